// Loads a model, compressed or not, and runs it. Sizes in bytes, times in milliseconds.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
ort.env.logLevel = "error";

const ARRAYS = {
  float32: Float32Array,
  int32: Int32Array,
  int64: BigInt64Array,
  uint8: Uint8Array,
  bool: Uint8Array,
};

/** Downloads a model and opens a session. */
export async function open(url) {
  let start = performance.now();
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  const content = new Uint8Array(await response.arrayBuffer());
  const facts = { bytes: content.byteLength, download_ms: performance.now() - start };
  start = performance.now();
  const session = await ort.InferenceSession.create(content, { executionProviders: ["wasm"] });
  return { session, facts: { ...facts, load_ms: performance.now() - start } };
}

/** Inputs of ones; dimensions without a size get that of `shapes`, or 1. */
export function madeUp(session, shapes = {}) {
  const feeds = {};
  for (const { name, type, shape } of session.inputMetadata) {
    const dims = shapes[name] ?? shape.map((size) => (typeof size === "number" ? size : 1));
    const count = dims.reduce((product, size) => product * size, 1);
    const data = new ARRAYS[type](count).fill(type === "int64" ? 1n : 1);
    feeds[name] = new ort.Tensor(type, data, dims);
  }
  return feeds;
}

/** Runs a session several times: the outputs of the last run, and each run's time. */
export async function run(session, feeds, runs = 10) {
  const times = [];
  let outputs = {};
  for (let count = 0; count < runs; count += 1) {
    const start = performance.now();
    outputs = await session.run(feeds);
    times.push(performance.now() - start);
  }
  return { outputs, times };
}
