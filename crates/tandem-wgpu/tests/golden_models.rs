//! Every fixture checkpoint on a GPU or on software Vulkan, through every path. Without an adapter these tests say so and pass.

#[allow(dead_code)]
#[path = "../../tandem-engine/tests/golden/mod.rs"]
mod golden;

use golden::check_all;
use tandem_wgpu::{Options, WgpuBackend, device_present};

#[test]
fn single_precision_matches_the_reference_logits_on_every_path() {
    if device_present() {
        let backend = WgpuBackend::new(&Options::default()).expect("a device");
        check_all(|| backend.another());
    } else {
        eprintln!("skipped: no Vulkan or Metal device here");
    }
}
