//! The choice of experts (DeepSeek-V3's `noaux_tc`, arXiv 2412.19437 section 2.1.2).

use tandem_core::backend::Routing;

/// Chooses `routing.top_k` experts from `logits [n_experts]`; ids are relative to `routing.first_expert`, and -1 for
/// experts that are not held.
///
/// Scores are `sigmoid(logits)`; `scores + bias` pick groups (by the sum of their two best) and experts, the scores
/// alone weigh them. Experts of rejected groups cannot be chosen, whatever the bias. Ties go to the lower index.
pub fn router_topk(logits: &[f32], bias: &[f32], routing: &Routing, ids: &mut [i32], weights: &mut [f32]) {
    let n_experts = logits.len();
    let scores: Vec<f32> = logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    let mut choice: Vec<f32> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
    if routing.n_group > 1 {
        let size = n_experts / routing.n_group;
        let mut group_scores: Vec<f32> = choice
            .chunks_exact(size)
            .map(|group| {
                let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
                for v in group {
                    if *v > first {
                        (first, second) = (*v, first);
                    } else if *v > second {
                        second = *v;
                    }
                }
                first + second
            })
            .collect();
        let mut kept = vec![false; routing.n_group];
        for _ in 0..routing.topk_group {
            kept[take_best(&mut group_scores)] = true;
        }
        for (group, choice) in choice.chunks_exact_mut(size).enumerate() {
            if !kept[group] {
                choice.fill(f32::NEG_INFINITY);
            }
        }
    }
    for (id, weight) in ids.iter_mut().zip(weights.iter_mut()) {
        let expert = take_best(&mut choice);
        *id = expert as i32;
        *weight = scores[expert];
    }
    let sum = if routing.normalize { weights.iter().sum::<f32>() + 1e-20 } else { 1.0 };
    for weight in weights {
        *weight = *weight / sum * routing.scale;
    }
    let held = routing.first_expert..routing.first_expert + routing.n_held;
    for id in ids {
        let expert = *id as usize;
        *id = if held.contains(&expert) { (expert - held.start) as i32 } else { -1 };
    }
}

/// Index of the largest value, which is removed from the contest.
fn take_best(values: &mut [f32]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] || values[best].is_nan() {
            best = i;
        }
    }
    values[best] = f32::NAN;
    best
}
