//! Every instruction set of this processor, with every numerics, on the terms of the scalar kernels.

use tandem_conformance::{Precision, Rounding, Scale, Subject, suite};
use tandem_cpu::{CpuBackend, Isa, Numerics};

fn precision(isa: Isa, numerics: Numerics) -> Precision {
    let is_x86 = matches!(isa, Isa::Avx2 | Isa::Avx512 | Isa::Amx);
    let (packed, bf16) = match numerics {
        Numerics::F32 => return Precision::F32,
        Numerics::Bf16 if is_x86 => (Rounding::Int16, Rounding::Bf16),
        Numerics::Bf16 => (Rounding::None, Rounding::Bf16),
        Numerics::Int8 => (Rounding::Int8, Rounding::None),
    };
    // Only AVX-512 makes bf16 of 8-bit floats.
    let fp8 = if is_x86 { bf16 } else { Rounding::None };
    // AMX multiplies bf16, in steps of many rows.
    let prefill = (isa == Isa::Amx && numerics == Numerics::Bf16).then_some(Rounding::Bf16);
    let queries = if isa.has_bf16() { Rounding::Bf16 } else { Rounding::None };
    Precision {
        packed,
        other_packed: packed,
        fp8,
        bf16,
        prefill_packed: prefill,
        prefill_weights: prefill.unwrap_or(Rounding::None),
        cache: Rounding::Bf16,
        mla: queries,
        gqa: queries,
        index: Rounding::Int8,
        ..Precision::F32
    }
}

#[test]
fn every_instruction_set_conforms() {
    let mut subjects = vec![];
    for isa in Isa::available() {
        for numerics in [Numerics::F32, Numerics::Bf16, Numerics::Int8] {
            // There are kernels for repacked matrices and for those that stay where they are mapped.
            for repack in if isa == Isa::Scalar { &[true][..] } else { &[true, false] } {
                let name = format!("{isa} {}{}", numerics.name(), if *repack { "" } else { " mapped" });
                let make = move || CpuBackend::with_isa(2, numerics, isa).with_repacking(*repack);
                subjects.push(Subject::new(name, precision(isa, numerics), make, |_, ids, out| ids.read(out)));
            }
        }
    }
    suite(subjects, Scale::from_environment()).assert_passed();
}
