//! What programs and scripts hold on to: variables and files that set flags, exit codes, keys of JSON, help in narrow
//! terminals.

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{command, file, finish, golden, tandem, temporary, text};
use serde_json::{Value, json};

const FABLE: &str = "models/fable-30m-MXFP4-Q8";

/// The flag of `tandem config run`, with variables and a file.
fn shown(variables: &[(&str, &str)], settings: &str, args: &[&str], flag: &str) -> (Value, String) {
    let dir = temporary();
    let settings = file(&dir, "tandem.toml", settings);
    let args = [&["--config-file", &settings, "config", "--json"], args].concat();
    let json = finish(command(&args).envs(variables.iter().copied())).json();
    let flags = json["flags"].as_array().expect("flags");
    let found = flags.iter().find(|found| found["flag"] == flag).unwrap_or_else(|| panic!("{flag} in {json}"));
    let origin = found["origin"].as_str().unwrap_or_default();
    (found["values"].clone(), origin.rsplit('/').next().unwrap_or_default().to_owned())
}

#[test]
fn flags_from_files_and_variables() {
    let file = "context = '2k'\n[run]\ntemperature = 0.5\n[models.'some/model'.run]\ncontext = '4k'\nstop = ['a', 'b']";
    let check = |variables: &[(&str, &str)], args: &[&str], flag: &str, values: Value, origin: &str| {
        assert_eq!(shown(variables, file, args, flag), (values, origin.to_owned()), "{variables:?} {args:?}");
    };
    check(&[], &["run"], "--context", json!(["2k"]), "tandem.toml");
    check(&[("TANDEM_CONTEXT", "1k")], &["run"], "--context", json!(["1k"]), "TANDEM_CONTEXT");
    check(&[("TANDEM_CONTEXT", "1k")], &["run", "--context", "8k"], "--context", json!(["8k"]), "command line");
    check(&[], &["run", "hi", "--model", "some/model"], "--context", json!(["4k"]), "model\".run]");
    check(&[], &["run", "--model", "some/model"], "--stop", json!(["a", "b"]), "model\".run]");
    check(&[], &["run"], "--temperature", json!(["0.5"]), "tandem.toml [run]");
    check(&[], &["run"], "--activations", json!(["auto"]), "default");
    check(&[], &["bench", "decode"], "--steps", json!(["32"]), "default");
    check(&[("TANDEM_VERBOSE", "2")], &["inspect"], "--verbose", json!(["2"]), "TANDEM_VERBOSE");
}

/// A new flag can be set from everywhere without anybody doing something for it.
#[test]
fn every_flag_in_help_has_a_variable() {
    for path in [
        &["run"][..],
        &["serve"],
        &["inspect"],
        &["convert"],
        &["pull"],
        &["launch"],
        &["devices"],
        &["doctor"],
        &["explain"],
        &["eval", "logits"],
        &["eval", "perplexity"],
        &["eval", "compare"],
        &["eval", "tasks"],
        &["bench", "decode"],
        &["bench", "prefill"],
        &["bench", "serve"],
        &["bench", "comm"],
        &["bench", "matrix"],
    ] {
        let help = tandem(&[path, &["--help"]].concat()).ok();
        // Descriptions are further right.
        let heads = help.lines().filter(|line| line.len() - line.trim_start().len() <= 6);
        let lines = heads.filter_map(|line| line.trim_start().strip_prefix('-'));
        let long = lines.filter_map(|line| line.split("--").nth(1).or_else(|| line.strip_prefix('-')));
        let names = long.map(|name| name.split([' ', ',', '=', '.']).next().unwrap_or_default().to_owned());
        let help: BTreeSet<String> = names.filter(|name| !matches!(&**name, "help" | "version")).collect();
        // Flags that must be given are given here.
        let required = match path {
            ["launch"] => &["--", "run"][..],
            ["convert"] => &["a", "--out", "b"],
            ["pull"] => &["a/b"],
            ["eval", "compare"] => &["a", "b"],
            _ => &[],
        };
        let json = tandem(&[&["config", "--json"], path, required].concat()).json();
        let flags = json["flags"].as_array().expect("flags");
        let found = |flag: &Value| flag["flag"].as_str().expect("a name").trim_start_matches("--").to_owned();
        assert_eq!(flags.iter().map(found).collect::<BTreeSet<_>>(), help, "{path:?}");
        for flag in flags {
            let name = found(flag).to_uppercase().replace('-', "_");
            assert_eq!(flag["variable"], format!("TANDEM_{name}"));
        }
    }
}

#[test]
fn settings_reach_the_command() {
    let dir = temporary();
    let settings = file(&dir, "tandem.toml", "json = true\n[run]\nraw = true");
    let run = |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = command(args);
        command.env("TANDEM_CONFIG_FILE", &settings).env("TANDEM_MODEL", FABLE).envs(variables.iter().copied());
        finish(&mut command)
    };
    let answer = run(&["run", "Once upon a time"], &[("TANDEM_MAX_TOKENS", "3"), ("TANDEM_TEMPERATURE", "0")]).json();
    assert_eq!((&answer["generated_tokens"], &answer["finish_reason"]), (&json!(3), &json!("length")));
    let plain = run(&["run", "Once upon a time"], &[("TANDEM_MAX_TOKENS", "0"), ("TANDEM_JSON", "no")]).ok();
    assert!(serde_json::from_str::<Value>(&plain).is_err(), "{plain:?}");
    // A required flag, and ranks, which must not look for settings themselves.
    let tokens = file(&dir, "tokens.json", "[1, 2, 3]");
    let out = text(&dir.path().join("logits.safetensors"));
    let logits = run(&["eval", "logits", "--ranks", "2"], &[("TANDEM_TOKENS", &tokens), ("TANDEM_OUT", &out)]).json();
    assert_eq!(logits["n_tokens"], 3);
    let launched =
        run(&["launch", "--", "run", "hi", "--ignore-eos"], &[("TANDEM_RANKS", "2"), ("TANDEM_MAX_TOKENS", "2")])
            .json();
    assert_eq!(launched["generated_tokens"], 2);
    // Of what excludes itself the command line counts.
    run(&["inspect", FABLE], &[("TANDEM_CONFIG", "glm-5.1")]).ok();
    let bench = ["bench", "decode", "--config", "llama-3.2-3b", "--load-format", "dummy", "--num-layers", "1"];
    let small = ["--vocab", "512", "--context", "8", "--steps", "1", "--warmup", "0"];
    run(&[&bench[..], &small].concat(), &[]).ok();
    // ./tandem.toml and the user's are found without being named.
    std::fs::create_dir_all(dir.path().join(".config/tandem")).expect("creates");
    std::fs::write(dir.path().join(".config/tandem/tandem.toml"), "context = 64\nthreads = 2").expect("writable");
    std::fs::write(dir.path().join("tandem.toml"), "context = 128").expect("writable");
    let found = finish(command(&["config", "run"]).current_dir(dir.path()).env("HOME", dir.path())).ok();
    let line = |flag: &str| found.lines().find(|line| line.starts_with(flag)).unwrap_or_default().to_owned();
    assert!(line("--context").contains("128") && line("--context").ends_with("(tandem.toml)"), "{found}");
    assert!(line("--threads").contains("2  (") && line("--threads").contains(".config/tandem"), "{found}");
    assert!(line("--top-k").ends_with("not set"), "{found}");
}

#[test]
fn settings_that_cannot_be() {
    let dir = temporary();
    for (settings, variable, args, expected) in [
        ("contxt = 1", None, &["run", "hi"][..], "\"contxt\" is no flag; did you mean context?"),
        ("[rum]\na = 1", None, &["run", "hi"], "did you mean run?"),
        ("context = 'x'", None, &["run", "hi"], "expected a whole number from 0"),
        ("", Some(("TANDEM_BACKEND", "abacus")), &["run", "hi"], "TANDEM_BACKEND: invalid value 'abacus'"),
        // Ranges hold wherever a number comes from.
        ("inter-token-ms = -1", None, &["serve"], "expected a number from 0.001 to 3600000"),
        ("prefill-share = nan", None, &["serve"], "expected a number from 0 to 1000"),
        ("request-timeout = 31536001", None, &["serve"], "expected a whole number from 1 to 31536000"),
        ("", Some(("TANDEM_INTER_TOKEN_MS", "1e300")), &["serve"], "expected a number from 0.001 to 3600000"),
        ("", Some(("TANDEM_MAX_BATCH", "65")), &["serve"], "expected a whole number from 1 to 64"),
        // Only the user starts programs and downloads.
        ("mpirun = '/tmp/x'", None, &["run", "hi"], "\"mpirun\" can be set on the command line"),
        ("[launch]\nssh-option = ['ProxyCommand=x']", None, &["run", "hi"], "\"ssh-option\" in [launch] can be set"),
        ("yes = true", None, &["run", "hi"], "\"yes\" can be set on the command line"),
        ("a = ", None, &["config"], "this is not TOML"),
        ("", Some(("TANDEM_CONFIG_FILE", "/no/such.toml")), &["run", "hi"], "cannot read /no/such.toml"),
    ] {
        let settings = file(&dir, "tandem.toml", settings);
        let mut command = command(args);
        command.env("TANDEM_CONFIG_FILE", settings).envs(variable);
        let done = finish(&mut command);
        let code = if args == ["config"] { 1 } else { 2 };
        assert_eq!(done.code, Some(code), "{}", done.stderr);
        assert!(done.stderr.starts_with("error: ") && done.stderr.contains(expected), "{expected}: {}", done.stderr);
    }
    // Help stays.
    let broken = file(&dir, "tandem.toml", "a = ");
    finish(command(&["run", "--help"]).env("TANDEM_CONFIG_FILE", broken)).ok();
    let done = finish(command(&["config"]).env("TANDEM_CONTXT", "1")).ok();
    assert!(done.contains("TANDEM_CONTXT sets no flag; did you mean TANDEM_CONTEXT?"), "{done}");
    assert!(done.contains("no file: neither tandem.toml"), "{done}");
}

/// As `tandem --help` lists them.
#[test]
fn exit_codes() {
    let help = tandem(&["--help"]).ok();
    assert!(help.contains("Exit codes:") && help.contains("TANDEM_CONTEXT=8k"), "{help}");
    let fixture = golden("models/glm51_tiny");
    for (what, args, code) in [
        ("done", &["inspect", FABLE][..], 0),
        ("help", &["--help"], 0),
        ("not found", &["run", "hi", "--model", "/no/such"], 1),
        ("not found", &["inspect", "/no/such"], 1),
        ("does not fit", &["run", "hi", "--raw", "--model", &fixture, "--context", "100000"], 1),
        ("does not fit", &["serve", "--model", &fixture, "--cache-tokens", "250m", "--port", "0"], 1),
        ("usage", &["run", "--no-such-flag"], 2),
        ("usage", &["run", "--temperature=-x"], 2),
        ("usage", &[], 2),
    ] {
        let done = tandem(args);
        assert_eq!(done.code, Some(code), "{what} {args:?}: {}", done.stderr);
        if code == 1 {
            let errors = done.stderr.lines().filter(|line| line.starts_with("error: ")).count();
            assert!(errors == 1 && done.stderr.lines().count() <= 2, "{what}: {}", done.stderr);
        }
    }
    // Ctrl-C: the signal's own end, which shells show as 130, or the code itself.
    let args = ["run", "Once upon a time", "--raw", "--model", FABLE, "--ignore-eos", "--context", "2k"];
    for args in [&args[..], &[&args[..], &["--ranks", "2"]].concat()] {
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starts");
        let mut first = [0];
        std::io::Read::read_exact(child.stdout.as_mut().expect("piped"), &mut first).expect("it began");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("sent");
        let status = child.wait().expect("ends");
        assert!(status.code() == Some(130) || status.signal() == Some(2), "{args:?}: {status:?}");
    }
}

/// Mistakes of those who know other programs.
#[test]
fn a_model_in_the_prompts_place() {
    let note = |args: &[&str]| tandem(&[&["run", "--max-tokens", "0"], args].concat()).stderr.contains("names a model");
    assert!(note(&["meta-llama/Llama-3.2-1B"]) && note(&[FABLE]));
    assert!(!note(&["and/or"]) && !note(&["What is 3/4?"]) && !note(&["some/Model-7b", "--model", FABLE]));
    let file = tandem(&["run", "hi", "--model", &format!("{FABLE}/config.json")]);
    assert!(file.stderr.contains("is a file; --model takes a model directory"), "{}", file.stderr);
    let config = tandem(&["config", "runn"]);
    assert!(
        config.stderr.starts_with("error: unrecognized") && !config.stderr.contains("error: error"),
        "{}",
        config.stderr
    );
    let serve = tandem(&["serve", "OWNER/NAME"]);
    assert!(serve.code == Some(2) && serve.stderr.contains("--model OWNER/NAME"), "{}", serve.stderr);
}

/// Numbers below zero reach the check that names the range, with and without `=`.
#[test]
fn negative_numbers() {
    for args in [&["--temperature", "-1"][..], &["--temperature=-1"], &["--top-p=-0.5"]] {
        let done = tandem(&[&["run", "hi", "--model", FABLE], args].concat());
        assert!(done.code != Some(0) && done.stderr.contains("expected"), "{args:?}: {}", done.stderr);
        assert!(!done.stderr.contains("unexpected argument"), "{args:?}: {}", done.stderr);
    }
}

#[test]
fn help_fits_narrow_terminals() {
    for args in [&["-h"][..], &["run", "-h"], &["serve", "--help"], &["bench", "decode", "--help"]] {
        let help = finish(command(args).env("COLUMNS", "40").env("TERM", "dumb")).ok();
        assert!(!help.contains('\u{1b}'), "{args:?}");
        assert!(help.contains("Usage: tandem"), "{args:?}");
    }
}

/// Keys of a JSON value; names that are data (formats, modules, kinds) are `*`.
fn keys(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    const NAMED_BY_DATA: [&str; 6] =
        ["modules", "format_bytes", "kinds", "variables", "bytes_per_token", "breakdown_ms"];
    match value {
        Value::Object(map) => {
            let is_data = path.rsplit('.').next().is_some_and(|last| NAMED_BY_DATA.contains(&last));
            for (key, value) in map {
                let key = if is_data { "*" } else { key };
                let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
                found.insert(path.clone());
                keys(value, &path, found);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| keys(value, path, found)),
        _ => {}
    }
}

/// What is measured in each unit is spelt alike in all commands.
const UNITS: [(&str, &str); 9] = [
    ("gigabyte", "gb, as in gb_per_s"),
    ("megabyte", "bytes"),
    ("milliseconds", "ms"),
    ("microseconds", "us"),
    ("tok_per", "tokens_per_second"),
    ("tokens_per_s_", "tokens_per_second"),
    ("tps", "tokens_per_second"),
    ("load_ms", "load_seconds"),
    ("_kb", "bytes"),
];

/// Keys say their unit, in one spelling.
fn check_names(command: &str, keys: &BTreeSet<String>) {
    for key in keys {
        let name = key.rsplit('.').next().unwrap_or(key);
        let is_snake = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        assert!(name == "*" || is_snake, "{command}: {key}");
        for (spelling, instead) in UNITS {
            assert!(!name.contains(spelling), "{command}: {key}, expected {instead}");
        }
        for (ending, instead) in [
            ("_s", "_seconds, or _per_s in rates"),
            ("_sec", "_seconds"),
            ("_millis", "_ms"),
            ("_time", "_ms or _seconds"),
            ("latency", "_ms"),
            ("_size_mb", "_bytes"),
            ("_mib", "_bytes"),
            ("_gib", "_bytes"),
            ("memory", "_bytes"),
            ("bandwidth", "_gb_per_s"),
            ("throughput", "_per_second"),
        ] {
            let is_rate = ending == "_s" && name.ends_with("_per_s");
            assert!(!name.ends_with(ending) || is_rate, "{command}: {key}, expected {instead}");
        }
    }
}

#[test]
fn json_keys() {
    let dir = temporary();
    let tokens = file(&dir, "tokens.json", "[1, 2, 3]");
    let prose = file(&dir, "prose.txt", "Once upon a time there was a fox who lived in the wood.");
    let tasks = file(
        &dir,
        "tasks.jsonl",
        "{\"kind\": \"k\", \"prompt\": \"hi\", \"expect\": \"x\"}\n\
         {\"question\": \"Once upon a\", \"choices\": [\" time\", \" tree\"], \"answer\": 0}\n",
    );
    let (logits, out) = (text(&dir.path().join("logits.safetensors")), text(&dir.path().join("out")));
    let dummy = ["--config", "llama-3.2-3b", "--load-format", "dummy", "--num-layers", "1", "--vocab", "512"];
    let quick = ["--steps", "1", "--warmup", "0", "--threads", "1"];
    let decode = [&["bench", "decode", "--context", "8"], &dummy[..], &quick].concat();
    let prefill = [&["bench", "prefill", "--prompt-tokens", "8"], &dummy[..], &quick].concat();
    let schemas: &[(&[&str], &str)] = &[
        (
            &["run", "hi", "--model", FABLE, "--max-tokens", "2"],
            "accepted_by_draft_position accepted_drafted_tokens cached_tokens decode_ms decode_tokens_per_second device \
             drafted_tokens finish_reason gb_per_s generated_tokens load_seconds numerics peak_memory_bytes prefill_ms \
             prefill_tokens_per_second prompt_tokens read_bytes_per_token \
             reasoning reasoning_ms reasoning_tokens text tokens tool_calls",
        ),
        (
            &["inspect", FABLE],
            "active_parameters chat chat.format chat.prompts chat.reasoning_by_default chat.reasoning_can_be_switched \
             chat.reasoning_efforts hidden_size index_topk max_position_embeddings model_type modules modules.* \
             modules.*.active_parameters modules.*.format_bytes modules.*.format_bytes.* modules.*.parameters \
             modules.*.read_bytes_per_token modules.*.resident_bytes mtp_head n_routed_experts num_experts_per_tok \
             num_hidden_layers parameters path read_bytes_per_token read_bytes_per_token_below_index_topk resident_bytes \
             vocab_size weights_present",
        ),
        (
            &["eval", "logits", "--model", FABLE, "--tokens", &tokens, "--out", &logits],
            "n_tokens out seconds vocab_size",
        ),
        (
            &["eval", "perplexity", "--model", FABLE, "--text", &prose],
            "mean_nll_nats perplexity seconds tokens_scored window_tokens",
        ),
        (
            &["eval", "compare", FABLE, FABLE, "--text", &prose],
            "a b mean_kl p99_kl per_module perplexity_a perplexity_b tokens top1_agreement worst worst.context worst.kl \
             worst.position",
        ),
        (
            &["eval", "tasks", "--model", FABLE, "--tasks", &tasks, "--max-tokens", "2"],
            "kinds kinds.* kinds.*.accuracy kinds.*.accuracy_normalized kinds.*.right kinds.*.right_normalized \
             kinds.*.standard_error kinds.*.standard_error_normalized kinds.*.total",
        ),
        (
            &decode,
            "achieved_gb_per_s active_parameters bandwidth_fraction bandwidth_fraction_of_moment_median \
             bandwidth_fraction_of_moment_p10 bandwidth_fraction_of_moment_p90 batch breakdown_ms breakdown_ms.* \
             breakdown_total_ms bytes_per_step bytes_per_token bytes_per_token.* command context decode_ms_median \
             decode_ms_p10 decode_ms_p90 experts_read_per_layer isa load_seconds major_page_faults \
             measured_bandwidth_gb_per_s model moe_layers num_hidden_layers numerics peak_memory_bytes quant \
             resident_bytes resident_share steps tandem_version threads tokens_per_second vocab_size weights",
        ),
        (
            &prefill,
            "achieved_gflop_per_s active_parameters breakdown_ms breakdown_ms.* breakdown_total_ms chunk_ms_median \
             chunk_ms_p10 chunk_ms_p90 command context gflop gflop_counted isa load_seconds measured_bandwidth_gb_per_s \
             measured_peak_gflop_per_s model moe_layers num_hidden_layers numerics peak_fraction \
             peak_fraction_of_moment_median peak_memory_bytes prefill_chunk prefill_ms_median prefill_ms_p10 \
             prefill_ms_p90 prompt_tokens quant resident_bytes steps tandem_version threads tokens_per_second vocab_size \
             weights",
        ),
        (
            &["bench", "comm", "--ranks", "2", "--max-bytes", "1k"],
            "ranks rows rows.bytes rows.gb_per_s rows.operation rows.repetitions rows.us_median rows.us_p90",
        ),
        (
            &["convert", FABLE, "--dry-run"],
            "bits_per_weight bytes files files.bytes files.name modules modules.* modules.*.bytes modules.*.format_bytes \
             modules.*.format_bytes.* modules.*.parameters read_bytes_per_token source source.bits_per_weight \
             source.bytes source.read_bytes_per_token",
        ),
        (
            &["convert", FABLE, "--out", &out, "--quant", "affine4"],
            "bytes bytes_written files files_kept out peak_memory_bytes seconds",
        ),
        (
            &["config", "inspect"],
            "command files flags flags.flag flags.origin flags.values flags.variable unknown_variables variables",
        ),
    ];
    for (args, expected) in schemas {
        let (head, rest) = args.split_at(if args[0] == "config" { 1 } else { 2 });
        let json = tandem(&[head, &["--json"], rest].concat());
        let mut found = BTreeSet::new();
        keys(&json.json(), "", &mut found);
        check_names(&args[..2].join(" "), &found);
        let found: Vec<&str> = found.iter().map(String::as_str).collect();
        let expected: Vec<&str> = expected.split_whitespace().collect();
        assert_eq!(found, expected, "{args:?}");
    }
    // What a machine's devices say differs.
    let devices = tandem(&["devices", "--json"]).json();
    for device in devices["devices"].as_array().expect("a list") {
        assert!(device["backend"].is_string(), "{device}");
    }
    let devices = devices["devices"].as_array().expect("a list");
    let mut found = BTreeSet::new();
    devices.iter().for_each(|device| keys(device, "", &mut found));
    check_names("devices", &found);
}

/// Several values are a list under `sweep`, each with the keys of one value.
#[test]
fn rows_of_several_values() {
    let model = ["--config", "llama-3.2-3b", "--load-format", "dummy", "--num-layers", "1", "--vocab", "512", "--json"];
    let quick = ["--steps", "1", "--warmup", "0", "--threads", "1"];
    for (command, values, names) in [
        ("decode", &["--context", "8,16", "--batch=1,3"][..], &["context", "batch"][..]),
        ("decode", &["--sweep-context", "8,16"], &["context", "batch"]),
        ("prefill", &["--prompt-tokens", "4,8"], &["prompt_tokens", "context"]),
        (
            "prefill",
            &["--prompt-tokens", "8", "--context", "0,4", "--prefill-chunk", "4,8"],
            &["context", "prefill_chunk"],
        ),
    ] {
        let json = tandem(&[&["bench", command], values, &model[..], &quick].concat()).json();
        let rows = json["sweep"].as_array().unwrap_or_else(|| panic!("{json}"));
        let found: Vec<Vec<u64>> =
            rows.iter().map(|row| names.iter().map(|name| row[*name].as_u64().expect("a number")).collect()).collect();
        let expected: &[&[u64]] = match (command, values.len()) {
            ("decode", 3) => &[&[8, 1], &[8, 3], &[16, 1], &[16, 3]],
            ("decode", _) => &[&[8, 1], &[16, 1]],
            (_, 2) => &[&[4, 0], &[8, 0]],
            _ => &[&[0, 4], &[0, 8], &[4, 4], &[4, 8]],
        };
        assert_eq!(found, expected, "{command} {values:?}");
        let single = tandem(&[&["bench", command], &model[..], &quick].concat()).json();
        let row: BTreeSet<&String> = rows[0].as_object().expect("a row").keys().collect();
        let whole: BTreeSet<&String> = single.as_object().expect("an object").keys().collect();
        assert!(row.is_subset(&whole) && !whole.contains(&"sweep".to_owned()), "{row:?} {whole:?}");
    }
    // From a variable too, which other commands know with one value.
    let args = [&["bench", "decode"], &model[..], &quick].concat();
    let json = finish(command(&args).env("TANDEM_CONTEXT", "8,16")).json();
    assert_eq!(json["sweep"].as_array().map(Vec::len), Some(2), "{json}");
}

/// `bench serve` against a server that is still loading.
#[test]
fn loads_of_a_server() {
    let mut server = command(&["serve", "--model", FABLE, "--port", "0", "--threads", "1", "--log-format", "json"])
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(server.stderr.take().expect("piped")).lines();
    let address = lines.find_map(|line| {
        line.expect("UTF-8").split_once("listening on ").and_then(|(_, rest)| Some(rest.split(';').next()?.to_owned()))
    });
    let url = format!("http://{}", address.expect("an address"));
    let (send, logged) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| send.send(line)));
    let small = ["bench", "serve", "--url", &url, "--requests", "2", "--max-tokens", "3", "--prompt-words", "4"];
    let json = tandem(&[&small[..], &["--goodput", "ttft:60000", "--json"]].concat()).json();
    let mut found = BTreeSet::new();
    keys(&json, "", &mut found);
    check_names("bench serve", &found);
    let names: Vec<&String> = found.iter().filter(|key| !key.contains('.')).collect();
    let expected = "burstiness concurrency errors generated_tokens generated_tokens_per_second \
                    good_requests_per_second inter_token_ms max_tokens model num_warmups prompt_tokens prompt_words \
                    request_ms request_rate request_tokens_per_second requests requests_per_second seconds \
                    time_per_output_token_ms time_to_first_token_ms total_tokens_per_second url";
    assert_eq!(names, expected.split_whitespace().collect::<Vec<_>>());
    assert_eq!((&json["requests"], &json["errors"], &json["generated_tokens"]), (&json!(2), &json!(0), &json!(6)));

    let several = ["--concurrency", "1,2", "--chat"];
    let csv = tandem(&[&small[..], &several, &["--csv"]].concat()).ok();
    let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert!(rows.len() == 3 && rows.iter().all(|row| row.len() == rows[0].len()), "{csv}");
    assert_eq!((rows[0][0], rows[1][0], rows[2][0]), ("concurrency", "1", "2"));
    let json = tandem(&[&small[..], &several, &["--json"]].concat()).json();
    assert_eq!(json["sweep"][1]["concurrency"], 2, "{json}");
    server.kill().expect("runs");
    server.wait().expect("ends");
    // One line for the load, and one for each of the requests above.
    let logged: Vec<Value> = logged.iter().filter_map(|line| serde_json::from_str(&line).ok()).collect();
    for (message, n, expected) in [
        ("loaded", 1, "cache_tokens context device gb_per_s max_batch model numerics resident_bytes seconds"),
        (
            "request",
            10,
            "cached_tokens client completion_tokens finish first_token_seconds model prompt_tokens reasoning_tokens seconds",
        ),
    ] {
        let found: Vec<&Value> = logged.iter().filter(|line| line["message"] == message).collect();
        assert_eq!(found.len(), n, "{message}: {logged:?}");
        for line in found {
            let mut keys: Vec<&String> = line.as_object().expect("an object").keys().collect();
            keys.retain(|key| !matches!(key.as_str(), "timestamp" | "level" | "target" | "message"));
            keys.sort();
            assert_eq!(keys, expected.split(' ').collect::<Vec<_>>(), "{line}");
            assert!(
                message == "loaded" || line["client"].as_str().is_some_and(|client| client.starts_with("127.0.0.1:"))
            );
        }
    }
    let gone = tandem(&small);
    assert!(gone.code == Some(1) && gone.stderr.contains("is the server running?"), "{}", gone.stderr);
}

#[test]
fn tables_to_paste() {
    let model = ["--config", "llama-3.2-3b", "--load-format", "dummy", "--num-layers", "1", "--vocab", "512"];
    let quick = ["--steps", "1", "--warmup", "0", "--threads", "1"];
    let decode = [&["bench", "decode", "--context", "8,16", "--batch", "1,2"], &model[..], &quick].concat();
    let prefill = [&["bench", "prefill", "--prompt-tokens", "8,16", "--context", "0,4"], &model[..], &quick].concat();
    for (args, n_rows) in [(&decode, 4), (&prefill, 4)] {
        let csv = tandem(&[&args[..], &["--csv"]].concat()).ok();
        let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
        assert_eq!((rows.len(), rows[0].len()), (n_rows + 1, 8), "{csv}");
        assert!(rows[1..].iter().flatten().all(|cell| cell.parse::<f64>().is_ok()), "{csv}");
        let markdown = tandem(&[&args[..], &["--markdown"]].concat()).ok();
        let lines: Vec<&str> = markdown.lines().collect();
        assert_eq!(lines.len(), n_rows + 2, "{markdown}");
        assert!(lines.iter().all(|line| line.matches('|').count() == 9) && lines[1].contains("---:"), "{markdown}");
    }
    let both = tandem(&[&decode[..], &["--csv", "--json"]].concat());
    assert_eq!(both.code, Some(2), "{}", both.stderr);
}

/// A question and a choice that are one token together used to end in a panic.
#[test]
fn a_choice_with_nothing_before_it() {
    let dir = temporary();
    let tasks = file(&dir, "tasks.jsonl", r#"{"question": "a", "choices": ["b", "n"], "answer": 0}"#);
    let start = Instant::now();
    let done = tandem(&["eval", "tasks", "--model", FABLE, "--tasks", &tasks]);
    assert!(done.code == Some(1) && done.stderr.contains("line 1: the question and the choice"), "{}", done.stderr);
    assert!(start.elapsed() < Duration::from_secs(5));
}
