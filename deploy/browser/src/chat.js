/** A conversation: the checkpoint's chat template, and as many of the messages so far as the context holds. */

import { Template } from '@huggingface/jinja';
import { ContextError } from './engine.js';

/** @typedef {{role: string, content: string}} Message */
/** @typedef {import('./bundle.js').Bundle} Bundle */
/** @typedef {import('./tokenizer.js').Tokenizer} Tokenizer */

/** Room that an answer gets at least, a quarter of a small context; older messages are forgotten for it. */
const MIN_ANSWER_TOKENS = 64;

/** A checkpoint's template, which turns messages into the text that the model was trained to answer. */
export class ChatTemplate {
  /** @param {string} source @param {Record<string, string>} tokens  special tokens by name */
  constructor(source, tokens) {
    this.template = new Template(source);
    this.tokens = tokens;
  }

  /** The text of a conversation up to where the answer begins. @param {Message[]} messages */
  render(messages) {
    try {
      return this.template.render({
        ...this.tokens,
        messages,
        add_generation_prompt: true,
        tools: null,
        documents: null,
      });
    } catch (error) {
      throw new Error(`the chat template refuses these messages: ${error.message}`);
    }
  }
}

/**
 * The template of a bundle, null where it has none. Files of their own come before tokenizer_config.json.
 * @param {Bundle} bundle @param {Record<string, any>} config  tokenizer_config.json
 * @param {Record<string, string>} tokens  special tokens by name
 */
export async function loadChatTemplate(bundle, config, tokens) {
  let value = config.chat_template;
  if (bundle.has('chat_template.jinja')) value = await bundle.readText('chat_template.jinja');
  else if (!value && bundle.has('chat_template.json')) {
    value = JSON.parse(await bundle.readText('chat_template.json')).chat_template;
  }
  if (Array.isArray(value)) value = value.find(entry => entry.name === 'default')?.template;
  else if (value && typeof value === 'object') value = value.default;
  return typeof value === 'string' ? new ChatTemplate(value, tokens) : null;
}

/**
 * The ids of a conversation; its oldest turns are forgotten where the context cannot hold all and an answer.
 * @param {ChatTemplate} template @param {Tokenizer} tokenizer @param {Message[]} messages @param {number} context
 * @returns {{ids: number[], forgotten: number}}
 */
export function encodeConversation(template, tokenizer, messages, context) {
  const system = messages[0]?.role === 'system' ? [messages[0]] : [];
  const room = Math.min(MIN_ANSWER_TOKENS, Math.max(1, Math.floor(context / 4)));
  for (let forgotten = 0; ; forgotten += 2) {
    const kept = messages.slice(system.length + forgotten);
    // The template has written bos itself where the model wants it.
    const ids = tokenizer.encode(template.render([...system, ...kept]), { addSpecialTokens: false });
    if (ids.length + room <= context) return { ids, forgotten };
    if (kept.length < 3) {
      throw new ContextError(
        `a message of ${ids.length} tokens, template included, and ${room} for its answer do not fit the context of ` +
          `${context} tokens; shorten the message`,
      );
    }
  }
}
