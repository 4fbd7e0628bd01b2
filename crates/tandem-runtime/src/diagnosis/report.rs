//! An explanation as text, and as a page of its own with charts; nothing is loaded from elsewhere.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;

use super::explain::Explanation;
use super::record::RunRecord;
use crate::units::bytes;

impl Explanation {
    /// For a terminal.
    pub fn text(&self, record: &RunRecord) -> String {
        let mut out = String::new();
        let mut line = |text: String| {
            out.push_str(&text);
            out.push('\n');
        };
        let facts = &record.facts;
        line(format!(
            "{}, {}; {}, numerics {}",
            facts.model,
            plural(facts.n_layers, "layer"),
            facts.device,
            facts.numerics
        ));
        if self.step_ms > 0.0 {
            let roofline = self.roofline_tokens_per_second;
            let limit = roofline.map_or(String::new(), |most| {
                format!(
                    ", {:.0} % of the {most:.1} that memory alone would allow",
                    100.0 * self.tokens_per_second / most
                )
            });
            line(format!("{:.1} ms per step, {:.2} tokens/s{limit}", self.step_ms, self.tokens_per_second));
        }
        line(format!("\nbottleneck: {}", self.verdict));
        if !self.parts.is_empty() {
            line(format!("\n{:<24}{:>10}{:>9}{:>12}{:>14}", "a step", "ms", "share", "bytes", "memory alone"));
        }
        for part in self.parts.iter().filter(|part| part.ms > 0.0005 * self.step_ms) {
            let floor = part.floor_ms.map_or(String::new(), |ms| format!("{ms:.2} ms"));
            let read = if part.bytes > 0 { bytes(part.bytes) } else { String::new() };
            let share = 100.0 * part.ms / self.step_ms;
            line(format!("{:<24}{:>10.2}{share:>7.1} %{read:>12}{floor:>14}", part.name, part.ms));
        }
        for (rank, r) in record.ranks.iter().enumerate().filter(|_| record.ranks.len() > 1) {
            line(format!(
                "rank {rank}: works {:.2} ms, sums {:.2}, waits for hidden states {:.2}, sends {:.2}; without a core {:.2}",
                r.working_ms, r.summing_ms, r.receiving_ms, r.sending_ms, r.run_delay_ms
            ));
        }
        for (i, advice) in self.advice.iter().enumerate() {
            if i == 0 {
                line("\nwhat would help (estimates)".to_string());
            }
            line(format!("  {:.1} tokens/s: {} ({})", advice.tokens_per_second, advice.what, advice.estimate));
        }
        // A verdict that says nothing has said why.
        let others = self.unknown.iter().filter(|text| !self.verdict.ends_with(text.as_str()));
        others.for_each(|text| line(format!("not known: {text}")));
        out
    }

    /// A page with charts.
    pub fn html(&self, record: &RunRecord) -> String {
        let bars: Vec<Bar> = self
            .parts
            .iter()
            .filter(|part| part.ms > 0.0)
            .map(|part| Bar { name: part.name.clone(), value: part.ms, mark: part.floor_ms })
            .collect();
        let steps: Vec<f64> = record.steps.iter().map(|(ms, _)| *ms).collect();
        let mut body = String::new();
        let _ = write!(body, "<p><strong>bottleneck: {}</strong></p>", escape(&self.verdict));
        let _ = write!(body, "<h2>A step, ms</h2>{}", bar_chart(&bars, "ms"));
        body.push_str("<p>The line in a bar is what memory alone would take for its bytes.</p>");
        let _ = write!(body, "<h2>The last steps, ms</h2>{}", line_chart(&steps));
        let _ = write!(body, "<h2>In numbers</h2><pre>{}</pre>", escape(&self.text(record)));
        page(&format!("{}: where a token's time goes", record.facts.model), &body)
    }
}

fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A bar of a chart.
pub struct Bar {
    /// Before it.
    pub name: String,
    /// Its length.
    pub value: f64,
    /// A line across it.
    pub mark: Option<f64>,
}

/// Bars below each other, as SVG.
fn bar_chart(bars: &[Bar], unit: &str) -> String {
    const ROW: usize = 24;
    let longest = bars.iter().map(|bar| bar.value.max(bar.mark.unwrap_or(0.0))).fold(1e-9, f64::max);
    let scale = 480.0 / longest;
    let height = ROW * bars.len() + 8;
    let mut svg =
        format!("<svg viewBox=\"0 0 860 {height}\" width=\"860\" role=\"img\" xmlns=\"http://www.w3.org/2000/svg\">");
    for (i, bar) in bars.iter().enumerate() {
        let (y, width) = (i * ROW + 4, bar.value * scale);
        let text = y + 15;
        let _ = write!(svg, "<text x=\"250\" y=\"{text}\" text-anchor=\"end\">{}</text>", escape(&bar.name));
        let _ = write!(svg, "<rect x=\"260\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"#4878a8\"/>");
        if let Some(mark) = bar.mark {
            let x = 260.0 + mark * scale;
            let _ = write!(
                svg,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{y}\" y2=\"{}\" stroke=\"#d62728\" stroke-width=\"3\"/>",
                y + 18
            );
        }
        let _ = write!(svg, "<text x=\"{:.1}\" y=\"{text}\">{:.2} {unit}</text>", 266.0 + width, bar.value);
    }
    svg + "</svg>"
}

/// Values one after the other, as SVG.
fn line_chart(values: &[f64]) -> String {
    let top = values.iter().copied().fold(1e-9, f64::max) * 1.1;
    let dx = 780.0 / values.len().saturating_sub(1).max(1) as f64;
    let point = |(i, value): (usize, &f64)| format!("{:.1},{:.1}", 60.0 + i as f64 * dx, 190.0 - value / top * 180.0);
    let points: Vec<String> = values.iter().enumerate().map(point).collect();
    format!(
        "<svg viewBox=\"0 0 860 210\" width=\"860\" role=\"img\" xmlns=\"http://www.w3.org/2000/svg\">\
         <line x1=\"60\" y1=\"190\" x2=\"840\" y2=\"190\" stroke=\"#888\"/><text x=\"54\" y=\"18\" text-anchor=\"end\">{top:.1}</text>\
         <text x=\"54\" y=\"194\" text-anchor=\"end\">0</text><polyline points=\"{}\" fill=\"none\" stroke=\"#4878a8\" \
         stroke-width=\"1.5\"/></svg>",
        points.join(" ")
    )
}

/// Writes a page with a verdict and a chart.
///
/// # Errors
/// It cannot be written.
pub fn write_chart(file: &Path, title: &str, verdict: &str, bars: &[Bar], unit: &str) -> anyhow::Result<()> {
    let body = format!("<p><strong>{}</strong></p>{}", escape(verdict), bar_chart(bars, unit));
    std::fs::write(file, page(title, &body)).with_context(|| format!("cannot write {}", file.display()))
}

/// A page of its own.
fn page(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>\
         body{{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222;background:#fff}}\
         svg{{max-width:100%;height:auto;font-size:13px}}pre{{overflow-x:auto;background:#f5f5f5;padding:1em}}\
         </style></head><body><h1>{title}</h1>{body}</body></html>\n"
    )
}

/// Text that is no markup.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
