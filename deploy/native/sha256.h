/* SHA-256, FIPS 180-4. */
#ifndef SHA256_H
#define SHA256_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define SHA256_BLOCK_BYTES 64

/* The hash of the rest of a file in hex, `hex` with room for 65 characters; false when the file cannot be read. */
_Bool hash_file(FILE *file, char *hex);

/* Take whole blocks into the state, by the processor's own instructions where it has them. */
void add_blocks(uint32_t state[8], const uint8_t *data, size_t blocks);
void add_blocks_portably(uint32_t state[8], const uint8_t *data, size_t blocks);

#endif
