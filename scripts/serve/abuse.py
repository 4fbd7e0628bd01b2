#!/usr/bin/env python3
"""Does to a server whatever a client could: abuse.py URL PID [--scale 1.0].

50,000 mutated and 2,000 malformed requests, 1,000 slow connections of each kind, 2,000 random and 100 nasty grammars, 100
bodies at the limit. Meanwhile a probe asks a short question again and again: it must never wait more than 2 s. At the end the
process must live, and its memory must be within 20 % or 64 MB of what it was after the warm-up.

Readers that do not read ask for real answers, and whoever comes later waits until these are written: start the server with a
short queue (--max-queue 8), so that a wait that would be long is refused at once.
"""
import argparse
import http.client
import json
import random
import socket
import sys
import threading
import time
import urllib.parse

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("pid", type=int)
parser.add_argument("--scale", type=float, default=1.0)
args = parser.parse_args()
address = urllib.parse.urlparse(args.url)
HOST, PORT = address.hostname, address.port
rng = random.Random(1)


def post(path, body, timeout=60):
    connection = http.client.HTTPConnection(HOST, PORT, timeout=timeout)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def memory_mb():
    with open(f"/proc/{args.pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


class Probe(threading.Thread):
    """Asks for one token, without pause."""

    def __init__(self):
        super().__init__(daemon=True)
        self.worst, self.n, self.failures, self.stopped = 0.0, 0, [], False

    def run(self):
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
        while not self.stopped:
            start = time.time()
            try:
                status, text = post("/v1/chat/completions", body)
                # A full queue says so at once, which is an answer.
                if status not in (200, 429, 503):
                    self.failures.append((status, text[:200]))
            except OSError as error:
                self.failures.append((0, str(error)))
            self.worst = max(self.worst, time.time() - start)
            self.n += 1
            time.sleep(0.05)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
USER = [{"role": "user", "content": "hi"}]
REQUESTS = [
    ("/v1/chat/completions", {"messages": USER, "max_tokens": 2, "tools": [TOOL], "tool_choice": "auto", "temperature": 0.5,
                              "response_format": {"type": "json_object"}, "stop": ["x"], "stream": False, "n": 1}),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 2, "logprobs": 1, "echo": True}),
    ("/v1/responses", {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": 2, "text": {"format": {"type": "text"}}}),
    ("/v1/messages", {"model": "fable", "max_tokens": 2, "messages": USER, "system": "x"}),
    ("/v1/messages/count_tokens", {"model": "fable", "messages": USER}),
    ("/tokenize", {"messages": USER}),
    ("/api/chat", {"model": "fable", "messages": USER, "stream": False, "options": {"num_predict": 2}}),
]
VALUES = [None, True, 0, -1, 1e308, 2**63, "", "x", "\u0000", "<|user|>", [], {}, [[]], {"type": "x"}, "x" * 10000, [None] * 100]


def mutate(value, depth=0):
    if rng.random() < 0.15:
        return rng.choice(VALUES)
    if isinstance(value, dict):
        mutated = {key: mutate(item, depth + 1) for key, item in value.items() if rng.random() > 0.05}
        if rng.random() < 0.1:
            mutated[rng.choice(["type", "id", "x", "temprature", "seed"])] = rng.choice(VALUES)
        return mutated
    if isinstance(value, list):
        return [mutate(item, depth + 1) for item in value] * rng.choice([1, 1, 1, 2, 0])
    return value


def parallel(jobs, n_threads=8):
    jobs, results, lock = iter(jobs), {}, threading.Lock()

    def work():
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            try:
                status = post(*job)[0]
            except OSError:
                status = 0
            with lock:
                results[status] = results.get(status, 0) + 1

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def scaled(n):
    return max(1, int(n * args.scale))


def mutated():
    for _ in range(scaled(50_000)):
        path, request = rng.choice(REQUESTS)
        yield path, json.dumps(mutate(request))


def malformed():
    for _ in range(scaled(2_000)):
        path, request = rng.choice(REQUESTS)
        text = json.dumps(request).encode()
        at = rng.randrange(len(text))
        yield path, rng.choice([text[:at], text[:at] + bytes([rng.randrange(256)]) + text[at:], b"[" * 5000, b"\xff" * 50])


def schema(depth=0, names=()):
    """A schema of any of the keywords that are kept to; at `depth` it ends."""
    kinds = ["string", "pattern", "enum", "const", "integer", "number", "boolean", "null", "types", "format"]
    if depth < 3:
        kinds += ["object", "object", "array", "tuple", "anyOf", "allOf"]
    if names:
        kinds += ["$ref", "$ref"]
    kind = rng.choice(kinds)
    low = rng.randrange(5)
    if kind == "string":
        return {"type": "string", **rng.choice([{}, {"minLength": low}, {"maxLength": low + 1}, {"minLength": low, "maxLength": low + 9}])}
    if kind == "pattern":
        return {"type": "string", "pattern": f"^{regex(2)}$"}
    if kind == "enum":
        return {"enum": rng.sample(["red", "grün", 5, 1.5, None, True, "a b", {"x": 1}, [1]], rng.randrange(1, 6))}
    if kind == "const":
        return {"const": rng.choice(["x", 7, None, [1, 2], {"a": "b"}])}
    if kind in ("integer", "number"):
        return {"type": kind, **rng.choice([{}, {"minimum": -low}, {"minimum": low, "maximum": low + 50}, {"exclusiveMaximum": 99}])}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "types":
        return {"type": rng.sample(["string", "integer", "null", "boolean"], 2)}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "date-time", "uuid", "email", "ipv4"])}
    if kind == "object":
        keys = rng.sample(["a", "b", "name", "größe", "x y", "next", "0"], rng.randrange(5))
        required = [key for key in keys if rng.random() < 0.5]
        more = rng.choice([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}])
        return {"type": "object", "properties": {key: schema(depth + 1, names) for key in keys}, "required": required, **more}
    if kind == "array":
        return {"type": "array", "items": schema(depth + 1, names), **rng.choice([{}, {"minItems": 1}, {"maxItems": low + 1}, {"minItems": 1, "maxItems": low + 1}])}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [schema(depth + 1, names), schema(depth + 1, names)], "items": schema(depth + 1, names), "maxItems": 4}
    if kind == "anyOf":
        return {"anyOf": [schema(depth + 1, names) for _ in range(rng.randrange(1, 4))]}
    if kind == "allOf":
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 40}]}
    return {"$ref": f"#/$defs/{rng.choice(names)}"}


def definitions():
    """A schema with definitions that name each other."""
    names = [f"d{i}" for i in range(rng.randrange(1, 5))]
    # What refers to itself may always end.
    defs = {name: {"anyOf": [{"type": "null"}, schema(1, names)]} for name in names}
    return {"type": "object", "properties": {"a": schema(1, names), "b": schema(1, names)}, "$defs": defs}


def regex(depth=0):
    atoms = ["a", "[a-z]", "[^x]", "\\d", "\\w", ".", "é", "\\.", "[0-9a-f]"]
    parts = []
    for _ in range(rng.randrange(1, 5)):
        part = rng.choice(atoms) if depth >= 3 or rng.random() < 0.7 else f"({regex(depth + 1)}|{regex(depth + 1)})"
        parts.append(part + rng.choice(["", "", "?", "*", "+", "{1,3}", "{2}"]))
    return "".join(parts)


def lark():
    """Rules that refer to those below them only, and to each other behind a character."""
    n = rng.randrange(1, 8)
    terminals = [f"T{i}" for i in range(rng.randrange(1, 4))]
    rules = []
    for i in range(n):
        def atom(i=i):
            lower = [f"r{j}" for j in range(i + 1, n)] + terminals + ['"x"', '"yes no"', "/[a-c]+/"]
            kind = rng.random()
            if kind < 0.6:
                return rng.choice(lower)
            if kind < 0.7:
                return f'"(" r{rng.randrange(n)} ")"'
            if kind < 0.8:
                return "%json " + json.dumps(schema(2))
            return f"({rng.choice(lower)} | {rng.choice(lower)})" + rng.choice(["", "?", "*", "+", "~1..3"])
        body = " | ".join(" ".join(atom() for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(1, 3)))
        rules.append(f"r{i}: {body}")
    words = ["start: r0"] + rules + [f"{name}: /{regex(2)}/" for name in terminals]
    return "\n".join(words + rng.choice([[], ["%ignore / +/"]]))


def noise():
    words = ["start:", "a:", "b:", "T:", '"x"', "/[a-z]+/", "|", "*", "+", "?", "(", ")", "\n", "a", "b", "T", "%json", "{}", "~", "&"]
    return "start: " + " ".join(rng.choice(words) for _ in range(rng.randrange(1, 60)))


def grammars():
    makers = [
        lambda: {"json": schema()}, lambda: {"json": definitions()}, lambda: {"regex": regex()}, lambda: {"grammar": lark()},
        lambda: {"choice": [regex() for _ in range(rng.randrange(1, 30))]}, lambda: {"grammar": noise()},
    ]
    for i in range(scaled(2_000)):
        form = makers[i % len(makers)]()
        yield "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 4, "structured_outputs": form})


def nasty_grammars():
    chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(1900)) + 'r1900: "x"'
    long_chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(20000)) + 'r20000: "x"'
    nested = {"type": "null"}
    for _ in range(100):
        nested = {"type": "array", "items": nested}
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1900)} | {"d1900": {"type": "string"}}
    forms = [
        {"grammar": chain}, {"grammar": long_chain}, {"grammar": "start: start start |"}, {"regex": "(a?){5000}"},
        {"regex": "((((a{100}){100}){100}){100}){100}"}, {"regex": "a" * 200000}, {"choice": [f"zq{i}" for i in range(300000)]},
        {"json": {"$ref": "#"}}, {"json": nested}, {"json": {"$ref": "#/$defs/d0", "$defs": definitions}},
        {"json": {"enum": [f"v{i}" for i in range(20000)]}}, {"json": {"type": "array", "minItems": 10**9, "items": {}}},
    ]
    for i in range(scaled(100)):
        yield "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 2, "n": 4, "structured_outputs": forms[i % len(forms)]})


def large_bodies():
    for i in range(scaled(100)):
        text = "".join(chr(rng.randint(33, 126)) for _ in range(1000)) * 15_500
        path, request = [("/tokenize", {"prompt": text}), ("/v1/completions", {"prompt": text}),
                         ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
                         ("/v1/completions", {"prompt": ["x"] * 2_000_000})][i % 4]
        yield path, json.dumps(request)


def slow(kind, n, hold):
    # More than the sockets' buffers hold.
    body = json.dumps({"messages": USER, "max_tokens": 100, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = {
        "idle": b"", "header": head, "body": head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:10],
        "reader": head + b"Content-Length: %d\r\n\r\n" % len(body) + body,
    }[kind]
    sockets = []
    for _ in range(n):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        try:
            connection.connect((HOST, PORT))
            connection.sendall(sent)
        except OSError:
            pass
        sockets.append(connection)
    time.sleep(hold)
    [connection.close() for connection in sockets]


def wait_until_loaded():
    for _ in range(600):
        connection = http.client.HTTPConnection(HOST, PORT, timeout=5)
        connection.request("GET", "/v1/models")
        if connection.getresponse().status == 200:
            return
        time.sleep(0.1)
    sys.exit("the server does not load")


def main():
    wait_until_loaded()
    parallel(("/v1/chat/completions", json.dumps({"messages": USER, "max_tokens": 4})) for _ in range(scaled(200)))
    warm = memory_mb()
    print(f"after the warm-up: {warm:.0f} MB")
    failed = False
    stages = [("mutated", lambda: parallel(mutated())), ("malformed", lambda: parallel(malformed())),
              ("random grammars", lambda: parallel(grammars(), 2)), ("nasty grammars", lambda: parallel(nasty_grammars(), 2)),
              ("large bodies", lambda: parallel(large_bodies(), 3))]
    stages += [(f"slow {kind}", lambda kind=kind: slow(kind, scaled(1000), 5)) for kind in ["idle", "header", "body", "reader"]]
    for name, stage in stages:
        probe, start = Probe(), time.time()
        probe.start()
        results = stage()
        probe.stopped = True
        probe.join(65)
        is_bad = probe.worst > 2 or probe.failures or (results or {}).get(500)
        failed |= bool(is_bad)
        print(f"{name}: {time.time() - start:.0f} s, {results or ''}; {probe.n} probes, longest {probe.worst:.2f} s, "
              f"{len(probe.failures)} failed {probe.failures[:1]}; {memory_mb():.0f} MB{'  <-- bad' if is_bad else ''}", flush=True)
    time.sleep(20)
    now = memory_mb()
    is_back = now <= max(warm * 1.2, warm + 64)
    print(f"memory: {warm:.0f} MB, now {now:.0f} MB{'' if is_back else '  <-- bad'}")
    sys.exit(1 if failed or not is_back else 0)


if __name__ == "__main__":
    main()
