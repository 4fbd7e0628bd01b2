#!/usr/bin/env python3
"""Kills a conversion with SIGKILL at random moments until it completes, and compares the bytes with an undisturbed run.

usage: kill.py SOURCE WORK_DIR [TANDEM] [N]     (N kills, 20 if not given; every attempt after a completed one starts anew)
"""
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time

source, work = sys.argv[1:3]
tandem = sys.argv[3] if len(sys.argv) > 3 else "target/release/tandem"
wanted = int(sys.argv[4]) if len(sys.argv) > 4 else 20
flags = ["--quant", "mxfp4-q8", "--max-shard-size", "2MB"]
random.seed(6)


def digest(folder):
    return {f: hashlib.sha256(open(os.path.join(folder, f), "rb").read()).hexdigest() for f in sorted(os.listdir(folder))}


def clean(name):
    for suffix in ("", ".partial"):
        shutil.rmtree(os.path.join(work, name + suffix), ignore_errors=True)


def start(name):
    return subprocess.Popen([tandem, "convert", source, "--out", os.path.join(work, name), *flags], stdout=subprocess.DEVNULL)


os.makedirs(work, exist_ok=True)
clean("whole")
began = time.time()
assert start("whole").wait() == 0
seconds = time.time() - began
expected = digest(os.path.join(work, "whole"))
kills = completed = 0
while kills < wanted:
    clean("out")
    while True:
        child = start("out")
        if kills < wanted:
            time.sleep(random.uniform(0.02, seconds))
            if child.poll() is None:
                child.kill()
                child.wait()
                kills += 1
                partial = os.path.join(work, "out.partial")
                there = sorted(f for f in os.listdir(partial) if f.endswith(".safetensors")) if os.path.isdir(partial) else []
                print(f"kill {kills}: {len(there)} files complete", flush=True)
                if os.path.isdir(os.path.join(work, "out")):
                    break
                continue
        assert child.wait() == 0, "the resumed run failed"
        break
    assert digest(os.path.join(work, "out")) == expected, "the bytes differ"
    completed += 1
print(f"{kills} kills, {completed} completed conversions of {len(expected)} files, all bytes equal to the undisturbed run ({seconds:.2f} s)")
