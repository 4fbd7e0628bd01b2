//! A GPU under each of its numerics, on the terms of the CPU's scalar kernels. Without a device this says so and passes,
//! unless `TANDEM_REQUIRE_CUDA` is 1.

mod device;

use tandem_conformance::{Precision, Rounding, Scale, Subject, Sums, suite};
use tandem_cuda::{CudaBackend, Numerics, Options};

/// A scale byte of 0, which stands for 2^-127, decodes as zero.
const F32: Precision = Precision { smallest_scale: 1, ..Precision::F32 };

/// The router's bf16 weights meet unrounded activations, and grouped-query attention runs in f32.
const BF16: Precision = Precision {
    packed: Rounding::Bf16,
    prefill_weights: Rounding::Bf16,
    cache: Rounding::Bf16,
    mla: Rounding::Bf16,
    index: Rounding::Bf16,
    sums: Sums::TowardsZero,
    ..F32
};

#[test]
fn the_device_conforms() {
    if !device::is_here() {
        return;
    }
    let fast = Options::new(Numerics::Bf16);
    let subject = |name, precision, options| {
        let make = move || CudaBackend::new(options).expect("the device opens");
        Subject::new(name, precision, make, CudaBackend::download_indices)
    };
    let subjects = vec![
        subject("cuda f32", F32, Options::new(Numerics::F32)),
        subject("cuda bf16", BF16, fast),
        subject("cuda bf16, nothing of Hopper's", BF16, Options { programmatic: false, hopper: false, ..fast }),
    ];
    suite(subjects, Scale::from_environment()).assert_passed();
}
