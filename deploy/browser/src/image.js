/**
 * The runtime's memory as it is once onnxruntime has started, for pages that then need not start it: registering every
 * operator there is takes a third of the CPU time until a small model's first token.
 *
 * build.mjs makes it with the very module that lies beside it, and has the bundle's golden tokens decoded from it. It
 * is for one thread: the stacks of others are in nobody's image.
 */

const PAGE_BYTES = 4096;
/** The export that runs the module's constructors, in the version that package.json pins. */
const CONSTRUCTORS = 'Va';

/**
 * The pages that are not zero, behind the size of all, how many there are, and their numbers.
 * @param {Uint8Array} memory
 */
export function packImage(memory) {
  const numbers = [];
  for (let first = 0; first < memory.length; first += PAGE_BYTES) {
    if (memory.subarray(first, first + PAGE_BYTES).some(byte => byte)) numbers.push(first / PAGE_BYTES);
  }
  const head = Uint32Array.of(memory.length, numbers.length, ...numbers);
  const image = new Uint8Array(head.byteLength + numbers.length * PAGE_BYTES);
  image.set(new Uint8Array(head.buffer));
  numbers.forEach((number, i) => {
    const first = number * PAGE_BYTES;
    image.set(memory.subarray(first, first + PAGE_BYTES), head.byteLength + i * PAGE_BYTES);
  });
  return image;
}

/**
 * Fill the memory that a module is to be instantiated with.
 * @param {Uint8Array} image @param {WebAssembly.Imports} imports
 */
export function restoreImage(image, imports) {
  const memory = Object.values(imports)
    .flatMap(group => Object.values(group))
    .find(value => value instanceof WebAssembly.Memory);
  if (!(memory instanceof WebAssembly.Memory)) throw new Error('onnxruntime-web: imports no memory');
  const [bytes, count] = new Uint32Array(image.buffer, image.byteOffset, 2);
  const numbers = new Uint32Array(image.buffer, image.byteOffset + 8, count);
  const missing = Math.ceil((bytes - memory.buffer.byteLength) / 65536);
  if (missing > 0) memory.grow(missing);
  const target = new Uint8Array(memory.buffer);
  numbers.forEach((number, i) => {
    const first = 8 + 4 * count + i * PAGE_BYTES;
    target.set(image.subarray(first, first + PAGE_BYTES), number * PAGE_BYTES);
  });
}

/** An instance whose constructors have run already. @param {WebAssembly.Instance} instance */
export function withoutConstructors({ exports }) {
  if (typeof exports[CONSTRUCTORS] !== 'function') throw new Error(`onnxruntime-web: has no export ${CONSTRUCTORS}`);
  return { exports: { ...exports, [CONSTRUCTORS]() {} } };
}
