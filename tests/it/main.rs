//! End to end: the real binary as a child process, the sandbox, a webhook receiver; everything through the public
//! gRPC, JSON and webhooks. Tests wait on conditions, never on the clock.
#![cfg(feature = "sandbox")]

mod contract;
mod demo;
mod failures;
mod harness;
mod isolation;
mod restart;
mod story;
mod surface;
