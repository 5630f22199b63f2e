// Report: the turns as a table and as a file.
// Promise: a ratio compares what was measured in the same round, and its median is shown with the least and the most.

import { execFileSync } from "node:child_process";
import { writeFile } from "node:fs/promises";
import { cpus } from "node:os";
import amqp from "amqplib";
import pg from "pg";

const OURS = "tidings";

export function print(turns, { rounds }) {
  for (const measure of new Set(turns.map((turn) => turn.measure))) {
    for (const queue of new Set(turns.map((turn) => turn.queue))) {
      const here = turns.filter((turn) => turn.measure === measure && turn.queue === queue);
      if (here.length > 0) console.log(`\n${{ drain: drainTable, latency: latencyTable }[measure](here, queue, rounds).join("\n")}`);
    }
  }
}

function drainTable(turns, queue, rounds) {
  const head = [`Drain to a ${queue} queue, ${rounds} rounds`, "pending", "messages/s", "ours is faster by", "its own CPU, µs/message"];
  return table(head, byContestant(turns), (own) => [
    own[0].backlog.toLocaleString("en"),
    spread(own.map(({ rate }) => rate), 0),
    spread(ratios(turns, own, (mine, theirs) => mine.rate / theirs.rate), 2),
    spread(own.map(({ cpu_us: us }) => us), 0),
  ]);
}

function latencyTable(turns, queue, rounds) {
  const head = [`Commit to consumer, ${queue} queue, ${rounds} rounds`, "changes/s", "p50 ms", "p99 ms", "p99 is this many times ours", "due to consumer, p99 ms", "untold after 2 s"];
  const nothing = ["keeps up with nothing in some round", "", "", "", "", ""];
  return table(head, byContestant(turns), (own) => (own.some(({ rate }) => rate === 0) ? nothing : latencyCells(turns, own)));
}

function latencyCells(turns, own) {
  return [
    spread(own.map(({ rate }) => rate), 0),
    spread(own.map(({ commit }) => commit.p50_ms), 2),
    spread(own.map(({ commit }) => commit.p99_ms), 2),
    spread(ratios(turns, own, (mine, theirs) => theirs.commit.p99_ms / mine.commit.p99_ms), 1),
    spread(own.map(({ due }) => due.p99_ms), 2),
    own.reduce((sum, { untold }) => sum + untold, 0),
  ];
}

function table(head, groups, cells) {
  const line = (parts) => `| ${parts.join(" | ")} |`;
  return [line(head), line(head.map(() => "---")), ...groups.map((own) => line([own[0].contestant, ...cells(own)]))];
}

const byContestant = (turns) => [...new Set(turns.map((turn) => turn.contestant))].sort(oursFirst).map((name) => turns.filter((turn) => turn.contestant === name));
const oursFirst = (a, b) => (b === OURS) - (a === OURS) || a.localeCompare(b);

function ratios(turns, own, ratio) {
  const ours = (round) => turns.find((turn) => turn.contestant === OURS && turn.round === round);
  return own.map((theirs) => ratio(ours(theirs.round), theirs));
}

// The median, and the least and the most.
function spread(values, digits) {
  const sorted = [...values].sort((a, b) => a - b);
  const shown = (value) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return `${shown(median(sorted))} (${shown(sorted[0])} to ${shown(sorted.at(-1))})`;
}

const median = (sorted) => (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;

export async function write(file, turns, settings, contestants) {
  const { out, ...asked } = settings;
  const machine = { cores: cpus().length, node: process.versions.node, postgres: await postgres(), rabbitmq: await rabbitmq() };
  const commit = execFileSync("git", ["rev-parse", "--short", "HEAD"], { encoding: "utf8" }).trim();
  const peers = contestants.map(({ name, processes, settings: set, share }) => ({ name, processes, settings: set, share }));
  const result = { measured_at: new Date().toISOString(), commit, settings: asked, machine, contestants: peers, turns };
  await writeFile(out, `${JSON.stringify(result, null, 1)}\n`);
}

async function postgres() {
  const server = new pg.Client({ connectionString: process.env.DATABASE_URL });
  await server.connect();
  const { rows } = await server.query("show server_version");
  await server.end();
  return rows[0].server_version;
}

async function rabbitmq() {
  const broker = await amqp.connect(process.env.AMQP_URL);
  const { version } = broker.connection.serverProperties;
  await broker.close();
  return version;
}
