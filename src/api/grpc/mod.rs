//! The gRPC wire. The only folder that knows tonic and prost; the client commands borrow its generated client.

pub mod proto;
