// The messages of the conversation that is shown.

import { copy, find, make, seconds } from "./elements.js";
import { Growing, GrowingText, markdown } from "./markdown.js";
import { fullText, pathTo, siblings } from "./conversation.js";
import { conditionOf, state } from "./state.js";

/** What a button of a message does; set by the page's beginning. */
export const actions = {};

/** Longer texts are drawn piece by piece. */
const LONG = 20_000;

const talk = () => find("talk");
/** Shown messages by id. */
const shown = new Map();
/** Whether new text keeps the end in sight. */
let isAtEnd = true;
/** Whether some of the messages is selected. */
let isSelecting = false;

const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) fill(entry.target);
}, { root: find("talk"), rootMargin: "1000px 0px" });

export function startTalk() {
  document.addEventListener("selectionchange", () => {
    const selection = document.getSelection();
    isSelecting = !selection.isCollapsed && talk().contains(selection.anchorNode);
  });
  let lastTop = 0;
  talk().addEventListener("scroll", () => {
    const { scrollTop, scrollHeight, clientHeight } = talk();
    const isNear = scrollHeight - scrollTop - clientHeight < 40;
    // Text that grows moves the end away; only the reader leaves it.
    if (isNear) isAtEnd = true;
    else if (scrollTop < lastTop - 2) isAtEnd = false;
    lastTop = scrollTop;
    find("to-end").hidden = isAtEnd || isNear;
  }, { passive: true });
  talk().addEventListener("wheel", (event) => { if (event.deltaY < 0) isAtEnd = false; }, { passive: true });
  talk().addEventListener("keydown", (event) => { if (["ArrowUp", "PageUp", "Home"].includes(event.key)) isAtEnd = false; });
  find("to-end").addEventListener("click", toEnd);
  new ResizeObserver(follow).observe(talk());
}

export function toEnd() {
  isAtEnd = true;
  find("to-end").hidden = true;
  follow();
}

function follow() {
  if (!isAtEnd) return;
  // Who selects something wants it to stay where it is.
  if (isSelecting) return;
  talk().scrollTop = talk().scrollHeight;
}

/** Shows the path to the conversation's leaf. */
export function showAll() {
  observer.disconnect();
  shown.clear();
  const path = pathTo(state.messages, state.conversation.leaf);
  talk().replaceChildren(...path.map(article));
  isAtEnd = true;
  if (!path.length) talk().append(make("p", { class: "soft message", text: "Ask something. What you write stays in this browser." }));
  // The last ones at once, so that the end is where it stays.
  for (const message of path.slice(-6)) fill(shown.get(message.id).node);
  follow();
  requestAnimationFrame(follow);
}

/** Adds a message at the end. */
export function add(message) {
  if (!shown.size) talk().replaceChildren();
  talk().append(article(message));
  fill(shown.get(message.id).node);
  toEnd();
}

const NAMES = { user: "You", assistant: "Answer", tool: "Result of a tool" };

const name = (message) => make("h2", { class: "unseen", text: NAMES[message.role] });

/** A message in its place; it gets its form when it comes near to the eye. */
function article(message) {
  const body = make("div", { class: "body plain-text", text: message.content });
  const node = make("article", { class: `message ${message.role}`, "data-id": message.id }, name(message), body);
  shown.set(message.id, { node, body, message, isFilled: false });
  observer.observe(node);
  return node;
}

function fill(node) {
  const view = shown.get(node.dataset.id);
  if (!view || view.isFilled) return;
  view.isFilled = true;
  observer.unobserve(node);
  draw(view);
}

/** Draws a message anew. */
export function redraw(message) {
  const view = shown.get(message.id);
  if (!view) return;
  view.message = message;
  view.isFilled = true;
  draw(view);
  follow();
}

function draw(view) {
  const { node, message } = view;
  const isWriting = message.state === "writing";
  node.classList.toggle("writing", isWriting);
  node.setAttribute("aria-busy", String(isWriting));
  view.body = make("div", { class: "body" });
  view.note = make("div", { class: "note" });
  const parts = [];
  view.reasoning = null;
  if (message.role === "assistant") {
    view.body.classList.add("text");
    if (message.reasoning) parts.push(reasoning(view));
    view.nShown = 0;
    view.growing = null;
    if (isWriting) view.growing = new Growing(view.body, speak);
    else if (message.content.length > LONG) view.growing = new Growing(view.body);
    else markdown(view.body, message.content);
  } else if (message.role === "tool") {
    const text = make("pre", { tabindex: "0", text: message.content, "aria-label": "Result" });
    view.body.append(make("details", { class: "side-note" }, make("summary", { text: `Result of ${message.name || "a tool"}` }), text));
  } else {
    view.body.classList.add("plain-text");
    const files = (message.attachments ?? []).map((file) => make("span", { class: "chip", text: `${file.name}, ${file.text.length} characters` }));
    if (files.length) view.body.append(make("div", {}, ...files));
    view.body.append(message.content);
  }
  node.replaceChildren(name(message), ...parts, view.body, ...calls(message), view.note, ...trouble(message), ...(isWriting ? [] : [buttons(message)]));
  note(view);
  if (isWriting) grow(message);
  else if (view.growing) drawRest(view, () => {});
}

function reasoning(view) {
  const summary = make("summary");
  const text = make("div", { class: "plain-text" });
  view.reasoning = { summary, text: new GrowingText(text), length: 0, node: make("details", { class: "side-note reasoning" }, summary, text) };
  growReasoning(view);
  return view.reasoning.node;
}

function growReasoning(view) {
  const { reasoning: part, message } = view;
  part.text.add(message.reasoning.slice(part.length));
  part.length = message.reasoning.length;
  const isThinking = message.state === "writing" && !message.content;
  part.summary.textContent = `${isThinking ? "Reasoning" : "Reasoned"} for ${seconds(message.reasoning_ms ?? 0)}`;
}

function calls(message) {
  return (message.tool_calls ?? []).map((call) => {
    let text = call.function.arguments;
    try {
      text = JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      // It is not complete, or no JSON: shown as it is.
    }
    return make("details", { class: "side-note call", open: true }, make("summary", { text: `Call of ${call.function.name || "…"}` }),
      make("pre", { tabindex: "0", "aria-label": "Arguments" }, make("code", { text })));
  });
}

const ENDS = { length: "It ended at the limit of tokens.", content_filter: "The server's filter ended it.", tool_calls: "", stop: "", function_call: "" };

/** One line below an answer: speed and tokens. */
function note(view) {
  const { message } = view;
  if (message.role !== "assistant") return;
  const { usage } = message;
  const parts = [];
  const isWaiting = message.state === "writing" && !message.content && !message.reasoning && !message.tool_calls;
  if (isWaiting) parts.push(waiting(view));
  if (message.rate) parts.push(`${message.rate.toFixed(message.rate < 10 ? 1 : 0)} tokens/s`);
  if (usage?.completion_tokens !== undefined) parts.push(`${usage.completion_tokens} generated`);
  if (usage?.prompt_tokens !== undefined) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} from the cache)` : ""}`);
  }
  if (message.model && state.models.length > 1 && !isWaiting) parts.push(message.model);
  if (message.state === "stopped") parts.push("stopped");
  view.note.textContent = parts.join(", ");
}

/** For the model, while its server brings it into memory; else for the first word. */
function waiting(view) {
  const { message } = view;
  const condition = conditionOf(message.model) ?? "loaded";
  const time = seconds(Date.now() - (message.asked ?? message.created));
  if (condition === "loaded") return `waiting ${time}`;
  const what = `${message.model} is ${condition === "loading" ? "being loaded" : "not loaded yet"}`;
  // Once for each condition to those who listen.
  if (view.said !== what) say(`${what}.`);
  view.said = what;
  return `${what}, ${time}`;
}

/** Why an answer is not whole, and what can be done. */
function trouble(message) {
  if (message.role !== "assistant" || message.state === "writing") return [];
  const button = (text, name) => make("button", { type: "button", class: "plain", text, click: () => actions[name](message) });
  const again = [button("Try again", "retry")];
  const goOn = message.content ? [button("Continue", "goOn"), ...again] : again;
  const box = (text, isMild, ...children) => [make("div", { class: `trouble${isMild ? " mild" : ""}` }, make("div", { text }), make("div", { class: "row" }, ...children))];
  if (message.state === "error") {
    const isKey = message.status === 401 || message.status === 403;
    return box(message.error, false, ...(isKey ? [button("Enter an API key", "enterKey")] : []), ...goOn);
  }
  if (message.state === "cut") return box("The connection ended before the answer did.", true, ...goOn);
  if (message.state === "stopped") return message.content ? box("You stopped it.", true, button("Continue", "goOn")) : [];
  const end = ENDS[message.finish_reason] ?? (message.finish_reason ? `It ended: ${message.finish_reason}.` : "");
  if (end) return box(end, true, ...(message.finish_reason === "length" && message.content ? [button("Continue", "goOn")] : []));
  if (message.finish_reason === "tool_calls" || message.tool_calls?.length) return results(message);
  return [];
}

/** A form for what the called tools give, which the page cannot run. */
function results(message) {
  const isLast = pathTo(state.messages, state.conversation.leaf).at(-1)?.id === message.id;
  if (!isLast) return [];
  const fields = message.tool_calls.map((call) => make("textarea", { rows: "2", "aria-label": `Result of ${call.function.name}`, placeholder: `Result of ${call.function.name}` }));
  const form = make("form", { class: "edit", submit: (event) => {
    event.preventDefault();
    actions.giveResults(message, fields.map((field) => field.value));
  } }, ...fields, make("div", { class: "row" }, make("button", { text: "Send results" })));
  return [make("details", { class: "side-note" }, make("summary", { text: "Give the results" }), form)];
}

function buttons(message) {
  const button = (text, name, label) => make("button", { type: "button", text, "aria-label": label, click: () => actions[name](message) });
  const row = make("div", { class: "actions" });
  const all = siblings(state.messages, message);
  if (all.length > 1) {
    const at = all.findIndex((other) => other.id === message.id);
    const step = (by, text, label) => make("button", { type: "button", text, "aria-label": label, disabled: !all[at + by], click: () => actions.choose(all[at + by]) });
    row.append(step(-1, "‹", "Earlier version"), make("span", { class: "soft", text: `${at + 1} of ${all.length}` }), step(1, "›", "Later version"));
  }
  const copied = make("button", { type: "button", text: "Copy", click: async () => {
    await copy(fullText(message));
    copied.textContent = "Copied";
    setTimeout(() => { copied.textContent = "Copy"; }, 1500);
  } });
  row.append(copied);
  if (message.role !== "tool") row.append(button("Edit", "edit"));
  if (message.role === "assistant") row.append(button("Retry", "retry"));
  row.append(button("Branch", "branch", "Branch into a new conversation"));
  return row;
}

/** A field in the place of a message. */
export function editor(message, onSave) {
  const view = shown.get(message.id);
  if (!view) return;
  fill(view.node);
  const area = make("textarea", { "aria-label": "Edit the message" });
  area.value = message.content;
  const close = () => { redraw(message); find("input").focus(); };
  const save = () => { const text = area.value; redraw(message); onSave(text); };
  const isQuestion = message.role === "user";
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && !event.isComposing && (event.ctrlKey || event.metaKey || (isQuestion && !event.shiftKey))) { event.preventDefault(); save(); }
  });
  view.node.replaceChildren(make("div", { class: "edit" }, area, make("div", { class: "row" },
    make("button", { type: "button", text: isQuestion ? "Send" : "Save", click: save }), make("button", { type: "button", class: "plain", text: "Cancel", click: close }))));
  area.rows = Math.min(20, message.content.split("\n").length + 1);
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

// --- an answer that grows ---

/** Characters drawn at a time, so that a frame stays short however fast they come; adapted to what drawing costs. */
let step = 2000;
let timer = 0, lastEnd = 0, lastCost = 0;

/** Draws what an answer has got since, soon. */
export function grow(message) {
  if (timer || !shown.has(message.id)) return;
  // A third of the time at most, so that the page stays quick.
  const wait = Math.max(25, 2 * lastCost - (performance.now() - lastEnd));
  timer = setTimeout(() => {
    timer = 0;
    if (growNow(message)) grow(message);
  }, wait);
}

/** Does one step; whether there is more to draw. */
function growNow(message) {
  const view = shown.get(message.id);
  if (!view?.growing || document.hidden) return false;
  const start = performance.now();
  if (message.reasoning && !view.reasoning) view.body.before(reasoning(view));
  else if (view.reasoning) growReasoning(view);
  const isMore = growText(view);
  if (message.tool_calls) {
    for (const old of view.node.querySelectorAll(".call")) old.remove();
    view.body.after(...calls(message));
  }
  note(view);
  follow();
  lastEnd = performance.now();
  lastCost = lastEnd - start;
  if (lastCost > 20) step = Math.max(500, step / 2);
  else if (lastCost < 8) step = Math.min(8000, step * 1.5);
  return isMore;
}

/** Draws the next piece; whether there is more. A selection stays what the reader made it, and the text catches up later. */
function growText(view) {
  if (view.growing.isSelected()) return false;
  const { content } = view.message;
  view.nShown = Math.min(content.length, (view.nShown ?? 0) + Math.ceil(step));
  view.growing.set(content.slice(0, view.nShown));
  return view.nShown < content.length;
}

/** Draws the rest of a text that grows no more, piece by piece. */
function drawRest(view, done) {
  const go = () => {
    if (!view.growing || !view.body.isConnected) return;
    if (!view.growing.isSelected() && !growText(view)) {
      view.growing.set(view.message.content, true);
      view.growing = null;
      done();
    } else {
      setTimeout(go, view.growing.isSelected() ? 300 : 25);
    }
    follow();
  };
  go();
}

/** The answer is over: the rest is drawn and spoken, and the buttons come. */
export function finish(message) {
  const view = shown.get(message.id);
  if (!view?.isFilled) return;
  if (!view.growing) return redraw(message);
  if (message.reasoning && !view.reasoning) view.body.before(reasoning(view));
  else if (view.reasoning) growReasoning(view);
  for (const node of view.node.querySelectorAll(".call")) node.remove();
  // What is drawn stays drawn.
  view.node.append(...calls(message), view.note, ...trouble(message), buttons(message));
  note(view);
  drawRest(view, () => {
    view.node.classList.remove("writing");
    view.node.setAttribute("aria-busy", "false");
    const end = { error: message.error, cut: "The connection ended before the answer did.", stopped: "Stopped." }[message.state];
    sayBlocks();
    say(end ?? (message.tool_calls?.length ? "The model calls a tool." : "The answer is complete."));
  });
}

/** Ticks the clocks of an answer that is being written. */
export function tick(message) {
  const view = shown.get(message.id);
  if (!view || !view.note) return;
  if (view.reasoning && !message.content) growReasoning(view);
  note(view);
}

// --- for screen readers ---

/** Complete blocks that are not said yet. */
let unsaid = [];

/** Says a block of the answer once, when it is complete; what comes fast is said together, and not all of it. */
function speak(block) {
  if (!unsaid.length) setTimeout(sayBlocks, 500);
  unsaid.push(block);
}

function sayBlocks() {
  const blocks = unsaid;
  unsaid = [];
  const texts = blocks.slice(0, 20).map((block) => (block.querySelector?.("pre")?.textContent ?? block.textContent).trim().slice(0, 600)).filter(Boolean);
  if (!texts.length) return;
  const line = make("div", { text: texts.join("\n").slice(0, 2000) });
  find("spoken").append(line);
  // What was said need not be found again beside the answer itself.
  setTimeout(() => line.remove(), 8000);
}

export function say(text) {
  find("status").textContent = "";
  setTimeout(() => { find("status").textContent = text; }, 50);
}
