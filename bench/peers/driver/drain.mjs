// Drain: how fast a backlog gets from the table into the queue.
// Promise: the clock runs from the first message in the queue, so that nobody is measured for how long it takes to start, until every
// message is in the queue and no row is pending.

import { setTimeout as sleep } from "node:timers/promises";

const LOOK_MS = 10;
const PATIENCE_MS = 300_000;

// Messages per second, and the relay's own CPU per message, which says something even on a machine that others use.
export async function drain(house, queueType, backlog) {
  await house.begin(queueType, backlog);
  try {
    await house.start();
    const begun = await until(house, (count) => count > 0);
    const told = await until(house, (count) => count >= backlog);
    while (await house.isPending()) await sleep(LOOK_MS);
    const seconds = (performance.now() - begun.at) / 1000;
    const cpuSeconds = (await house.cpuSeconds()) - begun.cpuSeconds;
    await house.inspect();
    const counted = backlog - begun.count;
    return { rate: counted / seconds, seconds, twice: told.count - backlog, cpu_us: (cpuSeconds * 1e6) / counted };
  } finally {
    await house.end();
  }
}

async function until(house, enough) {
  const deadline = performance.now() + PATIENCE_MS;
  for (;;) {
    const count = await house.waiting();
    const at = performance.now();
    if (enough(count)) return { count, at, cpuSeconds: await house.cpuSeconds() };
    if (at > deadline) throw new Error(`${house.contestant.name} has told ${count} of its backlog in ${PATIENCE_MS / 1000} s`);
    house.checkAlive();
    await sleep(LOOK_MS);
  }
}
