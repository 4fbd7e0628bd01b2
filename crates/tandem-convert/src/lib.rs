//! A checkpoint in other formats, written in MLX's layout.
//!
//! [`convert`] writes one, [`plan`] says what would be written. Sources are checkpoints, GGUF files and made-up weights.

mod calibrate;
mod gguf;
mod gguf_tokenizer;
mod mixed;
mod plan;
mod positioned;
mod rules;
mod source;
mod text;
mod write;

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use tandem_core::DType;
use tandem_core::quant;
use tandem_core::weights::Weight;
use tandem_model::{Accounting, Recipe};
use tandem_runtime::device::{fits_in_memory, n_threads};
use tandem_runtime::judge::Side;
use tandem_runtime::options::{Activations, BackendChoice, ShapeOptions};
use tandem_runtime::{DeviceOptions, Meter, News, OnNews, Unit, model_dir, presets};

use calibrate::Calibration;
use gguf::GgufSource;
use plan::Plan;
use source::{CheckpointSource, DummySource, MtpSource, Source};

/// What is converted, and how.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// A model directory, a GGUF file, or a Hugging Face id in the local cache; `None` for made-up weights.
    pub source: Option<String>,
    /// Shapes of made-up weights.
    pub shapes: ShapeOptions,
    /// Formats: `mxfp4-q8`, one format for all, `mixed-4.8`, or `mixed:FILE`.
    pub quant: String,
    /// Look for scales and codes with less error.
    pub search: bool,
    /// A text that the source reads for the search, instead of one of its own.
    pub calibrate: Option<PathBuf>,
    /// A model directory whose tokenizer is taken in place of a GGUF file's own.
    pub tokenizer: Option<PathBuf>,
    /// Write the multi-token-prediction layer alone.
    pub mtp_only: bool,
    /// Bytes of one output file, at most, unless a single weight is larger.
    pub max_shard_size: u64,
    /// Threads; one per core if `None`.
    pub threads: Option<usize>,
}

impl ConvertOptions {
    /// The defaults, for this source and these formats.
    pub fn new(source: &str, quant: &str) -> ConvertOptions {
        ConvertOptions {
            source: Some(source.to_string()),
            shapes: ShapeOptions::default(),
            quant: quant.to_string(),
            search: false,
            calibrate: None,
            tokenizer: None,
            mtp_only: false,
            max_shard_size: 5_000_000_000,
            threads: None,
        }
    }

    /// The source runs on the processor in single precision.
    fn device(&self) -> DeviceOptions {
        DeviceOptions {
            backend: BackendChoice::Cpu,
            activations: Activations::F32,
            threads: self.threads,
            // Slow, and done once.
            allow_paging: true,
            ..DeviceOptions::default()
        }
    }

    /// Whether the source has to run to find the formats.
    fn is_mixed(&self) -> bool {
        self.quant == mixed::NAME
    }

    /// Whether scales and codes are looked for.
    fn searches(&self) -> bool {
        self.search || self.calibrate.is_some()
    }
}

/// What was written.
#[derive(Clone, Copy, Debug)]
pub struct Converted {
    /// Bytes of all files of weights.
    pub bytes: u64,
    /// Files of weights.
    pub files: usize,
    /// Files that an earlier, interrupted conversion had completed.
    pub files_kept: usize,
    /// Bytes written now.
    pub bytes_written: u64,
}

/// What would be written.
pub struct Planned {
    /// The source's bytes by kind of module.
    pub before: Accounting,
    /// The output's.
    pub after: Accounting,
    /// Name and bytes of each file of weights.
    pub files: Vec<(String, u64)>,
}

/// Writes the checkpoint into `out`, which must not exist. Work is in `out.partial` until it is complete, where a later call
/// goes on.
///
/// # Errors
/// The source is damaged or of a form that is not known, the formats do not fit its weights, or a file cannot be written.
pub fn convert(options: &ConvertOptions, out: &Path, on_news: OnNews<'_>) -> anyhow::Result<Converted> {
    let judged = if options.is_mixed() || options.searches() { judged(options, on_news)? } else { None };
    let (source, plan) = planned(options, judged.as_ref(), on_news)?;
    let total: u64 = plan.shards.iter().map(|s| s.bytes).sum();
    let calibration = match &judged {
        Some((side, runs)) if options.searches() => {
            let backend = side.backend(&options.device())?;
            Some(Calibration::measure(&side.config, &side.weights()?, runs, backend, on_news)?)
        }
        _ => None,
    };
    drop(judged);
    let quantize = |weight: &Weight, part: usize, values: &[f32], rows: usize| {
        let (dtype, cols) = (weight.dtype, weight.spec.dims().2);
        if !dtype.is_quantized() || !options.searches() {
            return quant::quantize(dtype, rows, cols, values);
        }
        let inputs = calibration.as_ref().and_then(|c| c.get(&weight.spec.module, part));
        quant::quantize_searched(dtype, rows, cols, values, inputs)
    };
    let text = options.calibrate.as_deref().map(source::file_fingerprint);
    let settings = format!("search {} {text:?}", options.search);
    let meter = Meter::new("writing", Unit::Bytes, total, on_news);
    let written = write::write(&*source, &plan, &quantize, &settings, out, n_threads(&options.device()), &meter)?;
    meter.finish();
    Ok(Converted { bytes: total, files: plan.shards.len(), files_kept: written.n_kept, bytes_written: written.bytes })
}

/// Says what [`convert`] would write.
///
/// # Errors
/// As [`convert`], before anything is written.
pub fn plan(options: &ConvertOptions, on_news: OnNews<'_>) -> anyhow::Result<Planned> {
    let judged = if options.is_mixed() { judged(options, on_news)? } else { None };
    let (source, plan) = planned(options, judged.as_ref(), on_news)?;
    let config = source.config();
    Ok(Planned {
        before: Accounting::new(source.weights(), config),
        after: Accounting::new(&plan.weights, config),
        files: plan.shards.iter().map(|shard| (shard.name.clone(), shard.bytes)).collect(),
    })
}

/// A source as a model that runs, and the tokens that it is judged on.
type Judged = (Side, Vec<Vec<u32>>);

/// The source, and the files to write.
fn planned(
    options: &ConvertOptions,
    judged: Option<&Judged>,
    on_news: OnNews<'_>,
) -> anyhow::Result<(Box<dyn Source>, Plan)> {
    let recipe = match judged {
        Some((side, runs)) if options.is_mixed() => mixed::recipe(side, runs, &options.device(), on_news)?,
        _ => rules::recipe(&options.quant)?,
    };
    let mut source = open(options, &recipe)?;
    if options.mtp_only {
        source = Box::new(MtpSource::new(source)?);
    }
    let config = source.config();
    let dtypes: Vec<DType> = match options.shapes.config {
        Some(_) => source.weights().iter().map(|w| w.dtype).collect(),
        None => source.weights().iter().map(|w| recipe.dtype(&w.spec, w.dtype, config.float)).collect(),
    };
    let plan = Plan::new(source.config_json(), config, source.weights(), &dtypes, options.max_shard_size)?;
    Ok((source, plan))
}

/// The source as a model that runs, and the tokens that it is judged on: of the text that was given, or its own. `None`
/// when a search has to do without.
fn judged(options: &ConvertOptions, on_news: OnNews<'_>) -> anyhow::Result<Option<Judged>> {
    ensure!(
        !options.mtp_only,
        "--search, --calibrate and {} run the source, and --mtp-only converts a layer that does not run alone; give \
         another --quant",
        mixed::NAME
    );
    let name = match options.source.as_deref() {
        Some(name) if gguf_file(Path::new(name)).is_none() => name,
        _ if !options.is_mixed() && options.calibrate.is_none() => {
            on_news(News::Note(
                "GGUF files and made-up weights do not run here: the search knows nothing of the inputs of matrices"
                    .to_string(),
            ));
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
    let runs = match &options.calibrate {
        Some(path) => text::from_file(path, &side.tokenizer)?,
        None if fits_in_memory(side.resident_bytes()?) => {
            text::written(&side.config, &side.weights()?, side.backend(&options.device())?, on_news)?
        }
        None => text::random(&side.config),
    };
    on_news(News::Note(format!("judging by {} tokens", runs.iter().map(Vec::len).sum::<usize>())));
    Ok(Some((side, runs)))
}

fn open(options: &ConvertOptions, recipe: &Recipe) -> anyhow::Result<Box<dyn Source>> {
    if options.shapes.is_dummy("SRC")? {
        let name = options.shapes.config.as_deref().context("--load-format dummy needs --config NAME")?;
        let (_, text) = presets::config_text(name)?;
        return Ok(Box::new(DummySource::new(&options.shapes.apply(&text)?, recipe)?));
    }
    let name = options.source.as_deref().context("name the model to convert, or give --config")?;
    ensure!(
        !is_pickle(Path::new(name)),
        "{name} is a pickle file. Opening one runs the code inside, so it is refused; get the safetensors version of this \
         model"
    );
    match gguf_file(Path::new(name)) {
        Some(file) => Ok(Box::new(GgufSource::open(&file, options.tokenizer.as_deref())?)),
        None if options.tokenizer.is_some() => {
            bail!("--tokenizer is for GGUF files; {name} has a tokenizer of its own")
        }
        None => Ok(Box::new(CheckpointSource::open(&model_dir(Some(name))?, options.mtp_only)?)),
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
    use tandem_runtime::ignore_news;
    use tandem_runtime::judge::{Windows, engine};

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
        let device = DeviceOptions { threads: Some(2), ..ConvertOptions::new("", "mxfp4").device() };
        let backend = side.backend(&device).expect("complete");
        let calibration =
            Calibration::measure(&side.config, &weights(), &runs, backend, &mut ignore_news).expect("it runs");
        let matrices = tandem_model::weight_specs(&side.config).into_iter().filter(|spec| spec.form != Form::Vector);
        for spec in matrices.filter(|spec| spec.module != "model.embed_tokens") {
            assert!(calibration.get(&spec.module, 0).is_some(), "{} has seen no input", spec.module);
        }
        let file = format!("{root}generate/public_domain.txt");
        let mut windows = Windows::new(Path::new(&file), &side.tokenizer, 256).expect("a text");
        windows.0.truncate(2);
        let run =
            |source: &dyn WeightSource| engine(&side.config, source, 0, windows.longest(), &device).expect("loads");
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
