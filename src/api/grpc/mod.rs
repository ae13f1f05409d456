//! The gRPC wire. The only folder that knows tonic and prost; the client commands borrow its generated client.

mod capacity_service;
mod convert;
mod event_service;
mod limits;
mod message_service;
mod number_service;
mod operator_service;
pub mod orca;
pub mod proto;
pub mod server;
pub mod status;
mod stepwise;
mod tenant_service;
mod webhook_service;
