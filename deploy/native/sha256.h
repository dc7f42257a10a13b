/* SHA-256, FIPS 180-4. */
#ifndef SHA256_H
#define SHA256_H

#include <stdint.h>
#include <stdio.h>

/* The hash of the rest of a file in hex, `hex` with room for 65 characters; false when the file cannot be read. */
_Bool hash_file(FILE *file, char *hex);

#endif
