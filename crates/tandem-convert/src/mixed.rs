//! `mixed-4.8`: integer bits for each kind of module, chosen by what rounding that kind does to the model's output.

use anyhow::ensure;
use tandem_core::weights::{Form, MatrixData, Weight};
use tandem_core::{CheckpointError, DType, ModelConfig};
use tandem_model::{Recipe, Target, WeightSource};

use tandem_runtime::judge::{Side, Windows, engine, kind_of};
use tandem_runtime::{DeviceOptions, Meter, News, OnNews, Unit};

/// The name in `--quant`.
pub(super) const NAME: &str = "mixed-4.8";
/// Bits per weight of the whole checkpoint, at most: scales, biases and what is not quantised included.
const MAX_BITS: f64 = 4.8;
/// Bits that a kind can have; two lose too much to be foreseen from four.
const BITS: [u8; 5] = [3, 4, 5, 6, 8];
const GROUP: u16 = 64;
/// Bits at which each kind is tried.
const PROBE: u8 = 4;
/// Tokens that each trial runs.
const TOKENS: usize = 2048;

/// Matrices that get the same bits.
struct Kind {
    name: String,
    /// As in a rule file.
    pattern: String,
    elements: usize,
    /// Bits of scale and bias for each element.
    parameters: f64,
    /// Divergence of the model's output, nats a token, when only these matrices have [`PROBE`] bits.
    kl: f64,
}

/// Measures how much each kind of module of `side` matters on these tokens, and gives them bits.
pub(super) fn recipe(
    side: &Side,
    runs: &[Vec<u32>],
    device: &DeviceOptions,
    on_news: OnNews<'_>,
) -> anyhow::Result<Recipe> {
    let weights = side.resolve()?;
    let is_quantized = |w: &&Weight| {
        w.spec.form != Form::Vector && !w.spec.keeps_format && w.spec.dims().2.is_multiple_of(GROUP.into())
    };
    let others = weights.iter().filter(|w| !is_quantized(w)).map(|w| w.bytes() * 8).sum::<usize>();
    let total = weights.iter().map(|w| w.spec.elements()).sum::<usize>();
    let mut kinds: Vec<Kind> = vec![];
    for weight in weights.iter().filter(is_quantized) {
        let (module, elements) = (&weight.spec.module, weight.spec.elements());
        let name = kind_of(module);
        match kinds.iter_mut().find(|kind| kind.name == name) {
            Some(kind) => kind.elements += elements,
            None => {
                let in_layers = module.starts_with("model.layers.");
                let pattern = if in_layers { format!("model.layers.*.{name}") } else { module.clone() };
                let parameters = (16 * side.config.float.bytes()) as f64 / f64::from(GROUP);
                kinds.push(Kind { name: name.to_string(), pattern, elements, parameters, kl: 0.0 });
            }
        }
    }
    let mut left = TOKENS;
    let mut windows = Windows(vec![]);
    for run in runs.iter().filter(|run| run.len() > 1) {
        if left == 0 {
            break;
        }
        windows.0.push(run[..run.len().min(left + 1)].to_vec());
        left = left.saturating_sub(run.len() - 1);
    }
    let longest = windows.longest();
    let mut original = engine(&side.config, &side.weights()?, side.resident_bytes()?, longest, device)?;
    let n_tokens = (TOKENS * kinds.len()) as u64;
    let meter = Meter::new("trying each kind of module", Unit::Tokens, n_tokens, on_news);
    for kind in &mut kinds {
        let rounded = Rounded { source: &side.weights()?, kind: &kind.name, config: &side.config };
        let mut model = engine(&side.config, &rounded, side.resident_bytes()?, longest, device)?;
        kind.kl = windows.compare(&mut original, &mut model)?.mean_kl();
        meter.add(TOKENS as u64);
    }
    meter.finish();
    let max_total = MAX_BITS * total as f64 - others as f64;
    let bits = allocate(&kinds, max_total);
    let found: f64 = kinds.iter().zip(&bits).map(|(kind, bits)| size(kind, *bits)).sum();
    ensure!(
        found <= max_total,
        "this model has {:.2} bits per weight with the fewest bits that {NAME} gives: too much of it has rows that are not \
         whole groups of {GROUP}; use mixed:FILE",
        (found + others as f64) / total as f64
    );
    // In the form of a rule file, to be kept or changed.
    let mut lines = vec!["default = \"keep\"\n[rules]".to_string()];
    for (kind, bits) in kinds.iter().zip(&bits) {
        lines.push(format!("\"{}\" = \"affine{bits}\" # {:.6} nats a token at {PROBE} bits", kind.pattern, kind.kl));
    }
    on_news(News::Note(lines.join("\n")));
    let target = |bits: u8| Target::Affine { bits, group_size: GROUP };
    let rules = kinds.into_iter().zip(bits).map(|(kind, bits)| (kind.pattern, target(bits))).collect();
    Ok(Recipe { name: NAME.to_string(), rules, experts: Target::Keep, rest: Target::Keep })
}

/// Bits for each kind: from the fewest on, always the step that takes most off the sum of divergences for its size. A
/// divergence goes with the square of the step between codes. What made no difference did not run in the trial (an indexer
/// whose context is never exceeded, a multi-token-prediction layer), and gets the most.
fn allocate(kinds: &[Kind], max_total: f64) -> Vec<u8> {
    let step = |bits: u8| 1.0 / f64::from((1u32 << bits) - 1);
    let loss = |kind: &Kind, bits: u8| kind.kl * (step(bits) / step(PROBE)).powi(2);
    let most = BITS.len() - 1;
    let mut chosen: Vec<usize> = kinds.iter().map(|kind| if kind.kl > 1e-9 { 0 } else { most }).collect();
    let mut total: f64 = kinds.iter().zip(&chosen).map(|(kind, i)| size(kind, BITS[*i])).sum();
    loop {
        let gain = |i: usize| {
            let (kind, now, next) = (&kinds[i], BITS[chosen[i]], *BITS.get(chosen[i] + 1)?);
            let more = size(kind, next) - size(kind, now);
            (total + more <= max_total).then(|| (i, (loss(kind, now) - loss(kind, next)) / more, more))
        };
        let best = (0..kinds.len()).filter_map(gain).max_by(|a, b| a.1.total_cmp(&b.1));
        let Some((i, _, more)) = best else { break };
        chosen[i] += 1;
        total += more;
    }
    chosen.into_iter().map(|i| BITS[i]).collect()
}

/// Bits of all matrices of a kind, scales and biases included.
fn size(kind: &Kind, bits: u8) -> f64 {
    kind.elements as f64 * (f64::from(bits) + kind.parameters)
}

/// The source with one kind of module at [`PROBE`] bits.
struct Rounded<'a> {
    source: &'a dyn WeightSource,
    kind: &'a str,
    config: &'a ModelConfig,
}

impl WeightSource for Rounded<'_> {
    fn matrix(&self, module: &str) -> Result<MatrixData, CheckpointError> {
        let data = self.source.matrix(module)?;
        if kind_of(module) != self.kind {
            return Ok(data);
        }
        data.quantize(DType::Affine { bits: PROBE, group_size: GROUP, params: self.config.float })
    }

    fn vector(&self, module: &str, leaf: &str) -> Result<Vec<f32>, CheckpointError> {
        self.source.vector(module, leaf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_go_where_they_help() {
        let kind = |elements, kl| Kind { name: String::new(), pattern: String::new(), elements, parameters: 0.5, kl };
        let kinds = [kind(1000, 0.01), kind(10, 0.01), kind(1000, 0.0001), kind(10, 0.0)];
        let bits = allocate(&kinds, 4.8 * 2020.0);
        assert!(bits[1] > bits[0] && bits[0] > bits[2], "{bits:?}");
        let total: f64 = kinds.iter().zip(&bits).map(|(k, b)| k.elements as f64 * (f64::from(*b) + 0.5)).sum();
        assert!(total <= 4.8 * 2020.0 && total > 4.3 * 2020.0, "{bits:?}: {total}");
        assert_eq!(allocate(&kinds, 0.0), [3, 3, 3, 8], "not less than the least");
    }
}
