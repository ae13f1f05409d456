//! Between the session and the actor: waits for the slot, opens, then turns every event into a message, looking up
//! on disk what the machine needs to know. Works one event at a time, so their order is kept.

use std::sync::Arc;
use std::time::Duration;

use ractor::ActorRef;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use super::message::{ConnectionNo, FromSession, Inner, NumberMessage};
use crate::domain::change::SeenKey;
use crate::domain::close::CloseReason;
use crate::domain::message::{Content, MessageStatus};
use crate::domain::number::{Arrived, Receipted};
use crate::domain::outbox::Standing;
use crate::domain::proxy::Proxy;
use crate::domain::time::Timestamp;
use crate::session::contract::{EVENTS_MAX, Incoming, NotDurable, ReceiptKind, SessionEvent};
use crate::session::opener::{OpenPurpose, OpenRequest, Opener};
use crate::store::error::StoreError;
use crate::store::number_store::NumberStore;
use crate::telemetry::metrics;

/// How long a new session waits for the previous one's socket to be gone.
const SLOT_WAIT: Duration = Duration::from_secs(10);
/// Events of one number in the actor's mailbox at once.
const CREDITS: usize = 64;
/// Messages made durable in one unit.
const BATCH_MESSAGES_MAX: usize = 32;
/// Text made durable in one unit, in bytes; it is stored twice (history and event).
const BATCH_TEXT_MAX: usize = 128 * 1024;
/// Longest text kept of one message, in bytes; four times what WhatsApp shows.
const TEXT_BYTES_MAX: usize = 256 * 1024;

pub(super) struct SessionPump {
    pub(super) actor: ActorRef<NumberMessage>,
    pub(super) connection: ConnectionNo,
    pub(super) store: NumberStore,
    pub(super) opener: Arc<dyn Opener>,
    pub(super) slot: Arc<Semaphore>,
    pub(super) proxy: Option<Proxy>,
    pub(super) purpose: OpenPurpose,
    pub(super) span: tracing::Span,
}

impl SessionPump {
    /// Runs one session from its slot to its end.
    pub(super) async fn run(self) {
        let Ok(Ok(slot)) = tokio::time::timeout(SLOT_WAIT, self.slot.clone().acquire_owned()).await else {
            metrics::slot_timeout();
            self.tell(FromSession::Closed(CloseReason::Crashed), None);
            return;
        };
        // Linking starts only from a state in which the old credentials, if any, are dead.
        if matches!(self.purpose, OpenPurpose::Pair { .. }) && self.opener.forget(&self.store).await.is_err() {
            self.tell(FromSession::Closed(CloseReason::StoreFailed), None);
            return;
        }
        let (events, mut incoming) = mpsc::channel(EVENTS_MAX);
        let request = OpenRequest {
            store: self.store.clone(),
            purpose: self.purpose.clone(),
            proxy: self.proxy.clone(),
            slot,
            events,
            span: self.span.clone(),
        };
        let session = self.opener.open(request);
        self.tell(FromSession::Opened(session.commands), None);
        let credits = Arc::new(Semaphore::new(CREDITS));
        let mut closed = false;
        let mut durables = JoinSet::new();
        while let Some(event) = incoming.recv().await {
            closed = matches!(*event, SessionEvent::Closed(_));
            while durables.try_join_next().is_some() {}
            let Ok(credit) = credits.clone().acquire_owned().await else { break };
            // Boxed: between two events a session that says nothing needs no room for one.
            match Box::pin(self.resolve(*event, &mut durables)).await {
                Ok(Some(event)) => self.tell(event, Some(credit)),
                Ok(None) => {}
                Err(_) => {
                    // The disk cannot be read: the store is poisoned by its next write; the session goes now.
                    self.store.poison();
                    break;
                }
            }
            if closed {
                break;
            }
        }
        if !closed {
            self.tell(FromSession::Closed(CloseReason::Crashed), None);
        }
    }

    fn tell(&self, event: FromSession, credit: Option<tokio::sync::OwnedSemaphorePermit>) {
        let _ = self.actor.cast(Inner::Session(self.connection, event, credit).into());
    }

    async fn resolve(
        &self,
        event: SessionEvent,
        durables: &mut JoinSet<()>,
    ) -> Result<Option<FromSession>, StoreError> {
        Ok(Some(match event {
            SessionEvent::QrCode { code, valid_for } => FromSession::QrCode { code, valid_for },
            SessionEvent::PairingCode { code, valid_for } => FromSession::PairingCode { code, valid_for },
            SessionEvent::PasskeyRequest { options, valid_for } => FromSession::PasskeyRequest { options, valid_for },
            SessionEvent::PasskeyCode { code, valid_for } => FromSession::PasskeyCode { code, valid_for },
            SessionEvent::Paired { .. } => FromSession::Paired,
            SessionEvent::Online => FromSession::Online,
            SessionEvent::Alive => FromSession::Alive,
            SessionEvent::Troubled(trouble) => FromSession::Troubled(trouble),
            SessionEvent::Relieved(trouble) => FromSession::Relieved(trouble),
            SessionEvent::ServerTime(at) => FromSession::ServerTime(at),
            SessionEvent::Usage(usage) => FromSession::Usage(usage),
            SessionEvent::Written { .. } => FromSession::Written,
            SessionEvent::NotWritten { seq, error } => FromSession::NotWritten { seq, error },
            SessionEvent::Acked { whatsapp_id, error } => FromSession::Acked { whatsapp_id, error },
            SessionEvent::Closed(reason) => FromSession::Closed(reason),
            SessionEvent::Receipt { whatsapp_ids, kind, at, durable, .. } => {
                let messages = self.receipted(&whatsapp_ids).await?;
                if messages.is_empty() {
                    let _ = durable.send(Ok(()));
                    return Ok(None);
                }
                let (done, stored) = oneshot::channel();
                // Not waited for here: receipts of one moment share a write.
                durables.spawn(async move {
                    let _ = durable.send(stored.await.map_err(|_| NotDurable));
                });
                FromSession::Receipts { messages, status: status_of(kind), at, durable: done }
            }
            SessionEvent::Lock(answer) => FromSession::Lock(answer),
            SessionEvent::Inbound { messages, durable } => {
                self.take_in(messages, durable).await?;
                return Ok(None);
            }
        }))
    }

    async fn receipted(&self, whatsapp_ids: &[String]) -> Result<Vec<Receipted>, StoreError> {
        let mut messages = Vec::with_capacity(whatsapp_ids.len());
        for whatsapp_id in whatsapp_ids {
            let Some(record) = self.store.outbound_with(whatsapp_id).await? else { continue };
            let Some(to) = self.store.contact(record.chat).await? else { continue };
            messages.push(Receipted {
                seq: record.seq,
                whatsapp_id: record.whatsapp_id,
                chat: record.chat,
                to,
                correlation_id: record.correlation_id,
                progress: self.store.progress(record.seq).await?,
            });
        }
        Ok(messages)
    }

    /// Makes a batch durable, in units the store can hold, then tells the session.
    async fn take_in(
        &self,
        messages: Vec<Incoming>,
        durable: oneshot::Sender<Result<(), NotDurable>>,
    ) -> Result<(), StoreError> {
        let begun = tokio::time::Instant::now();
        let mut batch = Vec::new();
        let mut text = 0;
        let mut rest = messages.into_iter().peekable();
        while let Some(message) = rest.next() {
            text += message.content.text().len();
            batch.push(self.arrived(message).await?);
            let full = batch.len() >= BATCH_MESSAGES_MAX || text >= BATCH_TEXT_MAX;
            if full || rest.peek().is_none() {
                text = 0;
                let (done, stored) = oneshot::channel();
                self.tell(FromSession::Arrived { messages: std::mem::take(&mut batch), durable: done }, None);
                if stored.await.is_err() {
                    // The actor is gone; whoever comes next gets these messages again.
                    let _ = durable.send(Err(NotDurable));
                    return Ok(());
                }
            }
        }
        metrics::inbound_durable(begun.elapsed());
        let _ = durable.send(Ok(()));
        Ok(())
    }

    async fn arrived(&self, mut message: Incoming) -> Result<Arrived, StoreError> {
        if let Content::Text(text) = &mut message.content {
            let end = text.floor_char_boundary(TEXT_BYTES_MAX);
            text.truncate(end);
        }
        let chat = self.store.chat_of(&message.chat).await?;
        let (mut seen, mut standing, mut placeholder) = (false, Standing::New, None);
        if let Some(chat) = chat {
            let key = SeenKey {
                chat,
                direction: message.direction,
                whatsapp_id: message.whatsapp_id.clone(),
                digest: message.digest,
            };
            seen = self.store.has_seen(&key).await?;
            if !seen {
                standing = self.store.standing(chat).await?;
                placeholder = self.store.placeholder(key).await?.map(Box::new);
            }
        }
        Ok(Arrived {
            contact: message.chat,
            chat,
            seen,
            standing,
            placeholder,
            direction: message.direction,
            whatsapp_id: message.whatsapp_id,
            digest: message.digest,
            sender_name: message.sender_name,
            content: message.content,
            written_at: clamp(message.written_at),
        })
    }
}

/// A sender's clock can say anything; what it says must still be a date.
fn clamp(at: Timestamp) -> Timestamp {
    const YEAR_9999: u64 = 253_402_300_799_000;
    Timestamp(at.0.min(YEAR_9999))
}

fn status_of(kind: ReceiptKind) -> MessageStatus {
    match kind {
        ReceiptKind::Delivered => MessageStatus::Delivered,
        ReceiptKind::Read => MessageStatus::Read,
        ReceiptKind::Played => MessageStatus::Played,
    }
}
