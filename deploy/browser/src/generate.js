/** Text from an engine, a piece at a time. */

import { ContextError } from './engine.js';
import { Sampler } from './sampling.js';

/** @typedef {import('./engine.js').Engine | import('./gpu-engine.js').GpuEngine} Engine */
/** @typedef {import('./tokenizer.js').Tokenizer} Tokenizer */
/**
 * `eos`: the model ended the text; `length`: as many tokens as asked for, or as fit; `stopped`: the reader had enough.
 */
/** @typedef {'eos' | 'length' | 'stopped'} FinishReason */
/**
 * @typedef {{tokens: number[], finishReason: FinishReason, sharedTokens: number, prefillMs: number, decodeMs: number}}
 *   Completion
 */

/** A page must be able to say stop, so the worker looks at its messages this often. */
const PAUSE_EVERY_MS = 16;

/**
 * Continue `ids`; `onText` gets each piece of text. What the engine holds of them already is not computed again.
 * @param {Engine} engine @param {Tokenizer} tokenizer @param {number[]} ids
 * @param {object} options
 * @param {import('./sampling.js').SamplingParams} options.sampling
 * @param {number} [options.maxNewTokens]  as many as the context has room for where not given
 * @param {boolean} [options.continues]  whether the text goes on with the prompt, as opposed to an answer
 * @param {(text: string) => void} options.onText
 * @param {AbortSignal} [options.signal]
 * @returns {Promise<Completion>}
 */
export async function generate(engine, tokenizer, ids, { sampling, maxNewTokens, continues = false, onText, signal }) {
  const room = engine.maxLen - ids.length;
  if (room < 1)
    throw new ContextError(`a prompt of ${ids.length} tokens leaves no room in a context of ${engine.maxLen}`);
  const count = Math.min(maxNewTokens ?? room, room);
  const sampler = new Sampler(sampling, ids);
  const stream = tokenizer.stream(continues ? ids : []);
  const eos = new Set(engine.manifest.eos_token_ids);
  /** @type {number[]} */
  const tokens = [];
  const began = performance.now();
  engine.readsLogits = !sampler.greedy;
  const sharedTokens = await engine.prefillShared(ids);
  const prefilled = performance.now();
  /** @type {FinishReason} */
  let finishReason = 'length';
  for (let paused = prefilled; ;) {
    if (!sampler.greedy) engine.nextToken = sampler.choose(engine.logits);
    const token = engine.nextToken;
    tokens.push(token);
    if (eos.has(token)) {
      finishReason = 'eos';
      break;
    }
    const text = stream.push(token);
    if (text) onText(text);
    if (tokens.length >= count) break;
    if (tokens.length === 1 || performance.now() - paused > PAUSE_EVERY_MS) {
      await nextTask();
      if (signal?.aborted) {
        finishReason = 'stopped';
        break;
      }
      paused = performance.now();
    }
    await engine.step();
  }
  const rest = stream.finish();
  if (rest) onText(rest);
  const decodeMs = performance.now() - prefilled;
  return { tokens, finishReason, sharedTokens, prefillMs: prefilled - began, decodeMs };
}

/** Let messages that wait be handled; a timer would wait 4 ms. @returns {Promise<void>} */
function nextTask() {
  return new Promise(resolve => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
