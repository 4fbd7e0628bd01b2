//! The engine's sharing of steps and pages: with a runner that is no model, and with the bundled model.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use tandem_core::backend::{PAGE_SIZE, SAMPLED};
use tandem_core::{Batch, Checkpoint, ModelConfig};
use tandem_cpu::CpuBackend;
use tandem_engine::{
    BlockManager, Constraint, DeviceSampler, DraftDepth, Drafted, Drafter, Engine, EngineError, Event, FinishReason,
    Logits, ModelRunner, Output, PageStore, Request, RequestId, Runner, SampleError, SamplingParams, Scheduling,
    Sequence,
};
use tandem_model::Limits;

const VOCAB: usize = 50;
const END: u32 = 0;

/// Writes tokens into slots and answers with a token that depends on every slot of the sequence, so that a wrong page
/// gives a wrong text.
struct SlotRunner {
    slots: Vec<u32>,
    limits: Limits,
    largest_decode: std::sync::Arc<std::sync::Mutex<Vec<usize>>>,
    /// It samples tokens itself; those of the steps under way.
    samples: bool,
    sampled: VecDeque<Vec<u32>>,
    /// Its texts repeat themselves.
    repeats: bool,
    /// It drafts, rightly so in this many of eight cases.
    drafts: Option<u64>,
    /// Of each row of the last step that has ended, its position, and of the one submitted last.
    hidden: Vec<f32>,
    last_hidden: Vec<f32>,
    /// By slot, the token after the one there, as far as the drafter has seen them.
    drafter_slots: Vec<u32>,
    /// What a row takes, and one that the drafter runs.
    row_time: [Duration; 2],
}

/// Works for so long, whatever else the machine does.
fn work(time: Duration) {
    let start = std::time::Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// The token after `tokens`; one that was there before, as a rule, if texts are to repeat themselves.
fn next(tokens: impl Iterator<Item = u32>, repeats: bool) -> u32 {
    let tokens: Vec<u32> = tokens.collect();
    let hash = tokens.iter().fold(17u64, |h, t| (h ^ u64::from(*t)).wrapping_mul(0x100_0000_01b3).rotate_left(23));
    match tokens.len().checked_sub(5) {
        Some(before) if repeats && hash % 8 > 0 => tokens[before],
        _ => (hash % VOCAB as u64) as u32,
    }
}

impl SlotRunner {
    fn new(blocks: &BlockManager, limits: Limits, samples: bool) -> SlotRunner {
        let (slots, largest_decode) = (vec![0; blocks.n_slots()], Default::default());
        SlotRunner {
            drafter_slots: slots.clone(),
            slots,
            limits,
            largest_decode,
            samples,
            sampled: VecDeque::new(),
            repeats: false,
            drafts: None,
            hidden: vec![],
            last_hidden: vec![],
            row_time: Default::default(),
        }
    }

    /// Runs a batch; the tokens that follow.
    fn run(&mut self, batch: &Batch) -> Vec<u32> {
        for row in 0..batch.n_rows() {
            let slot = batch.slot(batch.sequences[row] as usize, batch.positions[row] as usize);
            let token = batch.tokens[row];
            let before = || self.sampled.back().expect("a step before")[(token & !SAMPLED) as usize];
            self.slots[slot] = if token & SAMPLED == 0 { token } else { before() };
        }
        self.largest_decode.lock().unwrap().push(batch.n_rows());
        work(self.row_time[0] * batch.n_rows() as u32);
        self.last_hidden = batch.positions.iter().map(|position| *position as f32).collect();
        let last = batch.logits_rows.iter().map(|row| *row as usize);
        last.map(|row| {
            let (sequence, last) = (batch.sequences[row] as usize, batch.positions[row] as usize);
            next((0..=last).map(|p| self.slots[batch.slot(sequence, p)]), self.repeats)
        })
        .collect()
    }
}

impl DeviceSampler for SlotRunner {
    fn submit(&mut self, batch: Batch) -> Result<(), EngineError> {
        assert_eq!(batch.sampling.len(), batch.logits_rows.len());
        let tokens = self.run(&batch);
        self.sampled.push_back(tokens);
        assert!(self.sampled.len() <= 2, "two steps under way");
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Result<u32, SampleError>>, EngineError> {
        let tokens = self.sampled.pop_front().expect("a step under way");
        self.hidden = if self.sampled.is_empty() { self.last_hidden.clone() } else { vec![] };
        Ok(tokens.into_iter().map(Ok).collect())
    }
}

impl Drafter for SlotRunner {
    fn hidden_size(&self) -> usize {
        1
    }

    fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    fn draft(&mut self, batch: Batch, hidden: &[f32]) -> Result<Drafted, EngineError> {
        assert!(batch.n_rows() <= self.limits.max_rows && batch.logits_rows.len() <= self.limits.max_logits_rows);
        assert!(batch.positions.iter().map(|position| *position as f32).eq(hidden.iter().copied()));
        work(self.row_time[1] * batch.n_rows() as u32);
        let slot_of = |row: usize, position: usize| batch.slot(batch.sequences[row] as usize, position);
        for row in 0..batch.n_rows() {
            self.drafter_slots[slot_of(row, batch.positions[row] as usize)] = batch.tokens[row];
        }
        let mut drafted = Drafted::default();
        for row in batch.logits_rows.iter().map(|row| *row as usize) {
            let last = batch.positions[row] as usize;
            let seen = (0..=last).map(|position| self.drafter_slots[slot_of(row, position)]);
            let token = next(std::iter::once(self.slots[slot_of(row, 0)]).chain(seen), self.repeats);
            let is_right = u64::from(token) % 8 < self.drafts.unwrap_or(0);
            drafted.tokens.push(if is_right { token } else { (token + 1) % VOCAB as u32 });
            drafted.hidden.push(last as f32 + 1.0);
        }
        Ok(drafted)
    }
}

impl Runner for SlotRunner {
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        assert!(self.sampled.is_empty() && batch.sampling.is_empty());
        let tokens = self.run(&batch);
        self.hidden.clone_from(&self.last_hidden);
        for token in tokens {
            logits.extend((0..VOCAB as u32).map(|id| if id == token { 1.0 } else { 0.0 }));
        }
        Ok(())
    }

    fn device_sampler(&mut self) -> Option<&mut dyn DeviceSampler> {
        if self.samples { Some(self) } else { None }
    }

    fn drafter(&mut self) -> Option<&mut dyn Drafter> {
        if self.drafts.is_some() { Some(self) } else { None }
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn save_page(&mut self, page: u32) -> Option<Vec<u8>> {
        let first = page as usize * PAGE_SIZE;
        Some(self.slots[first..first + PAGE_SIZE].iter().flat_map(|t| t.to_le_bytes()).collect())
    }

    fn load_page(&mut self, page: u32, bytes: &[u8]) -> bool {
        for (slot, token) in self.slots[page as usize * PAGE_SIZE..].iter_mut().zip(bytes.chunks_exact(4)) {
            *slot = u32::from_le_bytes(token.try_into().unwrap());
        }
        true
    }
}

/// What the runner would say to `prompt` alone.
fn expected(prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    expected_of(prompt, max_tokens, false)
}

fn expected_of(prompt: &[u32], max_tokens: usize, repeats: bool) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    while tokens.len() < prompt.len() + max_tokens {
        match next(tokens.iter().copied(), repeats) {
            END => break,
            token => tokens.push(token),
        }
    }
    tokens.split_off(prompt.len())
}

fn engine(n_pages: usize, max_batch: usize) -> Engine {
    engine_of(n_pages, max_batch, false)
}

fn engine_of(n_pages: usize, max_batch: usize, samples: bool) -> Engine {
    engine_that(n_pages, samples, false).with_scheduling(scheduling(max_batch))
}

fn engine_that(n_pages: usize, samples: bool, repeats: bool) -> Engine {
    engine_with(n_pages, samples, repeats, None)
}

fn engine_with(n_pages: usize, samples: bool, repeats: bool, drafts: Option<u64>) -> Engine {
    let blocks = BlockManager::for_tokens(n_pages * PAGE_SIZE);
    let limits = Limits { max_rows: 128, max_logits_rows: 64 };
    let runner = SlotRunner { repeats, drafts, ..SlotRunner::new(&blocks, limits, samples) };
    let context = n_pages * PAGE_SIZE;
    Engine::new(Box::new(runner), blocks, context, context)
}

fn scheduling(max_batch: usize) -> Scheduling {
    Scheduling { max_batch, prefill_chunk: 100, prefill_share: 2.0, inter_token: None }
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request { prompt, max_tokens, eos: vec![END], ..Request::default() }
}

/// The layer that drafts costs nothing where drafts do not pay: it does not follow texts then.
#[test]
fn the_layer_that_drafts_rests_while_nothing_is_drafted() {
    // Rows that each cost as much as the first, and drafts that are never right.
    let engine = |depth: DraftDepth, samples: bool| {
        let blocks = BlockManager::for_tokens(64 * PAGE_SIZE);
        let row_time = [Duration::from_micros(200), Duration::from_micros(50)];
        let limits = Limits { max_rows: 128, max_logits_rows: 64 };
        let runner = SlotRunner { drafts: Some(0), row_time, ..SlotRunner::new(&blocks, limits, samples) };
        Engine::new(Box::new(runner), blocks, 512, 512).with_scheduling(scheduling(4)).with_drafts(depth)
    };
    let run = |engine: &mut Engine, max_tokens: usize| {
        for seed in 0..8 {
            engine.submit(Request { eos: vec![], ..greedy(text(100, seed), max_tokens) }).unwrap();
        }
        run_all(engine);
        let counters = engine.counters();
        (counters.mtp_rows, counters.prompt_tokens + counters.generated_tokens, counters.mtp_drafts.drafts)
    };
    for samples in [false, true] {
        // Texts end before anything could be drafted, or nothing is wanted.
        assert_eq!(run(&mut engine(DraftDepth::Auto, samples), 1).0, 0);
        assert_eq!(run(&mut engine(DraftDepth::OFF, samples), 50).0, 0);
        let (n_run, n_rows, n_drafts) = run(&mut engine(DraftDepth::Auto, samples), 300);
        assert!(n_run * 10 <= n_rows && n_drafts * 50 <= n_rows, "{n_run} of {n_rows} rows, {n_drafts} drafts");
        let (n_run, n_rows, _) = run(&mut engine(DraftDepth::Fixed(1), samples), 50);
        assert!(n_run * 10 >= n_rows * 9, "{n_run} of {n_rows} rows");
    }
}

/// Steps until nothing is left; the tokens of each request and how it ended.
fn run_all(engine: &mut Engine) -> HashMap<RequestId, (Vec<u32>, Option<FinishReason>)> {
    let mut results: HashMap<RequestId, (Vec<u32>, Option<FinishReason>)> = HashMap::new();
    let mut outputs = vec![];
    while engine.n_running() + engine.n_waiting() > 0 {
        engine.step(&mut outputs).unwrap();
        for Output { request, event } in outputs.drain(..) {
            let result = results.entry(request).or_default();
            assert_eq!(result.1, None, "nothing follows the end");
            match event {
                Event::Started { .. } | Event::Drafted { .. } => {}
                Event::Token { id, .. } => result.0.push(id),
                Event::Finished(reason) => result.1 = Some(reason),
                Event::Failed(error) => panic!("{error}"),
            }
        }
    }
    results
}

fn text(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| 1 + (i * i + seed * 13) % (VOCAB as u32 - 1)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Few pages, so that sequences preempt each other; shared beginnings; cancellations in between.
    #[test]
    fn every_request_gets_the_text_it_would_get_alone(
        requests in prop::collection::vec((1usize..200, 0u32..3, 0usize..80, 0usize..12), 1..14),
        n_pages in 5usize..12,
        max_batch in 1usize..8,
        inter_token_us in prop::option::of(0u64..50),
        samples: bool,
        depth in prop::option::of(0usize..9),
        repeats: bool,
        drafts in prop::option::of(0u64..9),
    ) {
        let inter_token = inter_token_us.map(Duration::from_micros);
        let mut engine = engine_with(n_pages, samples, repeats, drafts)
            .with_scheduling(Scheduling { inter_token, ..scheduling(max_batch) })
            .with_drafts(depth.map_or(DraftDepth::Auto, DraftDepth::Fixed));
        let mut wanted = HashMap::new();
        let mut cancelled = vec![];
        let mut outputs = vec![];
        let mut results: HashMap<RequestId, Vec<u32>> = HashMap::new();
        for (n, seed, max_tokens, steps) in requests {
            let prompt = text(n, seed);
            let id = engine.submit(greedy(prompt.clone(), max_tokens)).unwrap();
            for _ in 0..steps {
                engine.step(&mut outputs).unwrap();
            }
            if steps == 7 {
                engine.cancel(id);
                cancelled.push(id);
            }
            wanted.insert(id, expected_of(&prompt, max_tokens, repeats));
        }
        for Output { request, event } in outputs.drain(..) {
            if let Event::Token { id, .. } = event {
                results.entry(request).or_default().push(id);
            }
        }
        for (id, (tokens, _)) in run_all(&mut engine) {
            results.entry(id).or_default().extend(tokens);
        }
        for (id, tokens) in wanted {
            let found = results.remove(&id).unwrap_or_default();
            if cancelled.contains(&id) {
                prop_assert!(tokens.starts_with(&found));
            } else {
                prop_assert_eq!(found, tokens);
            }
        }
        prop_assert_eq!(engine.blocks().n_used(), 0);
    }
}

#[test]
fn streams_do_not_stall_behind_a_long_prompt_and_decoding_steps_stay_exact() {
    let blocks = BlockManager::for_tokens(64 * PAGE_SIZE);
    let runner = SlotRunner::new(&blocks, Limits { max_rows: 512, max_logits_rows: 64 }, false);
    let sizes = runner.largest_decode.clone();
    let mut engine = Engine::new(Box::new(runner), blocks, 4096, 4096);
    let mut request = greedy(text(20, 1), 300);
    request.eos.clear();
    let stream = engine.submit(request).unwrap();
    let mut outputs = vec![];
    engine.step(&mut outputs).unwrap();
    engine.submit(greedy(text(2000, 2), 5)).unwrap();
    sizes.lock().unwrap().clear();
    outputs.clear();
    for _ in 0..50 {
        engine.step(&mut outputs).unwrap();
    }
    let n_stream = outputs.iter().filter(|o| o.request == stream && matches!(o.event, Event::Token { .. })).count();
    assert_eq!(n_stream, 50, "one token in every step");
    assert!(sizes.lock().unwrap().iter().all(|n| (2..=64).contains(n)));
}

#[test]
fn requests_that_cannot_run_are_refused() {
    let mut engine = engine(4, 4);
    let check = |engine: &mut Engine, request: Request, expected: &str| {
        let error = engine.submit(request).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(&mut engine, greedy(vec![], 1), "empty");
    check(&mut engine, greedy(vec![VOCAB as u32], 1), "outside the vocabulary");
    check(&mut engine, greedy(text(1000, 0), 1), "raise --context");
    let sampling = SamplingParams { top_p: 2.0, ..SamplingParams::default() };
    check(&mut engine, Request { sampling, ..greedy(vec![1], 1) }, "top_p");
}

#[test]
fn lengths_ends_and_grammars_are_kept() {
    struct Only(Vec<u32>);
    impl Constraint for Only {
        fn mask(&mut self, logits: &mut [f32]) {
            for (id, logit) in logits.iter_mut().enumerate() {
                if Some(id as u32) != self.0.last().copied() {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        fn accept(&mut self, token: u32) -> bool {
            assert_eq!(self.0.pop(), Some(token));
            !self.0.is_empty()
        }
    }
    for (samples, depth) in [(false, 0), (true, 0), (false, 3), (true, 8)] {
        let mut engine = engine_of(8, 4, samples).with_drafts(DraftDepth::Fixed(depth));
        let constraint = Some(Box::new(Only(vec![7, 8, 9])) as Box<dyn Constraint>);
        let grammar = engine.submit(Request { constraint, ..greedy(text(5, 1), 40) }).unwrap();
        let constraint = Some(Box::new(Only(vec![END, 8, 9])) as Box<dyn Constraint>);
        let complete = engine.submit(Request { constraint, min_tokens: 5, ..greedy(text(5, 1), 40) }).unwrap();
        let empty = engine.submit(greedy(text(5, 1), 0)).unwrap();
        let to_the_end = engine.submit(Request { eos: vec![], ..greedy(text(500, 1), 1000) }).unwrap();
        let everything: Vec<u32> = (0..VOCAB as u32).collect();
        let least =
            engine.submit(Request { eos: everything[1..].to_vec(), min_tokens: 3, ..greedy(text(5, 1), 9) }).unwrap();
        let results = run_all(&mut engine);
        assert_eq!(results[&grammar], (vec![9, 8, 7], Some(FinishReason::Stop)));
        assert_eq!(results[&complete], (vec![9, 8], Some(FinishReason::Stop)), "a complete grammar ends the text");
        assert_eq!(results[&empty], (vec![], Some(FinishReason::Length)));
        let (tokens, reason) = &results[&to_the_end];
        assert_eq!((tokens.len(), *reason), (8 * PAGE_SIZE - 500 + 1, Some(FinishReason::Length)));
        assert_eq!(results[&least].0, [END, END, END], "end tokens are not allowed before");
    }
}

#[test]
fn a_runner_that_samples_works_ahead_and_stops_where_it_must() {
    let mut engine = engine_of(16, 4, true);
    let prompts = [text(70, 1), text(5, 2), text(63, 3)];
    let ids: Vec<RequestId> = prompts.iter().map(|p| engine.submit(greedy(p.clone(), 30)).unwrap()).collect();
    let results = run_all(&mut engine);
    for (id, prompt) in ids.iter().zip(&prompts) {
        assert_eq!(results[id].0, expected(prompt, 30));
    }
    // A step for somebody who has gone is nobody's concern, and the next request is not disturbed by it.
    let gone = engine.submit(Request { eos: vec![], ..greedy(text(9, 4), 100) }).unwrap();
    let mut outputs = vec![];
    for _ in 0..3 {
        engine.step(&mut outputs).unwrap();
    }
    engine.cancel(gone);
    let id = engine.submit(greedy(prompts[0].clone(), 30)).unwrap();
    assert_eq!(run_all(&mut engine)[&id].0, expected(&prompts[0], 30));
    assert_eq!(engine.blocks().n_used(), 0);
    // Evaluation may come in between.
    let id = engine.submit(greedy(prompts[1].clone(), 30)).unwrap();
    engine.step(&mut outputs).unwrap();
    let mut sequence = Sequence::default();
    engine.run(&mut sequence, &prompts[2], 16, Logits::Last).unwrap();
    engine.release(&mut sequence);
    let mut tokens: Vec<u32> = outputs
        .iter()
        .filter(|o| o.request == id)
        .filter_map(|o| match o.event {
            Event::Token { id, .. } => Some(id),
            _ => None,
        })
        .collect();
    tokens.extend(&run_all(&mut engine)[&id].0);
    assert_eq!(tokens, expected(&prompts[1], 30));
}

#[test]
fn each_turn_of_a_conversation_runs_only_its_new_tokens() {
    let mut engine = engine(64, 4);
    let mut conversation = text(90, 1);
    for turn in 0..20 {
        let before = engine.counters();
        let n_prompt = conversation.len();
        let id = engine.submit(Request { eos: vec![], ..greedy(conversation.clone(), 30) }).unwrap();
        conversation.extend(&run_all(&mut engine)[&id].0);
        let after = engine.counters();
        if turn > 0 {
            // The answer's last token was never run, nor were the 25 of the next message.
            assert_eq!(after.prompt_tokens - before.prompt_tokens, 26, "turn {turn}");
            assert_eq!((after.cached_tokens - before.cached_tokens) as usize, n_prompt - 26);
        }
        conversation.extend(text(25, turn + 2));
    }
}

#[test]
fn pages_on_disk_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let open = || PageStore::open(dir.path(), "model", 1 << 20).unwrap();
    let prompt = text(300, 1);
    let mut first = engine(16, 4).with_page_store(open());
    first.submit(greedy(prompt.clone(), 5)).unwrap();
    run_all(&mut first);
    drop(first);
    let mut second = engine(16, 4).with_page_store(open());
    let id = second.submit(greedy(prompt.clone(), 5)).unwrap();
    assert_eq!(run_all(&mut second)[&id].0, expected(&prompt, 5));
    let counters = second.counters();
    assert_eq!((counters.disk_tokens, counters.prompt_tokens), (256, 44));
    // A page in memory that holds a part of one on disk does not stand in its way.
    let mut third = engine(16, 4).with_page_store(open());
    third.submit(greedy(prompt[..40].to_vec(), 5)).unwrap();
    run_all(&mut third);
    let id = third.submit(greedy(prompt.clone(), 5)).unwrap();
    assert_eq!(run_all(&mut third)[&id].0, expected(&prompt, 5));
    assert_eq!(third.counters().disk_tokens, 256);
    assert_eq!(third.blocks().n_used(), 0);
}

fn fable(max_rows: usize, max_batch: usize, n_pages: usize) -> Engine {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/fable-30m-MXFP4-Q8"));
    let config = ModelConfig::load(dir).unwrap();
    let backend = CpuBackend::new(2, CpuBackend::default_numerics());
    let limits = Limits { max_rows, max_logits_rows: max_batch };
    let model = tandem_model::load(&backend, &config, &Checkpoint::open(dir).unwrap(), limits, &mut |_| {}).unwrap();
    let blocks = BlockManager::for_tokens(n_pages * PAGE_SIZE);
    let runner = ModelRunner::new(backend, model, limits, config.vocab_size, blocks.n_slots());
    Engine::new(Box::new(runner), blocks, 512, config.max_position_embeddings)
}

/// With steps of at most 64 rows a text does not depend on the batch, on what the cache held, or on preemption.
#[test]
fn the_bundled_model_answers_in_a_batch_as_it_does_alone() {
    let request = |i: u32| {
        // Three different beginnings, the first of them longer than a page and than the sparse attention's top-k.
        let n = [150, 40, 70][i as usize % 3];
        let mut prompt: Vec<u32> = (0..n).map(|k| 20 + (k * 37 + i % 3 * 11) % 2800).collect();
        prompt.extend((0..i).map(|k| 100 + k * 7 + i));
        Request { prompt, max_tokens: 24, top_logprobs: Some(2), ..Request::default() }
    };
    let mut alone = vec![];
    for i in 0..12 {
        let mut single = fable(64, 1, 16);
        let id = single.submit(request(i)).unwrap();
        alone.push(run_all(&mut single).remove(&id).unwrap().0);
    }
    for n_pages in [64, 14] {
        let mut together = fable(64, 16, n_pages);
        let ids: Vec<RequestId> = (0..12).map(|i| together.submit(request(i)).unwrap()).collect();
        let results = run_all(&mut together);
        for (id, alone) in ids.iter().zip(&alone) {
            assert_eq!(&results[id].0, alone);
        }
        assert_eq!(together.counters().preemptions > 0, n_pages == 14);
        // Again, from what is in the cache now.
        let id = together.submit(request(9)).unwrap();
        assert_eq!(run_all(&mut together)[&id].0, alone[9]);
    }
}

/// Saved pages of a real cache give the same text.
#[test]
fn the_bundled_models_pages_survive_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let open = || PageStore::open(dir.path(), "fable", 1 << 30).unwrap();
    let prompt: Vec<u32> = (0..200).map(|k| 20 + (k * 37) % 2800).collect();
    let request = || Request { prompt: prompt.clone(), max_tokens: 16, ..Request::default() };
    let mut texts = vec![];
    for restart in 0..2 {
        let mut engine = fable(64, 1, 16).with_page_store(open());
        let id = engine.submit(request()).unwrap();
        texts.push(run_all(&mut engine).remove(&id).unwrap().0);
        assert_eq!(engine.counters().disk_tokens, [0, 192][restart]);
    }
    assert_eq!(texts[0], texts[1]);
}

/// Runs one request; its tokens, what the prefix cache knows after it, and the number of steps.
fn trace(engine: &mut Engine, request: Request) -> (Vec<u32>, (usize, usize), u64) {
    let before = engine.counters();
    let id = engine.submit(request).unwrap();
    let tokens = run_all(engine).remove(&id).unwrap().0;
    let blocks = engine.blocks();
    (tokens, (blocks.n_used(), blocks.n_idle()), engine.counters().steps - before.steps)
}

#[test]
fn drafts_save_steps_and_leave_the_same_cache() {
    // Texts that repeat themselves are looked up; others are drafted by a layer.
    for (samples, drafts) in [(false, None), (true, None), (false, Some(7)), (true, Some(7))] {
        let repeats = drafts.is_none();
        let mut plain = engine_with(24, samples, repeats, drafts);
        let mut drafting = engine_with(24, samples, repeats, drafts).with_drafts(DraftDepth::Fixed(4));
        for seed in 0..6 {
            for max_tokens in [0, 1, 2, 3, 60, 200] {
                let request = || Request { eos: vec![], ..greedy(text(90, seed), max_tokens) };
                let (tokens, pages, steps) = trace(&mut plain, request());
                let (drafted, drafted_pages, drafted_steps) = trace(&mut drafting, request());
                assert_eq!(tokens, drafted);
                // A runner that works ahead takes pages for steps that nobody wants, without drafts too.
                assert!(samples || pages == drafted_pages);
                let saves = max_tokens < 200 || 3 * drafted_steps < 2 * steps;
                assert!(drafted_steps <= steps && saves, "{drafted_steps} of {steps}");
            }
        }
        let (plain, drafting) = (plain.counters(), drafting.counters());
        let prompts = [plain, drafting].map(|counters| (counters.prompt_tokens, counters.cached_tokens));
        assert!(samples || prompts[0] == prompts[1]);
        assert_eq!(plain.generated_tokens, drafting.generated_tokens);
        assert_eq!(plain.drafts().drafts, 0);
        let drafts = drafting.drafts();
        assert!(drafts.accepted_tokens() > 500 && drafts.accepted_tokens() <= drafts.tokens);
        assert!(drafts.accepted.is_sorted_by(|a, b| a >= b) && drafts.accepted[4..] == [0; 4]);
        assert_eq!(drafting.mtp_drafts.drafts > 0, !repeats);
        // A layer that has seen every token before is right as often as it is made to be.
        let share = drafting.mtp_drafts.accepted[0] as f64 / drafting.mtp_drafts.drafts.max(1) as f64;
        assert!(repeats || (share - 7.0 / 8.0).abs() < 0.05, "{share}");
    }
}

/// With drafts a batch of the bundled model says the same, with greedy and with seeded sampling, penalties included.
#[test]
fn the_bundled_model_says_the_same_with_drafts() {
    let words: Vec<u32> = (0..40).map(|k| 20 + (k * 37) % 2800).collect();
    let request = |i: u32| {
        let sampling = match i % 4 {
            0 => SamplingParams::default(),
            1 => SamplingParams { temperature: 0.3, seed: Some(u64::from(i)), ..SamplingParams::default() },
            2 => SamplingParams { repetition_penalty: 1.1, frequency_penalty: 0.1, ..SamplingParams::default() },
            _ => SamplingParams { temperature: 1.0, top_p: 0.9, seed: Some(3), ..SamplingParams::default() },
        };
        // A prompt that repeats itself, so that there is something to look up; the first ones pass index_topk.
        let prompt = [&words[..], &words[..], &words[..10 + i as usize]].concat();
        Request { prompt, sampling, max_tokens: 60, top_logprobs: Some(1), ..Request::default() }
    };
    let mut texts = vec![];
    for depth in [0, 1, 5, 8] {
        let mut engine = fable(64, 64, 64).with_drafts(DraftDepth::Fixed(depth));
        let ids: Vec<RequestId> = (0..8).map(|i| engine.submit(request(i)).unwrap()).collect();
        let mut results = run_all(&mut engine);
        texts.push(ids.iter().map(|id| results.remove(id).unwrap()).collect::<Vec<_>>());
        assert_eq!(engine.counters().drafts().drafts > 0, depth > 0);
    }
    assert!(texts.iter().all(|text| *text == texts[0]));
}

/// Allows tokens by what it has accepted, and notes that.
struct Noting {
    accepted: std::sync::Arc<std::sync::Mutex<Vec<u32>>>,
    hash: u32,
}

impl Constraint for Noting {
    fn mask(&mut self, logits: &mut [f32]) {
        let shift = self.hash;
        for (id, logit) in logits.iter_mut().enumerate().filter(|(id, _)| (*id as u32 ^ shift) % 5 == 1) {
            *logit = if id == END as usize { *logit } else { f32::NEG_INFINITY };
        }
    }

    fn accept(&mut self, token: u32) -> bool {
        self.accepted.lock().unwrap().push(token);
        self.hash = self.hash.wrapping_mul(31).wrapping_add(token);
        true
    }
}

/// Two engines with few pages run the same requests, one of them with drafts that are right or wrong at random: texts, what
/// grammars saw, and what prompts find in the cache are the same all along.
#[test]
fn ten_thousand_schedules_of_drafts_leave_no_trace() {
    let mut n_drafts = 0;
    for (chance, samples, repeats) in [(0, false, true), (3, false, false), (6, true, false), (8, false, true)] {
        for depth in [1, 2, 4, 8] {
            let mut plain = engine_with(9, samples, repeats, Some(chance));
            let mut drafting = engine_with(9, samples, repeats, Some(chance)).with_drafts(DraftDepth::Fixed(depth));
            for schedule in 0..10_000u32.div_ceil(16) {
                let random = (schedule * 4 + chance as u32).wrapping_mul(2_654_435_761).rotate_left(9);
                let prompt = text(1 + (random % 150) as usize, random % 3);
                let mut seen = vec![];
                let mut run = |engine: &mut Engine| {
                    let accepted: std::sync::Arc<std::sync::Mutex<Vec<u32>>> = Default::default();
                    let noting = Noting { accepted: accepted.clone(), hash: random };
                    let constraint = random.is_multiple_of(3).then(|| Box::new(noting) as Box<dyn Constraint>);
                    let max_tokens = (random >> 8) as usize % 30;
                    let request = Request { constraint, ..greedy(prompt.clone(), max_tokens) };
                    let (tokens, pages, _) = trace(engine, request);
                    // A runner that works ahead takes pages for steps that nobody wants, without drafts too.
                    let pages = if samples { (0, 0) } else { pages };
                    seen.push((tokens, pages, accepted.lock().unwrap().clone()));
                };
                run(&mut plain);
                run(&mut drafting);
                assert_eq!(seen[0], seen[1], "depth {depth}, schedule {schedule}");
                let (a, b) = (plain.counters(), drafting.counters());
                assert!(samples || (a.prompt_tokens, a.cached_tokens) == (b.prompt_tokens, b.cached_tokens));
            }
            n_drafts += drafting.counters().drafts().drafts;
        }
    }
    assert!(n_drafts > 10_000, "{n_drafts}");
}
