/* Text that passes but for what is, or may yet become, a stop string. */
#ifndef STOP_FILTER_H
#define STOP_FILTER_H

#include "arena.h"

struct stop_filter {
    const char *const *stop;
    size_t num_stop;
    struct bytes held;
    bool stopped; /* nothing passes any more */
};

/* Number of bytes at the start of `held` that may pass now, of all text so far; the caller takes them off. */
size_t push_stop(struct arena *arena, struct stop_filter *filter, const struct bytes *text);
void take_passed(struct stop_filter *filter, size_t bytes);

#endif
