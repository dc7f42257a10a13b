/**
 * One engine in a worker: load, the first token of a short text, then prompts of ids with as many tokens behind them.
 * Both engines get the same ids, the same number of threads, no end of text, and greedy tokens.
 */

import { neededFiles, openBundle } from '../../deploy/browser/src/bundle.js';
import { openEngine } from '../../deploy/browser/src/engine.js';
import { generate } from '../../deploy/browser/src/generate.js';
import { openRuntime } from '../../deploy/browser/src/runtime.js';
import { GREEDY } from '../../deploy/browser/src/sampling.js';
import { Tokenizer } from '../../deploy/browser/src/tokenizer.js';

const FIRST_TEXT = 'def ';
const PEER = './peer/transformers.min.js';
const now = () => performance.timeOrigin + performance.now();

/** Engines by name: each opens from a folder and answers `complete(textOrIds, count)`. */
const engines = {
  async ryot({ model, threads, expand = true }) {
    const opening = openRuntime(new URL('vendor/', self.location).href, threads);
    const bundle = await openBundle(new URL(`${model}/`, self.location).href);
    const files = new Map(
      await Promise.all(neededFiles(bundle.manifest).map(async name => [name, await bundle.read(name)])),
    );
    const tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(files.get('tokenizer.json'))), {});
    const engine = await openEngine(await opening, { ...bundle.manifest, eos_token_ids: [] }, files, { expand });
    return async (prompt, count) => {
      engine.held = [];
      const times = [];
      const ids = typeof prompt === 'string' ? tokenizer.encode(prompt) : prompt;
      const began = now();
      const { tokens, prefillMs, decodeMs } = await generate(engine, tokenizer, ids, {
        sampling: GREEDY,
        maxNewTokens: count,
        onText: () => times.push(now()),
      });
      return { tokens, ttftMs: prefillMs, tokenMs: decodeMs / Math.max(1, count - 1), firstAt: began + prefillMs };
    };
  },

  'ryot-stored': options => engines.ryot({ ...options, expand: false }),

  async 'transformers.js'({ model, threads }) {
    const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import(PEER);
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.localModelPath = '/models/';
    env.backends.onnx.wasm.numThreads = threads;
    const folder = new URL('peer/', self.location).href;
    // Its own choice, the build with WebGPU, lacks the operator of a quantized embedding.
    env.backends.onnx.wasm.wasmPaths = {
      mjs: `${folder}ort-wasm-simd-threaded.mjs`,
      wasm: `${folder}ort-wasm-simd-threaded.wasm`,
    };
    const [tokenizer, loaded] = await Promise.all([
      AutoTokenizer.from_pretrained(model),
      AutoModelForCausalLM.from_pretrained(model, { device: 'wasm', dtype: 'fp32', use_external_data_format: true }),
    ]);
    return async (prompt, count) => {
      const ids = typeof prompt === 'string' ? Array.from(tokenizer(prompt).input_ids.data, Number) : prompt;
      const shape = [1, ids.length];
      const times = [];
      const began = now();
      const output = await loaded.generate({
        input_ids: new Tensor('int64', BigInt64Array.from(ids, BigInt), shape),
        attention_mask: new Tensor('int64', new BigInt64Array(ids.length).fill(1n), shape),
        max_new_tokens: count,
        do_sample: false,
        streamer: { put: () => times.push(now()), end() {} },
      });
      // The streamer gets the prompt first.
      const [, first] = times,
        last = times.at(-1);
      return {
        tokens: Array.from(output.data, Number).slice(ids.length),
        ttftMs: first - began,
        tokenMs: (last - first) / Math.max(1, count - 1),
        firstAt: first,
      };
    };
  },
};

self.onmessage = async ({ data: { engine, model, threads, count, turns, navigated } }) => {
  try {
    const prompts = await (await fetch(`${model}/prompts.json`)).json();
    const complete = await engines[engine]({ model, threads: Number(threads) });
    const { firstAt } = await complete(FIRST_TEXT, 1);
    const found = { startMs: firstAt - navigated, ttftMs: [], tokenMs: [], tokens: [] };
    for (let turn = 0; turn < Number(turns); turn++) {
      const { tokens, ttftMs, tokenMs } = await complete(prompts[turn % prompts.length], Number(count));
      found.ttftMs.push(ttftMs);
      found.tokenMs.push(tokenMs);
      found.tokens.push(tokens);
    }
    postMessage(found);
  } catch (error) {
    postMessage({ error: String(error?.stack ?? error) });
  }
};
