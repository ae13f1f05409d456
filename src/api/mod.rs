//! What a caller may do: use cases with authorisation, in domain types, and the two wires they are reached by.

pub mod capacity;
pub mod drain;
pub mod error;
pub mod events;
pub mod grpc;
pub mod history;
pub mod http;
pub mod keys;
pub mod messages;
pub mod numbers;
pub mod operator;
pub mod pairing;
pub mod service;
pub mod tenants;
mod token;
pub mod webhooks;
