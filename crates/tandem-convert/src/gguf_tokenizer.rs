//! tokenizer.json, tokenizer_config.json and generation_config.json from a GGUF file's metadata.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tandem_core::ModelConfig;
use tandem_core::gguf::{Gguf, Value as Meta};
use tandem_text::ends_by_name;

/// Token types of llama.cpp.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Llama 3's pattern, which GLM-4 uses too.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// Writes the files; none of a tokenizer when the GGUF has none.
pub(super) fn write(gguf: &Gguf, config: &ModelConfig, out: &Path) -> anyhow::Result<()> {
    for (name, value) in files(gguf, config)? {
        let path = out.join(name);
        // Never through a link.
        if path.symlink_metadata().is_ok() {
            std::fs::remove_file(&path).with_context(|| format!("cannot replace {}", path.display()))?;
        }
        std::fs::write(&path, serde_json::to_vec_pretty(&value)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Names and contents of the files.
pub(super) fn files(gguf: &Gguf, config: &ModelConfig) -> anyhow::Result<Vec<(&'static str, Value)>> {
    let mut files = vec![];
    let mut save = |name, value: &Value| files.push((name, value.clone()));
    let get = |key: &str| gguf.get(&format!("tokenizer.ggml.{key}"));
    let model = get("model").and_then(Meta::as_str).unwrap_or("none");
    let n_tokens = get("tokens").and_then(Meta::as_list).map_or(config.vocab_size, <[Meta]>::len);
    // llama.cpp's defaults of a SentencePiece vocabulary.
    let default = |key: &str| match (model, key) {
        ("llama", "unknown") => Some(0),
        ("llama", "bos") => Some(1),
        ("llama", "eos") => Some(2),
        _ => None,
    };
    // Ids beyond the vocabulary are passed over, as llama.cpp does.
    let id = |key: &str| {
        let found = get(&format!("{key}_token_id")).and_then(Meta::as_usize).or_else(|| default(key));
        found.filter(|id| *id < n_tokens)
    };
    let mut eos: Vec<usize> = [id("eos"), id("eot"), id("eom")].into_iter().flatten().collect();
    let generation =
        |eos: &[usize]| json!({"bos_token_id": id("bos"), "eos_token_id": eos, "pad_token_id": id("padding")});
    if model == "none" {
        eos.dedup();
        save("generation_config.json", &generation(&eos));
        return Ok(files);
    }
    let tokens: Vec<&str> = get("tokens")
        .and_then(Meta::as_list)
        .context("its metadata has no tokenizer.ggml.tokens")?
        .iter()
        .map(|token| token.as_str().context("tokenizer.ggml.tokens must be texts"))
        .collect::<anyhow::Result<_>>()?;
    if tokens.len() > config.vocab_size {
        bail!("it has {} tokens for a vocabulary of {}", tokens.len(), config.vocab_size);
    }
    let mut types: Vec<i64> = match get("token_type").and_then(Meta::as_list) {
        Some(types) => types.iter().map(|t| t.as_usize().map_or(1, |t| t as i64)).collect(),
        None => vec![1; tokens.len()],
    };
    if types.len() != tokens.len() {
        bail!("it has {} token types for {} tokens", types.len(), tokens.len());
    }
    // What ends a turn by its name is a control token, and an end, whatever the file says: llama.cpp corrects it so.
    let ends = ends_by_name(|name| tokens.contains(&name));
    for (token, kind) in tokens.iter().zip(&mut types) {
        if ends.contains(token) {
            *kind = CONTROL;
        }
    }
    eos.extend(tokens.iter().enumerate().filter(|(_, token)| ends.contains(token)).map(|(id, _)| id));
    let mut seen = HashSet::new();
    eos.retain(|id| seen.insert(*id));
    save("generation_config.json", &generation(&eos));
    let added: Vec<Value> = tokens
        .iter()
        .zip(&types)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED) || (model == "llama" && **kind == UNKNOWN))
        .map(|(id, (token, kind))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                   "special": *kind != USER_DEFINED})
        })
        .collect();
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))).collect();
    if vocab.len() != tokens.len() {
        bail!("tokenizer.ggml.tokens has a token twice");
    }
    let text_of = |key: &str| id(key).and_then(|id| tokens.get(id)).map(|token| token.to_string());
    let parts = match model {
        "gpt2" => byte_level(get("pre").and_then(Meta::as_str), get("merges"))?,
        "llama" => {
            let scores = get("scores").and_then(Meta::as_list).context("its metadata has no tokenizer.ggml.scores")?;
            let scores: Vec<f64> = scores.iter().filter_map(Meta::as_f64).collect();
            if scores.len() != tokens.len() {
                bail!("it has {} scores for {} tokens", scores.len(), tokens.len());
            }
            sentence_piece(
                &tokens,
                &scores,
                get("add_space_prefix").and_then(Meta::as_bool).unwrap_or(true),
                text_of("unknown"),
            )
        }
        other => bail!("its tokenizer is of kind {other:?}; read are gpt2 (byte-level BPE) and llama (SentencePiece)"),
    };
    let has_bos = model == "llama" || get("pre").and_then(Meta::as_str).is_some_and(is_llama3);
    let add_bos = get("add_bos_token").and_then(Meta::as_bool).unwrap_or(has_bos);
    let post_processor = match (add_bos, text_of("bos"), id("bos")) {
        (true, Some(bos), Some(id)) => json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos.clone(): {"id": bos, "ids": [id], "tokens": [bos]}},
        }),
        _ => Value::Null,
    };
    let mut bpe = json!({
        "type": "BPE", "dropout": null, "unk_token": parts.unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": parts.byte_fallback, "byte_fallback": parts.byte_fallback,
        "ignore_merges": parts.ignore_merges,
    });
    bpe["vocab"] = Value::Object(vocab);
    bpe["merges"] = parts.merges;
    save(
        "tokenizer.json",
        &json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": parts.normalizer,
            "pre_tokenizer": parts.pre_tokenizer, "post_processor": post_processor, "decoder": parts.decoder, "model": bpe,
        }),
    );
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.max_position_embeddings,
        "add_bos_token": add_bos,
    });
    for (key, name) in [("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")]
    {
        if let Some(text) = text_of(key) {
            settings[name] = json!(text);
        }
    }
    let prefix = "tokenizer.chat_template";
    let variants = gguf.metadata().filter_map(|(key, value)| {
        let name = key.strip_prefix(prefix)?.strip_prefix('.')?;
        Some(json!({"name": name, "template": value.as_str()?}))
    });
    let variants: Vec<Value> = variants.collect();
    match gguf.get(prefix).and_then(Meta::as_str) {
        Some(template) if variants.is_empty() => settings["chat_template"] = json!(template),
        Some(template) => {
            let default = json!({"name": "default", "template": template});
            settings["chat_template"] = std::iter::once(default).chain(variants).collect();
        }
        None if !variants.is_empty() => settings["chat_template"] = json!(variants),
        None => {}
    }
    save("tokenizer_config.json", &settings);
    Ok(files)
}

/// Names of Llama 3's pre-tokenizer, which comes with a first token.
fn is_llama3(pre: &str) -> bool {
    matches!(pre, "llama-bpe" | "llama3" | "llama-v3")
}

/// What differs between kinds of BPE.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    merges: Value,
    unknown: Option<String>,
    byte_fallback: bool,
    ignore_merges: bool,
}

fn byte_level(pre: Option<&str>, merges: Option<&Meta>) -> anyhow::Result<Parts> {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let sequence = |parts: Vec<Value>| json!({"type": "Sequence", "pretokenizers": parts});
    let pre = pre.unwrap_or_else(|| {
        tracing::warn!(
            "the file names no pre-tokenizer (tokenizer.ggml.pre): llama.cpp's default is taken, which may not be the \
             model's; --tokenizer DIR takes the original's"
        );
        "default"
    });
    let pre_tokenizer = match pre {
        "default" => sequence(vec![
            split(r"[\p{P}\$\+<=>\^~\|]+"),
            split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
            bytes(false),
        ]),
        "gpt-2" | "gpt2" | "mpt" | "olmo" | "phi-2" | "jina-es" | "jina-de" => bytes(true),
        "smollm" | "codeshell" | "refact" | "command-r" => {
            sequence(vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)])
        }
        "llama-bpe" | "llama3" | "llama-v3" | "glm4" | "chatglm-bpe" | "dbrx" | "smaug-bpe" => {
            sequence(vec![split(LLAMA3), bytes(false)])
        }
        "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "hunyuan" => sequence(vec![split(QWEN2), bytes(false)]),
        "deepseek-v3" => {
            sequence(vec![split(r"\p{N}{1,3}"), split("[一-龥\u{3040}-ゟ゠-ヿ]+"), split(DEEPSEEK3), bytes(false)])
        }
        other => bail!(
            "its tokenizer's pre-tokenizer is {other:?}; read are gpt-2, smollm, llama-bpe, glm4, chatglm-bpe, qwen2 and \
             deepseek-v3. --tokenizer DIR takes the tokenizer of the original model"
        ),
    };
    let merges = merges.and_then(Meta::as_list).context("its metadata has no tokenizer.ggml.merges")?;
    let merges: Vec<Value> = merges
        .iter()
        .map(|merge| {
            let (left, right) =
                merge.as_str().and_then(|m| m.split_once(' ')).context("tokenizer.ggml.merges must be pairs")?;
            Ok(json!([left, right]))
        })
        .collect::<anyhow::Result<_>>()?;
    Ok(Parts {
        normalizer: Value::Null,
        pre_tokenizer,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        merges: json!(merges),
        unknown: None,
        byte_fallback: false,
        ignore_merges: matches!(pre, "llama-bpe" | "llama3" | "llama-v3" | "glm4" | "chatglm-bpe"),
    })
}

/// SentencePiece's BPE: every way to cut a token into two others is a merge, best score first (as Hugging Face's
/// converter does).
fn sentence_piece(tokens: &[&str], scores: &[f64], prefix: bool, unknown: Option<String>) -> Parts {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let mut merges: Vec<(f64, usize, usize)> = vec![];
    for (token, score) in tokens.iter().zip(scores) {
        let cuts = token.char_indices().skip(1).map(|(i, _)| token.split_at(i));
        let mut of_token: Vec<(usize, usize)> =
            cuts.filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?))).collect();
        of_token.sort_unstable();
        merges.extend(of_token.into_iter().map(|(left, right)| (*score, left, right)));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    let merges: Vec<Value> = merges.iter().map(|(_, left, right)| json!([tokens[*left], tokens[*right]])).collect();
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut normalizers = vec![replace];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        merges: json!(merges),
        unknown,
        byte_fallback: true,
        ignore_merges: false,
    }
}
