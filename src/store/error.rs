//! What can go wrong with a write or a read, in the terms a caller can act on, and why a data directory does not open.

use std::path::PathBuf;

use super::master::MasterKeyError;

/// The data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds it.
    #[error("data directory {0} is in use by another process")]
    InUse(PathBuf),
    /// Reading or writing it failed.
    #[error("data directory {path}: {error}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The control plane's own Db does not open.
    #[error("meta store: {0}")]
    Meta(#[from] StoreError),
    /// It was written by a version with another format.
    #[error("data directory {path} has format {found}; this version reads format {supported} only")]
    Format {
        /// Which one.
        path: PathBuf,
        /// The format it says it has.
        found: u32,
        /// The only one known here.
        supported: u32,
    },
    /// The master key is missing, wrong or open to others.
    #[error(transparent)]
    MasterKey(#[from] MasterKeyError),
}

/// A failure of the store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The disk said no. The volume is quarantined: nothing is written to it any more.
    #[error("the volume failed and is quarantined: {0}")]
    Failed(String),
    /// What is on disk cannot be trusted. The volume's files were moved aside, and nothing takes their place until an
    /// operator rebuilds it.
    #[error("the volume is damaged and was set aside: {0}")]
    Damaged(String),
    /// There is no room. The volume is quarantined until there is.
    #[error("the disk is full")]
    DiskFull,
    /// A newer incarnation owns the number.
    #[error("fenced: a newer incarnation owns the number")]
    Fenced,
    /// A check of the unit did not hold; nothing of it was written.
    #[error("a precondition of the write did not hold")]
    Conflict,
    /// The committer's queue is full.
    #[error("the volume's queue is full")]
    Busy,
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
    /// The number was deleted: its data key is gone, and with it whatever it wrote.
    #[error("the number was deleted")]
    Erased,
    /// A stored record cannot be read.
    #[error("a stored record cannot be read: {0}")]
    Corrupt(String),
    /// The unit breaks a limit of the store: a programmer's error, refused before it can hurt.
    #[error("the write is too large: {0}")]
    TooLarge(&'static str),
}
