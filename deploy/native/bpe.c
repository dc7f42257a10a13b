#include "bpe.h"

#include <string.h>

#include "unicode.h"

#define MAX_ID ((int64_t)1 << 22)
#define NONE UINT32_MAX

struct token {
    const char *text; /* NULL where no token has this id */
    uint32_t bytes;
};

struct merge {
    uint32_t left, right, rank, made;
};

struct bpe {
    struct token *tokens;
    int64_t num_ids, num_tokens;
    uint32_t *slots;      /* ids by the hash of their text */
    struct merge *merges; /* by the hash of the pair */
    size_t slot_mask, merge_mask;
    int64_t byte_ids[256]; /* of <0x00> to <0xFF>, -1 where there is none */
    int64_t unknown;       /* -1: what is unknown is left out */
    bool byte_fallback, fuse_unknown, ignore_merges;
};

static size_t hash_text(const char *text, size_t bytes) {
    uint64_t hash = 0xcbf29ce484222325; /* FNV-1a */
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ (unsigned char)text[i]) * 0x100000001b3;
    return (size_t)(hash ^ hash >> 29);
}

static size_t hash_pair(uint32_t left, uint32_t right) {
    uint64_t hash = ((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15;
    return (size_t)(hash ^ hash >> 31);
}

/* A power of two, so large that at most half of it is used. */
static size_t table_size(size_t count) {
    size_t size = 16;
    while (size < 2 * count) size *= 2;
    return size;
}

static uint32_t *find_slot(const struct bpe *bpe, const char *text, size_t bytes) {
    for (size_t at = hash_text(text, bytes) & bpe->slot_mask;; at = (at + 1) & bpe->slot_mask) {
        uint32_t *slot = &bpe->slots[at];
        if (*slot == NONE) return slot;
        const struct token *token = &bpe->tokens[*slot];
        if (token->bytes == bytes && memcmp(token->text, text, bytes) == 0) return slot;
    }
}

int64_t find_token(const struct bpe *bpe, const char *text, size_t bytes) {
    uint32_t id = *find_slot(bpe, text, bytes);
    return id == NONE ? -1 : (int64_t)id;
}

const char *token_text(const struct bpe *bpe, int64_t id, size_t *bytes) {
    if (id < 0 || id >= bpe->num_ids || !bpe->tokens[id].text) return NULL;
    *bytes = bpe->tokens[id].bytes;
    return bpe->tokens[id].text;
}

int64_t vocabulary_size(const struct bpe *bpe) { return bpe->num_tokens; }

static struct merge *find_merge(const struct bpe *bpe, uint32_t left, uint32_t right) {
    for (size_t at = hash_pair(left, right) & bpe->merge_mask;; at = (at + 1) & bpe->merge_mask) {
        struct merge *merge = &bpe->merges[at];
        if (merge->left == NONE || (merge->left == left && merge->right == right)) return merge;
    }
}

static void read_vocabulary(struct arena *arena, struct bpe *bpe, const struct json *vocabulary, const char *where) {
    size_t text_bytes = 0;
    for (uint32_t i = 0; i < vocabulary->count; i += 2) {
        int64_t id = as_integer(arena, &vocabulary->items[i + 1], 0, MAX_ID, where);
        if (id >= bpe->num_ids) bpe->num_ids = id + 1;
        text_bytes += vocabulary->items[i].count;
    }
    bpe->tokens = take(arena, (size_t)bpe->num_ids, sizeof *bpe->tokens);
    bpe->slot_mask = table_size(vocabulary->count / 2) - 1;
    bpe->slots = take(arena, bpe->slot_mask + 1, sizeof *bpe->slots);
    memset(bpe->slots, 0xFF, (bpe->slot_mask + 1) * sizeof *bpe->slots);
    char *texts = take(arena, text_bytes + 1, 1);
    for (uint32_t i = 0; i < vocabulary->count; i += 2) {
        const struct json *text = &vocabulary->items[i];
        int64_t id = (int64_t)vocabulary->items[i + 1].number;
        if (bpe->tokens[id].text) fail(arena, NULL, "%s: token %lld comes twice", where, (long long)id);
        memcpy(texts, text->text, text->count);
        uint32_t *slot = find_slot(bpe, texts, text->count);
        if (*slot != NONE)
            fail(arena, NULL, "%s: a text is that of two tokens, %u and %lld", where, *slot, (long long)id);
        bpe->tokens[id] = (struct token){texts, text->count};
        *slot = (uint32_t)id;
        texts += text->count;
    }
    bpe->num_tokens = vocabulary->count / 2;
}

/* The two texts of a merge: "a b", or ["a", "b"]. */
static bool read_pair(const struct json *merge, struct bytes *left, struct bytes *right) {
    if (is_kind(merge, JSON_ARRAY) && merge->count == 2) {
        const struct json *a = &merge->items[0], *b = &merge->items[1];
        if (!is_kind(a, JSON_TEXT) || !is_kind(b, JSON_TEXT)) return false;
        *left = (struct bytes){(char *)a->text, a->count, 0};
        *right = (struct bytes){(char *)b->text, b->count, 0};
        return true;
    }
    const char *space = is_kind(merge, JSON_TEXT) ? memchr(merge->text, ' ', merge->count) : NULL;
    if (!space) return false;
    *left = (struct bytes){(char *)merge->text, (size_t)(space - merge->text), 0};
    *right = (struct bytes){(char *)space + 1, merge->count - left->count - 1, 0};
    return !memchr(right->items, ' ', right->count);
}

static void read_merges(struct arena *arena, struct bpe *bpe, const struct json *merges, const char *where) {
    bpe->merge_mask = table_size(merges->count) - 1;
    bpe->merges = take(arena, bpe->merge_mask + 1, sizeof *bpe->merges);
    for (size_t i = 0; i <= bpe->merge_mask; i++) bpe->merges[i].left = NONE;
    for (uint32_t rank = 0; rank < merges->count; rank++) {
        struct bytes left, right;
        char both[1024];
        if (!read_pair(&merges->items[rank], &left, &right) || left.count + right.count > sizeof both)
            fail(arena, NULL, "%s: merge %u is no pair of texts", where, rank + 1);
        memcpy(both, left.items, left.count);
        memcpy(both + left.count, right.items, right.count);
        int64_t ids[3] = {find_token(bpe, left.items, left.count), find_token(bpe, right.items, right.count),
                          find_token(bpe, both, left.count + right.count)};
        if (ids[0] < 0 || ids[1] < 0 || ids[2] < 0) fail(arena, NULL, "%s: merge %u is of no token", where, rank + 1);
        *find_merge(bpe, (uint32_t)ids[0], (uint32_t)ids[1]) =
            (struct merge){(uint32_t)ids[0], (uint32_t)ids[1], rank, (uint32_t)ids[2]};
    }
}

const struct bpe *read_bpe(struct arena *arena, const struct json *model, const char *where) {
    static const char *const unused[] = {"continuing_subword_prefix", "end_of_word_suffix", "dropout"};
    for (size_t i = 0; i < sizeof unused / sizeof *unused; i++) {
        const struct json *value = member(model, unused[i]);
        if (!is_nothing(value) && !is_text(value, "") && !(is_kind(value, JSON_NUMBER) && value->number == 0))
            fail(arena, "use the bundle's run.py", "%s: the model has a %s, which this program does not know", where,
                 unused[i]);
    }
    struct bpe *bpe = take(arena, 1, sizeof *bpe);
    where = format(arena, "%s: model", where);
    read_vocabulary(arena, bpe, need(arena, model, "vocab", JSON_OBJECT, where), where);
    read_merges(arena, bpe, need(arena, model, "merges", JSON_ARRAY, where), where);
    bpe->byte_fallback = is_true(member(model, "byte_fallback"));
    bpe->fuse_unknown = is_true(member(model, "fuse_unk"));
    bpe->ignore_merges = is_true(member(model, "ignore_merges"));
    bpe->unknown = -1;
    const struct json *unknown = member(model, "unk_token");
    if (is_kind(unknown, JSON_TEXT) && (bpe->unknown = find_token(bpe, unknown->text, unknown->count)) < 0)
        fail(arena, NULL, "%s: unk_token is no token", where);
    for (int byte = 0; byte < 256; byte++) {
        const char *digits = "0123456789ABCDEF";
        char name[6] = {'<', '0', 'x', digits[byte / 16], digits[byte % 16], '>'};
        bpe->byte_ids[byte] = find_token(bpe, name, sizeof name);
    }
    return bpe;
}

/* A word on its way: symbols in a row, and a heap of the pairs that may become one, the first in rank on top. */
struct symbol {
    uint32_t id;
    int32_t before, behind; /* -1 at the ends */
    bool gone;
};

struct candidate {
    uint32_t rank, made;
    int32_t at;
};

struct word {
    struct symbol *symbols;
    struct candidate *heap;
    size_t num_symbols, num_candidates;
};

static bool comes_before(struct candidate a, struct candidate b) {
    return a.rank < b.rank || (a.rank == b.rank && a.at < b.at);
}

static void push_candidate(const struct bpe *bpe, struct word *word, int32_t at) {
    if (at < 0 || word->symbols[at].behind < 0) return;
    const struct merge *merge = find_merge(bpe, word->symbols[at].id, word->symbols[word->symbols[at].behind].id);
    if (merge->left == NONE) return;
    struct candidate added = {merge->rank, merge->made, at};
    size_t i = word->num_candidates++;
    for (; i && comes_before(added, word->heap[(i - 1) / 2]); i = (i - 1) / 2) word->heap[i] = word->heap[(i - 1) / 2];
    word->heap[i] = added;
}

static struct candidate pop_candidate(struct word *word) {
    struct candidate top = word->heap[0], last = word->heap[--word->num_candidates];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < word->num_candidates; i = child) {
        if (child + 1 < word->num_candidates && comes_before(word->heap[child + 1], word->heap[child])) child++;
        if (!comes_before(word->heap[child], last)) break;
        word->heap[i] = word->heap[child];
    }
    word->heap[i] = last;
    return top;
}

static void merge_symbols(const struct bpe *bpe, struct word *word) {
    for (size_t i = 0; i + 1 < word->num_symbols; i++) push_candidate(bpe, word, (int32_t)i);
    while (word->num_candidates) {
        struct candidate best = pop_candidate(word);
        struct symbol *left = &word->symbols[best.at];
        if (left->gone || left->behind < 0) continue;
        struct symbol *right = &word->symbols[left->behind];
        /* One of the two may have become another since. */
        const struct merge *merge = find_merge(bpe, left->id, right->id);
        if (merge->left == NONE || merge->made != best.made) continue;
        left->id = best.made;
        left->behind = right->behind;
        right->gone = true;
        if (left->behind >= 0) word->symbols[left->behind].before = best.at;
        push_candidate(bpe, word, left->before);
        push_candidate(bpe, word, best.at);
    }
}

static void add_symbol(struct word *word, int64_t id) {
    int32_t at = (int32_t)word->num_symbols++;
    word->symbols[at] = (struct symbol){(uint32_t)id, at - 1, -1, false};
    if (at) word->symbols[at - 1].behind = at;
}

/* The tokens of single characters, or of their bytes; `unknown` is one that waits to be fused with its like. */
static void split_characters(const struct bpe *bpe, struct word *word, struct bytes text) {
    bool unknown = false;
    for (size_t at = 0, length; at < text.count; at += length) {
        length = character_bytes((unsigned char)text.items[at]);
        int64_t id = find_token(bpe, text.items + at, length);
        if (id >= 0) {
            if (unknown) add_symbol(word, bpe->unknown);
            unknown = false;
            add_symbol(word, id);
            continue;
        }
        bool as_bytes = bpe->byte_fallback;
        for (size_t i = 0; i < length; i++)
            as_bytes = as_bytes && bpe->byte_ids[(unsigned char)text.items[at + i]] >= 0;
        if (as_bytes) {
            for (size_t i = 0; i < length; i++) add_symbol(word, bpe->byte_ids[(unsigned char)text.items[at + i]]);
        } else if (bpe->unknown >= 0) {
            if (unknown && !bpe->fuse_unknown) add_symbol(word, bpe->unknown);
            unknown = true;
        }
    }
    if (unknown) add_symbol(word, bpe->unknown);
}

void encode_word(struct arena *arena, const struct bpe *bpe, struct bytes text, struct ids *ids) {
    int64_t whole = bpe->ignore_merges ? find_token(bpe, text.items, text.count) : -1;
    if (whole >= 0) {
        add_id(arena, ids, whole);
        return;
    }
    if (text.count > INT32_MAX / 4) fail(arena, NULL, "the prompt: a word of %zu bytes is too long", text.count);
    struct word word = {0};
    word.symbols = take(arena, text.count, sizeof *word.symbols);
    split_characters(bpe, &word, text);
    /* A pair for each neighbour, and two for each merge. */
    word.heap = take(arena, 3 * word.num_symbols, sizeof *word.heap);
    merge_symbols(bpe, &word);
    for (size_t i = 0; i < word.num_symbols; i++)
        if (!word.symbols[i].gone) add_id(arena, ids, word.symbols[i].id);
}
