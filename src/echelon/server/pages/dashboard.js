// The dashboard: loads the data of the last ten minutes every two seconds and shows it.
import { $, ask, askForKey, asksForKeys, bytes, hasKey, keyField, make, number, seconds, showModel, themeButton, tr, watchReadiness, wordsOf } from "./common.js";
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
    wantKey(tr("This server needs an API key."));
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
  if (restarted) notice(tr("The server was restarted at {time}; earlier data is lost.", { time: clock(fresh.since) }));
  else if (awaySince !== null) notice(tr("The server answers again, after no answer since {time}.", { time: clock(awaySince) }));
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
  trouble(tr("The server does not answer since {time}. Trying again every {seconds} s; the page shows its last data.", { time: clock(awaySince), seconds: number(period / 1000) }));
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
  $("updated").textContent = tr("Updated {time} · rates and latency over the last {seconds} s", { time: clock(data.at), seconds: number(minute.seconds) });
  const what = scorer ? tr("{family} on {device} in {precision}", scorer) : tr("no scorer yet");
  const remarks = [
    tr("Echelon {version}, {what}, running since {time}", { version, what, time: clock(since) }),
    now?.fallback && tr("max_length of low-priority requests is reduced"),
    now?.drifted && tr("steps take {times} times as long as normal on this machine: look for other programs or throttling, or measure again with `echelon tune --refresh`", { times: number(now.slowdown) }),
    now?.draining && tr("shutting down: admits no requests"),
  ];
  $("about").textContent = tr("{remarks}.", { remarks: remarks.filter(Boolean).join(tr("; ")) });
}

function showTiles() {
  const { minute, now } = data;
  const rows = [
    [tr("Documents/s"), number(minute.documents_per_s), tr("Documents of answered requests a second.")],
    [tr("Requests/s"), number(minute.requests_per_s), tr("Requests answered with 200 a second.")],
    [tr("Tokens/s"), number(minute.tokens_per_s), tr("Tokens scored a second, padding not included.")],
    [tr("Errors/s"), number(minute.errors_per_s), tr("Answers a second of any status but 200.")],
    [tr("Latency P50"), seconds(minute.p50_s), tr("Half of the requests were answered within this time.")],
    [tr("Latency P95"), seconds(minute.p95_s), tr("95 of 100 requests were answered within this time.")],
    [tr("Latency P99"), seconds(minute.p99_s), tr("99 of 100 requests were answered within this time.")],
    [tr("Slowdown"), now ? `${number(now.slowdown)} ×` : "–", tr("Time of a step over its normal time on this machine; above 1, something else uses the machine, or it throttles.")],
    [tr("Waiting pairs"), number(now?.waiting_pairs), tr("Pairs of a query and a document that wait in the queue.")],
    [tr("Oldest"), seconds(now?.oldest_s), tr("How long the oldest request in the queue has waited.")],
    [tr("Backlog"), seconds(now?.backlog_s), tr("Predicted time to score all pairs in the queue.")],
    [tr("Token budget"), number(now?.token_budget), tr("Maximum tokens of a step (one pass through the model); lowered after an out-of-memory error.")],
  ];
  $("tiles").replaceChildren(...rows.map(([name, value, title]) => make("div", { title }, make("dt", {}, name), make("dd", { class: "value" }, value))));
}

const KINDS = {
  http: (name) => (name === "499" ? tr("client went away: 499") : tr("answered: {status}", { status: name })),
  refused: (name) => tr("refused: {reason}", { reason: words(name) }),
  limited: () => tr("over a key's limit"),
  limit: (name) => tr("beyond {limit}", { limit: name }),
  connection: (name) => tr("connection ended: {reason}", { reason: words(name) }),
  outcome: (name) => tr("admitted, {outcome}", { outcome: words(name) }),
  step: () => tr("step scored again"),
  cache: (name) => (name === "hits" ? tr("documents whose score was cached") : tr("documents not in the score cache")),
  truncated: () => tr("documents that were truncated"),
  fallback: () => tr("low priority, max_length reduced"),
  ladder: (name) => tr("memory ladder: {rung}", { rung: words(name) }),
  worker: (name) => tr("worker {state}", { state: words(name) }),
};
const MEANINGS = {
  refused: tr("Not admitted: the answer says why and when to try again."),
  limited: tr("The key's rate is used up (429)."),
  limit: tr("The request exceeded a limit of the server, which the answer names."),
  connection: tr("The server ended the connection: its client was one too many, sent what cannot be read, or sent or read too slowly."),
  step: tr("A step was lost with its worker or did not fit in memory; its pairs were scored again."),
  cache: tr("Scores are kept for pairs that come again; a document in the cache costs nothing."),
  truncated: tr("Longer than the model reads; explain shows how much was left out."),
  fallback: tr("Under load, requests of low priority are read less far."),
  ladder: tr("What was done when memory ran out."),
};
const QUIET = new Set(["worker starting", "worker up", "outcome answered"]);

/** A name of the data in words. */
const words = (name) => tr(name.replaceAll("_", " "));

/** All counts, except those that the tiles and the table of workers show. */
function showKinds() {
  const rows = [];
  for (const [kind, label] of Object.entries(KINDS)) {
    for (const [name, count] of Object.entries(data.window.counts[kind] ?? {})) {
      if (QUIET.has(`${kind} ${name}`)) continue;
      rows.push([MEANINGS[kind] ?? "", label(name), number(data.minute.counts[kind]?.[name] ?? 0), number(count)]);
    }
  }
  if (!rows.length) rows.push(["", tr("nothing yet"), "", ""]);
  $("kinds").replaceChildren(...rows.map(([title, kind, ...counts]) => make("tr", { title }, make("td", {}, kind), ...counts.map((count) => make("td", { class: "number" }, count)))));
}

function showWorkers() {
  const rows = data.workers.map((worker) => {
    const state = make("td", {}, make("span", { class: worker.name === "up" ? "ok" : "trouble" }, words(worker.name)));
    if (worker.words) state.append(make("span", { class: "detail" }, worker.words));
    return make("tr", {}, make("td", {}, String(worker.worker)), state, make("td", {}, clock(worker.at)), make("td", { class: "number" }, bytes(worker.resident_bytes)));
  });
  $("workers").replaceChildren(...rows);
}

function showEvents() {
  const items = data.events.map((event) => {
    const said = { worker: event.worker, name: words(event.name) };
    const what = event.kind === "ladder" ? tr("memory ladder on worker {worker}: {name}", said) : tr("worker {worker}: {name}", said);
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
