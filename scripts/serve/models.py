#!/usr/bin/env python3
"""Two models behind one server, within memory that holds one: models.py target/release/tandem [--requests 200] [--budget 400MB]

Requests for the two alternate, one after the other; then as many at once. None may be lost, every answer of both must be the
same text (both are the bundled model), and the memory of the models' processes, looked at every 20 ms, must stay within the
budget. Prints loads, seconds of a switch and the most memory.
"""
import argparse
import concurrent.futures
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models/fable-30m-MXFP4-Q8"
parser = argparse.ArgumentParser()
parser.add_argument("binary")
parser.add_argument("--requests", type=int, default=200)
parser.add_argument("--budget", default="400MB")
args = parser.parse_args()


def ask(url, model):
    body = {"model": model, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def children(pid):
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        try:
            yield from map(int, (task / "children").read_text().split())
        except OSError:
            pass


def memory(pid):
    total = 0
    for child in children(pid):
        try:
            total += int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{child}/status").read_text())[1]) << 10
        except (OSError, TypeError):
            pass
    return total


def metric(url, start):
    with urllib.request.urlopen(f"{url}/metrics") as response:
        return sum(float(line.split()[-1]) for line in response.read().decode().splitlines() if line.startswith(start))


with tempfile.TemporaryDirectory() as folder:
    for name in "ab":
        (pathlib.Path(folder) / name).symlink_to(MODEL)
    command = [args.binary, "serve", "--models-dir", folder, "--models-memory", args.budget, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    url = next(match[0] for line in server.stderr if (match := re.search(r"http://\S+", line)))
    threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
    most, ended = 0, False

    def watch():
        global most
        while not ended:
            most = max(most, memory(server.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin, texts = time.time(), []
    for i in range(args.requests):
        texts.append(ask(url, "ab"[i % 2]))
    seconds = time.time() - begin
    loads = metric(url, "tandem_model_loads_total")
    with concurrent.futures.ThreadPoolExecutor(args.requests) as threads:
        texts += threads.map(lambda i: ask(url, "ab"[i % 2]), range(args.requests))
    ended = True
    watcher.join()
    server.terminate()
    server.wait()
    budget = float(args.budget[:-2]) * {"MB": 1e6, "GB": 1e9}[args.budget[-2:]]
    same = len(set(texts)) == 1
    print(f"{len(texts)} of {2 * args.requests} answered, {'all the same' if same else 'not the same'}; {loads:.0f} loads for the first "
          f"{args.requests}, {seconds / args.requests:.2f} s a switch; at most {most / 1e6:.0f} MB of {budget / 1e6:.0f}; exit {server.returncode}")
    sys.exit(not (same and len(texts) == 2 * args.requests and most <= budget and server.returncode == 0))
