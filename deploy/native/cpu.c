#include "cpu.h"

#include <stdio.h>
#include <string.h>

/* The flags of one processor are some 2 KB, and stand at its beginning. */
#define MOST_BYTES ((size_t)1 << 16)

/* Instruction sets that sum 8-bit products in 32 bits, as x86 and Arm name them: those of ryot/edge/machine.py. */
static const char *const EXACT[] = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"};

static bool has(const char *flags, const char *name) {
    size_t length = strlen(name);
    for (const char *at = flags; (at = strstr(at, name)); at += length)
        if ((at == flags || at[-1] == ' ') && (at[length] == ' ' || !at[length])) return true;
    return false;
}

bool overflows_int8(void) {
    char about[MOST_BYTES];
    FILE *file = fopen("/proc/cpuinfo", "r");
    size_t count = file ? fread(about, 1, sizeof about - 1, file) : 0;
    if (file) fclose(file);
    about[count] = 0;
    /* x86 with AVX2 and nothing newer for it; Arm, which says `Features`, has no such kernels. */
    char *flags = strstr(about, "\nflags\t");
    if (!flags || !(flags = strchr(flags, ':'))) return false;
    flags[strcspn(flags, "\n")] = 0;
    for (size_t i = 0; i < sizeof EXACT / sizeof *EXACT; i++)
        if (has(flags, EXACT[i])) return false;
    return has(flags, "avx2");
}
