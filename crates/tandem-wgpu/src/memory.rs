//! How much memory a GPU has, which only its driver's own interface says.

/// Bytes of the device's own memory, or of what the system lets it use of the processor's.
#[cfg(not(target_vendor = "apple"))]
#[allow(unsafe_code)]
pub(crate) fn bytes(adapter: &wgpu::Adapter) -> Option<u64> {
    /// VK_MEMORY_HEAP_DEVICE_LOCAL_BIT
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the handle is only asked for properties, while the adapter lives.
    unsafe {
        let adapter = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        let instance = adapter.shared_instance().raw_instance();
        let properties = instance.get_physical_device_memory_properties(adapter.raw_physical_device());
        let heaps = properties.memory_heaps.iter().take(properties.memory_heap_count as usize);
        heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).max()
    }
}

/// Bytes of the device's own memory, or of what the system lets it use of the processor's.
#[cfg(target_vendor = "apple")]
pub(crate) fn bytes(_: &wgpu::Adapter) -> Option<u64> {
    None
}
