/* Memory that is given back all at once, and the one way out of a failure.
 *
 * `fail` jumps to the entry point of the library that was called (`setjmp` in ryot.c); what was taken from arenas is
 * given back there, so that no function in between has anything to clean up.
 */
#ifndef ARENA_H
#define ARENA_H

#include <setjmp.h>
#include <stddef.h>

#include "ryot.h"

struct trap {
    jmp_buf entry;
    struct ryot_error error;
};

struct arena {
    struct chunk *chunks;
    struct trap *trap;
};

/* Zeroed memory for `count` things of `size` bytes. */
void *take(struct arena *arena, size_t count, size_t size);
void release(struct arena *arena);
/* A copy that ends with a zero byte. */
char *take_text(struct arena *arena, const char *text, size_t bytes);
/* A text made as by printf. */
char *format(struct arena *arena, const char *pattern, ...) __attribute__((format(printf, 2, 3)));

/* `hint` may be NULL. */
_Noreturn void fail(struct arena *arena, const char *hint, const char *pattern, ...)
    __attribute__((format(printf, 3, 4)));
/* The same where the caller's own values are wrong. */
_Noreturn void fail_usage(struct arena *arena, const char *hint, const char *pattern, ...)
    __attribute__((format(printf, 3, 4)));

/* Token ids, or bytes, that grow. */
struct ids {
    int64_t *items;
    size_t count, room;
};
void add_id(struct arena *arena, struct ids *ids, int64_t id);

struct bytes {
    char *items;
    size_t count, room;
};
void add_bytes(struct arena *arena, struct bytes *bytes, const char *more, size_t count);

/* A whole file, followed by a zero byte that is not counted. */
struct bytes read_file(struct arena *arena, const char *path, size_t max_bytes);

#endif
