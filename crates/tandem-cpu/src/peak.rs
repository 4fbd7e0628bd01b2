//! The machine's arithmetic limit: what prefill is measured against.

use crate::isa::Isa;
use tandem_core::Numerics;

use crate::pool::Pool;

/// Passes; the best counts, since other programs only ever slow it down.
#[cfg(target_arch = "x86_64")]
const PASSES: usize = 8;
/// Steps of 12 multiplications per thread and pass: some milliseconds.
#[cfg(target_arch = "x86_64")]
const STEPS: usize = 1 << 20;

/// Operations per second (a multiplication and an addition are two) of the pool's threads together on the
/// multiplications that `numerics` uses, operands in registers; `None` where no such loop is written.
pub fn measure_peak(pool: &Pool, numerics: Numerics, isa: Isa) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx2 | Isa::Avx512 | Isa::Amx) {
        return Some(x86::best(pool, numerics, isa));
    }
    let _ = (pool, numerics, isa);
    None
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;
    use std::time::Instant;

    use super::{Isa, Numerics, PASSES, Pool, STEPS};
    use crate::kernels::tile_rows::amx::multiply_registers;

    /// How many times fewer steps AMX takes, whose multiplications take some 16 cycles.
    const AMX_FEWER: usize = 16;
    /// Accumulators: enough to hide the latency of a multiplication.
    const CHAINS: usize = 12;

    pub(super) fn best(pool: &Pool, numerics: Numerics, isa: Isa) -> f64 {
        // Loop, and multiplications in one instruction.
        let (run, lanes): (unsafe fn(), usize) = match (isa, numerics) {
            (Isa::Avx512 | Isa::Amx, Numerics::Int8) => (int8, 64),
            (Isa::Amx, Numerics::Bf16) => (amx, 16 * 16 * 32),
            (Isa::Avx512, Numerics::Bf16) => (int16, 32),
            (Isa::Avx512 | Isa::Amx, Numerics::F32) => (f32, 16),
            (_, Numerics::Int8) => (int8_avx2, 32),
            (_, Numerics::Bf16) => (int16_avx2, 16),
            (_, Numerics::F32) => (f32_avx2, 8),
        };
        let is_amx = isa == Isa::Amx && numerics == Numerics::Bf16;
        let steps = if is_amx { STEPS / AMX_FEWER } else { STEPS };
        let operations = 2 * lanes * CHAINS * steps * pool.n_threads();
        let mut best = 0.0f64;
        for _ in 0..PASSES {
            let start = Instant::now();
            pool.chunks(pool.n_threads(), 1, |parts| {
                for _ in parts {
                    // SAFETY: the instructions are there, as checked above.
                    unsafe { run() };
                }
            });
            best = best.max(operations as f64 / start.elapsed().as_secs_f64());
        }
        best
    }

    unsafe fn amx() {
        // SAFETY: the processor has AMX.
        unsafe { multiply_registers(CHAINS * STEPS / AMX_FEWER / 4) };
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn int8() {
        let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(1)));
        let mut sums = [a; CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn int16() {
        let (a, b) = (black_box(_mm512_set1_epi16(3)), black_box(_mm512_set1_epi16(1)));
        let mut sums = [a; CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpwssd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn f32() {
        let a = _mm512_set1_ps(black_box(0.5));
        let mut sums = [_mm512_set1_ps(black_box(1.0)); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, a);
            }
        }
        black_box(sums);
    }

    /// A product of bytes in pairs and its addition.
    #[target_feature(enable = "avx2")]
    unsafe fn int8_avx2() {
        let (a, b) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi8(1)));
        let mut sums = [a; CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*sum, b));
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2")]
    unsafe fn int16_avx2() {
        let (a, b) = (black_box(_mm256_set1_epi16(3)), black_box(_mm256_set1_epi16(1)));
        let mut sums = [a; CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*sum, b));
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn f32_avx2() {
        let a = _mm256_set1_ps(black_box(0.5));
        let mut sums = [_mm256_set1_ps(black_box(1.0)); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, a);
            }
        }
        black_box(sums);
    }
}
