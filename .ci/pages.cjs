// Looks at /docs in a real browser: every operation is shown, nothing is asked of another host, no error is on the console.
// Use: node pages.cjs URL [PICTURE]; the browser is Debian's.
const { chromium } = require('playwright-core');

const BROWSER = '/usr/bin/chromium';
const PATIENCE_MS = 60_000;

async function main(url, picture) {
  const browser = await chromium.launch({ executablePath: BROWSER, args: ['--no-sandbox', '--disable-gpu'] });
  try {
    const page = await browser.newPage({ viewport: { width: 1280, height: 1600 } });
    const asked = [], complaints = [];
    page.on('request', (request) => asked.push(request.url()));
    page.on('console', (message) => message.type() === 'error' && complaints.push(message.text()));
    page.on('pageerror', (error) => complaints.push(String(error)));
    await page.goto(`${url}/docs`, { timeout: PATIENCE_MS });
    await page.waitForSelector('.opblock', { timeout: PATIENCE_MS });

    const wanted = (await (await fetch(`${url}/openapi.yaml`)).text()).match(/^ +operationId: .*/gm).length;
    const shown = await page.locator('.opblock').count();
    if (shown !== wanted) throw new Error(`${shown} operations are shown, and there are ${wanted}`);
    await page.locator('#operations-users-amendUser button').first().click();
    await page.getByText('version_mismatch').first().waitFor({ timeout: PATIENCE_MS });
    if (picture) await page.screenshot({ path: picture });

    const elsewhere = asked.filter((one) => !one.startsWith(`${url}/`) && !one.startsWith('data:'));
    if (elsewhere.length > 0) throw new Error(`asked of others: ${elsewhere.join(' ')}`);
    if (complaints.length > 0) throw new Error(`complaints: ${complaints.join('\n')}`);
    console.log(`${shown} operations are shown; ${asked.length} requests, all of them to ${url}`);
  } finally {
    await browser.close();
  }
}

main(process.argv[2], process.argv[3]).catch((error) => {
  console.error(String(error));
  process.exit(1);
});
