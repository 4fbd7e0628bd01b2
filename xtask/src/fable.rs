//! Compares both versions of fable-30m with the reference: greedy tokens, perplexities and task scores.
//!
//! The bf16 version (58 MB) is not in the repository, so this is a chore with an archived result, not a test.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Map, Value, json};

use crate::{Result, output, root, run};

/// Directory name, key in golden.json, key in tasks_reference.json.
const VERSIONS: [(&str, &str, &str); 2] = [
    ("fable-30m-MXFP4-Q8", "MXFP4-Q8 (dequantised, float32)", "MXFP4-Q8"),
    ("fable-30m", "bf16 (float32 arithmetic)", "bf16"),
];
/// Perplexities agree to three digits after the point.
const PERPLEXITY_TOLERANCE: f64 = 5e-4;

/// Runs the release binary on every golden of both models in `models` and writes `bench/runs/<date>-fable-30m`.
pub(crate) fn fable(models: &Path) -> Result<()> {
    let golden_dir = root().join("tests/golden/fable-30m");
    let goldens = read_json(&golden_dir.join("golden.json"))?;
    let task_scores = read_json(&golden_dir.join("tasks_reference.json"))?;
    run(Command::new("cargo").args(["build", "--release", "--package", "tandem-llm"]).current_dir(root()))?;
    let tandem = Tandem { binary: binary()? };

    let mut versions = Map::new();
    let mut rows = vec![];
    for (dir, golden_key, tasks_key) in VERSIONS {
        let model = models.join(dir);
        if !model.join("config.json").exists() {
            return Err(format!("{} is not a model directory; expected {dir} in it", models.display()));
        }
        eprintln!("{dir}: greedy");
        let golden = &goldens[golden_key];
        let mut checks = tandem.greedy(&model, golden)?;
        for (file, perplexity, tokens) in [
            ("held-chats.json", "chat_perplexity", "chat_tokens"),
            ("held-text.txt", "text_perplexity_512", "text_tokens"),
        ] {
            eprintln!("{dir}: perplexity of {file}");
            let found = tandem.json(&model, &["eval", "perplexity", "--text", path(&golden_dir.join(file))?])?;
            let (a, b) = (number(&found["perplexity"]), number(&golden[perplexity]));
            checks.push(json!({
                "check": format!("perplexity {file}"),
                "found": a,
                "expected": b,
                "ok": (a - b).abs() < PERPLEXITY_TOLERANCE && found["tokens_scored"] == golden[tokens],
                "tokens": found["tokens_scored"],
                "seconds": found["seconds"],
            }));
        }
        eprintln!("{dir}: tasks");
        let found = tandem.json(&model, &["eval", "tasks", "--tasks", path(&golden_dir.join("tasks.jsonl"))?])?;
        let expected = task_scores[tasks_key].as_object().ok_or("tasks_reference.json has no such version")?;
        for (kind, expected) in expected {
            let score = &found["kinds"][kind.as_str()];
            let text = format!("{}/{}", score["right"], score["total"]);
            checks.push(json!({
                "check": format!("tasks {kind}"), "found": text, "expected": expected, "ok": text == *expected,
            }));
        }
        for check in &checks {
            let [name, found, expected] = ["check", "found", "expected"].map(|key| plain(&check[key]));
            let mark = if check["ok"] == true { "yes" } else { "NO" };
            let row = format!("| {dir} | {name} | {found} | {expected} | {mark} |");
            println!("{row}");
            rows.push(row);
        }
        versions.insert(dir.to_string(), Value::Array(checks));
    }
    let ok = versions.values().flat_map(|v| v.as_array().into_iter().flatten()).all(|check| check["ok"] == true);
    let result = json!({
        "command": "cargo xtask fable DIR",
        "commit": output(Command::new("git").args(["rev-parse", "HEAD"]).current_dir(root()))?.trim(),
        "uncommitted_changes": !output(Command::new("git").args(["status", "--porcelain"]).current_dir(root()))?.is_empty(),
        "machine": machine(),
        "ok": ok,
        "versions": versions,
    });
    let out = archive(&result, &rows)?;
    println!("{}", out.join("summary.md").display());
    if ok { Ok(()) } else { Err("some results differ from the reference; see the summary".to_string()) }
}

/// The release binary.
struct Tandem {
    binary: PathBuf,
}

impl Tandem {
    /// Runs `tandem ARGS --model MODEL --activations f32 --json`.
    fn json(&self, model: &Path, args: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.binary);
        command.args(args).args(["--activations", "f32", "--json"]).arg("--model").arg(model);
        serde_json::from_str(&output(&mut command)?).map_err(|e| format!("{command:?} wrote no JSON: {e}"))
    }

    fn greedy(&self, model: &Path, golden: &Value) -> Result<Vec<Value>> {
        let prompts = golden["greedy"].as_array().ok_or("golden.json has no greedy prompts")?;
        prompts
            .iter()
            .map(|case| {
                let prompt = case["prompt"].as_str().ok_or("a golden has no prompt")?;
                let found = self.json(model, &["run", "--raw", "--temperature", "0", "--max-tokens", "512", prompt])?;
                // The reference keeps the end-of-turn token, which `run` does not print.
                let expected = case["greedy_ids"].as_array().and_then(|ids| ids.split_last()).map_or(&[][..], |s| s.1);
                let tokens = found["tokens"].as_array().map_or(&[][..], Vec::as_slice);
                let same = tokens.iter().zip(expected).take_while(|(a, b)| a == b).count();
                let n_prompt = case["prompt_ids"].as_array().map_or(0, Vec::len);
                Ok(json!({
                    "check": format!("greedy {}", plain(&case["kind"])),
                    "found": format!("{same} of {} tokens equal", tokens.len()),
                    "expected": format!("{} tokens", expected.len()),
                    "ok": tokens == expected && found["prompt_tokens"] == n_prompt && found["finish_reason"] == "stop",
                    "prompt_tokens": found["prompt_tokens"],
                    "decode_tokens_per_second": found["decode_tokens_per_second"],
                }))
            })
            .collect()
    }
}

fn archive(result: &Value, rows: &[String]) -> Result<PathBuf> {
    let date = output(Command::new("date").args(["-u", "+%Y-%m-%d"]))?;
    let out = root().join(format!("bench/runs/{}-fable-30m", date.trim()));
    let text = format!(
        "# fable-30m against its reference\n\n`cargo xtask fable DIR` at commit {} on {}.\nThe reference is transformers in \
         float32 (tests/golden/fable-30m). Raw data: result.json.\n\n| model | check | found | expected | same |\n\
         |---|---|---|---|---|\n{}\n",
        plain(&result["commit"]),
        plain(&result["machine"]),
        rows.join("\n")
    );
    let json = serde_json::to_string_pretty(result).map_err(|e| e.to_string())?;
    std::fs::create_dir_all(&out)
        .and_then(|()| std::fs::write(out.join("result.json"), json + "\n"))
        .and_then(|()| std::fs::write(out.join("summary.md"), text))
        .map_err(|e| format!("cannot write {}: {e}", out.display()))?;
    Ok(out)
}

/// `<target>/release/tandem`, next to the `<target>/debug` that this program runs from.
fn binary() -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let target = own.ancestors().nth(2).ok_or("this program is not in a target directory")?;
    Ok(target.join("release").join(format!("tandem{}", std::env::consts::EXE_SUFFIX)))
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split(": ").nth(1));
    format!("{}, {cores} threads", model.unwrap_or(std::env::consts::ARCH))
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    serde_json::from_str(&text).map_err(|e| format!("{} is not JSON: {e}", path.display()))
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| format!("{} is not UTF-8", path.display()))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// A JSON string without quotes; anything else as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}
