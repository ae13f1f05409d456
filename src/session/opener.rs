//! How the actor of a number gets a session without knowing which protocol it will speak.

use async_trait::async_trait;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::contract::{SessionEvent, SessionHandle};
use crate::domain::lifecycle::LinkBy;
use crate::domain::phone::Phone;
use crate::domain::proxy::Proxy;
use crate::store::error::StoreError;
use crate::store::number_store::NumberStore;

/// What the session is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpenPurpose {
    /// Link a new device; any phone but the expected one is refused.
    Pair {
        /// The number that must scan.
        expected: Phone,
        /// What it is given.
        by: LinkBy,
    },
    /// Log in with the stored device.
    Connect,
}

/// Everything a session needs.
#[derive(Debug)]
pub struct OpenRequest {
    /// The number's records; the session keeps its keys there.
    pub store: NumberStore,
    /// What for.
    pub purpose: OpenPurpose,
    /// What to connect through, if anything.
    pub proxy: Option<Proxy>,
    /// The number's only slot, held until the socket is really gone.
    pub slot: OwnedSemaphorePermit,
    /// Where events go.
    pub events: mpsc::Sender<Box<SessionEvent>>,
    /// The number's span, for the logs.
    pub span: tracing::Span,
}

/// Opens sessions of one kind.
#[async_trait]
pub trait Opener: Send + Sync {
    /// Starts a session and returns at once. It ends with exactly one `Closed`.
    fn open(&self, request: OpenRequest) -> SessionHandle;

    /// Whether the store holds credentials.
    async fn is_linked(&self, store: &NumberStore) -> bool;

    /// Drops the credentials and everything that belongs to them; a new link must not inherit any of it.
    ///
    /// # Errors
    /// When the store fails.
    async fn forget(&self, store: &NumberStore) -> Result<(), StoreError>;
}
