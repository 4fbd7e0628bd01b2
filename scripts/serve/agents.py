#!/usr/bin/env python3
"""Starts Claude Code, Codex and OpenCode from npm with `tandem agent`, against the bundled model.

    agents.py target/release/tandem [--node NODE_MODULES] [CLIENT ...]

Without --node the clients are installed into a scratch folder. Their first prompts are longer than the 2,048 tokens that the
bundled model was made for, so its copy says 131,072: the text it writes is nonsense, the requests are real.

Each client is started twice, with a question as its argument and a HOME that is empty but for configuration that would lead it
to another server and model: on a server that runs, which must have answered it, and on one that `tandem agent` starts, which must
be gone afterwards. Checked of HOME: the configuration's files have the same bytes as before, and other files are only where the
client keeps its own state, below .claude*, .codex, .cache, .config/opencode, .local/share/opencode and .local/state/opencode, in npm's
cache, from which OpenCode loads its providers, and where Tandem keeps the record of its last run, .local/state/tandem. TMPDIR has no folder of `tandem agent` left.
"""
import argparse
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/fable-30m-MXFP4-Q8"
CONTEXT = 131_072
QUESTION = "Say hello."
ELSEWHERE = "http://127.0.0.1:9"

PACKAGES = {"claude": "@anthropic-ai/claude-code", "codex": "@openai/codex", "opencode": "opencode-ai"}
ARGUMENTS = {
    # Its own instructions and all of its tools are some 80,000 tokens to a tokenizer of 2,880 words.
    "claude": ["--system-prompt", "You are brief.", "--tools", "Bash", "-p", QUESTION],
    "codex": ["exec", "--skip-git-repo-check", QUESTION],
    "opencode": ["run", QUESTION],
}
# What the user has set: another server. (Claude Code itself takes a "model" like "opus" out of its settings, however it is started, and
# OpenCode itself adds "$schema" to settings that lack it, at any command, `opencode models` too: here it has been started before.)
OWN = {
    ".claude/settings.json": json.dumps({
        "model": "mine", "env": {"ANTHROPIC_BASE_URL": ELSEWHERE, "ANTHROPIC_MODEL": "mine", "ANTHROPIC_AUTH_TOKEN": "mine"},
    }),
    ".codex/config.toml": f"""model = "gpt-5"
model_provider = "mine"
[model_providers.mine]
name = "mine"
base_url = "{ELSEWHERE}/v1"
wire_api = "responses"
""",
    ".config/opencode/opencode.json": json.dumps({
        "$schema": "https://opencode.ai/config.json", "model": "mine/big",
        "provider": {"mine": {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{ELSEWHERE}/v1"}, "models": {"big": {}}}},
    }),
}
OF_CLIENTS = [".claude", ".codex", ".cache", ".config/opencode", ".local/share/opencode", ".local/state/opencode", ".local/state/tandem", ".npm/_"]


def hashes(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def install(folder):
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", folder, *PACKAGES.values()], check=True)
    return folder / "node_modules"


def programs(node, folder):
    """A folder with the three programs; npm may be told not to run the scripts that put two of them in place."""
    folder.mkdir()
    found = {
        "claude": next(node.glob("@anthropic-ai/claude-code-*/claude"), None),
        "codex": node / ".bin/codex",
        "opencode": next(node.glob("opencode-*/bin/opencode"), None),
    }
    for name, path in found.items():
        if path is not None and path.exists():
            (folder / name).symlink_to(path.resolve())
    return folder


def model(folder):
    shutil.copytree(MODEL, folder, copy_function=os.link)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return folder


class Server:
    def __init__(self, binary, model):
        command = [binary, "serve", "--model", model, "--port", "0", "--context", str(CONTEXT), "--cache-tokens", str(2 * CONTEXT)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if match := re.search(r"http://\S+", line):
                self.url = match[0]
                break
        self.log = []

    def metric(self, name):
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def stop(self):
        self.process.terminate()
        self.process.wait()


def start(binary, client, flags, scratch, bin_folder, timeout):
    """Runs the client in a place of its own and looks at what it leaves."""
    place = pathlib.Path(tempfile.mkdtemp(prefix=f"{client}-", dir=scratch))
    home, work, temporary = place / "home", place / "work", place / "tmp"
    for folder in (home, work, temporary):
        folder.mkdir()
    for name, text in OWN.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    before = hashes(home)
    environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(home), "TMPDIR": str(temporary), "LANG": "C.UTF-8", "NO_COLOR": "1"}
    command = [binary, "agent", client, *flags, "--", *ARGUMENTS[client]]
    begin = time.time()
    done = subprocess.run(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    seconds = time.time() - begin
    after = hashes(home)
    problems = []
    if done.returncode != 0:
        problems.append(f"exit code {done.returncode}: {done.stdout[-800:]} {done.stderr[-1200:]}")
    if not done.stdout.strip():
        problems.append(f"nothing was said: {done.stderr[-800:]}")
    problems += [f"{name} was changed" for name, digest in before.items() if after.get(name) != digest]
    strangers = [name for name in after if name not in before and not name.startswith(tuple(OF_CLIENTS))]
    places = sorted({"/".join(name.split("/")[:2]) for name in strangers})
    problems += [f"HOME has {len([name for name in strangers if name.startswith(place)])} files in {place}" for place in places]
    problems += [f"TMPDIR has {path.name}" for path in temporary.glob("tandem-*")]
    own = len([name for name in after if name not in before])
    return problems, f"{seconds:.0f} s, {len(before)} files of configuration unchanged, {own} files of its own state", done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=lambda path: str(pathlib.Path(path).resolve()))
    parser.add_argument("--node", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("clients", nargs="*")
    given = parser.parse_intermixed_args()
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="agents-"))
    failed = False
    try:
        node = given.node or install(scratch)
        bin_folder = programs(node, scratch / "bin")
        large = model(scratch / "fable")
        for client in given.clients or PACKAGES:
            version = json.loads((node / PACKAGES[client] / "package.json").read_text())["version"]
            server = Server(given.binary, str(large))
            try:
                problems, summary, done = start(given.binary, client, ["--url", server.url], scratch, bin_folder, given.timeout)
                answered, tokens = server.metric("tandem_requests_finished_total"), server.metric("tandem_prompt_tokens_total")
            finally:
                server.stop()
            if answered < 1 or tokens < 100:
                problems.append(f"the server answered {answered:.0f} requests with {tokens:.0f} tokens of prompt: {done.stderr[-800:]}")
            print(f"{client} {version}, running server: {summary}; {answered:.0f} requests, {tokens:.0f} tokens of prompt", flush=True)
            flags = ["--model", str(large), "--context", str(CONTEXT), "--port", "9"]
            more, summary, done = start(given.binary, client, flags, scratch, bin_folder, given.timeout)
            address = re.search(r"runs with \S+ at (http://\S+)", done.stderr)
            if address is None:
                more.append(f"no server was started: {done.stderr[-800:]}")
            else:
                try:
                    urllib.request.urlopen(f"{address[1]}/health", timeout=2)
                    more.append("the server is still there")
                except OSError:
                    pass
            print(f"{client} {version}, server of its own: {summary}", flush=True)
            for problem in problems + more:
                print(f"  PROBLEM: {problem}")
            failed |= bool(problems + more)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
