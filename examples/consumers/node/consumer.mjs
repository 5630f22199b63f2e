// A consumer in Node with amqplib: hears that users changed, and keeps up by fetching their latest record.
//
//   AMQP_URL=amqp://localhost TIDINGS_URL=http://127.0.0.1:8080 TIDINGS_API_KEY=tdg_.. TIDINGS_QUEUE=badges node consumer.mjs 'user.*'
//
// A notice is only a hint to look. docs/consuming has the rules that this program follows, and a page about this library.

import { writeFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import amqp from "amqplib";

const { AMQP_URL, TIDINGS_URL, TIDINGS_EXCHANGE: EXCHANGE = "masterdata", TIDINGS_QUEUE: QUEUE } = process.env;
const { TIDINGS_API_KEY, TIDINGS_API_KEY_FILE } = process.env;
const MARK = `${QUEUE}.resync`; // a queue that is there as long as a resync is owed, whatever becomes of this process
const DECLARE = process.env.TIDINGS_DECLARE !== "no";
const PATIENCE_S = seconds("TIDINGS_PATIENCE_S", "30"); // for a state that the owner has told of and does not show
const CHECK_S = seconds("TIDINGS_CHECK_S", "10"); // from one look whether the exchange is there to the next
const KEYS = process.argv.length > 2 ? process.argv.slice(2) : ["#"];
for (const name of ["AMQP_URL", "TIDINGS_URL", "TIDINGS_QUEUE"]) {
  if (!process.env[name]) throw new Error(`${name} is not set`);
}
if (!isBroker(AMQP_URL)) throw new Error("AMQP_URL is not the address of a broker: amqp:// or amqps:// and a host");
if (!/^https?:\/\//i.test(TIDINGS_URL)) throw new Error("TIDINGS_URL does not begin with http:// or https://");
if (!["yes", "no", "", undefined].includes(process.env.TIDINGS_DECLARE)) throw new Error("TIDINGS_DECLARE is neither yes nor no");
if (!TIDINGS_API_KEY && !TIDINGS_API_KEY_FILE) throw new Error("TIDINGS_API_KEY is not set");

function isBroker(text) {
  try {
    const { protocol, hostname } = new URL(text);
    return /^amqps?:$/.test(protocol) && hostname !== "";
  } catch {
    return false; // its text would quote the password
  }
}

function seconds(name, otherwise) {
  const value = process.env[name] ?? otherwise;
  if (!/^\d{1,9}(\.\d+)?$/.test(value)) throw new Error(`${name} is not a number of seconds`);
  return Number(value);
}

const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
const DELAY = /^[1-9]\d{0,3}$/; // a Retry-After that is followed; any other is a second
const LONGEST_DELAY_S = 120; // whoever stands before the owner may ask for hours
const DENIALS = [401, 403]; // nothing is wrong with the message: the key may be about to be replaced
const OUTAGES = [404, 408, 410, 429, 502, 503, 504]; // 404 and 410 of whoever stands between; the owner's own is an answer

class SetAside extends Error {} // a message that no repetition helps; its text never quotes the message

// The latest 10,000 entries. What is forgotten costs one needless fetch.
class Memory extends Map {
  remember(key, value) {
    this.delete(key);
    this.set(key, value);
    if (this.size > 10_000) this.delete(this.keys().next().value);
  }
}

const seen = new Memory(); // message ids
const versions = new Memory(); // highest version handled, by user; your own copy would keep it beside the data
const stop = new AbortController();
let missed = false;
let failures = 0;

// Node's timers know 31 bits: what is longer becomes 1 ms.
const rest = (ms, signal) => sleep(Math.min(ms, 2 ** 31 - 1), undefined, { signal });

// Throws when somebody asks us to leave. Jitter keeps consumers from coming back all at once.
const pause = (ms) => rest(ms * (1 + Math.random()), stop.signal);

// Read anew for each request when it is in a file: a new key takes effect without a restart.
async function key() {
  const found = (TIDINGS_API_KEY_FILE ? await readFile(TIDINGS_API_KEY_FILE, "utf8") : TIDINGS_API_KEY).trim();
  if (!/^[!-~]+$/.test(found)) throw new TypeError("the key is not one word of printable ASCII"); // never quoted
  return found;
}

// Status, the object that came, empty if none did, and when to ask again. Node's fetch keeps connections open by itself.
async function askOnce(path) {
  const headers = { authorization: `Bearer ${await key()}` };
  const signal = AbortSignal.timeout(10_000);
  const answer = await fetch(TIDINGS_URL.replace(/\/$/, "") + path, { headers, redirect: "manual", signal }); // or the key would go along
  const body = await answer.text(); // in full, or the connection cannot be used again
  let found;
  try {
    found = JSON.parse(body);
  } catch {}
  return { status: answer.status, found: found ?? {}, after: answer.headers.get("retry-after") };
}

// Once, before anything is taken from the queue: a wrong key, or address, is the end. An outage is waited for later.
async function checkKey() {
  await key(); // here, where it is no outage that there is none
  const { status } = await askOnce("/v1/users?limit=1").catch((error) => {
    console.error(`the owner cannot be asked: ${kind(error)}`);
    return {};
  });
  if (DENIALS.includes(status)) console.error(`the owner refuses the key: ${status}`);
  else if (status >= 300 && status < 400) console.error(`TIDINGS_URL leads elsewhere: ${status}`);
  else return;
  process.exit(1);
}

// Without its text, which may quote what came. fetch wraps the error that says more; a file's has no name of its own.
const kind = (error) => error.cause?.code ?? (error.name === "Error" ? error.code : error.name);

const isVersion = (number) => Number.isSafeInteger(number) && number > 0;

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isRecord = (found) => isObject(found?.profile) && isVersion(found.version);

// Whether it is the owner's word on a user: his record, or that he is deleted. Whoever stands between says 200 and 410 as well.
const isLatest = (status, found) =>
  status === 410 ? found.code === "user_deleted" && isVersion(found.version) : status === 200 && isRecord(found);

// No deletion: that is 410. Whoever stands between, or is no owner at all, says 404 as well.
const isUnknown = (status, { code }) => status === 404 && code === "user_not_found";

const isPage = (status, { users, next }) => status === 200 && next !== undefined && Array.isArray(users) && users.every(isRecord);

// What the owner says, once it is what is wanted, asked for as long as it takes. What is waited for is told, once for each fetch.
async function ask(path, isWanted) {
  const patience = performance.now() + 1000 * PATIENCE_S; // the time of day may jump
  const told = new Set();
  const say = (text) => told.has(text) || (told.add(text) && console.error(text));
  for (;;) {
    let status, found, after;
    try {
      ({ status, found, after } = await askOnce(path));
    } catch (error) {
      say(`the owner cannot be asked: ${kind(error)}`);
      await pause(1000);
      continue;
    }
    if (isWanted(status, found)) return found;
    if (isUnknown(status, found)) throw new SetAside("the owner never knew this user");
    if (DENIALS.includes(status)) {
      say(`the owner refuses the key: ${status}`);
      await pause(1000);
      continue;
    }
    if (status >= 400 && !OUTAGES.includes(status)) throw new SetAside(`the owner answered ${status}`);
    if (found.code !== "not_yet_visible") say(`the owner cannot be asked: ${status}`);
    else if (performance.now() > patience) throw new SetAside("the owner shows no state this new");
    await pause(1000 * (DELAY.test(after) ? Math.min(Number(after), LONGEST_DELAY_S) : 1));
  }
}

function read({ properties, content }) {
  let notice;
  try {
    notice = JSON.parse(content);
  } catch {}
  const version = properties.headers?.version;
  const id = notice?.user_id; // a list of one id would pass the test as text
  if (typeof id !== "string" || !UUID.test(id) || !isVersion(version)) throw new SetAside("not a notice");
  return { id: id.toLowerCase(), version };
}

// Here your own copy would be written, or forgotten when there is no profile any more. What fails is tried again.
function keep(event, id, { version, profile = null }) {
  const line = JSON.stringify({ event, user_id: id, version: profile && version, profile });
  writeFileSync(1, `${line}\n`); // console.log keeps it to itself when it cannot write
  versions.remember(id, version); // of the deleted too: no late notice brings them back
}

const isNews = (id, version) => version > (versions.get(id) ?? 0);

// The type is for the curious: whatever happened, the latest record is fetched, for a type unknown here too.
async function handle(message) {
  const { messageId, type = null } = message.properties;
  if (seen.has(messageId)) return;
  const { id, version } = read(message);
  const isBackfill = "tidings-backfill" in message.properties.headers; // for those who lost what they held
  if (isNews(id, version) || isBackfill) keep(type, id, await ask(`/v1/users/${id}?min_version=${version}`, isLatest));
  if (messageId) seen.remember(messageId, true);
}

// Everybody as of now, when news may have been missed. Whom you hold and do not meet here was deleted: ask for each.
async function resync() {
  console.error("news may have been missed: resync");
  let page = { next: "" };
  while (page.next !== null) {
    page = await ask(`/v1/users?limit=500${page.next && `&after=${page.next}`}`, isPage);
    for (const { id, ...record } of page.users) if (isNews(id, record.version)) keep("resync", id, record);
    await pause(0);
  }
}

async function isThere(connection, queue) {
  const channel = await connection.createChannel();
  channel.on("error", () => {}); // or the whole process ends; the promise below tells the same
  try {
    await channel.checkQueue(queue);
    await channel.close();
    return true;
  } catch (error) {
    if (error.code === 404) return false;
    throw error;
  }
}

async function declare(channel) {
  await channel.assertExchange(QUEUE, "direct"); // our own door: dead letters go through it, backfills come
  const kept = { "x-queue-type": "quorum", "x-delivery-limit": 1_000_000 };
  await channel.assertQueue(`${QUEUE}.dead`, { arguments: kept });
  await channel.bindQueue(`${QUEUE}.dead`, QUEUE, "dead");
  const dead = { deadLetterExchange: QUEUE, deadLetterRoutingKey: "dead" };
  await channel.assertQueue(QUEUE, { ...dead, arguments: { "x-queue-type": "quorum", "x-delivery-limit": 1000 } });
  await channel.bindQueue(QUEUE, QUEUE, "work");
  for (const key of KEYS) await channel.bindQueue(QUEUE, EXCHANGE, key);
}

// Until it is done: when your own database is away, nothing is wrong with the message.
async function insist(message) {
  for (;;) {
    try {
      return await handle(message);
    } catch (error) {
      if (error instanceof SetAside || stop.signal.aborted) throw error;
      // Its text may quote what was fetched.
      console.error(`message ${message.properties.messageId} is tried again: ${error.code ?? error.name}`);
      await pause(1000);
    }
  }
}

async function deliver(channel, message) {
  if (stop.signal.aborted) return; // what waits behind the message in hand goes back
  try {
    await insist(message);
  } catch (error) {
    if (!(error instanceof SetAside)) return; // we are leaving
    console.error(`message ${message.properties.messageId} is set aside: ${error.message}`);
    return channel.reject(message, false);
  }
  channel.ack(message);
}

async function owe(connection) {
  missed = true;
  if (!DECLARE) return;
  const channel = await connection.createChannel();
  await channel.assertQueue(MARK, { arguments: { "x-queue-type": "quorum" } });
  await channel.close();
}

// A channel, once all is there that a session stands on, and bound. A queue or an exchange that was not there is a resync that is owed.
async function prepare(connection) {
  if (missed || !(await isThere(connection, QUEUE))) await owe(connection); // first: QUEUE without the mark says that nothing was missed
  const channel = await connection.createChannel();
  channel.on("error", () => {}); // or the whole process ends; the promise below tells the same
  try {
    if (DECLARE) await declare(channel);
    await channel.checkQueue(QUEUE);
  } catch (error) {
    if (error.code === 404) await owe(connection); // no exchange
    throw error;
  }
  return channel;
}

// Nobody tells when the exchange is deleted, and our bindings with it.
async function watch(connection, signal) {
  for (;;) {
    await rest(1000 * CHECK_S, signal);
    await (await prepare(connection)).close();
    if (missed) throw new Error("lost");
  }
}

async function session(connection) {
  stop.signal.throwIfAborted(); // asked while we connected: nobody would tell us again
  let end;
  const ended = new Promise((resolve, reject) => (end = (error) => (error ? reject(error) : resolve())));
  ended.catch(() => {}); // it may end before anybody waits for it
  connection.on("error", end).on("close", () => end(new Error("connection closed")));
  const leave = () => end();
  stop.signal.addEventListener("abort", leave);
  const over = new AbortController();
  let channel;
  let work = Promise.resolve(); // one after the other: amqplib does not wait for a handler before it calls the next
  try {
    missed ||= DECLARE && (await isThere(connection, MARK));
    channel = await prepare(connection);
    channel.on("error", end);
    await channel.prefetch(20);
    // After the bindings and before the first message, so that there is no gap between the two.
    if (missed) await resync();
    if (DECLARE && missed) await channel.deleteQueue(MARK);
    missed = false;
    const { consumerTag } = await channel.consume(QUEUE, (message) => {
      missed ||= message === null; // the queue was deleted
      if (message) work = work.then(() => deliver(channel, message)).catch(end);
      else end(new Error("cancelled"));
    });
    failures = 0;
    watch(connection, over.signal).catch(end);
    await ended;
    await channel.cancel(consumerTag);
  } finally {
    stop.signal.removeEventListener("abort", leave);
    over.abort();
    await work;
  }
  await channel.close(); // first: with its connection a channel ends at once, and the last acknowledgement would be lost
}

for (const signal of ["SIGTERM", "SIGINT"]) {
  process.on(signal, () => {
    stop.abort();
    // Longer than a request takes. Then the broker is silent: what was not acknowledged comes again.
    setTimeout(() => process.exit(0), 12_000).unref();
  });
}
await checkKey();
while (!stop.signal.aborted) {
  let connection;
  try {
    const url = new URL(AMQP_URL);
    url.searchParams.set("heartbeat", "30");
    connection = await amqp.connect(url.href, { timeout: 10_000 });
    await session(connection);
  } catch (error) {
    // The broker's own words are safe to show; another error's may quote what was fetched.
    if (!stop.signal.aborted) console.error(`session ended: ${error instanceof SyntaxError ? error.name : error.message}`);
  }
  await connection?.close().catch(() => {}); // gives back what was not acknowledged
  await pause(Math.min(250 * 2 ** failures++, 10_000)).catch(() => {});
}
