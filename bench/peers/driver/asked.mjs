// Asked: what a call wants measured.
// Promise: run by itself it only looks at the arguments, so that a mistake is told before anything is built or started.

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { CONTESTANTS } from "./contestants.mjs";

const USAGE = `Measure other outbox libraries and ours on the same work, in turn, on servers of their own.

Usage: ./dev bench peers [OPTIONS] [CONTESTANT..]

A contestant is named by a part of its name; ours is always among them. Without any: all of
  ${CONTESTANTS.map(({ name }) => name).join("\n  ")}

Options:
  --rounds N          [default: 3]
  --backlog EVENTS    that a drain begins with [default: 200000]
  --rate PER_SECOND   of changes whose latency is measured [default: 1000]
  --seconds N         of changes at that rate [default: 8]
  --queues KINDS      [default: quorum,classic]
  --measures KINDS    [default: drain,latency]
  --out FILE          where the turns are written, as JSON
  -h, --help`;

const OPTIONS = {
  rounds: { type: "string", default: "3" },
  backlog: { type: "string", default: "200000" },
  rate: { type: "string", default: "1000" },
  seconds: { type: "string", default: "8" },
  queues: { type: "string", default: "quorum,classic" },
  measures: { type: "string", default: "drain,latency" },
  out: { type: "string" },
  help: { type: "boolean", short: "h" },
};

// Settings and contestants; ends the process when there is nothing to measure.
export function asked() {
  const { values: settings, positionals: wanted } = parsed();
  if (settings.help) {
    console.log(USAGE);
    process.exit(0);
  }
  for (const option of ["rounds", "backlog", "rate", "seconds"]) {
    if (!/^[1-9][0-9]{0,8}$/.test(settings[option])) refuse(`--${option} is a whole number, at least 1`);
  }
  const kinds = { queues: ["quorum", "classic"], measures: ["drain", "latency"] };
  for (const [option, known] of Object.entries(kinds)) {
    if (!settings[option].split(",").every((kind) => known.includes(kind))) refuse(`--${option} is of ${known.join(", ")}`);
  }
  for (const part of wanted) {
    if (!CONTESTANTS.some(({ name }) => name.includes(part))) refuse(`no contestant has ${part} in its name`);
  }
  const isWanted = (name) => name === "tidings" || wanted.length === 0 || wanted.some((part) => name.includes(part));
  return { settings, contestants: CONTESTANTS.filter(({ name }) => isWanted(name)) };
}

function parsed() {
  try {
    return parseArgs({ allowPositionals: true, options: OPTIONS });
  } catch (error) {
    return refuse(error.message);
  }
}

function refuse(why) {
  console.error(`error: ${why}\nhint: \`./dev bench peers --help\` tells what can be asked for`);
  process.exit(2);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) asked();
