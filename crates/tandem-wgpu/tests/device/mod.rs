//! Whether there is a device to test on.

use tandem_wgpu::device_present;

/// True, with a word on it, where there is none.
///
/// # Panics
/// When there is none and `TANDEM_REQUIRE_VULKAN` is set, as in continuous integration.
pub(crate) fn skipped() -> bool {
    let skip = !device_present();
    assert!(!skip || std::env::var_os("TANDEM_REQUIRE_VULKAN").is_none(), "no Vulkan or Metal device was found");
    if skip {
        eprintln!("skipped: no Vulkan or Metal device here");
    }
    skip
}
