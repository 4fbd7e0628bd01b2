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
    /// AVX-512 F, BW, VL, DQ with VNNI and VBMI: Ice Lake, Zen 4 and later. Older ones take AVX2.
    Avx512,
    /// The same with AMX's products of bf16 for many rows: Sapphire Rapids and later.
    Amx,
    /// Arm NEON.
    Neon,
}

impl Isa {
    /// The fastest available.
    pub fn detect() -> Isa {
        Isa::available().pop().unwrap_or(Isa::Scalar)
    }

    /// The processor multiplies bf16 pairs (AVX512-BF16; Arm's bf16).
    pub fn has_bf16(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("bf16"),
            _ => false,
        }
    }

    /// The processor multiplies matrices of bytes (Arm's i8mm).
    pub fn has_i8mm(self) -> bool {
        #[cfg(target_arch = "aarch64")]
        return self == Isa::Neon && std::arch::is_aarch64_feature_detected!("i8mm");
        #[cfg(not(target_arch = "aarch64"))]
        false
    }

    /// The processor has integer dot products for the registers of these instructions: AVX512-VNNI, AVX-VNNI.
    pub fn has_vnni(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Isa::Avx512 | Isa::Amx => true,
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
            Isa::Avx2 | Isa::Avx512 | Isa::Amx => true,
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
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512vbmi")
                {
                    isas.push(Isa::Avx512);
                    if amx_permitted() {
                        isas.push(Isa::Amx);
                    }
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

/// Whether the processor has AMX with bf16 and the system lets this process use its registers, which it must be asked.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, unused_unsafe)] // reading the processor's features became safe after rust-version
fn amx_permitted() -> bool {
    use std::sync::OnceLock;
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        // Bits of EDX: AMX-TILE and AMX-BF16.
        const AMX: u32 = 1 << 24 | 1 << 22;
        // SAFETY: every processor with AVX2 has leaf 7.
        let features = unsafe { std::arch::x86_64::__cpuid_count(7, 0) };
        if features.edx & AMX != AMX {
            return false;
        }
        #[cfg(target_os = "linux")]
        {
            const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
            const XFEATURE_XTILEDATA: libc::c_ulong = 18;
            // SAFETY: changes only what this process may use; fails where the system knows no such request.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
        }
        #[cfg(not(target_os = "linux"))]
        false
    })
}

/// Whether a kernel that streams weights asks for each of their cache lines: on Intel's processors, whose prefetchers do not
/// take up what one request in several lines begins.
pub(crate) fn wants_every_line() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static WANTS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        #[allow(unsafe_code, unused_unsafe)] // as above
        *WANTS.get_or_init(|| {
            // SAFETY: every processor has leaf 0, which names its maker.
            let maker = unsafe { std::arch::x86_64::__cpuid(0) };
            [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl FromStr for Isa {
    type Err = String;

    /// The instruction set of that name, if this processor has it.
    fn from_str(name: &str) -> Result<Isa, String> {
        let available = Isa::available();
        available.iter().copied().find(|isa| isa.to_string() == name).ok_or_else(|| {
            let names: Vec<String> = available.iter().map(Isa::to_string).collect();
            if [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx, Isa::Neon].iter().any(|isa| isa.to_string() == name) {
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
            Isa::Amx => "amx",
            Isa::Neon => "neon",
        })
    }
}
