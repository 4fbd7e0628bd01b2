//! What the command line, variables and files say about one flag, and which of them counts.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, Command, value_parser};
use tandem_settings::{Applied, Origin, Settings, SettingsError, SettingsFile};

fn program() -> Command {
    let run = Command::new("run")
        .arg(Arg::new("prompt"))
        .arg(Arg::new("model").long("model").conflicts_with("shape"))
        .arg(Arg::new("shape").long("shape"))
        .arg(Arg::new("heat").long("heat").value_parser(value_parser!(f32)))
        .arg(Arg::new("size").long("size").default_value("3").value_parser(value_parser!(u16).range(1..10)))
        .arg(Arg::new("stop").long("stop").action(ArgAction::Append))
        .arg(Arg::new("list").long("list").value_delimiter(',').action(ArgAction::Append))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue))
        .arg(Arg::new("secret").long("secret").hide(true));
    let eval = Command::new("eval").subcommand_required(true);
    let eval = eval.subcommand(Command::new("text").arg(Arg::new("file").long("text-file").required(true)));
    let verbose = Arg::new("verbose").long("verbose").short('v').global(true).action(ArgAction::Count);
    Command::new("program").arg(verbose).subcommand(run).subcommand(eval)
}

fn apply(args: &[&str], variables: &[(&str, &str)], files: &[&str]) -> Result<Applied, SettingsError> {
    let dir = tempfile::TempDir::new().expect("a folder");
    let read = |(i, text): (usize, &&str)| {
        let path = dir.path().join(format!("{i}.toml"));
        std::fs::write(&path, text).expect("writable");
        let mut file = SettingsFile::read(&path)?.expect("there");
        file.path = PathBuf::from(format!("{i}.toml"));
        Ok(file)
    };
    let files = files.iter().enumerate().map(read).collect::<Result<Vec<_>, SettingsError>>()?;
    let variables = variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let settings = Settings::new("T_", &["stop"], files, variables);
    let args: Vec<OsString> = [&["program"], args].concat().iter().map(OsString::from).collect();
    let applied = settings.apply(program(), &args)?;
    // Whatever is put in, clap takes.
    if !applied.flags.is_empty() {
        applied.command.clone().try_get_matches_from(&args).expect("clap takes it");
    }
    Ok(applied)
}

/// What a flag is and where it came from.
#[track_caller]
fn check(args: &[&str], variables: &[(&str, &str)], files: &[&str], flag: &str, expected: (&[&str], &str)) {
    let applied = apply(args, variables, files).unwrap_or_else(|error| panic!("{error}"));
    let found = applied.flags.iter().find(|found| found.name == flag).unwrap_or_else(|| panic!("--{flag}"));
    let origin = found.origin.as_ref().map(Origin::to_string).unwrap_or_default();
    assert_eq!(
        (&found.values[..], &*origin),
        (&expected.0.iter().map(|v| v.to_string()).collect::<Vec<_>>()[..], expected.1)
    );
}

#[test]
fn the_most_particular_counts() {
    let file =
        "size = 4\n[run]\nsize = 5\n[models.m]\nsize = 6\n[models.m.run]\nsize = 7\n[models.\"o/n\"]\nheat = -0.5";
    let all = &[file, "size = 9\nheat = 1"][..];
    check(&["run", "--size", "2"], &[("T_SIZE", "8")], all, "size", (&["2"], "command line"));
    check(&["run"], &[("T_SIZE", "8")], all, "size", (&["8"], "T_SIZE"));
    check(&["run", "--model", "m"], &[], all, "size", (&["7"], "0.toml [models.m.run]"));
    check(&["run"], &[("T_MODEL", "some/m")], all, "size", (&["7"], "0.toml [models.m.run]"));
    check(&["run", "--model", "o/n"], &[], all, "heat", (&["-0.5"], "0.toml [models.\"o/n\"]"));
    check(&["run", "--model", "o/n"], &[], all, "size", (&["5"], "0.toml [run]"));
    check(&["run"], &[], &["size = 4"], "size", (&["4"], "0.toml"));
    check(&["run"], &[], all, "heat", (&["1"], "1.toml"));
    check(&["run"], &[], &[], "size", (&["3"], "default"));
    check(&["run"], &[], &[], "heat", (&[], ""));
    // An empty variable sets nothing.
    check(&["run"], &[("T_SIZE", "")], &[], "size", (&["3"], "default"));
}

#[test]
fn every_kind_of_flag() {
    check(&["run"], &[("T_JSON", "1")], &[], "json", (&["true"], "T_JSON"));
    check(&["run"], &[("T_JSON", "off")], &["json = true"], "json", (&["false"], "T_JSON"));
    check(&["run"], &[("T_STOP", "a b\nc")], &[], "stop", (&["a b", "c"], "T_STOP"));
    check(&["run"], &[], &["list = [1, 2.5, 'x']"], "list", (&["1", "2.5", "x"], "0.toml"));
    check(&["run"], &[("T_LIST", "1,2")], &[], "list", (&["1,2"], "T_LIST"));
    check(&["run"], &[("T_VERBOSE", "2")], &[], "verbose", (&["2"], "T_VERBOSE"));
    check(&["-vv", "run"], &[("T_VERBOSE", "1")], &[], "verbose", (&["2"], "command line"));
    // What is required may come from elsewhere.
    check(&["eval", "text"], &[], &["[eval.text]\ntext_file = 'a'"], "text-file", (&["a"], "0.toml [eval.text]"));
}

#[test]
fn values_reach_clap() {
    let applied = apply(&["run", "hi"], &[("T_LIST", "1,2"), ("T_JSON", "yes"), ("T_VERBOSE", "2")], &["size = 4"]);
    let applied = applied.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(applied.arguments(), ["--size=4", "--list=1,2", "--json", "--verbose", "--verbose"].map(str::to_owned));
    let matches = applied.command.try_get_matches_from(["program", "run", "hi"]).expect("parses");
    let (_, matches) = matches.subcommand().expect("run");
    let list: Vec<&String> = matches.get_many("list").expect("set").collect();
    assert_eq!(list, ["1", "2"]);
    assert_eq!(
        (matches.get_one("size"), matches.get_flag("json"), matches.get_count("verbose")),
        (Some(&4u16), true, 2)
    );
}

#[test]
fn what_excludes_what() {
    // The command line wins over what it excludes, whichever of the two the table names.
    check(&["run", "--shape", "s"], &[("T_MODEL", "m")], &[], "model", (&[], ""));
    check(&["run", "--model", "m"], &[("T_SHAPE", "s")], &[], "shape", (&[], ""));
    check(&["run"], &[("T_SHAPE", "s")], &["model = 'm'"], "model", (&[], ""));
    let error = apply(&["run"], &[("T_SHAPE", "s"), ("T_MODEL", "m")], &[]).err().expect("refused").to_string();
    assert!(error.contains("T_MODEL and T_SHAPE cannot be used together"), "{error}");
}

#[test]
fn mistakes_are_named() {
    type Case<'a> = (&'a [(&'a str, &'a str)], &'a str, &'a str);
    let cases: &[Case<'_>] = &[
        (&[("T_SIZE", "x")], "", "T_SIZE: invalid value 'x' for '--size"),
        (&[("T_JSON", "maybe")], "", "T_JSON: --json is \"maybe\", expected true or false"),
        (&[], "size = 99", "0.toml: invalid value '99'"),
        (&[], "[run]\nsize = [1, 2]", "0.toml [run]: --size takes one value, found 2"),
        (&[], "size = 1979-05-27", "0.toml: \"size\" is datetime, expected"),
        (&[], "siez = 1", "0.toml: \"siez\" is no flag; did you mean size?"),
        (&[], "[run]\ntext-file = 'a'", "\"text-file\" in [run] is no flag"),
        (&[], "[rum]\nsize = 1", "[rum] is no command's section; did you mean run?"),
        (&[], "[models.m.rnu]\nsize = 1", "[models.m.rnu] is no command's section; did you mean run?"),
        (&[], "[models]\nm = 1", "[models] has a section for each model"),
        (&[], "secret = 'x'", "\"secret\" is no flag"),
        (&[], "stop = 'x'", "can be set on the command line and by a variable only"),
        (&[], "size = ", "this is not TOML"),
    ];
    for (variables, file, expected) in cases {
        let error = apply(&["run"], variables, &[file]).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(expected), "{variables:?} {file:?}: {error}");
    }
    // Another command's flag may stand in a variable and at the top.
    check(&["run"], &[("T_TEXT_FILE", "a")], &["text-file = 'b'"], "size", (&["3"], "default"));
    let settings = Settings::new("T_", &[], vec![], [("T_SIEZ".into(), "1".into())].into_iter());
    assert_eq!(settings.unknown_variables(&program()), [("T_SIEZ".to_owned(), Some("T_SIZE".to_owned()))]);
}

#[test]
fn what_clap_refuses_is_left_to_clap() {
    for args in [&["run", "--no-such"][..], &["run", "--size", "x"], &[], &["--help"], &["frobnicate"]] {
        assert!(apply(args, &[("T_SIZE", "5")], &[]).is_ok_and(|applied| applied.flags.is_empty()), "{args:?}");
    }
}
