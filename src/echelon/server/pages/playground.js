// The playground: sends requests as a client does, and shows the whole response.
import { $, ask, askForKey, asksForKeys, copy, hasKey, keyField, make, milliseconds, number, plural, root, showModel, themeButton, tr, watchReadiness, wordsOf } from "./common.js";
import { documents, setDocuments, setUpDocuments } from "./documents.js";
import { EXAMPLE } from "./example.js";
import { bodyOf, LANGUAGES } from "./snippets.js";

const SHOWN_HITS = 100; // a page of results at a time
const SHOWN_LETTERS = 600; // of a document, until more is asked for

let language = "curl";
let model = "";
let running = null;

/** The request of the form; a top_n that is no number is sent as it is, and the server explains the error. */
function requested() {
  const typed = $("top-n").value.trim();
  const topN = typed === "" ? null : Number.isNaN(Number(typed)) ? typed : Number(typed);
  return bodyOf($("query").value, documents(), topN);
}

async function rank() {
  running?.abort();
  const body = requested();
  clear();
  if (body.query.trim() === "") {
    showError(tr("query: is empty. Type a question or some words.")); // the API would rank by an empty query
    $("query").focus();
    return;
  }
  const mine = (running = new AbortController());
  busy(true);
  try {
    const response = await ask("/v2/rerank", {
      method: "POST",
      signal: mine.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, raw_scores: true, explain: true }),
    });
    if (response.ok) showAnswer(await response.json(), response.headers, body.documents);
    else await showRefusal(response);
  } catch (error) {
    if (running !== mine) return; // a newer request replaced this one
    if (mine.signal.aborted) $("status").textContent = tr("Stopped");
    else showError(tr("The server does not answer ({reason}). Is it running?", { reason: error.message }));
  } finally {
    if (running === mine) {
      running = null;
      busy(false);
    }
  }
}

function busy(isBusy) {
  $("answer").setAttribute("aria-busy", String(isBusy));
  $("rank").disabled = isBusy;
  $("stop").hidden = !isBusy;
  if (isBusy) $("status").textContent = tr("Ranking …");
}

function clear() {
  for (const id of ["error", "warnings", "empty", "details", "more"]) $(id).hidden = true;
  $("results").replaceChildren();
}

// Errors, as the server words them.

async function showRefusal(response) {
  const again = response.headers.get("Retry-After");
  showError(`${response.status} · ${await wordsOf(response)}${again ? `\nRetry-After: ${again} s` : ""}`);
  if (response.status === 401) askForKey();
}

function showError(words) {
  $("status").textContent = "";
  $("error").textContent = words;
  $("error").hidden = false;
}

// Answers.

function showAnswer(answer, headers, texts) {
  const explained = answer.echelon;
  $("status").textContent = tr("{results} of {documents}", {
    results: plural("{count} result", "{count} results", answer.results.length),
    documents: plural("{count} document", "{count} documents", texts.length),
  });
  const hits = answer.results.map(({ index, relevance_score: logit }) => ({
    index,
    logit,
    relevance: 1 / (1 + Math.exp(-logit)),
    text: texts[index],
    cut: explained.truncated_tokens[index],
  }));
  showWarnings(answer.meta.warnings ?? []);
  showHits(hits, 0);
  showDetails(headers, explained);
}

function showWarnings(warnings) {
  $("warnings").hidden = warnings.length === 0;
  $("warnings").replaceChildren(make("ul", {}, ...warnings.map((words) => make("li", {}, words))));
}

function showHits(hits, from) {
  const upTo = Math.min(hits.length, from + SHOWN_HITS);
  $("results").append(...hits.slice(from, upTo).map((hit, place) => item(hit, from + place + 1)));
  $("more").hidden = upTo === hits.length;
  $("more").textContent = tr("Show {more} more of {all}", { more: number(Math.min(SHOWN_HITS, hits.length - upTo)), all: number(hits.length) });
  $("more").onclick = () => showHits(hits, upTo);
}

function item(hit, rank) {
  const bar = make("span");
  bar.style.width = `${100 * hit.relevance}%`;
  const place = make("span", { class: "place" }, tr("#{rank} · document {index} · logit {logit}", { rank, index: hit.index, logit: number(hit.logit) }));
  if (hit.cut) place.append(make("span", { class: "cut" }, plural("cut: {count} token lost", "cut: {count} tokens lost", hit.cut)));
  return make(
    "li",
    { "data-index": hit.index },
    make("div", { class: "hit" }, place, make("span", { class: "score", title: tr("relevance {value}", { value: hit.relevance }) }, scoreOf(hit.relevance))),
    make("div", { class: "bar", "aria-hidden": "true" }, bar),
    ...text(hit.text),
  );
}

const scoreOf = (relevance) => (relevance >= 0.01 ? relevance.toFixed(4) : relevance.toPrecision(3));

/** A document's text, never as HTML; a long one is shortened at first. */
function text(whole) {
  const words = make("p", { class: "text" });
  if (whole.length <= SHOWN_LETTERS) {
    words.textContent = whole;
    return [words];
  }
  const start = [...whole.slice(0, SHOWN_LETTERS)].slice(0, -1).join(""); // does not split a surrogate pair
  words.textContent = `${start} …`;
  const all = tr("Show all {count} letters", { count: number(whole.length) });
  const more = make("button", { type: "button", class: "plain", "aria-expanded": "false" }, all);
  more.addEventListener("click", () => {
    const open = more.getAttribute("aria-expanded") === "true";
    words.textContent = open ? `${start} …` : whole;
    more.textContent = open ? all : tr("Show less");
    more.setAttribute("aria-expanded", String(!open));
  });
  return [words, more];
}

function showDetails(headers, explained) {
  const head = (name) => headers.get(`X-Echelon-${name}`);
  const time = (name) => milliseconds(Number(head(name)));
  const rows = [
    [tr("Total"), time("Total-Ms")],
    [tr("Queue"), time("Queue-Ms")],
    [tr("Tokenise"), time("Tokenise-Ms")],
    [tr("Compute"), time("Compute-Ms")],
    [tr("Tokens"), number(Number(head("Tokens")))],
    [tr("Truncated documents"), head("Truncated-Documents")],
    [tr("Cached scores"), number(explained.cached_documents)],
    [tr("Largest step"), plural("{count} pair", "{count} pairs", Number(head("Batch-Size")))],
    [tr("Memory ladder"), explained.ladder.map((step) => step.rung).join(", ") || tr("none")],
  ];
  $("tiles").replaceChildren(...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", { class: "value" }, value))));
  $("request-id").textContent = tr("Request {id}", { id: headers.get("X-Request-Id") });
  $("details").hidden = false;
}

// The same call elsewhere.

function showSnippet() {
  const url = location.origin + root;
  $("snippet").textContent = LANGUAGES[language]({ url, model, body: requested(), keyed: asksForKeys || hasKey() });
  $("copied").textContent = "";
}

function setUpSnippets() {
  const tabs = Object.keys(LANGUAGES).map((name) => {
    const tab = make("button", { type: "button", role: "tab", "aria-controls": "snippet" }, name);
    tab.addEventListener("click", () => choose(name));
    return tab;
  });
  const choose = (name) => {
    language = name;
    for (const tab of tabs) {
      const chosen = tab.textContent === name;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    }
    showSnippet();
  };
  $("tabs").append(...tabs);
  $("tabs").addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const next = tabs[(tabs.indexOf(document.activeElement) + move + tabs.length) % tabs.length];
    next.focus();
    choose(next.textContent);
  });
  $("copy").addEventListener("click", async () => {
    try {
      await copy($("snippet").textContent);
      $("copied").textContent = tr("Copied.");
    } catch (error) {
      $("copied").textContent = tr("Not copied: {reason}. Select the text instead.", { reason: error.message });
    }
  });
  choose(language);
}

// Start.

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  rank();
});
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) rank();
});
$("stop").addEventListener("click", () => running?.abort());
$("example").addEventListener("click", () => {
  $("query").value = EXAMPLE.query;
  setDocuments(EXAMPLE.documents);
  rank();
});
for (const id of ["query", "top-n"]) $(id).addEventListener("input", showSnippet);
setUpSnippets();
setUpDocuments(showSnippet);
keyField(() => {
  $("error").hidden = true;
  showSnippet();
});
themeButton();
watchReadiness();
showModel().then((name) => {
  model = name;
  showSnippet();
});
