//! Writes a plan: file by file, each in parallel, so that an interrupted run can go on.
//!
//! Work is in `DIR.partial`. A file has its final name there once it is complete and on the disk, and
//! `conversion.json` holds a digest of its contents; a later run keeps files whose digest is right. At the end the
//! folder is renamed.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tandem_core::CheckpointError;
use tandem_core::checkpoint::check_mapped;
use tandem_core::quant::{self, QuantError};
use tandem_core::weights::{MatrixData, MatrixPart, Weight};
use tandem_runtime::Meter;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::plan::{Plan, Shard, Task};
use super::positioned::{read_exact_at, write_all_at};
use super::source::Source;

/// Elements that are decoded and quantised at once, so that they stay in a core's cache.
const BLOCK_ELEMENTS: usize = 1 << 15;

/// Tasks per thread that are read ahead.
const PREFETCH_TASKS: usize = 3;

const STATE: &str = "conversion.json";
const LOCK: &str = "conversion.lock";

/// What `DIR.partial` holds.
#[derive(Default, Deserialize, Serialize)]
struct State {
    /// Digest of source and settings.
    fingerprint: String,
    /// Digests of complete files.
    files: BTreeMap<String, String>,
}

/// What a run did.
pub(super) struct Written {
    /// Files kept from an interrupted run.
    pub(super) n_kept: usize,
    /// Bytes of weights written by this run.
    pub(super) bytes: u64,
}

/// How rows are quantised: `(weight, values, rows)` gives the packed rows.
pub(super) type Quantize<'a> = dyn Fn(&Weight, usize, &[f32], usize) -> Result<quant::Packed, QuantError> + Sync + 'a;

/// Writes the whole checkpoint to `out`.
pub(super) fn write(
    source: &dyn Source,
    plan: &Plan,
    quantize: &Quantize<'_>,
    settings: &str,
    out: &Path,
    n_threads: usize,
    meter: &Meter<'_>,
) -> anyhow::Result<Written> {
    if out.exists() && std::fs::read_dir(out).map_or(true, |mut entries| entries.next().is_some()) {
        bail!("{} exists already; remove it, or choose another --out", out.display());
    }
    let partial = partial_dir(out)?;
    std::fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let lock = File::create(partial.join(LOCK)).with_context(|| format!("cannot write in {}", partial.display()))?;
    if lock.try_lock().is_err() {
        bail!("another tandem is converting into {}; wait for it, or choose another --out", partial.display());
    }
    let fingerprint = format!(
        "{:016x}",
        xxh3_64_with_seed(
            format!("{} {settings} {} {}", env!("CARGO_PKG_VERSION"), source.fingerprint(), plan.fingerprint())
                .as_bytes(),
            0,
        )
    );
    let mut state = read_state(&partial, &fingerprint)?;
    let known = state.files.clone();
    let written = std::thread::scope(|scope| {
        // A full file goes to the disk while the next one is filled; there is no third, which would be more to lose.
        let (full, files) = mpsc::sync_channel::<Full>(0);
        let finishing = scope.spawn(|| files.into_iter().try_for_each(|file| state.complete(&partial, file)));
        let filled = fill_files(source, plan, quantize, &partial, &known, n_threads, meter, &full);
        drop(full);
        // An error there is why no more could be handed over.
        finishing.join().expect("completing a file does not panic")?;
        filled
    })?;
    source.write_other_files(&partial)?;
    write_json(&partial.join("model.safetensors.index.json"), &plan.index())?;
    write_json(&partial.join("config.json"), &Value::Object(plan.config_json.clone()))?;
    for entry in std::fs::read_dir(&partial)? {
        File::open(entry?.path())?.sync_all()?;
    }
    for name in [STATE, LOCK] {
        let path = partial.join(name);
        if path.exists() {
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    File::open(&partial)?.sync_all()?;
    std::fs::rename(&partial, out)
        .with_context(|| format!("cannot rename {} to {}", partial.display(), out.display()))?;
    Ok(written)
}

/// A file of the partial folder with all its bytes, perhaps not on the disk yet.
struct Full {
    file: File,
    /// Its final name.
    name: String,
    digest: u64,
}

impl State {
    /// Gives a file its final name once it is on the disk.
    fn complete(&mut self, partial: &Path, full: Full) -> anyhow::Result<()> {
        let temporary = temporary(partial, &full.name);
        let cannot = || format!("cannot write {}", temporary.display());
        full.file.sync_all().with_context(cannot)?;
        std::fs::rename(&temporary, partial.join(&full.name)).with_context(cannot)?;
        self.files.insert(full.name, format!("{:016x}", full.digest));
        write_json(&partial.join(STATE), &serde_json::to_value(&*self)?)
    }
}

/// Fills the files of the plan that are not there with the digests of `known`, and hands them over as `full`.
#[allow(clippy::too_many_arguments)]
fn fill_files(
    source: &dyn Source,
    plan: &Plan,
    quantize: &Quantize<'_>,
    partial: &Path,
    known: &BTreeMap<String, String>,
    n_threads: usize,
    meter: &Meter<'_>,
    full: &SyncSender<Full>,
) -> anyhow::Result<Written> {
    let mut written = Written { n_kept: 0, bytes: 0 };
    for shard in &plan.shards {
        let path = partial.join(&shard.name);
        if let Some(digest) = known.get(&shard.name)
            && path.symlink_metadata().is_ok_and(|m| m.is_file())
        {
            let found = run(plan, shard, n_threads, meter, &|task, _| read_back(&path, plan, shard, task), &|_| {})?;
            let header = read_header(&path, shard.header.len()).unwrap_or_default();
            let is_whole = std::fs::metadata(&path)?.len() == shard.bytes && header == shard.header;
            if format!("{found:016x}") == *digest && is_whole {
                written.n_kept += 1;
                continue;
            }
            meter.take_back(shard.bytes);
        }
        let temporary = temporary(partial, &shard.name);
        let cannot = || format!("cannot write {}", temporary.display());
        let file = create(&temporary).with_context(cannot)?;
        file.set_len(shard.bytes).with_context(cannot)?;
        write_all_at(&file, &shard.header, 0).with_context(cannot)?;
        let make = |task: &Task, later: Option<&Task>| -> anyhow::Result<u64> {
            let weight = |task: &Task| shard.items[task.item].weight;
            if let Some(later) = later {
                source.prefetch(weight(later), later.part, later.rows.clone());
            }
            let pieces = convert(source, plan, shard, quantize, task)?;
            check_mapped()?;
            let mut digest = 0u64;
            for (bytes, at) in
                [&pieces.weight, &pieces.scales, &pieces.biases].into_iter().zip(places(plan, shard, task))
            {
                write_all_at(&file, bytes, at).with_context(cannot)?;
                digest = digest.wrapping_add(xxh3_64_with_seed(bytes, at));
            }
            drop(pieces);
            source.release(weight(task), task.part, task.rows.clone());
            Ok(digest)
        };
        let digest = run(plan, shard, n_threads, meter, &make, &|item| source.close(shard.items[item].weight))?;
        written.bytes += shard.bytes;
        let sent = full.send(Full { file, name: shard.name.clone(), digest });
        sent.map_err(|_| anyhow!("an earlier file could not be completed"))?;
    }
    Ok(written)
}

/// A file's name while it is being filled.
fn temporary(partial: &Path, name: &str) -> PathBuf {
    partial.join(format!("{name}.tmp"))
}

/// `DIR.partial`, beside `DIR`.
pub(super) fn partial_dir(out: &Path) -> anyhow::Result<PathBuf> {
    let name = out.file_name().with_context(|| format!("--out {} does not name a folder", out.display()))?;
    let mut name = name.to_os_string();
    name.push(".partial");
    Ok(out.with_file_name(name))
}

fn read_state(partial: &Path, fingerprint: &str) -> anyhow::Result<State> {
    let path = partial.join(STATE);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Ok(State { fingerprint: fingerprint.to_string(), ..State::default() });
        }
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    let state: State =
        serde_json::from_str(&text).with_context(|| format!("{} is damaged; remove the folder", path.display()))?;
    if state.fingerprint != fingerprint {
        bail!(
            "{} holds an interrupted conversion of another source, with other settings or by another version; remove it, \
             or repeat that command",
            partial.display()
        );
    }
    Ok(state)
}

/// Written beside and renamed, so that a reader never sees half of it.
fn write_json(path: &Path, value: &Value) -> anyhow::Result<()> {
    let temporary = path.with_extension("json.tmp");
    let cannot = || format!("cannot write {}", temporary.display());
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    std::fs::write(&temporary, text).with_context(cannot)?;
    std::fs::rename(&temporary, path).with_context(cannot)
}

/// Runs the tasks of a file on `n_threads` threads and adds up what they return. `work` also gets a task that will be due
/// soon. `finished` gets each item whose last task is done.
fn run(
    plan: &Plan,
    shard: &Shard,
    n_threads: usize,
    meter: &Meter<'_>,
    work: &(dyn Fn(&Task, Option<&Task>) -> anyhow::Result<u64> + Sync),
    finished: &(dyn Fn(usize) + Sync),
) -> anyhow::Result<u64> {
    let tasks = shard.tasks(&plan.weights);
    let mut left = vec![0usize; shard.items.len()];
    tasks.iter().for_each(|task| left[task.item] += 1);
    let left: Vec<AtomicUsize> = left.into_iter().map(AtomicUsize::new).collect();
    let (next, sum, stop) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let error = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..n_threads.max(1) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(task) = tasks.get(i) else { return };
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    match work(task, tasks.get(i + PREFETCH_TASKS * n_threads)) {
                        Ok(digest) => {
                            sum.fetch_add(digest, Ordering::Relaxed);
                            let weight = &plan.weights[shard.items[task.item].weight];
                            let cols = weight.spec.dims().2;
                            meter.add(weight.dtype.total_bytes(task.rows.len(), cols) as u64);
                        }
                        Err(e) => {
                            stop.store(true, Ordering::Relaxed);
                            error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                            return;
                        }
                    }
                    if left[task.item].fetch_sub(1, Ordering::AcqRel) == 1 {
                        finished(task.item);
                    }
                }
            });
        }
    });
    match error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(sum.into_inner()),
    }
}

fn places(plan: &Plan, shard: &Shard, task: &Task) -> [u64; 3] {
    let item = &shard.items[task.item];
    item.places(&plan.weights[item.weight], task)
}

/// The first bytes of a file that is there.
fn read_header(path: &Path, length: usize) -> std::io::Result<Vec<u8>> {
    let mut header = vec![0; length];
    read_exact_at(&File::open(path)?, &mut header, 0)?;
    Ok(header)
}

/// A new file, in the place of whatever has its name: nothing is written through a link.
fn create(path: &Path) -> std::io::Result<File> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::options().write(true).create_new(true).open(path)
}

/// The digest of a task's bytes in a file that is there.
fn read_back(path: &Path, plan: &Plan, shard: &Shard, task: &Task) -> anyhow::Result<u64> {
    let weight = &plan.weights[shard.items[task.item].weight];
    let (dtype, rows, cols) = (weight.dtype, task.rows.len(), weight.spec.dims().2);
    let sizes = [dtype.weight_bytes(rows, cols), dtype.scale_bytes(rows, cols), dtype.bias_bytes(rows, cols)];
    let file = File::open(path)?;
    let mut digest = 0u64;
    for (size, at) in sizes.into_iter().zip(places(plan, shard, task)) {
        let mut bytes = vec![0; size];
        if read_exact_at(&file, &mut bytes, at).is_err() {
            return Ok(0); // shorter than it was: not the digest
        }
        digest = digest.wrapping_add(xxh3_64_with_seed(&bytes, at));
    }
    Ok(digest)
}

/// The bytes of a task: carried over where the format stays, else decoded and quantised.
fn convert(
    source: &dyn Source,
    plan: &Plan,
    shard: &Shard,
    quantize: &Quantize<'_>,
    task: &Task,
) -> anyhow::Result<MatrixPart> {
    let index = shard.items[task.item].weight;
    let (from, to) = (&source.weights()[index], &plan.weights[index]);
    let part = source.rows(index, task.part, task.rows.clone())?;
    let (rows, cols) = (task.rows.len(), to.spec.dims().2);
    let matrix = MatrixData { name: from.spec.module.clone(), dtype: from.dtype, rows, cols, parts: vec![part] };
    // Quantisers look at every value themselves.
    let n_checked = if from.dtype != to.dtype && to.dtype.is_quantized() { 0 } else { rows };
    matrix.check_finite(0, 0, n_checked).map_err(|error| match error {
        CheckpointError::NotFinite { place, value, .. } => {
            let tensor = format!("{}.{}", from.spec.module, from.spec.leaf);
            let at = [task.part, task.rows.start + place[0], place[1]];
            CheckpointError::NotFinite { tensor, place: at[3 - from.spec.shape.len().min(3)..].to_vec(), value }
        }
        other => other,
    })?;
    if from.dtype == to.dtype && matrix.parts[0].global_scale.is_none() {
        return Ok(matrix.parts.into_iter().next().unwrap_or_default());
    }
    let view = matrix.view(0);
    let (mut weight, mut scales, mut biases) = (
        Vec::with_capacity(to.dtype.weight_bytes(rows, cols)),
        Vec::with_capacity(to.dtype.scale_bytes(rows, cols)),
        Vec::with_capacity(to.dtype.bias_bytes(rows, cols)),
    );
    let n_rows = (BLOCK_ELEMENTS / cols.max(1)).max(1);
    let mut values = vec![0.0f32; n_rows * cols];
    for first in (0..rows).step_by(n_rows) {
        let values = &mut values[..n_rows.min(rows - first) * cols];
        for (row, values) in values.chunks_exact_mut(cols.max(1)).enumerate() {
            view.dequantize_row(first + row, values);
        }
        let packed = quantize(to, task.part, values, values.len() / cols.max(1)).map_err(|source| {
            let source = match source {
                QuantError::NonFinite { dtype, row, col, value } => {
                    QuantError::NonFinite { dtype, row: task.rows.start + first + row, col, value }
                }
                QuantError::Overflow { dtype, row, col, value } => {
                    QuantError::Overflow { dtype, row: task.rows.start + first + row, col, value }
                }
                other => other,
            };
            CheckpointError::Quant { tensor: matrix.name.clone(), source }
        })?;
        weight.extend_from_slice(&packed.weight);
        scales.extend_from_slice(&packed.scales);
        biases.extend_from_slice(&packed.biases);
    }
    Ok(MatrixPart { weight: weight.into(), scales: scales.into(), biases: biases.into(), global_scale: None })
}
