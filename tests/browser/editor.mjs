// Drives the ComfyUI editor as a user would and prints what happened as one line of JSON.
//
//   node editor.mjs URL CHROMIUM WORKFLOW_FOLDER SCREENSHOT
//
// Loads every workflow file and asks the editor for its API form; then opens clearsr_x4 from the template browser, runs it
// with the Run button, waits for the picture and takes a screenshot.
import fs from 'node:fs';
import path from 'node:path';
import { chromium } from 'playwright-core';

const [url, executablePath, folder, screenshot] = process.argv.slice(2);
const PACK = 'ComfyUI-ClearSR';
const TEMPLATE = 'clearsr_x4';
const READY_MS = 120_000;
const RUN_MS = 300_000;

const browser = await chromium.launch({
  executablePath,
  args: [
    '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync',
  ],
});
const report = { api: {}, pageErrors: [], outcome: null, pictures: {} };
try {
  const page = await browser.newPage({ viewport: { width: 2600, height: 1300 } /* high enough a zoom for text to be drawn */ });
  page.setDefaultTimeout(READY_MS);
  await page.route((target) => !target.href.startsWith(url), (route) => route.abort()); // nothing but this host
  page.on('pageerror', (error) => report.pageErrors.push(String(error)));
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await page.waitForFunction(
    () => window.app?.graph && window.app?.canvas && window.LiteGraph?.registered_node_types?.ClearSRLoader,
  );
  await page.waitForTimeout(1500); // the first, empty workflow is put up a moment later

  // 1. The editor reads each file to the same prompt that the API twin holds.
  for (const file of fs.readdirSync(folder).filter((name) => name.endsWith('.json'))) {
    const workflow = JSON.parse(fs.readFileSync(path.join(folder, file), 'utf8'));
    report.api[path.parse(file).name] = await page.evaluate(async (graph) => {
      await app.loadGraphData(graph, true, true);
      return (await app.graphToPrompt()).output;
    }, workflow);
  }

  // 2. The template browser offers the pack's workflow; a click opens it.
  await page.evaluate(async () => app.loadGraphData({ nodes: [], links: [], version: 0.4, last_node_id: 0, last_link_id: 0 }));
  await page.getByRole('button', { name: 'Templates', exact: true }).first().click();
  const dialog = page.getByRole('dialog').filter({ hasText: 'All Templates' });
  await dialog.getByText(PACK, { exact: true }).first().click();
  await dialog.getByTestId(`template-workflow-${TEMPLATE}`).click();
  await page.waitForFunction(() => app.graph._nodes.some((node) => node.type === 'ClearSRLSAKSampler'));
  await dialog.waitFor({ state: 'hidden' });

  // 3. Run, with few steps: the test is about the editor.
  await page.evaluate(() => {
    const sampler = app.graph._nodes.find((node) => node.type === 'ClearSRLSAKSampler');
    sampler.widgets.find((widget) => widget.name === 'steps').value = 3;
    const api = window.comfyAPI?.api?.api ?? app.api;
    window.finished = new Promise((resolve) => {
      for (const kind of ['execution_success', 'execution_error', 'execution_interrupted']) {
        api.addEventListener(kind, (event) => resolve([kind, event.detail?.exception_message ?? null]));
      }
    });
  });
  const newer = page.getByTestId('queue-button');
  const run = (await newer.count()) ? newer : page.getByRole('button', { name: 'Run', exact: true });
  await run.first().click();
  report.outcome = await page.evaluate(
    (limit) => Promise.race([window.finished, new Promise((resolve) => setTimeout(() => resolve(['timeout']), limit))]),
    RUN_MS,
  );

  // 4. The nodes show their pictures.
  const shown = () => app.graph._nodes.filter((node) => ['SaveImage', 'PreviewImage'].includes(node.type));
  if (report.outcome[0] === 'execution_success') {
    await page.waitForFunction(
      `(${shown})().every((node) => node.imgs?.length && node.imgs[0].complete && node.imgs[0].naturalWidth)`,
      null,
      { timeout: 20_000 },
    );
    report.pictures = await page.evaluate(
      `Object.fromEntries((${shown})().map((node) => [node.type, [node.imgs[0].naturalWidth, node.imgs[0].naturalHeight]]))`,
    );
  }
  await page.getByRole('button', { name: /^Fit View/ }).first().click();
  await page.waitForTimeout(1500);
  await page.screenshot({ path: screenshot });
} catch (error) {
  report.failure = String(error).split('\n').slice(0, 6).join('\n');
} finally {
  await browser.close();
  console.log(JSON.stringify(report));
}
