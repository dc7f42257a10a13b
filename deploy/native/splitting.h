/* What is done to a text before it is encoded: normalizers change it, pre-tokenizers cut it into words. */
#ifndef SPLITTING_H
#define SPLITTING_H

#include "json.h"

struct normalizer;
struct pre_tokenizer;

struct words {
    struct bytes *items;
    size_t count, room;
};

/* Read the part of a tokenizer.json; null leaves a text as it is. Fails for a kind that is not known. */
const struct normalizer *read_normalizer(struct arena *arena, const struct json *value, const char *where);
const struct pre_tokenizer *read_pre_tokenizer(struct arena *arena, const struct json *value, const char *where);

struct bytes normalize(struct arena *arena, const struct normalizer *normalizer, struct bytes text);
/* `begins` says that the text is the first of all. */
struct words split_words(struct arena *arena, const struct pre_tokenizer *pre_tokenizer, struct bytes text,
                         bool begins);

/* The characters in which a byte-level BPE writes bytes, GPT-2's: printable Latin-1 stands for itself, the other 68
 * bytes are, in order, the characters from U+0100 on. */
uint32_t character_of_byte(unsigned char byte);
/* -1 for a character that stands for none. */
int byte_of_character(uint32_t character);
struct bytes replace_text(struct arena *arena, struct bytes text, const struct json *from, const struct json *to);

#endif
