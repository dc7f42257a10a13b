/**
 * Quantized matrices of a graph as float32, unpacked while the graph is loaded.
 *
 * onnxruntime's WebAssembly build has fast kernels for float32 alone. It unpacks the whole of a `MatMulNBits` matrix
 * again for every token, and packs that of a `MatMulIntegerToFloat` anew; README.md has the times. So what is
 * downloaded and kept stays small, and memory holds float32. The embedding, of which a token reads one row, stays as it
 * is.
 */

import { FLOAT, Graph, UINT8, constantBytes, newConstant, newNode } from './onnx.js';

/** @typedef {import('./onnx.js').Node} Node */
/** @typedef {import('./onnx.js').Constant} Constant */
/**
 * A data file as the runtime reads it: in one piece per constant.
 * @typedef {{byteLength: number, subarray: (begin: number, end: number) => Uint8Array}} DataFile
 */

const MS = 'com.microsoft';

/**
 * The graph with float32 matrices, and its data files; values are computed when they are read.
 * @param {Uint8Array} model
 * @param {Map<string, Uint8Array>} files
 * @returns {{model: Uint8Array, files: Map<string, DataFile>}}
 */
export function expandMatrices(model, files) {
  const graph = new Graph(model);
  /** @type {Map<string, DataFile>} */
  const all = new Map(files);
  // The runtime copies a matrix before it asks for the next one, so all are unpacked into the same place.
  let scratch = new Float32Array(0);
  /** @param {string} name @param {number[]} dims @param {(out: Float32Array) => void} unpack */
  const addMatrix = (name, dims, unpack) => {
    const matrix = newConstant(`${name}.float32`, dims, FLOAT, `expanded/${name}`);
    graph.constants.set(matrix.name, matrix);
    all.set(matrix.file, {
      byteLength: matrix.length,
      subarray: (begin, end) => {
        if (scratch.byteLength < matrix.length) scratch = new Float32Array(matrix.length / 4);
        unpack(scratch.subarray(0, matrix.length / 4));
        return new Uint8Array(scratch.buffer, begin, end - begin);
      },
    });
    return matrix.name;
  };
  const constant = (/** @type {string} */ name) => {
    const found = graph.constants.get(name);
    if (!found) throw new Error(`${name}: a quantized matrix that is no constant`);
    return found;
  };
  // What the codes of a product's inputs were made of; the product is taken of that, so they are made for nobody.
  const rounded = new Map(graph.nodes.filter(n => n.op === 'QuantizeLinear').map(n => [n.outputs[0], n.inputs[0]]));
  graph.nodes = graph.nodes.flatMap(node => {
    if (node.op === 'MatMulNBits') {
      const [x, codes, scales, zeros, , bias] = node.inputs;
      const { N, K } = node.attributes;
      const matrix = addMatrix(codes, [N, K], out =>
        unpackBlocks(
          node.attributes,
          constantBytes(constant(codes), files),
          floats(constantBytes(constant(scales), files)),
          zeros ? constant(zeros) : null,
          files,
          out,
        ),
      );
      return product(node, x, matrix, bias, 1);
    }
    if (node.op === 'DynamicQuantizeMatMul') {
      const [x, codes, scales, zeros, bias] = node.inputs;
      const stored = constant(codes);
      if (zeros || stored.type === UINT8) return [node];
      const matrix = addMatrix(codes, stored.dims, out =>
        unpackColumns(constantBytes(stored, files), stored.dims, floats(constantBytes(constant(scales), files)), out),
      );
      return product(node, x, matrix, bias, 0);
    }
    const even = node.op === 'MatMulIntegerToFloat' ? rounded.get(node.inputs[0]) : undefined;
    if (even) {
      const [, codes, , scales] = node.inputs;
      const stored = constant(codes);
      const matrix = addMatrix(codes, stored.dims, out =>
        unpackColumns(constantBytes(stored, files), stored.dims, floats(constantBytes(constant(scales), files)), out),
      );
      return product(node, even, matrix, undefined, 0);
    }
    return [node];
  });
  return { model: graph.write(), files: all };
}

/**
 * The graph with embeddings of 8 bits and without zero points, which stand for the very same values: WebGPU's kernel
 * reads no packed zero points, and the build that has it no such embedding on the CPU.
 * @param {Uint8Array} model
 * @param {Map<string, Uint8Array>} files
 * @returns {{model: Uint8Array, files: Map<string, Uint8Array>}}
 */
export function centerEmbeddings(model, files) {
  const graph = new Graph(model);
  const all = new Map(files);
  graph.nodes = graph.nodes.map(node => {
    const [table, , scales, zeros] = node.inputs.map(name => graph.constants.get(name) ?? name);
    if (node.op !== 'GatherBlockQuantized' || !zeros) return node;
    if (typeof table === 'string' || typeof scales === 'string' || typeof zeros === 'string') return node;
    const { bits, block_size: size } = node.attributes;
    const [N, blocks] = scales.dims,
      K = (table.dims[1] * 8) / bits;
    const codes = new Uint8Array(N * K);
    const values = new Float32Array(N * K);
    const shape = { N, K, bits, block_size: size };
    unpackBlocks(shape, constantBytes(table, files), new Float32Array(N * blocks).fill(1), zeros, files, values);
    for (let i = 0; i < codes.length; i++) codes[i] = 128 + values[i];
    const centered = newConstant(`${table.name}.centered`, [N, K], UINT8, `centered/${table.name}`);
    graph.constants.set(centered.name, centered);
    all.set(centered.file, codes);
    return newNode(node.op, MS, [centered.name, node.inputs[1], scales.name], node.outputs[0], {
      ...node.attributes,
      bits: 8,
    });
  });
  return { model: graph.write(), files: all };
}

/**
 * @param {Node} node
 * @param {string} x
 * @param {string} matrix
 * @param {string | undefined} bias
 * @param {0 | 1} transB
 */
function product(node, x, matrix, bias, transB) {
  const [out] = node.outputs;
  if (!bias) return [newNode('FusedMatMul', MS, [x, matrix], out, { transB })];
  return [
    newNode('FusedMatMul', MS, [x, matrix], `${out}.product`, { transB }),
    newNode('Add', '', [`${out}.product`, bias], out),
  ];
}

/**
 * Codes [N, K] in blocks with a scale, and perhaps a zero, each: `(code - zero) * scale`.
 * @param {Record<string, number>} shape
 * @param {Uint8Array} codes
 * @param {Float32Array} scale
 * @param {Constant | null} zeros
 * @param {Map<string, Uint8Array>} files
 * @param {Float32Array} out
 */
function unpackBlocks({ N, K, bits, block_size: size }, codes, scale, zeros, files, out) {
  const blocks = Math.ceil(K / size),
    mask = (1 << bits) - 1;
  const zeroBytes = zeros ? constantBytes(zeros, files) : null;
  const zeroFloats = zeroBytes && zeros?.type === FLOAT ? floats(zeroBytes) : null;
  const zeroRow = Math.ceil((blocks * bits) / 8),
    blockBytes = (size * bits) / 8;
  // What each code stands for in the block at hand.
  const values = new Float32Array(1 << bits);
  for (let n = 0, at = 0; n < N; n++) {
    for (let block = 0; block < blocks; block++) {
      const step = scale[n * blocks + block];
      let zero = 1 << (bits - 1);
      if (zeroFloats) zero = zeroFloats[n * blocks + block];
      else if (zeroBytes) zero = (zeroBytes[n * zeroRow + ((block * bits) >> 3)] >> ((block * bits) & 7)) & mask;
      if (bits < 8) for (let code = 0; code <= mask; code++) values[code] = (code - zero) * step;
      const first = (n * blocks + block) * blockBytes,
        count = Math.min(size, K - block * size);
      if (bits === 8) {
        for (let k = 0; k < count; k++) out[at++] = (codes[first + k] - zero) * step;
      } else if (bits === 4 && count % 2 === 0) {
        for (let byte = first, end = first + count / 2; byte < end; byte++) {
          const pair = codes[byte];
          out[at++] = values[pair & 15];
          out[at++] = values[pair >> 4];
        }
      } else {
        for (let k = 0; k < count; k++) {
          const bit = k * bits;
          out[at++] = values[(codes[first + (bit >> 3)] >> (bit & 7)) & mask];
        }
      }
    }
  }
}

/**
 * Codes [K, N] with a scale a column, or one for all.
 * @param {Uint8Array} codes
 * @param {number[]} dims
 * @param {Float32Array} scales
 * @param {Float32Array} out
 */
function unpackColumns(codes, [K, N], scales, out) {
  const signed = new Int8Array(codes.buffer, codes.byteOffset, codes.byteLength);
  for (let k = 0, at = 0; k < K; k++) {
    for (let n = 0; n < N; n++, at++) out[at] = signed[at] * (scales.length > 1 ? scales[n] : scales[0]);
  }
}

/** Bytes as float32, wherever they begin. @param {Uint8Array} bytes */
function floats(bytes) {
  return new Float32Array(bytes.slice().buffer);
}
