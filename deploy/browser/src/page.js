/** The page itself: what is shown and typed. Everything about the model is in worker.js. */

/** @typedef {Record<string, any>} Told */

// The largest part of a start is the runtime's code, so it is fetched and compiled while the worker itself starts.
const compiled = WebAssembly.compileStreaming(fetch('vendor/ort-wasm-simd-threaded.wasm')).catch(() => undefined);
const worker = new Worker('worker.js');
const options = new URLSearchParams(location.search);

const $ = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));
const megabytes = (/** @type {number} */ bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const milliseconds = (/** @type {number} */ ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

/** What `ready` said of the model. @type {Told | null} */
let model = null;
/** @type {{role: string, content: string}[]} */
let messages = [];
/**
 * The answer that is being written.
 * @type {{element: HTMLElement, text: string, asked: number, first: number} | null}
 */
let answer = null;

worker.onmessage = (/** @type {MessageEvent<Told>} */ { data }) => handlers[data.type](data);
worker.onerror = (/** @type {ErrorEvent} */ event) =>
  showError(`the page's worker cannot start: ${event.message || 'see the browser’s console'}`);
worker.postMessage({
  type: 'load',
  bundle: new URL(options.get('bundle') ?? 'bundle/', location.href).href,
  threads: Number(options.get('threads') ?? 0),
  device: options.get('device') ?? undefined,
});
compiled.then(module => {
  performance.mark('ryot-compiled');
  worker.postMessage({ type: 'code', module });
});
navigator.serviceWorker?.register('sw.js').catch(() => {}); // without one there is no offline use

/** @type {Record<string, (event: Told) => void>} */
const handlers = {
  progress({ loaded, total }) {
    $('progress').value = loaded / total;
    $('status').textContent =
      loaded < total ? `Loading ${megabytes(loaded)} of ${megabytes(total)}` : 'Making the model ready…';
  },

  ready(event) {
    model = event;
    performance.mark('ryot-ready', { detail: event });
    document.title = $('name').textContent = event.name;
    $('about').textContent =
      `${(event.parameters / 1e6).toFixed(1)} M parameters · ${event.precision} · runs on this device`;
    $('progress').hidden = true;
    $('status').textContent = event.chat
      ? 'Ready. Ask something.'
      : 'Ready. Begin a text, and the model goes on with it.';
    $('text').placeholder = event.chat ? 'Message' : 'Beginning of a text';
    $('text').disabled = $('send').disabled = false;
    $('system-label').hidden = !event.chat;
    $('clear').textContent = event.chat ? 'New chat' : 'Clear';
    $('tokens').max = event.context;
    showFacts();
    showMemory(event.memoryBytes);
    const prompt = options.get('prompt');
    if (prompt !== null) ask(prompt);
    else $('text').focus();
  },

  text({ text }) {
    if (!answer) return;
    if (!answer.first) {
      answer.first = performance.now();
      performance.mark('ryot-first-token');
    }
    answer.text += text;
    answer.element.append(text);
    follow();
  },

  done(event) {
    if (!answer) return;
    const { asked, first, text } = answer;
    if (model?.chat) messages.push({ role: 'assistant', content: text });
    const figures = [`${event.tokens.length} tokens`];
    if (first) figures.push(`first after ${milliseconds(first - asked)}`);
    if (event.tokensPerS) figures.push(`${event.tokensPerS.toFixed(event.tokensPerS < 100 ? 1 : 0)} tok/s`);
    figures.push(`prompt of ${event.promptTokens}${event.sharedTokens ? `, ${event.sharedTokens} of them kept` : ''}`);
    if (event.finishReason === 'length') figures.push('ended by its length');
    if (event.forgotten) figures.push(`${event.forgotten} messages forgotten`);
    show('measured', figures.join(' · '));
    showMemory(event.memoryBytes);
    lastDone = event;
    finish();
  },

  verified({ compared, files }) {
    $('verdict').textContent =
      `${files} files as in the manifest, ` +
      (compared ? `${compared} golden tokens equal` : 'no golden tokens in the bundle');
    $('verify').disabled = false;
  },

  error({ message, during }) {
    if (during === 'verify') {
      $('verdict').textContent = message;
      $('verify').disabled = false;
    } else {
      if (answer && !answer.text) answer.element.remove();
      if (messages.at(-1)?.role === 'user') messages.pop();
      showError(message);
      finish();
    }
  },
};

/** For tests and benchmarks: the figures of the last answer. @type {Told | null} */
let lastDone = null;
Object.defineProperty(globalThis, 'ryot', {
  value: {
    get model() {
      return model;
    },
    get last() {
      return lastDone;
    },
  },
});

/** @param {string} content */
function ask(content) {
  $('welcome').hidden = true;
  $('clear').hidden = false;
  const sampling = {
    temperature: Number($('temperature').value),
    topP: Number($('top-p').value),
    seed: Date.now() % 2 ** 32,
  };
  const request = { type: 'generate', sampling, maxNewTokens: Number($('tokens').value) };
  const asked = performance.now();
  lastDone = null;
  if (model?.chat) {
    messages.push({ role: 'user', content });
    show('message user', content);
    const system = $('system').value.trim();
    worker.postMessage({
      ...request,
      messages: [...(system ? [{ role: 'system', content: system }] : []), ...messages],
    });
    answer = { element: show('message assistant', ''), text: '', asked, first: 0 };
  } else {
    worker.postMessage({ ...request, prompt: content });
    const element = show('message completion', '');
    const beginning = document.createElement('b');
    beginning.textContent = content;
    element.append(beginning);
    answer = { element, text: '', asked, first: 0 };
  }
  $('send').textContent = 'Stop';
  $('text').required = false;
}

function finish() {
  answer = null;
  $('send').textContent = 'Send';
  $('text').required = true;
}

/** @param {string} kind @param {string} text */
function show(kind, text) {
  const element = document.createElement('div');
  element.className = kind;
  element.textContent = text;
  $('talk').append(element);
  $('talk').scrollTop = $('talk').scrollHeight;
  return element;
}

/** @param {string} message */
function showError(message) {
  $('progress').hidden = true;
  $('status').textContent = model ? '' : 'The model is not used.';
  show('message error', message).setAttribute('role', 'alert');
}

/** Scroll along, unless the reader has scrolled up. */
function follow() {
  const talk = $('talk');
  if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80) talk.scrollTop = talk.scrollHeight;
}

function showFacts() {
  if (!model) return;
  const isolated = self.crossOriginIsolated;
  const threads = `${model.threads} thread${model.threads > 1 ? 's' : ''}`;
  const fetched = model.fetchedBytes ? `${megabytes(model.fetchedBytes)} fetched` : 'nothing fetched';
  const facts = {
    Model: `${model.name}, ${model.precision}, context ${model.context}`,
    Files: `${model.files}, ${megabytes(model.sizeBytes)}, each as its sha256 in the manifest`,
    Loaded: `in ${milliseconds(model.loadMs)}, ${fetched}`,
    Computed:
      model.device === 'WebGPU'
        ? 'by WebGPU'
        : `by WebAssembly, ${threads}${isolated ? '' : ' (not cross-origin isolated)'}`,
    ...(model.gpuProblem && { Note: model.gpuProblem }),
  };
  $('facts').replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => {
      const term = document.createElement('dt'),
        detail = document.createElement('dd');
      term.textContent = name;
      detail.textContent = value;
      return [term, detail];
    }),
  );
}

/** @param {number} bytes */
function showMemory(bytes) {
  const parts = [
    `${model?.device === 'WebGPU' ? 'Keys and values' : 'Runtime memory'} ${megabytes(bytes)}`,
    navigator.onLine ? 'Nothing that is typed here leaves this device.' : 'Offline',
  ];
  $('figures').replaceChildren(
    ...parts.map(text => Object.assign(document.createElement('span'), { textContent: text })),
  );
}

$('form').addEventListener('submit', (/** @type {SubmitEvent} */ event) => {
  event.preventDefault();
  if (answer) {
    worker.postMessage({ type: 'stop' });
    return;
  }
  const content = $('text').value;
  if (!content.trim() || !model) return;
  $('text').value = '';
  ask(content);
});
$('text').addEventListener('keydown', (/** @type {KeyboardEvent} */ event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing && !answer) {
    event.preventDefault();
    $('form').requestSubmit();
  }
});
$('settings').addEventListener('click', () => {
  $('panel').hidden = !$('panel').hidden;
  $('settings').setAttribute('aria-expanded', String(!$('panel').hidden));
});
$('verify').addEventListener('click', () => {
  $('verify').disabled = true;
  $('verdict').textContent = 'Comparing…';
  worker.postMessage({ type: 'verify' });
});
$('clear').addEventListener('click', () => {
  if (answer) worker.postMessage({ type: 'stop' });
  messages = [];
  for (const element of [...$('talk').children]) if (element.id !== 'welcome') element.remove();
  $('welcome').hidden = false;
  $('clear').hidden = true;
  $('text').focus();
});
