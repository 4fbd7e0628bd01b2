// Asking and answering: what is sent, what comes back, what is kept. Each answer belongs to its conversation, whatever is shown.

import { find, newId } from "./elements.js";
import { Gathered, ServerError, ask } from "./stream.js";
import { newestLeaf, pathTo, requestMessages, titleOf } from "./conversation.js";
import { apiKey, base, number, setting, tools } from "./settings.js";
import { TAB, state, tellOthers } from "./state.js";
import { actions, add, finish, grow, redraw, say, showAll, tick } from "./talk.js";

/** Set by the page's beginning: what else shows conversations and answers. */
export const on = { list: () => {}, running: () => {}, failed: () => {}, shown: () => {}, model: () => {} };

export function headers() {
  const key = apiKey();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

export function newConversation() {
  state.conversation = { id: newId(), title: "New conversation", created: Date.now(), updated: Date.now(), leaf: null };
  state.messages = new Map();
  on.shown(null);
  showAll();
  on.list();
  on.running();
}

/** Shows a kept conversation. */
export async function openConversation(id) {
  const job = state.jobs.get(id);
  const conversation = job?.conversation ?? (await state.store.conversation(id));
  if (!conversation) return newConversation();
  const list = job ? [...job.messages.values()] : await state.store.messages(id);
  const isOther = (message) => message.tab !== TAB && Date.now() - (message.touched ?? 0) < 5000;
  let elsewhere = null;
  for (const message of list) {
    if (message.state !== "writing" || job) continue;
    if (isOther(message)) elsewhere = message.id;
    else {
      // The page that wrote it has gone.
      message.state = "cut";
      await state.store.save(null, [message]);
    }
  }
  state.conversation = conversation;
  on.shown(id);
  state.messages = job?.messages ?? new Map(list.map((message) => [message.id, message]));
  on.model();
  showAll();
  on.list();
  on.running();
  if (elsewhere) watch(id, elsewhere);
}

/** Another page writes this answer and says when it is done, unless it is closed before. */
function watch(id, messageId) {
  setTimeout(async () => {
    if (state.conversation.id !== id || state.jobs.has(id)) return;
    const message = (await state.store.messages(id)).find((one) => one.id === messageId);
    if (message?.state === "writing" && Date.now() - message.touched < 5000) watch(id, messageId);
    else if (state.messages.get(messageId)?.state === "writing") openConversation(id);
  }, 3000);
}

async function keep(conversation, messages = [], isOnTheWay = false) {
  try {
    await state.store.save({ ...conversation }, messages.map((message) => ({ ...message })));
    if (!isOnTheWay) tellOthers(conversation.id);
  } catch (error) {
    find("banner").textContent = `The conversation could not be kept (${error?.message ?? error}). Export what you need.`;
    find("banner").hidden = false;
  }
}

function put(message) {
  const { conversation } = state;
  state.messages.set(message.id, message);
  conversation.leaf = message.id;
  conversation.updated = Date.now();
}

function newMessage(role, parent, fields) {
  return { id: newId(), conversation: state.conversation.id, parent, role, content: "", created: Date.now(), state: "done", ...fields };
}

/** Sends a question at the end of the path, and asks for its answer. */
export function send(text, attachments) {
  if (state.jobs.has(state.conversation.id)) return;
  const message = newMessage("user", state.conversation.leaf, { content: text, ...(attachments.length && { attachments }) });
  if (!state.conversation.titled && !state.messages.size) state.conversation.title = titleOf(text || attachments[0]?.name || "");
  put(message);
  add(message);
  keep(state.conversation, [message]);
  on.list();
  answer(message.id);
}

/** Whether the server goes on in the last answer when it is asked to, as vLLM and its kin do. */
function canContinue() {
  return Boolean(state.info) || state.models.some((model) => /^(tandem|vllm|sglang)$/.test(model.owned_by));
}

function requestBody(path, isContinued) {
  const effort = setting("reasoning_effort");
  const body = {
    model: find("model").value || undefined, messages: requestMessages(path, setting("system") ?? "", Boolean(state.info)),
    stream: true, stream_options: { include_usage: true }, temperature: number("temperature"), top_p: number("top_p"),
    max_tokens: number("max_tokens"), seed: number("seed"), reasoning_effort: effort || undefined, tools: tools(),
  };
  if (isContinued && canContinue()) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  else if (isContinued) body.messages.push({ role: "user", content: "Continue exactly where you stopped, and repeat nothing." });
  return body;
}

/** Asks for an answer to the message `parent`, or for more of the answer `continued`. */
async function answer(parent, continued) {
  const { conversation, messages } = state;
  const path = pathTo(messages, continued ? continued.id : parent);
  const message = continued ?? newMessage("assistant", parent, {});
  Object.assign(message, { state: "writing", tab: TAB, touched: Date.now(), asked: Date.now() });
  for (const name of ["error", "status", "finish_reason", "usage", "rate"]) delete message[name];
  const body = requestBody(path, Boolean(continued));
  message.model = body.model;
  conversation.model = body.model;
  const job = { conversation, messages, message, controller: new AbortController() };
  state.jobs.set(conversation.id, job);
  if (continued) {
    redraw(message);
  } else {
    put(message);
    add(message);
  }
  on.running();
  on.list();
  await keep(conversation, [message]);
  await run(job, body);
  state.jobs.delete(conversation.id);
  conversation.updated = Date.now();
  // Its own conversation gets it, shown or not.
  await keep(conversation, [message]);
  if (state.conversation.id === conversation.id) finish(message);
  on.running();
  on.list();
}

async function run(job, body) {
  const { conversation, message } = job;
  const gathered = new Gathered(message);
  const begun = performance.now();
  let first = 0, spoken = false, last = performance.now();
  const thinking = message.reasoning_ms ?? 0;
  const clock = setInterval(() => {
    if (state.conversation.id !== conversation.id) return;
    if (message.reasoning && !message.content) message.reasoning_ms = thinking + performance.now() - first;
    tick(message);
    grow(message);
  }, 200);
  const keeping = setInterval(() => {
    message.touched = Date.now();
    keep(conversation, [message], true);
  }, 1000);
  try {
    const isWhole = await ask(`${base()}/chat/completions`, headers(), body, gathered, job.controller.signal, () => {
      last = performance.now();
      first ||= gathered.nFrames ? last : 0;
      if (message.reasoning && !spoken) {
        message.reasoning_ms = thinking + last - first;
        spoken = Boolean(message.content);
      }
      const time = (last - first) / 1000;
      if (first && time > 0.1) message.rate = (message.usage?.completion_tokens ?? gathered.nFrames) / time;
      if (state.conversation.id === conversation.id) grow(message);
    });
    message.state = isWhole ? "done" : "cut";
    if (isWhole && !message.content && !message.reasoning && !message.tool_calls) fail(message, "The server sent an answer without any text.");
  } catch (error) {
    if (error.name === "AbortError") message.state = "stopped";
    else if (error instanceof ServerError) {
      fail(message, `${error.message}${error.retryAfter ? ` (The server asks to wait ${error.retryAfter} s.)` : ""}`, error.status);
    } else if (error instanceof TypeError) {
      fail(message, `The server does not answer (${base().startsWith("/") ? location.host : new URL(base()).host}).`);
    } else fail(message, String(error.message ?? error));
    on.failed(message);
  } finally {
    clearInterval(clock);
    clearInterval(keeping);
    message.first_ms = first ? Math.round(first - begun) : undefined;
  }
}

function fail(message, error, status) {
  Object.assign(message, { state: "error", error, status });
}

/** Stops the answer of the conversation that is shown. */
export function stop() {
  state.jobs.get(state.conversation.id)?.controller.abort();
}

const isBusy = () => {
  if (!state.jobs.has(state.conversation.id)) return false;
  say("Stop the answer first.");
  return true;
};

/** Buttons of messages. */
export function startActions(editor) {
  Object.assign(actions, {
    retry(message) {
      if (isBusy()) return;
      state.conversation.leaf = message.parent;
      showAll();
      answer(message.parent);
    },
    goOn(message) {
      if (isBusy()) return;
      if (state.conversation.leaf !== message.id) {
        state.conversation.leaf = message.id;
        showAll();
      }
      answer(message.parent, message);
    },
    edit(message) {
      if (isBusy()) return;
      editor(message, (content) => {
        const changed = { ...message, id: newId(), content, created: Date.now() };
        put(changed);
        keep(state.conversation, [changed]);
        showAll();
        if (changed.role === "user") answer(changed.id);
      });
    },
    choose(message) {
      if (isBusy()) return;
      state.conversation.leaf = newestLeaf(state.messages, message.id);
      keep(state.conversation);
      showAll();
    },
    async branch(message) {
      const path = pathTo(state.messages, message.id);
      const id = newId();
      let parent = null;
      const copies = path.map((one) => {
        const copied = { ...one, id: newId(), conversation: id, parent, state: one.state === "writing" ? "cut" : one.state };
        parent = copied.id;
        return copied;
      });
      const { title, model } = state.conversation;
      const now = Date.now();
      await keep({ id, title: `${title.slice(0, 180)} (branch)`, titled: true, model, created: now, updated: now, leaf: parent }, copies);
      await openConversation(id);
      say("This is a new conversation with a copy of the messages so far.");
    },
    giveResults(message, results) {
      if (isBusy()) return;
      let parent = message.id;
      const added = message.tool_calls.map((call, n) => {
        const one = newMessage("tool", parent, { content: results[n], tool_call_id: call.id, name: call.function.name, created: Date.now() + n });
        parent = one.id;
        put(one);
        return one;
      });
      keep(state.conversation, added);
      showAll();
      answer(parent);
    },
  });
}
