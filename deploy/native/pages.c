#define _DEFAULT_SOURCE
#include "pages.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Bits of a pagemap entry, see Documentation/admin-guide/mm/pagemap.rst of Linux. */
#define PRESENT ((uint64_t)1 << 63)
#define SWAPPED ((uint64_t)1 << 62)
#define FROM_FILE ((uint64_t)1 << 61)

/* Whether no page of these addresses was written to, as a debugger does with code. */
static bool is_as_in_file(int pagemap, uintptr_t start, uintptr_t end, uintptr_t page) {
    uint64_t entries[512];
    for (uintptr_t at = start; at < end;) {
        size_t count = (end - at) / page < 512 ? (size_t)((end - at) / page) : 512;
        ssize_t wanted = (ssize_t)(count * sizeof *entries);
        if (pread(pagemap, entries, (size_t)wanted, (off_t)(at / page * sizeof *entries)) != wanted) return false;
        for (size_t i = 0; i < count; i++)
            if (entries[i] & PRESENT ? !(entries[i] & FROM_FILE) : entries[i] & SWAPPED) return false;
        at += count * page;
    }
    return true;
}

void release_code(void) {
    FILE *maps = fopen("/proc/self/maps", "r");
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    char line[4352], kind[5];
    unsigned long start, end;
    while (maps && pagemap >= 0 && fgets(line, sizeof line, maps)) {
        const char *name = strrchr(line, '/');
        if (!name || !strstr(name, "onnxruntime") || sscanf(line, "%lx-%lx %4s", &start, &end, kind) != 3) continue;
        /* Code, and what is only read beside it. */
        if (strcmp(kind, "r-xp") != 0 && strcmp(kind, "r--p") != 0) continue;
        if (is_as_in_file(pagemap, start, end, page)) madvise((void *)start, end - start, MADV_DONTNEED);
    }
    if (maps) fclose(maps);
    if (pagemap >= 0) close(pagemap);
}

#ifdef __GLIBC__
#include <malloc.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif
/* What onnxruntime takes from the heap, in small pieces, and keeps with the smallest models: 9.1 MB (1.32). */
#define START_BYTES ((uintptr_t)9000000)
/* The largest piece that comes from the heap and not from pages of its own. */
#define SMALL_BYTES ((size_t)100 << 10)

void prepare_heap(void) {
    mallopt(M_TOP_PAD, 12 << 20); /* the heap grows by so much, not by 128 KB */
    void *piece = malloc(SMALL_BYTES);
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = ((uintptr_t)piece + page - 1) / page * page;
    uintptr_t bytes = START_BYTES / page * page;
    free(piece);
    /* Another allocator than the C library's may have answered. */
    if (start < page || start + bytes > (uintptr_t)sbrk(0)) return;
    /* Neither is needed, and a kernel may know neither. */
    madvise((void *)start, bytes, MADV_HUGEPAGE);
    madvise((void *)start, bytes, MADV_POPULATE_WRITE);
}
#else
void prepare_heap(void) {}
#endif
