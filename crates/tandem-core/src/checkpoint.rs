//! A set of safetensors files, memory-mapped, as one table of named tensors.
//!
//! Opening reads headers only. Which tensors a model needs, and that nothing else is there, is decided in
//! [`crate::weights`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use crate::shrink::{check_mapped, release_mapped};

use bytes::Bytes;
use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::config::ModelConfig;
use crate::json::without_literals;
use crate::shrink;
use crate::weights::is_of_mtp;

/// Why a checkpoint cannot be opened or does not fit its configuration.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The directory or a file in it cannot be read.
    #[error("cannot read {path}: {message}. Expected a model directory with config.json and *.safetensors files")]
    Read {
        /// The path.
        path: String,
        /// What went wrong.
        message: String,
    },
    /// A file is damaged.
    #[error("{path} is not a complete safetensors file: {message}. Download or copy it again")]
    Damaged {
        /// The path.
        path: String,
        /// What went wrong.
        message: String,
    },
    /// The tensors do not match what the configuration asks for.
    #[error("the checkpoint does not match its config.json: {}", list(.problems))]
    Mismatch {
        /// Every problem found, one line each.
        problems: Vec<String>,
    },
    /// A value that no correct checkpoint holds.
    #[error(
        "{tensor} has a scale that is not a finite number (entry {index}); the file is damaged or was converted wrongly: \
         download or convert it again"
    )]
    BadScale {
        /// Tensor or module.
        tensor: String,
        /// Index of the first bad scale in its matrix.
        index: usize,
    },
    /// An element that no correct checkpoint holds.
    #[error(
        "{tensor}{place:?} is {value}, not a finite number: a damaged checkpoint, or one that was converted wrongly; download \
         or convert it again"
    )]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Indices of the element.
        place: Vec<usize>,
        /// NaN or an infinity.
        value: f32,
    },
    /// A file became shorter, or could not be read, while it was mapped.
    #[error(
        "{path} was cut short, overwritten or could not be read while it was in use; nothing that was computed since then \
         counts. Restore the file and start again"
    )]
    Shrunk {
        /// The file.
        path: String,
    },
    /// A matrix cannot be represented as asked.
    #[error("{tensor}: {source}")]
    Quant {
        /// Tensor or module.
        tensor: String,
        /// The reason.
        source: crate::quant::QuantError,
    },
}

const LISTED_PROBLEMS: usize = 20;

fn list(problems: &[String]) -> String {
    let mut text = format!("{} problem{}", problems.len(), if problems.len() == 1 { "" } else { "s" });
    for problem in problems.iter().take(LISTED_PROBLEMS) {
        text.push_str("\n  - ");
        text.push_str(problem);
    }
    if problems.len() > LISTED_PROBLEMS {
        text.push_str(&format!("\n  ... and {} more", problems.len() - LISTED_PROBLEMS));
    }
    text
}

/// Element type as safetensors names it.
pub type TensorDType = safetensors::Dtype;

/// One tensor's place in the set.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: TensorDType,
    /// Shape as stored.
    pub shape: Vec<usize>,
    /// Index of the file.
    file: usize,
    /// Byte range in the file.
    start: usize,
    end: usize,
}

impl TensorInfo {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.end - self.start
    }
}

/// A checkpoint directory. Without weight files, names from the index remain (enough for `inspect`).
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Option<TensorInfo>>,
    duplicates: Vec<String>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Index {
    /// Whether it is of other files than the whole one that lies beside it, which wins then, as in transformers.
    fn is_stale(&self, dir: &Path) -> bool {
        const WHOLE: &str = "model.safetensors";
        dir.join(WHOLE).exists() && !self.weight_map.values().any(|file| file == WHOLE)
    }
}

/// Where checkpoints that wrap a language model for images or sound put its tensors.
const WRAPPERS: [(&str, &str); 2] = [("language_model.", ""), ("model.language_model.", "model.")];

/// The name of a language model's module or tensor without what a wrapper puts before it.
pub(crate) fn text_name(name: &str) -> String {
    let inner = WRAPPERS.iter().find_map(|(prefix, inner)| Some(format!("{inner}{}", name.strip_prefix(prefix)?)));
    inner.unwrap_or_else(|| name.to_string())
}

impl Checkpoint {
    /// Opens every safetensors file of `dir`: those that `model.safetensors.index.json` names, else
    /// `model.safetensors`, else every `*.safetensors`.
    ///
    /// # Errors
    /// A file is missing, truncated or not safetensors, or the index and the files disagree.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open_where(dir, |_| true)
    }

    /// The same of the files alone that hold multi-token-prediction layers, as far as an index tells which: the others may be
    /// elsewhere.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and if the index has no such layer.
    pub fn open_mtp(dir: &Path, config: &ModelConfig) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open_where(dir, |name| is_of_mtp(name, config))
    }

    fn open_where(dir: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<Checkpoint, CheckpointError> {
        let mut index = read_index(dir)?.filter(|index| !index.is_stale(dir));
        if let Some(index) = &mut index {
            index.weight_map.retain(|name, _| is_wanted(name));
        }
        let mut paths: Vec<PathBuf> = match &index {
            Some(index) => {
                let mut names: Vec<&String> = index.weight_map.values().collect();
                names.sort();
                names.dedup();
                names.into_iter().map(|n| shard_path(dir, n)).collect::<Result<_, _>>()?
            }
            None if dir.join("model.safetensors").exists() => vec![dir.join("model.safetensors")],
            None => {
                let entries = std::fs::read_dir(dir).map_err(|e| read_error(dir, e))?;
                entries
                    .filter_map(|e| e.ok().map(|e| e.path()))
                    .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
                    .collect()
            }
        };
        paths.sort();
        if paths.is_empty() {
            let message = match index {
                Some(_) => "its index names none of the wanted tensors",
                None => "there is no *.safetensors file in it",
            };
            return Err(CheckpointError::Read { path: dir.display().to_string(), message: message.to_string() });
        }
        let mut checkpoint =
            Checkpoint { dir: dir.to_path_buf(), files: vec![], tensors: BTreeMap::new(), duplicates: vec![] };
        for path in &paths {
            checkpoint.add_file(path)?;
        }
        if let Some(index) = index {
            checkpoint.check_index(&index)?;
        }
        Ok(checkpoint.unwrapped())
    }

    /// False if files that an index names are not there: when only a part of a model was got.
    pub fn is_whole(dir: &Path) -> bool {
        let index = read_index(dir).ok().flatten().filter(|index| !index.is_stale(dir));
        index.is_none_or(|index| index.weight_map.values().all(|file| dir.join(file).exists()))
    }

    /// Opens what is there: like [`Checkpoint::open`], or names alone when the index exists and the weights do not.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], when neither weights nor an index exist.
    pub fn open_or_index(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        if let Some(index) = read_index(dir)?.filter(|index| !index.is_stale(dir))
            && index.weight_map.values().any(|f| !dir.join(f).exists())
        {
            let tensors = index.weight_map.into_keys().map(|name| (name, None)).collect();
            return Ok(Checkpoint { dir: dir.to_path_buf(), files: vec![], tensors, duplicates: vec![] }.unwrapped());
        }
        Checkpoint::open(dir)
    }

    /// Of a checkpoint that wraps a language model, that model alone.
    fn unwrapped(mut self) -> Checkpoint {
        let is_wrapped = |name: &str| WRAPPERS.iter().any(|(prefix, _)| name.starts_with(prefix));
        if self.tensors.keys().any(|name| is_wrapped(name)) {
            let tensors = std::mem::take(&mut self.tensors).into_iter();
            // The head may stand outside.
            let kept = tensors.filter(|(name, _)| is_wrapped(name) || name.starts_with("lm_head."));
            self.tensors = kept.map(|(name, info)| (text_name(&name), info)).collect();
        }
        self
    }

    /// A checkpoint of the given names, without data.
    pub fn from_names(names: impl IntoIterator<Item = String>) -> Checkpoint {
        let tensors = names.into_iter().map(|name| (name, None)).collect();
        Checkpoint { dir: PathBuf::new(), files: vec![], tensors, duplicates: vec![] }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// True when the weights themselves are there.
    pub fn has_data(&self) -> bool {
        !self.files.is_empty()
    }

    /// True when a tensor of this name exists.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Names that more than one file holds.
    pub fn duplicates(&self) -> &[String] {
        &self.duplicates
    }

    /// Type and shape of a tensor; `None` when it does not exist or only its name is known.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).and_then(Option::as_ref)
    }

    /// Names, types and shapes of all tensors, one line each: what must be the same on every rank of a launch.
    pub fn table(&self) -> String {
        let line = |(name, info): (&String, &Option<TensorInfo>)| match info {
            Some(info) => format!("{name} {:?} {:?}\n", info.dtype, info.shape),
            None => format!("{name}\n"),
        };
        self.tensors.iter().map(line).collect()
    }

    /// The bytes of a tensor, still in the mapped file; `None` when it does not exist or only its name is known.
    pub fn bytes(&self, name: &str) -> Option<Bytes> {
        let info = self.info(name)?;
        Some(self.files[info.file].bytes().slice(info.start..info.end))
    }

    /// Starts reading `bytes`, a part of what [`Checkpoint::bytes`] gave, ahead of their use.
    pub fn prefetch(&self, bytes: &[u8]) {
        if let Some((file, start)) = self.files.iter().find_map(|file| Some((file, file.offset_of(bytes)?))) {
            file.prefetch(start, start + bytes.len());
        }
    }

    /// Gives back the memory that reading `bytes` took; they stay valid and are read from the file again.
    pub fn release(&self, bytes: &[u8]) {
        if let Some((file, start)) = self.files.iter().find_map(|file| Some((file, file.offset_of(bytes)?))) {
            file.release(start, start + bytes.len());
        }
    }

    /// The mapped pages that hold `parts`, those of adjacent ones together.
    pub fn pages<'a>(&self, parts: impl Iterator<Item = &'a [u8]>) -> Vec<MappedPages> {
        let mut found: Vec<MappedPages> = vec![];
        for part in parts.filter(|part| !part.is_empty()) {
            let Some((file, start)) = self.files.iter().find_map(|file| Some((file, file.offset_of(part)?))) else {
                continue;
            };
            let end = start + part.len();
            match found.last_mut() {
                Some(last) if Arc::ptr_eq(&last.map, &file.map) && last.end == start => last.end = end,
                _ => found.push(MappedPages { map: Arc::clone(&file.map), start, end }),
            }
        }
        found
    }

    /// The weight files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    fn add_file(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let file = File::open(path).map_err(|e| read_error(path, e))?;
        let mapped = MappedFile::new(path, &file).map_err(|e| read_error(path, e))?;
        let data = mapped.bytes();
        let damaged = |message: String| CheckpointError::Damaged { path: path.display().to_string(), message };
        let (header, metadata) = SafeTensors::read_metadata(&data).map_err(|e| {
            damaged(match e {
                safetensors::SafeTensorError::MetadataIncompleteBuffer => {
                    format!("its {} bytes are not what the header announces (truncated?)", data.len())
                }
                other => other.to_string(),
            })
        })?;
        let base = header + 8;
        if let Some(name) = name_twice(&data[8..base]) {
            return Err(damaged(format!("its header has {name} twice")));
        }
        for (name, tensor) in metadata.tensors() {
            let (start, end) = tensor.data_offsets;
            let info = TensorInfo {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                file: self.files.len(),
                start: base + start,
                end: base + end,
            };
            if self.tensors.insert(name.clone(), Some(info)).is_some() {
                self.duplicates.push(name);
            }
        }
        self.files.push(mapped);
        Ok(())
    }

    fn check_index(&self, index: &Index) -> Result<(), CheckpointError> {
        let mut problems: Vec<String> = index
            .weight_map
            .iter()
            .filter(|(name, _)| !self.contains(name))
            .map(|(name, file)| format!("the index says {file} holds {name}, but it does not"))
            .collect();
        problems.sort();
        if problems.is_empty() { Ok(()) } else { Err(CheckpointError::Mismatch { problems }) }
    }
}

/// A name that a header has more than once: a map would keep the last without a word.
fn name_twice(header: &[u8]) -> Option<String> {
    struct Names;
    impl<'de> Visitor<'de> for Names {
        type Value = Option<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of tensors")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<String>, A::Error> {
            let (mut names, mut twice) = (HashSet::new(), None);
            while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                twice = twice.or(names.replace(name));
            }
            Ok(twice)
        }
    }
    serde_json::Deserializer::from_slice(header).deserialize_map(Names).ok().flatten()
}

fn read_error(path: &Path, error: std::io::Error) -> CheckpointError {
    CheckpointError::Read { path: path.display().to_string(), message: error.to_string() }
}

fn read_index(dir: &Path) -> Result<Option<Index>, CheckpointError> {
    let path = dir.join("model.safetensors.index.json");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(read_error(&path, e)),
    };
    let index = serde_json::from_str(&without_literals(&text)).map_err(|e| CheckpointError::Read {
        path: path.display().to_string(),
        message: format!("not a weight index ({e})"),
    })?;
    Ok(Some(index))
}

/// A shard's path; an index may not point outside its directory.
fn shard_path(dir: &Path, name: &str) -> Result<PathBuf, CheckpointError> {
    let plain = Path::new(name).components().count() == 1 && !name.starts_with('.');
    if plain {
        Ok(dir.join(name))
    } else {
        Err(CheckpointError::Read {
            path: dir.join("model.safetensors.index.json").display().to_string(),
            message: format!("it names {name:?}, which is not a file in the same directory"),
        })
    }
}

/// A weight file in the address space.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Arc<Map>,
}

/// A mapping, watched until it ends.
#[derive(Debug)]
struct Map {
    map: Mmap,
    _watched: shrink::Watched,
}

impl std::ops::Deref for Map {
    type Target = Mmap;

    fn deref(&self) -> &Mmap {
        &self.map
    }
}

/// [`Bytes::from_owner`] wants an owner that is a slice.
struct Shared(Arc<Map>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[allow(unsafe_code)]
impl MappedFile {
    pub(crate) fn new(path: &Path, file: &File) -> std::io::Result<MappedFile> {
        // SAFETY: the mapping is read-only and private to this process. A writer that changes the file under us would
        // change the weights, as it would with any mapped model; nothing here relies on the bytes being constant.
        let map = unsafe { Mmap::map(file)? };
        let watched = shrink::watch(path, &map);
        Ok(MappedFile { path: path.to_path_buf(), map: Arc::new(Map { map, _watched: watched }) })
    }

    pub(crate) fn bytes(&self) -> Bytes {
        Bytes::from_owner(Shared(self.map.clone()))
    }

    /// Offset of `bytes` if they are in this file.
    fn offset_of(&self, bytes: &[u8]) -> Option<usize> {
        let (start, first) = (self.map.as_ptr() as usize, bytes.as_ptr() as usize);
        (first >= start && first + bytes.len() <= start + self.map.len()).then(|| first - start)
    }

    /// As [`MappedPages::prefetch`].
    pub(crate) fn prefetch(&self, start: usize, end: usize) {
        MappedPages { map: Arc::clone(&self.map), start, end }.prefetch();
    }

    /// As [`MappedPages::release`].
    pub(crate) fn release(&self, start: usize, end: usize) {
        MappedPages { map: Arc::clone(&self.map), start, end }.release();
    }
}

/// A part of a mapped file.
pub struct MappedPages {
    map: Arc<Map>,
    start: usize,
    end: usize,
}

#[allow(unsafe_code)]
impl MappedPages {
    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.end - self.start
    }

    /// Starts reading it, where the system can be asked to.
    pub fn prefetch(&self) {
        #[cfg(unix)]
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, self.start, self.bytes());
    }

    /// Unmaps the pages that lie wholly in it until they are read again, where the system does that when it is asked.
    #[cfg(not(unix))]
    pub fn release(&self) {}

    /// Unmaps the pages that lie wholly in it until they are read again.
    #[cfg(unix)]
    pub fn release(&self) {
        let (start, end) = (self.start, self.end);
        const PAGE: usize = 16 << 10; // at least the system's
        let (start, end) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
        if start < end {
            // SAFETY: the mapping is of a file and never written to, so dropped pages come back with the same bytes.
            let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
}
