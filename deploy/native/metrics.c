#define _DEFAULT_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "arena.h"
#include "ryot.h"

/* Names and buckets are those of ryot/edge/telemetry.py, written as Prometheus has names. */
static const struct histogram {
    const char *name, *help;
    size_t num_bounds;
    int64_t bounds_us[18];
} HISTOGRAMS[] = {
    {"gen_ai_server_time_to_first_token_seconds",
     "From the beginning of the work to the first token",
     18,
     {1000, 5000, 10000, 20000, 40000, 60000, 80000, 100000, 250000, 500000, 750000, 1000000, 2500000, 5000000, 7500000,
      10000000, 20000000, 40000000}},
    {"gen_ai_server_time_per_output_token_seconds",
     "From a token to the next one",
     16,
     {1000, 2500, 5000, 10000, 25000, 50000, 75000, 100000, 150000, 200000, 300000, 400000, 500000, 750000, 1000000,
      2500000}},
    {"gen_ai_server_request_duration_seconds",
     "From the beginning of the work to the last token",
     18,
     {100000, 300000, 500000, 800000, 1000000, 1500000, 2000000, 2500000, 5000000, 10000000, 15000000, 20000000,
      30000000, 40000000, 50000000, 60000000, 120000000, 240000000}},
};
static const struct counter {
    const char *name, *help;
} COUNTERS[] = {
    {"ryot_requests_total", "Prompts that were answered to the end"},
    {"ryot_requests_failed_total", "Prompts that were not"},
    {"ryot_tokens_prompt_total", "Tokens of prompts"},
    {"ryot_tokens_generated_total", "Tokens generated"},
};
#define NUM_HISTOGRAMS (sizeof HISTOGRAMS / sizeof *HISTOGRAMS)
#define NUM_COUNTERS (sizeof COUNTERS / sizeof *COUNTERS)
#define MOST_BUCKETS 19
#define MOST_SAMPLES (NUM_HISTOGRAMS * (MOST_BUCKETS + 2) + NUM_COUNTERS)
enum { FIRST_TOKEN, NEXT_TOKEN, WHOLE };
enum { REQUESTS, FAILED, PROMPT_TOKENS, GENERATED_TOKENS };

#define MOST_BYTES ((size_t)1 << 20)
/* More than a device can count to, and little enough that another answer's fit in. */
#define MOST_COUNTED ((int64_t)1 << 53)
#define MOST_SECONDS 1000000000
#define NS 1000000000
/* Somebody who keeps the folder must not hold up a program that is done. */
#define WAIT_MS 5000
#define TRY_EVERY_MS 10

struct metrics {
    int64_t buckets[NUM_HISTOGRAMS][MOST_BUCKETS]; /* each with all those below it; the last one has no bound */
    int64_t total_ns[NUM_HISTOGRAMS], counters[NUM_COUNTERS];
};

/* A line of the text; `about` is what stands above the first one of a metric. */
struct sample {
    const char *about, *name;
    int64_t *value;
    bool is_time; /* in ns */
};

static size_t list_samples(struct arena *arena, struct metrics *metrics, struct sample *samples) {
    size_t count = 0;
    for (size_t i = 0; i < NUM_HISTOGRAMS; i++) {
        const struct histogram *kind = &HISTOGRAMS[i];
        const char *about = format(arena, "# HELP %s %s\n# TYPE %s histogram\n", kind->name, kind->help, kind->name);
        for (size_t k = 0; k < kind->num_bounds; k++) {
            char bound[24];
            int length = snprintf(bound, sizeof bound, "%lld.%06lld", (long long)kind->bounds_us[k] / 1000000,
                                  (long long)kind->bounds_us[k] % 1000000);
            while (bound[length - 1] == '0' && bound[length - 2] != '.') bound[--length] = 0;
            const char *name = format(arena, "%s_bucket{le=\"%s\"}", kind->name, bound);
            samples[count++] = (struct sample){k ? "" : about, name, &metrics->buckets[i][k], false};
        }
        int64_t *all = &metrics->buckets[i][kind->num_bounds];
        samples[count++] = (struct sample){"", format(arena, "%s_bucket{le=\"+Inf\"}", kind->name), all, false};
        samples[count++] = (struct sample){"", format(arena, "%s_sum", kind->name), &metrics->total_ns[i], true};
        samples[count++] = (struct sample){"", format(arena, "%s_count", kind->name), all, false};
    }
    for (size_t i = 0; i < NUM_COUNTERS; i++) {
        const struct counter *kind = &COUNTERS[i];
        const char *about = format(arena, "# HELP %s %s\n# TYPE %s counter\n", kind->name, kind->help, kind->name);
        samples[count++] = (struct sample){about, kind->name, &metrics->counters[i], false};
    }
    return count;
}

/* A number as `write_samples` writes it, up to the end of its line; false for any other. No locale has a say. */
static bool read_value(const char *text, struct sample *sample) {
    int64_t number = 0, nanoseconds = 0;
    size_t digits = strspn(text, "0123456789");
    if (!digits || digits > 16) return false;
    for (size_t i = 0; i < digits; i++) number = 10 * number + (text[i] - '0');
    text += digits;
    if (sample->is_time) {
        if (*text != '.' || strspn(text + 1, "0123456789") != 9) return false;
        for (int i = 1; i <= 9; i++) nanoseconds = 10 * nanoseconds + (text[i] - '0');
        text += 10;
    }
    if (*text || number > (sample->is_time ? MOST_SECONDS : MOST_COUNTED)) return false;
    *sample->value = sample->is_time ? number * NS + nanoseconds : number;
    return true;
}

/* Take the values from the file, where there is one. */
static void read_samples(struct arena *arena, const char *path, struct sample *samples, size_t count) {
    struct stat about;
    if (stat(path, &about) && errno == ENOENT) return;
    struct bytes text = read_file(arena, path, MOST_BYTES);
    size_t number = 0;
    for (char *line = text.items, *next; line < text.items + text.count; line = next) {
        size_t length = strcspn(line, "\n");
        next = line + length + (line[length] == '\n');
        line[length] = 0;
        number++;
        if (!strncmp(line, "# HELP ", 7) || !strncmp(line, "# TYPE ", 7)) continue;
        char *value = strrchr(line, ' ');
        if (value) *value++ = 0;
        size_t i = 0;
        while (i < count && strcmp(samples[i].name, line) != 0) i++;
        if (!value || i == count || !read_value(value, &samples[i]))
            fail_usage(arena, "name another file, or one that is not there yet",
                       "metrics file %s: line %zu is none of this program's", path, number);
    }
}

static const char *render(struct arena *arena, const struct sample *samples, size_t count) {
    struct bytes text = {0};
    for (size_t i = 0; i < count; i++) {
        const struct sample *sample = &samples[i];
        long long value = (long long)*sample->value;
        const char *line =
            sample->is_time ? format(arena, "%s%s %lld.%09lld\n", sample->about, sample->name, value / NS, value % NS)
                            : format(arena, "%s%s %lld\n", sample->about, sample->name, value);
        add_bytes(arena, &text, line, strlen(line));
    }
    add_bytes(arena, &text, "", 1);
    return text.items;
}

/* What a reader finds is the text of before or this one, also after the power was cut. */
static void replace_file(struct arena *arena, const char *path, const char *text) {
    const char *part = format(arena, "%s.part", path);
    int file = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
    bool written = file >= 0;
    for (size_t left = strlen(text); written && left;) {
        ssize_t count = write(file, text, left);
        if (count < 0 && errno == EINTR) continue;
        written = count > 0;
        if (!written) break;
        text += count;
        left -= (size_t)count;
    }
    written = written && fsync(file) == 0;
    int reason = errno;
    if (file >= 0 && close(file) && written) written = false, reason = errno;
    if (written && rename(part, path)) written = false, reason = errno;
    if (written) return;
    if (file >= 0) unlink(part);
    fail(arena, NULL, "metrics file %s: cannot be written (%s)", path, strerror(reason));
}

static void observe(struct metrics *metrics, size_t kind, int64_t time_ns) {
    const struct histogram *histogram = &HISTOGRAMS[kind];
    for (size_t i = 0; i < histogram->num_bounds; i++)
        metrics->buckets[kind][i] += time_ns <= 1000 * histogram->bounds_us[i];
    metrics->buckets[kind][histogram->num_bounds]++;
    metrics->total_ns[kind] += time_ns;
}

static void count_answer(struct metrics *metrics, const struct ryot_answer *answer) {
    metrics->counters[answer ? REQUESTS : FAILED]++;
    if (!answer) return;
    metrics->counters[PROMPT_TOKENS] += (int64_t)answer->prompt_tokens;
    metrics->counters[GENERATED_TOKENS] += (int64_t)answer->generated_tokens;
    observe(metrics, FIRST_TOKEN, answer->first_token_ns);
    observe(metrics, WHOLE, answer->whole_ns);
    if (answer->generated_tokens > 1)
        observe(metrics, NEXT_TOKEN,
                (answer->whole_ns - answer->first_token_ns) / (int64_t)(answer->generated_tokens - 1));
}

/* The folder that the file is in, open. */
static int open_folder(struct arena *arena, const char *path) {
    const char *name = strrchr(path, '/');
    const char *folder = !name ? "." : name == path ? "/" : take_text(arena, path, (size_t)(name - path));
    int opened = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (opened >= 0) return opened;
    fail_usage(arena, strstr(path, "://") ? "this program writes a file; run.py sends to an address" : NULL,
               "metrics file %s: its folder cannot be opened (%s)", path, strerror(errno));
}

/* One process at a time adds: the folder is locked, for the file is replaced. The lock ends with the process. */
static void lock_folder(struct arena *arena, const char *path, int folder) {
    const struct timespec pause = {.tv_nsec = TRY_EVERY_MS * 1000000L};
    for (int waited = 0; flock(folder, LOCK_EX | LOCK_NB); waited += TRY_EVERY_MS) {
        if ((errno != EWOULDBLOCK && errno != EINTR) || waited >= WAIT_MS)
            fail(arena, NULL, "metrics file %s: its folder is locked (%s)", path, strerror(errno));
        nanosleep(&pause, NULL);
    }
}

struct work {
    struct trap trap;
    struct arena scratch;
    int folder;
    struct metrics metrics;
    struct sample samples[MOST_SAMPLES];
};

/* Read what there is and, where something is to be added, write it. */
static bool handle(struct work *work, const char *path, bool adds, const struct ryot_answer *answer) {
    struct arena *scratch = &work->scratch;
    scratch->trap = &work->trap;
    if (setjmp(work->trap.entry)) return false;
    work->folder = open_folder(scratch, path);
    if (adds) lock_folder(scratch, path, work->folder);
    size_t count = list_samples(scratch, &work->metrics, work->samples);
    read_samples(scratch, path, work->samples, count);
    if (!adds) return true;
    count_answer(&work->metrics, answer);
    replace_file(scratch, path, render(scratch, work->samples, count));
    return true;
}

static bool handle_all(const char *path, bool adds, const struct ryot_answer *answer, struct ryot_error *error) {
    struct work work = {.folder = -1};
    bool done = handle(&work, path, adds, answer);
    if (!done && error) *error = work.trap.error;
    if (work.folder >= 0) close(work.folder);
    release(&work.scratch);
    return done;
}

bool ryot_check_metrics(const char *path, struct ryot_error *error) { return handle_all(path, false, NULL, error); }

bool ryot_add_metrics(const char *path, const struct ryot_answer *answer, struct ryot_error *error) {
    return handle_all(path, true, answer, error);
}
