// The page's beginning: fields, lists, drawers, shortcuts.

import { download, find, make, newId } from "./elements.js";
import { openStore, read, renamed, write } from "./store.js";
import { asMarkdown, pathTo } from "./conversation.js";
import { addressFor, apiKey, base, keep, remembered, savePreset, setting, showDefaults, startSettings } from "./settings.js";
import { conditionOf, onOthers, state, tellOthers } from "./state.js";
import { actions, editor, grow, say, showAll, startTalk, toEnd } from "./talk.js";
import { headers, newConversation, on, openConversation, send, startActions, stop } from "./chat.js";
import { look, showServer } from "./panel.js";

const LARGEST_FILE = 1_000_000;
const isNarrow = () => matchMedia("(max-width: 760px)").matches;
const isDrawer = (side) => matchMedia(side === "left" ? "(max-width: 760px)" : "(max-width: 1100px)").matches;

// --- the list of conversations ---

let searched = null;

/** Draws the list: the newest first, or those in which the searched words are. */
async function showList() {
  const text = find("search").value.trim().toLowerCase();
  const all = await state.store.conversations();
  for (const job of state.jobs.values()) if (!all.some((one) => one.id === job.conversation.id)) all.push(job.conversation);
  if (text !== find("search").value.trim().toLowerCase()) return;
  const chosen = all.filter((one) => !text || one.title.toLowerCase().includes(text) || searched?.has(one.id));
  chosen.sort((a, b) => b.updated - a.updated);
  const isFocused = find("list").contains(document.activeElement) ? document.activeElement.dataset.of : null;
  find("list").replaceChildren(...chosen.slice(0, 500).map(entry));
  find("nothing").hidden = chosen.length > 0;
  find("nothing").textContent = text ? "Nothing was found." : "No conversations yet.";
  if (isFocused) find("list").querySelector(`[data-of="${isFocused}"]`)?.focus();
  const shown = all.find((one) => one.id === state.conversation.id);
  if (shown && shown.title !== state.conversation.title) state.conversation.title = shown.title;
  find("title").textContent = state.conversation.title;
  document.title = state.messages.size ? `${state.conversation.title} · Tandem` : "Tandem";
}

function entry(conversation) {
  const isBusy = state.jobs.has(conversation.id);
  const open = make("button", { type: "button", class: `open-one${isBusy ? " busy" : ""}`, text: conversation.title, title: conversation.title, "data-of": conversation.id,
    "aria-current": conversation.id === state.conversation.id && "true", click: () => goTo(conversation.id) });
  if (isBusy) open.append(make("span", { class: "unseen", text: ", being answered" }));
  const words = find("search").value.trim() && searched?.get(conversation.id);
  if (words) open.append(make("mark", { text: words }));
  const more = make("button", { type: "button", text: "⋯", "data-of": `more-${conversation.id}`, "aria-label": `More about ${conversation.title}`, click: () => manage(conversation) });
  return make("li", {}, open, more);
}

async function goTo(id) {
  await openConversation(id);
  close("left");
  find("input").focus();
}

function begin() {
  newConversation();
  close("left");
  find("input").focus();
}

let searching = 0;
function search() {
  clearTimeout(searching);
  searching = setTimeout(async () => {
    const text = find("search").value.trim().toLowerCase();
    searched = text.length > 1 ? await state.store.search(text) : null;
    showList();
  }, 150);
}

// --- dialogs ---

function ask(title, children, buttons) {
  const dialog = find("dialog");
  const shut = () => dialog.close();
  const row = buttons.map(([text, work, isPlain]) => make("button", { type: "button", class: isPlain && "plain", text, click: async () => {
    if (await work?.() !== false) shut();
  } }));
  dialog.replaceChildren(make("h2", { id: "dialog-title", text: title }), ...children, make("div", { class: "row" }, ...row));
  if (!dialog.open) dialog.showModal();
}

function field(label, value, work) {
  const input = make("input", { type: "text", maxlength: "200", keydown: (event) => {
    if (event.key === "Enter" && !event.isComposing) { event.preventDefault(); work(input.value); find("dialog").close(); }
  } });
  input.value = value;
  return { input, label: make("label", {}, label, input) };
}

/** Rename, export, delete. */
function manage(conversation) {
  const rename = async (title) => {
    const current = state.jobs.get(conversation.id)?.conversation ?? (state.conversation.id === conversation.id ? state.conversation : conversation);
    Object.assign(current, { title: title.trim() || current.title, titled: true });
    await state.store.save({ ...current });
    tellOthers(current.id);
    showList();
  };
  const name = field("Title", conversation.title, rename);
  ask("Conversation", [name.label], [
    ["Rename", () => rename(name.input.value)],
    ["Export", () => exportAs([conversation], conversation.title), true],
    ["Export as Markdown", async () => {
      const messages = new Map((await state.store.messages(conversation.id)).map((message) => [message.id, message]));
      download(`${conversation.title}.md`, asMarkdown(conversation, pathTo(messages, conversation.leaf)), "text/markdown");
    }, true],
    ["Delete", () => {
      ask(`Delete “${conversation.title}”?`, [make("p", { text: "It cannot be brought back." })], [["Delete", async () => {
        state.jobs.get(conversation.id)?.controller.abort();
        // The answer's last words are kept before it goes.
        while (state.jobs.has(conversation.id)) await new Promise((resolve) => setTimeout(resolve, 20));
        await state.store.remove(conversation.id);
        tellOthers(conversation.id);
        if (state.conversation.id === conversation.id) begin();
        else showList();
      }], ["Keep", null, true]]);
      return false;
    }, true],
    ["Close", null, true],
  ]);
  name.input.select();
}

async function exportAs(conversations, name) {
  const whole = await Promise.all(conversations.map(async (one) => ({ ...one, messages: await state.store.messages(one.id) })));
  download(`${name}.json`, write(whole), "application/json");
}

async function importFile(file) {
  try {
    const known = new Map((await state.store.conversations()).map((one) => [one.id, one]));
    let nNew = 0, nKnown = 0, last = null;
    for (let one of read(await file.text(), newId)) {
      const same = known.get(one.id);
      if (same && same.updated === one.updated) { nKnown += 1; continue; }
      if (same) one = renamed(one, newId);
      const { messages, ...conversation } = one;
      await state.store.save(conversation, messages);
      known.set(conversation.id, conversation);
      nNew += 1;
      last = conversation.id;
    }
    const text = `${nNew} imported${nKnown ? `, ${nKnown} were here already` : ""}.`;
    say(text);
    ask("Import", [make("p", { text })], [["Close"]]);
    if (last) await openConversation(last);
    else showList();
  } catch (error) {
    ask("Import", [make("p", { class: "error", role: "alert", text: `Nothing was imported: ${error.message}.` })], [["Close"]]);
  }
}

const SHORTCUTS = [["Enter", "send"], ["Shift+Enter", "begin a new line"], ["Esc", "stop the answer, close what is open"], ["↑", "in the empty field: edit the last question"],
  ["Alt+N", "new conversation"], ["Ctrl+K", "search"], ["Alt+S", "settings"], ["Alt+P", "server"], ["Alt+R", "another answer"], ["Alt+C", "copy the last answer"],
  ["End", "in the messages: to the end"], ["Ctrl+/", "this list"]];

function showShortcuts() {
  const list = make("dl", {}, ...SHORTCUTS.flatMap(([keys, what]) => [make("dt", {}, make("kbd", { text: keys })), make("dd", { text: what })]));
  ask("Shortcuts", [list], [["Close"]]);
}

// --- drawers ---

let before = null;

function open(side, tab) {
  if (side === "right") showTab(tab);
  if (isDrawer(side)) {
    for (const other of ["left", "right"]) if (other !== side && isDrawer(other)) close(other);
    // Whatever was used to open it, its button is where one comes back to.
    before = find(side === "left" ? "open-left" : `open-${tab}`);
    find("shade").hidden = false;
    // Nothing behind it can be reached.
    find("main").inert = true;
    if (side === "right") find("left").inert = true;
  }
  find(side).classList.add("open");
  marks();
  if (isDrawer(side)) find(side === "left" ? "close-left" : "close-right").focus();
  if (side === "right" && !isDrawer(side)) keep("tandem-panel", tab);
}

function close(side) {
  if (side === "right" && !isDrawer(side)) keep("tandem-panel", null);
  if (!find(side).classList.contains("open")) return;
  find(side).classList.remove("open");
  free();
  marks();
  if (before?.isConnected && isDrawer(side)) before.focus();
  before = null;
}

function free() {
  find("shade").hidden = true;
  find("main").inert = false;
  find("left").inert = false;
}

function marks() {
  const isOpen = find("right").classList.contains("open");
  find("open-left").setAttribute("aria-expanded", String(find("left").classList.contains("open")));
  for (const tab of ["settings", "server"]) find(`open-${tab}`).setAttribute("aria-expanded", String(isOpen && !find(tab).hidden));
}

function showTab(tab) {
  for (const name of ["settings", "server"]) {
    find(name).hidden = name !== tab;
    find(`tab-${name}`).setAttribute("aria-selected", String(name === tab));
    find(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
  }
  if (tab === "server") showServer();
  marks();
}

function toggle(tab) {
  if (find("right").classList.contains("open") && !find(tab).hidden) close("right");
  else open("right", tab);
}

// --- files ---

let attached = [];

async function attach(files) {
  const refused = [];
  for (const file of files) {
    if (file.size > LARGEST_FILE) { refused.push(`${file.name} has more than 1 MB`); continue; }
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      if (text.includes("\0")) throw new Error("zero bytes");
      attached.push({ name: file.name, text });
    } catch {
      refused.push(`${file.name} is not a text file`);
    }
  }
  showFiles();
  if (refused.length) ask("Not attached", [make("p", { role: "alert", text: `${refused.join("; ")}.` })], [["Close"]]);
}

function showFiles() {
  find("files").hidden = !attached.length;
  find("files").replaceChildren(...attached.map((file, n) => make("li", { class: "chip" }, `${file.name}, ${file.text.length} characters`,
    make("button", { type: "button", text: "×", "aria-label": `Remove ${file.name}`, click: () => { attached.splice(n, 1); showFiles(); find("input").focus(); } }))));
}

// --- the field ---

function fit() {
  const input = find("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function submit(event) {
  event.preventDefault();
  const text = find("input").value.trim();
  if ((!text && !attached.length) || state.jobs.has(state.conversation.id)) return;
  const files = attached;
  attached = [];
  find("input").value = "";
  showFiles();
  fit();
  keep("tandem-shown", state.conversation.id);
  send(text, files);
}

function running() {
  const isBusy = state.jobs.has(state.conversation.id);
  const wasFocused = [find("send"), find("stop")].includes(document.activeElement);
  find("send").hidden = isBusy;
  find("stop").hidden = !isBusy;
  if (wasFocused) find("input").focus();
}

/** Messages of the path of a role, the last one. */
const lastOf = (role) => pathTo(state.messages, state.conversation.leaf).findLast((message) => message.role === role);

function shortcut(event) {
  const { key } = event;
  const isCommand = event.ctrlKey || event.metaKey;
  const does = (work) => { event.preventDefault(); work(); };
  if (key === "Escape" && !event.isComposing) {
    if (find("dialog").open) return;
    const side = ["right", "left"].find((name) => find(name).classList.contains("open") && isDrawer(name));
    if (side) return does(() => close(side));
    if (state.jobs.has(state.conversation.id)) return does(stop);
    return;
  }
  if (find("dialog").open) return;
  if (isCommand && !event.shiftKey && key.toLowerCase() === "k") return does(() => { if (isDrawer("left")) open("left"); find("search").focus(); });
  if (isCommand && key === "/") return does(showShortcuts);
  if (event.altKey && !isCommand) {
    // By place: with Alt some keyboards write other letters.
    const work = { KeyN: begin, KeyS: () => toggle("settings"), KeyP: () => toggle("server"), KeyR: () => { const last = lastOf("assistant"); if (last) actions.retry(last); },
      KeyC: () => find("talk").querySelector(".assistant:last-of-type .actions button:not([aria-label])")?.click() }[event.code];
    if (work) return does(work);
  }
}

// --- models and the server's state ---

async function loadModels() {
  let list = [];
  try {
    const response = await fetch(`${base()}/models`, { headers: headers() });
    if (response.status === 401 || response.status === 403) return banner("This server wants an API key.", true);
    if (response.ok) list = (await response.json()).data ?? [];
  } catch {
    return banner(`The server does not answer. Trying again.`);
  }
  banner("");
  state.models = Array.isArray(list) ? list.filter((model) => typeof model?.id === "string") : [];
  const texts = state.models.map(({ id }) => `${id}${conditionOf(id) ? ` (${conditionOf(id)})` : ""}`);
  const before = [...find("model").options];
  // A list that is open stays open while only conditions change.
  if (before.length === texts.length && before.every((option, n) => option.value === state.models[n].id)) {
    before.forEach((option, n) => { if (option.text !== texts[n]) option.text = texts[n]; });
  } else {
    const value = find("model").value;
    find("model").replaceChildren(...texts.map((text, n) => make("option", { value: state.models[n].id, text })));
    choose([value, remembered("tandem-model")]);
    chooseOwn();
  }
  find("models").hidden = !texts.length;
}

/** Chooses the first of some models that there is. */
function choose(wanted) {
  const found = wanted.find((id) => state.models.some((model) => model.id === id));
  if (found) find("model").value = found;
}

/** A conversation goes on with the model that it had. */
const chooseOwn = () => choose([state.conversation?.model]);

function chosen() {
  keep("tandem-model", find("model").value);
  state.conversation.model = find("model").value;
  if (state.messages.size) state.store.save({ ...state.conversation });
  lastLook = 0;
}

function banner(text, isKey) {
  if (text === find("banner").dataset.text) return;
  find("banner").dataset.text = text;
  find("banner").replaceChildren(text, ...(isKey ? [" ", make("button", { type: "button", class: "link", text: "Enter it", click: enterKey })] : []));
  find("banner").hidden = !text;
}

function enterKey() {
  open("right", "settings");
  find("key").focus();
}

let lastLook = 0;
async function tick() {
  const isShown = find("right").classList.contains("open") && !find("server").hidden;
  // Often while something is to be seen, now and then otherwise.
  if (document.hidden || Date.now() - lastLook < (isShown || state.jobs.size ? 900 : 4900)) return;
  lastLook = Date.now();
  const info = await look();
  if (info) showDefaults(info.sampling);
  const { speed, requests } = info ?? {};
  find("live").textContent = requests?.running ? `${speed.tokens_per_second.toFixed(0)} tokens/s` : "";
  if (isShown) showServer();
  if (!state.models.length || find("banner").dataset.text || state.models.some(({ id }) => conditionOf(id))) loadModels();
}

/** Goes where the page's policy lets it reach the chosen server. */
function reach() {
  if (location.protocol === "file:") return false;
  const wanted = addressFor(base(), location.href);
  if (wanted === location.href) return false;
  location.replace(wanted);
  return true;
}

async function start() {
  startSettings((name) => {
    if (name === "save-preset") {
      const input = field("Name", setting("preset"), savePreset);
      ask("Save the values as a preset", [input.label], [["Save", () => (input.input.value.trim() ? savePreset(input.input.value.trim()) : false)], ["Cancel", null, true]]);
    }
    if (name === "base" && reach()) return;
    if (["base", "key", "keep_key"].includes(name)) { find("banner").dataset.text = "?"; loadModels(); lastLook = 0; }
  });
  if (reach()) return;
  state.store = await openStore();
  Object.assign(on, { list: showList, running, model: chooseOwn, shown: (id) => keep("tandem-shown", id), failed: (message) => { if ([401, 403].includes(message.status)) banner("This server wants an API key.", true); } });
  Object.assign(actions, { enterKey });
  startActions(editor);
  startTalk();
  find("form").addEventListener("submit", submit);
  find("input").addEventListener("input", fit);
  find("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); find("form").requestSubmit(); }
    if (event.key === "ArrowUp" && !find("input").value && !state.jobs.has(state.conversation.id)) {
      const last = lastOf("user");
      if (last) { event.preventDefault(); actions.edit(last); }
    }
  });
  find("stop").addEventListener("click", stop);
  find("new").addEventListener("click", begin);
  find("search").addEventListener("input", search);
  find("model").addEventListener("change", chosen);
  find("open-left").addEventListener("click", () => open("left"));
  for (const side of ["left", "right"]) find(`close-${side}`).addEventListener("click", () => close(side));
  for (const tab of ["settings", "server"]) {
    find(`open-${tab}`).addEventListener("click", () => toggle(tab));
    find(`tab-${tab}`).addEventListener("click", () => showTab(tab));
    find(`tab-${tab}`).addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      const other = tab === "settings" ? "server" : "settings";
      showTab(other);
      find(`tab-${other}`).focus();
    });
  }
  find("shade").addEventListener("click", () => { close("left"); close("right"); });
  find("open-shortcuts").addEventListener("click", showShortcuts);
  find("export-all").addEventListener("click", async () => exportAs(await state.store.conversations(), "conversations"));
  find("import").addEventListener("click", () => find("import-file").click());
  find("import-file").addEventListener("change", () => { const [file] = find("import-file").files; if (file) importFile(file); find("import-file").value = ""; });
  find("attach").addEventListener("click", () => find("file").click());
  find("file").addEventListener("change", async () => { await attach([...find("file").files]); find("file").value = ""; });
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => { if (holdsFiles(event)) { event.preventDefault(); document.body.classList.add("dropping"); } });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
  addEventListener("drop", (event) => { document.body.classList.remove("dropping"); if (holdsFiles(event)) { event.preventDefault(); attach([...event.dataTransfer.files]); } });
  addEventListener("keydown", shortcut);
  addEventListener("resize", () => { if (!isNarrow() && !isDrawer("right")) free(); });
  document.addEventListener("visibilitychange", () => { for (const job of state.jobs.values()) grow(job.message); });
  addEventListener("pagehide", () => { for (const job of state.jobs.values()) state.store.save({ ...job.conversation }, [{ ...job.message }]); });
  onOthers((id) => {
    showList();
    if (id === state.conversation.id && !state.jobs.has(id)) openConversation(id);
  });
  if (!state.store.isKept) banner("This browser keeps no data for this page: conversations are gone when it is closed. Export what you need.");
  const shown = remembered("tandem-shown");
  if (shown) await openConversation(shown);
  else newConversation();
  const panel = remembered("tandem-panel");
  if (panel && !isDrawer("right")) open("right", panel);
  loadModels();
  tick();
  setInterval(tick, 1000);
}

start();
