//! One model on several ranks: a pipeline of stages, each of one or more tensor-parallel ranks.
//!
//! Rank 0 has the engine. It sends each batch to every rank; the first stage starts from tokens, hidden states go from
//! stage to stage, and the last stage, which rank 0 belongs to, ends with logits. The other ranks only ever do what rank 0
//! sends. A rank that fails tells the others why and stops; every wait is bounded by the [`Group`].
//!
//! A command is a u32 that says what to do, and what that needs; an empty one ends the rank.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tandem_comm::{Channel, CommError, Doing, Failure, Group, Wire};
use tandem_core::EXACT_ROWS;
use tandem_core::backend::{Backend, Batch, TensorGroup};
use tandem_model::{KvCache, Limits, Model, Plan, RankPlan, StepShape};

use crate::EngineError;
use crate::runner::{Drafted, Drafter, MtpState, RankStatus, Runner};
use crate::timings::{OperationTimes, ReadUsage, Spent};

/// Tensor-parallel ranks compare their residual streams once in this many steps.
pub const CHECK_STEPS: u64 = 16;
/// Rows that a rank may compute in one patience.
const ROWS_PER_PATIENCE: usize = 8;
/// First word of a command: a batch to run, in lists of u32.
const STEP: u32 = 0;
/// First word of a command: bytes for the rank's [`Answer`].
const QUESTION: u32 = 1;
/// First word of a command: asks for what the rank has spent, a [`Spent`] in words.
const REPORT: u32 = 2;
/// First word of a command: a page's number; asks for a 1 and its vectors, or nothing if they cannot be had.
const SAVE_PAGE: u32 = 3;
/// First word of a command: a page's number and its vectors; asks whether it holds them now.
const LOAD_PAGE: u32 = 4;

/// Sums over tensor ranks through host memory: nothing is held open on a device while the host waits.
pub struct HostReduce {
    group: Group,
    wire: Wire,
    hidden_size: usize,
    sync_every: usize,
    state: Mutex<ReduceState>,
}

#[derive(Default)]
struct ReduceState {
    rows: Vec<f32>,
    layer: usize,
    step: u64,
    time: Duration,
    error: Option<CommError>,
}

impl HostReduce {
    /// Sums over `group` of rows of `hidden_size`.
    pub fn new(group: Group, wire: Wire, hidden_size: usize) -> HostReduce {
        HostReduce { group, wire, hidden_size, sync_every: 1, state: Mutex::default() }
    }

    /// Sums only in each `n`th layer, and compares nothing: for measuring what sums cost. The results mean nothing.
    #[must_use]
    pub fn with_sync_every(self, n: usize) -> HostReduce {
        HostReduce { sync_every: n.max(1), ..self }
    }

    /// Spent in sums since the last call, waiting for the others included.
    fn take_time(&self) -> Duration {
        std::mem::take(&mut self.state().time)
    }

    fn state(&self) -> MutexGuard<'_, ReduceState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Ends a step.
    ///
    /// # Errors
    /// The first error since the last call.
    pub fn finish_step(&self) -> Result<(), CommError> {
        let mut state = self.state();
        state.step += 1;
        state.error.take().map_or(Ok(()), Err)
    }
}

/// Compares rows of the residual stream, which must be equal on every rank of `group`; `place` says where in the model.
fn compare(group: &Group, rows: &[f32], layer: usize, place: &str) -> Result<(), CommError> {
    let doing = Doing { operation: "compare", part: "activations", layer: Some(layer) };
    // FNV-1a over words.
    let hash =
        rows.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, v| (h ^ u64::from(v.to_bits())).wrapping_mul(0x0100_0000_01b3));
    let mut hashes = vec![0u64; group.size()];
    group.all_gather(&hash.to_le_bytes(), bytemuck::cast_slice_mut(&mut hashes), doing)?;
    // The minority is at fault; of two, one cannot know.
    let count = |h: &u64| hashes.iter().filter(|other| *other == h).count();
    let most = hashes.iter().map(count).max().unwrap_or(0);
    let odd = hashes.iter().position(|h| count(h) < most);
    let odd = odd.or((most < hashes.len()).then_some(usize::from(group.rank() == 0)));
    match odd {
        None => Ok(()),
        Some(rank) => {
            let message = format!(
                "the residual stream {place} layer {layer} is not the same on all ranks; a host computes wrongly, or \
                 its processor rounds differently where modules are replicated"
            );
            Err(group.blame(rank, Failure::Diverged { message }, doing))
        }
    }
}

impl<B: Backend> TensorGroup<B> for HostReduce {
    fn begin_layer(&self, backend: &B, layer: usize, hidden: &B::Buffer, n_rows: usize) {
        let mut state = self.state();
        state.layer = layer;
        if state.error.is_none() && self.sync_every == 1 && state.step.is_multiple_of(CHECK_STEPS) {
            let mut rows = std::mem::take(&mut state.rows);
            rows.resize(n_rows * self.hidden_size, 0.0);
            backend.download(hidden, &mut rows);
            state.error = compare(&self.group, &rows, layer, "before").err();
            state.rows = rows;
        }
    }

    fn all_reduce(&self, backend: &B, x: &mut B::Buffer, n_rows: usize, part: &'static str) {
        let mut state = self.state();
        if state.error.is_some() || !(state.layer + 1).is_multiple_of(self.sync_every) {
            return;
        }
        let mut rows = std::mem::take(&mut state.rows);
        rows.resize(n_rows * self.hidden_size, 0.0);
        backend.download(x, &mut rows);
        let doing = Doing { operation: "all_reduce", part, layer: Some(state.layer) };
        let start = Instant::now();
        let result = self.group.all_reduce(&mut rows, self.wire, doing);
        state.time += start.elapsed();
        match result {
            Ok(()) => backend.write_rows(&rows, x),
            Err(error) => state.error = Some(error),
        }
        state.rows = rows;
    }
}

/// Where a rank stands in the pipeline.
#[derive(Clone)]
pub struct Pipeline {
    /// All ranks.
    pub world: Group,
    /// The rank that hidden states come from; none for the first stage.
    pub previous: Option<usize>,
    /// The rank that hidden states go to; none for the last stage.
    pub next: Option<usize>,
    /// Who holds what.
    pub plan: Arc<Plan>,
}

impl Pipeline {
    /// Rank `world.rank()`'s place in `plan`.
    pub fn new(world: Group, plan: Arc<Plan>) -> Pipeline {
        let (rank, size, n) = (world.rank(), plan.tensor_size, plan.n_stages);
        let (stage, tensor_rank) = (rank / size, rank % size);
        // Stages run 1, 2, .., n - 1, 0.
        let position = (stage + n - 1) % n;
        let at = |position: usize| (position + 1) % n * size + tensor_rank;
        Pipeline {
            previous: (position > 0).then(|| at(position - 1)),
            next: (position + 1 < n).then(|| at(position + 1)),
            plan,
            world,
        }
    }

    /// The ranks that share this rank's layers.
    pub fn tensor_group(&self) -> Group {
        let size = self.plan.tensor_size;
        let first = self.world.rank() / size * size;
        self.world.subgroup(&(first..first + size).collect::<Vec<_>>())
    }

    /// What a step does with hidden states, for messages: they enter before this rank's first layer, and leave after its
    /// last one.
    fn doing(&self, operation: &'static str) -> Doing {
        let layers = &self.plan.ranks[self.world.rank()].part.layers;
        let layer = if operation == "send" { layers.end.checked_sub(1) } else { Some(layers.start) };
        Doing { operation, part: "hidden states", layer }
    }

    /// Adds the layers of the rank at fault.
    fn explain(&self, error: EngineError) -> EngineError {
        match error {
            EngineError::Ranks(mut error) => {
                let at_fault = error.rank.and_then(|rank| self.plan.ranks.get(rank));
                if let Some(layers) = at_fault.map(|rank| &rank.part.layers).filter(|layers| !layers.is_empty()) {
                    error.host.push_str(&format!(", layers {} to {}", layers.start, layers.end - 1));
                }
                EngineError::Ranks(error)
            }
            other => other,
        }
    }
}

/// Where a rank's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankTimes {
    /// Its part of the model, sums left out.
    pub working: Duration,
    /// Sums over tensor-parallel ranks, waiting for the others included.
    pub summing: Duration,
    /// Waiting for hidden states.
    pub receiving: Duration,
    /// Sending hidden states.
    pub sending: Duration,
    /// Steps in these.
    pub n_steps: u64,
    /// Rows of these steps.
    pub n_rows: u64,
}

/// Answers what rank 0 asks this rank between two steps.
pub type Answer<B> = Box<dyn FnMut(&B, &mut KvCache<B>, &mut RankTimes, &[u8]) -> Vec<u8>>;

/// A rank's share of the model, its backend, its cache, and its neighbours.
pub struct RankRunner<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    cache: KvCache<B>,
    pipeline: Pipeline,
    reduce: Option<Arc<HostReduce>>,
    limits: Limits,
    vocab_size: usize,
    hidden_size: usize,
    /// Hidden states on the host, `[n, hidden_size]`.
    hidden: Vec<f32>,
    times: RankTimes,
    /// Sums of `times` since the model was loaded, which questions do not reset.
    total: RankTimes,
    operations: Option<Arc<OperationTimes>>,
    usage: Option<ReadUsage>,
    answer: Option<Answer<B>>,
    check: Option<Check>,
    mtp: Option<MtpState<B>>,
    /// Steps run, from which ranks know when to compare.
    n_steps: u64,
}

/// Says after each step whether sums on the device went wrong.
pub type Check = Box<dyn Fn() -> Result<(), CommError>>;

impl<B: Backend> RankRunner<B> {
    /// A runner with an empty cache of `n_slots` tokens; `reduce` is what the model's share sums with.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        backend: B,
        model: Box<dyn Model<B>>,
        pipeline: Pipeline,
        reduce: Option<Arc<HostReduce>>,
        limits: Limits,
        vocab_size: usize,
        hidden_size: usize,
        n_slots: usize,
    ) -> Self {
        let cache = model.new_cache(&backend, n_slots);
        let mtp = MtpState::new(&backend, &*model, n_slots, vocab_size);
        RankRunner {
            backend,
            model,
            cache,
            pipeline,
            reduce,
            limits,
            vocab_size,
            hidden_size,
            hidden: vec![],
            times: RankTimes::default(),
            total: RankTimes::default(),
            operations: None,
            usage: None,
            answer: None,
            check: None,
            mtp,
            n_steps: 0,
        }
    }

    /// The same, which says where time goes: `operations` are the backend's, `usage` reads the process's.
    #[must_use]
    pub fn with_times(self, operations: Option<Arc<OperationTimes>>, usage: ReadUsage) -> Self {
        RankRunner { operations, usage: Some(usage), ..self }
    }

    /// What this rank has done so far, without its usage of the system.
    fn spent(&self) -> Spent {
        let RankTimes { working, summing, receiving, sending, n_steps, n_rows } = self.total;
        let operations = self.operations.as_ref().map_or_else(Default::default, |times| times.read());
        Spent { n_steps, n_rows, working, summing, receiving, sending, operations, ..Spent::default() }
    }

    /// Answers questions with `answer`; without, all answers are empty.
    #[must_use]
    pub fn with_answer(self, answer: Option<Answer<B>>) -> Self {
        RankRunner { answer, ..self }
    }

    /// Sums are made on the device, and `check` knows of their failures.
    #[must_use]
    pub fn with_check(self, check: Option<Check>) -> Self {
        RankRunner { check, ..self }
    }

    /// Answers a command between two steps; `None` when it cannot be read.
    fn answer(&mut self, command: &[u8]) -> Option<Vec<u8>> {
        let (word, rest) = split_word(command)?;
        if word == REPORT {
            let usage = self.usage.as_ref().map_or_else(Default::default, |read| read());
            return Some(Spent { usage, ..self.spent() }.to_bytes());
        }
        let (backend, cache, times) = (&self.backend, &mut self.cache, &mut self.times);
        Some(match word {
            QUESTION => self.answer.as_mut().map_or_else(Vec::new, |answer| answer(backend, cache, times, rest)),
            SAVE_PAGE => {
                let saved = cache.save_page(backend, split_word(rest)?.0);
                saved.map_or_else(Vec::new, |vectors| [&[1], &vectors[..]].concat())
            }
            LOAD_PAGE => {
                let (page, vectors) = split_word(rest)?;
                vec![u8::from(cache.load_page(backend, page, vectors))]
            }
            _ => return None,
        })
    }

    /// Runs this rank's part of a step; logits are appended on the rank that has the head.
    fn run(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        let shape = StepShape::of(&batch);
        let world = self.pipeline.world.clone();
        // Others compute before they answer; in prefill, for long.
        world.set_slack((1 + shape.n_rows.div_ceil(ROWS_PER_PATIENCE)) as u32);
        self.hidden.resize(shape.n_rows * self.hidden_size, 0.0);
        let start = Instant::now();
        if let Some(previous) = self.pipeline.previous {
            let doing = self.pipeline.doing("recv");
            world.recv(previous, Channel::Data, bytemuck::cast_slice_mut(&mut self.hidden), doing)?;
        }
        let received = Instant::now();
        if self.pipeline.previous.is_some() {
            self.backend.write_rows(&self.hidden, self.model.hidden_mut());
        }
        let batch = self.backend.upload(batch);
        let (backend, model, cache) = (&self.backend, &mut self.model, &mut self.cache);
        if self.reduce.is_some() {
            // The host takes part between the operations, which therefore cannot be recorded.
            model.forward(backend, &batch, shape, cache);
        } else {
            backend.record_or_replay(&batch, shape.max_context, &mut |max_context| {
                model.forward(backend, &batch, StepShape { max_context, ..shape }, cache);
            });
        }
        if self.pipeline.next.is_some() {
            self.backend.download(self.model.hidden(), &mut self.hidden);
        } else {
            let start = logits.len();
            logits.resize(start + shape.n_logits * self.vocab_size, 0.0);
            self.backend.download(self.model.logits(), &mut logits[start..]);
        }
        if let Some(mtp) = &mut self.mtp {
            mtp.keep(&self.backend, &*self.model, shape.n_rows);
        }
        self.sync()?;
        self.compare_streams(shape.n_rows)?;
        let computed = Instant::now();
        if let Some(next) = self.pipeline.next {
            let doing = self.pipeline.doing("send");
            world.send(next, Channel::Data, bytemuck::cast_slice(&self.hidden), doing)?;
        }
        world.set_slack(1);
        let summing = self.reduce.as_ref().map_or(Duration::ZERO, |reduce| reduce.take_time());
        let working = (computed - received).saturating_sub(summing);
        let sending = computed.elapsed();
        for times in [&mut self.times, &mut self.total] {
            times.receiving += received - start;
            times.summing += summing;
            times.working += working;
            times.sending += sending;
            times.n_steps += 1;
            times.n_rows += shape.n_rows as u64;
        }
        Ok(())
    }

    /// Compares what the ranks that sum on devices have after their layers; where the host sums, [`HostReduce`] does.
    fn compare_streams(&mut self, n_rows: usize) -> Result<(), CommError> {
        let is_due = self.n_steps.is_multiple_of(CHECK_STEPS);
        self.n_steps += 1;
        if !is_due || self.check.is_none() {
            return Ok(());
        }
        let last = self.pipeline.plan.ranks[self.pipeline.world.rank()].part.layers.end.saturating_sub(1);
        let mut rows = vec![0.0; n_rows * self.hidden_size];
        self.backend.download(self.model.hidden(), &mut rows);
        compare(&self.pipeline.tensor_group(), &rows, last, "after")
    }

    fn sync(&self) -> Result<(), EngineError> {
        self.backend.sync().map_err(|e| EngineError::Device(Box::new(e)))?;
        self.check.as_ref().map_or(Ok(()), |check| check())?;
        Ok(self.reduce.as_ref().map_or(Ok(()), |reduce| reduce.finish_step())?)
    }

    /// Does what rank 0 sends until it says stop.
    ///
    /// # Errors
    /// The device or another rank failed; the other ranks have been told.
    pub fn follow(mut self) -> Result<(), EngineError> {
        let world = self.pipeline.world.clone();
        let result = self.follow_until_stop(&world).map_err(|error| self.pipeline.explain(error));
        match &result {
            Ok(()) => world.leave(),
            Err(error) => world.abort(&error.to_string()),
        }
        result
    }

    fn follow_until_stop(&mut self, world: &Group) -> Result<(), EngineError> {
        let mut command = vec![];
        loop {
            let doing = Doing::of("waiting for work");
            world.recv_when_ready(0, Channel::Command, &mut command, doing)?;
            let wrong = |message: &str| world.blame(0, Failure::Protocol { message: message.to_string() }, doing);
            let Some((word, rest)) = split_word(&command) else { return Ok(()) };
            if word != STEP {
                let answer = self.answer(&command).ok_or_else(|| wrong("a command that cannot be read"))?;
                world.send(0, Channel::Data, &answer, Doing::of("answering rank 0"))?;
                continue;
            }
            let mut batch = decode(rest).ok_or_else(|| wrong("a batch that cannot be read"))?;
            if batch.n_rows() > self.limits.max_rows {
                return Err(wrong("a batch larger than agreed").into());
            }
            // Only rank 0 has the head.
            batch.logits_rows.clear();
            self.run(batch, &mut vec![])?;
        }
    }
}

/// Rank 0: a [`Runner`] over all ranks.
pub struct DistributedRunner<B: Backend> {
    rank: RankRunner<B>,
}

impl<B: Backend> DistributedRunner<B> {
    /// Leads the ranks that [`RankRunner::follow`].
    pub fn new(rank: RankRunner<B>) -> Self {
        DistributedRunner { rank }
    }

    /// Rank 0's share.
    pub fn backend(&self) -> &B {
        &self.rank.backend
    }

    /// Who holds what.
    pub fn plan(&self) -> &Plan {
        &self.rank.pipeline.plan
    }

    /// The host of `rank`.
    pub fn host(&self, rank: usize) -> String {
        self.rank.pipeline.world.host(rank)
    }

    /// The answers of `ranks` to a question, which they work on at the same time.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn ask(&mut self, ranks: std::ops::Range<usize>, question: &[u8]) -> Result<Vec<Vec<u8>>, EngineError> {
        let command = [&QUESTION.to_le_bytes()[..], question].concat();
        self.exchange(ranks.map(|rank| (rank, command.clone())).collect())
    }

    /// Sends ranks their commands, and returns the answers in the same order.
    fn exchange(&mut self, commands: Vec<(usize, Vec<u8>)>) -> Result<Vec<Vec<u8>>, EngineError> {
        let world = self.rank.pipeline.world.clone();
        let doing = Doing::of("asking the ranks");
        for (to, command) in commands.iter().filter(|(to, _)| *to > 0) {
            world.send(*to, Channel::Command, command, doing)?;
        }
        let answer = |(from, command): (usize, Vec<u8>)| -> Result<Vec<u8>, EngineError> {
            let mut answer = vec![];
            match from {
                0 => answer = self.rank.answer(&command).unwrap_or_default(),
                _ => world.recv_when_ready(from, Channel::Data, &mut answer, doing)?,
            }
            Ok(answer)
        };
        commands.into_iter().map(answer).collect()
    }

    /// The ranks in the order of their layers, and of their slices.
    fn by_layer(&self) -> Vec<usize> {
        let ranks = &self.plan().ranks;
        let mut order: Vec<usize> = (0..ranks.len()).collect();
        order.sort_by_key(|rank| (ranks[*rank].part.layers.start, *rank));
        order
    }

    /// [`DistributedRunner::exchange`] of a command for each rank, in order.
    fn exchange_all(&mut self, command: impl Fn(usize) -> Vec<u8>) -> Result<Vec<Vec<u8>>, EngineError> {
        let commands = (0..self.plan().ranks.len()).map(|rank| (rank, command(rank))).collect();
        self.exchange(commands).map_err(|error| self.fail(error))
    }

    fn submit(&mut self, batch: &Batch) -> Result<(), EngineError> {
        let command = encode(batch);
        let world = &self.rank.pipeline.world;
        let doing = Doing::of("sending a batch");
        Ok((1..world.size()).try_for_each(|to| world.send(to, Channel::Command, &command, doing))?)
    }

    /// Tells the other ranks of an error, and who holds what in it.
    fn fail(&self, error: EngineError) -> EngineError {
        let error = self.rank.pipeline.explain(error);
        self.rank.pipeline.world.abort(&error.to_string());
        error
    }

    fn run_all(&mut self, batches: Vec<Batch>, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        let mut waiting: VecDeque<Batch> = batches.into();
        let mut running = VecDeque::new();
        loop {
            // As many as there are stages keep every stage busy.
            while running.len() < self.rank.pipeline.plan.n_stages
                && let Some(batch) = waiting.pop_front()
            {
                self.submit(&batch)?;
                running.push_back(batch);
            }
            match running.pop_front() {
                Some(batch) => self.rank.run(batch, logits)?,
                None => return Ok(()),
            }
        }
    }
}

impl<B: Backend> Runner for DistributedRunner<B> {
    fn spent(&self) -> Spent {
        self.rank.spent()
    }

    fn warning(&self) -> Option<String> {
        self.rank.backend.warning()
    }

    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        let parts = cut_decode_batch(batch, self.rank.pipeline.plan.n_stages);
        self.steps(parts, logits)
    }

    fn steps(&mut self, batches: Vec<Batch>, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        if let Some(mtp) = &mut self.rank.mtp {
            mtp.hidden.clear();
        }
        self.run_all(batches, logits).map_err(|error| self.fail(error))
    }

    fn drafter(&mut self) -> Option<&mut dyn Drafter> {
        if self.rank.mtp.is_some() { Some(self) } else { None }
    }

    fn limits(&self) -> Limits {
        self.rank.limits
    }

    fn vocab_size(&self) -> usize {
        self.rank.vocab_size
    }

    fn ranks(&mut self) -> Result<Vec<RankStatus>, EngineError> {
        let answers = self.exchange_all(|_| REPORT.to_le_bytes().to_vec())?;
        let status = |(rank, (planned, answer)): (usize, (&RankPlan, &Vec<u8>))| {
            let spent = Spent::from_bytes(answer);
            RankStatus {
                host: self.host(rank),
                layers: planned.part.layers.clone(),
                weight_bytes: planned.weight_bytes,
                cache_bytes: planned.cache_bytes,
                rows: spent.n_rows,
                busy: spent.working,
                spent,
            }
        };
        Ok(self.plan().ranks.iter().zip(&answers).enumerate().map(status).collect())
    }

    /// The ranks' parts in the order of their layers, so that any pipeline, and one rank too, can load them. A rank that is
    /// gone shows in the next step.
    fn save_page(&mut self, page: u32) -> Option<Vec<u8>> {
        let parts = self.exchange_all(|_| [SAVE_PAGE, page].map(u32::to_le_bytes).concat()).ok()?;
        let mut bytes = vec![];
        for rank in self.by_layer() {
            bytes.extend_from_slice(parts[rank].strip_prefix(&[1])?);
        }
        Some(bytes)
    }

    fn load_page(&mut self, page: u32, bytes: &[u8]) -> bool {
        // Of a page a rank holds the same share as of the whole cache.
        let sizes: Vec<usize> = self.plan().ranks.iter().map(|rank| rank.cache_bytes as usize).collect();
        let whole = sizes.iter().sum::<usize>().max(1);
        let (mut parts, mut first) = (vec![&bytes[..0]; sizes.len()], 0);
        for rank in self.by_layer() {
            let end = (first + sizes[rank] * bytes.len() / whole).min(bytes.len());
            parts[rank] = &bytes[first..end];
            first = end;
        }
        let command = |rank: usize| [&[LOAD_PAGE, page].map(u32::to_le_bytes).concat()[..], parts[rank]].concat();
        self.exchange_all(command).is_ok_and(|answers| answers.iter().all(|answer| *answer == [1]))
    }
}

/// Rank 0's layer: no other rank takes part.
impl<B: Backend> Drafter for DistributedRunner<B> {
    fn hidden_size(&self) -> usize {
        self.rank.hidden_size
    }

    fn hidden(&self) -> &[f32] {
        self.rank.mtp.as_ref().map_or(&[], |mtp| &mtp.hidden)
    }

    fn draft(&mut self, batch: Batch, hidden: &[f32]) -> Result<Drafted, EngineError> {
        let rank = &mut self.rank;
        let Some(mtp) = &mut rank.mtp else { return Ok(Drafted::default()) };
        let drafted = mtp.draft(&rank.backend, &mut *rank.model, batch, hidden);
        let failed = rank.backend.sync().err().map(|e| EngineError::Device(Box::new(e)));
        failed.map_or(Ok(drafted), |error| Err(self.fail(error)))
    }
}

/// The first word, and what comes after it.
fn split_word(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (word, rest) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*word), rest))
}

impl<B: Backend> Drop for DistributedRunner<B> {
    fn drop(&mut self) {
        let world = &self.rank.pipeline.world;
        for to in 1..world.size() {
            // A rank that is gone cannot be told.
            let _ = world.send(to, Channel::Command, &[], Doing::of("ending"));
        }
        world.leave();
    }
}

/// Cuts a batch of next tokens and drafts so that every stage has one part. Rows see only rows of their own sequence, and
/// those come before them.
fn cut_decode_batch(batch: Batch, n_parts: usize) -> Vec<Batch> {
    let n = batch.n_rows();
    let every_row_once = batch.logits_rows.iter().copied().eq(0..n as u32);
    if n_parts == 1 || !(2..=EXACT_ROWS).contains(&n) || !every_row_once {
        return vec![batch];
    }
    (0..n_parts)
        .map(|i| n * i / n_parts..n * (i + 1) / n_parts)
        .filter(|rows| !rows.is_empty())
        .map(|rows| Batch {
            tokens: batch.tokens[rows.clone()].to_vec(),
            positions: batch.positions[rows.clone()].to_vec(),
            sequences: (0..rows.len() as u32).collect(),
            block_tables: batch.sequences[rows.clone()]
                .iter()
                .map(|s| batch.block_tables[*s as usize].clone())
                .collect(),
            logits_rows: (0..rows.len() as u32).collect(),
            sampling: vec![],
        })
        .collect()
}

/// [`STEP`], then lists of u32, each with its length in front.
fn encode(batch: &Batch) -> Vec<u8> {
    // Ranks do not sample.
    let Batch { tokens, positions, sequences, block_tables, logits_rows, sampling: _ } = batch;
    let mut words: Vec<u32> = vec![STEP];
    let mut push = |list: &[u32]| {
        words.push(list.len() as u32);
        words.extend(list);
    };
    [tokens, positions, sequences, logits_rows].into_iter().for_each(|list| push(list));
    block_tables.iter().for_each(|table| push(table));
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// What [`encode`] wrote behind the first word.
fn decode(bytes: &[u8]) -> Option<Batch> {
    let words: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let mut rest = words.as_slice();
    let mut take = || -> Option<Vec<u32>> {
        let (length, after) = rest.split_first()?;
        let list = after.get(..*length as usize)?.to_vec();
        rest = &after[*length as usize..];
        Some(list)
    };
    let [tokens, positions, sequences, logits_rows] = [take()?, take()?, take()?, take()?];
    let mut block_tables = vec![];
    while let Some(table) = take() {
        block_tables.push(table);
    }
    let n = tokens.len();
    let fits = positions.len() == n
        && sequences.len() == n
        && sequences.iter().zip(&positions).all(|(s, p)| {
            let page = *p as usize / tandem_core::backend::PAGE_SIZE;
            block_tables.get(*s as usize).is_some_and(|table| page < table.len())
        });
    fits.then_some(Batch { tokens, positions, sequences, block_tables, logits_rows, sampling: vec![] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(n: usize) -> Batch {
        Batch {
            tokens: (0..n as u32).map(|i| i * 7).collect(),
            positions: vec![70; n],
            sequences: (0..n as u32).rev().collect(),
            block_tables: (0..n as u32).map(|i| vec![2 * i, 2 * i + 1]).collect(),
            logits_rows: (0..n as u32).collect(),
            sampling: vec![],
        }
    }

    #[test]
    fn batches_survive_the_way_and_the_cut() {
        for n in [1, 2, 5, 64] {
            let whole = batch(n);
            assert_eq!(decode(&encode(&whole)[4..]), Some(whole.clone()));
            let parts = cut_decode_batch(whole.clone(), 3);
            assert_eq!(parts.iter().map(Batch::n_rows).sum::<usize>(), n);
            let slots: Vec<usize> = parts
                .iter()
                .flat_map(|p| (0..p.n_rows()).map(|r| p.slot(p.sequences[r] as usize, p.positions[r] as usize)))
                .collect();
            let expected: Vec<usize> = (0..n).map(|r| whole.slot(whole.sequences[r] as usize, 70)).collect();
            assert_eq!(slots, expected);
        }
        // Rows of a prompt, whose logits nobody wants, stay together; a token and its drafts need not.
        let mut prompt = Batch { positions: (70..75).collect(), sequences: vec![0; 5], ..batch(5) };
        let parts = cut_decode_batch(prompt.clone(), 2);
        assert_eq!(
            parts.iter().map(|part| part.positions.clone()).collect::<Vec<_>>(),
            [vec![70, 71], vec![72, 73, 74]]
        );
        prompt.logits_rows = vec![4];
        assert_eq!(cut_decode_batch(prompt.clone(), 2), [prompt]);
    }

    proptest! {
        #[test]
        fn a_damaged_batch_never_panics(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }
}
