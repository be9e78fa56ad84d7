// The dashboard: asks for the last ten minutes again and again, and shows them; outlives the server.
import { $, ask, askForKey, asksForKeys, bytes, hasKey, keyField, make, number, seconds, showModel, themeButton, watchReadiness, wordsOf } from "./common.js";
import { draw, loadPlotly, setUpCharts } from "./charts.js";

const FASTEST_MS = 1000;
const PATIENCE_MS = 8000;
const NEWS_MS = 30000; // so long a restart is told

let period = 2000;
let data = null;
let awaySince = null;
let plotly = null;
let timer = 0;
let turn = 0;

async function look() {
  if (document.hidden) return; // goes on when it is looked at again
  if (asksForKeys && !hasKey()) {
    wantKey("This server asks for an API key.");
    return; // goes on when one was entered
  }
  const mine = ++turn;
  try {
    const response = await ask("/dashboard/data", { signal: AbortSignal.timeout(PATIENCE_MS) });
    const told = response.ok ? await response.json() : await wordsOf(response);
    if (mine !== turn) return; // asked again meanwhile, with another key perhaps: this one is old
    if (response.ok) take(told);
    else refused(response.status, told);
  } catch {
    if (mine !== turn) return;
    away();
  }
  clearTimeout(timer);
  timer = setTimeout(look, period);
}

function take(fresh) {
  const restarted = data !== null && data.since !== fresh.since;
  if (restarted) news(`The server was started anew at ${clock(fresh.since)}; what was before is gone.`);
  else if (awaySince !== null) news(`The server answers again; it did not from ${clock(awaySince)} on.`);
  awaySince = null;
  data = fresh;
  period = Math.max(FASTEST_MS, fresh.slice_s * 1000);
  $("trouble").hidden = true;
  $("board").classList.remove("stale");
  show();
  plotly ??= loadPlotly(document.documentElement.dataset.plotly).then(show, () => (plotly = null));
}

function refused(status, said) {
  const words = `${status} · ${said}`;
  if (status === 401) wantKey(words);
  else trouble(words);
}

/** Say it, and go to the field once: not again and again while someone reads. */
function wantKey(words) {
  if ($("trouble").hidden || $("trouble").textContent !== words) askForKey();
  trouble(words);
}

function away() {
  awaySince ??= Date.now() / 1000;
  trouble(`The server does not answer since ${clock(awaySince)}. Asking again every ${number(period / 1000)} s; what is shown is what it said last.`);
}

function trouble(words) {
  if ($("trouble").textContent !== words) $("trouble").textContent = words; // said once, not every second
  $("trouble").hidden = false;
  $("restarted").hidden = true;
  $("board").classList.add("stale");
}

function news(words) {
  $("restarted").textContent = words;
  $("restarted").hidden = false;
  setTimeout(() => ($("restarted").hidden = true), NEWS_MS);
}

const clock = (unix) => new Date(unix * 1000).toLocaleTimeString("en-GB");

function show() {
  if (data === null) return;
  showAbout();
  showTiles();
  showKinds();
  showWorkers();
  showEvents();
  draw(data);
}

function showAbout() {
  const { scorer, version, since, minute, now } = data;
  $("updated").textContent = `Updated ${clock(data.at)} · rates and latency over the last ${number(minute.seconds)} s`;
  const what = scorer ? `${scorer.family} on ${scorer.device} in ${scorer.precision}` : "no scorer yet";
  const remarks = [
    `Echelon ${version}, ${what}, running since ${clock(since)}`,
    now?.fallback && "reads low priority shorter",
    now?.drifted && `steps take ${number(now.slowdown)} times as long as is normal here: find what else runs or throttles the machine, or measure again with "echelon tune --refresh"`,
    now?.draining && "takes nothing more in",
  ];
  $("about").textContent = `${remarks.filter(Boolean).join("; ")}.`;
}

function showTiles() {
  const { minute, now } = data;
  const rows = [
    ["Documents/s", number(minute.documents_per_s)],
    ["Requests/s", number(minute.requests_per_s)],
    ["Tokens/s", number(minute.tokens_per_s)],
    ["Errors/s", number(minute.errors_per_s)],
    ["Latency P50", seconds(minute.p50_s)],
    ["Latency P95", seconds(minute.p95_s)],
    ["Latency P99", seconds(minute.p99_s)],
    ["Slowdown", now ? `${number(now.slowdown)} ×` : "–"],
    ["Waiting pairs", number(now?.waiting_pairs)],
    ["Oldest", seconds(now?.oldest_s)],
    ["Backlog", seconds(now?.backlog_s)],
    ["Token budget", number(now?.token_budget)],
  ];
  $("tiles").replaceChildren(...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", { class: "value" }, value))));
}

const TOLD = {
  http: (name) => (name === "200" ? "answered: 200" : name === "499" ? "client went away: 499" : `answered: ${name}`),
  refused: (name) => `refused: ${words(name)}`,
  limited: () => "over a key's limit",
  connection: (name) => `connection refused: ${words(name)}`,
  outcome: (name) => `taken in, ${words(name)}`,
  step: () => "step scored again",
  truncated: () => "documents that were cut",
  fallback: () => "low priority, read shorter",
  ladder: (name) => `memory ladder: ${words(name)}`,
  worker: (name) => `worker ${words(name)}`,
};
const QUIET = new Set(["worker starting", "worker up", "taken in, answered"]);

const words = (name) => name.replaceAll("_", " ");

/** All that was counted, but what the tiles and the table of workers say already. */
function showKinds() {
  const rows = [];
  for (const [kind, tell] of Object.entries(TOLD)) {
    for (const [name, count] of Object.entries(data.window.counts[kind] ?? {})) {
      if (QUIET.has(tell(name))) continue;
      rows.push([tell(name), number(data.minute.counts[kind]?.[name] ?? 0), number(count)]);
    }
  }
  if (!rows.length) rows.push(["nothing yet", "", ""]);
  $("kinds").replaceChildren(...rows.map(([kind, ...counts]) => make("tr", {}, make("td", {}, kind), ...counts.map((count) => make("td", { class: "number" }, count)))));
}

function showWorkers() {
  const rows = data.workers.map((worker) => {
    const state = make("td", {}, make("span", { class: worker.name === "up" ? "ok" : "trouble" }, worker.name));
    if (worker.words) state.append(make("span", { class: "detail" }, worker.words));
    return make("tr", {}, make("td", {}, String(worker.worker)), state, make("td", {}, clock(worker.at)), make("td", { class: "number" }, bytes(worker.resident_bytes)));
  });
  $("workers").replaceChildren(...rows);
}

function showEvents() {
  const items = data.events.map((event) => {
    const what = event.kind === "ladder" ? `memory ladder on worker ${event.worker}: ${words(event.name)}` : `worker ${event.worker}: ${event.name}`;
    return make("li", {}, make("time", {}, clock(event.at)), make("span", {}, what, event.words ? make("span", { class: "detail" }, event.words) : null));
  });
  $("events").replaceChildren(...items);
}

setUpCharts($("charts"));
keyField(look);
themeButton(() => data && draw(data));
watchReadiness();
showModel();
document.addEventListener("visibilitychange", () => document.hidden || look());
look();
