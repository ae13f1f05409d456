//! A loopback WhatsApp for the demo, the tests and the benches: real Noise, real binary nodes, real Signal.
//!
//! `server` accepts, `connection` owns one socket, the stanza modules decide, `world` holds the accounts and carries
//! stanzas between them, `phone` is the person behind every number. Never part of a default build.

pub mod account;
pub mod address;
pub mod admin;
pub mod appstate;
pub mod authenticator;
pub mod backlog;
pub mod certificate;
pub mod connection;
pub mod error;
pub mod faults;
pub mod handshake;
pub mod link;
pub mod login;
pub mod message;
pub mod pair_code;
pub mod pairing;
pub mod passkey;
pub mod persistence;
pub mod phone;
pub mod prekeys;
pub mod query;
pub mod receipt;
pub mod server;
pub mod signal_store;
pub mod stanza;
pub mod stats;
pub mod usync;
pub mod world;
