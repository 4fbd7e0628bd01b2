//! Kernels against component goldens made with transformers and float64 (`tests/golden/units`, `generate/gen_units.py`).

use safetensors::SafeTensors;
use serde_json::Value;
use tandem_core::ModelConfig;
use tandem_core::backend::{Rope, RopeLayout, Routing};
use tandem_core::config::RopeParameters;
use tandem_cpu::Isa;
use tandem_cpu::kernels::{attention, index_select, norm, rope, router_topk};

/// Absolute, and relative above 1: the fixtures' bound for components.
const TOLERANCE: f32 = 1e-5;

struct Units {
    info: Value,
    data: Vec<u8>,
}

impl Units {
    fn load() -> Units {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/units");
        let text = std::fs::read_to_string(format!("{dir}/units.json")).expect("units.json");
        let data = std::fs::read(format!("{dir}/units.safetensors")).expect("units.safetensors");
        Units { info: serde_json::from_str(&text).expect("JSON"), data }
    }

    fn words<T>(&self, name: &str, decode: impl Fn([u8; 4]) -> T) -> Vec<T> {
        let tensors = SafeTensors::deserialize(&self.data).expect("safetensors");
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        tensor.data().as_chunks::<4>().0.iter().map(|b| decode(*b)).collect()
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.words(name, f32::from_le_bytes)
    }

    fn i32s(&self, name: &str) -> Vec<i32> {
        self.words(name, i32::from_le_bytes)
    }

    fn number(&self, section: &str, key: &str) -> f64 {
        self.info[section][key].as_f64().unwrap_or_else(|| panic!("{section}.{key} is a number"))
    }

    fn size(&self, section: &str, key: &str) -> usize {
        self.number(section, key) as usize
    }
}

#[track_caller]
fn check_within(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * e.abs().max(1.0), "{what}[{i}]: found {f:e}, expected {e:e}");
    }
}

#[track_caller]
fn check(what: &str, found: &[f32], expected: &[f32]) {
    check_within(what, found, expected, TOLERANCE);
}

/// `w [n, x.len()] . x`, summed in f64: what surrounds the kernel under test must not add errors of its own.
fn matvec(w: &[f32], x: &[f32]) -> Vec<f32> {
    let dot = |row: &[f32]| row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
    w.chunks_exact(x.len()).map(dot).collect()
}

/// Rope parameters as a config.json would hold them.
fn rope_parameters(section: &Value) -> RopeParameters {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 8, "rope_parameters": section,
    });
    ModelConfig::parse(&config.to_string()).expect("a valid config").rope
}

fn rotated(rope: &Rope, position: u32, x: &[f32]) -> Vec<f32> {
    let (mut cos, mut sin) = (vec![0.0; rope.inv_freq.len()], vec![0.0; rope.inv_freq.len()]);
    rope::angles(rope, position, &mut cos, &mut sin);
    let mut out = vec![0.0; x.len()];
    rope::rotate(rope.layout, &cos, &sin, x, &mut out);
    out
}

#[test]
fn rope_matches() {
    let units = Units::load();
    let (positions, x) = (units.i32s("rope.positions"), units.f32s("rope.x"));
    let dim = 64;
    for name in ["glm51", "glm52", "dsv32_yarn", "yarn_mscale_ratio", "llama3"] {
        let golden = |part: &str| units.f32s(&format!("rope.{name}.{part}"));
        let parameters = rope_parameters(&units.info[format!("rope.{name}.params")]);
        let scaling = units.info[format!("rope.{name}.attention_scaling")].as_f64().expect("a number") as f32;
        check(&format!("{name} scaling"), &[parameters.attention_scaling()], &[scaling]);
        let inv_freq = parameters.inv_freq(dim);
        for (i, (f, e)) in inv_freq.iter().zip(&golden("inv_freq")).enumerate() {
            // The references compute the powers in f32: a few ulp.
            assert!((f - e).abs() <= 1e-6 * e, "{name} inv_freq[{i}]: found {f:e}, expected {e:e}");
        }

        for (layout, part) in [(RopeLayout::Interleaved, "interleaved"), (RopeLayout::Half, "half")] {
            let exact = Rope { inv_freq: golden("inv_freq"), scaling, layout };
            let own = Rope { inv_freq: inv_freq.clone(), scaling: parameters.attention_scaling(), layout };
            let (cos, sin, expected) = (golden("cos"), golden("sin"), golden(part));
            for (row, position) in positions.iter().enumerate() {
                let what = format!("{name} {part} position {position}");
                let (mut c, mut s) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
                rope::angles(&exact, *position as u32, &mut c, &mut s);
                let table = row * dim / 2..(row + 1) * dim / 2;
                check(&format!("{what} cos"), &c, &cos[table.clone()]);
                check(&format!("{what} sin"), &s, &sin[table]);
                for head in 0..2 {
                    let at = (row * 2 + head) * dim..(row * 2 + head + 1) * dim;
                    let (x, expected) = (&x[at.clone()], &expected[at]);
                    check(&what, &rotated(&exact, *position as u32, x), expected);
                    // Our own frequencies may be two ulp (of at most 2^-24 each) away, and x is up to 4.
                    let drift = *position as f32 * 2.0 * 2f32.powi(-24) * 4.0;
                    check_within(&what, &rotated(&own, *position as u32, x), expected, TOLERANCE + drift);
                }
            }
        }
    }
}

#[test]
fn rope_leaves_the_rest_alone() {
    let rope = Rope { inv_freq: vec![1.0, 0.5], scaling: 1.0, layout: RopeLayout::Half };
    let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    assert_eq!(rotated(&rope, 9, &x)[4..], x[4..]);
    assert_eq!(rotated(&rope, 0, &x), x);
}

#[test]
fn router_matches() {
    let units = Units::load();
    for name in ["plain", "grouped", "grouped_negative_bias", "no_norm", "top1"] {
        let cfg = format!("router.{name}.cfg");
        let routing = Routing {
            top_k: units.size(&cfg, "top_k"),
            n_group: units.size(&cfg, "n_group"),
            topk_group: units.size(&cfg, "topk_group"),
            normalize: units.info[&cfg]["norm_topk_prob"] == true,
            scale: units.number(&cfg, "routed_scaling_factor") as f32,
            first_expert: 0,
            n_held: usize::MAX,
        };
        let golden = |part: &str| units.f32s(&format!("router.{name}.{part}"));
        let (bias, logits, weights) = (golden("bias"), golden("logits"), golden("w"));
        let (gate, x) = (golden("weight"), golden("x"));
        let expected_ids = units.i32s(&format!("router.{name}.idx"));
        let (k, hidden) = (routing.top_k, gate.len() / bias.len());
        for (row, logits) in logits.chunks_exact(bias.len()).enumerate() {
            let what = format!("{name} row {row}");
            let own_logits = matvec(&gate, &x[row * hidden..(row + 1) * hidden]);
            check(&format!("{what} logits"), &own_logits, logits);
            let (mut ids, mut found) = (vec![0; k], vec![0.0; k]);
            router_topk::router_topk(logits, &bias, &routing, &mut ids, &mut found);
            // The golden is in ascending order of experts.
            let mut chosen: Vec<(i32, f32)> = ids.into_iter().zip(found).collect();
            chosen.sort_by_key(|(id, _)| *id);
            let (ids, found): (Vec<i32>, Vec<f32>) = chosen.into_iter().unzip();
            let range = row * k..(row + 1) * k;
            assert_eq!(ids, expected_ids[range.clone()], "{what}");
            check(&what, &found, &weights[range]);
        }
    }
}

#[test]
fn indexer_matches() {
    let units = Units::load();
    for name in ["interleaved", "half", "tiny_k"] {
        let cfg = format!("indexer.{name}.cfg");
        let golden = |part: &str| units.f32s(&format!("indexer.{name}.{part}"));
        let (n_heads, dim) = (units.size(&cfg, "index_n_heads"), units.size(&cfg, "index_head_dim"));
        let (topk, rope_dim) = (units.size(&cfg, "index_topk"), units.size(&cfg, "rope_dim"));
        let theta = units.number(&cfg, "rope_theta");
        let interleaved = units.info[&cfg]["interleaved"] == true;
        let rope = Rope {
            inv_freq: rope_parameters(&serde_json::json!({"rope_theta": theta})).inv_freq(rope_dim),
            scaling: 1.0,
            layout: if interleaved { RopeLayout::Interleaved } else { RopeLayout::Half },
        };
        let (wq, wk, w_weights) = (golden("wq_b.weight"), golden("wk.weight"), golden("weights_proj.weight"));
        let (norm_weight, norm_bias) = (golden("k_norm.weight"), golden("k_norm.bias"));
        let (hidden, q_resid) = (golden("hidden"), golden("q_resid"));
        let (scores, expected_topk) = (golden("scores"), units.i32s(&format!("indexer.{name}.topk")));
        let width = wk.len() / dim;
        let n = hidden.len() / width;

        let keys: Vec<Vec<f32>> = hidden
            .chunks_exact(width)
            .enumerate()
            .map(|(position, hidden)| {
                let mut key = vec![0.0; dim];
                norm::layer_norm(&matvec(&wk, hidden), &norm_weight, &norm_bias, 1e-6, &mut key);
                rotated(&rope, position as u32, &key)
            })
            .collect();
        // The kernel leaves positive factors out, which do not change the choice; the reference has them.
        let factor = (n_heads as f32).powf(-0.5) * (dim as f32).powf(-0.5);
        for row in 0..n {
            let q = matvec(&wq, &q_resid[row * width..(row + 1) * width]);
            let q: Vec<f32> = q.chunks_exact(dim).flat_map(|head| rotated(&rope, row as u32, head)).collect();
            let mut weights = matvec(&w_weights, &hidden[row * width..(row + 1) * width]);
            weights.iter_mut().for_each(|w| *w *= factor);
            let expected_scores = &scores[row * n..row * n + row + 1];
            let expected = &expected_topk[row * topk..(row + 1) * topk];
            for isa in Isa::available() {
                let what = format!("{name} row {row} {isa}");
                let mut found = vec![0.0; row + 1];
                index_select::scores(isa, &q, &weights, keys.iter().map(Vec::as_slice), &mut found);
                check(&what, &found, expected_scores);
                let mut selected = vec![0; topk];
                index_select::select(&found, &mut vec![], &mut selected);
                check_selection(&what, &selected, expected, expected_scores);
            }
        }
    }
}

/// The same positions, or, where scores tie at the threshold, positions with the same scores.
#[track_caller]
fn check_selection(what: &str, found: &[i32], expected: &[i32], scores: &[f32]) {
    assert!(found.windows(2).all(|w| w[0] < w[1] || w[1] == -1), "{what}: {found:?} is not ascending");
    if found == expected {
        return;
    }
    let of = |positions: &[i32]| {
        let mut of: Vec<f32> = positions.iter().filter(|p| **p >= 0).map(|p| scores[*p as usize]).collect();
        of.sort_by(f32::total_cmp);
        of
    };
    // Exact zeros tie; anything else must be the same choice.
    assert_eq!(of(found), of(expected), "{what}: {found:?} instead of {expected:?}");
}

#[test]
fn norms_match() {
    let units = Units::load();
    let (x, w, b) = (units.f32s("norm.x"), units.f32s("norm.w"), units.f32s("norm.b"));
    for (name, eps) in [("1e-05", 1e-5), ("1e-06", 1e-6)] {
        let (rms, layer) = (units.f32s(&format!("norm.rms_{name}")), units.f32s(&format!("norm.layer_{name}")));
        let rows = x.chunks_exact(w.len()).zip(rms.chunks_exact(w.len())).zip(layer.chunks_exact(w.len()));
        for (row, ((x, rms), layer)) in rows.enumerate() {
            let mut out = vec![0.0; w.len()];
            norm::rms_norm(x, &w, eps, &mut out);
            check(&format!("rms {name} row {row}"), &out, rms);
            norm::layer_norm(x, &w, &b, eps, &mut out);
            check(&format!("layer {name} row {row}"), &out, layer);
        }
    }
}

#[test]
fn absorbed_mla_matches() {
    let units = Units::load();
    let golden = |part: &str| units.f32s(&format!("mla.{part}"));
    let (latent, k_pe, q_nope, q_pe) = (golden("latent"), golden("k_pe"), golden("q_nope"), golden("q_pe"));
    let (embed_q, unembed_out) = (golden("embed_q"), golden("unembed_out"));
    let scale = units.info["mla.scale"].as_f64().expect("a number") as f32;
    let (n_heads, n, kv_lora, nope, rope_dim, v) = (4, 20, 64, 64, 32, 64);
    let width = kv_lora + rope_dim;
    let cached: Vec<f32> =
        (0..n).flat_map(|p| [&latent[p * kv_lora..][..kv_lora], &k_pe[p * rope_dim..][..rope_dim]].concat()).collect();
    let q: Vec<f32> = (0..n_heads)
        .flat_map(|h| {
            let absorbed = matvec(&embed_q[h * kv_lora * nope..][..kv_lora * nope], &q_nope[h * nope..][..nope]);
            [&absorbed[..], &q_pe[h * rope_dim..][..rope_dim]].concat()
        })
        .collect();
    for isa in Isa::available() {
        let mut attended = vec![0.0; n_heads * kv_lora];
        let key = |p: usize| &cached[p * width..(p + 1) * width];
        let value = |p: usize| &cached[p * width..p * width + kv_lora];
        attention::attend(isa, &q, n_heads, scale, n, key, value, &mut attended);
        let out: Vec<f32> = (0..n_heads)
            .flat_map(|h| matvec(&unembed_out[h * v * kv_lora..][..v * kv_lora], &attended[h * kv_lora..][..kv_lora]))
            .collect();
        check(&format!("out {isa}"), &out, &golden("out"));
    }
}
