/* Reading an expression. */
#include <string.h>

#include "regex_parts.h"
#include "unicode.h"

#define MAX_DEPTH 100 /* groups in each other */

struct reader {
    struct arena *arena;
    const char *start, *at, *end, *where;
    int depth;
    bool fold_case;
};

static _Noreturn void refuse(struct reader *r, const char *what) {
    fail(r->arena, "use the bundle's run.py",
         "%s: the regular expression has %s, which this program cannot match: %.*s", r->where, what,
         r->end - r->start > 200 ? 200 : (int)(r->end - r->start), r->start);
}

static bool accept(struct reader *r, const char *text) {
    size_t length = strlen(text);
    if ((size_t)(r->end - r->at) < length || memcmp(r->at, text, length) != 0) return false;
    r->at += length;
    return true;
}

static void add_range(struct reader *r, struct set *set, uint32_t first, uint32_t last) {
    void *ranges = take(r->arena, set->num_ranges + 1, sizeof *set->ranges);
    if (set->num_ranges) memcpy(ranges, set->ranges, set->num_ranges * sizeof *set->ranges);
    set->ranges = ranges;
    set->ranges[set->num_ranges].first = first;
    set->ranges[set->num_ranges++].last = last;
}

/* The categories of \p{NAME}, by its one or two letters. */
static uint32_t read_property(struct reader *r) {
    static const char names[] = "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCoCn";
    uint32_t found = 0;
    if (!accept(r, "{")) refuse(r, "a property without a name");
    const char *name = r->at;
    while (r->at < r->end && *r->at != '}') r->at++;
    size_t length = (size_t)(r->at - name);
    if (!accept(r, "}") || length < 1 || length > 2) refuse(r, "a property other than a general category");
    for (size_t i = 0; i < sizeof names - 1; i += 2)
        if (memcmp(names + i, name, length) == 0) found |= 1u << i / 2;
    if (!found) refuse(r, "a property other than a general category");
    return found;
}

/* What follows a backslash: true where it is a class, which is added to the set; else the character. */
static bool read_escape(struct reader *r, struct set *set, uint32_t *character) {
    if (r->at == r->end) refuse(r, "a backslash at its end");
    char c = *r->at++;
    switch (c) {
    case 'p': set->categories |= read_property(r); return true;
    case 'P': set->no_categories |= read_property(r); return true;
    case 's': set->space = true; return true;
    case 'S': set->no_space = true; return true;
    case 'd': set->categories |= 1u << ND; return true;
    case 'D': set->no_categories |= 1u << ND; return true;
    case 'w': set->word = true; return true;
    case 'W': set->no_word = true; return true;
    case 'n': *character = '\n'; return false;
    case 'r': *character = '\r'; return false;
    case 't': *character = '\t'; return false;
    case 'f': *character = '\f'; return false;
    case 'v': *character = '\v'; return false;
    case 'u':
    case 'x': {
        static const char digits[] = "0123456789abcdef0123456789ABCDEF";
        bool braces = c == 'x' && accept(r, "{");
        const char *digit;
        *character = 0;
        for (int i = 0; i < (braces     ? 8
                             : c == 'u' ? 4
                                        : 2) &&
                        r->at < r->end && (digit = strchr(digits, *r->at));
             i++, r->at++)
            *character = *character << 4 | (uint32_t)((digit - digits) & 15);
        if (braces && !accept(r, "}")) refuse(r, "a character's number without an end");
        return false;
    }
    default: break;
    }
    if ((c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z')) refuse(r, "an unknown escape");
    r->at--;
    r->at += read_character(r->at, character);
    return false;
}

static struct set read_set(struct reader *r) {
    struct set set = {.fold_case = r->fold_case, .negated = accept(r, "^")};
    bool first = true;
    while (first || !accept(r, "]")) {
        uint32_t low, high;
        if (r->at >= r->end) refuse(r, "a class without an end");
        if (*r->at == '[') refuse(r, "a class in a class");
        if (accept(r, "&&")) refuse(r, "an intersection");
        first = false;
        bool is_class = false;
        if (accept(r, "\\")) is_class = read_escape(r, &set, &low);
        else r->at += read_character(r->at, &low);
        if (is_class) continue;
        high = low;
        if (r->end - r->at > 1 && r->at[0] == '-' && r->at[1] != ']') {
            r->at++;
            if (accept(r, "\\")) {
                if (read_escape(r, &set, &high)) refuse(r, "a range to a class");
            } else {
                r->at += read_character(r->at, &high);
            }
            if (high < low) refuse(r, "a range that is empty");
        }
        add_range(r, &set, low, high);
    }
    return set;
}

static bool read_number(struct reader *r, size_t *number) {
    const char *first = r->at;
    for (*number = 0; r->at < r->end && *r->at >= '0' && *r->at <= '9' && *number < 100000; r->at++)
        *number = *number * 10 + (size_t)(*r->at - '0');
    return r->at > first;
}

/* Make of a part a group of which it is all. */
static void enclose(struct reader *r, struct part *part) {
    struct part *inner = take(r->arena, 1, sizeof *inner);
    *inner = *part;
    *part = (struct part){.kind = GROUP, .group = take(r->arena, 1, sizeof *part->group), .low = 1, .high = 1};
    part->group->first = inner;
}

static void read_repetition(struct reader *r, struct part *part) {
    part->low = part->high = 1;
    bool interval = false;
    if (accept(r, "*")) part->low = 0, part->high = SIZE_MAX;
    else if (accept(r, "+")) part->high = SIZE_MAX;
    else if (accept(r, "?")) part->low = 0;
    else if (accept(r, "{")) {
        interval = true;
        bool from = read_number(r, &part->low);
        part->high = part->low;
        if (accept(r, ",") && !read_number(r, &part->high)) part->high = SIZE_MAX;
        if (!from || !accept(r, "}") || part->high < part->low) refuse(r, "a repetition of another kind");
    } else return;
    if (interval && r->at < r->end && (*r->at == '+' || *r->at == '*' || (*r->at == '?' && part->low == part->high))) {
        /* In Oniguruma's default syntax this repeats the repetition. */
        enclose(r, part);
        if (!accept(r, "?")) part->high = SIZE_MAX;
        if (!accept(r, "+")) part->low = 0, accept(r, "*");
    } else if (accept(r, "?")) {
        part->mode = LAZY;
    } else if (accept(r, "+")) {
        part->mode = POSSESSIVE;
    }
    if (r->at < r->end && strchr("*+?", *r->at)) refuse(r, "a repetition of a repetition");
}

static struct alternative *read_alternatives(struct reader *r);

static void read_group(struct reader *r, struct part *part) {
    bool outside = r->fold_case;
    part->kind = GROUP;
    if (accept(r, "?")) {
        if (accept(r, "i:")) r->fold_case = true;
        else if (accept(r, "<=") || accept(r, "<!")) part->kind = LOOK_BEHIND, part->negative = r->at[-1] == '!';
        else if (accept(r, "=") || accept(r, "!")) part->kind = LOOK_AHEAD, part->negative = r->at[-1] == '!';
        else if (!accept(r, ":")) refuse(r, "a group of another kind");
    }
    part->group = read_alternatives(r);
    if (!accept(r, ")")) refuse(r, "a group without an end");
    r->fold_case = outside;
    if (part->kind != LOOK_BEHIND) return;
    for (struct alternative *a = part->group; a; a = a->next)
        if (!a->first || a->first->kind != SET || a->first->high != 1 || a->first->low != 1 || a->first->next)
            refuse(r, "a lookbehind of more than one character");
}

static struct alternative *read_alternative(struct reader *r) {
    struct alternative *alternative = take(r->arena, 1, sizeof *alternative);
    const struct part **behind = &alternative->first;
    while (r->at < r->end && *r->at != '|' && *r->at != ')') {
        struct part *part = take(r->arena, 1, sizeof *part);
        uint32_t character;
        part->kind = SET;
        part->set.fold_case = r->fold_case;
        if (accept(r, "(")) read_group(r, part);
        else if (accept(r, "[")) part->set = read_set(r);
        else if (accept(r, "^")) part->kind = TEXT_START;
        else if (accept(r, "$")) part->kind = TEXT_END;
        else if (accept(r, ".")) add_range(r, &part->set, '\n', '\n'), part->set.negated = true;
        else if (strchr("*+?{", *r->at)) refuse(r, "a repetition of nothing");
        else if (!accept(r, "\\")) {
            r->at += read_character(r->at, &character);
            add_range(r, &part->set, character, character);
        } else if (r->at < r->end && strchr("zZAbBGK", *r->at)) {
            refuse(r, "an anchor");
        } else if (!read_escape(r, &part->set, &character)) {
            add_range(r, &part->set, character, character);
        }
        read_repetition(r, part);
        if (part->kind == GROUP && part->mode == POSSESSIVE) refuse(r, "a possessive group");
        if (part->kind > GROUP && part->high != 1) refuse(r, "a repetition of nothing");
        *behind = part;
        behind = &part->next;
    }
    return alternative;
}

static struct alternative *read_alternatives(struct reader *r) {
    if (++r->depth > MAX_DEPTH) refuse(r, "too many groups in each other");
    struct alternative *first = read_alternative(r), *last = first;
    while (accept(r, "|")) last = last->next = read_alternative(r);
    r->depth--;
    return first;
}

const struct regex *compile_regex(struct arena *arena, const char *pattern, size_t bytes, const char *where) {
    struct regex *regex = take(arena, 1, sizeof *regex);
    struct reader r = {.arena = arena, .start = pattern, .at = pattern, .end = pattern + bytes, .where = where};
    regex->alternatives = read_alternatives(&r);
    if (r.at != r.end) refuse(&r, "a bracket too many");
    return regex;
}
