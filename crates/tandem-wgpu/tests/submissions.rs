//! Work is cut into submissions that keep to a budget, and a lost device is one error that names the operation.

mod device;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tandem_comm::{Channel, CommError, Group, Incoming, Transport, Wait, Wire, local};
use tandem_core::backend::{Backend, EXACT_ROWS, PAGE_SIZE, TensorGroup};
use tandem_core::{Batch, ModelConfig};
use tandem_engine::{EngineError, HostReduce, ModelRunner, Runner};
use tandem_model::{DummyWeights, Limits, Recipe, Stacks};
use tandem_wgpu::{Options, SubmissionStats, Tiles, WgpuBackend, WgpuError};

/// Two layers in the shape of GLM-5.1, an eighth to a sixteenth as wide.
const CONFIG: &str = r#"{"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "dtype": "bfloat16",
    "vocab_size": 256, "hidden_size": 384, "intermediate_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 2,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "qk_head_dim": 96, "v_head_dim": 64, "head_dim": 32,
    "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": true, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "index_head_dim": 32, "index_n_heads": 4, "index_topk": 2048, "indexer_rope_interleave": true, "rms_norm_eps": 1e-05,
    "attention_bias": false, "hidden_act": "silu", "max_position_embeddings": 4096,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "tie_word_embeddings": false, "eos_token_id": [0]}"#;

fn runner(backend: WgpuBackend, n: usize) -> ModelRunner<WgpuBackend> {
    runner_of(CONFIG, backend, n)
}

fn runner_of(config: &str, backend: WgpuBackend, n: usize) -> ModelRunner<WgpuBackend> {
    let config = ModelConfig::parse(config).expect("a configuration");
    let recipe = Recipe::parse("mxfp4-q8").expect("a recipe");
    let limits = Limits { max_rows: n, max_logits_rows: 1 };
    let source = DummyWeights::new(&config, &recipe, Stacks::Repeated);
    let model = tandem_model::load_from(&backend, &config, &source, limits, &mut |_| {}).expect("loads");
    ModelRunner::new(backend, model, limits, config.vocab_size, n.next_multiple_of(PAGE_SIZE))
}

fn prompt(n: usize) -> Batch {
    Batch {
        tokens: (0..n as u32).map(|t| t % 256).collect(),
        positions: (0..n as u32).collect(),
        sequences: vec![0; n],
        block_tables: vec![(0..n.div_ceil(PAGE_SIZE) as u32).collect()],
        logits_rows: vec![n as u32 - 1],
        sampling: vec![],
    }
}

#[test]
fn a_prefill_is_cut_into_submissions_that_keep_to_the_budget() {
    if device::skipped() {
        return;
    }
    // One that a prefill exceeds many times over, on software as on a GPU.
    let probe = WgpuBackend::new(&Options::default()).expect("a device");
    let software = probe.info().kind == "cpu";
    let budget = if software { Duration::from_millis(20) } else { Duration::from_micros(200) };
    let n = EXACT_ROWS + 32;
    let mut logits = vec![];
    for (budget, cut) in [(Duration::from_secs(3600), false), (budget, true)] {
        let backend = WgpuBackend::new(&Options { budget, ..Options::default() }).expect("a device");
        let mut runner = runner(backend, n);
        let mut of_run = vec![];
        runner.step(prompt(n), &mut of_run).expect("runs");
        logits.push(std::mem::take(&mut of_run));
        if !cut {
            continue;
        }
        // The first step taught the estimates.
        runner.backend().begin_submission_stats();
        runner.step(prompt(n), &mut of_run).expect("runs");
        let stats = runner.backend().submission_stats();
        assert!(stats.submissions > 4, "{stats:?}");
        // Other work on this machine may make a time on software much longer.
        kept_to(budget, stats, 10.0);
    }
    assert_eq!(logits[0], logits[1], "the same results however work is cut");
}

/// Submissions whose times were measured have kept to the budget, the longest within `most` times it.
fn kept_to(budget: Duration, stats: SubmissionStats, most: f64) {
    assert!(stats.timed > 4, "{stats:?}");
    let mean = stats.timed_seconds / stats.timed as f64;
    assert!(mean <= 1.5 * budget.as_secs_f64(), "a mean of {mean} s for {budget:?}: {stats:?}");
    assert!(stats.longest_seconds <= most * budget.as_secs_f64(), "{budget:?}: {stats:?}");
}

/// Needs a GPU with 25 GB of memory: `submissions --ignored --nocapture`.
#[test]
#[ignore = "layers of full size take software hours"]
fn a_prefill_through_layers_of_full_size_keeps_to_20_ms() {
    if device::skipped() {
        return;
    }
    let (n, budget) = (512, Duration::from_millis(20));
    let mut config: serde_json::Value =
        serde_json::from_str(include_str!("../../tandem-runtime/src/presets/glm-5.1.json")).expect("JSON");
    let object = config.as_object_mut().expect("an object");
    for (name, value) in
        [("num_hidden_layers", 4), ("vocab_size", 1024), ("first_k_dense_replace", 0), ("eos_token_id", 0)]
    {
        object.insert(name.into(), value.into());
    }
    ["pad_token_id", "mlp_layer_types", "num_nextn_predict_layers"].iter().for_each(|name| _ = object.remove(*name));
    let config = config.to_string();
    for tiles in [Tiles::Single, Tiles::Split] {
        let backend = WgpuBackend::new(&Options { budget, tiles, ..Options::default() }).expect("a device");
        if tiles != Tiles::Single && !backend.is_cooperative() {
            continue;
        }
        let mut runner = runner_of(&config, backend, n);
        let mut logits = vec![];
        // The first one teaches the estimates, which for kernels not seen before know bytes and bandwidth only.
        runner.step(prompt(n), &mut logits).expect("runs");
        let first = runner.backend().submission_stats();
        runner.backend().begin_submission_stats();
        runner.step(prompt(n), &mut logits).expect("runs");
        let stats = runner.backend().submission_stats();
        println!("{tiles:?}: with the first {first:?}, then {stats:?}");
        kept_to(budget, stats, 2.0);
        kept_to(budget, first, 10.0);
    }
}

#[test]
fn a_lost_device_is_an_error_that_stays_and_a_new_one_works() {
    if device::skipped() {
        return;
    }
    let backend = WgpuBackend::new(&Options::default()).expect("a device");
    let mut runner = runner(backend, 8);
    let mut logits = vec![];
    runner.step(prompt(8), &mut logits).expect("runs");
    runner.backend().lose();
    for _ in 0..2 {
        let error = runner.step(prompt(8), &mut logits).expect_err("the device is gone");
        let EngineError::Device(error) = error else { panic!("{error:?}") };
        let error = error.downcast_ref::<WgpuError>().expect("the backend's own").clone();
        let WgpuError::Lost { operation, .. } = &error else { panic!("{error}") };
        assert!(!operation.is_empty() && error.to_string().contains("was lost during"), "{error}");
    }
    let again = WgpuBackend::new(&Options::default()).expect("a device");
    let mut values = [0.0; 4];
    again.download(&again.buffer(&[1.0, 2.0, 3.0, 4.0], 4), &mut values);
    again.sync().expect("a new device");
    assert_eq!(values, [1.0, 2.0, 3.0, 4.0]);
}

/// Looks at the device whenever its rank talks to others.
struct Watching {
    inner: local::Local,
    under_way: Arc<AtomicUsize>,
    n_exchanges: Arc<AtomicUsize>,
}

impl Transport for Watching {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn host(&self, rank: usize) -> String {
        self.inner.host(rank)
    }

    fn exchange(
        &mut self,
        channel: Channel,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, Incoming<'_>)>,
        wait: Wait,
    ) -> Result<(), CommError> {
        self.n_exchanges.fetch_add(1, Ordering::Relaxed);
        let under_way = self.under_way.load(Ordering::Acquire);
        assert_eq!(under_way, 0, "the device works on submissions while its rank waits for another");
        self.inner.exchange(channel, send, recv, wait)
    }

    fn abort(&mut self, message: &str) {
        self.inner.abort(message);
    }

    fn leave(&mut self) {
        self.inner.leave();
    }
}

/// A sum over ranks happens on the host, with the device idle; a rank that is killed leaves nothing on the device of another,
/// which could wait for it until the driver's time is up.
#[test]
fn nothing_is_submitted_while_ranks_wait_for_each_other() {
    if device::skipped() {
        return;
    }
    let backend = WgpuBackend::new(&Options::default()).expect("a device");
    let (under_way, n_exchanges) = (backend.watch_submissions(), Arc::default());
    let mut ranks = local::group(2);
    let (other, own) = (ranks.remove(1), ranks.remove(0));
    let watching = Watching { inner: own, under_way: Arc::clone(&under_way), n_exchanges: Arc::clone(&n_exchanges) };
    let (rows, width, n_sums) = (16, 64, 3);
    let reduce = HostReduce::new(Group::world(Box::new(watching), Duration::from_secs(20)), Wire::F32, width);
    let other = std::thread::spawn(move || {
        let group = Group::world(Box::new(other), Duration::from_secs(20));
        let doing = tandem_comm::Doing { operation: "all_reduce", part: "a test", layer: Some(0) };
        for _ in 0..n_sums {
            let mut values = vec![1.0; rows * width];
            group.all_reduce(&mut values, Wire::F32, doing).expect("both are there");
        }
        // Its thread ends, as a process that is killed.
    });
    let mut x = backend.buffer(&vec![1.0; rows * width], width);
    let y = backend.buffer(&vec![1.0; rows * width], width);
    for sum in 0..=n_sums {
        // Work before the sum and after it.
        (0..100).for_each(|_| backend.add(&mut x, &y, rows));
        reduce.all_reduce(&backend, &mut x, rows, "a test");
        (0..100).for_each(|_| backend.add(&mut x, &y, rows));
        assert_eq!(reduce.finish_step().is_err(), sum == n_sums, "the other rank takes part in {n_sums} sums");
    }
    assert!(n_exchanges.load(Ordering::Relaxed) > n_sums);
    backend.sync().expect("the device itself is well");
    assert_eq!(under_way.load(Ordering::Acquire), 0, "nothing is left on the device");
    other.join().expect("the other rank");
}

#[test]
fn a_choice_that_fits_no_device_lists_those_that_are_there() {
    if device::skipped() {
        return;
    }
    for wanted in ["99", "no such device"] {
        let Err(error) = WgpuBackend::new(&Options { device: Some(wanted.into()), ..Options::default() }) else {
            panic!("{wanted} was opened")
        };
        let text = error.to_string();
        assert!(text.contains(wanted) && text.contains(&tandem_wgpu::adapters()[0].name), "{text}");
    }
}
