#!/usr/bin/env python3
"""`tandem serve` against llama.cpp's continuous batching: the same prompts, threads and answer lengths, in one run.

usage: serve_llama.py --tandem target/release/tandem --model MLX_DIR --gguf FILE.gguf [--rounds 2] [--out FILE.json]

llama.cpp runs in this process through its C interface, as its server's loop does (one llama_decode for all slots, prompts
in batches of at most 512 tokens beside the decoded ones, greedy): no HTTP, no text. That is at least as fast as its server.
Tandem is measured through HTTP by `tandem bench serve`. Both write --max-tokens tokens for each of --requests prompts, with
--concurrency at a time. In turns, medians.
"""
import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request

MASK = (1 << 64) - 1
WORDS = ("the fox and a tree with red bird who said that day was good in house to find old man one day she had little boy we go "
         "home cat sun is").split()


def prompt(i, n_words, seed=1):
    """The same as `tandem bench serve` makes."""
    state = ((seed + 1) * 0x9E3779B97F4A7C15 & MASK) ^ (i * 0xD1342543DE82EF95 & MASK)
    words = []
    for _ in range(n_words):
        state = (state * 6364136223846793005 + 1442695040888963407) & MASK
        words.append(WORDS[(state >> 33) % len(WORDS)])
    return " ".join(words)


def llama(a):
    """Worker: runs all requests once and prints seconds and tokens."""
    import llama_cpp as L

    callback = L.llama_log_callback(lambda level, text, data: None)
    L.llama_log_set(callback, ctypes.c_void_p(0))
    L.llama_backend_init()
    mp = L.llama_model_default_params()
    mp.n_gpu_layers = 0
    model = L.llama_model_load_from_file(a.gguf.encode(), mp)
    vocabulary = L.llama_model_get_vocab(model)
    n_vocab = L.llama_vocab_n_tokens(vocabulary)
    cp = L.llama_context_default_params()
    cp.n_ctx = a.concurrency * 1024
    cp.n_batch = cp.n_ubatch = 512
    cp.n_seq_max = a.concurrency
    cp.n_threads = cp.n_threads_batch = a.threads
    context = L.llama_init_from_model(model, cp)
    memory = L.llama_get_memory(context)
    batch = L.llama_batch_init(512, 0, 1)

    def tokens(text):
        data = text.encode()
        out = (L.llama_token * (len(data) + 8))()
        n = L.llama_tokenize(vocabulary, data, len(data), out, len(out), True, True)
        return list(out[:n])

    def argmax(row):
        import numpy as np
        return int(np.ctypeslib.as_array(row, shape=(n_vocab,)).argmax())

    def run(requests):
        waiting, running, free = list(enumerate(requests)), {}, list(range(a.concurrency))
        n_prompt = n_generated = 0
        while waiting or running:
            while waiting and free:
                _, request = waiting.pop(0)
                running[free.pop()] = {"pending": list(request), "position": 0, "left": a.max_tokens}
            batch.n_tokens = 0
            wanted = []
            # Decoded tokens first, then as many prompt tokens as fit.
            for slot, s in sorted(running.items(), key=lambda x: len(x[1]["pending"])):
                part = s["pending"][: 512 - batch.n_tokens]
                for token in part:
                    i = batch.n_tokens
                    batch.token[i], batch.pos[i] = token, s["position"]
                    batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, slot, 0
                    s["position"] += 1
                    batch.n_tokens += 1
                del s["pending"][: len(part)]
                if part and not s["pending"]:
                    batch.logits[batch.n_tokens - 1] = 1
                    wanted.append((slot, batch.n_tokens - 1))
            if L.llama_decode(context, batch) != 0:
                sys.exit("llama_decode failed")
            for slot, row in wanted:
                s = running[slot]
                s["pending"] = [argmax(L.llama_get_logits_ith(context, row))]
                s["left"] -= 1
                n_generated += 1
                if s["left"] == 0:
                    L.llama_memory_seq_rm(memory, slot, -1, -1)
                    del running[slot]
                    free.append(slot)
        return n_generated

    requests = [tokens(prompt(i, a.prompt_words)) for i in range(a.requests)]
    run(requests[:2])  # pages the weights in
    start = time.perf_counter()
    n_generated = run(requests)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "generated_tokens": n_generated, "prompt_tokens": sum(map(len, requests)),
                      "system": L.llama_print_system_info().decode()}))
    sys.stdout.flush()
    os._exit(0)


def tandem(a, port=8171):
    server = subprocess.Popen(
        [a.tandem, "serve", "--model", a.model, "--port", str(port), "--max-batch", str(a.concurrency), "--threads", str(a.threads),
         "--activations", a.activations, "--context", "1024", "--cache-tokens", str(1024 * a.concurrency), *a.serve_option],
        stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready")
                break
            except OSError:
                time.sleep(0.1)
        common = [a.tandem, "bench", "serve", "--url", f"http://127.0.0.1:{port}", "--json", "--concurrency", str(a.concurrency),
                  "--prompt-words", str(a.prompt_words), "--max-tokens", str(a.max_tokens)]
        subprocess.run([*common, "--requests", "2", "--seed", "99"], check=True, stdout=subprocess.DEVNULL)
        return json.loads(subprocess.run([*common, "--requests", str(a.requests)], check=True, stdout=subprocess.PIPE).stdout)
    finally:
        server.kill()
        server.wait()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tandem", default="target/release/tandem")
    p.add_argument("--model", required=True, help="MLX directory (peers.py makes it)")
    p.add_argument("--gguf", required=True)
    p.add_argument("--requests", type=int, default=32)
    p.add_argument("--concurrency", type=int, default=16)
    p.add_argument("--prompt-words", type=int, default=100)
    p.add_argument("--max-tokens", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--activations", default="int8")
    p.add_argument("--serve-option", action="append", default=[])
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--out")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        return llama(a)
    results = {"tandem": [], "llama.cpp": [], "load": []}
    for _ in range(a.rounds):
        results["load"].append(os.getloadavg()[0])
        results["tandem"].append(tandem(a))
        worker = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--worker"], check=True, stdout=subprocess.PIPE)
        results["llama.cpp"].append(json.loads(worker.stdout))
    for name in ("tandem", "llama.cpp"):
        rates = [r["generated_tokens"] / r["seconds"] for r in results[name]]
        print(f"{name:<10} {statistics.median(rates):8.1f} generated tokens/s  ({', '.join(f'{r:.1f}' for r in rates)})")
    ratio = statistics.median(t["generated_tokens"] / t["seconds"] for t in results["tandem"]) / statistics.median(
        t["generated_tokens"] / t["seconds"] for t in results["llama.cpp"])
    print(f"tandem / llama.cpp: {ratio:.2f}")
    if a.out:
        with open(a.out, "w") as f:
            json.dump({"arguments": vars(a), "ratio": ratio, **results}, f, indent=1)


main()
