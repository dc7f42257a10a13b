/* Text to token ids and back, as the bundle's tokenizer.json says. */
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "added_tokens.h"

struct tokenizer;

/* `keep` is for what stays, `scratch` for what is needed while reading. Fails for a kind that is not known. */
const struct tokenizer *read_tokenizer(struct arena *keep, struct arena *scratch, const char *folder);
/* The ids of valid UTF-8, with what the checkpoint puts around a text. */
struct ids encode(struct arena *scratch, const struct tokenizer *tokenizer, struct bytes text, bool split_special);

/* Text that comes a token at a time, never a part of a character. */
struct text_stream {
    bool continues; /* a text has begun, so that its first token is past */
    bool broken;    /* the run of bytes that is on is no UTF-8 */
    char held[4];   /* of a character whose end has not come */
    size_t num_held;
    size_t strip_left; /* characters that may yet be removed from the beginning */
};

struct text_stream begin_text(const struct tokenizer *tokenizer, const int64_t *after, size_t count);
/* Append the text that is complete with this token. */
void push_token(struct arena *scratch, const struct tokenizer *tokenizer, struct text_stream *stream, int64_t id,
                struct bytes *text);

#endif
