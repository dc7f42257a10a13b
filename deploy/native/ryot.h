/* Text from a bundle without Python: what an app or a program links.
 *
 * A function that can fail takes a `struct ryot_error`, may be NULL, and fills it in. One thread at a time may use a
 * `struct ryot`; several of them are independent. onnxruntime's shared library is loaded when it is first needed, with
 * its telemetry switched off for the whole process.
 */
#ifndef RYOT_H
#define RYOT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RYOT_API __attribute__((visibility("default")))

#define RYOT_FAILED 1
#define RYOT_WRONG_USAGE 2

struct ryot;

struct ryot_error {
    int exit_code;     /* RYOT_FAILED, or RYOT_WRONG_USAGE */
    char message[512]; /* one line */
    char hint[160];    /* one line, or empty */
};

/* How a token is drawn; all zeros is greedy. */
struct ryot_sampling {
    double temperature;        /* logits are divided by it; 0 takes the best token */
    int64_t top_k;             /* keep the k best tokens; 0 keeps all */
    double top_p;              /* keep the best tokens up to this probability; 0 or 1 keeps all */
    double min_p;              /* keep tokens of at least this share of the best one's probability */
    double repetition_penalty; /* makes tokens already seen less likely; 0 or 1 is none */
    uint64_t seed;             /* same seed, same text, and the same as run.py's */
};

/* What a generation came to: numbers alone. */
struct ryot_answer {
    bool whole;              /* it came to its end; false where `write` wanted no more */
    size_t prompt_tokens;    /* with what the checkpoint puts around a text */
    size_t generated_tokens; /* an end-of-text token included */
    int64_t first_token_ns;  /* from the beginning of the work, with the model loaded, to the first token */
    int64_t whole_ns;        /* and to the last one */
};

struct ryot_request {
    const char *prompt; /* UTF-8 */
    size_t prompt_bytes;
    int64_t max_new_tokens;    /* 0: as many as fit, at most 64 */
    bool ignore_eos;           /* go on after the end of a text */
    bool split_special_tokens; /* special tokens in the prompt are plain text */
    const char *const *stop;   /* end before any of these texts */
    size_t num_stop;
    struct ryot_sampling sampling;
    /* Takes text as it comes, whole characters of it; false ends the generation. */
    bool (*write)(void *context, const char *text, size_t bytes);
    void *context;
    struct ryot_answer *answer; /* filled in, where it is not NULL */
};

struct ryot_checked {
    size_t files;         /* as in the manifest */
    size_t golden_tokens; /* all that the manifest has */
    size_t compared;      /* of these, up to where the reference itself hesitates */
};

/* Read the manifest and the tokenizer of the bundle in `folder`; NULL when that fails.
 * `onnxruntime` is the path of its shared library, NULL for $RYOT_ONNXRUNTIME, the one named when this was compiled,
 * or the system's. */
RYOT_API struct ryot *ryot_open(const char *folder, const char *onnxruntime, int threads, struct ryot_error *error);
RYOT_API void ryot_close(struct ryot *ryot);

/* Number of ids of a text, with what the checkpoint puts around one; the first `room` are written to `ids`.
 * -1 when the text is not UTF-8, or has an id that the model does not know. */
RYOT_API int64_t ryot_encode(struct ryot *ryot, const char *text, size_t bytes, bool split_special_tokens, int64_t *ids,
                             size_t room, struct ryot_error *error);

/* Stream the continuation of a prompt. */
RYOT_API bool ryot_generate(struct ryot *ryot, const struct ryot_request *request, struct ryot_error *error);

/* Hash every file that the manifest names, see that this CPU computes what its weights were made for, and decode its
 * golden prompts. */
RYOT_API bool ryot_verify(struct ryot *ryot, struct ryot_checked *checked, struct ryot_error *error);

/* Counts and latencies for the owner of a device, as Prometheus text in a file: it is replaced as a whole, and goes on
 * from what it holds. `ryot_check_metrics` says whether it can be such a file, before any work. `ryot_add_metrics` adds
 * one answer, or with NULL one that failed; several processes may. */
RYOT_API bool ryot_check_metrics(const char *path, struct ryot_error *error);
RYOT_API bool ryot_add_metrics(const char *path, const struct ryot_answer *answer, struct ryot_error *error);

/* The bundle's name. */
RYOT_API const char *ryot_name(const struct ryot *ryot);

#endif
