#define _POSIX_C_SOURCE 200809L
#include "onnxruntime.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Functions are reached by their place in a table, `OrtApi`, which only ever grows at its end. These are the places of
 * ryot/edge/c_library.py, and a test holds the two lists together. */
enum place {
    GetErrorMessage = 2,
    CreateEnv = 3,
    CreateSession = 7,
    Run = 9,
    CreateSessionOptions = 10,
    DisableCpuMemArena = 19,
    SetSessionLogSeverityLevel = 22,
    SetSessionGraphOptimizationLevel = 23,
    SetIntraOpNumThreads = 24,
    SetInterOpNumThreads = 25,
    SessionGetInputCount = 30,
    SessionGetOutputCount = 31,
    CreateTensorWithDataAsOrtValue = 49,
    IsTensor = 50,
    GetTensorMutableData = 51,
    CreateCpuMemoryInfo = 69,
    ReleaseStatus = 93,
    ReleaseSession = 95,
    ReleaseValue = 96,
    ReleaseSessionOptions = 100,
    AddSessionConfigEntry = 130
};
#define API_VERSION 20
#define LOG_ERRORS_ONLY 3
/* The export has fused what can be fused; looking for more finds next to nothing and takes time and memory. */
#define NO_OPTIMIZATIONS 0
/* As ryot/edge/engine.py says: threads wait actively for 20 us within a call. The last is for matrices that stay as they
   are. */
static const char *const CONFIG[][2] = {{"session.intra_op.allow_spinning", "1"},
                                        {"session.intra_op.spin_duration_us", "20"},
                                        {"session.force_spinning_stop", "1"},
                                        {"session.disable_prepacking", "1"}};
#define NUM_CONFIG (sizeof CONFIG / sizeof *CONFIG)

typedef void function(void);
typedef void *status; /* NULL where all went well */

struct onnxruntime {
    function *const *table;
    const char *version;
    void *environment, *memory_info;
};

/* The function at a place, as one that takes and gives what is said. */
#define CALL(ort, place, result, ...) ((result (*)(__VA_ARGS__))(ort)->table[place])

static void check(struct arena *arena, const struct onnxruntime *ort, status found, const char *where) {
    char message[400];
    if (!found) return;
    snprintf(message, sizeof message, "%s", CALL(ort, GetErrorMessage, const char *, status)(found));
    CALL(ort, ReleaseStatus, void, status)(found);
    message[strcspn(message, "\n")] = 0;
    fail(arena, NULL, "%s: onnxruntime %s: %s", where, ort->version, message);
}

/* `named` may be NULL. */
static void *open_library(struct arena *arena, const char *named) {
    if (named && *named) {
        void *library = dlopen(named, RTLD_LAZY | RTLD_LOCAL);
        if (!library) fail(arena, NULL, "onnxruntime's library cannot be loaded: %s", dlerror());
        return library;
    }
    static const char *const places[] = {
#ifdef ORT_LIBRARY
        ORT_LIBRARY,
#endif
#ifdef __APPLE__
        "libonnxruntime.dylib",
#endif
        "libonnxruntime.so.1", "libonnxruntime.so"};
    void *library = NULL;
    for (size_t i = 0; !library && i < sizeof places / sizeof *places; i++)
        library = dlopen(places[i], RTLD_LAZY | RTLD_LOCAL);
    if (!library)
        fail(arena,
             "name it with --onnxruntime, or in RYOT_ONNXRUNTIME: capi/libonnxruntime.so.* of the pip package, or a "
             "release's",
             "onnxruntime's library is not found: %s", dlerror());
    return library;
}

/* Make a tensor and find it again, so that a table of another order is noticed before anything is loaded. */
static void check_places(struct arena *arena, const struct onnxruntime *ort) {
    int64_t buffer = 7, shape[] = {1, 1};
    int is_tensor = 0;
    void *found = NULL;
    struct tensor *tensor = make_tensor(arena, ort, &buffer, shape, 2, INT64);
    check(arena, ort, CALL(ort, IsTensor, status, struct tensor *, int *)(tensor, &is_tensor), "IsTensor");
    check(arena, ort, CALL(ort, GetTensorMutableData, status, struct tensor *, void **)(tensor, &found), "its data");
    free_tensor(ort, tensor);
    if (is_tensor != 1 || found != &buffer)
        fail(arena, NULL, "onnxruntime %s: its function table is not the one that this program knows", ort->version);
}

const struct onnxruntime *load_onnxruntime(struct arena *arena, const char *path) {
    struct base {
        const void *(*get_api)(uint32_t);
        const char *(*get_version)(void);
    };
    struct onnxruntime *ort = take(arena, 1, sizeof *ort);
    /* It asks for this when it is loaded; what the owner has set stays. */
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    const char *named = path ? path : getenv("RYOT_ONNXRUNTIME");
    void *library = open_library(arena, named);
    const struct base *(*get_base)(void);
    *(void **)&get_base = dlsym(library, "OrtGetApiBase");
    if (!get_base) fail(arena, NULL, "%s: is not onnxruntime's library", named ? named : "libonnxruntime.so");
    ort->version = get_base()->get_version();
    ort->table = get_base()->get_api(API_VERSION);
    if (!ort->table) fail(arena, NULL, "onnxruntime %s does not serve its C API %d", ort->version, API_VERSION);
    check(arena, ort,
          CALL(ort, CreateEnv, status, int, const char *, void **)(LOG_ERRORS_ONLY, "ryot", &ort->environment),
          "CreateEnv");
    check(arena, ort, CALL(ort, CreateCpuMemoryInfo, status, int, int, void **)(0, 0, &ort->memory_info),
          "CreateCpuMemoryInfo");
    check_places(arena, ort);
    return ort;
}

const char *onnxruntime_version(const struct onnxruntime *ort) { return ort->version; }

struct session *open_session(struct arena *arena, const struct onnxruntime *ort, const char *path, int threads,
                             bool packed) {
    void *options;
    struct session *session = NULL;
    check(arena, ort, CALL(ort, CreateSessionOptions, status, void **)(&options), path);
    status found = CALL(ort, SetIntraOpNumThreads, status, void *, int)(options, threads);
    if (!found) found = CALL(ort, SetInterOpNumThreads, status, void *, int)(options, 1);
    if (!found) found = CALL(ort, SetSessionGraphOptimizationLevel, status, void *, int)(options, NO_OPTIMIZATIONS);
    if (!found) found = CALL(ort, DisableCpuMemArena, status, void *)(options);
    if (!found) found = CALL(ort, SetSessionLogSeverityLevel, status, void *, int)(options, LOG_ERRORS_ONLY);
    for (size_t i = 0; !found && i < NUM_CONFIG - packed; i++)
        found = CALL(ort, AddSessionConfigEntry, status, void *, const char *, const char *)(options, CONFIG[i][0],
                                                                                             CONFIG[i][1]);
    if (!found)
        found = CALL(ort, CreateSession, status, void *, const char *, void *,
                     struct session **)(ort->environment, path, options, &session);
    CALL(ort, ReleaseSessionOptions, void, void *)(options);
    check(arena, ort, found, path);
    return session;
}

void close_session(const struct onnxruntime *ort, struct session *session) {
    if (session) CALL(ort, ReleaseSession, void, struct session *)(session);
}

void check_session(struct arena *arena, const struct onnxruntime *ort, struct session *session, size_t inputs,
                   size_t outputs, const char *path) {
    size_t found[2] = {0, 0};
    check(arena, ort, CALL(ort, SessionGetInputCount, status, struct session *, size_t *)(session, &found[0]), path);
    check(arena, ort, CALL(ort, SessionGetOutputCount, status, struct session *, size_t *)(session, &found[1]), path);
    if (found[0] != inputs || found[1] != outputs)
        fail(arena, NULL, "%s: has %zu inputs and %zu outputs, the manifest makes it %zu and %zu", path, found[0],
             found[1], inputs, outputs);
}

struct tensor *make_tensor(struct arena *arena, const struct onnxruntime *ort, void *data, const int64_t *shape,
                           size_t rank, enum element element) {
    size_t bytes = element == INT64 ? 8 : element == INT8 ? 1 : 4;
    struct tensor *tensor = NULL;
    for (size_t i = 0; i < rank; i++) bytes *= (size_t)shape[i];
    status found = CALL(ort, CreateTensorWithDataAsOrtValue, status, void *, void *, size_t, const int64_t *, size_t,
                        int, struct tensor **)(ort->memory_info, data, bytes, shape, rank, (int)element, &tensor);
    check(arena, ort, found, "a tensor");
    return tensor;
}

void free_tensor(const struct onnxruntime *ort, struct tensor *tensor) {
    if (tensor) CALL(ort, ReleaseValue, void, struct tensor *)(tensor);
}

void run_session(struct arena *arena, const struct onnxruntime *ort, struct session *session,
                 const char *const *input_names, struct tensor *const *inputs, size_t num_inputs,
                 const char *const *output_names, struct tensor **outputs, size_t num_outputs, const char *path) {
    check(arena, ort,
          CALL(ort, Run, status, struct session *, void *, const char *const *, struct tensor *const *, size_t,
               const char *const *, size_t,
               struct tensor **)(session, NULL, input_names, inputs, num_inputs, output_names, num_outputs, outputs),
          path);
}
