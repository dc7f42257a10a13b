/* Choosing the next token from logits, as ryot/edge/sampling.py defines it: repetition penalty, temperature, then the
 * cuts top-k, top-p and min-p, then a draw with numpy's generator, so that a seed gives run.py's text. */
#ifndef SAMPLING_H
#define SAMPLING_H

#include "arena.h"

struct sampler;

/* Fails for a value that makes no sense. */
struct sampler *make_sampler(struct arena *arena, const struct ryot_sampling *params, size_t vocab_size,
                             const struct ids *prompt);
/* Whether the runtime's own greedy choice serves. */
bool is_greedy(const struct ryot_sampling *params);
int64_t choose_token(struct arena *arena, struct sampler *sampler, const float *logits);

#endif
