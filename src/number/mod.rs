//! The actor of one number: a thin shell around `domain::number`. It performs what the machine decides and feeds
//! back what happened; it never waits for the network or the disk.

pub mod actor;
mod crossing;
mod deliver;
mod effects;
pub mod environment;
pub mod handle;
pub mod message;
mod session_pump;
