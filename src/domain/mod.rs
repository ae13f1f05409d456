//! The rules, pure: no async, no clock, no randomness, no I/O. Everything here can be replayed from its inputs.

pub mod access;
pub mod ack;
pub mod breaker;
pub mod budget;
pub mod capacity;
pub mod change;
pub mod close;
pub mod delivery;
pub mod endpoint;
pub mod event;
pub mod gate;
pub mod id;
pub mod lifecycle;
pub mod limiter;
pub mod message;
pub mod number;
pub mod orders;
pub mod outbox;
pub mod phone;
pub mod proxy;
pub mod restart;
pub mod retention;
pub mod time;
pub mod trouble;
pub mod version;
pub mod webhook;
