//! The handle others hold on a live connection: wake it for its backlog, pass it a stanza of its own, end it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use tokio::sync::Notify;
use whatsapp_rust::wacore_binary::Node;

/// Stanzas a connection may have waiting outside its backlog; more means that nobody reads it.
const MAILBOX_LIMIT: usize = 64;

/// How a connection ends.
#[derive(Debug, Clone)]
pub enum Farewell {
    /// The socket disappears without a word.
    Drop,
    /// This stanza, then the end.
    Stanza(Box<Node>),
}

/// A live connection as seen by the rest of the sandbox.
#[derive(Default)]
pub struct Link {
    wake: Notify,
    gone: Notify,
    is_gone: AtomicBool,
    mailbox: Mutex<Mailbox>,
}

#[derive(Default)]
struct Mailbox {
    stanzas: Vec<Node>,
    farewell: Option<Farewell>,
}

impl Link {
    /// Tells the connection that its backlog has grown.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Hands over a stanza that belongs to this connection only; false when it does not read.
    pub fn post(&self, node: Node) -> bool {
        let mut mailbox = self.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
        if mailbox.stanzas.len() >= MAILBOX_LIMIT {
            return false;
        }
        mailbox.stanzas.push(node);
        drop(mailbox);
        self.wake();
        true
    }

    /// Ends the connection; the first farewell counts.
    pub fn end(&self, farewell: Farewell) {
        let mut mailbox = self.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
        mailbox.farewell.get_or_insert(farewell);
        drop(mailbox);
        self.wake();
    }

    /// Waits until there may be something to do.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Takes what others have left.
    pub fn collect(&self) -> (Vec<Node>, Option<Farewell>) {
        let mut mailbox = self.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut mailbox.stanzas), mailbox.farewell.take())
    }

    /// Says that the socket is closed.
    pub fn mark_gone(&self) {
        self.is_gone.store(true, Ordering::Release);
        self.gone.notify_waiters();
    }

    /// Whether the socket is closed.
    pub fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }

    /// Waits until the socket is closed.
    pub async fn until_gone(&self) {
        let gone = self.gone.notified();
        if !self.is_gone() {
            gone.await;
        }
    }
}
