//! `tandem doctor`: what is wrong here, and how fast a model should be. `tandem explain`: why the last run, or a running
//! server, is as fast as it is.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;
use tandem_runtime::diagnosis::{self, DoctorOptions, RunRecord};
use tandem_serve::read_keys;

use crate::cli::{DoctorArgs, ExplainArgs};
use crate::report::{check_writable, plain, print_json};

/// A server that answers anything answers this sooner.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs `tandem doctor`; fails if there is a problem.
pub(crate) fn doctor(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let options = DoctorOptions { program: std::env::current_exe().ok(), ..args.into() };
    let report = diagnosis::doctor(&options, &mut |what| eprintln!("looking at {what}"));
    if args.json {
        print_json(&json!({ "command": "doctor", "healthy": !report.has_problem(), "report": report }))?;
    } else {
        print!("{}", plain(&report.text()));
    }
    Ok(if report.has_problem() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs `tandem explain`.
pub(crate) fn explain(args: &ExplainArgs) -> anyhow::Result<()> {
    args.report.as_deref().map(check_writable).transpose()?;
    let mut record = match &args.url {
        Some(url) => ask(url, args)?,
        None => {
            let mut record = diagnosis::read_last_run()?;
            record.measure_bandwidth();
            record
        }
    };
    record.facts.model = plain(&record.facts.model).into_owned();
    let explanation = diagnosis::explain(&record);
    if let Some(file) = &args.report {
        let page = explanation.html(&record);
        std::fs::write(file, page).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if args.json {
        return print_json(&json!({ "command": "explain", "explanation": explanation, "record": record }));
    }
    print!("{}", plain(&explanation.text(&record)));
    Ok(())
}

/// A server's timings.
fn ask(url: &str, args: &ExplainArgs) -> anyhow::Result<RunRecord> {
    ensure!(url.starts_with("http://") || url.starts_with("https://"), "{url} is no address; write http://HOST:PORT");
    let address = format!("{}/timings", url.trim_end_matches('/'));
    let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false);
    let mut request = config.build().new_agent().get(&address);
    if let Some(file) = &args.api_key_file {
        request = request.header("Authorization", format!("Bearer {}", read_keys(file)?[0]));
    }
    let mut response = request.call().with_context(|| format!("cannot reach {address}"))?;
    let status = response.status();
    let text = response.body_mut().read_to_string().with_context(|| format!("the answer of {address}"))?;
    ensure!(
        status.is_success(),
        "{address} answers {status}; it must be a tandem server, with its key in --api-key-file if it has one"
    );
    RunRecord::parse(&text).with_context(|| format!("the answer of {address}"))
}
