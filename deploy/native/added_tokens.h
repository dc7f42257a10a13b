/* Tokens that are found in a text before anything else is done to it, as they are written. */
#ifndef ADDED_TOKENS_H
#define ADDED_TOKENS_H

#include "bpe.h"

struct added_token {
    const char *text;
    size_t bytes;
    int64_t id;
    bool special, strip_left, strip_right, normalized;
    struct bytes match; /* what is looked for: the text, or its normal form */
};

struct added_tokens {
    struct added_token *items;
    size_t count, room;
    /* By first byte, in the text as it is [0] and in its normal form [1], longest first; NULL at the end. */
    const struct added_token **by_byte[2][256];
};

/* Those of tokenizer.json, and what stands beside it in the bundle: a name, or a list, makes tokens special. */
void read_added_tokens(struct arena *keep, struct arena *scratch, const struct json *root, const char *folder,
                       const struct bpe *bpe, struct added_tokens *tokens, const char *where);
/* Whether tokenizer_config.json makes special tokens in a text plain text. */
bool split_by_config(struct arena *scratch, const char *folder);
/* Prepare the search, once `match` of each token is known. */
void index_added_tokens(struct arena *keep, struct added_tokens *tokens);
/* NULL where no added token has this id. */
const struct added_token *find_added(const struct added_tokens *tokens, int64_t id);

/* The next one at or behind `from`, with the spaces that it takes; NULL where none comes. */
const struct added_token *next_added(const struct added_tokens *tokens, bool normalized, bool split_special,
                                     struct bytes text, size_t from, size_t *start, size_t *end);

#endif
