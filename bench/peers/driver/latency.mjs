// Latency: from a change to the consumer, at a steady rate.
// Promise: an open loop. Changes are due by the clock, however slow the answers are; a contestant that cannot keep up is asked for less.

import { once } from "node:events";
import http from "node:http";
import { setTimeout as sleep } from "node:timers/promises";
import { Worker } from "node:worker_threads";
import pg from "pg";

const WARM_UP_S = 2;
const CONNECTIONS = 32;
const FIRST_ARRIVAL_MS = 60_000;
// What has not been written and told so long after the last change was due is behind, not late.
const CATCH_UP_MS = 2_000;
// A median beyond this is a queue that does not get shorter: the latency is of the queue, not of the contestant.
const BEHIND_MS = 250;
const LEAST_RATE = 50;

// More than this share untold means that a contestant does not keep up. What stays untold counts as later than anything.
const UNTOLD_SHARE = 0.01;
// The latencies at `rate`, or at the half, the quarter, .. when it cannot be kept; at a rate of 0 when none can.
export async function latency(house, queueType, rate, seconds) {
  for (; rate >= LEAST_RATE; rate /= 2) {
    const figures = await atRate(house, queueType, rate, seconds);
    if (figures && figures.commit.p50_ms < BEHIND_MS) return { rate, ...figures };
  }
  return { rate: 0 };
}

async function atRate(house, queueType, rate, seconds) {
  await house.begin(queueType, 0);
  const consumer = new Consumer(house.queue);
  const writer = house.contestant.isService ? new Api(house) : new Sql(house);
  try {
    await house.start();
    await consumer.ready;
    await writer.open();
    await writer.change(1);
    if (!(await consumer.hears(1, FIRST_ARRIVAL_MS))) throw new Error(`${house.contestant.name} tells nothing, see ${house.contestant.log}`);
    const due = await steadily(writer, rate, WARM_UP_S + seconds);
    await consumer.hears(due.size + 1, due.get(due.size + 1) + CATCH_UP_MS - now());
    house.checkAlive();
    return figures(await consumer.arrivals(), due, rate * WARM_UP_S);
  } finally {
    await writer.close();
    await consumer.close();
    await house.end();
  }
}

// Changes 2, 3, .., each at its time; when each was due.
async function steadily(writer, rate, seconds) {
  const due = new Map();
  const underWay = [];
  const began = now();
  for (let n = 0; n < rate * seconds; ) {
    for (; n < rate * seconds && began + (n * 1000) / rate <= now(); n++) {
      due.set(n + 2, began + (n * 1000) / rate);
      underWay.push(writer.change(n + 2));
    }
    await sleep(1);
  }
  await Promise.all(underWay);
  return due;
}

// Of what was due after the warming up; nothing when too much of it stayed untold.
function figures(arrivals, due, warmUp) {
  const first = new Map();
  for (const arrival of arrivals) if (arrival.user > warmUp + 1 && !first.has(arrival.user)) first.set(arrival.user, arrival);
  const untold = due.size - warmUp - first.size;
  if (untold > UNTOLD_SHARE * due.size) return null;
  const late = Array(untold).fill(Infinity);
  const sinceCommit = [...first.values()].map(({ at, committed }) => at - committed);
  const sinceDue = [...first.values()].map(({ at, user }) => at - due.get(user));
  return { untold, commit: quantiles([...sinceCommit, ...late]), due: quantiles([...sinceDue, ...late]) };
}

function quantiles(values) {
  const sorted = values.sort((a, b) => a - b);
  return { p50_ms: quantile(sorted, 0.5), p99_ms: quantile(sorted, 0.99), max_ms: sorted.at(-1) };
}

const quantile = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];

const now = () => performance.timeOrigin + performance.now();

// In a thread of its own, so that what the writer does delays no arrival.
class Consumer {
  constructor(queue) {
    this.worker = new Worker(new URL("consumer.mjs", import.meta.url), { workerData: { queue } });
    this.ready = once(this.worker, "message");
  }

  close = () => this.worker.terminate();

  async arrivals() {
    this.worker.postMessage("arrivals");
    return (await once(this.worker, "message"))[0];
  }

  async hears(count, patienceMs) {
    for (const deadline = now() + patienceMs; now() < deadline; await sleep(20)) {
      this.worker.postMessage("count");
      if ((await once(this.worker, "message"))[0] >= count) return true;
    }
    return false;
  }
}

// A peer's change: one row, in a transaction of its own.
class Sql {
  constructor(house) {
    this.pool = new pg.Pool({ connectionString: house.url, max: CONNECTIONS, min: CONNECTIONS });
    this.statement = { name: "change", text: house.rows };
  }

  open = () => Promise.all(Array.from({ length: CONNECTIONS }, () => this.pool.query("select pg_sleep(0.1)")));
  change = (n) => this.pool.query({ ...this.statement, values: [n, 1] });
  close = () => this.pool.end();
}

// Our change: a request to amend a user.
class Api {
  constructor(house) {
    this.house = house;
    this.agent = new http.Agent({ keepAlive: true, maxSockets: CONNECTIONS });
    this.run = Date.now(); // so that each run finds another value to change
  }

  async open() {
    const [host, port] = this.house.address.split(":");
    const headers = { authorization: `Bearer ${this.house.key}`, "content-type": "application/merge-patch+json" };
    this.options = { host, port, agent: this.agent, method: "PATCH", headers };
  }

  async change(n) {
    const path = `/v1/users/00000000-0000-4000-8000-${n.toString(16).padStart(12, "0")}`;
    const request = http.request({ ...this.options, path });
    request.end(`{"profile":{"job_title":"Editor ${this.run}"}}`);
    const [answer] = await once(request, "response");
    answer.resume();
    await once(answer, "end");
    if (answer.statusCode !== 200) throw new Error(`a change was answered ${answer.statusCode}`);
  }

  close = async () => this.agent.destroy();
}
