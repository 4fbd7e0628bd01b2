//! From a model's name to a model that is ready to run: typed options, the device, the files, other ranks.
//!
//! Owns the choice of device and the only list of backends ([`device`]), the division among ranks ([`ranks`]), loading
//! ([`load()`]), measuring ([`measured`]), judging ([`judge`])
//! and saying why a run is slow ([`diagnosis`]). It knows no flags and prints nothing: news go to the
//! caller ([`News`]).

mod bundled;
mod chat;
pub mod conversation;
pub mod device;
pub mod diagnosis;
pub mod judge;
mod load;
pub mod measured;
mod model_dir;
mod mtp;
mod news;
pub mod options;
pub mod presets;
pub mod ranks;
pub mod serving;
pub mod session;
pub mod units;

pub use chat::Chat;
pub use load::{Loaded, LogitsRows, Shape, load, settle_tie};
pub use model_dir::{hugging_face_cache, hugging_face_token, model_dir};
pub use news::{Meter, News, OnNews, Progress, Unit, ignore_news};
pub use options::{DeviceOptions, LoadOptions, ModelOptions, ParallelOptions};
