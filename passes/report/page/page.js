// The sections of the report, from the JSON of `onnxcomp optimize`.

const result = JSON.parse(document.getElementById("result").textContent);
const sites = result.sites;
const encoded = sites.filter((site) => site.bytes_after < site.bytes_before);
const weights = encoded.reduce((sum, site) => sum + site.shape.reduce((product, size) => product * size, 1), 0);
const mean = weights ? (8 * encoded.reduce((sum, site) => sum + site.bytes_after, 0)) / weights : 0;
const file = (path) => (path || "model in memory").split(/[\\/]/).pop();
const all = (key) => sites.reduce((sum, site) => sum + site[key], 0);
const methods = [...new Set(sites.map((site) => site.method))]
  .sort((a, b) => bytesOf(b, "bytes_before") - bytesOf(a, "bytes_before"));
function bytesOf(method, key) {
  return sites.reduce((sum, site) => sum + (site.method === method ? site[key] : 0), 0);
}
methods.forEach(colour);

function head() {
  const figures = [
    [bytes(result.output.bytes), `from ${bytes(result.input.bytes)}`],
    [times(result.ratio), "smaller", result.target && (result.target.met ? ["good", "target met"] : ["bad", "target MISSED"])],
    [percent(result.coverage), "of weight bytes compressed"],
  ];
  if (result.verify) {
    const outputs = [...Object.values(result.verify.outputs), ...Object.values(result.verify.before_decisions || {})]
      .filter((o) => o.rel_l2 !== null && o.agreement === undefined);
    const most = Math.max(0, ...outputs.map((o) => Math.max(o.rel_l2, o.worst_slice ? o.worst_slice.rel_l2 : 0)));
    figures.push([outputs.length ? percent(most) : "–", "largest relative difference of an output or a part of one", most > 0.5 && ["bad"]]);
    const passed = result.verify.passed;
    const judged = result.evaluation || (result.verify.tolerance !== null && result.verify.tolerance !== undefined);
    const word = !passed ? "FAILED" : judged ? "verified" : "runs; loss not judged";
    figures.push([word, "with the library and without", [!passed ? "bad" : judged ? "good" : "warn"]]);
    const again = result.verify.detections;
    if (again && again.reference) figures.push([`${again.found} of ${again.reference}`, `detections found again at IoU ${again.iou}`]);
  } else figures.push(["not verified", "the result was not run", ["warn"]]);
  if (result.evaluation) {
    const score = (value) => (value === null ? "–" : String(Number(value.toPrecision(4)))), { dense, compressed, passed } = result.evaluation;
    figures.push([score(compressed), `score by --eval, ${score(dense)} before`, passed ? ["good", "close enough"] : ["bad", "dropped too far"]]);
  }
  if (result.speed) {
    const { slowdown, max_slowdown, passed } = result.speed;
    figures.push([times(slowdown), `the time of a run, ${times(max_slowdown)} allowed`, passed ? ["good", "fast enough"] : ["bad", "too slow"]]);
  }
  return html("header", {},
    html("h1", {}, file(result.output.path || result.input.path)),
    html("p", { class: "soft small" }, `made from ${file(result.input.path)} by onnxcomp ${result.versions.onnxcomp || ""}`),
    html("br"),
    html("div", { class: "figures" }, figures.map(([big, small, mark]) => html("div", { class: "figure" },
      html("b", { class: mark && mark.length === 1 ? mark[0] : null }, big), html("span", {}, small),
      mark && mark.length > 1 && html("span", { class: mark[0] }, ", " + mark[1])))));
}

function sizes() {
  const rest = { before: result.input.bytes - all("bytes_before"), after: result.output.bytes - all("bytes_after") };
  const parts = (key) => [...methods.map((method) => ({ method, size: bytesOf(method, key === "before" ? "bytes_before" : "bytes_after") })),
    { method: "", size: rest[key] }];
  const items = (key) => {
    const own = `bytes_${key}`, least = .002 * (key === "before" ? result.input.bytes : result.output.bytes);
    const large = sites.filter((site) => site[own] >= least), small = sites.filter((site) => site[own] < least);
    const found = large.map((site) => ({
      name: site.name, size: site[own], method: site.method,
      words: key === "before" ? `${site.shape.join(" × ")} ${site.dtype}` : `${site.method} ${settings(site.params)}`,
    }));
    const sum = small.reduce((total, site) => total + site[own], 0);
    if (small.length) found.push({ name: `${small.length} small`, size: sum, method: "dense", words: "tensors of less than 0.2 % each" });
    const cut = key === "before" && result.prune;
    found.push({ name: cut ? "graph and what was pruned" : "graph", size: rest[key], method: "", words: "nodes, functions, names and shared tensors" });
    return found;
  };
  return section("Size", "Bars are to scale; each map fills its frame. A rectangle is a tensor, coloured by the method that stores it.",
    sizeBar("before", parts("before"), result.input.bytes), sizeBar("after", parts("after"), result.input.bytes), html("br"),
    html("div", { class: "maps" },
      html("div", {}, html("p", { class: "small soft" }, `before: ${bytes(result.input.bytes)}`), treemap(items("before"))),
      html("div", {}, html("p", { class: "small soft" }, `after: ${bytes(result.output.bytes)}`), treemap(items("after")))),
    legend([...methods, ""]));
}

const errorOf = (site) => site.output_error ?? site.weight_error;
function describe(site) {
  const error = site.output_error !== null ? "error of its products" : "error of the weight";
  return `${site.name}\n${site.method} ${settings(site.params)}\n${bytes(site.bytes_before)} → ${bytes(site.bytes_after)}, ` +
    `${error} ${percent(errorOf(site))}`;
}

function ratios() {
  const shown = encoded.filter((site) => errorOf(site) > 0);
  if (!shown.length) return null;
  const most = Math.max(...shown.map((site) => site.bytes_before));
  return section("Ratio against error", "One mark for each weight; the area is its size before.",
    plot({
      xs: shown.map((s) => s.bytes_before / s.bytes_after), ys: shown.map((s) => 100 * errorOf(s)), logX: true, logY: true,
      xText: (v) => v + "×", yText: (v) => v + " %", xTitle: "times smaller", yTitle: "relative error",
    }, (x, y) => shown.slice().sort((a, b) => b.bytes_before - a.bytes_before).map((site) =>
      point(x(site.bytes_before / site.bytes_after), y(100 * errorOf(site)), 3 + 9 * Math.sqrt(site.bytes_before / most), colour(site.method), describe(site)))),
    legend([...new Set(shown.map((s) => s.method))]));
}

function network() {
  const shown = encoded.filter((site) => site.weight_error > 0);
  if (!shown.length) return null;
  const measured = shown.filter((site) => site.output_error > 0);
  const values = [...shown.map((s) => decibels(s.weight_error)), ...measured.map((s) => decibels(s.output_error))];
  const index = new Map(shown.map((site, number) => [site, number + 1]));
  return section("Signal-to-noise ratio of every weight",
    "Weights in the order of the file, higher is better." + (measured.length ? " Filled: its products on held-out inputs; rings: the weight itself." : ""),
    plot({
      xs: [1, Math.max(2, shown.length)], ys: values, xText: String, yText: (v) => v + " dB", xTitle: "weight", yTitle: "",
    }, (x, y) => [
      line(shown.map((s) => [x(index.get(s)), y(decibels(s.weight_error))]), "var(--line)"),
      ...shown.map((s) => {
        const mark = point(x(index.get(s)), y(decibels(s.weight_error)), 4, measured.length ? "var(--card)" : colour(s.method),
          `${describe(s)}\n${decibels(s.weight_error).toFixed(1)} dB of the weight`);
        if (measured.length) mark.style.stroke = colour(s.method);
        return mark;
      }),
      ...measured.map((s) => point(x(index.get(s)), y(decibels(s.output_error)), 4, colour(s.method),
        `${describe(s)}\n${decibels(s.output_error).toFixed(1)} dB of its products`)),
    ]));
}

function frontier() {
  const points = (result.frontier || []).filter((p) => (p.error ?? p.weight_error) > 0 && p.bytes > 0);
  if (points.length < 2) return null;
  const error = (p) => p.error ?? p.weight_error, mixed = points.filter((p) => !p.setting), equal = points.filter((p) => p.setting);
  const words = (p) => `${p.setting || "mixed settings"}\n${bytes(p.bytes)} (${times(p.ratio)}), expected error ${percent(error(p))}`;
  const low = 100 * Math.min(...points.map(error)), high = 100 * Math.max(...points.map(error));
  return section("What could be had", "Plans from small to large with their expected error: the line mixes settings, dots give all weights the same. The dashed line is this model.",
    plot({
      xs: [...points.map((p) => p.bytes), result.output.bytes], ys: [low, high], logX: true, logY: true,
      xText: bytes, yText: (v) => v + " %", xTitle: "size", yTitle: "expected error",
    }, (x, y) => [
      line([[x(result.output.bytes), y(low)], [x(result.output.bytes), y(high)]], "var(--soft)", "4 4"),
      line(mixed.slice().sort((a, b) => a.bytes - b.bytes).map((p) => [x(p.bytes), y(100 * error(p))]), "var(--accent)"),
      ...mixed.map((p) => point(x(p.bytes), y(100 * error(p)), 3, "var(--accent)", words(p))),
      ...equal.map((p) => point(x(p.bytes), y(100 * error(p)), 5, "var(--m2)", words(p))),
    ]));
}

function pruned() {
  const prune = result.prune;
  if (!prune || !prune.groups.length) return null;
  const count = (value) => value.toLocaleString("en"), { before, after } = prune;
  const rows = prune.groups.map((group) => html("tr", {}, html("td", { class: "name" }, group.name), html("td", {}, group.kind),
    html("td", { class: "number", "data-label": "before" }, count(group.before)), html("td", { class: "number", "data-label": "after" }, count(group.after))));
  return section("Pruned", `${percent(prune.reached)} of the ${prune.unit} went. Parameters ${count(before.parameters)} → ${count(after.parameters)}, ` +
    `FLOPs ${count(before.flops)} → ${count(after.flops)}. Scores: ${prune.score}.`,
    html("details", {}, html("summary", {}, `${rows.length} groups of channels`), html("table", { class: "cards" },
      html("thead", {}, html("tr", {}, ["made by", "kind", "before", "after"].map((name, i) => html("th", { class: i > 1 ? "number" : null }, name)))),
      html("tbody", {}, rows))));
}

function spectra() {
  const shown = sites.filter((site) => Array.isArray(site.spectrum) && site.spectrum.some(([, v]) => v > 0));
  if (!shown.length) return null;
  const scaled = shown.map((site) => ({ site, values: site.spectrum.filter(([, v]) => v > 1e-6) }));
  return section("Spectra", "Singular values of weights, the largest set to 1; the mark is the rank that was chosen.",
    plot({
      xs: [1, Math.max(2, ...scaled.map((s) => s.values.at(-1)[0]))], ys: scaled.flatMap((s) => s.values.map(([, v]) => v)), logX: true, logY: true,
      xText: String, yText: String, xTitle: "number of the value", yTitle: "relative to the largest",
    }, (x, y) => scaled.flatMap(({ site, values }) => {
      const rank = site.params.rank || 0, after = values.findIndex(([n]) => n >= rank);
      const mark = () => {
        const [n1, v1] = values[after], [n0, v0] = values[Math.max(0, after - 1)];
        const part = n1 === n0 ? 0 : Math.log(rank / n0) / Math.log(n1 / n0);
        return point(x(rank), y(v0 * (v1 / v0) ** part), 5, colour(site.method), `${site.name}\nrank ${rank} of ${Math.min(...site.shape)}`);
      };
      return [line(values.map(([n, v]) => [x(n), y(v)]), colour(site.method)), rank && after >= 0 ? mark() : null];
    })));
}

function outputs() {
  if (!result.verify) return null;
  const number = (value, digits) => (value === null || value === undefined ? "–" : Number(value.toPrecision(digits)).toString());
  const classes = Object.values(result.verify.outputs).some((o) => o.label_agreement !== undefined);
  const slices = Object.values(result.verify.outputs).some((o) => o.worst_slice);
  const worst = (slice) => {
    if (!slice) return "–";
    const first = slice.indices[0], last = slice.indices[slice.indices.length - 1];
    return `${percent(slice.rel_l2)} (axis ${slice.axis}: ${first === last ? first : first + "–" + last})`;
  };
  const rows = Object.entries(result.verify.outputs).map(([name, o]) => {
    const portable = (result.verify.portable && result.verify.portable.outputs[name]) || {};
    return html("tr", {}, html("td", { class: "name" }, name),
      html("td", { class: "number", "data-label": "difference" }, percent(o.rel_l2) || "–"),
      html("td", { class: "number", "data-label": "without library" }, percent(portable.rel_l2) || "–"),
      html("td", { class: "number", "data-label": "SNR" }, o.snr_db === null ? "exact" : o.snr_db.toFixed(1) + " dB"),
      html("td", { class: "number", "data-label": "cosine" }, number(o.cosine, 6)),
      html("td", { class: "number", "data-label": "largest difference" }, number(o.max_abs, 3)),
      slices && html("td", { class: "number", "data-label": "worst part" }, worst(o.worst_slice)),
      classes && html("td", { class: "number", "data-label": "same class" }, percent(o.label_agreement)));
  });
  const heads = ["output", "difference", "without library", "SNR", "cosine", "largest difference", ...(slices ? ["worst part"] : []), ...(classes ? ["same class"] : [])];
  return section("Outputs against the original", `Relative L2 difference over ${result.config && result.config.data ? "the given inputs" : "made-up inputs; real ones may differ less or more"}, with the operator library and without.`,
    html("div", { class: "scroll" }, html("table", { class: "cards" },
      html("thead", {}, html("tr", {}, heads.map((name, i) => html("th", { class: i ? "number" : null }, name)))), html("tbody", {}, rows))));
}

function speed() {
  const models = (result.bench || []).filter((model) => model.median_ms > 0);
  if (!models.length) return null;
  const rows = (key) => models.map((m, i) => ({
    name: i ? (m.form === "portable" ? "portable" : "compressed") : "original", value: m[key], words: `${file(m.path)} (${m.form || "model"})`,
    fill: i ? (m.form === "portable" ? "var(--m1)" : "var(--m0)") : "var(--dense)",
  }));
  const ms = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(3)) + " ms";
  return html("div", { class: "two" },
    section("Latency", "Median time of a run.", bars(rows("median_ms"), ms)),
    section("Memory", "Of a process with one session, after runs.", bars(rows("rss_bytes"), bytes)));
}

function facts() {
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const list = (values) => html("dl", {}, Object.entries(values).flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, text(value))]));
  return section("The run", null,
    html("details", {}, html("summary", {}, "files"), list({
      input: result.input.path || "model in memory", "input sha256": result.input.sha256 || "–",
      output: result.output.files.join(", ") || "none", "output sha256": result.output.sha256 || "–",
    })),
    html("details", {}, html("summary", {}, "settings in effect"), list(result.config)),
    html("details", {}, html("summary", {}, "seconds, memory and versions"), list({
      ...result.seconds, "peak memory": bytes(result.peak_rss_bytes), ...result.versions,
    })));
}

document.getElementById("page").replaceChildren(...[
  head(), sizes(),
  [ratios(), network()].every(Boolean) ? html("div", { class: "two" }, ratios(), network()) : ratios() || network(),
  frontier(), pruned(), spectra(), speed(), outputs(), table(sites), facts(), hint,
].filter(Boolean));
charts.forEach((draw) => draw());
