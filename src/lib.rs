//! Switchboard keeps whole fleets of WhatsApp numbers connected.

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
#[cfg(feature = "sandbox")]
pub mod demo;
pub mod domain;
pub mod number;
#[cfg(feature = "sandbox")]
pub mod sandbox;
pub mod session;
pub mod store;
pub mod supervisor;
pub mod telemetry;
pub mod webhook;
