"""Goldens for layouts the MLX fixtures do not cover: Hugging Face checkpoints (per-expert tensors, kv_b_proj), block-FP8, f16 llama.
usage: gen_extra.py [OUT_DIR] [name ...]      (needs torch, transformers, safetensors, numpy; not mlx)

Weights: numpy PCG64, seeds below, stored by hand in the *published* tensor layout (one tensor per expert and projection).
Golden: transformers, eager attention and eager experts, float32, loaded from the written directory with from_pretrained
(FP8: from its weights dequantised to float32, w = e4m3 * weight_scale_inv[row // 128, col // 128]; activations are not quantised).
"""
import hashlib
import importlib.util
import sys
import types

if importlib.util.find_spec("mlx") is None:  # common.py imports mlx for the MLX fixtures; nothing here calls it

    class _Stub(types.ModuleType):
        def __getattr__(self, k):
            if k.startswith("__"):
                raise AttributeError(k)
            return type(k, (), {"__init__": lambda self, *a, **kw: None})

    for _m in ("mlx", "mlx.core", "mlx.nn", "mlx.utils", "mlx_lm", "mlx_lm.utils", "mlx_lm.models", "mlx_lm.models.deepseek_v32",
               "mlx_lm.models.glm_moe_dsa", "mlx_lm.models.cache"):
        sys.modules[_m] = _Stub(_m)
    for _m in list(sys.modules):
        if _m.startswith(("mlx.", "mlx_lm.")):
            setattr(sys.modules[_m.rsplit(".", 1)[0]], _m.rsplit(".", 1)[1], sys.modules[_m])

from common import *
import gen_models as gm
from tokenizer import write_tokenizer

for _m in [m for m, v in sys.modules.items() if m.split(".")[0] in ("mlx", "mlx_lm") and isinstance(v, types.ModuleType) and getattr(v, "__file__", None) is None and v.__spec__ is None]:
    del sys.modules[_m]  # the stubs: transformers looks for the real ones

OUT = Path(__file__).resolve().parent.parent / "models"
F8 = torch.float8_e4m3fn
B = 128

DSV3 = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", torch_dtype="bfloat16", vocab_size=320, hidden_size=128,
    intermediate_size=160, moe_intermediate_size=16, num_hidden_layers=3, first_k_dense_replace=1, moe_layer_freq=1,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
    norm_topk_prob=True, routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc", q_lora_rank=48, kv_lora_rank=64,
    qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False,
    attention_dropout=0.0, max_position_embeddings=1024, rope_theta=10000,
    rope_scaling={"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                  "mscale_all_dim": 0.707},
    num_nextn_predict_layers=0, tie_word_embeddings=False, use_cache=True, initializer_range=0.02, bos_token_id=None,
    eos_token_id=[256, 260, 262], pad_token_id=256, ep_size=1, pretraining_tp=1,
)

CONFIGS = {}
# group-limited routing; yarn with mscale != mscale_all_dim
CONFIGS["dsv3_tiny"] = dict(cfg=DSV3, seed=2001, bias=(-0.25, 0.15))
# block FP8; no linear has both sides a multiple of 128; heads of kv_b_proj (48 + 32 rows) and of q_b_proj (80) straddle blocks
CONFIGS["dsv3_fp8_tiny"] = dict(
    cfg=dict(DSV3, hidden_size=192, intermediate_size=320, q_lora_rank=96, qk_rope_head_dim=32, qk_nope_head_dim=48,
             quantization_config={"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [B, B]}),
    seed=2002, fp8=True)
# GLM-5.1 as published: HF layout, MTP layer (index num_hidden_layers) with its own copies of the embedding and the head
CONFIGS["glm51_hf_tiny_mtp"] = dict(
    cfg=dict(gm.GLM_BASE, intermediate_size=160, moe_intermediate_size=16, num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=8,
             num_experts_per_tok=2, q_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=32, qk_head_dim=48, v_head_dim=32, head_dim=16,
             index_head_dim=32, _with_mtp=True, _mtp_own_head=True),
    seed=2003)
# Llama: float16, untied head, heads * head_dim != hidden, biases on q/k/v/o, plain rope
CONFIGS["llama_f16_tiny"] = dict(
    cfg=dict(architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="float16", vocab_size=320, hidden_size=96,
             intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5,
             rope_theta=10000.0, max_position_embeddings=1024, tie_word_embeddings=False, attention_bias=True, mlp_bias=False,
             hidden_act="silu", bos_token_id=None, eos_token_id=256, pad_token_id=256),
    seed=2004, dtype=torch.float16)


# ----------------------------------------------------------------- weights
def dsv3_weights(cfg, seed, **kw):
    """dsa_weights without the indexer."""
    r = Rng(seed)
    c = dict(cfg, index_n_heads=0, index_head_dim=0)
    w = {"model.embed_tokens.weight": r.normal((cfg["vocab_size"], cfg["hidden_size"]), 1.0)}
    for l in range(cfg["num_hidden_layers"]):
        w |= dsa_layer(r, c, f"model.layers.{l}.", l >= cfg["first_k_dense_replace"], False, **kw)
    w["model.norm.weight"] = r.norm(cfg["hidden_size"])
    w["lm_head.weight"] = r.lin(cfg["vocab_size"], cfg["hidden_size"], 2.5)
    return w


def is_fp8(k):
    return k.endswith("_proj.weight") or k.endswith("_proj_with_mqa.weight")


def expand(s, shape):
    return s.repeat_interleave(B, 0).repeat_interleave(B, 1)[: shape[0], : shape[1]]


def to_fp8(w, seed):
    """Every linear -> F8_E4M3 + weight_scale_inv.  Blocks first get gains of 0.6 .. 1.65, so that a wrong block index is visible."""
    r = Rng([seed, 8])
    out = {}
    for k, v in w.items():
        if not is_fp8(k):
            out[k] = v
            continue
        n, m = v.shape
        nb = (-(-n // B), -(-m // B))
        f = v.float() * expand(torch.exp(r.uniform(nb, -0.5, 0.5)), (n, m))
        pad = torch.zeros(nb[0] * B, nb[1] * B)
        pad[:n, :m] = f
        s = pad.view(nb[0], B, nb[1], B).abs().amax((1, 3)) / 448.0
        q = (f / expand(s, (n, m))).to(F8)
        out[k], out[k + "_scale_inv"] = q, s
    return out


def from_fp8(w):
    out = {}
    for k, v in w.items():
        if k.endswith("_scale_inv"):
            continue
        out[k] = v.float() * expand(w[k + "_scale_inv"], v.shape) if v.dtype == F8 else v.float()
    return out


def fuse(w):
    """per-expert tensors -> transformers' stacked module layout, float32"""
    out, ex = {}, {}
    for k, v in w.items():
        if ".experts." in k:
            b, t = k.split("experts.")
            e, n, _ = t.split(".")
            ex.setdefault(b, {}).setdefault(n, {})[int(e)] = v.float()
        else:
            out[k] = v.float()
    for b, d in ex.items():
        g, u, dn = ([d[n][e] for e in range(len(d[n]))] for n in ("gate_proj", "up_proj", "down_proj"))
        out[b + "experts.gate_up_proj"] = torch.stack([torch.cat(p) for p in zip(g, u)])
        out[b + "experts.down_proj"] = torch.stack(dn)
    return out


def load_file(path):
    with safe_open(str(path), "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}


# ----------------------------------------------------------------- one model
def hf_from_dir(d):
    from transformers import AutoModelForCausalLM

    m, info = AutoModelForCausalLM.from_pretrained(str(d), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
                                                   output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return m.float().eval(), sorted(info["unexpected_keys"])


def rope_facts(hf, cfg):
    rot, att = hf.model.rotary_emb, hf.model.layers[0].self_attn
    return {"rope_type": rot.rope_type, "inv_freq": [float(x) for x in rot.inv_freq], "cos_sin_scale": float(rot.attention_scaling),
            "softmax_scale": float(att.scaling)}


def build(name, spec, root):
    import safetensors, tokenizers, transformers

    cfg, seed, out = dict(spec["cfg"]), spec["seed"], root / name
    if out.exists():
        shutil.rmtree(out)
    kind = cfg["model_type"]
    if kind == "llama":
        W = llama_weights(cfg, seed)
        r = Rng([seed, 7])
        for l in range(cfg["num_hidden_layers"]):
            for p in "qkvo":
                b = f"model.layers.{l}.self_attn.{p}_proj."
                W[b + "bias"] = r.normal(W[b + "weight"].shape[0], 0.2)
        # new draws in float16's own precision (llama_weights rounds to bf16): add bits below bf16's
        r = Rng([seed, 6])
        W = {k: (v.float() * (1 + r.uniform(v.shape, -0.002, 0.002))).to(spec["dtype"]) for k, v in W.items()}
    elif kind == "deepseek_v3":
        W = dsv3_weights(cfg, seed, **({"bias": spec["bias"]} if "bias" in spec else {}))
    else:
        W = dsa_weights(cfg, seed)
    if spec.get("fp8"):
        W = to_fp8(W, seed)
    W = {k: W[k] for k in sorted(W)}
    write_hf(out, W, public_cfg(cfg))
    write_tokenizer(out, cfg)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": cfg["eos_token_id"], "pad_token_id": cfg["pad_token_id"], "do_sample": False}, indent=1))

    # reference model, from the file as written
    disk = load_file(out / "model.safetensors")
    assert disk.keys() == W.keys() and all(torch.equal(disk[k].view(torch.uint8), W[k].view(torch.uint8)) for k in W)
    rep = {"name": name, "seed": seed, "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__,
           "safetensors": safetensors.__version__, "tokenizers": tokenizers.__version__}, "oracle": "transformers float32 eager",
           "weights_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()}
    deq = from_fp8(disk)
    if spec.get("fp8"):
        with tempfile.TemporaryDirectory() as t:
            write_hf(Path(t), deq, {k: v for k, v in public_cfg(cfg).items() if k != "quantization_config"})
            hf, extra = hf_from_dir(t)
        rep["fp8_tensors"] = sum(v.dtype == F8 for v in disk.values())
        rep["fp8_not_converted"] = sorted(k for k, v in disk.items() if v.dtype == BF16 and ".layers." not in k or k.endswith("gate.weight"))
    else:
        hf, extra = hf_from_dir(out)
    state = fuse(deq)
    own = hf.state_dict()
    for k, v in own.items():  # from_pretrained really read the per-expert layout
        assert torch.equal(v, state[k]), k
    rep["ignored_by_transformers"] = extra
    N = cfg["num_hidden_layers"]
    assert all(k.startswith(f"model.layers.{N}.") for k in extra) and bool(extra) == bool(cfg.get("_with_mtp")), extra
    rep["rope"] = rope_facts(hf, cfg) if kind != "llama" else {"rope_type": "default"}
    if kind == "deepseek_v3":
        y = cfg["rope_scaling"]
        ms = lambda m: 0.1 * m * math.log(y["factor"]) + 1.0
        assert abs(rep["rope"]["cos_sin_scale"] - ms(y["mscale"]) / ms(y["mscale_all_dim"])) < 1e-12
        assert abs(rep["rope"]["softmax_scale"] - (cfg["qk_nope_head_dim"] + cfg["qk_rope_head_dim"]) ** -0.5 * ms(y["mscale_all_dim"]) ** 2) < 1e-12

    icfg = {"index_topk": 1 << 30, "n_group": 1, **cfg}
    G, rep["prompts"] = {}, []
    for i, n in enumerate(gm.LENGTHS):
        P = f"p{i}."
        toks, attempt, margins = gm.pick_prompt(hf, state, icfg, seed, i, n)
        lg, d = hf_prefill(hf, toks, capture=True)
        g, gl = hf_greedy(hf, toks, gm.NGREEDY)
        full, _ = hf_prefill(hf, list(toks) + g)
        nocache = full[n - 1 : n - 1 + gm.NGREEDY]
        assert g == nocache.argmax(-1).tolist()
        with RoundActs(hf):
            lgr, _ = hf_prefill(hf, toks)
        G[P + "tokens"] = torch.tensor(list(map(int, toks)), dtype=torch.int32)
        G[P + "logits"] = lg
        G[P + "greedy"] = torch.tensor(g, dtype=torch.int32)
        for k, v in d.items():
            if k.startswith("router_idx_") or k.startswith("router_w_"):
                G[P + k] = v
            if k.startswith("topk_"):  # canonical: ascending, -1 padding
                v = v.long()
                v = torch.where(v <= torch.arange(n)[:, None], v, torch.full_like(v, 10 ** 6)).sort(-1).values
                G[P + k] = torch.where(v == 10 ** 6, -1, v).int()
        s = {"len": n, "attempt": attempt, "margins": margins, "logits_std": float(lg.std()), "greedy_min_top1_gap": float(gaps(gl, 1).min()),
             "greedy_distinct": len(set(g)), "greedy_cache_vs_nocache_max_abs": float((gl - nocache).abs().max()),
             "bf16_rounded_acts_rel_rms": rel_rms(lgr, lg), "bf16_rounded_acts_argmax_agree": float((lg.argmax(-1) == lgr.argmax(-1)).float().mean()),
             "hidden_rms": {k: float(v.pow(2).mean().sqrt()) for k, v in d.items() if k.startswith("layer_") or k == "embed"},
             "experts_used": {l: len(d[f"router_idx_{l}"].unique()) for l in range(N) if f"router_idx_{l}" in d}}
        if cfg.get("_with_mtp") and i == 1:
            seq = list(map(int, toks)) + g
            _, _, ml = gm.mtp_reference(cfg, state, hf, seq)
            G[P + "mtp_seq"] = torch.tensor(seq, dtype=torch.int32)
            G[P + "mtp_logits"] = ml
            G[P + "mtp_draft"] = ml.argmax(-1).int()
            s["mtp_min_top1_gap"] = float(gaps(ml, 1).min())
        rep["prompts"].append(s)
    write_golden(out / "golden.safetensors", G)
    (out / "golden.json").write_text(json.dumps(rep, indent=1))
    return rep


if __name__ == "__main__":
    args = sys.argv[1:]
    if args and args[0] not in CONFIGS:
        OUT = Path(args.pop(0))
    for n, s in CONFIGS.items():
        if args and n not in args:
            continue
        rep = build(n, s, OUT)
        print(n, json.dumps({k: v for k, v in rep.items() if k not in ("prompts", "ignored_by_transformers")}), flush=True)
        for p in rep["prompts"]:
            print("  ", json.dumps(p), flush=True)
