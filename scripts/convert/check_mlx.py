#!/usr/bin/env python3
"""Loads converted checkpoints with mlx-lm and compares greedy tokens with tandem's. Needs mlx and mlx-lm.

usage: check_mlx.py TANDEM PROMPT MODEL_DIR...

mlx's processor kernels round activations to 16 bits, so both run the weights dequantised to float32.
"""
import json
import subprocess
import sys

import mlx.core as mx
import mlx_lm.utils as utils
from mlx_lm.generate import generate_step

mx.set_default_device(mx.cpu)
tandem, prompt, *models = sys.argv[1:]
failed = 0
for model in models:
    out = subprocess.run([tandem, "run", "--raw", "--temperature", "0", "--json", "--ignore-eos", "--max-tokens", "24", "--activations", "f32",
                          "--model", model, prompt], capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    ours = json.loads(out.stdout)["tokens"]
    net, tokenizer = utils.load(model)
    net.set_dtype(mx.float32)
    net = utils.dequantize_model(net)
    ids = mx.array(tokenizer.encode(prompt, add_special_tokens=False))
    theirs = [int(token) for (token, _), _ in zip(generate_step(ids, net, max_tokens=24, sampler=lambda x: mx.argmax(x, axis=-1)), range(24))]
    same = ours == theirs
    failed += not same
    print(f"{model}: {'equal' if same else f'{ours} against {theirs}'}", flush=True)
sys.exit(failed)
