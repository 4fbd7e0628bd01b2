"""Plots of the book, drawn from archived runs as SVG that stands in its page; book.py asks for them by name.

    python3 scripts/docs/plots.py NAME > plot.svg
"""

import csv
import html
import json
import lzma
import math
import re
import sys
from pathlib import Path

RUNS = Path(__file__).resolve().parents[2] / "bench/runs"
COLOURS = ["#2f7ed8", "#d9822b", "#3a9b5c", "#b0489b", "#8a8a8a"]
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 680, 300, 74, 14, 16, 44
STYLE = 'font-family="sans-serif" font-size="12" fill="currentColor"'


def read(name):
    """Text of a file of bench/runs, packed or not."""
    path = RUNS / name
    return (lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()).decode()


def text(x, y, words, anchor="middle", **attributes):
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{html.escape(words)}</text>'


def number(value):
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


class Axis:
    """Values to places between `start` and `end`; powers of ten are as far apart as each other if it is logarithmic."""

    def __init__(self, values, start, end, logarithmic, label):
        self.logarithmic, self.label, self.start, self.end = logarithmic, label, start, end
        if logarithmic:
            low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
            self.low, self.high, self.ticks = low, max(high, low + 1), [10.0**i for i in range(low, high + 1)]
        else:
            step = 10 ** math.floor(math.log10(max(values)))
            step = next(s for s in (step / 5, step / 2, step, step * 2) if max(values) / s <= 8)
            self.ticks = [step * i for i in range(math.ceil(max(values) / step) + 1)]
            self.low, self.high = 0, self.ticks[-1]

    def __call__(self, value):
        value = math.log10(value) if self.logarithmic else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def frame(x, y):
    """Lines, numbers and labels of both axes."""
    parts = []
    for tick in y.ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".2"/>')
        parts.append(text(LEFT - 6, y(tick) + 4, number(tick), "end"))
    if x:
        parts.extend(text(x(tick), HEIGHT - BOTTOM + 16, number(tick)) for tick in x.ticks)
        parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.label))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(text(14, middle, y.label, transform=f"rotate(-90 14 {middle:.1f})"))
    return parts


def legend(names):
    parts, x = [], LEFT + 10
    for name, colour in zip(names, COLOURS):
        parts.append(f'<rect x="{x}" y="{TOP - 8}" width="10" height="10" fill="{colour}"/>' + text(x + 14, TOP + 1, name, "start"))
        x += 32 + 7 * len(name)
    return parts


def svg(parts, title):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {STYLE}>'
    return f"{head}<title>{html.escape(title)}</title>{''.join(parts)}</svg>"


def curves(series, x_label, y_label, title, points=(), logarithmic=(False, False)):
    """Lines through the (x, y) of each named series; `points` are names that get no line but a word at each point."""
    xs, ys = ([p[i] for _, line in series for p in line] for i in (0, 1))
    x = Axis(xs, LEFT, WIDTH - RIGHT, logarithmic[0], x_label)
    y = Axis(ys, HEIGHT - BOTTOM, TOP + 10, logarithmic[1], y_label)
    parts, words = frame(x, y) + legend([name for name, _ in series]), []
    for (name, line), colour in zip(series, COLOURS):
        if name not in points:
            way = "L".join(f"{x(p[0]):.1f} {y(p[1]):.1f}" for p in line)
            parts.append(f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for p in line:
            parts.append(f'<circle cx="{x(p[0]):.1f}" cy="{y(p[1]):.1f}" r="3.5" fill="{colour}"/>')
            if len(p) > 2:
                # To the left of its point where another word is to the right.
                is_free = all(abs(y(p[1]) - b) > 9 or not 0 <= x(p[0]) - a < 10 for a, b in words)
                words.append((x(p[0]), y(p[1])))
                place = (x(p[0]) + 6, "start") if is_free else (x(p[0]) - 6, "end")
                parts.append(text(place[0], y(p[1]) + 4, p[2], place[1], font_size=10))
    return svg(parts, title)


def bars(groups, names, y_label, title, unit=number):
    """Bars side by side: each group is a word and a value for each name."""
    y = Axis([v for _, values in groups for v in values], HEIGHT - BOTTOM, TOP + 20, False, y_label)
    parts = frame(None, y) + (legend(names) if len(names) > 1 else [])
    width = (WIDTH - RIGHT - LEFT) / len(groups)
    bar = width * 0.8 / len(names)
    for i, (word, values) in enumerate(groups):
        for j, value in enumerate(values):
            left, top = LEFT + i * width + width * 0.1 + j * bar, y(value)
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{bar - 1:.1f}" height="{HEIGHT - BOTTOM - top:.1f}" fill="{COLOURS[j]}"/>'
            )
            parts.append(text(left + bar / 2, top - 3, unit(value), font_size=10))
        lines = word.split("\n")
        parts.extend(text(LEFT + (i + 0.5) * width, HEIGHT - BOTTOM + 14 * (k + 1), line, font_size=10) for k, line in enumerate(lines))
    return svg(parts, title)


def formats():
    ways = {"plain": "plain", "search": "--search", "calibrate": "--calibrate"}
    series = {name: [] for name in ways.values()}
    for row in json.loads(read("2026-11-23-convert/table.json.xz")):
        if row["format"] != "bf16":
            word = [row["format"]] if row["way"] == "plain" else []
            series[ways[row["way"]]].append((row["bytes"] / 1e6, row["texts"][0]["mean_kl"], *word))
    title = "Size and divergence of fable-30m's formats"
    return curves(list(series.items()), "MB of weights", "mean KL on chats, nats a token", title, list(series), (False, True))


def threads():
    output = read("2026-11-26-spr/cpu-check.txt.xz")
    part = r"== decode, two layers, (\d+) threads\n.*?context 512: ([\d.]+) ms.*?at ([\d.]+) GB/s.*?just before and after it: ([\d.]+) %"
    rows = [[float(value) for value in row] for row in re.findall(part, output, re.S)]
    reached = [(n, rate) for n, _, rate, _ in rows]
    possible = [(n, rate / share * 100) for n, _, rate, share in rows]
    title = "Weights read by 1 to 16 threads while two GLM-5.1 layers decode, and plain reads of the same moments"
    return curves([("decoding", reached), ("plain reads just before and after", possible)], "threads", "GB/s", title)


def messages():
    series = {}
    for row in json.loads(read("2026-11-23-comm/bench-comm.json.xz"))["rows"]:
        series.setdefault(row["operation"], []).append((row["bytes"], row["us_median"]))
    names = {"raw": "raw socket, there and back", "ping-pong": "ping-pong", "all_reduce": "sum over two ranks"}
    title = "Time of a message between two ranks of one machine"
    return curves([(words, series[name]) for name, words in names.items()], "bytes", "microseconds", title, (), (True, True))


def peers():
    rows = json.loads(read("2026-11-23-cpu-tiles/peers.json.xz"))["rows"]
    speed = {(row["case"], row["peer"]): row["tokens_per_second"] for row in rows}
    names = ["tandem int8", "tandem bf16", "llama.cpp"]
    cases = {
        "GLM-5.1 shape, 2 MoE layers, decode at 512": "2 GLM-5.1 layers,\ndecode at 512",
        "GLM-5.1 shape, 2 MoE layers, prefill of 256": "2 GLM-5.1 layers,\nprompt of 256",
        "SmolLM2-135M Q4_1, decode at 512": "SmolLM2-135M,\ndecode at 512",
    }
    groups = [(word, [speed[case, name] for name in names]) for case, word in cases.items()]
    return bars(groups, names, "tokens per second", "Beside llama.cpp on two Zen 4 cores", lambda v: f"{v:.0f}")


def gpu_layer():
    rows = list(csv.DictReader(read("2026-11-23-cuda-h100/ncu-decode-4096.csv").splitlines()))
    norms = [i for i, row in enumerate(rows[:-1]) if row["kernel"] == "rms_norm" and rows[i + 1]["grid"].startswith("1x17")]
    layer = min((rows[a:b] for a, b in zip(norms, norms[1:])), key=len)
    copy_rate = 3.0e12
    groups = [("", [float(row["us"]), float(row["mb_read"]) * 1e6 / copy_rate * 1e6]) for row in layer]
    words = {0: "norm", 1: "first\nproducts", 3: "q_b", 4: "scores", 5: "select", 7: "attention", 10: "o_proj", 12: "router", 13: "gate, up", 14: "down"}
    groups = [(words.get(i, ""), values) for i, (_, values) in enumerate(groups)]
    names = ["alone", "its bytes at 3.0 TB/s"]
    return bars(groups, names, "microseconds", "Launches of one GLM-5.1 layer on an H100 at context 4096", lambda v: f"{v:.0f}")


FULL_SIZE = "2026-11-26-full-size/results.json"
PLANS = {"tp": "slices (tp)", "ep": "experts (ep)", "pp": "layers (pp)", "mixed": "tp and pp", "one": "one device"}
PARTS = {
    "weights": ("attention_projections", "router", "experts", "dense_mlp", "lm_head"),
    "attention": ("sparse_attention",),
    "indexer": ("indexer",),
    "sums": ("communication", "waiting"),
    "the rest": ("norms", "other"),
}


def full_size_points(steps, find):
    """Points of decoding of scripts/full-size, each with its division; without the run that leaves sums out."""
    points = {}
    for step in steps if steps is not None else json.loads(read(FULL_SIZE)):
        plan = re.match(r"decode (\w+)", step["step"])
        result = step.get("result")
        if plan and isinstance(result, dict) and "without sums" not in step["step"]:
            for row in result.get("sweep") or [result]:
                if "tokens_per_second" in row and find(row):
                    points[plan[1], row["context"], row["batch"]] = row
    if not points:
        raise ValueError("no such point was measured")
    return points


def full_size_context(steps=None):
    series = {}
    for (plan, context, _), row in sorted(full_size_points(steps, lambda row: row["batch"] == 1).items()):
        series.setdefault(plan, []).append((context, row["tokens_per_second"]))
    lines = [(PLANS[plan], series[plan]) for plan in PLANS if plan in series]
    title = "One sequence of the full-size model: tokens per second by length of context"
    return curves(lines, "tokens of context", "tokens per second", title, (), (True, False))


def full_size_batch(steps=None):
    points = full_size_points(steps, lambda row: True)
    first = min(context for _, context, _ in points)
    plan = "tp" if any(key[0] == "tp" for key in points) else next(iter(points))[0]
    found = sorted((batch, row["tokens_per_second"]) for (own, context, batch), row in points.items() if (own, context) == (plan, first))
    groups = [(f"{batch} sequence{'s' * (batch > 1)}", [rate]) for batch, rate in found]
    title = f"Sequences of {first} tokens that decode together: tokens per second of all"
    return bars(groups, [PLANS[plan]], "tokens per second", title, lambda v: f"{v:.0f}")


def full_size_shares(steps=None):
    groups = []
    for (plan, context, _), row in sorted(full_size_points(steps, lambda row: row["batch"] == 1).items()):
        parts, total = row["breakdown_ms"], row["breakdown_total_ms"]
        if plan in ("tp", "one") and total > 0:
            groups.append((f"{context:,} tokens", [100 * sum(parts.get(name, 0) for name in names) / total for names in PARTS.values()]))
    if not groups:
        raise ValueError("no such point was measured")
    return bars(groups, list(PARTS), "% of a step with a stopwatch", "Where the time of a decode step goes", lambda v: f"{v:.0f}")


PLOTS = {
    "full-size-context": full_size_context,
    "full-size-batch": full_size_batch,
    "full-size-shares": full_size_shares,
    "formats": formats,
    "threads": threads,
    "messages": messages,
    "peers": peers,
    "gpu-layer": gpu_layer,
}


def figure(name):
    """A plot as it stands in a page."""
    return f"<figure>{PLOTS[name]()}</figure>"


if __name__ == "__main__":
    print(PLOTS[sys.argv[1]]())
