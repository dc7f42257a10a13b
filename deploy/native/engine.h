/* One sequence of a bundle: its keys and values, and the token that comes next.
 *
 * The context is a limit, not an allocation: keys and values have room for 256 positions at first, and twice as many
 * when that is full. A prompt goes through the graph in pieces of at most 256 tokens, where the graph takes a past.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include "bundle.h"
#include "onnxruntime.h"

struct engine;

/* Load the graphs; `close_engine` gives them back, also after a failure in here, where `*engine` is set already. */
void open_engine(struct arena *keep, struct arena *scratch, const struct bundle *bundle, const struct onnxruntime *ort,
                 int threads, struct engine **engine);
void close_engine(struct engine *engine);

/* Start over with a prompt. Ids must be those of the vocabulary, and fit the context. */
void prefill(struct arena *scratch, struct engine *engine, const struct ids *prompt);
/* Feed the next token, and compute the one after it. */
void step(struct arena *scratch, struct engine *engine);

/* The greedy choice, or what was written over it. */
int64_t *next_token(struct engine *engine);
/* What it was chosen from, one for each id of the vocabulary. */
const float *logits(const struct engine *engine);

#endif
