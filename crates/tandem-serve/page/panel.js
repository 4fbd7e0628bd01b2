// The server's side: ranks and their links, memory, cache, queue, speed over time, and where a token's time goes.

import { bytes, draw, find, make } from "./elements.js";
import { base } from "./settings.js";
import { headers } from "./chat.js";
import { conditionOf, state } from "./state.js";

const N_SAMPLES = 120;
const COLOURS = ["#0b7a6e", "#c2740a", "#7a52c7", "#2a6fd1", "#b8336a", "#5f7a1f", "#8a6d3b", "#3d8f9e", "#a04000", "#4f5fa8"];
/** Tokens per second, one value a look. */
const speeds = [];

/** Where a Tandem server tells about itself: beside /v1. */
const place = (path) => `${base().replace(/\/v1$/, "")}${path}`;

/** The model whose state is shown: the chosen one, where the server has several. */
const chosen = () => (conditionOf(find("model").value) ? find("model").value : undefined);
/** A model that is not in memory has nothing to tell. */
const isAway = () => !["loaded", undefined].includes(conditionOf(find("model").value));

async function get(path) {
  if (isAway()) return null;
  const response = await fetch(`${place(path)}${chosen() ? `?model=${encodeURIComponent(chosen())}` : ""}`, { headers: headers() });
  return response.ok ? response.json() : null;
}

/** Asks the server how it is; null if it does not tell. */
export async function look() {
  let info = await get("/info").catch(() => null);
  if (!info || typeof info !== "object" || !Array.isArray(info.ranks)) info = null;
  state.info = info;
  speeds.push(info ? info.speed.tokens_per_second : ownSpeed());
  if (speeds.length > N_SAMPLES) speeds.shift();
  return info;
}

/** What this page's own answers get. */
function ownSpeed() {
  return [...state.jobs.values()].reduce((sum, job) => sum + (job.message.rate ?? 0), 0);
}

function table(rows) {
  return make("table", {}, make("tbody", {}, ...rows.map(([name, value]) => make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: String(value) })))));
}

function bar(parts, total, label) {
  const box = make("div", { class: "bar", role: "img", "aria-label": label });
  parts.forEach((part, n) => {
    const piece = make("i");
    piece.style.width = `${(100 * part) / Math.max(total, 1e-9)}%`;
    piece.style.background = COLOURS[n % COLOURS.length];
    box.append(piece);
  });
  return box;
}

function history() {
  const most = Math.max(1, ...speeds);
  const points = speeds.map((speed, n) => `${(270 * (n + N_SAMPLES - speeds.length)) / (N_SAMPLES - 1) + 5},${65 - (55 * speed) / most}`);
  const now = speeds.at(-1) ?? 0;
  return draw("svg", { viewBox: "0 0 280 72", role: "img", "aria-label": `Tokens per second of the last looks: now ${now.toFixed(0)}, at most ${most.toFixed(0)}` },
    draw("line", { x1: 5, y1: 65, x2: 275, y2: 65, stroke: "currentColor", "stroke-opacity": 0.3 }),
    draw("polyline", { points: points.join(" "), fill: "none", stroke: COLOURS[0], "stroke-width": 1.5 }),
    text(5, 11, `${most.toFixed(0)} tokens/s`, "faint"));
}

function text(x, y, content, name = "", anchor = "start") {
  const node = draw("text", { x, y, class: name, "text-anchor": anchor });
  node.textContent = content;
  return node;
}

/** Ranks as a ring, with the links between neighbours; a link's label is its time. */
function graph(ranks, timings) {
  const n = ranks.length;
  const radius = n === 1 ? 0 : 62;
  const at = (i) => [140 + radius * 1.35 * Math.sin((2 * Math.PI * i) / n), 90 - radius * Math.cos((2 * Math.PI * i) / n)];
  const links = linksOf(ranks, timings);
  const lines = links.flatMap(({ from, to, label }) => {
    const [[x1, y1], [x2, y2]] = [at(from), at(to)];
    return [draw("line", { x1, y1, x2, y2, stroke: "currentColor", "stroke-opacity": 0.5 }),
      ...(label ? [text((x1 + x2) / 2, (y1 + y2) / 2 - 3, label, "faint", "middle")] : [])];
  });
  const nodes = ranks.flatMap((rank, i) => {
    const [x, y] = at(i);
    const number = text(x, y + 4, String(rank.rank), "", "middle");
    number.style.fill = "#fff";
    return [draw("circle", { cx: x, cy: y, r: 14, fill: COLOURS[0] }), number, text(x, y + 26, rank.host || "this machine", "faint", "middle")];
  });
  const label = `${n} ${n === 1 ? "rank" : "ranks"}. ${links.map((link) => `${link.from} to ${link.to}${link.label ? `: ${link.label}` : ""}`).join("; ")}`;
  return draw("svg", { viewBox: `0 ${n === 1 ? 66 : 0} 280 ${n === 1 ? 58 : 190}`, role: "img", "aria-label": label }, ...lines, ...nodes);
}

const time = (us) => (us < 1000 ? `${us.toFixed(us < 10 ? 1 : 0)} µs` : `${(us / 1000).toFixed(1)} ms`);

/** Each rank talks to the next one; what that takes was measured when they started, and shows in every step. */
function linksOf(ranks, timings) {
  if (ranks.length < 2) return [];
  const measured = timings?.facts?.rank_round_trip_us ?? [];
  const pairs = ranks.length === 2 ? [0] : ranks.map((_, i) => i);
  return pairs.map((from) => {
    const to = (from + 1) % ranks.length;
    const values = [measured[from], measured[to]].filter((us) => us > 0);
    const record = timings?.ranks?.[from];
    const inStep = record ? record.summing_ms + record.receiving_ms + record.sending_ms : 0;
    return { from, to, label: values.length ? time(Math.max(...values) / 2) : inStep > 0 ? `${inStep.toFixed(2)} ms a step` : "" };
  });
}

/** A token's time by part. */
function explained(timings) {
  const { decode } = timings;
  if (!decode) return [make("p", { class: "soft", text: "Nothing has been generated yet." })];
  const parts = new Map(Object.entries(decode.operations_ms));
  if (!parts.size) parts.set("device", decode.working_ms);
  parts.set("communication", decode.summing_ms + decode.receiving_ms + decode.sending_ms);
  parts.set("host", decode.host_ms);
  parts.set("outside", decode.outside_ms);
  const sorted = [...parts].filter(([, ms]) => ms > 0).sort((a, b) => b[1] - a[1]);
  const legend = sorted.map(([name, ms], n) => {
    const colour = make("i");
    colour.style.background = COLOURS[n % COLOURS.length];
    return make("li", {}, colour, `${name.replaceAll("_", " ")} ${ms.toFixed(2)} ms`);
  });
  return [table([["a step", `${decode.ms.toFixed(2)} ms`], ["median, slowest tenth", `${decode.ms_median.toFixed(2)}, ${decode.ms_p90.toFixed(2)} ms`]]),
    bar(sorted.map(([, ms]) => ms), decode.ms, "A token's time by part"), make("ul", { class: "legend" }, ...legend),
    ...(timings.warning ? [make("p", { class: "error", text: timings.warning })] : [])];
}

/** Draws the panel. */
export async function showServer() {
  const { info } = state;
  const timings = info ? await get("/timings").catch(() => null) : null;
  const parts = [make("h2", { text: "Speed" }), history()];
  if (!info) {
    parts.push(table([["this page's answers", `${(speeds.at(-1) ?? 0).toFixed(0)} tokens/s`], ["models", state.models.length]]),
      make("p", { class: "soft", text: isAway() ? `${chosen()} is not loaded. A question loads it.` : "This server tells nothing of its ranks, its memory and its queue." }));
  } else {
    parts.push(...told(info, timings));
  }
  parts.push(...models());
  // Nothing jumps under a reader who has scrolled or selected something.
  const selection = document.getSelection();
  if (selection && !selection.isCollapsed && find("server").contains(selection.anchorNode)) return;
  find("server").replaceChildren(...parts);
}

/** The models of a server that has several and says where each is. */
function models() {
  const several = state.models.filter((model) => conditionOf(model.id));
  if (!several.length) return [];
  const rows = several.map((model) => {
    const { id, pinned, memory_bytes, requests_running, requests_waiting, error } = model;
    const about = [conditionOf(id), pinned && "pinned", memory_bytes && bytes(memory_bytes), requests_running && `${requests_running} running`,
      requests_waiting && `${requests_waiting} waiting`, error];
    return [id, about.filter(Boolean).join(", ")];
  });
  return [make("h2", { text: "Models" }), table(rows)];
}

function told(info, timings) {
  const { speed, cache, requests, ranks, drafts } = info;
  const percent = (part, whole) => `${((100 * part) / Math.max(whole, 1e-9)).toFixed(0)} %`;
  const weights = ranks.reduce((sum, rank) => sum + rank.weight_bytes, 0);
  const caches = ranks.reduce((sum, rank) => sum + rank.cache_bytes, 0);
  const used = ranks.reduce((sum, rank) => sum + rank.cache_bytes_used, 0);
  const parts = [
    table([["generated", `${speed.tokens_per_second.toFixed(0)} tokens/s`], ["weights read", `${bytes(speed.bytes_per_second)}/s`],
      ...(speed.bandwidth > 0 ? [["of the measured bandwidth", percent(speed.bytes_per_second, speed.bandwidth)]] : []),
      ...(drafts?.tokens ? [["drafts accepted", percent(drafts.accepted, drafts.tokens)]] : [])]),
    make("h2", { text: "Queue" }), table([["running", `${requests.running} of ${info.max_batch}`], ["waiting", requests.waiting]]),
    make("h2", { text: ranks.length === 1 ? "Rank" : "Ranks" }), graph(ranks, timings),
    ...ranks.map((rank) => table([
      [`rank ${rank.rank}${rank.host && `, ${rank.host}`}`, rank.n_layers ? `layers ${rank.first_layer} to ${rank.first_layer + rank.n_layers - 1}` : "no layers"],
      ["weights", bytes(rank.weight_bytes)], ["cache in use", `${bytes(rank.cache_bytes_used)} of ${bytes(rank.cache_bytes)}`],
      ["time a token", rank.rows ? `${((1e3 * rank.busy_seconds) / rank.rows).toFixed(2)} ms` : "none yet"]])),
    make("h2", { text: "Memory" }), bar([weights, used], weights + caches, `Weights ${bytes(weights)}, cache in use ${bytes(used)} of ${bytes(caches)}`),
    table([["weights", bytes(weights)], ["cache in use", bytes(used)], ["cache in all", bytes(caches)]]),
    make("h2", { text: "Cache" }), bar([cache.used, cache.idle], cache.pages, `${cache.used} pages in use, ${cache.idle} kept, of ${cache.pages}`),
    table([["in use", `${cache.used} of ${cache.pages} pages`], ["kept for later", `${cache.idle} pages`], ["tokens a page", cache.page_tokens],
      ["prompt tokens run", cache.prompt_tokens], ["found in the cache", cache.cached_tokens], ["of these from disk", cache.disk_tokens]]),
  ];
  if (timings) parts.push(make("h2", { text: "Where a token's time goes" }), ...explained(timings));
  parts.push(make("h2", { text: "Model" }), table([["name", info.model], ["family", info.model_type], ["context", info.context], ["numerics", info.numerics],
    ["Tandem", info.version]]));
  return parts;
}
