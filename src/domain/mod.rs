//! The rules, pure: no async, no clock, no randomness, no I/O. Everything here can be replayed from its inputs.

pub mod access;
pub mod close;
pub mod event;
pub mod id;
pub mod message;
pub mod phone;
pub mod time;
pub mod webhook;
