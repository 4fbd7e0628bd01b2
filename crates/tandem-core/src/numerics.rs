//! How activations meet weights.

use std::fmt;
use std::str::FromStr;

/// The form that activations take where they meet quantised weights. A backend need not have them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Numerics {
    /// Single precision throughout: the reference.
    F32,
    /// Rounded to bfloat16 wherever products are taken in bfloat16, f32 elsewhere; sums in f32.
    Bf16,
    /// 8-bit integers with one f32 scale per 32, for 4-bit and 8-bit weights; f32 for unquantised ones.
    Int8,
}

/// A name that no [`Numerics`] has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("numerics must be f32, bf16 or int8, found {0:?}")]
pub struct UnknownNumerics(String);

impl Numerics {
    /// All of them, the most exact first.
    pub const ALL: [Numerics; 3] = [Numerics::F32, Numerics::Bf16, Numerics::Int8];

    /// Name on the command line, in reports and between ranks; [`Numerics::from_str`] reads it.
    pub const fn name(self) -> &'static str {
        match self {
            Numerics::F32 => "f32",
            Numerics::Bf16 => "bf16",
            Numerics::Int8 => "int8",
        }
    }
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Numerics {
    type Err = UnknownNumerics;

    fn from_str(name: &str) -> Result<Numerics, UnknownNumerics> {
        Numerics::ALL.into_iter().find(|n| n.name() == name).ok_or_else(|| UnknownNumerics(name.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_are_errors() {
        for numerics in Numerics::ALL {
            assert_eq!(numerics.name().parse(), Ok(numerics));
        }
        for other in ["", "BF16", "fp8", "bf16 "] {
            let error = other.parse::<Numerics>().expect_err(other).to_string();
            assert_eq!(error, format!("numerics must be f32, bf16 or int8, found {other:?}"));
        }
    }
}
