//! Faults on purpose: the real daemon is killed, at random and at failpoints, and its connections are cut, while
//! messages flow in both directions. Afterwards phones, histories, webhooks and streams are compared from outside.
//! README.md, "What it survives", has the long runs.
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

mod kill;
mod line;
mod load;
mod process;
mod proxy;
mod sink;
mod verdict;
mod world;
