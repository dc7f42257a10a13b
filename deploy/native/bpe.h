/* Byte-pair encoding: a vocabulary, and which two tokens become one, in which order. */
#ifndef BPE_H
#define BPE_H

#include "json.h"

struct bpe;

/* Read the `model` of a tokenizer.json. */
const struct bpe *read_bpe(struct arena *arena, const struct json *model, const char *where);
/* The id of what is written so; -1 where there is none. */
int64_t find_token(const struct bpe *bpe, const char *text, size_t bytes);
/* How a token is written; NULL for an id without one. */
const char *token_text(const struct bpe *bpe, int64_t id, size_t *bytes);
int64_t vocabulary_size(const struct bpe *bpe);
/* Append the ids of a word. */
void encode_word(struct arena *arena, const struct bpe *bpe, struct bytes word, struct ids *ids);

#endif
