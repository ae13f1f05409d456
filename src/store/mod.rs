//! The only folder that knows sled. One small Db for what the daemon as a whole knows (`meta`), four volume Dbs
//! for the numbers. A number is one key range of one volume, so one batch is atomic over everything it owns.

mod chunk;
mod committer;
mod disk;
pub mod error;
pub mod key;
mod keyring;
pub mod layout;
mod linger;
pub mod master;
pub mod mender;
pub mod meta;
pub mod number_store;
mod open;
pub mod records;
pub mod seal;
pub mod secret_file;
pub mod storage;
mod sweep;
#[cfg(test)]
mod tests;
pub mod unit;
mod volume;
mod webhooks;
