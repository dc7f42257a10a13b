#include "json.h"

#include <math.h>
#include <string.h>

#include "unicode.h"

#define MAX_DEPTH 64
#define MAX_FILE_BYTES ((size_t)256 << 20)

struct parser {
    struct arena *arena;
    const char *start, *at, *end, *where;
    int depth;
    /* Values whose array or object has not ended. */
    struct json *open;
    size_t num_open, room;
};

static _Noreturn void wrong(struct parser *p, const char *what) {
    fail(p->arena, NULL, "%s: not valid JSON, perhaps cut short (%s at byte %zu)", p->where, what,
         (size_t)(p->at - p->start));
}

static void skip_space(struct parser *p) {
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\n' || *p->at == '\t' || *p->at == '\r')) p->at++;
}

static bool take_word(struct parser *p, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(p->end - p->at) < length || memcmp(p->at, word, length) != 0) return false;
    p->at += length;
    return true;
}

static double parse_number(struct parser *p) {
    bool negative = take_word(p, "-");
    const char *first = p->at;
    /* Not strtod, which reads by the locale of the program that links this. */
    double mantissa = 0;
    int exponent = 0;
    for (; p->at < p->end && *p->at >= '0' && *p->at <= '9'; p->at++) mantissa = mantissa * 10 + (*p->at - '0');
    if (p->at == first || (*first == '0' && p->at > first + 1)) wrong(p, "a number");
    if (take_word(p, ".")) {
        const char *fraction = p->at;
        for (; p->at < p->end && *p->at >= '0' && *p->at <= '9'; p->at++) {
            if (p->at - fraction > 17) continue; /* beyond what a double holds */
            mantissa = mantissa * 10 + (*p->at - '0');
            exponent--;
        }
        if (p->at == fraction) wrong(p, "a number");
    }
    if (take_word(p, "e") || take_word(p, "E")) {
        bool minus = take_word(p, "-");
        if (!minus) take_word(p, "+");
        const char *power = p->at;
        int value = 0;
        for (; p->at < p->end && *p->at >= '0' && *p->at <= '9'; p->at++)
            if (value < 10000) value = value * 10 + (*p->at - '0');
        if (p->at == power) wrong(p, "a number");
        exponent += minus ? -value : value;
    }
    double value = exponent < 0 ? mantissa / pow(10, -exponent) : mantissa * pow(10, exponent);
    return negative ? -value : value;
}

static unsigned parse_hex(struct parser *p) {
    unsigned value = 0;
    if (p->end - p->at < 4) wrong(p, "a text");
    for (int i = 0; i < 4; i++, p->at++) {
        int digit = hex_value(*p->at);
        if (digit < 0) wrong(p, "a text");
        value = value * 16 + (unsigned)digit;
    }
    return value;
}

static size_t parse_escape(struct parser *p, char *to) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    if (p->at == p->end) wrong(p, "a text");
    char c = *p->at++;
    if (c == 'u') {
        unsigned code = parse_hex(p);
        if (code >= 0xD800 && code < 0xDC00) {
            if (!take_word(p, "\\u")) wrong(p, "half of a pair");
            unsigned low = parse_hex(p);
            if (low < 0xDC00 || low > 0xDFFF) wrong(p, "half of a pair");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        } else if (code >= 0xDC00 && code < 0xE000) {
            wrong(p, "half of a pair");
        }
        return write_character(to, code);
    }
    const char *name = c ? strchr(names, c) : NULL;
    if (!name) wrong(p, "an escape");
    *to = values[name - names];
    return 1;
}

static struct json parse_text(struct parser *p) {
    const char *first = p->at;
    while (p->at < p->end && *p->at != '"') {
        if ((unsigned char)*p->at < 0x20) wrong(p, "a text");
        p->at += *p->at == '\\' && p->end - p->at > 1 ? 2 : 1;
    }
    if (p->at >= p->end) wrong(p, "a text");
    /* No escape makes a text longer. */
    char *text = take(p->arena, (size_t)(p->at - first) + 1, 1);
    size_t count = 0;
    for (p->at = first; *p->at != '"';) {
        if (*p->at == '\\') {
            p->at++;
            count += parse_escape(p, text + count);
        } else {
            text[count++] = *p->at++;
        }
    }
    p->at++;
    if (!is_utf8(text, count)) wrong(p, "a text that is not UTF-8");
    return (struct json){.kind = JSON_TEXT, .count = (uint32_t)count, .text = text};
}

static void push(struct parser *p, struct json value) {
    if (p->num_open == p->room) {
        size_t room = p->room ? 2 * p->room : 256;
        struct json *open = take(p->arena, room, sizeof *open);
        if (p->num_open) memcpy(open, p->open, p->num_open * sizeof *open);
        p->open = open;
        p->room = room;
    }
    p->open[p->num_open++] = value;
}

static void parse_value(struct parser *p);

static void parse_items(struct parser *p, enum json_kind kind, const char *close) {
    size_t first = p->num_open;
    if (++p->depth > MAX_DEPTH) wrong(p, "too many brackets in each other");
    skip_space(p);
    for (bool more = !take_word(p, close); more;) {
        if (kind == JSON_OBJECT) {
            skip_space(p);
            if (!take_word(p, "\"")) wrong(p, "a key");
            push(p, parse_text(p));
            skip_space(p);
            if (!take_word(p, ":")) wrong(p, "a colon");
        }
        parse_value(p);
        skip_space(p);
        more = take_word(p, ",");
        if (!more && !take_word(p, close)) wrong(p, "a comma");
    }
    p->depth--;
    size_t count = p->num_open - first;
    struct json *items = take(p->arena, count, sizeof *items);
    if (count) memcpy(items, p->open + first, count * sizeof *items);
    p->num_open = first;
    push(p, (struct json){.kind = kind, .count = (uint32_t)count, .items = items});
}

static void parse_value(struct parser *p) {
    skip_space(p);
    if (take_word(p, "\"")) push(p, parse_text(p));
    else if (take_word(p, "{")) parse_items(p, JSON_OBJECT, "}");
    else if (take_word(p, "[")) parse_items(p, JSON_ARRAY, "]");
    else if (take_word(p, "null")) push(p, (struct json){.kind = JSON_NULL});
    else if (take_word(p, "true")) push(p, (struct json){.kind = JSON_TRUE});
    else if (take_word(p, "false")) push(p, (struct json){.kind = JSON_FALSE});
    else push(p, (struct json){.kind = JSON_NUMBER, .number = parse_number(p)});
}

const struct json *parse_json(struct arena *arena, struct bytes text, const char *where) {
    struct parser p = {
        .arena = arena, .start = text.items, .at = text.items, .end = text.items + text.count, .where = where};
    parse_value(&p);
    skip_space(&p);
    if (p.at != p.end) wrong(&p, "something behind the end");
    return p.open;
}

const struct json *read_json(struct arena *arena, const char *path) {
    return parse_json(arena, read_file(arena, path, MAX_FILE_BYTES), path);
}

const struct json *member(const struct json *object, const char *key) {
    if (!is_kind(object, JSON_OBJECT)) return NULL;
    for (uint32_t i = object->count; i >= 2; i -= 2)
        if (is_text(&object->items[i - 2], key)) return &object->items[i - 1];
    return NULL;
}

bool is_kind(const struct json *value, enum json_kind kind) { return value && value->kind == kind; }

bool is_text(const struct json *value, const char *text) {
    return is_kind(value, JSON_TEXT) && value->count == strlen(text) && memcmp(value->text, text, value->count) == 0;
}

bool is_nothing(const struct json *value) { return !value || value->kind == JSON_NULL; }

bool is_true(const struct json *value) { return is_kind(value, JSON_TRUE); }

static const char *const KIND_NAMES[] = {"null",   "a truth value", "a truth value", "a number",
                                         "a text", "a list",        "a table"};

const struct json *need(struct arena *arena, const struct json *object, const char *key, enum json_kind kind,
                        const char *where) {
    const struct json *value = member(object, key);
    if (!value) fail(arena, NULL, "%s: '%s' is missing", where, key);
    bool truth = kind == JSON_TRUE || kind == JSON_FALSE;
    if (value->kind != kind && !(truth && (value->kind == JSON_TRUE || value->kind == JSON_FALSE)))
        fail(arena, NULL, "%s: %s: got %s, expected %s", where, key, KIND_NAMES[value->kind], KIND_NAMES[kind]);
    return value;
}

int64_t as_integer(struct arena *arena, const struct json *value, int64_t low, int64_t high, const char *where) {
    if (!is_kind(value, JSON_NUMBER)) fail(arena, NULL, "%s: expected a whole number", where);
    double number = value->number;
    if (!(number >= (double)low && number <= (double)high) || number != floor(number))
        fail(arena, NULL, "%s: got %.17g, expected a whole number from %lld to %lld", where, number, (long long)low,
             (long long)high);
    return (int64_t)number;
}

int64_t need_integer(struct arena *arena, const struct json *object, const char *key, int64_t low, int64_t high,
                     const char *where) {
    const struct json *value = need(arena, object, key, JSON_NUMBER, where);
    return as_integer(arena, value, low, high, format(arena, "%s: %s", where, key));
}

const char *need_text(struct arena *arena, const struct json *object, const char *key, const char *where) {
    const struct json *value = need(arena, object, key, JSON_TEXT, where);
    if (strlen(value->text) != value->count) fail(arena, NULL, "%s: %s: has a zero byte", where, key);
    return value->text;
}
