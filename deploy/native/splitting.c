#include "splitting.h"

#include <string.h>

#include "regex.h"
#include "unicode.h"

/* What ByteLevel cuts by where it cuts, from GPT-2. */
static const char GPT2_PATTERN[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

enum normalizer_kind { PREPEND, REPLACE, NFC };

struct normalizer {
    enum normalizer_kind kind;
    const struct json *from, *to;
    const struct normalizer *next;
};

enum pre_tokenizer_kind { SPLIT, DIGITS, PUNCTUATION, BYTE_LEVEL, METASPACE };
enum behavior { REMOVED, ISOLATED, CONTIGUOUS, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT };
enum prepend { NEVER, FIRST, ALWAYS };

struct pre_tokenizer {
    enum pre_tokenizer_kind kind;
    enum behavior behavior;
    const struct regex *regex; /* NULL: by the text, or by characters */
    const struct json *text;
    bool invert, split, prefix_space;
    enum prepend prepend;
    const struct pre_tokenizer *next;
};

/* A copy that outlives the file it was read from. */
static const struct json *keep_text(struct arena *arena, const struct json *text) {
    struct json *kept = take(arena, 1, sizeof *kept);
    *kept = *text;
    kept->text = take_text(arena, text->text, text->count);
    return kept;
}

static _Noreturn void refuse(struct arena *arena, const char *where, const struct json *type) {
    fail(arena, "use the bundle's run.py", "%s: is of a kind that this program does not know: %s", where,
         is_kind(type, JSON_TEXT) ? type->text : "without a type");
}

static void add_normalizers(struct arena *arena, const struct normalizer ***behind, const struct json *value,
                            const char *where, int depth) {
    const struct json *type = member(value, "type");
    if (is_text(type, "Sequence") && depth < 8) {
        const struct json *parts = need(arena, value, "normalizers", JSON_ARRAY, where);
        for (uint32_t i = 0; i < parts->count; i++) add_normalizers(arena, behind, &parts->items[i], where, depth + 1);
        return;
    }
    struct normalizer *made = take(arena, 1, sizeof *made);
    if (is_text(type, "Prepend")) {
        made->kind = PREPEND;
        made->to = keep_text(arena, need(arena, value, "prepend", JSON_TEXT, where));
    } else if (is_text(type, "Replace") && is_kind(member(member(value, "pattern"), "String"), JSON_TEXT)) {
        made->kind = REPLACE;
        made->from = keep_text(arena, member(member(value, "pattern"), "String"));
        made->to = keep_text(arena, need(arena, value, "content", JSON_TEXT, where));
    } else if (is_text(type, "NFC")) {
        made->kind = NFC;
    } else {
        refuse(arena, where, type);
    }
    **behind = made;
    *behind = &made->next;
}

const struct normalizer *read_normalizer(struct arena *arena, const struct json *value, const char *where) {
    const struct normalizer *first = NULL, **behind = &first;
    if (!is_nothing(value)) add_normalizers(arena, &behind, value, format(arena, "%s: normalizer", where), 0);
    return first;
}

static enum behavior read_behavior(struct arena *arena, const struct json *value, const char *where) {
    static const char *const names[] = {"Removed", "Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext"};
    for (int i = 0; i <= MERGED_WITH_NEXT; i++)
        if (is_text(member(value, "behavior"), names[i])) return (enum behavior)i;
    fail(arena, NULL, "%s: has no behavior that is known", where);
}

static void read_split(struct arena *arena, struct pre_tokenizer *made, const struct json *value, const char *where) {
    const struct json *pattern = member(value, "pattern"), *text;
    made->kind = SPLIT;
    made->behavior = read_behavior(arena, value, where);
    made->invert = is_true(member(value, "invert"));
    if (is_kind(text = member(pattern, "Regex"), JSON_TEXT)) {
        made->regex = compile_regex(arena, text->text, text->count, where);
    } else if (is_kind(text = member(pattern, "String"), JSON_TEXT) && text->count) {
        made->text = keep_text(arena, text);
    } else {
        fail(arena, NULL, "%s: a split without a pattern", where);
    }
}

static void read_metaspace(struct arena *arena, struct pre_tokenizer *made, const struct json *value,
                           const char *where) {
    const struct json *scheme = member(value, "prepend_scheme"), *split = member(value, "split");
    made->kind = METASPACE;
    made->behavior = MERGED_WITH_NEXT;
    made->text = keep_text(arena, need(arena, value, "replacement", JSON_TEXT, where));
    made->split = is_nothing(split) || is_true(split);
    /* Files of before 2024 have add_prefix_space instead. */
    const struct json *older = member(value, "add_prefix_space");
    made->prepend = is_text(scheme, "never") ? NEVER : is_text(scheme, "first") ? FIRST : ALWAYS;
    if (is_nothing(scheme) && is_kind(older, JSON_FALSE)) made->prepend = NEVER;
}

static void add_pre_tokenizers(struct arena *arena, const struct pre_tokenizer ***behind, const struct json *value,
                               const char *where, int depth) {
    const struct json *type = member(value, "type");
    if (is_text(type, "Sequence") && depth < 8) {
        const struct json *parts = need(arena, value, "pretokenizers", JSON_ARRAY, where);
        for (uint32_t i = 0; i < parts->count; i++)
            add_pre_tokenizers(arena, behind, &parts->items[i], where, depth + 1);
        return;
    }
    struct pre_tokenizer *made = take(arena, 1, sizeof *made);
    if (is_text(type, "Split")) {
        read_split(arena, made, value, where);
    } else if (is_text(type, "Digits")) {
        made->kind = DIGITS;
        made->behavior = is_true(member(value, "individual_digits")) ? ISOLATED : CONTIGUOUS;
    } else if (is_text(type, "Punctuation")) {
        made->kind = PUNCTUATION;
        made->behavior = is_nothing(member(value, "behavior")) ? ISOLATED : read_behavior(arena, value, where);
    } else if (is_text(type, "ByteLevel")) {
        const struct json *use_regex = member(value, "use_regex");
        made->kind = BYTE_LEVEL;
        made->behavior = ISOLATED;
        made->prefix_space = is_true(need(arena, value, "add_prefix_space", JSON_TRUE, where));
        if (is_nothing(use_regex) || is_true(use_regex))
            made->regex = compile_regex(arena, GPT2_PATTERN, sizeof GPT2_PATTERN - 1, where);
    } else if (is_text(type, "Metaspace")) {
        read_metaspace(arena, made, value, where);
    } else {
        refuse(arena, where, type);
    }
    **behind = made;
    *behind = &made->next;
}

const struct pre_tokenizer *read_pre_tokenizer(struct arena *arena, const struct json *value, const char *where) {
    const struct pre_tokenizer *first = NULL, **behind = &first;
    if (!is_nothing(value)) add_pre_tokenizers(arena, &behind, value, format(arena, "%s: pre_tokenizer", where), 0);
    return first;
}

struct bytes replace_text(struct arena *arena, struct bytes text, const struct json *from, const struct json *to) {
    struct bytes result = {0};
    size_t kept = 0;
    if (!from->count) return text;
    for (size_t at = 0; at + from->count <= text.count;) {
        if (memcmp(text.items + at, from->text, from->count) != 0) {
            at++;
            continue;
        }
        add_bytes(arena, &result, text.items + kept, at - kept);
        add_bytes(arena, &result, to->text, to->count);
        kept = at += from->count;
    }
    if (!kept) return text;
    add_bytes(arena, &result, text.items + kept, text.count - kept);
    return result;
}

static struct bytes prepend(struct arena *arena, struct bytes text, const char *what, size_t bytes) {
    struct bytes result = {0};
    add_bytes(arena, &result, what, bytes);
    add_bytes(arena, &result, text.items, text.count);
    return result;
}

struct bytes normalize(struct arena *arena, const struct normalizer *normalizer, struct bytes text) {
    for (; normalizer; normalizer = normalizer->next) {
        if (normalizer->kind == NFC) text = normalize_nfc(arena, text);
        else if (normalizer->kind == REPLACE) text = replace_text(arena, text, normalizer->from, normalizer->to);
        else if (text.count) text = prepend(arena, text, normalizer->to->text, normalizer->to->count);
    }
    return text;
}

static void add_word(struct arena *arena, struct words *words, struct bytes word) {
    if (!word.count) return;
    if (words->count == words->room) {
        size_t room = words->room ? 2 * words->room : 64;
        struct bytes *items = take(arena, room, sizeof *items);
        if (words->count) memcpy(items, words->items, words->count * sizeof *items);
        words->items = items;
        words->room = room;
    }
    words->items[words->count++] = word;
}

/* The first thing to cut by at or behind `from`. */
static bool find_cut(struct arena *arena, const struct pre_tokenizer *p, struct bytes text, size_t from, size_t *start,
                     size_t *end) {
    if (p->regex) return find_match(arena, p->regex, text, from, start, end);
    for (size_t at = from; at < text.count;) {
        uint32_t c;
        size_t length = read_character(text.items + at, &c);
        bool found;
        enum category category = category_of(c);
        if (p->kind == DIGITS) {
            found = category == ND || category == NL || category == NO;
        } else if (p->kind == PUNCTUATION) {
            found = (category >= PC && category <= PO) || (c < 0x80 && category >= SM && category <= SO);
        } else {
            found = p->text->count <= text.count - at && !memcmp(text.items + at, p->text->text, p->text->count);
            if (found) length = p->text->count;
        }
        if (found) {
            *start = at;
            *end = at + length;
            return true;
        }
        at += length;
    }
    return false;
}

struct fragment {
    size_t start, end;
    bool match;
};

/* Cut a text at all matches; each behavior says to which side a match goes. */
static void cut(struct arena *arena, const struct pre_tokenizer *p, struct bytes text, struct words *words) {
    struct fragment *fragments = NULL;
    size_t count = 0, room = 0, at = 0, start, end;
    bool more = true;
    while (at < text.count) {
        more = more && find_cut(arena, p, text, at, &start, &end);
        if (!more) start = end = text.count;
        if (count + 2 > room) {
            struct fragment *grown = take(arena, 2 * room + 64, sizeof *grown);
            if (count) memcpy(grown, fragments, count * sizeof *grown);
            fragments = grown;
            room = 2 * room + 64;
        }
        if (start > at) fragments[count++] = (struct fragment){at, start, p->invert};
        if (end > start) fragments[count++] = (struct fragment){start, end, !p->invert};
        at = end;
    }
    for (size_t i = 0; i < count;) {
        size_t last = i;
        if (p->behavior == CONTIGUOUS)
            while (last + 1 < count && fragments[last + 1].match == fragments[i].match) last++;
        if (p->behavior == MERGED_WITH_PREVIOUS && !fragments[i].match && i + 1 < count && fragments[i + 1].match)
            last++;
        if (p->behavior == MERGED_WITH_NEXT && fragments[i].match && i + 1 < count && !fragments[i + 1].match) last++;
        if (p->behavior != REMOVED || !fragments[i].match)
            add_word(arena, words,
                     (struct bytes){text.items + fragments[i].start, fragments[last].end - fragments[i].start, 0});
        i = last + 1;
    }
}

uint32_t character_of_byte(unsigned char byte) {
    static const struct {
        unsigned char first, last;
    } others[] = {{0x00, 0x20}, {0x7F, 0xA0}, {0xAD, 0xAD}};
    uint32_t next = 0x100;
    for (int i = 0; i < 3; i++) {
        if (byte >= others[i].first && byte <= others[i].last) return next + byte - others[i].first;
        next += (uint32_t)(others[i].last - others[i].first + 1);
    }
    return byte;
}

int byte_of_character(uint32_t character) {
    if (character >= 0x144) return -1;
    for (int byte = 0; byte < 256; byte++)
        if (character_of_byte((unsigned char)byte) == character) return byte;
    return -1;
}

static struct bytes write_bytes(struct arena *arena, struct bytes text) {
    struct bytes result = {take(arena, 2 * text.count + 1, 1), 0, 2 * text.count};
    for (size_t i = 0; i < text.count; i++)
        result.count += write_character(result.items + result.count, character_of_byte((unsigned char)text.items[i]));
    return result;
}

static void apply(struct arena *arena, const struct pre_tokenizer *p, struct bytes text, bool begins,
                  struct words *words) {
    if (p->kind == METASPACE) {
        static const struct json space = {.kind = JSON_TEXT, .count = 1, .text = " "};
        text = replace_text(arena, text, &space, p->text);
        bool there = text.count >= p->text->count && !memcmp(text.items, p->text->text, p->text->count);
        if (!there && (p->prepend == ALWAYS || (p->prepend == FIRST && begins)))
            text = prepend(arena, text, p->text->text, p->text->count);
        if (!p->split) {
            add_word(arena, words, text);
            return;
        }
    } else if (p->kind == BYTE_LEVEL) {
        if (p->prefix_space && text.count && text.items[0] != ' ') text = prepend(arena, text, " ", 1);
        size_t first = words->count;
        if (p->regex) cut(arena, p, text, words);
        else add_word(arena, words, text);
        for (size_t i = first; i < words->count; i++) words->items[i] = write_bytes(arena, words->items[i]);
        return;
    }
    cut(arena, p, text, words);
}

struct words split_words(struct arena *arena, const struct pre_tokenizer *pre_tokenizer, struct bytes text,
                         bool begins) {
    struct words words = {0};
    add_word(arena, &words, text);
    for (; pre_tokenizer; pre_tokenizer = pre_tokenizer->next) {
        struct words before = words;
        words = (struct words){0};
        for (size_t i = 0; i < before.count; i++)
            apply(arena, pre_tokenizer, before.items[i], begins && i == 0, &words);
    }
    return words;
}
