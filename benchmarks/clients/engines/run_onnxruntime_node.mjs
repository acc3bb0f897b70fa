// ONNX Runtime's package for Node, in an environment of its own. Prints what harness.py prints.
//
//   node run_onnxruntime_node.mjs MODEL FEEDS.json
//
// FEEDS holds {name: {"type": ..., "dims": [...], "data": [...]}}, with the wanted output as "wanted".

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [model, path] = process.argv.slice(2);
const ort = createRequire(join(process.cwd(), "package.json"))("onnxruntime-node");

function statusBytes(key) {
  const line = readFileSync("/proc/self/status", "utf8").split("\n").find((l) => l.startsWith(key));
  return 1024 * Number(line.split(/\s+/)[1]);
}

function seconds() {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
}

const { wanted, ...inputs } = JSON.parse(readFileSync(path, "utf8"));
const feeds = {};
for (const [name, { type, dims, data }] of Object.entries(inputs)) {
  feeds[name] = new ort.Tensor(type, BigInt64Array.from(data.map(BigInt)), dims);
}

const before = statusBytes("VmRSS");
let start = seconds();
const options = { intraOpNumThreads: 1, interOpNumThreads: 1, logSeverityLevel: 3 };
const session = await ort.InferenceSession.create(model, options);
const facts = { load_s: seconds() - start, peak_bytes: statusBytes("VmHWM") - before };
await session.run(feeds);
start = seconds();
const found = (await session.run(feeds))[session.outputNames[0]].data;
const run_s = seconds() - start;
let difference = 0;
let norm = 0;
wanted.data.forEach((value, i) => {
  difference += (found[i] - value) ** 2;
  norm += value ** 2;
});
const error = found.length === wanted.data.length ? Math.sqrt(difference / norm) : NaN;
console.log("RESULT " + JSON.stringify({ ...facts, run_s, error }));
