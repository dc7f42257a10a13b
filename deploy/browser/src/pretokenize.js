/**
 * What is done to a text before its words become tokens: normalizers change it, pre-tokenizers cut it into words.
 * A part of `tokenizer.json` that is not known here is refused, since skipping it would give other ids.
 */

import { byteToChar } from './bytes.js';
import { literalPattern, translatePattern } from './regex.js';

/** @typedef {(text: string) => string} Normalizer */
/**
 * Words of a word; `first` says that the text begins with it.
 * @typedef {(text: string, first: boolean) => string[]} Cutter
 */

const GPT2_WORDS = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const PUNCTUATION = /[!-/:-@[-`{-~]|\p{P}/gu;

/** @param {any} spec @returns {Normalizer} */
export function buildNormalizer(spec) {
  switch (spec?.type) {
    case undefined:
      return text => text;
    case 'Sequence': {
      const parts = spec.normalizers.map(buildNormalizer);
      return text => parts.reduce((/** @type {string} */ t, /** @type {Normalizer} */ part) => part(t), text);
    }
    case 'NFC':
    case 'NFD':
    case 'NFKC':
    case 'NFKD':
      return text => text.normalize(spec.type);
    case 'Lowercase':
      return text => text.toLowerCase();
    case 'Prepend':
      return text => text && spec.prepend + text;
    case 'Replace': {
      const pattern = buildPattern(spec.pattern);
      return text => text.replace(pattern, () => spec.content);
    }
    default:
      throw new Error(`tokenizer.json: normalizer ${spec.type} is not supported`);
  }
}

/** @param {any} spec @returns {Cutter} */
export function buildCutter(spec) {
  switch (spec?.type) {
    case undefined:
      return text => [text];
    case 'Sequence': {
      const parts = spec.pretokenizers.map(buildCutter);
      return (text, first) =>
        parts.reduce(
          (/** @type {string[]} */ words, /** @type {Cutter} */ part) =>
            words.flatMap((word, i) => part(word, first && i === 0)),
          [text],
        );
    }
    case 'ByteLevel': {
      const words = spec.use_regex === false ? null : translatePattern(GPT2_WORDS);
      return text => {
        const whole = spec.add_prefix_space && !text.startsWith(' ') ? ` ${text}` : text;
        return (words ? cut(whole, words, 'Isolated', false) : [whole]).map(writeBytes);
      };
    }
    case 'Split': {
      const pattern = buildPattern(spec.pattern);
      return text => cut(text, pattern, spec.behavior, spec.invert);
    }
    case 'Digits':
      return text => cut(text, /\p{N}/gu, spec.individual_digits ? 'Isolated' : 'Contiguous', false);
    case 'Punctuation':
      return text => cut(text, PUNCTUATION, spec.behavior, false);
    case 'Metaspace':
      return (text, first) => {
        const { replacement, prepend_scheme: scheme, split } = spec;
        let marked = text.replaceAll(' ', replacement);
        const begins = scheme === 'always' || (scheme === 'first' && first);
        if (begins && !marked.startsWith(replacement)) marked = replacement + marked;
        return split === false ? [marked] : cut(marked, literalPattern(replacement), 'MergedWithNext', false);
      };
    default:
      throw new Error(`tokenizer.json: pre-tokenizer ${spec.type} is not supported`);
  }
}

/** @param {{String?: string, Regex?: string}} pattern */
function buildPattern({ String: text, Regex: regex }) {
  return text === undefined ? translatePattern(/** @type {string} */ (regex)) : literalPattern(text);
}

/**
 * A text in parts, by where a pattern matches; `inverted` takes what lies between the matches for them.
 * @param {string} text @param {RegExp} pattern @param {string} behavior @param {boolean} inverted
 */
function cut(text, pattern, behavior, inverted) {
  /** @type {[string, boolean][]} */
  const parts = [];
  let last = 0;
  for (const { index, 0: match } of text.matchAll(pattern)) {
    if (!match) continue;
    if (index > last) parts.push([text.slice(last, index), inverted]);
    parts.push([match, !inverted]);
    last = index + match.length;
  }
  if (last < text.length) parts.push([text.slice(last), inverted]);
  switch (behavior) {
    case 'Isolated':
      return parts.map(([part]) => part);
    case 'Removed':
      return parts.filter(([, matched]) => !matched).map(([part]) => part);
    case 'Contiguous':
      return join(parts, (before, now) => before[1] === now[1]);
    case 'MergedWithPrevious':
      return join(parts, (before, now) => now[1] && !before[1]);
    case 'MergedWithNext':
      return join(parts, (before, now) => before[1] && !now[1]);
    default:
      throw new Error(`tokenizer.json: split behavior ${behavior} is not supported`);
  }
}

/** @param {[string, boolean][]} parts @param {(before: [string, boolean], now: [string, boolean]) => boolean} joins */
function join(parts, joins) {
  /** @type {string[]} */
  const words = [];
  parts.forEach((part, i) => {
    if (i && joins(parts[i - 1], part)) words[words.length - 1] += part[0];
    else words.push(part[0]);
  });
  return words;
}

const encoder = new TextEncoder();

/** @param {string} word */
function writeBytes(word) {
  let written = '';
  for (const byte of encoder.encode(word)) written += byteToChar[byte];
  return written;
}
