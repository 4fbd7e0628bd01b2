#!/usr/bin/env python3
"""Copy the tiny MLX checkpoints with slimmed goldens.  usage: slim.py SRC_DIR OUT_DIR [name ... | all]
SRC_DIR holds <name>/ folders as generate/gen_models.py writes them; standard library only.

Kept of golden.safetensors: pN.tokens, pN.logits, pN.greedy, pN.mtp_seq, pN.mtp_logits, pN.mtp_draft, which tests read.
Dropped: greedy_logits, logits_mlx_f32, topk_L, router_idx_L, router_w_L, dbg.*.  Weights are copied as they are.
Without names: the set the repository has room for (README.md).
"""
import json
import os
import re
import shutil
import struct
import sys

ALL = ["glm51_tiny", "glm51_tiny_bf16", "dsv32_tiny", "glm52_tiny", "llama_tiny", "glm51_mtp_tiny"]
DEFAULT = ["dsv32_tiny", "llama_tiny"]
KEEP = re.compile(r"p\d\.(tokens|logits|greedy|mtp_seq|mtp_logits|mtp_draft)")


def slim(src, dst):
    with open(src, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        head = json.loads(f.read(n))
        body = f.read()
    meta = head.pop("__metadata__", None)
    keep = [k for k in head if KEEP.fullmatch(k)]
    # all tensors are 4-byte types, so data stays aligned in any order
    out, data, pos = ({"__metadata__": meta} if meta else {}), [], 0
    for k in sorted(keep):
        a, b = head[k]["data_offsets"]
        data.append(body[a:b])
        out[k] = {"dtype": head[k]["dtype"], "shape": head[k]["shape"], "data_offsets": [pos, pos + b - a]}
        pos += b - a
    h = json.dumps(out, separators=(",", ":")).encode()
    h += b" " * (-len(h) % 8)
    with open(dst, "wb") as f:
        f.write(struct.pack("<Q", len(h)) + h + b"".join(data))


def main(src, out, names):
    for name in names:
        d, o = os.path.join(src, name), os.path.join(out, name)
        shutil.rmtree(o, ignore_errors=True)
        os.makedirs(o)
        for f in sorted(os.listdir(d)):
            if f == "golden.safetensors":
                slim(os.path.join(d, f), os.path.join(o, f))
            else:
                shutil.copyfile(os.path.join(d, f), os.path.join(o, f))
            os.chmod(os.path.join(o, f), 0o644)
        print(name, sum(os.path.getsize(os.path.join(o, f)) for f in os.listdir(o)))


if __name__ == "__main__":
    names = sys.argv[3:] or DEFAULT
    main(sys.argv[1], sys.argv[2], ALL if names == ["all"] else names)
