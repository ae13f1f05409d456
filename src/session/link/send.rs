//! Sends. One at a time per chat, in the order they were asked for; a few chats at once. The library blocks for
//! a minute on a dead connection, so that is asked first and everything has a deadline.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::Instrument;
use whatsapp_rust::waproto::whatsapp as wa;
use whatsapp_rust::{Client, ErrorChainExt, Freshness, Jid, SendError as LibraryError, SendOptions};

use super::backend::LinkBackend;
use super::contact::address_of;
use super::signals::Signals;
use crate::domain::close::CloseReason;
use crate::domain::message::Content;
use crate::domain::outbox::Devices;
use crate::domain::phone::Contact;
use crate::session::contract::{Outgoing, SendError, SessionEvent};
use crate::store::number_store::NumberStore;
use crate::telemetry::failpoint::{self, Failpoint};

/// Chats written to at once.
const CHATS_AT_ONCE_MAX: usize = 8;
/// Sends waiting for their chat; the number itself keeps the real queue.
const WAITING_MAX: usize = 256;
/// Longest time one send may take. An unanswered question to the server takes the library 75 s.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time the question may take whether a first-time recipient exists.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// What a send needs.
pub(super) struct Wire {
    pub(super) client: Arc<Client>,
    pub(super) backend: Arc<LinkBackend>,
    pub(super) store: NumberStore,
}

/// The sends of one session.
pub(super) struct Outbound {
    signals: Arc<Signals>,
    wire: Arc<Wire>,
    span: tracing::Span,
    /// One entry per chat that is being written to; its queue waits for the message in flight.
    chats: HashMap<String, VecDeque<Outgoing>>,
    /// Chats that wait for a free place.
    parked: VecDeque<(String, Outgoing)>,
    waiting: usize,
    running: JoinSet<String>,
}

fn chat_of(contact: &Contact) -> String {
    contact.addresses().into_iter().next().unwrap_or_default()
}

impl Outbound {
    pub(super) fn new(signals: Arc<Signals>, wire: Wire, span: tracing::Span) -> Self {
        Self {
            signals,
            wire: Arc::new(wire),
            span,
            chats: HashMap::new(),
            parked: VecDeque::new(),
            waiting: 0,
            running: JoinSet::new(),
        }
    }

    /// What others may send with.
    pub(super) fn wire(&self) -> Arc<Wire> {
        self.wire.clone()
    }

    /// Takes a message; its answer comes as `Written` or `NotWritten`.
    pub(super) fn take(&mut self, message: Outgoing) {
        if self.waiting >= WAITING_MAX {
            self.signals.tell(SessionEvent::NotWritten { seq: message.seq, error: SendError::Other });
            return;
        }
        let chat = chat_of(&message.to);
        if let Some(queue) = self.chats.get_mut(&chat) {
            queue.push_back(message);
            self.waiting += 1;
        } else if self.running.len() < CHATS_AT_ONCE_MAX {
            self.start(chat, message);
        } else {
            self.parked.push_back((chat, message));
            self.waiting += 1;
        }
    }

    fn start(&mut self, chat: String, message: Outgoing) {
        self.chats.entry(chat.clone()).or_default();
        let signals = self.signals.clone();
        let wire = self.wire.clone();
        let sending = async move {
            let seq = message.seq;
            let event = match send(&wire, &signals, message).await {
                Ok(()) => SessionEvent::Written { seq },
                Err(error) => SessionEvent::NotWritten { seq, error },
            };
            signals.deliver(event).await;
            chat
        };
        self.running.spawn(sending.instrument(self.span.clone()));
    }

    /// Waits for a send to end and starts what waited for it. Never resolves while nothing is sent.
    pub(super) async fn progress(&mut self) {
        match self.running.join_next().await {
            None => std::future::pending().await,
            Some(Ok(chat)) => self.proceed(&chat),
            Some(Err(error)) => {
                if error.is_panic() {
                    self.signals.end(CloseReason::Crashed);
                }
            }
        }
    }

    fn proceed(&mut self, chat: &str) {
        match self.chats.get_mut(chat).and_then(VecDeque::pop_front) {
            Some(next) => {
                self.waiting -= 1;
                self.start(chat.to_owned(), next);
            }
            None => {
                self.chats.remove(chat);
            }
        }
        while self.running.len() < CHATS_AT_ONCE_MAX {
            let Some((chat, message)) = self.parked.pop_front() else {
                break;
            };
            match self.chats.get_mut(&chat) {
                Some(queue) => queue.push_back(message),
                None => {
                    self.waiting -= 1;
                    self.start(chat, message);
                }
            }
        }
    }

    /// Ends the sends: what is in flight gets a moment, the rest is answered as offline.
    pub(super) async fn close(mut self, patience: Duration) {
        let waiting = self.chats.drain().flat_map(|(_, queue)| queue);
        let parked = self.parked.drain(..).map(|(_, message)| message);
        for message in waiting.chain(parked) {
            self.signals.tell(SessionEvent::NotWritten { seq: message.seq, error: SendError::Offline });
        }
        let ended = async { while self.running.join_next().await.is_some() {} };
        if timeout(patience, ended).await.is_err() {
            // A dropped send answers nothing: the number treats it like one without an acknowledgement.
            self.running.abort_all();
            while self.running.join_next().await.is_some() {}
        }
    }
}

async fn send(wire: &Wire, signals: &Signals, message: Outgoing) -> Result<(), SendError> {
    let client = &wire.client;
    if !signals.is_online() || !client.is_connected() || !client.is_logged_in() {
        return Err(SendError::Offline);
    }
    let to = address_of(&message.to).ok_or(SendError::Invalid)?;
    let body = body_of(&message.content).ok_or(SendError::Invalid)?;
    if !exists(wire, &message.to, &to).await {
        return Err(SendError::NoSuchRecipient);
    }
    let mut options = SendOptions::default().with_message_id(message.whatsapp_id);
    if message.devices == Devices::Refreshed {
        forget_sessions(client, &to).await?;
        options = options.with_device_freshness(Freshness::Refresh);
    }
    failpoint::reach(Failpoint::WireBefore);
    // Boxed: the library's send is a large state machine.
    let sending = Box::pin(client.send_message_with_options(to, body, options));
    match timeout(SEND_TIMEOUT, sending).await {
        Ok(Ok(_)) => {
            failpoint::reach(Failpoint::WireAfter);
            Ok(())
        }
        Ok(Err(error)) => Err(classify(&error, wire, signals)),
        Err(_) => Err(SendError::TimedOut),
    }
}

/// WhatsApp refused a message for what we believe of the recipient's devices: the next attempt begins with new
/// sessions. Device lists are the library's, which asks for them again by itself when told so.
async fn forget_sessions(client: &Client, to: &Jid) -> Result<(), SendError> {
    let forget = async {
        let known = client.signal().get_user_devices(std::slice::from_ref(to)).await?;
        client.signal().delete_sessions(&known).await
    };
    match timeout(LOOKUP_TIMEOUT, Box::pin(forget)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(SendError::Other),
    }
}

pub(super) fn body_of(content: &Content) -> Option<wa::Message> {
    match content {
        Content::Text(text) => Some(wa::Message { conversation: Some(text.clone()), ..Default::default() }),
        Content::Other(_) | Content::Undecryptable | Content::NotKept => None,
    }
}

/// Whether the recipient has an account. The library does not ask: to an unknown number it writes to the bare
/// address and leaves the rest to the server. Asked once per recipient, for a device list answers it later.
async fn exists(wire: &Wire, contact: &Contact, to: &Jid) -> bool {
    let phone = contact.phone.as_ref().map(|phone| phone.digits());
    let lid = contact.lid.as_ref().map(|lid| &*lid.0);
    for user in phone.into_iter().chain(lid) {
        if wire.backend.knows_devices_of(user).await {
            return true;
        }
    }
    let asked = [to.clone()];
    let contacts = wire.client.contacts();
    match timeout(LOOKUP_TIMEOUT, Box::pin(contacts.is_on_whatsapp(&asked))).await {
        Ok(Ok(answers)) => answers.is_empty() || answers.iter().any(|answer| answer.is_registered),
        // Not knowing is no reason to refuse: the send itself will tell.
        Ok(Err(_)) | Err(_) => true,
    }
}

fn classify(error: &LibraryError, wire: &Wire, signals: &Signals) -> SendError {
    let kind = if error.store_failure().is_some() || wire.store.is_poisoned() {
        signals.end(CloseReason::StoreFailed);
        SendError::StoreFailed
    } else if error.is_timeout() {
        SendError::TimedOut
    } else if error.is_transport_unavailable() || matches!(error, LibraryError::NotLoggedIn) {
        SendError::Offline
    } else if matches!(error, LibraryError::InvalidRequest(_)) {
        SendError::Invalid
    } else if error.server_rejection().is_some_and(|rejection| rejection.code == 404) {
        SendError::NoSuchRecipient
    } else {
        SendError::Other
    };
    // The library's text may name the recipient; the kind does not.
    tracing::debug!(?kind, "message not written");
    kind
}
