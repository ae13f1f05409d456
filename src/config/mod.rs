//! What an operator may set. `default.toml` is the documentation, the list of keys and the defaults in one; a file and
//! the environment lie on top of it. Every mistake is reported at once, with its place.

pub mod error;
mod layers;
pub mod sections;
