#include "decoding.h"

#include <string.h>

#include "splitting.h"
#include "unicode.h"

#define MAX_PARTS 16

/* The parts of a decoder in their order. */
static size_t list_parts(struct arena *arena, const struct json *value, const struct json **parts, size_t count,
                         const char *where) {
    if (is_text(member(value, "type"), "Sequence")) {
        const struct json *inner = need(arena, value, "decoders", JSON_ARRAY, where);
        for (uint32_t i = 0; i < inner->count; i++) {
            if (is_text(member(&inner->items[i], "type"), "Sequence"))
                fail(arena, NULL, "%s: a sequence in a sequence", where);
            count = list_parts(arena, &inner->items[i], parts, count, where);
        }
        return count;
    }
    if (count == MAX_PARTS) fail(arena, NULL, "%s: has more than %d parts", where, MAX_PARTS);
    parts[count] = value;
    return count + 1;
}

static struct json copy(struct arena *arena, const struct json *text) {
    return (struct json){.kind = JSON_TEXT, .count = text->count, .text = take_text(arena, text->text, text->count)};
}

static bool read_replacement(struct arena *arena, const struct json *part, struct replacement *made,
                             const char *where) {
    const struct json *type = member(part, "type"), *from = member(member(part, "pattern"), "String");
    if (is_text(type, "Replace") && is_kind(from, JSON_TEXT)) {
        made->from = copy(arena, from);
        made->to = copy(arena, need(arena, part, "content", JSON_TEXT, where));
        return true;
    }
    if (!is_text(type, "Metaspace")) return false;
    made->from = copy(arena, need(arena, part, "replacement", JSON_TEXT, where));
    made->to = (struct json){.kind = JSON_TEXT, .count = 1, .text = " "};
    made->metaspace = true;
    made->drops_first = !is_text(member(part, "prepend_scheme"), "never");
    return true;
}

struct decoding read_decoding(struct arena *arena, const struct json *value, const char *where) {
    const struct json *parts[MAX_PARTS + 1] = {NULL};
    struct decoding decoding = {0};
    where = format(arena, "%s: decoder", where);
    if (is_nothing(value)) fail(arena, NULL, "%s: there is none, so tokens cannot be turned into text", where);
    size_t count = list_parts(arena, value, parts, 0, where), at = 0;
    if (is_text(member(parts[0], "type"), "ByteLevel")) {
        decoding.byte_level = true;
        at++;
    } else {
        struct replacement **behind = &decoding.replacements, made = {0};
        for (; at < count && read_replacement(arena, parts[at], &made, where); at++) {
            *behind = take(arena, 1, sizeof made);
            **behind = made;
            behind = &(*behind)->next;
        }
        decoding.byte_fallback = at < count && is_text(member(parts[at], "type"), "ByteFallback");
        at += decoding.byte_fallback;
    }
    bool known = decoding.byte_level || decoding.byte_fallback || decoding.replacements;
    if (at < count && is_text(member(parts[at], "type"), "Fuse")) at++;
    if (at < count && !decoding.byte_level && is_text(member(parts[at], "type"), "Strip")) {
        const struct json *content = need(arena, parts[at], "content", JSON_TEXT, where);
        known = known && content->count && content->count == character_bytes((unsigned char)content->text[0]);
        if (known) memcpy(decoding.strip, content->text, decoding.strip_bytes = content->count);
        decoding.strip_count = (size_t)need_integer(arena, parts[at], "start", 0, 1000, where);
        if (need_integer(arena, parts[at], "stop", 0, 1000, where)) known = false;
        at++;
    }
    if (at < count || !known) {
        const struct json *type = member(parts[at < count ? at : 0], "type");
        fail(arena, "use the bundle's run.py", "%s: is of a kind that this program does not know: %s", where,
             is_kind(type, JSON_TEXT) ? type->text : "without a type");
    }
    return decoding;
}

static struct bytes decode_bytes(struct arena *arena, struct bytes name) {
    struct bytes result = {take(arena, name.count + 1, 1), 0, name.count};
    for (size_t at = 0; at < name.count;) {
        uint32_t c;
        at += read_character(name.items + at, &c);
        int byte = byte_of_character(c);
        if (byte < 0) return name; /* not written in the alphabet: it stands for itself */
        result.items[result.count++] = (char)byte;
    }
    return result;
}

struct bytes decode_name(struct arena *arena, const struct decoding *decoding, struct bytes name, bool first,
                         bool *byte) {
    static const struct json nothing = {.kind = JSON_TEXT, .count = 0, .text = ""};
    *byte = decoding->byte_level;
    if (decoding->byte_level) return decode_bytes(arena, name);
    for (const struct replacement *r = decoding->replacements; r; r = r->next)
        name = replace_text(arena, name, &r->from, first && r->drops_first ? &nothing : &r->to);
    if (decoding->byte_fallback && name.count == 6 && !memcmp(name.items, "<0x", 3) && name.items[5] == '>') {
        int high = hex_value(name.items[3]), low = hex_value(name.items[4]);
        if (high >= 0 && low >= 0) {
            char *made = take(arena, 1, 1);
            *made = (char)(high * 16 + low);
            *byte = true;
            return (struct bytes){made, 1, 1};
        }
    }
    return name;
}
