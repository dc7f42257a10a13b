/**
 * One bundle, loaded and ready: a prompt goes in, then a token at a time comes out.
 *
 * As in Python's engine a bundle's context is a limit, not an allocation: keys and values have room for `capacity`
 * positions and grow to twice that, a long prompt goes through the graph in pieces, and a conversation goes on behind
 * what is already held. The output `next_token` is the same array as the decode step's `input_ids`.
 *
 * Shapes: S new tokens, T positions in the buffers, K key-value heads, H head width, V vocabulary.
 */

import { BundleError } from './bundle.js';
import { expandMatrices } from './expand.js';

/** @typedef {import('./bundle.js').Manifest} Manifest */
/** @typedef {import('./runtime.js').Runtime} Runtime */
/** @typedef {import('./runtime.js').Session} Session */
/** @typedef {import('./runtime.js').Tensor} Tensor */

/** Positions that the buffers begin with, where the context has more. */
const FIRST_CAPACITY = 256;
/** The most tokens that go through a graph in one call, where the graph takes tokens that have a past. */
const PIECE_TOKENS = 256;
/** Calls of as many lengths stay laid out. */
const KEPT_CALLS = 8;

/** A prompt that the context cannot hold. */
export class ContextError extends Error {}

/**
 * Throw `ContextError` where ids do not fit behind `held` tokens, `BundleError` for an unknown one.
 * @param {Manifest} manifest @param {number} held @param {number[]} ids
 */
export function checkPrompt({ model: { context_length: context, vocab_size: size } }, held, ids) {
  if (held + ids.length > context) {
    throw new ContextError(`the prompt has ${held + ids.length} tokens, the context holds ${context}`);
  }
  if (ids.some(id => id < 0 || id >= size)) {
    throw new BundleError(`prompt: a token id is outside the vocabulary, 0 to ${size - 1}`);
  }
}

export class Engine {
  /** Ids that keys and values are held of. @type {number[]} */
  held = [];
  /** Whether `logits` are wanted; here they are there in any case. */
  readsLogits = false;
  capacity = 0;
  /** @type {[string, Tensor][]} */
  #cache = [];
  /** @type {Map<string, {call: import('./runtime.js').Call, ids: Tensor, positions: Tensor | null}>} */
  #calls = new Map();

  /**
   * @param {Runtime} runtime
   * @param {Manifest} manifest
   * @param {{prefill: Session, decode: Session}} sessions  the same one twice where one graph does both
   */
  constructor(runtime, manifest, sessions) {
    this.runtime = runtime;
    this.manifest = manifest;
    this.sessions = sessions;
    this.maxLen = manifest.model.context_length;
    // Until graphs of another kind came, those of a pair that round keys and values behind the prompt took no past.
    this.takesPast =
      manifest.prefill_takes_past ??
      (manifest.graphs.prefill === manifest.graphs.decode || manifest.kv_dtype === 'float32');
    this.#lastIndex = runtime.newTensor('int32', [1]);
    this.#total = runtime.newTensor('int32', []);
    this.#token = runtime.newTensor('int64', [1, 1]);
    this.#logits = runtime.newTensor('float32', [1, 1, manifest.model.vocab_size]);
    this.#grow(1);
  }

  #lastIndex;
  #total;
  #token;
  #logits;

  /** Bytes of the runtime's memory: weights, cache and all else. */
  get memoryBytes() {
    return this.runtime.memoryBytes;
  }

  /** [V] logits behind the last token; a view of the runtime's own memory. @returns {Float32Array} */
  get logits() {
    return this.#logits.elements;
  }

  /** The greedy choice, which the next step reads; writing replaces it. */
  get nextToken() {
    return Number(this.#token.elements[0]);
  }

  set nextToken(token) {
    this.#token.elements[0] = BigInt(token);
  }

  /**
   * Start over with a prompt of at least one token.
   * @param {number[]} ids
   */
  prefill(ids) {
    this.held = [];
    this.extend(ids);
  }

  /**
   * Hold these tokens; what they begin with and is held already is not computed again.
   * @param {number[]} ids
   * @returns {number} how many were held already
   */
  prefillShared(ids) {
    let shared = 0;
    while (shared < ids.length - 1 && this.held[shared] === ids[shared]) shared++;
    this.held.length = shared;
    this.extend(ids.slice(shared));
    return shared;
  }

  /**
   * Append tokens to what is held. Throws `ContextError` where they do not fit, `BundleError` for an unknown id.
   * @param {number[]} ids
   */
  extend(ids) {
    const start = this.held.length;
    checkPrompt(this.manifest, start, ids);
    this.#grow(start + ids.length);
    const oneByOne = start > 0 && !this.takesPast;
    const size = oneByOne ? 1 : this.takesPast ? PIECE_TOKENS : ids.length;
    for (let first = 0; first < ids.length; first += size) {
      this.#run(oneByOne ? 'decode' : 'prefill', ids.slice(first, first + size));
    }
  }

  /** Feed `nextToken` and compute the one behind it. */
  step() {
    if (this.held.length >= this.maxLen) throw new ContextError(`the context of ${this.maxLen} tokens is full`);
    this.#grow(this.held.length + 1);
    this.held.push(this.nextToken);
    const { call, positions } = this.#laidOut('decode', 1, this.#token);
    this.#setLength(positions, 1);
    this.sessions.decode.run(call);
  }

  /** @param {'prefill' | 'decode'} role @param {number[]} ids */
  #run(role, ids) {
    const { call, ids: fed, positions } = this.#laidOut(role, ids.length, null);
    fed.elements.set(ids.map(BigInt));
    this.held.push(...ids);
    this.#setLength(positions, ids.length);
    this.sessions[role].run(call);
  }

  /** @param {Tensor | null} positions @param {number} count */
  #setLength(positions, count) {
    const length = this.held.length;
    this.#lastIndex.elements[0] = length - 1;
    this.#total.elements[0] = length;
    for (let i = 0; positions && i < count; i++) positions.elements[i] = BigInt(length - count + i);
  }

  /**
   * The call of a graph with this many tokens; those of a step are read from `token`.
   * @param {'prefill' | 'decode'} role @param {number} count @param {Tensor | null} token
   */
  #laidOut(role, count, token) {
    const key = token ? 'step' : `${role} ${count}`;
    let found = this.#calls.get(key);
    if (!found) {
      if (this.#calls.size >= KEPT_CALLS) this.#dropCalls();
      const ids = token ?? this.runtime.newTensor('int64', [1, count]);
      const positions = this.manifest.position_ids ? this.runtime.newTensor('int64', [1, count]) : null;
      /** @type {[string, Tensor][]} */
      const inputs = [
        ['input_ids', ids],
        ['seqlens_k', this.#lastIndex],
        ['total_sequence_length', this.#total],
        ...this.#cache.map(([name, tensor]) => /** @type {[string, Tensor]} */ ([`past_key_values.${name}`, tensor])),
      ];
      if (positions) inputs.push(['position_ids', positions]);
      /** @type {[string, Tensor][]} */
      const outputs = [
        ['next_token', this.#token],
        ['logits', this.#logits],
        ...this.#cache.map(([name, tensor]) => /** @type {[string, Tensor]} */ ([`present.${name}`, tensor])),
      ];
      found = { call: this.sessions[role].newCall(inputs, outputs), ids, positions };
      this.#calls.set(key, found);
    }
    return found;
  }

  /** Have room for `length` positions. @param {number} length */
  #grow(length) {
    if (length <= this.capacity) return;
    let capacity = this.capacity || FIRST_CAPACITY;
    while (capacity < length) capacity *= 2;
    capacity = Math.min(capacity, this.maxLen);
    const { num_layers: layers, num_kv_heads: heads, head_dim: width } = this.manifest.model;
    this.#dropCalls();
    const before = new Map(this.#cache);
    this.#cache = [];
    for (let layer = 0; layer < layers; layer++) {
      for (const part of ['key', 'value']) {
        const name = `${layer}.${part}`;
        const tensor = this.runtime.newTensor(this.manifest.kv_dtype, [1, heads, capacity, width]);
        const old = before.get(name);
        if (old) {
          for (let head = 0; head < heads; head++) {
            const from = head * this.capacity * width;
            tensor.elements.set(old.elements.subarray(from, from + this.held.length * width), head * capacity * width);
          }
          this.runtime.freeTensor(old);
        }
        this.#cache.push([name, tensor]);
      }
    }
    this.capacity = capacity;
  }

  #dropCalls() {
    for (const { call, ids, positions } of this.#calls.values()) {
      this.sessions.decode.freeCall(call);
      if (ids !== this.#token) this.runtime.freeTensor(ids);
      if (positions) this.runtime.freeTensor(positions);
    }
    this.#calls.clear();
  }
}

/**
 * Load a bundle's graphs into the runtime.
 * @param {Runtime} runtime
 * @param {Manifest} manifest
 * @param {Map<string, Uint8Array>} files
 * @param {{expand?: boolean}} [options]  whether quantized matrices are unpacked, as `expand` says
 */
export async function openEngine(runtime, manifest, files, { expand = true } = {}) {
  const data = new Map([...files].filter(([name]) => name.endsWith('.data')));
  const { prefill, decode } = manifest.graphs;
  /** @param {string} name */
  const open = async name => {
    try {
      const stored = { model: /** @type {Uint8Array} */ (files.get(name)), files: data };
      const graph = expand ? expandMatrices(stored.model, stored.files) : stored;
      return await runtime.openSession(graph.model, graph.files);
    } catch (error) {
      throw new BundleError(`${name}: ${error.message}`);
    }
  };
  const first = await open(decode);
  return new Engine(runtime, manifest, { decode: first, prefill: prefill === decode ? first : await open(prefill) });
}

/**
 * Compare the bundle's golden prompts with what the engine answers; returns how many tokens were compared.
 *
 * Tokens must be equal up to the first position where the reference's margin between its two best logits is below the
 * bundle's tolerance. Throws `BundleError` at the first difference before that.
 * @param {Engine | import('./gpu-engine.js').GpuEngine} engine
 */
export async function checkGolden(engine) {
  const { golden, tolerance } = engine.manifest;
  let compared = 0;
  for (const [number, { ids, tokens, margins }] of golden.entries()) {
    await engine.prefill(ids);
    for (const [position, expected] of tokens.entries()) {
      if (margins[position] < tolerance) break;
      if (position) await engine.step();
      if (engine.nextToken !== expected) {
        throw new BundleError(
          `golden prompt ${number + 1}: token ${position + 1} is ${engine.nextToken}, expected ${expected} ` +
            `(margin ${margins[position]}, tolerance ${tolerance}); this browser computes something else than the ` +
            'bundle was checked with',
        );
      }
      compared++;
    }
  }
  if (golden.length && !compared) throw new BundleError(`no golden token has a margin above ${tolerance}`);
  return compared;
}
