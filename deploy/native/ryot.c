#define _POSIX_C_SOURCE 200809L
#include "ryot.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bundle.h"
#include "cpu.h"
#include "engine.h"
#include "sampling.h"
#include "stop_filter.h"
#include "tokenizer.h"
#include "unicode.h"

#define DEFAULT_NEW_TOKENS 64

struct ryot {
    struct arena keep, scratch; /* what stays, and what one call needs */
    const struct bundle *bundle;
    const struct tokenizer *tokenizer;
    const struct onnxruntime *ort;
    struct arena loaded; /* the engine's */
    struct engine *engine;
    const char *library;
    int threads;
};

static void begin(struct ryot *ryot, struct trap *trap) {
    ryot->keep.trap = ryot->scratch.trap = ryot->loaded.trap = trap;
}

static void end(struct ryot *ryot) { release(&ryot->scratch); }

static void close_model(struct ryot *ryot) {
    close_engine(ryot->engine);
    ryot->engine = NULL;
    release(&ryot->loaded);
}

/* After a failure: what was on its way is given back. */
static void give_up(struct ryot *ryot, struct trap *trap, struct ryot_error *error) {
    if (error) *error = trap->error;
    close_model(ryot);
    end(ryot);
}

static bool load_bundle(struct ryot *ryot, const char *folder, const char *library, struct ryot_error *error) {
    struct trap trap;
    begin(ryot, &trap);
    if (setjmp(trap.entry)) {
        give_up(ryot, &trap, error);
        return false;
    }
    if (ryot->threads < 1)
        fail_usage(&ryot->keep, NULL, "threads: got %d, expected a whole number above 0", ryot->threads);
    ryot->bundle = read_bundle(&ryot->keep, &ryot->scratch, folder);
    release(&ryot->scratch);
    check_files(&ryot->scratch, ryot->bundle, false);
    ryot->tokenizer = read_tokenizer(&ryot->keep, &ryot->scratch, folder);
    if (library) ryot->library = take_text(&ryot->keep, library, strlen(library));
    end(ryot);
    return true;
}

struct ryot *ryot_open(const char *folder, const char *library, int threads, struct ryot_error *error) {
    struct ryot *ryot = calloc(1, sizeof *ryot);
    if (!ryot) {
        if (error) *error = (struct ryot_error){RYOT_FAILED, "out of memory", ""};
        return NULL;
    }
    ryot->threads = threads;
    if (load_bundle(ryot, folder, library, error)) return ryot;
    ryot_close(ryot);
    return NULL;
}

void ryot_close(struct ryot *ryot) {
    if (!ryot) return;
    close_model(ryot);
    release(&ryot->scratch);
    release(&ryot->keep);
    free(ryot);
}

const char *ryot_name(const struct ryot *ryot) { return ryot->bundle->name; }

/* Versions are compared by number. */
static bool is_older(const char *installed, const char *required) {
    for (int part = 0; part < 3; part++) {
        long a = strtol(installed, (char **)&installed, 10), b = strtol(required, (char **)&required, 10);
        if (a != b) return a < b;
        installed += *installed == '.';
        required += *required == '.';
    }
    return false;
}

static void load_model(struct ryot *ryot) {
    if (ryot->engine) return;
    if (!ryot->ort) ryot->ort = load_onnxruntime(&ryot->keep, ryot->library);
    const char *version = onnxruntime_version(ryot->ort), *oldest = ryot->bundle->onnxruntime_min;
    if (is_older(version, oldest))
        fail(&ryot->keep, NULL, "onnxruntime %s is too old for this bundle, which needs %s or later", version, oldest);
    open_engine(&ryot->loaded, &ryot->scratch, ryot->bundle, ryot->ort, ryot->threads, &ryot->engine);
}

static struct ids encode_prompt(struct ryot *ryot, const char *text, size_t bytes, bool split_special) {
    size_t valid = valid_bytes(text, bytes);
    if (valid < bytes)
        fail_usage(&ryot->scratch, NULL, "prompt: is not UTF-8 (byte 0x%02x at offset %zu)", (unsigned char)text[valid],
                   valid);
    struct ids ids = encode(&ryot->scratch, ryot->tokenizer, (struct bytes){(char *)text, bytes, 0}, split_special);
    for (size_t i = 0; i < ids.count; i++)
        if (ids.items[i] >= ryot->bundle->vocab_size)
            fail(&ryot->scratch, NULL, "prompt: a token id is outside the vocabulary, 0 to %lld",
                 (long long)ryot->bundle->vocab_size - 1);
    return ids;
}

int64_t ryot_encode(struct ryot *ryot, const char *text, size_t bytes, bool split_special, int64_t *ids, size_t room,
                    struct ryot_error *error) {
    struct trap trap;
    begin(ryot, &trap);
    if (setjmp(trap.entry)) {
        give_up(ryot, &trap, error);
        return -1;
    }
    struct ids found = encode_prompt(ryot, text, bytes, split_special);
    if (found.count && room) memcpy(ids, found.items, (found.count < room ? found.count : room) * sizeof *ids);
    int64_t count = (int64_t)found.count;
    end(ryot);
    return count;
}

/* How many tokens to generate. */
static int64_t plan(struct ryot *ryot, const struct ryot_request *request, const struct ids *prompt) {
    int64_t length = (int64_t)prompt->count, room = ryot->bundle->context_length - length,
            wanted = request->max_new_tokens;
    if (wanted < 0)
        fail_usage(&ryot->scratch, NULL, "max_new_tokens: got %lld, expected a whole number above 0",
                   (long long)wanted);
    if (room < 1 || wanted > room) {
        const char *more = wanted ? format(&ryot->scratch, " and %lld new ones", (long long)wanted) : "";
        const char *hint = room > 0 ? format(&ryot->scratch, "ask for at most %lld new tokens", (long long)room)
                                    : "shorten the prompt";
        fail(&ryot->scratch, hint, "a prompt of %lld tokens%s does not fit the context of %lld tokens",
             (long long)length, more, (long long)ryot->bundle->context_length);
    }
    if (wanted) return wanted;
    return room < DEFAULT_NEW_TOKENS ? room : DEFAULT_NEW_TOKENS;
}

static bool is_end(const struct ryot *ryot, const struct ryot_request *request, int64_t token) {
    for (size_t i = 0; !request->ignore_eos && i < ryot->bundle->eos.count; i++)
        if (ryot->bundle->eos.items[i] == token) return true;
    return false;
}

/* Hand on what may pass; false where the receiver wants no more. */
static bool pass(struct stop_filter *filter, size_t bytes, const struct ryot_request *request) {
    bool more = !bytes || request->write(request->context, filter->held.items, bytes);
    take_passed(filter, bytes);
    return more;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void generate(struct ryot *ryot, const struct ryot_request *request, struct ryot_answer *answer) {
    struct arena *scratch = &ryot->scratch;
    struct ids prompt = encode_prompt(ryot, request->prompt, request->prompt_bytes, request->split_special_tokens);
    if (!prompt.count && ryot->bundle->bos < 0)
        fail_usage(scratch, NULL,
                   "prompt: is empty, and this model has no token that begins a text; give at least a character");
    if (!prompt.count) add_id(scratch, &prompt, ryot->bundle->bos);
    int64_t num_tokens = plan(ryot, request, &prompt);
    struct stop_filter filter = {.stop = request->stop, .num_stop = request->num_stop};
    for (size_t i = 0; i < request->num_stop; i++)
        if (!*request->stop[i]) fail_usage(scratch, NULL, "stop: got an empty string, expected at least one character");
    struct sampler *sampler = make_sampler(scratch, &request->sampling, (size_t)ryot->bundle->vocab_size, &prompt);
    struct text_stream stream = begin_text(ryot->tokenizer, prompt.items, prompt.count);
    load_model(ryot);
    answer->prompt_tokens = prompt.count;
    int64_t began_ns = now_ns();
    prefill(scratch, ryot->engine, &prompt);
    for (int64_t count = 1;; count++) {
        int64_t *token = next_token(ryot->engine);
        if (!is_greedy(&request->sampling)) *token = choose_token(scratch, sampler, logits(ryot->engine));
        if (count == 1) answer->first_token_ns = now_ns() - began_ns;
        answer->generated_tokens = (size_t)count;
        struct bytes text = {0};
        bool ended = is_end(ryot, request, *token);
        if (!ended) push_token(scratch, ryot->tokenizer, &stream, *token, &text);
        bool more = pass(&filter, push_stop(scratch, &filter, &text), request);
        ended = ended || count == num_tokens;
        if (ended && !filter.stopped && more) more = pass(&filter, filter.held.count, request);
        if (filter.stopped || ended || !more) {
            answer->whole = more;
            answer->whole_ns = now_ns() - began_ns;
            return;
        }
        step(scratch, ryot->engine);
    }
}

bool ryot_generate(struct ryot *ryot, const struct ryot_request *request, struct ryot_error *error) {
    struct trap trap;
    struct ryot_answer unread, *answer = request->answer ? request->answer : &unread;
    *answer = (struct ryot_answer){0};
    begin(ryot, &trap);
    if (setjmp(trap.entry)) {
        give_up(ryot, &trap, error);
        return false;
    }
    generate(ryot, request, answer);
    end(ryot);
    return true;
}

/* Golden tokens may come out all the same: few activations are so large that their products overflow. */
static void check_cpu(struct ryot *ryot) {
    if (ryot->bundle->eight_bit_products && overflows_int8())
        fail(&ryot->scratch, "export it with a target whose device is like this one, which takes 7 bits",
             "bundle %s: its weights have 8 bits, whose sums overflow on this CPU, which has no VNNI",
             ryot->bundle->folder);
}

/* Tokens must be equal up to the first that the reference itself hesitated about. */
static void check_golden(struct ryot *ryot, struct ryot_checked *checked) {
    const struct bundle *bundle = ryot->bundle;
    for (size_t number = 0; number < bundle->num_golden; number++) {
        const struct golden_prompt *golden = &bundle->golden[number];
        checked->golden_tokens += golden->tokens.count;
        prefill(&ryot->scratch, ryot->engine, &golden->prompt);
        for (size_t i = 0; i < golden->tokens.count && golden->margins[i] >= bundle->tolerance;
             i++, checked->compared++) {
            if (i) step(&ryot->scratch, ryot->engine);
            int64_t token = *next_token(ryot->engine), expected = golden->tokens.items[i];
            if (token != expected)
                fail(&ryot->scratch, "this CPU or onnxruntime computes something else than the bundle was checked with",
                     "bundle %s: golden prompt %zu: token %zu is %lld, expected %lld (margin %.3g, tolerance %.3g)",
                     bundle->folder, number + 1, i + 1, (long long)token, (long long)expected, golden->margins[i],
                     bundle->tolerance);
        }
        release(&ryot->scratch);
    }
    if (bundle->num_golden && !checked->compared)
        fail(&ryot->scratch, NULL, "bundle %s: no golden token has a margin above %.3g", bundle->folder,
             bundle->tolerance);
}

bool ryot_verify(struct ryot *ryot, struct ryot_checked *checked, struct ryot_error *error) {
    struct trap trap;
    begin(ryot, &trap);
    if (setjmp(trap.entry)) {
        give_up(ryot, &trap, error);
        return false;
    }
    *checked = (struct ryot_checked){.files = ryot->bundle->num_files};
    check_files(&ryot->scratch, ryot->bundle, true);
    check_cpu(ryot);
    load_model(ryot);
    check_golden(ryot, checked);
    end(ryot);
    return true;
}
