// Builds the libraries of the chat page from npm's packages into crates/tandem-serve/page/vendor: vendor.mjs NODE_MODULES [--check]
// With --check nothing is written, and a file that differs is an error.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const modules = resolve(process.argv[2] ?? "node_modules");
const isCheck = process.argv.includes("--check");
const { build } = await import(createRequire(`${modules}/`).resolve("esbuild"));
const out = new URL("../../crates/tandem-serve/page/vendor/", import.meta.url);
const LANGUAGES = ["bash", "c", "cpp", "css", "diff", "go", "ini", "java", "javascript", "json", "python", "rust", "sql", "typescript", "xml", "yaml"];
const read = (name) => readFileSync(`${modules}/${name}`, "utf8");

/** The font comes from Debian's fonts-texgyre-math, by scripts/page/font.sh; a browser reads a part of it. */
const FONT = `## math.woff2: TeX Gyre Termes Math 1.543 (a subset), Copyright 2012-2014 B. Jackowski, P. Strzelczyk, P. Pianowski (on behalf of TeX Users Groups)

GUST Font License: this work may be distributed and modified under the conditions of the LaTeX Project Public License, version 1.3c or
later, https://www.latex-project.org/lppl/; http://www.gust.org.pl/projects/e-foundry/licenses. This file is a subset of
texgyretermes-math.otf, made by scripts/page/font.sh; the page uses it under the name "Page Math".
`;

async function bundle(contents) {
  const { outputFiles } = await build({ stdin: { contents, resolveDir: modules }, bundle: true, minify: true, format: "iife", write: false });
  return outputFiles[0].text;
}

function licences() {
  const parts = [["marked", "marked.js", "LICENSE"], ["highlight.js", "highlight.js", "LICENSE"], ["temml", "temml.js, temml.css", "LICENSE"]].map(([name, files, licence]) => {
    const { version, license } = JSON.parse(read(`${name}/package.json`));
    const file = [licence, `${licence}.md`, `${licence}.txt`].find((one) => existsSync(`${modules}/${name}/${one}`));
    return `## ${files}: ${name} ${version}, ${license}, https://www.npmjs.com/package/${name}\n\n${read(`${name}/${file}`).trim()}\n`;
  });
  return `# Libraries of the chat page, built by scripts/page/vendor.mjs\n\n${parts.join("\n")}\n${FONT}`;
}

const files = {
  "marked.js": await bundle('import { Lexer } from "marked"; globalThis.marked = { Lexer };'),
  "highlight.js": await bundle(`import hljs from "highlight.js/lib/core"; ${LANGUAGES.map((name) => `import ${name} from "highlight.js/lib/languages/${name}";`).join(" ")}
    for (const [name, language] of Object.entries({ ${LANGUAGES.join(", ")} })) hljs.registerLanguage(name, language); globalThis.hljs = hljs;`),
  "temml.js": read("temml/dist/temml.min.js"),
  // Without its font, which is a file.
  "temml.css": read("temml/dist/Temml-Local.css").replace(/\/\*[\s\S]*?\*\/\s*/g, "").replace(/@font-face \{[^}]*\}\s*/g, "").replace(/\n{2,}/g, "\n"),
  LICENSES: licences(),
};
for (const [name, text] of Object.entries(files)) {
  const path = new URL(name, out);
  if (isCheck && (!existsSync(path) || readFileSync(path, "utf8") !== text)) {
    console.error(`error: crates/tandem-serve/page/vendor/${name} is not what the packages give; run scripts/check-page --vendor`);
    process.exitCode = 1;
  }
  if (!isCheck) {
    mkdirSync(out, { recursive: true });
    writeFileSync(path, text);
  }
}
