//! /metrics of several models: those of each loaded one with its name as a label, and those of the models themselves.

use std::collections::HashMap;
use std::fmt::Write;

use super::pool::{Shown, State};

/// Puts the label `model` into every line of a model's metrics, and the families of all models together.
pub(crate) fn merged(models: &[(String, String)]) -> String {
    let mut order: Vec<&str> = vec![];
    let mut families: HashMap<&str, (Vec<&str>, String)> = HashMap::new();
    for (name, text) in models {
        let label = format!("model=\"{}\"", escaped(name));
        let mut family = "";
        for line in text.lines() {
            if let Some(words) = line.strip_prefix("# ") {
                if words == "EOF" {
                    continue;
                }
                family = words.split(' ').nth(1).unwrap_or_default();
                let (about, _) = families.entry(family).or_insert_with(|| {
                    order.push(family);
                    Default::default()
                });
                if !about.contains(&line) && !about.iter().any(|known| kind(known) == kind(line)) {
                    about.push(line);
                }
            } else if let Some((_, samples)) = families.get_mut(family) {
                let (metric, rest) = line.split_at(line.find(['{', ' ']).unwrap_or(line.len()));
                // The lines of a family that has labels already, and of one that has none.
                let _ = match rest.strip_prefix('{') {
                    Some(rest) if rest.starts_with('}') => writeln!(samples, "{metric}{{{label}{rest}"),
                    Some(rest) => writeln!(samples, "{metric}{{{label},{rest}"),
                    None => writeln!(samples, "{metric}{{{label}}}{rest}"),
                };
            }
        }
    }
    let mut out = String::new();
    for family in order {
        let Some((about, samples)) = families.get(family) else { continue };
        about.iter().for_each(|line| out += &format!("{line}\n"));
        out += samples;
    }
    out
}

/// HELP, TYPE or UNIT.
fn kind(line: &str) -> &str {
    line.split(' ').nth(1).unwrap_or_default()
}

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Metrics of the models themselves, and the end of the text.
pub(crate) fn of_models<A>(models: &[Shown<A>], (budget, used): (u64, u64)) -> String {
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, f64)>| {
        let _ = write!(out, "# HELP {name} {help}.\n# TYPE {name} {kind}\n");
        let suffix = if kind == "counter" { "_total" } else { "" };
        samples.iter().for_each(|(labels, value)| out += &format!("{name}{suffix}{labels} {value}\n"));
    };
    let each = |value: &dyn Fn(&Shown<A>) -> f64| {
        models.iter().map(|model| (format!("{{model=\"{}\"}}", escaped(&model.name)), value(model))).collect::<Vec<_>>()
    };
    family(
        "tandem_models_memory_limit_bytes",
        "gauge",
        "Memory of all models at most",
        vec![(String::new(), budget as f64)],
    );
    family(
        "tandem_models_memory_used_bytes",
        "gauge",
        "Memory of the models that are in it",
        vec![(String::new(), used as f64)],
    );
    let is = |state: State| move |model: &Shown<A>| f64::from(u8::from(model.state == state));
    family("tandem_model_loaded", "gauge", "Whether the model is in memory and answers", each(&is(State::Loaded)));
    family(
        "tandem_model_failed",
        "gauge",
        "Whether its last load failed, or it ended by itself",
        each(&is(State::Failed)),
    );
    let in_memory = |model: &Shown<A>| match model.state {
        State::Loading | State::Loaded | State::Stopping => model.bytes.unwrap_or(0) as f64,
        State::Unloaded | State::Failed => 0.0,
    };
    family("tandem_model_memory_bytes", "gauge", "Memory that it takes", each(&in_memory));
    family("tandem_model_requests_running", "gauge", "Requests on their way through it", each(&|m| m.n_running as f64));
    family("tandem_model_requests_waiting", "gauge", "Requests that wait for it", each(&|m| m.n_waiting as f64));
    family("tandem_model_loads", "counter", "Times that it was loaded", each(&|m| m.n_loads as f64));
    family("tandem_model_evictions", "counter", "Times that it left for another one", each(&|m| m.n_evictions as f64));
    family("tandem_model_failures", "counter", "Loads that failed, and ends by itself", each(&|m| m.n_failures as f64));
    family("tandem_model_load_seconds", "gauge", "Time of its last load", each(&|m| m.load_seconds.unwrap_or(0.0)));
    out + "# EOF\n"
}

#[cfg(test)]
mod tests {
    use super::merged;

    #[test]
    fn families_of_two_models_are_one() {
        let one = "# HELP a Help.\n# TYPE a counter\na_total 1\n# HELP b Help.\n# TYPE b histogram\n# UNIT b seconds\n\
                   b_bucket{le=\"1\"} 2\nb_count 3\n# EOF\n";
        let two = "# HELP a Help.\n# TYPE a counter\na_total 5\n# HELP c Help.\n# TYPE c gauge\nc{} 6\n# EOF\n";
        let text = merged(&[("x".into(), one.into()), ("o\"d\\d\n".into(), two.into())]);
        let expected = "# HELP a Help.\n# TYPE a counter\na_total{model=\"x\"} 1\na_total{model=\"o\\\"d\\\\d\\n\"} 5\n\
                        # HELP b Help.\n# TYPE b histogram\n# UNIT b seconds\nb_bucket{model=\"x\",le=\"1\"} 2\nb_count{model=\"x\"} 3\n\
                        # HELP c Help.\n# TYPE c gauge\nc{model=\"o\\\"d\\\\d\\n\"} 6\n";
        assert_eq!(text, expected);
        assert_eq!(merged(&[]), "");
    }
}
