/* How a tokenizer's decoder makes text of each token by itself. */
#ifndef DECODING_H
#define DECODING_H

#include "json.h"

struct replacement {
    struct json from, to;
    bool metaspace;   /* `from` is what stands for a space ... */
    bool drops_first; /* ... and goes from a text's first token */
    struct replacement *next;
};

struct decoding {
    bool byte_level, byte_fallback;
    struct replacement *replacements;
    char strip[5]; /* removed from the beginning of a text, up to `strip_count` times */
    size_t strip_bytes, strip_count;
};

struct decoding read_decoding(struct arena *arena, const struct json *value, const char *where);
/* What a token's name stands for; `byte` says that it is one byte of a run of them. */
struct bytes decode_name(struct arena *arena, const struct decoding *decoding, struct bytes name, bool first,
                         bool *byte);

#endif
