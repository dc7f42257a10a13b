#include "sampling.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "random.h"

/* Tokens that are sorted first, and where those are too few; then all. */
static const size_t HEADS[] = {128, 2048, SIZE_MAX};

struct choice {
    float logit;
    uint32_t id;
};

struct sampler {
    struct ryot_sampling params;
    struct random random;
    size_t vocab_size;
    bool *seen;
    float *logits;
    double *weights;
    struct choice *best;
    double *probabilities, *cumulative;
};

static double or_one(double value) { return value == 0 ? 1 : value; }

bool is_greedy(const struct ryot_sampling *params) {
    return params->temperature == 0 && or_one(params->repetition_penalty) == 1;
}

struct sampler *make_sampler(struct arena *arena, const struct ryot_sampling *given, size_t vocab_size,
                             const struct ids *prompt) {
    struct ryot_sampling p = *given;
    p.top_p = or_one(p.top_p);
    p.repetition_penalty = or_one(p.repetition_penalty);
    const struct {
        const char *name;
        bool holds;
        double value;
        const char *rule;
    } rules[] = {
        {"temperature", p.temperature >= 0 && isfinite(p.temperature), p.temperature, "a number not below 0"},
        {"top_k", p.top_k >= 0, (double)p.top_k, "a whole number not below 0"},
        {"top_p", p.top_p > 0 && p.top_p <= 1, p.top_p, "a number above 0, at most 1"},
        {"min_p", p.min_p >= 0 && p.min_p <= 1, p.min_p, "a number from 0 to 1"},
        {"repetition_penalty", p.repetition_penalty > 0 && isfinite(p.repetition_penalty), p.repetition_penalty,
         "a number above 0"},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (!rules[i].holds)
            fail_usage(arena, NULL, "%s: got %g, expected %s", rules[i].name, rules[i].value, rules[i].rule);
    struct sampler *s = take(arena, 1, sizeof *s);
    s->params = p;
    s->random = seed_random(p.seed, 0);
    s->vocab_size = vocab_size;
    s->seen = take(arena, vocab_size, sizeof *s->seen);
    s->logits = take(arena, vocab_size, sizeof *s->logits);
    s->weights = take(arena, vocab_size, sizeof *s->weights);
    s->best = take(arena, vocab_size, sizeof *s->best);
    s->probabilities = take(arena, vocab_size, sizeof *s->probabilities);
    s->cumulative = take(arena, vocab_size, sizeof *s->cumulative);
    for (size_t i = 0; i < prompt->count; i++) s->seen[prompt->items[i]] = true;
    return s;
}

static bool is_better(struct choice a, struct choice b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

static int compare_choices(const void *a, const void *b) {
    return is_better(*(const struct choice *)a, *(const struct choice *)b) ? -1 : 1;
}

static void sift_down(struct choice *heap, size_t count) {
    struct choice moved = heap[0];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < count; i = child) {
        if (child + 1 < count && is_better(heap[child], heap[child + 1])) child++;
        if (!is_better(moved, heap[child])) break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

/* The best `count` tokens, best first; equal ones by lower id. */
static void sort_best(struct sampler *s, size_t count) {
    struct choice *heap = s->best; /* the worst of them on top */
    size_t used = 0;
    for (uint32_t id = 0; id < s->vocab_size; id++) {
        struct choice added = {s->logits[id], id};
        if (used < count) {
            size_t i = used++;
            for (; i && is_better(heap[(i - 1) / 2], added); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
            heap[i] = added;
        } else if (is_better(added, heap[0])) {
            heap[0] = added;
            sift_down(heap, count);
        }
    }
    qsort(heap, used, sizeof *heap, compare_choices);
}

static int compare_ids(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Probabilities of the sorted tokens among those that top-k leaves; sums are in the order of ids. */
static void find_probabilities(struct arena *arena, struct sampler *s, size_t count) {
    double top = s->best[0].logit, sum = 0;
    if (s->params.top_k) {
        uint32_t *ids = take(arena, count, sizeof *ids);
        for (size_t i = 0; i < count; i++) ids[i] = s->best[i].id;
        qsort(ids, count, sizeof *ids, compare_ids);
        for (size_t i = 0; i < count; i++)
            sum += s->weights[ids[i]] = exp(((double)s->logits[ids[i]] - top) / s->params.temperature);
    } else {
        for (size_t id = 0; id < s->vocab_size; id++)
            sum += s->weights[id] = exp(((double)s->logits[id] - top) / s->params.temperature);
    }
    double total = 0;
    for (size_t i = 0; i < count; i++) {
        s->probabilities[i] = s->weights[s->best[i].id] / sum;
        s->cumulative[i] = total += s->probabilities[i];
    }
}

/* How many of the sorted tokens top-p and min-p keep: at least 1; more than given where all stay. */
static size_t count_kept(const struct sampler *s, size_t count) {
    size_t keep = count + 1;
    if (s->params.top_p < 1) {
        size_t before = 0;
        while (before < count && s->cumulative[before] < s->params.top_p) before++;
        if (before + 1 < keep) keep = before + 1;
    }
    if (s->params.min_p > 0) {
        size_t stay = 0;
        while (stay < count && s->probabilities[stay] >= s->params.min_p * s->probabilities[0]) stay++;
        if (stay < count && stay < keep) keep = stay;
    }
    return keep;
}

static int64_t token_at(const struct sampler *s, size_t count, double point) {
    size_t index = 0;
    while (index + 1 < count && s->cumulative[index] <= point) index++;
    return s->best[index].id;
}

/* Where nothing is cut there is nothing to sort: ids in their order, weights in float, sums in double. */
static int64_t draw_uncut(struct sampler *s, double uniform) {
    float best = s->logits[0], temperature = fmaxf((float)s->params.temperature, FLT_MIN);
    for (size_t id = 1; id < s->vocab_size; id++)
        if (s->logits[id] > best) best = s->logits[id];
    double *sums = s->cumulative, sum = 0;
    for (size_t id = 0; id < s->vocab_size; id++) sums[id] = sum += (double)expf((s->logits[id] - best) / temperature);
    size_t chosen = 0;
    while (chosen + 1 < s->vocab_size && sums[chosen] <= uniform * sum) chosen++;
    return (int64_t)chosen;
}

static int64_t draw(struct arena *arena, struct sampler *s, double uniform) {
    if (!s->params.top_k && s->params.top_p >= 1 && s->params.min_p == 0) return draw_uncut(s, uniform);
    size_t top_k = (uint64_t)s->params.top_k < s->vocab_size ? (size_t)s->params.top_k : 0;
    for (size_t i = 0;; i++) {
        size_t head = HEADS[i] < s->vocab_size ? HEADS[i] : s->vocab_size;
        bool all = head == s->vocab_size;
        if (top_k > head) continue;
        if (top_k) head = top_k;
        sort_best(s, head);
        find_probabilities(arena, s, head);
        size_t keep = count_kept(s, head);
        bool cut = keep < head || (keep == head && !s->params.top_k && !all);
        if (cut) return token_at(s, keep, uniform * s->cumulative[keep - 1]);
        if (all || s->params.top_k) return token_at(s, head, uniform);
    }
}

int64_t choose_token(struct arena *arena, struct sampler *s, const float *logits) {
    float penalty = (float)s->params.repetition_penalty;
    size_t greatest = 0;
    for (size_t id = 0; id < s->vocab_size; id++) {
        float logit = logits[id];
        if (isnan(logit)) fail(arena, NULL, "the model's logits are not numbers (NaN); its weights are damaged");
        if (s->seen[id] && penalty != 1) {
            logit = logit > 0 ? logit / penalty : logit * penalty;
            logit = fminf(fmaxf(logit, -FLT_MAX), FLT_MAX);
        }
        s->logits[id] = logit;
        if (logit > s->logits[greatest]) greatest = id;
    }
    int64_t token = s->params.temperature == 0 ? (int64_t)greatest : draw(arena, s, next_uniform(&s->random));
    s->seen[token] = true;
    return token;
}
