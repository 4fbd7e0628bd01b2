//! Every fixture checkpoint on the CPU, through every path.

mod golden;

use golden::{check_all, check_fast};
use tandem_cpu::{CpuBackend, Isa, Numerics};

#[test]
fn vector_kernels_match_the_reference_logits_on_every_path() {
    check_all(|| CpuBackend::new(2, Numerics::F32));
}

#[test]
fn scalar_kernels_match_the_reference_logits_on_every_path() {
    check_all(|| CpuBackend::with_isa(1, Numerics::F32, Isa::Scalar));
}

#[test]
fn bf16_activations_stay_within_the_fixtures_tolerance() {
    check_fast("bf16", || CpuBackend::new(2, Numerics::Bf16));
}

#[test]
fn int8_activations_stay_within_the_fixtures_tolerance() {
    check_fast("int8", || CpuBackend::new(2, Numerics::Int8));
}
