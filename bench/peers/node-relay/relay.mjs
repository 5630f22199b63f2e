// A relay as a careful team would write it by hand in an afternoon: pg, amqplib's confirm channel, batches of 500, the confirms of a
// batch awaited together, and the rows of what was confirmed deleted.
//
//   DATABASE_URL=postgres://.. AMQP_URL=amqp://.. EXCHANGE=.. node relay.mjs setup|relay
//
// The table is that of tidings, from its migration. An advisory lock keeps a second relay away, so that rows need no locks and no transaction
// is open while the broker is waited for: that would keep Postgres from forgetting the rows that are deleted. While batches wait
// for their confirms the next one is read, without the rows that are under way.

import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import amqp from "amqplib";
import pg from "pg";

const { DATABASE_URL, AMQP_URL, EXCHANGE, AT_ONCE = "2" } = process.env;
const MIGRATION = new URL("../../../migrations/20261123000001_users_and_outbox.sql", import.meta.url);
const BATCH = 500;
const POLL_MS = 5; // a hint by `notify` would have the commits of all writers wait for each other

const LEAD = "select pg_advisory_lock(4711)";
const CLAIM = `
  select id, message_id, event, user_id, version, changed_fields, traceparent, extract(epoch from occurred_at)::bigint as second,
         to_char(occurred_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as time
    from outbox where id <> all($1) order by id limit ${BATCH}`;
const claim = (underWay) => ({ name: "claim", text: CLAIM, values: [underWay] });
const settle = (ids) => ({ name: "settle", text: "delete from outbox where id = any($1)", values: [ids] });

async function setup() {
  const db = await connect();
  await db.query(await readFile(MIGRATION, "utf8"));
  await db.end();
}

async function relay() {
  const broker = await amqp.connect(AMQP_URL, { noDelay: true });
  const reader = await connect();
  const settler = await connect();
  await reader.query(LEAD);
  const channels = await Promise.all(Array.from({ length: Number(AT_ONCE) }, () => broker.createConfirmChannel()));
  const batches = new Map(); // under way, by their channel
  for (;;) {
    const channel = channels.find((one) => !batches.has(one));
    const { rows } = await reader.query(claim([...batches.values()].flatMap(({ ids }) => ids)));
    const ids = rows.map((row) => row.id);
    if (ids.length > 0) batches.set(channel, { ids, done: carry(channel, settler, rows, ids).then(() => batches.delete(channel)) });
    if (batches.size === channels.length) await Promise.race([...batches.values()].map(({ done }) => done));
    else if (ids.length < BATCH) await sleep(POLL_MS);
  }
}

// One batch: published, confirmed as a whole, deleted. Without a confirm the process ends, and the rows are still there.
async function carry(channel, settler, rows, ids) {
  for (const row of rows) publish(channel, row);
  await channel.waitForConfirms();
  await settler.query(settle(ids));
}

function publish(channel, row) {
  const body = Buffer.from(JSON.stringify({ user_id: row.user_id, changed_fields: row.changed_fields }));
  const headers = {
    version: Number(row.version),
    traceparent: row.traceparent,
    cloudEvents_specversion: "1.0",
    cloudEvents_id: row.message_id,
    cloudEvents_source: "urn:tidings:masterdata",
    cloudEvents_type: row.event,
    cloudEvents_subject: row.user_id,
    cloudEvents_time: row.time,
  };
  for (const field of row.changed_fields) headers[`field.${field}`] = true;
  channel.publish(EXCHANGE, row.event, body, {
    persistent: true,
    mandatory: true,
    messageId: row.message_id,
    type: row.event,
    contentType: "application/json",
    timestamp: Number(row.second),
    appId: "tidings",
    headers,
  });
}

async function connect() {
  const db = new pg.Client({ connectionString: DATABASE_URL });
  await db.connect();
  return db;
}

await { setup, relay }[process.argv[2]]();
