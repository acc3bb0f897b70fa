// Treemaps, axes and points.

// Squarified treemap (Bruls, Huizing and van Wijk, 2000): `items` with a positive `size`, largest first.
function squarify(items, x, y, width, height) {
  const placed = [];
  let total = items.reduce((sum, item) => sum + item.size, 0);
  let rest = items.slice();
  while (rest.length) {
    const scale = (width * height) / total, side = Math.min(width, height);
    let count = 1, sum = rest[0].size, best = worst(rest, 1, sum, scale, side);
    while (count < rest.length) {
      const next = worst(rest, count + 1, sum + rest[count].size, scale, side);
      if (next > best) break;
      best = next; sum += rest[count].size; count += 1;
    }
    const thick = (sum * scale) / side;
    let along = 0;
    for (const item of rest.slice(0, count)) {
      const length = (item.size * scale) / thick;
      placed.push(width >= height
        ? { item, x, y: y + along, width: thick, height: length }
        : { item, x: x + along, y, width: length, height: thick });
      along += length;
    }
    if (width >= height) { x += thick; width -= thick; } else { y += thick; height -= thick; }
    total -= sum;
    rest = rest.slice(count);
  }
  return placed;
}
function worst(items, count, sum, scale, side) {
  const thick = (sum * scale) / side;
  let ratio = 1;
  for (let i = 0; i < count; i += 1) {
    const length = (items[i].size * scale) / thick;
    ratio = Math.max(ratio, length / thick, thick / length);
  }
  return ratio;
}

function treemap(items, name) {
  const shown = items.filter((item) => item.size > 0).sort((a, b) => b.size - a.size);
  return drawn(270, (width, height) => squarify(shown, 0, 0, width, height).map((cell) => {
    const room = Math.floor((cell.width - 10) / 6.6);
    const box = explain(svg("rect", {
      class: "mark", x: cell.x, y: cell.y, width: Math.max(0, cell.width), height: Math.max(0, cell.height), rx: 2,
      fill: colour(cell.item.method),
    }), `${cell.item.name}\n${bytes(cell.item.size)}, ${cell.item.words}`);
    const lines = room < Math.min(6, cell.item.name.length) || cell.height < 20 ? [] : [short(cell.item.name, room)], size = bytes(cell.item.size);
    if (lines.length && cell.height >= 36 && size.length <= room) lines.push(size);
    const kind = ["", "dense"].includes(cell.item.method) ? "inside quiet" : "inside";
    return [box, ...lines.map((line, row) => svg("text", { class: kind, x: cell.x + 5, y: cell.y + 15 + 15 * row }, line))];
  }));
}

function sizeBar(label, parts, whole) {
  const chart = drawn(20, (width) => {
    let x = 0;
    return parts.filter((part) => part.size > 0).map((part) => {
      const long = (width * part.size) / whole;
      const box = explain(svg("rect", { class: "mark", x, y: 0, width: Math.max(long, .5), height: 20, rx: 2, fill: colour(part.method) }),
        `${part.method || "graph and framing"}: ${bytes(part.size)}`);
      x += long;
      return box;
    });
  });
  return html("div", { class: "bar" }, html("span", {}, label), chart);
}

// Round numbers from `low` to `high`: 1, 2, 5 times powers of ten.
function roundNumbers(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) {
    found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  }
  return found;
}
function powers(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
    for (const digit of [1, 2, 5]) {
      const value = digit * 10 ** e;
      if (value >= low * .999 && value <= high * 1.001) found.push(value);
    }
  }
  return found;
}

function axis(values, log) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) { low /= 1.25; high *= 1.25; } else { const room = (high - low || Math.abs(high) || 1) * .08; low -= room; high += room; }
  const at = (value) => log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  let ticks = log ? powers(low, high) : roundNumbers(low, high, 5);
  if (log && ticks.length < 3) ticks = roundNumbers(low, high, 4);
  if (log && ticks.length > 7) ticks = ticks.filter((t) => Math.abs(Math.log10(t) - Math.round(Math.log10(t))) < 1e-9);
  return { at, ticks };
}

const tidy = (value) => Number(value.toPrecision(6));

// A frame with two axes; `draw(x, y)` gives what is in it, with functions from values to positions.
function plot({ xs, ys, logX, logY, xText, yText, xTitle, yTitle, height = 290 }, draw) {
  return drawn(height, (width) => {
    const left = 52, right = 12, top = 12, bottom = 42;
    const ax = axis(xs, logX), ay = axis(ys, logY);
    const x = (value) => left + ax.at(value) * (width - left - right);
    const y = (value) => height - bottom - ay.at(value) * (height - top - bottom);
    const room = Math.max(1, Math.ceil((ax.ticks.length * 58) / (width - left - right)));
    return [
      ay.ticks.map((t) => [
        svg("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }),
        svg("text", { class: "tick", x: left - 7, y: y(t) + 4, "text-anchor": "end" }, yText(tidy(t))),
      ]).flat(),
      ax.ticks.filter((_, index) => index % room === 0).map((t) => [
        svg("line", { class: "grid", x1: x(t), x2: x(t), y1: top, y2: height - bottom }),
        svg("text", { class: "tick", x: x(t), y: height - bottom + 17, "text-anchor": "middle" }, xText(tidy(t))),
      ]).flat(),
      svg("text", { class: "tick", x: width - right, y: height - 6, "text-anchor": "end" }, xTitle),
      svg("text", { class: "tick", x: left, y: top - 1 }, yTitle),
      ...draw(x, y, width),
    ].flat();
  });
}
const point = (x, y, size, fillColour, text) =>
  explain(svg("circle", { class: "mark", cx: x, cy: y, r: size, fill: fillColour, "fill-opacity": .85 }), text);
const line = (points, stroke, dash) => svg("polyline", {
  points: points.map((p) => p.join(",")).join(" "), fill: "none", stroke, "stroke-width": 1.5, "stroke-dasharray": dash,
});

function bars(rows, text) {
  const most = Math.max(...rows.map((row) => row.value));
  return rows.map((row) => html("div", { class: "bar" }, html("span", {}, row.name), drawn(20, (width) => {
    const long = Math.max(1, (row.value / most) * (width - 78));
    return [
      explain(svg("rect", { class: "mark", x: 0, y: 1, width: long, height: 18, rx: 2, fill: row.fill }), `${row.words}: ${text(row.value)}`),
      svg("text", { x: long + 6, y: 14 }, text(row.value)),
    ];
  })));
}
