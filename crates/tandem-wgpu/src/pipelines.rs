//! Kernels, compiled on first use for the device and the shapes at hand.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::args::Args;
use crate::device::{Device, WORKGROUP};
use crate::mixing::Mixing;
use crate::template::{Defines, expand};

/// Most experts and choices that the router's kernels hold.
pub(crate) const MAX_EXPERTS: usize = 1024;
pub(crate) const MAX_TOP_K: usize = 64;

/// Words of a batch on the device, beside batch.rs: where its lists begin.
pub(crate) const BATCH_POSITIONS: u32 = 0;
pub(crate) const BATCH_SLOTS: u32 = 1;
pub(crate) const BATCH_SEQUENCES: u32 = 2;
pub(crate) const BATCH_LOGITS: u32 = 3;
pub(crate) const BATCH_TABLES: u32 = 4;
pub(crate) const BATCH_PITCH: u32 = 5;
pub(crate) const BATCH_TOKENS: u32 = 8;

/// How threads add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lanes {
    /// Threads that share a sum.
    pub(crate) n: u32,
    /// They are a whole subgroup.
    pub(crate) whole: bool,
    /// They talk through workgroup memory, for want of subgroups.
    pub(crate) plain: bool,
}

impl Lanes {
    pub(crate) fn of(device: &Device, plain: bool) -> Lanes {
        let (least, most) = device.info.subgroup;
        if plain || least < 8 || !device.features.contains(wgpu::Features::SUBGROUP) {
            return Lanes { n: 8, whole: false, plain: true };
        }
        let n = least.min(64);
        Lanes { n, whole: n == most, plain: false }
    }
}

/// A compiled kernel.
pub(crate) struct Pipeline {
    pub(crate) name: &'static str,
    pub(crate) id: u32,
    /// A number for the name, from 0 up: what is known of all its variants is kept under it.
    pub(crate) kernel: usize,
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

/// All kernels of a device.
pub(crate) struct Pipelines {
    device: Arc<Device>,
    pub(crate) lanes: Lanes,
    compiled: Mutex<Compiled>,
}

impl Pipelines {
    pub(crate) fn new(device: Arc<Device>, lanes: Lanes) -> Pipelines {
        Pipelines { device, lanes, compiled: Mutex::default() }
    }

    /// Kernel `name` in the variant that `defines` makes; equal variants have equal numbers.
    pub(crate) fn get<A: Args>(
        &self,
        name: &'static str,
        variant: u64,
        defines: impl FnOnce(&mut Defines),
    ) -> Arc<Pipeline> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = compiled.kernel(name);
        if let Some(pipeline) = compiled.variants[kernel].get(&variant) {
            return Arc::clone(pipeline);
        }
        self.device.errors.enter(name);
        let mut all = common_defines(self.lanes);
        defines(&mut all);
        let text = shader_text::<A>(name, &all);
        compiled.n += 1;
        let numbers = (compiled.n, kernel);
        let pipeline = Arc::new(compile(&self.device, name, numbers, &text, size_of::<A>() as u32));
        compiled.variants[kernel].insert(variant, Arc::clone(&pipeline));
        pipeline
    }
}

#[derive(Default)]
struct Compiled {
    names: Vec<&'static str>,
    /// By number of the name.
    variants: Vec<HashMap<u64, Arc<Pipeline>, Mixing>>,
    n: u32,
}

impl Compiled {
    fn kernel(&mut self, name: &'static str) -> usize {
        // A name has one address nearly always, and there are few of them.
        let known = self
            .names
            .iter()
            .position(|n| std::ptr::eq(*n, name))
            .or_else(|| self.names.iter().position(|n| *n == name));
        known.unwrap_or_else(|| {
            self.names.push(name);
            self.variants.push(HashMap::default());
            self.names.len() - 1
        })
    }
}

/// What every kernel knows.
pub(crate) fn common_defines(lanes: Lanes) -> Defines {
    let numbers = [
        ("WG", WORKGROUP),
        ("LANES", lanes.n),
        ("WHOLE", lanes.whole.into()),
        ("PLAIN", lanes.plain.into()),
        ("PAGE", tandem_core::backend::PAGE_SIZE as u32),
        ("MAX_EXPERTS", MAX_EXPERTS as u32),
        ("MAX_TOP_K", MAX_TOP_K as u32),
        ("BATCH_POSITIONS", BATCH_POSITIONS),
        ("BATCH_SLOTS", BATCH_SLOTS),
        ("BATCH_SEQUENCES", BATCH_SEQUENCES),
        ("BATCH_LOGITS", BATCH_LOGITS),
        ("BATCH_TABLES", BATCH_TABLES),
        ("BATCH_PITCH", BATCH_PITCH),
        ("BATCH_TOKENS", BATCH_TOKENS),
    ];
    numbers.iter().map(|(name, n)| ((*name).to_string(), n.to_string())).collect()
}

/// A whole shader: arguments and body.
pub(crate) fn shader_text<A: Args>(name: &str, defines: &Defines) -> String {
    let body = expand(name, defines);
    // Extensions come before everything else.
    let half = if body.contains("f16>") { "enable f16;\n" } else { "" };
    let cooperative = if body.contains("coop_mat") { "enable wgpu_cooperative_matrix;\n" } else { "" };
    format!("{half}{cooperative}{}{body}", A::WGSL)
}

fn compile(device: &Device, name: &'static str, (id, kernel): (u32, usize), text: &str, args_bytes: u32) -> Pipeline {
    let descriptor = wgpu::ShaderModuleDescriptor { label: Some(name), source: wgpu::ShaderSource::Wgsl(text.into()) };
    // SAFETY: the shaders are ours; every index is bounded by their arguments, which the dispatching functions derive from
    // the sizes of the buffers, and every loop ends.
    #[allow(unsafe_code)]
    let module =
        unsafe { device.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
    let entries: Vec<wgpu::BindGroupLayoutEntry> = bindings(text)
        .into_iter()
        .map(|(binding, read_only)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        })
        .collect();
    let layout = device
        .device
        .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
    let pipeline_layout = device.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some(name),
        bind_group_layouts: &[Some(&layout)],
        immediate_size: args_bytes,
    });
    let pipeline = device.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(name),
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions {
            zero_initialize_workgroup_memory: false,
            ..wgpu::PipelineCompilationOptions::default()
        },
        cache: None,
    });
    Pipeline { name, id, kernel, pipeline, layout }
}

/// Number of each storage buffer of a shader, and whether it is only read.
fn bindings(text: &str) -> Vec<(u32, bool)> {
    text.lines()
        .filter_map(|line| {
            let (number, rest) = line.trim().strip_prefix("@group(0) @binding(")?.split_once(')')?;
            Some((number.parse().ok()?, !rest.contains("read_write")))
        })
        .collect()
}
