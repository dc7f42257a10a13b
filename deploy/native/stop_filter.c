#include "stop_filter.h"

#include <string.h>

/* Length of the longest end of the text with which a stop string begins. */
static size_t overlap(const struct bytes *text, const char *stop) {
    size_t length = strlen(stop) - 1;
    if (length > text->count) length = text->count;
    for (; length; length--)
        if (!memcmp(text->items + text->count - length, stop, length)) return length;
    return 0;
}

static size_t find(const struct bytes *text, const char *stop) {
    size_t length = strlen(stop);
    for (size_t at = 0; at + length <= text->count; at++)
        if (!memcmp(text->items + at, stop, length)) return at;
    return SIZE_MAX;
}

size_t push_stop(struct arena *arena, struct stop_filter *filter, const struct bytes *text) {
    size_t first = SIZE_MAX, keep = 0;
    if (filter->stopped) return 0;
    add_bytes(arena, &filter->held, text->items, text->count);
    for (size_t i = 0; i < filter->num_stop; i++) {
        size_t at = find(&filter->held, filter->stop[i]), held = overlap(&filter->held, filter->stop[i]);
        if (at < first) first = at;
        if (held > keep) keep = held;
    }
    filter->stopped = first != SIZE_MAX;
    return filter->stopped ? first : filter->held.count - keep;
}

void take_passed(struct stop_filter *filter, size_t bytes) {
    filter->held.count -= bytes;
    if (filter->held.count) memmove(filter->held.items, filter->held.items + bytes, filter->held.count);
}
