//! `--quant`: a recipe's name, or a TOML file of rules.

use std::path::Path;

use anyhow::Context;
use serde::Deserialize;
use tandem_model::{Recipe, Target};

use super::usage;
use tandem_runtime::presets;

/// A rule file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    /// For matrices that no rule names.
    #[serde(default = "keep")]
    default: String,
    /// Pattern to format, in order.
    #[serde(default)]
    rules: toml::Table,
}

fn keep() -> String {
    "keep".to_string()
}

/// The recipe that `--quant` names.
pub(super) fn recipe(name: &str) -> anyhow::Result<Recipe> {
    match name.strip_prefix("mixed:") {
        Some(file) => {
            let text = presets::read(Path::new(file))?;
            let recipe = parse(name, &text).with_context(|| format!("{file} is not a rule file"))?;
            Ok(recipe)
        }
        None => Recipe::parse(name).map_err(usage),
    }
}

fn parse(name: &str, text: &str) -> anyhow::Result<Recipe> {
    let rules: Rules = toml::from_str(text)?;
    let mut recipe = Recipe::parse(&rules.default).map_err(usage)?;
    recipe.name = name.to_string();
    for (pattern, format) in &rules.rules {
        let format =
            format.as_str().with_context(|| format!("the format of {pattern:?} must be text such as \"mxfp4\""))?;
        recipe.rules.push((pattern.clone(), Target::parse(format).map_err(usage)?));
    }
    Ok(recipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_keep_their_order() {
        let text = "default = 'affine8'\n[rules]\n'*.switch_mlp.*' = 'mxfp4'\nlm_head = 'bf16'\n'*' = 'affine4:g32'\n";
        let recipe = parse("mixed:x", text).expect("valid");
        let patterns: Vec<&str> = recipe.rules.iter().map(|(pattern, _)| pattern.as_str()).collect();
        assert_eq!(patterns, ["*.switch_mlp.*", "lm_head", "*"]);
        assert_eq!(recipe.rules[2].1, Target::Affine { bits: 4, group_size: 32 });
        assert_eq!(recipe.rest, Target::Affine { bits: 8, group_size: 64 });
    }

    #[test]
    fn bad_rules_say_what_is_wrong() {
        for (text, expected) in [
            ("default = 'q4'", "\"q4\" is not a format"),
            ("[rules]\nlm_head = 4", "must be text"),
            ("[rules]\nlm_head = 'int4'", "\"int4\" is not a format"),
            ("[rule]\nlm_head = 'bf16'", "unknown field"),
            ("default", "expected"),
        ] {
            let error = format!("{:#}", parse("mixed:x", text).expect_err("invalid"));
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
