// Markdown to elements. Nothing that a model writes becomes markup: the parser's tokens are turned into elements one by one, HTML
// stays text, links lead to the web only, and pictures are links unless their bytes are in the text.

import { copy, make } from "./elements.js";

const LANGUAGES = { sh: "bash", shell: "bash", zsh: "bash", console: "bash", js: "javascript", jsx: "javascript", mjs: "javascript", ts: "typescript",
  tsx: "typescript", py: "python", rs: "rust", "c++": "cpp", h: "c", hpp: "cpp", cu: "cpp", cuda: "cpp", html: "xml", svg: "xml", yml: "yaml",
  toml: "ini", golang: "go", jsonc: "json", patch: "diff" };
/** Longer code stays plain: colouring it would hold the page up. */
const LONGEST_COLOURED = 60_000;
/** Items of one list or rows of one table: a longer one goes on in another, so that what is far away is not laid out again. */
const MOST_ITEMS = 100;
/** An open list or table of more bytes than this is drawn piece by piece. */
const LARGE = 4_000;
/** Characters of a piece of plain text, about. */
const PIECE = 4_000;

// --- mathematics: $..$, $$..$$, \(..\), \[..\] and environments ---

const BLOCK_MATHS = /^(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\]|(\\begin\{((?:align|gather|equation|multline|alignat|eqnarray)\*?)\}[\s\S]+?\\end\{\4\}))[ \t]*(?:\n+|$)/;
// As in pandoc: no space inside of the dollars, and no digit after them, so that prices stay prices.
const INLINE_MATHS = /^(?:\$\$((?:\\[\s\S]|[^$\\])+?)\$\$|\$(?![\s$])((?:\\[\s\S]|[^$\\\n])+?)(?<![\s\\])\$(?![\d$])|\\\(([\s\S]+?)\\\)|\\\[([\s\S]+?)\\\])/;

const blockMaths = (text) => {
  const found = BLOCK_MATHS.exec(text);
  return found ? { type: "maths", raw: found[0], text: found[1] ?? found[2] ?? found[3], isBlock: true } : undefined;
};
const inlineMaths = (text) => {
  const found = INLINE_MATHS.exec(text);
  return found ? { type: "maths", raw: found[0], text: found[1] ?? found[2] ?? found[3] ?? found[4], isBlock: (found[1] ?? found[4]) !== undefined } : undefined;
};
/** The next dollar, if the parser would run over it: it stops by itself at the other characters. */
const nextDollar = (text) => {
  const at = text.search(/[\\<!\[`*_$]/);
  return text[at] === "$" ? at : undefined;
};
const EXTENSIONS = { block: [blockMaths], inline: [inlineMaths], startInline: [nextDollar], childTokens: {}, renderers: {} };

function maths(source, isBlock) {
  const box = make(isBlock ? "div" : "span", isBlock ? { class: "math-block", tabindex: "0", role: "group", "aria-label": "Formula" } : {});
  try {
    if (!globalThis.temml) throw new Error("formulas are not drawn");
    const tree = temml.__renderToMathMLTree(source.trim(), { displayMode: isBlock, throwOnError: true, trust: false, maxSize: [50, 50], maxExpand: 500 });
    restyle(tree);
    box.append(tree.toNode());
  } catch (error) {
    box.append(make("code", { text: source.trim(), title: String(error.message ?? error) }));
  }
  return box;
}

/** Style attributes as properties: the page's policy lets no attribute of a text be a style. */
function restyle(node) {
  if (node.attributes?.style) {
    for (const rule of node.attributes.style.split(";")) {
      const [name, value] = rule.split(":");
      if (value !== undefined) (node.style ??= {})[name.trim()] = value.trim();
    }
    delete node.attributes.style;
  }
  for (const child of node.children ?? []) restyle(child);
}

// --- tokens to elements ---

/** Tokens of a text in which the addresses in `links`, by name, are known from before. */
function lex(text, links) {
  const lexer = new marked.Lexer({ gfm: true, breaks: true, extensions: EXTENSIONS });
  Object.assign(lexer.tokens.links, links);
  return lexer.lex(text);
}

/** A web address or mail address; anything else (javascript:, file:) leads nowhere. */
function safeAddress(address) {
  return /^(https?:\/\/|mailto:)/i.test(address) ? address : undefined;
}

function plain(text) {
  // The parser leaves entities of the source in place.
  return text.includes("&") ? text.replace(/&(#x?[0-9a-f]+|amp|lt|gt|quot|nbsp|copy|hellip|mdash|ndash|rarr|larr|times|deg);/gi, (all, name) => {
    const code = name[0] === "#" ? (/^#x/i.test(name) ? parseInt(name.slice(2), 16) : parseInt(name.slice(1), 10)) : undefined;
    if (code !== undefined) return code > 0 && code <= 0x10ffff ? String.fromCodePoint(code) : all;
    return { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0", copy: "©", hellip: "…", mdash: "—", ndash: "–", rarr: "→", larr: "←", times: "×", deg: "°" }[name.toLowerCase()];
  }) : text;
}

function inline(parent, tokens = []) {
  for (const token of tokens) {
    switch (token.type) {
      case "strong": case "em": case "del": {
        const node = make(token.type);
        inline(node, token.tokens);
        parent.append(node);
        break;
      }
      case "codespan": parent.append(make("code", { text: token.text })); break;
      case "br": parent.append(make("br")); break;
      case "maths": parent.append(maths(token.text, token.isBlock)); break;
      case "link": {
        const href = safeAddress(token.href);
        const node = make(href ? "a" : "span", href ? { href, title: token.title, target: "_blank", rel: "noopener noreferrer nofollow" } : {});
        inline(node, token.tokens);
        parent.append(node);
        break;
      }
      case "image": parent.append(picture(token)); break;
      case "html": parent.append(/^<br\s*\/?>$/i.test(token.raw.trim()) ? make("br") : token.raw); break;
      default:
        if (token.tokens) inline(parent, token.tokens);
        else parent.append(plain(token.text ?? token.raw).replace(JOINER, ""));
    }
  }
}

function picture(token) {
  if (/^data:image\/(png|jpeg|gif|webp);base64,[a-z0-9+/=]+$/i.test(token.href)) return make("img", { src: token.href, alt: token.text });
  const href = safeAddress(token.href);
  const text = `Picture: ${token.text || token.href}`;
  // A picture from elsewhere would tell its server who reads this.
  return href ? make("a", { href, target: "_blank", rel: "noopener noreferrer nofollow", text }) : make("span", { text });
}

/** Code with its language and a button that copies it. */
function codeBlock(language, text) {
  const code = make("code", { text });
  const name = (language ?? "").trim().split(/[\s,{]/)[0];
  const button = make("button", { type: "button", class: "plain", text: "Copy", click: async () => {
    await copy(code.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } });
  const label = `Code${name ? `, ${name}` : ""}`;
  const box = make("div", { class: "code" }, make("div", { class: "row" }, make("span", { text: name || "text" }), button),
    make("pre", { tabindex: "0", role: "region", "aria-label": label }, code));
  return { box, code, name };
}

function colour(code, name) {
  const language = LANGUAGES[name.toLowerCase()] ?? name.toLowerCase();
  const text = code.textContent;
  if (!globalThis.hljs?.getLanguage(language) || text.length > LONGEST_COLOURED) return;
  const { _emitter: emitter } = hljs.highlight(text, { language, ignoreIllegals: true });
  if (!emitter?.rootNode) return;
  code.replaceChildren();
  coloured(code, emitter.rootNode);
}

function coloured(parent, node) {
  for (const child of node.children) {
    if (typeof child === "string") {
      parent.append(child);
      continue;
    }
    const scope = child.scope?.split(".")[0];
    const span = make("span", scope && !scope.startsWith("language:") ? { class: `hljs-${scope}` } : {});
    coloured(span, child);
    parent.append(span);
  }
}

function item(token) {
  const node = make("li", token.task ? { class: "task" } : {});
  if (token.task) node.append(make("input", { type: "checkbox", disabled: true, checked: token.checked, "aria-label": token.checked ? "done" : "to do" }));
  for (const part of token.tokens) {
    if (part.type === "checkbox") continue;
    if (part.type === "text") inline(node, part.tokens ?? [part]);
    else if (part.type === "paragraph" && !token.loose) inline(node, part.tokens);
    else block(node, part);
  }
  return node;
}

function row(cells, tag) {
  return make("tr", {}, ...cells.map((cell) => {
    const node = make(tag, { class: cell.align === "center" || cell.align === "right" ? cell.align : undefined, scope: tag === "th" ? "col" : undefined });
    inline(node, cell.tokens);
    return node;
  }));
}

/** Depths of the headings above the next one: a level is never left out, whatever the text does. */
let above = [];

function levelOf(depth) {
  while (above.length && above.at(-1) >= depth) above.pop();
  above.push(depth);
  // The page's title and the message's name are above these.
  return Math.min(2 + above.length, 6);
}

/** Appends the elements of one token; the result is what a later piece of the same token goes into. */
function block(parent, token) {
  switch (token.type) {
    case "space": case "def": return undefined;
    case "heading": {
      const node = make(`h${levelOf(token.depth)}`, { class: token.depth < 3 && "large" });
      inline(node, token.tokens);
      parent.append(node);
      return undefined;
    }
    case "code": {
      const { box, code, name } = codeBlock(token.lang, token.text);
      colour(code, name);
      parent.append(box);
      return undefined;
    }
    case "blockquote": {
      const node = make("blockquote");
      for (const part of token.tokens) block(node, part);
      parent.append(node);
      return undefined;
    }
    case "list": {
      const node = make(token.ordered ? "ol" : "ul", { start: token.ordered && token.start !== 1 && Number.isInteger(token.start) ? token.start : undefined });
      node.append(...token.items.map(item));
      parent.append(node);
      return node;
    }
    case "table": {
      const body = make("tbody", {}, ...token.rows.map((cells) => row(cells, "td")));
      const table = make("table", {}, make("thead", {}, row(token.header, "th")), body);
      parent.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" }, table));
      return body;
    }
    case "hr": parent.append(make("hr")); return undefined;
    case "maths": parent.append(maths(token.text, true)); return undefined;
    case "html": parent.append(make("p", { class: "plain-text", text: token.raw.trimEnd() })); return undefined;
    default: {
      const node = make("p");
      inline(node, token.tokens ?? [token]);
      parent.append(node);
      return node;
    }
  }
}

/** A whole text. */
export function markdown(parent, text) {
  above = [];
  for (const token of lex(text, {})) block(parent, token);
}

// --- a text that grows ---

/** Whether anything is selected; to ask at every step would lay the page out each time. */
let hasSelection = false;
document.addEventListener("selectionchange", () => { hasSelection = !document.getSelection().isCollapsed; });

const OPENING = /^( {0,3})(`{3,}|~{3,})([^\n]*)\n/;

/**
 * Draws a text that grows at its end. What can no longer change is drawn once and stays as it is, so that a selection in it stays
 * too; the last block is drawn again. Long blocks of code, lists and tables grow by their lines.
 */
export class Growing {
  /** `onBlock` gets each element that is complete. */
  constructor(parent, onBlock = () => {}) {
    this.parent = parent;
    this.onBlock = onBlock;
    this.start();
  }

  start() {
    this.parent.replaceChildren();
    // Characters drawn for good, and the elements of the rest.
    this.nDrawn = 0;
    this.last = [];
    this.links = {};
    this.open = null;
    this.above = [];
  }

  /** Whether the user has selected something in the part that is drawn again. */
  isSelected() {
    return hasSelection && this.last.some((node) => document.getSelection().containsNode(node, true));
  }

  /** Draws `text`, which begins with the one of the last time. */
  set(text, isEnd = false) {
    if (text.includes("\r")) text = text.replace(/\r\n?/g, "\n");
    while (this.step(text, isEnd)) {
      // A block of code has begun or ended, and there is more.
    }
    if (isEnd && Object.keys(this.links).length && text.length < LONGEST_COLOURED) this.again(text);
  }

  step(text, isEnd) {
    if (this.open?.kind === "code" && !this.code(text, isEnd)) return false;
    for (const node of this.last) node.remove();
    this.last = [];
    const rest = text.slice(this.nDrawn);
    if (!rest) return false;
    if (!this.open && this.begin(rest)) return true;
    const header = this.open?.header ?? "";
    const tokens = lex(header + rest, this.links);
    const final = isEnd ? tokens.length : this.countFinal(tokens, header.length, rest);
    above = this.above;
    for (const [i, token] of tokens.entries()) {
      if (i === final) above = [...above];
      const raw = i === 0 && header ? token.raw.slice(header.length) : token.raw;
      if (i === final && !this.open && this.begin(raw)) return true;
      this.token(token, raw, i < final, i === tokens.length - 1 && !isEnd);
    }
    return false;
  }

  /** Tokens at the beginning that nothing can change any more. */
  countFinal(tokens, nHeader, rest) {
    const solid = tokens.map((token, i) => (token.type === "space" ? -1 : i)).filter((i) => i >= 0);
    // A line that is not complete can still join the block before it.
    const partial = rest.length - (rest.lastIndexOf("\n") + 1);
    let end = tokens.reduce((n, token) => n + token.raw.length, -nHeader);
    let final = solid.at(-1) ?? 0;
    for (let i = tokens.length - 1; i >= final; i -= 1) end -= tokens[i].raw.length;
    if (final > 0 && end >= rest.length - partial) final = solid.at(-2) ?? 0;
    return final;
  }

  token(token, raw, isFinal, isLast) {
    const before = this.parent.lastChild;
    const into = this.open && this.open.kind === token.type ? this.open.node : null;
    if (isFinal) {
      this.nDrawn += raw.length;
      // The first one counts; before it is complete its address is not either.
      if (token.type === "def") this.links[token.tag] ??= { href: token.href, title: token.title };
      if (into) this.more(into, token, partsOf(token));
      else this.block(token);
      if (token.type !== "space") this.open = null;
      return;
    }
    const parts = partsOf(token);
    const nHeader = into ? this.open.header.length : 0;
    if (isLast && parts.length > 2 && (into || raw.length > LARGE)) {
      // All but the last two parts are complete; of a paragraph's words all but the last hundreds.
      const { n, size } = countParts(token, parts);
      if (!into) {
        const first = token.type === "list" ? { ...token, items: [] } : token.type === "table" ? { ...token, rows: [] } : { ...token, tokens: [] };
        const header = { list: "", table: token.raw.slice(0, sizeOfRows(token.raw, 2)), paragraph: JOINER }[token.type];
        this.open = { kind: token.type, node: block(this.parent, first), header };
      }
      for (let i = 0; i < n; i += MOST_ITEMS) this.more(this.open.node, token, parts.slice(i, Math.min(n, i + MOST_ITEMS)));
      this.nDrawn += Math.max(0, size - nHeader);
      this.last.push(...this.more(this.open.node, token, parts.slice(n), false));
    } else if (into) {
      this.last.push(...this.more(into, token, parts, false));
    } else {
      block(this.parent, token);
      for (let node = before ? before.nextSibling : this.parent.firstChild; node; node = node.nextSibling) this.last.push(node);
    }
  }

  block(token) {
    const before = this.parent.lastChild;
    block(this.parent, token);
    if (this.parent.lastChild !== before) this.onBlock(this.parent.lastChild);
  }

  more(node, token, parts, isFinal = true) {
    if (token.type === "paragraph") {
      const span = make("span");
      inline(span, parts);
      node.append(span);
      if (isFinal && parts.length) this.onBlock(span);
      return [span];
    }
    if (isFinal && token.type === "list" && node.childElementCount + parts.length > MOST_ITEMS) {
      const start = node.localName === "ol" ? (node.start ?? 1) + node.childElementCount : undefined;
      node = this.open.node = make(node.localName, { class: "goes-on", start });
      this.parent.append(node);
    }
    if (isFinal && token.type === "table" && node.childElementCount + parts.length > MOST_ITEMS) node = this.open.node = nextTable(node);
    const nodes = parts.map((part) => (token.type === "list" ? item(part) : row(part, "td")));
    node.append(...nodes);
    if (isFinal) nodes.forEach((one) => this.onBlock(one));
    return nodes;
  }

  /** Opens a block of code if `rest` begins with a fence: its lines are appended as they come. */
  begin(rest) {
    const [line, indent, fence, info] = OPENING.exec(rest) ?? [];
    if (!line || (fence[0] === "`" && info.includes("`"))) return false;
    const { box, code, name } = codeBlock(info, "");
    this.parent.append(box);
    this.nDrawn += line.length;
    this.open = { kind: "code", box, code, name, text: new GrowingText(code), indent: indent.length, end: new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`) };
    return true;
  }

  /** Appends lines of code; whether the block is over. */
  code(text, isEnd) {
    const { open } = this;
    const rest = text.slice(this.nDrawn);
    const lines = rest.split("\n");
    const partial = isEnd ? null : lines.pop();
    let added = "", size = 0, isOver = false;
    for (const line of lines) {
      size += line.length + 1;
      isOver = open.end.test(line);
      if (isOver) break;
      added += (open.indent ? line.replace(new RegExp(`^ {0,${open.indent}}`), "") : line) + "\n";
    }
    // The line that still grows is shown, unless it may be the end.
    open.partial?.remove();
    open.partial = null;
    open.text.add(added);
    this.nDrawn += Math.min(size, rest.length);
    if (!isOver && partial && !/^ {0,3}[`~]/.test(partial)) {
      open.partial = make("span", { text: partial });
      open.code.append(open.partial);
    }
    if (!isOver && !isEnd) return false;
    this.open = null;
    open.text.trimEnd();
    colour(open.code, open.name);
    this.onBlock(open.box);
    return true;
  }

  /** Links defined below their use, now that all is here. */
  again(text) {
    this.parent.replaceChildren();
    this.last = [];
    above = [];
    for (const token of lex(text, this.links)) block(this.parent, token);
  }
}

/** Text that grows at its end, in pieces: laying out one long text at every word would hold the page up. */
export class GrowingText {
  constructor(parent) {
    this.parent = parent;
    this.node = null;
  }

  add(text) {
    while (text) {
      if (!this.node || this.node.length > PIECE) {
        this.node = document.createTextNode("");
        this.parent.append(make("span", { class: "piece" }, this.node));
      }
      // A piece ends with a line.
      const end = text.indexOf("\n", Math.max(0, PIECE - this.node.length)) + 1 || text.length;
      this.node.appendData(text.slice(0, end));
      text = text.slice(end);
      if (text) this.node = null;
    }
  }

  /** Leaves out the end of the last line. */
  trimEnd() {
    if (this.node?.data.endsWith("\n")) this.node.deleteData(this.node.length - 1, 1);
  }
}

/** A table that goes on below another one, whose columns keep their widths from here on. */
function nextTable(body) {
  const table = body.parentNode;
  if (!table.querySelector("colgroup")) {
    const cells = [...(table.tHead?.rows[0].cells ?? [])];
    const columns = cells.map((cell) => {
      const column = make("col");
      column.style.width = `${cell.offsetWidth}px`;
      return column;
    });
    table.prepend(make("colgroup", {}, ...columns));
    table.style.width = `${table.offsetWidth}px`;
    table.style.tableLayout = "fixed";
  }
  const next = make("tbody");
  const more = make("table", { class: "goes-on", "aria-label": "The table goes on" }, table.querySelector("colgroup").cloneNode(true), next);
  more.style.width = table.style.width;
  more.style.tableLayout = "fixed";
  table.parentNode.append(more);
  return next;
}

/** Begins the rest of a paragraph, which would be a list or a heading otherwise; it is not seen. */
const JOINER = "\u2060";

/** What an open block grows by. */
function partsOf(token) {
  if (token.type === "list") return token.items;
  if (token.type === "table") return token.rows;
  return token.type === "paragraph" ? token.tokens.flatMap(words) : [];
}

/** A long text in pieces that end with a space. */
function words(token) {
  if (token.type !== "text" || token.tokens || token.raw !== token.text || token.raw.length < 400) return [token];
  return (token.raw.match(/[\s\S]{1,300}\S*\s*/g) ?? []).map((text) => ({ type: "text", raw: text, text }));
}

/** How many of its parts are complete, and how many characters these are. */
function countParts(token, parts) {
  if (token.type === "table") return { n: parts.length - 2, size: sizeOfRows(token.raw, parts.length) };
  let n = parts.length - 2;
  if (token.type === "paragraph") for (let left = 0; n > 0 && left < 600; n -= 1) left += parts[n].raw.length;
  return { n, size: parts.slice(0, n).reduce((sum, part) => sum + part.raw.length, 0) };
}

/** Characters of the first `n` lines. */
function sizeOfRows(text, n) {
  let at = 0;
  for (; n > 0; n -= 1) {
    const end = text.indexOf("\n", at);
    if (end < 0) return text.length;
    at = end + 1;
  }
  return at;
}
