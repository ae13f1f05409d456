//! What a caller may do: use cases with authorisation, in domain types, and the two wires they are reached by.

pub mod grpc;
