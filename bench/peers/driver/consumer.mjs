// Consumer: hears every message of one queue and remembers when. A thread, asked by messages: `count` or `arrivals`.
// Not here, on purpose: acknowledgements, which cost the cores that the contestants need.

import { parentPort, workerData } from "node:worker_threads";
import amqp from "amqplib";

const arrivals = [];
const broker = await amqp.connect(process.env.AMQP_URL, { noDelay: true });
const channel = await broker.createChannel();
await channel.consume(workerData.queue, hear, { noAck: true });
parentPort.on("message", (question) => parentPort.postMessage(question === "count" ? arrivals.length : arrivals));
parentPort.postMessage("ready");

function hear({ properties: { headers } }) {
  const at = performance.timeOrigin + performance.now();
  const user = Number.parseInt(headers.cloudEvents_subject.slice(-12), 16);
  arrivals.push({ user, at, committed: milliseconds(headers.cloudEvents_time) });
}

// With the microseconds, which Date does not read.
function milliseconds(time) {
  const [whole, fraction = "0Z"] = time.split(".");
  return Date.parse(`${whole.replace("Z", "")}Z`) + Number(`0.${fraction.replace("Z", "")}`) * 1000;
}
