//! What is enqueued: one command buffer at a time, cut into submissions that each hold a bounded amount of work.
//!
//! A driver resets a GPU that one submission keeps busy for some seconds, so the recorder estimates how long each dispatch
//! takes, submits before the budget is spent, and cuts a dispatch that is longer than the budget into ranges of its
//! workgroups. Estimates begin with the device's measured bandwidth and follow timestamps of what ran. No submission ever
//! waits for anything but the GPU.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use crate::WgpuError;
use crate::buffer::Memory;
use crate::device::Device;
use crate::mixing::Mixing;
use crate::pipelines::Pipeline;

/// Most workgroups of a dispatch in one dimension.
const MAX_GROUPS: u32 = 65535;
/// Dispatches of the first submission after the device was idle, so that it has work while the host records more. Each of
/// the next ones has twice as many, up to a limit: the host records a dispatch sooner than the device runs one.
const FIRST_DISPATCHES: usize = 8;
const MORE_DISPATCHES: usize = 256;
/// Submissions whose times may be awaited at once; later ones go untimed.
const TIMERS: usize = 16;
/// Timestamps of one profiled submission.
const PROFILE_STAMPS: u32 = 2048;
/// Bind groups kept; beyond, all are made anew, so that none keeps freed memory for long.
const MAX_BIND_GROUPS: usize = 1 << 15;
/// Most buffers of a kernel, and what a bind group is found by: the numbers of pipeline and buffers.
const MOST_BUFFERS: usize = 13;
type BindGroupKey = [u64; MOST_BUFFERS + 1];
/// Longest wait for the device before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a dispatch reads and computes, from which its time is estimated.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// Bytes read and written.
    pub(crate) bytes: u64,
    /// Multiplications.
    pub(crate) products: u64,
}

/// Time and traffic of one kernel, summed over its dispatches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelTime {
    /// The kernel's name.
    pub name: &'static str,
    /// Dispatches.
    pub calls: u64,
    /// Seconds on the device.
    pub seconds: f64,
    /// Bytes that they read and wrote, by their shapes.
    pub bytes: u64,
}

/// How submissions have kept to their budget.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SubmissionStats {
    /// Submissions so far.
    pub submissions: u64,
    /// Dispatches so far.
    pub dispatches: u64,
    /// Submissions whose time was measured.
    pub timed: u64,
    /// Their time on the device, and that of the longest of them.
    pub timed_seconds: f64,
    /// Seconds.
    pub longest_seconds: f64,
}

/// A kernel's part of a submission.
#[derive(Clone, Copy, Default)]
struct Share {
    /// Estimated.
    seconds: f64,
    /// The factor in the estimate.
    factor: f64,
}

struct Open {
    encoder: wgpu::CommandEncoder,
    pass: Option<wgpu::ComputePass<'static>>,
    seconds: f64,
    dispatches: usize,
    /// By number of the kernel.
    shares: Vec<Share>,
    timer: Option<usize>,
    /// The pipeline set last.
    pipeline: u32,
    /// Dispatches between timestamps, under a profile.
    stamped: Vec<(&'static str, u64)>,
}

/// A query set with two timestamps (or many, under a profile) and where they are read.
struct Timer {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    host: wgpu::Buffer,
    state: Arc<AtomicU8>,
    shares: Vec<Share>,
    stamped: Vec<(&'static str, u64)>,
}

const FREE: u8 = 0;
const WRITING: u8 = 1;
const READABLE: u8 = 2;
const LOST: u8 = 3;

struct State {
    open: Option<Open>,
    timers: Vec<Timer>,
    /// Seconds of a kernel over what bytes and products suggest, by its number; 1 until it is known.
    factors: Vec<f64>,
    bind_groups: HashMap<BindGroupKey, wgpu::BindGroup, Mixing>,
    stats: SubmissionStats,
    kernels: HashMap<&'static str, KernelTime>,
    bytes: u64,
    budget: f64,
    /// Dispatches of the next submission.
    most_dispatches: usize,
    profiled: bool,
    /// Submissions under way, where somebody wants to know.
    under_way: Option<Arc<AtomicUsize>>,
}

/// Records and submits.
pub(crate) struct Recorder {
    device: Arc<Device>,
    state: RefCell<State>,
    /// Bytes per second.
    bandwidth: f64,
    seconds_per_stamp: f64,
}

impl Recorder {
    pub(crate) fn new(device: Arc<Device>, budget: Duration, bandwidth: f64) -> Recorder {
        let seconds_per_stamp = f64::from(device.queue.get_timestamp_period()) * 1e-9;
        let state = State {
            open: None,
            timers: vec![],
            factors: vec![],
            bind_groups: HashMap::default(),
            stats: SubmissionStats::default(),
            kernels: HashMap::new(),
            bytes: 0,
            budget: budget.as_secs_f64(),
            most_dispatches: FIRST_DISPATCHES,
            profiled: false,
            under_way: None,
        };
        Recorder { device, state: RefCell::new(state), bandwidth, seconds_per_stamp }
    }

    pub(crate) fn budget(&self) -> Duration {
        Duration::from_secs_f64(self.state.borrow().budget)
    }

    pub(crate) fn bandwidth(&self) -> f64 {
        self.bandwidth
    }

    pub(crate) fn set_bandwidth(&mut self, bandwidth: f64) {
        self.bandwidth = bandwidth;
    }

    pub(crate) fn watch(&self) -> Arc<AtomicUsize> {
        self.wait();
        Arc::clone(self.state.borrow_mut().under_way.get_or_insert_default())
    }

    pub(crate) fn stats(&self) -> SubmissionStats {
        self.state.borrow().stats
    }

    /// Counts from here on.
    pub(crate) fn begin_stats(&self) {
        self.wait();
        self.state.borrow_mut().stats = SubmissionStats::default();
    }

    /// Bytes that dispatches have read and written so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.state.borrow().bytes
    }

    /// Measures every dispatch from now on.
    pub(crate) fn profile(&self, on: bool) {
        self.flush();
        self.collect_times();
        let mut state = self.state.borrow_mut();
        state.profiled = on && self.device.features.contains(wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES);
        state.timers.clear();
        state.kernels.clear();
    }

    /// Times by kernel since the profile began, longest first.
    pub(crate) fn kernel_times(&self) -> Vec<KernelTime> {
        let mut times: Vec<KernelTime> = self.state.borrow().kernels.values().cloned().collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        times
    }

    /// Enqueues `grid` workgroups of a kernel; `args` begins with the first workgroup of x, which is 0.
    pub(crate) fn dispatch(&self, pipeline: &Pipeline, buffers: &[&Memory], args: &[u8], grid: [u32; 3], cost: Cost) {
        if grid.contains(&0) || self.device.errors.any() {
            return;
        }
        self.device.errors.enter(pipeline.name);
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let factor = state.factors.get(pipeline.kernel).copied().unwrap_or(1.0);
        let seconds = (cost.bytes as f64 + cost.products as f64) / self.bandwidth * factor;
        let pieces = ((seconds / state.budget).ceil() as u32).clamp(1, grid[0]).max(grid[0].div_ceil(MAX_GROUPS));
        let per_piece = grid[0].div_ceil(pieces);
        state.bytes += cost.bytes;
        for first in (0..grid[0]).step_by(per_piece as usize) {
            let n = per_piece.min(grid[0] - first);
            let part = f64::from(n) / f64::from(grid[0]);
            if state.open.as_ref().is_some_and(|open| open.seconds + seconds * part > state.budget) {
                self.submit(state);
            }
            let share = Share { seconds: seconds * part, factor };
            self.record(state, pipeline, buffers, args, [first, n, grid[1], grid[2]], share);
            if let Some(open) = &mut state.open {
                if state.profiled {
                    open.stamped.push((pipeline.name, (cost.bytes as f64 * part) as u64));
                }
                open.dispatches += 1;
                if open.dispatches >= state.most_dispatches {
                    self.submit(state);
                    state.most_dispatches = (2 * state.most_dispatches).min(MORE_DISPATCHES);
                }
            }
        }
    }

    fn record(
        &self,
        state: &mut State,
        pipeline: &Pipeline,
        buffers: &[&Memory],
        args: &[u8],
        [first, x, y, z]: [u32; 4],
        share: Share,
    ) {
        let mut key: BindGroupKey = [0; MOST_BUFFERS + 1];
        key[0] = pipeline.id.into();
        key.iter_mut().skip(1).zip(buffers).for_each(|(key, buffer)| *key = buffer.id);
        assert!(buffers.len() <= MOST_BUFFERS, "{} has {} buffers", pipeline.name, buffers.len());
        if state.bind_groups.len() >= MAX_BIND_GROUPS {
            state.bind_groups.clear();
        }
        let group = state.bind_groups.entry(key).or_insert_with(|| {
            let entries: Vec<wgpu::BindGroupEntry<'_>> = buffers
                .iter()
                .enumerate()
                .map(|(i, b)| wgpu::BindGroupEntry { binding: i as u32, resource: b.buffer.as_entire_binding() })
                .collect();
            self.device.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(pipeline.name),
                layout: &pipeline.layout,
                entries: &entries,
            })
        });
        if state.open.is_none() {
            let timer = free_timer(&self.device, &mut state.timers, state.profiled);
            state.open = Some(Open {
                encoder: self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default()),
                pass: None,
                seconds: 0.0,
                dispatches: 0,
                shares: vec![],
                timer,
                pipeline: 0,
                stamped: vec![],
            });
        }
        let Some(open) = &mut state.open else { return };
        if open.pass.is_none() {
            open.pipeline = 0;
        }
        let pass = open.pass.get_or_insert_with(|| {
            // A submission of one pass, as nearly all are, has its begin and end stamped.
            let writes = open.timer.filter(|_| open.shares.is_empty()).map(|t| wgpu::ComputePassTimestampWrites {
                query_set: &state.timers[t].queries,
                beginning_of_pass_write_index: Some(0),
                end_of_pass_write_index: Some(1),
            });
            let descriptor = wgpu::ComputePassDescriptor { label: Some(pipeline.name), timestamp_writes: writes };
            open.encoder.begin_compute_pass(&descriptor).forget_lifetime()
        });
        let mut arguments = [0u32; 24];
        bytemuck::cast_slice_mut::<u32, u8>(&mut arguments)[..args.len()].copy_from_slice(args);
        arguments[0] = first;
        if open.pipeline != pipeline.id {
            pass.set_pipeline(&pipeline.pipeline);
            open.pipeline = pipeline.id;
        }
        pass.set_bind_group(0, Some(&*group), &[]);
        pass.set_immediates(0, &bytemuck::cast_slice::<u32, u8>(&arguments)[..args.len()]);
        pass.dispatch_workgroups(x, y, z);
        state.stats.dispatches += 1;
        open.seconds += share.seconds;
        let of_kernel = place(&mut open.shares, pipeline.kernel, Share::default());
        *of_kernel = Share { seconds: of_kernel.seconds + share.seconds, ..share };
        if state.profiled
            && let Some(timer) = open.timer
        {
            let stamp = open.stamped.len() as u32 + 2;
            pass.write_timestamp(&state.timers[timer].queries, stamp);
            if stamp + 2 >= PROFILE_STAMPS {
                open.seconds = f64::INFINITY;
            }
        }
    }

    /// Enqueues a copy of bytes between buffers.
    pub(crate) fn copy(&self, from: &Memory, from_at: u64, to: &wgpu::Buffer, to_at: u64, bytes: u64) {
        if bytes == 0 || self.device.errors.any() {
            return;
        }
        let mut state = self.state.borrow_mut();
        if state.open.is_none() {
            state.open = Some(Open {
                encoder: self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default()),
                pass: None,
                seconds: 0.0,
                dispatches: 0,
                shares: vec![],
                timer: None,
                pipeline: 0,
                stamped: vec![],
            });
        }
        if let Some(open) = &mut state.open {
            open.pass = None;
            open.encoder.copy_buffer_to_buffer(&from.buffer, from_at, to, to_at, bytes);
        }
    }

    /// Submits what is recorded.
    pub(crate) fn flush(&self) {
        self.submit(&mut self.state.borrow_mut());
    }

    fn submit(&self, state: &mut State) {
        let Some(Open { mut encoder, pass, shares, timer, stamped, .. }) = state.open.take() else { return };
        drop(pass);
        if let Some(timer) = timer.and_then(|t| state.timers.get_mut(t)) {
            let n = if state.profiled { stamped.len() as u32 + 2 } else { 2 };
            encoder.resolve_query_set(&timer.queries, 0..n, &timer.resolved, 0);
            encoder.copy_buffer_to_buffer(&timer.resolved, 0, &timer.host, 0, u64::from(n) * 8);
            timer.shares = shares;
            timer.stamped = stamped;
            timer.state.store(WRITING, Ordering::Release);
        }
        if let Some(under_way) = &state.under_way {
            under_way.fetch_add(1, Ordering::Release);
        }
        self.device.queue.submit([encoder.finish()]);
        if let Some(under_way) = &state.under_way {
            let under_way = Arc::clone(under_way);
            self.device.queue.on_submitted_work_done(move || _ = under_way.fetch_sub(1, Ordering::Release));
        }
        state.stats.submissions += 1;
        if let Some(timer) = timer.and_then(|t| state.timers.get(t)) {
            let readable = Arc::clone(&timer.state);
            timer.host.slice(..).map_async(wgpu::MapMode::Read, move |result| {
                readable.store(if result.is_ok() { READABLE } else { LOST }, Ordering::Release);
            });
        }
    }

    /// Submits and waits until the device is idle.
    pub(crate) fn wait(&self) {
        self.flush();
        let poll = wgpu::PollType::Wait { submission_index: None, timeout: Some(PATIENCE) };
        if let Err(error) = self.device.device.poll(poll) {
            let operation = self.device.errors.operation();
            self.device.errors.set(WgpuError::Lost { operation, reason: error.to_string() });
        }
        self.state.borrow_mut().most_dispatches = FIRST_DISPATCHES;
        self.collect_times();
    }

    /// Takes measured times in.
    fn collect_times(&self) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        for timer in &mut state.timers {
            if timer.state.load(Ordering::Acquire) != READABLE {
                continue;
            }
            let stamps: Vec<u64> = match timer.host.slice(..).get_mapped_range() {
                Ok(view) => {
                    view.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap_or_default())).collect()
                }
                Err(_) => continue,
            };
            timer.host.unmap();
            timer.state.store(FREE, Ordering::Release);
            let seconds = stamps[1].wrapping_sub(stamps[0]) as f64 * self.seconds_per_stamp;
            // Clocks of some devices jump; a time out of all proportion teaches nothing.
            if !(0.0..600.0).contains(&seconds) {
                continue;
            }
            state.stats.timed += 1;
            state.stats.timed_seconds += seconds;
            state.stats.longest_seconds = state.stats.longest_seconds.max(seconds);
            let estimated: f64 = timer.shares.iter().map(|share| share.seconds).sum();
            if estimated > 0.0 && seconds > 0.0 {
                // Many submissions are recorded before the first has run: each tells what the factor of its estimate
                // should have been, not what is to be done to the present one.
                for (kernel, share) in timer.shares.iter().enumerate().filter(|(_, share)| share.seconds > 0.0) {
                    let (told, weight) = (share.factor * seconds / estimated, share.seconds / estimated);
                    let factor = place(&mut state.factors, kernel, 1.0);
                    *factor = learnt(*factor, told, weight).clamp(1e-4, 1e4);
                }
            }
            let mut before = stamps[0];
            for ((name, bytes), stamp) in timer.stamped.iter().zip(stamps.iter().skip(2)) {
                let kernel = state.kernels.entry(name).or_default();
                kernel.name = name;
                kernel.calls += 1;
                kernel.bytes += bytes;
                kernel.seconds += stamp.wrapping_sub(before) as f64 * self.seconds_per_stamp;
                before = *stamp;
            }
        }
    }
}

/// A factor after a submission that `told` one, of which the kernel was the part `weight`. A budget is kept by believing
/// long times at once and short ones slowly: the same kernel is slower on some shapes than on others.
fn learnt(factor: f64, told: f64, weight: f64) -> f64 {
    let weight = if told < factor { weight / 4.0 } else { weight };
    factor.powf(1.0 - weight) * told.powf(weight)
}

/// A value kept under a kernel's number, which `missing` stands for until then.
fn place<T: Copy>(numbers: &mut Vec<T>, kernel: usize, missing: T) -> &mut T {
    if numbers.len() <= kernel {
        numbers.resize(kernel + 1, missing);
    }
    &mut numbers[kernel]
}

/// The number of a timer that is not in use; none where the device has no timestamps or too many are under way.
fn free_timer(device: &Device, timers: &mut Vec<Timer>, profiled: bool) -> Option<usize> {
    if !device.features.contains(wgpu::Features::TIMESTAMP_QUERY) {
        return None;
    }
    if let Some(free) = timers.iter().position(|t| t.state.load(Ordering::Acquire) == FREE) {
        return Some(free);
    }
    if timers.len() >= TIMERS {
        return None;
    }
    let count = if profiled { PROFILE_STAMPS } else { 2 };
    let buffer = |usage| {
        device.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: u64::from(count) * 8,
            usage,
            mapped_at_creation: false,
        })
    };
    timers.push(Timer {
        queries: device.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: None,
            ty: wgpu::QueryType::Timestamp,
            count,
        }),
        resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
        host: buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST),
        state: Arc::new(AtomicU8::new(FREE)),
        shares: vec![],
        stamped: vec![],
    });
    Some(timers.len() - 1)
}
