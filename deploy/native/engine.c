#define _DEFAULT_SOURCE
#include "engine.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "pages.h"

#define FIRST_CAPACITY 256
#define PIECE_TOKENS 256
#define OUTPUTS_BEFORE_CACHE 2

struct engine {
    const struct bundle *bundle;
    const struct onnxruntime *ort;
    struct session *sessions[2]; /* prefill, decode; the first is NULL where one does both */
    size_t num_caches;
    void **caches; /* a key and a value for each layer, [1, kv heads, capacity, head dim] */
    size_t cache_bytes;
    int64_t capacity;
    int32_t last_index, length; /* seqlens_k and total_sequence_length */
    int64_t token, position;
    float *logits;
    const char **input_names, **output_names;
    size_t num_inputs, inputs_before_cache;
    struct tensor **inputs, **outputs; /* of a step */
    struct tensor *piece[2];           /* ids and positions of a part of a prompt */
};

static void load(struct arena *arena, struct engine *engine, int role, const char *name, int threads) {
    const char *path = format(arena, "%s/%s", engine->bundle->folder, name);
    engine->sessions[role] = open_session(arena, engine->ort, path, threads, !engine->bundle->fp32);
    check_session(arena, engine->ort, engine->sessions[role], engine->num_inputs,
                  OUTPUTS_BEFORE_CACHE + engine->num_caches, path);
}

static void name_tensors(struct arena *keep, struct engine *engine) {
    static const char *const fixed[] = {"input_ids", "seqlens_k", "total_sequence_length", "position_ids"};
    engine->inputs_before_cache = engine->bundle->position_ids ? 4 : 3;
    engine->num_inputs = engine->inputs_before_cache + engine->num_caches;
    engine->input_names = take(keep, engine->num_inputs, sizeof *engine->input_names);
    engine->output_names = take(keep, OUTPUTS_BEFORE_CACHE + engine->num_caches, sizeof *engine->output_names);
    engine->inputs = take(keep, engine->num_inputs, sizeof *engine->inputs);
    engine->outputs = take(keep, OUTPUTS_BEFORE_CACHE + engine->num_caches, sizeof *engine->outputs);
    memcpy(engine->input_names, fixed, engine->inputs_before_cache * sizeof *fixed);
    engine->output_names[0] = "next_token";
    engine->output_names[1] = "logits";
    for (size_t i = 0; i < engine->num_caches; i++) {
        const char *part = i % 2 ? "value" : "key";
        engine->input_names[engine->inputs_before_cache + i] = format(keep, "past_key_values.%zu.%s", i / 2, part);
        engine->output_names[OUTPUTS_BEFORE_CACHE + i] = format(keep, "present.%zu.%s", i / 2, part);
    }
}

/* The tensors that stay as long as the buffers do. What is input and output at once is one tensor. */
static void bind(struct arena *arena, struct engine *engine) {
    const struct bundle *bundle = engine->bundle;
    const int64_t one[] = {1, 1}, vocabulary[] = {1, 1, bundle->vocab_size};
    const int64_t cache[] = {1, bundle->num_kv_heads, engine->capacity, bundle->head_dim};
    struct tensor **inputs = engine->inputs, **outputs = engine->outputs;
    inputs[0] = outputs[0] = make_tensor(arena, engine->ort, &engine->token, one, 2, INT64);
    inputs[1] = make_tensor(arena, engine->ort, &engine->last_index, one, 1, INT32);
    inputs[2] = make_tensor(arena, engine->ort, &engine->length, one, 0, INT32);
    if (bundle->position_ids) inputs[3] = make_tensor(arena, engine->ort, &engine->position, one, 2, INT64);
    outputs[1] = make_tensor(arena, engine->ort, engine->logits, vocabulary, 3, FLOAT32);
    for (size_t i = 0; i < engine->num_caches; i++)
        inputs[engine->inputs_before_cache + i] = outputs[OUTPUTS_BEFORE_CACHE + i] =
            make_tensor(arena, engine->ort, engine->caches[i], cache, 4, bundle->int8_cache ? INT8 : FLOAT32);
}

static void unbind(struct engine *engine) {
    for (size_t i = 0; i < engine->num_inputs; i++) {
        free_tensor(engine->ort, engine->inputs[i]);
        engine->inputs[i] = NULL;
    }
    free_tensor(engine->ort, engine->outputs[1]);
    memset(engine->outputs, 0, (OUTPUTS_BEFORE_CACHE + engine->num_caches) * sizeof *engine->outputs);
}

static void free_piece(struct engine *engine) {
    for (int i = 0; i < 2; i++) {
        free_tensor(engine->ort, engine->piece[i]);
        engine->piece[i] = NULL;
    }
}

/* Buffers of twice the positions, until there are enough; the first `used` are copied. */
static void reserve(struct arena *arena, struct engine *engine, int64_t length, int64_t used) {
    const struct bundle *bundle = engine->bundle;
    int64_t capacity = engine->capacity ? engine->capacity : FIRST_CAPACITY;
    if (length <= engine->capacity) return;
    while (capacity < length) capacity *= 2;
    if (capacity > bundle->context_length) capacity = bundle->context_length;
    size_t position_bytes = (size_t)bundle->head_dim * (bundle->int8_cache ? 1 : sizeof(float));
    size_t heads = (size_t)bundle->num_kv_heads, bytes = heads * (size_t)capacity * position_bytes;
    unbind(engine);
    for (size_t i = 0; i < engine->num_caches; i++) {
        /* Anonymous pages: zero, aligned, and none is taken before it is touched. */
        char *grown = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
             *old = engine->caches[i];
        if (grown == MAP_FAILED)
            fail(arena, NULL, "out of memory: keys and values of %lld tokens", (long long)capacity);
        for (size_t head = 0; used && head < heads; head++)
            memcpy(grown + head * (size_t)capacity * position_bytes,
                   old + head * (size_t)engine->capacity * position_bytes, (size_t)used * position_bytes);
        if (old) munmap(old, engine->cache_bytes);
        engine->caches[i] = grown;
    }
    engine->capacity = capacity;
    engine->cache_bytes = bytes;
    bind(arena, engine);
}

void open_engine(struct arena *keep, struct arena *scratch, const struct bundle *bundle, const struct onnxruntime *ort,
                 int threads, struct engine **opened) {
    struct engine *engine = *opened = take(keep, 1, sizeof *engine);
    engine->bundle = bundle;
    engine->ort = ort;
    engine->num_caches = 2 * (size_t)bundle->num_layers;
    engine->caches = take(keep, engine->num_caches, sizeof *engine->caches);
    engine->logits = take(keep, (size_t)bundle->vocab_size, sizeof *engine->logits);
    name_tensors(keep, engine);
    release_code(); /* now, so that the peak while loading is lower, and once more when all is loaded */
    load(scratch, engine, 1, bundle->decode, threads);
    if (bundle->prefill != bundle->decode) load(scratch, engine, 0, bundle->prefill, threads);
    release_code();
}

void close_engine(struct engine *engine) {
    if (!engine) return;
    free_piece(engine);
    unbind(engine);
    for (size_t i = 0; i < engine->num_caches; i++)
        if (engine->caches[i]) munmap(engine->caches[i], engine->cache_bytes);
    for (int role = 0; role < 2; role++) close_session(engine->ort, engine->sessions[role]);
}

static void set_length(struct engine *engine, int64_t length) {
    engine->length = (int32_t)length;
    engine->last_index = (int32_t)(length - 1);
    engine->position = length - 1;
}

static void run(struct arena *arena, struct engine *engine, int role, struct tensor **inputs) {
    struct session *session = engine->sessions[role] ? engine->sessions[role] : engine->sessions[1];
    run_session(arena, engine->ort, session, engine->input_names, inputs, engine->num_inputs, engine->output_names,
                engine->outputs, OUTPUTS_BEFORE_CACHE + engine->num_caches,
                role ? engine->bundle->decode : engine->bundle->prefill);
}

void prefill(struct arena *scratch, struct engine *engine, const struct ids *prompt) {
    int64_t total = (int64_t)prompt->count;
    int64_t most = engine->bundle->prefill_takes_past && total > PIECE_TOKENS ? PIECE_TOKENS : total;
    int64_t *positions = take(scratch, prompt->count, sizeof *positions);
    struct tensor **inputs = take(scratch, engine->num_inputs, sizeof *inputs);
    reserve(scratch, engine, total, 0);
    for (int64_t first = 0; first < total; first += most) {
        const int64_t shape[] = {1, total - first < most ? total - first : most};
        set_length(engine, first + shape[1]);
        for (int64_t i = 0; i < shape[1]; i++) positions[i] = first + i;
        memcpy(inputs, engine->inputs, engine->num_inputs * sizeof *inputs);
        inputs[0] = engine->piece[0] = make_tensor(scratch, engine->ort, prompt->items + first, shape, 2, INT64);
        if (engine->bundle->position_ids)
            inputs[3] = engine->piece[1] = make_tensor(scratch, engine->ort, positions, shape, 2, INT64);
        run(scratch, engine, 0, inputs);
        free_piece(engine);
    }
}

void step(struct arena *scratch, struct engine *engine) {
    if (engine->length >= engine->capacity) {
        if (engine->length >= engine->bundle->context_length)
            fail(scratch, NULL, "the context of %lld tokens is full", (long long)engine->bundle->context_length);
        reserve(scratch, engine, engine->length + 1, engine->length);
    }
    set_length(engine, engine->length + 1);
    run(scratch, engine, 1, engine->inputs);
}

int64_t *next_token(struct engine *engine) { return &engine->token; }

const float *logits(const struct engine *engine) { return engine->logits; }
