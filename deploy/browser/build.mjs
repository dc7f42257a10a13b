/**
 * Put a bundle and the page that runs it into one folder, which any web server can serve.
 *
 *     npm run build -- BUNDLE [-o FOLDER]      FOLDER is dist/ where not given
 *
 * Of the bundle only the files that the page reads are taken. Nothing in the folder is fetched from elsewhere.
 */

import { createHash } from 'node:crypto';
import { copyFileSync, existsSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { checkRuntimeVersion, neededFiles, parseManifest } from './src/bundle.js';

const here = dirname(fileURLToPath(import.meta.url));
const MANIFEST = 'ryot_manifest.json';
/** Files of npm packages, and what they are called in vendor/. */
const VENDORED = {
  'onnxruntime-web/dist/ort-wasm-simd-threaded.mjs': 'ort-wasm-simd-threaded.mjs',
  'onnxruntime-web/dist/ort-wasm-simd-threaded.wasm': 'ort-wasm-simd-threaded.wasm',
  '@huggingface/jinja/dist/index.js': 'jinja.js',
};

/** @param {string} message @returns {never} */
function stop(message) {
  process.stderr.write(`Error: ${message}\n`);
  process.exit(2);
}

/** @param {string} folder */
function addPage(folder) {
  for (const name of readdirSync(join(here, 'src'))) copyFileSync(join(here, 'src', name), join(folder, name));
  mkdirSync(join(folder, 'vendor'), { recursive: true });
  for (const [from, to] of Object.entries(VENDORED)) {
    const source = join(here, 'node_modules', from);
    if (!existsSync(source)) stop(`${from} is not installed; run 'npm ci' in ${here} first`);
    copyFileSync(source, join(folder, 'vendor', to));
  }
  const { version } = JSON.parse(readFileSync(join(here, 'node_modules/onnxruntime-web/package.json'), 'utf8'));
  writeFileSync(join(folder, 'vendor', 'versions.js'), `export const ORT_VERSION = '${version}';\n`);
  return version;
}

/** Name the page's files, and the build by what is in them, for the service worker. @param {string} folder */
function addFileList(folder) {
  const names = ['vendor', '.'].flatMap(part => readdirSync(join(folder, part), { withFileTypes: true })
    .filter(entry => entry.isFile() && !['sw.js', 'files.js'].includes(entry.name))
    .map(entry => (part === '.' ? '' : `${part}/`) + entry.name)).sort();
  const hash = createHash('sha256');
  for (const name of names) hash.update(name).update(readFileSync(join(folder, name)));
  writeFileSync(
    join(folder, 'files.js'),
    `export const BUILD = '${hash.digest('hex').slice(0, 16)}';\nexport const FILES = ${JSON.stringify(names, null, 1)};\n`);
}

/** @param {string} bundle @param {string} folder @param {string} runtimeVersion */
function addBundle(bundle, folder, runtimeVersion) {
  const path = join(bundle, MANIFEST);
  if (!existsSync(path)) stop(`${bundle}: not a bundle, it has no ${MANIFEST}`);
  const text = readFileSync(path, 'utf8');
  const manifest = parseManifest(text);
  checkRuntimeVersion(runtimeVersion, manifest.onnxruntime_min);
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, MANIFEST), text);
  for (const name of neededFiles(manifest)) {
    const bytes = readFileSync(join(bundle, name));
    const found = createHash('sha256').update(bytes).digest('hex');
    if (found !== manifest.files[name].sha256) {
      stop(`${name}: its sha256 is ${found.slice(0, 12)}…, the manifest says ${manifest.files[name].sha256.slice(0, 12)}…`);
    }
    writeFileSync(join(folder, name), bytes);
  }
}

const { values, positionals } = parseArgs({ allowPositionals: true, options: { output: { type: 'string', short: 'o' } } });
if (positionals.length !== 1) stop('expected one bundle: npm run build -- BUNDLE [-o FOLDER]');
const output = values.output ?? join(here, 'dist');
if (existsSync(output) && readdirSync(output).length && !existsSync(join(output, 'files.js'))) {
  stop(`${output}: holds something else than a page; name another folder with -o`);
}
rmSync(output, { recursive: true, force: true });
mkdirSync(output, { recursive: true });
try {
  const version = addPage(output);
  addBundle(positionals[0], join(output, 'bundle'), version);
  addFileList(output);
} catch (error) {
  stop(error.message);
}
process.stdout.write(`${output}\n`);
