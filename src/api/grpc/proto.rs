//! Code generated from `proto/switchboard/v1`, and the descriptor set behind the reflection service.

#![allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::nursery,
    clippy::restriction,
    reason = "generated"
)]

tonic::include_proto!("switchboard.v1");

/// Every message, service and comment, encoded as a `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("switchboard.v1.descriptor");
