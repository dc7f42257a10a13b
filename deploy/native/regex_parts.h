/* What a regular expression is made of, between its reader (regex.c) and its matcher (regex_match.c). */
#ifndef REGEX_PARTS_H
#define REGEX_PARTS_H

#include "regex.h"

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

#endif
