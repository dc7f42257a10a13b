/* Matching an expression: backtracking, with limits on depth and steps. */
#include "regex_parts.h"
#include "unicode.h"

#define MAX_CALLS 2000    /* of the matcher in each other: repeated groups over a long text */
#define STEPS_A_BYTE 5000 /* the patterns of known models need fewer than 20 */

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
