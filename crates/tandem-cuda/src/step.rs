//! Steps as graphs: one that has run before is recorded, then replayed; with the scratch memory that graphs refer to.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use crate::CudaBackend;
use crate::batch::{CudaBatch, DECODE_ROWS};
use crate::driver::{Device, Graph, Memory};
use crate::host_experts::{HostMoe, OnHost};

/// The steps so far.
#[derive(Default)]
pub(crate) struct Steps {
    // Dropped first: graphs refer to the memory below.
    recorded: RefCell<HashMap<CudaBatch, Recorded>>,
    /// The parts so far, while a step is being recorded.
    recording: RefCell<Option<Vec<Part>>>,
    scratch: RefCell<HashMap<&'static str, Memory>>,
}

/// A step that has run, or has been recorded.
enum Recorded {
    /// It ran once, so that all memory it needs is there.
    Ran,
    /// To replay, in order.
    Parts(Vec<Part>),
}

/// A part of a recorded step.
enum Part {
    Graph(Graph),
    /// Experts that the host computes while the device waits.
    Host(HostMoe),
}

impl Steps {
    /// Memory that graphs refer to has moved: none is valid any more.
    pub(crate) fn forget(&self) {
        self.recorded.borrow_mut().clear();
    }

    /// Scratch memory under a name; it keeps its place until a longer one is asked for.
    fn scratch(&self, device: &Arc<Device>, name: &'static str, bytes: usize) -> u64 {
        let mut scratch = self.scratch.borrow_mut();
        if let Some(memory) = scratch.get(name)
            && memory.bytes() >= bytes
        {
            return memory.pointer();
        }
        self.forget();
        scratch.remove(name);
        let memory = device.alloc(bytes);
        let pointer = memory.pointer();
        scratch.insert(name, memory);
        pointer
    }
}

impl CudaBackend {
    /// Runs the operations of a step, or what was recorded of an equal one.
    pub(crate) fn run_or_replay(&self, batch: &CudaBatch, operations: &mut dyn FnMut(usize)) {
        if !self.options.graphs || batch.n_rows > DECODE_ROWS {
            return operations(batch.max_context);
        }
        let known = self.steps.recorded.borrow_mut().remove(batch);
        let recorded = match known {
            None => {
                operations(batch.max_context);
                Recorded::Ran
            }
            Some(Recorded::Parts(parts)) => {
                self.replay(&parts);
                Recorded::Parts(parts)
            }
            Some(Recorded::Ran) => {
                self.steps.recording.replace(Some(vec![]));
                self.device.begin_capture();
                operations(batch.max_context);
                let mut parts = self.steps.recording.take().unwrap_or_default();
                let Some(graph) = self.device.end_capture() else { return };
                parts.push(Part::Graph(graph));
                self.replay(&parts);
                Recorded::Parts(parts)
            }
        };
        self.steps.recorded.borrow_mut().insert(*batch, recorded);
    }

    fn replay(&self, parts: &[Part]) {
        for part in parts {
            match (part, &self.on_host) {
                (Part::Graph(graph), _) => self.device.replay(graph),
                (Part::Host(work), Some(on_host)) => on_host.run(&self.device, work),
                (Part::Host(_), None) => {}
            }
        }
    }

    /// Work of the host between two parts of a step: done now, or recorded.
    pub(crate) fn run_on_host(&self, on_host: &OnHost, work: HostMoe) {
        if self.steps.recording.borrow().is_none() {
            return on_host.run(&self.device, &work);
        }
        let graph = self.device.end_capture();
        if let Some(parts) = self.steps.recording.borrow_mut().as_mut() {
            parts.extend(graph.map(Part::Graph));
            parts.push(Part::Host(work));
        }
        self.device.begin_capture();
    }

    /// Scratch memory under a name; it keeps its place until a longer one is asked for.
    pub(crate) fn scratch(&self, name: &'static str, bytes: usize) -> u64 {
        self.steps.scratch(&self.device, name, bytes)
    }

    /// Enqueues a kernel without dynamic shared memory. `arguments` are pointers to its parameters, in order.
    pub(crate) fn launch(
        &self,
        name: &'static str,
        grid: (usize, usize, usize),
        threads: usize,
        arguments: &mut [*mut std::ffi::c_void],
    ) {
        self.device.launch(name, grid, threads, 0, arguments);
    }
}
