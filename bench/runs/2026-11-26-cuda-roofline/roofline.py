#!/usr/bin/env python3
"""A decoded GLM-5.1 MoE layer, launch by launch, from the profiles of 2026-11-23-cuda-h100: bytes over the copy bandwidth
beside the time of the launch alone, and what several designs would take. Prints the tables of README.md.

    python3 roofline.py
"""

import csv
import os

RUN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../2026-11-23-cuda-h100")
COPY = 3.0e12  # bytes per second, measured in the same run
# Measured layer (6 and 2 layers over 4), the same run, in us.
MEASURED = {"512": 177.0, "4096": 194.0}


def of_512():
    """(kernel, grid, bytes, us), in launch order."""
    launches = {}
    with open(os.path.join(RUN, "decode-512.csv")) as f:
        for row in csv.DictReader(f):
            launch = launches.setdefault(int(row["ID"]), [row["Kernel Name"], row["Grid Size"].strip("()").replace(", ", "x"), 0.0, 0.0])
            value = float(row["Metric Value"].replace(",", ""))
            launch[2 if row["Metric Name"].startswith("dram") else 3] = value if row["Metric Name"].startswith("dram") else value / 1e3
    return [launches[i] for i in sorted(launches)]


def of_4096():
    with open(os.path.join(RUN, "ncu-decode-4096.csv")) as f:
        return [[r["kernel"], r["grid"], float(r["mb_read"]) * 1e6, float(r["us"])] for r in csv.DictReader(f)]


def layer(launches):
    """A layer in the middle: from a norm that is followed by the first products to the next, without the head."""
    first = [i for i, l in enumerate(launches[:-1]) if l[0] == "rms_norm" and launches[i + 1][1] in ("1x172x1", "1x174x1")]
    return min((launches[a:b] for a, b in zip(first, first[1:])), key=len)


def fit(rows):
    """Least squares of us = fixed + bytes / bandwidth over the launches that read weights in tiles."""
    points = [(size, us) for kernel, _, size, us in rows if kernel in ("linear_mma_one", "moe_gate_up_one", "moe_down_token")]
    n, sx, sy = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    sxx, sxy = sum(x * x for x, _ in points), sum(x * y for x, y in points)
    slope = (n * sxy - sx * sy) / (n * sxx - sx * sx)
    return (sy - slope * sx) / n, 1e6 / slope


def main():
    for name, launches in [("512", layer(of_512())), ("4096", layer(of_4096()))]:
        print(f"\ncontext {name}: {len(launches)} launches\n")
        print("| launch | grid | MB | us alone | us of its bytes |\n|---|---|---|---|---|")
        total, alone = 0.0, 0.0
        for kernel, grid, size, us in launches:
            print(f"| {kernel} | {grid} | {size / 1e6:.2f} | {us:.1f} | {size / COPY * 1e6:.1f} |")
            total, alone = total + size, alone + us
        bytes_us = total / COPY * 1e6
        print(f"| sum | | {total / 1e6:.1f} | {alone:.1f} | {bytes_us:.1f} |")
        fixed, bandwidth = fit(launches)
        beyond = MEASURED[name] - bytes_us
        print(f"\nlaunches that read tiles, alone: {fixed:.1f} us + bytes at {bandwidth / 1e12:.2f} TB/s")
        print(f"measured {MEASURED[name]:.0f} us: {bytes_us:.0f} of bytes, {beyond:.0f} beyond, {beyond / len(launches):.1f} a launch")
        for stage in [1.0, 1.5, 2.0]:
            print(f"with {stage} us for each of {len(launches)} stages: {bytes_us + stage * len(launches):.0f} us")


main()
