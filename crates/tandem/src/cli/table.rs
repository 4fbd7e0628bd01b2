//! clap's table of all commands, with what is the same for many of them: examples, exit codes, negative numbers; and
//! hints for those who know other programs' words.

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory};

use super::Cli;

/// Of each command, by its names.
const EXAMPLES: [(&[&str], &[&str]); 16] = [
    (
        &["run"],
        &[
            "tandem run \"Tell me a story\"",
            "tandem run --model OWNER/NAME --context 8k",
            "git diff | tandem run \"Review this\" --json | jq -r .text",
        ],
    ),
    (&["inspect"], &["tandem inspect", "tandem inspect OWNER/NAME --json"]),
    (&["eval", "logits"], &["tandem eval logits --model DIR --tokens tokens.json --out logits.safetensors"]),
    (&["eval", "perplexity"], &["tandem eval perplexity --model DIR --text held-text.txt --context 2k"]),
    (
        &["eval", "compare"],
        &["tandem eval compare DIR DIR-mxfp4 --text held-text.txt", "tandem eval compare A B --text FILE --per-module"],
    ),
    (&["eval", "tasks"], &["tandem eval tasks --model DIR --tasks tasks.jsonl --json"]),
    (
        &["bench", "decode"],
        &[
            "tandem bench decode --context 512,8k --batch 1,8 --markdown",
            "tandem bench decode --config glm-5.1 --load-format dummy --num-layers 2 --vocab 1024",
        ],
    ),
    (
        &["bench", "prefill"],
        &["tandem bench prefill --prompt-tokens 128,512 --markdown", "tandem bench prefill --context 8k --json"],
    ),
    (
        &["bench", "serve"],
        &[
            "tandem bench serve --url http://127.0.0.1:8000 --concurrency 1,8,32 --markdown",
            "tandem bench serve --request-rate 2 --requests 200 --goodput ttft:500,tpot:50",
        ],
    ),
    (
        &["serve"],
        &[
            "tandem serve --port 8000",
            "tandem serve --model OWNER/NAME --context 32k --max-batch 32 --api-key-file keys.txt",
            "tandem serve --models-dir DIR --models-memory 300GB --pin NAME --keep-alive 1h",
            "tandem serve --log-format json 2>> serve.log",
        ],
    ),
    (
        &["agent"],
        &[
            "tandem agent claude",
            "tandem agent codex --url http://127.0.0.1:8000 -- exec \"Explain this repository\"",
            "tandem agent opencode --model OWNER/NAME --context 64k",
        ],
    ),
    (
        &["launch"],
        &[
            "tandem launch --ranks 2 -- run --model DIR \"Hello\"",
            "tandem launch --hostfile hosts.json --restart 3 -- serve --model DIR",
        ],
    ),
    (
        &["convert"],
        &[
            "tandem convert DIR --out DIR-mxfp4 --dry-run",
            "tandem convert model.gguf --out DIR --quant keep",
            "tandem convert DIR --out DIR-mxfp4 --quant mxfp4 --search",
        ],
    ),
    (&["doctor"], &["tandem doctor --model DIR", "tandem doctor --hostfile hosts.json"]),
    (&["explain"], &["tandem explain", "tandem explain http://127.0.0.1:8000 --report explain.html"]),
    (&["pull"], &["tandem pull OWNER/NAME", "tandem pull OWNER/NAME --revision v1 --metadata"]),
];

/// Ends the long help of these commands.
const EXIT_CODES: &str = "\
Exit codes:
  0    done, or the reader of standard output has left
  1    an error: something is not found, malformed, does not fit or cannot
       be written; one line on stderr says what
  2    the command line is wrong
  130  Ctrl-C ended it";

/// In the long help of the program.
const SETTINGS: &str = "\
Flags from elsewhere:
  TANDEM_CONTEXT=8k does what --context 8k does, and so for every flag.
  ./tandem.toml and ~/.config/tandem/tandem.toml have lines such as
  context = \"8k\", under [run] for one command and [models.\"OWNER/NAME\"]
  for one model. The command line counts more than variables, variables
  more than files; `tandem config run` shows what came from where.";

/// What llama.cpp, ollama, mlx-lm and vLLM call things, and what to use here.
const FLAG_HINTS: [(&[&str], &str); 15] = [
    (&["-p", "--prompt"], "the prompt is an argument: tandem run \"Hello\""),
    (&["-m", "--model-path", "-hf", "--hf-repo"], "--model DIR|ID names the model"),
    (&["-c", "--ctx-size", "--max-model-len", "--max-kv-size", "--num-ctx"], "--context N is the number of tokens"),
    (&["-n", "--n-predict", "--max-new-tokens", "--num-predict"], "--max-tokens N bounds the answer"),
    (&["-t", "--num-threads"], "--threads N is the number of threads"),
    (&["--temp"], "--temperature T is the temperature"),
    (&["--repeat-penalty"], "--repetition-penalty R makes tokens less likely that occurred"),
    (&["-s", "-sys", "--system-prompt"], "--system TEXT is the system message"),
    (&["-i", "-cnv", "--interactive", "--conversation"], "without a prompt it is a chat"),
    (
        &["-ngl", "--n-gpu-layers", "--gpu-layers", "--gpu-memory-utilization"],
        "a GPU gets what fits; --n-cpu-moe N keeps the experts of N layers with the processor",
    ),
    (&["-tp", "--tensor-parallel-size"], "--tp N divides each layer"),
    (&["-pp", "--pipeline-parallel-size"], "--pp N divides the layers"),
    (&["-np", "--parallel", "--max-num-seqs"], "--max-batch N is the number of answers written at the same time"),
    (&["--api-key"], "--api-key-file FILE has keys: those of a command line show in the list of processes"),
    (&["-q", "--quantization", "--dtype"], "weights run in the formats they have; `tandem convert` writes others"),
];

const COMMAND_HINTS: [(&[&str], &str); 5] = [
    (&["chat", "generate", "cli"], "tandem run answers a prompt, or chats when there is none"),
    (&["list", "ls", "ps", "show", "info"], "tandem inspect says what a model is"),
    (&["download", "get"], "tandem pull gets a model"),
    (&["quantize"], "tandem convert writes a model in other formats"),
    (&["benchmark", "perf"], "tandem bench measures speed"),
];

/// The table.
pub(crate) fn command() -> Command {
    let mut command = Cli::command().after_long_help([SETTINGS, EXIT_CODES].join("\n\n"));
    for (path, lines) in EXAMPLES {
        let lines: Vec<String> = lines.iter().map(|line| format!("  {line}")).collect();
        let examples = format!("Examples:\n{}", lines.join("\n"));
        command = change(command, path, &|inner| {
            inner.after_help(examples.clone()).after_long_help([&examples, EXIT_CODES].join("\n\n"))
        });
    }
    with_negative_numbers(command)
}

fn change(command: Command, path: &[&str], by: &dyn Fn(Command) -> Command) -> Command {
    match path {
        [] => by(command),
        [name, rest @ ..] => command.mut_subcommand(name, |inner| change(inner, rest, by)),
    }
}

/// `--top-k -1` reaches the check that names the range.
fn with_negative_numbers(command: Command) -> Command {
    let takes = |arg: &clap::Arg| arg.get_action().takes_values() && arg.get_long().is_some();
    let command = command.mut_args(|arg| if takes(&arg) { arg.allow_negative_numbers(true) } else { arg });
    command.mut_subcommands(with_negative_numbers)
}

/// Adds a hint to what clap says of a command line.
pub(crate) fn explained(mut error: clap::Error, args: &[String]) -> clap::Error {
    let word = |kind| match error.get(kind) {
        Some(ContextValue::String(word)) => word.clone(),
        _ => String::new(),
    };
    let is_among = |words: &[&str], word: &str| words.contains(&word.split('=').next().unwrap_or(word));
    let hint = match error.kind() {
        ErrorKind::UnknownArgument => {
            let word = word(ContextKind::InvalidArg);
            // Of `-ngl` clap knows the first letter.
            let given = args
                .iter()
                .find(|arg| arg.split('=').next() == Some(&word) || (word.len() == 2 && arg.starts_with(&word)));
            let known = FLAG_HINTS.iter().find(|(words, _)| given.is_some_and(|given| is_among(words, given)));
            match known {
                Some((_, hint)) => Some((*hint).to_owned()),
                None if word.starts_with('-') => None,
                None if args.iter().any(|arg| arg == "run") => Some("quote a prompt of several words".to_owned()),
                None => Some(format!("flags name everything else: --model {word}, if that is a model")),
            }
        }
        ErrorKind::InvalidSubcommand => {
            let word = word(ContextKind::InvalidSubcommand);
            COMMAND_HINTS.iter().find(|(words, _)| is_among(words, &word)).map(|(_, hint)| (*hint).to_owned())
        }
        _ => None,
    };
    if let Some(hint) = hint {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(hint)]));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves<'a>(command: &'a Command, path: &[&'a str], found: &mut Vec<(Vec<&'a str>, &'a Command)>) {
        if !command.has_subcommands() {
            found.push((path.to_vec(), command));
        }
        let shown = command.get_subcommands().filter(|inner| !inner.is_hide_set());
        shown.for_each(|inner| leaves(inner, &[path, &[inner.get_name()]].concat(), found));
    }

    /// Words of a line of a shell, up to a pipe.
    fn words(line: &str) -> Vec<String> {
        let line = line.split(" | ").find(|part| part.starts_with("tandem")).unwrap_or(line);
        let line = line.split(" 2>").next().unwrap_or(line);
        let parts = line.split('"').enumerate();
        parts
            .flat_map(|(i, part)| match i % 2 {
                0 => part.split_whitespace().map(str::to_owned).collect(),
                _ => vec![part.to_owned()],
            })
            .collect()
    }

    #[test]
    fn every_command_has_examples_that_can_be_run() {
        let table = command();
        let mut all = vec![];
        leaves(&table, &[], &mut all);
        let without = [&["devices"][..], &["config"], &["completions"], &["bench", "comm"], &["bench", "matrix"]];
        for (path, _) in all {
            let found = EXAMPLES.iter().find(|(of, _)| *of == path);
            assert!(found.is_some() || without.contains(&&*path), "{path:?} has no examples");
        }
        for line in EXAMPLES.iter().flat_map(|(_, lines)| *lines) {
            let parsed = table.clone().try_get_matches_from(words(line));
            assert!(parsed.is_ok(), "{line}: {}", parsed.expect_err("refused"));
            assert!(line.len() < 100, "{line}");
        }
    }

    #[test]
    fn hints_name_flags_and_commands_that_there_are() {
        let table = command();
        let mut all = vec![];
        leaves(&table, &[], &mut all);
        let flags: Vec<&str> =
            all.iter().flat_map(|(_, leaf)| leaf.get_arguments().filter_map(|a| a.get_long())).collect();
        for (foreign, hint) in FLAG_HINTS {
            let ours = hint.split(' ').filter_map(|word| word.strip_prefix("--"));
            ours.for_each(|flag| assert!(flags.contains(&flag), "{hint}"));
            for flag in foreign {
                // A flag of that name elsewhere is none of `run`.
                let run = table.find_subcommand("run").expect("run");
                let is_ours = run.get_arguments().any(|arg| arg.get_long() == flag.strip_prefix("--"));
                assert!(!flag.starts_with("--") || !is_ours, "{flag}");
            }
        }
        for (foreign, hint) in COMMAND_HINTS {
            let ours = hint.split(' ').nth(1).expect("a command");
            assert!(table.find_subcommand(ours).is_some(), "{hint}");
            foreign.iter().for_each(|name| assert!(table.find_subcommand(name).is_none(), "{name}"));
        }
    }

    #[test]
    fn words_of_other_programs_are_explained() {
        for (line, expected) in [
            ("run -m x hi", "--model DIR|ID names the model"),
            ("run -p hi", "the prompt is an argument"),
            ("run --prompt=hi", "the prompt is an argument"),
            ("run -ngl 99 hi", "--n-cpu-moe N"),
            ("run -n 5 hi", "--max-tokens N"),
            ("run --max-model-len 4096 hi", "--context N"),
            ("serve --tensor-parallel-size 2", "--tp N"),
            ("serve --api-key x", "--api-key-file FILE"),
            ("serve OWNER/NAME", "--model OWNER/NAME"),
            ("run Tell me", "quote a prompt"),
            ("chat", "tandem run"),
            ("list", "tandem inspect"),
            ("run --temprature 0 hi", "'--temperature'"),
            ("run --max-tokens -1 hi", "expected a whole number from 0"),
            ("run --top-k -1 hi", "expected a whole number from 0"),
            ("run --temperature hot hi", "expected a number"),
            ("serve --port 80000", "expected a whole number from 0 to 65535"),
        ] {
            let args: Vec<String> = std::iter::once("tandem").chain(line.split(' ')).map(str::to_owned).collect();
            let error = command().try_get_matches_from(&args).expect_err(line);
            let text = explained(error, &args).to_string();
            assert!(text.contains(expected) && !text.contains("as a value"), "{line}: {text}");
        }
    }
}
