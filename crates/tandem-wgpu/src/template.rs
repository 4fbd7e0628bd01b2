//! WGSL with constants, conditions, unrolled loops and inclusions, which WGSL itself lacks.
//!
//! Lines that begin with `#` direct: `#if NAME`, `#else`, `#end`, `#for i COUNT`, `#include file NAME=text ..`. Elsewhere
//! `${expression}` is replaced; expressions know names, numbers, `+ * / %` and no parentheses. A name that is not defined is
//! false in `#if` and a bug elsewhere. Loops are unrolled here because not every driver does it, and arrays that are not
//! indexed by constants live in memory.

use std::collections::HashMap;

/// Names and their texts.
pub(crate) type Defines = HashMap<String, String>;

/// The shader files, by name.
pub(crate) fn source(name: &str) -> &'static str {
    SOURCES.iter().find(|(n, _)| *n == name).map_or_else(|| panic!("no shader {name}"), |(_, text)| text)
}

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        const SOURCES: &[(&str, &str)] = &[$(($name, include_str!(concat!("../shaders/", $name, ".wgsl")))),*];
    };
}

sources!(
    "common",
    "format",
    "scale",
    "scale_word",
    "load",
    "segments",
    "stage",
    "dot",
    "decode_unit",
    "fetch_weights",
    "fetch",
    "decode_half",
    "fetch_half",
    "half_number",
    "half_rows",
    "linear_tiles_half",
    "tile_fills",
    "tile_place",
    "embed",
    "gather_rows",
    "norm_row",
    "rms_norm",
    "silu_mul",
    "rope_table",
    "rope",
    "add",
    "add_bias",
    "linear_rows",
    "linear_several",
    "gate_up_rows",
    "down_rows",
    "linear_tiles",
    "router_topk",
    "moe_plan",
    "moe_combine",
    "latent_row",
    "key_row",
    "prepare_attention",
    "write_latent",
    "write_index_key",
    "write_cache",
    "index_scores",
    "index_topk",
    "attention",
    "attention_merge",
    "copy",
);

/// The text of shader `name` under `defines`.
pub(crate) fn expand(name: &str, defines: &Defines) -> String {
    let mut out = String::new();
    let lines: Vec<&str> = source(name).lines().collect();
    expand_lines(&lines, defines, &mut out);
    out
}

fn expand_lines(lines: &[&str], defines: &Defines, out: &mut String) {
    let mut i = 0;
    while i < lines.len() {
        let line = lines[i];
        let Some(directive) = line.trim_start().strip_prefix('#') else {
            // Comments of the source are for its readers.
            if !line.trim_start().starts_with("//") {
                substitute(line, defines, out);
                out.push('\n');
            }
            i += 1;
            continue;
        };
        let words: Vec<&str> = directive.split_whitespace().collect();
        match words[..] {
            ["if", name] => {
                let (middle, end) = block(lines, i);
                let body =
                    if is_true(name, defines) { &lines[i + 1..middle] } else { &lines[(middle + 1).min(end)..end] };
                expand_lines(body, defines, out);
                i = end + 1;
            }
            ["for", name, count] => {
                let (_, end) = block(lines, i);
                let mut inner = defines.clone();
                for n in 0..evaluate(count, defines) {
                    inner.insert(name.into(), n.to_string());
                    expand_lines(&lines[i + 1..end], &inner, out);
                }
                i = end + 1;
            }
            ["include", name, ..] => {
                let mut inner = defines.clone();
                for pair in &words[2..] {
                    let (key, text) = pair.split_once('=').unwrap_or_else(|| panic!("{line}"));
                    let mut value = String::new();
                    substitute(text, defines, &mut value);
                    inner.insert(key.into(), value);
                }
                let included: Vec<&str> = source(name).lines().collect();
                expand_lines(&included, &inner, out);
                i += 1;
            }
            _ => panic!("directive: {line}"),
        }
    }
}

/// Lines of the `#else` (or the end) and of the `#end` that belong to the block begun at `start`.
fn block(lines: &[&str], start: usize) -> (usize, usize) {
    let (mut depth, mut middle) = (0, None);
    for (i, line) in lines.iter().enumerate().skip(start) {
        match line.split_whitespace().next() {
            Some("#if" | "#for") => depth += 1,
            Some("#else") if depth == 1 => middle = Some(i),
            Some("#end") => {
                depth -= 1;
                if depth == 0 {
                    return (middle.unwrap_or(i), i);
                }
            }
            _ => {}
        }
    }
    panic!("no #end for: {}", lines[start])
}

fn is_true(name: &str, defines: &Defines) -> bool {
    defines.get(name).is_some_and(|text| text != "0")
}

fn substitute(line: &str, defines: &Defines, out: &mut String) {
    let mut rest = line;
    while let Some(start) = rest.find("${") {
        let end = start + rest[start..].find('}').unwrap_or_else(|| panic!("unclosed: {line}"));
        out.push_str(&rest[..start]);
        let expression = &rest[start + 2..end];
        match defines.get(expression) {
            Some(text) => out.push_str(text),
            None => out.push_str(&evaluate(expression, defines).to_string()),
        }
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
}

/// Sums of products, from left to right.
fn evaluate(expression: &str, defines: &Defines) -> u32 {
    let term = |term: &str| -> u32 {
        let (mut value, mut operator) = (1, '*');
        for factor in term.split_inclusive(['*', '/', '%']) {
            let (name, next) = match factor.char_indices().next_back() {
                Some((at, c @ ('*' | '/' | '%'))) => (&factor[..at], c),
                _ => (factor, ' '),
            };
            let name = name.trim();
            let text = defines.get(name).map_or(name, String::as_str);
            let number: u32 = text.parse().unwrap_or_else(|_| panic!("{name} in {expression} is not a number"));
            value = match operator {
                '*' => value * number,
                '/' => value / number,
                _ => value % number,
            };
            operator = next;
        }
        value
    };
    expression.split('+').map(term).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_loops_and_conditions_expand() {
        let defines: Defines = [("N", "2"), ("YES", "1"), ("NO", "0")].map(|(k, v)| (k.into(), v.into())).into();
        let text = "#for i N\na${i} = ${i*4+N/2} ${7%4};\n#if YES\ny\n#else\nn\n#end\n#end\n#if NO\nn\n#end\n#if MISSING\nm\n#else\nelse\n#end";
        let mut out = String::new();
        expand_lines(&text.lines().collect::<Vec<_>>(), &defines, &mut out);
        assert_eq!(out, "a0 = 1 3;\ny\na1 = 5 3;\ny\nelse\n");
    }
}
