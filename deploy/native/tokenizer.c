#include "tokenizer.h"

#include <string.h>

#include "decoding.h"
#include "splitting.h"
#include "unicode.h"

static const char UNKNOWN[] = "\xEF\xBF\xBD"; /* U+FFFD */

struct tokenizer {
    const struct bpe *bpe;
    struct added_tokens added;
    const struct normalizer *normalizer;
    const struct pre_tokenizer *pre_tokenizer;
    struct ids before, behind; /* what stands around a text */
    struct decoding decoding;
    bool split_special; /* special tokens in a text are plain text */
};

/* Append the ids of a special token of a template. */
static void add_special(struct arena *keep, const struct json *special, const struct json *name, struct ids *ids,
                        const char *where) {
    const struct json *found = is_kind(name, JSON_TEXT) ? member(special, name->text) : NULL;
    const struct json *listed = need(keep, found, "ids", JSON_ARRAY, where);
    for (uint32_t i = 0; i < listed->count; i++)
        add_id(keep, ids, as_integer(keep, &listed->items[i], 0, INT32_MAX, where));
}

static void read_template(struct arena *keep, struct tokenizer *tokenizer, const struct json *value,
                          const char *where) {
    const struct json *parts = need(keep, value, "single", JSON_ARRAY, where);
    bool behind = false;
    for (uint32_t i = 0; i < parts->count; i++) {
        const struct json *special = member(&parts->items[i], "SpecialToken");
        const struct json *sequence = member(&parts->items[i], "Sequence");
        if (special) {
            add_special(keep, member(value, "special_tokens"), member(special, "id"),
                        behind ? &tokenizer->behind : &tokenizer->before, where);
        } else if (sequence && !behind) {
            behind = true;
        } else {
            fail(keep, NULL, "%s: a template that is not of one text", where);
        }
    }
    if (!behind) fail(keep, NULL, "%s: a template without a text", where);
}

static void read_post_processor(struct arena *keep, struct tokenizer *tokenizer, const struct json *value,
                                const char *where) {
    const struct json *type = member(value, "type");
    bool done = tokenizer->before.count || tokenizer->behind.count;
    if (is_nothing(value) || is_text(type, "ByteLevel")) return; /* only offsets change */
    if (is_text(type, "TemplateProcessing") && !done) {
        read_template(keep, tokenizer, value, where);
    } else if (is_text(type, "Sequence") && !done) {
        const struct json *parts = need(keep, value, "processors", JSON_ARRAY, where);
        for (uint32_t i = 0; i < parts->count; i++) {
            if (is_text(member(&parts->items[i], "type"), "Sequence"))
                fail(keep, NULL, "%s: a sequence in a sequence", where);
            read_post_processor(keep, tokenizer, &parts->items[i], where);
        }
    } else {
        fail(keep, "use the bundle's run.py", "%s: is of a kind that this program does not know: %s", where,
             is_kind(type, JSON_TEXT) ? type->text : "without a type");
    }
}

const struct tokenizer *read_tokenizer(struct arena *keep, struct arena *scratch, const char *folder) {
    const char *where = format(keep, "%s/tokenizer.json", folder);
    struct tokenizer *tokenizer = take(keep, 1, sizeof *tokenizer);
    const struct json *root = read_json(scratch, where), *model = need(scratch, root, "model", JSON_OBJECT, where);
    const struct json *type = member(model, "type");
    /* Files of before 2020 do not name the kind. */
    if (!is_text(type, "BPE") && !(is_nothing(type) && member(model, "merges")))
        fail(keep, "use the bundle's run.py", "%s: the model is %s, this program knows BPE", where,
             is_kind(type, JSON_TEXT) ? type->text : "of no known kind");
    tokenizer->bpe = read_bpe(keep, model, where);
    tokenizer->normalizer = read_normalizer(keep, member(root, "normalizer"), where);
    tokenizer->pre_tokenizer = read_pre_tokenizer(keep, member(root, "pre_tokenizer"), where);
    tokenizer->decoding = read_decoding(keep, member(root, "decoder"), where);
    read_post_processor(keep, tokenizer, member(root, "post_processor"), format(keep, "%s: post_processor", where));
    read_added_tokens(keep, scratch, root, folder, tokenizer->bpe, &tokenizer->added, where);
    for (size_t i = 0; i < tokenizer->added.count; i++) {
        struct added_token *token = &tokenizer->added.items[i];
        token->match = (struct bytes){(char *)token->text, token->bytes, 0};
        if (token->normalized) token->match = normalize(keep, tokenizer->normalizer, token->match);
    }
    index_added_tokens(keep, &tokenizer->added);
    tokenizer->split_special = split_by_config(scratch, folder);
    return tokenizer;
}

static void encode_plain(struct arena *scratch, const struct tokenizer *tokenizer, struct bytes text, bool begins,
                         struct ids *ids) {
    struct words words = split_words(scratch, tokenizer->pre_tokenizer, text, begins);
    for (size_t i = 0; i < words.count; i++) encode_word(scratch, tokenizer->bpe, words.items[i], ids);
}

/* Encode a text between added tokens: those that are looked for in it as it is, then those in its normal form. */
static void encode_between(struct arena *scratch, const struct tokenizer *tokenizer, struct bytes text,
                           bool split_special, bool normalized, bool begins, struct ids *ids) {
    if (normalized) text = normalize(scratch, tokenizer->normalizer, text);
    for (size_t at = 0, start, end; at < text.count; at = end) {
        const struct added_token *token =
            next_added(&tokenizer->added, normalized, split_special, text, at, &start, &end);
        if (!token) start = end = text.count;
        struct bytes part = {text.items + at, start - at, 0};
        if (part.count && normalized) encode_plain(scratch, tokenizer, part, begins && at == 0, ids);
        else if (part.count) encode_between(scratch, tokenizer, part, split_special, true, begins && at == 0, ids);
        if (token) add_id(scratch, ids, token->id);
    }
}

struct ids encode(struct arena *scratch, const struct tokenizer *tokenizer, struct bytes text, bool split_special) {
    struct ids ids = {0};
    for (size_t i = 0; i < tokenizer->before.count; i++) add_id(scratch, &ids, tokenizer->before.items[i]);
    encode_between(scratch, tokenizer, text, split_special || tokenizer->split_special, false, true, &ids);
    for (size_t i = 0; i < tokenizer->behind.count; i++) add_id(scratch, &ids, tokenizer->behind.items[i]);
    return ids;
}

/* How a token is written; nothing where it adds none to a text. */
static struct bytes name_of(const struct tokenizer *tokenizer, int64_t id) {
    const struct added_token *added = find_added(&tokenizer->added, id);
    if (added) return (struct bytes){added->special ? NULL : (char *)added->text, added->special ? 0 : added->bytes, 0};
    size_t bytes = 0;
    const char *text = token_text(tokenizer->bpe, id, &bytes);
    return (struct bytes){(char *)text, bytes, 0};
}

struct text_stream begin_text(const struct tokenizer *tokenizer, const int64_t *after, size_t count) {
    struct text_stream stream = {0};
    for (size_t i = 0; i < count && !stream.continues; i++)
        stream.continues = name_of(tokenizer, after[i]).items != NULL;
    stream.strip_left = stream.continues ? 0 : tokenizer->decoding.strip_count;
    return stream;
}

/* Append text, less what goes from a text's beginning. */
static void push_text(struct arena *scratch, const struct decoding *decoding, struct text_stream *stream,
                      const char *more, size_t count, struct bytes *text) {
    while (stream->strip_left && count) {
        if (count >= decoding->strip_bytes && !memcmp(more, decoding->strip, decoding->strip_bytes)) {
            more += decoding->strip_bytes;
            count -= decoding->strip_bytes;
            stream->strip_left--;
        } else {
            stream->strip_left = 0;
        }
    }
    add_bytes(scratch, text, more, count);
}

/* Bytes at the start of `held` that cannot begin a character, however it goes on; 0 where they may. */
static size_t wrong_bytes(const char *held, size_t count) {
    static const char fill[] = "\x80\x80\x80", high[] = "\xBF\xBF\xBF";
    size_t length = character_bytes((unsigned char)held[0]);
    if (!length) return 1;
    char whole[4];
    for (size_t known = count; known; known--) {
        /* Whether some ending makes the first `known` bytes a character. */
        memcpy(whole, held, known);
        if (known < length) memcpy(whole + known, fill, length - known);
        bool possible = known <= length && is_utf8(whole, length);
        if (known < length) memcpy(whole + known, high, length - known);
        possible = possible || (known <= length && is_utf8(whole, length));
        if (possible) return known == count ? 0 : known;
    }
    return 1;
}

static void push_unknown(struct arena *scratch, const struct decoding *decoding, struct text_stream *stream,
                         size_t times, struct bytes *text) {
    for (; times; times--) push_text(scratch, decoding, stream, UNKNOWN, sizeof UNKNOWN - 1, text);
}

/* One byte of a text that is bytes throughout, or of a run of bytes between characters: such a run is UTF-8 as a
 * whole, or each of its bytes is unknown. */
static void push_byte(struct arena *scratch, const struct decoding *decoding, struct text_stream *stream, char byte,
                      struct bytes *text) {
    if (stream->broken) {
        push_unknown(scratch, decoding, stream, 1, text);
        return;
    }
    stream->held[stream->num_held++] = byte;
    while (stream->num_held) {
        if (stream->num_held == character_bytes((unsigned char)stream->held[0]) &&
            is_utf8(stream->held, stream->num_held)) {
            push_text(scratch, decoding, stream, stream->held, stream->num_held, text);
            stream->num_held = 0;
            return;
        }
        size_t wrong = wrong_bytes(stream->held, stream->num_held);
        if (!wrong) return;
        if (!decoding->byte_level) {
            stream->broken = true;
            push_unknown(scratch, decoding, stream, stream->num_held, text);
            stream->num_held = 0;
            return;
        }
        push_unknown(scratch, decoding, stream, 1, text);
        stream->num_held -= wrong;
        memmove(stream->held, stream->held + wrong, stream->num_held);
    }
}

void push_token(struct arena *scratch, const struct tokenizer *tokenizer, struct text_stream *stream, int64_t id,
                struct bytes *text) {
    const struct decoding *decoding = &tokenizer->decoding;
    struct bytes name = name_of(tokenizer, id);
    bool byte;
    if (!name.items) return;
    struct bytes piece = decode_name(scratch, decoding, name, !stream->continues, &byte);
    stream->continues = true;
    if (byte) {
        for (size_t i = 0; i < piece.count; i++) push_byte(scratch, decoding, stream, piece.items[i], text);
        return;
    }
    push_unknown(scratch, decoding, stream, stream->num_held, text);
    stream->num_held = 0;
    stream->broken = false;
    push_text(scratch, decoding, stream, piece.items, piece.count, text);
}
