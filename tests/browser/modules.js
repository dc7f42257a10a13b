// What tests call of the page, one by one.
export { ChatTemplate } from '../../deploy/browser/src/chat.js';
export { centerEmbeddings, expandMatrices } from '../../deploy/browser/src/expand.js';
export { chooseToken } from '../../deploy/browser/src/sampling.js';
export { Tokenizer } from '../../deploy/browser/src/tokenizer.js';
