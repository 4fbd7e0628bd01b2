//! Which module is stored in which format.

use tandem_core::weights::{Form, WeightSpec};
use tandem_core::{DType, Float};

/// A format that modules can be given, as `--quant` and rule files name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// As it is in the source.
    Keep,
    /// Plain floating point.
    Float(Float),
    /// Affine codes of `bits` bits in groups of `group_size`.
    Affine {
        /// 2, 3, 4, 5, 6 or 8.
        bits: u8,
        /// 32, 64 or 128.
        group_size: u16,
    },
    /// A microscaling format.
    Block(DType),
}

impl Target {
    /// Reads `keep`, `bf16`, `f16`, `f32`, `mxfp4`, `mxfp8`, `nvfp4` or `affine{bits}[:g{group}]` (groups of 64 if not
    /// given).
    ///
    /// # Errors
    /// A message that lists the formats.
    pub fn parse(text: &str) -> Result<Target, String> {
        let unknown = || {
            format!(
                "{text:?} is not a format; formats are mxfp4, mxfp8, nvfp4, affine2, 3, 4, 5, 6 or 8 (in groups of 64, or \
                 :g32, :g128), bf16, f16, f32 and keep"
            )
        };
        Ok(match text {
            "keep" => Target::Keep,
            "bf16" => Target::Float(Float::BF16),
            "f16" => Target::Float(Float::F16),
            "f32" => Target::Float(Float::F32),
            "mxfp4" => Target::Block(DType::Mxfp4),
            "mxfp8" => Target::Block(DType::Mxfp8),
            "nvfp4" => Target::Block(DType::Nvfp4),
            _ => {
                let (bits, group) = text.split_once(":g").unwrap_or((text, "64"));
                let bits = bits.strip_prefix("affine").and_then(|bits| bits.parse().ok()).ok_or_else(unknown)?;
                let group_size = group.parse().map_err(|_| unknown())?;
                if !matches!(bits, 2..=6 | 8) || !matches!(group_size, 32 | 64 | 128) {
                    return Err(unknown());
                }
                Target::Affine { bits, group_size }
            }
        })
    }

    /// The format of a weight of `cols` columns that is `source` now; plain floats and parameters of affine formats are
    /// of type `float`. A format whose groups do not divide the columns leaves the weight unquantised.
    pub fn dtype(self, cols: usize, source: DType, float: Float) -> DType {
        let unquantised = match source {
            DType::Float(_) => source,
            _ => DType::Float(float),
        };
        let target = match self {
            // MLX has no fp8 in square blocks.
            Target::Keep if source == DType::Fp8Block => unquantised,
            Target::Keep => source,
            Target::Float(float) => DType::Float(float),
            Target::Affine { bits, group_size } => DType::Affine { bits, group_size, params: float },
            Target::Block(dtype) => dtype,
        };
        if cols.is_multiple_of(target.group_size()) { target } else { unquantised }
    }
}

/// Formats of all modules of a model. Router gates, norms and biases keep theirs unless a rule names them.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Name in reports.
    pub name: String,
    /// Patterns of module paths, `*` standing for any characters; the first that matches counts.
    pub rules: Vec<(String, Target)>,
    /// Stacks of routed experts.
    pub experts: Target,
    /// Other matrices.
    pub rest: Target,
}

impl Recipe {
    /// `mxfp4-q8` (routed experts mxfp4, other matrices affine 8-bit in groups of 64), or one format for all matrices.
    ///
    /// # Errors
    /// A message that lists the names.
    pub fn parse(name: &str) -> Result<Recipe, String> {
        let (experts, rest) = match name {
            "mxfp4-q8" => (Target::Block(DType::Mxfp4), Target::Affine { bits: 8, group_size: 64 }),
            _ => {
                let target =
                    Target::parse(name).map_err(|e| format!("{e}; mixes are mxfp4-q8, mixed-4.8 and mixed:FILE"))?;
                (target, target)
            }
        };
        Ok(Recipe { name: name.to_string(), rules: vec![], experts, rest })
    }

    /// The format of a weight that is `source` now. `float` is the model's own type.
    pub fn dtype(&self, spec: &WeightSpec, source: DType, float: Float) -> DType {
        if spec.form == Form::Vector {
            return source;
        }
        let rule = self.rules.iter().find(|(pattern, _)| glob_matches(pattern, &spec.module));
        let target = match (rule, spec.form) {
            (Some((_, target)), _) => *target,
            (None, _) if spec.keeps_format => Target::Keep,
            (None, Form::Experts) => self.experts,
            (None, _) => self.rest,
        };
        target.dtype(spec.dims().2, source, float)
    }
}

/// Shell-like matching in which `*` also matches dots.
pub fn glob_matches(pattern: &str, text: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == text };
    let Some(rest) = text.strip_prefix(head) else { return false };
    (0..=rest.len()).filter(|i| rest.is_char_boundary(*i)).any(|i| glob_matches(tail, &rest[i..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_formats() {
        assert_eq!(Target::parse("affine4"), Ok(Target::Affine { bits: 4, group_size: 64 }));
        assert_eq!(Target::parse("affine3:g128"), Ok(Target::Affine { bits: 3, group_size: 128 }));
        for wrong in ["affine7", "affine4:g16", "affine", "mxfp6", "", "affine4:64"] {
            assert!(Target::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("lm_head", "lm_head", true),
            ("lm_head", "lm_head2", false),
            ("*.down_proj", "model.layers.0.mlp.down_proj", true),
            ("model.layers.*.mlp.switch_mlp.*", "model.layers.12.mlp.switch_mlp.up_proj", true),
            ("model.layers.1.*", "model.layers.12.mlp.gate", false),
            ("*", "", true),
        ] {
            assert_eq!(glob_matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn groups_that_do_not_divide_leave_a_weight_unquantised() {
        let affine = Target::Affine { bits: 4, group_size: 64 };
        assert_eq!(affine.dtype(96, DType::F32, Float::BF16), DType::F32);
        assert_eq!(affine.dtype(96, DType::Mxfp4, Float::BF16), DType::BF16);
        assert_eq!(Target::Keep.dtype(128, DType::Fp8Block, Float::BF16), DType::BF16);
        assert_eq!(Target::Keep.dtype(128, DType::Nvfp4, Float::BF16), DType::Nvfp4);
    }
}
