#include "unicode.h"

#include <string.h>

#include "unicode_tables.h"

#define COUNT(table) (sizeof(table) / sizeof *(table))

/* Hangul syllables are composed by a rule, see chapter 3.12 of the Unicode standard. */
enum { S_BASE = 0xAC00, L_BASE = 0x1100, V_BASE = 0x1161, T_BASE = 0x11A7, L_COUNT = 19, V_COUNT = 21, T_COUNT = 28 };
enum { S_COUNT = L_COUNT * V_COUNT * T_COUNT };

/* Index of the last entry whose key is at most `key`; entries are sorted, and the first one's is at most any. */
static size_t find_last(const uint32_t *table, size_t count, int shift, uint32_t key) {
    size_t low = 0, high = count;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (table[middle] >> shift <= key) low = middle;
        else high = middle;
    }
    return low;
}

enum category category_of(uint32_t character) {
    return (enum category)(CATEGORY_STARTS[find_last(CATEGORY_STARTS, COUNT(CATEGORY_STARTS), 5, character)] & 31);
}

bool is_space(uint32_t character) { return SPACES[find_last(SPACES, COUNT(SPACES), 0, character)] == character; }

bool is_word(uint32_t character) {
    enum category category = category_of(character);
    return category <= NO || category == PC;
}

int hex_value(char digit) {
    if (digit >= '0' && digit <= '9') return digit - '0';
    if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
    return digit >= 'A' && digit <= 'F' ? digit - 'A' + 10 : -1;
}

size_t character_bytes(unsigned char first) {
    return first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
}

size_t read_character(const char *at, uint32_t *character) {
    const unsigned char *b = (const unsigned char *)at;
    if (b[0] < 0x80) return *character = b[0], 1;
    if (b[0] < 0xE0) return *character = (b[0] & 31u) << 6 | (b[1] & 63u), 2;
    if (b[0] < 0xF0) return *character = (b[0] & 15u) << 12 | (b[1] & 63u) << 6 | (b[2] & 63u), 3;
    return *character = (b[0] & 7u) << 18 | (b[1] & 63u) << 12 | (b[2] & 63u) << 6 | (b[3] & 63u), 4;
}

size_t write_character(char *to, uint32_t c) {
    unsigned char *b = (unsigned char *)to;
    if (c < 0x80) return b[0] = (unsigned char)c, 1;
    size_t bytes = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = bytes - 1; i; i--, c >>= 6) b[i] = (unsigned char)(0x80 | (c & 63));
    b[0] = (unsigned char)((0xF00 >> bytes & 0xFF) | c);
    return bytes;
}

size_t valid_bytes(const char *text, size_t bytes) {
    size_t at = 0;
    while (at < bytes) {
        const unsigned char *b = (const unsigned char *)text + at;
        size_t length = character_bytes(b[0]);
        if (!length || length > bytes - at) return at;
        for (size_t i = 1; i < length; i++)
            if ((b[i] & 0xC0) != 0x80) return at;
        /* Longer than it need be, half of a pair, or beyond the last character. */
        if ((b[0] == 0xE0 && b[1] < 0xA0) || (b[0] == 0xED && b[1] > 0x9F) || (b[0] == 0xF0 && b[1] < 0x90) ||
            (b[0] == 0xF4 && b[1] > 0x8F))
            return at;
        at += length;
    }
    return at;
}

bool is_utf8(const char *text, size_t bytes) { return valid_bytes(text, bytes) == bytes; }

static uint32_t combining_class(uint32_t character) {
    uint32_t found = COMBINING[find_last(COMBINING, COUNT(COMBINING), 8, character)];
    return found >> 8 == character ? found & 0xFF : 0;
}

/* The row that begins with these keys. */
static const uint32_t *find_row(const uint32_t (*table)[3], size_t count, uint32_t a, uint32_t b, int keys) {
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const uint32_t *row = table[middle];
        if (row[0] == a && (keys == 1 || row[1] == b)) return row;
        if (row[0] < a || (row[0] == a && keys == 2 && row[1] < b)) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

static void decompose(struct arena *arena, struct ids *to, uint32_t c) {
    if (c >= S_BASE && c < S_BASE + S_COUNT) {
        uint32_t index = c - S_BASE;
        add_id(arena, to, L_BASE + index / (V_COUNT * T_COUNT));
        add_id(arena, to, V_BASE + index / T_COUNT % V_COUNT);
        if (index % T_COUNT) add_id(arena, to, T_BASE + index % T_COUNT);
        return;
    }
    const uint32_t *row = find_row(DECOMPOSITIONS, COUNT(DECOMPOSITIONS), c, 0, 1);
    if (!row) {
        add_id(arena, to, c);
        return;
    }
    decompose(arena, to, row[1]);
    if (row[2]) decompose(arena, to, row[2]);
}

/* The character that two make together; 0 where they make none. */
static uint32_t compose(uint32_t a, uint32_t b) {
    if (a >= L_BASE && a < L_BASE + L_COUNT && b >= V_BASE && b < V_BASE + V_COUNT)
        return S_BASE + ((a - L_BASE) * V_COUNT + (b - V_BASE)) * T_COUNT;
    if (a >= S_BASE && a < S_BASE + S_COUNT && (a - S_BASE) % T_COUNT == 0 && b > T_BASE && b < T_BASE + T_COUNT)
        return a + (b - T_BASE);
    const uint32_t *row = find_row(COMPOSITIONS, COUNT(COMPOSITIONS), a, b, 2);
    return row ? row[2] : 0;
}

struct bytes normalize_nfc(struct arena *arena, struct bytes text) {
    size_t first = 0;
    while (first < text.count && (unsigned char)text.items[first] < 0x80) first++;
    if (first == text.count) return text;

    struct ids all = {0};
    for (size_t at = 0; at < text.count;) {
        uint32_t c;
        at += read_character(text.items + at, &c);
        decompose(arena, &all, c);
    }
    /* Marks of one character stand in the order of their classes; those of one class stay in theirs. */
    for (size_t i = 1; i < all.count; i++) {
        uint32_t order = combining_class((uint32_t)all.items[i]);
        for (size_t k = i; order && k && combining_class((uint32_t)all.items[k - 1]) > order; k--) {
            int64_t swapped = all.items[k];
            all.items[k] = all.items[k - 1];
            all.items[k - 1] = swapped;
        }
    }
    size_t count = 0, starter = SIZE_MAX;
    uint32_t last = 0; /* class of what was kept behind the starter last */
    for (size_t i = 0; i < all.count; i++) {
        uint32_t c = (uint32_t)all.items[i], order = combining_class(c);
        bool blocked = starter == SIZE_MAX || (count - 1 > starter && (last >= order || !last));
        uint32_t made = blocked ? 0 : compose((uint32_t)all.items[starter], c);
        if (made) {
            all.items[starter] = made;
            continue;
        }
        if (!order) starter = count;
        last = order;
        all.items[count++] = c;
    }
    struct bytes result = {take(arena, 4 * count + 1, 1), 0, 4 * count};
    for (size_t i = 0; i < count; i++)
        result.count += write_character(result.items + result.count, (uint32_t)all.items[i]);
    return result;
}
