// Contestants: who is measured, how each is set up and started, and how a change is made that it has to tell.
// Promise: whoever is listed gets a database of its own, the same exchange, the same messages, and the settings written here.

import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";

const PEERS = fileURLToPath(new URL("..", import.meta.url));
const TARGET = process.env.CARGO_TARGET_DIR ?? fileURLToPath(new URL("../../../target", import.meta.url));
const TIDINGS = process.env.TIDINGS_BINARY ?? `${TARGET}/release/tidings`;

const node = (folder) => [process.execPath, `${PEERS}${folder}/relay.mjs`];
const python = (folder) => [`${TARGET}/peers/venv-${folder}/bin/python`, `${PEERS}${folder}/relay.py`];

// `processes`: how many of it run at once, when more were faster than one. `share`: of the full backlog, for those that would need minutes.
// `settings`: what the environment says beyond the defaults written in the program.
export const CONTESTANTS = [
  {
    name: "tidings",
    rows: "node-relay",
    setup: [TIDINGS, "migrate"],
    command: [TIDINGS, "serve"],
    isService: true,
    share: 1,
  },
  { name: "node-relay", rows: "node-relay", ...peer(node("node-relay"), "relay"), share: 1 },
  { name: "txoutbox", rows: "txoutbox", ...peer(python("txoutbox"), "relay"), share: 0.1 },
  { name: "faststream-outbox", rows: "faststream-outbox", ...peer(python("faststream-outbox"), "relay"), processes: 2, share: 0.05 },
  {
    name: "pg-transactional-outbox, polling",
    rows: "pg-transactional-outbox",
    ...peer(node("pg-transactional-outbox"), "polling"),
    pending: "select exists (select from outbox where processed_at is null)",
    share: 0.05,
  },
  {
    name: "pg-transactional-outbox, replication",
    rows: "pg-transactional-outbox",
    ...peer(node("pg-transactional-outbox"), "replication"),
    pending: "select exists (select from outbox where processed_at is null)",
    // A slot keeps every byte that is written until it is read, so it is there only while its owner has a turn.
    arm: "select pg_create_logical_replication_slot('peers_replication', 'pgoutput')",
    disarm: "select pg_drop_replication_slot('peers_replication')",
    share: 0.05,
  },
].map(complete);

function peer(program, mode) {
  return { setup: [...program, "setup"], command: [...program, mode] };
}

function complete(contestant) {
  const slug = contestant.name.replace(/[^a-z]+/g, "_");
  return {
    pending: "select exists (select from outbox)",
    processes: 1,
    settings: {},
    ...contestant,
    database: `peers_${slug}`,
    exchange: `peers.${slug}`,
    log: `${TARGET}/peers/log/${slug}.log`,
  };
}

// The statement that adds rows, with `$1` the first number and `$2` how many.
export const rowsOf = ({ rows }) => readFile(`${PEERS}${rows}/rows.sql`, "utf8");
