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

/// Load reports as other balancers read them; the modules are nested as the packages are.
pub mod xds {
    pub mod data {
        pub mod orca {
            pub mod v3 {
                tonic::include_proto!("xds.data.orca.v3");
            }
        }
    }
    pub mod service {
        pub mod orca {
            pub mod v3 {
                tonic::include_proto!("xds.service.orca.v3");
            }
        }
    }
}

/// Every message, service and comment, encoded as a `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("switchboard.v1.descriptor");
