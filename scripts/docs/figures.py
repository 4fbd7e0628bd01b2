#!/usr/bin/env python3
"""Draws docs/images/crates.svg (from `cargo metadata`) and docs/images/decode-step.svg. Needs Python and cargo.

    python3 scripts/docs/figures.py
"""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs/images"
STYLE = (
    "<style>rect{fill:#f4f6f8;stroke:#5b6b7b;rx:6}.dev{stroke-dasharray:4 3}text{font:13px sans-serif;fill:#1c2733;"
    "text-anchor:middle}.small{font-size:11px;fill:#5b6b7b}path{stroke:#8fa0b0;fill:none}"
    "@media(prefers-color-scheme:dark){rect{fill:#1c2733;stroke:#8fa0b0}text{fill:#e8eef4}.small{fill:#a9b8c6}}</style>"
)


def svg(width, height, body):
    arrow = '<marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    arrow += '<path d="M0,0 L8,4 L0,8" /></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return f"{head}{STYLE}<defs>{arrow}</defs>{''.join(body)}</svg>\n"


def box(x, y, width, height, title, subtitle="", kind=""):
    text = f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>'
    text += f'<text x="{x + width / 2}" y="{y + 20}">{title}</text>'
    if subtitle:
        text += f'<text class="small" x="{x + width / 2}" y="{y + 37}">{subtitle}</text>'
    return text


def crates():
    metadata = json.loads(
        subprocess.run(
            ["cargo", "metadata", "--format-version", "1", "--no-deps"], cwd=ROOT, check=True, capture_output=True
        ).stdout
    )
    # Library names: packages have other names in the registry.
    name_of = {}
    for package in metadata["packages"]:
        target = next(t for t in package["targets"] if t["kind"][0] in ("lib", "bin"))
        name_of[package["name"]] = target["name"].replace("_", "-")
    depends = {}
    for package in metadata["packages"]:
        if package["name"] == "xtask":
            continue
        own = [d["name"] for d in package["dependencies"] if d["kind"] is None and d["name"] in name_of]
        depends[name_of[package["name"]]] = {name_of[d] for d in own}
    # Only arrows that no longer path implies.
    def reaches(start, goal, skip):
        return any(d == goal or reaches(d, goal, False) for d in depends[start] if not (skip and d == goal))

    level = {}

    def depth(name):
        if name not in level:
            level[name] = 1 + max((depth(d) for d in depends[name]), default=-1)
        return level[name]

    rows = {}
    for name in sorted(depends, key=depth):
        rows.setdefault(depth(name), []).append(name)
    width, step, size = 860, 82, (150, 34)
    height = step * len(rows) + 20
    place = {}
    for row, names in rows.items():
        for i, name in enumerate(names):
            x = width * (i + 1) / (len(names) + 1) - size[0] / 2
            place[name] = (x, height - step * (row + 1) + 20)
    body = []
    for name, targets in depends.items():
        for target in targets:
            if reaches(name, target, True):
                continue
            (x0, y0), (x1, y1) = place[name], place[target]
            start, end = (x0 + size[0] / 2, y0 + size[1]), (x1 + size[0] / 2, y1)
            middle = (start[1] + end[1]) / 2
            body.append(
                f'<path marker-end="url(#a)" d="M{start[0]:.0f},{start[1]:.0f} C{start[0]:.0f},{middle:.0f} '
                f'{end[0]:.0f},{middle:.0f} {end[0]:.0f},{end[1] - 1:.0f}"/>'
            )
    for name, (x, y) in place.items():
        body.append(box(round(x), round(y), *size, name, kind="dev" if "conformance" in name else ""))
    (OUT / "crates.svg").write_text(svg(width, height, body))


# A decode step of a layer with MLA and experts, as the forward pass runs it.
STAGES = [
    ("rms_norm", "hidden, bf16 or f32"),
    ("linear", "kv_a, q_a, indexer key"),
    ("prepare_attention", "norms, cached latent and key"),
    ("rope_index_select", "positions, past index_topk"),
    ("head_linear", "queries into the latent space"),
    ("rope_mla_attention", "over the selected positions"),
    ("head_linear, linear", "values out, o_proj"),
    ("all_reduce", "between tensor-parallel ranks"),
    ("add_rms_norm", "residual"),
    ("route", "8 of 256 experts"),
    ("moe", "gate, up, down, shared expert"),
    ("all_reduce", "between tensor-parallel ranks"),
]


def decode_step():
    columns, size, gap = 4, (190, 46), 24
    body = []
    rows = -(-len(STAGES) // columns)
    for i, (title, subtitle) in enumerate(STAGES):
        row, column = divmod(i, columns)
        x, y = 10 + column * (size[0] + gap), 10 + row * (size[1] + 34)
        body.append(box(x, y, *size, title, subtitle, "dev" if title == "all_reduce" else ""))
        if i + 1 < len(STAGES):
            if column + 1 < columns:
                body.append(
                    f'<path marker-end="url(#a)" d="M{x + size[0]},{y + size[1] / 2} h{gap - 1}"/>'
                )
            else:
                down = y + size[1]
                body.append(
                    f'<path marker-end="url(#a)" d="M{x + size[0] / 2},{down} v17 H{10 + size[0] / 2} v16"/>'
                )
    width, height = 20 + columns * size[0] + (columns - 1) * gap, 20 + rows * size[1] + (rows - 1) * 34
    (OUT / "decode-step.svg").write_text(svg(width, height, body))


crates()
decode_step()
