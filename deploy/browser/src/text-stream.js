/**
 * Tokens to text, one at a time and never a part of a character: what the decoder of `tokenizer.json` makes of each
 * token by itself. Decoders that look further than one token are refused.
 */

import { charToByte } from './bytes.js';
import { literalPattern, translatePattern } from './regex.js';

const UNKNOWN = '\ufffd';
const encoder = new TextEncoder();

/**
 * @typedef {{byteLevel: boolean, byteFallback: boolean, perToken: ((name: string, first: boolean) => string)[], strip:
 *   string, stripCount: number}} Decoding
 */

/** @param {any} spec  `decoder` of tokenizer.json @returns {Decoding} */
export function readDecoding(spec) {
  const stages = spec ? flatten(spec) : [];
  const kinds = stages.map(stage => stage.type);
  /** @type {Decoding} */
  const decoding = { byteLevel: false, byteFallback: false, perToken: [], strip: '', stripCount: 0 };
  if (/^ByteLevel(,Fuse)?$/.test(String(kinds))) return { ...decoding, byteLevel: true };
  let at = 0;
  for (; kinds[at] === 'Replace' || kinds[at] === 'Metaspace'; at++) decoding.perToken.push(perToken(stages[at]));
  if (kinds[at] === 'ByteFallback') decoding.byteFallback = Boolean(++at);
  if (kinds[at] === 'Fuse') at++;
  if (kinds[at] === 'Strip' && stages[at].stop === 0) {
    decoding.strip = stages[at].content;
    decoding.stripCount = stages[at++].start;
  }
  if (at < stages.length || !stages.length) {
    throw new Error(
      `tokenizer.json: decoder ${kinds.join(' + ') || 'none'} cannot turn tokens into text one at a time`,
    );
  }
  return decoding;
}

/** @param {any} spec @returns {any[]} */
function flatten(spec) {
  return spec.type === 'Sequence' ? spec.decoders.flatMap(flatten) : [spec];
}

/** @param {any} stage @returns {(name: string, first: boolean) => string} */
function perToken(stage) {
  if (stage.type === 'Replace') {
    const { String: text, Regex: regex } = stage.pattern;
    const pattern = text === undefined ? translatePattern(regex) : literalPattern(text);
    return name => name.replace(pattern, () => stage.content);
  }
  const { replacement, prepend_scheme: scheme } = stage;
  return (name, first) => {
    const text = name.replaceAll(replacement, ' ');
    return first && scheme !== 'never' && text.startsWith(' ') ? text.slice(1) : text;
  };
}

export class TextStream {
  /**
   * @param {Decoding} decoding
   * @param {(id: number) => string | undefined} name  how the tokenizer writes a token; none for a special one
   * @param {boolean} continues  whether the tokens go on with a text, so that the first one is none that begins it
   */
  constructor(decoding, name, continues = false) {
    this.decoding = decoding;
    this.name = name;
    this.first = !continues;
    this.stripLeft = continues ? 0 : decoding.stripCount;
    this.decoder = new TextDecoder('utf-8', { ignoreBOM: true });
    /** Bytes of a run whose end has not come. @type {number[]} */
    this.run = [];
    this.broken = false;
  }

  /** The text that is complete with this token, perhaps none. @param {number} id */
  push(id) {
    let name = this.name(id);
    if (name === undefined) return '';
    const { byteLevel, byteFallback, perToken: stages } = this.decoding;
    if (byteLevel) return this.decoder.decode(readBytes(name), { stream: true });
    for (const stage of stages) name = stage(name, this.first);
    this.first = false;
    const byte = byteFallback ? /^<0x([0-9A-Fa-f]{2})>$/.exec(name) : null;
    return this.#strip(byte ? this.#byte(parseInt(byte[1], 16)) : this.#endRun() + name);
  }

  /** What stands for an unfinished last character, since no more tokens come. */
  finish() {
    return this.decoding.byteLevel ? this.decoder.decode() : this.#strip(this.#endRun());
  }

  /** Single bytes in a text of characters: a run of them is UTF-8, or U+FFFD for each. @param {number} byte */
  #byte(byte) {
    if (this.broken) return UNKNOWN;
    this.run.push(byte);
    try {
      const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(this.run));
      this.run = [];
      return text;
    } catch {
      if (couldBecomeCharacter(this.run)) return '';
      this.broken = true;
      return this.#unknown();
    }
  }

  #endRun() {
    this.broken = false;
    return this.#unknown();
  }

  #unknown() {
    const text = UNKNOWN.repeat(this.run.length);
    this.run = [];
    return text;
  }

  /** @param {string} text */
  #strip(text) {
    while (this.stripLeft && text) {
      if (!text.startsWith(this.decoding.strip)) this.stripLeft = 0;
      else {
        text = text.slice(this.decoding.strip.length);
        this.stripLeft--;
      }
    }
    return text;
  }
}

/** The bytes that a byte-level token's name writes; one not in the alphabet stands for itself. @param {string} name */
function readBytes(name) {
  const bytes = Array.from(name, char => charToByte.get(char));
  return bytes.includes(undefined) ? encoder.encode(name) : Uint8Array.from(/** @type {number[]} */ (bytes));
}

/**
 * Whether bytes are the beginning of a character: a decoder that waits for more finds no fault in them.
 * @param {number[]} bytes
 */
function couldBecomeCharacter(bytes) {
  try {
    new TextDecoder('utf-8', { fatal: true }).decode(Uint8Array.from(bytes), { stream: true });
    return true;
  } catch {
    return false;
  }
}
