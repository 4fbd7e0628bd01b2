//! Properties of every format; bit-exact agreement with MLX is in `tests/quant_golden.rs`.

use proptest::prelude::*;

use super::minifloat::{E2M1_MAX, E4M3_MAX};
use super::*;

fn affine(bits: u8, group_size: u16, params: Float) -> DType {
    DType::Affine { bits, group_size, params }
}

fn any_dtype() -> impl Strategy<Value = DType> {
    let floats = prop::sample::select(vec![Float::F32, Float::F16, Float::BF16]);
    let bits = prop::sample::select(vec![2u8, 3, 4, 5, 6, 8]);
    let groups = prop::sample::select(vec![32u16, 64, 128]);
    prop_oneof![
        floats.clone().prop_map(DType::Float),
        (bits, groups, floats).prop_map(|(bits, group_size, params)| affine(bits, group_size, params)),
        Just(DType::Mxfp4),
        Just(DType::Mxfp8),
        Just(DType::Nvfp4),
        Just(DType::Fp8Block),
    ]
}

/// A format with a shape it accepts.
fn any_matrix_shape() -> impl Strategy<Value = (DType, usize, usize)> {
    (any_dtype(), 0usize..4, 0usize..4, 0usize..200).prop_map(|(dtype, rows, groups, ragged)| match dtype {
        DType::Fp8Block => (dtype, rows, ragged),
        _ => (dtype, rows, groups * dtype.group_size()),
    })
}

/// A format, a shape, and normally scaled values with one power-of-two magnitude per matrix.
fn any_values() -> impl Strategy<Value = (DType, usize, usize, Vec<f32>)> {
    (any_matrix_shape(), -3i32..8).prop_flat_map(|((dtype, rows, cols), exponent)| {
        let limit = (exponent as f32).exp2();
        prop::collection::vec(-limit..limit, rows * cols).prop_map(move |values| (dtype, rows, cols, values))
    })
}

/// Largest error that rounding to the nearest code allows for `value` in the scale group `group`.
fn error_bound(dtype: DType, group: &[f32], value: f32) -> f32 {
    let largest = amax(group);
    match dtype {
        DType::Float(Float::F32) => 0.0,
        DType::Float(Float::F16) => value.abs() / 2048.0 + 2f32.powi(-25),
        DType::Float(Float::BF16) => value.abs() / 256.0,
        DType::Affine { bits, params, .. } => affine_error_bound(bits, params, group, value),
        DType::Mxfp4 => {
            let scale = minifloat::e8m0(minifloat::e8m0_encode_up(largest / E2M1_MAX));
            scale * half_step_e2m1(value / scale)
        }
        DType::Nvfp4 => {
            let scale = minifloat::E4M3[usize::from(minifloat::e4m3_encode(largest / E2M1_MAX))];
            // A scale rounded down lets the largest values saturate at 6.
            scale * half_step_e2m1(value / scale) + (value.abs() - scale * E2M1_MAX).max(0.0)
        }
        DType::Mxfp8 => {
            let scale = minifloat::e8m0(minifloat::e8m0_encode_up(largest / E4M3_MAX));
            (value.abs() / 16.0).max(scale / 1024.0)
        }
        DType::Fp8Block => {
            let scale = largest / E4M3_MAX;
            (value.abs() / 16.0).max(scale / 1024.0) * (1.0 + 1e-6)
        }
    }
}

/// Half a step, or for values beyond the last code the distance to it, plus the rounding of the stored parameters.
fn affine_error_bound(bits: u8, params: Float, group: &[f32], value: f32) -> f32 {
    let exact = quantize(affine(bits, group.len() as u16, Float::F32), 1, group.len(), group).unwrap();
    let (scale, bias) = (Float::F32.read(&exact.scales, 0), Float::F32.read(&exact.biases, 0));
    let (step, far_end) = (scale.abs(), bias + scale * f32::from(((1u16 << bits) - 1) as u8));
    let beyond = (value - far_end.max(bias)).max(far_end.min(bias) - value);
    // Zero is made a code by changing the step, which moves the far end of the range by at most one step.
    assert!(beyond <= step * 1.01 + 1e-6, "{value} lies {beyond} outside of the codes, step {step}");
    let unit = match params {
        Float::F32 => 2f32.powi(-24),
        Float::F16 => 2f32.powi(-11),
        Float::BF16 => 2f32.powi(-8),
    };
    beyond.max(step / 2.0) + (bias.abs() + (far_end - bias).abs()) * (unit + 2f32.powi(-22)) + 1e-7
}

/// Half of the gap between the codes around `value`.
fn half_step_e2m1(value: f32) -> f32 {
    let half = if value.abs() < 2.0 {
        0.25
    } else if value.abs() < 4.0 {
        0.5
    } else {
        1.0
    };
    half * (1.0 + 1e-6)
}

/// The values that share a scale with `(row, col)`.
fn group_of(dtype: DType, rows: usize, cols: usize, values: &[f32], row: usize, col: usize) -> Vec<f32> {
    let group = dtype.group_size();
    let columns = col / group * group..cols.min((col / group + 1) * group);
    let rows = match dtype {
        DType::Fp8Block => row / group * group..rows.min((row / group + 1) * group),
        _ => row..row + 1,
    };
    rows.flat_map(|r| values[r * cols + columns.start..r * cols + columns.end].to_vec()).collect()
}

proptest! {
    #[test]
    fn round_trip_error_is_within_half_a_step((dtype, rows, cols, values) in any_values()) {
        let packed = quantize(dtype, rows, cols, &values).unwrap();
        let decoded = packed.view().dequantize();
        prop_assert_eq!(has_nan_scale(&packed.view()), None);
        for (i, (value, back)) in values.iter().zip(&decoded).enumerate() {
            let bound = error_bound(dtype, &group_of(dtype, rows, cols, &values, i / cols, i % cols), *value);
            prop_assert!((value - back).abs() <= bound, "{} at {}: {} -> {}, bound {}", dtype, i, value, back, bound);
        }
    }

    /// Values that a format has stay in floats and the MX formats. In the others they move as any value may: the range of
    /// affine codes does, a saturated maximum of NVFP4 has a smaller scale, and blocks of FP8 divide by rounded ones.
    #[test]
    fn requantising_changes_no_mx_value_and_others_within_half_a_step((dtype, rows, cols, values) in any_values()) {
        let once = quantize(dtype, rows, cols, &values).unwrap().view().dequantize();
        let twice = quantize(dtype, rows, cols, &once).unwrap().view().dequantize();
        for (i, (value, back)) in once.iter().zip(&twice).enumerate() {
            let bound = match dtype {
                DType::Float(_) | DType::Mxfp4 | DType::Mxfp8 => 0.0,
                _ => error_bound(dtype, &group_of(dtype, rows, cols, &once, i / cols, i % cols), *value),
            };
            prop_assert!((value - back).abs() <= bound, "{} at {}: {} -> {}, bound {}", dtype, i, value, back, bound);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        (dtype, rows, cols) in any_matrix_shape(),
        seed in prop::collection::vec(any::<u8>(), 1..64),
        global_scale in prop::option::of(any::<f32>()),
    ) {
        let bytes = |n: usize| -> Vec<u8> { seed.iter().copied().cycle().take(n).collect() };
        let weight = bytes(dtype.weight_bytes(rows, cols));
        let scales = bytes(dtype.scale_bytes(rows, cols));
        let biases = bytes(dtype.bias_bytes(rows, cols));
        let view = PackedView::new(dtype, rows, cols, &weight, &scales, &biases).unwrap();
        let view = PackedView { global_scale, ..view };
        prop_assert_eq!(view.dequantize().len(), rows * cols);
        has_nan_scale(&view);
        let too_long = bytes(weight.len() + 1);
        prop_assert!(PackedView::new(dtype, rows, cols, &too_long, &scales, &biases).is_err());
    }

    #[test]
    fn arbitrary_shapes_and_values_never_panic(
        dtype in any_dtype(),
        bits in any::<u8>(),
        group_size in any::<u16>(),
        rows in prop_oneof![Just(0), Just(1), any::<usize>()],
        cols in prop_oneof![Just(0), Just(256), any::<usize>()],
        values in prop::collection::vec(any::<f32>(), 256),
    ) {
        for dtype in [dtype, affine(bits, group_size, Float::F16)] {
            let _ = PackedView::new(dtype, rows, cols, &[], &[], &[]);
            if let Ok(packed) = quantize(dtype, rows, cols, &values) {
                packed.view().dequantize();
            }
        }
    }
}

fn check_error(result: Result<impl std::fmt::Debug, QuantError>, expected: &str) {
    let message = result.expect_err("the call must fail").to_string();
    assert!(message.starts_with(expected), "expected {expected:?}, found {message:?}");
}

#[test]
fn errors_say_what_was_expected_and_found() {
    let new = |dtype, rows, cols, n_weight: usize, n_scales: usize| {
        PackedView::new(dtype, rows, cols, &vec![0; n_weight], &vec![0; n_scales], &[])
            .map(|view| (view.rows, view.cols))
    };
    let f32_params = Float::F32;
    check_error(new(affine(7, 64, f32_params), 1, 64, 0, 0), "affine weights have 2, 3, 4, 5, 6 or 8 bits, found 7");
    check_error(new(affine(4, 16, f32_params), 1, 64, 0, 0), "affine groups have 32, 64 or 128 values, found 16");
    check_error(new(DType::Mxfp4, 1, 48, 24, 1), "mxfp4 needs a multiple of 32 columns, found 48");
    check_error(new(DType::Mxfp4, 2, 32, 31, 2), "weight of a 2 x 32 mxfp4 matrix must have 32 bytes, found 31");
    check_error(new(DType::Mxfp4, 2, 32, 32, 3), "scales of a 2 x 32 mxfp4 matrix must have 2 bytes, found 3");
    check_error(
        new(affine(4, 32, f32_params), 1, 32, 16, 4),
        "biases of a 1 x 32 affine4:g32 matrix must have 4 bytes",
    );
    check_error(new(DType::F32, usize::MAX, 2, 0, 0), "a matrix of 18446744073709551615 x 2 does not fit");
    check_error(quantize(DType::F32, 2, 2, &[0.0; 3]), "a 2 x 2 matrix has 4 values, found 3");
    let mut values = [0.0; 64];
    values[40] = f32::NAN;
    check_error(quantize(DType::Mxfp8, 2, 32, &values), "mxfp8 needs finite values, found NaN at row 1, column 8");
}

#[test]
fn has_nan_scale_finds_the_first_bad_group() {
    fn check(dtype: DType, scales: &[u8], biases: &[u8], global_scale: Option<f32>, expected: Option<usize>) {
        let n_groups = 3;
        let cols = n_groups * dtype.group_size();
        let weight = vec![0; dtype.weight_bytes(1, cols)];
        let view = PackedView::new(dtype, 1, cols, &weight, scales, biases).unwrap();
        assert_eq!(has_nan_scale(&PackedView { global_scale, ..view }), expected, "{dtype} {scales:?}");
    }
    check(DType::Mxfp4, &[0, 254, 127], &[], None, None);
    check(DType::Mxfp4, &[0, 255, 255], &[], None, Some(1));
    check(DType::Mxfp8, &[0, 1, 255], &[], None, Some(2));
    check(DType::Nvfp4, &[0x7e, 0xfe, 0], &[], None, None);
    check(DType::Nvfp4, &[0xff, 0x7f, 0], &[], None, Some(0));
    check(DType::Nvfp4, &[0, 0, 0], &[], Some(f32::NAN), Some(0));

    let floats = |values: [f32; 3]| values.map(f32::to_le_bytes).concat();
    let affine4 = affine(4, 32, Float::F32);
    check(DType::Fp8Block, &floats([1.0, 2.0, f32::INFINITY]), &[], None, Some(2));
    check(affine4, &floats([1.0, -2.0, 0.0]), &floats([0.0; 3]), None, None);
    check(affine4, &floats([1.0, 2.0, f32::NAN]), &floats([0.0, f32::INFINITY, 0.0]), None, Some(1));
    check(DType::F32, &[], &[], None, None);
}

#[test]
fn fp8_block_scales_cover_partial_blocks() {
    // [130, 200]: blocks of 128 and 2 rows, 128 and 72 columns.
    let (rows, cols) = (130, 200);
    let block_amax = [[448.0, 0.0], [1.0, 896.0]];
    let values: Vec<f32> = (0..rows * cols).map(|i| block_amax[i / cols / 128][i % cols / 128]).collect();
    let packed = quantize(DType::Fp8Block, rows, cols, &values).unwrap();
    let scales: Vec<f32> = (0..4).map(|i| Float::F32.read(&packed.scales, i)).collect();
    assert_eq!(scales, [1.0, 1.0, 1.0 / 448.0, 2.0]);
    assert_eq!(packed.view().dequantize(), values);
}

#[test]
fn nvfp4_global_scale_multiplies_every_group() {
    let values: Vec<f32> = (0..32).map(|i| i as f32 - 16.0).collect();
    let packed = quantize(DType::Nvfp4, 1, 32, &values).unwrap();
    let plain = packed.view().dequantize();
    let scaled = PackedView { global_scale: Some(2688.0 * 4.0), ..packed.view() }.dequantize();
    assert_eq!(scaled, plain.iter().map(|value| value * 4.0).collect::<Vec<_>>());
}

#[test]
fn non_finite_elements_are_found_where_they_are() {
    let check = |dtype: DType, rows: usize, cols: usize, codes: &[&[u8]]| {
        let values = vec![0.5; rows * cols];
        let packed = quantize(dtype, rows, cols, &values).expect("fits");
        assert_eq!(packed.view().find_non_finite(0, rows), None, "{dtype}");
        for code in codes {
            for (row, col) in [(0, 0), (rows - 1, cols - 1), (rows / 2, 3)] {
                let mut bad = packed.clone();
                let start = (row * cols + col) * code.len();
                bad.weight[start..start + code.len()].copy_from_slice(code);
                assert_eq!(bad.view().find_non_finite(0, rows), Some((row, col)), "{dtype} {code:?}");
                assert_eq!(bad.view().find_non_finite(row, 1), Some((row, col)), "{dtype} {code:?}");
                let other = if row == 0 { 1 } else { 0 };
                assert_eq!(bad.view().find_non_finite(other, 1), None, "{dtype} {code:?}");
            }
        }
    };
    let f32s = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(f32::to_le_bytes);
    let f16s = [0x7c00u16, 0xfc00, 0x7c01, 0xffff].map(u16::to_le_bytes);
    let bf16s = [0x7f80u16, 0xff80, 0x7f81, 0xffff].map(u16::to_le_bytes);
    let slices = |codes: &'static [u8]| codes.chunks(1).collect::<Vec<_>>();
    for (rows, cols) in [(2, 32), (3, 128), (70, 384)] {
        check(DType::F32, rows, cols, &f32s.each_ref().map(|code| &code[..]));
        check(DType::F16, rows, cols, &f16s.each_ref().map(|code| &code[..]));
        check(DType::BF16, rows, cols, &bf16s.each_ref().map(|code| &code[..]));
        check(DType::Mxfp8, rows, cols, &slices(&[0x7f, 0xff]));
        check(DType::Fp8Block, rows, cols, &slices(&[0x7f, 0xff]));
    }
    // The largest finite codes are numbers.
    let largest = quantize(DType::F16, 1, 32, &[65504.0; 32]).expect("fits");
    assert_eq!(largest.view().find_non_finite(0, 1), None);
}
