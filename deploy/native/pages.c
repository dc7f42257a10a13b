#define _DEFAULT_SOURCE
#include "pages.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
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
