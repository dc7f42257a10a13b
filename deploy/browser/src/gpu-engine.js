/**
 * A bundle on WebGPU, through onnxruntime-web's own JavaScript: weights stay quantized, keys and values on the GPU.
 *
 * It answers as `Engine` does, but that its calls have to be awaited. Keys and values are new buffers after each call,
 * as long as what is held, so a prompt is computed anew unless it begins with all of that.
 */

import { ContextError, checkPrompt } from './engine.js';
import { centerEmbeddings } from './expand.js';
import { Graph } from './onnx.js';

/** @typedef {import('./bundle.js').Manifest} Manifest */

/** Operators of our graphs for which WebGPU has no kernel, so that every layer would go to the CPU and back. */
const CPU_ONLY = ['FusedMatMul', 'DynamicQuantizeMatMul', 'MatMulIntegerToFloat'];
/** The most tokens that go through the graph in one call. */
const PIECE_TOKENS = 256;

/**
 * Whether a graph and its bundle are made of what WebGPU computes.
 * @param {Manifest} manifest
 * @param {Uint8Array} model
 */
export function fitsGpu(manifest, model) {
  return (
    manifest.graphs.prefill === manifest.graphs.decode &&
    manifest.kv_dtype === 'float32' &&
    !new Graph(model).nodes.some(node => CPU_ONLY.includes(node.op))
  );
}

/**
 * @param {string} folder  of onnxruntime-web's files, a URL that ends in a slash
 * @param {Manifest} manifest
 * @param {Map<string, Uint8Array>} files
 */
export async function openGpuEngine(folder, manifest, files) {
  const ort = await import(`${folder}ort.webgpu.bundle.min.mjs`);
  ort.env.wasm.wasmPaths = folder;
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = 'error';
  const names = Array.from({ length: manifest.model.num_layers }, (_, layer) => [
    `${layer}.key`,
    `${layer}.value`,
  ]).flat();
  const graph = centerEmbeddings(/** @type {Uint8Array} */ (files.get(manifest.graphs.decode)), files);
  const data = [...graph.files].filter(([name]) => name.endsWith('.data') || name.startsWith('centered/'));
  const session = await ort.InferenceSession.create(graph.model, {
    executionProviders: ['webgpu'],
    externalData: data.map(([path, bytes]) => ({ path, data: bytes })),
    preferredOutputLocation: Object.fromEntries(names.map(name => [`present.${name}`, 'gpu-buffer'])),
    logSeverityLevel: 3,
  });
  return new GpuEngine(ort, session, manifest, names);
}

export class GpuEngine {
  /** Ids that keys and values are held of. @type {number[]} */
  held = [];
  nextToken = 0;
  /** Whether `logits` are brought from the GPU; greedy text needs none. */
  readsLogits = false;
  logits = new Float32Array(0);
  /** @type {Map<string, any>} */
  #past = new Map();

  /** @param {any} ort @param {any} session @param {Manifest} manifest @param {string[]} names */
  constructor(ort, session, manifest, names) {
    this.ort = ort;
    this.session = session;
    this.manifest = manifest;
    this.names = names;
    this.maxLen = manifest.model.context_length;
  }

  /** Bytes of keys and values; what else the GPU holds is not told. */
  get memoryBytes() {
    const { num_layers: layers, num_kv_heads: heads, head_dim: width } = this.manifest.model;
    return 8 * layers * heads * width * this.held.length;
  }

  /** @param {number[]} ids */
  async prefill(ids) {
    this.#forget();
    await this.extend(ids);
  }

  /** @param {number[]} ids @returns {Promise<number>} how many were held already */
  async prefillShared(ids) {
    const shared = this.held.length < ids.length && this.held.every((id, i) => id === ids[i]) ? this.held.length : 0;
    if (!shared) this.#forget();
    await this.extend(ids.slice(shared));
    return shared;
  }

  /** @param {number[]} ids */
  async extend(ids) {
    checkPrompt(this.manifest, this.held.length, ids);
    for (let first = 0; first < ids.length; first += PIECE_TOKENS)
      await this.#run(ids.slice(first, first + PIECE_TOKENS));
  }

  async step() {
    if (this.held.length >= this.maxLen) throw new ContextError(`the context of ${this.maxLen} tokens is full`);
    await this.#run([this.nextToken]);
  }

  /** @param {number[]} ids */
  async #run(ids) {
    const { Tensor } = this.ort;
    const start = this.held.length,
      length = start + ids.length;
    const { num_kv_heads: heads, head_dim: width } = this.manifest.model;
    /** @type {Record<string, any>} */
    const feeds = {
      input_ids: new Tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]),
      seqlens_k: new Tensor('int32', Int32Array.of(length - 1), [1]),
      total_sequence_length: new Tensor('int32', Int32Array.of(length), []),
    };
    if (this.manifest.position_ids) {
      feeds.position_ids = new Tensor(
        'int64',
        BigInt64Array.from(ids, (_, i) => BigInt(start + i)),
        [1, ids.length],
      );
    }
    for (const name of this.names) {
      feeds[`past_key_values.${name}`] =
        this.#past.get(name) ?? new Tensor('float32', new Float32Array(0), [1, heads, 0, width]);
    }
    const fetches = [
      'next_token',
      ...(this.readsLogits ? ['logits'] : []),
      ...this.names.map(name => `present.${name}`),
    ];
    const results = await this.session.run(feeds, fetches);
    for (const name of this.names) {
      this.#past.get(name)?.dispose();
      this.#past.set(name, results[`present.${name}`]);
    }
    this.held.push(...ids);
    this.nextToken = Number(results.next_token.data[0]);
    if (this.readsLogits) this.logits = results.logits.data;
  }

  #forget() {
    for (const buffer of this.#past.values()) buffer.dispose();
    this.#past.clear();
    this.held = [];
  }
}
