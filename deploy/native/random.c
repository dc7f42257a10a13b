#include "random.h"

#include <stddef.h>

#define POOL 4

/* Products of 64 bits without a type of 128, which 32-bit processors lack. */
static void multiply(uint64_t a, uint64_t b, uint64_t *high, uint64_t *low) {
    uint64_t a0 = a & 0xFFFFFFFF, a1 = a >> 32, b0 = b & 0xFFFFFFFF, b1 = b >> 32;
    uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (middle & 0xFFFFFFFF);
    *high = a1 * b1 + (middle >> 32) + (other >> 32);
    *low = a * b;
}

static void add(uint64_t *to, const uint64_t *more) {
    to[0] += more[0];
    to[1] += more[1] + (to[0] < more[0]);
}

static void advance(struct random *random) {
    static const uint64_t factor[2] = {0x4385df649fccf645, 0x2360ed051fc65da4};
    uint64_t high, low;
    multiply(random->state[0], factor[0], &high, &low);
    high += random->state[0] * factor[1] + random->state[1] * factor[0];
    random->state[0] = low;
    random->state[1] = high;
    add(random->state, random->increment);
}

static uint32_t hash_word(uint32_t value, uint32_t *constant, uint32_t factor) {
    value ^= *constant;
    *constant *= factor;
    value *= *constant;
    return value ^ value >> 16;
}

static uint32_t mix(uint32_t x, uint32_t y) {
    uint32_t mixed = 0xca01f9ddu * x - 0x4973f715u * y;
    return mixed ^ mixed >> 16;
}

/* numpy's SeedSequence over these words, whose entropy fits its pool. */
static void spread_seed(const uint32_t *words, size_t count, uint32_t *out, size_t num_out) {
    uint32_t pool[POOL], constant = 0x43b0d7e5;
    for (size_t i = 0; i < POOL; i++) pool[i] = hash_word(i < count ? words[i] : 0, &constant, 0x931e8875);
    for (size_t from = 0; from < POOL; from++)
        for (size_t to = 0; to < POOL; to++)
            if (from != to) pool[to] = mix(pool[to], hash_word(pool[from], &constant, 0x931e8875));
    constant = 0x8b51f9dd;
    for (size_t i = 0; i < num_out; i++) out[i] = hash_word(pool[i % POOL], &constant, 0x58f38ded);
}

struct random seed_random(uint64_t seed, uint32_t row) {
    uint32_t words[3] = {(uint32_t)seed}, out[8];
    size_t count = 1;
    if (seed >> 32) words[count++] = (uint32_t)(seed >> 32);
    words[count++] = row;
    spread_seed(words, count, out, 8);
    uint64_t values[4];
    for (int i = 0; i < 4; i++) values[i] = (uint64_t)out[2 * i + 1] << 32 | out[2 * i];
    struct random random = {.increment = {values[3] << 1 | 1, values[2] << 1 | values[3] >> 63}};
    const uint64_t start[2] = {values[1], values[0]};
    advance(&random);
    add(random.state, start);
    advance(&random);
    return random;
}

double next_uniform(struct random *random) {
    advance(random);
    uint64_t folded = random->state[1] ^ random->state[0];
    int turn = (int)(random->state[1] >> 58);
    folded = turn ? folded >> turn | folded << (64 - turn) : folded;
    return (double)(folded >> 11) / 9007199254740992.0; /* 2 ** 53 */
}
