//! The door of this folder: opens a session and returns at once.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::driver::drive;
use super::environment::LinkEnvironment;
use crate::domain::lifecycle::LinkBy;
use crate::domain::phone::Phone;
use crate::domain::proxy::Proxy;
use crate::session::contract::{COMMANDS_MAX, SessionEvent, SessionHandle};
use crate::store::number_store::NumberStore;

/// What a session is for.
#[derive(Debug, Clone)]
pub enum Purpose {
    /// Show codes until a phone scans one, then log in. Any other phone than the expected one is refused before
    /// it is accepted.
    Pair {
        /// The number this link is for.
        expected: Phone,
        /// What it is given.
        by: LinkBy,
    },
    /// Log in with the credentials in the store.
    Connect,
}

/// What a session needs.
#[derive(Debug)]
pub struct LinkParams {
    /// The number's store.
    pub store: NumberStore,
    /// Pair or connect.
    pub purpose: Purpose,
    /// What to connect through, if anything.
    pub proxy: Option<Proxy>,
    /// The number's right to a socket; given back before `Closed` is told.
    pub slot: OwnedSemaphorePermit,
    /// Where events go. [`SessionEvent::Closed`] is the last one; dropping the receiver closes the session.
    pub events: mpsc::Sender<Box<SessionEvent>>,
    /// The span of everything the session logs: it names the number by its opaque id.
    pub span: tracing::Span,
}

/// Opens a session. Its tasks belong to the environment; dropping the handle closes it politely.
#[must_use = "dropping the handle closes the session"]
pub fn open(environment: &Arc<LinkEnvironment>, params: LinkParams) -> SessionHandle {
    let (commands, received) = mpsc::channel(COMMANDS_MAX);
    environment.own(drive(environment.clone(), params, received));
    SessionHandle { commands }
}
