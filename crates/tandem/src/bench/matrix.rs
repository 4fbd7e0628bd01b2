//! `tandem bench matrix`: one table of controlled comparisons that shows what limits decoding. Each row is `bench decode`
//! of random weights of the same shapes, with one thing changed, in a process of its own.

use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tandem_core::ModelConfig;
use tandem_model::{Accounting, DummyWeights, Recipe, Stacks};
use tandem_runtime::diagnosis::matrix::{SHARES, row, verdict};
use tandem_runtime::diagnosis::{Bar, write_chart};
use tandem_runtime::options::ShapeOptions;
use tandem_runtime::{model_dir, presets};

use crate::cli::BenchMatrixArgs;
use crate::report::{check_writable, print_json};

/// Runs the command.
pub(crate) fn matrix(args: &BenchMatrixArgs) -> anyhow::Result<()> {
    ensure!(args.ranks >= 2, "--ranks is {}, expected at least 2: one rank is measured anyhow", args.ranks);
    args.report.as_deref().map(check_writable).transpose()?;
    let sample = Sample::new(args)?;
    let mut rows = vec![];
    for (name, flags) in comparisons(args, &sample) {
        eprintln!("{name}: tandem {}", flags.join(" "));
        rows.push(match measure(&flags) {
            Ok(result) => row(name, &flags, &result),
            Err(error) => json!({ "row": name, "flags": flags, "error": format!("{error:#}") }),
        });
    }
    let verdict = match &sample.missing {
        Some(missing) => format!("bottleneck: unknown. {missing}"),
        None => verdict(&rows, args.ranks),
    };
    if let Some(file) = &args.report {
        let bar = |row: &Value| {
            let (name, value) = (row["row"].as_str()?.to_string(), row["tokens_per_second"].as_f64()?);
            Some(Bar { name, value, mark: None })
        };
        let bars: Vec<Bar> = rows.iter().filter_map(bar).collect();
        write_chart(file, "What limits decoding", &verdict, &bars, "tokens/s")?;
    }
    if args.json {
        return print_json(&json!({
            "command": "matrix", "ranks": args.ranks, "rows": rows, "verdict": verdict, "missing": sample.missing,
        }));
    }
    print(&rows);
    println!("\n{verdict}");
    Ok(())
}

/// The part of a model that is measured. With fewer layers than the model's it keeps the model's share of layers without
/// experts and of the head, unless flags say otherwise: a verdict on other shares would be one on another model.
struct Sample {
    /// Leading layers without experts.
    first_dense: Option<usize>,
    vocab: Option<usize>,
    /// The same of half the layers.
    first_dense_of_half: Option<usize>,
    /// What the measured shapes lack of the whole model, if that is enough to change the verdict.
    missing: Option<String>,
}

/// From this difference in its share of the bytes on, a kind of module is missing or counts for too much.
const MAX_SHARE_OFF: f64 = 0.15;

impl Sample {
    fn new(args: &BenchMatrixArgs) -> anyhow::Result<Sample> {
        let text = match &args.config {
            Some(name) => presets::config_text(name)?.1,
            None => presets::read(&model_dir(args.model.as_deref())?.join("config.json"))?,
        };
        let whole = ModelConfig::parse(&text)?;
        let n_whole = whole.num_hidden_layers;
        let n_dense = (0..n_whole).filter(|l| !whole.is_sparse(*l)).count();
        let part = |n: usize, of: usize| (n as f64 * of as f64 / n_whole as f64).round() as usize;
        let mut sample =
            Sample { first_dense: args.first_dense, vocab: args.vocab, first_dense_of_half: None, missing: None };
        if let Some(n) = args.num_layers {
            let dense = |n: usize| args.first_dense.unwrap_or_else(|| part(n, n_dense)).min(n);
            if whole.moe.is_some() {
                sample.first_dense = Some(dense(n));
                sample.first_dense_of_half = Some(dense((n / 2).max(1)));
            }
            sample.vocab = Some(args.vocab.unwrap_or_else(|| part(n, whole.vocab_size).next_multiple_of(64)));
        }
        let shapes = ShapeOptions {
            num_layers: args.num_layers,
            first_dense: sample.first_dense,
            vocab: sample.vocab,
            ..ShapeOptions::default()
        };
        let measured = ModelConfig::parse(&shapes.apply(&text)?)?;
        sample.missing = missing(&shares(&whole)?, &shares(&measured)?);
        Ok(sample)
    }
}

/// Kinds of modules with their share of the bytes that a token reads.
fn shares(config: &ModelConfig) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let recipe = Recipe::parse("mxfp4").map_err(anyhow::Error::msg)?;
    let accounting = Accounting::new(DummyWeights::new(config, &recipe, Stacks::Repeated).weights(), config);
    let total = accounting.total(|k| k.read_bytes).max(1) as f64;
    Ok(accounting.kinds.iter().map(|k| (k.kind.name(), k.read_bytes as f64 / total)).collect())
}

/// A sentence about the kinds of modules whose share is far from the whole model's.
fn missing(whole: &[(&'static str, f64)], measured: &[(&'static str, f64)]) -> Option<String> {
    let of = |shares: &[(&'static str, f64)], name: &str| {
        shares.iter().find(|(kind, _)| *kind == name).map_or(0.0, |(_, share)| *share)
    };
    let mut names: Vec<&str> = whole.iter().chain(measured).map(|(name, _)| *name).collect();
    names.sort_unstable();
    names.dedup();
    let off: Vec<String> = names
        .into_iter()
        .filter(|name| (of(whole, name) - of(measured, name)).abs() > MAX_SHARE_OFF)
        .map(|name| {
            let (is, should) = (100.0 * of(measured, name), 100.0 * of(whole, name));
            format!("{name} are {is:.0} % of the bytes read here and {should:.0} % in the whole model")
        })
        .collect();
    (!off.is_empty()).then(|| {
        let off = off.join("; ");
        format!(
            "The measured shapes are not those of the model: {off}. Leave out --first-dense and --vocab, or measure more \
             layers"
        )
    })
}

/// Names and flags of the rows.
fn comparisons(args: &BenchMatrixArgs, sample: &Sample) -> Vec<(&'static str, Vec<String>)> {
    let ranks = args.ranks.to_string();
    let ranks = ranks.as_str();
    let half = args.num_layers.map(|n| (n / 2).max(1).to_string());
    let dense_of_half = sample.first_dense_of_half.map(|n| n.to_string());
    let mut rows: Vec<(&str, Vec<&str>)> = vec![
        ("one rank, mxfp4", vec![]),
        ("one rank, affine 4 bits", vec!["--quant", "affine4"]),
        ("one rank, affine 8 bits", vec!["--quant", "affine8"]),
        ("pipeline, tcp", vec!["--pp", ranks]),
        ("pipeline, threads", vec!["--pp", ranks, "--transport", "local"]),
        ("slices, tcp", vec!["--tp", ranks]),
        ("slices, threads", vec!["--tp", ranks, "--transport", "local"]),
        ("slices, sums in every 4th layer", vec!["--tp", ranks, "--sync-every", "4"]),
        ("slices, sums in no layer", vec!["--tp", ranks, "--sync-every", "1000000"]),
    ];
    if let Some(half) = &half {
        let mut flags = vec!["--num-layers", half];
        if let Some(dense) = &dense_of_half {
            flags.extend(["--first-dense", dense]);
        }
        rows.insert(3, ("one rank, half the layers", flags));
    }
    let with_base = |(name, extra): (&'static str, Vec<&str>)| {
        let has = |flag: &str| extra.contains(&flag);
        let n_ranks = if has("--pp") || has("--tp") { args.ranks } else { 1 };
        let mut flags: Vec<String> =
            ["bench", "decode", "--json", "--load-format", "dummy"].iter().map(ToString::to_string).collect();
        let mut add = |flag: &str, value: Option<String>| {
            if let Some(value) = value.filter(|_| !has(flag)) {
                flags.extend([flag.to_string(), value]);
            }
        };
        add("--model", args.model.clone());
        add("--config", args.config.clone());
        add("--num-layers", args.num_layers.map(|n| n.to_string()));
        add("--first-dense", sample.first_dense.map(|n| n.to_string()));
        add("--vocab", sample.vocab.map(|n| n.to_string()));
        add("--quant", Some("mxfp4".to_string()));
        add("--context", Some(args.context.to_string()));
        add("--steps", Some(args.steps.to_string()));
        // The same cores for every row.
        add("--threads", args.threads.map(|n| (n / n_ranks).max(1).to_string()));
        flags.extend(extra.iter().map(ToString::to_string));
        (name, flags)
    };
    rows.into_iter().map(with_base).collect()
}

fn measure(flags: &[String]) -> anyhow::Result<Value> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let output = Command::new(program).args(flags).output().context("cannot start this program again")?;
    // What stays in the processor's cache is an error of `bench decode` after its report, and a fraction above 1 here.
    if output.stdout.is_empty() {
        let said = String::from_utf8_lossy(&output.stderr);
        let error =
            said.lines().rev().find_map(|line| line.split_once("error: ")).map_or("no reason given", |(_, e)| e);
        bail!("{error}");
    }
    serde_json::from_slice(&output.stdout).context("the measurement's JSON")
}

fn print(rows: &[Value]) {
    print!("{:<34}{:>8}{:>8}", "", "tok/s", "of BW");
    SHARES.iter().for_each(|(share, _)| print!("{share:>15}"));
    println!("{:>8}{:>10}", "faults", "resident");
    for row in rows {
        let name = row["row"].as_str().unwrap_or("");
        if let Some(error) = row["error"].as_str() {
            println!("{name:<34}  not measured: {error}");
            continue;
        }
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        print!("{name:<34}{:>8.2}", number(&row["tokens_per_second"]));
        print!("{:>6.0} %", 100.0 * number(&row["bandwidth_fraction"]));
        SHARES.iter().for_each(|(share, _)| print!("{:>13.1} %", 100.0 * number(&row["share"][share])));
        print!("{:>8}", row["major_page_faults"].as_u64().unwrap_or(0));
        println!(
            "{:>10}",
            row["resident_share"].as_f64().map_or("-".into(), |share| format!("{:.0} %", 100.0 * share))
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_of_every_row_are_known() {
        use clap::Parser as _;
        let args = ["tandem", "bench", "matrix", "--config", "glm-5.1", "--num-layers", "2", "--threads", "4"];
        let cli = crate::cli::Cli::parse_from(args);
        let crate::cli::Command::Bench(bench) = cli.command else { panic!("another command") };
        let crate::cli::BenchCommand::Matrix(args) = bench.command else { panic!("another benchmark") };
        let rows = comparisons(&args, &Sample::new(&args).expect("a preset"));
        assert_eq!(rows.len(), 10);
        for (name, flags) in rows {
            let words = std::iter::once("tandem".to_string()).chain(flags.iter().cloned());
            let row = crate::cli::Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{name}: {e}"));
            let model = row.command.bench_model_args().expect("bench decode");
            let ranks = tandem_runtime::ParallelOptions::from(&model.parallel).n_ranks().expect("valid");
            assert_eq!(model.threads, Some(4 / ranks), "{name}");
        }
    }

    fn sample(flags: &[&str]) -> Sample {
        use clap::Parser as _;
        let words = ["tandem", "bench", "matrix"].iter().chain(flags);
        let cli = crate::cli::Cli::parse_from(words);
        let crate::cli::Command::Bench(bench) = cli.command else { panic!("another command") };
        let crate::cli::BenchCommand::Matrix(args) = bench.command else { panic!("another benchmark") };
        Sample::new(&args).expect("valid shapes")
    }

    /// A verdict on two dense layers would say nothing about a model whose bytes are in its experts.
    #[test]
    fn a_sample_has_the_shares_of_its_model() {
        for config in ["glm-5.1", "deepseek-v3.2", "llama-3.2-3b"] {
            for layers in ["1", "2", "4", "8", "26"] {
                let sample = sample(&["--config", config, "--num-layers", layers]);
                assert_eq!(sample.missing, None, "{config}, {layers} layers");
            }
        }
        let cases = [
            (&["--config", "glm-5.1", "--num-layers", "2", "--first-dense", "2"][..], "routed_experts are 0 %"),
            (&["--config", "deepseek-v3.2", "--num-layers", "2", "--first-dense", "2"], "routed_experts are 0 %"),
            (&["--config", "glm-5.1", "--num-layers", "1", "--vocab", "154880"], "lm_head are"),
            (&["--config", "llama-3.2-3b", "--num-layers", "1", "--vocab", "128256"], "lm_head are"),
        ];
        for (flags, expected) in cases {
            let missing = sample(flags).missing.unwrap_or_default();
            assert!(missing.contains(expected), "{flags:?}: {missing:?}");
        }
        assert_eq!(sample(&["--config", "glm-5.1"]).missing, None);
    }
}
