//! What a step wants to be on disk, in the domain's terms. The store knows how each is written.

use serde::{Deserialize, Serialize};

use super::delivery::{Course, DeadLetter, DeliveryRow};
use super::endpoint::{DeliverySeq, Endpoint, EndpointState};
use super::event::{Event, EventKind};
use super::id::{ChatNo, EventSeq, MessageSeq};
use super::lifecycle::Life;
use super::limiter::{ChatPace, LimiterRecord};
use super::message::{Content, Direction, MessageRecord, Progress};
use super::outbox::OutboxRow;
use super::phone::Contact;
use super::retention::{Erasure, Removal};
use super::time::Timestamp;

/// One change of one record of a number.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A new history row and its index entries.
    Message(MessageRecord),
    /// The same history row with the content that could not be decrypted at first.
    Filled(MessageRecord),
    /// The delivery progress of an outbound message.
    Progress(MessageSeq, Progress),
    /// An accepted send that is not settled.
    Outbox(OutboxRow),
    /// What an accepted send says, where the history does not keep it; goes with the outbox row.
    Body(MessageSeq, Content),
    /// A settled send.
    OutboxGone(MessageSeq),
    /// The answer a request id got.
    Idempotency(IdempotencyKey, IdempotencyRecord),
    /// A chat and the addresses it is found by.
    Chat(ChatNo, Contact),
    /// The other side of a chat wrote for the first time.
    Heard(ChatNo),
    /// An inbound message that must not be taken in twice, and when it was.
    Seen(SeenKey, MessageSeq, Timestamp),
    /// An entry of the event log.
    Event(Event),
    /// An event waits for an endpoint.
    Delivery(u32, DeliveryRow),
    /// It no longer does.
    DeliveryGone(u32, DeliverySeq),
    /// It was given up.
    DeadLetter(u32, DeadLetter),
    /// The dead letter of this event came back.
    DeadLetterGone(u32, EventSeq),
    /// What became of one attempt.
    Attempt(AttemptRecord),
    /// A webhook endpoint.
    Endpoint(Endpoint),
    /// What moves with an endpoint's deliveries.
    EndpointState(u32, EndpointState),
    /// A webhook endpoint was removed; what is left of it is swept.
    EndpointGone(u32),
    /// High-water marks; part of every change that moves one.
    Counters(Counters),
    /// The number's life.
    Life(Life),
    /// Something that was kept long enough.
    Removed(Removal),
    /// State of the limiter.
    Limiter(LimiterRecord),
    /// What the limiter remembers of a chat.
    ChatPace(ChatNo, ChatPace),
    /// The limiter remembers nothing of a chat.
    ChatPaceGone(ChatNo),
    /// Everything of a contact is to be erased.
    Erase(Erasure),
    /// It is.
    Erased(ChatNo),
}

/// Hash of a request id together with the key that used it; made by the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IdempotencyKey(pub [u8; 16]);

/// The answer a request id got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdempotencyRecord {
    /// SHA-256 of what was asked, so that another question is noticed.
    pub body: [u8; 32],
    /// The message it made.
    pub seq: MessageSeq,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When it may be forgotten.
    pub expires_at: Timestamp,
}

/// What makes an inbound message the same one: ids alone are not unique per sender.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeenKey {
    /// The chat.
    pub chat: ChatNo,
    /// Who wrote it.
    pub direction: Direction,
    /// WhatsApp's id.
    pub whatsapp_id: String,
    /// Hash of the decoded message.
    pub digest: [u8; 16],
}

/// Hash of a [`SeenKey`]; made by the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeenHash(pub [u8; 16]);

/// An address that leads to a chat, as the store keys it: its keyed hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AliasHash(pub [u8; 16]);

/// One webhook attempt, for the delivery log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptRecord {
    /// The endpoint.
    pub endpoint: u32,
    /// The event.
    pub event: EventSeq,
    /// The delivery. 0 in records of earlier versions, which means the event's number.
    #[serde(default)]
    pub sequence: DeliverySeq,
    /// The event's kind, where it could be read.
    #[serde(default)]
    pub kind: Option<EventKind>,
    /// The way the delivery took.
    #[serde(default)]
    pub course: Course,
    /// Which attempt, from 1.
    pub attempt: u16,
    /// When it ended.
    pub at: Timestamp,
    /// HTTP status, if there was one.
    pub status: Option<u16>,
    /// Stable word for the outcome, for instance `delivered` or `timeout`.
    pub outcome: String,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// The beginning of the response, or what went wrong.
    #[serde(default)]
    pub response: String,
}

/// High-water marks of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Counters {
    /// Last history row.
    pub message: u64,
    /// Last event.
    pub event: u64,
    /// Last chat.
    pub chat: u32,
    /// Last endpoint.
    pub endpoint: u32,
    /// Whether the last thing customers were told about the connection is that it stands.
    pub announced_connected: bool,
    /// Last event that is no longer part of the log, whatever still waits for it.
    #[serde(default)]
    pub event_floor: u64,
    /// Last message made before the number began to only relay; unset while it keeps a history.
    #[serde(default)]
    pub relays_since: Option<MessageSeq>,
    /// History rows that were removed.
    #[serde(default)]
    pub messages_removed: u64,
    /// Rows of the event log that were removed.
    #[serde(default)]
    pub events_removed: u64,
}
