// The sections of the page in their order. A section without data is left out.

const data = JSON.parse(document.getElementById("content").textContent);
const main = document.getElementById("main");
const redraws = [];
const styleIndex = (label) => (data.models.includes(label) ? data.models.length - 1 - data.models.indexOf(label) : label === "base" ? -1 : -2);
const marked = (label) => (data.unfinished.includes(label) ? `${label} (not finished)` : label);
const legendOf = (labels, withLines) => legend(labels.map((name) => ({ name: marked(name), index: styleIndex(name) })), withLines);
const short = (name) => data.short[name] ?? name;

// The selections of the reader survive the reloads of a live page.
const store = `fedamole ${document.title}`;
let chosen = {};
try { chosen = (data.live && JSON.parse(sessionStorage.getItem(store))) || {}; } catch { /* no session storage */ }
function choose(key, value) {
  chosen[key] = value;
  try { if (data.live) sessionStorage.setItem(store, JSON.stringify(chosen)); } catch { /* no session storage */ }
}
const recalled = (key, fallback, count) => (Number.isInteger(chosen[key]) && chosen[key] < count ? chosen[key] : fallback);

function heading(key, level, ...more) {
  const [title, sentence] = data.titles[key];
  return [h(level, { text: title }), h("p", { class: "see", text: sentence }), ...more];
}
function section(key, ...content) {
  main.append(h("section", { id: key }, ...heading(key, "h2"), ...content));
}

function opening() {
  const count = data.clients.length, rounds = data.learning?.rounds;
  append(document.getElementById("top"),
    h("h1", { text: data.title }),
    data.verdict ? h("p", { class: "verdict", text: data.verdict }) : null,
    h("p", { class: "soft", text: `${count} client${count === 1 ? "" : "s"}` + (rounds ? `, ${rounds} round${rounds === 1 ? "" : "s"}` : "") + ". " + [summary(), data.shortened].filter(Boolean).join(" ") }),
    ...data.states.map(([mark, text]) => h("p", { class: "state" }, h("strong", { text: mark }), `: ${text}`)),
    data.live ? follow() : null,
    h("details", {}, h("summary", { text: "Glossary" }),
      h("dl", {}, ...data.glossary.flatMap(([word, text]) => [h("dt", { text: word }), h("dd", { text })]))),
    h("nav", { "aria-label": "figures" }, ...Object.keys(data.titles).filter((key) => document.getElementById(key))
      .map((key) => h("a", { href: `#${key}`, text: data.titles[key][0] }))));
  document.getElementById("bottom").append(`Written by fedamole ${data.version} from the files of the runs. This page loads nothing from other places.`);
}
function summary() {
  if (!data.test) return "";
  const mean = (label) => Object.values(data.test.marks[label]).reduce((sum, value) => sum + value, 0) / data.test.clients.length;
  const means = Object.keys(data.test.marks).map((label) => [mean(label), label]).sort((one, other) => other[0] - one[0]);
  return "Mean test score: " + means.map(([value, label]) => `${label} ${value.toFixed(1)}`).join(", ") + ".";
}
function follow() {
  const button = h("button", { type: "button", text: "Stop reloading" });
  let timer = setTimeout(() => location.reload(), 1000 * data.live);
  button.addEventListener("click", () => {
    if (timer === null) return location.reload();
    clearTimeout(timer);
    timer = null;
    button.textContent = "Resume reloading";
  });
  return h("p", { class: "state" }, `This page follows the run and reloads itself every ${data.live} seconds. `, button);
}

function about() {
  const { head, lines } = data.about, same = head.length > 1;
  const row = ([name, values]) => h("tr", {}, h("th", { scope: "row", text: name }),
    ...(same && values.every((value) => value === values[0]) ? [h("td", { colspan: values.length, text: values[0] })]
      : values.map((text) => h("td", { text: text || "–" }))));
  section("about", h("div", { class: "wide" }, h("table", { class: "words" },
    h("thead", {}, h("tr", {}, h("td", {}), ...head.map((text) => h("th", { scope: "col", text: marked(text) })))), h("tbody", {}, ...lines.map(row)))));
}

const MEASURES = { loss: "validation loss, in nats per answer token: lower is better", score: "validation score, 0 to 100: higher is better" };

function learning() {
  const { measures, rounds, lines, before } = data.learning;
  const panels = h("div", { class: `panels${data.clients.length > 16 ? " many" : ""}` });
  const state = { measure: 0, same: false };
  const scored = data.clients.filter((name) => lines.some((line) => Object.values(line.values).some((values) => defined(values[name]).length)));
  const names = scored.length > 1 ? ["", ...scored] : scored;
  const labels = data.models.filter((_, model) => lines.some((line) => line.model === model));

  function panel(name, key, most) {
    const many = data.clients.length > 16, width = many ? 168 : 230, height = many ? 112 : 130, left = 34, right = 10, over = 24, under = 20;
    const steps = ticks(most), x = (round) => left + (rounds > 1 ? round / (rounds - 1) : 0.5) * (width - left - right);
    const y = (value) => over + (1 - value / steps.at(-1)) * (height - over - under);
    const title = name || (many ? "mean" : "mean of all clients");
    const svg = canvas(width, height, { role: "img", "aria-label": `${title}: ${MEASURES[key]}` }, s("text", { class: "title", x: left, y: 13, text: middle(name ? short(name) : title, many ? 18 : 26) }));
    for (const value of steps) svg.append(s("path", { class: "axis", d: `M${left} ${y(value)}H${width - right}` }), s("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end", text: value }));
    const every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => rounds / step <= 7) || 1000;
    for (let round = 0; round < rounds; round += every) svg.append(s("text", { x: x(round), y: height - 5, "text-anchor": "middle", text: round }));
    for (const { model, values } of lines) {
      const points = values[key]?.[name]?.map((value, round) => (value === null ? null : [x(round), y(Math.min(value, steps.at(-1) * 1.02))])) || [];
      const present = defined(points), index = styleIndex(data.models[model]);
      svg.append(s("path", { class: `model m${index % 8}`, "stroke-dasharray": dash(index), d: present.map((point, step) => (step ? "L" : "M") + point.map((v) => v.toFixed(1)).join(" ")).join("") }));
      if (present.length === 1 || rounds <= 12) present.forEach(([a, b]) => svg.append(s("circle", { class: `mark m${index % 8}`, cx: a, cy: b, r: 2.6 })));
    }
    svg.addEventListener("mousemove", (event) => {
      const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width * width - left) / (width - left - right);
      const round = Math.max(0, Math.min(rounds - 1, Math.round(at * (rounds - 1))));
      const texts = lines.map(({ model, seed, values }) => `${data.models[model]}${several ? `, seed ${seed}` : ""}: ${shown(values[key]?.[name]?.[round], key === "loss" ? 3 : 1)}`);
      const base = key === "loss" && name in before ? `\nuntuned base: ${shown(before[name], 3)}` : "";
      showTip(`${title}, round ${round}\n${texts.join("\n")}${base}`, event.clientX, event.clientY);
    });
    svg.addEventListener("mouseleave", hideTip);
    return svg;
  }
  const several = new Set(lines.map((line) => line.seed)).size > 1;
  const highest = (key, name) => Math.max(0, ...lines.flatMap((line) => defined(line.values[key]?.[name] || [])));
  function draw() {
    const key = measures[state.measure];
    const most = Math.max(...names.map((name) => highest(key, name)));
    panels.replaceChildren(...names.map((name) => panel(name, key, state.same ? most : highest(key, name))));
    unit.textContent = `x: round, from 0. y: ${MEASURES[key]}.` + (key === "loss" ? " The loss of the untuned base is in the table." : "");
    numbers.fill();
  }
  const unit = h("figcaption");
  const numbers = asTable("Values", () => {
    const key = measures[state.measure], digits = key === "loss" ? 3 : 1;
    const body = names.flatMap((name) => lines.map(({ model, seed, values }) => [name || "mean of all clients", data.models[model] + (several ? `, seed ${seed}` : ""),
      key === "loss" && name in before ? shown(before[name], digits) : "", ...(values[key]?.[name] || []).map((value) => shown(value, digits))]));
    return table(["client", "method", "untuned base", ...Array.from({ length: rounds }, (_, round) => `round ${round}`)], body);
  });
  const same = h("input", { type: "checkbox", onchange: (event) => { state.same = event.target.checked; draw(); } });
  section("learning", h("div", { class: "controls" },
    measures.length > 1 ? select("measure", measures.map((key) => `validation ${key}`), 0, (value) => { state.measure = value; draw(); }) : null,
    names.length > 1 ? h("label", {}, same, h("span", { text: "same scale in all panels" })) : null), legendOf(labels, true), h("figure", {}, panels, unit), numbers);
  draw();
}

function test() {
  const { head, body, clients, seeds, marks } = data.test, labels = Object.keys(marks);
  const box = h("div");
  redraws.push(() => {
    const width = widthOf(box), { side, shown: names } = sideOf(clients.map(short), width), step = clients.length > 20 ? 17 : 28, over = 22;
    const size = step < 20 ? 3.2 : 4.2;
    const x = (value) => side + value / 100 * (width - side - 16), tall = over + clients.length * step + 6;
    const svg = canvas(width, tall, { role: "img", "aria-label": data.titles.test[0] });
    for (let value = 0; value <= 100; value += 20) svg.append(s("path", { class: "axis", d: `M${x(value)} ${over}V${tall - 4}` }), s("text", { x: x(value), y: 13, "text-anchor": "middle", text: value }));
    clients.forEach((name, line) => {
      const y = over + (line + 0.5) * step, values = labels.map((label) => marks[label][name]);
      svg.append(s("text", { class: "name", x: side - 10, y: y + 4, "text-anchor": "end", text: names[line] }),
        s("path", { class: "axis", d: `M${x(Math.min(...values))} ${y}H${x(Math.max(...values))}` }),
        ...apart(labels.map((label) => [x(marks[label][name]), styleIndex(label)]), 2 * size).map(([across, aside, index]) => mark(index, across, y + aside * size, size)));
      const scores = labels.map((label) => [marks[label][name], label]).sort((one, other) => other[0] - one[0]).map(([value, label]) => `${label}: ${value.toFixed(1)}`);
      svg.append(s("rect", { x: 0, y: y - step / 2, width, height: step, opacity: 0,
        onmousemove: (event) => showTip(`${name}\n${scores.join("\n")}`, event.clientX, event.clientY), onmouseleave: hideTip }));
    });
    box.replaceChildren(svg);
  });
  const caption = `Test score, 0 to 100, at the best validation round (seed ${seeds.join(", ")}): accuracy, ROUGE-L for free text, or preference for pairs of answers.`;
  section("test", legendOf(labels, false), h("figure", {}, box, h("figcaption", { text: caption })),
    h("h3", { text: "Table of scores" }), h("p", { class: "soft", text: data.test.caption }), table(head, body, { first: clients.length }));
}

// Shift marks that overlap vertically: [x, index] becomes [x, vertical steps, index].
function apart(marks, near) {
  const groups = [];
  for (const point of marks.sort((a, b) => a[0] - b[0])) {
    if (groups.length && point[0] - groups.at(-1).at(-1)[0] < near * 0.6) groups.at(-1).push(point);
    else groups.push([point]);
  }
  return groups.flatMap((group) => group.map(([x, index], step) => [x, (step - (group.length - 1) / 2) * Math.min(1.7, 5 / group.length), index]));
}

function gain() {
  const box = h("div", { class: "wide" }), references = data.gain.map((one) => one.reference);
  const clients = data.test.clients;
  function draw(which) {
    choose("reference", which);
    const { reference, columns } = data.gain[which];
    const most = Math.max(1, ...columns.flatMap((column) => Object.values(column.clients).map(Math.abs)));
    const line = (name, format) => h("tr", {}, h("th", { scope: "row", text: name }), ...columns.map((column) => h("td", { text: format(column) })));
    const cell = (name, { other, clients: found }) => name in found ? h("td", { "data-client": true, text: signed(found[name]), title: `${name}: ${reference} ${signed(found[name])} against ${other}`,
      class: found[name] > 0 ? "better" : found[name] < 0 ? "worse" : null, "--much": Math.round(8 + 52 * Math.abs(found[name]) / most) }) : h("td", { text: "–" });
    const rows = clients.map((name) => h("tr", {}, h("th", { scope: "row", text: name }), ...columns.map((column) => cell(name, column))));
    const after = [line("mean", (column) => signed(column.mean)), line("95 % interval of the mean", (column) => column.low === null ? "–" : `${signed(column.low)} to ${signed(column.high)}`),
      line("better / equal / worse", (column) => `${column.wins} / ${column.ties} / ${column.pairs - column.wins - column.ties}`), line("Wilcoxon p (clients)", (column) => shown(column.p_clients, 3))];
    after[0].className = "first";
    box.replaceChildren(h("table", { class: "gains" }, h("caption", { text: `Test score of ${reference} minus that of the method of the column` }), h("thead", {}, h("tr", {}, h("th", { scope: "col", text: "client" }),
      ...columns.map(({ other }) => h("th", { scope: "col", text: other })))), h("tbody", {}, ...rows, ...after)));
  }
  section("gain", h("div", { class: "controls" }, references.length > 1 ? select("gain of", references, recalled("reference", references.length - 1, references.length), draw) : null), box,
    h("p", { class: "soft", text: "Wilcoxon p: two-sided signed-rank test over the clients, each averaged over its seeds. Clients of one federation are not independent samples, so the interval and p are optimistic. Neither applies to other data." }));
  draw(recalled("reference", references.length - 1, references.length));
}

// Module and round are selected once for the three heat maps of the assignment.
function experts() {
  const box = h("div"), runs = data.experts;
  const which = recalled("run", 0, runs.length);
  section("experts", runs.length > 1 ? h("div", { class: "controls" }, select("run", runs.map((run) => run.label), which, (value) => { choose("run", value); assignment(box, runs[value]); })) : null, box);
  redraws.push(() => box.maps?.forEach((map) => map.draw()));
  assignment(box, runs[which]);
}
function assignment(box, run) {
  const { clients } = data, last = run.rounds.length - 1;
  const state = { module: recalled("module", 0, run.modules.length), round: recalled("round", last, last + 1) };
  const pairs = (round, module, client) => Object.fromEntries(Array.from({ length: run.held[round][module][client].length / 2 }, (_, step) =>
    [run.held[round][module][client][2 * step], run.held[round][module][client][2 * step + 1] / 10000]));
  const held = (round) => run.modules.map((_, module) => clients.map((_, client) => pairs(round, module, client)));
  const before = () => (state.round > 0 ? held(state.round - 1)[state.module] : null);
  const { scale } = run, clamp = (value) => Math.max(-1, Math.min(1, value));
  const random = () => scale.random && (run.always_random || run.rounds[state.round] === 0);
  const tone = (value) => random() ? 0 : clamp(scale.times ? Math.log(value / scale.even) / Math.log(scale.times) : (value - scale.even) / (scale.high - scale.even));
  let now, old, shares;
  const here = (client) => now[state.module][client], count = (client, module) => Object.keys(now[module][client]).length;
  const others = (expert, client) => clients.filter((_, other) => other !== client && expert in here(other));
  const fresh = (expert, client) => old !== null && !(expert in old[client]);
  const common = (one, other) => now.reduce((sum, found) => sum + Object.keys(found[one]).filter((expert) => expert in found[other]).length, 0);
  const together = () => clients.map((_, one) => clients.map((_, other) => (one === other ? null : common(one, other))));
  const most = Math.max(1, ...run.held.flat(2).map((found) => found.length / 2));

  const maps = [
    heatMap({
      label: data.titles.experts[0], lines: clients.map(short), around: true, columns: Array.from({ length: run.experts }, (_, expert) => String(expert)), across: "expert",
      at: (client, expert) => (expert in here(client) ? { value: tone(here(client)[expert]), fresh: fresh(expert, client) } : null),
      describe: (client, expert) => {
        const relevance = here(client)[expert], with_ = others(expert, client).join(", ") || "no other client";
        if (relevance === undefined) return `${clients[client]} does not hold expert ${expert}; holders: ${others(expert, client).join(", ") || "none"}.`;
        return `${clients[client]} holds expert ${expert}, ${scale.name} = ${relevance.toFixed(4)}; shared with ${with_}${fresh(expert, client) ? "; new in this round" : ""}.`;
      },
    }),
    heatMap({
      label: data.titles.sizes[0], lines: clients.map(short), columns: run.modules, slanted: true, share: 0.5,
      at: (client, module) => ({ value: count(client, module) / most, text: count(client, module) }),
      describe: (client, module) => `${clients[client]} holds ${count(client, module)} experts in ${run.modules[module]}.`,
    }),
    heatMap({
      label: data.titles.shared[0], lines: clients.map(short), columns: clients.map(short), slanted: true, share: 0.5,
      at: (one, other) => (shares[one][other] ? { value: shares[one][other] / Math.max(1, ...shares.flat()), text: shares[one][other] } : null),
      describe: (one, other) => one === other ? `${clients[one]} and itself.` : `${clients[one]} and ${clients[other]} share ${shares[one][other]} experts, over all modules.`,
    }),
  ];
  const slider = h("input", { type: "range", min: 0, max: last, value: state.round, "aria-label": "round", oninput: (event) => go(+event.target.value) });
  const where = h("output"), onPaper = h("p", { class: "print-only" }), note = h("p", { class: "soft", role: "status" });
  const step = (text, label, by) => h("button", { type: "button", text, "aria-label": label, onclick: () => go(state.round + by) });
  const back = step("‹", "previous round", -1), on = step("›", "next round", 1);
  const numbers = asTable("Assignment", () => table(["client", `experts (${scale.name})`], clients.map((name, client) =>
    [name, Object.entries(here(client)).map(([expert, relevance]) => `${expert} (${relevance.toFixed(4)})`).join(", ")])));
  const sizes = asTable("Counts", () => table(["client", ...run.modules], clients.map((name, client) => [name, ...run.modules.map((_, module) => String(count(client, module)))])));
  const sharing = asTable("Pairs", () => table(["client", ...clients], clients.map((name, one) => [name, ...shares[one].map((count) => (count === null ? "" : String(count)))])));
  function go(round, module = state.module) {
    Object.assign(state, { round: Math.max(0, Math.min(last, round)), module });
    choose("round", state.round === last ? null : state.round);
    choose("module", module);
    [now, old] = [held(state.round), before()];
    shares = together();
    slider.value = state.round;
    where.textContent = `round ${run.rounds[state.round]} of ${run.rounds[0]} to ${run.rounds[last]}`;
    onPaper.textContent = `${run.label}, ${run.modules[state.module]}, round ${run.rounds[state.round]}`;
    note.textContent = random() ? data.random : "";
    [back.disabled, on.disabled] = [state.round === 0, state.round === last];
    maps.forEach((map) => map.draw());
    [numbers, sizes, sharing].forEach((one) => one.fill());
  }
  const piece = (text) => h("span", { text }), below = scale.even > 0 ? [piece(`≤ ${scale.low.toFixed(3)}`), h("span", { class: "scale from-below" })] : [];
  const keys = h("ul", { class: "legend" }, h("li", {}, piece(`${scale.name}:`)), h("li", {}, ...below, piece(`${scale.even.toFixed(3)} (${scale.meaning})`), h("span", { class: "scale from-even" }),
    piece(`${scale.high < 1 ? "≥ " : ""}${scale.high.toFixed(3)}`)), h("li", {}, h("span", { class: "boxed" }), piece("new in this round")));
  box.replaceChildren(h("div", { class: "controls" }, run.modules.length > 1 ? select("module", run.modules, state.module, (value) => go(state.round, value)) : null,
    h("label", {}, h("span", { text: "round" }), back, slider, on), where), onPaper, note, keys, maps[0], numbers,
  h("div", { class: "pair" }, h("div", { id: "sizes" }, ...heading("sizes", "h3"), maps[1], sizes), ...(clients.length > 1 ? [h("div", { id: "shared" }, ...heading("shared", "h3"), maps[2], sharing)] : [])));
  box.maps = maps;
  go(state.round);
}

function routing() {
  const box = h("div"), runs = data.routing;
  const show = (which, module = 0) => {
    const run = runs[which], shares = run.shares[module], of = (line, column) => shares[run.clients[line]]?.[run.experts[column]];
    const map = heatMap({
      label: data.titles.routing[0], lines: run.clients.map(short), columns: run.experts, across: "expert",
      at: (line, column) => (of(line, column) === undefined ? null : { value: of(line, column), text: Math.round(100 * of(line, column)) }),
      describe: (line, column) => of(line, column) === undefined ? `${run.clients[line]} does not hold expert ${run.experts[column]}.`
        : `${run.clients[line]} routes ${(100 * of(line, column)).toFixed(1)} % of its tokens to expert ${run.experts[column]}.`,
    });
    box.replaceChildren(h("div", { class: "controls" }, runs.length > 1 ? select("run", runs.map((one) => one.label), which, (value) => show(value)) : null,
      run.modules.length > 1 ? select("module", run.modules, module, (value) => show(which, value)) : null), h("p", { class: "print-only", text: `${run.label}, ${run.modules[module]}` }),
    h("ul", { class: "legend" }, h("li", {}, "from 0 %", h("span", { class: "scale" }), "to 100 % of the client's tokens")), map,
    asTable("Shares", () => table(["client", "experts"], run.clients.map((name) => [name, run.experts.filter((expert) => shares[name]?.[expert] !== undefined).map((expert) => `${expert} (${(100 * shares[name][expert]).toFixed(1)} %)`).join(", ")]))));
    box.map = map;
    map.draw();
  };
  section("routing", box);
  redraws.push(() => box.map.draw());
  show(0);
}

// Stacked bars, one per client; `relative` gives all bars the same length.
function bars(key, head, lines, pieces, relative) {
  const box = h("div"), totals = lines.map(([, , counts]) => counts.reduce((sum, count) => sum + count, 0));
  const names = lines.map(([name, source]) => (source ? `${short(name)} (${source})` : short(name)));
  const kind = (piece) => (pieces.length > 4 ? `var(--m${piece % 8})` : `var(--split${piece})`);
  redraws.push(() => {
    const width = widthOf(box), { side, shown: texts } = sideOf(names, width, 260), step = lines.length > 20 ? 17 : 24;
    const most = relative ? 1 : Math.max(...totals), svg = canvas(width, lines.length * step + 4, { role: "img", "aria-label": data.titles[key][0] });
    lines.forEach(([name, , counts], line) => {
      let x = side;
      const y = line * step + 3, about = counts.map((count, piece) => `${pieces[piece]}: ${count}`).join("\n");
      svg.append(s("text", { class: "name", x: side - 10, y: y + step / 2, "text-anchor": "end", text: texts[line] }));
      counts.forEach((count, piece) => {
        const wide = count / (relative ? totals[line] || 1 : most) * (width - side - 60);
        svg.append(s("rect", { class: "piece", x, y, width: Math.max(0, wide - (count ? 0.8 : 0)), height: step - 6, "--c": kind(piece), fill: kind(piece) }));
        x += wide;
      });
      svg.append(s("text", { x: x + 6, y: y + step / 2, text: totals[line] }), s("rect", { x: 0, y: y - 3, width, height: step, opacity: 0,
        onmousemove: (event) => showTip(`${name}\n${about}`, event.clientX, event.clientY), onmouseleave: hideTip }));
    });
    box.replaceChildren(svg);
  });
  section(key, h("ul", { class: "legend" }, ...pieces.map((text, piece) => h("li", {}, h("span", { class: "swatch", "--c": kind(piece) }), text))), h("figure", {}, box),
    asTable("Counts", () => table([...head, ...pieces], lines.map(([name, source, counts]) => [name, ...(head.length > 1 ? [source] : []), ...counts.map(String)]))));
}

function costs() {
  const { columns, lines } = data.costs, most = columns.map((_, column) => Math.max(...lines.map(([, values]) => values[column])));
  const cell = (text, value, column) => h("td", {}, text, h("span", { class: "bar", "aria-hidden": "true", "width%": most[column] ? 100 * value / most[column] : 0 }));
  section("costs", h("div", { class: "wide" }, h("table", { class: "costs" }, h("thead", {}, h("tr", {}, h("th", { scope: "col", text: "method" }), ...columns.map((text) => h("th", { scope: "col", text })))),
    h("tbody", {}, ...lines.map(([label, values, texts]) => h("tr", {}, h("th", { scope: "row", text: label }), ...texts.map((text, column) => cell(text, values[column], column))))))),
  h("p", { class: "soft", text: "Methods that are scored in the same run share its costs. On a CPU, the memory is the peak of the whole process." }));
}

if (data.about) about();
if (data.learning) learning();
if (data.test) test();
if (data.gain?.length) gain();
if (data.experts) experts();
if (data.routing) routing();
if (data.data) bars("data", data.data.sources ? ["client", "source"] : ["client"], data.data.lines.map(([name, source, counts]) => [name, data.data.sources ? source : "", counts]), data.data.splits, false);
if (data.labels) bars("labels", ["client"], data.labels.lines.map(([name, counts]) => [name, "", counts]), data.labels.labels, true);
if (data.audits?.length) section("audits", table(["run", "client", "epsilon claimed", "epsilon at least", "AUROC own model", "AUROC other models", "tokens found", "tokens by chance"], data.audits, { kind: "words" }));
if (data.costs) costs();
if (data.failed) section("failed", table(["run", "round", "client", "reason"], data.failed.map((line) => line.map(String)), { kind: "words" }));
opening();
const redraw = () => redraws.forEach((draw) => draw());
redraw();
// Paper has another width: figures are drawn for it, and tables that do not fit are made smaller.
function zoom(table) {
  table.classList.add("measured"); // with the font and the cells of paper
  table.style.zoom = Math.min(1, PAPER / table.offsetWidth);
  table.classList.remove("measured");
}
addEventListener("beforeprint", () => {
  document.querySelector("header details").open = true;
  printing = true;
  redraw();
  document.querySelectorAll(".wide > table").forEach(zoom);
});
addEventListener("afterprint", () => {
  printing = false;
  redraw();
  document.querySelectorAll(".wide > table").forEach((table) => { table.style.zoom = ""; });
});
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 150); });
