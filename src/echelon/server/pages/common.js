// What both pages share: addresses, the API key, the theme, numbers in words, small DOM helpers.

const page = document.documentElement;
export const root = page.dataset.root;
export const asksForKeys = page.dataset.keys === "yes";
const texts = JSON.parse(page.dataset.texts ?? "{}");

/** A sentence in the page's language; `values` replace its {names}. */
export const tr = (sentence, values = {}) => (texts[sentence] ?? sentence).replace(/\{(\w+)\}/g, (_, name) => values[name]);

const KEY = "echelon-api-key";
let key = stored(() => sessionStorage.getItem(KEY)) ?? "";

function stored(read) {
  try {
    return read();
  } catch {
    return null; // no access to storage: values are kept as long as the page is open
  }
}

export const $ = (id) => document.getElementById(id);

/** Make an element; text is inserted as text, never as HTML. */
export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch(root + path, { cache: "no-store", ...options, headers });
}

/** The server's error message. */
export async function wordsOf(response) {
  const text = await response.text();
  try {
    const body = JSON.parse(text);
    const words = body.message ?? body.detail ?? body.error?.message ?? body.error;
    return typeof words === "string" ? words : text;
  } catch {
    return text || response.statusText;
  }
}

/** Set up the field for the API key; `changed` is called after a new key was entered. */
export function keyField(changed) {
  const form = $("key-form");
  form.hidden = !asksForKeys;
  $("key").value = key;
  const take = () => {
    if ($("key").value === key) return false;
    key = $("key").value;
    stored(() => sessionStorage.setItem(KEY, key));
    return true;
  };
  $("key").addEventListener("change", () => take() && changed());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    take();
    changed();
  });
}

export const hasKey = () => key !== "";

export function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

/** Set up the button that switches the theme; `changed` is called after a switch. */
export function themeButton(changed = () => {}) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (page.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    $("theme").textContent = isDark() ? tr("Light") : tr("Dark");
    $("theme").setAttribute("aria-label", isDark() ? tr("Switch to the light theme") : tr("Switch to the dark theme"));
    changed();
  };
  $("theme").addEventListener("click", () => {
    page.dataset.theme = isDark() ? "light" : "dark";
    stored(() => localStorage.setItem("echelon-theme", page.dataset.theme));
    show();
  });
  system.addEventListener("change", show);
  show();
}

/** Show in the header, every five seconds, whether the server is ready. */
export function watchReadiness() {
  const say = (state, words) => {
    $("ready").dataset.state = state;
    $("ready-words").textContent = words;
    $("ready").title = words;
  };
  const look = async () => {
    if (!document.hidden) {
      try {
        const state = await (await ask("/ready", { signal: AbortSignal.timeout(12000) })).json();
        if (state.ready) say("yes", tr("ready"));
        else say("no", tr("not ready: {reason}", { reason: state.reason }));
      } catch {
        say("no", tr("does not answer"));
      }
    }
    setTimeout(look, 5000);
  };
  look();
}

export async function showModel() {
  try {
    const { model } = await (await ask("/health")).json();
    $("model").textContent = model;
    $("model").title = model;
    return model;
  } catch {
    return "";
  }
}

export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  // Pages over plain HTTP from another machine have no access to the clipboard.
  const field = make("textarea", { class: "away", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  if (!done) throw new Error(tr("the browser does not allow pages to copy"));
}

/** A number with three significant digits and separated thousands. */
export function number(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0) return `−${number(-value)}`;
  if (value >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return value >= 0.001 ? Number(value.toPrecision(3)).toString() : value.toExponential(1);
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return `${number(value / 1000)} s`;
  return `${value >= 100 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(3))} ms`;
}

export const seconds = (value) => milliseconds(value === null || value === undefined ? value : value * 1000);

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  return value >= 2 ** 30 ? `${number(value / 2 ** 30)} GiB` : `${number(value / 2 ** 20)} MiB`;
}

/** A sentence with a {count}: its form for one, or for any other number. */
export const plural = (one, many, count) => tr(count === 1 ? one : many, { count: number(count) });
