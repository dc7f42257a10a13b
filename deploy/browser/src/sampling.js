/**
 * Choosing the next token from logits, in the order of transformers' `generate`: repetition penalty, temperature, then
 * top-k, top-p and min-p, each of which keeps a head of the tokens sorted by probability (equal ones: lower id first).
 */

/**
 * @typedef {object} SamplingParams
 * @property {number} temperature  logits are divided by it; 0 takes the best token
 * @property {number} topK  keep the k best tokens; 0 keeps all
 * @property {number} topP  keep the fewest best tokens whose probabilities add up to this; 1 keeps all
 * @property {number} minP  keep tokens of at least this share of the best one's probability; 0 keeps all
 * @property {number} repetitionPenalty  makes tokens that were seen less likely; 1 is none
 * @property {number} seed
 */

/** @type {SamplingParams} */
export const GREEDY = { temperature: 0, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1, seed: 0 };

/** Tokens that are sorted first; a trained model's draw nearly always falls among them. */
const HEAD = 128;

/** A smaller temperature is 0 in single precision, and a logit beyond the largest number is none. */
const SMALLEST_TEMPERATURE = 2 ** -126;
const LARGEST_LOGIT = (2 - 2 ** -23) * 2 ** 127;

/** Throw for a value that makes no sense. @param {SamplingParams} params */
export function checkParams(params) {
  /** @type {[string, number, boolean, string][]} */
  const rules = [
    ['temperature', params.temperature, params.temperature >= 0, 'a number not below 0'],
    ['topK', params.topK, Number.isInteger(params.topK) && params.topK >= 0, 'a whole number not below 0'],
    ['topP', params.topP, params.topP > 0 && params.topP <= 1, 'a number above 0, at most 1'],
    ['minP', params.minP, params.minP >= 0 && params.minP <= 1, 'a number from 0 to 1'],
    ['repetitionPenalty', params.repetitionPenalty, params.repetitionPenalty > 0, 'a number above 0'],
  ];
  const broken = rules.find(([, , holds]) => !holds);
  if (broken) throw new RangeError(`${broken[0]}: got ${broken[1]}, expected ${broken[3]}`);
}

/** Draws the tokens of one text. */
export class Sampler {
  /** @param {SamplingParams} params @param {number[]} promptIds */
  constructor(params, promptIds) {
    checkParams(params);
    this.params = params;
    this.seen = new Set(promptIds);
    this.random = randomStream(params.seed);
  }

  /** Whether the graph's own ArgMax gives the token. */
  get greedy() {
    return this.params.temperature === 0 && this.params.repetitionPenalty === 1;
  }

  /** The next token; it counts as seen from now on. @param {Float32Array} logits */
  choose(logits) {
    const { repetitionPenalty: penalty } = this.params;
    if (penalty !== 1) {
      logits = logits.slice();
      for (const id of this.seen) {
        const changed = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
        logits[id] = Math.min(Math.max(changed, -LARGEST_LOGIT), LARGEST_LOGIT);
      }
    }
    const token = chooseToken(logits, this.params, this.params.temperature === 0 ? 0 : this.random());
    this.seen.add(token);
    return token;
  }
}

/**
 * The id at the point `uniform`, from 0 to below 1, of the cut distribution.
 * @param {Float32Array} logits @param {SamplingParams} params @param {number} uniform
 */
export function chooseToken(logits, { temperature, topK, topP, minP }, uniform) {
  let max = -Infinity,
    best = 0;
  for (let id = 0; id < logits.length; id++) {
    if (logits[id] > max) {
      max = logits[id];
      best = id;
    }
  }
  if (temperature === 0) return best;
  if (!Number.isFinite(max)) throw new Error("the model's logits are not numbers; its weights are damaged");
  if (!topK && topP >= 1 && minP === 0) return drawUncut(logits, max, temperature, uniform);
  const weights = Float64Array.from(logits, logit => Math.exp((logit - max) / temperature));
  const total = topK ? 0 : weights.reduce((sum, weight) => sum + weight, 0);
  for (let head = topK || HEAD; ; head = logits.length) {
    const order = bestIds(logits, Math.min(head, logits.length));
    const mass = topK ? order.reduce((sum, id) => sum + weights[id], 0) : total;
    const chosen = chooseFrom(
      order,
      weights,
      mass,
      { topP, minP },
      uniform,
      topK > 0 || order.length === logits.length,
    );
    if (chosen !== undefined) return chosen;
  }
}

/**
 * Where nothing is cut there is nothing to sort: ids in their order, weights in single precision, sums in double.
 * @param {Float32Array} logits @param {number} max  the largest of them @param {number} temperature
 * @param {number} uniform
 */
function drawUncut(logits, max, temperature, uniform) {
  const divisor = Math.max(Math.fround(temperature), SMALLEST_TEMPERATURE);
  let sum = 0;
  const sums = Float64Array.from(
    logits,
    logit => (sum += Math.fround(Math.exp(Math.fround(Math.fround(logit - max) / divisor)))),
  );
  const chosen = sums.findIndex(reached => reached > uniform * sum);
  return chosen < 0 ? logits.length - 1 : chosen;
}

/**
 * The choice among the tokens `order`, best first; undefined where tokens behind them matter and these are not `all`.
 * @param {number[]} order @param {Float64Array} weights @param {number} mass  the sum of all weights that top-k leaves
 * @param {{topP: number, minP: number}} cuts @param {number} uniform @param {boolean} all
 */
function chooseFrom(order, weights, mass, { topP, minP }, uniform, all) {
  let keep = order.length,
    cut = all,
    sum = 0;
  for (let i = 0; i < order.length; i++) {
    const share = weights[order[i]] / mass;
    // A token is kept while those before it add up to less than topP.
    if ((topP < 1 && sum >= topP) || share < minP * (weights[order[0]] / mass)) {
      keep = Math.max(i, 1);
      cut = true;
      break;
    }
    sum += share;
  }
  if (!cut) return undefined;
  const point = uniform * (keep < order.length ? sum : 1);
  let passed = 0;
  for (let i = 0; i < keep; i++) {
    passed += weights[order[i]] / mass;
    if (point < passed) return order[i];
  }
  return order[keep - 1];
}

/** The ids of the k best logits, best first; equal ones by lower id. @param {Float32Array} logits @param {number} k */
function bestIds(logits, k) {
  if (k >= logits.length) {
    return Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  }
  // The k-th best so far is at the root, and most logits are below it.
  /** @type {number[]} */
  const heap = [];
  const worse = (/** @type {number} */ a, /** @type {number} */ b) =>
    logits[a] < logits[b] || (logits[a] === logits[b] && a > b);
  const sink = () => {
    for (let at = 0; ;) {
      let least = at;
      for (const child of [2 * at + 1, 2 * at + 2]) {
        if (child < heap.length && worse(heap[child], heap[least])) least = child;
      }
      if (least === at) return;
      [heap[at], heap[least]] = [heap[least], heap[at]];
      at = least;
    }
  };
  for (let id = 0; id < logits.length; id++) {
    if (heap.length < k) {
      heap.push(id);
      for (let at = heap.length - 1; at;) {
        const parent = (at - 1) >> 1;
        if (!worse(heap[at], heap[parent])) break;
        [heap[at], heap[parent]] = [heap[parent], heap[at]];
        at = parent;
      }
    } else if (worse(heap[0], id)) {
      heap[0] = id;
      sink();
    }
  }
  return heap.sort((a, b) => logits[b] - logits[a] || a - b);
}

/** Numbers from 0 to below 1, the same ones for a seed (Steele and Vigna's splitmix32). @param {number} seed */
function randomStream(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let mixed = state ^ (state >>> 16);
    mixed = Math.imul(mixed, 0x21f0aaad);
    mixed ^= mixed >>> 15;
    mixed = Math.imul(mixed, 0x735a2d97);
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32;
  };
}
