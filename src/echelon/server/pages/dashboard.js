// The dashboard: loads the data of the last ten minutes every two seconds and shows it.
import { $, ask, askForKey, asksForKeys, bytes, hasKey, keyField, make, number, seconds, showModel, themeButton, watchReadiness, wordsOf } from "./common.js";
import { draw, loadPlotly, setUpCharts } from "./charts.js";

const FASTEST_MS = 1000;
const TIMEOUT_MS = 8000;
const NOTICE_MS = 30000; // a restart is shown this long

let period = 2000;
let data = null;
let awaySince = null;
let plotly = null;
let timer = 0;
let turn = 0;

async function look() {
  if (document.hidden) return; // continues when the page is visible again
  if (asksForKeys && !hasKey()) {
    wantKey("This server needs an API key.");
    return; // continues after a key was entered
  }
  const mine = ++turn;
  try {
    const response = await ask("/dashboard/data", { signal: AbortSignal.timeout(TIMEOUT_MS) });
    const found = response.ok ? await response.json() : await wordsOf(response);
    if (mine !== turn) return; // a newer request was sent meanwhile, perhaps with another key
    if (response.ok) take(found);
    else refused(response.status, found);
  } catch {
    if (mine !== turn) return;
    away();
  }
  clearTimeout(timer);
  timer = setTimeout(look, period);
}

function take(fresh) {
  const restarted = data !== null && data.since !== fresh.since;
  if (restarted) notice(`The server was restarted at ${clock(fresh.since)}; earlier data is lost.`);
  else if (awaySince !== null) notice(`The server answers again, after no answer since ${clock(awaySince)}.`);
  awaySince = null;
  data = fresh;
  period = Math.max(FASTEST_MS, fresh.slice_s * 1000);
  $("trouble").hidden = true;
  $("content").classList.remove("stale");
  show();
  plotly ??= loadPlotly(document.documentElement.dataset.plotly).then(show, () => (plotly = null));
}

function refused(status, message) {
  const words = `${status} · ${message}`;
  if (status === 401) wantKey(words);
  else trouble(words);
}

/** Show a message, and move the focus to the key field once, not with every request. */
function wantKey(words) {
  if ($("trouble").hidden || $("trouble").textContent !== words) askForKey();
  trouble(words);
}

function away() {
  awaySince ??= Date.now() / 1000;
  trouble(`The server does not answer since ${clock(awaySince)}. Trying again every ${number(period / 1000)} s; the page shows its last data.`);
}

function trouble(words) {
  if ($("trouble").textContent !== words) $("trouble").textContent = words; // screen readers announce it once, not every second
  $("trouble").hidden = false;
  $("restarted").hidden = true;
  $("content").classList.add("stale");
}

function notice(words) {
  $("restarted").textContent = words;
  $("restarted").hidden = false;
  setTimeout(() => ($("restarted").hidden = true), NOTICE_MS);
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
    now?.fallback && "max_length of low-priority requests is reduced",
    now?.drifted && `steps take ${number(now.slowdown)} times as long as normal on this machine: look for other programs or throttling, or measure again with "echelon tune --refresh"`,
    now?.draining && "shutting down: admits no requests",
  ];
  $("about").textContent = `${remarks.filter(Boolean).join("; ")}.`;
}

function showTiles() {
  const { minute, now } = data;
  const rows = [
    ["Documents/s", number(minute.documents_per_s), "Documents of answered requests a second."],
    ["Requests/s", number(minute.requests_per_s), "Requests answered with 200 a second."],
    ["Tokens/s", number(minute.tokens_per_s), "Tokens scored a second, padding not included."],
    ["Errors/s", number(minute.errors_per_s), "Answers a second of any status but 200."],
    ["Latency P50", seconds(minute.p50_s), "Half of the requests were answered within this time."],
    ["Latency P95", seconds(minute.p95_s), "95 of 100 requests were answered within this time."],
    ["Latency P99", seconds(minute.p99_s), "99 of 100 requests were answered within this time."],
    ["Slowdown", now ? `${number(now.slowdown)} ×` : "–", "Time of a step over its normal time on this machine; above 1, something else uses the machine, or it throttles."],
    ["Waiting pairs", number(now?.waiting_pairs), "Pairs of a query and a document that wait in the queue."],
    ["Oldest", seconds(now?.oldest_s), "How long the oldest request in the queue has waited."],
    ["Backlog", seconds(now?.backlog_s), "Predicted time to score all pairs in the queue."],
    ["Token budget", number(now?.token_budget), "Maximum tokens of a step (one pass through the model); lowered after an out-of-memory error."],
  ];
  $("tiles").replaceChildren(...rows.map(([name, value, title]) => make("div", { title }, make("dt", {}, name), make("dd", { class: "value" }, value))));
}

const KINDS = {
  http: (name) => (name === "200" ? "answered: 200" : name === "499" ? "client went away: 499" : `answered: ${name}`),
  refused: (name) => `refused: ${words(name)}`,
  limited: () => "over a key's limit",
  limit: (name) => `beyond ${name}`,
  connection: (name) => `connection ended: ${words(name)}`,
  outcome: (name) => `admitted, ${words(name)}`,
  step: () => "step scored again",
  cache: (name) => (name === "hits" ? "documents whose score was cached" : "documents not in the score cache"),
  truncated: () => "documents that were truncated",
  fallback: () => "low priority, max_length reduced",
  ladder: (name) => `memory ladder: ${words(name)}`,
  worker: (name) => `worker ${words(name)}`,
};
const MEANINGS = {
  refused: "Not admitted: the answer says why and when to try again.",
  limited: "The key's rate is used up (429).",
  limit: "The request exceeded a limit of the server, which the answer names.",
  connection: "The server ended the connection: its client was one too many, sent what cannot be read, or sent or read too slowly.",
  step: "A step was lost with its worker or did not fit in memory; its pairs were scored again.",
  cache: "Scores are kept for pairs that come again; a document in the cache costs nothing.",
  truncated: "Longer than the model reads; explain shows how much was left out.",
  fallback: "Under load, requests of low priority are read less far.",
  ladder: "What was done when memory ran out.",
};
const QUIET = new Set(["worker starting", "worker up", "admitted, answered"]);

const words = (name) => name.replaceAll("_", " ");

/** All counts, except those that the tiles and the table of workers show. */
function showKinds() {
  const rows = [];
  for (const [kind, label] of Object.entries(KINDS)) {
    for (const [name, count] of Object.entries(data.window.counts[kind] ?? {})) {
      if (QUIET.has(label(name))) continue;
      rows.push([MEANINGS[kind] ?? "", label(name), number(data.minute.counts[kind]?.[name] ?? 0), number(count)]);
    }
  }
  if (!rows.length) rows.push(["", "nothing yet", "", ""]);
  $("kinds").replaceChildren(...rows.map(([title, kind, ...counts]) => make("tr", { title }, make("td", {}, kind), ...counts.map((count) => make("td", { class: "number" }, count)))));
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
