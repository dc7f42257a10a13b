/* onnxruntime's C library: the few functions that an engine needs, checked before anything is loaded. */
#ifndef ONNXRUNTIME_H
#define ONNXRUNTIME_H

#include "arena.h"

struct onnxruntime;
struct session;
struct tensor;

/* ONNXTensorElementDataType */
enum element { FLOAT32 = 1, INT8 = 3, INT32 = 6, INT64 = 7 };

/* Load it, with its telemetry switched off; `path` as for `ryot_open`. It stays for as long as the process. */
const struct onnxruntime *load_onnxruntime(struct arena *arena, const char *path);
const char *onnxruntime_version(const struct onnxruntime *ort);

/* With `packed` matrices are laid out anew for its kernels, which quantized ones need: they take 20 times as long
 * without. Those of float32 do not, and have then no second copy in memory. */
struct session *open_session(struct arena *arena, const struct onnxruntime *ort, const char *path, int threads,
                             bool packed);
void close_session(const struct onnxruntime *ort, struct session *session);
/* Fails unless a graph has as many inputs and outputs. */
void check_session(struct arena *arena, const struct onnxruntime *ort, struct session *session, size_t inputs,
                   size_t outputs, const char *path);

/* A tensor over memory that the caller keeps. */
struct tensor *make_tensor(struct arena *arena, const struct onnxruntime *ort, void *data, const int64_t *shape,
                           size_t rank, enum element element);
void free_tensor(const struct onnxruntime *ort, struct tensor *tensor);

/* Run a graph on tensors that are bound to names; outputs are written in place. */
void run_session(struct arena *arena, const struct onnxruntime *ort, struct session *session,
                 const char *const *input_names, struct tensor *const *inputs, size_t num_inputs,
                 const char *const *output_names, struct tensor **outputs, size_t num_outputs, const char *path);

#endif
