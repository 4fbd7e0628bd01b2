//! GGUF files: header, metadata, tensor directory, and the block formats of ggml.
//!
//! Layouts are those of ggml-common.h and ggml-quants.c. Which tensor is which weight of a model is decided by the
//! converter; nothing here knows models.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::checkpoint::MappedFile;
use crate::dtype::{DType, Float};
use crate::quant::minifloat::{E2M1, e8m0};

/// Why a GGUF file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// Not GGUF, or damaged.
    #[error("{path} is not a complete GGUF file: {message}. Download or copy it again")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        message: String,
    },
    /// A tensor type that is not read.
    #[error(
        "{path}: tensor {tensor} has ggml type {found}; read are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, \
         Q6_K and MXFP4. Get the model in one of these"
    )]
    Type {
        /// The file.
        path: String,
        /// The tensor.
        tensor: String,
        /// ggml's number of the type.
        found: u32,
    },
}

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer type.
    Int(i64),
    /// Any float type.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Value>),
}

impl Value {
    /// As a non-negative integer.
    pub fn as_usize(&self) -> Option<usize> {
        match self {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        }
    }

    /// As a number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Int(n) => Some(*n as f64),
            Value::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// As text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// As a truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// As a list.
    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Value::List(values) => Some(values),
            _ => None,
        }
    }
}

/// The block formats that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // ggml's names
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    Mxfp4,
}

impl GgmlType {
    fn parse(number: u32) -> Option<GgmlType> {
        Some(match number {
            0 => GgmlType::F32,
            1 => GgmlType::F16,
            2 => GgmlType::Q4_0,
            3 => GgmlType::Q4_1,
            6 => GgmlType::Q5_0,
            7 => GgmlType::Q5_1,
            8 => GgmlType::Q8_0,
            12 => GgmlType::Q4K,
            13 => GgmlType::Q5K,
            14 => GgmlType::Q6K,
            30 => GgmlType::BF16,
            39 => GgmlType::Mxfp4,
            _ => return None,
        })
    }

    /// Elements and bytes of one block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            GgmlType::F32 => (1, 4),
            GgmlType::F16 | GgmlType::BF16 => (1, 2),
            GgmlType::Q4_0 => (32, 18),
            GgmlType::Q4_1 => (32, 20),
            GgmlType::Q5_0 => (32, 22),
            GgmlType::Q5_1 => (32, 24),
            GgmlType::Q8_0 => (32, 34),
            GgmlType::Q4K => (256, 144),
            GgmlType::Q5K => (256, 176),
            GgmlType::Q6K => (256, 210),
            GgmlType::Mxfp4 => (32, 17),
        }
    }

    /// The format that holds exactly the same values, if there is one; others are decoded to f32.
    pub fn exact(self) -> Option<DType> {
        let affine = |bits| Some(DType::Affine { bits, group_size: 32, params: Float::F16 });
        match self {
            GgmlType::F32 => Some(DType::F32),
            GgmlType::F16 => Some(DType::F16),
            GgmlType::BF16 => Some(DType::BF16),
            GgmlType::Q4_0 | GgmlType::Q4_1 => affine(4),
            GgmlType::Q5_0 | GgmlType::Q5_1 => affine(5),
            GgmlType::Q8_0 => affine(8),
            GgmlType::Mxfp4 => Some(DType::Mxfp4),
            GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K => None,
        }
    }

    /// Repacks one row to [`GgmlType::exact`]'s layout, appending packed elements, scales and biases. A bias that
    /// overflows f16 becomes infinite, which readers refuse.
    ///
    /// # Panics
    /// When there is no exact format, or the row is not whole blocks.
    pub fn repack_row(self, row: &[u8], weight: &mut Vec<u8>, scales: &mut Vec<u8>, biases: &mut Vec<u8>) {
        let (_, size) = self.block();
        assert!(row.len().is_multiple_of(size), "a row of {self:?} has whole blocks");
        match self {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => weight.extend_from_slice(row),
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Mxfp4 => {
                for block in row.chunks_exact(size) {
                    let nibbles = &block[size - 16..];
                    // ggml keeps element j beside element j + 16, MLX beside j + 1.
                    weight.extend(nibbles.chunks_exact(2).map(|pair| pair[0] & 15 | pair[1] << 4));
                    weight.extend(nibbles.chunks_exact(2).map(|pair| pair[0] >> 4 | pair[1] & 0xf0));
                    match self {
                        GgmlType::Mxfp4 => scales.push(block[0]),
                        GgmlType::Q4_1 => {
                            scales.extend_from_slice(&block[..2]);
                            biases.extend_from_slice(&block[2..4]);
                        }
                        _ => offset(block, 8.0, scales, biases),
                    }
                }
            }
            GgmlType::Q5_0 | GgmlType::Q5_1 => {
                for block in row.chunks_exact(size) {
                    let codes = codes_5(block);
                    for codes in codes.chunks_exact(8) {
                        let word = codes.iter().rev().fold(0u64, |word, code| word << 5 | u64::from(*code));
                        weight.extend_from_slice(&word.to_le_bytes()[..5]);
                    }
                    if self == GgmlType::Q5_1 {
                        scales.extend_from_slice(&block[..2]);
                        biases.extend_from_slice(&block[2..4]);
                    } else {
                        offset(block, 16.0, scales, biases);
                    }
                }
            }
            GgmlType::Q8_0 => {
                for block in row.chunks_exact(size) {
                    weight.extend(block[2..].iter().map(|code| code ^ 0x80)); // signed to offset binary
                    offset(block, 128.0, scales, biases);
                }
            }
            GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K => panic!("{self:?} has no exact format"),
        }
    }

    /// Decodes one row.
    ///
    /// # Panics
    /// When `row` and `out` are not the same whole blocks.
    pub fn dequantize_row(self, row: &[u8], out: &mut [f32]) {
        let (elements, size) = self.block();
        assert_eq!(row.len() / size, out.len() / elements, "a row of {self:?}");
        for (block, out) in row.chunks_exact(size).zip(out.chunks_exact_mut(elements)) {
            self.dequantize_block(block, out);
        }
    }

    fn dequantize_block(self, block: &[u8], out: &mut [f32]) {
        let f16 = |at: usize| Float::F16.read(&block[at..], 0);
        match self {
            GgmlType::F32 => out[0] = Float::F32.read(block, 0),
            GgmlType::F16 => out[0] = f16(0),
            GgmlType::BF16 => out[0] = Float::BF16.read(block, 0),
            GgmlType::Q4_0 | GgmlType::Q4_1 => {
                let d = f16(0);
                let (first, m) = if self == GgmlType::Q4_0 { (2, -8.0 * d) } else { (4, f16(2)) };
                for (j, byte) in block[first..].iter().enumerate() {
                    out[j] = d * f32::from(byte & 15) + m;
                    out[j + 16] = d * f32::from(byte >> 4) + m;
                }
            }
            GgmlType::Q5_0 | GgmlType::Q5_1 => {
                let d = f16(0);
                let m = if self == GgmlType::Q5_0 { -16.0 * d } else { f16(2) };
                for (value, code) in out.iter_mut().zip(codes_5(block)) {
                    *value = d * f32::from(code) + m;
                }
            }
            GgmlType::Q8_0 => {
                let d = f16(0);
                for (value, code) in out.iter_mut().zip(&block[2..]) {
                    *value = d * f32::from(*code as i8);
                }
            }
            GgmlType::Mxfp4 => {
                let scale = e8m0(block[0]);
                for (j, byte) in block[1..].iter().enumerate() {
                    out[j] = E2M1[usize::from(byte & 15)] * scale;
                    out[j + 16] = E2M1[usize::from(byte >> 4)] * scale;
                }
            }
            GgmlType::Q4K | GgmlType::Q5K => {
                let (d, dmin) = (f16(0), f16(2));
                let packed = &block[4..16];
                let (high, low) =
                    if self == GgmlType::Q4K { (&block[..0], &block[16..]) } else { (&block[16..48], &block[48..]) };
                for group in 0..8 {
                    let (scale, min) = scale_min(packed, group);
                    let (d, m) = (d * f32::from(scale), dmin * f32::from(min));
                    for l in 0..32 {
                        let byte = low[group / 2 * 32 + l];
                        let mut code = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
                        if !high.is_empty() {
                            code |= (high[l] >> group & 1) << 4;
                        }
                        out[group * 32 + l] = d * f32::from(code) - m;
                    }
                }
            }
            GgmlType::Q6K => {
                let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], f16(208));
                for half in 0..2 {
                    for l in 0..32 {
                        let (a, b, h) = (low[half * 64 + l], low[half * 64 + l + 32], high[half * 32 + l]);
                        let codes = [
                            a & 15 | (h & 3) << 4,
                            b & 15 | (h >> 2 & 3) << 4,
                            a >> 4 | (h >> 4 & 3) << 4,
                            b >> 4 | (h >> 6) << 4,
                        ];
                        for (quarter, code) in codes.into_iter().enumerate() {
                            let scale = scales[half * 8 + quarter * 2 + l / 16] as i8;
                            out[half * 128 + quarter * 32 + l] = d * f32::from(scale) * (f32::from(code) - 32.0);
                        }
                    }
                }
            }
        }
    }
}

/// `d` as scale and `-by * d` as bias: codes that were signed become unsigned. The product is exact unless it overflows.
fn offset(block: &[u8], by: f32, scales: &mut Vec<u8>, biases: &mut Vec<u8>) {
    scales.extend_from_slice(&block[..2]);
    Float::F16.write(-by * Float::F16.read(block, 0), biases);
}

/// Codes of Q5_0 and Q5_1: 32 fifth bits, then 16 bytes of nibbles, at the end of the block.
fn codes_5(block: &[u8]) -> [u8; 32] {
    let (head, nibbles) = block.split_at(block.len() - 16);
    let fifth = &head[head.len() - 4..];
    std::array::from_fn(|j| {
        let nibble = if j < 16 { nibbles[j] & 15 } else { nibbles[j - 16] >> 4 };
        nibble | (fifth[j / 8] >> (j % 8) & 1) << 4
    })
}

/// 6-bit scale and minimum of group `j` of 8 in the 12 bytes of a K-quant (ggml's get_scale_min_k4).
fn scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    }
}

/// One tensor's place.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// Block format.
    pub ggml_type: GgmlType,
    /// Shape, outermost dimension first (ggml stores it the other way round).
    pub shape: Vec<usize>,
    file: usize,
    start: usize,
    end: usize,
}

/// A model in one GGUF file or several (`-00001-of-00003.gguf`).
#[derive(Debug)]
pub struct Gguf {
    files: Vec<MappedFile>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, GgufTensor>,
}

const MAX_DEPTH: usize = 4;
/// Files of one model.
const MAX_FILES: usize = 1 << 14;
/// Metadata values of one file, those in lists included: vocabularies have some hundred thousand.
const MAX_VALUES: usize = 1 << 24;

impl Gguf {
    /// Maps a file, and its siblings if it is the first of several, and reads the directories.
    ///
    /// # Errors
    /// See [`GgufError`].
    pub fn open(path: &Path) -> Result<Gguf, GgufError> {
        let mut gguf = Gguf { files: vec![], metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        gguf.add(path)?;
        let n_files = gguf.metadata.get("split.count").and_then(Value::as_usize).unwrap_or(1);
        if n_files > MAX_FILES {
            let message = format!("it says that it is one of {n_files} files, expected at most {MAX_FILES}");
            return Err(GgufError::Damaged { path: path.display().to_string(), message });
        }
        for i in 2..=n_files {
            let sibling = sibling(path, i, n_files).ok_or_else(|| GgufError::Damaged {
                path: path.display().to_string(),
                message: format!("it says that it is one of {n_files} files, but its name does not end in -00001-of-{n_files:05}.gguf"),
            })?;
            gguf.add(&sibling)?;
        }
        Ok(gguf)
    }

    /// Metadata by key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A tensor's type and shape.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.get(name)
    }

    /// All tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's blocks, still in the mapped file.
    pub fn bytes(&self, tensor: &GgufTensor) -> Bytes {
        self.files[tensor.file].bytes().slice(tensor.start..tensor.end)
    }

    /// Starts reading bytes `range` of a tensor ahead of their use.
    pub fn prefetch(&self, tensor: &GgufTensor, range: Range<usize>) {
        self.files[tensor.file].prefetch(tensor.start + range.start, tensor.start + range.end);
    }

    /// Gives back the memory that reading bytes `range` of a tensor took.
    pub fn release(&self, tensor: &GgufTensor, range: Range<usize>) {
        self.files[tensor.file].release(tensor.start + range.start, tensor.start + range.end);
    }

    fn add(&mut self, path: &Path) -> Result<(), GgufError> {
        let read_error = |source| GgufError::Read { path: path.display().to_string(), source };
        let file = File::open(path).map_err(read_error)?;
        let mapped = MappedFile::new(path, &file).map_err(read_error)?;
        let data = mapped.bytes();
        let (metadata, tensors) = parse(&data, self.files.len()).map_err(|problem| match problem {
            Problem::Message(message) => GgufError::Damaged { path: path.display().to_string(), message },
            Problem::Type(tensor, found) => GgufError::Type { path: path.display().to_string(), tensor, found },
        })?;
        self.files.push(mapped);
        for (key, value) in metadata {
            self.metadata.entry(key).or_insert(value);
        }
        for (name, tensor) in tensors {
            if self.tensors.insert(name.clone(), tensor).is_some() {
                let message = format!("tensor {name} is there twice");
                return Err(GgufError::Damaged { path: path.display().to_string(), message });
            }
        }
        Ok(())
    }
}

fn sibling(path: &Path, i: usize, n: usize) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(&format!("-00001-of-{n:05}.gguf"))?;
    Some(path.with_file_name(format!("{stem}-{i:05}-of-{n:05}.gguf")))
}

enum Problem {
    Message(String),
    Type(String, u32),
}

impl From<String> for Problem {
    fn from(message: String) -> Problem {
        Problem::Message(message)
    }
}

type Directory = (BTreeMap<String, Value>, BTreeMap<String, GgufTensor>);

/// Reads header, metadata and tensor directory of the whole file `data`. Counts are never trusted: memory is taken only
/// for what the file's bytes can hold.
fn parse(data: &[u8], file: usize) -> Result<Directory, Problem> {
    let mut reader = Reader { data, at: 0, n_values: 0 };
    if reader.take(4)? != b"GGUF" {
        return Err("it does not start with \"GGUF\"".to_string().into());
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("its version is {version}, expected 2 or 3").into());
    }
    let n_tensors = reader.u64()?;
    let n_values = reader.u64()?;
    // A key takes at least 13 bytes, a tensor 24.
    for (what, n, least) in [("metadata values", n_values, 13), ("tensors", n_tensors, 24)] {
        if n > data.len() as u64 / least {
            return Err(format!("it announces {n} {what}, more than its {} bytes can hold", data.len()).into());
        }
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..n_values {
        let key = reader.text()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("metadata key {key:?} is there twice").into());
        }
    }
    let mut tensors = BTreeMap::new();
    let mut found = vec![];
    for _ in 0..n_tensors {
        let name = reader.text()?;
        let n_dims = reader.u32()?;
        if !(1..=4).contains(&n_dims) {
            return Err(format!("tensor {name:?} has {n_dims} dimensions, expected 1 to 4").into());
        }
        let mut shape = vec![];
        for _ in 0..n_dims {
            let n = reader.u64()?;
            shape.push(usize::try_from(n).map_err(|_| format!("tensor {name:?} has a dimension of {n}"))?);
        }
        shape.reverse();
        let number = reader.u32()?;
        let offset = reader.u64()?;
        let ggml_type = GgmlType::parse(number).ok_or_else(|| Problem::Type(name.clone(), number))?;
        found.push((name, shape, ggml_type, offset));
    }
    let alignment = metadata.get("general.alignment").and_then(Value::as_usize).unwrap_or(32);
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(format!("its alignment is {alignment}, expected a power of two").into());
    }
    let base = reader.at.next_multiple_of(alignment);
    for (name, shape, ggml_type, offset) in found {
        let (block, size) = ggml_type.block();
        let cols = *shape.last().unwrap_or(&1);
        if !cols.is_multiple_of(block) {
            return Err(format!(
                "tensor {name:?} has rows of {cols}, expected a multiple of {block} for {ggml_type:?}"
            )
            .into());
        }
        let elements = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let end = elements
            .and_then(|n| (n / block).checked_mul(size))
            .and_then(|bytes| Some((usize::try_from(offset).ok()?.checked_add(base)?, bytes)))
            .and_then(|(start, bytes)| Some((start, start.checked_add(bytes)?)));
        let Some((start, end)) = end.filter(|(_, end)| *end <= data.len()) else {
            return Err(format!(
                "tensor {name:?} of shape {shape:?} ends behind the file's {} bytes (truncated?)",
                data.len()
            )
            .into());
        };
        let tensor = GgufTensor { ggml_type, shape, file, start, end };
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(format!("tensor {name:?} is there twice").into());
        }
    }
    Ok((metadata, tensors))
}

struct Reader<'a> {
    data: &'a [u8],
    at: usize,
    /// Metadata values read.
    n_values: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.data.len());
        let end = end.ok_or_else(|| format!("its directory ends behind its {} bytes (truncated?)", self.data.len()))?;
        let bytes = &self.data[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String, String> {
        let n = self.u64()?;
        let bytes = self.take(usize::try_from(n).unwrap_or(usize::MAX))?;
        // Vocabularies may hold any bytes; keys and names are ASCII.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, String> {
        self.n_values += 1;
        if self.n_values > MAX_VALUES {
            return Err(format!("it has more than {MAX_VALUES} metadata values"));
        }
        Ok(match kind {
            0 => Value::Int(self.array::<1>()?[0].into()),
            1 => Value::Int(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Int(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Int(self.u32()?.into()),
            5 => Value::Int(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < MAX_DEPTH => {
                let kind = self.u32()?;
                let n = self.u64()?;
                let mut values = vec![];
                for _ in 0..n {
                    values.push(self.value(kind, depth + 1)?);
                }
                Value::List(values)
            }
            9 => return Err("its lists are nested too deeply".to_string()),
            10 => Value::Int(i64::try_from(self.u64()?).unwrap_or(i64::MAX)),
            11 => Value::Int(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("it has a metadata value of unknown type {other}")),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::PackedView;

    proptest! {
        /// Repacked blocks decode to the same values.
        #[test]
        fn repacking_is_exact(
            kind in prop::sample::select(vec![GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q5_0, GgmlType::Q5_1, GgmlType::Q8_0, GgmlType::Mxfp4]),
            bytes in prop::collection::vec(any::<u8>(), 34 * 3),
        ) {
            let (elements, size) = kind.block();
            let mut row = bytes[..3 * size].to_vec();
            for block in row.chunks_exact_mut(size) {
                // Scales of ordinary size: 2^-14 to 2 for f16, and any e8m0 but the ends.
                if kind == GgmlType::Mxfp4 {
                    block[0] = block[0].clamp(8, 240);
                } else {
                    block[1] = block[1] & 0x3f | 4;
                    if matches!(kind, GgmlType::Q4_1 | GgmlType::Q5_1) {
                        block[3] &= 0xbf;
                    }
                }
            }
            let mut expected = vec![0.0; 3 * elements];
            kind.dequantize_row(&row, &mut expected);
            let (mut weight, mut scales, mut biases) = (vec![], vec![], vec![]);
            kind.repack_row(&row, &mut weight, &mut scales, &mut biases);
            let dtype = kind.exact().expect("exact");
            let view = PackedView::new(dtype, 1, 3 * elements, &weight, &scales, &biases).expect("fits");
            let found = view.dequantize();
            for (found, expected) in found.iter().zip(&expected) {
                // d * q + m rounds twice in both; with a fixed offset ggml multiplies q - 8 instead.
                prop_assert!((found - expected).abs() <= expected.abs() * 1e-6 + 1e-6, "{} {}", found, expected);
            }
        }

        #[test]
        fn any_bytes_are_an_error_or_a_directory(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes, 0);
            bytes.splice(..0, *b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0");
            let _ = parse(&bytes, 0);
        }
    }
}
