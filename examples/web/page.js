// Reads the address, runs the model, shows what came out, and hands it to `?report=` if asked to.

import { madeUp, open, run } from "./model.js";

const query = new URLSearchParams(location.search);
const state = document.getElementById("state");
const table = document.getElementById("facts");

function shapes() {
  const given = query.getAll("shape").map((text) => text.split(":"));
  return Object.fromEntries(given.map(([name, dims]) => [name, dims.split("x").map(Number)]));
}

function median(values) {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
}

function show(facts) {
  const rows = [
    ["downloaded", `${(facts.bytes / 1e6).toFixed(2)} MB`],
    ["download", `${facts.download_ms.toFixed(0)} ms`],
    ["load", `${facts.load_ms.toFixed(0)} ms`],
    ["first run", `${facts.first_ms.toFixed(1)} ms`],
    ["run, median", `${facts.run_ms.toFixed(1)} ms`],
  ];
  for (const [what, value] of rows) {
    const row = table.insertRow();
    row.insertCell().textContent = what;
    row.insertCell().textContent = value;
  }
}

async function main() {
  const { session, facts } = await open(query.get("model") ?? "model.onnx");
  const feeds = madeUp(session, shapes());
  const { outputs, times } = await run(session, feeds, Number(query.get("runs") ?? 10));
  const [name] = session.outputNames;
  const first = [...outputs[name].data.slice(0, 64)].map(Number);
  return { ...facts, first_ms: times[0], run_ms: median(times.slice(1)), output: first };
}

let found;
try {
  found = await main();
  show(found);
  state.textContent = "done";
} catch (error) {
  found = { failed: String(error) };
  state.textContent = found.failed;
}
if (query.has("report")) {
  await fetch(query.get("report"), { method: "POST", body: JSON.stringify(found) });
}
