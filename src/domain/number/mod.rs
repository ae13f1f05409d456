//! The whole number as a pure machine: what it knows, what can happen to it, what must be done. The actor around
//! it only performs. Whatever must wait for the disk waits for [`Input::Stored`]; nothing is answered before.

mod connection;
mod erasing;
mod interface;
mod machine;
mod predicting;
mod receiving;
mod retaining;
mod sending;
mod taking;
mod timely;
mod webhooks;

pub use erasing::ERASURES_MAX;
pub use interface::EndpointOrder;
pub use interface::{Arrived, CancelOutcome, CancelTarget, OnUnknown, Receipted, ReplyId, SendingRules};
pub use interface::{Commit, Counted, Effect, Input, Reply, Retry, SendRequest, Snapshot, Ticket, Transmit};
pub use machine::Number;
pub use sending::{IDEMPOTENCY_KEPT, QUEUE_MAX};
