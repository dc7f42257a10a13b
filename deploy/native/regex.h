/* The regular expressions that tokenizers split text by, as Oniguruma reads them in Unicode.
 *
 * A backtracking matcher of what these patterns are made of: alternatives, groups, (?i:), lookahead and lookbehind,
 * classes with \p{..}, \s, \d, \w and ranges, and greedy, lazy or possessive repetition. Anything else is refused.
 */
#ifndef REGEX_H
#define REGEX_H

#include "arena.h"

struct regex;

/* `where` stands before what cannot be read. */
const struct regex *compile_regex(struct arena *arena, const char *pattern, size_t bytes, const char *where);

/* The first match at or behind `from`, in valid UTF-8; false where there is none. Fails when matching takes so many
 * steps that a text must have been made for that. */
bool find_match(struct arena *arena, const struct regex *regex, struct bytes text, size_t from, size_t *start,
                size_t *end);

#endif
