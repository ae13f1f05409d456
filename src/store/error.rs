//! What can go wrong with a write or a read, in the terms a caller can act on.

/// A failure of the store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The disk said no. The volume is quarantined: nothing is written to it any more.
    #[error("the volume failed and is quarantined: {0}")]
    Failed(String),
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
    /// A stored record cannot be read.
    #[error("a stored record cannot be read: {0}")]
    Corrupt(String),
    /// The unit breaks a limit of the store: a programmer's error, refused before it can hurt.
    #[error("the write is too large: {0}")]
    TooLarge(&'static str),
}
