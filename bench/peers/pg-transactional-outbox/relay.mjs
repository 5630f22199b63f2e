// pg-transactional-outbox, which hands one message at a time to a handler in a transaction of its own; ours publishes it and waits
// for the broker's confirm.
//
//   DATABASE_URL=postgres://.. AMQP_URL=amqp://.. EXCHANGE=.. node relay.mjs setup|polling|replication
//
// README.md beside the folders says why each setting is as it is.

import amqp from "amqplib";
import pg from "pg";
import {
  DatabaseSetup,
  createReplicationSemaphoreConcurrencyController,
  getDisabledLogger,
  initializePollingMessageListener,
  initializeReplicationMessageListener,
} from "pg-transactional-outbox";

const { DATABASE_URL, AMQP_URL, EXCHANGE } = process.env;
const PARALLEL = Number(process.env.PARALLEL ?? 40); // messages at once, and connections
const POLL_MS = 5;
const SLOT = "peers_replication";
const PUBLICATION = "peers_publication";
const NEXT_MESSAGES = "next_outbox_messages";

const url = new URL(DATABASE_URL);
const database = url.pathname.slice(1);
const connection = { connectionString: DATABASE_URL, max: PARALLEL };
const config = {
  outboxOrInbox: "outbox",
  dbListenerConfig: { host: url.hostname, port: Number(url.port), user: url.username, database, max: 4 },
  dbHandlerConfig: connection,
};
// What the library's own example for an outbox has: both protections cost each message a transaction more.
const settings = { dbSchema: "public", dbTable: "outbox", enableMaxAttemptsProtection: false, enablePoisonousMessageProtection: false };

async function setup() {
  const names = { outboxOrInbox: "outbox", database, schema: "public", table: "outbox", listenerRole: url.username };
  const polling = { ...names, nextMessagesName: NEXT_MESSAGES };
  const db = new pg.Client(connection);
  await db.connect();
  await db.query(DatabaseSetup.dropAndCreateTable(names));
  await db.query(DatabaseSetup.setupPollingIndexes(polling));
  await db.query(DatabaseSetup.createPollingFunction(polling));
  await db.query(DatabaseSetup.setupReplicationCore({ ...names, publication: PUBLICATION, replicationSlot: SLOT }));
  await db.end();
}

async function polling() {
  const pollingSettings = {
    ...settings,
    nextMessagesFunctionName: NEXT_MESSAGES,
    nextMessagesBatchSize: PARALLEL,
    nextMessagesLockInMs: 2_000,
    nextMessagesPollingIntervalInMs: POLL_MS,
  };
  initializePollingMessageListener({ ...config, settings: pollingSettings }, await publisher(), quiet(), { batchSizeStrategy });
}

// The library asks for as many messages as have just been done, which is often one, and each question looks at the whole backlog.
// So: nothing until half of them are done, then as many as there is room for.
async function batchSizeStrategy(underWay) {
  if (underWay <= PARALLEL / 2) return PARALLEL;
  await new Promise(setImmediate);
  return underWay;
}

async function replication() {
  const replicationSettings = { ...settings, dbPublication: PUBLICATION, dbReplicationSlot: SLOT };
  const concurrencyStrategy = createReplicationSemaphoreConcurrencyController(PARALLEL);
  initializeReplicationMessageListener({ ...config, settings: replicationSettings }, await publisher(), quiet(), { concurrencyStrategy });
}

async function publisher() {
  const broker = await amqp.connect(AMQP_URL, { noDelay: true });
  const channel = await broker.createConfirmChannel();
  return { handle: (message) => confirmed(channel, message) };
}

function confirmed(channel, { id, aggregateId, messageType, payload, metadata, createdAt }) {
  const headers = {
    version: metadata.version,
    traceparent: metadata.traceparent,
    cloudEvents_specversion: "1.0",
    cloudEvents_id: id,
    cloudEvents_source: "urn:tidings:masterdata",
    cloudEvents_type: messageType,
    cloudEvents_subject: aggregateId,
    cloudEvents_time: metadata.time,
  };
  for (const field of payload.changed_fields) headers[`field.${field}`] = true;
  const properties = {
    persistent: true,
    mandatory: true,
    messageId: id,
    type: messageType,
    contentType: "application/json",
    timestamp: Math.floor(Date.parse(createdAt) / 1000),
    appId: "tidings",
    headers,
  };
  return new Promise((resolve, reject) => {
    const answered = (error) => (error ? reject(error) : resolve());
    channel.publish(EXCHANGE, messageType, Buffer.from(JSON.stringify(payload)), properties, answered);
  });
}

// Errors only: a line per message would be measured too.
function quiet() {
  return { ...getDisabledLogger(), error: console.error, fatal: console.error };
}

await { setup, polling, replication }[process.argv[2]]();
