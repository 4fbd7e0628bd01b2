"""models/glm4_lite_tiny: GLM-4.7-Flash's shape (glm4_moe_lite) in Hugging Face's layout, bf16, with logits of mlx-lm in float32.
usage: gen_glm4_lite.py [OUT_DIR]

Small on purpose: 2 layers (one dense), 4 experts, a vocabulary of 32 that needs no tokenizer. Weights are numpy's PCG64, rounded
to bf16. The reference is mlx_lm.models.glm4_moe_lite, which reads the same folder.
"""
import json
import math
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
NAME, SEED, LENGTHS, N_GREEDY = "glm4_lite_tiny", 4007, (12, 40, 72), 32
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "models"
CFG = dict(
    architectures=["Glm4MoeLiteForCausalLM"], model_type="glm4_moe_lite", dtype="bfloat16", vocab_size=32, hidden_size=32,
    intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, mlp_layer_types=["dense", "sparse"],
    first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4,
    num_experts_per_tok=2, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.8, topk_method="noaux_tc",
    q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, rope_interleave=True,
    rope_theta=1000000, rope_parameters={"rope_theta": 1000000, "rope_type": "default"}, rope_scaling=None, rms_norm_eps=1e-5,
    hidden_act="silu", attention_bias=False, max_position_embeddings=1024, tie_word_embeddings=False,
    num_nextn_predict_layers=0, eos_token_id=[31], pad_token_id=31,
)


def weights():
    random = np.random.Generator(np.random.PCG64(SEED))
    normal = lambda *shape, std=1.0: (random.standard_normal(shape, dtype=np.float32) * np.float32(std))
    linear = lambda rows, cols, gain=1.0: normal(rows, cols, std=gain / math.sqrt(cols))
    norm = lambda n: 1 + 0.1 * normal(n)
    c, w = CFG, {}
    hidden, heads, nope, rope, v = (c[k] for k in ("hidden_size", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))

    def mlp(p, width, gain):
        w[p + "gate_proj.weight"], w[p + "up_proj.weight"] = linear(width, hidden), linear(width, hidden)
        w[p + "down_proj.weight"] = linear(hidden, width, gain)

    w["model.embed_tokens.weight"] = normal(c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        a = p + "self_attn."
        w[p + "input_layernorm.weight"], w[p + "post_attention_layernorm.weight"] = norm(hidden), norm(hidden)
        w[a + "q_a_proj.weight"], w[a + "q_a_layernorm.weight"] = linear(c["q_lora_rank"], hidden), norm(c["q_lora_rank"])
        w[a + "q_b_proj.weight"] = linear(heads * (nope + rope), c["q_lora_rank"])
        w[a + "kv_a_proj_with_mqa.weight"] = linear(c["kv_lora_rank"] + rope, hidden)
        w[a + "kv_a_layernorm.weight"] = norm(c["kv_lora_rank"])
        w[a + "kv_b_proj.weight"] = linear(heads * (nope + v), c["kv_lora_rank"])
        w[a + "o_proj.weight"] = linear(hidden, heads * v, 0.4)
        if layer < c["first_k_dense_replace"]:
            mlp(p + "mlp.", c["intermediate_size"], 0.6)
            continue
        w[p + "mlp.gate.weight"] = linear(c["n_routed_experts"], hidden, 1.5)
        w[p + "mlp.gate.e_score_correction_bias"] = random.uniform(-0.05, 0.15, c["n_routed_experts"]).astype(np.float32)
        mlp(p + "mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"], 0.6)
        for expert in range(c["n_routed_experts"]):
            mlp(f"{p}mlp.experts.{expert}.", c["moe_intermediate_size"], 0.3)
    w["model.norm.weight"], w["lm_head.weight"] = norm(hidden), linear(c["vocab_size"], hidden, 2.0)
    keeps = lambda name: name.endswith("e_score_correction_bias")
    return {k: mx.array(x) if keeps(k) else mx.array(x).astype(mx.bfloat16) for k, x in w.items()}


def main():
    folder = OUT / NAME
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CFG, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": CFG["eos_token_id"], "do_sample": False}))
    mx.save_safetensors(str(folder / "model.safetensors"), weights(), metadata={"format": "pt"})
    model, _ = load_model(folder, lazy=False)
    model.set_dtype(mx.float32)
    golden = {}
    for i, length in enumerate(LENGTHS):
        # The first prompt whose greedy text does not hang on a rounding, nor repeats itself at once.
        for attempt in range(1000):
            tokens = np.random.Generator(np.random.PCG64([SEED, i, attempt])).integers(0, 31, length).astype(np.int32)
            cache = make_prompt_cache(model)
            logits = model(mx.array(tokens)[None], cache=cache)[0]
            last, greedy, gap = logits[-1], [], np.inf
            for _ in range(N_GREEDY):
                row = np.sort(np.array(last))
                gap = min(gap, row[-1] - row[-2])
                greedy.append(int(np.argmax(np.array(last))))
                last = model(mx.array([[greedy[-1]]]), cache=cache)[0, -1]
            if gap > 1e-2 and 31 not in greedy and len(set(greedy)) >= 5:
                break
        else:
            raise SystemExit("no prompt with enough margin; change the seed")
        golden |= {f"p{i}.tokens": mx.array(tokens), f"p{i}.logits": logits, f"p{i}.greedy": mx.array(np.array(greedy, np.int32))}
        print(f"p{i}: attempt {attempt}, smallest gap {gap:.4f}, {len(set(greedy))} different tokens")
    mx.save_safetensors(str(folder / "golden.safetensors"), golden)


main()
