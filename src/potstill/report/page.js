"use strict";

// --- tables: a click on a column's head sorts by it, a second one the other way round

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = table.tBodies[0];
    const key = (row) => {
      const cell = row.cells[column];
      if (cell.classList.contains("missing")) return null;
      return cell.dataset.number === undefined ? cell.textContent : Number(cell.dataset.number);
    };
    const compare = (a, b) => {
      if (a === null || b === null) return (a === null) - (b === null); // missing ones last
      const order = typeof a === "number" && typeof b === "number"
        ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
      return descending ? -order : order;
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  }));
}

// --- plots: page.css says the colours, and each figure what is drawn

const figures = JSON.parse(document.getElementById("figures").textContent);
const shown = {}; // of each plot: its variant, whether its axis is logarithmic, hidden entries

function themed(place, layout, log) {
  const { color, backgroundColor, borderTopColor, fontFamily } = getComputedStyle(place);
  const axis = (given) => ({
    automargin: true, gridcolor: borderTopColor, linecolor: borderTopColor,
    zerolinecolor: borderTopColor, ...given,
  });
  return {
    ...layout,
    xaxis: axis(layout.xaxis),
    yaxis: { ...axis(layout.yaxis), ...(log ? { type: "log" } : {}) },
    paper_bgcolor: backgroundColor,
    plot_bgcolor: backgroundColor,
    font: { color, family: fontFamily, size: 13 },
    hoverlabel: { namelength: -1 },
    hovermode: "closest",
    margin: { l: 48, r: 12, t: 24, b: 44 },
    showlegend: false,
  };
}

function draw(key) {
  const place = document.querySelector(`[data-plot="${key}"]`);
  const { variant, log, hidden } = shown[key];
  const { data, layout } = figures[key].variants[variant];
  const traces = data.map((t) => ({ ...t, visible: !hidden.has(t.legendgroup) }));
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // none that sends data away
  };
  Plotly.react(place, traces, themed(place, layout, log), config);
}

function button(text, pressed, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  if (pressed !== null) made.setAttribute("aria-pressed", pressed);
  made.addEventListener("click", act);
  return made;
}

const DASHES = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3" };
const SYMBOLS = {
  circle: "M8.5 5a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
  square: "M8.5 1.5h7v7h-7z",
  diamond: "M12 .5l4.5 4.5-4.5 4.5-4.5-4.5z",
  "triangle-up": "M12 1l4.5 8h-9z",
  star: "M12 0l1.4 3.4 3.6.2-2.8 2.4.9 3.6-3.1-2-3.1 2 .9-3.6-2.8-2.4 3.6-.2z",
};

function sample(trace) { // of a trace, for the legend
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 10");
  svg.setAttribute("width", 24);
  svg.setAttribute("height", 10);
  svg.setAttribute("aria-hidden", true);
  const part = (attributes) => {
    const path = document.createElementNS(svg.namespaceURI, "path");
    Object.entries(attributes).forEach((pair) => path.setAttribute(...pair));
    svg.append(path);
  };
  const mode = trace.mode ?? "";
  if (mode.includes("lines")) {
    const pattern = { "stroke-width": 2.5, "stroke-dasharray": DASHES[trace.line.dash] ?? "" };
    part({ d: "M0 5H24", stroke: trace.meta, ...pattern });
  }
  const symbol = trace.type === "bar" ? "square" : mode.includes("markers") && trace.marker?.symbol;
  if (symbol) part({ d: SYMBOLS[symbol], fill: trace.meta });
  return svg;
}

function legend(key) {
  const { variant, hidden } = shown[key];
  const entries = new Map();
  for (const t of figures[key].variants[variant].data) {
    if (t.meta) entries.set(t.legendgroup, t); // a line comes after its band
  }
  const again = (change) => () => { change(); draw(key); legend(key); };
  const place = document.querySelector(`[data-legend="${key}"]`);
  const focused = [...place.children].indexOf(document.activeElement);
  const all = entries.size < 4 ? [] : [
    button("all", null, again(() => hidden.clear())),
    button("none", null, again(() => [...entries.keys()].forEach((name) => hidden.add(name)))),
  ];
  place.replaceChildren(...all, ...[...entries].map(([name, trace]) => {
    const made = button("", !hidden.has(name), again(() => hidden.delete(name) || hidden.add(name)));
    const text = document.createElement("span");
    text.textContent = name;
    made.append(sample(trace), text);
    return made;
  }));
  if (focused >= 0) place.children[focused].focus();
}

function controls(key) {
  const { log, variants } = figures[key];
  const state = shown[key];
  const place = document.querySelector(`[data-controls="${key}"]`);
  const show = (change) => { change(); draw(key); legend(key); controls(key); };
  const focused = [...place.children].indexOf(document.activeElement);
  const made = [];
  if (variants.length > 4) {
    const select = document.createElement("select");
    select.setAttribute("aria-label", "What is shown");
    variants.forEach(({ label }, i) => select.add(new Option(label, i, false, i === state.variant)));
    select.addEventListener("change", () => show(() => { state.variant = Number(select.value); }));
    made.push(select);
  } else if (variants.length > 1) {
    variants.forEach(({ label }, i) => made.push(
      button(label, i === state.variant, () => show(() => { state.variant = i; })),
    ));
  }
  if (log) made.push(button("log scale", state.log, () => show(() => { state.log = !state.log; })));
  place.replaceChildren(...made);
  if (focused >= 0) place.children[focused].focus();
}

for (const [key, { variants }] of Object.entries(figures)) {
  const off = variants.flatMap((v) => v.data).filter((t) => t.visible === false);
  shown[key] = { variant: 0, log: false, hidden: new Set(off.map((t) => t.legendgroup)) };
  controls(key);
  draw(key);
  legend(key);
}

// --- light and dark: the system's, until the button is used

const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const toggle = document.getElementById("theme");

function paint(theme) {
  if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
  const dark = theme ? theme === "dark" : system.matches;
  toggle.textContent = dark ? "Light" : "Dark";
  toggle.setAttribute("aria-label", `Show in ${dark ? "light" : "dark"} colours`);
  Object.keys(figures).forEach(draw);
}

let chosen = null;
toggle.addEventListener("click", () => {
  chosen = toggle.textContent.toLowerCase();
  paint(chosen);
});
system.addEventListener("change", () => paint(chosen));
addEventListener("beforeprint", () => paint("light"));
addEventListener("afterprint", () => paint(chosen));
paint(chosen);
