// Conversations in the browser's own database (IndexedDB), or in memory where it may not be used.

/** Fields that a conversation and a message may have; a file with others loses them. */
const CONVERSATION = { id: "string", title: "string", titled: "boolean", created: "number", updated: "number", leaf: "string", model: "string" };
const MESSAGE = {
  id: "string", conversation: "string", parent: "string", role: "string", content: "string", reasoning: "string", reasoning_ms: "number",
  tool_calls: "object", tool_call_id: "string", name: "string", attachments: "object", created: "number", touched: "number", tab: "string",
  state: "string", error: "string", status: "number", finish_reason: "string", usage: "object", rate: "number", model: "string",
};
const ROLES = ["user", "assistant", "tool"];
export const FORMAT = "tandem-conversations";

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Opens the database. `isKept` of the result says whether anything survives the page. */
export async function openStore(name = "tandem") {
  try {
    const opening = indexedDB.open(name, 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("conversations", { keyPath: "id" });
      opening.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    const database = await done(opening);
    database.onversionchange = () => database.close();
    return new Kept(database);
  } catch {
    return new Forgetful();
  }
}

class Kept {
  isKept = true;
  constructor(database) { this.database = database; }

  run(mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(["conversations", "messages"], mode);
      let result;
      transaction.oncomplete = () => resolve(result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
      const value = work(transaction.objectStore("conversations"), transaction.objectStore("messages"));
      if (value instanceof IDBRequest) value.onsuccess = () => { result = value.result; };
    });
  }

  conversations() { return this.run("readonly", (conversations) => conversations.getAll()); }
  conversation(id) { return this.run("readonly", (conversations) => conversations.get(id)); }
  messages(id) { return this.run("readonly", (_, messages) => messages.index("conversation").getAll(id)); }

  /** Writes a conversation, and messages of it, together. */
  save(conversation, list = []) {
    return this.run("readwrite", (conversations, messages) => {
      if (conversation) conversations.put(conversation);
      for (const message of list) messages.put(message);
    });
  }

  remove(id) {
    return this.run("readwrite", (conversations, messages) => {
      conversations.delete(id);
      messages.index("conversation").openKeyCursor(IDBKeyRange.only(id)).onsuccess = (event) => {
        const cursor = event.target.result;
        if (!cursor) return;
        messages.delete(cursor.primaryKey);
        cursor.continue();
      };
    });
  }

  /** The conversations in whose messages `text` (lower case) is, each with words around the first place. */
  search(text, limit = 200) {
    const found = new Map();
    return this.run("readonly", (_, messages) => {
      messages.openCursor().onsuccess = (event) => {
        const cursor = event.target.result;
        if (!cursor || found.size >= limit) return;
        note(found, cursor.value, text);
        cursor.continue();
      };
    }).then(() => found);
  }
}

class Forgetful {
  isKept = false;
  all = new Map();
  texts = new Map();

  async conversations() { return [...this.all.values()].map((one) => structuredClone(one)); }
  async conversation(id) { return structuredClone(this.all.get(id)); }
  async messages(id) { return [...this.texts.values()].filter((message) => message.conversation === id).map((one) => structuredClone(one)); }
  async save(conversation, list = []) {
    if (conversation) this.all.set(conversation.id, structuredClone(conversation));
    for (const message of list) this.texts.set(message.id, structuredClone(message));
  }
  async remove(id) {
    this.all.delete(id);
    for (const message of await this.messages(id)) this.texts.delete(message.id);
  }
  async search(text) {
    const found = new Map();
    for (const message of this.texts.values()) note(found, message, text);
    return found;
  }
}

function note(found, message, text) {
  if (found.has(message.conversation)) return;
  const at = message.content.toLowerCase().indexOf(text);
  if (at >= 0) found.set(message.conversation, message.content.slice(Math.max(0, at - 20), at + text.length + 40).replace(/\s+/g, " "));
}

function only(value, fields) {
  const kept = {};
  for (const [name, type] of Object.entries(fields)) {
    if (typeof value[name] === type && value[name] !== null) kept[name] = value[name];
  }
  return kept;
}

/** The text of a file with conversations, as [`read`] takes it. */
export function write(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/**
 * Reads conversations from a file's text: its own format, or `{"messages": [{"role", "content"}]}`, one or a list.
 * What is not known is left out; what cannot be a conversation is an error that says so.
 */
export function read(text, newId, now = Date.now()) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("the file is not JSON; choose one that Export made");
  }
  if (file?.format === FORMAT && file.version !== 1) throw new Error(`the file is of version ${file.version}, and this page reads version 1`);
  const list = file?.format === FORMAT ? file.conversations : Array.isArray(file) ? file : [file];
  if (!Array.isArray(list)) throw new Error("the file has no list of conversations; choose one that Export made");
  return list.map((conversation, n) => readOne(conversation, `conversation ${n + 1}`, newId, now));
}

function readOne(given, name, newId, now) {
  if (!given || typeof given !== "object" || !Array.isArray(given.messages)) throw new Error(`${name} has no messages`);
  const conversation = { id: newId(), title: "Imported", created: now, updated: now, ...only(given, CONVERSATION) };
  let last = null;
  const messages = given.messages.filter((message) => message?.role !== "system").map((message, n) => {
    if (!message || !ROLES.includes(message.role)) throw new Error(`message ${n + 1} of ${name} has no role of ${ROLES.join(", ")}`);
    const one = { id: newId(), created: now + n, content: "", ...only(message, MESSAGE), conversation: conversation.id };
    if (Array.isArray(message.content)) one.content = message.content.map((part) => part?.text ?? "").join("");
    one.parent = "parent" in message ? (typeof message.parent === "string" ? message.parent : null) : last;
    if (one.state === "writing") one.state = "cut";
    one.tool_calls = calls(one.tool_calls);
    if (!one.tool_calls) delete one.tool_calls;
    one.attachments = Array.isArray(one.attachments)
      ? one.attachments.filter((file) => typeof file?.name === "string" && typeof file?.text === "string").map(({ name, text }) => ({ name, text })) : undefined;
    if (!one.attachments?.length) delete one.attachments;
    last = one.id;
    return one;
  });
  const ids = new Map(messages.map((message) => [message.id, message]));
  if (ids.size !== messages.length) throw new Error(`two messages of ${name} have the same id`);
  // No parent, or one that is not there, or a circle: it begins a branch of its own.
  const rooted = new Set([null]);
  for (const message of messages) {
    const above = new Set();
    let one = message;
    while (one && !rooted.has(one.id) && !above.has(one.id)) {
      above.add(one.id);
      if (one.parent !== null && !ids.has(one.parent)) one.parent = null;
      if (above.has(one.parent)) one.parent = null;
      one = ids.get(one.parent);
    }
    above.forEach((id) => rooted.add(id));
  }
  if (!ids.has(conversation.leaf)) conversation.leaf = last;
  conversation.title = conversation.title.slice(0, 200);
  return { ...conversation, messages };
}

function calls(given) {
  if (!Array.isArray(given)) return undefined;
  const text = (value) => (typeof value === "string" ? value : "");
  return given.map((call) => ({ id: text(call?.id), type: "function", function: { name: text(call?.function?.name), arguments: text(call?.function?.arguments) } }));
}

/** The same conversation under names of its own, so that it can stand beside the first. */
export function renamed(conversation, newId) {
  const ids = new Map(conversation.messages.map((message) => [message.id, newId()]));
  const id = newId();
  const messages = conversation.messages.map((message) => (
    { ...message, id: ids.get(message.id), conversation: id, parent: ids.get(message.parent) ?? null }));
  return { ...conversation, id, leaf: ids.get(conversation.leaf) ?? null, messages };
}
