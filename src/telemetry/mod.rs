//! What every part measures with: clock, randomness, backoff, metrics, logs. The only folder that reads the system's
//! clock and its source of randomness.

pub mod backoff;
pub mod clock;
pub mod collector;
pub mod descriptors;
pub mod failpoint;
pub mod load;
pub mod logging;
pub mod metrics;
pub mod number_stats;
pub mod panic_hook;
mod redaction;
pub mod rng;
pub mod service_manager;
