/**
 * The page without a network: its own files come from the cache, all of one build. The bundle's files are kept by
 * bundle.js, under their hashes.
 *
 * A server that cannot set headers may serve the page too: what comes from here is cross-origin isolated in any case,
 * which is what threads need.
 */

const CACHE = `ryot-page-${BUILD}`;
const ISOLATION = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Cross-Origin-Resource-Policy': 'same-origin',
};
/** Large and for few browsers: kept once it was asked for. @param {string} name */
const isLate = name => /webgpu|asyncify/.test(name);
const EARLY = ['', ...FILES.filter(name => !isLate(name))];
const here = new URL('./', self.location.href).href;
const sw = /** @type {any} */ (self);

sw.addEventListener('install', (/** @type {any} */ event) => {
  event.waitUntil(fill().then(() => sw.skipWaiting()));
  // Where browsers know how, files come from the cache without this worker being started for them.
  event
    .addRoutes?.(
      EARLY.map(name => ({
        condition: { urlPattern: { pathname: new URL(here + name).pathname, search: '' }, requestMethod: 'GET' },
        source: { cacheName: CACHE },
      })),
    )
    .catch(() => {});
});

sw.addEventListener('activate', (/** @type {any} */ event) => {
  event.waitUntil(forgetOthers().then(() => sw.clients.claim()));
});

sw.addEventListener('fetch', (/** @type {any} */ event) => {
  const url = new URL(event.request.url);
  const name = url.href.startsWith(here) ? url.pathname.slice(new URL(here).pathname.length) : null;
  if (name !== null && event.request.method === 'GET' && ['', ...FILES].includes(name))
    event.respondWith(fromCache(name));
});

async function fill() {
  const cache = await caches.open(CACHE);
  await Promise.all(EARLY.map(name => keep(cache, name)));
}

/** @param {Cache} cache @param {string} name */
async function keep(cache, name) {
  const response = await fetch(here + name, { cache: 'no-cache' });
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
  const headers = new Headers(response.headers);
  for (const [key, value] of Object.entries(ISOLATION)) headers.set(key, value);
  await cache.put(here + name, new Response(response.body, { headers }));
}

async function forgetOthers() {
  const names = await caches.keys();
  await Promise.all(
    names.filter(name => name.startsWith('ryot-page-') && name !== CACHE).map(name => caches.delete(name)),
  );
}

/** @param {string} name */
async function fromCache(name) {
  const cache = await caches.open(CACHE);
  if (isLate(name) && !(await cache.match(here + name))) await keep(cache, name).catch(() => {});
  return (await cache.match(here + name)) ?? fetch(here + name);
}
