//! `tandem bench serve`: prints what tandem-load measures.

use anyhow::bail;

use crate::cli::BenchServeArgs;
use crate::report::print_json;

/// Runs the command.
pub(super) fn serve(args: &BenchServeArgs) -> anyhow::Result<()> {
    let report = tandem_load::run(&args.into())?;
    let json = &report.json;
    if args.json {
        print_json(json)?;
    } else {
        let number = |key: &str| json[key].as_f64().unwrap_or(0.0);
        println!(
            "{} at {}: {} requests in {:.1} s, {} errors",
            report.model, args.url, json["requests"], report.seconds, json["errors"]
        );
        let (prompt, generated) = (&json["prompt_tokens"], &json["generated_tokens"]);
        let rate = number("generated_tokens_per_second");
        println!("{prompt} prompt tokens, {generated} generated, {rate:.1} tokens/s");
        if let Some(good) = json["good_requests_per_second"].as_f64() {
            println!("goodput: {good:.2} of {:.2} requests/s", number("requests_per_second"));
        }
        for (name, key) in [
            ("time to first token, ms", "time_to_first_token_ms"),
            ("time per output token, ms", "time_per_output_token_ms"),
            ("between tokens, ms", "inter_token_ms"),
            ("whole requests, ms", "request_ms"),
            ("tokens/s of each request", "request_tokens_per_second"),
        ] {
            let figures = json[key].as_object().into_iter().flatten();
            let line = figures.map(|(name, value)| format!("{name} {:.2}", value.as_f64().unwrap_or(0.0)));
            println!("{name}: {}", line.collect::<Vec<_>>().join(", "));
        }
    }
    match report.failed {
        Some((error, n)) => bail!("{n} of {} requests failed; the first: {error}", json["requests"]),
        None => Ok(()),
    }
}
