//! Answers in every dialect.

use super::*;
use crate::{AnswerStream, Tokenizer};
use proptest::prelude::*;
use serde_json::json;

fn functions() -> Vec<Function> {
    let function = |name: &str, properties: Value| Function {
        name: name.to_owned(),
        parameters: json!({"type": "object", "properties": properties}),
    };
    vec![
        function("get_weather", json!({"city": {"type": "string"}, "days": {"type": "integer"}})),
        function("write", json!({"path": {"type": "string"}, "text": {"type": "string"}})),
        function("now", json!({})),
        function(
            "set",
            json!({"on": {"type": "boolean"}, "level": {"type": "number"}, "tags": {"type": "array"},
                "to": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "unit": {"enum": ["C", "F"]}}),
        ),
    ]
}

/// Reasoning, content and calls (name, arguments) of a whole answer.
type Answer = (String, String, Vec<(String, String)>);

fn collect(deltas: impl IntoIterator<Item = Delta>) -> Answer {
    let mut answer = Answer::default();
    for delta in deltas {
        match delta {
            Delta::Reasoning(text) => answer.0.push_str(&text),
            Delta::Content(text) => answer.1.push_str(&text),
            Delta::Call { name } => answer.2.push((name, String::new())),
            Delta::Arguments(json) => answer.2.last_mut().expect("a call has begun").1.push_str(&json),
            Delta::EndCall => {
                serde_json::from_str::<Value>(&answer.2.last().unwrap().1).expect("arguments are JSON");
            }
        }
    }
    answer
}

/// The same events however a text was cut: neighbours of one kind are one.
fn merged(deltas: impl IntoIterator<Item = Delta>) -> Vec<Delta> {
    let mut all: Vec<Delta> = vec![];
    for delta in deltas {
        match (all.last_mut(), delta) {
            (Some(Delta::Reasoning(text)), Delta::Reasoning(more))
            | (Some(Delta::Content(text)), Delta::Content(more))
            | (Some(Delta::Arguments(text)), Delta::Arguments(more)) => text.push_str(&more),
            (_, delta) => all.push(delta),
        }
    }
    all
}

fn parse(dialect: Dialect, in_reasoning: bool, pieces: &[&str], cut_off: bool) -> Vec<Delta> {
    let mut parser = Parser::new(dialect, functions(), in_reasoning);
    let mut deltas: Vec<Delta> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    deltas.extend(parser.finish(cut_off));
    merged(deltas)
}

/// A tokenizer with a token for every byte, and all tags as special tokens behind them.
fn bytes_tokenizer() -> &'static Tokenizer {
    static TOKENIZER: std::sync::LazyLock<Tokenizer> = std::sync::LazyLock::new(|| {
        // As GPT-2 writes bytes: those that are no letters as letters from 256 on.
        let mut n_others = 0;
        let mut letter = |byte: u32| {
            let is_letter = matches!(byte, 33..=126 | 161..=172 | 174..=255);
            n_others += u32::from(!is_letter);
            char::from_u32(if is_letter { byte } else { 255 + n_others }).unwrap()
        };
        let vocab: Map<String, Value> = (0..256).map(|byte| (letter(byte).to_string(), json!(byte))).collect();
        let mut tags: Vec<&str> = DIALECTS.iter().flat_map(|entry| entry.tokens.iter().copied()).collect();
        tags.extend([THINK, END_THINK]);
        tags.sort_unstable();
        tags.dedup();
        let added: Vec<Value> = tags
            .iter()
            .enumerate()
            .map(|(i, tag)| {
                json!({"id": 256 + i, "content": tag, "special": true, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false})
            })
            .collect();
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let tokenizer = json!({
            "version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        Tokenizer::from_dir(dir.path()).unwrap()
    });
    &TOKENIZER
}

fn stream(dialect: Dialect, in_reasoning: bool, ids: impl IntoIterator<Item = u32>, cut_off: bool) -> Vec<Delta> {
    let mut stream = AnswerStream::chat(bytes_tokenizer(), dialect, functions(), in_reasoning, vec![]);
    let mut deltas: Vec<Delta> = ids.into_iter().flat_map(|id| stream.push(id).unwrap().deltas).collect();
    deltas.extend(stream.finish(cut_off).unwrap().0);
    merged(deltas)
}

/// The events of an answer, which are the same however it is split.
#[track_caller]
fn events(dialect: Dialect, text: &str, cut_off: bool) -> Vec<Delta> {
    let in_reasoning = text.contains(END_THINK) && !text.contains(THINK);
    let found = parse(dialect, in_reasoning, &[text], cut_off);
    let what = || format!("{dialect:?}: {text:?}");
    for (at, _) in text.char_indices() {
        assert_eq!(parse(dialect, in_reasoning, &[&text[..at], &text[at..]], cut_off), found, "{} cut at {at}", what());
    }
    let pieces: Vec<String> = text.chars().map(String::from).collect();
    let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
    assert_eq!(parse(dialect, in_reasoning, &pieces, cut_off), found, "{} by characters", what());
    let bytes = text.bytes().map(u32::from);
    assert_eq!(stream(dialect, in_reasoning, bytes, cut_off), found, "{} by bytes", what());
    found
}

#[track_caller]
fn check(dialect: Dialect, text: &str, reasoning: &str, content: &str, calls: &[(&str, Value)]) {
    let (found_reasoning, found_content, found_calls) = collect(events(dialect, text, false));
    assert_eq!((&*found_reasoning, &*found_content), (reasoning, content), "{text}");
    let found: Vec<(&str, Value)> =
        found_calls.iter().map(|(n, a)| (n.as_str(), serde_json::from_str(a).expect("JSON"))).collect();
    assert_eq!(found, calls, "{text}");
    for (at, _) in text.char_indices() {
        events(dialect, &text[..at], true);
    }
}

#[test]
fn glm_answers() {
    let check = |text: &str, reasoning: &str, content: &str, calls: &[(&str, Value)]| {
        check(Dialect::Glm, text, reasoning, content, calls);
    };
    let paris = || ("get_weather", json!({"city": "Paris"}));
    check("Hello.", "", "Hello.", &[]);
    check("47 + 38</think>\n85", "47 + 38", "85", &[]);
    check("<think>a</think>b", "a", "b", &[]);
    check("</think>b", "", "b", &[]);
    check("a < b <b>c</b>\n", "", "a < b <b>c</b>\n", &[]);
    let call = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>";
    check(call, "", "", &[paris()]);
    check(&format!("Let me look.\n{call}"), "", "Let me look.", &[paris()]);
    check(&format!("why</think>{call}{call}"), "why", "", &[paris(), paris()]);
    let lines = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n\
                 <arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>";
    check(lines, "", "", &[("get_weather", json!({"city": "Paris", "days": 3}))]);
    check("<tool_call>now</tool_call>", "", "", &[("now", json!({}))]);
}

#[test]
fn a_tag_that_the_prompt_has_written_is_no_reasoning() {
    for text in ["<think>a</think>b", "\n<think>a</think>b", "a</think>b"] {
        for name in Dialect::names() {
            let dialect = Dialect::from_name(name).unwrap();
            for cut in 0..text.len() {
                let found = collect(parse(dialect, true, &[&text[..cut], &text[cut..]], false));
                assert_eq!((found.0.trim(), found.1.as_str()), ("a", "b"), "{text:?} cut at {cut}");
            }
        }
    }
}

#[test]
fn types_follow_the_schema() {
    let check = |key: &str, value: &str, expected: Value| {
        let text = format!("<tool_call>set<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>");
        check(Dialect::Glm, &text, "", "", &[("set", json!({key: expected}))]);
    };
    check("on", "true", json!(true));
    check("on", "False", json!(false));
    check("on", "maybe", json!("maybe"));
    check("level", "3", json!(3));
    check("level", "0.5", json!(0.5));
    check("tags", "[1, \"a\"]", json!([1, "a"]));
    check("to", "null", json!(null));
    check("to", "12", json!("12"));
    check("unit", "C", json!("C"));
    check("unknown", "{\"a\": 1}", json!({"a": 1}));
    check("unknown", "plain words", json!("plain words"));
    let days = "<tool_call>get_weather<arg_key>days</arg_key><arg_value>2.0</arg_value><arg_key>city</arg_key>\
                <arg_value>12</arg_value></tool_call>";
    super::tests::check(Dialect::Glm, days, "", "", &[("get_weather", json!({"days": 2, "city": "12"}))]);
}

/// Each line is something a model has written, or might.
#[test]
fn malformed_glm_calls() {
    let check = |text: &str, reasoning: &str, content: &str, calls: &[(&str, Value)]| {
        check(Dialect::Glm, text, reasoning, content, calls);
    };
    let paris = || ("get_weather", json!({"city": "Paris"}));
    let city = "<arg_key>city</arg_key><arg_value>Paris</arg_value>";
    // Inside the reasoning, which goes on after it.
    check(&format!("hm <tool_call>get_weather{city}</tool_call> ok</think>x"), "hm ok", "x", &[paris()]);
    check(&format!("hm <tool_call>get_weather{city}</think>x"), "hm", "x", &[paris()]);
    // Undeclared, empty, or no call at all.
    check("<tool_call>fly</tool_call>", "", "<tool_call>fly</tool_call>", &[]);
    check("<tool_call></tool_call>", "", "<tool_call></tool_call>", &[]);
    check("the tag <tool_call> means a call", "", "the tag <tool_call> means a call", &[]);
    check("a <tool_call>", "", "a <tool_call>", &[]);
    check("a </tool_call> b", "", "a </tool_call> b", &[]);
    check(
        &format!("<tool_call>fly{city}</tool_call><tool_call>now</tool_call>"),
        "",
        &format!("<tool_call>fly{city}</tool_call>"),
        &[("now", json!({}))],
    );
    // Missing tags.
    check(&format!("<tool_call>get_weather{city}"), "", "", &[paris()]);
    check("<tool_call>now", "", "", &[("now", json!({}))]);
    check("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris", "", "", &[paris()]);
    check("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</tool_call>", "", "", &[paris()]);
    check("<tool_call>get_weather<arg_key>city</arg_key>Paris</arg_value></tool_call>", "", "", &[paris()]);
    check("<tool_call>get_weather<arg_key>city<arg_value>Paris</arg_value></tool_call>", "", "", &[paris()]);
    check(&format!("<tool_call>get_weather{city}<tool_call>now</tool_call>"), "", "", &[paris(), ("now", json!({}))]);
    let swallowed = format!(
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</tool_call>\n<tool_call>get_weather{city}</tool_call>"
    );
    check(&swallowed, "", "", &[paris(), paris()]);
    // Repeated keys, words between arguments.
    check(&format!("<tool_call>get_weather{city}{city}</tool_call>"), "", "", &[paris()]);
    check(
        &format!("<tool_call>get_weather and {city} then</tool_call>"),
        "",
        &format!("<tool_call>get_weather and {city} then</tool_call>"),
        &[],
    );
    check(&format!("<tool_call>get_weather{city} then </tool_call>"), "", "", &[paris()]);
    // Tags inside values.
    let text = "a</arg_value>b</tool_call>c<tool_call>d<arg_key>e</think>";
    check(
        &format!("</think><tool_call>write<arg_key>text</arg_key><arg_value>{text}</arg_value></tool_call>."),
        "",
        ".",
        &[("write", json!({"text": text}))],
    );
    // The other dialect.
    check("<tool_call>{\"name\": \"now\"}</tool_call>", "", "", &[("now", json!({}))]);
}

#[test]
fn hermes_answers() {
    let check = |text: &str, content: &str, calls: &[(&str, Value)]| {
        check(Dialect::Hermes, text, "", content, calls);
    };
    let paris = || ("get_weather", json!({"city": "Paris"}));
    let call = r#"{"name": "get_weather", "arguments": {"city": "Paris"}}"#;
    check(call, "", &[paris()]);
    check(&format!("[{call}, {call}]"), "", &[paris(), paris()]);
    check(&format!("<tool_call>[{call}]</tool_call>"), "", &[paris()]);
    check(&format!("Sure.\n<tool_call>\n{call}\n</tool_call>"), "Sure.", &[paris()]);
    check(&format!("<tool_call>{call}</tool_call>\n<tool_call>{call}</tool_call>"), "", &[paris(), paris()]);
    check(&format!("<tool_call>{call}"), "", &[paris()]);
    check(r#"{"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}"#, "", &[paris()]);
    check(r#"{"type": "function", "function": {"name": "now", "arguments": {}}}"#, "", &[("now", json!({}))]);
    check(r#"{"name": "now"}"#, "", &[("now", json!({}))]);
    let tag = r#"<tool_call>{"name": "write", "arguments": {"text": "</tool_call>"}}</tool_call>"#;
    check(tag, "", &[("write", json!({"text": "</tool_call>"}))]);
    // Not calls.
    for text in [
        r#"{"name": "fly", "parameters": {}}"#,
        r#"{"name": "get_weather", "parameters": {"city": "Paris""#,
        r#"{"name": "get_weather", "parameters": [1]}"#,
        r#"{"city": "Paris"}"#,
        "[]",
        "{not json}",
        "Use {\"name\": \"now\"} to call.",
        "<tool_call>{\"name\": \"fly\"}</tool_call>",
        "the tag <tool_call> means a call",
    ] {
        check(text, text, &[]);
    }
}

#[test]
fn llama3_answers() {
    let check = |text: &str, content: &str, calls: &[(&str, Value)]| {
        check(Dialect::Llama3, text, "", content, calls);
    };
    let paris = || ("get_weather", json!({"city": "Paris"}));
    let call = r#"{"name": "get_weather", "parameters": {"city": "Paris"}}"#;
    check(call, "", &[paris()]);
    check(&format!("<|python_tag|>{call}; {call}"), "", &[paris(), paris()]);
    check(&format!("I look.<|python_tag|>{call}"), "I look.", &[paris()]);
    check(&format!("[{call}, {call}]"), "", &[paris(), paris()]);
    let function = r#"<function=get_weather>{"city": "Paris"}</function>"#;
    check(function, "", &[paris()]);
    check(&format!("Both:\n{function}\n{function}"), "Both:", &[paris(), paris()]);
    check("<function=now>{}", "", &[("now", json!({}))]);
    check(
        r#"<function=write>{"text": "</function>", "path": "é"}</function> done"#,
        " done",
        &[("write", json!({"text": "</function>", "path": "é"}))],
    );
    check(r#"<|python_tag|>get_weather.call(city="Paris")"#, "", &[paris()]);
    check(
        r#"[get_weather(city="Paris", days=3), now()]"#,
        "",
        &[("get_weather", json!({"city": "Paris", "days": 3})), ("now", json!({}))],
    );
    check(
        r#"[set(on=True, level=-0.5, tags=['it\'s', "b\n", {"a": None, 'b': [1, 2]}], to=None)]"#,
        "",
        &[("set", json!({"on": true, "level": -0.5, "tags": ["it's", "b\n", {"a": null, "b": [1, 2]}], "to": null}))],
    );
    for text in [
        r#"{"name": "fly", "parameters": {}}"#,
        "[fly()]",
        "[now(), fly()]",
        "[now() and more]",
        "[get_weather(city=Paris)]",
        "[1, 2]",
        "<|python_tag|>print(1)",
        "<function=fly>{}</function>",
        "<function=now>[1]</function>",
        "a <function= b",
        "[now(a=[[",
    ] {
        check(text, text, &[]);
    }
}

#[test]
fn deepseek_v31_answers() {
    let check = |text: &str, reasoning: &str, content: &str, calls: &[(&str, Value)]| {
        for dialect in [Dialect::DeepSeekV31, Dialect::DeepSeekV3] {
            check(dialect, text, reasoning, content, calls);
        }
    };
    let paris = || ("get_weather", json!({"city": "Paris"}));
    let now = || ("now", json!({}));
    let (list, end_list) = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>");
    let call = |name: &str, arguments: &str| {
        format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>")
    };
    let old = |name: &str, arguments: &str| {
        format!("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>")
    };
    let one = call("get_weather", r#"{"city": "Paris"}"#);
    check("Hello.", "", "Hello.", &[]);
    check("why</think>Hello.", "why", "Hello.", &[]);
    check(&format!("{list}{one}{end_list}"), "", "", &[paris()]);
    check(&format!("hm</think>So:\n\n{list}{one}{}{end_list}", call("now", "{}")), "hm", "So:", &[paris(), now()]);
    let two = old("get_weather", "{\"city\": \"Paris\"}") + "\n" + &old("now", "{}");
    check(&format!("{list}{two}{end_list}"), "", "", &[paris(), now()]);
    // Nested JSON, tags and fences in texts, numbers of any length.
    let text = "a<｜tool▁call▁end｜>```\n{<｜tool▁calls▁end｜>";
    let nested = json!({"tags": [{"a": {"b": [1, null]}}, text], "level": 1.5});
    for nested in [call("set", &nested.to_string()), old("set", &nested.to_string())] {
        check(
            &format!("{list}{nested}{end_list}after"),
            "",
            "after",
            &[("set", json!({"tags": [{"a": {"b": [1, null]}}, text], "level": 1.5}))],
        );
    }
    check(&format!("{list}{}{end_list}", call("now", "")), "", "", &[now()]);
    // Missing tags, white space.
    check(&one, "", "", &[paris()]);
    check(&format!("{list}\n{one}\n{}\n{end_list}", call(" now ", " {} ")), "", "", &[paris(), now()]);
    check(&format!("{list}<｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}{end_list}"), "", "", &[now()]);
    check(&format!("{list}<｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}{one}"), "", "", &[now(), paris()]);
    check(&format!("{list}<｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}"), "", "", &[now()]);
    check(&format!("{list}{one}"), "", "", &[paris()]);
    // Inside the reasoning, which goes on after it.
    check(&format!("hm {list}{one}{end_list} ok</think>x"), "hm ok", "x", &[paris()]);
    // Not calls.
    for text in [
        call("fly", "{}"),
        format!("{list}{}{end_list}", call("fly", "{}")),
        format!("{list}{}{end_list}", old("fly", "{}")),
        format!("{list}{}{end_list}", call("now", "[1]")),
        format!("{list}{}{end_list}", call("now", "{")),
        format!("{list}{end_list}"),
        format!("the token {list} begins calls"),
        format!("a {list}"),
        "<｜tool▁call▁begin｜>now".to_owned(),
    ] {
        check(&text, "", &text, &[]);
    }
    let fly = call("fly", "{}");
    check(&format!("{list}{fly}{one}{end_list}"), "", &format!("{list}{fly}"), &[paris()]);
    check(&format!("{list}{one}{fly}{end_list}"), "", &format!("{fly}{end_list}"), &[paris()]);
}

#[test]
fn deepseek_v32_answers() {
    let check = |text: &str, reasoning: &str, content: &str, calls: &[(&str, Value)]| {
        check(Dialect::DeepSeekV32, text, reasoning, content, calls);
    };
    let paris = || ("get_weather", json!({"city": "Paris"}));
    let now = || ("now", json!({}));
    let list = |calls: &str| format!("\n\n<｜DSML｜function_calls>\n{calls}</｜DSML｜function_calls>");
    let call =
        |name: &str, parameters: &str| format!("<｜DSML｜invoke name=\"{name}\">\n{parameters}</｜DSML｜invoke>\n");
    let parameter = |name: &str, is_text: bool, value: &str| {
        format!("<｜DSML｜parameter name=\"{name}\" string=\"{is_text}\">{value}</｜DSML｜parameter>\n")
    };
    let one = call("get_weather", &parameter("city", true, "Paris"));
    check("Hello.", "", "Hello.", &[]);
    check("why</think>Hello.", "why", "Hello.", &[]);
    check("</think>Hello.", "", "Hello.", &[]);
    check(&list(&one), "", "", &[paris()]);
    check(&format!("hm</think>So:{}", list(&(one.clone() + &call("now", "\n")))), "hm", "So:", &[paris(), now()]);
    check(&format!("hm</think>{}", list(&one)), "hm", "", &[paris()]);
    check(
        &list(&call("get_weather", &(parameter("city", true, "") + &parameter("days", false, "3")))),
        "",
        "",
        &[("get_weather", json!({"city": "", "days": 3}))],
    );
    // Texts and JSON: what the model marks, unless the schema knows better.
    for (key, is_text, value, expected) in [
        ("to", true, "null", json!("null")),
        ("to", false, "null", json!(null)),
        ("to", true, " 12\n", json!(" 12\n")),
        ("to", false, "12", json!("12")),
        ("to", false, "\"12\"", json!("12")),
        ("on", true, "true", json!(true)),
        ("on", false, "False", json!(false)),
        ("level", true, "0.5", json!(0.5)),
        ("level", false, "0.5", json!(0.5)),
        ("tags", false, r#"[1, {"a": "</｜DSML｜parameter>"}]"#, json!([1, {"a": "</｜DSML｜parameter>"}])),
        ("unknown", true, "{\"a\": 1}", json!("{\"a\": 1}")),
        ("unknown", false, "{\"a\": 1}", json!({"a": 1})),
        ("unknown", false, "plain words", json!("plain words")),
        ("unknown", true, "<｜DSML｜invoke> <b>é</b> \"x\" \\n", json!("<｜DSML｜invoke> <b>é</b> \"x\" \\n")),
    ] {
        check(&list(&call("set", &parameter(key, is_text, value))), "", "", &[("set", json!({key: expected}))]);
    }
    // Missing or other tags, words between them.
    let calls = |text: &str| check(text, "", "", &[paris()]);
    calls(&one);
    calls(&format!("{one}</｜DSML｜function_calls>"));
    calls(&list(&one).replace("</｜DSML｜function_calls>", ""));
    calls(&list(&one).replace("</｜DSML｜invoke>", ""));
    calls(&list(&one).replace("</｜DSML｜parameter>", ""));
    calls(&list(&one).replace(" string=\"true\"", ""));
    calls(&list(&one).replace("<｜DSML｜parameter", "so <｜DSML｜parameter"));
    calls(&list(&call("get_weather", &(parameter("city", true, "Paris") + &parameter("city", true, "Rome")))));
    calls(&list(&call("get_weather", "{\"city\": \"Paris\"}\n")));
    calls("<｜DSML｜invoke name=\"get_weather\">{\"city\": \"Paris\"}");
    check(&list("<｜DSML｜invoke name=\"now\"/>\n"), "", "", &[now()]);
    check(&format!("{} and more", list(&one)), "", " and more", &[paris()]);
    check(&format!("hm{} ok</think>x", list(&one)), "hm ok", "x", &[paris()]);
    check(&format!("hm{}</think>x", list(&one).replace("</｜DSML｜function_calls>", "")), "hm", "x", &[paris()]);
    // Not calls.
    for text in [
        list(&call("fly", &parameter("a", true, "b"))),
        call("fly", ""),
        list(""),
        "the tag <｜DSML｜function_calls> begins calls".to_owned(),
        "a <｜DSML｜function_calls>".to_owned(),
        "a <｜DSML｜invoke name=\"now".to_owned(),
        "a <｜DSML｜invoke name=now>".to_owned(),
        "｜DSML｜".to_owned(),
    ] {
        check(&text, "", text.trim_start_matches('\n'), &[]);
    }
    let fly = call("fly", "");
    check(&list(&(fly.clone() + &one)), "", &format!("<｜DSML｜function_calls>\n{}", fly.trim_end()), &[paris()]);
}

/// Digits and texts are passed on as the model wrote them.
#[test]
fn arguments_keep_every_digit() {
    let json = r#"{"level": 123456789012345678901234567890, "tags": [1.0, 1e2, "\u00e9"], "to": "12"}"#;
    let dsml = |key: &str, is_text: bool, value: &str| {
        format!("<｜DSML｜parameter name=\"{key}\" string=\"{is_text}\">{value}</｜DSML｜parameter>")
    };
    let answers = [
        (Dialect::Hermes, format!("<tool_call>{{\"name\": \"set\", \"arguments\": {json}}}</tool_call>")),
        (Dialect::Llama3, format!("{{\"name\": \"set\", \"parameters\": {json}}}")),
        (Dialect::Llama3, format!("<function=set>{json}</function>")),
        (Dialect::DeepSeekV31, format!("<｜tool▁call▁begin｜>set<｜tool▁sep｜>{json}<｜tool▁call▁end｜>")),
        (
            Dialect::DeepSeekV3,
            format!("<｜tool▁call▁begin｜>function<｜tool▁sep｜>set\n```json\n{json}\n```<｜tool▁call▁end｜>"),
        ),
        (Dialect::DeepSeekV32, format!("<｜DSML｜invoke name=\"set\">{json}</｜DSML｜invoke>")),
        (
            Dialect::DeepSeekV32,
            format!(
                "<｜DSML｜invoke name=\"set\">{}{}{}</｜DSML｜invoke>",
                dsml("level", false, "123456789012345678901234567890"),
                dsml("tags", false, r#"[1.0, 1e2, "\u00e9"]"#),
                dsml("to", true, "12")
            ),
        ),
        (
            Dialect::Glm,
            "<tool_call>set<arg_key>level</arg_key><arg_value>123456789012345678901234567890</arg_value>\
             <arg_key>tags</arg_key><arg_value>[1.0, 1e2, \"\\u00e9\"]</arg_value><arg_key>to</arg_key>\
             <arg_value>12</arg_value></tool_call>"
                .to_owned(),
        ),
    ];
    for (dialect, text) in answers {
        let (_, content, calls) = collect(events(dialect, &text, false));
        assert_eq!((content.as_str(), calls), ("", vec![("set".to_owned(), json.to_owned())]), "{dialect:?}: {text}");
    }
}

/// The tags as the vocabulary's own tokens, special as some checkpoints declare them.
#[test]
fn tags_may_be_special_tokens() {
    let answers = [
        (Dialect::Glm, "hm</think><tool_call>now</tool_call>"),
        (Dialect::Hermes, "hm</think><tool_call>{\"name\": \"now\"}</tool_call>"),
        (Dialect::Llama3, "hm</think><|python_tag|>now.call()"),
        (
            Dialect::DeepSeekV31,
            "hm</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (
            Dialect::DeepSeekV32,
            "hm</think><｜DSML｜function_calls>\n<｜DSML｜invoke name=\"now\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        ),
    ];
    for (dialect, text) in answers {
        let ids = bytes_tokenizer().encode(text, false).unwrap();
        assert!(ids.iter().any(|id| *id >= 256) && ids.len() < text.len());
        let expected = [
            Delta::Reasoning("hm".into()),
            Delta::Call { name: "now".into() },
            Delta::Arguments("{}".into()),
            Delta::EndCall,
        ];
        assert_eq!(stream(dialect, true, ids, false), expected, "{dialect:?}");
        assert_eq!(events(dialect, text, false), expected, "{dialect:?}");
    }
}

#[test]
fn the_registry_is_in_the_order_of_dialects() {
    for name in Dialect::names() {
        let dialect = Dialect::from_name(name).unwrap();
        assert_eq!((dialect.name(), dialect.entry().dialect), (name, dialect));
    }
    assert_eq!(Dialect::from_name("morse"), None);
}

/// The last call is open, and what is there of its arguments is passed on where the dialect writes them one by one or alone.
#[test]
fn a_cut_off_call_keeps_its_open_end_and_a_half_name_is_text() {
    let open = |dialect: Dialect, text: &str, arguments: &str| {
        let found = events(dialect, text, true);
        assert!(!found.contains(&Delta::EndCall), "{text}");
        let expected = ("".to_owned(), "".to_owned(), vec![("get_weather".to_owned(), arguments.to_owned())]);
        assert_eq!(collect(found), expected, "{text}");
    };
    let glm =
        "<tool_call>get_weather<arg_key>days</arg_key><arg_value>1</arg_value><arg_key>city</arg_key><arg_value>Pa";
    open(Dialect::Glm, glm, r#"{"days": 1"#);
    let dsml = "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"days\" \
                string=\"false\">1</｜DSML｜parameter>\n<｜DSML｜parameter name=\"city\" string=\"true\">Pa";
    open(Dialect::DeepSeekV32, dsml, r#"{"days": 1"#);
    let v31 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"days\": 1, \"city\": \"Pa";
    open(Dialect::DeepSeekV31, v31, r#"{"days": 1, "city": "Pa"#);
    let v3 = v31.replace("get_weather<｜tool▁sep｜>", "function<｜tool▁sep｜>get_weather\n```json\n");
    open(Dialect::DeepSeekV3, &v3, r#"{"days": 1, "city": "Pa"#);
    for (dialect, text) in [
        (Dialect::Glm, "<tool_call>get_w"),
        (Dialect::Hermes, "<tool_call>{\"name\": \"get_weather\", \"arguments\": {"),
        (Dialect::Llama3, "<|python_tag|>{\"name\": \"get_weather\", \"parameters\": {"),
        (Dialect::DeepSeekV32, "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_w"),
        (Dialect::DeepSeekV31, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_w"),
    ] {
        assert_eq!(events(dialect, text, true), [Delta::Content(text.to_owned())], "{dialect:?}");
    }
}

/// A list that waits for its end holds no open call.
#[test]
fn a_call_is_open_up_to_its_end() {
    for (dialect, begin, end) in [
        (Dialect::Glm, "<tool_call>now", "</tool_call>"),
        (Dialect::Hermes, "<tool_call>{\"name\": \"now\"}", "</tool_call>"),
        (Dialect::DeepSeekV31, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}", "<｜tool▁call▁end｜>"),
        (Dialect::DeepSeekV32, "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"now\">\n", "</｜DSML｜invoke>"),
    ] {
        let mut parser = Parser::new(dialect, functions(), false);
        parser.push(begin);
        assert!(parser.in_call() && parser.n_calls() == 0, "{dialect:?}");
        parser.push(end);
        assert!(!parser.in_call() && parser.n_calls() == 1, "{dialect:?}");
    }
}

#[test]
fn without_functions_everything_is_text() {
    for (dialect, text) in [
        (Dialect::Glm, "<tool_call>now</tool_call>"),
        (Dialect::Hermes, "{\"name\": \"now\"}"),
        (Dialect::Llama3, "<function=now>{}</function>"),
        (Dialect::DeepSeekV31, "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        (Dialect::DeepSeekV32, "<｜DSML｜invoke name=\"now\"></｜DSML｜invoke>"),
    ] {
        let mut parser = Parser::new(dialect, vec![], false);
        let mut deltas = parser.push(text);
        deltas.extend(parser.finish(false));
        assert_eq!(collect(deltas).1, text);
    }
}

#[test]
fn arguments_come_one_by_one() {
    let mut parser = Parser::new(Dialect::Glm, functions(), false);
    let first = parser.push("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>");
    let name = "get_weather".to_owned();
    assert_eq!(first, [Delta::Call { name }, Delta::Arguments(r#"{"city": "Paris""#.into())]);
    let rest = parser.push("days</arg_key><arg_value>2</arg_value></tool_call>");
    assert_eq!(rest, [Delta::Arguments(r#", "days": 2"#.into()), Delta::Arguments("}".into()), Delta::EndCall]);
}

proptest! {
    /// Any order of tags and words, cut anywhere: no panic, the same events, and arguments that are JSON.
    #[test]
    fn cuts_do_not_matter(
        parts in prop::collection::vec(0usize..40, 0..16), cuts in prop::collection::vec(0usize..300, 0..6),
        which in 0usize..6, in_reasoning: bool, cut_off: bool,
    ) {
        let dialect = DIALECTS[which].dialect;
        let own = dialect.entry().tokens.iter().copied().chain((dialect.entry().reader)().openings().iter().copied());
        let own: Vec<&str> = own.collect();
        let words = [THINK, END_THINK, "get_weather", "city", " \n", "{\"name\": \"now\"}", "{\"city\": \"Paris\"}", "now", "<",
            "é", "words", "[now()]", ">", "</function>", " name=\"now\">", " name=\"city\" string=\"true\">", "</｜DSML｜invoke>",
            "<｜DSML｜parameter", "</｜DSML｜parameter>", "</｜DSML｜function_calls>", "function", "\n```json\n", "{}", "\n```"];
        let all: Vec<&str> = words.iter().chain(own.iter()).chain(own.iter()).copied().collect();
        let text: String = parts.iter().map(|part| all[*part % all.len()]).collect();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).filter(|c| text.is_char_boundary(*c)).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
        let whole = parse(dialect, in_reasoning, &[&text], cut_off);
        prop_assert_eq!(&parse(dialect, in_reasoning, &pieces, cut_off), &whole);
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
        prop_assert_eq!(&parse(dialect, in_reasoning, &chars, cut_off), &whole);
        if !cut_off {
            collect(whole);
        }
    }
}
