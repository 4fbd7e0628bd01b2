//! `tandem eval compare`: what a model's outputs lose against another's of the same architecture.

use anyhow::{Context, ensure};
use serde_json::json;
use tandem_model::WeightSource;
use tandem_runtime::DeviceOptions;
use tandem_runtime::judge::{Comparison, Mixed, Side, Windows, engine};

use crate::cli::CompareArgs;
use crate::report::print_json;

/// Inputs per window of a plain text.
const WINDOW: usize = 512;
/// Worst positions shown.
const WORST: usize = 5;

/// Runs the command.
pub(crate) fn compare(args: &CompareArgs) -> anyhow::Result<()> {
    let (a, b) = (Side::open(&args.a)?, Side::open(&args.b)?);
    ensure!(
        a.config.vocab_size == b.config.vocab_size,
        "{} has a vocabulary of {}, {} of {}: only models of one tokenizer can be compared",
        args.a,
        a.config.vocab_size,
        args.b,
        b.config.vocab_size
    );
    let windows = Windows::new(&args.text, &a.tokenizer, args.context.unwrap_or(WINDOW))?;
    ensure!(
        Windows::new(&args.text, &b.tokenizer, args.context.unwrap_or(WINDOW))?.0 == windows.0,
        "the tokenizers of {} and {} cut the text differently: only models of one tokenizer can be compared",
        args.a,
        args.b
    );
    for (side, name) in [(&a, &args.a), (&b, &args.b)] {
        side.check_weights().with_context(|| name.clone())?;
    }
    let options =
        DeviceOptions { activations: args.activations.into(), threads: args.threads, ..DeviceOptions::default() };
    let load = |side: &Side, source: &dyn WeightSource| {
        let bytes = side.resident_bytes()?;
        engine(&side.config, source, bytes, windows.longest(), &options)
    };
    let mut first = load(&a, &a.weights()?)?;
    let result = windows.compare(&mut first, &mut load(&b, &b.weights()?)?)?;
    let mut kinds: Vec<(String, Comparison)> = vec![];
    if args.per_module {
        for kind in a.kinds() {
            let mixed = Mixed::new(&a, &b, &kind)?;
            if mixed.differs()? {
                let mut engine = load(&a, &mixed)?;
                kinds.push((kind.clone(), windows.compare(&mut first, &mut engine)?));
            }
        }
        kinds.sort_by(|x, y| y.1.mean_kl().total_cmp(&x.1.mean_kl()));
    }
    if args.json {
        let worst = |c: &Comparison| -> anyhow::Result<Vec<serde_json::Value>> {
            c.worst(WORST)
                .iter()
                .map(|p| Ok(json!({"position": p.position, "kl": p.kl, "context": windows.context(&a.tokenizer, p)?})))
                .collect()
        };
        let ranked: Vec<_> = kinds
            .iter()
            .map(|(kind, c)| json!({"module": kind, "mean_kl": c.mean_kl(), "top1_agreement": c.agreement()}))
            .collect();
        return print_json(&json!({
            "a": args.a, "b": args.b,
            "tokens": result.points.len(),
            "perplexity_a": result.perplexity(|p| p.nll_a),
            "perplexity_b": result.perplexity(|p| p.nll_b),
            "mean_kl": result.mean_kl(),
            "p99_kl": result.p99_kl(),
            "top1_agreement": result.agreement(),
            "worst": worst(&result)?,
            "per_module": ranked,
        }));
    }
    println!(
        "perplexity        {:.4} (A)  {:.4} (B)  over {} tokens",
        result.perplexity(|p| p.nll_a),
        result.perplexity(|p| p.nll_b),
        result.points.len()
    );
    println!("KL(A || B)        {:.6} nats mean, {:.6} at the 99th percentile", result.mean_kl(), result.p99_kl());
    println!("top-1 agreement   {:.2} %", 100.0 * result.agreement());
    println!("worst positions");
    for point in result.worst(WORST) {
        println!("  {:>7}  KL {:.4}  {:?}", point.position, point.kl, windows.context(&a.tokenizer, point)?);
    }
    if !kinds.is_empty() {
        println!(
            "\none kind of module at a time from B, the rest from A\n{:<36}{:>12}{:>10}",
            "module", "mean KL", "top-1"
        );
        for (kind, c) in &kinds {
            println!("{kind:<36}{:>12.6}{:>8.2} %", c.mean_kl(), 100.0 * c.agreement());
        }
    }
    Ok(())
}
