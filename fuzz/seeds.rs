//! Writes seed inputs from the fixtures into `fuzz/corpus/{config,checkpoint,gguf,gguf_tokenizer,grammar,template,tokenizer,page_store}`:
//! `cargo run --bin seeds`.

use std::path::Path;

use serde_json::{Value, json};

/// Sizes that keep a made-up file of the same structure small.
const SMALL: [(&str, usize); 16] = [
    ("vocab_size", 64),
    ("hidden_size", 64),
    ("intermediate_size", 64),
    ("moe_intermediate_size", 64),
    ("num_hidden_layers", 2),
    ("first_k_dense_replace", 1),
    ("num_attention_heads", 2),
    ("num_key_value_heads", 2),
    ("q_lora_rank", 64),
    ("kv_lora_rank", 64),
    ("qk_nope_head_dim", 64),
    ("v_head_dim", 64),
    ("n_routed_experts", 8),
    ("index_n_heads", 2),
    ("num_experts_per_tok", 2),
    ("head_dim", 32),
];

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for target in ["config", "checkpoint", "gguf", "gguf_tokenizer", "grammar", "template", "tokenizer", "page_store"] {
        std::fs::create_dir_all(root.join("corpus").join(target))?;
    }
    let write =
        |target: &str, name: String, bytes: &[u8]| std::fs::write(root.join("corpus").join(target).join(name), bytes);
    for entry in std::fs::read_dir(root.join("../tests/golden/models"))? {
        let dir = entry?.path();
        let name = dir.file_name().unwrap_or_default().to_string_lossy().to_string();
        let text = std::fs::read_to_string(dir.join("config.json"))?;
        write("config", name.clone(), text.as_bytes())?;
        let small = shrink(&text)?;
        let tokenizer = std::fs::read(dir.join("tokenizer.json")).unwrap_or_default();
        let config = std::fs::read_to_string(dir.join("tokenizer_config.json")).unwrap_or_default();
        let length = config.len().min(u16::MAX.into());
        let both = [&(length as u16).to_le_bytes()[..], &config.as_bytes()[..length], &tokenizer].concat();
        write("tokenizer", name.clone(), &both)?;
        let config: Value = serde_json::from_str(&config).unwrap_or_default();
        if let Some(template) = config["chat_template"].as_str() {
            write("template", name.clone(), template.as_bytes())?;
        }
        write("config", format!("{name}-small"), small.as_bytes())?;
        for (variant, choices) in variants().iter().enumerate() {
            write("checkpoint", format!("{name}-{variant}"), &input(1, &small, choices))?;
        }
        // The header of a real file, with the first bytes of its data and without the rest.
        if let Ok(file) = std::fs::read(dir.join("model.safetensors")) {
            let n = file.first_chunk::<8>().map_or(0, |b| u64::from_le_bytes(*b) as usize) + 8;
            write("checkpoint", format!("{name}-header"), &input(0, &small, &file[..(n + 64).min(file.len())]))?;
        }
    }
    let empty = json!({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).to_string();
    let mut file = (empty.len() as u64).to_le_bytes().to_vec();
    file.extend(empty.bytes());
    file.extend([0; 4]);
    write("checkpoint", "tiny-file".to_string(), &input(0, "{}", &file))?;
    for (number, bytes) in [(0u32, 4 * 256), (2, 18 * 8), (3, 20 * 8), (7, 24 * 8), (8, 34 * 8), (12, 144), (13, 176), (14, 210), (39, 17 * 8)] {
        write("gguf", format!("type-{number}"), &gguf(number, bytes))?;
        write("gguf_tokenizer", format!("type-{number}"), &gguf(number, bytes))?;
    }
    for (i, (kind, text)) in grammars().iter().enumerate() {
        // As the target reads its input: a byte, and the rest as text.
        write("grammar", format!("{i}"), &[&[*kind][..], text.as_bytes()].concat())?;
    }
    write("page_store", "page".into(), &[[1; 32], [2; 32]].concat())
}

/// Grammars, expressions, choices and schemas that compile; the number says which of them a text is.
fn grammars() -> Vec<(u8, String)> {
    let lark = [
        "start: \"yes\" | \"no\"",
        "start: a b?\na: /[a-z]+/ | \"(\" start \")\"\nb: (\",\" a)*",
        "start: item~1..3\nitem: %json {\"type\": \"integer\"}",
        "start: T\nT[max_tokens=3]: /.*/\n%ignore / +/",
        "start: head tail\nhead[capture, stop=\"x\"]: /[^x]*/\ntail: %regex {\"substring_chars\": \"abc\"}",
        "start: (A & B) | ~A\nA: /[0-9a-f]{2,4}/\nB: /[0-9]+/",
    ];
    let regex = ["[a-c]{2,5}(x|yz)*", r"\d{3}-\d{4}", r"(?i)(foo|bar)+\s?", r"[^\x00-\x1f]+", r"\p{Lu}\p{Ll}*", "a?b+c{0,3}|.{4}"];
    let choice = ["red\ngreen\nblue", "a\nab\nabc\n", "\u{e9}\n\u{65e5}\u{672c}"];
    let schemas = [
        json!({"type": "object", "properties": {"a": {"type": "string", "minLength": 1, "maxLength": 3}}, "required": ["a"]}),
        json!({"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}}}),
        json!({"anyOf": [{"const": 1}, {"enum": ["x", null, true]}, {"type": "number", "minimum": 0, "maximum": 1}]}),
        json!({"type": "string", "pattern": "^[a-z]+@[a-z]{2}$"}),
        json!({"type": "string", "format": "date-time"}),
        json!({"allOf": [{"type": "integer", "minimum": 3}, {"multipleOf": 5, "exclusiveMaximum": 21}]}),
        json!({"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4}),
        json!({"type": "object", "additionalProperties": {"type": ["string", "null"]}, "properties": {"b": false}}),
        json!({"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": false}),
        json!(true),
    ];
    let texts = |kind: u8, texts: &[&str]| texts.iter().map(|text| (kind, (*text).to_owned())).collect::<Vec<_>>();
    [
        texts(0, &lark),
        texts(1, &regex),
        texts(2, &choice),
        schemas.iter().map(|schema| (3, schema.to_string())).collect(),
    ]
    .concat()
}

/// A GGUF file with one metadata value and one tensor of 256 elements of ggml's type `number`.
fn gguf(number: u32, bytes: usize) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut file = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
    file.extend(text("general.architecture"));
    file.extend(8u32.to_le_bytes());
    file.extend(text("llama"));
    file.extend(text("token_embd.weight"));
    file.extend(1u32.to_le_bytes());
    file.extend(256u64.to_le_bytes());
    file.extend(number.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.resize(file.len().next_multiple_of(32) + bytes, 0x11);
    file
}

fn input(mode: u8, config: &str, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![mode];
    bytes.extend((config.len() as u16).to_le_bytes());
    bytes.extend(config.bytes());
    bytes.extend(rest);
    bytes
}

/// The choices of `fitting_file`: fill, MTP, then one byte per weight.
fn variants() -> Vec<Vec<u8>> {
    let constant = |fill: u8, mtp: u8, choice: u8| [vec![fill, mtp], vec![choice; 400]].concat();
    vec![
        constant(0, 0, 0x00),
        constant(0x3f, 1, 0x00),
        constant(0x3f, 1, 0x10),
        constant(0x10, 0, 0x16),
        constant(0x77, 1, 0x07),
        constant(0xff, 0, 0x08),
        constant(0x01, 0, 0x1d),
        constant(0x01, 0, 0x04),
    ]
}

fn shrink(text: &str) -> std::io::Result<String> {
    let mut config: Value = serde_json::from_str(text)?;
    for (key, size) in SMALL {
        if let Some(value) = config.get_mut(key)
            && value.is_u64()
        {
            *value = json!(size);
        }
    }
    if let Some(quantization) = config.get_mut("quantization").and_then(Value::as_object_mut) {
        quantization.retain(|key, value| !value.is_object() || key.contains("layers.1."));
    }
    if let Some(object) = config.as_object_mut() {
        object.remove("quantization_config");
        for list in ["mlp_layer_types", "indexer_types"] {
            if let Some(Value::Array(values)) = object.get_mut(list) {
                values.truncate(2);
            }
        }
    }
    Ok(config.to_string())
}
