#!/usr/bin/env python3
"""Times MLX on the CPU: decode of one GLM-5.1 MoE layer (mlx-lm's glm_moe_dsa), or of a checkpoint; prints one JSON object.

usage: run_mlx.py glm [--context 512] [--steps 3] [--vocab 1024]
       run_mlx.py DIR [--context 128] [--steps 3]

The layer has random packed weights: MXFP4 (groups of 32) routed experts, affine 8-bit (groups of 64) other matrices, as
in the published MXFP4-Q8 checkpoint. Its cache is filled with random keys: prefill would take minutes.
"""
import argparse
import json
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np

mx.set_default_device(mx.cpu)

GLM = dict(
    model_type="glm_moe_dsa", hidden_size=6144, intermediate_size=12288, moe_intermediate_size=2048, num_hidden_layers=1,
    first_k_dense_replace=0, moe_layer_freq=1, num_attention_heads=64, num_key_value_heads=64, n_shared_experts=1,
    n_routed_experts=256, num_experts_per_tok=8, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5,
    scoring_func="sigmoid", topk_method="noaux_tc", q_lora_rank=2048, kv_lora_rank=512, qk_rope_head_dim=64,
    qk_nope_head_dim=192, qk_head_dim=256, v_head_dim=256, head_dim=64, index_head_dim=128, index_n_heads=32, index_topk=2048,
    indexer_rope_interleave=True, rope_interleave=True, rms_norm_eps=1e-5, attention_bias=False, max_position_embeddings=202752,
    rope_parameters={"rope_theta": 1000000, "rope_type": "default"}, tie_word_embeddings=False,
)


def glm_layer(vocab, rng):
    from mlx.utils import tree_flatten
    from mlx_lm.models import glm_moe_dsa

    model = glm_moe_dsa.Model(glm_moe_dsa.ModelArgs.from_dict(dict(GLM, vocab_size=vocab)))

    def predicate(path, m):
        if not hasattr(m, "to_quantized"):
            return False
        if "switch_mlp" in path:
            return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        return {"group_size": 64, "bits": 8, "mode": "affine"} if m.weight.shape[-1] % 64 == 0 else False

    nn.quantize(model, class_predicate=predicate)  # lazy: only names, shapes and types are used
    scale_of = {}
    todo = [(k, v.shape, v.dtype) for k, v in tree_flatten(model.parameters())]
    for name, shape, dtype in todo:
        n = int(np.prod(shape))
        if dtype == mx.uint32:
            a = mx.array(np.frombuffer(rng.bytes(4 * n), np.uint32).reshape(shape))
        elif dtype == mx.uint8:  # e8m0
            a = mx.array((118 + np.frombuffer(rng.bytes(n), np.uint8) % 3).reshape(shape))
        elif name.endswith(".scales"):
            s = rng.uniform(0.5, 1.5, shape).astype(np.float32) / (74 * 64)
            scale_of[name[: -len("scales")]] = s
            a = mx.array(s).astype(mx.bfloat16)
        elif name.endswith(".biases"):
            a = mx.array(-128 * scale_of.pop(name[: -len("biases")])).astype(mx.bfloat16)
        elif name.endswith("e_score_correction_bias"):
            a = mx.array(0.01 * rng.standard_normal(shape).astype(np.float32))
        elif "norm" in name:
            a = (mx.zeros(shape) if name.endswith("bias") else mx.ones(shape)).astype(mx.bfloat16)
        else:
            a = mx.array(rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1])).astype(mx.bfloat16)
        mx.eval(a)
        model.load_weights([(name, a)], strict=False)
    return model


def fill(cache, context):
    """Replaces a cache that holds one token by one that holds `context` random ones."""
    for c in cache:
        if hasattr(c, "caches"):
            fill(c.caches, context)
            continue
        if c.keys is None:
            continue
        k, v = c.keys, c.values
        c.keys = (0.5 * mx.random.normal((*k.shape[:2], context, k.shape[3]))).astype(k.dtype)
        c.values = (0.5 * mx.random.normal((*v.shape[:2], context, v.shape[3]))).astype(v.dtype)
        c.offset = context
        mx.eval(c.keys, c.values)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--vocab", type=int, default=1024)
    a = p.parse_args()
    rng = np.random.default_rng(1)
    if a.model == "glm":
        model, vocab = glm_layer(a.vocab, rng), a.vocab
    else:
        from pathlib import Path

        from mlx_lm.utils import load_model

        model, config = load_model(Path(a.model))
        vocab = config["vocab_size"]
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)

    def step():
        t = time.perf_counter()
        y = model(mx.array([[int(rng.integers(vocab))]]), cache=cache)
        mx.eval(y)
        t = time.perf_counter() - t
        if not bool(mx.isfinite(y.astype(mx.float32)).all()):
            sys.exit("MLX's logits are not finite")
        return t

    step()
    fill(cache, a.context)
    step()
    print(json.dumps({"context": a.context, "layers": len(model.layers), "decode_s": [step() for _ in range(a.steps)]}))


if __name__ == "__main__":
    main()
