//! How long what a number has written down is kept, and what a sweep looks for. Pure: which rows are too old is decided
//! here and in the number's machine; the shell only looks them up, a bounded batch at a time.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::change::{AliasHash, IdempotencyKey, SeenHash};
use super::endpoint::DeliverySeq;
use super::event::EventKind;
use super::id::{ChatNo, EventSeq, MessageSeq, NumberId};
use super::time::Timestamp;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Most days a number can be told to keep: ten years.
pub const DAYS_MAX: u16 = 3650;
/// Rows one sweep looks at, and so the most that one unit removes.
pub const SWEEP_ROWS: usize = 200;
/// Pause of one number between two batches that removed something.
pub const SWEEP_PAUSE: Duration = Duration::from_millis(250);
/// How long an inbound message is recognised when it comes again. WhatsApp holds what was not received for 30 days.
pub const SEEN_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long a number that only relays keeps its events for a stream that comes back. An event that still waits for
/// a webhook stays until that is settled.
pub const RELAY_EVENTS_KEPT: Duration = Duration::from_secs(3600);
/// How long a number that only relays keeps what it needs for receipts: ids, statuses, and whom it wrote to. No text.
pub const RELAY_ROWS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
/// How often a number that only relays looks for what may go, at least.
pub const RELAY_SWEEP_EVERY: Duration = Duration::from_secs(300);

/// What a number keeps of its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
pub enum Retention {
    /// Everything, for ever.
    #[default]
    KeepAll,
    /// What is younger than this many days, 1 to [`DAYS_MAX`].
    KeepDays(u16),
    /// Nothing: messages pass through to webhooks and streams.
    RelayOnly,
}

impl Retention {
    /// The oldest moment of which anything may still be shown; `None` when the history shows nothing at all.
    #[must_use]
    pub fn shown_from(self, now: Timestamp) -> Option<Timestamp> {
        match self {
            Self::KeepAll => Some(Timestamp(0)),
            Self::KeepDays(days) => Some(before(now, DAY * u32::from(days))),
            Self::RelayOnly => None,
        }
    }

    /// The oldest moment of which a stream may still be given events.
    #[must_use]
    pub fn streamed_from(self, now: Timestamp) -> Timestamp {
        match self {
            Self::KeepAll => Timestamp(0),
            Self::KeepDays(days) => before(now, DAY * u32::from(days)),
            Self::RelayOnly => before(now, RELAY_EVENTS_KEPT),
        }
    }

    /// Shortens `kept` to what the number allows.
    fn at_most(self, kept: Duration) -> Duration {
        match self {
            Self::KeepAll => kept,
            Self::KeepDays(days) => kept.min(DAY * u32::from(days)),
            Self::RelayOnly => kept.min(RELAY_EVENTS_KEPT),
        }
    }
}

/// What holds for every number of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// How long events are kept for streams that come back.
    pub events_kept: Duration,
    /// Most events kept for them.
    pub events_max: u64,
    /// How long the log of webhook attempts is kept.
    pub attempts_kept: Duration,
    /// Most attempts kept per endpoint, give or take one batch.
    pub attempts_max: u32,
    /// How long dead letters are kept.
    pub dead_letters_kept: Duration,
    /// How often a number looks for what is too old.
    pub sweep_every: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            events_kept: 7 * DAY,
            events_max: 1_000_000,
            attempts_kept: 30 * DAY,
            attempts_max: 1000,
            dead_letters_kept: 30 * DAY,
            sweep_every: Duration::from_secs(3600),
        }
    }
}

/// The policy as it holds for one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rules {
    /// Of the process.
    pub policy: Policy,
    /// Of the number.
    pub retention: Retention,
}

impl Rules {
    /// Events recorded before this moment are no longer part of the log.
    #[must_use]
    pub fn events_before(&self, now: Timestamp) -> Timestamp {
        before(now, self.retention.at_most(self.policy.events_kept))
    }

    /// History rows made before this moment may go.
    #[must_use]
    pub fn messages_before(&self, now: Timestamp) -> Timestamp {
        match self.retention {
            Retention::KeepAll => Timestamp(0),
            Retention::KeepDays(days) => before(now, DAY * u32::from(days)),
            Retention::RelayOnly => before(now, RELAY_ROWS_KEPT),
        }
    }

    /// Attempts made before this moment may go.
    #[must_use]
    pub fn attempts_before(&self, now: Timestamp) -> Timestamp {
        before(now, self.retention.at_most(self.policy.attempts_kept))
    }

    /// Dead letters queued before this moment may go.
    #[must_use]
    pub fn dead_letters_before(&self, now: Timestamp) -> Timestamp {
        before(now, self.retention.at_most(self.policy.dead_letters_kept))
    }

    /// Time between two passes.
    #[must_use]
    pub fn sweep_every(&self) -> Duration {
        match self.retention {
            Retention::RelayOnly => self.policy.sweep_every.min(RELAY_SWEEP_EVERY),
            Retention::KeepAll | Retention::KeepDays(_) => self.policy.sweep_every,
        }
    }

    /// The next moment at which this number's pass begins. Numbers begin at different moments of the interval, and a
    /// number that restarts often does not put its own off.
    #[must_use]
    pub fn next_pass(&self, number: NumberId, now: Timestamp) -> Timestamp {
        let every = u64::try_from(self.sweep_every().as_millis()).unwrap_or(u64::MAX).max(1);
        // Fibonacci hashing: ids made one after the other do not begin together.
        let phase = number.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) % every;
        let into = now.0.wrapping_sub(phase) % every;
        Timestamp(now.0.saturating_add(every - into))
    }
}

/// The moment `kept` ago; the beginning of time when that lies before it.
pub(super) fn before(now: Timestamp, kept: Duration) -> Timestamp {
    Timestamp(now.0.saturating_sub(u64::try_from(kept.as_millis()).unwrap_or(u64::MAX)))
}

/// An order to erase a contact; also what is stored of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Erasure {
    /// The contact's chat.
    pub chat: ChatNo,
    /// Messages up to here go; what came later is another conversation.
    pub through: MessageSeq,
    /// Events up to here are emptied.
    pub events_through: EventSeq,
}

/// A look for rows that may go: one range, [`SWEEP_ROWS`] at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sweep {
    /// Answers to request ids that expired by this moment.
    Idempotency(Timestamp),
    /// Digests of inbound messages noted before this moment.
    Seen(Timestamp),
    /// History rows made before a moment, oldest first.
    Messages {
        /// Rows up to here were looked at in this pass.
        after: MessageSeq,
        /// Those up to here may go whatever their age.
        through: MessageSeq,
        /// The moment.
        before: Timestamp,
    },
    /// How far the event log is older than a moment.
    EventAge {
        /// Up to here it is known to be.
        after: EventSeq,
        /// The moment.
        before: Timestamp,
    },
    /// Events that nobody waits for any more.
    Events {
        /// Events up to here were looked at in this pass.
        after: EventSeq,
        /// The last one that is not part of the log any more.
        through: EventSeq,
        /// Whether a dead letter holds its event as well.
        dead_letters_hold: bool,
        /// The endpoints whose queues hold events.
        endpoints: Vec<u32>,
    },
    /// Dead letters of an endpoint queued before a moment.
    DeadLetters {
        /// Whose.
        endpoint: u32,
        /// Dead letters up to here were looked at in this pass.
        after: EventSeq,
        /// The moment.
        before: Timestamp,
    },
    /// The attempts of an endpoint that are too old or too many.
    Attempts {
        /// Whose.
        endpoint: u32,
        /// Older ones go.
        before: Timestamp,
        /// So many of the newest stay; `None` when there cannot be more.
        keep: Option<u32>,
    },
    /// The messages of a contact that is being erased.
    ErasedMessages {
        /// The order.
        erasure: Erasure,
        /// Rows up to here were looked at in this pass.
        after: MessageSeq,
    },
    /// The events that tell of it. The log has no index by chat: it is gone through once, a batch at a time.
    ErasedEvents {
        /// The order.
        erasure: Erasure,
        /// Events up to here were looked at in this pass.
        after: EventSeq,
    },
    /// Who it is, when nothing else is left.
    ErasedContact(Erasure),
    /// What is queued and logged for endpoints that are gone.
    Orphans {
        /// The endpoints that are there.
        living: Vec<u32>,
        /// Later ones may have been added meanwhile.
        through: u32,
    },
}

/// What a sweep came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// What may go, unless something happened to it meanwhile.
    pub removals: Vec<Removal>,
    /// Where to look on; `None` when this range is done.
    pub next: Option<Sweep>,
    /// The last event older than asked ([`Sweep::EventAge`] only).
    pub aged: Option<EventSeq>,
}

/// A row that goes, with everything needed to find its index entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    /// The answer of a request id, by its expiry.
    Idempotency(Timestamp, IdempotencyKey),
    /// An inbound digest, by when it was noted.
    Seen(Timestamp, SeenHash),
    /// A history row with its index entries and progress.
    Message {
        /// Its place.
        seq: MessageSeq,
        /// Its chat.
        chat: ChatNo,
        /// WhatsApp's id, if it is found by it.
        whatsapp_id: Option<String>,
        /// Its caller's reference, if it is found by it.
        correlation_id: Option<String>,
    },
    /// Whom a chat without messages is with. That its addresses lead to this chat stays, as hashes: what arrives again
    /// is recognised by it.
    Chat(ChatNo),
    /// Whom a chat was with, and that these addresses lead to it: every one, also those its contact is not known by
    /// any more.
    Contact(ChatNo, Vec<AliasHash>),
    /// An event.
    Event(EventSeq),
    /// What an event tells; it keeps its place.
    EventBody(EventSeq, Timestamp, EventKind),
    /// A delivery for an endpoint that is gone.
    Delivery(u32, DeliverySeq),
    /// A dead letter.
    DeadLetter(u32, EventSeq),
    /// An attempt: endpoint, and the rest of its key as the store wrote it.
    Attempt(u32, Vec<u8>),
    /// What moved with the deliveries of an endpoint that is gone.
    EndpointState(u32),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: Timestamp = Timestamp(1_763_819_999_042);

    #[test]
    fn each_mode_shows_what_it_keeps() {
        assert_eq!(Retention::KeepAll.shown_from(NOW), Some(Timestamp(0)));
        assert_eq!(Retention::KeepDays(1).shown_from(NOW), Some(Timestamp(NOW.0 - 86_400_000)));
        assert_eq!(Retention::RelayOnly.shown_from(NOW), None);
        assert_eq!(Retention::KeepDays(u16::MAX).shown_from(Timestamp(5)), Some(Timestamp(0)));
    }

    #[test]
    fn a_number_shortens_what_the_process_keeps_and_never_lengthens_it() {
        let rules = |retention| Rules { policy: Policy::default(), retention };
        let age = |at: Timestamp| NOW.since(at);
        assert_eq!(age(rules(Retention::KeepAll).events_before(NOW)), 7 * DAY);
        assert_eq!(age(rules(Retention::KeepDays(2)).events_before(NOW)), 2 * DAY);
        assert_eq!(age(rules(Retention::KeepDays(90)).events_before(NOW)), 7 * DAY);
        assert_eq!(age(rules(Retention::RelayOnly).events_before(NOW)), RELAY_EVENTS_KEPT);
        assert_eq!(rules(Retention::KeepAll).messages_before(NOW), Timestamp(0));
    }

    proptest! {
        #[test]
        fn a_pass_comes_within_its_interval_and_at_the_same_phase(id: u64, now in 0u64..1 << 50, seconds in 1u64..100_000) {
            let policy = Policy { sweep_every: Duration::from_secs(seconds), ..Policy::default() };
            let rules = Rules { policy, retention: Retention::KeepAll };
            let next = rules.next_pass(NumberId(id), Timestamp(now));
            prop_assert!(next.0 > now && next.0 <= now + seconds * 1000);
            let again = rules.next_pass(NumberId(id), next);
            prop_assert_eq!(again.0, next.0 + seconds * 1000);
        }
    }
}
