//! Every fixture checkpoint on a GPU or on software Vulkan, through every path. Without an adapter these tests say so and pass.

#[allow(dead_code)]
#[path = "../../tandem-engine/tests/golden/mod.rs"]
mod golden;

use golden::{ROUTES, check_some};
use tandem_wgpu::{Options, WgpuBackend, device_present};

#[test]
fn single_precision_matches_the_reference_logits() {
    if !device_present() {
        return eprintln!("skipped: no Vulkan or Metal device here");
    }
    let backend = WgpuBackend::new(&Options::default()).expect("a device");
    // Software takes its time: in one piece, and first in chunks, then one by one.
    let some = [ROUTES[0], ROUTES[4]];
    let routes = if backend.info().kind == "cpu" { &some[..] } else { &ROUTES[..] };
    check_some(|| backend.another(), routes);
}
