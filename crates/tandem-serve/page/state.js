// What the page shows and does at the moment, for all its parts.

import { newId } from "./elements.js";

export const state = {
  store: null,
  /** The conversation shown; it is kept once it has a message. */
  conversation: null,
  /** Its messages by id. */
  messages: new Map(),
  /** Answers being written, by conversation: each has its own messages, whatever is shown. */
  jobs: new Map(),
  /** /v1/models, and whether this is a Tandem server. */
  models: [],
  info: null,
};

/** Where a model is, if its server says so: "loaded", "loading", and so on. */
export function conditionOf(id) {
  const model = state.models.find((one) => one.id === id);
  const condition = model?.state ?? model?.status?.value ?? model?.status;
  return typeof condition === "string" ? condition : undefined;
}

/** Another page of this browser has its own name, which stays through a reload. */
export const TAB = (() => {
  try {
    const name = sessionStorage.getItem("tandem-tab") ?? newId();
    sessionStorage.setItem("tandem-tab", name);
    return name;
  } catch {
    return newId();
  }
})();

const channel = typeof BroadcastChannel === "function" ? new BroadcastChannel("tandem") : null;

/** Tells this browser's other pages that a conversation has changed. */
export const tellOthers = (id) => channel?.postMessage(id);
export const onOthers = (listener) => channel?.addEventListener("message", (event) => listener(event.data));
