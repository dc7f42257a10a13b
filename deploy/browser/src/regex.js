/**
 * Patterns of `tokenizer.json` as JavaScript's. They are written for Oniguruma, which reads some things otherwise: `\s`
 * is Unicode's White_Space, `\d` any decimal digit, scripts have bare names, `(?i:…)` exists, `?+ *+ ++` are
 * possessive, and `{1,3}+` repeats `{1,3}`.
 */

/** Properties that JavaScript knows by the same name. */
const SAME_NAME = /^(?:[CLMNPSZ][a-z&]?|Alphabetic|White_Space|Lowercase|Uppercase|Emoji)$/;
/** @type {Record<string, string>} */
const ESCAPES = {
  s: '\\p{White_Space}',
  S: '\\P{White_Space}',
  d: '\\p{Nd}',
  D: '\\P{Nd}',
  w: '\\p{L}\\p{M}\\p{N}\\p{Pc}',
};
/** What folding the case of a letter adds to its two cases. @type {Record<string, string>} */
const FOLDED = { s: 'ſ', k: '\u212a' };
const TOKEN = new RegExp(
  [
    String.raw`(?<property>\\[pP]\{\^?[^}]+\})`,
    String.raw`\\(?<escape>.)`,
    String.raw`(?<set>\[\^?\]?(?:\\[pP]\{\^?[^}]+\}|\\.|[^\]\\])*\])`,
    String.raw`(?<open>\((?:\?(?:<?[=!]|[a-z]*:|>))?)`,
    String.raw`(?<close>\))`,
    String.raw`(?<quantifier>(?:[?*+]|(?<range>\{\d*,?\d*\}))(?<lazy>\?)?(?<plus>\+)?)`,
    String.raw`(?<char>.)`,
  ].join('|'),
  'gsu',
);

/**
 * @param {string} pattern
 * @returns {RegExp} global and Unicode-aware. Throws for what cannot be said in JavaScript.
 */
export function translatePattern(pattern) {
  /** @type {string[]} */
  const out = [];
  /** Where open groups begin, and whether they ignore case. @type {{start: number, folds: boolean}[]} */
  const groups = [];
  let atom = 0,
    numPossessive = 0;
  for (const { groups: found } of pattern.matchAll(TOKEN)) {
    const { property, escape, set, open, close, quantifier, range, lazy, plus, char } =
      /** @type {Record<string, string>} */ (found);
    const folds = groups.at(-1)?.folds ?? false;
    if (quantifier) {
      const repeated = out.splice(atom).join('');
      const bare = plus ? quantifier.slice(0, -1) : quantifier;
      if (!plus) out.push(repeated + bare);
      else if (range || lazy) out.push(`(?:${repeated}${bare})+`);
      else {
        // What a lookahead has matched is not given back.
        const name = `possessive${++numPossessive}`;
        out.push(`(?=(?<${name}>${repeated}${bare}))\\k<${name}>`);
      }
      continue;
    }
    if (close) {
      atom = groups.pop()?.start ?? 0;
      out.push(')');
      continue;
    }
    atom = out.length;
    if (property) out.push(translateProperty(property));
    else if (escape) out.push(translateEscape(escape, false));
    else if (set) out.push(translateSet(set, folds));
    else if (char) out.push(translateChar(char, folds));
    else {
      if (open === '(?>') throw new Error(`pattern ${pattern}: atomic groups are not supported`);
      if (/\?(?!i?:)[a-z]*:/.test(open)) throw new Error(`pattern ${pattern}: ${open} is not supported`);
      groups.push({ start: atom, folds: folds || open === '(?i:' });
      out.push(open === '(?i:' || open === '(' ? '(?:' : open);
    }
  }
  return new RegExp(out.join(''), 'gu');
}

/** A text as itself in a pattern. @param {string} text */
export function literalPattern(text) {
  return new RegExp(text.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&'), 'gu');
}

/** @param {string} property */
function translateProperty(property) {
  const [, letter, negated, name] = /** @type {string[]} */ (
    /** @type {unknown} */ (/^\\([pP])\{(\^?)(.+)\}$/.exec(property))
  );
  const kind = negated ? (letter === 'p' ? 'P' : 'p') : letter;
  return `\\${kind}{${SAME_NAME.test(name) || name.includes('=') ? name : `Script=${name}`}}`;
}

/** @param {string} char @param {boolean} inSet */
function translateEscape(char, inSet) {
  if (char === 'W') return inSet ? refuse('\\W in a set') : `[^${ESCAPES.w}]`;
  if (char === 'w') return inSet ? ESCAPES.w : `[${ESCAPES.w}]`;
  if (char === 'h' || char === 'H' || char === 'A' || char === 'z' || char === 'Z' || char === 'G')
    return refuse(`\\${char}`);
  // An escaped character that needs no escape is an error in a Unicode pattern.
  return ESCAPES[char] ?? (/[\w^$\\.*+?()[\]{}|/]/.test(char) || (inSet && char === '-') ? `\\${char}` : char);
}

/** @param {string} set @param {boolean} folds */
function translateSet(set, folds) {
  if (set.includes('[:') || set.includes('&&')) return refuse(set);
  const start = set[1] === '^' ? '[^' : '[';
  const inner = set
    .slice(start.length, -1)
    .replace(/(\\[pP]\{[^}]+\})|\\(.)|([^])/gu, (whole, property, escape, char) => {
      if (property) return translateProperty(property);
      if (escape) return translateEscape(escape, true);
      if (folds) return translateChar(char, true).replace(/^\[|\]$/g, '');
      return char === '[' || char === ']' ? `\\${char}` : char;
    });
  return `${start}${inner}]`;
}

/** @param {string} char @param {boolean} folds */
function translateChar(char, folds) {
  const lower = char.toLowerCase(),
    upper = char.toUpperCase();
  return folds && lower !== upper ? `[${lower}${upper}${FOLDED[lower] ?? ''}]` : char;
}

/** @param {string} part @returns {never} */
function refuse(part) {
  throw new Error(`pattern: ${part} is not supported`);
}
