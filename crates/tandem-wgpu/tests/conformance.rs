//! Every operation on a GPU or on software Vulkan, on the terms of the scalar kernels: with subgroups, without them, and with
//! matrices cut into small buffers. Without an adapter this test says so and passes.

mod device;

use tandem_conformance::{Precision, Scale, Subject, Sums, suite};
use tandem_wgpu::{Options, Tiles, WgpuBackend};

/// A result below 2^-126, as MXFP4 scales of byte 0 make, may be flushed to zero by the device, and WGSL does not promise NaN.
const PRECISION: Precision = Precision { smallest_scale: 1, keeps_nan: false, ..Precision::F32 };
/// Cuts matrices of the small cases both between the matrices of a stack and between rows.
const SMALL_BUFFER: u64 = 8 << 10;

fn conforms(name: &'static str, options: &Options, scale: Scale) {
    if device::skipped() {
        return;
    }
    let backend = WgpuBackend::new(options).expect("a device");
    let largest = usize::try_from(backend.info().max_binding_bytes).unwrap_or(usize::MAX) - 4096;
    let name = format!("{} {name}", backend.info().name);
    let precision = match backend.is_cooperative() {
        // As in the tensor cores of the only GPUs that this was seen on.
        true => Precision { sums: Sums::TowardsZero, ..PRECISION },
        false => PRECISION,
    };
    let subject = Subject::new(name, precision, move || backend.another(), |b, ids, out| b.download_indices(ids, out));
    suite(vec![subject.with_largest_buffer(largest)], scale).assert_passed();
}

#[test]
fn every_operation_conforms() {
    conforms("f32", &Options::default(), Scale::from_environment());
}

#[test]
fn every_operation_conforms_without_subgroups() {
    conforms("f32 without subgroups", &Options { plain: true, ..Options::default() }, Scale::OneRow);
}

#[test]
fn every_operation_conforms_with_matrices_in_many_buffers() {
    let options = Options { binding_limit: Some(SMALL_BUFFER), ..Options::default() };
    conforms("f32 in many buffers", &options, Scale::OneRow);
}

/// With cooperative matrices where the adapter has them, and else the same kernel without.
#[test]
fn every_operation_conforms_with_numbers_split_in_halves() {
    let options = Options { tiles: Tiles::Split, ..Options::default() };
    conforms("f32 split in halves", &options, Scale::ManyRows);
}
