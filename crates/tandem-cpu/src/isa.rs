//! Which vector instructions this processor has, found at run time.

use std::fmt;
use std::str::FromStr;

/// Instruction sets that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust: the oracle that every other variant is tested against.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ.
    Avx512,
    /// Arm NEON.
    Neon,
}

impl Isa {
    /// The best available.
    pub fn detect() -> Isa {
        *Isa::available().last().unwrap_or(&Isa::Scalar)
    }

    /// The processor multiplies bf16 pairs (AVX512-BF16).
    pub fn has_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The processor has integer dot products for the registers of these instructions: AVX512-VNNI (with the byte
    /// permutations of VBMI), AVX-VNNI.
    pub fn has_vnni(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Isa::Avx512 => is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi"),
            Isa::Avx2 => is_x86_feature_detected!("avxvnni"),
            _ => false,
        };
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The processor has the integer products that the row kernels for 8-bit activations use.
    pub fn has_int8_dot(self) -> bool {
        match self {
            Isa::Scalar => false,
            Isa::Avx2 | Isa::Avx512 => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => false,
        }
    }

    /// Every variant this processor can run, the slowest first.
    pub fn available() -> Vec<Isa> {
        let mut isas = vec![Isa::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                isas.push(Isa::Avx2);
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                {
                    isas.push(Isa::Avx512);
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            isas.push(Isa::Neon);
        }
        isas
    }
}

impl FromStr for Isa {
    type Err = String;

    /// The instruction set of that name, if this processor has it.
    fn from_str(name: &str) -> Result<Isa, String> {
        let available = Isa::available();
        available.iter().copied().find(|isa| isa.to_string() == name).ok_or_else(|| {
            let names: Vec<String> = available.iter().map(Isa::to_string).collect();
            if [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Neon].iter().any(|isa| isa.to_string() == name) {
                format!("this processor has no {name}; it has {}", names.join(", "))
            } else {
                format!("there are no kernels for {name:?}; this processor has those for {}", names.join(", "))
            }
        })
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        })
    }
}
