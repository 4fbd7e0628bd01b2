//! GPUs of any make, through Vulkan or Metal, as devices: which one, what it must hold, and how ranks share those of a host.

use std::collections::HashSet;

use anyhow::{bail, ensure};
use serde_json::{Map, Value, json};
use tandem_cpu::system::{available_memory_bytes, wired_limit_bytes};
use tandem_engine::Profiled;
use tandem_model::Stacks;
use tandem_wgpu::{AdapterInfo, Options, WgpuBackend, WgpuIndices, adapters};

use super::{Device, FoundDevice, Place, ToHold, cache_bytes_per_token, no_host_experts};
use crate::news::OnNews;
use crate::options::{Activations, DeviceOptions};
use crate::units::bytes;

/// Kept free for activations, scratch and the driver.
const RESERVE: u64 = 1 << 30;

/// The only numerics so far.
const NUMERICS: &str = "f32";

/// True if there is a GPU that is worth using without being asked for: software is not, and of the others those are that
/// have memory of their own, or Apple's.
pub(super) fn device_present() -> bool {
    adapters().iter().any(|adapter| adapter.kind == "discrete" || adapter.api == "metal")
}

/// Every adapter.
pub(super) fn found() -> Vec<FoundDevice> {
    adapters()
        .into_iter()
        .map(|adapter| FoundDevice { backend: "wgpu", name: line(&adapter), json: describe(&adapter) })
        .collect()
}

fn line(adapter: &AdapterInfo) -> String {
    let memory = adapter.memory_bytes.map_or(String::new(), |memory| format!(", {}", bytes(memory)));
    let subgroups = match adapter.subgroup {
        (0, _) => "no subgroups".to_string(),
        (least, most) if least == most => format!("subgroups of {least}"),
        (least, most) => format!("subgroups of {least} to {most}"),
    };
    format!(
        "{} {} ({}, {}{memory}): {}; buffers of up to {}, {subgroups}, {}",
        adapter.index,
        adapter.name,
        adapter.api,
        adapter.kind,
        adapter.driver,
        bytes(adapter.max_binding_bytes.min(adapter.max_buffer_bytes)),
        adapter.features.join(", ")
    )
}

fn describe(adapter: &AdapterInfo) -> Map<String, Value> {
    let value = json!({
        "index": adapter.index,
        "name": adapter.name,
        "api": adapter.api,
        "kind": adapter.kind,
        "driver": adapter.driver,
        "memory_bytes": adapter.memory_bytes,
        "max_buffer_bytes": adapter.max_buffer_bytes,
        "max_binding_bytes": adapter.max_binding_bytes,
        "subgroup_threads": [adapter.subgroup.0, adapter.subgroup.1],
        "features": adapter.features,
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// The numerics that `--activations` asks for.
fn numerics(activations: Activations) -> anyhow::Result<()> {
    match activations {
        Activations::F32 | Activations::Auto => Ok(()),
        Activations::Bf16 => {
            bail!("--backend wgpu runs in f32: WGSL has no bf16. Leave --activations out, or use --backend cpu or cuda")
        }
        Activations::Int8 => bail!("--activations int8 is for --backend cpu; on a GPU leave it out"),
    }
}

/// Opens the adapter that `wanted` names.
fn open(wanted: Option<String>) -> anyhow::Result<WgpuBackend> {
    Ok(WgpuBackend::new(&Options { device: wanted, ..Options::default() })?)
}

/// Memory that the adapter can have: its own, or what is free where it shares the processor's.
fn memory(backend: &WgpuBackend) -> Option<u64> {
    let own = if backend.info().api == "metal" { wired_limit_bytes() } else { backend.info().memory_bytes };
    let free = if backend.is_unified() { available_memory_bytes() } else { None };
    match (own, free) {
        (Some(own), Some(free)) => Some(own.min(free)),
        (own, free) => own.or(free),
    }
}

impl Device for WgpuBackend {
    type Opened = WgpuBackend;

    fn open(options: &DeviceOptions, place: Place) -> anyhow::Result<WgpuBackend> {
        numerics(options.activations)?;
        // Ranks of one host take its GPUs in turn; software serves all of them.
        let adapters = adapters();
        let n = adapters.iter().filter(|adapter| adapter.kind != "cpu").count().max(1);
        open(options.device.clone().or_else(|| Some((place.local_rank % n).to_string())))
    }

    fn memory(opened: &WgpuBackend, place: Place) -> u64 {
        let share = if opened.is_unified() { place.on_this_host.max(1) as u64 } else { 1 };
        memory(opened).map_or(u64::MAX >> 8, |memory| (memory / share).saturating_sub(RESERVE))
    }

    fn plan_bandwidth(opened: &WgpuBackend) -> f64 {
        WgpuBackend::bandwidth(opened)
    }

    fn numerics(options: &DeviceOptions) -> anyhow::Result<&'static str> {
        numerics(options.activations).map(|()| NUMERICS)
    }

    fn finish(opened: WgpuBackend, name: &str) -> anyhow::Result<WgpuBackend> {
        ensure!(
            name == NUMERICS,
            "rank 0 runs with numerics {name}, this rank with {NUMERICS}; give every rank --activations f32"
        );
        Ok(opened)
    }

    fn alone(options: &DeviceOptions, load: &ToHold<'_>, _: OnNews<'_>) -> anyhow::Result<WgpuBackend> {
        no_host_experts(options)?;
        numerics(options.activations)?;
        let backend = open(options.device.clone())?;
        let cache = (load.shape.n_slots * cache_bytes_per_token(&backend, load.shape)) as u64;
        let wanted = load.resident + cache + RESERVE;
        if let Some(memory) = memory(&backend)
            && wanted > memory
        {
            bail!(
                "{} has {} for this, and it needs {}: {} of weights, {} of cache for {} tokens, {} of working memory. Ask for \
                 a smaller --context, use a smaller model, or --backend cpu{}",
                backend.info().name,
                bytes(memory),
                bytes(wanted),
                bytes(load.resident),
                bytes(cache),
                load.shape.n_slots,
                bytes(RESERVE),
                if backend.info().api == "metal" {
                    format!("; or raise the limit on wired memory: sudo sysctl iogpu.wired_limit_mb={}", wanted >> 20)
                } else {
                    String::new()
                }
            );
        }
        Ok(backend)
    }

    fn numerics_name(&self) -> &'static str {
        NUMERICS
    }

    fn known_bandwidth(&self) -> Option<f64> {
        Some(WgpuBackend::bandwidth(self))
    }

    fn stacks() -> Stacks {
        Stacks::Repeated
    }

    fn profiled(self) -> Profiled<WgpuBackend> {
        Profiled::new(self, count_distinct)
    }

    fn bandwidth(&self) -> f64 {
        WgpuBackend::bandwidth(self)
    }

    fn memory_bytes(&self) -> u64 {
        tandem_cpu::system::peak_memory_bytes()
    }

    fn name(&self) -> String {
        format!("{} ({})", self.info().name, self.info().api)
    }

    fn describe(&self) -> Map<String, Value> {
        describe(self.info())
    }
}

/// Different experts in the first rows; those of other ranks have the id -1.
fn count_distinct(backend: &WgpuBackend, ids: &WgpuIndices, n_rows: usize) -> usize {
    let mut all = vec![0; n_rows * ids.width()];
    backend.download_indices(ids, &mut all);
    all.into_iter().filter(|id| *id >= 0).collect::<HashSet<i32>>().len()
}
