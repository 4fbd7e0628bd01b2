//! The choice of experts, and mixtures of them.

use tandem_core::backend::Routing;
use tandem_core::weights::MatrixData;
use tandem_core::{Backend, DType};

use super::products::{activations, columns, mlp_budget, product};
use crate::data::{AFFINE8, coarse, matrix, noise, sampled};
use crate::subject::MlpData;
use crate::tolerance::{Budget, EVEN};
use crate::{Case, Oracle, Subject, Suite, alike, compare, same};

pub(crate) fn run<B: Backend>(suite: &mut Suite<B>, batches: &[usize]) {
    let one_row = batches.len() == 1;
    for (n_experts, n_group, topk_group, top_k) in
        [(16, 1, 1, 4), (256, 1, 1, 8), (256, 8, 4, 8), (32, 1, 1, 6), (16, 4, 2, 4), (4, 1, 1, 1)]
    {
        let (first_expert, n_held) = (n_experts / 4, n_experts / 2);
        let routing = Routing { top_k, n_group, topk_group, normalize: n_group > 1, scale: 2.5, first_expert, n_held };
        for n in batches {
            suite.case(&Choose { n_experts, routing, n: *n });
            for dtype in [DType::BF16, DType::F32, AFFINE8] {
                suite.case(&Route { gate: matrix(dtype, 1, n_experts, 192, 6), routing, n: *n });
            }
        }
    }
    // Nine of twelve experts are held; the others are somebody else's.
    let held = Routing { top_k: 3, n_group: 1, topk_group: 1, normalize: true, scale: 2.5, first_expert: 2, n_held: 9 };
    let (hidden, inter, wide) = (192, 64, 128);
    let stack =
        |dtype, n, width| [(width, hidden), (width, hidden), (hidden, width)].map(|(r, c)| matrix(dtype, n, r, c, 1));
    for (dtype, shared_dtype) in
        [(DType::Mxfp4, AFFINE8), (AFFINE8, AFFINE8), (AFFINE8, DType::BF16), (DType::BF16, DType::Mxfp4)]
    {
        let experts = stack(dtype, 9, inter);
        for n in batches {
            for shared in [None, Some(inter), Some(wide)] {
                let shared = shared.map(|width| stack(shared_dtype, 1, width));
                suite.case(&Moe { experts: experts.clone(), n_experts: 12, shared, routing: held, n: *n, only: None });
            }
        }
    }
    for n in batches.iter().take(3) {
        // Every expert of these rows is on another rank.
        let elsewhere = Routing { first_expert: 500, ..held };
        let experts = stack(DType::Mxfp4, 9, inter);
        for shared in [None, Some(stack(AFFINE8, 1, wide))] {
            suite.case(&Moe { experts: experts.clone(), n_experts: 12, shared, routing: elsewhere, n: *n, only: None });
        }
    }
    if !one_row {
        for dtype in [DType::Mxfp4, AFFINE8, DType::BF16] {
            suite.case(&SameInAnyBatch {
                experts: stack(dtype, 9, 256),
                shared: stack(AFFINE8, 1, 256),
                routing: held,
            });
        }
    }
}

/// [`Backend::router_topk`]: the very experts, in the same order, ties too.
pub(crate) struct Choose {
    pub(crate) n_experts: usize,
    pub(crate) routing: Routing,
    pub(crate) n: usize,
}

impl Choose {
    fn run<B: Backend>(&self, b: &Subject<B>) -> (Vec<i32>, Vec<f32>) {
        let mut logits = noise(21, self.n * self.n_experts);
        // Equal logits, whose order the bias decides, and where that is equal too the lower index.
        logits[..self.n_experts].iter_mut().for_each(|v| *v = (*v * 4.0).round());
        let mut bias = noise(22, self.n_experts);
        bias[self.n_experts / 2..].fill(0.25);
        b.router_topk(&logits, &bias, &self.routing)
    }
}

/// Weights of experts: the exponential, a sum and a division in sigmoid, the sum over experts, a division and a factor.
fn routing_weights(routing: &Routing) -> Budget {
    Budget::steps(8).and(Budget::sum(routing.top_k))
}

impl Case for Choose {
    type Expected = (Vec<i32>, Vec<f32>);

    fn name(&self) -> String {
        let Routing { top_k, n_group, topk_group, .. } = self.routing;
        format!("router_topk {top_k} of {} in {topk_group} of {n_group} groups n={}", self.n_experts, self.n)
    }

    fn expected(&self, oracle: &Oracle) -> Self::Expected {
        self.run(oracle)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, (ids, weights): &Self::Expected) -> Result<(), String> {
        let (found_ids, found_weights) = self.run(b);
        alike("experts", &found_ids, ids)?;
        compare("weights", &found_weights, weights, 0.0, routing_weights(&self.routing))
    }
}

/// [`Backend::route`]: logits within the tolerance of a product, and of those logits the very experts.
pub(crate) struct Route {
    pub(crate) gate: MatrixData,
    pub(crate) routing: Routing,
    pub(crate) n: usize,
}

impl Route {
    fn input(&self) -> Vec<f32> {
        noise(23, self.n * self.gate.cols)
    }

    fn bias(&self) -> Vec<f32> {
        noise(24, self.gate.rows)
    }
}

impl Case for Route {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        let Routing { top_k, n_group, topk_group, .. } = self.routing;
        let MatrixData { name, rows, cols, .. } = &self.gate;
        format!("route {name} {rows}x{cols} {top_k} in {topk_group} of {n_group} groups n={}", self.n)
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        oracle.linear(&self.input(), self.n, &[&self.gate]).remove(0)
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        let (logits, ids, weights) = b.route(&self.input(), self.n, &self.gate, &self.bias(), &self.routing);
        let rounding = Budget::rounded(activations(b.precision, self.gate.dtype, self.n), EVEN);
        let budget = product(b.precision, self.gate.dtype, self.n, self.gate.cols).and(rounding);
        compare("logits", &logits, expected, (self.gate.cols as f64 / 9.0).sqrt(), budget)?;
        let (expected_ids, expected_weights) = crate::scalar(1).router_topk(&logits, &self.bias(), &self.routing);
        alike("experts", &ids, &expected_ids)?;
        compare("weights", &weights, &expected_weights, 0.0, routing_weights(&self.routing))
    }
}

/// [`Backend::moe`] on the experts that [`Backend::router_topk`] chooses.
pub(crate) struct Moe {
    pub(crate) experts: MlpData,
    /// Experts that the router knows.
    pub(crate) n_experts: usize,
    pub(crate) shared: Option<MlpData>,
    pub(crate) routing: Routing,
    pub(crate) n: usize,
    /// Columns of the result that are compared; all if none.
    pub(crate) only: Option<Vec<usize>>,
}

impl Moe {
    fn run<B: Backend>(&self, b: &Subject<B>, experts: &MlpData, shared: Option<&MlpData>) -> Vec<f32> {
        let x = coarse(3, self.n * experts[0].cols);
        b.moe(&x, self.n, experts, shared, &noise(17, self.n * self.n_experts), &self.routing)
    }
}

impl Case for Moe {
    type Expected = Vec<f32>;

    fn name(&self) -> String {
        let [gate, ..] = &self.experts;
        let shared = self
            .shared
            .as_ref()
            .map_or("nothing shared".into(), |[gate, ..]| format!("{} of {} shared", gate.name, gate.rows));
        let Routing { top_k, first_expert, n_held, .. } = self.routing;
        let held = format!("{top_k} of {} experts, {n_held} from {first_expert} held", self.n_experts);
        format!("moe {} {}x{}, {shared}, {held} n={}", gate.name, gate.rows, gate.cols, self.n)
    }

    fn bytes(&self) -> usize {
        let [gate, ..] = &self.experts;
        gate.parts.len() * gate.dtype.weight_bytes(gate.rows, gate.cols)
    }

    fn expected(&self, oracle: &Oracle) -> Vec<f32> {
        let cut = |mlp: &MlpData| {
            let [gate, up, down] = mlp.clone();
            [gate, up, self.only.as_ref().map_or(down.clone(), |rows| sampled(&down, rows))]
        };
        self.run(oracle, &cut(&self.experts), self.shared.as_ref().map(cut).as_ref())
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Vec<f32>) -> Result<(), String> {
        let found = self.run(b, &self.experts, self.shared.as_ref());
        let found = columns(found, self.experts[2].rows, self.only.as_deref());
        // Each expert has its own error; the larger part of the sum has the larger part of it, so the sum of both bounds
        // what they are together.
        let shared = self.shared.as_ref().map_or(Budget::exact(), |mlp| mlp_budget(b.precision, mlp, self.n));
        let budget = mlp_budget(b.precision, &self.experts, self.n).and(shared);
        compare("outputs", &found, expected, 0.0, budget.and(routing_weights(&self.routing)))
    }
}

/// A row's mixture does not depend on the rest of its batch, of up to 64 rows.
struct SameInAnyBatch {
    experts: MlpData,
    shared: MlpData,
    routing: Routing,
}

impl Case for SameInAnyBatch {
    type Expected = ();

    fn name(&self) -> String {
        format!("moe {}, the same in any batch", self.experts[0].name)
    }

    fn expected(&self, _: &Oracle) {}

    fn check<B: Backend>(&self, b: &Subject<B>, (): &()) -> Result<(), String> {
        let (hidden, n_experts) = (self.experts[0].cols, self.experts[0].parts.len() + 3);
        let (x, logits) = (coarse(3, 64 * hidden), noise(17, 64 * n_experts));
        let run = |first: usize, n: usize| {
            let (x, logits) = (&x[first * hidden..][..n * hidden], &logits[first * n_experts..][..n * n_experts]);
            b.moe(x, n, &self.experts, Some(&self.shared), logits, &self.routing)
        };
        let all = run(0, 64);
        for (first, n) in [(0, 1), (63, 1), (7, 2), (3, 5), (40, 20)] {
            same(&format!("rows {first} to {}", first + n), &run(first, n), &all[first * hidden..][..n * hidden])?;
        }
        Ok(())
    }
}

/// [`Backend::moe`] with stacks that take a while to load: several batches with one loading.
pub(crate) struct LargeMoe {
    pub(crate) experts: MlpData,
    pub(crate) shared: MlpData,
    pub(crate) routing: Routing,
    pub(crate) batches: [usize; 3],
    /// Columns of the result that are compared.
    pub(crate) only: Vec<usize>,
}

impl LargeMoe {
    fn run<B: Backend>(&self, b: &Subject<B>, experts: &MlpData, shared: &MlpData) -> Vec<Vec<f32>> {
        let (inner, hidden, n_experts) = (experts[0].cols, experts[2].rows, experts[0].parts.len());
        let (experts, shared) = (b.load_mlp(experts), b.load_mlp(shared));
        let run = |n: usize| {
            let (x, logits) = (coarse(3, n * inner), noise(17, n * n_experts));
            b.moe_loaded((&x, n, hidden), &experts, Some(&shared), (&logits, n_experts), &self.routing)
        };
        self.batches.iter().map(|n| run(*n)).collect()
    }
}

impl Case for LargeMoe {
    type Expected = Vec<Vec<f32>>;

    fn name(&self) -> String {
        let [gate, ..] = &self.experts;
        let Routing { top_k, n_group, .. } = self.routing;
        let of = gate.parts.len();
        format!(
            "moe {} {}x{}, {top_k} of {of} experts in {n_group} groups, shared one",
            gate.name, gate.rows, gate.cols
        )
    }

    fn bytes(&self) -> usize {
        let [gate, ..] = &self.experts;
        gate.parts.len() * gate.dtype.weight_bytes(gate.rows, gate.cols)
    }

    fn expected(&self, oracle: &Oracle) -> Self::Expected {
        let cut = |[gate, up, down]: &MlpData| [gate.clone(), up.clone(), sampled(down, &self.only)];
        self.run(oracle, &cut(&self.experts), &cut(&self.shared))
    }

    fn check<B: Backend>(&self, b: &Subject<B>, expected: &Self::Expected) -> Result<(), String> {
        let hidden = self.experts[2].rows;
        for ((n, found), expected) in self.batches.iter().zip(self.run(b, &self.experts, &self.shared)).zip(expected) {
            let found = columns(found, hidden, Some(&self.only));
            let both = [&self.experts, &self.shared].map(|mlp| mlp_budget(b.precision, mlp, *n));
            let budget = both[0].and(both[1]).and(routing_weights(&self.routing));
            compare(&format!("outputs of {n} rows"), &found, expected, 0.0, budget)?;
        }
        Ok(())
    }
}
