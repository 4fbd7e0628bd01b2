//! The lightning indexer: which cached positions a query attends to (DeepSeek-V3.2 report, equation 1).

use super::vector::{Element, dot};
use crate::cache::CpuCache;
use crate::isa::Isa;

/// Score of each of `keys`: `sum_h weights[h] * relu(q[h] . key)`; `q [n_heads, dim]`.
pub fn scores<'a, E: Element>(
    isa: Isa,
    q: &[f32],
    weights: &[f32],
    keys: impl Iterator<Item = &'a [E]>,
    out: &mut [f32],
) {
    let dim = q.len() / weights.len();
    for (out, key) in out.iter_mut().zip(keys) {
        *out = weights.iter().zip(q.chunks_exact(dim)).map(|(w, q)| w * dot(isa, q, key).max(0.0)).sum();
    }
}

/// Offset that makes 8-bit keys unsigned, as integer dot products want one operand.
pub const KEY_OFFSET: i32 = 128;
/// Heads of one vector register.
const LANES: usize = 16;

/// One row's indexer query in 8 bits, heads in lanes.
#[derive(Debug, Default)]
pub struct Int8Query {
    /// `[dim / 4, n_heads rounded up to 16, 4]`
    codes: Vec<i8>,
    /// `weights[h] * scale of q[h]`, 0 for heads that do not exist.
    weights: Vec<f32>,
    /// `-128 * sum of q[h]`, what unsigned keys add too much.
    start: Vec<i32>,
}

impl Int8Query {
    /// Quantises `q [n_heads, dim]` with one scale per head; `dim` must divide by 4.
    pub fn new(q: &[f32], weights: &[f32]) -> Int8Query {
        let n_heads = weights.len();
        let dim = q.len() / n_heads;
        let lanes = n_heads.next_multiple_of(LANES);
        let mut query = Int8Query { codes: vec![0; dim * lanes], weights: vec![0.0; lanes], start: vec![0; lanes] };
        for (h, (head, weight)) in q.chunks_exact(dim).zip(weights).enumerate() {
            let largest = head.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            query.weights[h] = weight * largest / 127.0;
            for (d, v) in head.iter().enumerate() {
                let code = (v * inverse).round_ties_even() as i8;
                query.codes[(d / 4 * lanes + h) * 4 + d % 4] = code;
                query.start[h] -= KEY_OFFSET * i32::from(code);
            }
        }
        query
    }
}

/// [`scores`] with 8-bit keys: `key(p)` gives codes plus [`KEY_OFFSET`], and their scale.
#[allow(unsafe_code)]
pub fn scores_int8<'a>(isa: Isa, query: &Int8Query, key: impl Fn(usize) -> (&'a [u8], f32), out: &mut [f32]) {
    if matches!(isa, Isa::Avx512 | Isa::Amx) {
        // SAFETY: the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        return unsafe { scores_vnni(query, key, out) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx2 {
        // SAFETY: the processor has the instructions.
        return unsafe { scores_avx2(query, key, out) };
    }
    scores_int8_scalar(query, key, out);
}

/// The oracle of [`scores_int8`].
pub fn scores_int8_scalar<'a>(query: &Int8Query, key: impl Fn(usize) -> (&'a [u8], f32), out: &mut [f32]) {
    let lanes = query.weights.len();
    for (p, out) in out.iter_mut().enumerate() {
        let (codes, scale) = key(p);
        let mut sum = 0.0f32;
        for h in 0..lanes {
            let mut dot = query.start[h];
            for (d, code) in codes.iter().enumerate() {
                dot += i32::from(query.codes[(d / 4 * lanes + h) * 4 + d % 4]) * i32::from(*code);
            }
            sum += query.weights[h] * dot.max(0) as f32;
        }
        *out = sum * scale;
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn scores_vnni<'a>(query: &Int8Query, key: impl Fn(usize) -> (&'a [u8], f32), out: &mut [f32]) {
    use std::arch::x86_64::*;
    /// Positions that share the loads of the query.
    const POSITIONS: usize = 8;
    let lanes = query.weights.len();
    let n_words = query.codes.len() / (lanes * 4);
    for first in (0..out.len()).step_by(POSITIONS) {
        let n = POSITIONS.min(out.len() - first);
        let mut keys = [(&[] as &[u8], 0.0); POSITIONS];
        for (i, slot) in keys.iter_mut().enumerate() {
            *slot = key(first + i.min(n - 1));
            assert!(slot.0.len() >= n_words * 4);
        }
        let mut sums = [_mm512_setzero_ps(); POSITIONS];
        for h in (0..lanes).step_by(LANES) {
            // SAFETY: start, weights and codes have `lanes` entries (per word), keys `n_words` words (checked).
            unsafe {
                let mut dots = [_mm512_loadu_si512(query.start.as_ptr().add(h).cast()); POSITIONS];
                for word in 0..n_words {
                    let q = _mm512_loadu_si512(query.codes.as_ptr().add((word * lanes + h) * 4).cast());
                    for (dot, (codes, _)) in dots.iter_mut().zip(&keys) {
                        let k = codes.as_ptr().add(word * 4).cast::<i32>().read_unaligned();
                        *dot = _mm512_dpbusd_epi32(*dot, _mm512_set1_epi32(k), q);
                    }
                }
                let weights = _mm512_loadu_ps(query.weights.as_ptr().add(h));
                for (sum, dot) in sums.iter_mut().zip(&dots) {
                    let positive = _mm512_max_epi32(*dot, _mm512_setzero_si512());
                    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(positive), weights, *sum);
                }
            }
        }
        for i in 0..n {
            out[first + i] = _mm512_reduce_add_ps(sums[i]) * keys[i].1;
        }
    }
}

/// Bytes as 16-bit numbers: products of bytes in pairs would not fit 16 bits.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
unsafe fn scores_avx2<'a>(query: &Int8Query, key: impl Fn(usize) -> (&'a [u8], f32), out: &mut [f32]) {
    use std::arch::x86_64::*;
    /// Positions that share the loads of the query.
    const POSITIONS: usize = 4;
    let lanes = query.weights.len();
    let n_words = query.codes.len() / (lanes * 4);
    for first in (0..out.len()).step_by(POSITIONS) {
        let n = POSITIONS.min(out.len() - first);
        let mut keys = [(&[] as &[u8], 0.0); POSITIONS];
        for (i, slot) in keys.iter_mut().enumerate() {
            *slot = key(first + i.min(n - 1));
            assert!(slot.0.len() >= n_words * 4);
        }
        let mut sums = [_mm256_setzero_ps(); POSITIONS];
        for h in (0..lanes).step_by(8) {
            // SAFETY: start, weights and codes have `lanes` entries (per word), keys `n_words` words (checked).
            unsafe {
                let mut dots = [_mm256_loadu_si256(query.start.as_ptr().add(h).cast()); POSITIONS];
                for word in 0..n_words {
                    let q = _mm256_loadu_si256(query.codes.as_ptr().add((word * lanes + h) * 4).cast());
                    let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(q));
                    let odd = _mm256_srai_epi16::<8>(q);
                    for (dot, (codes, _)) in dots.iter_mut().zip(&keys) {
                        let k = codes.as_ptr().add(word * 4).cast::<u32>().read_unaligned();
                        let (k_even, k_odd) = ((k & 0x00ff_00ff) as i32, (k >> 8 & 0x00ff_00ff) as i32);
                        let products = _mm256_add_epi32(
                            _mm256_madd_epi16(even, _mm256_set1_epi32(k_even)),
                            _mm256_madd_epi16(odd, _mm256_set1_epi32(k_odd)),
                        );
                        *dot = _mm256_add_epi32(*dot, products);
                    }
                }
                let weights = _mm256_loadu_ps(query.weights.as_ptr().add(h));
                for (sum, dot) in sums.iter_mut().zip(&dots) {
                    let positive = _mm256_max_epi32(*dot, _mm256_setzero_si256());
                    *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(positive), weights, *sum);
                }
            }
        }
        for i in 0..n {
            out[first + i] = super::avx2::reduce(sums[i]) * keys[i].1;
        }
    }
}

/// Share of the `k` positions that f32 scores select which 8-bit queries and keys select as well, for random vectors:
/// `n_heads` heads of `dim` elements, `n_keys` positions.
pub fn agreement(isa: Isa, n_heads: usize, dim: usize, n_keys: usize, k: usize) -> f64 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut noise = |n: usize| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        // Sums of four are near enough to normal, with the outliers that cost a shared scale its precision.
        (0..n).map(|_| (0..4).map(|_| next()).sum()).collect()
    };
    let (q, weights, keys) = (noise(n_heads * dim), noise(n_heads), noise(n_keys * dim));
    let mut cache = CpuCache::int8(n_keys, dim);
    for (slot, key) in keys.chunks_exact(dim).enumerate() {
        cache.write(slot, key);
    }
    let CpuCache::Int8(rows) = &cache else { unreachable!("made as such") };
    let (mut exact, mut fast) = (vec![0.0; n_keys], vec![0.0; n_keys]);
    scores(isa, &q, &weights, keys.chunks_exact(dim), &mut exact);
    scores_int8(isa, &Int8Query::new(&q, &weights), |p| rows.row(p), &mut fast);
    let selected = |scores: &[f32]| {
        let mut selected = vec![0; k];
        select(scores, &mut vec![], &mut selected);
        selected
    };
    let (exact, fast) = (selected(&exact), selected(&fast));
    exact.iter().filter(|p| fast.binary_search(p).is_ok()).count() as f64 / k as f64
}

/// Buckets of the first pass of [`select`]: the upper bits of an order-preserving integer.
const BUCKET_BITS: u32 = 12;

/// Positions of the `selected.len()` highest scores, ascending; all of them when there are fewer, then -1.
///
/// Among equal scores at the threshold the earlier positions win (the references leave this open). A histogram finds the
/// bucket that holds the threshold, so that only its few members are ordered.
pub fn select(scores: &[f32], scratch: &mut Vec<u32>, selected: &mut [i32]) {
    let k = selected.len();
    if scores.len() <= k {
        for (i, s) in selected.iter_mut().enumerate() {
            *s = if i < scores.len() { i as i32 } else { -1 };
        }
        return;
    }
    let mut counts = [0u32; 1 << BUCKET_BITS];
    for score in scores {
        counts[(ordered(*score) >> (32 - BUCKET_BITS)) as usize] += 1;
    }
    let (mut above, mut bucket) = (0usize, counts.len() - 1);
    while above + (counts[bucket] as usize) < k {
        above += counts[bucket] as usize;
        bucket -= 1;
    }
    scratch.clear();
    scratch.extend(scores.iter().map(|s| ordered(*s)).filter(|o| (o >> (32 - BUCKET_BITS)) as usize == bucket));
    let wanted = k - above;
    let (higher, threshold, _) = scratch.select_nth_unstable_by(wanted - 1, |a, b| b.cmp(a));
    let threshold = *threshold;
    let mut ties = wanted - higher.iter().filter(|o| **o > threshold).count();
    let mut n = 0;
    for (position, score) in scores.iter().enumerate() {
        let order = ordered(*score);
        if order < threshold || (order == threshold && ties == 0) {
            continue;
        }
        ties -= usize::from(order == threshold);
        selected[n] = position as i32;
        n += 1;
        if n == k {
            break;
        }
    }
}

/// An integer that orders as the float does (`total_cmp`); both zeros are alike.
#[inline]
fn ordered(value: f32) -> u32 {
    let bits = (value + 0.0).to_bits();
    bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn selection_equals_sorting() {
        for (n, k) in [(1, 4), (5, 5), (10, 3), (1000, 128), (5000, 2048), (300, 299)] {
            for coarse in [false, true] {
                let mut scores = noise(n, 7);
                if coarse {
                    // Many ties, also at zero of both signs.
                    scores.iter_mut().for_each(|s| *s = (*s * 3.0).round() * -0.5);
                }
                let mut order: Vec<usize> = (0..n).collect();
                order.sort_by(|a, b| (scores[*b] + 0.0).total_cmp(&(scores[*a] + 0.0)).then(a.cmp(b)));
                let mut expected: Vec<i32> = order[..k.min(n)].iter().map(|i| *i as i32).collect();
                expected.sort_unstable();
                expected.resize(k, -1);
                let mut found = vec![0; k];
                select(&scores, &mut vec![], &mut found);
                assert_eq!(found, expected, "{n} {k} {coarse}");
            }
        }
    }

    #[test]
    fn integer_scores_select_nearly_the_same_positions() {
        for (n_heads, n_keys) in [(32, 4096), (64, 16384)] {
            let share = agreement(Isa::detect(), n_heads, 128, n_keys, 2048);
            assert!(share > 0.98 && share < 1.0, "{share} of 2048 among {n_keys}");
        }
    }

    #[test]
    fn integer_scores_match_their_oracle_and_approach_the_float_ones() {
        for (n_heads, dim) in [(4, 64), (8, 64), (32, 128), (64, 128)] {
            let (q, weights, n) = (noise(n_heads * dim, 1), noise(n_heads, 2), 77);
            let keys = noise(n * dim, 3);
            let codes: Vec<u8> = keys.iter().map(|v| (v * 127.0).round() as i32 as u8 ^ 0x80).collect();
            let key = |p: usize| (&codes[p * dim..(p + 1) * dim], 1.0 / 127.0);
            let query = Int8Query::new(&q, &weights);
            let (mut expected, mut exact) = (vec![0.0; n], vec![0.0; n]);
            scores_int8_scalar(&query, key, &mut expected);
            scores(Isa::Scalar, &q, &weights, keys.chunks_exact(dim), &mut exact);
            for isa in Isa::available() {
                let mut found = vec![0.0; n];
                scores_int8(isa, &query, key, &mut found);
                let size = exact.iter().map(|v| v * v).sum::<f32>().sqrt() / (n as f32).sqrt();
                for i in 0..n {
                    assert!((found[i] - expected[i]).abs() <= 1e-5 * size, "{isa} {i}");
                    assert!((found[i] - exact[i]).abs() <= 0.05 * size, "{isa} {i} {} {}", found[i], exact[i]);
                }
            }
        }
    }
}
