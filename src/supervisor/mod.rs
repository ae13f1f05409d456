//! Keeps every number's actor running: a root over sixteen shards, each the supervisor of its share of the numbers;
//! the directory everybody finds numbers in; the gate that limits how fast sessions are opened.

pub mod directory;
mod eraser;
pub mod fleet;
pub mod gate;
pub mod proxies;
mod root;
mod shard;
