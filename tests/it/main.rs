//! End to end: the real binary as a child process, the sandbox, a webhook receiver; everything through the public
//! gRPC, JSON and webhooks. Tests wait on conditions, never on the clock; what takes hours puts the daemon's clock
//! forward.
//!
//! Which test guards which promise:
//!
//! | promise | guarded by |
//! | --- | --- |
//! | each answer of WhatsApp to a send (400, 404, 421, 429, 463, 475, 479, 5xx, unknown, none) | `answers` |
//! | what nobody knows of is sent again under its id, or failed (`on_unknown`), also over a log-out | `answers` |
//! | a full queue is refused, a repeat is answered all the same | `answers::a_full_queue_says_so_…` |
//! | scheduled sends, deadlines, withdrawals; a lock survives a kill | `outbox` |
//! | one request id, one message: also when the answer died with the daemon | `contract`, `outbox`, `restart` |
//! | what cannot be decrypted keeps its place and is filled; repeats show once; an id used twice swallows nothing | `inbound` |
//! | webhooks: attempts, dead letters, filters, pauses, replays, 410, one that hangs beside others | `webhooks` |
//! | webhooks: `Retry-After`, redirects, resets, trickles, garbage, two secrets during a rotation | `hostile` |
//! | streams: resumed without a gap, markers, expired cursors, slow readers, drain | `streams`, `surface` |
//! | retention: days, relay-only, an erased contact, a deleted number | `retention`, `sealing`, `streams` |
//! | kills, drain, what was under way | `restart`, `outbox` |
//! | a disk that is full or fails | `disk` |
//! | crashes and lost connections stay with their number; tenants see nothing of each other | `failures`, `isolation` |
//! | keys, scopes, errors, health, metrics | `contract`, `surface` |
#![cfg(feature = "sandbox")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    clippy::large_futures,
    unreachable_pub,
    missing_docs,
    reason = "a test that cannot go on may panic"
)]

mod answers;
mod contract;
mod demo;
mod disk;
mod failures;
mod harness;
mod hostile;
mod inbound;
mod isolation;
mod outbox;
mod restart;
mod retention;
mod sealing;
mod story;
mod streams;
mod surface;
mod webhooks;
