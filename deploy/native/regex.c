#include "regex.h"

#include <string.h>

#include "unicode.h"

#define MAX_DEPTH 100     /* groups in each other */
#define MAX_CALLS 2000    /* of the matcher in each other: repeated groups over a long text */
#define STEPS_A_BYTE 5000 /* the patterns of known models need fewer than 20 */

enum kind { SET, GROUP, LOOK_AHEAD, LOOK_BEHIND, TEXT_START, TEXT_END };
enum mode { GREEDY, LAZY, POSSESSIVE };

/* Characters: those in the ranges or categories, or none of them. */
struct set {
    struct {
        uint32_t first, last;
    } *ranges;
    size_t num_ranges;
    uint32_t categories; /* a bit for each */
    bool space, no_space, word, no_word, negated, fold_case;
    uint32_t no_categories;
};

/* What an alternative is made of, one behind the other. */
struct part {
    enum kind kind;
    struct set set;
    bool negative; /* of looking */
    struct alternative *group;
    size_t low, high;
    enum mode mode;
    const struct part *next;
};

struct alternative {
    const struct part *first;
    struct alternative *next;
};

struct regex {
    struct alternative *alternatives;
};

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

static bool in_ranges(const struct set *set, uint32_t character) {
    for (size_t i = 0; i < set->num_ranges; i++)
        if (character >= set->ranges[i].first && character <= set->ranges[i].last) return true;
    return false;
}

static bool contains(const struct set *set, uint32_t c) {
    bool found = in_ranges(set, c);
    if (!found && set->fold_case) {
        /* Patterns fold English endings only: ASCII, and the two characters whose other case lies there. */
        if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) found = in_ranges(set, c ^ 0x20);
        found = found || (c == 0x17F && (in_ranges(set, 's') || in_ranges(set, 'S')));
        found = found || (c == 0x212A && (in_ranges(set, 'k') || in_ranges(set, 'K')));
    }
    if (!found && (set->categories || set->no_categories)) {
        uint32_t category = 1u << category_of(c);
        found = set->categories & category || (set->no_categories && !(set->no_categories & category));
    }
    found = found || (set->space && is_space(c)) || (set->no_space && !is_space(c));
    found = found || (set->word && is_word(c)) || (set->no_word && !is_word(c));
    return found != set->negated;
}

struct matcher {
    struct arena *arena;
    const char *start, *end;
    size_t steps_left;
    int calls;
};

/* What is to match behind a group's alternative: one more round of the group, or what follows it. */
struct continuation {
    const struct part *part; /* the group, NULL at the end of the expression */
    size_t rounds;
    const char *began; /* where this round did */
    const struct continuation *outer;
};

static const char *match_parts(struct matcher *m, const struct part *part, const char *at,
                               const struct continuation *then);

static const char *match_group(struct matcher *m, const struct part *group, size_t rounds, const char *at,
                               const struct continuation *outer) {
    struct continuation round = {group, rounds + 1, at, outer};
    const char *end;
    if (group->mode == LAZY && rounds >= group->low && (end = match_parts(m, group->next, at, outer))) return end;
    if (rounds < group->high)
        for (const struct alternative *a = group->group; a; a = a->next)
            if ((end = match_parts(m, a->first, at, &round))) return end;
    return group->mode != LAZY && rounds >= group->low ? match_parts(m, group->next, at, outer) : NULL;
}

static const char *match_any(struct matcher *m, const struct alternative *alternatives, const char *at) {
    for (const char *end; alternatives; alternatives = alternatives->next)
        if ((end = match_parts(m, alternatives->first, at, NULL))) return end;
    return NULL;
}

static const char *match_set(struct matcher *m, const struct part *part, const char *at,
                             const struct continuation *then) {
    size_t count = 0, wanted = part->mode == LAZY ? part->low : part->high;
    const char *lowest = part->low ? NULL : at, *end;
    for (uint32_t c; count < wanted && at < m->end; count++) {
        size_t length = read_character(at, &c);
        if (!contains(&part->set, c)) break;
        at += length;
        if (count + 1 == part->low) lowest = at;
        if (!m->steps_left--) fail(m->arena, NULL, "the prompt: splitting it into words takes too many steps");
    }
    if (count < part->low) return NULL;
    if (part->mode == POSSESSIVE) return match_parts(m, part->next, at, then);
    if (part->mode == LAZY) {
        for (uint32_t c;; count++) {
            if ((end = match_parts(m, part->next, at, then))) return end;
            if (count == part->high || at == m->end) return NULL;
            size_t length = read_character(at, &c);
            if (!contains(&part->set, c)) return NULL;
            at += length;
        }
    }
    while (!(end = match_parts(m, part->next, at, then))) {
        if (at == lowest) return NULL;
        do at--;
        while ((*at & 0xC0) == 0x80);
    }
    return end;
}

/* Where a match of these parts, and of what is to follow, ends; NULL where there is none. */
static const char *match_parts(struct matcher *m, const struct part *part, const char *at,
                               const struct continuation *then) {
    if (!m->steps_left--) fail(m->arena, NULL, "the prompt: splitting it into words takes too many steps");
    if (++m->calls > MAX_CALLS) fail(m->arena, NULL, "the prompt: splitting it into words goes too deep");
    const char *end = NULL;
    if (!part) {
        if (!then) end = at;
        else if (at == then->began)
            end = match_parts(m, then->part->next, at, then->outer); /* an empty round: enough */
        else end = match_group(m, then->part, then->rounds, at, then->outer);
    } else if (part->kind == SET) {
        end = match_set(m, part, at, then);
    } else if (part->kind == GROUP) {
        end = match_group(m, part, 0, at, then);
    } else {
        bool found;
        if (part->kind == TEXT_START) found = at == m->start || at[-1] == '\n';
        else if (part->kind == TEXT_END) found = at == m->end || *at == '\n';
        else if (part->kind == LOOK_AHEAD) found = (match_any(m, part->group, at) != NULL) != part->negative;
        else {
            const char *before = at;
            if (before > m->start) do
                    before--;
                while ((*before & 0xC0) == 0x80);
            found = (before < at && match_any(m, part->group, before) != NULL) != part->negative;
        }
        end = found ? match_parts(m, part->next, at, then) : NULL;
    }
    m->calls--;
    return end;
}

bool find_match(struct arena *arena, const struct regex *regex, struct bytes text, size_t from, size_t *start,
                size_t *end) {
    struct matcher m = {arena, text.items, text.items + text.count, (text.count - from + 100) * STEPS_A_BYTE, 0};
    for (size_t at = from; at < text.count; at += character_bytes((unsigned char)text.items[at])) {
        const char *found = match_any(&m, regex->alternatives, text.items + at);
        if (found == text.items + at)
            fail(arena, "use the bundle's run.py", "the tokenizer splits where its expression matches nothing");
        if (found) {
            *start = at;
            *end = (size_t)(found - text.items);
            return true;
        }
    }
    return false;
}
