"use strict";
// Building blocks of all figures. Text from data goes into text nodes and attributes only, never into markup.

const SVG = "http://www.w3.org/2000/svg";

const append = (node, ...children) => node.append(...children.filter((child) => child !== null && child !== undefined));
function build(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--") || key === "width%") node.style.setProperty(key === "width%" ? "width" : key, key === "width%" ? value + "%" : value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  append(node, ...children);
  return node;
}
const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

const canvas = (width, height, attributes, ...children) =>
  s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, ...attributes }, ...children);
const defined = (values) => values.filter((value) => value !== null && value !== undefined);
const shown = (value, digits = 1) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const signed = (value, digits = 1) => (value > 0 ? "+" : value < 0 ? "−" : "±") + Math.abs(value).toFixed(digits);
const cut = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
const middle = (text, most) => (text.length > most ? text.slice(0, Math.ceil((most - 1) / 2)) + "…" + text.slice(text.length - Math.floor((most - 1) / 2)) : text);

// Names for the left side of a chart of this width: without their middle if they would take more than a third of it.
function sideOf(names, width, widest = 200) {
  const longest = Math.max(...names.map((name) => name.length));
  let most = Math.max(7, Math.min(longest, Math.floor((Math.min(widest, width / 3) - 14) / 6.9)));
  while (most < longest && new Set(names.map((name) => middle(name, most))).size < new Set(names).size) most += 1;
  return { side: 14 + 6.9 * Math.min(most, longest), shown: names.map((name) => middle(name, most)) };
}
// Width for a chart in this element; paper has its own.
const PAPER = 680;
let printing = false;
const widthOf = (element, share = 1) => Math.max(280, (printing ? PAPER * share : element?.clientWidth) || 1080);

// Round numbers from 0 to at least `top`, four or five of them.
function ticks(top) {
  if (!(top > 0)) return [0, 1];
  const power = 10 ** Math.floor(Math.log10(top / 4));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => top / candidate <= 4.001);
  return Array.from({ length: Math.ceil(top / step - 1e-9) + 1 }, (_, index) => +(index * step).toPrecision(6));
}

const tip = document.getElementById("tip");
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 6)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + "px";
}
const hideTip = () => { tip.hidden = true; };
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

// The mark of the model with style `index`. Shape and colour both differ, so either is enough to distinguish models.
function mark(index, x, y, size = 4.5) {
  const kind = index < 0 ? "m-plain" : `m${index % 8}`;
  const forms = [
    [[-1, 0], [0, -1], [1, 0], [0, 1]].map(([a, b]) => [a * 1.3, b * 1.3]), [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
    [[0, -1.2], [1.15, 0.9], [-1.15, 0.9]], [[0, 1.2], [1.15, -0.9], [-1.15, -0.9]],
  ];
  if (index === -1) return s("circle", { class: `mark open ${kind}`, cx: x, cy: y, r: size - 0.5 });
  if (index < 0) return s("path", { class: `model ${kind}`, d: `M${x - size} ${y}H${x + size}M${x} ${y - size}V${y + size}` });
  if (index % 5 === 0) return s("circle", { class: `mark ${kind}`, cx: x, cy: y, r: size + 0.6 });
  const points = forms[(index % 5) - 1].map(([a, b]) => `${x + a * size},${y + b * size}`).join(" ");
  return s("polygon", { class: `mark ${kind}`, points });
}
const DASHES = [null, "7 3", "2 3", "9 3 2 3", "5 2 1 2 1 2"];
const dash = (index) => DASHES[index % 5];

function legend(models, withLines) {
  const entry = ({ name, index }) => h("li", {}, canvas(30, 14, { "aria-hidden": "true" },
    withLines ? s("path", { class: `model m${index % 8}`, d: "M1 7H29", "stroke-dasharray": dash(index) }) : null,
    withLines ? null : mark(index, 15, 7)), h("span", { text: name }));
  return h("ul", { class: "legend", "aria-label": "legend" }, ...models.map(entry));
}

// A table of texts with a thicker rule above the row `first`.
function table(head, body, { caption, first = -1, kind = "" } = {}) {
  const line = (cells, index) => h("tr", { class: index === first ? "first" : null },
    ...cells.map((cell, column) => column === 0 ? h("th", { scope: "row", text: cell })
      : h("td", { class: /\*$/.test(cell) ? "best" : null, text: cell })));
  return h("div", { class: "wide" }, h("table", { class: kind }, caption ? h("caption", { text: caption }) : null,
    h("thead", {}, h("tr", {}, ...head.map((text) => h("th", { scope: "col", text })))), h("tbody", {}, ...body.map(line))));
}
// The numbers of a figure as a table, for screen readers and for copying; filled when it is opened.
function asTable(what, make) {
  const details = h("details", { class: "table" }, h("summary", { text: `${what} as a table` }));
  const fill = () => { details.querySelector(".wide")?.remove(); if (details.open) details.append(make()); };
  details.addEventListener("toggle", fill);
  return Object.assign(details, { fill });
}

function select(name, options, value, change) {
  const box = h("select", { onchange: (event) => change(+event.target.value) },
    ...options.map((text, index) => h("option", { value: index, text, selected: index === value })));
  return h("label", {}, h("span", { text: name }), box);
}

// A heat map. `at(line, column)` returns null or {value, text, fresh}, `describe(line, column)` the text of a cell. Values
// are from 0 to 1, or from -1 to 1 around a neutral colour if `around` is set.
// Cells are selected with the mouse, or with the arrow keys when the map has the focus.
function heatMap({ label, lines, columns, at, describe, across, slanted = false, around = false, share = 1 }) {
  const figure = h("figure"), map = h("div", { class: "heat", tabindex: 0, role: "group" }), status = h("p", { class: "readout soft", role: "status" });
  map.setAttribute("aria-roledescription", "heat map");
  figure.append(h("div", { class: "wide" }, map), status);
  const selected = { line: 0, column: 0 };
  let side, above, width, height, cursor;

  function draw() {
    const room = widthOf(figure.parentElement, share) - 8, names = sideOf(lines, room), slantedNames = sideOf(columns, room, 150).shown;
    const reach = Math.max(...slantedNames.map((name) => name.length)), over = slanted ? 4.9 * reach : 8;
    side = names.side;
    width = Math.max(slanted ? 18 : 9, Math.min(64, (room - side - over) / columns.length));
    height = lines.length > 20 ? 15 : 22;
    above = slanted ? 14 + 5.1 * reach : 36;
    const wide = side + width * columns.length + over, tall = above + height * lines.length + 4;
    const every = slanted ? Math.ceil(13 / width) : [1, 2, 5, 10, 20, 50].find((step) => step * width >= 22) || 100;
    const svg = canvas(wide, tall, { role: "img", "aria-label": label });
    svg.append(s("rect", { class: "ground", x: side, y: above, width: width * columns.length, height: height * lines.length }));
    if (!slanted) svg.append(s("text", { x: side, y: 13, text: across }));
    columns.forEach((name, column) => {
      if (column % every) return;
      const x = side + (column + 0.5) * width;
      svg.append(slanted ? s("text", { x: x - 2, y: above - 7, transform: `rotate(-45 ${x - 2} ${above - 7})`, text: slantedNames[column] })
        : s("text", { x, y: above - 6, "text-anchor": "middle", text: name }));
    });
    lines.forEach((_, line) => {
      const y = above + line * height;
      svg.append(s("text", { class: "name", x: side - 8, y: y + height / 2 + 4, "text-anchor": "end", text: names.shown[line] }));
      if (line) svg.append(s("rect", { class: "stripe", x: side, y: y - 0.5, width: width * columns.length, height: 1 }));
      columns.forEach((_, column) => {
        const cell = at(line, column), gap = width > 9 ? 1 : 0.4;
        if (!cell) return;
        const box = { x: side + column * width + gap, y: y + 1, width: width - 2 * gap, height: height - 2, rx: width > 9 ? 2 : 0 };
        svg.append(s("rect", { class: `cell${around ? (cell.value < 0 ? " below" : " above") : ""}`, ...box, "--p": Math.round(100 * Math.min(1, Math.abs(cell.value))) }));
        if (cell.text && width > 21) svg.append(s("text", { class: cell.value > 0.5 ? "on-strong" : "on-weak", x: box.x + box.width / 2, y: y + height / 2 + 4, "text-anchor": "middle", text: cell.text }));
        if (cell.fresh) svg.append(s("rect", width > 12 ? { class: "new", ...box } : { class: "new small", ...box, y: y + height - 4, height: 3 }));
      });
    });
    cursor = s("rect", { class: "cursor", visibility: "hidden", width: width + 1, height: height + 1 });
    svg.append(cursor);
    map.replaceChildren(svg);
    map.setAttribute("aria-label", `${label}. Use the arrow keys to move between cells.`);
    status.textContent = "Point at a cell, or use Tab and the arrow keys, to see its values.";
  }
  function pick(line, column, x, y) {
    Object.assign(selected, { line, column });
    cursor.setAttribute("x", side + column * width - 0.5);
    cursor.setAttribute("y", above + line * height - 0.5);
    cursor.setAttribute("visibility", "visible");
    status.textContent = describe(line, column);
    if (x === undefined) {
      const box = cursor.getBoundingClientRect();
      [x, y] = [box.right, box.top];
    }
    showTip(status.textContent, x, y);
  }
  const leave = () => { cursor.setAttribute("visibility", "hidden"); hideTip(); };
  map.addEventListener("mousemove", (event) => {
    const box = map.querySelector("svg").getBoundingClientRect(), zoom = map.querySelector("svg").viewBox.baseVal.width / box.width;
    const column = Math.floor(((event.clientX - box.left) * zoom - side) / width), line = Math.floor(((event.clientY - box.top) * zoom - above) / height);
    if (line >= 0 && line < lines.length && column >= 0 && column < columns.length) pick(line, column, event.clientX, event.clientY);
    else leave();
  });
  map.addEventListener("mouseleave", leave);
  map.addEventListener("blur", leave);
  map.addEventListener("focus", () => { if (map.matches(":focus-visible")) pick(selected.line, selected.column); });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0], Home: [0, -1e6], End: [0, 1e6] }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    pick(Math.max(0, Math.min(lines.length - 1, selected.line + step[0])), Math.max(0, Math.min(columns.length - 1, selected.column + step[1])));
  });
  return Object.assign(figure, { draw });
}
