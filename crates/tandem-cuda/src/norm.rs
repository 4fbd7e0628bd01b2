//! RMS norms, with an addition or a sum over ranks on their way.

use tandem_core::backend::{AddRmsNorm, RmsNorm};

use crate::CudaBackend;
use crate::args;
use crate::buffer::CudaBuffer;

impl CudaBackend {
    pub(crate) fn enqueue_rms_norm(&self, op: RmsNorm<'_, CudaBuffer>) {
        let RmsNorm { x, weight, eps, n_rows, out } = op;
        self.norm(x, None, weight, eps, n_rows, out);
    }

    pub(crate) fn enqueue_add_rms_norm(&self, op: AddRmsNorm<'_, CudaBuffer>) {
        let AddRmsNorm { x, y, weight, eps, n_rows, out } = op;
        x.written();
        if let Some(sum) = y.pending.take() {
            let args = norm_args(x, Some(y), weight, eps, n_rows, out);
            let threads = weight.width().div_ceil(8).next_multiple_of(32);
            return self.launch("all_reduce_norm", (n_rows, 1, 1), threads, &mut args![sum, args]);
        }
        self.norm(x, Some(y), weight, eps, n_rows, out);
    }

    fn norm(
        &self,
        x: &CudaBuffer,
        y: Option<&CudaBuffer>,
        weight: &CudaBuffer,
        eps: f32,
        n_rows: usize,
        out: &mut CudaBuffer,
    ) {
        let args = norm_args(x, y, weight, eps, n_rows, out);
        let threads = weight.width().div_ceil(8).next_multiple_of(32).clamp(64, 1024);
        self.launch("rms_norm", (n_rows, 1, 1), threads, &mut args![args]);
    }
}

pub(crate) fn norm_args(
    x: &CudaBuffer,
    y: Option<&CudaBuffer>,
    weight: &CudaBuffer,
    eps: f32,
    n_rows: usize,
    out: &CudaBuffer,
) -> args::NormArgs {
    let packed = out.packed_output(n_rows);
    args::NormArgs {
        x: x.pointer(),
        y: y.map_or(0, CudaBuffer::pointer),
        weight: weight.pointer(),
        out: out.pointer(),
        packed: packed.pointer,
        x_pitch: x.width() as u32,
        y_pitch: y.map_or(0, |y| y.width() as u32),
        out_pitch: out.width() as u32,
        packed_pitch: packed.pitch as u32,
        width: weight.width() as u32,
        eps,
    }
}
