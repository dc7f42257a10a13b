/** Byte-pair encoding: the pair of neighbours whose merge was learned first is joined, until none is left. */

import { fallbackName } from './bytes.js';

/** Words that are kept with their ids. */
const KEPT_WORDS = 10_000;
/** Longer ones are too rare to keep. */
const KEPT_LENGTH = 64;
const encoder = new TextEncoder();

export class Bpe {
  /** @type {Map<string, number[]>} */
  #known = new Map();
  /** Rank and result of each merge, by `left * size + right`. @type {Map<number, number>} */
  #ranks = new Map();
  /** @type {number[]} */
  #merged = [];

  /** @param {any} spec  `model` of tokenizer.json */
  constructor(spec) {
    const { type, vocab, merges } = spec;
    if (type !== undefined && type !== 'BPE')
      throw new Error(`tokenizer.json: model ${type} is not supported, only BPE`);
    for (const name of ['dropout', 'continuing_subword_prefix', 'end_of_word_suffix']) {
      if (spec[name]) throw new Error(`tokenizer.json: model.${name} is not supported`);
    }
    /** @type {Map<string, number>} */
    this.vocab = new Map(Object.entries(vocab));
    this.unknown = spec.unk_token == null ? undefined : this.vocab.get(spec.unk_token);
    this.fusesUnknown = Boolean(spec.fuse_unk);
    this.byteFallback = Boolean(spec.byte_fallback);
    this.wholeWords = Boolean(spec.ignore_merges);
    this.size = 0;
    for (const id of this.vocab.values()) this.size = Math.max(this.size, id + 1);
    merges.forEach((/** @type {string | [string, string]} */ merge, /** @type {number} */ rank) => {
      const [left, right] = typeof merge === 'string' ? merge.split(' ') : merge;
      const key = this.#id(left) * this.size + this.#id(right);
      // Of a merge that is listed twice, the later one counts.
      this.#ranks.set(key, rank);
      this.#merged[rank] = this.#id(left + right);
    });
  }

  /** @param {string} token */
  #id(token) {
    const id = this.vocab.get(token);
    if (id === undefined) throw new Error(`tokenizer.json: merges name ${token}, which the vocabulary lacks`);
    return id;
  }

  /** Ids of one word. @param {string} word @returns {number[]} */
  encode(word) {
    const known = this.#known.get(word);
    if (known) return known;
    const whole = this.wholeWords ? this.vocab.get(word) : undefined;
    const ids = whole === undefined ? this.#merge(this.#symbols(word)) : [whole];
    if (word.length <= KEPT_LENGTH) {
      if (this.#known.size >= KEPT_WORDS) this.#known.clear();
      this.#known.set(word, ids);
    }
    return ids;
  }

  /** Ids of the characters. @param {string} word */
  #symbols(word) {
    const ids = [];
    let unknownBefore = false;
    for (const char of word) {
      const id = this.vocab.get(char);
      if (id !== undefined) {
        ids.push(id);
        unknownBefore = false;
        continue;
      }
      const bytes = this.byteFallback
        ? Array.from(encoder.encode(char), byte => this.vocab.get(fallbackName(byte)))
        : [];
      if (bytes.length && !bytes.includes(undefined)) {
        ids.push(.../** @type {number[]} */ (bytes));
        unknownBefore = false;
      } else if (this.unknown !== undefined) {
        if (!(unknownBefore && this.fusesUnknown)) ids.push(this.unknown);
        unknownBefore = true;
      }
    }
    return ids;
  }

  /** @param {number[]} ids */
  #merge(ids) {
    const count = ids.length;
    if (count < 2) return ids;
    const next = Int32Array.from(ids, (_, i) => i + 1);
    const before = Int32Array.from(ids, (_, i) => i - 1);
    const queue = new Queue(count);
    /** @param {number} left */
    const offer = left => {
      const right = next[left];
      if (left < 0 || right >= count) return;
      const rank = this.#ranks.get(ids[left] * this.size + ids[right]);
      if (rank !== undefined) queue.push(rank * count + left);
    };
    for (let i = 0; i < count - 1; i++) offer(i);
    for (let top; (top = queue.pop()) !== undefined;) {
      const left = top % count,
        rank = (top - left) / count,
        right = next[left];
      // The pair that was offered may be gone by now.
      if (ids[left] < 0 || right >= count) continue;
      const now = this.#ranks.get(ids[left] * this.size + ids[right]);
      if (now === undefined || this.#merged[now] !== this.#merged[rank]) continue;
      ids[left] = this.#merged[now];
      ids[right] = -1;
      next[left] = next[right];
      if (next[right] < count) before[next[right]] = left;
      if (before[left] >= 0) offer(before[left]);
      offer(left);
    }
    return ids.filter(id => id >= 0);
  }
}

/** A binary heap of numbers, smallest first: rank, and among equal ones position. */
class Queue {
  /** @param {number} room */
  constructor(room) {
    this.items = new Array(room);
    this.size = 0;
  }

  /** @param {number} item */
  push(item) {
    const { items } = this;
    let at = this.size++;
    while (at) {
      const parent = (at - 1) >> 1;
      if (items[parent] <= item) break;
      items[at] = items[parent];
      at = parent;
    }
    items[at] = item;
  }

  /** @returns {number | undefined} */
  pop() {
    if (!this.size) return undefined;
    const { items } = this;
    const top = items[0],
      item = items[--this.size];
    for (let at = 0; ;) {
      let child = 2 * at + 1;
      if (child >= this.size) {
        items[at] = item;
        return top;
      }
      if (child + 1 < this.size && items[child + 1] < items[child]) child++;
      if (items[child] >= item) {
        items[at] = item;
        return top;
      }
      items[at] = items[child];
      at = child;
    }
  }
}
