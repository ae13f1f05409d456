//! The HTTP wire. The only folder that knows axum: the JSON API of the seed, the admin pages, and the listener that
//! carries gRPC and JSON on one port.

pub mod admin;
mod admission;
mod answer;
mod body;
mod history;
mod load;
mod messages;
mod numbers;
pub mod server;
mod webhooks;
