/**
 * Chromium, led by the lines that come on stdin: one JSON command a line, one JSON answer a line.
 *
 *     node driver.mjs PROFILE_FOLDER CHROMIUM [webgpu]
 *
 * {do: "open", url, width?, height?}  {do: "evaluate", code}  {do: "wait", code, timeout_s?}  {do: "type", text}
 * {do: "offline", on}  {do: "screenshot", path}  {do: "close"}; the answer is {value} or {error}.
 */

import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const require = createRequire(new URL('../../deploy/browser/package.json', import.meta.url));
const { chromium } = require('playwright-core');

const FLAGS = [
  '--no-sandbox',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];
/** WebGPU computed in software: slow, and an implementation of its own of what the graphs need. */
const WEBGPU_FLAGS = [
  '--enable-unsafe-webgpu',
  '--use-webgpu-adapter=swiftshader',
  '--enable-features=Vulkan',
  '--use-vulkan=swiftshader',
  '--disable-vulkan-surface',
];
const [profile, executablePath, webgpu] = process.argv.slice(2);
const context = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  args: [...FLAGS, ...(webgpu ? WEBGPU_FLAGS : ['--disable-gpu'])],
  viewport: { width: 1100, height: 760 },
});
let page = context.pages()[0];
const log = [];

function watch(opened) {
  opened.on('console', message => log.push(message.text()));
  opened.on('pageerror', error => log.push(String(error)));
  return opened;
}
watch(page);

const commands = {
  async open({ url, width, height }) {
    const before = page;
    page = watch(await context.newPage());
    await before.close();
    if (width) await page.setViewportSize({ width, height });
    await page.goto(url);
  },
  evaluate: ({ code }) => page.evaluate(code),
  async wait({ code, timeout_s = 60 }) {
    // Playwright's own way evaluates inside the page, which the page's policy forbids.
    const end = Date.now() + timeout_s * 1e3;
    while (!(await page.evaluate(code))) {
      if (Date.now() > end) throw new Error(`not within ${timeout_s} s`);
      await new Promise(resolve => setTimeout(resolve, 20));
    }
  },
  async type({ text }) {
    await page.fill('#text', text);
    await page.press('#text', 'Enter');
  },
  click: ({ selector }) => page.click(selector),
  offline: ({ on }) => context.setOffline(on),
  screenshot: ({ path }) => page.screenshot({ path }),
  log: () => log.splice(0),
};

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  if (command.do === 'close') break;
  let answer;
  try {
    answer = { value: (await commands[command.do](command)) ?? null };
  } catch (error) {
    answer = { error: error.message, log };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await context.close();
