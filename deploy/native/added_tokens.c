#include "added_tokens.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "unicode.h"

#define MAX_ID ((int64_t)1 << 31)

static struct added_token *find_text(const struct added_tokens *tokens, const struct json *text) {
    for (size_t i = 0; i < tokens->count; i++)
        if (tokens->items[i].bytes == text->count && memcmp(tokens->items[i].text, text->text, text->count) == 0)
            return &tokens->items[i];
    return NULL;
}

const struct added_token *find_added(const struct added_tokens *tokens, int64_t id) {
    for (size_t i = 0; i < tokens->count; i++)
        if (tokens->items[i].id == id) return &tokens->items[i];
    return NULL;
}

/* The id of a new token: that of the ordinary one written so, or the next. */
static int64_t new_id(const struct added_tokens *tokens, const struct bpe *bpe, const struct json *text) {
    int64_t id = find_token(bpe, text->text, text->count), next = vocabulary_size(bpe);
    if (id >= 0) return id;
    for (size_t i = 0; i < tokens->count; i++)
        if (tokens->items[i].id >= next) next = tokens->items[i].id + 1;
    return next;
}

static struct added_token *add(struct arena *keep, struct added_tokens *tokens, const struct bpe *bpe,
                               const struct json *text) {
    if (tokens->count == tokens->room) {
        size_t room = tokens->room ? 2 * tokens->room : 64;
        struct added_token *items = take(keep, room, sizeof *items);
        if (tokens->count) memcpy(items, tokens->items, tokens->count * sizeof *items);
        tokens->items = items;
        tokens->room = room;
    }
    int64_t id = new_id(tokens, bpe, text);
    struct added_token *token = &tokens->items[tokens->count++];
    *token = (struct added_token){.text = take_text(keep, text->text, text->count), .bytes = text->count, .id = id};
    return token;
}

/* Set what a table says about a token; a token that is special is, unless told otherwise, looked for as it is. */
static void read_fields(struct arena *keep, const struct json *table, struct added_token *token, const char *where) {
    if (is_true(member(table, "single_word")))
        fail(keep, "use the bundle's run.py", "%s: token '%s' is one of single words, which this program does not know",
             where, token->text);
    token->special = is_true(member(table, "special"));
    token->strip_left = is_true(member(table, "lstrip"));
    token->strip_right = is_true(member(table, "rstrip"));
    const struct json *normalized = member(table, "normalized");
    token->normalized = is_nothing(normalized) ? !token->special : is_true(normalized);
}

/* The text of a token that a file names: a text, or a table with one. */
static const struct json *named_text(const struct json *value) {
    if (is_kind(value, JSON_OBJECT)) value = member(value, "content");
    return is_kind(value, JSON_TEXT) && value->count ? value : NULL;
}

static void make_special(struct arena *keep, struct added_tokens *tokens, const struct bpe *bpe,
                         const struct json *value, bool always) {
    const struct json *text = named_text(value);
    if (!text) return;
    struct added_token *token = find_text(tokens, text);
    if (!token) {
        add(keep, tokens, bpe, text)->special = true;
    } else if (always) {
        token->special = true;
    }
}

static bool ends_with(const struct json *text, const char *end) {
    size_t length = strlen(end);
    return text->count >= length && memcmp(text->text + text->count - length, end, length) == 0;
}

/* What tokenizer_config.json and files like it say; `folder` reads the same in Python. */
static void apply_config(struct arena *keep, struct added_tokens *tokens, const struct bpe *bpe,
                         const struct json *const *files, size_t num_files) {
    const struct json *extra[2] = {NULL, NULL};
    /* Tables come before lists, so that a name counts whatever a list says. */
    for (size_t f = 0; f < num_files; f++) {
        for (uint32_t i = 0; i + 1 < files[f]->count; i += 2) {
            const struct json *key = &files[f]->items[i], *value = &files[f]->items[i + 1];
            /* A key of a later file takes the place of an earlier one's. */
            if (!ends_with(key, "_token") || (f + 1 < num_files && member(files[f + 1], key->text))) continue;
            make_special(keep, tokens, bpe, value, true);
        }
        const struct json *value = member(files[f], "extra_special_tokens");
        if (value) extra[0] = value;
        value = member(files[f], "additional_special_tokens");
        if (value) extra[1] = value;
    }
    const struct json *listed = extra[0] && extra[0]->count ? extra[0] : extra[1];
    if (is_kind(listed, JSON_OBJECT))
        for (uint32_t i = 1; i < listed->count; i += 2) make_special(keep, tokens, bpe, &listed->items[i], true);
    if (is_kind(listed, JSON_ARRAY))
        for (uint32_t i = 0; i < listed->count; i++) make_special(keep, tokens, bpe, &listed->items[i], false);
}

static const struct json *read_table(struct arena *scratch, const char *folder, const char *name) {
    const char *path = format(scratch, "%s/%s", folder, name);
    struct stat about;
    if (stat(path, &about)) return NULL;
    const struct json *table = read_json(scratch, path);
    if (!is_kind(table, JSON_OBJECT)) fail(scratch, NULL, "%s: expected a JSON table", path);
    return table;
}

struct numbered {
    int64_t id;
    const struct json *table;
};

static int compare_numbers(const void *a, const void *b) {
    int64_t x = ((const struct numbered *)a)->id, y = ((const struct numbered *)b)->id;
    return (x > y) - (x < y);
}

/* `added_tokens_decoder`: tables of tokens by their ids. */
static void apply_listed(struct arena *keep, struct arena *scratch, struct added_tokens *tokens, const struct bpe *bpe,
                         const struct json *listed, const char *where) {
    if (!is_kind(listed, JSON_OBJECT)) fail(scratch, NULL, "%s: added_tokens_decoder: expected a table", where);
    size_t count = listed->count / 2;
    struct numbered *sorted = take(scratch, count, sizeof *sorted);
    for (size_t i = 0; i < count; i++) {
        char *end;
        sorted[i] = (struct numbered){strtoll(listed->items[2 * i].text, &end, 10), &listed->items[2 * i + 1]};
        if (*end) fail(scratch, NULL, "%s: added_tokens_decoder: '%s' is no id", where, listed->items[2 * i].text);
    }
    if (count) qsort(sorted, count, sizeof *sorted, compare_numbers);
    for (size_t i = 0; i < count; i++) {
        const struct json *text = need(scratch, sorted[i].table, "content", JSON_TEXT, where);
        if (!text->count) continue;
        struct added_token *token = find_text(tokens, text);
        read_fields(keep, sorted[i].table, token ? token : add(keep, tokens, bpe, text), where);
    }
}

void read_added_tokens(struct arena *keep, struct arena *scratch, const struct json *root, const char *folder,
                       const struct bpe *bpe, struct added_tokens *tokens, const char *where) {
    const struct json *listed = member(root, "added_tokens");
    where = format(scratch, "%s: added_tokens", where);
    if (!is_nothing(listed) && !is_kind(listed, JSON_ARRAY)) fail(scratch, NULL, "%s: expected a list", where);
    for (uint32_t i = 0; is_kind(listed, JSON_ARRAY) && i < listed->count; i++) {
        const struct json *table = &listed->items[i], *text = need(scratch, table, "content", JSON_TEXT, where);
        int64_t id = need_integer(scratch, table, "id", 0, MAX_ID, where);
        if (!text->count) continue;
        struct added_token *token = find_text(tokens, text);
        if (!token) token = add(keep, tokens, bpe, text);
        if (find_token(bpe, text->text, text->count) < 0) token->id = id;
        read_fields(keep, table, token, where);
    }
    const struct json *files[2];
    size_t num_files = 0;
    const struct json *config = read_table(scratch, folder, "tokenizer_config.json"), *more = NULL;
    if (config) files[num_files++] = config;
    if (!member(config, "added_tokens_decoder")) more = read_table(scratch, folder, "special_tokens_map.json");
    else apply_listed(keep, scratch, tokens, bpe, member(config, "added_tokens_decoder"), "tokenizer_config.json");
    if (more) files[num_files++] = more;
    apply_config(keep, tokens, bpe, files, num_files);
}

bool split_by_config(struct arena *scratch, const char *folder) {
    return is_true(member(read_table(scratch, folder, "tokenizer_config.json"), "split_special_tokens"));
}

static int compare_matches(const void *a, const void *b) {
    const struct added_token *x = *(const struct added_token *const *)a, *y = *(const struct added_token *const *)b;
    unsigned char p = (unsigned char)x->match.items[0], q = (unsigned char)y->match.items[0];
    if (p != q) return p < q ? -1 : 1;
    return (x->match.count < y->match.count) - (x->match.count > y->match.count);
}

void index_added_tokens(struct arena *keep, struct added_tokens *tokens) {
    for (int normalized = 0; normalized < 2; normalized++) {
        const struct added_token **sorted = take(keep, tokens->count + 1, sizeof *sorted);
        size_t count = 0;
        for (size_t i = 0; i < tokens->count; i++)
            if (tokens->items[i].normalized == (normalized == 1) && tokens->items[i].match.count)
                sorted[count++] = &tokens->items[i];
        if (!count) continue;
        qsort(sorted, count, sizeof *sorted, compare_matches);
        /* A group for each first byte, with NULL behind it. */
        const struct added_token **groups = take(keep, 2 * count + 1, sizeof *groups);
        for (size_t i = 0, at = 0; i < count; i++) {
            unsigned char first = (unsigned char)sorted[i]->match.items[0];
            if (i && first != (unsigned char)sorted[i - 1]->match.items[0]) at++;
            if (!tokens->by_byte[normalized][first]) tokens->by_byte[normalized][first] = groups + at;
            groups[at++] = sorted[i];
        }
    }
}

static size_t skip_spaces_back(struct bytes text, size_t at, size_t stop) {
    while (at > stop) {
        size_t before = at - 1;
        uint32_t c;
        while (before > stop && ((unsigned char)text.items[before] & 0xC0) == 0x80) before--;
        read_character(text.items + before, &c);
        if (!is_space(c)) break;
        at = before;
    }
    return at;
}

static size_t skip_spaces(struct bytes text, size_t at) {
    while (at < text.count) {
        uint32_t c;
        size_t length = read_character(text.items + at, &c);
        if (!is_space(c)) break;
        at += length;
    }
    return at;
}

const struct added_token *next_added(const struct added_tokens *tokens, bool normalized, bool split_special,
                                     struct bytes text, size_t from, size_t *start, size_t *end) {
    for (size_t at = from; at < text.count; at++) {
        const struct added_token **group = tokens->by_byte[normalized][(unsigned char)text.items[at]], *found = NULL;
        for (; group && *group && !found; group++)
            if ((*group)->match.count <= text.count - at &&
                !memcmp(text.items + at, (*group)->match.items, (*group)->match.count))
                found = *group;
        if (!found) continue;
        if (split_special && found->special) {
            at += found->match.count - 1;
            continue;
        }
        *start = found->strip_left ? skip_spaces_back(text, at, from) : at;
        *end = found->strip_right ? skip_spaces(text, at + found->match.count) : at + found->match.count;
        return found;
    }
    return NULL;
}
