/**
 * Text to token ids and back, as `tokenizers` does it for BPE vocabularies, byte-level or SentencePiece-like.
 *
 * A text is cut at added tokens first; what lies between them is normalized, cut into words, and encoded word by word.
 */

import { Bpe } from './bpe.js';
import { literalPattern } from './regex.js';
import { buildCutter, buildNormalizer } from './pretokenize.js';
import { TextStream, readDecoding } from './text-stream.js';

/**
 * @typedef {{id: number, content: string, special: boolean, normalized: boolean, single_word: boolean, lstrip: boolean,
 *   rstrip: boolean}} AddedToken
 */
/** A stretch of text, or the id of an added token in its place. @typedef {string | number} Piece */

const NAMED_TOKENS = ['bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token'];
const WORD = /[\p{L}\p{M}\p{N}\p{Pc}]/u;

export class Tokenizer {
  /**
   * @param {any} spec  tokenizer.json
   * @param {Record<string, any>} config  tokenizer_config.json
   */
  constructor(spec, config = {}) {
    this.config = config;
    this.model = new Bpe(spec.model);
    this.normalize = buildNormalizer(spec.normalizer);
    this.cut = buildCutter(spec.pre_tokenizer);
    this.decoding = readDecoding(spec.decoder);
    /** @type {Map<string, AddedToken>} */
    this.added = new Map(spec.added_tokens?.map((/** @type {AddedToken} */ token) => [token.content, { ...token }]));
    this.#addConfigured();
    /** @type {(string | undefined)[]} */
    this.names = [];
    for (const [name, id] of this.model.vocab) this.names[id] = name;
    for (const { content, id, normalized } of this.added.values()) {
      this.names[id] = normalized ? this.normalize(content) : content; // as `tokenizers` names them since 0.23
    }
    this.special = new Set([...this.added.values()].filter(token => token.special).map(token => token.id));
    this.around = readTemplate(spec.post_processor);
    const all = [...this.added.values()];
    this.rawMatcher = matcher(all.filter(token => !token.normalized).map(token => [token.content, token]));
    this.normalizedMatcher = matcher(
      all.filter(token => token.normalized).map(token => [this.normalize(token.content), token]),
    );
  }

  /** Special tokens by the names that chat templates call them. @returns {Record<string, string>} */
  get namedTokens() {
    const found = NAMED_TOKENS.map(name => [name, tokenText(this.config[name])]);
    return Object.fromEntries(found.filter(([, text]) => text !== undefined));
  }

  /**
   * The ids of a text, with bos or whatever else the checkpoint puts around a text unless told not to.
   * @param {string} text
   * @param {{addSpecialTokens?: boolean}} [options]
   */
  encode(text, { addSpecialTokens = true } = {}) {
    if (!text.isWellFormed()) throw new Error('text: holds half of a surrogate pair, which UTF-8 cannot hold');
    const ids = [];
    let first = true;
    for (const piece of split(text, this.rawMatcher)) {
      if (typeof piece === 'number') ids.push(piece);
      else {
        for (const part of split(this.normalize(piece), this.normalizedMatcher)) {
          if (typeof part === 'number') ids.push(part);
          else for (const word of this.cut(part, first)) ids.push(...this.model.encode(word));
          first = false;
        }
      }
      first = false;
    }
    return addSpecialTokens ? [...this.around.before, ...ids, ...this.around.after] : ids;
  }

  /** The text of ids; special tokens give nothing. @param {number[]} ids */
  decode(ids) {
    const stream = this.stream();
    return ids.map(id => stream.push(id)).join('') + stream.finish();
  }

  /** Reads tokens as they come; those `after` a text that has begun continue it. @param {number[]} after */
  stream(after = []) {
    const name = (/** @type {number} */ id) => (this.special.has(id) ? undefined : this.names[id]);
    return new TextStream(
      this.decoding,
      name,
      after.some(id => name(id) !== undefined),
    );
  }

  /** Add the tokens that tokenizer_config.json lists and names, as transformers does. */
  #addConfigured() {
    const { config } = this;
    const listed = Object.entries(config.added_tokens_decoder ?? {}).sort(([a], [b]) => Number(a) - Number(b));
    for (const [, token] of listed) this.#add(token.content, token);
    const extra = config.extra_special_tokens ?? config.additional_special_tokens;
    const named = Object.entries(config)
      .filter(([key]) => key.endsWith('_token'))
      .map(([, value]) => value);
    if (extra && !Array.isArray(extra)) named.push(...Object.values(extra));
    for (const value of named) {
      const text = tokenText(value);
      if (text !== undefined) this.#add(text, { special: true });
    }
    for (const value of Array.isArray(extra) ? extra : []) {
      const text = tokenText(value);
      if (text !== undefined && !this.added.has(text)) this.#add(text, { special: true });
    }
  }

  /** @param {string} content @param {Partial<AddedToken>} fields */
  #add(content, fields) {
    const plain = { single_word: false, lstrip: false, rstrip: false, special: false };
    const present = this.added.get(content);
    const last = Math.max(this.model.size - 1, ...[...this.added.values()].map(token => token.id));
    const id = present?.id ?? this.model.vocab.get(content) ?? last + 1;
    const normalized = fields.normalized ?? present?.normalized ?? !fields.special;
    this.added.set(content, { ...plain, ...present, ...fields, normalized, content, id });
  }
}

/** @param {any} value */
function tokenText(value) {
  return typeof value === 'string' ? value : typeof value?.content === 'string' ? value.content : undefined;
}

/**
 * Finds the leftmost, and there the longest, of some tokens.
 * @param {[string, AddedToken][]} tokens
 */
function matcher(tokens) {
  const written = new Map(tokens.filter(([text]) => text));
  if (!written.size) return null;
  const longestFirst = [...written.keys()].sort((a, b) => b.length - a.length);
  return {
    pattern: new RegExp(longestFirst.map(text => literalPattern(text).source).join('|'), 'gu'),
    tokens: written,
  };
}

/** @param {string} text @param {ReturnType<typeof matcher>} found @returns {Piece[]} */
function split(text, found) {
  if (!found) return text ? [text] : [];
  /** @type {Piece[]} */
  const pieces = [];
  let last = 0;
  for (const { index, 0: match } of text.matchAll(found.pattern)) {
    const token = /** @type {AddedToken} */ (found.tokens.get(match));
    let start = index,
      end = index + match.length;
    if (token.single_word) {
      const before = [...text.slice(0, start)].at(-1) ?? '',
        after = String.fromCodePoint(text.codePointAt(end) ?? 32);
      if (WORD.test(before) || WORD.test(after)) continue;
    }
    if (start < last) continue;
    if (token.lstrip) start = last + text.slice(last, start).replace(/\p{White_Space}+$/u, '').length;
    if (token.rstrip) end += /^\p{White_Space}*/u.exec(text.slice(end))?.[0].length ?? 0;
    if (start > last) pieces.push(text.slice(last, start));
    pieces.push(token.id);
    last = end;
  }
  if (last < text.length) pieces.push(text.slice(last));
  return pieces;
}

/** Ids that stand before and behind a text. @param {any} spec  `post_processor` of tokenizer.json */
function readTemplate(spec) {
  /** @type {{before: number[], after: number[]}} */
  const around = { before: [], after: [] };
  for (const part of spec?.type === 'Sequence' ? spec.processors : spec ? [spec] : []) {
    if (part.type === 'ByteLevel') continue; // changes offsets, not ids
    if (part.type !== 'TemplateProcessing')
      throw new Error(`tokenizer.json: post-processor ${part.type} is not supported`);
    let seen = false;
    for (const item of part.single) {
      if (item.Sequence) seen = true;
      else around[seen ? 'after' : 'before'].push(...part.special_tokens[item.SpecialToken.id].ids);
    }
  }
  return around;
}
