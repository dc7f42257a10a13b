/* JSON as RFC 8259 has it, read into a tree. */
#ifndef JSON_H
#define JSON_H

#include "arena.h"

enum json_kind { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_TEXT, JSON_ARRAY, JSON_OBJECT };

struct json {
    enum json_kind kind;
    uint32_t count; /* bytes of a text, items of an array, twice the members of an object */
    union {
        double number;
        const char *text;         /* UTF-8, a zero byte behind it */
        const struct json *items; /* of an object: key, value, key, value */
    };
};

/* The tree of a text; `where` stands before what is wrong with it. */
const struct json *parse_json(struct arena *arena, struct bytes text, const char *where);
const struct json *read_json(struct arena *arena, const char *path);

/* A member of an object; NULL where there is none, or no object. A key that comes twice counts as it came last. */
const struct json *member(const struct json *object, const char *key);
bool is_kind(const struct json *value, enum json_kind kind);
bool is_text(const struct json *value, const char *text);
bool is_nothing(const struct json *value); /* not there, or null */
bool is_true(const struct json *value);

/* A value that must be there and of that kind; `where` and `key` are named otherwise. */
const struct json *need(struct arena *arena, const struct json *object, const char *key, enum json_kind kind,
                        const char *where);
int64_t need_integer(struct arena *arena, const struct json *object, const char *key, int64_t low, int64_t high,
                     const char *where);
/* Text without a zero byte inside. */
const char *need_text(struct arena *arena, const struct json *object, const char *key, const char *where);
/* The value as a whole number in a range. */
int64_t as_integer(struct arena *arena, const struct json *value, int64_t low, int64_t high, const char *where);

#endif
