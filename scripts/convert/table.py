#!/usr/bin/env python3
"""Size, perplexity, KL divergence and task scores of a model in every format, as a Markdown table.

usage: table.py SOURCE CALIBRATION TASKS WORK_DIR TANDEM TEXT...

CALIBRATION must share nothing with the TEXTs. TASKS may be "-". WORK_DIR gets results.json, and each model for a while; what
is in results.json is not run again. mixed-4.8 is not searched: it takes the longest, and its scales are found as those of the
other integers.
"""
import json
import os
import shutil
import subprocess
import sys

source, calibration, tasks, work, tandem, *texts = sys.argv[1:]
WAYS = {"plain": [], "search": ["--search"], "calibrate": ["--calibrate", calibration]}
SEARCHED = ["mxfp4", "affine4", "mxfp4-q8", "nvfp4", "affine3"]
PLAIN = ("mixed-4.8", "bf16", "affine8", "mxfp8", "affine6", "affine5", "affine4:g32")
RUNS = [(f, "plain") for f in (*SEARCHED, *PLAIN)] + [(f, way) for f in SEARCHED for way in ("search", "calibrate")]


def run(*args):
    done = subprocess.run([tandem, *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{args}: {done.stderr}")
    return done.stdout


os.makedirs(work, exist_ok=True)
path = os.path.join(work, "results.json")
results = json.load(open(path)) if os.path.exists(path) else []
for quant, way in RUNS:
    if any((r["format"], r["way"]) == (quant, way) for r in results):
        continue
    out = os.path.join(work, "model")
    shutil.rmtree(out, ignore_errors=True)
    seconds = json.loads(run("convert", source, "--out", out, "--quant", quant, *WAYS[way], "--json"))["seconds"]
    result = {"format": quant, "way": way, "bytes": json.loads(run("inspect", out, "--json"))["resident_bytes"], "seconds": seconds, "texts": []}
    for text in texts:
        c = json.loads(run("eval", "compare", source, out, "--text", text, "--json"))
        result["texts"].append({k: c[k] for k in ("tokens", "perplexity_a", "perplexity_b", "mean_kl", "p99_kl", "top1_agreement")})
    if tasks != "-":
        result["tasks"] = json.loads(run("eval", "tasks", "--model", out, "--tasks", tasks, "--json"))["kinds"]
    results.append(result)
    json.dump(results, open(path, "w"), indent=1)
    cells = [f"{t['perplexity_b']:.4f} | {t['mean_kl']:.5f} | {t['p99_kl']:.4f} | {100 * t['top1_agreement']:.1f}" for t in result["texts"]]
    kinds = result.get("tasks", {}).values()
    right = f"{sum(k['right'] for k in kinds)}" if kinds else ""
    print(f"| {quant} | {way} | {result['bytes'] / 1e6:.2f} | {' | '.join(cells)} | {right} |", flush=True)
