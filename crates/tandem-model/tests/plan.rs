//! Plans of the full-size model, without its weights.

use tandem_core::ModelConfig;
use tandem_core::backend::CacheKind;
use tandem_core::weights::ModuleKind;
use tandem_model::{
    Accounting, DummyWeights, Plan, PlanError, Planner, RankResources, Recipe, Request, Stacks, cache_specs,
};

const GB: u64 = 1_000_000_000;

const GLM: &str = include_str!("../../../crates/tandem-runtime/src/presets/glm-5.1.json");
const DEEPSEEK: &str = include_str!("../../../crates/tandem-runtime/src/presets/deepseek-v3.2.json");
const LLAMA: &str = include_str!("../../../crates/tandem-runtime/src/presets/llama-3.2-3b.json");

fn plan(memory: &[u64], bandwidth: &[f64], round_trip: f64, request: Request) -> Result<Plan, PlanError> {
    plan_of(GLM, memory, bandwidth, round_trip, request)
}

fn plan_of(
    config: &str,
    memory: &[u64],
    bandwidth: &[f64],
    round_trip: f64,
    request: Request,
) -> Result<Plan, PlanError> {
    let config = ModelConfig::parse(config).expect("valid");
    let weights = DummyWeights::new(&config, &Recipe::parse("mxfp4-q8").expect("known"), Stacks::Distinct);
    let ranks: Vec<RankResources> = memory
        .iter()
        .zip(bandwidth)
        .map(|(gb, bandwidth)| RankResources {
            host: "host".to_string(),
            memory: gb * GB,
            bandwidth: *bandwidth,
            round_trip,
        })
        .collect();
    let planner = Planner {
        config: &config,
        weights: weights.weights(),
        n_slots: 8192,
        cache_bytes: &|kind, width| if kind == CacheKind::IndexKey { width + 4 } else { 2 * width },
        ranks: &ranks,
    };
    planner.plan(request)
}

fn layers(plan: &Plan) -> Vec<usize> {
    plan.ranks.iter().map(|r| r.part.layers.len()).collect()
}

fn pp(n: usize) -> Request {
    Request { pp: Some(n), ..Request::default() }
}

#[test]
fn layers_are_divided_by_bytes_speed_and_memory() {
    let even = plan(&[256, 256], &[2e11, 2e11], 1e-4, pp(2)).expect("fits");
    assert_eq!(layers(&even).iter().sum::<usize>(), 78);
    // Every byte is held once.
    let held: u64 = even.ranks.iter().map(|r| r.weight_bytes).sum();
    assert!((405 * GB..406 * GB).contains(&held), "{held}");
    let slowest = even.ranks.iter().map(|r| r.read_bytes).max();
    assert!(slowest < Some(17 * GB), "{slowest:?}");
    // Rank 0 holds the last layers and the head.
    assert!(even.ranks[0].part.head && even.ranks[0].part.layers.end == 78 && even.ranks[1].part.embeds);

    // The fast machine gets more; then only what fits.
    let fast = layers(&plan(&[512, 512], &[4e11, 2e11], 1e-4, pp(2)).expect("fits"));
    assert!(fast[0] > 50 && fast[0] < 54, "{fast:?}");
    let small = plan(&[128, 320], &[4e11, 2e11], 1e-4, pp(2)).expect("fits");
    assert!(small.ranks[0].weight_bytes + small.ranks[0].cache_bytes <= 128 * GB && layers(&small)[0] > 20);
    assert_eq!(layers(&plan(&[120; 4], &[2e11; 4], 1e-4, pp(4)).expect("fits")).iter().sum::<usize>(), 78);
}

#[test]
fn slices_halve_what_a_rank_reads() {
    let one = plan(&[512], &[2e11], 0.0, pp(1)).expect("fits");
    for request in
        [Request { tp: Some(2), ..Request::default() }, Request { tp: Some(2), ep: Some(2), ..Request::default() }]
    {
        let two = plan(&[256; 2], &[2e11; 2], 3e-5, request).expect("fits");
        let reads = two.ranks.iter().map(|r| r.read_bytes).max().expect("two");
        let share = reads as f64 / one.ranks[0].read_bytes as f64;
        assert!((0.5..0.58).contains(&share), "{request:?}: {share}");
    }
}

#[test]
fn the_network_decides_between_pipeline_and_slices() {
    let choice = |round_trip: f64| {
        let plan = plan(&[256; 2], &[2e11; 2], round_trip, Request::default()).expect("fits");
        (plan.n_stages, plan.tensor_size)
    };
    assert_eq!(choice(5e-5), (1, 2));
    assert_eq!(choice(2e-3), (2, 1));
}

#[test]
fn what_does_not_fit_is_refused_with_the_remedy() {
    let error = plan(&[200, 150], &[2e11; 2], 1e-4, Request::default()).expect_err("too small").to_string();
    assert!(error.contains("are missing") && error.contains("rank 1 (host): 150.00 GB free"), "{error}");
    let error = plan(&[200; 2], &[2e11; 2], 1e-4, pp(3)).expect_err("three").to_string();
    assert!(error.contains("needs 3 ranks, but there are 2"), "{error}");
}

#[test]
fn plans_and_accounts_agree_on_what_a_token_reads_and_caches() {
    let cached = |kind, width| if kind == CacheKind::IndexKey { width + 4 } else { 2 * width };
    for (text, per_token) in [
        // Latents of 512 + 64; GLM-5.1 and DeepSeek-V3.2 have an indexer in every layer, with keys of 128.
        (GLM, 78 * (2 * 576 + 132)),
        (DEEPSEEK, 61 * (2 * 576 + 132)),
        // 8 heads of 128, keys and values.
        (LLAMA, 28 * 2 * 2 * 8 * 128),
    ] {
        let config = ModelConfig::parse(text).expect("valid");
        let specs: Vec<_> = (0..config.num_hidden_layers).flat_map(|layer| cache_specs(&config, layer)).collect();
        assert_eq!(specs.iter().map(|spec| cached(spec.kind, spec.width)).sum::<usize>(), per_token);

        let weights = DummyWeights::new(&config, &Recipe::parse("mxfp4-q8").expect("known"), Stacks::Distinct);
        let accounting = Accounting::new(weights.weights(), &config);
        let rank = plan_of(text, &[1024], &[2e11], 0.0, pp(1)).expect("fits").ranks.remove(0);
        let row = accounting.kinds.iter().find(|k| k.kind == ModuleKind::Embed).map_or(0, |k| k.read_bytes);
        // A tied embedding is read whole, its row with it.
        let twice = if config.tie_word_embeddings { row } else { 0 };
        assert_eq!(rank.read_bytes, accounting.total(|k| k.read_bytes) - twice);
        assert_eq!(rank.weight_bytes, accounting.total(|k| k.resident_bytes));
        assert_eq!(rank.cache_bytes, (8192 * per_token) as u64);
    }
}

#[test]
fn a_rank_with_half_of_the_key_heads_caches_half() {
    let tp = Request { tp: Some(2), ..Request::default() };
    for (text, shares) in [(LLAMA, 2), (GLM, 1)] {
        let one = plan_of(text, &[1024], &[2e11], 0.0, pp(1)).expect("fits");
        let two = plan_of(text, &[1024; 2], &[2e11; 2], 0.0, tp).expect("fits");
        for rank in &two.ranks {
            assert_eq!(rank.cache_bytes * shares, one.ranks[0].cache_bytes, "every rank has the whole latent");
        }
    }
}
