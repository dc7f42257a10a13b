/* What the CPU has, as the system says. */
#ifndef CPU_H
#define CPU_H

#include <stdbool.h>

/* Whether int8 kernels here add pairs of products in 16 bits, where those of 8-bit weights overflow. */
bool overflows_int8(void);

#endif
