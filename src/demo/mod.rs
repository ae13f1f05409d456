//! The newcomer's first command: the whole product on one machine, each step verified from outside, through the
//! same gRPC and webhooks a customer uses. Also what the end-to-end tests and benches stand on.

pub mod client;
pub mod phones;
pub mod sink;
pub mod story;
