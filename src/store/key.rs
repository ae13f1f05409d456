//! Key encoding: number (u64 BE), tag (u8), rest. Everything big-endian, so that byte order is the order of time.

use sha2::{Digest, Sha256};

use crate::domain::id::NumberId;

/// Longest key a unit may carry, in bytes.
pub const KEY_BYTES_MAX: usize = 512;

/// The record families of a number. The values are on disk: never reuse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Tag {
    /// Ownership epoch.
    Epoch = 0x00,
    /// The linked device's own identity.
    Device = 0x01,
    /// One-time prekeys by id.
    PreKey = 0x02,
    /// Signed prekeys by id.
    SignedPreKey = 0x03,
    /// Signal sessions: h(user), device.
    Session = 0x04,
    /// Sender keys of groups.
    SenderKey = 0x05,
    /// Trusted identities: h(user), device.
    Identity = 0x06,
    /// App-state keys, versions and MACs.
    AppState = 0x07,
    /// Device lists, LID mappings, tokens, base keys: can be fetched again.
    ProtocolCache = 0x08,
    /// Plain text of sent messages for retry receipts.
    SentMessage = 0x09,
    /// Inbound messages between decryption and the durability hook.
    PendingInbound = 0x0a,
    /// Sent messages that a device asked for again and has not confirmed: h(device, id).
    AskedAgain = 0x0c,
    /// Secrets of messages (polls, edits).
    MessageSecret = 0x0b,
    /// History rows by sequence.
    Message = 0x10,
    /// History index: chat, sequence.
    ChatMessage = 0x11,
    /// Delivery progress of outbound messages by sequence.
    Progress = 0x12,
    /// h(direction, WhatsApp id, chat) to sequence.
    WhatsappId = 0x13,
    /// h(chat, sender, id, digest) of inbound messages.
    Seen = 0x14,
    /// h(address) to chat number.
    ChatAlias = 0x15,
    /// Chats by number.
    Chat = 0x16,
    /// When inbound messages were noted: time, the key of `Seen`.
    SeenTime = 0x17,
    /// Chats whose other side has written, by number.
    ChatHeard = 0x18,
    /// h(caller's reference) of outbound messages to sequence; the newest one wins.
    CorrelationId = 0x19,
    /// Contacts being erased, by chat number.
    Erasure = 0x1a,
    /// Accepted sends that are not settled, by sequence.
    Outbox = 0x20,
    /// What they say, where the history does not keep it.
    OutboxBody = 0x24,
    /// h(request id) to the answer it got.
    Idempotency = 0x22,
    /// Expiry of idempotency records: time, h(request id).
    IdempotencyExpiry = 0x23,
    /// Webhook queue: endpoint, delivery sequence.
    Delivery = 0x30,
    /// Webhook attempts: endpoint, time, delivery sequence.
    Attempt = 0x31,
    /// Deliveries given up: endpoint, event sequence.
    DeadLetter = 0x32,
    /// Webhook endpoints by ordinal.
    Endpoint = 0x33,
    /// What moves with an endpoint's deliveries, by ordinal; outlives the endpoint until its rows are swept.
    EndpointState = 0x34,
    /// Event log by sequence.
    Event = 0x40,
    /// High-water marks of the number's counters.
    Counters = 0x50,
    /// State of the number's life.
    Life = 0x51,
    /// State of the limiter.
    Limiter = 0x52,
    /// What it remembers of the chats written to lately, by number.
    ChatPace = 0x53,
    /// Continuation pieces of values that are too large for one.
    Chunk = 0xf0,
}

/// The full key of one record.
#[must_use]
pub fn full_key(number: NumberId, tag: Tag, rest: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(9 + rest.len());
    key.extend_from_slice(&number.0.to_be_bytes());
    key.push(tag as u8);
    key.extend_from_slice(rest);
    key
}

/// A short keyed hash for names that must not stand in a key in clear: addresses, message ids, request ids.
/// `secret` belongs to the store, so equal names of two installations do not look alike.
#[must_use]
pub fn hashed(secret: &[u8; 32], number: NumberId, kind: &str, name: &[u8]) -> [u8; 16] {
    let mut hasher = Sha256::new();
    hasher.update(secret);
    hasher.update(number.0.to_be_bytes());
    hasher.update((kind.len() as u64).to_be_bytes());
    hasher.update(kind.as_bytes());
    hasher.update(name);
    let digest = hasher.finalize();
    let mut short = [0u8; 16];
    short.copy_from_slice(&digest[..16]);
    short
}

/// The first key after every key that starts with `prefix`; `None` when there is no such key.
#[must_use]
pub fn after_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}
