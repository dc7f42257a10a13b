// One engine, one visit: the worker measures, this page holds what it found.
const worker = new Worker('bench_worker.js', { type: 'module' });
worker.onmessage = ({ data }) => {
  globalThis.result = data;
};
worker.onerror = event => {
  globalThis.result = { error: event.message };
};
worker.postMessage({ ...Object.fromEntries(new URLSearchParams(location.search)), navigated: performance.timeOrigin });
