//! Every kernel, in the variants that the backend asks for, through naga's validator and to Metal's language.

use std::process::Command;

use naga::back::{msl, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use tandem_core::{DType, Float};

use crate::args::*;
use crate::linear::{HalfTile, RowsShape, tiles_define};
use crate::matrix::{Format, SEGMENT_ELEMENTS};
use crate::pipelines::{Lanes, common_defines, shader_text};
use crate::template::Defines;

const SUBGROUPS: Lanes = Lanes { n: 32, whole: true, plain: false };
const PARTS_OF_SUBGROUPS: Lanes = Lanes { n: 32, whole: false, plain: false };
const PLAIN: Lanes = Lanes { n: 8, whole: false, plain: true };

const FORMATS: [DType; 9] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Mxfp4,
    DType::Mxfp8,
    DType::Nvfp4,
    DType::Fp8Block,
    DType::Affine { bits: 4, group_size: 64, params: Float::BF16 },
    DType::Affine { bits: 8, group_size: 128, params: Float::F32 },
];

/// Name, text.
fn shaders(lanes: Lanes) -> Vec<(String, String)> {
    let mut all = vec![];
    let common = common_defines(lanes);
    let with = |pairs: &[(&str, usize)], format: Option<DType>| -> Defines {
        let mut defines = common.clone();
        if let Some(dtype) = format {
            Format::of(dtype).define(&mut defines);
        }
        defines.extend(pairs.iter().map(|(k, v)| ((*k).to_string(), v.to_string())));
        defines
    };
    for dtype in FORMATS {
        let unit = Format::of(dtype).unit();
        let rows = |(rows, tokens, split): (usize, usize, usize), aligned: usize, routed: usize| {
            let lanes = lanes.n as usize;
            let (teams, segment) = (256 / lanes / split, SEGMENT_ELEMENTS / unit * lanes);
            let shape = RowsShape { tokens, rows, split, teams, segment, segments: 6 };
            let mut defines =
                with(&[("ALIGNED", aligned), ("ROUTED", routed), ("ADD", routed), ("OUTPUTS", 3)], Some(dtype));
            shape.define(unit, &mut defines);
            defines
        };
        let mut add = |kernel: &str, text: String| all.push((format!("{kernel} {dtype}"), text));
        add("linear_rows", shader_text::<MatrixArgs>("linear_rows", &rows((4, 1, 2), 1, 0)));
        add("linear_rows tokens", shader_text::<MatrixArgs>("linear_rows", &rows((2, 4, 1), 0, 0)));
        add("linear_several", shader_text::<SeveralArgs>("linear_several", &rows((2, 1, 4), 1, 0)));
        add("gate_up_rows", shader_text::<MatrixArgs>("gate_up_rows", &rows((2, 1, 1), 1, 1)));
        add("gate_up_rows tokens", shader_text::<MatrixArgs>("gate_up_rows", &rows((1, 2, 2), 1, 0)));
        add("down_rows", shader_text::<MatrixArgs>("down_rows", &rows((4, 1, 2), 1, 1)));
        add("embed", shader_text::<MatrixArgs>("embed", &with(&[], Some(dtype))));
        for (pair, planned) in [(0, 0), (0, 1), (1, 1), (1, 0)] {
            let mut defines = with(&[("ALIGNED", pair), ("PAIR", pair), ("PLANNED", planned)], Some(dtype));
            tiles_define(unit, [64, 32, 16][pair + planned], &mut defines);
            let text = shader_text::<MatrixArgs>("linear_tiles", &defines);
            add(&format!("linear_tiles {pair}{planned}"), text);
            if Format::of(dtype).is_scaled() {
                for (x_parts, w_parts, cooperative) in
                    [(1, 1, true), (2, 1, true), (2, 2, true), (2, 2, false), (1, 1, false)]
                {
                    let mut defines = with(&[("PAIR", pair), ("PLANNED", planned)], Some(dtype));
                    HalfTile { tokens: [64, 32][planned], x_parts, w_parts, cooperative }.define(unit, &mut defines);
                    let text = shader_text::<MatrixArgs>("linear_tiles_half", &defines);
                    add(&format!("linear_tiles_half {pair}{planned} {x_parts}{w_parts} {cooperative}"), text);
                }
            }
        }
    }
    let mut add = |kernel: &str, text: String| all.push((kernel.to_string(), text));
    for parts in [1, 2] {
        let defines = with(&[("X_PARTS", parts), ("SPLIT_X", parts - 1)], None);
        add("half_rows", shader_text::<HalfArgs>("half_rows", &defines));
    }
    for adds in [0, 1] {
        for vectors in [0, 6] {
            let mut defines = with(&[("ADD", adds), ("VECTORS", vectors)], None);
            defines.insert("X_ACCESS".into(), if adds == 1 { "read_write" } else { "read" }.into());
            add("rms_norm", shader_text::<RowArgs>("rms_norm", &defines));
        }
        add("moe_combine", shader_text::<CombineArgs>("moe_combine", &with(&[("ADD", adds)], None)));
    }
    for (query, key) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
        let pairs = [("QUERY", query), ("KEY", key), ("VECTORS", query * 2)];
        add("prepare_attention", shader_text::<PrepareArgs>("prepare_attention", &with(&pairs, None)));
    }
    for name in ["add", "add_bias", "silu_mul", "gather_rows", "write_cache", "copy"] {
        add(name, shader_text::<RowArgs>(name, &common));
    }
    add("rope", shader_text::<RopeArgs>("rope", &common));
    add("write_latent", shader_text::<CacheArgs>("write_latent", &common));
    add("write_index_key", shader_text::<CacheArgs>("write_index_key", &common));
    add("router_topk", shader_text::<RouterArgs>("router_topk", &common));
    add("moe_plan", shader_text::<PlanArgs>("moe_plan", &common));
    add("index_scores", shader_text::<IndexArgs>("index_scores", &with(&[("DIM", 128)], None)));
    add("index_topk", shader_text::<IndexArgs>("index_topk", &common));
    add("attention_merge", shader_text::<MergeArgs>("attention_merge", &common));
    for (selected, spans, heads, width) in [(0, 0, 4, 512usize), (1, 1, 4, 512), (0, 1, 3, 64)] {
        let pairs = [
            ("KEY_WIDTH", width + 64),
            ("VALUE_WIDTH", width),
            ("HEADS", heads),
            ("VALUES", width.div_ceil(256)),
            ("POSITIONS", 32 / (256 / lanes.n as usize)),
            ("ROUNDS", (heads * 32).div_ceil(256)),
            ("SELECTED", selected),
            ("SPANS", spans),
            ("ROTATED", selected),
            ("WIDE", spans),
            ("KEY_ROUNDS", (width + 64).div_ceil(4 * lanes.n as usize)),
            ("MAX_SPANS", 32),
        ];
        add("attention", shader_text::<AttentionArgs>("attention", &with(&pairs, None)));
    }
    all
}

/// The kernel in Metal's language, or what is wrong with it.
fn metal(text: &str) -> Result<String, String> {
    let (module, info) = valid(text)?;
    let options = msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..msl::Options::default() };
    let (metal, _) = msl::write_string(&module, &info, &options, &msl::PipelineOptions::default())
        .map_err(|e| format!("no translation to Metal: {e}"))?;
    Ok(metal)
}

fn valid(text: &str) -> Result<(naga::Module, naga::valid::ModuleInfo), String> {
    let module = naga::front::wgsl::parse_str(text).map_err(|e| e.emit_to_string(text))?;
    let capabilities = Capabilities::SUBGROUP
        | Capabilities::IMMEDIATES
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | Capabilities::SHADER_FLOAT16
        | Capabilities::COOPERATIVE_MATRIX;
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    let info = validator.validate(&module).map_err(|e| e.emit_to_string(text))?;
    Ok((module, info))
}

/// Kernels with cooperative matrices have run on few devices: their translation to Vulkan's language is looked at by
/// `spirv-val`, where it is installed.
#[test]
fn kernels_with_cooperative_matrices_translate_to_vulkan() {
    let dir = std::env::temp_dir().join(format!("tandem-shaders-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    let mut n = 0;
    for (name, text) in shaders(SUBGROUPS).into_iter().filter(|(_, text)| text.contains("coop_mat")) {
        let (module, info) = valid(&text).expect("valid");
        let options = spv::Options { lang_version: (1, 3), capabilities: None, ..spv::Options::default() };
        let words = spv::write_vec(&module, &info, &options, None).expect("translates");
        let path = dir.join(format!("{n}.spv"));
        std::fs::write(&path, words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>()).expect("written");
        n += 1;
        let Ok(checked) = Command::new("spirv-val").args(["--target-env", "vulkan1.3"]).arg(&path).output() else {
            continue;
        };
        let said = String::from_utf8_lossy(&checked.stderr);
        // Validators of before 2023-10 do not know these matrices.
        assert!(checked.status.success() || said.contains("Invalid capability operand"), "{name}: {said}");
    }
    assert!(n > 0);
    let _ = std::fs::remove_dir_all(&dir);
}

#[test]
fn every_kernel_is_valid_and_translates_to_metal() {
    let mut wrong = vec![];
    for lanes in [SUBGROUPS, PARTS_OF_SUBGROUPS, PLAIN] {
        for (name, text) in shaders(lanes) {
            match metal(&text) {
                Ok(metal) => assert!(metal.contains("kernel void"), "{name}: {metal}"),
                Err(error) => wrong.push(format!("{name}, {lanes:?}: {error}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{} kernels:\n{}", wrong.len(), wrong[..wrong.len().min(12)].join("\n"));
}

/// Two kernels in Metal's language as they were when somebody last read them: a change of naga or of a shader shows here.
/// With `TANDEM_UPDATE_SNAPSHOTS` set, what is found is written.
#[test]
fn kernels_in_metals_language_are_as_they_were() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/metal");
    let all = shaders(SUBGROUPS);
    for (name, file) in [("linear_rows mxfp4", "linear_rows_mxfp4.metal"), ("rope", "rope.metal")] {
        let (_, text) = all.iter().find(|(n, _)| n == name).expect("one of them");
        let found = metal(text).expect("valid");
        let path = folder.join(file);
        if std::env::var_os("TANDEM_UPDATE_SNAPSHOTS").is_some() {
            std::fs::create_dir_all(&folder).expect("a folder");
            std::fs::write(&path, &found).expect("written");
        }
        let expected = std::fs::read_to_string(&path).expect("a snapshot");
        assert!(
            found == expected,
            "{name} differs from {}; read it, then set TANDEM_UPDATE_SNAPSHOTS=1",
            path.display()
        );
    }
}
