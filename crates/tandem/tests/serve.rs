//! `tandem serve` with the bundled model, through HTTP.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

struct Server {
    process: Child,
    url: String,
}

impl Server {
    /// Starts a server on a free port.
    fn start(args: &[&str]) -> Server {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8");
        let mut process = Command::new(env!("CARGO_BIN_EXE_tandem"))
            .args(["serve", "--model", model, "--port", "0", "--prefill-chunk", "64", "--served-model-name", "fable"])
            .args(args)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let url = loop {
            let line = lines.next().expect("the server has ended").unwrap();
            if let Some((_, rest)) = line.split_once("http://") {
                break format!("http://{}", rest.split(' ').next().unwrap());
            }
        };
        // Nobody reads further messages, but the pipe must not fill up.
        std::thread::spawn(move || lines.for_each(drop));
        Server { process, url }
    }

    fn get(&self, path: &str) -> String {
        agent().get(format!("{}{path}", self.url)).call().unwrap().body_mut().read_to_string().unwrap()
    }

    /// Status and body of a request.
    fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let mut response = agent()
            .post(format!("{}{path}", self.url))
            .header("content-type", "application/json")
            .send(body.to_string())
            .unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    fn ok(&self, path: &str, body: Value) -> Value {
        let (status, body) = self.post(path, body);
        assert_eq!(status, 200, "{body}");
        body
    }

    /// Data of a stream's events.
    fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = json!(true);
        let (status, text) = self.post(path, body);
        assert_eq!(status, 200, "{text}");
        let Value::String(text) = text else { panic!("{text} is no stream") };
        let data = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        data.map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    fn chat(&self, mut body: Value) -> Value {
        body["temperature"] = json!(0);
        self.ok("/v1/chat/completions", body)
    }

    /// The value of a metric.
    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics");
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).split(' ').next_back().unwrap().parse().unwrap()
    }

    fn wait_until_free(&self) {
        let start = Instant::now();
        while self.metric("tandem_cache_pages_used") > 0.0 {
            assert!(start.elapsed() < Duration::from_secs(20), "pages are still in use");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn weather_tool() -> Value {
    json!({"type": "function", "function": {
        "name": "get_weather", "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }})
}

/// Where an interface's usage has a place for them, drafted tokens are in it: those that were said, and the others.
#[test]
fn drafted_tokens_are_counted_where_an_interface_has_a_place_for_them() {
    let server = Server::start(&["--draft-depth", "3"]);
    let (prompt, last) = ("Tell me a story about a brave fox named Lily.", json!({"include_usage": true}));
    let chat = json!({"messages": user(prompt), "max_tokens": 40, "temperature": 0, "stream_options": last});
    let text =
        json!({"prompt": "The fox", "max_tokens": 40, "temperature": 0, "ignore_eos": true, "stream_options": last});
    let two = json!({"prompt": ["The fox", "One day"], "max_tokens": 40, "temperature": 0, "ignore_eos": true, "n": 2});
    let responses = json!({"input": prompt, "max_output_tokens": 40, "temperature": 0});
    let messages = json!({"model": "fable", "messages": user(prompt), "max_tokens": 40, "temperature": 0});
    let whole = |body: &Value| {
        let mut body = body.clone();
        body.as_object_mut().unwrap().remove("stream_options");
        body
    };
    let mut sums = [0, 0];
    for (path, body, is_stream, has_place) in [
        ("/v1/chat/completions", &chat, false, true),
        ("/v1/chat/completions", &chat, true, true),
        ("/v1/completions", &text, false, true),
        ("/v1/completions", &text, true, true),
        ("/v1/completions", &two, false, true),
        ("/v1/responses", &responses, false, false),
        ("/v1/messages", &messages, false, false),
    ] {
        let before = ["num_draft_tokens", "num_accepted_tokens"]
            .map(|name| server.metric(&format!("vllm:spec_decode_{name}_total{{model_name=\"fable\"}}")));
        let usage = match is_stream {
            true => server.stream(path, body.clone()).last().unwrap()["usage"].clone(),
            false => server.ok(path, whole(body))["usage"].clone(),
        };
        server.wait_until_free();
        let [drafted, accepted] = ["num_draft_tokens", "num_accepted_tokens"]
            .map(|name| server.metric(&format!("vllm:spec_decode_{name}_total{{model_name=\"fable\"}}")));
        let counted = [accepted - before[1], drafted - before[0] - (accepted - before[1])];
        assert!(counted[0] > 10.0, "{path}: {counted:?}");
        let details = &usage["completion_tokens_details"];
        let found = ["accepted", "rejected"].map(|name| details[format!("{name}_prediction_tokens")].as_f64());
        assert_eq!(found, if has_place { counted.map(Some) } else { [None, None] }, "{path} {is_stream}: {usage}");
        sums = [sums[0] + counted[0] as u64, sums[1] + counted[1] as u64];
    }
    // The same in sum, and by place in the draft.
    let info: Value = serde_json::from_str(&server.get("/info")).unwrap();
    let drafts = &info["drafts"];
    assert_eq!((&drafts["accepted"], &drafts["tokens"]), (&json!(sums[0]), &json!(sums[0] + sums[1])), "{info}");
    let by_position: Vec<u64> = serde_json::from_value(drafts["accepted_by_position"].clone()).unwrap();
    assert_eq!(by_position.iter().sum::<u64>(), sums[0]);
    for (position, n) in by_position.iter().enumerate() {
        let name = "vllm:spec_decode_num_accepted_tokens_per_pos_total";
        let label = format!("{name}{{model_name=\"fable\",position=\"{position}\"}}");
        assert!(position >= 3 || server.metric(&label) == *n as f64, "{label}");
    }
    // Nothing is drafted, nothing is counted.
    let plain = Server::start(&["--draft-depth", "0"]);
    let usage = &plain.ok("/v1/completions", whole(&text))["usage"]["completion_tokens_details"];
    assert_eq!((&usage["accepted_prediction_tokens"], &usage["rejected_prediction_tokens"]), (&json!(0), &json!(0)));
}

#[test]
fn answers_in_every_interface() {
    let server = Server::start(&[]);
    // The golden text of `tandem run`, whole and in pieces.
    let story = user("Tell me a story about a brave fox named Lily.");
    let whole = server.chat(json!({"model": "fable", "messages": story}));
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.starts_with("Far away, in the valley, lived a brave fox named Lily."), "{text}");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!(whole["usage"]["prompt_tokens"], 17);
    let options = json!({"messages": story, "temperature": 0, "stream_options": {"include_usage": true}});
    let pieces = server.stream("/v1/chat/completions", options);
    let joined: String = pieces.iter().filter_map(|p| p["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(joined, text);
    assert_eq!(pieces.last().unwrap()["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);

    // Reasoning.
    let sum = json!({"messages": user("What is 47 + 38?"), "reasoning_effort": "medium"});
    let answer = server.chat(sum);
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["reasoning_content"], "47 + 38: ones 7 + 8 = 15, carry 1; tens 4 + 3 + 1 = 8. So 85.");
    assert_eq!(message["content"], "47 + 38 = 85.");
    assert!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64() > Some(20));

    // A tool: call, observation, answer.
    let question = json!({"role": "user", "content": "What is the weather in Paris?"});
    let asked = server.chat(json!({"messages": [question], "tools": [weather_tool()]}));
    let message = asked["choices"][0]["message"].clone();
    assert_eq!(asked["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(message["content"], Value::Null);
    let call = &message["tool_calls"][0];
    assert_eq!(call["function"]["name"], "get_weather");
    assert_eq!(
        serde_json::from_str::<Value>(call["function"]["arguments"].as_str().unwrap()).unwrap(),
        json!({"city": "Paris"})
    );
    let result =
        json!({"role": "tool", "tool_call_id": call["id"], "content": "{\"temperature\": 21, \"sky\": \"sunny\"}"});
    let answered = server.chat(json!({"messages": [question, message, result], "tools": [weather_tool()]}));
    let text = answered["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.contains("21") && text.contains("Paris"), "{text}");

    // The same through Anthropic's interface.
    let tool = json!({"name": "get_weather", "input_schema": weather_tool()["function"]["parameters"]});
    let body = json!({"model": "fable", "max_tokens": 99, "temperature": 0, "messages": [question], "tools": [tool]});
    let asked = server.ok("/v1/messages", body.clone());
    assert_eq!(asked["stop_reason"], "tool_use");
    assert_eq!(asked["content"][0]["input"], json!({"city": "Paris"}));
    let events = server.stream("/v1/messages", body);
    let kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!((kinds[0], kinds[1], *kinds.last().unwrap()), ("message_start", "content_block_start", "message_stop"));
    let json: String = events.iter().filter_map(|e| e["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), json!({"city": "Paris"}));
    let count = server.ok("/v1/messages/count_tokens", json!({"model": "fable", "messages": story}));
    assert_eq!(count["input_tokens"], 17);

    // And through OpenAI's newer one.
    let response = server.ok(
        "/v1/responses",
        json!({
            "input": "What is 47 + 38?", "temperature": 0, "reasoning": {"effort": "low"},
        }),
    );
    assert_eq!(
        (&response["output"][0]["type"], &response["output"][1]["content"][0]["text"]),
        (&json!("reasoning"), &json!("47 + 38 = 85."))
    );
    let events = server.stream("/v1/responses", json!({"input": "What is 47 + 38?", "temperature": 0}));
    assert_eq!(events.last().unwrap()["type"], "response.completed");

    // Plain completion, tokens and their texts.
    let tokens = server.ok("/tokenize", json!({"prompt": "Once upon a time"}))["tokens"].clone();
    assert_eq!(server.ok("/detokenize", json!({"tokens": tokens}))["prompt"], "Once upon a time");
    let body =
        json!({"prompt": tokens, "temperature": 0, "max_tokens": 5, "logprobs": 2, "echo": true, "ignore_eos": true});
    let completion = server.ok("/v1/completions", body);
    let choice = &completion["choices"][0];
    assert!(choice["text"].as_str().unwrap().starts_with("Once upon a time"));
    // The prompt's tokens, of which the first has no probability, and the answer's.
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), 9);
    assert_eq!(choice["finish_reason"], "length");
    let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert!(logprobs[0].is_null() && logprobs.iter().skip(1).all(|l| l.as_f64().unwrap() <= 0.0));

    // Several answers, stop strings, seeds.
    let body = json!({"messages": story, "n": 3, "seed": 5, "max_tokens": 40, "stop": [","], "temperature": 1.5});
    let first = server.ok("/v1/chat/completions", body.clone());
    let texts = |answer: &Value| -> Vec<String> {
        answer["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].to_string()).collect()
    };
    assert!(texts(&first).len() == 3 && texts(&first).iter().all(|text| !text.contains(',')));
    assert_eq!(texts(&first), texts(&server.ok("/v1/chat/completions", body)));

    // Every document is there, and every page given back.
    assert!(server.get("/openapi.json").contains("/v1/chat/completions"));
    assert!(server.get("/").contains("<title>Tandem</title>"));
    assert!(server.get("/health").contains("ok") && server.get("/ready").contains("ready"));
    server.wait_until_free();
}

#[test]
fn structured_output_keeps_its_form() {
    let server = Server::start(&[]);
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "city"],
        "properties": {"name": {"type": "string"}, "city": {"enum": ["Oslo", "Rome"]}},
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "person", "schema": schema}});
    let nora = user("As JSON with keys name and city: Nora lives in Oslo.");
    let answer = server.chat(json!({"messages": nora, "response_format": format, "max_tokens": 200}));
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(text).unwrap(), json!({"name": "Nora", "city": "Oslo"}), "{answer}");
    // After reasoning; the model ends its second text inside the reasoning section, which must not empty the answer.
    let integer =
        json!({"type": "object", "properties": {"sum": {"type": "integer", "maximum": 999}}, "required": ["sum"]});
    let sum = json!({"type": "json_schema", "json_schema": {"schema": integer}});
    for (messages, format, key) in [(user("What is 47 + 38?"), sum, "sum"), (nora, format, "city")] {
        let answer = server.chat(json!({
            "messages": messages, "response_format": format, "max_tokens": 300, "reasoning_effort": "high",
        }));
        let message = &answer["choices"][0]["message"];
        let value: Value =
            serde_json::from_str(message["content"].as_str().unwrap()).unwrap_or_else(|e| panic!("{answer}: {e}"));
        assert!(!value[key].is_null() && message["reasoning_content"].is_string(), "{answer}");
    }
    // Against what the model would rather say.
    let story = "Tell me a story about a brave fox named Lily.";
    let answer =
        server.chat(json!({"messages": user(story), "response_format": {"type": "json_object"}, "max_tokens": 300}));
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(
        text.starts_with('{') && (choice["finish_reason"] == "length" || serde_json::from_str::<Value>(text).is_ok()),
        "{text}"
    );
    for (outputs, expected) in [
        (json!({"regex": "[0-9]{3}-[0-9]{2}"}), r"^\d{3}-\d{2}$"),
        (json!({"choice": ["red", "blue"]}), "^(red|blue)$"),
        (json!({"grammar": "start: \"a\" \"b\"+ \"c\""}), "^ab+c$"),
    ] {
        let answer = server.chat(json!({"messages": user(story), "structured_outputs": outputs, "max_tokens": 30}));
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
        let fits = match expected {
            "^(red|blue)$" => text == "red" || text == "blue",
            "^ab+c$" => {
                answer["choices"][0]["finish_reason"] == "length" || (text.starts_with("ab") && text.ends_with("bc"))
            }
            _ => {
                text.len() == 6
                    && text.split('-').map(str::len).eq([3, 2])
                    && text.chars().all(|c| c == '-' || c.is_ascii_digit())
            }
        };
        assert!(fits, "{text} for {outputs}");
    }
    // Calls that must be made.
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "get_weather"}})] {
        let answer = server.chat(json!({
            "messages": user(story), "tools": [weather_tool()], "tool_choice": choice, "parallel_tool_calls": false,
            "max_tokens": 100,
        }));
        let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
        assert_eq!(call["name"], "get_weather", "{answer}");
        let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
        assert!(arguments["city"].is_string());
    }
    let (status, error) = server.post("/v1/chat/completions", json!({
        "messages": user("x"), "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}},
    }));
    assert_eq!((status, &error["error"]["param"]), (400, &json!("response_format")), "{error}");
}

#[test]
fn errors_say_what_is_wrong() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "# keys\nsecret-one\nsecret-two\n").unwrap();
    let key_file = keys.path().to_str().unwrap();
    let server = Server::start(&["--api-key-file", key_file, "--max-body-mb", "1"]);
    let post = |body: String, key: &str| {
        let mut response = agent()
            .post(format!("{}/v1/chat/completions", server.url))
            .header("authorization", format!("Bearer {key}"))
            .send(body)
            .unwrap();
        let status = response.status().as_u16();
        (
            status,
            serde_json::from_str::<Value>(&response.body_mut().read_to_string().unwrap()).unwrap()["error"].clone(),
        )
    };
    let check = |body: Value, status: u16, param: Value, message: &str| {
        let (found, error) = post(body.to_string(), "secret-two");
        assert_eq!((found, &error["param"]), (status, &param), "{error}");
        assert!(error["message"].as_str().unwrap().contains(message), "{error}");
    };
    assert_eq!(post(json!({"messages": user("x"), "max_tokens": 1}).to_string(), "secret-one").0, 200);
    let (status, error) = post("{}".into(), "secret");
    assert_eq!((status, &error["code"]), (401, &json!("invalid_api_key")));
    assert_eq!(post("{\"messages\": [".into(), "secret-one").0, 400);
    assert_eq!(post(" ".repeat(2 << 20), "secret-one").0, 413);
    check(json!({"messages": []}), 400, json!("messages"), "empty");
    check(json!({"messages": user("x"), "model": "gpt-4"}), 404, json!("model"), "fable");
    check(json!({"messages": user("x"), "temperature": "hot"}), 400, json!("temperature"), "invalid type");
    check(json!({"messages": user("x"), "temperature": 3}), 400, json!("temperature"), "0 to 2");
    check(json!({"messages": user("x"), "top_p": 2}), 400, json!("top_p"), "from 0 to 1");
    check(json!({"messages": [{"role": "robot"}]}), 400, json!("messages[0].role"), "robot");
    check(json!({"messages": user("x"), "logit_bias": {"dog": 1}}), 400, json!("logit_bias"), "token id");
    check(json!({"messages": user("x"), "tool_choice": "required"}), 400, json!("tool_choice"), "no tools");
    check(json!({"messages": user(&"word ".repeat(3000))}), 400, json!("messages"), "context");
    // The number of a variant is not its name.
    check(json!({"messages": user("x"), "response_format": {"type": 0}}), 400, json!("response_format"), "type is 0");
    let block = json!([{"role": "user", "content": [{"type": 0, "text": "x"}]}]);
    for (path, body) in [
        ("/v1/messages", json!({"model": "fable", "max_tokens": 1, "messages": block})),
        ("/v1/messages/count_tokens", json!({"model": "fable", "messages": block})),
        ("/v1/messages", json!({"model": "fable", "max_tokens": 1, "messages": user("x"), "tool_choice": {"type": 3}})),
        ("/v1/responses", json!({"input": [{"type": 1}]})),
        ("/v1/responses", json!({"input": "x", "text": {"format": {"type": 1}}})),
        // Nor is a list of values an object.
        ("/v1/chat/completions", json!({"messages": user("x"), "max_tokens": 1, "stream_options": [true, null]})),
        ("/v1/chat/completions", json!({"messages": [["user", "x", null, null, null, null]], "max_tokens": 1})),
        ("/v1/messages", json!({"model": "fable", "max_tokens": 1, "messages": [["user", "x"]]})),
        ("/tokenize", json!(["x", null, null])),
    ] {
        let url = format!("{}{path}", server.url);
        let mut answer = agent().post(url).header("x-api-key", "secret-one").send(body.to_string()).unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        assert_eq!(answer.status(), 400, "{body}: {text}");
    }
    let (status, error) = post(json!({"messages": user("x")}).to_string(), "secret-three");
    assert_eq!((status, &error["type"]), (401, &json!("authentication_error")));
    // It still serves, and nothing is held.
    assert_eq!(post(json!({"messages": user("x"), "max_tokens": 1}).to_string(), "secret-one").0, 200);
}

#[test]
fn a_client_that_goes_away_frees_its_pages_and_a_full_queue_says_so() {
    let server = Server::start(&["--max-batch", "2", "--max-queue", "1"]);
    let long = json!({"messages": user("Tell me a story."), "ignore_eos": true, "max_tokens": 1500, "stream": true});
    let open = || {
        let mut response = agent().post(format!("{}/v1/chat/completions", server.url)).send(long.to_string()).unwrap();
        let mut some = [0; 100];
        if response.status() == 200 {
            response.body_mut().as_reader().read_exact(&mut some).unwrap();
        }
        response
    };
    let streams: Vec<_> = (0..2).map(|_| open()).collect();
    let start = Instant::now();
    while server.metric("tandem_cache_pages_used") == 0.0 {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing runs");
    }
    let waiting = std::thread::scope(|scope| {
        let third = scope.spawn(|| {
            agent()
                .post(format!("{}/v1/chat/completions", server.url))
                .send(json!({"messages": user("x"), "max_tokens": 1}).to_string())
                .unwrap()
                .status()
                .as_u16()
        });
        let start = Instant::now();
        while server.metric("tandem_requests_waiting") == 0.0 {
            assert!(start.elapsed() < Duration::from_secs(20), "nothing waits");
        }
        let (refused, _) = server.post("/v1/chat/completions", json!({"messages": user("y"), "max_tokens": 1}));
        assert_eq!(refused, 429);
        drop(streams);
        third.join().unwrap()
    });
    assert_eq!(waiting, 200);
    server.wait_until_free();
    assert_eq!(server.metric("tandem_requests_running"), 0.0);
}

#[test]
fn a_request_has_a_deadline_and_a_stopping_server_completes_its_answers() {
    let mut server = Server::start(&["--request-timeout", "5", "--max-batch", "2"]);
    let story = user("Tell me a story.");
    let long = json!({"messages": story, "ignore_eos": true, "max_tokens": 1900, "n": 16});
    let (status, error) = server.post("/v1/chat/completions", long);
    assert_eq!((status, &error["error"]["code"]), (504, &json!("deadline_exceeded")), "{error}");
    server.wait_until_free();
    // The signal comes while the answer is written.
    let body = json!({"messages": story, "ignore_eos": true, "max_tokens": 60, "stream": true});
    let mut answer = agent().post(format!("{}/v1/chat/completions", server.url)).send(body.to_string()).unwrap();
    let mut lines = BufReader::new(answer.body_mut().as_reader()).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().starts_with("data: "));
    assert!(Command::new("kill").arg(server.process.id().to_string()).status().unwrap().success());
    assert_eq!(lines.filter(|line| !line.is_empty()).last().unwrap(), "data: [DONE]");
    assert!(server.process.wait().unwrap().success());
}

#[test]
fn a_conversation_runs_only_its_new_tokens_and_a_restart_finds_them_on_disk() {
    let cache = tempfile::tempdir().unwrap();
    let args = ["--cache-dir", cache.path().to_str().unwrap()];
    let mut messages = vec![json!({"role": "user", "content": "What is the weather in Paris?"})];
    let body = |messages: &[Value]| json!({"messages": messages, "tools": [weather_tool()], "max_tokens": 60});
    let mut server = Server::start(&args);
    let mut seen = 0;
    for turn in 0..20 {
        let before = server.metric("tandem_prompt_tokens_total");
        let answer = server.chat(body(&messages));
        let n_prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
        let n_run = (server.metric("tandem_prompt_tokens_total") - before) as usize;
        // All but what is new: the answer's last token, which was chosen and not run, and the message after it.
        assert!(
            turn == 0 || n_run <= n_prompt - seen + 1,
            "turn {turn}: {n_run} of {n_prompt} tokens run, {seen} known"
        );
        seen = n_prompt + answer["usage"]["completion_tokens"].as_u64().unwrap() as usize;
        let message = answer["choices"][0]["message"].clone();
        let is_call = message["tool_calls"].is_array();
        messages.push(message);
        messages.push(match is_call {
            true => json!({"role": "tool", "content": "{\"temperature\": 21, \"sky\": \"sunny\"}"}),
            false => {
                json!({"role": "user", "content": format!("What is the weather in {}?", ["Rome", "Oslo"][turn % 2])})
            }
        });
    }
    // Terminated, it finishes and writes what it keeps.
    let stopped = Command::new("kill").arg(server.process.id().to_string()).status().unwrap();
    assert!(stopped.success() && server.process.wait().unwrap().success());
    let server = Server::start(&args);
    let answer = server.chat(body(&messages));
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(server.metric("tandem_disk_prompt_tokens_total") as u64, cached);
    assert!(cached + 64 + 20 >= seen as u64 && Path::new(cache.path()).exists(), "{cached} of {seen}");
}

#[test]
fn a_hostile_grammar_or_web_page_does_no_harm() {
    let server = Server::start(&[]);
    let chain: String = (0..1500).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
    let mut definitions = serde_json::Map::new();
    (0..1500).for_each(|i| drop(definitions.insert(format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)}))));
    definitions.insert("d1500".into(), json!({"type": "string", "maxLength": 3}));
    let schema = json!({"$ref": "#/$defs/d0", "$defs": definitions});
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"a": schema}, "$defs": definitions,
    }}});
    let grammar = format!("start: r0\n{chain}r1500: \"x\"");
    for (path, body) in [
        ("/v1/chat/completions", json!({"messages": user("x"), "structured_outputs": {"grammar": grammar}})),
        ("/v1/completions", json!({"prompt": "x", "structured_outputs": {"grammar": grammar}})),
        (
            "/v1/chat/completions",
            json!({"messages": user("x"), "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user("x"), "tools": [tool], "tool_choice": "required", "max_tokens": 3}),
        ),
        (
            "/v1/responses",
            json!({"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}),
        ),
    ] {
        let (status, answer) = server.post(path, body);
        assert!(status == 200 || status == 400, "{path}: {status} {answer}");
    }
    for (headers, expected) in [
        (vec![("host", "evil.example")], 403),
        (vec![("origin", "http://evil.example")], 403),
        (vec![("content-type", "text/plain")], 415),
        (vec![("content-type", "application/x-www-form-urlencoded")], 200),
        (vec![("content-type", "application/json")], 200),
    ] {
        let mut request = agent().post(format!("{}/v1/completions", server.url));
        for (name, value) in &headers {
            request = request.header(*name, *value);
        }
        let status = request.send(json!({"prompt": "x", "max_tokens": 1}).to_string()).unwrap().status();
        assert_eq!(status, expected, "{headers:?}");
    }
}
