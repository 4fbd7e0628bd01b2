//! A cache page of any bytes in the place of a page: it is either the page that was written or missing.

#![no_main]

mod shared;

use libfuzzer_sys::fuzz_target;
use shared::in_folder;
use tandem_engine::PageStore;

fuzz_target!(|data: &[u8]| {
    let Some((name, content)) = data.split_first_chunk::<32>() else { return };
    in_folder(|dir| {
        let _ = std::fs::remove_dir_all(dir.join("model"));
        let mut store = PageStore::open(dir, "model", 1 << 24).expect("a folder of its own");
        store.write([1; 32], vec![7; 100]);
        drop(store);
        let digits: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(dir.join("model").join(digits + ".page"), content).expect("writable");
        let mut store = PageStore::open(dir, "model", 1 << 24).expect("a folder of its own");
        // The fuzzer sees both sides of a comparison and so finds right checksums: then the page is what was written here.
        for hash in [*name, [1; 32]] {
            if let Some(page) = store.read(&hash) {
                assert!(page == [7; 100] && hash == [1; 32] || hash == *name && content[..content.len() - 32] == page);
            }
        }
    });
});
