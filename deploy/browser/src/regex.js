/**
 * Patterns of `tokenizer.json` as JavaScript's. They are written for Oniguruma, which reads a few things otherwise:
 * `\s` is Unicode's White_Space, `\d` any decimal digit, `(?i:…)` and possessive quantifiers exist, scripts have bare names.
 */

/** General categories and properties that JavaScript knows by the same name. */
const SAME_NAME = /^(?:[CLMNPSZ][a-z&]?|Alphabetic|White_Space|Lowercase|Uppercase|Emoji)$/;
const CLASSES = {
  s: '\\p{White_Space}', S: '\\P{White_Space}', d: '\\p{Nd}', D: '\\P{Nd}', h: '[0-9A-Fa-f]', A: '^', z: '$',
};
/** What case folding adds to the two cases of a letter. */
const FOLDED = { s: 'ſ', k: '\u212a' };

/**
 * @param {string} pattern
 * @returns {RegExp} global and Unicode-aware
 */
export function translatePattern(pattern) {
  let out = '', i = 0, groups = 0, inClass = false, atomStart = 0, foldDepth = 0;
  /** Where groups began, and whether case is ignored in them. @type {{start: number, folds: boolean}[]} */
  const open = [];
  while (i < pattern.length) {
    const start = out.length;
    const char = /** @type {string} */ (String.fromCodePoint(/** @type {number} */ (pattern.codePointAt(i))));
    if (char === '\\') {
      const property = /^\\([pP])\{(\^?)([^}]+)\}/.exec(pattern.slice(i));
      if (property) {
        const [whole, letter, negated, name] = property;
        const kind = negated ? (letter === 'p' ? 'P' : 'p') : letter;
        out += `\\${kind}{${SAME_NAME.test(name) || name.includes('=') ? name : `Script=${name}`}}`;
        i += whole.length;
      } else {
        const next = pattern[i + 1];
        const known = /** @type {Record<string, string>} */ (CLASSES)[next];
        // An escaped character that needs no escape is an error in a Unicode pattern.
        out += known ?? (/[\w^$\\.*+?()[\]{}|/-]/.test(next) && (next !== '-' || inClass) ? `\\${next}` : next);
        i += 2;
      }
    } else if (inClass) {
      if (char === ']') inClass = false;
      out += char === '[' ? '\\[' : char;
      i += char.length;
      if (!inClass) continue; // the class as a whole is the atom
      if (atomStart >= 0) continue;
    } else if (char === '[') {
      inClass = true;
      atomStart = start;
      out += '[';
      i += pattern[i + 1] === '^' ? (out += '^', 2) : 1;
      continue;
    } else if (char === '(') {
      const folds = pattern.startsWith('(?i:', i);
      const atomic = pattern.startsWith('(?>', i);
      if (atomic) throw new Error(`pattern ${pattern}: atomic groups are not supported`);
      open.push({ start, folds });
      foldDepth += Number(folds);
      out += folds ? '(?:' : '(';
      i += folds ? 4 : 1;
      continue;
    } else if (char === ')') {
      const group = open.pop();
      foldDepth -= Number(group?.folds);
      out += ')';
      i++;
      atomStart = group?.start ?? start;
      continue;
    } else if (/[?*+{]/.test(char) && pattern[i - 1] !== '(') {
      const quantifier = /^(?:[?*+]|\{\d*,?\d*\})/.exec(pattern.slice(i))?.[0] ?? char;
      i += quantifier.length;
      if (pattern[i] === '+') {
        // Possessive: what a lookahead has matched is not given back.
        groups++;
        out = `${out.slice(0, atomStart)}(?=(?<possessive${groups}>${out.slice(atomStart)}${quantifier}))\\k<possessive${groups}>`;
        i++;
      } else {
        out += quantifier;
        if (pattern[i] === '?') {
          out += '?';
          i++;
        }
      }
      continue;
    } else {
      const lower = char.toLowerCase(), upper = char.toUpperCase();
      const other = /** @type {Record<string, string>} */ (FOLDED)[lower] ?? '';
      out += foldDepth && lower !== upper ? `[${lower}${upper}${other}]` : char;
      i += char.length;
    }
    if (!inClass) atomStart = start;
  }
  return new RegExp(out, 'gu');
}

/** A text as itself in a pattern. @param {string} text */
export function literalPattern(text) {
  return new RegExp(text.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&'), 'gu');
}
