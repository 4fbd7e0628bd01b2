// Settings of this browser, and presets of them. The key stays in this tab unless the user wants it kept.

import { find, make } from "./elements.js";

const SAMPLING = ["system", "temperature", "top_p", "max_tokens", "seed", "reasoning_effort", "tools"];
const KEPT = [...SAMPLING, "base", "keep_key", "theme", "preset"];
const FIRST = { "Server's defaults": {}, "Exact": { temperature: "0" }, "Lively": { temperature: "1", top_p: "0.95" } };

function stored(area, name) {
  try {
    return area().getItem(name);
  } catch {
    return null;
  }
}

export function keep(name, value, area = () => localStorage) {
  try {
    if (value === null) area().removeItem(name);
    else area().setItem(name, value);
  } catch {
    // Storage is off: the settings hold for this page only.
  }
}

export const remembered = (name) => stored(() => localStorage, name);

function parsed(name) {
  try {
    const value = JSON.parse(stored(() => localStorage, name) ?? "{}");
    return value && typeof value === "object" ? value : {};
  } catch {
    return {};
  }
}

const values = { ...Object.fromEntries(KEPT.map((name) => [name, ""])), ...parsed("tandem-settings") };
const presets = parsed("tandem-presets");

export const setting = (name) => values[name];
export const apiKey = () => find("key").value.trim();

export function number(name) {
  const value = String(values[name] ?? "").trim();
  return value === "" || !Number.isFinite(Number(value)) ? undefined : Number(value);
}

/** Tools that the user described, none if they cannot be read. */
export function tools() {
  try {
    const list = JSON.parse(values.tools || "[]");
    return Array.isArray(list) && list.length ? list : undefined;
  } catch {
    return undefined;
  }
}

/** The address of an interface of OpenAI's kind: "" (this server's) or as in https://example.com/v1. */
export function baseOf(text) {
  const trimmed = text.trim().replace(/\/+$/, "");
  if (!trimmed) return "/v1";
  const url = new URL(/^https?:\/\//i.test(trimmed) ? trimmed : `http://${trimmed}`);
  if (url.username || url.search || url.hash) throw new Error("an address has no user, question mark or #");
  return url.origin + (url.pathname === "/" ? "/v1" : url.pathname.replace(/\/+$/, ""));
}

/** Where requests go. */
export function base() {
  try {
    return baseOf(values.base);
  } catch {
    return "/v1";
  }
}

/**
 * The server's policy lets the page talk to the server it came from, and to the one named in its own address. The page goes by its
 * settings alone, so that a link cannot send a conversation elsewhere; it adds the name itself.
 */
export function addressFor(base, href) {
  const here = new URL(href);
  const origin = new URL(base, here).origin;
  if (origin === here.origin) {
    here.searchParams.delete("server");
    return here.href;
  }
  if (here.searchParams.get("server") !== origin) here.searchParams.set("server", origin);
  return here.href;
}

/** Fills the form, and keeps what is changed in it. `onChange` gets the name of a setting. */
export function startSettings(onChange) {
  const key = stored(() => localStorage, "tandem-key");
  find("key").value = key ?? stored(() => sessionStorage, "tandem-key") ?? "";
  const keepKey = () => {
    keep("tandem-key", values.keep_key ? find("key").value : null);
    keep("tandem-key", values.keep_key ? null : find("key").value, () => sessionStorage);
  };
  for (const name of KEPT.filter((name) => name !== "preset")) {
    const field = find(name);
    const isBox = field.type === "checkbox";
    if (isBox) field.checked = Boolean(values[name]);
    else field.value = values[name];
    field.addEventListener(isBox || field.localName === "select" || name === "base" ? "change" : "input", () => {
      set(name, isBox ? field.checked : field.value);
      if (SAMPLING.includes(name)) choosePreset("");
      if (name === "keep_key") keepKey();
      check();
      onChange(name);
    });
  }
  find("key").addEventListener("change", () => { keepKey(); onChange("key"); });
  find("preset").addEventListener("change", () => apply(find("preset").value, onChange));
  find("save-preset").addEventListener("click", () => onChange("save-preset"));
  find("delete-preset").addEventListener("click", () => {
    delete presets[values.preset];
    keep("tandem-presets", JSON.stringify(presets));
    choosePreset("");
  });
  choosePreset(values.preset);
  check();
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

function set(name, value) {
  values[name] = value;
  keep("tandem-settings", JSON.stringify(values));
  if (name === "theme") paint();
}

/** The system's colours, unless others are chosen. */
function paint() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = values.theme || system;
}

function check() {
  let wrong = "";
  try {
    baseOf(values.base);
  } catch (error) {
    wrong = `This is no address (${error.message}).`;
  }
  find("base-error").textContent = wrong;
  find("base-error").hidden = !wrong;
  wrong = values.tools.trim() && !tools() ? "Tools are a JSON list of functions, as in the interface of OpenAI." : "";
  find("tools-error").textContent = wrong;
  find("tools-error").hidden = !wrong;
}

function choosePreset(name) {
  const names = [...Object.keys(FIRST), ...Object.keys(presets)];
  const options = ["", ...names].map((name) => make("option", { value: name, text: name || "own values" }));
  find("preset").replaceChildren(...options);
  find("preset").value = names.includes(name) ? name : "";
  find("delete-preset").disabled = !Object.hasOwn(presets, name);
  set("preset", find("preset").value);
}

function apply(name, onChange) {
  const preset = presets[name] ?? FIRST[name];
  if (!preset) return choosePreset("");
  for (const field of SAMPLING) {
    // A system message and tools stay where a preset says nothing of them.
    if (!Object.hasOwn(preset, field) && Object.hasOwn(FIRST, name) && ["system", "tools"].includes(field)) continue;
    find(field).value = preset[field] ?? "";
    set(field, find(field).value);
  }
  choosePreset(name);
  check();
  onChange("preset");
}

export function savePreset(name) {
  presets[name] = Object.fromEntries(SAMPLING.map((field) => [field, values[field]]));
  keep("tandem-presets", JSON.stringify(presets));
  choosePreset(name);
}

/** What the server uses where a field is empty. */
export function showDefaults(sampling) {
  for (const [name, value] of Object.entries(sampling ?? {})) {
    if (typeof value === "number" && ["temperature", "top_p"].includes(name)) find(name).placeholder = String(Number(value.toFixed(3)));
  }
}
