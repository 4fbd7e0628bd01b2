// Answers as they arrive: server-sent events, and what their frames add to a message. Any OpenAI-compatible server.

/** The `data` of each server-sent event of a body. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "", data = [];
  for (;;) {
    const { done, value } = await reader.read();
    rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
    // A carriage return at the end may be half of a line's end.
    const complete = !done && rest.endsWith("\r") ? rest.length - 1 : rest.length;
    const lines = rest.slice(0, complete).split(/\r\n|\n|\r/);
    rest = lines.pop() + rest.slice(complete);
    for (const line of lines) {
      if (line === "") {
        if (data.length) yield data.join("\n");
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    if (done) {
      if (rest.startsWith("data:")) data.push(rest.slice(rest[5] === " " ? 6 : 5));
      if (data.length) yield data.join("\n");
      return;
    }
  }
}

/** An error of a server's answer: `message`, HTTP `status`, seconds after which to try again. */
export class ServerError extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    Object.assign(this, { name: "ServerError", status, retryAfter });
  }
}

/** The error that a response without success tells of. */
export async function errorOf(response) {
  const text = (await response.text().catch(() => "")).slice(0, 4000);
  let message = text.trim().startsWith("<") ? "" : text;
  try {
    const { error, detail, message: plain } = JSON.parse(text);
    message = error?.message ?? (typeof error === "string" ? error : undefined) ?? plain ?? (typeof detail === "string" ? detail : text);
  } catch {
    // The text itself is all there is.
  }
  const retryAfter = Number(response.headers.get("retry-after")) || undefined;
  return new ServerError(String(message || response.statusText || `HTTP ${response.status}`).slice(0, 1000), response.status, retryAfter);
}

const THINK = "<think>", END = "</think>";

/** What frames add up to. Servers without a parser for reasoning write it into the text, between tags. */
export class Gathered {
  constructor(message) {
    this.message = message;
    this.start = message.content ?? "";
    this.text = "";
    this.nFrames = 0;
    this.isOver = false;
  }

  /** Takes one frame, or a whole answer of a server that does not stream. */
  take(frame) {
    if (frame.error) {
      const { error } = frame;
      throw new ServerError(String(error.message ?? error), Number(error.code) || undefined);
    }
    const { message } = this;
    if (frame.model) message.model = frame.model;
    const choice = frame.choices?.[0];
    const delta = choice?.delta ?? choice?.message;
    if (delta) {
      const reasoning = delta.reasoning_content ?? delta.reasoning;
      if (typeof reasoning === "string" && reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
      if (typeof delta.content === "string" && delta.content) this.add(delta.content);
      if (typeof delta.refusal === "string" && delta.refusal) this.add(delta.refusal);
      for (const call of delta.tool_calls ?? []) this.call(call);
      if (reasoning || delta.content || delta.tool_calls?.length) this.nFrames += 1;
    }
    if (choice?.finish_reason) {
      message.finish_reason = choice.finish_reason;
      this.isOver = true;
    }
    if (frame.usage) message.usage = frame.usage;
  }

  add(piece) {
    const { message } = this;
    if (this.tags === "none") {
      message.content += piece;
      return;
    }
    // Until it is known whether the text begins with a tag, and until that tag ends.
    this.text += piece;
    const begins = this.text.trimStart();
    if (this.start === "" && begins.startsWith(THINK)) {
      const end = begins.indexOf(END);
      message.reasoning = begins.slice(THINK.length, end < 0 ? undefined : end).trim();
      message.content = end < 0 ? "" : begins.slice(end + END.length).trimStart();
      // Space before the first word is left out.
      if (message.content) this.tags = "none";
    } else if (this.start !== "" || begins.length >= THINK.length || !THINK.startsWith(begins)) {
      this.tags = "none";
      message.content = this.start + this.text;
    }
  }

  call(delta) {
    const calls = (this.message.tool_calls ??= []);
    const last = calls.length - 1;
    // Some servers leave the index out: a new id is a new call.
    const index = delta.index ?? (delta.id && calls[last]?.id !== delta.id ? calls.length : Math.max(last, 0));
    if (!Number.isInteger(index) || index < 0 || index > 999) return;
    while (calls.length <= index) calls.push({ id: "", type: "function", function: { name: "", arguments: "" } });
    const call = calls[index];
    if (delta.id) call.id = delta.id;
    if (delta.function?.name) call.function.name += delta.function.name;
    const given = delta.function?.arguments;
    if (given !== undefined && given !== null) call.function.arguments += typeof given === "string" ? given : JSON.stringify(given);
  }
}

/** Asks for an answer and puts it into `gathered` piece by piece; resolves to whether the answer came to its end. */
export async function ask(url, headers, body, gathered, signal, onChange) {
  const response = await fetch(url, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw await errorOf(response);
  if (!(response.headers.get("content-type") ?? "").includes("event-stream")) {
    gathered.take(await response.json());
    onChange();
    return true;
  }
  try {
    for await (const data of events(response.body)) {
      if (data.trim() === "[DONE]") return true;
      let frame;
      try {
        frame = JSON.parse(data);
      } catch {
        continue;
      }
      gathered.take(frame);
      onChange();
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    // The connection broke: what has arrived stays.
    return gathered.isOver;
  }
  return gathered.isOver;
}
