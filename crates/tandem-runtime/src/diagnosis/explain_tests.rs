//! Verdicts on runs whose faults are known: a small model of a machine makes the numbers that the engine would record.

use super::*;
use crate::diagnosis::record::{Facts, KindBytes};

/// Steps of a run.
const N_STEPS: usize = 60;
/// Bytes per second of the machine's memory.
const BANDWIDTH: f64 = 40e9;

/// Faults of a run, with their strength; zero is none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Faults {
    /// Milliseconds that page faults add to some steps of rank 0.
    paging: f64,
    /// Factor that rank 1 is slower by, less one.
    slow_rank: f64,
    /// Milliseconds that messages take more.
    link: f64,
    /// Share of the time in which others have the cores of every rank.
    contention: f64,
    /// Factor that old kernels are slower by, less one.
    kernels: f64,
    /// Milliseconds of work between steps.
    host: f64,
}

/// splitmix64, from 0 to 1.
fn random(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut x = *state;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) as f64 / u64::MAX as f64
}

/// The record of a run with these faults on so many ranks, and the mean time of its steps. Times scatter by three per cent.
fn run(faults: Faults, n_ranks: usize, seed: u64) -> RunRecord {
    let mut state = seed;
    let mut noise = |x: f64| x * (0.97 + 0.06 * random(&mut state));
    let bytes = 2_000_000_000u64;
    let floor = bytes as f64 / BANDWIDTH * 1e3 / n_ranks as f64;
    let healthy = floor / 0.82;
    let mut ranks = vec![];
    for rank in 0..n_ranks {
        let mut weights = noise(healthy) * (1.0 + faults.kernels);
        let (mut delay, mut slowed) = (0.0, 1.0);
        if faults.contention > 0.0 {
            slowed /= 1.0 - faults.contention;
            delay += weights * (slowed - 1.0);
        }
        if rank == 1 {
            slowed *= 1.0 + faults.slow_rank;
        }
        weights *= slowed;
        let operations = BTreeMap::from([
            (Operation::Experts.name().to_string(), 0.6 * weights),
            (Operation::AttentionProjections.name().to_string(), 0.4 * weights),
            (Operation::SparseAttention.name().to_string(), 0.05 * healthy),
            (Operation::Norms.name().to_string(), 0.02 * healthy),
        ]);
        let working = weights + 0.07 * healthy + if rank == 0 { faults.paging / 2.0 } else { 0.0 };
        ranks.push(RankRecord {
            working_ms: working,
            operations_ms: operations,
            cpu_ms: 2.0 * weights / slowed,
            run_delay_ms: 2.0 * delay,
            major_faults: if rank == 0 && faults.paging > 0.0 { 20.0 } else { 0.0 },
            resident_share: Some(if rank == 0 && faults.paging > 0.0 { 0.7 } else { 1.0 }),
            ..RankRecord::default()
        });
    }
    let slowest = ranks.iter().map(|rank| rank.working_ms).fold(0.0, f64::max);
    let sums = if n_ranks > 1 { noise(0.04 * healthy) + faults.link } else { 0.0 };
    for rank in &mut ranks {
        rank.summing_ms = if n_ranks > 1 { sums + slowest - rank.working_ms } else { 0.0 };
    }
    let host = noise(0.01 * healthy);
    let ms = slowest + sums + host + faults.host;
    let decode = Phase {
        n_steps: N_STEPS,
        n_tokens: N_STEPS,
        context: 300.0,
        ms,
        ms_median: ms,
        ms_p10: 0.97 * ms,
        ms_p90: 1.03 * ms,
        outside_ms: faults.host,
        host_ms: host,
        operations_ms: ranks[0].operations_ms.clone(),
        working_ms: ranks[0].working_ms,
        summing_ms: ranks[0].summing_ms,
        major_faults: ranks[0].major_faults,
        // Half of the steps have faults, of twice the mean cost.
        clean_ms: Some(ms - faults.paging / 2.0),
        clean_working_ms: Some(ranks[0].working_ms - faults.paging / 2.0),
        ..Phase::default()
    };
    let kind = |kind: ModuleKind, share: f64, format: &str| KindBytes {
        kind: kind.name().to_string(),
        read_bytes: (share * bytes as f64) as u64,
        resident_bytes: (share * bytes as f64) as u64,
        formats: vec![format.to_string()],
    };
    RunRecord {
        form: 1,
        facts: Facts {
            model: "made up".to_string(),
            n_layers: 10,
            backend: "cpu".to_string(),
            isa: Some(if faults.kernels > 0.0 { "scalar" } else { "avx512" }.to_string()),
            best_isa: Some("avx512".to_string()),
            threads: 2,
            cores: 2 * n_ranks,
            weight_bytes: bytes,
            kinds: vec![kind(ModuleKind::RoutedExperts, 0.6, "mxfp4"), kind(ModuleKind::Attention, 0.4, "affine8:g64")],
            bandwidth: Some(BANDWIDTH * n_ranks as f64),
            tensor_size: n_ranks,
            rank_bytes: vec![bytes / n_ranks as u64; if n_ranks > 1 { n_ranks } else { 0 }],
            planned_communication_ms: 0.04 * healthy,
            ..Facts::default()
        },
        decode: Some(decode),
        ranks,
        ..RunRecord::default()
    }
}

fn kind_of(faults: Faults, n_ranks: usize, seed: u64) -> CauseKind {
    explain(&run(faults, n_ranks, seed)).principal
}

#[test]
fn a_healthy_run_reads_weights_whatever_the_noise() {
    for seed in 0..40 {
        for n_ranks in [1, 2] {
            assert_eq!(kind_of(Faults::default(), n_ranks, seed), CauseKind::Weights, "{n_ranks} ranks, seed {seed}");
        }
    }
}

/// Each fault by itself, of half the time of a healthy step, on one rank and on two; no fault of one rank that needs two.
fn single_faults(healthy: f64, n_ranks: usize) -> Vec<(CauseKind, Faults)> {
    let none = Faults::default();
    let mut list = vec![
        (CauseKind::Paging, Faults { paging: healthy, ..none }),
        (CauseKind::CpuContention, Faults { contention: 0.4, ..none }),
        (CauseKind::Kernels, Faults { kernels: 2.0, ..none }),
        (CauseKind::Host, Faults { host: 0.5 * healthy, ..none }),
    ];
    if n_ranks > 1 {
        list.push((CauseKind::SlowRank, Faults { slow_rank: 0.6, ..none }));
        list.push((CauseKind::Communication, Faults { link: 0.6 * healthy, ..none }));
    }
    list
}

fn step_ms(faults: Faults, n_ranks: usize) -> f64 {
    run(faults, n_ranks, 7).decode.expect("it decoded").ms
}

#[test]
fn every_fault_by_itself_is_named() {
    for n_ranks in [1, 2] {
        let healthy = step_ms(Faults::default(), n_ranks);
        for (kind, faults) in single_faults(healthy, n_ranks) {
            for seed in 0..5 {
                let explanation = explain(&run(faults, n_ranks, seed));
                assert_eq!(explanation.principal, kind, "{n_ranks} ranks, {faults:?}: {}", explanation.verdict);
                let gained = step_ms(faults, n_ranks) - healthy;
                let cost = explanation.causes[0].cost_ms;
                assert!((cost / gained - 1.0).abs() < 0.5, "{kind:?}: costs {gained:.1} ms, said {cost:.1}");
            }
        }
    }
    let slow = explain(&run(Faults { slow_rank: 1.0, ..Faults::default() }, 2, 1));
    assert_eq!(slow.causes[0].rank, Some(1));
    assert!(slow.verdict.contains("wait for rank 1"), "{}", slow.verdict);
}

#[test]
fn of_several_faults_the_one_that_costs_most_is_named() {
    let mut state = 20_261_126;
    let (mut right, n) = (0, 60);
    let mut wrong = vec![];
    for case in 0..n {
        let n_ranks = if case % 4 == 0 { 1 } else { 2 };
        let healthy = step_ms(Faults::default(), n_ranks);
        let mut draw = |most: f64| if random(&mut state) < 0.5 { most * random(&mut state) } else { 0.0 };
        let faults = Faults {
            paging: draw(1.5 * healthy),
            contention: draw(0.5),
            kernels: draw(2.5),
            host: draw(0.8 * healthy),
            slow_rank: if n_ranks > 1 { draw(1.2) } else { 0.0 },
            link: if n_ranks > 1 { draw(healthy) } else { 0.0 },
        };
        let none = Faults::default();
        let alone = [
            (CauseKind::Paging, Faults { paging: faults.paging, ..none }),
            (CauseKind::CpuContention, Faults { contention: faults.contention, ..none }),
            (CauseKind::Kernels, Faults { kernels: faults.kernels, ..none }),
            (CauseKind::Host, Faults { host: faults.host, ..none }),
            (CauseKind::SlowRank, Faults { slow_rank: faults.slow_rank, ..none }),
            (CauseKind::Communication, Faults { link: faults.link, ..none }),
        ];
        let costs = alone.map(|(kind, faults)| (kind, step_ms(faults, n_ranks) - healthy));
        let most = costs.iter().map(|(_, cost)| *cost).fold(0.0, f64::max);
        let named = kind_of(faults, n_ranks, case);
        let is_right = if most < 0.15 * (healthy + most) {
            // Too little for a verdict: whatever is largest, a fault or none.
            true
        } else {
            costs.iter().any(|(kind, cost)| *kind == named && *cost >= 0.8 * most)
        };
        right += usize::from(is_right);
        if !is_right {
            wrong.push(format!("{n_ranks} ranks, {faults:?}: {named:?}, alone {costs:.1?}"));
        }
    }
    assert!(right >= 57, "{right} of {n}\n{}", wrong.join("\n"));
}

#[test]
fn what_the_numbers_do_not_carry_is_unknown() {
    let mut record = run(Faults::default(), 1, 1);
    // Too few steps.
    record.decode.as_mut().unwrap().n_steps = 3;
    assert_eq!(explain(&record).principal, CauseKind::Unknown);
    // A GPU whose operations are not timed, far from its bandwidth.
    let mut record = run(Faults::default(), 1, 1);
    record.facts.backend = "cuda".to_string();
    record.facts.bandwidth = Some(30.0 * BANDWIDTH);
    record.decode.as_mut().unwrap().operations_ms.clear();
    let explanation = explain(&record);
    assert_eq!(explanation.principal, CauseKind::Unknown);
    assert!(explanation.verdict.contains("bench decode"), "{}", explanation.verdict);
    // The same with experts on the host.
    record.facts.host_expert_bytes = 1 << 30;
    assert_eq!(explain(&record).principal, CauseKind::HostExperts);
    // And with memory lost.
    record.facts.host_expert_bytes = 0;
    record.warning = Some("the GPU reads weights at 20 GB/s, and 600 at first".to_string());
    assert_eq!(explain(&record).principal, CauseKind::DeviceMemoryLost);
    // Time that belongs to nothing.
    let mut record = run(Faults::default(), 1, 1);
    record.decode.as_mut().unwrap().ms *= 2.0;
    assert_eq!(explain(&record).principal, CauseKind::Unknown);
    // No run at all.
    assert_eq!(explain(&RunRecord::default()).principal, CauseKind::Unknown);
}

#[test]
fn more_threads_than_cores_are_told_from_other_programs() {
    let mut record = run(Faults { contention: 0.4, ..Faults::default() }, 1, 3);
    record.facts.threads = 8;
    record.ranks[0].run_delay_ms *= 4.0;
    assert_eq!(explain(&record).principal, CauseKind::TooManyThreads);
}

/// On a machine whose cores others have, the time between steps grows too.
#[test]
fn steps_that_wait_for_a_core_to_begin_are_not_the_hosts() {
    let mut record = run(Faults { host: 60.0, ..Faults::default() }, 1, 3);
    assert_eq!(explain(&record).principal, CauseKind::Host);
    record.ranks[0].run_delay_ms = 180.0;
    assert_eq!(explain(&record).principal, CauseKind::CpuContention);
}

#[test]
fn a_record_survives_its_file_and_a_page_needs_nothing_else() {
    let record = run(Faults { link: 30.0, ..Faults::default() }, 2, 1);
    let text = serde_json::to_string(&record).unwrap();
    let again = RunRecord::parse(&text).unwrap();
    // The last digit of a number may differ; what it means does not.
    assert_eq!(explain(&again).verdict, explain(&record).verdict);
    assert_eq!((again.facts.n_layers, again.ranks.len()), (record.facts.n_layers, record.ranks.len()));
    assert!(RunRecord::parse(&text.replacen("\"form\":1", "\"form\":2", 1)).is_err());
    assert!(RunRecord::parse("[]").is_err());
    let explanation = explain(&record);
    let page = explanation.html(&record);
    assert!(page.contains("<svg") && page.contains(&super::super::report::escape(&explanation.verdict)));
    for outside in ["src=", "href=", "url(", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(explanation.text(&record).contains("rank 1: works"));
}

/// Every number of a record by itself becomes something that no run wrote: whatever is said then, it is said.
#[test]
fn a_damaged_record_is_explained_without_a_panic() {
    use serde_json::{Value, json};
    fn leaves(value: &Value, at: &str, out: &mut Vec<String>) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| leaves(value, &format!("{at}/{key}"), out)),
            Value::Array(list) => {
                list.iter().enumerate().for_each(|(i, value)| leaves(value, &format!("{at}/{i}"), out))
            }
            _ => out.push(at.to_string()),
        }
    }
    let mut record = run(Faults { link: 30.0, contention: 0.3, paging: 20.0, ..Faults::default() }, 2, 1);
    record.steps = vec![(1.0, 0), (2.0, 3)];
    record.ranks[1].throttled_ms = 3.0;
    record.facts.experts = Some((8, 64));
    let whole = json!(record);
    let mut paths = vec![];
    leaves(&whole, "", &mut paths);
    assert!(paths.len() > 80, "{}", paths.len());
    let mut n_read = 0;
    for path in &paths {
        for damage in
            [json!(0), json!(-1.5), json!(1), json!(1e300), json!(u64::MAX), Value::Null, json!("text"), json!([])]
        {
            let mut damaged = whole.clone();
            *damaged.pointer_mut(path).unwrap() = damage;
            if let Ok(record) = RunRecord::parse(&damaged.to_string()) {
                let explanation = explain(&record);
                assert!(explanation.text(&record).contains("bottleneck:"));
                assert!(explanation.html(&record).contains("</html>"));
                n_read += 1;
            }
        }
    }
    assert!(n_read > paths.len(), "{n_read}");
    // Lists that do not belong together.
    for (list, n) in
        [("/ranks", 0), ("/ranks", 1), ("/facts/rank_bytes", 0), ("/facts/rank_bytes", 1), ("/facts/kinds", 0)]
    {
        let mut damaged = whole.clone();
        damaged.pointer_mut(list).and_then(Value::as_array_mut).unwrap().truncate(n);
        let record = RunRecord::parse(&damaged.to_string()).unwrap();
        assert!(!explain(&record).text(&record).is_empty(), "{list}");
    }
    for (text, words) in
        [("", "JSON"), ("[]", "JSON"), ("{}", "form"), (r#"{"form": 7}"#, "form 7"), (r#"{"form": 1}"#, "timings")]
    {
        let error = format!("{:#}", RunRecord::parse(text).unwrap_err());
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn formats_without_kernels_and_what_they_cost_are_named() {
    // A tenth of the speed, with the kernels that the processor has.
    let mut record = run(Faults { kernels: 9.0, ..Faults::default() }, 1, 1);
    record.facts.isa = record.facts.best_isa.clone();
    let plain = explain(&record);
    assert_eq!(plain.principal, CauseKind::Weights);
    // More bandwidth would not help, and nobody says so.
    assert!(plain.verdict.contains("bandwidth does not") && !plain.advice.iter().any(|a| a.what.contains("bandwidth")));
    record.facts.slow_formats = vec!["mxfp4".to_string()];
    let slow = explain(&record);
    assert_eq!(slow.principal, CauseKind::Kernels);
    assert!(
        slow.verdict.contains("no kernel for mxfp4") && slow.verdict.contains("tandem convert"),
        "{}",
        slow.verdict
    );
}

/// A rank that a quota stops is stopped in sums too, and the others see only that messages take long.
#[test]
fn a_rank_that_is_held_in_sums_is_no_slow_network() {
    let mut record = run(Faults { slow_rank: 0.4, link: 40.0, ..Faults::default() }, 2, 1);
    assert_eq!(explain(&record).principal, CauseKind::Communication);
    let rank = &mut record.ranks[1];
    (rank.throttled_ms, rank.run_delay_ms) = (48.0, 96.0);
    let explanation = explain(&record);
    assert_eq!(
        (explanation.principal, explanation.causes[0].rank),
        (CauseKind::SlowRank, Some(1)),
        "{:?}",
        explanation.causes
    );
    // Where all ranks lack cores, it is neither.
    for rank in &mut record.ranks {
        (rank.throttled_ms, rank.run_delay_ms) = (0.0, 160.0);
    }
    assert_eq!(explain(&record).principal, CauseKind::CpuContention);
}
