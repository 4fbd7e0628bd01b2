//! `tandem devices`: what models can run on here.

use serde_json::{Value, json};
use tandem_runtime::device;

use crate::cli::DevicesArgs;

pub(crate) fn devices(args: &DevicesArgs) -> anyhow::Result<()> {
    let found = device::found();
    if args.json {
        let list: Vec<Value> = found
            .into_iter()
            .map(|device| {
                let mut json = device.json;
                json.insert("backend".into(), device.backend.into());
                Value::Object(json)
            })
            .collect();
        println!("{}", json!({ "devices": list }));
    } else {
        found.iter().for_each(|device| println!("{:<5} {}", device.backend, device.name));
    }
    Ok(())
}
