/**
 * Put a bundle and the page that runs it into one folder, which any web server can serve.
 *
 *     npm run build -- BUNDLE [-o FOLDER]      FOLDER is dist/ where not given
 *
 * Of the bundle only the files that the page reads are taken. Nothing in the folder is fetched from elsewhere.
 */

import { createHash } from 'node:crypto';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import { buildSync } from 'esbuild';
import { THREADS_FROM_BYTES, checkRuntimeVersion, neededFiles, parseManifest } from './src/bundle.js';
import { checkGolden, openEngine } from './src/engine.js';
import { packImage } from './src/image.js';
import { openRuntime } from './src/runtime.js';

const here = dirname(fileURLToPath(import.meta.url));
const RUNTIME_FOLDER = join(here, 'node_modules', 'onnxruntime-web');
const MANIFEST = 'ryot_manifest.json';
/** The WebAssembly build, and the larger one that has WebGPU with the JavaScript that drives it. */
const RUNTIME = [
  'ort-wasm-simd-threaded.mjs',
  'ort-wasm-simd-threaded.wasm',
  'ort.webgpu.bundle.min.mjs',
  'ort-wasm-simd-threaded.asyncify.mjs',
  'ort-wasm-simd-threaded.asyncify.wasm',
];
const AS_THEY_ARE = ['index.html', 'style.css', 'app.webmanifest', 'icon.svg'];

/** @param {string} message @returns {never} */
function stop(message) {
  process.stderr.write(`Error: ${message}\n`);
  process.exit(2);
}

/** Copy or bundle what the page is made of. @param {string} folder @param {string} version  of the runtime */
async function addPage(folder, version) {
  for (const name of AS_THEY_ARE) copyFileSync(join(here, 'src', name), join(folder, name));
  mkdirSync(join(folder, 'vendor'), { recursive: true });
  for (const name of RUNTIME) copyFileSync(join(RUNTIME_FOLDER, 'dist', name), join(folder, 'vendor', name));
  await addImage(folder, version);
  bundleScripts(folder, ['page.js', 'worker.js'], { RUNTIME_VERSION: JSON.stringify(version) });
  // The service worker names every other file, and the build by what is in them.
  const names = ['vendor/', '']
    .flatMap(part =>
      readdirSync(join(folder, part), { withFileTypes: true })
        .filter(entry => entry.isFile())
        .map(entry => part + entry.name),
    )
    .sort();
  const hash = createHash('sha256');
  for (const name of names) hash.update(name).update(readFileSync(join(folder, name)));
  bundleScripts(folder, ['sw.js'], {
    BUILD: JSON.stringify(hash.digest('hex').slice(0, 16)),
    FILES: JSON.stringify(names),
  });
}

/**
 * The runtime's memory once it has started, for bundles that one thread computes; it has to give their golden tokens.
 * @param {string} folder @param {string} version  in its name: no cache may give one of another module
 */
async function addImage(folder, version) {
  const manifest = parseManifest(readFileSync(join(folder, 'bundle', MANIFEST), 'utf8'));
  const files = new Map(
    neededFiles(manifest).map(name => [name, new Uint8Array(readFileSync(join(folder, 'bundle', name)))]),
  );
  const weightBytes = [...files].reduce((sum, [name, { length }]) => sum + (name.endsWith('.data') ? length : 0), 0);
  if (weightBytes >= THREADS_FROM_BYTES) return;
  const vendor = pathToFileURL(join(folder, 'vendor') + '/').href;
  const code = await WebAssembly.compile(readFileSync(join(folder, 'vendor', 'ort-wasm-simd-threaded.wasm')));
  const image = packImage((await openRuntime(vendor, 1, code)).module.HEAPU8);
  await checkGolden(await openEngine(await openRuntime(vendor, 1, code, image), manifest, files));
  writeFileSync(join(folder, 'vendor', `started-${version}.bin`), image);
}

/**
 * Each script with all that it imports in one file: a start does not wait for one import after another.
 * @param {string} folder
 * @param {string[]} names
 * @param {Record<string, string>} define
 */
function bundleScripts(folder, names, define) {
  buildSync({
    absWorkingDir: here,
    entryPoints: names.map(name => `src/${name}`),
    outdir: folder,
    bundle: true,
    minifyWhitespace: true,
    format: 'iife',
    target: 'es2023',
    charset: 'utf8',
    legalComments: 'none',
    logLevel: 'warning',
    define,
    supported: { 'dynamic-import': true },
  });
}

/** @param {string} bundle @param {string} folder @param {string} runtimeVersion */
function addBundle(bundle, folder, runtimeVersion) {
  const path = join(bundle, MANIFEST);
  if (!existsSync(path)) throw new Error(`${bundle}: not a bundle, it has no ${MANIFEST}`);
  const text = readFileSync(path, 'utf8');
  const manifest = parseManifest(text);
  checkRuntimeVersion(runtimeVersion, manifest.onnxruntime_min);
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, MANIFEST), text);
  for (const name of neededFiles(manifest)) {
    const bytes = readFileSync(join(bundle, name));
    const found = createHash('sha256').update(bytes).digest('hex');
    if (found !== manifest.files[name].sha256) {
      const expected = manifest.files[name].sha256;
      throw new Error(`${name}: its sha256 is ${found.slice(0, 12)}…, the manifest says ${expected.slice(0, 12)}…`);
    }
    writeFileSync(join(folder, name), bytes);
  }
}

if (!existsSync(RUNTIME_FOLDER)) stop(`onnxruntime-web is not installed; run 'npm ci' in ${here} first`);
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { output: { type: 'string', short: 'o' } },
});
if (positionals.length !== 1) stop('expected one bundle: npm run build -- BUNDLE [-o FOLDER]');
const output = values.output ?? join(here, 'dist');
if (existsSync(output) && readdirSync(output).length && !existsSync(join(output, 'sw.js'))) {
  stop(`${output}: holds something else than a page; name another folder with -o`);
}
const fresh = `${output.replace(/\/+$/, '')}.new-${process.pid}`;
try {
  const { version } = JSON.parse(readFileSync(join(RUNTIME_FOLDER, 'package.json'), 'utf8'));
  mkdirSync(fresh, { recursive: true });
  addBundle(positionals[0], join(fresh, 'bundle'), version);
  await addPage(fresh, version);
  // What was there is replaced by what is whole, or left as it is.
  rmSync(output, { recursive: true, force: true });
  renameSync(fresh, output);
} catch (error) {
  rmSync(fresh, { recursive: true, force: true });
  stop(error.message);
}
process.stdout.write(`${output}\n`);
