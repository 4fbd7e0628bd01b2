//! Hugging Face tokenizers: whole-text encoding and decoding, and streaming decoding.
//!
//! Owns `tokenizer.json` and the added tokens of `tokenizer_config.json`. It deliberately does not truncate or pad,
//! does not apply `clean_up_tokenization_spaces` (a stream could not undo it; vLLM does the same), and knows no chat
//! template (see [`crate::chat_template`]).

use std::cell::Cell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use aho_corasick::{AhoCorasick, MatchKind};
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use tandem_core::json::without_literals;
use thiserror::Error;
use tokenizers::{AddedToken, DecoderWrapper};

/// Bytes of the largest tokenizer.json; that of a vocabulary of 256,000 tokens has 33 million.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Ids are below this: no model has as many tokens.
const MAX_IDS: u64 = 1 << 24;

thread_local! {
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread is the tokenizers crate's, which becomes an error and needs no report.
pub fn is_guarded() -> bool {
    IS_GUARDED.get()
}

/// Runs code of the tokenizers crate, which panics on some malformed files.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    let before = IS_GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    IS_GUARDED.set(before);
    match result {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("tokenizer.json asks for something impossible (the tokenizers library gave up)".into()),
    }
}

/// [`guarded`], for work with errors of its own.
fn guarded_tokens(work: impl FnOnce() -> Result<(), TokenizerError>, path: &Path) -> Result<(), TokenizerError> {
    let mut result = Ok(());
    let run = guarded(|| {
        result = work();
        Ok(())
    });
    run.map_err(|cause| TokenizerError::Parse { path: path.to_owned(), cause })?;
    result
}

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// A file is missing or unreadable.
    #[error(
        "cannot read {path}: {source}; a model directory needs tokenizer.json (Hugging Face layout)",
        path = path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file does not hold what its name promises.
    #[error("{path} is not a valid tokenizer file: {cause}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause, in the parser's words.
        cause: String,
    },
    /// An added token of `tokenizer_config.json` would not get the id that the file names.
    #[error(
        "{path}: added token {token:?} should have id {expected} but would get {found}; \
         tokenizer.json and tokenizer_config.json are not of the same model", path = path.display()
    )]
    AddedToken {
        /// The file.
        path: PathBuf,
        /// The token's text.
        token: String,
        /// The id in the file.
        expected: u32,
        /// The id that the vocabulary would give.
        found: u32,
    },
    /// The tokenizer refused the text.
    #[error("cannot encode text: {0}")]
    Encode(String),
    /// The tokenizer refused the ids.
    #[error("cannot decode tokens: {0}")]
    Decode(String),
}

/// How ids become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DecoderKind {
    /// GPT-2's byte-level alphabet: each token is a fixed run of bytes.
    ByteLevel,
    /// Anything else (SentencePiece, ...): a token's text may depend on its neighbours.
    Contextual,
}

/// A tokenizer of one model; cheap to clone and to share between threads.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    decoder_kind: DecoderKind,
    /// Put before the text when special tokens are asked for (`add_bos_token: true` in tokenizer_config.json).
    forced_bos: Option<u32>,
    /// `eos_token`.
    eos: Option<u32>,
    control: Arc<Control>,
}

/// Tokens that were added to the vocabulary, without those of white space alone: in a prompt they are orders.
struct Control {
    /// Finds the longest at each place; none if there are no such tokens.
    finder: Option<AhoCorasick>,
    /// And each one that begins anywhere.
    overlapping: Option<AhoCorasick>,
    /// Id of each pattern, and whether it takes the white space before and after it.
    tokens: Vec<(u32, bool, bool)>,
    /// The tokenizer without added tokens, made when it is needed first.
    plain: OnceLock<tokenizers::Tokenizer>,
}

impl Control {
    fn new(tokenizer: &tokenizers::Tokenizer) -> Control {
        let mut added: Vec<(u32, AddedToken)> = tokenizer.get_added_tokens_decoder().into_iter().collect();
        added.retain(|(_, token)| !token.content.trim().is_empty());
        added.sort_by_key(|(id, _)| *id);
        let find = |kind: MatchKind| {
            let patterns = added.iter().map(|(_, token)| &token.content);
            (!added.is_empty()).then(|| AhoCorasick::builder().match_kind(kind).build(patterns).ok()).flatten()
        };
        Control {
            finder: find(MatchKind::LeftmostLongest),
            overlapping: find(MatchKind::Standard),
            tokens: added.iter().map(|(id, token)| (*id, token.lstrip, token.rstrip)).collect(),
            plain: OnceLock::new(),
        }
    }

    fn plain(&self, tokenizer: &tokenizers::Tokenizer) -> &tokenizers::Tokenizer {
        self.plain.get_or_init(|| {
            let mut plain = tokenizers::Tokenizer::new(tokenizer.get_model().clone());
            plain.with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned());
            // Without added tokens there is nothing to normalise that could fail.
            let _ = plain.with_normalizer(tokenizer.get_normalizer().cloned());
            plain
        })
    }
}

impl Tokenizer {
    /// Loads `tokenizer.json` and, where present, `tokenizer_config.json` from a model directory.
    ///
    /// # Errors
    /// When `tokenizer.json` is missing, or either file is malformed or contradicts the other.
    pub fn from_dir(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let read = |source| TokenizerError::Read { path: path.clone(), source };
        // A cause may quote a token, of any length.
        let parse = |cause: String| {
            let short = match cause.char_indices().nth(300) {
                Some((end, _)) => format!("{}...", &cause[..end]),
                None => cause,
            };
            TokenizerError::Parse { path: path.clone(), cause: short }
        };
        let n_bytes = std::fs::metadata(&path).map_err(read)?.len();
        if n_bytes > MAX_FILE_BYTES {
            return Err(parse(format!("it has {n_bytes} bytes, expected at most {MAX_FILE_BYTES}")));
        }
        let bytes = std::fs::read(&path).map_err(read)?;
        check_ids(&bytes).map_err(&parse)?;
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(&parse)?;
        // Training-time settings that some files carry; an engine must see the whole text.
        inner.with_padding(None);
        guarded(|| inner.with_truncation(None).map(|_| ())).map_err(parse)?;

        let config = read_tokenizer_config(dir)?;
        guarded_tokens(|| add_missing_tokens(&mut inner, &config, dir), &path)?;
        let eos = token_text(&config, "eos_token").and_then(|token| inner.token_to_id(&token));
        let forced_bos = match config.get("add_bos_token") {
            Some(Value::Bool(true)) => token_text(&config, "bos_token").and_then(|token| inner.token_to_id(&token)),
            _ => None,
        };
        let decoder_kind = match inner.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => DecoderKind::ByteLevel,
            Some(DecoderWrapper::Sequence(sequence))
                if matches!(sequence.get_decoders(), [DecoderWrapper::ByteLevel(_)]) =>
            {
                DecoderKind::ByteLevel
            }
            _ => DecoderKind::Contextual,
        };
        let control = Arc::new(Control::new(&inner));
        Ok(Self { inner: Arc::new(inner), decoder_kind, forced_bos, eos, control })
    }

    /// Token ids of `text`. Special tokens written in the text become tokens, as in Hugging Face; `add_special_tokens`
    /// adds those that the tokenizer puts around a plain text (leave it off for a rendered chat template).
    ///
    /// # Errors
    /// When the tokenizer's model refuses the text (an out-of-vocabulary piece without an unknown token).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens)).map_err(TokenizerError::Encode)?;
        let mut ids = encoding.get_ids().to_vec();
        if add_special_tokens
            && let Some(bos) = self.forced_bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Whether a text holds the name of an added token.
    pub fn has_control(&self, text: &str) -> bool {
        self.control.finder.as_ref().is_some_and(|finder| finder.is_match(text))
    }

    /// Where the names of added tokens begin, in order; they may overlap.
    pub fn control_starts(&self, text: &str) -> Vec<usize> {
        let finder = self.control.overlapping.as_ref();
        let mut starts: Vec<usize> = finder
            .into_iter()
            .flat_map(|finder| finder.find_overlapping_iter(text).map(|found| found.start()))
            .collect();
        starts.sort_unstable();
        starts.dedup();
        starts
    }

    /// Token ids of a rendered conversation. Names of added tokens that begin at one of `literals` are text; so is what only
    /// the normaliser would make of text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_literals(&self, text: &str, literals: &[usize]) -> Result<Vec<u32>, TokenizerError> {
        let Some(finder) = &self.control.finder else { return self.encode(text, false) };
        let mut orders = vec![];
        let mut at = 0;
        while let Some(found) = finder.find(aho_corasick::Input::new(text).range(at..)) {
            let is_literal = literals.binary_search(&found.start()).is_ok();
            at = if is_literal { found.start() + 1 } else { found.end() };
            while !text.is_char_boundary(at) {
                at += 1;
            }
            if !is_literal {
                orders.push((found.start(), found.end(), found.pattern().as_usize()));
            }
        }
        if literals.is_empty() {
            let ids = self.encode(text, false)?;
            let is_control = |id: &u32| self.control.tokens.binary_search_by_key(id, |(control, ..)| *control).is_ok();
            let found = ids.iter().copied().filter(is_control);
            if found.eq(orders.iter().map(|(.., pattern)| self.control.tokens[*pattern].0)) {
                return Ok(ids);
            }
        }
        let mut ids = vec![];
        let mut start = 0;
        let mut strips_start = false;
        for (from, to, order) in orders.iter().map(|(from, to, pattern)| (*from, *to, Some(*pattern))).chain([(
            text.len(),
            text.len(),
            None,
        )]) {
            let token = order.map(|pattern| self.control.tokens[pattern]);
            let mut between = &text[start..from];
            if strips_start {
                between = between.trim_start();
            }
            if token.is_some_and(|(_, lstrip, _)| lstrip) {
                between = between.trim_end();
            }
            if !between.is_empty() {
                ids.extend(self.encode_plain(between)?);
            }
            ids.extend(token.map(|(id, ..)| id));
            strips_start = token.is_some_and(|(.., rstrip)| rstrip);
            start = to;
        }
        Ok(ids)
    }

    /// Token ids of a text, none of them of an added token.
    fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let control = &self.control;
        let encode = |tokenizer: &tokenizers::Tokenizer, text: &str| {
            guarded(|| tokenizer.encode_fast(text, false)).map_err(TokenizerError::Encode)
        };
        if !self.has_control(text) {
            return Ok(encode(&self.inner, text)?.get_ids().to_vec());
        }
        let ids = encode(control.plain(&self.inner), text)?.get_ids().to_vec();
        let is_control = |id: &u32| control.tokens.binary_search_by_key(id, |(control, ..)| *control).is_ok();
        if !ids.iter().any(is_control) {
            return Ok(ids);
        }
        // Some models find the name among their ordinary pieces: not so if its characters come one by one.
        let mut ids = vec![];
        let mut rest = 0;
        for start in self.control_starts(text) {
            let after = start + text[start..].chars().next().map_or(0, char::len_utf8);
            if after > rest {
                ids.extend_from_slice(encode(control.plain(&self.inner), &text[rest..after])?.get_ids());
                rest = after;
            }
        }
        ids.extend_from_slice(encode(control.plain(&self.inner), &text[rest..])?.get_ids());
        ids.retain(|id| !is_control(id));
        Ok(ids)
    }

    /// The text of `ids`; ids outside the vocabulary are skipped, bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        guarded(|| self.inner.decode(ids, skip_special_tokens)).map_err(TokenizerError::Decode)
    }

    /// A decoder that takes one id at a time.
    pub fn decode_stream(&self, skip_special_tokens: bool) -> DecodeStream {
        DecodeStream {
            tokenizer: self.clone(),
            skip_special_tokens,
            bytes: Vec::new(),
            window: Vec::new(),
            n_emitted: 0,
        }
    }

    /// The token as it stands in the vocabulary (byte-level tokens are not readable text).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token, by its text in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether the vocabulary has a token.
    pub fn has_token(&self, token: &str) -> bool {
        self.token_to_id(token).is_some()
    }

    /// The tokenizer's own end of a text (`eos_token` in its configuration).
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a token is left out of plain text (`special` in tokenizer.json).
    pub fn is_special(&self, id: u32) -> bool {
        self.id_to_token(id).is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// Whether a token was added to the vocabulary as a whole: other tokens never spell it.
    pub fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// The bytes that a token stands for.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.id_to_token(id)?;
        match self.decoder_kind {
            DecoderKind::ByteLevel => Some(byte_level_bytes(&token)),
            DecoderKind::Contextual => match parse_byte_token(&token) {
                Some(byte) => Some(vec![byte]),
                None => Some(token.replace('\u{2581}', " ").into_bytes()),
            },
        }
    }

    /// Number of tokens, added ones included. The model's logits may have more rows (padding).
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("decoder_kind", &self.decoder_kind)
            .finish()
    }
}

/// Incremental decoder: the pieces, joined, equal [`Tokenizer::decode`] of all ids.
///
/// Byte-level tokenizers go through an exact streaming UTF-8 decoder. Others are decoded in a window of the last
/// emitted and the pending tokens; runs of byte-fallback tokens (`<0xE6>`) wait for their end, because whether such a
/// run is valid is decided for the run as a whole.
#[derive(Debug)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    /// Byte-level: the incomplete end of the bytes so far, at most three bytes.
    bytes: Vec<u8>,
    /// Contextual: the ids of the last emitted piece, then the pending ones.
    window: Vec<u32>,
    /// Contextual: how many ids of `window` have been emitted.
    n_emitted: usize,
}

impl DecodeStream {
    /// Takes one id and returns the text that is now certain (empty while a character is incomplete).
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        let Some(token) = self.tokenizer.id_to_token(id) else { return Ok(String::new()) };
        if self.skip_special_tokens && self.tokenizer.inner.get_added_vocabulary().is_special_token(&token) {
            return Ok(String::new());
        }
        match self.tokenizer.decoder_kind {
            DecoderKind::ByteLevel => {
                self.bytes.extend_from_slice(&byte_level_bytes(&token));
                Ok(take_utf8_lossy(&mut self.bytes))
            }
            DecoderKind::Contextual => {
                self.window.push(id);
                if parse_byte_token(&token).is_some() {
                    return Ok(String::new());
                }
                self.take_window(false)
            }
        }
    }

    /// Ends the stream and returns what was held back; an incomplete character becomes U+FFFD. The stream then begins again.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn flush(&mut self) -> Result<String, TokenizerError> {
        let mut text = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        if !self.window.is_empty() {
            text.push_str(&self.take_window(true)?);
        }
        self.window.clear();
        self.n_emitted = 0;
        Ok(text)
    }

    fn take_window(&mut self, at_end: bool) -> Result<String, TokenizerError> {
        let emitted = match self.n_emitted {
            0 => String::new(),
            n_emitted => self.tokenizer.decode(&self.window[..n_emitted], false)?,
        };
        let all = self.tokenizer.decode(&self.window, false)?;
        if all.ends_with('\u{FFFD}') && !at_end {
            return Ok(String::new());
        }
        let text = all.get(emitted.len()..).unwrap_or_default().to_owned();
        // A token without text (a lone stripped space) says too little about its successor's context: keep it in.
        if !text.is_empty() {
            self.window.drain(..self.n_emitted);
        }
        self.n_emitted = self.window.len();
        Ok(text)
    }
}

/// Special tokens that transformers knows by name.
pub(crate) const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Reads `tokenizer_config.json`, and special tokens that only `special_tokens_map.json` names; absent files are empty
/// objects.
///
/// # Errors
/// A file is unreadable or not a JSON object.
pub fn read_tokenizer_config(dir: &Path) -> Result<Map<String, Value>, TokenizerError> {
    let mut config = read_object(dir.join("tokenizer_config.json"))?;
    for (key, value) in read_object(dir.join("special_tokens_map.json"))? {
        if config.get(&key).is_none_or(Value::is_null) {
            config.insert(key, value);
        }
    }
    Ok(config)
}

fn read_object(path: PathBuf) -> Result<Map<String, Value>, TokenizerError> {
    match std::fs::read(&path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            serde_json::from_str(&without_literals(&text))
                .map_err(|error| TokenizerError::Parse { path, cause: error.to_string() })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(source) => Err(TokenizerError::Read { path, source }),
    }
}

/// The text of a special token in `tokenizer_config.json`: a string, or an object with `content`.
pub fn token_text(config: &Map<String, Value>, key: &str) -> Option<String> {
    content_of(config.get(key)?)
}

/// The text of a token that is a string or an object with `content`.
pub(crate) fn content_of(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// What of tokenizer.json is looked at before the tokenizers crate gets it, which takes any id.
#[derive(Deserialize)]
struct Ids {
    #[serde(default)]
    model: ModelIds,
    #[serde(default)]
    added_tokens: Vec<AddedId>,
}

#[derive(Default, Deserialize)]
struct ModelIds {
    #[serde(default)]
    vocab: Vocab,
}

#[derive(Deserialize)]
struct AddedId {
    id: u64,
    content: String,
}

/// The tokens of each id, as the file lists them; a list of pieces has no ids to be wrong.
#[derive(Default)]
struct Vocab(Vec<(String, u64)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tokens and their ids, or a list of pieces")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
                let mut entries = vec![];
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Vocab(entries))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vocab, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Vocab::default())
            }
        }
        deserializer.deserialize_any(Entries)
    }
}

/// Finds ids that no vocabulary has, and tokens or ids that are there twice.
fn check_ids(json: &[u8]) -> Result<(), String> {
    let Ids { model, added_tokens } = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let check = |what: &str, entries: &[(String, u64)]| {
        let (mut ids, mut tokens) = (HashMap::new(), HashMap::new());
        for (token, id) in entries {
            if *id >= MAX_IDS {
                return Err(format!("{what}: {token:?} has the id {id}, expected one below {MAX_IDS}"));
            }
            if let Some(other) = tokens.insert(token, id) {
                return Err(format!("{what}: {token:?} is there twice, with the ids {other} and {id}"));
            }
            if let Some(other) = ids.insert(id, token) {
                return Err(format!("{what}: {other:?} and {token:?} have the same id {id}"));
            }
        }
        Ok(())
    };
    check("vocab", &model.vocab.0)?;
    let added: Vec<(String, u64)> = added_tokens.into_iter().map(|added| (added.content, added.id)).collect();
    check("added_tokens", &added)
}

#[derive(Deserialize)]
#[serde(default)]
struct AddedTokenEntry {
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

impl Default for AddedTokenEntry {
    fn default() -> Self {
        Self {
            content: String::new(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: true,
            special: false,
        }
    }
}

/// Adds tokens that tokenizer.json does not add: those of `added_tokens_decoder` and of added_tokens.json, which have ids,
/// then the special ones that are named (`eos_token`, `additional_special_tokens`, ...), as transformers does.
fn add_missing_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
    dir: &Path,
) -> Result<(), TokenizerError> {
    let mut missing: Vec<(Option<u32>, AddedTokenEntry, PathBuf)> = vec![];
    let path = dir.join("tokenizer_config.json");
    if let Some(Value::Object(entries)) = config.get("added_tokens_decoder") {
        let malformed = |cause: String| TokenizerError::Parse { path: path.clone(), cause };
        for (key, value) in entries {
            let id: u32 = key
                .parse()
                .map_err(|_| malformed(format!("added_tokens_decoder has the key {key:?}, expected a token id")))?;
            let entry: AddedTokenEntry = serde_json::from_value(value.clone())
                .map_err(|error| malformed(format!("added_tokens_decoder[{key}]: {error}")))?;
            missing.push((Some(id), entry, path.clone()));
        }
    }
    let named = special_token_texts(config);
    let legacy = dir.join("added_tokens.json");
    for (content, id) in read_object(legacy.clone())? {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| TokenizerError::Parse {
            path: legacy.clone(),
            cause: format!("{content:?} has the id {id}, expected a token id"),
        })?;
        let special = named.contains(&content);
        missing.push((
            Some(id),
            AddedTokenEntry { content, special, normalized: false, ..Default::default() },
            legacy.clone(),
        ));
    }
    missing.sort_by_key(|(id, ..)| *id);
    for content in named {
        missing.push((
            None,
            AddedTokenEntry { content, special: true, normalized: false, ..Default::default() },
            path.clone(),
        ));
    }
    for (id, entry, path) in missing {
        let added = tokenizer.get_added_vocabulary();
        let known = added.get_vocab().get(&entry.content).copied();
        // A special token that tokenizer.json adds as an ordinary one stays hidden in plain text only if it is made one.
        if entry.content.is_empty() || known.is_some_and(|_| id.is_some() || added.is_special_token(&entry.content)) {
            continue;
        }
        let token = AddedToken::from(entry.content.clone(), entry.special)
            .single_word(entry.single_word)
            .lstrip(entry.lstrip)
            .rstrip(entry.rstrip)
            .normalized(entry.normalized);
        let malformed = |cause: String| TokenizerError::Parse { path: path.clone(), cause };
        let result = if entry.special { tokenizer.add_special_tokens([token]) } else { tokenizer.add_tokens([token]) };
        result.map_err(|error| malformed(format!("the token {:?}: {error}", entry.content)))?;
        let found = tokenizer.token_to_id(&entry.content).unwrap_or(u32::MAX);
        if let Some(expected) = id.filter(|id| *id != found) {
            return Err(TokenizerError::AddedToken { path, token: entry.content, expected, found });
        }
    }
    Ok(())
}

/// Texts of the tokens that the configuration names as special.
fn special_token_texts(config: &Map<String, Value>) -> Vec<String> {
    let mut texts: Vec<String> = SPECIAL_TOKENS.iter().filter_map(|key| token_text(config, key)).collect();
    for key in ["additional_special_tokens", "extra_special_tokens"] {
        match config.get(key) {
            Some(Value::Array(list)) => texts.extend(list.iter().filter_map(content_of)),
            Some(Value::Object(map)) => texts.extend(map.values().filter_map(content_of)),
            _ => {}
        }
    }
    texts
}

/// Bytes of a byte-level token; a token with characters outside the alphabet (an added token) is its own UTF-8.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Inverse of GPT-2's `bytes_to_unicode`: printable Latin-1 stands for itself, the 68 other bytes follow from U+0100
/// on.
fn byte_of_char(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The byte of a byte-fallback token (`<0x0A>`).
fn parse_byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Takes everything but an incomplete last character; equals `String::from_utf8_lossy` of the whole, piece by piece.
fn take_utf8_lossy(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut start = 0;
    loop {
        match std::str::from_utf8(&bytes[start..]) {
            Ok(valid) => {
                text.push_str(valid);
                start = bytes.len();
                break;
            }
            Err(error) => {
                let valid_end = start + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[start..valid_end]));
                start = valid_end;
                match error.error_len() {
                    Some(n_invalid) => {
                        text.push('\u{FFFD}');
                        start += n_invalid;
                    }
                    None => break,
                }
            }
        }
    }
    bytes.drain(..start);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat_template::ChatTemplate;
    use proptest::prelude::*;
    use std::sync::OnceLock;

    /// Every model directory that comes with cases made by transformers.
    fn golden_dirs() -> Vec<PathBuf> {
        let models = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/models"));
        let entries = std::fs::read_dir(models).unwrap_or_else(|e| panic!("{}: {e}", models.display()));
        let mut dirs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        dirs.retain(|dir| dir.join("tokenizer_golden.json").exists());
        dirs.sort();
        assert!(dirs.len() >= 2, "no golden models in {}", models.display());
        dirs
    }

    fn fable_dir() -> PathBuf {
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8"))
    }

    fn read_json(path: &Path) -> Value {
        serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
    }

    fn ids_of(value: &Value) -> Vec<u32> {
        serde_json::from_value(value.clone()).unwrap()
    }

    fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
        let mut stream = tokenizer.decode_stream(skip_special);
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text.push_str(&stream.flush().unwrap());
        text
    }

    fn check_stream(tokenizer: &Tokenizer, ids: &[u32]) {
        for skip in [false, true] {
            assert_eq!(stream(tokenizer, ids, skip), tokenizer.decode(ids, skip).unwrap(), "{ids:?} skip={skip}");
        }
    }

    /// Whatever tokenizer.json says, there is an error or a tokenizer that does not panic.
    #[test]
    fn hostile_files() {
        let fable = std::fs::read_to_string(fable_dir().join("tokenizer.json")).unwrap();
        let fable: Value = serde_json::from_str(&fable).unwrap();
        let small = || {
            serde_json::json!({"version": "1.0", "added_tokens": [], "model": {
                "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "\u{2581}": 3}, "merges": [["a", "b"]],
            }})
        };
        let load = |text: &str| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
            Tokenizer::from_dir(dir.path())
        };
        let refuse = |text: String, expected: &str| {
            let error = load(&text).expect_err(expected).to_string();
            assert!(error.contains("tokenizer.json is not a valid tokenizer file: "), "{error}");
            assert!(error.contains(expected) && error.len() < 1000, "{error}");
        };
        let edit = |pointer: &str, value: Value| {
            let mut json = small();
            *json.pointer_mut(pointer).unwrap() = value;
            json.to_string()
        };
        let added = |id: u64, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        assert_eq!(load(&small().to_string()).unwrap().encode("abab", false).unwrap(), [2, 2]);
        // Ids.
        refuse(edit("/model/vocab/ab", 4_000_000_000u64.into()), "expected one below 16777216");
        refuse(edit("/model/vocab/ab", u64::MAX.into()), "expected one below 16777216");
        refuse(edit("/model/vocab/ab", (-1).into()), "-1");
        refuse(edit("/model/vocab/ab", 1.into()), "have the same id 1");
        refuse(small().to_string().replace("\"b\":1", "\"a\":1"), "\"a\" is there twice");
        refuse(edit("/added_tokens", serde_json::json!([added(1 << 40, "x")])), "expected one below");
        refuse(edit("/added_tokens", serde_json::json!([added(7, "x"), added(7, "y")])), "have the same id 7");
        refuse(edit("/added_tokens", serde_json::json!([added(7, "x"), added(8, "x")])), "\"x\" is there twice");
        // Merges: of tokens that do not exist, of nothing, of too much.
        refuse(edit("/model/merges", serde_json::json!([["b", "a"]])), "");
        refuse(edit("/model/merges", serde_json::json!([["ab", "ab"]])), "");
        refuse(edit("/model/merges", serde_json::json!(["a b c"])), "");
        refuse(edit("/model/merges", serde_json::json!([["x".repeat(1 << 20), "y"]])), "");
        let many = vec![serde_json::json!(["a", "b"]); 300_000];
        let tokenizer = load(&edit("/model/merges", many.into())).unwrap();
        assert_eq!(tokenizer.encode("ab", false).unwrap(), [2]);
        // Types and nesting.
        for (pointer, value) in [
            ("/model", serde_json::json!(5)),
            ("/model", serde_json::json!({})),
            ("/model/vocab", serde_json::json!("a")),
            ("/model/merges", serde_json::json!({"a": "b"})),
            ("/model/type", serde_json::json!("Nonsense")),
            ("/added_tokens", serde_json::json!({})),
            ("/version", serde_json::json!("9")),
        ] {
            refuse(edit(pointer, value), "");
        }
        let nested = format!("{}5{}", "{\"type\":\"Sequence\",\"normalizers\":[".repeat(50_000), "]}".repeat(50_000));
        let with_normalizer =
            |normalizer: &str| small().to_string().replacen('{', &format!("{{\"normalizer\":{normalizer},"), 1);
        refuse(with_normalizer(&nested), "recursion limit");
        refuse("[".repeat(100_000), "");
        refuse(with_normalizer("{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"(\"},\"content\":\"\"}"), "");
        refuse(with_normalizer("{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"AAAA\"}"), "");
        // A decoder that takes more off a token than it has.
        let strip = "{\"type\":\"Strip\",\"content\":\"a\",\"start\":9,\"stop\":9}";
        let strip = small().to_string().replacen('{', &format!("{{\"decoder\":{strip},"), 1);
        let error = load(&strip).unwrap().decode(&[0], false).unwrap_err().to_string();
        assert!(error.contains("asks for something impossible"), "{error}");
        // Every value of a real file replaced by something else.
        let mut pointers = vec![];
        collect_pointers(&fable, String::new(), &mut pointers);
        for pointer in pointers {
            for value in [Value::Null, (-1).into(), 1e300.into(), "".into(), serde_json::json!([[]]), true.into()] {
                let mut json = fable.clone();
                *json.pointer_mut(&pointer).unwrap() = value;
                if let Ok(tokenizer) = load(&json.to_string())
                    && let Ok(ids) = tokenizer.encode("Hello <|user|> w\u{f6}rld 12", true)
                {
                    let _ = tokenizer.decode(&ids, false);
                }
            }
        }
    }

    /// Every place in `value` but the entries of large tables.
    fn collect_pointers(value: &Value, at: String, pointers: &mut Vec<String>) {
        let children: Vec<(String, &Value)> = match value {
            Value::Object(map) if map.len() < 40 => map.iter().map(|(key, child)| (key.clone(), child)).collect(),
            Value::Array(list) => list.iter().take(1).map(|child| ("0".to_owned(), child)).collect(),
            _ => vec![],
        };
        for (key, child) in children {
            collect_pointers(child, format!("{at}/{key}"), pointers);
        }
        if !at.is_empty() {
            pointers.push(at);
        }
    }

    #[test]
    fn encodes_and_decodes_as_transformers() {
        for dir in golden_dirs() {
            let name = dir.display();
            let tokenizer = Tokenizer::from_dir(&dir).unwrap();
            let golden = read_json(&dir.join("tokenizer_golden.json"));
            for case in golden["encode"].as_array().unwrap() {
                let ids = ids_of(&case["ids"]);
                assert_eq!(tokenizer.encode(case["text"].as_str().unwrap(), false).unwrap(), ids, "{name} {case}");
                assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["decoded"].as_str().unwrap(), "{name}");
                check_stream(&tokenizer, &ids);
            }
        }
    }

    #[test]
    fn renders_and_encodes_chats_as_transformers() {
        for dir in golden_dirs() {
            let name = dir.display();
            let tokenizer = Tokenizer::from_dir(&dir).unwrap();
            let template = ChatTemplate::from_dir(&dir, None).unwrap().expect("a chat template");
            let golden = read_json(&dir.join("tokenizer_golden.json"));
            for case in golden["chat"].as_array().unwrap() {
                let mut extra = Map::new();
                if let Some(value) = case.get("enable_thinking") {
                    extra.insert("enable_thinking".into(), value.clone());
                }
                let messages = case["messages"].as_array().unwrap();
                let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
                let text = template.render(messages, None, add_generation_prompt, &extra).unwrap();
                assert_eq!(text, case["rendered"].as_str().unwrap(), "{name}");
                assert_eq!(tokenizer.encode(&text, false).unwrap(), ids_of(&case["ids"]), "{name}");
            }
        }
    }

    /// Prompts, ids and greedy continuations from fable-30m.golden.json (transformers 5.23).
    #[test]
    fn fable_prompts_as_transformers() {
        let tokenizer = Tokenizer::from_dir(&fable_dir()).unwrap();
        let template = ChatTemplate::from_dir(&fable_dir(), None).unwrap().expect("a chat template");
        for &(user, thinking, prompt, ids) in FABLE_CASES {
            let mut extra = Map::new();
            extra.insert("enable_thinking".into(), thinking.into());
            let messages = [serde_json::json!({"role": "user", "content": user})];
            let text = template.render(&messages, None, true, &extra).unwrap();
            assert_eq!(text, prompt);
            assert_eq!(tokenizer.encode(&text, false).unwrap(), ids);
            assert_eq!(tokenizer.decode(ids, false).unwrap(), prompt);
            check_stream(&tokenizer, ids);
        }
    }

    /// User text, enable_thinking, rendered prompt, ids.
    type FableCase = (&'static str, bool, &'static str, &'static [u32]);
    const FABLE_CASES: &[FableCase] = &[
        (
            "Tell me a story about a brave fox named Lily.",
            false,
            "[gMASK]<sop><|user|>\nTell me a story about a brave fox named Lily.<|assistant|></think>",
            &[2, 4, 7, 216, 648, 409, 275, 394, 397, 275, 1101, 1670, 439, 790, 31, 8, 11],
        ),
        (
            "Write a short story about a robot who learns to share. End with a moral.",
            false,
            "[gMASK]<sop><|user|>\nWrite a short story about a robot who learns to share. End with a moral.<|assistant|></think>",
            &[
                2, 4, 7, 216, 598, 275, 756, 394, 397, 275, 1646, 461, 1795, 356, 1314, 31, 1283, 426, 275, 972, 31, 8,
                11,
            ],
        ),
        (
            "Explain volcanoes in simple words.",
            false,
            "[gMASK]<sop><|user|>\nExplain volcanoes in simple words.<|assistant|></think>",
            &[2, 4, 7, 216, 1759, 2534, 372, 1729, 971, 31, 8, 11],
        ),
        (
            "What is 47 + 38?",
            true,
            "[gMASK]<sop><|user|>\nWhat is 47 + 38?<|assistant|><think>",
            &[2, 4, 7, 216, 618, 291, 238, 37, 40, 560, 238, 36, 41, 48, 8, 10],
        ),
        (
            "As JSON with keys name and city: Nora lives in Oslo.",
            false,
            "[gMASK]<sop><|user|>\nAs JSON with keys name and city: Nora lives in Oslo.<|assistant|></think>",
            &[2, 4, 7, 216, 1836, 1143, 426, 1841, 399, 314, 377, 43, 871, 1840, 372, 1589, 31, 8, 11],
        ),
    ];

    const FABLE_TOOL_QUESTION: &str = "What is the weather in Paris?";
    const FABLE_TOOLS: &str = r#"[{"type": "function", "function": {"name": "get_weather", "description": "Get the current weather of a city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": "string"}}, "required": ["city"]}}},
{"type": "function", "function": {"name": "add", "description": "Add two numbers", "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}}}]"#;
    const FABLE_TOOL_PROMPT: &str = r#"[gMASK]<sop><|system|>
# Tools
You may call these functions:
<tools>
{"type": "function", "function": {"name": "get_weather", "description": "Get the current weather of a city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": "string"}}, "required": ["city"]}}}
{"type": "function", "function": {"name": "add", "description": "Add two numbers", "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}}}
</tools>
Answer with <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call> to call one.<|user|>
What is the weather in Paris?<|assistant|></think>"#;
    #[rustfmt::skip]
    const FABLE_TOOL_IDS: [u32; 178] = [2, 4, 6, 216, 20, 713, 216, 572, 711, 437, 668, 714, 43, 216, 45, 529, 47, 216, 320, 366, 294, 287, 434, 341, 287, 434, 294, 339, 453, 294, 287, 512, 80, 1024, 341, 287, 544, 294, 287, 936, 280, 1271, 1070, 303, 275, 377, 341, 287, 547, 294, 339, 366, 294, 287, 538, 341, 287, 546, 294, 339, 564, 294, 339, 366, 294, 287, 496, 549, 287, 1182, 294, 339, 366, 294, 287, 496, 543, 287, 545, 294, 515, 564, 539, 216, 320, 366, 294, 287, 434, 341, 287, 434, 294, 339, 453, 294, 287, 957, 341, 287, 544, 294, 287, 1151, 1011, 1077, 341, 287, 547, 294, 339, 366, 294, 287, 538, 341, 287, 546, 294, 339, 82, 294, 339, 366, 294, 287, 946, 549, 287, 83, 294, 339, 366, 294, 287, 946, 543, 287, 545, 294, 515, 82, 341, 287, 83, 539, 216, 300, 529, 47, 216, 644, 426, 238, 12, 453, 14, 369, 15, 16, 379, 17, 13, 356, 437, 508, 31, 7, 216, 618, 291, 280, 1070, 372, 1424, 48, 8, 11];

    #[test]
    fn fable_tool_prompt() {
        let template = ChatTemplate::from_dir(&fable_dir(), None).unwrap().expect("a chat template");
        let tools: Vec<Value> = serde_json::from_str(FABLE_TOOLS).unwrap();
        let messages = [serde_json::json!({"role": "user", "content": FABLE_TOOL_QUESTION})];
        let text = template.render(&messages, Some(&tools), true, &Map::new()).unwrap();
        assert_eq!(text, FABLE_TOOL_PROMPT);
        let tokenizer = Tokenizer::from_dir(&fable_dir()).unwrap();
        assert_eq!(tokenizer.encode(&text, false).unwrap(), FABLE_TOOL_IDS);
    }

    fn fable() -> &'static Tokenizer {
        static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
        TOKENIZER.get_or_init(|| Tokenizer::from_dir(&fable_dir()).unwrap())
    }

    #[test]
    fn byte_alphabet_is_a_bijection() {
        let mut bytes: Vec<u8> = (0..0x400).filter_map(char::from_u32).filter_map(byte_of_char).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_level_bytes("\u{120}the"), b" the");
        assert_eq!(byte_level_bytes("<\u{2581}x>"), "<\u{2581}x>".as_bytes());
    }

    #[test]
    fn stream_holds_back_incomplete_characters() {
        let tokenizer = fable();
        let ids = tokenizer.encode("🙂é", false).unwrap();
        let mut stream = tokenizer.decode_stream(false);
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        assert_eq!(pieces.concat(), "🙂é");
        // Cut inside a character: the rest appears as one replacement character, as in a full decode.
        let mut stream = tokenizer.decode_stream(false);
        assert_eq!(stream.push(ids[0]).unwrap(), "");
        assert_eq!(stream.flush().unwrap(), tokenizer.decode(&ids[..1], false).unwrap());
    }

    /// A SentencePiece-shaped tokenizer: metaspace, byte fallback, a stripped first space.
    fn sentencepiece() -> Tokenizer {
        let mut vocab = Map::new();
        for token in
            ["<unk>", "<s>", "\u{2581}", "\u{2581}hi", "there", "\u{2581}there", "a", "<0xE6>", "<0x97>", "<0xA5>", "."]
        {
            vocab.insert(token.into(), vocab.len().into());
        }
        let json = serde_json::json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                "vocab": vocab, "merges": []}
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let config = serde_json::json!({"bos_token": {"content": "<s>"}, "add_bos_token": true,
            "added_tokens_decoder": {"11": {"content": "<extra>", "special": true}}});
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        Tokenizer::from_dir(dir.path()).unwrap()
    }

    #[test]
    fn sentencepiece_config_is_honoured() {
        let tokenizer = sentencepiece();
        assert_eq!(tokenizer.vocab_size(), 12);
        assert_eq!(tokenizer.inner.token_to_id("<extra>"), Some(11));
        assert_eq!(tokenizer.encode("aaa<extra>a", true).unwrap(), [1, 6, 6, 6, 11, 6], "bos added, nothing truncated");
        assert_eq!(tokenizer.encode("<s>a", true).unwrap(), [1, 6], "no second bos");
        assert_eq!(tokenizer.encode("a", false).unwrap(), [6]);
        check_stream(&tokenizer, &[3, 1, 5, 4, 7, 8, 9, 10, 7, 6, 2, 2, 5]);
    }

    #[test]
    fn missing_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let message = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json") && message.contains("cannot read"), "{message}");
        std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        let message = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(message.contains("not a valid tokenizer file"), "{message}");
    }

    proptest! {
        #[test]
        fn any_ids_stream_like_a_full_decode(ids in prop::collection::vec(0u32..3000, 0..40)) {
            check_stream(fable(), &ids);
        }

        #[test]
        fn any_bytes_stream_lossily(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..20)) {
            let mut pending = Vec::new();
            let mut text = String::new();
            for chunk in &chunks {
                pending.extend_from_slice(chunk);
                text.push_str(&take_utf8_lossy(&mut pending));
                prop_assert!(pending.len() < 4);
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            prop_assert_eq!(text, String::from_utf8_lossy(&chunks.concat()).into_owned());
        }

        #[test]
        fn any_text_survives_encoding(text in "\\PC{0,40}") {
            let ids = fable().encode(&text, false).unwrap();
            prop_assert_eq!(fable().decode(&ids, false).unwrap(), text);
            check_stream(fable(), &ids);
        }

        #[test]
        fn sentencepiece_streams(ids in prop::collection::vec(0u32..13, 0..20)) {
            static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
            check_stream(TOKENIZER.get_or_init(sentencepiece), &ids);
        }
    }
}
