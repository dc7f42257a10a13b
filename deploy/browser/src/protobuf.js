/** The wire format of Protocol Buffers, as far as ONNX files need it: messages as lists of fields, in their order. */

/** A field's number, its wire type, and its value: a number for a varint, bytes for anything else. */
/** @typedef {{number: number, wire: number, value: number | Uint8Array}} Field */

const VARINT = 0,
  FIXED64 = 1,
  BYTES = 2,
  FIXED32 = 5;
const decoder = new TextDecoder();
const encoder = new TextEncoder();

/** @param {Uint8Array} bytes @returns {Field[]} */
export function readFields(bytes) {
  /** @type {Field[]} */
  const fields = [];
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= bytes.length) throw new Error('the file is cut short');
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const number = Math.floor(key / 8),
      wire = key % 8;
    if (wire === VARINT) {
      fields.push({ number, wire, value: varint() });
      continue;
    }
    const size = wire === BYTES ? varint() : wire === FIXED32 ? 4 : wire === FIXED64 ? 8 : -1;
    if (size < 0 || at + size > bytes.length) throw new Error('not a valid ONNX file');
    fields.push({ number, wire, value: bytes.subarray(at, at + size) });
    at += size;
  }
  return fields;
}

/** @param {Field[]} fields @returns {Uint8Array} */
export function writeFields(fields) {
  /** @type {(number | Uint8Array)[]} */
  const parts = [];
  let size = 0;
  /** @param {number} value */
  const varint = value => {
    for (; value >= 128; value = Math.floor(value / 128), size++) parts.push((value % 128) | 128);
    parts.push(value);
    size++;
  };
  for (const { number, wire, value } of fields) {
    varint(number * 8 + wire);
    if (typeof value === 'number') varint(value);
    else {
      if (wire === BYTES) varint(value.length);
      parts.push(value);
      size += value.length;
    }
  }
  const bytes = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    if (typeof part === 'number') bytes[at++] = part;
    else {
      bytes.set(part, at);
      at += part.length;
    }
  }
  return bytes;
}

/** Bytes of all fields of this number. @param {Field[]} fields @param {number} number */
export function allBytes(fields, number) {
  return fields.filter(field => field.number === number).map(field => /** @type {Uint8Array} */ (field.value));
}

/** @param {Field[]} fields @param {number} number */
export function textOf(fields, number) {
  const found = allBytes(fields, number);
  return found.length ? decoder.decode(found[0]) : '';
}

/** @param {Field[]} fields @param {number} number */
export function numberOf(fields, number) {
  const found = fields.find(field => field.number === number);
  return found ? Number(found.value) : 0;
}

/** @param {number} number @param {string | Uint8Array} value @returns {Field} */
export function bytesField(number, value) {
  return { number, wire: BYTES, value: typeof value === 'string' ? encoder.encode(value) : value };
}

/** @param {number} number @param {number} value @returns {Field} */
export function numberField(number, value) {
  return { number, wire: VARINT, value };
}
