//! The verdict of `tandem bench matrix`: what limits decoding, from a table of controlled comparisons.

use serde_json::{Value, json};

/// Where a step's time goes, by the names of `bench decode`'s breakdown; "other" and "norms" are the rest.
pub const SHARES: [(&str, &[&str]); 5] = [
    ("weights", &["attention_projections", "router", "experts", "dense_mlp", "lm_head"]),
    ("attention", &["sparse_attention", "indexer"]),
    ("communication", &["communication"]),
    ("waiting", &["waiting"]),
    ("host", &["norms", "other"]),
];

/// A row of the table, from what `bench decode --json` with these flags says.
pub fn row(name: &str, flags: &[String], result: &Value) -> Value {
    let total = result["breakdown_total_ms"].as_f64().unwrap_or(f64::NAN);
    let of = |kinds: &[&str]| -> f64 {
        kinds.iter().filter_map(|k| result["breakdown_ms"][k].as_f64()).fold(0.0, |sum, ms| sum + ms)
    };
    let mut row = json!({
        "row": name,
        "flags": flags,
        "tokens_per_second": result["tokens_per_second"],
        "decode_ms_median": result["decode_ms_median"],
        "bandwidth_fraction": result["bandwidth_fraction"],
        "major_page_faults": result["major_page_faults"],
        "resident_share": result["resident_share"],
    });
    for (share, kinds) in SHARES {
        row["share"][share] = json!(of(kinds) / total);
    }
    row
}

/// What limits one rank, and what several ranks lose.
pub fn verdict(rows: &[Value], n_ranks: usize) -> String {
    let find = |name: &str| rows.iter().find(|r| r["row"] == name && r["error"].is_null());
    let speed = |row: &Value| row["tokens_per_second"].as_f64().unwrap_or(0.0);
    let share = |row: &Value, name: &str| row["share"][name].as_f64().unwrap_or(0.0);
    let Some(one) = find("one rank, mxfp4") else {
        return "bottleneck: unknown, one rank was not measured".to_string();
    };
    if one["resident_share"].as_f64().is_some_and(|s| s < 0.9) || one["major_page_faults"].as_u64() > Some(100) {
        return "bottleneck: the disk. The weights are not all in memory: free memory, use fewer bits, or more machines"
            .to_string();
    }
    let divided = ["pipeline, tcp", "pipeline, threads", "slices, tcp", "slices, threads"].into_iter().filter_map(find);
    let best = divided.max_by(|a, b| speed(a).total_cmp(&speed(b)));
    let (row, where_) = match best {
        Some(best) if speed(best) > speed(one) => (best, best["row"].as_str().unwrap_or("")),
        _ => (one, "one rank"),
    };
    let Some((worst, _)) = SHARES.iter().max_by(|a, b| share(row, a.0).total_cmp(&share(row, b.0))) else {
        return String::new();
    };
    let advice = match *worst {
        "weights" => "reading weights; fewer bits, faster memory, or slices on more machines help",
        "attention" => "attention over the context; fewer tokens in the cache help, other weight formats do not",
        "communication" => "messages between ranks; a pipeline, or a network with shorter round trips, helps",
        "waiting" => "ranks that wait for a slower one; give it less, or stop what else it does",
        _ => "work outside of the matrices; the model is small for this machine",
    };
    let mut text = format!(
        "bottleneck: {worst}, {:.0} % of the time in the fastest division ({where_}): {advice}",
        100.0 * share(row, worst)
    );
    if let Some(best) = best {
        text += &format!(
            ". {n_ranks} ranks at their best ({}) run at {:.2} times the speed of one rank with all cores",
            best["row"].as_str().unwrap_or(""),
            speed(best) / speed(one)
        );
    }
    if let (Some(slices), Some(without)) = (find("slices, tcp"), find("slices, sums in no layer")) {
        text +=
            &format!("; without any sums, slices would run at {:.2} times their speed", speed(without) / speed(slices));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(name: &str, speed: f64, weights: f64, communication: f64) -> Value {
        json!({
            "row": name, "tokens_per_second": speed, "resident_share": 1.0, "major_page_faults": 0,
            "share": { "weights": weights, "communication": communication, "attention": 0.1 },
        })
    }

    #[test]
    fn the_verdict_names_the_largest_share_of_the_fastest_division() {
        let one = measured("one rank, mxfp4", 10.0, 0.9, 0.0);
        let slow =
            [one.clone(), measured("slices, tcp", 4.0, 0.2, 0.7), measured("slices, sums in no layer", 8.0, 1.0, 0.0)];
        let text = verdict(&slow, 2);
        assert!(text.starts_with("bottleneck: weights, 90 %") && text.contains("0.40 times"), "{text}");
        assert!(text.contains("without any sums, slices would run at 2.00 times"), "{text}");
        let fast = [one.clone(), measured("slices, tcp", 16.0, 0.4, 0.5)];
        assert!(verdict(&fast, 2).starts_with("bottleneck: communication, 50 %"), "{}", verdict(&fast, 2));
        let mut swapped = one;
        swapped["resident_share"] = json!(0.5);
        assert!(verdict(&[swapped], 2).starts_with("bottleneck: the disk"));
        assert!(verdict(&[json!({"row": "one rank, mxfp4", "error": "no"})], 2).contains("unknown"));
    }

    /// They say their unit as those of `bench decode` do. Measuring ten rows takes too long for a test.
    #[test]
    fn the_keys_of_a_row() {
        let measured = json!({"tokens_per_second": 1.0, "breakdown_ms": {"norms": 1.0}, "breakdown_total_ms": 2.0});
        let row = row("one", &[], &measured);
        let keys: Vec<&String> = row.as_object().expect("an object").keys().collect();
        let expected =
            "row flags tokens_per_second decode_ms_median bandwidth_fraction major_page_faults resident_share share";
        assert_eq!(keys, expected.split(' ').collect::<Vec<_>>());
        assert_eq!(row["share"]["host"], 0.5, "{row}");
    }
}
