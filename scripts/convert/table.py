#!/usr/bin/env python3
"""Size, perplexity, KL divergence and task scores of a model in every format, as a Markdown table.

usage: table.py SOURCE TEXT CALIBRATION TASKS WORK_DIR [TANDEM]

TEXT and CALIBRATION must be disjoint. WORK_DIR gets the converted models and results.json.
"""
import json
import os
import subprocess
import sys

source, text, calibration, tasks, work = sys.argv[1:6]
tandem = sys.argv[6] if len(sys.argv) > 6 else "target/release/tandem"
RUNS = [("bf16", []), ("affine8", []), ("mxfp8", []), ("mxfp4-q8", []), ("affine4:g32", []), ("affine4", []), ("affine4", ["--search"]),
        ("affine4", ["--calibrate", calibration]), ("nvfp4", []), ("nvfp4", ["--calibrate", calibration]), ("mxfp4", []), ("mxfp4", ["--search"]),
        ("mxfp4", ["--calibrate", calibration]), ("affine3", []), ("affine3", ["--calibrate", calibration])]


def run(*args):
    done = subprocess.run([tandem, *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{args}: {done.stderr}")
    return done.stdout


results = []
for quant, flags in RUNS:
    name = quant.replace(":", "-") + "".join(f.replace("--", "-") for f in flags if f.startswith("--"))
    out = os.path.join(work, name)
    if not os.path.exists(out):
        run("convert", source, "--out", out, "--quant", quant, *flags)
    size = json.loads(run("inspect", out, "--json"))["resident_bytes"]
    c = json.loads(run("eval", "compare", source, out, "--text", text, "--json"))
    right = None
    if tasks != "-":
        kinds = json.loads(run("eval", "tasks", "--model", out, "--tasks", tasks, "--json"))["kinds"].values()
        right = f"{sum(k['right'] for k in kinds)}/{sum(k['total'] for k in kinds)}"
    results.append({"format": quant, "flags": [f for f in flags if f.startswith("--")], "bytes": size, "tasks": right,
                    **{k: c[k] for k in ("tokens", "perplexity_a", "perplexity_b", "mean_kl", "p99_kl", "top1_agreement")}})
    json.dump(results, open(os.path.join(work, "results.json"), "w"), indent=1)
    r = results[-1]
    print(f"| {quant} {' '.join(r['flags'])} | {size / 1e6:.2f} | {r['perplexity_b']:.4f} | {r['mean_kl']:.5f} | {r['p99_kl']:.4f} | {100 * r['top1_agreement']:.1f} % | {right or ''} |", flush=True)
