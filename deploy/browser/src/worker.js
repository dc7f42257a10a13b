/**
 * Inference off the page's own thread. The page sends requests, one at a time, and gets events:
 *
 *     {type: 'load', bundle, threads}             progress…, ready
 *     {type: 'code', module}                      what `load` waits for: the runtime, compiled
 *     {type: 'generate', messages | prompt, …}    text…, done
 *     {type: 'verify'}                            verified
 *     {type: 'stop'}                              ends what is being generated
 *
 * Whatever goes wrong is {type: 'error', message}.
 */

import { THREADS_FROM_BYTES, checkRuntimeVersion, neededFiles, openBundle } from './bundle.js';
import { encodeConversation, loadChatTemplate } from './chat.js';
import { checkGolden, openEngine } from './engine.js';
import { generate } from './generate.js';
import { fitsGpu, openGpuEngine } from './gpu-engine.js';
import { openRuntime } from './runtime.js';
import { GREEDY } from './sampling.js';
import { Tokenizer } from './tokenizer.js';

const MAX_THREADS = 4;
/** And below this a step on the CPU is over before a GPU has begun. */
const GPU_FROM_BYTES = 16e6;
const VENDOR = new URL('./vendor/', self.location.href).href;
/** Text is sent this often; a model can be faster than a page needs to be. */
const SEND_EVERY_MS = 16;

/** @type {import('./generate.js').Engine} */
let engine;
/** @type {Tokenizer} */
let tokenizer;
/** @type {import('./chat.js').ChatTemplate | null} */
let template;
let running = new AbortController();
/** @type {(module: WebAssembly.Module | undefined) => void} */
let giveCode;
/** @type {Promise<WebAssembly.Module | undefined>} */
const code = new Promise(resolve => {
  giveCode = resolve;
});

/** @param {Record<string, any>} event */
const send = event => postMessage(event);

/** @type {Record<string, (request: any) => Promise<void>>} */
const requests = {
  async load({ bundle: folder, threads, device }) {
    const began = performance.now();
    const bundle = await openBundle(folder);
    const { manifest } = bundle;
    checkRuntimeVersion(RUNTIME_VERSION, manifest.onnxruntime_min);
    const weightBytes = Object.entries(manifest.files).reduce(
      (sum, [name, { bytes }]) => sum + (name.endsWith('.data') ? bytes : 0),
      0,
    );
    const wanted = threads || (weightBytes < THREADS_FROM_BYTES ? 1 : Math.ceil(navigator.hardwareConcurrency / 2));
    const usable = self.crossOriginIsolated ? Math.min(wanted, MAX_THREADS) : 1;
    const image = usable === 1 ? fetchImage() : undefined;
    const opening = code.then(async module => openRuntime(VENDOR, usable, module, await image));
    opening.catch(() => {}); // awaited below, behind the files
    let loaded = 0;
    const files = new Map(
      await Promise.all(
        neededFiles(manifest).map(async name => {
          const bytes = await bundle.read(name, arrived => {
            loaded += arrived;
            send({ type: 'progress', loaded, total: bundle.sizeBytes });
          });
          return /** @type {[string, Uint8Array]} */ ([name, bytes]);
        }),
      ),
    );
    const read = performance.now();
    const json = (/** @type {string} */ name) =>
      JSON.parse(new TextDecoder().decode(files.get(name) ?? new Uint8Array([123, 125])));
    const config = json('tokenizer_config.json');
    const special = 'added_tokens_decoder' in config ? {} : json('special_tokens_map.json');
    tokenizer = new Tokenizer(json('tokenizer.json'), { ...config, ...special });
    template = await loadChatTemplate(bundle, config, tokenizer.namedTokens);
    const gpu = await tryGpu(manifest, files, device ?? (weightBytes < GPU_FROM_BYTES ? 'cpu' : 'any'));
    const opened = performance.now();
    engine = gpu.engine ?? (await openEngine(await opening, manifest, files));
    send({
      type: 'ready',
      name: manifest.name,
      precision: manifest.precision,
      parameters: manifest.model.num_parameters,
      context: manifest.model.context_length,
      chat: template !== null,
      threads: usable,
      sizeBytes: bundle.sizeBytes,
      fetchedBytes: bundle.fetchedBytes,
      imageBytes: (await image)?.byteLength ?? 0,
      memoryBytes: engine.memoryBytes,
      device: gpu.engine ? 'WebGPU' : 'WebAssembly',
      gpuProblem: gpu.problem,
      files: neededFiles(manifest).length,
      readMs: read - began,
      runtimeMs: opened - read,
      openMs: performance.now() - opened,
      loadMs: performance.now() - began,
    });
    await bundle.forgetOthers();
  },

  async code({ module }) {
    giveCode(module);
  },

  async generate({ messages, prompt, sampling, maxNewTokens }) {
    running = new AbortController();
    const began = performance.now();
    const chat = messages && template;
    const { ids, forgotten } = chat
      ? encodeConversation(
          /** @type {import('./chat.js').ChatTemplate} */ (template),
          tokenizer,
          messages,
          engine.maxLen,
        )
      : { ids: encodePrompt(prompt), forgotten: 0 };
    let waiting = '',
      sent = 0,
      firstMs = 0;
    const flush = () => {
      if (waiting) send({ type: 'text', text: waiting });
      waiting = '';
      sent = performance.now();
    };
    const completion = await generate(engine, tokenizer, ids, {
      sampling: { ...GREEDY, ...sampling },
      maxNewTokens,
      continues: !chat,
      signal: running.signal,
      onText: text => {
        firstMs ||= performance.now() - began;
        waiting += text;
        if (performance.now() - sent > SEND_EVERY_MS) flush();
      },
    });
    flush();
    const { tokens, finishReason, sharedTokens, decodeMs } = completion;
    send({
      type: 'done',
      promptTokens: ids.length,
      tokens,
      finishReason,
      sharedTokens,
      forgotten,
      firstMs,
      tokensPerS: tokens.length > 1 ? ((tokens.length - 1) / decodeMs) * 1e3 : 0,
      memoryBytes: engine.memoryBytes,
    });
  },

  async verify() {
    const compared = await checkGolden(engine);
    send({ type: 'verified', compared, files: neededFiles(engine.manifest).length });
  },

  async stop() {
    running.abort();
  },
};

/**
 * The bundle on WebGPU, where there is one that gives the golden tokens; else why not, where one was tried.
 * @param {import('./bundle.js').Manifest} manifest @param {Map<string, Uint8Array>} files
 * @param {string} device  `webgpu` takes one that computes in software too, `any` only real ones, anything else none
 * @returns {Promise<{engine?: import('./gpu-engine.js').GpuEngine, problem?: string}>}
 */
async function tryGpu(manifest, files, device) {
  const asked = device === 'webgpu';
  const graph = /** @type {Uint8Array} */ (files.get(manifest.graphs.decode));
  if (!asked && device !== 'any') return {};
  if (!fitsGpu(manifest, graph))
    return asked ? { problem: 'WebGPU has no kernels for the matrices of this bundle' } : {};
  const adapter = await /** @type {any} */ (navigator).gpu?.requestAdapter();
  if (!adapter || (!asked && adapter.info?.isFallbackAdapter))
    return asked ? { problem: 'this browser offers no WebGPU' } : {};
  try {
    const opened = await openGpuEngine(VENDOR, manifest, files);
    await checkGolden(opened);
    return { engine: opened };
  } catch (error) {
    return { problem: `not on WebGPU: ${error.message}` };
  }
}

/** The runtime's memory once it has started, where the build has left one. */
async function fetchImage() {
  const response = await fetch(`${VENDOR}started-${RUNTIME_VERSION}.bin`).catch(() => null);
  return response?.ok ? new Uint8Array(await response.arrayBuffer()) : undefined;
}

/** The ids of a text; of an empty one, the id that begins a text. @param {string} text */
function encodePrompt(text) {
  const ids = tokenizer.encode(text);
  if (ids.length) return ids;
  const bos = engine.manifest.bos_token_id;
  if (bos === null) throw new Error('the prompt is empty, and this model has no token that begins a text');
  return [bos];
}

self.onmessage = async ({ data }) => {
  try {
    await requests[data.type](data);
  } catch (error) {
    send({ type: 'error', message: error.message ?? String(error), during: data.type });
  }
};
