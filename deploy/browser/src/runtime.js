/**
 * onnxruntime's WebAssembly build, called through its C functions.
 *
 * onnxruntime-web's own JavaScript copies every input into the module's memory and every output out of it, at every
 * call: of a decode step that is the whole key-value cache, twice. Here tensors are made once, in the module's memory,
 * and the same one is a graph's input and its output. The functions are not documented for callers, so the version is
 * pinned in package.json and `openRuntime` refuses a module that lacks one of them.
 */

import { restoreImage, withoutConstructors } from './image.js';

/** onnx's numbers of the element types that a bundle's graphs take. */
const ELEMENT_TYPES = { float32: 1, int8: 3, int32: 6, int64: 7 };
const ARRAYS = { float32: Float32Array, int8: Int8Array, int32: Int32Array, int64: BigInt64Array };
const ON_CPU = 1;
/** Buffers start on cache-line boundaries, as those of the runtime's own kernels do. */
const ALIGNMENT_BYTES = 64;
/** The export has fused what can be fused; looking for more took a third of the time in which a small graph opens. */
const NO_OPTIMIZATIONS = 0;
const SEQUENTIAL = 0;
const ERRORS_ONLY = 3;
const NEEDED = [
  '_OrtInit',
  '_OrtCreateSessionOptions',
  '_OrtAddSessionConfigEntry',
  '_OrtReleaseSessionOptions',
  '_OrtCreateSession',
  '_OrtReleaseSession',
  '_OrtCreateTensor',
  '_OrtReleaseTensor',
  '_OrtRun',
  '_OrtGetLastError',
  '_malloc',
  '_free',
  'stackSave',
  'stackAlloc',
  'stackRestore',
  'setValue',
  'getValue',
  'UTF8ToString',
  'stringToUTF8',
  'lengthBytesUTF8',
  'mountExternalData',
  'unmountExternalData',
];

/** @typedef {'float32' | 'int8' | 'int32' | 'int64'} ElementType */
/** @typedef {Float32Array | Int8Array | Int32Array | BigInt64Array} Elements */
/**
 * An array in the module's memory and the runtime's handle of it.
 * @typedef {{handle: number, pointer: number, elements: any}} Tensor
 */
/**
 * Names and tensors of one way to call a graph, laid out as the C function reads them.
 * @typedef {{block: number, numInputs: number, numOutputs: number}} Call
 */

/**
 * Load the module from `folder` (a URL that ends in a slash); `threads` above 1 need cross-origin isolation.
 * @param {string} folder
 * @param {number} threads
 * @param {WebAssembly.Module} [compiled]  the module's code, where somebody has compiled it already
 * @param {Uint8Array} [image]  for one thread and with `compiled`: its memory once it has started, as image.js packs it
 */
export async function openRuntime(folder, threads, compiled, image) {
  const restored = compiled && threads === 1 ? image : undefined;
  const factory = (await import(`${folder}ort-wasm-simd-threaded.mjs`)).default;
  const module = await factory({
    numThreads: threads,
    locateFile: (/** @type {string} */ name) => folder + name,
    ...(compiled && {
      instantiateWasm: (/** @type {WebAssembly.Imports} */ imports, /** @type {Function} */ receive) => {
        if (restored) restoreImage(restored, imports);
        WebAssembly.instantiate(compiled, imports).then(instance =>
          receive(restored ? withoutConstructors(instance) : instance, compiled),
        );
        return {};
      },
    }),
  });
  const missing = NEEDED.filter(name => typeof module[name] !== 'function');
  if (missing.length) {
    throw new Error(`onnxruntime-web: has no ${missing.join(', ')}; install the version that package.json names`);
  }
  return new Runtime(module, threads, Boolean(restored));
}

export class Runtime {
  /** @param {any} module @param {number} threads @param {boolean} started  whether onnxruntime runs in it already */
  constructor(module, threads, started) {
    this.module = module;
    this.threads = threads;
    if (!started) this.check(module._OrtInit(threads, ERRORS_ONLY), 'starting onnxruntime');
  }

  /** Bytes of the module's memory: weights, cache and all else that the runtime has. */
  get memoryBytes() {
    return this.module.HEAPU8.buffer.byteLength;
  }

  /**
   * A graph, ready to run, with the data files that it names.
   * @param {Uint8Array} graph
   * @param {Map<string, import('./expand.js').DataFile>} dataFiles
   */
  async openSession(graph, dataFiles) {
    const { module } = this;
    const options = module._OrtCreateSessionOptions(
      NO_OPTIMIZATIONS,
      false,
      true,
      SEQUENTIAL,
      false,
      0,
      0,
      ERRORS_ONLY,
      0,
      0,
    );
    if (!options) this.fail('session options');
    const bytes = module._malloc(graph.byteLength);
    try {
      module.HEAPU8.set(graph, bytes);
      for (const [name, data] of dataFiles) module.mountExternalData(name, data);
      const handle = await module._OrtCreateSession(bytes, graph.byteLength, options);
      if (!handle) this.fail('loading the graph');
      return new Session(this, handle);
    } finally {
      module.unmountExternalData();
      module._free(bytes);
      module._OrtReleaseSessionOptions(options);
    }
  }

  /**
   * Zeros in the module's memory.
   * @param {ElementType} type
   * @param {number[]} dims
   * @returns {Tensor}
   */
  newTensor(type, dims) {
    const kind = ARRAYS[type];
    const count = dims.reduce((product, dim) => product * dim, 1);
    const size = count * kind.BYTES_PER_ELEMENT;
    const pointer = this.module._malloc(size + ALIGNMENT_BYTES);
    if (!pointer) throw new RangeError(`memory: ${size} bytes for a tensor are not to be had`);
    const start = pointer + ((ALIGNMENT_BYTES - (pointer % ALIGNMENT_BYTES)) % ALIGNMENT_BYTES);
    this.module.getValue(pointer, 'i8'); // refreshes the views where another thread made the memory grow
    const elements = new kind(this.module.HEAPU8.buffer, start, count).fill(
      /** @type {never} */ (type === 'int64' ? 0n : 0),
    );
    return { handle: this.#handle(type, dims, start, size), pointer, elements };
  }

  /** @param {Tensor} tensor */
  freeTensor(tensor) {
    this.module._OrtReleaseTensor(tensor.handle);
    this.module._free(tensor.pointer);
  }

  /** @param {ElementType} type @param {number[]} dims @param {number} start @param {number} size */
  #handle(type, dims, start, size) {
    const { module } = this;
    const stack = module.stackSave();
    try {
      const shape = module.stackAlloc(4 * dims.length);
      dims.forEach((dim, i) => module.setValue(shape + 4 * i, dim, 'i32'));
      const handle = module._OrtCreateTensor(ELEMENT_TYPES[type], start, size, shape, dims.length, ON_CPU);
      if (!handle) this.fail('making a tensor');
      return handle;
    } finally {
      module.stackRestore(stack);
    }
  }

  /** @param {number} status @param {string} doing */
  check(status, doing) {
    if (status) this.fail(doing);
  }

  /** @param {string} doing @returns {never} */
  fail(doing) {
    const { module } = this;
    const stack = module.stackSave();
    const place = module.stackAlloc(8);
    module._OrtGetLastError(place, place + 4);
    const message = module.getValue(place + 4, '*');
    const reason = message ? module.UTF8ToString(message) : 'no reason given';
    module.stackRestore(stack);
    throw new Error(`onnxruntime: ${doing}: ${reason.split('\n')[0]}`);
  }
}

export class Session {
  #strings = new Map();

  /** @param {Runtime} runtime @param {number} handle */
  constructor(runtime, handle) {
    this.runtime = runtime;
    this.handle = handle;
  }

  /**
   * Lay out a call; `freeCall` gives its memory back.
   * @param {[string, Tensor][]} inputs
   * @param {[string, Tensor][]} outputs
   * @returns {Call}
   */
  newCall(inputs, outputs) {
    const { module } = this.runtime;
    const rows = [...inputs, ...outputs];
    const block = module._malloc(8 * rows.length);
    // Names of inputs, their tensors, names of outputs, their tensors.
    const words = [inputs, outputs].flatMap(part => [
      ...part.map(([name]) => this.#string(name)),
      ...part.map(([, tensor]) => tensor.handle),
    ]);
    words.forEach((word, i) => module.setValue(block + 4 * i, word, '*'));
    return { block, numInputs: inputs.length, numOutputs: outputs.length };
  }

  /** @param {Call} call */
  freeCall(call) {
    this.runtime.module._free(call.block);
  }

  /** @param {Call} call */
  run({ block, numInputs, numOutputs }) {
    const outputs = block + 8 * numInputs;
    const status = this.runtime.module._OrtRun(
      this.handle,
      block,
      block + 4 * numInputs,
      numInputs,
      outputs,
      numOutputs,
      outputs + 4 * numOutputs,
      0,
    );
    this.runtime.check(status, 'running the graph');
  }

  /** @param {string} text */
  #string(text) {
    if (!this.#strings.has(text)) {
      const { module } = this.runtime;
      const size = module.lengthBytesUTF8(text) + 1;
      const pointer = module._malloc(size);
      module.stringToUTF8(text, pointer, size);
      this.#strings.set(text, pointer);
    }
    return this.#strings.get(text);
  }
}
