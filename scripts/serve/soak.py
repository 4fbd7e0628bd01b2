#!/usr/bin/env python3
"""Loads `tandem serve` with many streams, cancellations, malformed requests and slow readers: soak.py URL PID [--minutes 10]

First every prompt runs alone: its greedy text is what each later stream must repeat, and the median time between its
tokens is the measure of the others. PID is the server's, whose memory is watched. Standard library only.
"""
import argparse
import asyncio
import json
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
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 160, "stream": True, **more}


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


class Client:
    def __init__(self, url):
        self.host, self.port = urlparse(url).hostname, urlparse(url).port

    async def open(self, method, path, body=""):
        reader, writer = await asyncio.open_connection(self.host, self.port)
        data = body.encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: {self.host}\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        return status, reader, writer

    async def get(self, path):
        _, reader, writer = await self.open("GET", path)
        text = (await reader.read()).decode()
        writer.close()
        return text

    async def stream(self, body, gaps=None, stop_after=None, delay=0.0):
        """Text of an answer (reasoning, content, calls); None if it was given up after so many events."""
        status, reader, writer = await self.open("POST", "/v1/chat/completions", json.dumps(body))
        try:
            if status != 200:
                raise RuntimeError(f"status {status}: {(await reader.read()).decode()[:300]}")
            text, last, n = "", None, 0
            while line := await reader.readline():
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    return text
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                delta = event["choices"][0]["delta"] if event["choices"] else {}
                piece = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
                for call in delta.get("tool_calls", []):
                    piece += call["function"].get("name", "") + call["function"]["arguments"]
                if piece:
                    now = time.perf_counter()
                    if last is not None and gaps is not None:
                        gaps.append(now - last)
                    last, text, n = now, text + piece, n + 1
                if stop_after is not None and n >= stop_after:
                    return None
                if delay:
                    await asyncio.sleep(delay)
            raise RuntimeError("the stream ended without [DONE]")
        finally:
            writer.close()


def resident(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


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
    alone_gaps, expected = [], []
    for body in bodies:
        expected.append(await client.stream(body, gaps=alone_gaps))
    median = statistics.median(alone_gaps)
    print(f"alone: {len(bodies)} prompts, median {median * 1e3:.2f} ms, p99 {percentile(alone_gaps, 0.99) * 1e3:.2f} ms between pieces", flush=True)

    gaps, errors, memory = [], [], []
    counts = {"whole": 0, "cancelled": 0, "malformed": 0, "slow": 0, "different": 0}
    end = time.monotonic() + 60 * args.minutes

    async def work(i):
        chance = random.Random(args.seed * 1000 + i)
        while time.monotonic() < end:
            kind, which = chance.random(), chance.randrange(len(bodies))
            try:
                if kind < 0.06:
                    text, wanted = chance.choice(MALFORMED)
                    status, reader, writer = await client.open("POST", "/v1/chat/completions", text)
                    await reader.read()
                    writer.close()
                    counts["malformed"] += 1
                    if status != wanted:
                        errors.append(f"malformed request: status {status}, expected {wanted}")
                elif kind < 0.16:
                    await client.stream(bodies[which], stop_after=chance.randrange(0, 40))
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
    p99 = percentile(gaps, 0.99)
    # The first minute fills the cache's memory, which the system hands out as it is used.
    settled = memory[len(memory) // 4:] or memory
    result = {
        "minutes": args.minutes, "streams": args.streams, **counts, "errors": len(errors), "first_errors": errors[:5],
        "alone_median_ms": median * 1e3, "median_ms": statistics.median(gaps) * 1e3, "p99_ms": p99 * 1e3,
        "p99_over_alone_median": p99 / median, "gaps": len(gaps),
        "pages_used_after": float(metrics["tandem_cache_pages_used"]), "running_after": float(metrics["tandem_requests_running"]),
        "resident_mb": {"first": memory[0] / 1e6, "after_a_quarter": settled[0] / 1e6, "last": memory[-1] / 1e6, "largest": max(memory) / 1e6},
        "server": {name: float(value) for name, value in metrics.items() if name.startswith("tandem_") and "{" not in name and "bucket" not in name},
    }
    print(json.dumps(result, indent=2))


asyncio.run(main())
