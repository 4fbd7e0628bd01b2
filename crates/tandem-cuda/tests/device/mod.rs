//! Whether these tests have a device to run on.

/// False, and a word about it, where there is no device.
///
/// # Panics
/// When there is none although `TANDEM_REQUIRE_CUDA` is 1.
pub(crate) fn is_here() -> bool {
    let is_here = tandem_cuda::device_present();
    let is_required = std::env::var_os("TANDEM_REQUIRE_CUDA").is_some_and(|value| value == "1");
    assert!(is_here || !is_required, "TANDEM_REQUIRE_CUDA is 1, but no NVIDIA device was found");
    if !is_here {
        eprintln!("skipped: no NVIDIA device here; scripts/gpu-check runs this on one");
    }
    is_here
}
