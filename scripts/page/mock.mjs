// A server of OpenAI's interface whose answers are canned: the last question's first word chooses one.
import { createServer } from "node:http";

const TEXTS = {
  markdown: `# Title\n\nA [link](https://example.com/a), **bold**, *slanted*, ~~gone~~, \`code\`, https://example.org/b\nand a second line.\n
- one\n  - two\n    1. three\n    2. four\n- [x] done\n- [ ] to do\n\n| left | right |\n|:-----|------:|\n| a | \`1\` |\n| b | **2** |\n
> A quotation\n> with *two* lines\n\n\`\`\`rust\nfn main() {\n    println!("hi"); // </script>\n}\n\`\`\`\n
<img src=x onerror="alert(1)"> [bad](javascript:alert(1)) ![picture](https://example.com/p.png)\n
Prices of $5 and $6 stay, $x^2 + y_1$ is drawn, \\(a \\ne b\\) too.\n\n$$\\int_0^1 \\frac{x^2}{\\sqrt{1+x}}\\,dx = \\sum_{n=1}^{\\infty} a_n$$\n
\\[\n\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}\n\\]\n\nThe end [later].\n\n[later]: https://example.com/later\n`,
};

/** About 200 KB of everything that models write. */
function mixed(n = 200_000) {
  const block = (i) => `## Part ${i}\n\nSome **words** with \`code\`, a [link](https://example.com/${i}) and $x_${i}^2$. ${"The quick brown fox jumps over the lazy dog. ".repeat(6)}\n
${Array.from({ length: 8 }, (_, k) => `${k % 2 ? "  " : ""}- item ${i}.${k} with *some* text`).join("\n")}\n\n\`\`\`python\n${Array.from({ length: 12 }, (_, k) => `def f${k}(x):\n    return x * ${k}  # comment`).join("\n")}\n\`\`\`\n
| name | value |\n|---|---|\n${Array.from({ length: 8 }, (_, k) => `| row ${k} | ${i * k} |`).join("\n")}\n\n$$\\frac{${i}}{x} = \\sqrt{y}$$\n\n`;
  let text = "";
  for (let i = 0; text.length < n; i += 1) text += block(i);
  return text;
}

const LARGE = {
  mixed,
  paragraph: (n = 200_000) => "The **quick** brown fox jumps over the `lazy` dog and runs on, ".repeat(Math.ceil(n / 63)),
  fence: (n = 200_000) => `\`\`\`js\n${'const value = compute("text", 42); // a comment\n'.repeat(Math.ceil(n / 48))}\`\`\`\n`,
  list: (n = 200_000) => Array.from({ length: Math.ceil(n / 50) }, (_, i) => `${i % 5 ? "- " : "- **head** "}item number ${i} with some words in it\n`).join(""),
  table: (n = 200_000) => `| a | b | c |\n|---|---|---|\n${"| some words | `more` words | **42** |\n".repeat(Math.ceil(n / 38))}`,
  thoughts: (n = 200_000) => "I wonder whether this is so, or not.\n".repeat(Math.ceil(n / 37)),
};

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const pieces = (text, size) => text.match(new RegExp(`[\\s\\S]{1,${size}}`, "g")) ?? [];

/** Starts it; `page` gives the document and its policy for an address. Requests are noted in `requests`. */
export async function startMock(page, port = 0, options = {}) {
  const requests = [];
  const isOther = options.isOther ?? false;
  const server = createServer(async (request, response) => {
    if (isOther) {
      response.setHeader("access-control-allow-origin", "*");
      response.setHeader("access-control-allow-headers", "*");
      if (request.method === "OPTIONS") return response.writeHead(204).end();
    }
    const url = new URL(request.url, "http://mock");
    if (url.pathname === "/") {
      const { html, policy } = page(url.searchParams.get("server"));
      return response.writeHead(200, { "content-type": "text/html; charset=utf-8", "content-security-policy": policy }).end(html);
    }
    let body = "";
    for await (const piece of request) body += piece;
    const key = request.headers.authorization;
    if (options.key && url.pathname.startsWith("/v1") && key !== `Bearer ${options.key}`) return json(response, 401, { error: { message: "no key, or a wrong one" } });
    if (url.pathname === "/v1/models") return json(response, 200, { data: options.models?.() ?? [{ id: "canned", owned_by: "mock" }, { id: "second", owned_by: "mock", state: "unloaded" }] });
    if (url.pathname === "/info" && options.info) return json(response, 200, options.info());
    if (url.pathname === "/timings" && options.timings) return json(response, 200, options.timings);
    if (url.pathname !== "/v1/chat/completions") return json(response, 404, { error: { message: "no such path" } });
    const asked = JSON.parse(body);
    requests.push(asked);
    if (await options.before?.(asked, (...what) => json(response, ...what))) return;
    await answer(asked, response).catch(() => response.destroy());
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${server.address().port}`, port: server.address().port, requests, options,
    close: () => { server.closeAllConnections(); return new Promise((resolve) => server.close(resolve)); } };
}

function json(response, status, value, headers = {}) {
  response.writeHead(status, { "content-type": "application/json", ...headers }).end(JSON.stringify(value));
}

async function answer(asked, response) {
  const last = asked.messages.findLast((message) => message.role === "user");
  const [word, ...rest] = String(last?.content ?? "").split(/\s+/);
  if (word === "fails") return json(response, 500, { error: { message: "the engine has stopped" } });
  if (word === "busy") return json(response, 429, { error: { message: "the queue is full" } }, { "retry-after": "7" });
  if (word === "html") return response.writeHead(502, { "content-type": "text/html" }).end("<html>Bad gateway</html>");
  if (word === "whole") return json(response, 200, { choices: [{ message: { role: "assistant", content: "All at once." }, finish_reason: "stop" }] });
  response.writeHead(200, { "content-type": "text/event-stream" });
  response.flushHeaders();
  const write = (value, end = "\n\n") => response.write(`data: ${typeof value === "string" ? value : JSON.stringify(value)}${end}`);
  const delta = (value, end) => write({ model: "canned", choices: [{ index: 0, delta: value, finish_reason: null }] }, end);
  const finish = (reason = "stop") => {
    write({ model: "canned", choices: [{ index: 0, delta: {}, finish_reason: reason }] });
    write({ choices: [], usage: { prompt_tokens: 12, completion_tokens: 34, prompt_tokens_details: { cached_tokens: 5 } } });
    write("[DONE]");
    response.end();
  };
  const isContinued = asked.continue_final_message || asked.messages.at(-1).content === "Continue exactly where you stopped, and repeat nothing.";
  if (isContinued) { delta({ content: "and the rest." }); return finish(); }
  const stream = async (text, size, ms, field = "content") => {
    for (const piece of pieces(text, size)) {
      if (response.destroyed) return;
      delta({ [field]: piece });
      if (ms) await pause(ms);
    }
  };
  switch (word) {
    case "slow":
      for (let i = 0; i < 60 && !response.destroyed; i += 1) { delta({ content: `${rest[0] ?? "word"}${i} ` }); await pause(50); }
      return finish();
    case "cut": await stream("This answer begins ", 5, 5); await pause(50); return response.destroy();
    case "ends": await stream("This one just ends", 5, 5); return response.end();
    case "breaks": await stream("Some text. ", 5, 5); write({ error: { message: "the device failed", code: 500 } }); return response.end();
    case "limit": await stream("Too long ", 5, 2); return finish("length");
    case "filtered": await stream("Hm", 5, 2); return finish("content_filter");
    case "empty": return finish();
    case "reasons": await stream("First I think about it.\nThen again.", 4, 60, rest[0] ?? "reasoning_content"); await stream("The **answer** is 42.", 4, 10); return finish();
    case "tags": await stream("<think>\nHidden thoughts</think>\n\nSeen words", 3, 3); return finish();
    case "tool":
      if (asked.messages.at(-1).role === "tool") { await stream(`It is ${asked.messages.at(-1).content}.`, 6, 2); return finish(); }
      delta({ tool_calls: [{ index: 0, id: "call_1", function: { name: "weather", arguments: "" } }] });
      for (const piece of pieces('{"city": "Bern", "unit": "C"}', 6)) { delta({ tool_calls: [{ index: 0, function: { arguments: piece } }] }); await pause(5); }
      return finish("tool_calls");
    case "lines": for (const piece of ["a ", "b\r\n", "ü€😀"]) delta({ content: piece }, "\r\n\r\n"); response.write(": a comment\r\nevent: ping\r\n\r\n"); return finish();
    case "large": {
      const kind = rest[0] ?? "mixed";
      const text = LARGE[kind](Number(rest[1]) || undefined);
      const field = kind === "thoughts" ? "reasoning_content" : "content";
      // About four seconds.
      const each = Math.ceil(text.length / 20 / 400);
      const all = pieces(text, 20);
      for (let i = 0; i < all.length && !response.destroyed; i += each) {
        for (const piece of all.slice(i, i + each)) delta({ [field]: piece });
        await pause(10);
      }
      return finish();
    }
    default: {
      const text = TEXTS[word] ?? `You said: ${last?.content}`;
      await stream(text, 7, word === "markdown" ? 3 : 1);
      return finish();
    }
  }
}

export { LARGE, TEXTS };
