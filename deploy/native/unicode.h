/* Characters: UTF-8, the categories that regular expressions ask for, and normalization form C. */
#ifndef UNICODE_H
#define UNICODE_H

#include "arena.h"

/* General categories; the order is unicode_tables.py's. */
/* clang-format off */
enum category {
    LU, LL, LT, LM, LO, MN, MC, ME, ND, NL, NO, PC, PD, PS, PE, PI, PF, PO, SM, SC, SK, SO, ZS, ZL, ZP, CC, CF, CO, CN
};
/* clang-format on */

enum category category_of(uint32_t character);
bool is_space(uint32_t character);
bool is_word(uint32_t character); /* \w */
/* The value of a hexadecimal digit; -1 for what is none. */
int hex_value(char digit);

/* The character at a place of valid UTF-8, and its length there. */
size_t read_character(const char *at, uint32_t *character);
size_t write_character(char *to, uint32_t character);
/* Bytes of the character that begins with `first`; 0 where none does. */
size_t character_bytes(unsigned char first);
bool is_utf8(const char *text, size_t bytes);
/* Bytes of a text that are valid UTF-8 from its start. */
size_t valid_bytes(const char *text, size_t bytes);

/* Normalization form C of valid UTF-8. */
struct bytes normalize_nfc(struct arena *arena, struct bytes text);

#endif
