#!/usr/bin/env python3
"""Several models behind one server, within memory that holds one: models.py target/release/tandem [--requests 200] [--record FILE]

All models are the bundled one, so every answer must be the same text. The budget is what the server itself expects one model to
take, and a twentieth more; the memory of the models' processes, looked at every 20 ms, must stay within it.

1. Requests for two models alternate, one after the other; then the same number at once. None may be lost.
2. A request for a model that is not loaded: without time it is refused at once, with the seconds to come back after; with too
   little time when that is over; with enough it is answered.
3. A pinned model beside the two that alternate: its process is the same at the end, and it answers without a load.

Prints a line for each and ends with 1 if one of these does not hold.
"""
import argparse
import concurrent.futures
import contextlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models/fable-30m-MXFP4-Q8"
failures, figures = [], {}


def check(holds, what):
    if not holds:
        failures.append(what)
        print(f"FAILED: {what}")


def children(pid):
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            yield from map(int, (task / "children").read_text().split())


def memory(pid):
    """Bytes of each child. A set: a child goes from thread to thread of its parent, and would be found twice."""
    found = {}
    for child in set(children(pid)):
        with contextlib.suppress(OSError, TypeError):
            found[child] = int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{child}/status").read_text())[1]) << 10
    return found


class Server:
    """A server, and the most memory that its models' processes had."""

    def __init__(self, binary, folder, *flags):
        command = [binary, "serve", "--models-dir", folder, "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.url = next(match[0] for line in self.process.stderr if (match := re.search(r"http://\S+", line)))
        self.most, self.most_of, self.ended = 0, {}, False
        self.threads = [threading.Thread(target=self.watch), threading.Thread(target=lambda: [None for _ in self.process.stderr])]
        for thread in self.threads:
            thread.start()

    def watch(self):
        while not self.ended:
            found = memory(self.process.pid)
            if sum(found.values()) > self.most:
                self.most, self.most_of = sum(found.values()), found
            time.sleep(0.02)

    def get(self, path):
        with urllib.request.urlopen(f"{self.url}{path}") as response:
            return response.read().decode()

    def model(self, name):
        return json.loads(self.get(f"/v1/models/{name}"))

    def metric(self, start):
        return sum(float(line.split()[-1]) for line in self.get("/metrics").splitlines() if line.startswith(start))

    def ask(self, model, **headers):
        """Status, text or error, and the header Retry-After."""
        body = {"model": model, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8, "temperature": 0}
        headers = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers), timeout=1200) as response:
                return response.status, json.load(response)["choices"][0]["message"]["content"], None
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), error.headers["retry-after"]

    def stop(self):
        self.ended = True
        self.process.terminate()
        code = self.process.wait()
        for thread in self.threads:
            thread.join()
        return code


def alternate(server, n):
    """Answers to requests for a and b in turn, and the seconds that each took."""
    answers, begin = [], time.time()
    for i in range(n):
        answers.append(server.ask("ab"[i % 2]))
    return answers, (time.time() - begin) / n


def same(answers):
    return all(status == 200 for status, _, _ in answers) and len({text for _, text, _ in answers}) == 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--record", type=pathlib.Path, help="writes the figures there, as JSON")
    args = parser.parse_args()
    n = args.requests
    with tempfile.TemporaryDirectory() as folder:
        for name in "abp":
            (pathlib.Path(folder) / name).symlink_to(MODEL)
        server = Server(args.binary, folder)
        expected = server.model("a")["memory_bytes"]
        server.stop()

        budget = expected * 21 // 20 // 1_000_000 * 1_000_000
        server = Server(args.binary, folder, "--models-memory", f"{budget // 1_000_000}MB")
        answers, seconds = alternate(server, n)
        check(same(answers), "every alternating request has the same answer")
        loads = server.metric("tandem_model_loads_total")
        check(loads >= n * 0.95, f"{loads} loads for {n} alternating requests")
        with concurrent.futures.ThreadPoolExecutor(n) as threads:
            together = list(threads.map(lambda i: server.ask("ab"[i % 2]), range(n)))
        check(same(answers + together), "every request at once has the same answer")
        all_loads = server.metric("tandem_model_loads_total")
        loaded = next(model for model in map(server.model, "ab") if model["state"] == "loaded")["memory_bytes"]

        server.ask("a")
        begin = time.time()
        status, text, retry = server.ask("b", x_tandem_load_timeout="0")
        check(status == 503 and "not loaded yet" in text and int(retry or 0) > 0 and time.time() - begin < 1, f"without time: {status} {text} {retry}")
        refused = time.time() - begin
        check(server.ask("b", x_tandem_load_timeout="600")[0] == 200, "with enough time it is answered")
        begin = time.time()
        status, text, retry = server.ask("a", x_tandem_load_timeout="0.1")
        check(status == 503 and int(retry or 0) > 0 and 0.1 <= time.time() - begin < 1, f"with 0.1 s: {status} {text} {retry}")
        late = time.time() - begin
        most = server.most
        check(most <= budget, f"{most} bytes of {budget}: {server.most_of}")
        check(server.stop() == 0, "the server ends well")
        print(f"{2 * n} requests for two models, all answered with the same text: {n} in turn with {loads:.0f} loads, {seconds:.2f} s each; "
              f"{n} at once with {all_loads - loads:.0f} loads; at most {most / 1e6:.0f} MB of {budget / 1e6:.0f} MB")
        print(f"refused without time after {refused:.2f} s, with 0.1 s after {late:.2f} s, answered with enough")

        pinned_budget = budget + loaded
        server = Server(args.binary, folder, "--models-memory", f"{pinned_budget // 1_000_000}MB", "--pin", "p")
        while server.model("p")["state"] != "loaded":
            time.sleep(0.05)
        process = set(children(server.process.pid))
        answers, pinned_seconds = alternate(server, n // 4)
        check(same(answers), "every request beside a pinned model has the same answer")
        check(process < set(children(server.process.pid)), "the pinned model's process is the same")
        check(server.ask("p", x_tandem_load_timeout="0")[0] == 200, "the pinned model answers at once")
        check(server.metric('tandem_model_loads_total{model="p"}') == 1, "the pinned model was loaded once")
        evictions = server.metric("tandem_model_evictions_total")
        check(evictions >= n // 4 - 2, f"{evictions} evictions")
        pinned_most = server.most
        check(pinned_most <= pinned_budget, f"{pinned_most} bytes of {pinned_budget}: {server.most_of}")
        check(server.stop() == 0, "the server ends well")
        print(f"a pinned model stays through {evictions:.0f} evictions of others, {pinned_seconds:.2f} s each; at most {pinned_most / 1e6:.0f} MB "
              f"of {pinned_budget / 1e6:.0f} MB")
    figures.update(
        requests=2 * n, loads_in_turn=loads, seconds_in_turn=round(seconds, 3), loads_at_once=all_loads - loads, expected_bytes=expected,
        loaded_bytes=loaded, most_bytes=most, budget_bytes=budget, refused_seconds=round(refused, 3), late_seconds=round(late, 3),
        pinned_evictions=evictions, pinned_most_bytes=pinned_most, pinned_budget_bytes=pinned_budget, failures=failures,
    )
    if args.record:
        args.record.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(bool(failures))


main()
