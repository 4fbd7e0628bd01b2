#!/usr/bin/env python3
"""Speed of a conversion against the disk's own, measured in turn with the same bytes to read and to write.

usage: disk.py SOURCE WORK_DIR TANDEM [FORMAT]     (SOURCE is a checkpoint far larger than a cache, e.g. of made-up weights)

The disk's own speed: dd reads SOURCE's files while another process writes as many random bytes as the conversion does, in
blocks of 8 MB that go around the page cache (O_DIRECT). Caches are dropped before each (as root; else SOURCE's files only).
"""
import glob
import json
import mmap
import os
import shutil
import subprocess
import sys
import time

if sys.argv[1] == "--write":
    block = mmap.mmap(-1, 8 << 20)
    block.write(os.urandom(len(block)))
    fd = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    for _ in range(int(sys.argv[3]) // len(block)):
        os.write(fd, block)
    os.fsync(fd)
    sys.exit()
source, work, tandem = sys.argv[1:4]
ROUNDS = 3
quant = sys.argv[4] if len(sys.argv) > 4 else "mxfp4-q8"
files = sorted(glob.glob(os.path.join(source, "*.safetensors")))
to_read = sum(os.path.getsize(f) for f in files)
to_write = json.loads(subprocess.check_output([tandem, "convert", source, "--quant", quant, "--dry-run", "--json"]))["bytes"]
os.makedirs(work, exist_ok=True)


def drop_caches():
    os.sync()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    try:
        open("/proc/sys/vm/drop_caches", "w").write("1")
    except OSError:
        pass


def processor_seconds():
    """Of all processes and of the system, and of this script's children."""
    everything = sum(map(int, open("/proc/stat").readline().split()[1:])) / os.sysconf("SC_CLK_TCK")
    idle = sum(map(int, open("/proc/stat").readline().split()[4:6])) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return everything - idle, own.children_user + own.children_system


def timed(*commands):
    drop_caches()
    start, (all_before, own_before) = time.time(), processor_seconds()
    running = [subprocess.Popen(c, shell=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    assert all(child.wait() == 0 for child in running), commands
    seconds, (all_after, own_after) = time.time() - start, processor_seconds()
    others = all_after - all_before - (own_after - own_before)
    print(f"others, the system's own threads included, used {others:.1f} s of processor time", flush=True)
    return seconds


def disk_alone():
    out = os.path.join(work, "dd.bin")
    reads = " && ".join(f"dd if={f} of=/dev/null bs=8M iflag=direct" for f in files)
    writes = f"{sys.executable} {__file__} --write {out} {to_write}"
    seconds = timed(reads, writes)
    os.remove(out)
    print(f"disk alone: {seconds:.1f} s, {(to_read + to_write) / seconds / 1e6:.0f} MB/s", flush=True)
    return seconds


def convert():
    out = os.path.join(work, "out")
    shutil.rmtree(out, ignore_errors=True)
    start = os.times()
    seconds = timed(f"{tandem} convert {source} --out {out} --quant {quant} --json > {work}/convert.json")
    used = os.times()
    shutil.rmtree(out)
    peak = json.load(open(f"{work}/convert.json"))["peak_memory_bytes"]
    print(f"convert: {seconds:.1f} s, {(to_read + to_write) / seconds / 1e6:.0f} MB/s, user {used.children_user - start.children_user:.1f} s, "
          f"system {used.children_system - start.children_system:.1f} s, peak memory {peak / 1e6:.1f} MB", flush=True)
    return seconds


print(f"{to_read / 1e9:.2f} GB to read, {to_write / 1e9:.2f} GB to write", flush=True)
alone, ratios = [disk_alone()], []
for _ in range(ROUNDS):
    seconds = convert()
    alone.append(disk_alone())
    ratios.append((alone[-2] + alone[-1]) / 2 / seconds)
    print(f"{100 * ratios[-1]:.0f} % of the mean of the disk's speed before and after", flush=True)
print(f"median {100 * sorted(ratios)[ROUNDS // 2]:.0f} %")
