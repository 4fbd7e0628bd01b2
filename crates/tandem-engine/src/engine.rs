//! The engine: sequences, the steps that advance them together, and their cache pages.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_core::backend::{PAGE_SIZE, SAMPLED, Sampling};
use tandem_core::{Batch, EXACT_ROWS};

use crate::block_manager::{BlockManager, PageHash, Prefix, ROOT, page_hash};
use crate::draft::{DraftCounts, DraftDepth, MAX_DRAFT_DEPTH, NgramIndex};
use crate::draft_control::{Control, DraftSource, History, Offer, Ran};
use crate::page_store::PageStore;
use crate::request::{Event, FinishReason, Logprobs, Output, Request, RequestId};
use crate::runner::{RankStatus, Runner};
use crate::sampler::{InvalidParam, SampleError, Sampler, logprob, top_logprobs};
use crate::scheduler::{Scheduling, StepCosts, share_rows};
use crate::timings::{StepClock, StepTimes, Timings};

/// Why generation stopped with an error.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// More tokens than the cache holds.
    #[error(
        "the prompt has {tokens} tokens and the context holds {context}; shorten the prompt or raise --context \
         (the model was made for {trained})"
    )]
    ContextExceeded {
        /// Tokens asked for.
        tokens: usize,
        /// Tokens that fit.
        context: usize,
        /// The model's own limit.
        trained: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab_size}; the tokenizer and the model do not match")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Ids below this exist.
        vocab_size: usize,
    },
    /// The model computed something that is not a number.
    #[error(
        "after position {position} the logit of token {token_id} is {value}: the forward pass is broken (overflow, or a \
         damaged checkpoint)"
    )]
    NotFinite {
        /// Position of the token whose successor the logits are for, from 0.
        position: usize,
        /// The first such token.
        token_id: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// Nothing to run.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// The backend failed.
    #[error("the device failed: {0}")]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// Another rank failed.
    #[error(transparent)]
    Ranks(#[from] tandem_comm::CommError),
    /// The logits cannot be sampled.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// A sampling parameter is outside its range.
    #[error(transparent)]
    Param(#[from] InvalidParam),
}

/// One text being processed: its tokens, and the cache pages that hold them.
#[derive(Debug, Default)]
pub struct Sequence {
    tokens: Vec<u32>,
    pages: Vec<u32>,
    /// Hashes of the full pages that others may find.
    hashes: Vec<PageHash>,
}

impl Sequence {
    /// Tokens that the cache holds.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

/// Which rows' logits a run returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// Counts since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps run.
    pub steps: u64,
    /// Prompt tokens run, those run again after a preemption included.
    pub prompt_tokens: u64,
    /// Prompt tokens that the cache held.
    pub cached_tokens: u64,
    /// The part of these whose pages came from the disk.
    pub disk_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Sequences that gave their pages up to others for a while.
    pub preemptions: u64,
    /// Drafts taken from earlier places of the text.
    pub ngram_drafts: DraftCounts,
    /// Drafts by the multi-token-prediction layer.
    pub mtp_drafts: DraftCounts,
    /// Rows that this layer has run, those that only follow the text included.
    pub mtp_rows: u64,
}

impl Counters {
    /// Drafts of all sources.
    pub fn drafts(&self) -> DraftCounts {
        self.ngram_drafts + self.mtp_drafts
    }
}

/// A request that runs or waits.
struct Active {
    id: RequestId,
    request: Request,
    sampler: Sampler,
    /// Prompt and generated tokens; those that have not run yet are more than `sequence` has.
    tokens: Vec<u32>,
    sequence: Sequence,
    is_started: bool,
    ngrams: NgramIndex,
    history: History,
    lag: Lag,
}

/// Positions that the multi-token-prediction layer has not run yet: it runs when drafts are wanted.
#[derive(Default)]
struct Lag {
    /// The first of them; the last one is the sequence's.
    first: usize,
    /// Their hidden states, `[n, hidden_size]`.
    hidden: Vec<f32>,
    /// Some were not kept, so that the layer cannot draft for this sequence any more.
    is_lost: bool,
    /// The layer has drafted for this sequence.
    has_drafted: bool,
}

impl Lag {
    fn lose(&mut self) {
        *self = Lag { is_lost: true, ..Lag::default() };
    }
}

impl Active {
    fn n_generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    fn n_pending(&self) -> usize {
        self.tokens.len() - self.sequence.tokens.len()
    }

    /// Positions that the multi-token-prediction layer has not run, if there is one.
    fn n_lagging(&self) -> usize {
        if self.lag.hidden.is_empty() { 0 } else { self.sequence.tokens.len() - self.lag.first }
    }

    /// True if the token after `n_generated` follows from its logits and a [`Sampling`] alone.
    fn device_can_sample(&self, n_generated: usize) -> bool {
        let Request { sampling, min_tokens, eos, top_logprobs, constraint, .. } = &self.request;
        let any_token = n_generated >= *min_tokens || eos.is_empty();
        sampling.is_plain() && any_token && top_logprobs.is_none() && constraint.is_none()
    }
}

/// A step that the runner works on, or will.
struct UnderWay {
    members: Vec<Member>,
    /// What will run when its logits are wanted here; none if the runner has it and samples tokens.
    batch: Option<Batch>,
    start: Instant,
    /// The part of its time that drafts by the multi-token-prediction layer took, and the most tokens in one of them.
    drafting: Duration,
    mtp_depth: usize,
}

/// Bytes of hidden states that wait for the multi-token-prediction layer, of one sequence, at most.
const MOST_LAG_BYTES: usize = 64 << 20;
/// Positions that wait for the layer and go with the row that drafts; more are run before it.
const SHORT_LAG: usize = 1 + MAX_DRAFT_DEPTH;
/// Positions that the layer still runs when a text ends for which it has drafted.
const LAST_LAG: usize = 64;
/// Steps that a runner which samples tokens works ahead before it is asked again whether drafts pay.
const STEPS_AHEAD: u32 = 16;
/// Drafts by the multi-token-prediction layer after which their acceptance tells whether it is wired as it should be, and
/// the number of right ones that says so. A layer that knows nothing is right once in a vocabulary.
const CHECKED_DRAFTS: u64 = 64;
const FEWEST_RIGHT: u64 = 4;

/// A sequence's part of a step.
#[derive(Clone)]
struct Member {
    id: RequestId,
    /// Rows of tokens of the text; those of drafts come after them.
    n_rows: usize,
    /// It ends with the next token.
    is_last: bool,
    decodes: bool,
    /// What may follow, to be verified, and where that comes from.
    drafts: Vec<u32>,
    source: DraftSource,
}

impl Member {
    fn n_logits(&self) -> usize {
        if self.is_last { 1 + self.drafts.len() } else { 0 }
    }
}

/// What [`Engine::generate`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Prompt tokens that the cache held.
    pub cached_tokens: usize,
}

/// A runner with its cache pages, and the requests that share it.
pub struct Engine {
    runner: Box<dyn Runner>,
    blocks: BlockManager,
    store: Option<PageStore>,
    context: usize,
    trained_context: usize,
    scheduling: Scheduling,
    control: Control,
    /// Steps in a row that began before the one before them had ended.
    n_ahead: u32,
    /// The part of this step in which the multi-token-prediction layer followed texts without drafting.
    following: Duration,
    waiting: VecDeque<Active>,
    /// In order of admission.
    running: Vec<Active>,
    /// What a runner that samples tokens works on between two calls.
    under_way: Option<UnderWay>,
    costs: StepCosts,
    counters: Counters,
    last_step_rows: usize,
    last_step_end: Instant,
    clock: StepClock,
    next_id: u64,
    logits: Vec<f32>,
}

impl Engine {
    /// An engine over `runner`, whose cache has the slots of `blocks`; `context` tokens per sequence.
    pub fn new(runner: Box<dyn Runner>, blocks: BlockManager, context: usize, trained_context: usize) -> Engine {
        let limits = runner.limits();
        let scheduling = Scheduling {
            max_batch: limits.max_logits_rows,
            prefill_chunk: limits.max_rows,
            prefill_share: 2.0,
            inter_token: None,
        };
        Engine {
            runner,
            blocks,
            store: None,
            context,
            trained_context,
            scheduling,
            control: Control::new(DraftDepth::OFF),
            n_ahead: 0,
            following: Duration::ZERO,
            waiting: VecDeque::new(),
            running: vec![],
            under_way: None,
            costs: StepCosts::default(),
            counters: Counters::default(),
            last_step_rows: 0,
            last_step_end: Instant::now(),
            clock: StepClock::new(),
            next_id: 0,
            logits: vec![],
        }
        .with_scheduling(scheduling)
    }

    /// The same with other rules of sharing, within what the runner can hold.
    #[must_use]
    pub fn with_scheduling(mut self, scheduling: Scheduling) -> Engine {
        let limits = self.runner.limits();
        let most = limits.max_logits_rows.min(limits.max_rows).min(EXACT_ROWS);
        self.scheduling = Scheduling {
            max_batch: scheduling.max_batch.clamp(1, most.max(1)),
            prefill_chunk: scheduling.prefill_chunk.clamp(1, limits.max_rows.max(1)),
            ..scheduling
        };
        self
    }

    /// The same with drafted tokens.
    #[must_use]
    pub fn with_drafts(mut self, depth: DraftDepth) -> Engine {
        self.control = Control::new(depth);
        self
    }

    /// Whether cache pages can be kept on disk.
    pub fn saves_pages(&mut self) -> bool {
        self.runner.save_page(0).is_some()
    }

    /// The same with cache pages kept on disk.
    #[must_use]
    pub fn with_page_store(mut self, store: PageStore) -> Engine {
        self.store = Some(store);
        self
    }

    /// The same, which counts the page faults of each step with `major_faults`.
    #[must_use]
    pub fn with_major_faults(mut self, major_faults: fn() -> u64) -> Engine {
        self.clock = self.clock.with_major_faults(major_faults);
        self
    }

    /// Leaves the timings of steps out, or notes them again: to see what they cost.
    pub fn set_timings(&mut self, on: bool) {
        self.clock.set_on(on);
        self.runner.set_timings(on);
    }

    /// The last steps and where their time went; they stay up to date.
    pub fn timings(&self) -> &Arc<Timings> {
        self.clock.timings()
    }

    /// What a user should know of the device now: it has lost memory.
    pub fn warning(&self) -> Option<String> {
        self.runner.warning()
    }

    /// Tokens per sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits per token.
    pub fn vocab_size(&self) -> usize {
        self.runner.vocab_size()
    }

    /// The cache pages.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// What has been done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Every rank that runs the model.
    ///
    /// # Errors
    /// A rank is gone. The engine is of no more use.
    pub fn ranks(&mut self) -> Result<Vec<RankStatus>, EngineError> {
        self.runner.ranks()
    }

    /// Rows of the last step.
    pub fn last_step_rows(&self) -> usize {
        self.last_step_rows
    }

    /// Requests that run.
    pub fn n_running(&self) -> usize {
        self.running.len()
    }

    /// Requests that wait for their first or next step.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Takes a request, which runs in the coming steps.
    ///
    /// # Errors
    /// The prompt is empty, too long or not of this vocabulary, or a sampling parameter is outside its range.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, EngineError> {
        self.check(&request.prompt, request.prompt.len())?;
        let sampler = Sampler::new(request.sampling.clone())?.with_prompt_len(request.prompt.len());
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let tokens = request.prompt.clone();
        self.waiting.push_back(Active {
            id,
            request,
            sampler,
            tokens,
            sequence: Sequence::default(),
            is_started: false,
            ngrams: NgramIndex::default(),
            history: History::default(),
            lag: Lag::default(),
        });
        Ok(id)
    }

    /// Ends a request at once and gives its pages back; does nothing when it has ended.
    pub fn cancel(&mut self, id: RequestId) {
        self.waiting.retain(|a| a.id != id);
        if let Some(i) = self.running.iter().position(|a| a.id == id) {
            let active = self.running.remove(i);
            self.retire(active.sequence);
        }
    }

    /// Runs one step for the requests that have one to run, and appends what happened to `outputs`. A runner that samples
    /// tokens itself already works on the next step when this returns, unless it may bring somebody else.
    ///
    /// # Errors
    /// The device failed. The engine is of no more use.
    pub fn step(&mut self, outputs: &mut Vec<Output>) -> Result<(), EngineError> {
        self.clock.enter();
        if let Some(step) = &self.under_way
            && !step.members.iter().any(|m| self.running.iter().any(|a| a.id == m.id))
        {
            self.abandon()?;
        }
        let step = match self.under_way.take() {
            Some(step) => step,
            None => {
                self.admit(outputs);
                match self.begin()? {
                    Some(step) => step,
                    None => return Ok(()),
                }
            }
        };
        self.under_way = self.begin_next(&step)?;
        self.finish(step, outputs)
    }

    /// Plans a step; one whose tokens the runner can sample is under way then.
    fn begin(&mut self) -> Result<Option<UnderWay>, EngineError> {
        let start = Instant::now();
        let rows = self.plan();
        let mut members: Vec<Member> = self
            .running
            .iter()
            .zip(rows)
            .filter(|(_, n_rows)| *n_rows > 0)
            .map(|(active, n_rows)| Member {
                id: active.id,
                n_rows,
                is_last: n_rows == active.n_pending(),
                decodes: active.n_pending() == 1 && active.n_generated() > 0,
                drafts: vec![],
                source: DraftSource::Mtp,
            })
            .collect();
        if members.is_empty() {
            return Ok(None);
        }
        let drafting_start = Instant::now();
        let mtp_depth = self.draft(&mut members)?;
        let drafting = if mtp_depth > 0 { drafting_start.elapsed() - self.following } else { Duration::ZERO };
        let mut batch = Batch::default();
        for (member, active) in each_member(&members, &mut self.running) {
            let first = active.sequence.tokens.len();
            let tokens = [&active.tokens[first..first + member.n_rows], &member.drafts[..]].concat();
            add_rows(&mut batch, member, active, &tokens, first);
        }
        let can_sample = each_member(&members, &mut self.running)
            .all(|(member, active)| !member.is_last || active.device_can_sample(active.n_generated()));
        let Some(sampler) = self.runner.device_sampler().filter(|_| can_sample && !batch.logits_rows.is_empty()) else {
            return Ok(Some(UnderWay { members, batch: Some(batch), start, drafting, mtp_depth }));
        };
        batch.sampling = sampling(&members, &mut self.running);
        sampler.submit(batch)?;
        self.n_ahead = 0;
        Ok(Some(UnderWay { members, batch: None, start, drafting, mtp_depth }))
    }

    /// Gives the members of a step in which all decode tokens that may follow, and the pages for them; the most that the
    /// multi-token-prediction layer has drafted for one of them.
    fn draft(&mut self, members: &mut [Member]) -> Result<usize, EngineError> {
        let most = self.control.depth().most();
        if most == 0 || !members.iter().all(|m| m.decodes) {
            return Ok(0);
        }
        let limits = self.runner.limits();
        let most_rows = EXACT_ROWS.min(limits.max_rows).min(limits.max_logits_rows).saturating_sub(members.len());
        let has_mtp = self.runner.drafter().is_some();
        let (mut offers, mut found) = (vec![], vec![]);
        let mut context = 0;
        for (_, active) in each_member(members, &mut self.running) {
            let n_tokens = active.tokens.len();
            context = context.max(n_tokens);
            // A step may end the text with one token more than it has drafts.
            let n_left =
                active.request.max_tokens.saturating_sub(active.n_generated()).min(self.context + 1 - n_tokens);
            let depth = most.min(n_left.saturating_sub(1));
            let ngram = active.ngrams.propose(&active.tokens, depth);
            let mut sources = vec![];
            sources.extend(ngram.as_ref().map(|(drafts, length)| (DraftSource::Ngram(*length), drafts.len())));
            // After a preemption there may be no hidden state yet.
            let n_lagging = active.n_lagging();
            sources.extend((has_mtp && depth > 0 && n_lagging > 0).then_some((DraftSource::Mtp, depth)));
            found.push(ngram.map(|(drafts, _)| drafts).unwrap_or_default());
            offers.push(Offer { history: &mut active.history, sources, n_lagging });
        }
        let chosen = self.control.choose(&mut offers, context, most_rows);
        drop(offers);
        let (mut by_mtp, mut mtp_depth) = (vec![], 0);
        for (i, (member, (chosen, mut drafts))) in members.iter_mut().zip(chosen.into_iter().zip(found)).enumerate() {
            let Some((source, depth)) = chosen else { continue };
            let Some(active) = self.running.iter_mut().find(|a| a.id == member.id) else { continue };
            let (n_tokens, pages) = (active.tokens.len(), &mut active.sequence.pages);
            let has_room = self.blocks.grow_by_free(pages, n_tokens + depth);
            let depth = if has_room { depth } else { depth.min(pages.len() * PAGE_SIZE - n_tokens) };
            member.source = source;
            if source == DraftSource::Mtp && depth > 0 {
                by_mtp.push((i, depth));
                mtp_depth = mtp_depth.max(depth);
            } else {
                drafts.truncate(depth);
                member.drafts = drafts;
            }
        }
        self.draft_by_mtp(members, by_mtp)?;
        Ok(mtp_depth)
    }

    /// Drafts by the multi-token-prediction layer for members `wanted`, each to its depth.
    fn draft_by_mtp(&mut self, members: &mut [Member], mut wanted: Vec<(usize, usize)>) -> Result<(), EngineError> {
        let place = |running: &[Active], member: &Member| running.iter().position(|a| a.id == member.id);
        let places: Vec<usize> = members.iter().filter_map(|member| place(&self.running, member)).collect();
        let lags = |running: &[Active]| wanted.iter().map(|(i, _)| running[places[*i]].n_lagging()).sum::<usize>();
        let has_room = lags(&self.running) <= self.runner.limits().max_rows;
        for (i, _) in &wanted {
            if !has_room || self.running[places[*i]].n_lagging() > SHORT_LAG {
                self.catch_up(places[*i])?;
            }
        }
        // First the rows that still wait, the last of which drafts; then a row for each further draft.
        let (mut batch, mut hidden) = (Batch::default(), vec![]);
        for (i, _) in &wanted {
            let active = &mut self.running[places[*i]];
            hidden.append(&mut active.lag.hidden);
            let rows = active.lag.first..active.sequence.tokens.len();
            add_mtp_rows(&mut batch, active, &active.tokens[rows.start + 1..rows.end + 1], rows.start, true);
            active.lag.first = rows.end;
            active.lag.has_drafted = true;
        }
        while !wanted.is_empty() {
            let Some(drafter) = self.runner.drafter() else { return Ok(()) };
            let n = drafter.hidden_size();
            self.counters.mtp_rows += batch.tokens.len() as u64;
            let drafted = drafter.draft(std::mem::take(&mut batch), &hidden)?;
            hidden.clear();
            let mut rest = vec![];
            for (row, ((i, depth), token)) in wanted.iter().zip(drafted.tokens).enumerate() {
                let drafts = &mut members[*i].drafts;
                drafts.push(token);
                if drafts.len() < *depth {
                    let active = &self.running[places[*i]];
                    add_mtp_rows(&mut batch, active, &[token], active.tokens.len() + drafts.len() - 2, true);
                    hidden.extend_from_slice(&drafted.hidden[row * n..(row + 1) * n]);
                    rest.push((*i, *depth));
                }
            }
            wanted = rest;
        }
        Ok(())
    }

    /// Runs the multi-token-prediction layer over positions of running sequence `i` that wait for it, but for the last.
    fn catch_up(&mut self, i: usize) -> Result<(), EngineError> {
        let (start, max_rows) = (Instant::now(), self.runner.limits().max_rows);
        let (Some(drafter), active) = (self.runner.drafter(), &mut self.running[i]) else { return Ok(()) };
        let (end, n) = (active.sequence.tokens.len().saturating_sub(1), drafter.hidden_size());
        let n_rows = end.saturating_sub(active.lag.first);
        let mut run = 0;
        while run < n_rows {
            let rows = active.lag.first + run..end.min(active.lag.first + run + max_rows);
            let mut batch = Batch::default();
            add_mtp_rows(&mut batch, active, &active.tokens[rows.start + 1..rows.end + 1], rows.start, false);
            drafter.draft(batch, &active.lag.hidden[run * n..(run + rows.len()) * n])?;
            run += rows.len();
        }
        active.lag.hidden.drain(..n_rows * n);
        active.lag.first += n_rows;
        self.counters.mtp_rows += n_rows as u64;
        let time = start.elapsed();
        self.following += time;
        self.control.note_following(n_rows, time);
        Ok(())
    }

    /// Keeps the hidden states of running sequence `i` that a step has brought, from its row `row` on, for its positions
    /// from `first` on: until drafts are wanted, or they are many.
    fn keep_hidden(&mut self, i: usize, row: usize, first: usize) -> Result<(), EngineError> {
        let active = &mut self.running[i];
        if self.control.depth() == DraftDepth::OFF || active.lag.is_lost {
            return Ok(());
        }
        let Some(drafter) = self.runner.drafter() else { return Ok(()) };
        let (n, n_kept) = (drafter.hidden_size(), active.sequence.tokens.len() - first);
        match drafter.hidden().get(row * n..(row + n_kept) * n) {
            Some(hidden) => active.lag.hidden.extend_from_slice(hidden),
            // The step behind it had already begun.
            None => active.lag.lose(),
        }
        if size_of_val(&active.lag.hidden[..]) > MOST_LAG_BYTES {
            let (n_lagging, n_sequences) = (active.n_lagging(), self.running.len());
            if self.control.may_follow(n_lagging, n_sequences, first + n_kept) {
                self.catch_up(i)?;
            } else {
                self.running[i].lag.lose();
            }
        }
        Ok(())
    }

    /// Puts the step that follows `step` behind it, while its tokens are not known here yet; none if it is not certain
    /// that exactly the same sequences go on, each with one token that the runner can sample.
    fn begin_next(&mut self, step: &UnderWay) -> Result<Option<UnderWay>, EngineError> {
        if !self.may_run_ahead(step) {
            return Ok(None);
        }
        let is_full = self.running.len() >= self.costs.max_running(&self.scheduling);
        let same = step.members.len() == self.running.len() && (self.waiting.is_empty() || is_full);
        let goes_on = |(member, active): (&Member, &Active)| {
            let (n_generated, n_tokens) = (active.n_generated() + 1, active.tokens.len() + 1);
            let goes_on = n_generated < active.request.max_tokens && n_tokens <= self.context;
            active.id == member.id && member.is_last && goes_on && active.device_can_sample(n_generated)
        };
        if step.batch.is_some() || !same || !step.members.iter().zip(&self.running).all(goes_on) {
            return Ok(None);
        }
        for active in &mut self.running {
            if !self.blocks.grow(&mut active.sequence.pages, active.tokens.len() + 1) {
                return Ok(None);
            }
        }
        let Some(sampler) = self.runner.device_sampler() else { return Ok(None) };
        let members: Vec<Member> =
            step.members.iter().map(|m| Member { n_rows: 1, decodes: true, ..m.clone() }).collect();
        let mut batch = Batch::default();
        for (i, (member, active)) in members.iter().zip(&self.running).enumerate() {
            add_rows(&mut batch, member, active, &[SAMPLED | i as u32], active.tokens.len());
        }
        batch.sampling = sampling(&members, &mut self.running);
        sampler.submit(batch)?;
        self.n_ahead += 1;
        let (start, drafting) = (Instant::now(), Duration::ZERO);
        Ok(Some(UnderWay { members, batch: None, start, drafting, mtp_depth: 0 }))
    }

    /// False where drafts depend on the tokens of `step`.
    fn may_run_ahead(&mut self, step: &UnderWay) -> bool {
        let drafts = step.members.iter().any(|m| !m.drafts.is_empty());
        match self.control.depth() {
            DraftDepth::OFF => true,
            DraftDepth::Fixed(_) => false,
            // Hidden states of a step behind which another one has begun are not kept.
            DraftDepth::Auto => {
                let may_draft = self.runner.drafter().is_some()
                    && (!self.control.rests() || step.members.iter().any(|m| !m.decodes));
                !drafts && self.n_ahead < STEPS_AHEAD && !may_draft
            }
        }
    }

    /// Waits for a step and does what follows from its tokens.
    fn finish(&mut self, step: UnderWay, outputs: &mut Vec<Output>) -> Result<(), EngineError> {
        let UnderWay { members, batch, start, drafting, mtp_depth } = step;
        let mut logits = std::mem::take(&mut self.logits);
        logits.clear();
        let is_ahead = batch.is_none();
        let waited = Instant::now();
        let sampled = match batch {
            Some(batch) => {
                self.runner.step(batch, &mut logits)?;
                vec![]
            }
            None => self.runner.device_sampler().map_or(Ok(vec![]), |sampler| sampler.collect())?,
        };
        // A device that has the next step already works while the host does its part.
        let device = if is_ahead { Duration::MAX } else { waited.elapsed() };
        let (decoding, prefilling): (Vec<_>, Vec<_>) = members.iter().partition::<Vec<&Member>, _>(|m| m.decodes);
        let n_prefill = prefilling.iter().map(|m| m.n_rows).sum();
        let n_decode = decoding.iter().map(|m| m.n_rows + m.drafts.len()).sum();
        self.counters.steps += 1;
        self.counters.prompt_tokens += n_prefill as u64;
        self.last_step_rows = n_decode + n_prefill;
        let context = members.iter().filter_map(|m| self.running.iter().find(|a| a.id == m.id));
        let context = context.map(|active| active.tokens.len()).max().unwrap_or(0);
        let n_before = self.counters.generated_tokens;
        let (n_sequences, all_decode) = (members.len(), n_prefill == 0);
        self.commit(&members, &sampled, &mut logits, outputs)?;
        self.logits = logits;
        // A step that was put behind another began when that one ended.
        let start = start.max(self.last_step_end);
        self.last_step_end = Instant::now();
        let time = self.last_step_end - start;
        let time = time.saturating_sub(std::mem::take(&mut self.following));
        self.costs.record(n_decode, n_prefill, time);
        if all_decode {
            let n_tokens = (self.counters.generated_tokens - n_before) as usize;
            let ran = Ran { n_sequences, n_rows: n_decode, context, n_tokens, drafting, mtp_depth, time };
            self.control.note_step(&ran);
        } else {
            self.control.note_prefill(time);
        }
        // What a draft brought counts, not what it asked for.
        let n_generated = (self.counters.generated_tokens - n_before) as usize;
        let (n_decoding, n_prefilled) = (if all_decode { n_generated } else { n_decode }, n_prefill);
        let step = StepTimes { n_decoding, n_prefilled, context, ..StepTimes::default() };
        if self.clock.is_on() {
            self.clock.end(step, device, self.runner.spent(), !self.running.is_empty());
        }
        Ok(())
    }

    /// Waits for a step that nobody wants any more.
    fn abandon(&mut self) -> Result<(), EngineError> {
        if self.under_way.take().is_some()
            && let Some(sampler) = self.runner.device_sampler()
        {
            sampler.collect()?;
        }
        Ok(())
    }

    /// Runs one request to its end. `emit` gets each token and may stop the text.
    ///
    /// # Errors
    /// As [`Engine::submit`] and [`Engine::step`].
    pub fn generate(
        &mut self,
        request: Request,
        mut emit: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated, EngineError> {
        let id = self.submit(request)?;
        let mut cached_tokens = 0;
        let mut outputs = vec![];
        loop {
            self.step(&mut outputs)?;
            for output in outputs.drain(..).filter(|o| o.request == id) {
                match output.event {
                    Event::Started { cached_tokens: n } => cached_tokens = n,
                    Event::Token { id: token, .. } => {
                        if emit(token).is_break() {
                            self.cancel(id);
                            return Ok(Generated { finish_reason: FinishReason::Stop, cached_tokens });
                        }
                    }
                    Event::Drafted { .. } => {}
                    Event::Finished(finish_reason) => return Ok(Generated { finish_reason, cached_tokens }),
                    Event::Failed(error) => return Err(error),
                }
            }
        }
    }

    /// Appends `tokens` to a sequence of its own, in batches of at most `chunk`, and returns the wanted logits
    /// `[1 or tokens.len(), vocab_size]`.
    ///
    /// # Errors
    /// The tokens do not fit, are not in the vocabulary, the device failed, or a logit is NaN or infinite. The sequence is
    /// as before.
    ///
    /// A step of requests that is under way is run again after this, with other random numbers.
    pub fn run(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        chunk: usize,
        wanted: Logits,
    ) -> Result<Vec<f32>, EngineError> {
        let total = sequence.tokens.len() + tokens.len();
        self.check(tokens, total)?;
        self.abandon()?;
        if !self.blocks.grow(&mut sequence.pages, total) {
            return Err(self.too_long(total));
        }
        let limits = self.runner.limits();
        let chunk = match wanted {
            Logits::Last => chunk.clamp(1, limits.max_rows),
            Logits::All => chunk.clamp(1, limits.max_rows.min(limits.max_logits_rows)),
        };
        let mut batches = vec![];
        let mut position = sequence.tokens.len();
        for part in tokens.chunks(chunk) {
            let end = position + part.len();
            let logits_rows = match wanted {
                Logits::All => (0..part.len() as u32).collect(),
                Logits::Last if end == total => vec![part.len() as u32 - 1],
                Logits::Last => vec![],
            };
            batches.push(Batch {
                tokens: part.to_vec(),
                positions: (position as u32..end as u32).collect(),
                sequences: vec![0; part.len()],
                block_tables: vec![sequence.pages.clone()],
                logits_rows,
                sampling: vec![],
            });
            position = end;
        }
        let mut logits = vec![];
        self.runner.steps(batches, &mut logits)?;
        let vocab_size = self.runner.vocab_size();
        let first = total - logits.len() / vocab_size;
        for (position, row) in (first..).zip(logits.chunks_exact(vocab_size)) {
            check_finite(row, position)?;
        }
        sequence.tokens.extend_from_slice(tokens);
        Ok(logits)
    }

    /// Returns the pages of a sequence that [`Engine::run`] filled.
    pub fn release(&mut self, sequence: &mut Sequence) {
        self.blocks.release(&mut sequence.pages);
        sequence.tokens.clear();
    }

    /// Checks tokens with which a sequence would have `total`.
    fn check(&self, tokens: &[u32], total: usize) -> Result<(), EngineError> {
        let vocab_size = self.runner.vocab_size();
        if tokens.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        check_vocabulary(tokens, vocab_size)?;
        if total > self.context { Err(self.too_long(total)) } else { Ok(()) }
    }

    fn too_long(&self, tokens: usize) -> EngineError {
        EngineError::ContextExceeded { tokens, context: self.context, trained: self.trained_context }
    }

    /// Lets waiting requests run while there are places and pages.
    fn admit(&mut self, outputs: &mut Vec<Output>) {
        while self.running.len() < self.costs.max_running(&self.scheduling) {
            let Some(mut active) = self.waiting.pop_front() else { return };
            // The last token always runs: its logits are needed.
            let Prefix { pages, hashes, n_tokens } = self.blocks.find_prefix(&active.tokens[..active.tokens.len() - 1]);
            active.sequence = Sequence { tokens: active.tokens[..n_tokens].to_vec(), pages, hashes };
            self.read_pages(&active.tokens, &mut active.sequence);
            let missing = active.tokens.len().div_ceil(PAGE_SIZE) - active.sequence.pages.len();
            if missing > self.blocks.n_available() && !self.running.is_empty() {
                self.retire(std::mem::take(&mut active.sequence));
                self.waiting.push_front(active);
                return;
            }
            let cached_tokens = active.sequence.tokens.len();
            active.lag = Lag { first: cached_tokens, ..Lag::default() };
            if !active.is_started {
                active.is_started = true;
                self.counters.cached_tokens += cached_tokens as u64;
                outputs.push(Output { request: active.id, event: Event::Started { cached_tokens } });
            }
            self.running.push(active);
        }
    }

    /// Rows of each running sequence in the next step, whose pages they have.
    fn plan(&mut self) -> Vec<usize> {
        let pending: Vec<usize> = self.running.iter().map(Active::n_pending).collect();
        let mut rows = share_rows(&pending, self.runner.limits().max_rows, &self.scheduling, &self.costs);
        let mut i = 0;
        while i < self.running.len() {
            let total = self.running[i].sequence.tokens.len() + rows[i];
            if self.blocks.grow(&mut self.running[i].sequence.pages, total) {
                i += 1;
                continue;
            }
            // The sequence that came last gives way; it may be this one.
            let Some(mut active) = self.running.pop() else { break };
            rows.pop();
            self.retire(std::mem::take(&mut active.sequence));
            self.waiting.push_front(active);
            self.counters.preemptions += 1;
        }
        rows
    }

    /// Notes what a step ran, and takes its tokens: `sampled` by the runner, or here from `logits`.
    fn commit(
        &mut self,
        members: &[Member],
        sampled: &[Result<u32, SampleError>],
        logits: &mut [f32],
        outputs: &mut Vec<Output>,
    ) -> Result<(), EngineError> {
        let mut first_row = 0;
        let mut logits = logits.chunks_exact_mut(self.runner.vocab_size());
        let mut sampled = sampled.iter();
        let mut ended = vec![];
        for member in members {
            // Those of sequences that have ended since the step began are passed over.
            let sampled: Vec<_> = sampled.by_ref().take(member.n_logits()).collect();
            let rows: Vec<_> = logits.by_ref().take(member.n_logits()).collect();
            let row = first_row;
            first_row += member.n_rows + member.drafts.len();
            let Some(i) = self.running.iter().position(|a| a.id == member.id) else { continue };
            let active = &mut self.running[i];
            let first = active.sequence.tokens.len();
            active.sequence.tokens.extend_from_slice(&active.tokens[first..first + member.n_rows]);
            let end = if member.is_last { self.take_tokens(i, member, sampled, rows, outputs) } else { None };
            self.keep_hidden(i, row, first)?;
            let active = &mut self.running[i];
            let n_known = active.sequence.hashes.len();
            let Sequence { tokens, pages, hashes } = &mut active.sequence;
            self.blocks.publish(pages, hashes, tokens, false);
            if !member.drafts.is_empty() {
                self.blocks.trim(pages, tokens.len());
            }
            // As soon as they are full: all at once, the disk would not keep up.
            save_pages(self.store.as_mut(), &mut *self.runner, &active.sequence, n_known);
            if let Some(event) = end {
                outputs.push(Output { request: active.id, event });
                ended.push(member.id);
            }
            // A text that ends here may go on in another request, which will want drafts too.
            let has_ended = ended.last() == Some(&member.id);
            let (n_lagging, n_tokens) = (active.n_lagging(), active.tokens.len());
            let is_short = active.lag.has_drafted && n_lagging <= LAST_LAG;
            if has_ended && n_lagging > 1 && (is_short || self.control.may_prepare(n_lagging, members.len(), n_tokens))
            {
                self.catch_up(i)?;
            }
        }
        ended.into_iter().for_each(|id| self.cancel(id));
        Ok(())
    }

    /// Takes the tokens of running sequence `i` that follow a step's last row of text and its drafts, up to the first that
    /// was not drafted; says how the text ends, if it does.
    fn take_tokens(
        &mut self,
        i: usize,
        member: &Member,
        sampled: Vec<&Result<u32, SampleError>>,
        rows: Vec<&mut [f32]>,
        outputs: &mut Vec<Output>,
    ) -> Option<Event> {
        let (active, context, n_drafts) = (&mut self.running[i], self.context, member.drafts.len());
        // Nothing was to be generated.
        if active.n_generated() >= active.request.max_tokens {
            return Some(Event::Finished(FinishReason::Length));
        }
        let (mut sampled, mut rows) = (sampled.into_iter(), rows.into_iter());
        let (mut n_accepted, mut end) = (0, None);
        loop {
            let result = match (sampled.next(), rows.next()) {
                (Some(token), _) => {
                    if n_drafts > 0 {
                        active.sampler.skip(1);
                    }
                    token.clone().map(|token| accept(active, token, None, context)).map_err(EngineError::from)
                }
                (None, Some(row)) => sample(active, row, context),
                (None, None) => break,
            };
            let (event, finished) = match result {
                Ok(taken) => taken,
                Err(error) => {
                    end = Some(Event::Failed(error));
                    break;
                }
            };
            self.counters.generated_tokens += u64::from(event.is_some());
            let token = match &event {
                Some(Event::Token { id, .. }) => Some(*id),
                _ => None,
            };
            outputs.extend(event.map(|event| Output { request: active.id, event }));
            let is_drafted = token.is_some() && token.as_ref() == member.drafts.get(n_accepted);
            n_accepted += usize::from(is_drafted);
            end = finished.map(Event::Finished);
            if end.is_some() || !is_drafted {
                break;
            }
            // The row that comes next has run it.
            active.sequence.tokens.extend(token);
        }
        if n_drafts > 0 {
            self.control.note_draft(&mut active.history, member.source, n_drafts, n_accepted);
            outputs.push(Output { request: active.id, event: Event::Drafted { n_tokens: n_drafts, n_accepted } });
            match member.source {
                DraftSource::Mtp => self.counters.mtp_drafts.add(n_drafts, n_accepted),
                DraftSource::Ngram(_) => self.counters.ngram_drafts.add(n_drafts, n_accepted),
            }
            let DraftCounts { drafts, accepted, .. } = self.counters.mtp_drafts;
            if member.source == DraftSource::Mtp && drafts == CHECKED_DRAFTS && accepted[0] < FEWEST_RIGHT {
                tracing::warn!(
                    "the first token that the multi-token-prediction layer drafts was right {} times in {drafts}: its \
                     weights do not belong to this model, or it is wired wrongly; --draft-depth 0 does without it",
                    accepted[0]
                );
            }
        }
        end
    }

    /// Gives a sequence's pages back, to be found again.
    fn retire(&mut self, mut sequence: Sequence) {
        self.blocks.publish(&sequence.pages, &mut sequence.hashes, &sequence.tokens, true);
        save_pages(self.store.as_mut(), &mut *self.runner, &sequence, 0);
        self.blocks.release(&mut sequence.pages);
    }

    /// Appends the full pages of `tokens` that are on disk and not in memory. A page in memory that holds a part of the next
    /// one's tokens gives way to it.
    fn read_pages(&mut self, tokens: &[u32], sequence: &mut Sequence) {
        let Some(store) = &mut self.store else { return };
        loop {
            let n_pages = sequence.hashes.len();
            let (first, n_tokens) = (n_pages * PAGE_SIZE, (n_pages + 1) * PAGE_SIZE);
            // The last token always runs.
            if n_tokens >= tokens.len() {
                return;
            }
            let hash = page_hash(sequence.hashes.last().unwrap_or(&ROOT), &tokens[first..n_tokens]);
            let Some(bytes) = store.read(&hash) else { return };
            self.blocks.release(&mut sequence.pages.split_off(n_pages));
            sequence.tokens.truncate(first);
            if !self.blocks.grow(&mut sequence.pages, n_tokens) {
                return;
            }
            if !self.runner.load_page(sequence.pages[n_pages], &bytes) {
                let mut unused = sequence.pages.split_off(n_pages);
                return self.blocks.release(&mut unused);
            }
            sequence.tokens.extend_from_slice(&tokens[first..n_tokens]);
            self.blocks.publish(&sequence.pages, &mut sequence.hashes, &sequence.tokens, false);
            self.counters.disk_tokens += PAGE_SIZE as u64;
        }
    }
}

/// Checks that every token is below `vocab_size`.
///
/// # Errors
/// The first one that is not.
pub fn check_vocabulary(tokens: &[u32], vocab_size: usize) -> Result<(), EngineError> {
    match tokens.iter().find(|token| **token as usize >= vocab_size) {
        Some(token) => Err(EngineError::UnknownToken { token: *token, vocab_size }),
        None => Ok(()),
    }
}

/// Checks the logits that a model gave after `position`, before anything masks them.
fn check_finite(logits: &[f32], position: usize) -> Result<(), EngineError> {
    // Summed in lanes, a product that is NaN for every number that is not finite; only a bad row is searched.
    let (lanes, rest) = logits.as_chunks::<16>();
    let mut sums = [0.0f32; 16];
    for lane in lanes {
        sums.iter_mut().zip(lane).for_each(|(sum, logit)| *sum += logit * 0.0);
    }
    if sums.iter().chain(rest).all(|value| value.is_finite()) {
        return Ok(());
    }
    let bad = logits.iter().enumerate().find(|(_, logit)| !logit.is_finite());
    bad.map_or(Ok(()), |(token_id, value)| Err(EngineError::NotFinite { position, token_id, value: *value }))
}

/// Writes a sequence's full pages from `first` on to the disk, unless they are there or it does not keep up.
fn save_pages(store: Option<&mut PageStore>, runner: &mut dyn Runner, sequence: &Sequence, first: usize) {
    let Some(store) = store else { return };
    for (page, hash) in sequence.pages.iter().zip(&sequence.hashes).skip(first) {
        if !store.contains(hash)
            && store.has_room()
            && let Some(bytes) = runner.save_page(*page)
        {
            store.write(*hash, bytes);
        }
    }
}

/// The members of a step that still run, with their sequences.
fn each_member<'a>(
    members: &'a [Member],
    running: &'a mut [Active],
) -> impl Iterator<Item = (&'a Member, &'a mut Active)> {
    running.iter_mut().filter_map(|active| Some((members.iter().find(|m| m.id == active.id)?, active)))
}

/// Adds a sequence's rows to a batch.
fn add_rows(batch: &mut Batch, member: &Member, active: &Active, tokens: &[u32], first: usize) {
    batch.tokens.extend_from_slice(tokens);
    batch.positions.extend(first as u32..(first + tokens.len()) as u32);
    batch.sequences.extend(std::iter::repeat_n(batch.block_tables.len() as u32, tokens.len()));
    batch.block_tables.push(active.sequence.pages.clone());
    let n_rows = batch.tokens.len();
    batch.logits_rows.extend((n_rows - member.n_logits()..n_rows).map(|row| row as u32));
}

/// Adds rows for the multi-token-prediction layer: `tokens` come after the positions from `first` on.
fn add_mtp_rows(batch: &mut Batch, active: &Active, tokens: &[u32], first: usize, wants_draft: bool) {
    batch.tokens.extend_from_slice(tokens);
    batch.positions.extend(first as u32..(first + tokens.len()) as u32);
    batch.sequences.extend(std::iter::repeat_n(batch.block_tables.len() as u32, tokens.len()));
    batch.block_tables.push(active.sequence.pages.clone());
    batch.logits_rows.extend(wants_draft.then(|| batch.tokens.len() as u32 - 1));
}

/// How the runner samples the next tokens of a step, in the order of their logits.
fn sampling(members: &[Member], running: &mut [Active]) -> Vec<Sampling> {
    each_member(members, running)
        .filter(|(member, _)| member.is_last)
        .flat_map(|(member, active)| match member.drafts.len() {
            0 => vec![active.sampler.sampling()],
            n_drafts => active.sampler.sampling_ahead(1 + n_drafts),
        })
        .collect()
}

/// Samples the next token of a sequence from its logits; says what to report, and whether the text ends.
fn sample(
    active: &mut Active,
    logits: &mut [f32],
    context: usize,
) -> Result<(Option<Event>, Option<FinishReason>), EngineError> {
    let Active { request, sampler, tokens, .. } = &mut *active;
    check_finite(logits, tokens.len() - 1)?;
    let n_generated = tokens.len() - request.prompt.len();
    // Before anything changes them.
    let original = request.top_logprobs.map(|_| logits.to_vec());
    if let Some(constraint) = &mut request.constraint {
        constraint.mask(logits);
    }
    if n_generated < request.min_tokens {
        let ends: Vec<(usize, f32)> =
            request.eos.iter().filter_map(|id| logits.get(*id as usize).map(|logit| (*id as usize, *logit))).collect();
        ends.iter().for_each(|(id, _)| logits[*id] = f32::NEG_INFINITY);
        // A grammar that is complete leaves nothing but the end.
        if request.constraint.is_some() && logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
            ends.iter().for_each(|(id, logit)| logits[*id] = *logit);
        }
    }
    let id = sampler.sample(logits, tokens)?;
    let logprobs = original
        .zip(request.top_logprobs)
        .map(|(original, n_top)| Logprobs { chosen: logprob(&original, id), top: top_logprobs(&original, n_top) });
    Ok(accept(active, id, logprobs, context))
}

/// Takes a sequence's next token; says what to report, and whether the text ends.
fn accept(
    active: &mut Active,
    id: u32,
    logprobs: Option<Logprobs>,
    context: usize,
) -> (Option<Event>, Option<FinishReason>) {
    let n_generated = active.n_generated() + 1;
    let Active { request, tokens, .. } = active;
    if request.eos.contains(&id) {
        return (None, Some(FinishReason::Stop));
    }
    tokens.push(id);
    let may_continue = request.constraint.as_mut().is_none_or(|c| c.accept(id));
    let end = if !may_continue {
        Some(FinishReason::Stop)
    } else if n_generated >= request.max_tokens || tokens.len() > context {
        Some(FinishReason::Length)
    } else {
        None
    };
    (Some(Event::Token { id, logprobs }), end)
}
