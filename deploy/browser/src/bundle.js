/**
 * The bundle as a page sees it: its manifest, and its files, each held against the manifest's sha256 before it is used.
 *
 * Files are kept in the browser's Cache Storage under their hash, so that the page works without a network and an
 * unchanged file of a new version is not fetched again. What comes out of the cache is hashed like what comes from the
 * network: a damaged copy is fetched anew, a damaged original is refused.
 */

/** The newest manifest layout that this code reads. */
const SCHEMA = 1;
const MANIFEST = 'ryot_manifest.json';
const CACHE = 'ryot-bundle';
/** Weights below this are read so fast that handing work to other threads costs more than it saves. */
export const THREADS_FROM_BYTES = 16e6;
/** Files beside the graphs that text needs; a bundle may lack all but the first. */
const TEXT_FILES = [
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
  'chat_template.json',
];
const REBUILD = "export it again with 'ryot-deploy export', and build the page again";

/**
 * @typedef {object} Manifest
 * @property {number} schema
 * @property {string} name
 * @property {string} precision
 * @property {{vocab_size: number, num_layers: number, num_kv_heads: number, head_dim: number, context_length: number,
 *   num_parameters: number}} model
 * @property {{prefill: string, decode: string}} graphs
 * @property {boolean} position_ids
 * @property {'float32' | 'int8'} kv_dtype
 * @property {boolean} [prefill_takes_past]
 * @property {number[]} eos_token_ids
 * @property {number | null} bos_token_id
 * @property {string} onnxruntime_min
 * @property {Record<string, {sha256: string, bytes: number}>} files
 * @property {{ids: number[], tokens: number[], margins: number[]}[]} golden
 * @property {number} tolerance
 */

/** What is wrong with a bundle, in one line. */
export class BundleError extends Error {}

/** Names of the files that a page needs of a bundle. @param {Manifest} manifest */
export function neededFiles(manifest) {
  const data = Object.keys(manifest.files).filter(name => name.endsWith('.data'));
  const text = TEXT_FILES.filter(name => name in manifest.files);
  return [...new Set([manifest.graphs.prefill, manifest.graphs.decode, ...data, ...text])];
}

/**
 * The manifest in the text of its file. Throws `BundleError` for one that this code cannot read.
 * @param {string} text
 * @returns {Manifest}
 */
export function parseManifest(text) {
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (error) {
    throw new BundleError(`${MANIFEST}: not valid JSON, perhaps cut short (${error.message}); ${REBUILD}`);
  }
  if (!Number.isInteger(manifest?.schema)) throw new BundleError(`${MANIFEST}: has no schema number; ${REBUILD}`);
  if (manifest.schema > SCHEMA) {
    throw new BundleError(
      `${MANIFEST}: schema ${manifest.schema} is newer than ${SCHEMA}, the newest that this page reads; ` +
        'build the page with a newer ryot',
    );
  }
  for (const role of ['prefill', 'decode']) {
    const name = manifest.graphs?.[role];
    if (!(name in (manifest.files ?? {})))
      throw new BundleError(`${MANIFEST}: graphs.${role}: ${name} is not among files`);
  }
  if (!('tokenizer.json' in manifest.files)) throw new BundleError(`${MANIFEST}: files: has no tokenizer.json`);
  const strange = Object.keys(manifest.files).find(name => name.startsWith('/') || name.split('/').includes('..'));
  if (strange !== undefined) throw new BundleError(`${MANIFEST}: files: ${strange} is not a path inside the bundle`);
  return manifest;
}

/**
 * Throw `BundleError` where `installed` is older than `required`.
 * @param {string} installed
 * @param {string} required
 */
export function checkRuntimeVersion(installed, required) {
  const [have, need] = [installed, required].map(version => version.split('.').map(part => parseInt(part, 10) || 0));
  for (let i = 0; i < 3; i++) {
    const difference = (have[i] ?? 0) - (need[i] ?? 0);
    if (difference > 0) return;
    if (difference < 0) {
      throw new BundleError(
        `onnxruntime-web ${installed} is too old for this bundle, which needs ${required} or later; ` +
          'raise it in package.json and build the page again',
      );
    }
  }
}

export class Bundle {
  /** @param {string} folder @param {Manifest} manifest @param {Cache | null} cache */
  constructor(folder, manifest, cache) {
    this.folder = folder;
    this.manifest = manifest;
    this.cache = cache;
    /** Bytes that came over the network. */
    this.fetchedBytes = 0;
  }

  /** Bytes of all files that the page loads. */
  get sizeBytes() {
    return neededFiles(this.manifest).reduce((sum, name) => sum + this.manifest.files[name].bytes, 0);
  }

  /** @param {string} name */
  has(name) {
    return name in this.manifest.files;
  }

  /**
   * The bytes of a file, which are those that the manifest names. Throws `BundleError` for others.
   * @param {string} name
   * @param {(bytes: number) => void} [onProgress]  called with the bytes of each piece that arrives
   * @returns {Promise<Uint8Array>}
   */
  async read(name, onProgress = () => {}) {
    const entry = this.manifest.files[name];
    const key = `${this.folder}${name}?sha256=${entry.sha256}`;
    const kept = await this.cache?.match(key);
    if (kept) {
      const bytes = new Uint8Array(await kept.arrayBuffer());
      if ((await hash(bytes)) === entry.sha256) {
        onProgress(bytes.byteLength);
        return bytes;
      }
      await this.cache?.delete(key);
    }
    const bytes = await this.#fetch(name, entry.bytes, onProgress);
    if (bytes.byteLength !== entry.bytes) {
      const word = bytes.byteLength < entry.bytes ? 'cut short' : 'changed';
      throw new BundleError(
        `${name} is ${word}: it has ${bytes.byteLength} bytes, the manifest says ${entry.bytes}; ${REBUILD}`,
      );
    }
    const found = await hash(bytes);
    if (found !== entry.sha256) {
      throw new BundleError(
        `sha256 of ${name} is ${found.slice(0, 12)}…, expected ${entry.sha256.slice(0, 12)}…; ${REBUILD}`,
      );
    }
    await this.#keep(key, bytes);
    return bytes;
  }

  /** The text of a file. @param {string} name */
  async readText(name) {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(await this.read(name));
  }

  /** Drop what the cache holds of other versions. */
  async forgetOthers() {
    if (!this.cache) return;
    const current = new Set(
      neededFiles(this.manifest).map(name => `${this.folder}${name}?sha256=${this.manifest.files[name].sha256}`),
    );
    current.add(this.folder + MANIFEST);
    for (const request of await this.cache.keys()) {
      if (!current.has(request.url)) await this.cache.delete(request);
    }
  }

  /** @param {string} name @param {number} size @param {(bytes: number) => void} onProgress */
  async #fetch(name, size, onProgress) {
    let response;
    try {
      response = await fetch(this.folder + name, { cache: 'no-store' });
    } catch (error) {
      throw new BundleError(`${name}: cannot be fetched (${error.message}); is the server there?`);
    }
    if (!response.ok || !response.body) throw new BundleError(`${name}: the server answered ${response.status}`);
    // Of the size that the manifest promises, so that a large file is in memory once.
    const bytes = new Uint8Array(size);
    let filled = 0;
    const reader = response.body.getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      if (filled + value.byteLength > size) {
        await reader.cancel();
        throw new BundleError(
          `${name} is changed: it has more than the ${size} bytes that the manifest says; ${REBUILD}`,
        );
      }
      bytes.set(value, filled);
      filled += value.byteLength;
      this.fetchedBytes += value.byteLength;
      onProgress(value.byteLength);
    }
    return bytes.subarray(0, filled);
  }

  /** @param {string} key @param {Uint8Array} bytes */
  async #keep(key, bytes) {
    try {
      await this.cache?.put(key, new Response(/** @type {BodyInit} */ (bytes)));
    } catch {
      // No room, or a private window: the page works, and fetches again the next time.
      this.cache = null;
    }
  }
}

/**
 * The bundle in `folder` (a URL that ends in a slash). Its manifest comes from the network, without one from the cache.
 * @param {string} folder
 * @returns {Promise<Bundle>}
 */
export async function openBundle(folder) {
  const cache = globalThis.caches ? await caches.open(CACHE).catch(() => null) : null;
  const url = folder + MANIFEST;
  let text;
  try {
    const response = await fetch(url, { cache: 'no-store' });
    if (!response.ok) throw new BundleError(`${url}: the server answered ${response.status}; is there a bundle?`);
    text = await response.text();
  } catch (error) {
    const kept = await cache?.match(url);
    if (error instanceof BundleError || !kept) {
      throw error instanceof BundleError ? error : new BundleError(`${url}: cannot be fetched (${error.message})`);
    }
    text = await kept.text();
  }
  const manifest = parseManifest(text);
  await cache?.put(url, new Response(text)).catch(() => {});
  return new Bundle(folder, manifest, cache);
}

/** sha256 in hex. @param {Uint8Array} bytes */
async function hash(bytes) {
  const digest = await crypto.subtle.digest('SHA-256', /** @type {BufferSource} */ (bytes));
  return Array.from(new Uint8Array(digest), byte => byte.toString(16).padStart(2, '0')).join('');
}
