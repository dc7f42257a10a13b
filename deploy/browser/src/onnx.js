/** The parts of an ONNX graph that `expand` changes: nodes and constants. Everything else passes through as it is. */

import { allBytes, bytesField, numberField, numberOf, readFields, textOf, writeFields } from './protobuf.js';

/** @typedef {import('./protobuf.js').Field} Field */
/**
 * @typedef {{op: string, domain: string, name: string, inputs: string[], outputs: string[], attributes: Record<string,
 *   number>, bytes: Uint8Array}} Node
 */
/**
 * @typedef {{name: string, dims: number[], type: number, bytes: Uint8Array, file: string, offset: number, length:
 *   number}} Constant
 */

// Field numbers of onnx.proto.
const MODEL_GRAPH = 7;
const GRAPH_NODE = 1,
  GRAPH_CONSTANT = 5;
const NODE_INPUT = 1,
  NODE_OUTPUT = 2,
  NODE_NAME = 3,
  NODE_OP = 4,
  NODE_ATTRIBUTE = 5,
  NODE_DOMAIN = 7;
const ATTRIBUTE_NAME = 1,
  ATTRIBUTE_INT = 3,
  ATTRIBUTE_TYPE = 20,
  INT_ATTRIBUTE = 2;
const TENSOR_DIMS = 1,
  TENSOR_TYPE = 2,
  TENSOR_NAME = 8,
  TENSOR_RAW = 9,
  TENSOR_EXTERNAL = 13,
  TENSOR_LOCATION = 14;
const ENTRY_KEY = 1,
  ENTRY_VALUE = 2;
const EXTERNAL = 1;
export const FLOAT = 1,
  UINT8 = 2;

const decoder = new TextDecoder();

export class Graph {
  /** @param {Uint8Array} model */
  constructor(model) {
    this.model = readFields(model);
    this.fields = readFields(allBytes(this.model, MODEL_GRAPH)[0]);
    this.nodes = allBytes(this.fields, GRAPH_NODE).map(readNode);
    this.constants = new Map(
      allBytes(this.fields, GRAPH_CONSTANT).map(bytes => {
        const constant = readConstant(bytes);
        return [constant.name, constant];
      }),
    );
  }

  /** The file of the graph as it is now, without constants that no node reads. */
  write() {
    const used = new Set(this.nodes.flatMap(node => node.inputs));
    const constants = [...this.constants.values()].filter(constant => used.has(constant.name));
    const graph = writeFields([
      ...this.nodes.map(node => bytesField(GRAPH_NODE, node.bytes)),
      ...this.fields.filter(({ number }) => number !== GRAPH_NODE && number !== GRAPH_CONSTANT),
      ...constants.map(constant => bytesField(GRAPH_CONSTANT, constant.bytes)),
    ]);
    return writeFields(
      this.model.map(field => (field.number === MODEL_GRAPH ? bytesField(MODEL_GRAPH, graph) : field)),
    );
  }
}

/** @param {Uint8Array} bytes @returns {Node} */
function readNode(bytes) {
  const fields = readFields(bytes);
  const attributes = allBytes(fields, NODE_ATTRIBUTE)
    .map(readFields)
    .map(attribute => [textOf(attribute, ATTRIBUTE_NAME), numberOf(attribute, ATTRIBUTE_INT)]);
  return {
    op: textOf(fields, NODE_OP),
    domain: textOf(fields, NODE_DOMAIN),
    name: textOf(fields, NODE_NAME),
    inputs: allBytes(fields, NODE_INPUT).map(input => decoder.decode(input)),
    outputs: allBytes(fields, NODE_OUTPUT).map(output => decoder.decode(output)),
    attributes: Object.fromEntries(attributes),
    bytes,
  };
}

/**
 * A node with whole numbers for attributes.
 * @param {string} op
 * @param {string} domain
 * @param {string[]} inputs
 * @param {string} output
 * @param {Record<string, number>} attributes
 * @returns {Node}
 */
export function newNode(op, domain, inputs, output, attributes = {}) {
  const fields = [
    ...inputs.map(input => bytesField(NODE_INPUT, input)),
    bytesField(NODE_OUTPUT, output),
    bytesField(NODE_NAME, output),
    bytesField(NODE_OP, op),
    ...Object.entries(attributes).map(([name, value]) =>
      bytesField(
        NODE_ATTRIBUTE,
        writeFields([
          bytesField(ATTRIBUTE_NAME, name),
          numberField(ATTRIBUTE_INT, value),
          numberField(ATTRIBUTE_TYPE, INT_ATTRIBUTE),
        ]),
      ),
    ),
    bytesField(NODE_DOMAIN, domain),
  ];
  return { op, domain, name: output, inputs, outputs: [output], attributes, bytes: writeFields(fields) };
}

/** @param {Uint8Array} bytes @returns {Constant} */
function readConstant(bytes) {
  const fields = readFields(bytes);
  const external = Object.fromEntries(
    allBytes(fields, TENSOR_EXTERNAL)
      .map(readFields)
      .map(entry => [textOf(entry, ENTRY_KEY), textOf(entry, ENTRY_VALUE)]),
  );
  return {
    name: textOf(fields, TENSOR_NAME),
    dims: readDims(fields),
    type: numberOf(fields, TENSOR_TYPE),
    bytes,
    file: external.location ?? '',
    offset: Number(external.offset ?? 0),
    length: Number(external.length ?? 0),
  };
}

/** @param {Field[]} fields */
function readDims(fields) {
  return fields
    .filter(field => field.number === TENSOR_DIMS)
    .flatMap(({ value }) => {
      if (typeof value === 'number') return [value];
      // Packed: the same numbers, one behind the other.
      const dims = [];
      for (let at = 0; at < value.length;) {
        let dim = 0;
        for (let scale = 1; ; scale *= 128) {
          dim += (value[at] & 127) * scale;
          if (value[at++] < 128) break;
        }
        dims.push(dim);
      }
      return dims;
    });
}

/**
 * A constant whose values lie in a data file of their own.
 * @param {string} name @param {number[]} dims @param {number} type  `FLOAT` or `UINT8` @param {string} file
 * @returns {Constant}
 */
export function newConstant(name, dims, type, file) {
  const length = (type === FLOAT ? 4 : 1) * dims.reduce((product, dim) => product * dim, 1);
  const entries = { location: file, offset: '0', length: String(length) };
  const bytes = writeFields([
    ...dims.map(dim => numberField(TENSOR_DIMS, dim)),
    numberField(TENSOR_TYPE, type),
    bytesField(TENSOR_NAME, name),
    ...Object.entries(entries).map(([key, value]) =>
      bytesField(TENSOR_EXTERNAL, writeFields([bytesField(ENTRY_KEY, key), bytesField(ENTRY_VALUE, value)])),
    ),
    numberField(TENSOR_LOCATION, EXTERNAL),
  ]);
  return { name, dims, type, bytes, file, offset: 0, length };
}

/** The bytes of a constant's values. @param {Constant} constant @param {Map<string, Uint8Array>} files */
export function constantBytes({ bytes, file, offset, length, name }, files) {
  if (file) {
    const data = files.get(file);
    if (!data || offset + length > data.length) throw new Error(`constant ${name}: ${file} does not hold it`);
    return data.subarray(offset, offset + length);
  }
  const [raw] = allBytes(readFields(bytes), TENSOR_RAW);
  if (!raw) throw new Error(`constant ${name}: its values are not raw bytes`);
  return raw;
}
