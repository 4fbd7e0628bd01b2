#!/usr/bin/env python3
"""Makes layer.json from the outputs of `tandem bench decode .. --draft-depth 8 --json` (files named overlap-X.json)."""
import json, pathlib, sys
rows = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("overlap-*.json")):
    report = json.loads(path.read_text())
    for case in report.get("sweep", [report]):
        rows.append({
            "expert_overlap": float(path.stem.split("-")[1]), "context": case["context"],
            "layer_ms": [round(v["step_ms_median"], 3) for v in case["verified"]],
            "experts": [round(v["experts_read_per_layer"], 2) for v in case["verified"]],
            "time_over_bytes": [round(v["time_over_bytes"], 3) for v in case["verified"]],
        })
print("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
