// House: a contestant's database, its queue and its processes.
// Promise: every turn begins with an empty table, an empty queue and a checkpoint behind it, and leaves no process and no queue.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, open, readFile } from "node:fs/promises";
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import amqp from "amqplib";
import pg from "pg";
import { rowsOf } from "./contestants.mjs";

const { DATABASE_URL, AMQP_URL } = process.env;
const KEY = "profile.updated";
const STOP_MS = 15_000;
const TICKS_PER_S = 100; // of Linux, whatever the kernel's own
const USERS = 20_000;
const PROFILE = `{"first_name":"Ana","last_name":"Example","email":"ana@example.org","phone":"+49 30 1234567","job_title":"Author","company":"Example Ltd","city":"Example","country":"DE","language":"de"}`;

export class House {
  constructor(contestant) {
    this.contestant = contestant;
    this.queue = contestant.exchange;
    this.url = Object.assign(new URL(DATABASE_URL), { pathname: `/${contestant.database}` }).href;
    this.children = [];
  }

  // A new database with the contestant's own schema.
  async build() {
    const { database, isService } = this.contestant;
    await onServer(`drop database if exists ${database} with (force)`);
    await onServer(`create database ${database}`);
    await this.run(this.contestant.setup);
    this.db = new pg.Client({ connectionString: this.url });
    this.db.on("error", () => {});
    await this.db.connect();
    this.rows = await rowsOf(this.contestant);
    if (isService) await this.admit();
  }

  async tearDown() {
    await this.db?.end();
    await onServer(`drop database if exists ${this.contestant.database} with (force)`);
  }

  // Users to amend, and a key to do so.
  async admit() {
    this.key = (await this.run([this.contestant.command[0], "client", "create", "peers", "--scope", "admin"])).trim();
    await this.db.query(
      `insert into users (id, version, profile, created_at, updated_at)
       select ('00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 1, '${PROFILE}', now(), now()
         from generate_series(1, ${USERS}::bigint) as n`,
    );
    await this.db.query("vacuum analyze users");
  }

  // An empty table and a queue of this type; `backlog` rows pending.
  async begin(queueType, backlog) {
    const { arm, exchange } = this.contestant;
    await this.db.query("truncate outbox");
    if (arm) await this.db.query(arm);
    if (backlog > 0) await this.db.query(this.rows, [1, backlog]);
    await this.db.query("vacuum analyze outbox");
    await this.db.query("checkpoint");
    this.broker = await amqp.connect(AMQP_URL);
    this.channel = await this.broker.createChannel();
    await this.channel.assertExchange(exchange, "topic", { durable: true });
    await this.channel.deleteQueue(this.queue);
    await this.channel.assertQueue(this.queue, { durable: true, arguments: { "x-queue-type": queueType } });
    await this.channel.bindQueue(this.queue, exchange, KEY);
  }

  async end() {
    await this.stop();
    await this.disarm();
    await this.channel.deleteQueue(this.queue);
    await this.channel.deleteExchange(this.contestant.exchange);
    await this.broker.close();
  }

  // The server notices only after a while that a reader is gone.
  async disarm() {
    const { disarm } = this.contestant;
    for (const deadline = Date.now() + STOP_MS; disarm; await sleep(100)) {
      const failed = await this.db.query(disarm).then(() => null, (error) => error);
      if (!failed) return;
      if (Date.now() > deadline) throw failed;
    }
  }

  async start() {
    for (let n = 0; n < this.contestant.processes; n++) this.children.push(await this.launch());
    if (this.contestant.isService) this.address = await addressOf(this.children[0]);
  }

  async launch() {
    await mkdir(dirname(this.contestant.log), { recursive: true });
    const log = await open(this.contestant.log, "a");
    const [program, ...args] = this.contestant.command;
    const stdout = this.contestant.isService ? "pipe" : log.fd;
    const child = spawn(program, args, { env: this.environment(), stdio: ["ignore", stdout, log.fd] });
    await log.close();
    return child;
  }

  async stop() {
    const children = this.children.splice(0).filter((child) => child.exitCode === null && child.signalCode === null);
    await Promise.all(children.map(stopOne));
  }

  checkAlive() {
    const gone = this.children.find((child) => child.exitCode !== null || child.signalCode !== null);
    if (gone) throw new Error(`${this.contestant.name} left by itself, see ${this.contestant.log}`);
  }

  async run([program, ...args]) {
    const child = spawn(program, args, { env: this.environment(), stdio: ["ignore", "pipe", "inherit"] });
    let said = "";
    child.stdout.on("data", (data) => (said += data));
    const [code] = await once(child, "close");
    if (code !== 0) throw new Error(`${program} ${args.join(" ")} ended with ${code}`);
    return said;
  }

  environment() {
    const { exchange, settings } = this.contestant;
    const ours = { TIDINGS_EXCHANGE: exchange, TIDINGS_LISTEN: "127.0.0.1:0", TIDINGS_RATE_LIMIT: "off" };
    return { ...process.env, ...ours, ...settings, DATABASE_URL: this.url, AMQP_URL, EXCHANGE: exchange };
  }

  // Of its own processes, without the servers.
  async cpuSeconds() {
    const all = await Promise.all(this.children.map(({ pid }) => readFile(`/proc/${pid}/stat`, "utf8")));
    return all.reduce((sum, stat) => sum + ticksOf(stat) / TICKS_PER_S, 0);
  }

  async waiting() {
    return (await this.channel.checkQueue(this.queue)).messageCount;
  }

  async isPending() {
    return (await this.db.query(this.contestant.pending)).rows[0].exists;
  }

  // Whether what arrives is what ours sends: read from the first message in the queue, which goes back.
  async inspect() {
    const message = await this.channel.get(this.queue);
    this.channel.nack(message);
    const { deliveryMode, messageId, type, contentType, timestamp, appId, headers } = message.properties;
    const body = message.content.toString();
    const isWhole =
      deliveryMode === 2 && messageId === headers.cloudEvents_id && type === KEY && contentType === "application/json" && timestamp > 1e9 &&
      appId === "tidings" && headers.version >= 2 && headers["field.job_title"] === true && headers.cloudEvents_specversion === "1.0" &&
      headers.traceparent.length === 55 && headers.cloudEvents_subject === JSON.parse(body).user_id && headers.cloudEvents_time.length >= 20 &&
      body === JSON.stringify({ user_id: headers.cloudEvents_subject, changed_fields: ["job_title"] });
    if (!isWhole) throw new Error(`${this.contestant.name} sends something else: ${body} ${JSON.stringify(message.properties)}`);
  }
}

async function addressOf(child) {
  for await (const data of child.stdout) {
    const found = /http:\/\/(\S+)/.exec(data);
    if (!found) continue;
    child.stdout.resume();
    return found[1];
  }
  throw new Error("tidings does not get ready");
}

// User and system time: the 14th and 15th field, counted from the end of the name, which may have spaces in it.
function ticksOf(stat) {
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return Number(fields[11]) + Number(fields[12]);
}

async function stopOne(child) {
  const gone = once(child, "exit");
  child.kill("SIGTERM");
  const late = sleep(STOP_MS, undefined, { ref: false }).then(() => child.kill("SIGKILL"));
  await Promise.race([gone, late]);
  await gone;
}

async function onServer(sql) {
  const server = new pg.Client({ connectionString: DATABASE_URL });
  await server.connect();
  await server.query(sql);
  await server.end();
}
