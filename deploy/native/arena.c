#define _POSIX_C_SOURCE 200809L
#include "arena.h"

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define CHUNK_BYTES ((size_t)32 << 10)
#define ALIGNMENT _Alignof(max_align_t)

struct chunk {
    struct chunk *next;
    size_t used, size;
    _Alignas(max_align_t) char data[];
};

void *take(struct arena *arena, size_t count, size_t size) {
    if (size && count > SIZE_MAX / 4 / size) fail(arena, NULL, "out of memory");
    size_t wanted = (count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    struct chunk *chunk = arena->chunks;
    if (!chunk || chunk->size - chunk->used < wanted) {
        size_t room = wanted > CHUNK_BYTES / 4 ? wanted : CHUNK_BYTES;
        chunk = calloc(1, sizeof *chunk + room);
        if (!chunk) fail(arena, NULL, "out of memory: %zu more bytes", room);
        chunk->size = room;
        if (room == wanted && arena->chunks) {
            /* What fills a chunk of its own goes behind the one that still has room. */
            chunk->next = arena->chunks->next;
            arena->chunks->next = chunk;
        } else {
            chunk->next = arena->chunks;
            arena->chunks = chunk;
        }
    }
    void *taken = chunk->data + chunk->used;
    chunk->used += wanted;
    return taken;
}

void release(struct arena *arena) {
    for (struct chunk *next, *chunk = arena->chunks; chunk; chunk = next) {
        next = chunk->next;
        free(chunk);
    }
    arena->chunks = NULL;
}

char *take_text(struct arena *arena, const char *text, size_t bytes) {
    char *copy = take(arena, bytes + 1, 1);
    memcpy(copy, text, bytes);
    return copy;
}

char *format(struct arena *arena, const char *pattern, ...) {
    va_list values, again;
    va_start(values, pattern);
    va_copy(again, values);
    int length = vsnprintf(NULL, 0, pattern, values);
    va_end(values);
    char *text = take(arena, (size_t)length + 1, 1);
    vsnprintf(text, (size_t)length + 1, pattern, again);
    va_end(again);
    return text;
}

static _Noreturn void jump(struct arena *arena, int exit_code, const char *hint, const char *pattern, va_list values) {
    struct ryot_error *error = &arena->trap->error;
    error->exit_code = exit_code;
    vsnprintf(error->message, sizeof error->message, pattern, values);
    snprintf(error->hint, sizeof error->hint, "%s", hint ? hint : "");
    for (char *c = error->message; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = ' ';
    longjmp(arena->trap->entry, 1);
}

void fail(struct arena *arena, const char *hint, const char *pattern, ...) {
    va_list values;
    va_start(values, pattern);
    jump(arena, RYOT_FAILED, hint, pattern, values);
}

void fail_usage(struct arena *arena, const char *hint, const char *pattern, ...) {
    va_list values;
    va_start(values, pattern);
    jump(arena, RYOT_WRONG_USAGE, hint, pattern, values);
}

void add_id(struct arena *arena, struct ids *ids, int64_t id) {
    if (ids->count == ids->room) {
        size_t room = ids->room ? 2 * ids->room : 64;
        int64_t *items = take(arena, room, sizeof *items);
        if (ids->count) memcpy(items, ids->items, ids->count * sizeof *items);
        ids->items = items;
        ids->room = room;
    }
    ids->items[ids->count++] = id;
}

void add_bytes(struct arena *arena, struct bytes *bytes, const char *more, size_t count) {
    if (!count) return;
    if (bytes->room - bytes->count < count) {
        size_t room = 2 * bytes->room > bytes->count + count ? 2 * bytes->room : bytes->count + count + 64;
        char *items = take(arena, room, 1);
        if (bytes->count) memcpy(items, bytes->items, bytes->count);
        bytes->items = items;
        bytes->room = room;
    }
    memcpy(bytes->items + bytes->count, more, count);
    bytes->count += count;
}

struct bytes read_file(struct arena *arena, const char *path, size_t max_bytes) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(arena, NULL, "%s: cannot be read (%s)", path, strerror(errno));
    struct stat about;
    if (fstat(fileno(file), &about) || !S_ISREG(about.st_mode) || (uintmax_t)about.st_size > max_bytes) {
        fclose(file);
        fail(arena, NULL, "%s: is no file, or one of more than %zu bytes", path, max_bytes);
    }
    size_t size = (size_t)about.st_size;
    struct trap *outer = arena->trap, inner;
    arena->trap = &inner; /* the file is closed whatever happens */
    char *data = setjmp(inner.entry) ? NULL : take(arena, size + 1, 1);
    arena->trap = outer;
    size_t got = data ? fread(data, 1, size, file) : 0;
    fclose(file);
    if (!data) fail(arena, NULL, "%s: out of memory", path);
    if (got != size) fail(arena, NULL, "%s: cannot be read, %zu of %zu bytes came", path, got, size);
    data[size] = 0;
    return (struct bytes){data, size, size};
}
