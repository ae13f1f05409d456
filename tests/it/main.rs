//! End to end: the real binary as a child process, the sandbox, a webhook receiver; everything through the public
//! gRPC, JSON and webhooks. Tests wait on conditions, never on the clock.
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
