//! The command line: one binary that is the daemon and, in a sandbox build, the loopback WhatsApp and the demo.

mod arguments;
mod exit;
mod runtime;

pub use runtime::run;
