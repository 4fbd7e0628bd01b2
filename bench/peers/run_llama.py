#!/usr/bin/env python3
"""Times llama.cpp (through llama-cpp-python's C interface) on one GGUF; prints one JSON object.

usage: run_llama.py MODEL.gguf [--threads 2] [--context 512] [--steps 24] [--prefill 256,512] [--repeats 2] [--no-repack] [--no-mmap]

Prompts and decoded tokens are random and differ from step to step, so that routing does. The memory map is on unless told otherwise, as is
llama.cpp's default; the first prefill of each length is not timed (it pages the weights in). Bytes per decoded token
come from the file: every matrix once, of the routed experts the share that is used, no token embedding row.
"""
import argparse
import ctypes
import json
import os
import sys
import time

import gguf
import llama_cpp as L
import numpy as np


def active_bytes(path):
    r = gguf.GGUFReader(path)
    kv = {k: f for k, f in r.fields.items()}
    arch = kv["general.architecture"].contents()
    get = lambda k: kv[f"{arch}.{k}"].contents() if f"{arch}.{k}" in kv else None
    n, used = get("expert_count"), get("expert_used_count")
    names = {t.name for t in r.tensors}
    total = 0.0
    for t in r.tensors:
        if t.name == "token_embd.weight" and "output.weight" in names:
            continue
        total += int(t.n_bytes) * (used / n if "_exps." in t.name else 1)
    layers = get("block_count")
    indexer = [int(t.n_bytes) for t in r.tensors if ".indexer.attn_q_b" in t.name]
    return round(total), layers, sum(indexer)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--prefill", default="256,512")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--no-repack", action="store_true", help="do not let llama.cpp repack weights for this processor")
    p.add_argument("--no-mmap", action="store_true", help="read the file into memory, where the system keeps no file pages")
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    lengths = [int(x) for x in a.prefill.split(",") if x]

    log = []
    callback = L.llama_log_callback(lambda level, text, data: log.append(text.decode(errors="replace")))
    L.llama_log_set(callback, ctypes.c_void_p(0))
    L.llama_backend_init()
    mp = L.llama_model_default_params()
    mp.n_gpu_layers = 0
    if a.no_mmap:
        mp.load_mode = L.LLAMA_LOAD_MODE_NONE
    if a.no_repack:
        mp.use_extra_bufts = False
    model = L.llama_model_load_from_file(a.model.encode(), mp)
    if not model:
        sys.exit("".join(log[-30:]) + f"{a.model}: llama.cpp cannot load it")
    cp = L.llama_context_default_params()
    cp.n_ctx = max([a.context + a.steps, *lengths]) + 16
    cp.n_batch = cp.n_ubatch = 512
    cp.n_threads = cp.n_threads_batch = a.threads
    ctx = L.llama_init_from_model(model, cp)
    if not ctx:
        sys.exit("".join(log[-30:]) + "llama.cpp cannot make a context")
    vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    mem = L.llama_get_memory(ctx)
    rng = np.random.default_rng(a.seed)

    def decode(n):
        tokens = (L.llama_token * n)(*rng.integers(0, vocab, n).tolist())
        t = time.perf_counter()
        rc = L.llama_decode(ctx, L.llama_batch_get_one(tokens, n))
        logits = L.llama_get_logits_ith(ctx, -1)  # waits for the result
        t = time.perf_counter() - t
        if rc != 0:
            sys.exit(f"llama_decode returned {rc}")
        if not np.isfinite(logits[0]):
            sys.exit("llama.cpp's logits are not finite")
        return t

    def fill(n):  # prefill in batches of at most 512
        L.llama_memory_clear(mem, True)
        t = 0.0
        while n:
            t += decode(min(n, 512))
            n -= min(n, 512)
        return t

    bytes_, layers, indexer_q = active_bytes(a.model)
    out = {"threads": a.threads, "context": a.context, "layers": layers, "bytes_per_token": bytes_, "indexer_q_bytes": indexer_q,
           "repack_buffers": sorted({s.strip() for s in log if "buffer size" in s and "CPU" in s}),
           "system": L.llama_print_system_info().decode(), "decode_s": [], "prefill_s": {str(n): [] for n in lengths}}
    for n in lengths:
        fill(n)
    for _ in range(a.repeats):
        for n in lengths:
            out["prefill_s"][str(n)].append(fill(n))
        fill(a.context)
        decode(1)
        out["decode_s"] += [decode(1) for _ in range(a.steps - 1)]
    print(json.dumps(out))
    sys.stdout.flush()
    os._exit(0)  # freeing 11 GB of pages takes longer than it is worth


if __name__ == "__main__":
    main()
