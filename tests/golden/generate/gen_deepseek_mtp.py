"""DeepSeek-V3.2's multi-token-prediction layer, in numpy alone: drafts by recurrence, the layer's own output fed back.

The layer is made of layer 3 of models/dsv32_tiny, put at 4, and of norms and an eh_proj by a formula (`filled`), which the
test repeats. Written from the model's published description (arXiv 2412.19437, 2.2; config.json; the rotary table of YaRN,
arXiv 2309.00071), not from Tandem's code. Contexts stay below index_topk, so that the indexer selects every position.

    python3 generate/gen_deepseek_mtp.py        # in tests/golden; writes units/deepseek_mtp.json

The normalised state fed back (GLM's rule) is computed too: the file says where it leads elsewhere.
"""

import json
import math
import pathlib
import struct

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent.parent
MODEL = HERE / "models" / "dsv32_tiny"
CONFIG = json.loads((MODEL / "config.json").read_text())
PREFIX, N_DRAFTS = 7, 4
# Hidden states are given to so many digits.
KEPT = 8


def tensors():
    found = {}
    for path in sorted(MODEL.glob("model-*.safetensors")):
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        for name, info in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = info["data_offsets"]
                found[name] = (info["dtype"], info["shape"], data[8 + length + start : 8 + length + end])
    return found


TENSORS = tensors()


def floats(name):
    dtype, shape, data = TENSORS[name]
    if dtype == "F32":
        values = np.frombuffer(data, "<f4")
    else:
        assert dtype == "BF16", dtype
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape).astype(np.float64)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def matrix(module):
    """A matrix or a stack of them, decoded: affine of 8 bits in groups of 64, or mxfp4."""
    dtype, shape, data = TENSORS[module + ".weight"]
    if dtype != "U32":
        return floats(module + ".weight")
    words = np.frombuffer(data, "<u4").reshape(shape)
    if module + ".biases" in TENSORS:
        codes = (words[..., None] >> (8 * np.arange(4, dtype=np.uint32))) & 255
        codes = codes.reshape(*shape[:-1], -1, 64).astype(np.float64)
        values = codes * floats(module + ".scales")[..., None] + floats(module + ".biases")[..., None]
    else:
        codes = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
        _, scale_shape, scale_data = TENSORS[module + ".scales"]
        scales = 2.0 ** (np.frombuffer(scale_data, "u1").reshape(scale_shape).astype(np.float64) - 127)
        values = E2M1[codes.reshape(*shape[:-1], -1, 32)] * scales[..., None]
    return values.reshape(*shape[:-1], -1)


def filled(n, seed, scale, offset):
    """Numbers that any language makes alike: n of them, whole multiples of 1/4096."""
    state = np.uint64(seed)
    values = np.empty(n)
    for i in range(n):
        state = np.uint64((int(state) * 6364136223846793005 + 1442695040888963407) % (1 << 64))
        values[i] = (int(state >> np.uint64(33)) % 2001 - 1000) * scale / 4096 + offset
    return values


H = CONFIG["hidden_size"]
ENORM, HNORM, HEAD_NORM = (filled(H, seed, 1, 1) for seed in (1, 2, 3))
EH_PROJ = filled(2 * H * H, 4, 1, 0).reshape(H, 2 * H)


def rms(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"]) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def rotation(position):
    """Cosines and sines of YaRN's frequencies."""
    yarn, dim = CONFIG["rope_scaling"], CONFIG["qk_rope_head_dim"]
    base, original = CONFIG["rope_theta"], yarn["original_max_position_embeddings"]
    place = lambda turns: dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
    low, high = max(math.floor(place(yarn["beta_fast"])), 0), min(math.ceil(place(yarn["beta_slow"])), dim - 1)
    i = np.arange(dim // 2)
    plain = base ** (-2.0 * i / dim)
    ramp = np.clip((i - low) / max(high - low, 0.001), 0, 1)
    frequencies = plain / yarn["factor"] * ramp + plain * (1 - ramp)
    # mscale and mscale_all_dim are equal, so that the table itself is not scaled.
    return np.cos(position * frequencies), np.sin(position * frequencies)


def rotate(x, position):
    """Pairs of neighbours, as DeepSeek's attention has them."""
    cos, sin = rotation(position)
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out


P = "model.layers.3."
W = {
    name: matrix(P + name)
    for name in [
        *(f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "embed_q", "unembed_out", "o_proj")),
        *(f"mlp.{kind}.{n}_proj" for kind in ("shared_experts", "switch_mlp") for n in ("gate", "up", "down")),
        "mlp.gate",
    ]
}
NORMS = {n: floats(P + n + ".weight") for n in ("input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")}
BIAS = floats(P + "mlp.gate.e_score_correction_bias")
EMBEDDING, HEAD = matrix("model.embed_tokens"), matrix("lm_head")


def attention(x, position, cache):
    n_heads, nope, rope = CONFIG["num_attention_heads"], CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"]
    q = W["self_attn.q_b_proj"] @ rms(W["self_attn.q_a_proj"] @ x, NORMS["self_attn.q_a_layernorm"])
    q = q.reshape(n_heads, nope + rope)
    latent, key = np.split(W["self_attn.kv_a_proj_with_mqa"] @ x, [CONFIG["kv_lora_rank"]])
    cache.append((rms(latent, NORMS["self_attn.kv_a_layernorm"]), rotate(key, position)))
    assert len(cache) <= CONFIG["index_topk"]
    latents, keys = (np.stack(part) for part in zip(*cache))
    # embed_q [n_heads, kv_lora_rank, nope] takes a query to the latents, unembed_out [n_heads, v, kv_lora_rank] back.
    in_latent = np.einsum("hkn,hn->hk", W["self_attn.embed_q"], q[:, :nope])
    scores = in_latent @ latents.T + rotate(q[:, nope:], position) @ keys.T
    yarn = CONFIG["rope_scaling"]
    mscale = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1
    scores *= mscale * mscale / math.sqrt(nope + rope)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hvk,hk->hv", W["self_attn.unembed_out"], weights @ latents)
    return W["self_attn.o_proj"] @ out.reshape(-1)


def mlp(x, gate, up, down):
    return down @ (silu(gate @ x) * (up @ x))


def experts(x):
    n_group, per_token = CONFIG["n_group"], CONFIG["num_experts_per_tok"]
    scores = 1 / (1 + np.exp(-(W["mlp.gate"] @ x)))
    choice = (scores + BIAS).reshape(n_group, -1)
    best_two = np.sort(choice, -1)[:, -2:].sum(-1)
    groups = np.argsort(-best_two)[: CONFIG["topk_group"]]
    masked = np.full_like(choice, -np.inf)
    masked[groups] = choice[groups]
    chosen = np.argsort(-masked.reshape(-1))[:per_token]
    weights = scores[chosen] / scores[chosen].sum() * CONFIG["routed_scaling_factor"]
    out = mlp(x, *(W[f"mlp.shared_experts.{n}_proj"] for n in ("gate", "up", "down")))
    for expert, weight in zip(chosen, weights):
        out = out + weight * mlp(x, *(W[f"mlp.switch_mlp.{n}_proj"][expert] for n in ("gate", "up", "down")))
    return out


def layer(token, given, position, cache):
    """Output of the layer, and the logits, for one position."""
    x = EH_PROJ @ np.concatenate([rms(EMBEDDING[token], ENORM), rms(given, HNORM)])
    x = x + attention(rms(x, NORMS["input_layernorm"]), position, cache)
    x = x + experts(rms(x, NORMS["post_attention_layernorm"]))
    return x, HEAD @ rms(x, HEAD_NORM)


def drafts(tokens, given, normalised):
    cache, found = [], []
    for position, token in enumerate(tokens):
        x, logits = layer(token, given[position], position, cache)
    while True:
        gap = np.sort(logits)[-1] - np.sort(logits)[-2]
        fed = rms(x, HEAD_NORM) if normalised else x
        found.append({"token": int(logits.argmax()), "gap": round(float(gap), 4), "fed_back": [round(float(v), 5) for v in fed[:KEPT]]})
        if len(found) == N_DRAFTS:
            return found
        x, logits = layer(found[-1]["token"], fed, len(tokens) + len(found) - 1, cache)


def main():
    cases = []
    for seed in range(10, 16):
        tokens = [int(v) % CONFIG["vocab_size"] for v in filled(PREFIX, seed, 4096, 1000)]
        given = filled(PREFIX * H, 100 + seed, 4, 0).reshape(PREFIX, H)
        own, normalised = (drafts(tokens, given, rule) for rule in (False, True))
        cases.append({"seed": seed, "tokens": tokens, "drafts": own, "drafts_if_normalised": [d["token"] for d in normalised]})
    assert any(c["drafts_if_normalised"] != [d["token"] for d in c["drafts"]] for c in cases)
    out = HERE / "units" / "deepseek_mtp.json"
    out.write_text(json.dumps({"cases": cases}, separators=(",", ":")) + "\n")
    print(out.stat().st_size, [[d["token"] for d in c["drafts"]] for c in cases], [c["drafts_if_normalised"] for c in cases])
    print([[d["gap"] for d in c["drafts"]] for c in cases])


main()
