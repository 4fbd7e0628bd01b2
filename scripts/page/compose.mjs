// Puts the chat page together as crates/tandem-serve/src/page.rs does, so that it can be tried without a build.
// check.mjs compares the two.
import { readFileSync } from "node:fs";

const source = new URL("../../crates/tandem-serve/", import.meta.url);
const file = (name) => readFileSync(new URL(name, source), "utf8");

export function compose() {
  const rust = file("src/page.rs");
  const libraries = [...rust.matchAll(/include_str!\("\.\.\/(page\/vendor\/\w+\.js)"\)/g)].map(([, name]) => file(name));
  const styles = [...rust.matchAll(/include_str!\("\.\.\/(page\/[\w/]+\.css)"\)/g)].map(([, name]) => file(name));
  const font = `@font-face { font-family: "Page Math"; src: url(data:font/woff2;base64,${readFileSync(new URL("page/vendor/math.woff2", source)).toString("base64")}) format("woff2"); }\n`;
  const modules = [...rust.matchAll(/\("(\w+)", include_str!\("\.\.\/(page\/\w+\.js)"\)\)/g)].map(([, name, path]) => scoped(name, file(path)));
  const scripts = [...libraries, `"use strict";\n${modules.join("")}`].map((script) => `<script>${script}</script>\n`).join("").trimEnd();
  return file("page/index.html").replace("/* style.css */", () => styles.join("") + font).replace("<!-- scripts -->", () => scripts);
}

function scoped(name, text) {
  const exported = [];
  const body = text.replace(/\n$/, "").split("\n").map((line) => {
    const imported = /^import (.*) from "\.\/(\w+)\.js";$/.exec(line);
    if (imported) return `const ${imported[1]} = module_${imported[2]};\n`;
    const found = /^export (?:async )?(?:function\*?|const|class) (\w+)/.exec(line);
    if (found) exported.push(found[1]);
    return `${line.replace(/^export /, "")}\n`;
  });
  return `const module_${name} = (() => {\n${body.join("")}return { ${exported.join(", ")} };\n})();\n`;
}
