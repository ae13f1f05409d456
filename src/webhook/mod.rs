//! The only outgoing HTTP to customers: what is sent, how it is signed, where it may go, and the client that sends it.
//! When it is sent again is decided by `domain::webhook`.

pub mod client;
pub mod guard;
pub mod payload;
pub mod room;
pub mod signature;
