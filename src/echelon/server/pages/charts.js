// The charts of the dashboard: the data of each, drawn by plotly.js.
import { bytes, make, milliseconds, number, plural, root, seconds, tr } from "./common.js";

const COLOURS = ["#0077bb", "#d95f02", "#1b9e77", "#9a5fc4", "#e7298a", "#7f7f7f"]; // as in the tuning report
const MIN_SHOWN_S = 60;

const last = (column) => column.findLast((value) => value !== null) ?? null;

/** Lines over time. */
function lines(columns, { fill = false } = {}) {
  return (data) => {
    const x = data.columns.ends_at.map((end) => new Date(end * 1000));
    return Object.entries(columns).map(([name, column], place) => ({
      name,
      x,
      y: data.columns[column],
      mode: "lines+markers", // markers, so that a single point between gaps is visible
      marker: { size: 2.5 },
      line: { color: COLOURS[place], width: 1.75 },
      ...(fill ? { fill: "tozeroy", fillcolor: `${COLOURS[place]}26` } : {}),
    }));
  };
}

function bars(counts) {
  return (data) => {
    const found = data.window[counts];
    const powers = data.steps.powers;
    const first = found.findIndex(Boolean);
    const end = found.findLastIndex(Boolean) + 1;
    const x = powers.map((size, place) => label(size, powers[place - 1], place === powers.length - 1));
    return [{ type: "bar", x: x.slice(first, end), y: found.slice(first, end), marker: { color: COLOURS[0] } }];
  };
}

function label(size, before, isLast) {
  if (isLast) return `> ${number(before)}`;
  return size <= 2 ? number(size) : `≤ ${number(size)}`;
}

function againstPredicted(data) {
  const points = data.steps.recent.filter(([predicted, actual]) => predicted > 0 && actual > 0).map((point) => point.map((s) => s * 1000));
  const all = points.flat();
  const ends = all.length ? [Math.min(...all) / 1.3, Math.max(...all) * 1.3] : [];
  return [
    { name: tr("as predicted"), x: ends, y: ends, mode: "lines", line: { color: COLOURS[5], width: 1, dash: "dot" }, hoverinfo: "skip" },
    { name: tr("step"), x: points.map((point) => point[0]), y: points.map((point) => point[1]), mode: "markers", marker: { color: COLOURS[0], size: 5, opacity: 0.55 } },
  ];
}

function drift(data) {
  const [ratio, scale] = lines({ [tr("actual ÷ predicted")]: "drift", [tr("slowdown")]: "slowdown" })(data);
  return [ratio, { ...scale, yaxis: "y2" }];
}

function memory(data) {
  const x = data.columns.ends_at.map((end) => new Date(end * 1000));
  return data.workers.map((worker, place) => ({
    name: tr("worker {number}", { number: worker.worker }),
    x,
    y: data.columns.resident_bytes[place].map((value) => (value === null ? null : value / 2 ** 20)),
    mode: "lines",
    line: { color: COLOURS[place % COLOURS.length], width: 1.75 },
  }));
}

const minuteOf = (name) => (data) => `${number(data.minute[name])}/s`;
const TIME = { tickformat: "~s", ticksuffix: "s" };
const LOG = { type: "log", dtick: "D2", tickformat: "~g" };

const CHARTS = [
  { id: "documents", title: tr("Documents a second"), note: tr("Documents scored."), traces: lines({ [tr("documents/s")]: "documents_per_s" }, { fill: true }), now: minuteOf("documents_per_s") },
  { id: "requests", title: tr("Requests a second"), note: tr("Errors are answers of any status but 200."), traces: lines({ [tr("answered")]: "requests_per_s", [tr("errors")]: "errors_per_s" }), now: minuteOf("requests_per_s") },
  { id: "tokens", title: tr("Tokens a second"), note: tr("Tokens scored, padding not included."), traces: lines({ [tr("tokens/s")]: "tokens_per_s" }, { fill: true }), now: minuteOf("tokens_per_s") },
  {
    id: "latency", title: tr("Latency"), note: tr("From a request's headers to its answer, of requests answered with 200."),
    traces: lines({ P50: "p50_s", P95: "p95_s", P99: "p99_s" }), layout: { yaxis: TIME },
    now: (data) => `P95 ${seconds(data.minute.p95_s)}`,
  },
  { id: "waiting", title: tr("Waiting pairs"), note: tr("Pairs of a query and a document in the queue."), traces: lines({ [tr("waiting pairs")]: "waiting_pairs" }, { fill: true }), now: (data) => tr("{value} now", { value: number(data.now?.waiting_pairs) }) },
  {
    id: "backlog", title: tr("Age and backlog"), note: tr("Age of the oldest request in the queue; predicted time to score all pairs in it."),
    traces: lines({ [tr("oldest")]: "oldest_s", [tr("backlog")]: "backlog_s" }), layout: { yaxis: TIME }, now: (data) => tr("backlog {time}", { time: seconds(data.now?.backlog_s) }),
  },
  { id: "step-pairs", title: tr("Pairs of a step"), note: tr("Number of steps by pairs."), traces: bars("step_pairs"), layout: { xaxis: { type: "category" } }, now: steps },
  {
    id: "step-tokens", title: tr("Tokens of a step"), note: tr("Number of steps by tokens, padding included."), traces: bars("step_tokens"), layout: { xaxis: { type: "category" } },
    now: (data) => tr("budget {tokens}", { tokens: number(data.now?.token_budget) }),
  },
  {
    id: "predicted", title: tr("Step time"), note: tr("Milliseconds of the last 200 steps: predicted on the x axis, measured on the y axis; equal on the line."),
    traces: againstPredicted, layout: { xaxis: LOG, yaxis: LOG, hovermode: "closest", showlegend: false },
    now: (data) => (data.steps.recent.length ? tr("last {time}", { time: milliseconds(data.steps.recent.at(-1)[1] * 1000) }) : ""),
  },
  {
    id: "drift", title: tr("Drift"), note: tr("Left: measured over predicted time of steps; predictions are corrected by it. Right: step time over the normal step time of this machine."),
    traces: drift, layout: { yaxis2: { overlaying: "y", side: "right", showgrid: false, rangemode: "tozero", fixedrange: true, automargin: true, tickmode: "auto", nticks: 5 } }, now: (data) => `${number(data.now?.slowdown)} ×`,
  },
  {
    id: "memory", title: tr("Memory of workers"), note: tr("Resident memory of each worker's process."), traces: memory, layout: { yaxis: { ticksuffix: " MiB" } },
    now: (data) => tr("{size} in all", { size: bytes(data.workers.reduce((sum, worker) => sum + (worker.resident_bytes ?? 0), 0)) }),
  },
  { id: "budget", title: tr("Token budget"), note: tr("Maximum tokens of a step; it is lowered after an out-of-memory error."), traces: lines({ [tr("budget")]: "token_budget" }), now: (data) => tr("{value} now", { value: number(data.now?.token_budget) }) },
];

function steps(data) {
  return plural("{count} step", "{count} steps", data.window.step_pairs.reduce((sum, count) => sum + count, 0));
}

export function setUpCharts(parent) {
  for (const { id, title, note } of CHARTS) {
    const caption = note ? make("figcaption", {}, note) : null;
    const head = make("header", {}, make("h3", {}, title), make("span", { id: `${id}-now` }));
    parent.append(make("figure", {}, head, make("div", { class: "plot", id, role: "img" }), caption));
  }
}

/** Draw or redraw; until plotly.js is loaded, show the numbers only. */
export function draw(data) {
  for (const chart of CHARTS) {
    const words = chart.now(data);
    document.getElementById(`${chart.id}-now`).textContent = words;
    const plot = document.getElementById(chart.id);
    plot.setAttribute("aria-label", `${chart.title}: ${words}`);
    if (window.Plotly) window.Plotly.react(plot, ...figure(chart, data));
  }
}

function figure(chart, data) {
  const traces = chart.traces(data);
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true, fixedrange: true };
  const isEmpty = traces.every((trace) => trace.y.every((value) => value === null));
  const { xaxis = timeAxis(data), yaxis, ...rest } = chart.layout ?? {};
  const layout = {
    margin: { l: 8, r: 8, t: 6, b: 8 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { color: colour("--soft"), size: 11, family: getComputedStyle(document.body).fontFamily },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    showlegend: traces.length > 1,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, rangemode: "tozero", nticks: 5, ...yaxis },
    bargap: 0.15,
    annotations: isEmpty ? [{ text: tr("nothing measured yet"), showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }] : [],
    ...rest,
  };
  if (isEmpty) layout.yaxis = { ...layout.yaxis, showticklabels: false };
  return [traces, layout, { displayModeBar: false, responsive: true }];
}

/** The last ten minutes, or the time since the server's start. */
function timeAxis(data) {
  const from = Math.min(Math.max(data.since, data.at - 600), data.at - MIN_SHOWN_S);
  const tickformat = data.at - from > 240 ? "%H:%M" : "%H:%M:%S";
  return { type: "date", range: [new Date(from * 1000), new Date(data.at * 1000)], nticks: 5, tickformat, hoverformat: "%H:%M:%S" };
}

/** Load plotly.js from this server; without it the page shows numbers only. */
export function loadPlotly(version) {
  return new Promise((resolve, reject) => {
    const script = make("script", { src: `${root}/pages/plotly.js?v=${encodeURIComponent(version)}` });
    script.addEventListener("load", resolve);
    script.addEventListener("error", () => {
      script.remove();
      reject(new Error("plotly.js could not be loaded"));
    });
    document.head.append(script);
  });
}
