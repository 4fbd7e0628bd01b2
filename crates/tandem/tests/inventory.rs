//! The full-size GLM-5.1 MXFP4-Q8 checkpoint, as sparse files: 405 GB that nothing may read.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use common::{golden, tandem, temporary, text};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const RESIDENT_BYTES: u64 = 405_480_321_024;
const READ_BYTES: u64 = 31_464_573_312;
const INDEX_QUERY_BYTES: u64 = 711_499_776;
const N_SHARDS: usize = 8;

struct Inventory {
    config: Value,
    /// Name to type, shape and bytes.
    tensors: BTreeMap<String, (String, Value, u64)>,
}

/// Tensors from `tests/golden/inventory/glm51.json`; experts' mxfp4 listed over an affine default, as mlx-lm writes it.
fn inventory() -> Inventory {
    let file = std::fs::read_to_string(golden("inventory/glm51.json")).expect("glm51.json");
    let inventory: Value = serde_json::from_str(&file).expect("JSON");
    let mut quantization = Map::new();
    quantization.extend([
        ("group_size".into(), json!(64)),
        ("bits".into(), json!(8)),
        ("mode".into(), json!("affine")),
    ]);
    let mut tensors = BTreeMap::new();
    for module in inventory["mlx_mxfp4_q8"]["modules"].as_array().expect("modules") {
        let path = module["path"].as_str().expect("a path");
        let layers = module["layers"].as_array().expect("layers");
        let paths = match layers.as_slice() {
            [] => vec![path.to_string()],
            layers => layers.iter().map(|layer| path.replace("{L}", &layer.to_string())).collect(),
        };
        for path in paths {
            if module["quantization"]["mode"] == "mxfp4" {
                quantization.insert(path.clone(), module["quantization"].clone());
            }
            for (leaf, tensor) in module["tensors"].as_object().expect("tensors") {
                let dtype = tensor["dtype"].as_str().expect("a type").to_string();
                let bytes = tensor["bytes"].as_u64().expect("bytes");
                tensors.insert(format!("{path}.{leaf}"), (dtype, tensor["shape"].clone(), bytes));
            }
        }
    }
    assert_eq!(Some(tensors.len() as u64), inventory["mlx_mxfp4_q8"]["tensors"].as_u64());
    let mut config = inventory["config"].clone();
    config["quantization"] = Value::Object(quantization);
    Inventory { config, tensors }
}

/// Writes config.json, the index and, if asked, the shards: headers, then holes.
fn write(inventory: &Inventory, shards: bool) -> TempDir {
    let dir = temporary();
    std::fs::write(dir.path().join("config.json"), inventory.config.to_string()).expect("writable");
    let name = |shard: usize| format!("model-{:05}-of-{N_SHARDS:05}.safetensors", shard + 1);
    let shard_of = |i: usize| i * N_SHARDS / inventory.tensors.len();
    let map: Map<String, Value> =
        inventory.tensors.keys().enumerate().map(|(i, tensor)| (tensor.clone(), json!(name(shard_of(i))))).collect();
    let index = json!({"metadata": {"total_size": RESIDENT_BYTES}, "weight_map": map});
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).expect("writable");
    for shard in 0..if shards { N_SHARDS } else { 0 } {
        let (mut header, mut end) = (Map::new(), 0);
        for (_, (tensor, (dtype, shape, bytes))) in
            inventory.tensors.iter().enumerate().filter(|(i, _)| shard_of(*i) == shard)
        {
            let start = end;
            end += bytes;
            header.insert(tensor.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
        }
        let mut header = serde_json::to_vec(&header).expect("JSON");
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = File::create(dir.path().join(name(shard))).expect("creates");
        file.write_all(&(header.len() as u64).to_le_bytes()).expect("writable");
        file.write_all(&header).expect("writable");
        file.set_len(8 + header.len() as u64 + end).expect("sparse files");
    }
    dir
}

/// Inspects the folder and checks the published numbers.
#[track_caller]
fn check(dir: &TempDir, weights_present: bool) {
    let start = Instant::now();
    let found = tandem(&["inspect", &text(dir.path()), "--json"]).json();
    assert!(start.elapsed() < Duration::from_secs(5), "inspect took {:?}: did it read the weights?", start.elapsed());
    assert_eq!(found["weights_present"], weights_present);
    assert_eq!(found["resident_bytes"], RESIDENT_BYTES);
    assert_eq!(found["read_bytes_per_token"], READ_BYTES);
    assert_eq!(found["read_bytes_per_token_below_index_topk"], READ_BYTES - INDEX_QUERY_BYTES);
    assert_eq!(found["mtp_head"], false);
}

#[test]
fn a_sparse_checkpoint_passes_the_strict_check() {
    let dir = write(&inventory(), true);
    check(&dir, true);
    let size: u64 = std::fs::read_dir(dir.path())
        .expect("readable")
        .map(|e| e.and_then(|e| e.metadata()).expect("readable").len())
        .sum();
    assert!(size > RESIDENT_BYTES, "the shards are as long as the published ones");
    let table = tandem(&["inspect", &text(dir.path())]).ok();
    assert!(table.contains("405,480,321,024") && table.contains("31,464,573,312"), "{table}");
}

#[test]
fn the_index_alone_gives_the_same_numbers() {
    check(&write(&inventory(), false), false);
}

#[test]
fn the_strict_check_sees_what_is_missing() {
    let mut inventory = inventory();
    inventory.tensors.remove("model.layers.40.mlp.switch_mlp.down_proj.scales").expect("was there");
    for shards in [true, false] {
        let done = tandem(&["inspect", &text(write(&inventory, shards).path())]);
        assert_eq!(done.code, Some(1), "shards {shards}");
        assert!(done.stderr.contains("model.layers.40.mlp.switch_mlp.down_proj.scales is missing"), "{}", done.stderr);
    }
}
