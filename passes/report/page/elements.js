"use strict";
// Making elements and words. Text from models only ever becomes text nodes and attribute values.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}
const html = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]]) {
    if (Math.abs(count) >= size) return (count / size).toFixed(count < 10 * size ? 2 : 1) + " " + unit;
  }
  return Math.round(count) + " B";
}
function percent(share) {
  if (share === null || share === undefined) return "";
  const value = 100 * share;
  const digits = value >= 99.95 || value === 0 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toPrecision(2);
  return Number(digits) + " %";
}
const times = (ratio) => (ratio >= 100 ? Math.round(ratio) : ratio.toFixed(2)) + "×";
const decibels = (error) => -20 * Math.log10(error);
const short = (text, room) => (text.length <= room ? text : "…" + text.slice(1 - room));

// Methods in the order of the bytes they take care of get the colours in their order.
const COLOURS = new Map([["dense", "var(--dense)"], ["", "var(--other)"]]);
function colour(method) {
  if (!COLOURS.has(method)) COLOURS.set(method, `var(--m${(COLOURS.size - 2) % 7})`);
  return COLOURS.get(method);
}
const settings = (params) => Object.entries(params).map(([k, v]) => `${k}=${v}`).join(" ");
function legend(names) {
  const words = (name) => name || "graph and framing";
  return html("ul", { class: "legend" }, names.map((name) => {
    const swatch = html("i");
    swatch.style.background = colour(name);
    return html("li", {}, swatch, words(name));
  }));
}

const hint = html("div", { id: "hint", role: "status" });
function explain(element, text) {
  const show = (event) => {
    hint.textContent = text;
    const room = [innerWidth - hint.offsetWidth - 8, innerHeight - hint.offsetHeight - 8];
    hint.style.left = Math.max(8, Math.min(event.clientX + 14, room[0])) + "px";
    hint.style.top = Math.max(8, Math.min(event.clientY + 14, room[1])) + "px";
    hint.style.visibility = "visible";
  };
  element.addEventListener("pointermove", show);
  element.addEventListener("pointerdown", show);
  element.addEventListener("pointerleave", () => { hint.style.visibility = "hidden"; });
  element.append(svg("title", {}, text));
  return element;
}

function section(title, note, ...children) {
  return html("section", {}, html("h2", {}, title), note && html("p", { class: "soft small" }, note), ...children);
}

// Charts are drawn for the width they have: when all are in the page, and again when it changes.
const charts = [];
function drawn(height, draw) {
  const chart = svg("svg", { class: "chart", height });
  let last = 0;
  const again = () => {
    const width = Math.round(chart.getBoundingClientRect().width);
    if (!width || width === last) return;
    last = width;
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.replaceChildren(...draw(width, height).flat().filter(Boolean));
  };
  charts.push(again);
  new ResizeObserver(again).observe(chart);
  return chart;
}
