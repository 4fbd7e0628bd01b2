//! Work is cut into submissions that keep to a budget, and a lost device is one error that names the operation.

mod device;

use std::time::Duration;

use tandem_core::backend::{Backend, EXACT_ROWS, PAGE_SIZE};
use tandem_core::{Batch, ModelConfig};
use tandem_engine::{EngineError, ModelRunner, Runner};
use tandem_model::{DummyWeights, Limits, Recipe, Stacks};
use tandem_wgpu::{Options, WgpuBackend, WgpuError};

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
    let config = ModelConfig::parse(CONFIG).expect("a configuration");
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
        assert!(stats.submissions > 4 && stats.timed > 4, "{stats:?}");
        // Other work on this machine may double a time on software.
        let mean = stats.timed_seconds / stats.timed as f64;
        assert!(mean <= 1.5 * budget.as_secs_f64(), "a mean of {mean} s for {budget:?}: {stats:?}");
        assert!(stats.longest_seconds <= 10.0 * budget.as_secs_f64(), "{budget:?}: {stats:?}");
    }
    assert_eq!(logits[0], logits[1], "the same results however work is cut");
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
