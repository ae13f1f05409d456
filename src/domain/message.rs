//! A message in the history and the ladder its delivery climbs. Statuses only go up, so repeated and
//! reordered receipts are harmless.

use serde::{Deserialize, Serialize};

use super::id::{ChatNo, MessageSeq};
use super::time::Timestamp;

/// Longest text WhatsApp shows, in characters.
pub const TEXT_CHARS_MAX: usize = 4096;

/// Stands in for the digest of a message that could not be decrypted, so that its row is found again.
pub const PLACEHOLDER_DIGEST: [u8; 16] = [0; 16];

/// A row of the history. Only one that could not be decrypted changes after it is written: its content is filled in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageRecord {
    /// Place in the history.
    pub seq: MessageSeq,
    /// The chat it belongs to.
    pub chat: ChatNo,
    /// Who wrote it.
    pub direction: Direction,
    /// WhatsApp's id: chosen by us for outbound messages, before the first attempt.
    pub whatsapp_id: String,
    /// Caller's own reference (outbound only).
    pub correlation_id: Option<String>,
    /// What it says.
    pub content: Content,
    /// The sender's display name (inbound only, where known).
    pub sender_name: Option<String>,
    /// When we accepted or received it.
    pub created_at: Timestamp,
    /// When the sender wrote it, by WhatsApp's clock (inbound), or `created_at` (outbound).
    pub written_at: Timestamp,
    /// When it is to be sent, if its caller said so (outbound).
    #[serde(default)]
    pub send_at: Option<Timestamp>,
    /// After which moment it is not sent any more, if its caller said so (outbound).
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
}

impl std::fmt::Debug for MessageRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MessageRecord({:?} {:?} {:?})", self.seq, self.chat, self.direction)
    }
}

/// Who wrote a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Direction {
    /// The other side.
    Inbound,
    /// This number, through us.
    Outbound,
    /// This number, from its phone or another linked device.
    OwnDevice,
}

/// What a message says. Debug shows its size only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// A kind this version does not read; the name is WhatsApp's field name, for instance `imageMessage`.
    Other(String),
    /// Could not be decrypted (yet); filled when the sender repeats it.
    Undecryptable,
    /// The number only relays: what it said went through and was not kept.
    NotKept,
}

impl Content {
    /// The text; empty for kinds without one.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Other(_) | Self::Undecryptable | Self::NotKept => "",
        }
    }

    /// Name of the kind as the API shows it.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::Text(_) => "text",
            Self::Other(kind) => kind,
            Self::Undecryptable => "undecryptable",
            Self::NotKept => "not_kept",
        }
    }
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}({} bytes)", self.kind(), self.text().len())
    }
}

/// The rungs of the ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MessageStatus {
    /// Accepted and durable; not yet acknowledged by WhatsApp.
    Queued,
    /// WhatsApp's server has it.
    Sent,
    /// A device of the recipient has it.
    Delivered,
    /// The recipient opened it.
    Read,
    /// The recipient played it (voice notes).
    Played,
    /// It will never be sent.
    Failed,
    /// Its sender withdrew it before it left.
    Cancelled,
    /// Its deadline passed before it left.
    Expired,
}

impl MessageStatus {
    fn rung(self) -> u8 {
        match self {
            Self::Queued => 0,
            Self::Failed | Self::Cancelled | Self::Expired => 1,
            Self::Sent => 2,
            Self::Delivered => 3,
            Self::Read => 4,
            Self::Played => 5,
        }
    }

    /// Whether nothing more will be attempted.
    #[must_use]
    pub fn is_settled(self) -> bool {
        self != Self::Queued
    }

    /// The public name, as in the JSON API.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "QUEUED",
            Self::Sent => "SENT",
            Self::Delivered => "DELIVERED",
            Self::Read => "READ",
            Self::Played => "PLAYED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELED",
            Self::Expired => "EXPIRED",
        }
    }
}

/// Why a message failed, as a stable code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailureCode {
    /// The recipient is not on WhatsApp (404).
    WhatsappNotExist,
    /// WhatsApp refused the stanza (400, 479 and anything it calls permanent).
    RejectedByWhatsapp,
    /// The account may not open new chats now (463). Only in histories of earlier versions: such sends are held now.
    ReachOutLocked,
    /// Its deadline passed after it was attempted.
    DeadlinePassed,
    /// Its deadline passed before it was attempted.
    NeverAttempted,
    /// Too many attempts without an answer.
    AttemptsExhausted,
    /// The number was logged out or removed.
    NumberGone,
}

impl FailureCode {
    /// The public name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::WhatsappNotExist => "WHATSAPP_NOT_EXIST",
            Self::RejectedByWhatsapp => "REJECTED_BY_WHATSAPP",
            Self::ReachOutLocked => "REACH_OUT_LOCKED",
            Self::DeadlinePassed => "EXPIRED_AFTER_ATTEMPTS",
            Self::NeverAttempted => "NEVER_ATTEMPTED_MAX_AGE_EXCEEDED",
            Self::AttemptsExhausted => "DELIVERY_TIMEOUT",
            Self::NumberGone => "LINKED_WHATSAPP_INSTANCE_NOT_FOUND",
        }
    }
}

/// Where an outbound message stands; the mutable half of its history row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Highest rung reached.
    pub status: MessageStatus,
    /// When WhatsApp acknowledged it.
    pub sent_at: Option<Timestamp>,
    /// First delivery receipt.
    pub delivered_at: Option<Timestamp>,
    /// First read receipt.
    pub read_at: Option<Timestamp>,
    /// When it failed, was cancelled or expired.
    pub failed_at: Option<Timestamp>,
    /// Why it failed.
    pub failure: Option<FailureCode>,
}

impl Progress {
    /// Freshly accepted.
    pub const QUEUED: Self = Self {
        status: MessageStatus::Queued,
        sent_at: None,
        delivered_at: None,
        read_at: None,
        failed_at: None,
        failure: None,
    };

    /// Climbs to `status` if that is higher. Returns whether anything changed; a skipped rung's time stays empty.
    /// `at` comes from another clock, often in whole seconds: it never lies before the rung below.
    pub fn climb(&mut self, status: MessageStatus, at: Timestamp, failure: Option<FailureCode>) -> bool {
        if status.rung() <= self.status.rung() {
            return false;
        }
        self.status = status;
        let at = [self.sent_at, self.delivered_at].into_iter().flatten().fold(at, Timestamp::max);
        let slot = match status {
            MessageStatus::Queued => return false,
            MessageStatus::Sent => &mut self.sent_at,
            MessageStatus::Delivered => &mut self.delivered_at,
            MessageStatus::Read | MessageStatus::Played => &mut self.read_at,
            MessageStatus::Failed | MessageStatus::Cancelled | MessageStatus::Expired => &mut self.failed_at,
        };
        slot.get_or_insert(at);
        self.failure = if status.rung() == 1 { failure } else { None };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn statuses() -> impl Strategy<Value = MessageStatus> {
        proptest::sample::select(vec![
            MessageStatus::Sent,
            MessageStatus::Delivered,
            MessageStatus::Read,
            MessageStatus::Played,
            MessageStatus::Failed,
            MessageStatus::Cancelled,
            MessageStatus::Expired,
        ])
    }

    proptest! {
        #[test]
        fn the_ladder_only_climbs_whatever_the_order(steps in proptest::collection::vec(statuses(), 0..20)) {
            let mut progress = Progress::QUEUED;
            let mut highest = 0;
            for (index, status) in steps.iter().enumerate() {
                progress.climb(*status, Timestamp(index as u64), None);
                prop_assert!(progress.status.rung() >= highest);
                highest = progress.status.rung();
            }
            let best = steps.iter().map(|status| status.rung()).max().unwrap_or(0);
            prop_assert_eq!(highest, best);
        }
    }

    #[test]
    fn a_receipt_after_a_failure_proves_it_was_sent() {
        let mut progress = Progress::QUEUED;
        assert!(progress.climb(MessageStatus::Failed, Timestamp(1), Some(FailureCode::AttemptsExhausted)));
        assert!(progress.climb(MessageStatus::Delivered, Timestamp(2), None));
        assert_eq!((progress.status, progress.failure), (MessageStatus::Delivered, None));
    }
}
