//! Measuring several ranks: rank 0 asks the others to fill their caches and what they measured.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tandem_core::backend::{CacheKind, TensorGroup};
use tandem_core::{Backend, Batch, ModelConfig};
use tandem_cpu::{Pool, system};
use tandem_engine::{DistributedRunner, EngineError, Operation, OperationTimes, Profile, Profiled, RankTimes, Runner};

use super::runner::MeasuredRunner;
use crate::device::Device;
use crate::load::Shape;
use crate::news::{News, OnNews};
use crate::options::ParallelOptions;
use crate::ranks::{self, Answers, Joined, Model, RankBackend};

/// What rank 0 asks.
#[derive(Serialize, Deserialize)]
enum Question {
    /// Random vectors in this many slots of the cache.
    Fill(usize),
    /// Bytes per second that the rank's threads read, f64.
    Bandwidth,
    /// Start to measure, operations one by one if asked.
    Start { profile: bool },
    /// Stop; a [`RankReport`].
    Stop,
}

/// What one rank did between start and stop. Times are sums in ms.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RankReport {
    /// Its pipeline stage.
    pub stage: usize,
    /// By operation, as in [`Operation::ALL`]; zeros without a profile.
    pub operations: Vec<f64>,
    /// Different experts in all runs of its MoE layers, and the number of these runs.
    pub experts: (u64, u64),
    /// Computing.
    pub working: f64,
    /// In sums over a tensor-parallel group.
    pub summing: f64,
    /// Waiting for the stage before.
    pub receiving: f64,
    /// Handing activations on.
    pub sending: f64,
    /// Pages read from a disk.
    pub major_faults: u64,
    /// Memory of the process at the end, where the weights lie in it and the system tells.
    pub resident_bytes: Option<u64>,
}

impl RankReport {
    pub(super) fn new<D: Device>(profile: &Profile, times: &RankTimes, faults_before: u64) -> RankReport {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        RankReport {
            stage: 0,
            operations: Operation::ALL.iter().map(|o| ms(profile.time(*o))).collect(),
            experts: profile.experts(),
            working: ms(times.working),
            summing: ms(times.summing),
            receiving: ms(times.receiving),
            sending: ms(times.sending),
            major_faults: system::major_page_faults() - faults_before,
            resident_bytes: system::resident_memory_bytes().filter(|_| D::HOLDS_IN_PROCESS),
        }
    }
}

/// One value per stage: the mean of its ranks' and the smallest.
pub fn by_stage(reports: &[RankReport], value: impl Fn(&RankReport) -> f64) -> (f64, f64) {
    let (mut means, mut least) = (0.0, 0.0);
    for stage in reports.chunk_by(|a, b| a.stage == b.stage) {
        means += stage.iter().map(&value).sum::<f64>() / stage.len() as f64;
        least += stage.iter().map(&value).fold(f64::INFINITY, f64::min);
    }
    (means, least)
}

/// Sums of a device for its stopwatch.
struct Through<D: Backend>(Arc<dyn TensorGroup<D>>);

impl<D: Backend> TensorGroup<Profiled<D>> for Through<D> {
    fn begin_layer(&self, backend: &Profiled<D>, layer: usize, hidden: &D::Buffer, n_rows: usize) {
        self.0.begin_layer(backend.inner(), layer, hidden, n_rows);
    }

    fn all_reduce(&self, backend: &Profiled<D>, x: &mut D::Buffer, n_rows: usize, part: &'static str) {
        self.0.all_reduce(backend.inner(), x, n_rows, part);
    }
}

impl<D: Device> RankBackend for Profiled<D> {
    type Device = D;

    fn of(device: D) -> Self {
        device.profiled()
    }

    fn device(&self) -> &D {
        self.inner()
    }

    fn through(group: Arc<dyn TensorGroup<D>>) -> Arc<dyn TensorGroup<Self>> {
        Arc::new(Through(group))
    }

    fn operation_times(&self) -> Option<Arc<OperationTimes>> {
        Profiled::operation_times(self)
    }

    fn answers(config: &ModelConfig) -> Option<Answers<Self>> {
        let (config, mut faults) = (config.clone(), 0);
        Some(Box::new(move |backend, cache, times, question| {
            match serde_json::from_slice(question) {
                Ok(Question::Fill(n_slots)) => cache.fill_random(backend, &config, n_slots, 1),
                Ok(Question::Bandwidth) => {
                    return backend.inner().bandwidth_of_rank().to_le_bytes().to_vec();
                }
                Ok(Question::Start { profile }) => {
                    (*times, faults) = (RankTimes::default(), system::major_page_faults());
                    if profile {
                        backend.start();
                    }
                }
                Ok(Question::Stop) => {
                    let report = RankReport::new::<D>(&backend.stop(), times, faults);
                    return serde_json::to_vec(&report).unwrap_or_default();
                }
                Err(error) => tracing::error!("rank 0 asked something else than expected: {error}"),
            }
            vec![]
        }))
    }
}

/// Rank 0 of a benchmark.
struct Ranks<D: Backend> {
    runner: DistributedRunner<Profiled<D>>,
    bandwidth: f64,
}

/// Loads rank 0's part; also the name of the numerics.
pub(super) fn load<D: Device>(
    joined: Joined,
    parallel: &ParallelOptions,
    sync_every: usize,
    model: &Model,
    shape: Shape<'_>,
    on_news: OnNews<'_>,
) -> anyhow::Result<(Box<dyn MeasuredRunner>, &'static str)> {
    let Shape { limits, n_slots, .. } = shape;
    let (runner, numerics, _) =
        ranks::lead::<Profiled<D>>(joined, model, parallel, limits, n_slots, sync_every, on_news)?;
    let mut ranks = Ranks { runner, bandwidth: 0.0 };
    ranks.bandwidth = ranks.measure_bandwidth(on_news)?;
    Ok((Box::new(ranks), numerics))
}

impl<D: Device> Ranks<D> {
    fn ask(&mut self, ranks: std::ops::Range<usize>, question: &Question) -> anyhow::Result<Vec<Vec<u8>>> {
        Ok(self.runner.ask(ranks, &serde_json::to_vec(question)?)?)
    }

    /// Bytes of one token over the time in which memory alone would deliver them: the ranks of a stage read at the same
    /// time, stages one after the other.
    fn measure_bandwidth(&mut self, on_news: OnNews<'_>) -> anyhow::Result<f64> {
        let (n_stages, size) = (self.runner.plan().n_stages, self.runner.plan().tensor_size);
        let (mut bytes, mut seconds) = (0.0, 0.0);
        for stage in 0..n_stages {
            let ranks = stage * size..(stage + 1) * size;
            let answers = self.ask(ranks.clone(), &Question::Bandwidth)?;
            let mut slowest = 0.0f64;
            for (rank, answer) in ranks.zip(answers) {
                let bandwidth = answer.first_chunk().map(|b| f64::from_le_bytes(*b)).context("a rank's bandwidth")?;
                let read = self.runner.plan().ranks[rank].read_bytes as f64;
                on_news(News::Note(format!("read bandwidth of rank {rank}: {:.2} GB/s", bandwidth / 1e9)));
                bytes += read;
                slowest = slowest.max(read / bandwidth);
            }
            seconds += slowest;
        }
        Ok(bytes / seconds)
    }
}

impl<D: Device> MeasuredRunner for Ranks<D> {
    fn step(&mut self, batch: Batch, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        self.runner.step(batch, logits)
    }

    fn start(&mut self, profile: bool) -> anyhow::Result<()> {
        let n = self.runner.plan().ranks.len();
        self.ask(0..n, &Question::Start { profile }).map(drop)
    }

    fn stop(&mut self) -> anyhow::Result<Vec<RankReport>> {
        let size = self.runner.plan().tensor_size;
        let answers = self.ask(0..self.runner.plan().ranks.len(), &Question::Stop)?;
        let report = |(rank, answer): (usize, &Vec<u8>)| {
            let report: RankReport = serde_json::from_slice(answer).context("a rank's report")?;
            Ok(RankReport { stage: rank / size, ..report })
        };
        answers.iter().enumerate().map(report).collect()
    }

    fn fill_cache(&mut self, _: &ModelConfig, n_slots: usize) -> anyhow::Result<()> {
        let n = self.runner.plan().ranks.len();
        self.ask(0..n, &Question::Fill(n_slots)).map(drop)
    }

    fn cache_bytes(&self, kind: CacheKind, width: usize) -> usize {
        self.runner.backend().cache_bytes(kind, width)
    }

    fn bandwidth(&self) -> f64 {
        self.bandwidth
    }

    fn pool(&self) -> Option<Arc<Pool>> {
        None
    }

    fn peak(&self) -> Option<f64> {
        None
    }

    fn index_agreement(&self, _: usize, _: usize, _: usize, _: usize) -> Option<f64> {
        None
    }

    fn peak_memory_bytes(&self) -> u64 {
        system::peak_memory_bytes()
    }

    fn name(&self) -> String {
        let plan = self.runner.plan();
        let (stages, size) = (plan.n_stages, plan.tensor_size);
        format!("{stages} stages of {size} ranks, {} each", Device::name(self.runner.backend().inner()))
    }

    fn describe(&self) -> Map<String, Value> {
        let plan = self.runner.plan();
        let ranks: Vec<Value> = plan
            .ranks
            .iter()
            .enumerate()
            .map(|(rank, planned)| {
                json!({
                    "host": self.runner.host(rank),
                    "layers": [planned.part.layers.start, planned.part.layers.end],
                    "weight_bytes": planned.weight_bytes,
                    "read_bytes": planned.read_bytes,
                })
            })
            .collect();
        let mut map = self.runner.backend().inner().describe();
        map.insert("pipeline_stages".into(), json!(plan.n_stages));
        map.insert("tensor_ranks".into(), json!(plan.tensor_size));
        map.insert("ranks".into(), json!(ranks));
        map
    }
}
