//! `tandem inspect`: what a checkpoint is, without reading its weights.

use std::cell::LazyCell;
use std::path::Path;

use serde_json::json;
use tandem_core::weights::ModuleKind;
use tandem_core::{Checkpoint, ModelConfig};
use tandem_model::Accounting;
use tandem_text::{ChatFormat, ChatTemplate, Dialect, Tokenizer};

use crate::cli::InspectArgs;
use crate::report::print_json;
use tandem_runtime::units::{bytes, count, thousands};
use tandem_runtime::{model_dir, settle_tie};

/// Runs the command.
pub(crate) fn inspect(args: &InspectArgs) -> anyhow::Result<()> {
    if let Some(model) = &args.model {
        crate::pull::offer_metadata(model)?;
    }
    let dir = model_dir(args.model.as_deref())?;
    let mut config = ModelConfig::load(&dir)?;
    let checkpoint = Checkpoint::open_or_index(&dir)?;
    settle_tie(&mut config, &checkpoint);
    let weights = tandem_model::resolve(&checkpoint, &config)?;
    let accounting = Accounting::new(&weights, &config);
    let has_mtp = weights.iter().any(|w| w.spec.kind == ModuleKind::Mtp);
    let chat = Chat::of(&dir, args.chat_format);
    if args.json {
        let mut json = as_json(&dir, &config, &checkpoint, &accounting, has_mtp);
        json["chat"] = chat.as_json();
        return print_json(&json);
    }
    print(&config, &checkpoint, &accounting, has_mtp, &chat);
    Ok(())
}

/// How the model chats, as far as its small files are here.
struct Chat {
    format: Option<ChatFormat>,
    /// Why it is not known.
    error: Option<String>,
}

impl Chat {
    fn of(dir: &Path, forced: Option<Dialect>) -> Chat {
        // Needed only where no template says how calls are written.
        let tokenizer = LazyCell::new(|| Tokenizer::from_dir(dir).ok());
        let has_token = |token: &str| tokenizer.as_ref().is_some_and(|tokenizer| tokenizer.has_token(token));
        match ChatFormat::from_dir(dir, None, forced, has_token) {
            Ok(format) => Chat { format: Some(format), error: None },
            Err(error) => Chat { format: None, error: Some(error.to_string()) },
        }
    }

    /// Where prompts come from.
    fn source(template: &ChatTemplate) -> &'static str {
        if template.is_built_in() { "built-in" } else { "template" }
    }

    fn as_json(&self) -> serde_json::Value {
        let Some(format) = &self.format else { return json!({"error": self.error}) };
        let Some(template) = &format.template else { return json!({"format": format.dialect.name(), "prompts": null}) };
        let reasoning = template.reasoning();
        json!({
            "format": format.dialect.name(),
            "prompts": Chat::source(template),
            "reasoning_by_default": reasoning.is_on,
            "reasoning_can_be_switched": reasoning.has_switch,
            "reasoning_efforts": reasoning.efforts.iter().map(|effort| effort.name()).collect::<Vec<_>>(),
        })
    }

    fn line(&self) -> String {
        let Some(format) = &self.format else { return self.error.clone().unwrap_or_default() };
        let name = format.dialect.name();
        let Some(template) = &format.template else {
            return format!("none (calls as {name}): there is no chat template, so prompts are passed as they stand");
        };
        let reasoning = template.reasoning();
        let efforts: Vec<&str> = reasoning.efforts.iter().map(|effort| effort.name()).collect();
        let switch = match (reasoning.has_switch, reasoning.is_on) {
            (true, true) => ", reasoning on, can be switched off",
            (true, false) => ", reasoning off, can be switched on",
            (false, true) => ", reasoning always on",
            (false, false) => "",
        };
        let efforts = if efforts.is_empty() { String::new() } else { format!(", efforts {}", efforts.join(", ")) };
        let prompts = if template.is_built_in() { "built-in prompts" } else { "prompts by its template" };
        format!("{name}, {prompts}{switch}{efforts}")
    }
}

fn as_json(
    dir: &std::path::Path,
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    accounting: &Accounting,
    has_mtp: bool,
) -> serde_json::Value {
    let kinds: serde_json::Map<String, serde_json::Value> = accounting
        .kinds
        .iter()
        .map(|k| {
            let formats: serde_json::Map<_, _> = k.formats.iter().map(|(f, b)| (f.clone(), json!(b))).collect();
            let value = json!({
                "parameters": k.parameters,
                "active_parameters": k.active_parameters,
                "resident_bytes": k.resident_bytes,
                "read_bytes_per_token": k.read_bytes,
                "format_bytes": formats,
            });
            (k.kind.name().to_string(), value)
        })
        .collect();
    json!({
        "path": dir.display().to_string(),
        "model_type": config.model_type.name(),
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "n_routed_experts": config.moe.as_ref().map(|m| m.n_routed_experts),
        "num_experts_per_tok": config.moe.as_ref().map(|m| m.num_experts_per_tok),
        "index_topk": config.indexer.as_ref().map(|i| i.index_topk),
        "weights_present": checkpoint.has_data(),
        "mtp_head": has_mtp,
        "parameters": accounting.total(|k| k.parameters),
        "active_parameters": accounting.total(|k| k.active_parameters),
        "resident_bytes": accounting.total(|k| k.resident_bytes),
        "read_bytes_per_token": accounting.total(|k| k.read_bytes),
        "read_bytes_per_token_below_index_topk": accounting.read_bytes_at(config, 1),
        "modules": kinds,
    })
}

fn print(config: &ModelConfig, checkpoint: &Checkpoint, accounting: &Accounting, has_mtp: bool, chat: &Chat) {
    println!(
        "{} with {} layers, hidden size {}",
        config.model_type.name(),
        config.num_hidden_layers,
        config.hidden_size
    );
    if let Some(moe) = &config.moe {
        let dense = moe.sparse_layers.iter().filter(|sparse| !**sparse).count();
        println!(
            "experts: {} routed, {} per token, {} shared; {dense} dense layers",
            moe.n_routed_experts, moe.num_experts_per_tok, moe.n_shared_experts
        );
    }
    if let Some(indexer) = &config.indexer {
        let full = indexer.full_layers.iter().filter(|full| **full).count();
        println!("sparse attention: {} positions per query, {full} layers with an indexer", indexer.index_topk);
    }
    println!(
        "context {}, vocabulary {}, multi-token-prediction head: {}",
        thousands(config.max_position_embeddings as u64),
        thousands(config.vocab_size as u64),
        if has_mtp { "yes" } else { "no" }
    );
    println!("chat format: {}", chat.line());
    if !checkpoint.has_data() {
        println!("weights are not here: sizes are computed from config.json and the index");
    }
    println!();
    println!("{:<16}{:>12}{:>12}{:>12}{:>14}  format", "module", "parameters", "active", "resident", "read/token");
    for k in &accounting.kinds {
        let formats: Vec<&str> = k.formats.iter().map(|(name, _)| name.as_str()).collect();
        println!(
            "{:<16}{:>12}{:>12}{:>12}{:>14}  {}",
            k.kind.name(),
            count(k.parameters),
            count(k.active_parameters),
            bytes(k.resident_bytes),
            bytes(k.read_bytes),
            formats.join(", ")
        );
    }
    println!(
        "{:<16}{:>12}{:>12}{:>12}{:>14}",
        "total",
        count(accounting.total(|k| k.parameters)),
        count(accounting.total(|k| k.active_parameters)),
        bytes(accounting.total(|k| k.resident_bytes)),
        bytes(accounting.total(|k| k.read_bytes))
    );
    println!();
    println!("resident: {} bytes", thousands(accounting.total(|k| k.resident_bytes)));
    println!("read per decoded token: {} bytes", thousands(accounting.total(|k| k.read_bytes)));
    if accounting.index_query_bytes > 0 {
        println!(
            "  of these {} are not read while the context is at most {} tokens",
            thousands(accounting.index_query_bytes),
            config.indexer.as_ref().map_or(0, |i| i.index_topk)
        );
    }
}
