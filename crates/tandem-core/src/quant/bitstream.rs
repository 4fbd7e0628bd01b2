//! Little-endian bit streams: code `k` occupies bits `[k*bits, (k+1)*bits)` of the bytes.
//!
//! Every width packs 8 codes into `bits` bytes, so both directions work in units of 8 codes and never straddle a unit.

/// Codes of one unit, which fills `bits` whole bytes.
const UNIT: usize = 8;

/// Unpacks `codes.len()` codes (a multiple of 8) of `bits` bits (1 to 8). Panics when `packed` is too short.
#[inline]
pub(crate) fn unpack(bits: usize, packed: &[u8], codes: &mut [u8]) {
    assert_lengths(bits, packed.len(), codes.len());
    match bits {
        8 => codes.copy_from_slice(packed),
        4 => {
            for (pair, byte) in codes.chunks_exact_mut(2).zip(packed) {
                pair[0] = byte & 15;
                pair[1] = byte >> 4;
            }
        }
        _ => {
            let mask = (1u64 << bits) - 1;
            for (unit, bytes) in codes.chunks_exact_mut(UNIT).zip(packed.chunks_exact(bits)) {
                let word = bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
                for (k, code) in unit.iter_mut().enumerate() {
                    *code = (word >> (k * bits) & mask) as u8;
                }
            }
        }
    }
}

/// Packs `codes` (a multiple of 8, each below `2^bits`) onto the end of `packed`.
pub(crate) fn pack(bits: usize, codes: &[u8], packed: &mut Vec<u8>) {
    let start = packed.len();
    for unit in codes.chunks_exact(UNIT) {
        let word = unit.iter().rev().fold(0u64, |word, code| word << bits | u64::from(*code));
        packed.extend_from_slice(&word.to_le_bytes()[..bits]);
    }
    assert_lengths(bits, packed.len() - start, codes.len());
}

fn assert_lengths(bits: usize, n_bytes: usize, n_codes: usize) {
    assert!(
        n_codes.is_multiple_of(UNIT) && n_bytes * 8 == n_codes * bits,
        "{n_codes} codes of {bits} bits do not match {n_bytes} bytes"
    );
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition in the file header, one bit at a time.
    fn code_at(bits: usize, packed: &[u8], index: usize) -> u8 {
        (0..bits).fold(0, |code, b| {
            let position = index * bits + b;
            code | (packed[position / 8] >> (position % 8) & 1) << b
        })
    }

    proptest! {
        #[test]
        fn pack_unpack_is_the_identity(
            bits in 1usize..=8,
            units in proptest::collection::vec(any::<[u8; UNIT]>(), 0..20),
        ) {
            let codes: Vec<u8> = units.concat().iter().map(|c| c & ((1u16 << bits) - 1) as u8).collect();
            let mut packed = Vec::new();
            pack(bits, &codes, &mut packed);
            for (k, code) in codes.iter().enumerate() {
                prop_assert_eq!(code_at(bits, &packed, k), *code);
            }
            let mut back = vec![0; codes.len()];
            unpack(bits, &packed, &mut back);
            prop_assert_eq!(&back, &codes);
            let mut again = Vec::new();
            pack(bits, &back, &mut again);
            prop_assert_eq!(again, packed);
        }
    }
}
