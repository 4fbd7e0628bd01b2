//! Prints the kernels as the one program that NVRTC compiles, for scripts/check-cuda-kernels.

fn main() {
    print!("{}", tandem_cuda::kernel_source());
}
