/* A bundle's manifest, and the check that its files are the ones it was built with. */
#ifndef BUNDLE_H
#define BUNDLE_H

#include "arena.h"

struct file_entry {
    const char *name, *sha256;
    int64_t bytes;
};

struct golden_prompt {
    struct ids prompt, tokens;
    const double *margins; /* between the reference's two best logits, for each token */
};

struct bundle {
    const char *folder, *name, *onnxruntime_min;
    const char *prefill, *decode; /* files of the graphs; the same where one graph does both */
    int64_t vocab_size, num_layers, num_kv_heads, head_dim, context_length;
    bool position_ids, int8_cache, prefill_takes_past, fp32;
    bool eight_bit_products; /* of weights and activations, which some CPUs add in 16 bits */
    struct ids eos;
    int64_t bos; /* -1 where no token begins a text */
    struct file_entry *files;
    size_t num_files;
    struct golden_prompt *golden;
    size_t num_golden;
    double tolerance; /* a margin below it: another CPU may rightly choose another token */
};

/* Read the manifest; what stays lies in `keep`. Every file must be there with its size. */
const struct bundle *read_bundle(struct arena *keep, struct arena *scratch, const char *folder);
/* Hash the files that text needs: graphs, weights and the tokenizer's; or all. Fails for one that was changed. */
void check_files(struct arena *scratch, const struct bundle *bundle, bool all);

#endif
