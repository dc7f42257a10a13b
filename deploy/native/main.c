/* The command line over ryot.h. stdout carries the text, stderr an error as one line. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pages.h"
#include "ryot.h"

#define MAX_STOPS 16
#define MAX_PROMPT_BYTES ((size_t)64 << 20)

static const char HELP[] =
    "Usage: ryot-run BUNDLE [PROMPT] [options]\n"
    "\n"
    "Continue PROMPT with the bundle's model, on stdout as it comes. Without PROMPT, or with -, it is read from "
    "stdin.\n"
    "\n"
    "  --verify                 check every file's hash, this CPU and the golden prompts\n"
    "  --ids                    print the prompt's token ids\n"
    "  --max-new-tokens N       tokens to generate; default: 64, or what fits\n"
    "  --stop TEXT              end before this text; repeatable\n"
    "  --ignore-eos             go on after the end of a text\n"
    "  --split-special-tokens   take special tokens in the prompt as plain text\n"
    "  --temperature X          0, the default, takes the best token\n"
    "  --top-k N                keep the N best tokens; default: all\n"
    "  --top-p X                keep the best tokens up to this probability; default: 1\n"
    "  --min-p X                keep tokens of this share of the best one's probability; default: 0\n"
    "  --repetition-penalty X   make tokens already there less likely; default: 1, not at all\n"
    "  --seed N                 same seed, same text; default: 0\n"
    "  --threads N              threads of onnxruntime; default: 1\n"
    "  --metrics-to FILE        add counts and latencies, no text, to this Prometheus text; default: to none\n"
    "  --onnxruntime PATH       its shared library; default: $RYOT_ONNXRUNTIME, or where it was when this was built\n"
    "  -h, --help               show this\n"
    "\n"
    "Example: ryot-run BUNDLE \"def \" --max-new-tokens 40\n";

struct options {
    const char *bundle, *prompt, *library, *metrics;
    bool verify, ids;
    int threads;
    const char *stop[MAX_STOPS];
    struct ryot_request request;
};

static _Noreturn void stop_with(const struct ryot_error *error) {
    fflush(stdout);
    fprintf(stderr, "Error: %s\n", error->message);
    if (*error->hint) fprintf(stderr, "hint: %s\n", error->hint);
    exit(error->exit_code);
}

static _Noreturn void misuse(const char *option, const char *what) {
    struct ryot_error error = {.exit_code = RYOT_WRONG_USAGE, .hint = "see ryot-run -h"};
    snprintf(error.message, sizeof error.message, "%s: %s", option, what);
    stop_with(&error);
}

static double read_number(const char *option, const char *value) {
    char *end;
    double number = strtod(value, &end);
    if (end == value || *end) misuse(option, "expected a number");
    return number;
}

static long long read_whole(const char *option, const char *value, long long low) {
    char *end;
    errno = 0;
    long long number = strtoll(value, &end, 10);
    if (end == value || *end || errno || number < low)
        misuse(option, low ? "expected a whole number above 0" : "expected a whole number not below 0");
    return number;
}

static bool read_flag(struct options *o, const char *name) {
    if (!strcmp(name, "--verify")) o->verify = true;
    else if (!strcmp(name, "--ids")) o->ids = true;
    else if (!strcmp(name, "--ignore-eos")) o->request.ignore_eos = true;
    else if (!strcmp(name, "--split-special-tokens")) o->request.split_special_tokens = true;
    else return false;
    return true;
}

static bool read_value(struct options *o, const char *name, const char *value) {
    struct ryot_sampling *sampling = &o->request.sampling;
    if (!strcmp(name, "--max-new-tokens")) o->request.max_new_tokens = read_whole(name, value, 1);
    else if (!strcmp(name, "--temperature")) sampling->temperature = read_number(name, value);
    else if (!strcmp(name, "--top-k")) sampling->top_k = read_whole(name, value, 0);
    else if (!strcmp(name, "--top-p")) sampling->top_p = read_number(name, value);
    else if (!strcmp(name, "--min-p")) sampling->min_p = read_number(name, value);
    else if (!strcmp(name, "--repetition-penalty")) sampling->repetition_penalty = read_number(name, value);
    else if (!strcmp(name, "--seed")) sampling->seed = (uint64_t)read_whole(name, value, 0);
    else if (!strcmp(name, "--threads")) o->threads = (int)read_whole(name, value, 1);
    else if (!strcmp(name, "--onnxruntime")) o->library = value;
    else if (!strcmp(name, "--metrics-to")) o->metrics = value;
    else if (!strcmp(name, "--stop")) {
        if (o->request.num_stop == MAX_STOPS) misuse(name, "too many");
        o->stop[o->request.num_stop++] = value;
    } else return false;
    return true;
}

static struct options read_options(int count, char **arguments) {
    struct options o = {.threads = 1};
    bool plain = false; /* behind --, nothing is an option */
    for (int i = 1; i < count; i++) {
        const char *argument = arguments[i];
        if (!plain && !strcmp(argument, "--")) {
            plain = true;
        } else if (!plain && argument[0] == '-' && argument[1]) {
            if (!strcmp(argument, "-h") || !strcmp(argument, "--help")) {
                fputs(HELP, stdout);
                exit(0);
            }
            if (read_flag(&o, argument)) continue;
            if (i + 1 == count) misuse(argument, "unknown, or without its value");
            if (!read_value(&o, argument, arguments[++i])) misuse(argument, "unknown");
        } else if (!o.bundle) {
            o.bundle = argument;
        } else if (!o.prompt) {
            o.prompt = argument;
        } else {
            misuse(argument, "one prompt is taken; put it in quotes");
        }
    }
    if (!o.bundle) misuse("BUNDLE", "is missing");
    if (o.metrics && !*o.metrics) misuse("--metrics-to", "expected a file");
    if (o.metrics && (o.verify || o.ids)) misuse("--metrics-to", "is for text, not for --verify or --ids");
    return o;
}

/* All of stdin. */
static const char *read_stdin(size_t *bytes) {
    char *text = NULL;
    for (size_t room = 0, got = 1; got; *bytes += got) {
        if (*bytes == room) {
            room = room ? 2 * room : 4096;
            text = room <= MAX_PROMPT_BYTES ? realloc(text, room) : NULL;
            if (!text) misuse("PROMPT", "is too long");
        }
        got = fread(text + *bytes, 1, room - *bytes, stdin);
    }
    if (ferror(stdin)) misuse("stdin", strerror(errno));
    return text;
}

static bool write_text(void *context, const char *text, size_t bytes) {
    (void)context;
    return fwrite(text, 1, bytes, stdout) == bytes && fflush(stdout) == 0;
}

/* What could not be written is an error, unless the reader has seen enough. */
static int end_output(void) {
    if (putchar('\n') != EOF && fflush(stdout) == 0) return 0;
    if (errno == EPIPE) return 0;
    struct ryot_error error = {.exit_code = RYOT_FAILED};
    snprintf(error.message, sizeof error.message, "stdout cannot be written (%s)", strerror(errno));
    stop_with(&error);
}

static int print_ids(struct ryot *ryot, const struct ryot_request *request) {
    struct ryot_error error;
    /* No text has more tokens than bytes, but for what stands around it and what a normalizer makes of it. */
    size_t room = 4 * request->prompt_bytes + 1024;
    int64_t *ids = malloc(room * sizeof *ids);
    if (!ids) misuse("PROMPT", "is too long");
    int64_t count =
        ryot_encode(ryot, request->prompt, request->prompt_bytes, request->split_special_tokens, ids, room, &error);
    if (count < 0) stop_with(&error);
    for (int64_t i = 0; i < count && (size_t)i < room; i++) printf(i ? " %lld" : "%lld", (long long)ids[i]);
    free(ids);
    return end_output();
}

static int verify(struct ryot *ryot) {
    struct ryot_checked checked;
    struct ryot_error error;
    if (!ryot_verify(ryot, &checked, &error)) stop_with(&error);
    printf("%s: %zu files as in the manifest, %zu of %zu golden tokens compared and equal", ryot_name(ryot),
           checked.files, checked.compared, checked.golden_tokens);
    return end_output();
}

/* An owner who gets no figures is told so; the text is there all the same. */
static void add_metrics(const char *path, const struct ryot_answer *answer) {
    struct ryot_error error;
    if (path && !ryot_add_metrics(path, answer, &error)) fprintf(stderr, "note: %s\n", error.message);
}

static int write_answer(struct ryot *ryot, struct ryot_request *request, const char *metrics) {
    struct ryot_answer answer;
    struct ryot_error error;
    request->answer = &answer;
    if (!ryot_generate(ryot, request, &error)) {
        add_metrics(metrics, NULL);
        stop_with(&error);
    }
    int result = end_output();
    if (answer.whole) add_metrics(metrics, &answer);
    return result;
}

int main(int count, char **arguments) {
    struct options options = read_options(count, arguments);
    struct ryot_request *request = &options.request;
    struct ryot_error error;
    char *from_stdin = NULL;
    signal(SIGPIPE, SIG_IGN);
    if (!options.ids) prepare_heap();
    if (options.metrics && !ryot_check_metrics(options.metrics, &error)) stop_with(&error);
    if (!options.verify) {
        bool given = options.prompt && strcmp(options.prompt, "-") != 0;
        if (given) request->prompt_bytes = strlen(options.prompt);
        else from_stdin = (char *)read_stdin(&request->prompt_bytes);
        request->prompt = given ? options.prompt : from_stdin;
        request->stop = options.stop;
        request->write = write_text;
    }
    struct ryot *ryot = ryot_open(options.bundle, options.library, options.threads, &error);
    if (!ryot) stop_with(&error);
    int result;
    if (options.verify) {
        result = verify(ryot);
    } else if (options.ids) {
        result = print_ids(ryot, request);
    } else {
        result = write_answer(ryot, request, options.metrics);
    }
#ifndef __SANITIZE_ADDRESS__
    /* All is written. The system takes a process back at once; onnxruntime takes a fifth of a short run to end. */
    _exit(result);
#endif
    ryot_close(ryot);
    free(from_stdin);
    return result;
}
