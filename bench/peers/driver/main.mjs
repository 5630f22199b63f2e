// Measures every contestant in turn, in several rounds, and writes what came out.
//
//   DATABASE_URL=postgres://.. AMQP_URL=amqp://.. node main.mjs ARGUMENTS (asked.mjs)
//
// Ours is always among them. Each round begins with another contestant, so that nobody always has the same neighbour.

import { loadavg } from "node:os";
import { asked } from "./asked.mjs";
import { drain } from "./drain.mjs";
import { House } from "./house.mjs";
import { latency } from "./latency.mjs";
import { print, write } from "./report.mjs";

const { settings, contestants } = asked();
const houses = contestants.map((contestant) => new House(contestant));
const turns = [];
const rates = new Map(); // what each was found to keep up with

try {
  for (const house of houses) await house.build();
  for (let round = 0; round < Number(settings.rounds); round++) await playRound(round);
} finally {
  for (const house of houses) await house.tearDown();
}
print(turns, settings);

async function playRound(round) {
  for (const measure of settings.measures.split(",")) {
    for (const queue of settings.queues.split(",")) {
      for (const house of rotated(houses, round)) {
        const figures = await { drain: drainTurn, latency: latencyTurn }[measure](house, queue);
        turns.push({ measure, queue, round, contestant: house.contestant.name, load: loadavg()[0], ...figures });
        console.error(JSON.stringify(turns.at(-1)));
        if (settings.out) await write(settings.out, turns, settings, contestants);
      }
    }
  }
}

async function drainTurn(house, queue) {
  const backlog = Math.round(Number(settings.backlog) * house.contestant.share);
  return { backlog, ...(await drain(house, queue, backlog)) };
}

async function latencyTurn(house, queue) {
  const kept = `${house.contestant.name} ${queue}`;
  const figures = await latency(house, queue, rates.get(kept) ?? Number(settings.rate), Number(settings.seconds));
  if (figures.rate > 0) rates.set(kept, figures.rate);
  return figures;
}

function rotated(list, by) {
  const first = by % list.length;
  return [...list.slice(first), ...list.slice(0, first)];
}
