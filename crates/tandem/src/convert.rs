//! `tandem convert`: flags in, what was written out.

use std::time::Instant;

use anyhow::Context;
use serde_json::json;
use tandem_convert::{ConvertOptions, Planned};
use tandem_cpu::system::peak_memory_bytes;
use tandem_model::Accounting;
use tandem_runtime::units::{bytes, count, thousands};

use crate::cli::ConvertArgs;
use crate::news::on_terminal;
use crate::report::print_json;

/// Runs the command.
pub(crate) fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    let start = Instant::now();
    let options = ConvertOptions::from(args);
    if args.dry_run {
        return dry_run(&tandem_convert::plan(&options, &mut on_terminal())?, args.json);
    }
    let out = args.out.as_deref().context("--out is missing")?;
    let written = tandem_convert::convert(&options, out, &mut on_terminal())?;
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        return print_json(&json!({
            "out": out.display().to_string(),
            "bytes": written.bytes,
            "files": written.files,
            "files_kept": written.files_kept,
            "bytes_written": written.bytes_written,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }));
    }
    let kept = match written.files_kept {
        0 => String::new(),
        n => format!(", {n} of them kept from before"),
    };
    println!(
        "{}: {} in {} file{}{kept}; {seconds:.1} s, peak memory {}",
        out.display(),
        bytes(written.bytes),
        written.files,
        if written.files == 1 { "" } else { "s" },
        bytes(peak_memory_bytes())
    );
    Ok(())
}

/// Prints what would be written.
fn dry_run(planned: &Planned, as_json: bool) -> anyhow::Result<()> {
    let Planned { before, after, files } = planned;
    let bits = |bytes: u64, parameters: u64| bytes as f64 * 8.0 / parameters.max(1) as f64;
    let of = |a: &Accounting| {
        let parameters = a.total(|k| k.parameters);
        let resident = a.total(|k| k.resident_bytes);
        (resident, a.total(|k| k.read_bytes), bits(resident, parameters))
    };
    let ((bytes_before, read_before, bits_before), (bytes_after, read_after, bits_after)) = (of(before), of(after));
    if as_json {
        let kinds: serde_json::Map<_, _> = after
            .kinds
            .iter()
            .map(|k| {
                let formats: serde_json::Map<_, _> = k.formats.iter().map(|(f, b)| (f.clone(), json!(b))).collect();
                let value = json!({"parameters": k.parameters, "bytes": k.resident_bytes, "format_bytes": formats});
                (k.kind.name().to_string(), value)
            })
            .collect();
        return print_json(&json!({
            "source": {"bytes": bytes_before, "read_bytes_per_token": read_before, "bits_per_weight": bits_before},
            "bytes": bytes_after,
            "read_bytes_per_token": read_after,
            "bits_per_weight": bits_after,
            "files": files.iter().map(|(name, bytes)| json!({"name": name, "bytes": bytes})).collect::<Vec<_>>(),
            "modules": kinds,
        }));
    }
    println!("{:<16}{:>12}{:>14}{:>14}{:>8}  formats", "module", "parameters", "source", "output", "bits");
    for (b, a) in before.kinds.iter().zip(&after.kinds) {
        let formats: Vec<&str> = a.formats.iter().map(|(name, _)| name.as_str()).collect();
        println!(
            "{:<16}{:>12}{:>14}{:>14}{:>8.2}  {}",
            a.kind.name(),
            count(a.parameters),
            bytes(b.resident_bytes),
            bytes(a.resident_bytes),
            bits(a.resident_bytes, a.parameters),
            formats.join(", ")
        );
    }
    println!();
    println!("source: {} bytes, {bits_before:.2} bits per weight", thousands(bytes_before));
    println!("output: {} bytes, {bits_after:.2} bits per weight, {} files", thousands(bytes_after), files.len());
    println!("read per decoded token: {} before, {} after", bytes(read_before), bytes(read_after));
    Ok(())
}
