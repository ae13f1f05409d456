//! The whole number as a pure machine: what it knows, what can happen to it, what must be done. The actor around
//! it only performs. Whatever must wait for the disk waits for [`Input::Stored`]; nothing is answered before.

mod connection;
mod interface;
mod machine;
mod receiving;
mod retaining;
mod sending;
mod webhooks;

pub use interface::{Arrived, Receipted, ReplyId, SendRequest, Snapshot, Ticket};
pub use interface::{Commit, Counted, Effect, Input, Reply, Retry, Transmit};
pub use machine::Number;
pub use sending::{IDEMPOTENCY_KEPT, QUEUE_MAX};
