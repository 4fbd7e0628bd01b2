//! `tandem convert`: a checkpoint in other formats, written in MLX's layout.

mod calibrate;
mod gguf;
mod gguf_tokenizer;
mod mixed;
mod plan;
mod rules;
mod source;
mod text;
mod write;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow, bail, ensure};
use serde_json::json;
use tandem_core::DType;
use tandem_core::quant;
use tandem_core::weights::Weight;
use tandem_cpu::system::{default_threads, peak_memory_bytes};
use tandem_model::{Accounting, Recipe};

use crate::cli::{ActivationsArg, ConvertArgs};
use crate::compare::Side;
use crate::load::{fits_in_memory, model_dir, progress_bar};
use crate::presets;
use crate::report::{bytes, count, print_json, thousands};
use calibrate::Calibration;
use gguf::GgufSource;
use plan::Plan;
use source::{CheckpointSource, DummySource, Source};

/// Runs the command.
pub(crate) fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    let start = Instant::now();
    let judged = if judges(args) { judged(args)? } else { None };
    let recipe = match &judged {
        Some((side, runs)) if args.quant == mixed::NAME => mixed::recipe(side, runs, args.threads)?,
        _ => rules::recipe(&args.quant)?,
    };
    let source = open(args, &recipe)?;
    let config = source.config();
    let dtypes: Vec<DType> = match args.shapes.config {
        Some(_) => source.weights().iter().map(|w| w.dtype).collect(),
        None => source.weights().iter().map(|w| recipe.dtype(&w.spec, w.dtype, config.float)).collect(),
    };
    let plan = Plan::new(source.config_json(), config, source.weights(), &dtypes, args.max_shard_size)?;
    let total: u64 = plan.shards.iter().map(|s| s.bytes).sum();
    if args.dry_run {
        return dry_run(&*source, &plan, args.json);
    }
    let out = args.out.as_deref().context("--out is missing")?;
    let searches = args.search || args.calibrate.is_some();
    let calibration = match &judged {
        Some((side, runs)) if searches => {
            let backend = side.backend(args.threads, ActivationsArg::F32)?;
            Some(Calibration::measure(&side.config, &side.weights()?, runs, backend)?)
        }
        _ => None,
    };
    drop(judged);
    let n_threads = args.threads.unwrap_or_else(default_threads).max(1);
    let bar = progress_bar(total);
    if let Ok(style) =
        indicatif::ProgressStyle::with_template("writing {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
    {
        bar.set_style(style);
    }
    let quantize = |weight: &Weight, part: usize, values: &[f32], rows: usize| {
        let (dtype, cols) = (weight.dtype, weight.spec.dims().2);
        if !dtype.is_quantized() || !searches {
            return quant::quantize(dtype, rows, cols, values);
        }
        let inputs = calibration.as_ref().and_then(|c| c.get(&weight.spec.module, part));
        quant::quantize_searched(dtype, rows, cols, values, inputs)
    };
    let settings = format!("search {} {:?}", args.search, args.calibrate.as_deref().map(source::file_fingerprint));
    let written = write::write(&*source, &plan, &quantize, &settings, out, n_threads, &bar)?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        return print_json(&json!({
            "out": out.display().to_string(),
            "bytes": total,
            "files": plan.shards.len(),
            "files_kept": written.n_kept,
            "bytes_written": written.bytes,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }));
    }
    let kept = match written.n_kept {
        0 => String::new(),
        n => format!(", {n} of them kept from before"),
    };
    println!(
        "{}: {} in {} file{}{kept}; {seconds:.1} s, peak memory {}",
        out.display(),
        bytes(total),
        plan.shards.len(),
        if plan.shards.len() == 1 { "" } else { "s" },
        bytes(peak_memory_bytes())
    );
    Ok(())
}

/// Whether the source has to run for this conversion.
fn judges(args: &ConvertArgs) -> bool {
    args.quant == mixed::NAME || (!args.dry_run && (args.search || args.calibrate.is_some()))
}

/// The source as a model that runs, and the tokens that it is judged on: of the text that was given, or its own. `None`
/// when a search has to do without.
fn judged(args: &ConvertArgs) -> anyhow::Result<Option<(Side, Vec<Vec<u32>>)>> {
    let name = match args.source.as_deref() {
        Some(name) if gguf_file(Path::new(name)).is_none() => name,
        _ if args.quant != mixed::NAME && args.calibrate.is_none() => {
            eprintln!(
                "GGUF files and made-up weights do not run here: the search knows nothing of the inputs of matrices"
            );
            return Ok(None);
        }
        Some(name) => bail!(
            "--calibrate and {} run the source, and GGUF files do not run here; convert {name} with --quant keep first, \
             then that",
            mixed::NAME
        ),
        None => bail!("--calibrate and {} run the source, so they need one: not --config", mixed::NAME),
    };
    let side = Side::open(name)?;
    let runs = match &args.calibrate {
        Some(path) => text::from_file(path, &side.tokenizer)?,
        None if fits_in_memory(side.resident_bytes()?) => {
            text::written(&side.config, &side.weights()?, side.backend(args.threads, ActivationsArg::F32)?)?
        }
        None => text::random(&side.config),
    };
    eprintln!("judging by {} tokens", runs.iter().map(Vec::len).sum::<usize>());
    Ok(Some((side, runs)))
}

fn open(args: &ConvertArgs, recipe: &Recipe) -> anyhow::Result<Box<dyn Source>> {
    if args.shapes.is_dummy("SRC")? {
        let name = args.shapes.config.as_deref().context("--load-format dummy needs --config NAME")?;
        let (_, text) = presets::config_text(name)?;
        return Ok(Box::new(DummySource::new(&args.shapes.apply(&text)?, recipe)?));
    }
    let name = args.source.as_deref().context("name the model to convert, or give --config")?;
    ensure!(
        !is_pickle(Path::new(name)),
        "{name} is a pickle file. Opening one runs the code inside, so it is refused; get the safetensors version of this \
         model"
    );
    match gguf_file(Path::new(name)) {
        Some(file) => Ok(Box::new(GgufSource::open(&file)?)),
        None => Ok(Box::new(CheckpointSource::open(&model_dir(Some(name))?)?)),
    }
}

/// A GGUF file, or the first one of a directory that has no config.json.
fn gguf_file(path: &Path) -> Option<PathBuf> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|e| e == "gguf");
    if is_gguf(path) {
        return Some(path.to_path_buf());
    }
    if !path.is_dir() || path.join("config.json").exists() {
        return None;
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(path).ok()?.filter_map(|e| e.ok().map(|e| e.path())).collect();
    files.sort();
    files.into_iter().find(|file| is_gguf(file))
}

fn is_pickle(path: &Path) -> bool {
    path.is_file()
        && path.extension().is_some_and(|e| e == "bin" || e == "pt" || e == "pth" || e == "pkl" || e == "ckpt")
}

/// Prints what would be written.
fn dry_run(source: &dyn Source, plan: &Plan, as_json: bool) -> anyhow::Result<()> {
    let config = source.config();
    let (before, after) = (Accounting::new(source.weights(), config), Accounting::new(&plan.weights, config));
    let bits = |bytes: u64, parameters: u64| bytes as f64 * 8.0 / parameters.max(1) as f64;
    let of = |a: &Accounting| {
        let parameters = a.total(|k| k.parameters);
        let resident = a.total(|k| k.resident_bytes);
        (resident, a.total(|k| k.read_bytes), bits(resident, parameters))
    };
    let ((bytes_before, read_before, bits_before), (bytes_after, read_after, bits_after)) = (of(&before), of(&after));
    if as_json {
        let kinds: serde_json::Map<_, _> = after
            .kinds
            .iter()
            .map(|k| {
                let formats: serde_json::Map<_, _> = k.formats.iter().map(|(f, b)| (f.clone(), json!(b))).collect();
                let value = json!({"parameters": k.parameters, "bytes": k.resident_bytes, "format_bytes": formats});
                (k.kind.name().to_string(), value)
            })
            .collect();
        return print_json(&json!({
            "source": {"bytes": bytes_before, "read_bytes_per_token": read_before, "bits_per_weight": bits_before},
            "bytes": bytes_after,
            "read_bytes_per_token": read_after,
            "bits_per_weight": bits_after,
            "files": plan.shards.iter().map(|s| json!({"name": s.name, "bytes": s.bytes})).collect::<Vec<_>>(),
            "modules": kinds,
        }));
    }
    println!("{:<16}{:>12}{:>14}{:>14}{:>8}  formats", "module", "parameters", "source", "output", "bits");
    for (b, a) in before.kinds.iter().zip(&after.kinds) {
        let formats: Vec<&str> = a.formats.iter().map(|(name, _)| name.as_str()).collect();
        println!(
            "{:<16}{:>12}{:>14}{:>14}{:>8.2}  {}",
            a.kind.name(),
            count(a.parameters),
            bytes(b.resident_bytes),
            bytes(a.resident_bytes),
            bits(a.resident_bytes, a.parameters),
            formats.join(", ")
        );
    }
    println!();
    println!("source: {} bytes, {bits_before:.2} bits per weight", thousands(bytes_before));
    println!("output: {} bytes, {bits_after:.2} bits per weight, {} files", thousands(bytes_after), plan.shards.len());
    println!("read per decoded token: {} before, {} after", bytes(read_before), bytes(read_after));
    Ok(())
}

/// A message for a problem in a rule file or a name.
fn usage(message: String) -> anyhow::Error {
    anyhow!(message)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tandem_core::CheckpointError;
    use tandem_core::weights::{Form, MatrixData, MatrixPart};
    use tandem_model::{CheckpointWeights, WeightSource};

    use super::*;
    use crate::compare::{Windows, engine};

    /// Every matrix but router gates in mxfp4.
    struct Mxfp4<'a> {
        source: CheckpointWeights<'a>,
        kept: &'a HashSet<String>,
        calibration: Option<&'a Calibration>,
    }

    impl WeightSource for Mxfp4<'_> {
        fn matrix(&self, module: &str) -> Result<MatrixData, CheckpointError> {
            let mut data = self.source.matrix(module)?;
            if self.kept.contains(module) {
                return Ok(data);
            }
            for part in 0..data.parts.len() {
                let (rows, cols, values) = (data.rows, data.cols, data.view(part).dequantize());
                let packed = match self.calibration {
                    Some(known) => quant::quantize_searched(DType::Mxfp4, rows, cols, &values, known.get(module, part)),
                    None => quant::quantize(DType::Mxfp4, rows, cols, &values),
                };
                let packed = packed.expect("whole groups of finite values");
                let (weight, scales) = (packed.weight.into(), packed.scales.into());
                data.parts[part] = MatrixPart { weight, scales, ..MatrixPart::default() };
            }
            Ok(MatrixData { dtype: DType::Mxfp4, ..data })
        }

        fn vector(&self, module: &str, leaf: &str) -> Result<Vec<f32>, CheckpointError> {
            self.source.vector(module, leaf)
        }
    }

    /// As for a source that does not fit in memory.
    #[test]
    fn random_tokens_judge_a_model_too() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/");
        let side = Side::open(&format!("{root}models/glm51_tiny_bf16")).expect("there");
        let weights = || side.weights().expect("complete");
        let runs = text::random(&side.config);
        assert_eq!(runs.iter().map(Vec::len).sum::<usize>(), 8192);
        assert!(runs.iter().flatten().all(|token| (*token as usize) < side.config.vocab_size));
        let backend = side.backend(Some(2), ActivationsArg::F32).expect("complete");
        let calibration = Calibration::measure(&side.config, &weights(), &runs, backend).expect("it runs");
        let matrices = tandem_model::weight_specs(&side.config).into_iter().filter(|spec| spec.form != Form::Vector);
        for spec in matrices.filter(|spec| spec.module != "model.embed_tokens") {
            assert!(calibration.get(&spec.module, 0).is_some(), "{} has seen no input", spec.module);
        }
        let file = format!("{root}generate/public_domain.txt");
        let mut windows = Windows::new(Path::new(&file), &side.tokenizer, 256).expect("a text");
        windows.0.truncate(2);
        let run = |source: &dyn WeightSource| {
            engine(&side.config, source, 0, windows.longest(), Some(2), ActivationsArg::F32).expect("loads")
        };
        let mut original = run(&weights());
        let specs = tandem_model::weight_specs(&side.config);
        let kept = specs.into_iter().filter(|spec| spec.keeps_format).map(|spec| spec.module).collect();
        let mut kl = |calibration| {
            let mut model = run(&Mxfp4 { source: weights(), kept: &kept, calibration });
            windows.compare(&mut original, &mut model).expect("finite").mean_kl()
        };
        let (plain, searched) = (kl(None), kl(Some(&calibration)));
        assert!(searched < 0.95 * plain, "{searched} against {plain}");
    }
}
