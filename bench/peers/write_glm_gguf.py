#!/usr/bin/env python3
"""A GGUF with the layer shape of GLM-5.1 (architecture glm-dsa): N MoE layers, routed experts MXFP4, other matrices
Q8_0, router, norms and indexer head weights F32 as llama.cpp's converter keeps them. Random weights, no tokenizer.

usage: write_glm_gguf.py OUT.gguf [--layers 2] [--vocab 1024] [--seed 1]

Two layers are 10.7 GB, written tensor by tensor in pieces of at most 64 MiB. Random blocks have scales that give each
matrix an output of about the size of its input, so activations stay finite and routing spreads over the experts.
"""
import argparse
import math
import os
import shutil
import sys

import gguf
import numpy as np

HIDDEN, HEADS, Q_LORA, KV_LORA, NOPE, ROPE, V_DIM = 6144, 64, 2048, 512, 192, 64, 256
EXPERTS, TOP_K, EXPERT_FF, DENSE_FF, SHARED = 256, 8, 2048, 12288, 1
INDEX_HEADS, INDEX_DIM, INDEX_TOPK = 32, 128, 2048
T = gguf.GGMLQuantizationType
PIECE = 64 << 20


def tensors(layers, vocab):
    """(name, numpy shape [.., rows, columns], type) in file order."""
    q8, f32, mx = T.Q8_0, T.F32, T.MXFP4
    yield "token_embd.weight", (vocab, HIDDEN), q8
    for i in range(layers):
        for name, shape, ty in [
            ("attn_norm.weight", (HIDDEN,), f32),
            ("attn_q_a.weight", (Q_LORA, HIDDEN), q8),
            ("attn_q_a_norm.weight", (Q_LORA,), f32),
            ("attn_q_b.weight", (HEADS * (NOPE + ROPE), Q_LORA), q8),
            ("attn_kv_a_mqa.weight", (KV_LORA + ROPE, HIDDEN), q8),
            ("attn_kv_a_norm.weight", (KV_LORA,), f32),
            ("attn_k_b.weight", (HEADS, KV_LORA, NOPE), q8),
            ("attn_v_b.weight", (HEADS, V_DIM, KV_LORA), q8),
            ("attn_output.weight", (HIDDEN, HEADS * V_DIM), q8),
            ("indexer.attn_q_b.weight", (INDEX_HEADS * INDEX_DIM, Q_LORA), q8),
            ("indexer.attn_k.weight", (INDEX_DIM, HIDDEN), q8),
            ("indexer.k_norm.weight", (INDEX_DIM,), f32),
            ("indexer.k_norm.bias", (INDEX_DIM,), f32),
            ("indexer.proj.weight", (INDEX_HEADS, HIDDEN), f32),
            ("ffn_norm.weight", (HIDDEN,), f32),
            ("ffn_gate_inp.weight", (EXPERTS, HIDDEN), f32),
            ("exp_probs_b.bias", (EXPERTS,), f32),
            ("ffn_gate_exps.weight", (EXPERTS, EXPERT_FF, HIDDEN), mx),
            ("ffn_up_exps.weight", (EXPERTS, EXPERT_FF, HIDDEN), mx),
            ("ffn_down_exps.weight", (EXPERTS, HIDDEN, EXPERT_FF), mx),
            ("ffn_gate_shexp.weight", (SHARED * EXPERT_FF, HIDDEN), q8),
            ("ffn_up_shexp.weight", (SHARED * EXPERT_FF, HIDDEN), q8),
            ("ffn_down_shexp.weight", (HIDDEN, SHARED * EXPERT_FF), q8),
        ]:
            yield f"blk.{i}.{name}", shape, ty
    yield "output_norm.weight", (HIDDEN,), f32
    yield "output.weight", (vocab, HIDDEN), q8


def byte_shape(shape, ty):
    block, size = gguf.GGML_QUANT_SIZES[ty]
    assert shape[-1] % block == 0, (shape, ty)
    return (*shape[:-1], shape[-1] // block * size)


def nbytes(shape, ty):
    return math.prod(byte_shape(shape, ty))


def random_blocks(rng, n, ty, columns):
    """n random blocks as uint8 [n, block bytes]; values have a standard deviation of about 1/sqrt(columns)."""
    size = gguf.GGML_QUANT_SIZES[ty][1]
    b = np.frombuffer(rng.bytes(n * size), np.uint8).reshape(n, size).copy()
    if ty == T.MXFP4:  # e8m0 byte, then 32 e2m1 codes (root mean square 2.9)
        e = 127 + round(math.log2(1 / math.sqrt(columns) / 2.9))
        b[:, 0] = e - 1 + b[:, 0] % 3
    else:  # Q8_0: float16 scale, then 32 int8 (root mean square 74)
        d = (0.5 + rng.random(n, dtype=np.float32)) / (74 * math.sqrt(columns))
        b[:, :2] = d.astype(np.float16).view(np.uint8).reshape(n, 2)
    return b


def pieces(rng, name, shape, ty):
    if ty == T.F32:
        if "norm" in name:
            a = 1 + 0.1 * rng.standard_normal(shape, dtype=np.float32) if name.endswith("weight") else np.zeros(shape, np.float32)
        elif name.endswith("exp_probs_b.bias"):
            a = 0.01 * rng.standard_normal(shape, dtype=np.float32)
        else:
            a = rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(shape[-1]))
        yield a.astype(np.float32)
        return
    block, size = gguf.GGML_QUANT_SIZES[ty]
    left = math.prod(shape) // block
    while left:
        n = min(left, PIECE // size)
        yield random_blocks(rng, n, ty, shape[-1])
        left -= n


def write(out, layers=2, vocab=1024, seed=1):
    todo = list(tensors(layers, vocab))
    total = sum(nbytes(s, t) for _, s, t in todo)
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(out))).free
    if free < total + (1 << 30):
        sys.exit(f"{out}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free")
    w = gguf.GGUFWriter(out + ".part", gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GLM_DSA])
    w.add_name(f"GLM-5.1 shape, {layers} MoE layers, random")
    w.add_block_count(layers)
    w.add_context_length(202752)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(DENSE_FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(1)
    w.add_key_length(KV_LORA + ROPE)
    w.add_value_length(KV_LORA)
    w.add_key_length_mla(NOPE + ROPE)
    w.add_value_length_mla(V_DIM)
    w.add_q_lora_rank(Q_LORA)
    w.add_kv_lora_rank(KV_LORA)
    w.add_rope_dimension_count(ROPE)
    w.add_rope_freq_base(1e6)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_layer_norm_eps(1e-6)
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(TOP_K)
    w.add_expert_shared_count(SHARED)
    w.add_expert_group_count(1)
    w.add_expert_group_used_count(1)
    w.add_expert_feed_forward_length(EXPERT_FF)
    w.add_expert_weights_scale(2.5)
    w.add_expert_weights_norm(True)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    w.add_leading_dense_block_count(0)
    w.add_indexer_head_count(INDEX_HEADS)
    w.add_indexer_key_length(INDEX_DIM)
    w.add_indexer_top_k(INDEX_TOPK)
    w.add_vocab_size(vocab)
    w.add_tokenizer_model("none")
    for name, shape, ty in todo:
        if ty == T.F32:
            w.add_tensor_info(name, shape, np.dtype(np.float32), nbytes(shape, ty))
        else:
            w.add_tensor_info(name, byte_shape(shape, ty), np.dtype(np.uint8), nbytes(shape, ty), raw_dtype=ty)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    f, rng = w.fout[0], np.random.Generator(np.random.SFC64(seed))
    w.write_padding(f, f.tell())
    done = 0
    for name, shape, ty in todo:
        n = 0
        for p in pieces(rng, name, shape, ty):
            f.write(memoryview(np.ascontiguousarray(p)).cast("B"))
            n += p.nbytes
        assert n == nbytes(shape, ty), name
        w.write_padding(f, n)
        done += n
        if n > 1 << 30:
            print(f"{name}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", flush=True)
    w.close()
    os.replace(out + ".part", out)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--vocab", type=int, default=1024)
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    write(a.out, a.layers, a.vocab, a.seed)
