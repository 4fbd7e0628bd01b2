//! Every fixture checkpoint on a GPU, through every path. Without a device these tests say so and
//! pass, unless `TANDEM_REQUIRE_CUDA` is 1.

#[path = "../../tandem-engine/tests/golden/mod.rs"]
mod golden;

mod device;

use golden::{check_all, check_fast};
use tandem_cuda::{CudaBackend, Numerics, Options};

fn backend(options: Options) -> CudaBackend {
    CudaBackend::new(options).expect("a device")
}

#[test]
fn single_precision_matches_the_reference_logits_on_every_path() {
    if device::is_here() {
        check_all(|| backend(Options::new(Numerics::F32)));
    }
}

#[test]
fn launches_one_by_one_match_the_reference_logits() {
    if device::is_here() {
        check_all(|| backend(Options { graphs: false, programmatic: false, ..Options::new(Numerics::F32) }));
    }
}

#[test]
fn bf16_activations_stay_within_the_fixtures_tolerance() {
    if device::is_here() {
        check_fast("bf16", || backend(Options::new(Numerics::Bf16)));
        check_fast("bf16 without graphs", || {
            backend(Options { graphs: false, programmatic: false, ..Options::new(Numerics::Bf16) })
        });
    }
}
