"""Smaller versions of two MLX fixtures, so that the repository stays small: whole layers and whole experts are sliced out of the
mlx-made files (the packed bytes are mlx's own), then the goldens are recomputed with transformers (float32, eager).
usage: gen_cut.py FIXTURE_MODELS_DIR [OUT_DIR] [name ...]      (no mlx needed)

Before cutting, the same reference is run on the uncut fixture and must reproduce its published golden.
"""
from gen_extra import *

CUTS = {  # name: (fixture, layers kept, MTP layer, experts kept, seed)
    "glm51_tiny": ("glm51_tiny", [0, 1, 2, 3, 4], None, 8, 1001),
    "glm51_tiny_bf16": ("glm51_tiny_bf16", [0, 1, 2, 3, 4], None, 8, 1001),  # the same weights before quantisation
    "glm52_cut": ("glm52_tiny", [0, 1, 2], None, 8, 3003),  # full, full, shared
    "glm51_mtp_cut": ("glm51_mtp_tiny", [0, 1], 3, 8, 3005),  # dense, MoE + the MTP layer
}
NO_P0_LOGITS = {"glm52_cut", "glm51_mtp_cut"}
E2M1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])


def load_dir(d):
    w = {}
    for f in sorted(Path(d).glob("model*.safetensors")):
        w |= load_file(f)
    return w


def deq(w, cfg, m):
    x = w[m + ".weight"]
    if m + ".scales" not in w:
        return x.float()
    q = cfg["quantization"]
    p = q[m] if isinstance(q.get(m), dict) else q
    b = x.contiguous().view(torch.uint8)
    c = b if p["bits"] == 8 else torch.stack([b & 15, b >> 4], -1).flatten(-2)
    g = c.unflatten(-1, (-1, p["group_size"]))
    s = w[m + ".scales"][..., None]
    if p.get("mode", "affine") == "affine":
        return (s.float() * g.float() + w[m + ".biases"][..., None].float()).flatten(-2)
    assert p["mode"] == "mxfp4"
    return (E2M1[g.long()] * torch.exp2(s.float() - 127)).flatten(-2)


def hf_state(w, cfg):
    """common.mlx_to_hf_state without mlx"""
    out, st = {}, {}
    for k, v in w.items():
        if k.endswith((".scales", ".biases")):
            continue
        m, leaf = k.rsplit(".", 1)
        if leaf != "weight":
            out[k] = v.float()
        elif ".switch_mlp." in m or m.endswith((".embed_q", ".unembed_out")):
            st[m] = deq(w, cfg, m)
        else:
            out[k] = deq(w, cfg, m)
    for m in st:
        if m.endswith("switch_mlp.gate_proj"):
            b = m[: -len("switch_mlp.gate_proj")]
            out[b + "experts.gate_up_proj"] = torch.cat([st[m], st[b + "switch_mlp.up_proj"]], 1)
            out[b + "experts.down_proj"] = st[b + "switch_mlp.down_proj"]
        if m.endswith("embed_q"):
            b = m[: -len("embed_q")]
            out[b + "kv_b_proj.weight"] = torch.cat([st[m].mT, st[b + "unembed_out"]], 1).flatten(0, 1).contiguous()
    return out


def cut(w, cfg, layers, mtp, E):
    ren = {l: i for i, l in enumerate(layers + ([mtp] if mtp is not None else []))}

    def name(k):
        if not k.startswith("model.layers."):
            return k
        a = k.split(".")
        return ".".join(a[:2] + [str(ren[int(a[2])])] + a[3:]) if int(a[2]) in ren else None

    out = {}
    for k, v in w.items():
        if name(k):
            v = v[:E] if ".switch_mlp." in k or ".mlp.gate." in k else v
            out[name(k)] = v.contiguous()
    c = dict(cfg, num_hidden_layers=len(layers), n_routed_experts=E)
    if "indexer_types" in c:
        c["indexer_types"] = [c["indexer_types"][l] for l in layers]
    for q in ("quantization", "quantization_config"):
        if q in c:
            c[q] = {name(k): v for k, v in c[q].items() if name(k)}
    return out, c


def main(src, out_root, names):
    import transformers

    for name, (fix, layers, mtp, E, seed) in CUTS.items():
        if names and name not in names:
            continue
        d, out = src / fix, out_root / name
        assert d.resolve() != out.resolve(), f"{out} is the fixture to cut"
        w, cfg = load_dir(d), json.loads((d / "config.json").read_text())
        G0 = load_file(d / "golden.safetensors")
        ref = hf_model(cfg, hf_state(w, cfg))
        agree = max(float((hf_prefill(ref, G0[f"p{i}.tokens"].tolist())[0] - G0[f"p{i}.logits"]).abs().max()) for i in range(3))
        assert agree < 1e-4, agree
        w, cfg = cut(w, cfg, layers, mtp, E)
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        st_save(dict(sorted(w.items())), str(out / "model.safetensors"), metadata={"format": "mlx"})
        (out / "config.json").write_text(json.dumps(cfg, indent=1))
        for f in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer_golden.json"):
            shutil.copyfile(d / f, out / f)
        state = hf_state(load_dir(out), cfg)
        hf = hf_model(cfg, state)
        N = cfg["num_hidden_layers"]
        G = {}
        rep = {"name": name, "cut_from": fix, "layers": layers, "mtp_layer": mtp, "experts": E, "seed": seed,
               "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
               "uncut_reference_vs_fixture_golden_max_abs": agree, "prompts": []}
        for i, n in enumerate(gm.LENGTHS):
            P = f"p{i}."
            toks, attempt, margins = gm.pick_prompt(hf, state, cfg, seed, i, n)
            lg, dd = hf_prefill(hf, toks, capture=True)
            g, gl = hf_greedy(hf, toks, gm.NGREEDY)
            G[P + "tokens"] = torch.tensor(list(map(int, toks)), dtype=torch.int32)
            if i or name not in NO_P0_LOGITS:
                G[P + "logits"] = lg
            G[P + "greedy"] = torch.tensor(g, dtype=torch.int32)
            for k, v in dd.items():
                if k.startswith(("router_idx_", "router_w_")):
                    G[P + k] = v
                if k.startswith("topk_"):
                    v = v.long()
                    v = torch.where(v <= torch.arange(n)[:, None], v, torch.full_like(v, 10 ** 6)).sort(-1).values
                    G[P + k] = torch.where(v == 10 ** 6, -1, v).int()
            s = {"len": n, "attempt": attempt, "margins": margins, "logits_std": float(lg.std()), "greedy_distinct": len(set(g)),
                 "experts_used": {l: len(dd[f"router_idx_{l}"].unique()) for l in range(N) if f"router_idx_{l}" in dd}}
            if mtp is not None:
                seq = list(map(int, toks)) + g
                _, _, ml = gm.mtp_reference(cfg, state, hf, seq)
                G[P + "mtp_seq"] = torch.tensor(seq, dtype=torch.int32)
                if i == 1:
                    G[P + "mtp_logits"] = ml
                G[P + "mtp_draft"] = ml.argmax(-1).int()
                s["mtp_min_top1_gap"] = float(gaps(ml, 1).min())
            rep["prompts"].append(s)
        write_golden(out / "golden.safetensors", G)
        (out / "golden.json").write_text(json.dumps(rep, indent=1))
        print(json.dumps(rep), flush=True)


if __name__ == "__main__":
    a = sys.argv[1:]
    src = Path(a.pop(0))
    out = Path(a.pop(0)) if a and a[0] not in CUTS else OUT
    main(src, out, a)
