#include "sha256.h"

#include <stdbool.h>

#define READ_BYTES (64 << 10)

bool hash_file(FILE *file, char *hex) {
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    static const char digits[] = "0123456789abcdef";
    uint8_t data[READ_BYTES + 2 * SHA256_BLOCK_BYTES];
    uint64_t total = 0;
    size_t count;
    /* fread gives less than asked for only at the end. */
    while ((count = fread(data, 1, READ_BYTES, file)) == READ_BYTES) {
        add_blocks(state, data, READ_BYTES / SHA256_BLOCK_BYTES);
        total += count;
    }
    if (ferror(file)) return false;
    total += count;
    data[count++] = 0x80;
    while (count % SHA256_BLOCK_BYTES != SHA256_BLOCK_BYTES - 8) data[count++] = 0;
    for (int i = 0; i < 8; i++) data[count++] = (uint8_t)(8 * total >> (56 - 8 * i));
    add_blocks(state, data, count / SHA256_BLOCK_BYTES);
    for (int i = 0; i < 64; i++) hex[i] = digits[state[i / 8] >> (28 - i % 8 * 4) & 15];
    hex[64] = 0;
    return true;
}
