//! Any text as a `config.json`: parsing, the table of weights and the accounting must not panic, hang or allocate much.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem_core::{Checkpoint, ModelConfig};
use tandem_model::Accounting;

/// Deeper models differ in length only.
const MAX_LAYERS: usize = 16;

fuzz_target!(|text: &str| {
    let Ok(config) = ModelConfig::parse(text) else { return };
    let _ = (config.softmax_scale(), config.rope.attention_scaling(), config.rope.inv_freq(config.head_dim.min(256)));
    if config.num_hidden_layers > MAX_LAYERS {
        return;
    }
    let specs = tandem_model::weight_specs(&config);
    let names = specs
        .iter()
        .chain(&tandem_model::mtp_specs(&config))
        .map(|s| format!("{}.{}", s.module, s.leaf))
        .collect::<Vec<_>>();
    // What `inspect` does when there is an index and no weights.
    for scales in [false, true] {
        let modules = specs.iter().filter(|_| scales).map(|s| format!("{}.scales", s.module));
        let checkpoint = Checkpoint::from_names(names.iter().cloned().chain(modules));
        if let Ok(weights) = tandem_model::resolve(&checkpoint, &config) {
            let accounting = Accounting::new(&weights, &config);
            let _ = (accounting.total(|k| k.resident_bytes), accounting.read_bytes_at(&config, 1));
        }
    }
});
