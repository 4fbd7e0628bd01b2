//! Grammars of calls whose arguments stand between tags: GLM's and DeepSeek-V3.2's; and of those that are JSON between
//! tokens, DeepSeek-V3.1's.
//!
//! Arguments come in the schema's order. Texts stand as they are, everything else as JSON. A keyword that cannot be kept to is
//! an error that names it, unless the model may write text as well: then the grammar only helps.

use std::fmt::Write;

use anyhow::{anyhow, bail, ensure};
use serde_json::{Map, Value};
use tandem_text::Function;
use tandem_text::schema::{SchemaError, alternatives as plain_schemas, types};

use crate::grammar::{alternatives, quoted, self_contained, with_white_space};

/// Keywords of an object that say nothing about a call, or that are kept to below.
const OF_OBJECTS: [&str; 24] = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "unevaluatedProperties",
    "title",
    "description",
    "default",
    "examples",
    "example",
    "$schema",
    "$id",
    "$comment",
    "$anchor",
    "$defs",
    "definitions",
    "deprecated",
    "readOnly",
    "writeOnly",
    "minProperties",
    "maxProperties",
    "strict",
    "nullable",
    "propertyNames",
];
/// And of a text.
const OF_TEXTS: [&str; 17] = [
    "type",
    "enum",
    "const",
    "pattern",
    "minLength",
    "maxLength",
    "format",
    "title",
    "description",
    "default",
    "examples",
    "example",
    "$comment",
    "$id",
    "deprecated",
    "contentMediaType",
    "nullable",
];

/// The tags of a dialect, in Lark's notation.
pub(crate) struct Tags {
    /// Around all calls.
    list: [String; 2],
    /// Around a call: what stands before the function's name, between it and the arguments, and at the end.
    call: [String; 3],
    /// Around an argument that is a text, and one that is JSON: before its name, between it and the value, at the end.
    text: [String; 3],
    json: [String; 3],
    /// What the terminal of a text takes of the end of its argument. It goes on as far as it can, and a token that is a tag as
    /// a whole ends it; where there is none, it ends as soon as it can.
    is_lazy: bool,
    end_of_text: &'static str,
}

impl Tags {
    /// GLM's; `tag` names a tag as a token or quotes it.
    pub(crate) fn glm(tag: &dyn Fn(&str) -> String) -> Tags {
        let argument =
            || [tag("<arg_key>"), format!("{} {}", tag("</arg_key>"), tag("<arg_value>")), tag("</arg_value>")];
        Tags {
            list: [String::new(), String::new()],
            call: [tag("<tool_call>"), String::new(), tag("</tool_call>")],
            text: argument(),
            json: argument(),
            is_lazy: false,
            end_of_text: "",
        }
    }

    /// DeepSeek-V3.2's; `mark` is the token in every tag, if the vocabulary has it.
    pub(crate) fn dsml(mark: Option<u32>) -> Tags {
        let tag = |before: &str, after: &str| match mark {
            Some(mark) => format!("{} <[{mark}]> {}", quoted(before), quoted(after)),
            None => quoted(&format!("{before}｜DSML｜{after}")),
        };
        let end_of_text = match mark {
            Some(mark) => format!("<[{mark}]> {}", quoted("parameter>\n")),
            None => quoted("parameter>\n"),
        };
        let argument = |is_text: bool, end: String| {
            [tag("<", "parameter name=\""), quoted(&format!("\" string=\"{is_text}\">")), end]
        };
        Tags {
            list: [format!("/\\n{{0,2}}/ {}", tag("<", "function_calls>\n")), tag("</", "function_calls>")],
            call: [tag("<", "invoke name=\""), quoted("\">\n"), tag("</", "invoke>\n")],
            text: argument(true, end_of_text),
            json: argument(false, tag("</", "parameter>\n")),
            is_lazy: mark.is_none(),
            end_of_text: if mark.is_some() { "</" } else { "</｜DSML｜" },
        }
    }
}

/// The grammar, in Lark's notation.
///
/// # Errors
/// A schema has a keyword that the grammar could not keep to.
pub(crate) fn calls(
    functions: &[Function],
    parallel: bool,
    or_text: Option<&Value>,
    tags: &Tags,
) -> anyhow::Result<String> {
    // A model that may also write text is helped with its calls as far as a grammar can.
    let is_strict = or_text.is_none();
    let mut rules = Rules { text: String::new(), n_texts: 0, is_strict, tags };
    let more = if parallel { "+" } else { "" };
    let mut grammar = format!("start: calls{}\n", if or_text.is_some() { " | answer" } else { "" });
    // A model puts a line before a call.
    let space = if is_strict { "" } else { "/[ \\n]{0,2}/ " };
    writeln!(grammar, "calls: {} ({space}call){more} {}", tags.list[0], tags.list[1])?;
    let names: Vec<String> = (0..functions.len()).map(|i| format!("call_{i}")).collect();
    writeln!(grammar, "call: {}", names.join(" | "))?;
    writeln!(grammar, "{}", rules.terminal("TEXT", "/(.|\\n)*/"))?;
    if let Some(schema) = or_text {
        writeln!(grammar, "answer: {}", json_rule(schema, schema)?)?;
    }
    for (i, function) in functions.iter().enumerate() {
        let wrong = |error: anyhow::Error| anyhow!("the function {:?}: {error}", function.name);
        let objects = match plain_schemas(&function.parameters, &function.parameters) {
            Ok(objects) => objects,
            Err(_) if !is_strict => vec![Map::new()],
            Err(error) => return Err(wrong(error.into())),
        };
        let mut bodies = vec![];
        for object in &objects {
            bodies.push(rules.arguments(object, &function.parameters).map_err(wrong)?);
        }
        if bodies.is_empty() {
            return Err(wrong(anyhow!("no arguments fit its schema")));
        }
        let [begin, middle, end] = &tags.call;
        writeln!(grammar, "call_{i}: {begin} {} {middle} ({}) {end}", quoted(&function.name), bodies.join(" | "))?;
    }
    Ok(grammar + &rules.text)
}

/// The grammar of DeepSeek-V3.1's calls; of V3's, if `is_fenced`. `tag` names a tag as a token or quotes it.
///
/// # Errors
/// A schema's references lead nowhere.
pub(crate) fn deepseek_v3(
    functions: &[Function],
    parallel: bool,
    or_text: Option<&Value>,
    is_fenced: bool,
    tag: &dyn Fn(&str) -> String,
) -> anyhow::Result<String> {
    let more = if parallel { "+" } else { "" };
    let mut grammar = format!("start: calls{}\n", if or_text.is_some() { " | answer" } else { "" });
    if let Some(schema) = or_text {
        writeln!(grammar, "answer: {}", json_rule(schema, schema)?)?;
    }
    let (begin, end) = (tag("<｜tool▁calls▁begin｜>"), tag("<｜tool▁calls▁end｜>"));
    let names: Vec<String> = (0..functions.len()).map(|i| format!("call_{i}")).collect();
    writeln!(grammar, "calls: /\\n{{0,2}}/ {begin} ({}){more} {end}", names.join(" | "))?;
    let (begin, separator, end) = (tag("<｜tool▁call▁begin｜>"), tag("<｜tool▁sep｜>"), tag("<｜tool▁call▁end｜>"));
    for (i, function) in functions.iter().enumerate() {
        let parameters = crate::grammar::object_schema(&function.parameters);
        let arguments = json_rule(&parameters, &parameters)
            .map_err(|error| anyhow!("the function {:?}: {error}", function.name))?;
        let name = &function.name;
        match is_fenced {
            true => writeln!(
                grammar,
                "call_{i}: {begin} \"function\" {separator} {} {arguments} {} {end}",
                quoted(&format!("{name}\n```json\n")),
                quoted("\n```")
            )?,
            false => writeln!(grammar, "call_{i}: {begin} {} {separator} {arguments} {end}", quoted(name))?,
        }
    }
    Ok(grammar)
}

/// What an argument may be.
enum Form {
    /// A terminal of texts, up to the end of the argument.
    Text(String),
    /// One of these texts.
    Texts(Vec<String>),
    /// JSON.
    Json(String),
}

struct Rules<'a> {
    /// Terminals.
    text: String,
    n_texts: usize,
    is_strict: bool,
    tags: &'a Tags,
}

impl Rules<'_> {
    /// All arguments of a call.
    fn arguments(&mut self, object: &Map<String, Value>, root: &Value) -> anyhow::Result<String> {
        let none = Map::new();
        let properties = object.get("properties").and_then(Value::as_object).unwrap_or(&none);
        let required: Vec<&str> =
            object.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        if self.is_strict {
            if let Some(key) = object.keys().find(|key| !OF_OBJECTS.contains(&key.as_str())) {
                bail!("the keyword {key:?} cannot be kept to beside the arguments of a forced call; leave it out");
            }
            ensure!(
                matches!(types(object)[..], [] | ["object"]),
                "its arguments are of \"type\" {:?}, expected an object",
                types(object)
            );
            let bound = |key: &str| object.get(key).and_then(Value::as_u64);
            if bound("minProperties").is_some_and(|least| least > required.len() as u64) {
                bail!("the keyword \"minProperties\" cannot be kept to: name the arguments under \"required\"");
            }
            if bound("maxProperties").is_some_and(|most| most < properties.len() as u64) {
                bail!("the keyword \"maxProperties\" cannot be kept to: declare fewer arguments");
            }
        }
        let any = Value::Bool(true);
        let other = object.get("additionalProperties").unwrap_or(&any);
        let undeclared: Vec<(&str, &Value)> =
            required.iter().filter(|name| !properties.contains_key(**name)).map(|name| (*name, other)).collect();
        let declared = properties.iter().map(|(name, schema)| (name.as_str(), schema));
        let mut body = String::new();
        for (name, schema) in declared.chain(undeclared) {
            let is_required = required.contains(&name);
            let forms = match self.value(schema, root) {
                Ok(forms) if !forms.is_empty() => forms,
                Ok(_) if is_required => bail!("the argument {name:?} is required, and nothing fits its schema"),
                Ok(_) => continue,
                Err(_) if !self.is_strict => vec![Form::Text(self.name_of("TEXT"))],
                Err(error) => return Err(anyhow!("the argument {name:?}: {error}")),
            };
            let Tags { text, json, end_of_text, .. } = self.tags;
            let alternatives = forms.iter().map(|form| {
                let ([begin, middle, end], value) = match form {
                    Form::Text(terminal) => (text, terminal.clone()),
                    Form::Texts(texts) => (text, format!("({}) {}", alternatives(texts), quoted(end_of_text))),
                    Form::Json(rule) => (json, format!("({rule})")),
                };
                format!("{begin} {} {middle} {value} {end}", quoted(name))
            });
            let argument = format!("({})", alternatives.collect::<Vec<_>>().join(" | "));
            body.push_str(&if is_required { format!("{argument} ") } else { format!("({argument})? ") });
        }
        Ok(if body.is_empty() { "\"\"".to_owned() } else { body })
    }

    /// One argument; nothing when nothing fits its schema.
    fn value(&mut self, schema: &Value, root: &Value) -> anyhow::Result<Vec<Form>> {
        let plain = match plain_schemas(schema, root) {
            Ok(plain) => plain,
            // A type that holds itself is no text.
            Err(SchemaError::Depth(_) | SchemaError::Many(_)) => return Ok(vec![Form::Json(json_rule(schema, root)?)]),
            Err(error) => return Err(error.into()),
        };
        let mut forms = vec![];
        for schema in &plain {
            let values = match (schema.get("const"), schema.get("enum")) {
                (Some(value), _) => Some(vec![value.clone()]),
                (None, Some(Value::Array(values))) => Some(values.clone()),
                _ => None,
            };
            if let Some(mut values) = values {
                if let Some(kind) = schema.get("type").and_then(Value::as_str) {
                    values.retain(|value| fits(value, kind));
                }
                // Beside a list of values everything else can only take some of them away.
                if self.is_strict
                    && let Some(key) = schema.keys().find(|key| {
                        !OF_TEXTS.contains(&key.as_str())
                            || ["pattern", "minLength", "maxLength"].contains(&key.as_str())
                    })
                {
                    bail!("the keyword {key:?} beside a list of values cannot be kept to; leave it out");
                }
                let (texts, others): (Vec<&Value>, Vec<&Value>) = values.iter().partition(|value| value.is_string());
                let texts: Vec<String> = texts.into_iter().filter_map(Value::as_str).map(str::to_owned).collect();
                let others: Vec<String> = others.into_iter().map(Value::to_string).collect();
                forms.extend((!texts.is_empty()).then_some(Form::Texts(texts)));
                forms.extend((!others.is_empty()).then(|| Form::Json(alternatives(&others))));
                continue;
            }
            match types(schema)[..] {
                ["string"] => forms.push(Form::Text(self.string(schema)?)),
                // Whatever it is, it can be written as text; what it looks like is what it becomes.
                [] if schema.keys().all(|key| OF_TEXTS.contains(&key.as_str())) => {
                    forms.push(Form::Text(self.name_of("TEXT")));
                }
                _ => forms.push(Form::Json(json_rule(&Value::Object(schema.clone()), root)?)),
            }
        }
        Ok(forms)
    }

    /// A text as it stands.
    fn string(&mut self, schema: &Map<String, Value>) -> anyhow::Result<String> {
        if self.is_strict
            && let Some(key) = schema.keys().find(|key| !OF_TEXTS.contains(&key.as_str()))
        {
            bail!("the keyword {key:?} cannot be kept to for a text; leave it out");
        }
        let mut parts = vec![];
        if let Some(pattern) = schema.get("pattern") {
            let pattern = pattern.as_str().ok_or_else(|| anyhow!("the keyword \"pattern\" is not a text"))?;
            parts.push(searched(pattern)?);
        }
        let bound = |key: &str| schema.get(key).and_then(|n| n.as_u64().or(n.as_f64().map(|n| n as u64)));
        let (least, most) = (bound("minLength"), bound("maxLength"));
        if least.is_some() || most.is_some() {
            let (least, most) = (least.unwrap_or(0), most.map_or(String::new(), |most| most.to_string()));
            parts.push(format!("(.|\\n){{{least},{most}}}"));
        }
        parts.extend(schema.get("format").and_then(Value::as_str).and_then(format_regex).map(str::to_owned));
        if parts.is_empty() {
            return Ok(self.name_of("TEXT"));
        }
        let parts: Vec<String> = parts.iter().map(|part| format!("/{}/", part.replace('/', "\\/"))).collect();
        let name = format!("TEXT_{}", self.n_texts);
        self.n_texts += 1;
        let terminal = self.terminal(&name, &parts.join(" & "));
        writeln!(self.text, "{terminal}")?;
        Ok(self.name_of(&name))
    }

    /// Only rules may end early, and their names are small.
    fn name_of(&self, terminal: &str) -> String {
        if self.tags.is_lazy { terminal.to_lowercase() } else { terminal.to_owned() }
    }

    /// A terminal of a text, which takes the beginning of what ends it.
    fn terminal(&self, name: &str, text: &str) -> String {
        let Tags { is_lazy, end_of_text, .. } = self.tags;
        match *end_of_text {
            "" => format!("{name}: {text}"),
            end if *is_lazy => {
                format!("{}[lazy]: {name}_END\n{name}_END: ({text}) {}", name.to_lowercase(), quoted(end))
            }
            end => format!("{name}: ({text}) {}", quoted(end)),
        }
    }
}

/// A value written as JSON.
fn json_rule(schema: &Value, root: &Value) -> anyhow::Result<String> {
    Ok(format!("%json {}", with_white_space(self_contained(schema, root)?)))
}

fn fits(value: &Value, kind: &str) -> bool {
    match (kind, value) {
        ("number", Value::Number(_)) => true,
        ("integer", Value::Number(n)) => n.as_f64().is_some_and(|n| n.fract() == 0.0),
        _ => tandem_text::schema::type_of(value) == kind,
    }
}

/// JSON schema looks for a pattern anywhere in a text; a grammar matches the whole.
fn searched(pattern: &str) -> anyhow::Result<String> {
    // Where alternatives are not in brackets each has anchors of its own.
    let (mut depth, mut in_class, mut is_escaped, mut parts, mut part) = (0usize, false, false, vec![], String::new());
    for c in pattern.chars() {
        match c {
            _ if is_escaped => {}
            '[' => in_class = true,
            ']' => in_class = false,
            '(' if !in_class => depth += 1,
            ')' if !in_class => depth = depth.saturating_sub(1),
            '|' if depth == 0 && !in_class => {
                parts.push(std::mem::take(&mut part));
                continue;
            }
            _ => {}
        }
        is_escaped = c == '\\' && !is_escaped;
        part.push(c);
    }
    parts.push(part);
    let mut all = vec![];
    for part in parts {
        let (front, rest) = match part.strip_prefix('^') {
            Some(rest) => ("", rest),
            None => ("(.|\\n)*", part.as_str()),
        };
        let ends = rest.ends_with('$') && !rest.ends_with("\\$");
        let (middle, back) = if ends { (&rest[..rest.len() - 1], "") } else { (rest, "(.|\\n)*") };
        let is_anchor_inside = middle.contains("\\b")
            || middle
                .char_indices()
                .any(|(i, c)| "^$".contains(c) && !middle[..i].ends_with(['\\', '[']) && depth_of(middle, i));
        ensure!(
            !is_anchor_inside,
            "the keyword \"pattern\" with {pattern:?} has anchors inside, which cannot be kept to"
        );
        all.push(format!("{front}({middle}){back}"));
    }
    Ok(all.join("|"))
}

/// Whether a place is outside of character classes.
fn depth_of(pattern: &str, at: usize) -> bool {
    let before = &pattern[..at];
    before.matches('[').count() <= before.matches(']').count()
}

/// What the formats that can be told by their letters look like; the others say nothing.
fn format_regex(format: &str) -> Option<&'static str> {
    Some(match format {
        "date" => "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
        "time" => "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})",
        "date-time" => {
            "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})"
        }
        "uuid" => "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
        "ipv4" => "((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\\.){3}(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])",
        "email" => "[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(\\.[A-Za-z0-9-]{1,63}){1,4}",
        _ => return None,
    })
}
