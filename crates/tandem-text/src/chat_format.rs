//! Which chat format a checkpoint has: what makes its prompts, and how its answers are written.

use std::path::Path;

use serde_json::{Map, Value};

use crate::chat_template::{ChatTemplate, TemplateError};
use crate::dialect::Dialect;
use crate::tokenizer::read_tokenizer_config;

/// How a model chats.
#[derive(Debug)]
pub struct ChatFormat {
    /// How answers are written.
    pub dialect: Dialect,
    /// What makes prompts; `None`: the model knows no conversations.
    pub template: Option<ChatTemplate>,
}

impl ChatFormat {
    /// The format of a model's directory. `chat_template` is used in place of the model's own; `forced` decides the dialect
    /// and, where its checkpoints have no template, what makes prompts. `has_token`: whether the vocabulary has a token.
    ///
    /// # Errors
    /// A file is unreadable or malformed, or the template is not valid Jinja.
    pub fn from_dir(
        dir: &Path,
        chat_template: Option<&Path>,
        forced: Option<Dialect>,
        has_token: impl Fn(&str) -> bool,
    ) -> Result<ChatFormat, TemplateError> {
        if chat_template.is_none()
            && let Some(dialect) = forced
            && let Some(template) = ChatTemplate::built_in(dialect)
        {
            return Ok(ChatFormat { dialect, template: Some(template) });
        }
        let config = read_tokenizer_config(dir)?;
        let template = ChatTemplate::from_config(dir, chat_template, &config)?;
        // MLX's converter says so in place of a template, or in spite of one.
        let named = config.get("chat_template_type").and_then(Value::as_str).and_then(Dialect::from_name);
        let named = named.filter(|_| chat_template.is_none() && forced.is_none());
        let found = |template: &ChatTemplate| Dialect::of_template(template.source(), &has_token);
        let without = || shipped_encoding(dir).unwrap_or_else(|| Dialect::of_template("", &has_token));
        let dialect = forced.or(named).unwrap_or_else(|| template.as_ref().map_or_else(without, found));
        let is_ours = template.is_none() || named.is_some();
        let template = if is_ours { ChatTemplate::built_in(dialect).or(template) } else { template };
        Ok(ChatFormat { dialect, template })
    }
}

/// The dialect of a checkpoint that ships a program in place of a template, by that program or its family.
fn shipped_encoding(dir: &Path) -> Option<Dialect> {
    let config = std::fs::read(dir.join("config.json")).unwrap_or_default();
    let config: Map<String, Value> = serde_json::from_slice(&config).unwrap_or_default();
    let is_v32 = config.get("model_type").and_then(Value::as_str) == Some("deepseek_v32")
        || dir.join("encoding/encoding_dsv32.py").exists();
    is_v32.then_some(Dialect::DeepSeekV32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The checkpoint's files, a token of its vocabulary, what is forced; the dialect and whether prompts are ours.
    #[test]
    fn chosen_from_the_checkpoint() {
        use Dialect::{DeepSeekV3, DeepSeekV31, DeepSeekV32, Glm, Hermes, Llama3};
        let v32 = ("config.json", r#"{"model_type": "deepseek_v32"}"#);
        let glm = ("chat_template.jinja", "<tool_call>{{ n }}<arg_key>");
        let v31 = ("chat_template.jinja", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ n }}<｜tool▁sep｜>");
        let v3 = ("chat_template.jinja", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ n }}\n```json");
        let mlx = ("tokenizer_config.json", r#"{"chat_template_type": "deepseek_v32", "chat_template": "x"}"#);
        type Files<'a> = &'a [(&'a str, &'a str)];
        type Case<'a> = (Files<'a>, &'a str, Option<Dialect>, Dialect, Option<bool>);
        let cases: [Case<'_>; 18] = [
            (&[v32], "", None, DeepSeekV32, Some(true)),
            (&[("encoding/encoding_dsv32.py", "")], "", None, DeepSeekV32, Some(true)),
            (&[], "｜DSML｜", None, DeepSeekV32, Some(true)),
            (&[mlx], "", None, DeepSeekV32, Some(true)),
            // V3.2-Exp has a template, V3.1's.
            (&[v32, v31], "<｜tool▁sep｜>", None, DeepSeekV31, Some(false)),
            (&[v3], "<｜tool▁sep｜>", None, DeepSeekV3, Some(false)),
            (&[glm], "", None, Glm, Some(false)),
            (&[("chat_template.jinja", "<|im_start|><tool_call>")], "", None, Hermes, Some(false)),
            (&[("chat_template.jinja", "<|start_header_id|>")], "", None, Llama3, Some(false)),
            (&[("chat_template.jinja", "plain")], "<|python_tag|>", None, Llama3, Some(false)),
            (&[("chat_template.jinja", "plain")], "<arg_key>", None, Glm, Some(false)),
            (&[("chat_template.jinja", "plain")], "", None, Hermes, Some(false)),
            (&[], "", None, Hermes, None),
            (&[], "<｜tool▁sep｜>", None, DeepSeekV31, None),
            // Forced.
            (&[glm], "", Some(DeepSeekV32), DeepSeekV32, Some(true)),
            (&[glm], "", Some(Llama3), Llama3, Some(false)),
            (&[v32], "", Some(Hermes), Hermes, None),
            (&[mlx], "", Some(Glm), Glm, Some(false)),
        ];
        for (files, token, forced, dialect, is_built_in) in cases {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in files {
                let path = dir.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            let found = ChatFormat::from_dir(dir.path(), None, forced, |asked| asked == token).unwrap();
            let template = found.template.as_ref().map(ChatTemplate::is_built_in);
            assert_eq!((found.dialect, template), (dialect, is_built_in), "{files:?} {token:?} {forced:?}");
        }
        // A template of the user's own.
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), v32.1).unwrap();
        let own = dir.path().join("own.jinja");
        std::fs::write(&own, glm.1).unwrap();
        for (forced, dialect) in [(None, Glm), (Some(DeepSeekV32), DeepSeekV32)] {
            let found = ChatFormat::from_dir(dir.path(), Some(&own), forced, |_| false).unwrap();
            assert_eq!((found.dialect, found.template.unwrap().source()), (dialect, glm.1));
        }
    }
}
