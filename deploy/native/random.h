/* numpy's default random numbers: PCG64 (O'Neill 2014), seeded as `numpy.random.default_rng([seed, row])`. */
#ifndef RANDOM_H
#define RANDOM_H

#include <stdint.h>

struct random {
    uint64_t state[2], increment[2]; /* 128 bits each, the lower half first */
};

struct random seed_random(uint64_t seed, uint32_t row);
/* From 0 to below 1. */
double next_uniform(struct random *random);

#endif
