// A conversation is a tree of messages: an edited question or another answer is a sibling. One path of it is shown.

/** The messages from the first to `leaf`. */
export function pathTo(messages, leaf) {
  const path = [];
  for (let message = messages.get(leaf); message; message = messages.get(message.parent)) path.push(message);
  return path.reverse();
}

/** Messages with the same parent, the oldest first. */
export function siblings(messages, message) {
  const all = [...messages.values()].filter((other) => other.parent === message.parent);
  return all.sort((a, b) => a.created - b.created);
}

/** The end of the newest branch below a message. */
export function newestLeaf(messages, id) {
  const children = new Map();
  for (const message of messages.values()) {
    const best = children.get(message.parent);
    if (!best || message.created >= best.created) children.set(message.parent, message);
  }
  while (children.has(id)) id = children.get(id).id;
  return id;
}

/** A title from the first words of a question. */
export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 60 ? line.slice(0, 57).replace(/\s\S*$/, "") + "…" : line || "New conversation";
}

/** A fence that the text cannot end. */
function fenced(name, text) {
  const longest = Math.max(2, ...[...text.matchAll(/`{3,}/g)].map((run) => run[0].length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}`;
}

/** The text of a message as the model gets it: attached files first. */
export function fullText(message) {
  const files = (message.attachments ?? []).map((file) => fenced(file.name, file.text));
  return [...files, message.content].filter((part) => part !== "").join("\n\n");
}

/** The messages of a request. `withReasoning` for servers that take an answer's reasoning back. */
export function requestMessages(path, system, withReasoning) {
  const messages = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  for (const message of path) {
    if (message.role === "user") messages.push({ role: "user", content: fullText(message) });
    if (message.role === "tool") messages.push({ role: "tool", tool_call_id: message.tool_call_id, content: message.content });
    if (message.role !== "assistant" || (!message.content && !message.tool_calls?.length)) continue;
    const answer = { role: "assistant", content: message.content };
    if (message.tool_calls?.length) answer.tool_calls = message.tool_calls;
    if (withReasoning && message.reasoning) answer.reasoning_content = message.reasoning;
    messages.push(answer);
  }
  return messages;
}

/** A conversation's path as Markdown, for reading elsewhere. */
export function asMarkdown(conversation, path) {
  const parts = path.map((message) => {
    const name = { user: "You", assistant: message.model ? `Answer (${message.model})` : "Answer", tool: "Result of a tool" }[message.role];
    const calls = (message.tool_calls ?? []).map((call) => fenced(`Call of ${call.function.name}`, call.function.arguments));
    return [`## ${name}`, fullText(message), ...calls].filter(Boolean).join("\n\n");
  });
  return [`# ${conversation.title}`, ...parts].join("\n\n") + "\n";
}
