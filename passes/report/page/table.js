// The table of all tensors: sorted by any column, searched, a part at a time.

const STEP = 150;

function table(sites) {
  const columns = [
    ["name", (s) => s.name, false], ["uses", (s) => s.uses.join(" "), false], ["method", (s) => s.method, false],
    ["before", (s) => s.bytes_before, true], ["after", (s) => s.bytes_after, true],
    ["ratio", (s) => s.bytes_before / Math.max(1, s.bytes_after), true],
    ["weight error", (s) => s.weight_error ?? -1, true], ["output error", (s) => s.output_error ?? -1, true],
    ["why", why, false],
  ].filter(([name, value]) => !["weight error", "output error", "why"].includes(name) || sites.some((s) => value(s) !== -1 && value(s) !== ""));
  const has = new Set(columns.map((column) => column[0]));
  const state = { column: null, down: true, text: "", method: "", shown: STEP };
  const body = html("tbody"), count = html("p", { class: "small soft" });
  const more = html("button", { class: "more", type: "button", onclick: () => { state.shown += STEP; draw(); } }, "Show more");
  const heads = columns.map(([name, , number]) => html("th", { class: number ? "number" : null, scope: "col" },
    html("button", { type: "button", onclick: () => sort(name) }, name)));

  function sort(name) {
    state.down = state.column === name ? !state.down : columns.find((c) => c[0] === name)[2];
    state.column = name;
    heads.forEach((head, i) => {
      if (columns[i][0] === name) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    draw();
  }
  function chosen() {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const hay = (s) => [s.name, s.uses.join(" "), s.method, settings(s.params), s.mode, s.dtype, why(s)].join(" ").toLowerCase();
    const found = sites.filter((s) => (!state.method || s.method === state.method) && words.every((word) => hay(s).includes(word)));
    if (!state.column) return found;
    const value = columns.find((c) => c[0] === state.column)[1], sign = state.down ? -1 : 1;
    return found.sort((a, b) => sign * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
  }
  function draw() {
    const found = chosen(), part = found.slice(0, state.shown);
    body.replaceChildren(...part.map((site) => row(site, has)));
    more.hidden = found.length <= part.length;
    const sum = (key) => found.reduce((total, s) => total + s[key], 0);
    count.textContent = `${found.length} of ${sites.length} tensors, ${bytes(sum("bytes_before"))} → ${bytes(sum("bytes_after"))}`;
  }
  const search = html("input", { type: "search", placeholder: "Search names, operators, reasons", "aria-label": "Search",
    oninput: (event) => { state.text = event.target.value; state.shown = STEP; draw(); } });
  const names = [...new Set(sites.map((s) => s.method))];
  const filter = html("select", { "aria-label": "Method", onchange: (event) => { state.method = event.target.value; state.shown = STEP; draw(); } },
    html("option", { value: "" }, "all methods"), names.map((name) => html("option", { value: name }, name)));
  const order = html("select", { "aria-label": "Order", onchange: (event) => sort(event.target.value) },
    html("option", { value: "", disabled: "", selected: "" }, "in model order"), columns.map(([name]) => html("option", { value: name }, "by " + name)));
  draw();
  return section("Every tensor", mean > 0 ? `${mean.toFixed(1)} bits for each weight on average.` : null, html("div", { class: "tools" }, search, filter, order), count,
    html("div", { class: "scroll" }, html("table", { class: "cards sites" }, html("thead", {}, html("tr", {}, heads)), body)), more);
}

const bits = (site) => (8 * site.bytes_after) / Math.max(1, site.shape.reduce((product, size) => product * size, 1));

// Why a tensor is stored like this, or stays as it is.
const why = (site) => [site.reason, site.note].filter(Boolean).join("; ");

function row(site, has) {
  const swatch = html("i"), smaller = site.bytes_after < site.bytes_before;
  swatch.style.background = colour(site.method);
  const number = (label, text) => html("td", { class: "number", "data-label": label }, text);
  return html("tr", {},
    html("td", { class: "name" }, site.name, html("small", {}, `${site.shape.join(" × ") || "scalar"} ${site.dtype}`)),
    html("td", { "data-label": "uses" }, site.uses.length > 4 ? `${site.uses.slice(0, 3).join(", ")} and ${site.uses.length - 3} more` : site.uses.join(", ")),
    html("td", { class: "how" }, html("span", { class: "chip" }, swatch, site.method),
      html("small", {}, [settings(site.params), site.mode].filter(Boolean).join(", "))),
    number("before", bytes(site.bytes_before)),
    number("after", [bytes(site.bytes_after), smaller && html("small", {}, `${bits(site).toFixed(1)} bits each`)]),
    number("ratio", smaller ? times(site.bytes_before / site.bytes_after) : "1×"),
    has.has("weight error") && number("weight error", percent(site.weight_error)),
    has.has("output error") && number("output error", percent(site.output_error)),
    has.has("why") && html("td", { class: "why" }, why(site)));
}
