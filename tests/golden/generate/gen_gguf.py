#!/usr/bin/env python3
"""Random blocks of every ggml type that tandem reads, and their values by the gguf package (0.19.0).

usage: gen_gguf.py OUT.safetensors
"""
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize
from safetensors.numpy import save_file

random = np.random.default_rng(6)
# Offsets of f16 scales in a block; an e8m0 scale for MXFP4.
F16_AT = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.MXFP4: []}
out = {}
for kind, at in F16_AT.items():
    elements, size = GGML_QUANT_SIZES[kind]
    n_blocks = max(3, 96 // elements)
    blocks = random.integers(0, 256, (n_blocks, size), dtype=np.uint8)
    for offset in at:
        scales = random.normal(0, 0.05, n_blocks).astype(np.float16)
        blocks[:, offset:offset + 2] = scales.view(np.uint8).reshape(n_blocks, 2)
    if kind == T.MXFP4:
        blocks[:, 0] = random.integers(100, 140, n_blocks)
    out[f"{kind.name}.blocks"] = blocks.reshape(-1)
    out[f"{kind.name}.values"] = dequantize(blocks, kind).astype(np.float32).reshape(-1)
save_file(out, sys.argv[1])
