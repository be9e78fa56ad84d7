// Entry of documents: one a line, or in boxes that may hold line breaks.
import { $, make, plural, tr } from "./common.js";

let boxed = false;
let changed = () => {};

const isBroken = (text) => /[\r\n]/.test(text);
const isText = (text) => text.trim() !== "";

/** The documents to send. Empty boxes between others are kept, so that a box's number is its index. */
export function documents() {
  if (!boxed) return $("lines").value.split(/\r\n|\r|\n/).filter(isText);
  const all = boxes().map((box) => box.value);
  return all.slice(0, all.findLastIndex(isText) + 1);
}

export function setDocuments(texts) {
  if (boxed || texts.some(isBroken)) fillBoxes(texts);
  else $("lines").value = texts.join("\n");
  update();
}

export function setUpDocuments(whenChanged) {
  changed = whenChanged;
  $("lines").addEventListener("input", update);
  $("box-list").addEventListener("input", update);
  $("as-lines").addEventListener("click", toLines);
  $("as-boxes").addEventListener("click", () => boxed || fillBoxes(documents()));
  $("add").addEventListener("click", () => addBox("").focus());
  update();
}

const boxes = () => [...$("box-list").querySelectorAll("textarea")];

function update() {
  $("entry-note").textContent = "";
  $("count").textContent = plural("· {count} document", "· {count} documents", documents().length);
  changed();
}

function toLines() {
  if (!boxed) return;
  const texts = documents();
  const broken = texts.findIndex(isBroken);
  if (broken >= 0) {
    $("entry-note").textContent = tr("Document {number} holds line breaks; as lines it would become several. It stays in its box.", { number: broken });
    return;
  }
  $("lines").value = texts.filter(isText).join("\n");
  show(false);
}

function fillBoxes(texts) {
  $("box-list").replaceChildren();
  for (const text of texts.length ? texts : [""]) addBox(text);
  show(true);
}

function show(inBoxes) {
  boxed = inBoxes;
  $("lines").hidden = boxed;
  $("boxes").hidden = !boxed;
  $("as-boxes").setAttribute("aria-pressed", String(boxed));
  $("as-lines").setAttribute("aria-pressed", String(!boxed));
  update();
}

function addBox(text) {
  const box = make("textarea", { rows: "2", spellcheck: "false" });
  box.value = text;
  const remove = make("button", { type: "button", class: "plain" }, tr("Remove"));
  const item = make("li", {}, box, remove);
  remove.addEventListener("click", () => {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    (next?.querySelector("textarea") ?? $("add")).focus();
    rename();
    update();
  });
  $("box-list").append(item);
  rename();
  update();
  return box;
}

function rename() {
  boxes().forEach((box, index) => {
    box.setAttribute("aria-label", tr("Document {number}", { number: index }));
    box.nextElementSibling.setAttribute("aria-label", tr("Remove document {number}", { number: index }));
  });
}
