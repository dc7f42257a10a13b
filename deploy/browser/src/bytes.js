/**
 * The alphabet in which a byte-level BPE writes its tokens: GPT-2's table, where a printable Latin-1 character stands
 * for its own byte and the other 68 bytes are written, in order, as the characters from U+0100 on.
 */

/** @type {string[]} */
export const byteToChar = [];
/** @type {Map<string, number>} */
export const charToByte = new Map();

let next = 0x100;
for (let byte = 0; byte < 256; byte++) {
  const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  byteToChar[byte] = String.fromCharCode(printable ? byte : next++);
  charToByte.set(byteToChar[byte], byte);
}

/** The name of the token that stands for one byte, where a vocabulary of characters has such. @param {number} byte */
export function fallbackName(byte) {
  return `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`;
}
