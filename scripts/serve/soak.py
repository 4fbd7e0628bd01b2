#!/usr/bin/env python3
"""Loads `tandem serve` with many streams, cancellations, malformed requests and slow readers: soak.py URL PID [--minutes 10]

First every prompt runs alone: its greedy text is what each later stream must repeat, and the median time between its
tokens is the measure of the others. Where text is held back (a call's argument, the end of the reasoning) one piece stands
for several tokens, as the usage in each event says: its time is divided among them, and reported undivided too. PID is the
server's, whose memory is watched. Standard library only.
"""
import argparse
import asyncio
import gc
import json
import math
import random
import statistics
import time
from urllib.parse import urlparse

NAMES = ["Lily", "Leo", "Nora", "Hugo", "Mia", "Finn", "Ada", "Tom"]
ANIMALS = ["fox", "rabbit", "owl", "bear"]
CITIES = ["Paris", "Rome", "Oslo", "Lima"]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}


def user(text, **more):
    options = {"include_usage": True, "continuous_usage_stats": True}
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 160, "stream": True,
            "stream_options": options, **more}


def requests():
    for name in NAMES:
        for animal in ANIMALS:
            yield user(f"Tell me a story about a brave {animal} named {name}.")
    for i in range(12):
        yield user(f"What is {13 + 7 * i} + {88 - 5 * i}?", reasoning_effort="medium")
    for city in CITIES:
        yield user(f"What is the weather in {city}?", tools=[TOOL])
    for name in NAMES:
        facts = " ".join(f"The color of {other} is {'gray red blue green'.split()[len(other) % 4]}." for other in NAMES * 3)
        yield user(f"Remember this. {facts} What is the color of {name}?")


MALFORMED = [
    ("{", 400), ("[]", 400), ('{"messages": 5}', 400), ('{"messages": []}', 400), ('{"model": "x", "messages": [{"role": "user"}]}', 404),
    (json.dumps(user("a " * 9000)), 400), (json.dumps(user("x", temperature="hot")), 400), (json.dumps(user("x", top_p=9)), 400),
    (json.dumps(user("x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": 7}}})), 400),
]


class Stream(asyncio.Protocol):
    """One request. What arrives is noted with its time and read afterwards, so that the client takes little of the machine."""

    def __init__(self, request, stop_after, delay):
        self.request, self.stop_after, self.delay = request, stop_after, delay
        self.pieces, self.n_events, self.is_closed = [], 0, False
        self.ended = asyncio.Event()

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data):
        self.pieces.append((time.perf_counter(), data))
        if self.stop_after is not None:
            self.n_events += data.count(b"data: ")
            if self.n_events >= self.stop_after:
                self.transport.abort()
        elif self.delay:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(self.delay, lambda: self.is_closed or self.transport.resume_reading())

    def connection_lost(self, error):
        self.is_closed = True
        self.ended.set()


class Client:
    def __init__(self, url):
        self.host, self.port = urlparse(url).hostname, urlparse(url).port

    async def send(self, method, path, body="", stop_after=None, delay=0.0):
        """Status, body, and the bytes of it that were there at each time; given up after so many events."""
        head = f"{method} {path} HTTP/1.1\r\nhost: {self.host}\r\nconnection: close\r\ncontent-type: application/json\r\n"
        request = f"{head}content-length: {len(body.encode())}\r\n\r\n{body}".encode()
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: Stream(request, stop_after, delay), self.host, self.port)
        await stream.ended.wait()
        head, _, rest = b"".join(data for _, data in stream.pieces).partition(b"\r\n\r\n")
        if not head:
            raise RuntimeError("no answer")
        ends, total = [], -len(head) - 4
        for when, data in stream.pieces:
            total += len(data)
            ends.append((total, when))
        return int(head.split()[1]), rest, ends

    async def get(self, path):
        _, rest, _ = await self.send("GET", path)
        return rest.decode()

    async def stream(self, body, gaps=None, stop_after=None, delay=0.0):
        """Text of an answer (reasoning, content, calls); None if it was given up after so many events.

        `gaps` gets the seconds between two pieces of text, the tokens that the second one stands for, and when it came."""
        status, rest, ends = await self.send("POST", "/v1/chat/completions", json.dumps(body), stop_after, delay)
        if stop_after is not None and status == 200:
            return None
        if status != 200:
            raise RuntimeError(f"status {status}: {rest.decode()[:300]}")
        text, last, last_tokens, at, which = "", None, 0, 0, 0
        for i, line in enumerate(rest.split(b"\n")):
            at += len(line) + 1
            if i % 16 == 0:
                # Other streams are measured meanwhile.
                await asyncio.sleep(0)
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return text
            while ends[which][0] < at - 1:
                which += 1
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            delta = event["choices"][0]["delta"] if event["choices"] else {}
            piece = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
            for call in delta.get("tool_calls", []):
                piece += call["function"].get("name", "") + call["function"]["arguments"]
            if piece:
                now, n_tokens = ends[which][1], event["usage"]["completion_tokens"]
                # Several events may come of one token: a call's name and its first argument.
                if last is not None and gaps is not None and n_tokens > last_tokens:
                    gaps.append((now - last, n_tokens - last_tokens, now))
                if n_tokens > last_tokens:
                    last, last_tokens = now, n_tokens
                text += piece
        raise RuntimeError("the stream ended without [DONE]")


def resident(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def per_token(gaps):
    return [gap / n for gap, n, _ in gaps for _ in range(n)]


def percentile(values, p):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * p))]


async def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("pid", type=int)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    client, bodies = Client(args.url), list(requests())
    # Collecting garbage takes milliseconds, in which nothing is measured.
    gc.set_threshold(100_000, 50, 1000)
    alone_gaps, expected = [], []
    for _ in range(2):
        # The second time with prompts in the cache, as later.
        alone_gaps, expected = [], []
        for body in bodies:
            expected.append(await client.stream(body, gaps=alone_gaps))
    alone = per_token(alone_gaps)
    median = statistics.median(alone)
    print(f"alone: {len(bodies)} prompts, median {median * 1e3:.2f} ms, p99 {percentile(alone, 0.99) * 1e3:.2f} ms between tokens", flush=True)

    gaps, errors, memory = [], [], []
    counts = {"whole": 0, "cancelled": 0, "malformed": 0, "slow": 0, "different": 0}
    start, end = time.perf_counter(), time.monotonic() + 60 * args.minutes

    async def work(i):
        chance = random.Random(args.seed * 1000 + i)
        while time.monotonic() < end:
            kind, which = chance.random(), chance.randrange(len(bodies))
            try:
                if kind < 0.06:
                    text, wanted = chance.choice(MALFORMED)
                    status, _, _ = await client.send("POST", "/v1/chat/completions", text)
                    counts["malformed"] += 1
                    if status != wanted:
                        errors.append(f"malformed request: status {status}, expected {wanted}")
                elif kind < 0.16:
                    await client.stream(bodies[which], stop_after=chance.randrange(1, 40))
                    counts["cancelled"] += 1
                else:
                    slow = kind < 0.22
                    text = await client.stream(bodies[which], gaps=None if slow else gaps, delay=0.05 if slow else 0.0)
                    counts["slow" if slow else "whole"] += 1
                    if text != expected[which]:
                        counts["different"] += 1
                        errors.append(f"prompt {which} gave another text: {text!r} for {expected[which]!r}")
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)

    async def watch():
        while time.monotonic() < end:
            memory.append(resident(args.pid))
            await asyncio.sleep(5)

    await asyncio.gather(watch(), *(work(i) for i in range(args.streams)))
    for _ in range(200):
        metrics = dict(line.rsplit(" ", 1) for line in (await client.get("/metrics")).splitlines() if not line.startswith("#"))
        if metrics["tandem_cache_pages_used"] == "0" and metrics["tandem_requests_running"] == "0":
            break
        await asyncio.sleep(0.1)
    tokens = per_token(gaps)
    p99 = percentile(tokens, 0.99)
    # What else the machine did shows in some minutes.
    minutes = [part for i in range(math.ceil(args.minutes)) if (part := [g for g in gaps if i <= (g[2] - start) / 60 < i + 1])]
    # The first minutes fill the cache's memory, which the system hands out as it is used.
    settled = memory[len(memory) // 4:] or memory
    buckets = [(name.split('"')[1], float(value)) for name, value in metrics.items() if name.startswith("tandem_inter_token_latency_seconds_bucket")]
    result = {
        "minutes": args.minutes, "streams": args.streams, **counts, "errors": len(errors), "first_errors": errors[:5],
        "alone_median_ms": median * 1e3, "alone_p99_ms": percentile(alone, 0.99) * 1e3,
        "median_ms": statistics.median(tokens) * 1e3, "p99_ms": p99 * 1e3, "p99_over_alone_median": p99 / median,
        "p999_ms": percentile(tokens, 0.999) * 1e3, "largest_ms": max(tokens) * 1e3, "tokens": len(tokens),
        "p99_each_minute_ms": [round(percentile(per_token(part), 0.99) * 1e3, 2) for part in minutes],
        "pieces_undivided_p99_ms": percentile([gap for gap, _, _ in gaps], 0.99) * 1e3,
        "tokens_in_pieces_of_several": sum(n for _, n, _ in gaps if n > 1) / len(tokens),
        "pages_used_after": float(metrics["tandem_cache_pages_used"]), "running_after": float(metrics["tandem_requests_running"]),
        "resident_mb": {"first": memory[0] / 1e6, "after_a_quarter": settled[0] / 1e6, "last": memory[-1] / 1e6, "largest": max(memory) / 1e6,
                        "each_minute": [round(m / 1e6, 1) for m in memory[::12]]},
        "server_inter_token_buckets": {le: n - before for (le, n), before in zip(buckets, [0] + [n for _, n in buckets])},
        "server": {name: float(value) for name, value in metrics.items() if name.startswith("tandem_") and "{" not in name and "bucket" not in name},
    }
    print(json.dumps(result, indent=2))


asyncio.run(main())
