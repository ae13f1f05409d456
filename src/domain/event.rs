//! What a customer is told: one closed set of events, the same for webhooks and for the event stream.

use serde::{Deserialize, Serialize};

use super::delivery::Logged;
use super::endpoint::DisabledReason;
use super::id::{ChatNo, EndpointId, EventId, MessageId};
use super::message::{FailureCode, MessageStatus};
use super::phone::Contact;
use super::time::Timestamp;

/// Kinds of events, by the names customers subscribe to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum EventKind {
    /// `message.sent`: WhatsApp accepted the message.
    MessageSent,
    /// `message.delivered`: a device of the recipient has it.
    MessageDelivered,
    /// `message.read`: the recipient opened it (only if they allow read receipts).
    MessageRead,
    /// `message.failed`: it will never be sent; the code says why.
    MessageFailed,
    /// `message.received`: somebody wrote to the number.
    MessageReceived,
    /// `number.created`.
    NumberCreated,
    /// `number.connected`: online, with proof of traffic.
    NumberConnected,
    /// `number.disconnected`: no longer online; the reason says whether it comes back by itself.
    NumberDisconnected,
    /// `number.health_degraded`: connected, and something is wrong; the reason says what.
    NumberDegraded,
    /// `number.recovered`: it no longer is.
    NumberRecovered,
    /// `webhook.disabled`: one of the number's webhooks was stopped by us; told to the others and to streams.
    WebhookDisabled,
}

impl EventKind {
    /// Every kind, in the order of the documentation.
    pub const ALL: [Self; 11] = [
        Self::MessageSent,
        Self::MessageDelivered,
        Self::MessageRead,
        Self::MessageFailed,
        Self::MessageReceived,
        Self::NumberCreated,
        Self::NumberConnected,
        Self::NumberDisconnected,
        Self::NumberDegraded,
        Self::NumberRecovered,
        Self::WebhookDisabled,
    ];

    /// The public name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MessageSent => "message.sent",
            Self::MessageDelivered => "message.delivered",
            Self::MessageRead => "message.read",
            Self::MessageFailed => "message.failed",
            Self::MessageReceived => "message.received",
            Self::NumberCreated => "number.created",
            Self::NumberConnected => "number.connected",
            Self::NumberDisconnected => "number.disconnected",
            Self::NumberDegraded => "number.health_degraded",
            Self::NumberRecovered => "number.recovered",
            Self::WebhookDisabled => "webhook.disabled",
        }
    }

    /// The kind with this public name.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Which events an endpoint or a stream wants. Empty wants nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventFilter {
    /// `["*"]`: everything, also kinds that do not exist yet.
    All,
    /// Only these.
    Only(Vec<EventKind>),
}

impl EventFilter {
    /// Whether an event of this kind is wanted.
    #[must_use]
    pub fn wants(&self, kind: EventKind) -> bool {
        match self {
            Self::All => true,
            Self::Only(kinds) => kinds.contains(&kind),
        }
    }

    /// Reads the public form: names, or `*` for all.
    ///
    /// # Errors
    /// The first name that is no event.
    pub fn parse<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, &'a str> {
        let mut kinds = Vec::new();
        let mut all = false;
        for name in names {
            match EventKind::of_name(name) {
                Some(kind) if !kinds.contains(&kind) => kinds.push(kind),
                Some(_) => {}
                None if name == "*" => all = true,
                None => return Err(name),
            }
        }
        Ok(if all { Self::All } else { Self::Only(kinds) })
    }

    /// The public form.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        match self {
            Self::All => vec!["*"],
            Self::Only(kinds) => kinds.iter().map(|kind| kind.name()).collect(),
        }
    }
}

/// One entry of a number's event log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Number and sequence; stable for ever.
    pub id: EventId,
    /// When it was recorded.
    pub at: Timestamp,
    /// What happened.
    pub body: EventBody,
}

impl Event {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> EventKind {
        match &self.body {
            EventBody::Outbound(body) => body.kind(),
            EventBody::Received(_) => EventKind::MessageReceived,
            EventBody::NumberCreated => EventKind::NumberCreated,
            EventBody::NumberConnected => EventKind::NumberConnected,
            EventBody::NumberDisconnected { .. } => EventKind::NumberDisconnected,
            EventBody::NumberDegraded { .. } => EventKind::NumberDegraded,
            EventBody::NumberRecovered => EventKind::NumberRecovered,
            EventBody::WebhookDisabled { .. } => EventKind::WebhookDisabled,
            EventBody::Erased(kind) => *kind,
        }
    }

    /// What a replay needs of it.
    #[must_use]
    pub fn logged(&self) -> Logged {
        Logged { event: self.id.seq, chat: self.chat(), kind: self.kind() }
    }

    /// The chat whose order it must keep, if it belongs to one.
    #[must_use]
    pub fn chat(&self) -> Option<ChatNo> {
        match &self.body {
            EventBody::Outbound(body) => Some(body.chat),
            EventBody::Received(body) => Some(body.chat),
            EventBody::NumberCreated
            | EventBody::NumberConnected
            | EventBody::NumberDisconnected { .. }
            | EventBody::NumberDegraded { .. }
            | EventBody::NumberRecovered
            | EventBody::WebhookDisabled { .. }
            | EventBody::Erased(_) => None,
        }
    }
}

/// The facts of an event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum EventBody {
    /// A message of ours climbed the ladder.
    Outbound(OutboundEvent),
    /// Somebody wrote.
    Received(ReceivedEvent),
    /// The number exists.
    NumberCreated,
    /// The number is online.
    NumberConnected,
    /// The number is no longer online.
    NumberDisconnected {
        /// Stable code of the reason, for instance `LOGGED_OUT` or `CONNECTION_LOST`.
        reason: String,
        /// Whether the daemon connects again by itself.
        reconnecting: bool,
    },
    /// The number is online, and something is wrong.
    NumberDegraded {
        /// Stable code of what is, for instance `PREKEYS_MISSING`.
        reason: String,
    },
    /// It no longer is.
    NumberRecovered,
    /// One of the number's webhooks was stopped.
    WebhookDisabled {
        /// Which.
        webhook: EndpointId,
        /// Why.
        reason: DisabledReason,
    },
    /// It told of a contact that was erased; nothing is left but its place and its kind.
    Erased(EventKind),
}

/// Progress of one message of ours.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutboundEvent {
    /// Our id.
    pub message: MessageId,
    /// WhatsApp's id.
    pub whatsapp_id: String,
    /// Caller's own reference, if any was given.
    pub correlation_id: Option<String>,
    /// The recipient.
    pub to: Contact,
    /// The chat.
    pub chat: ChatNo,
    /// The rung reached: sent, delivered, read or failed.
    pub status: MessageStatus,
    /// Why, when failed.
    pub failure: Option<FailureCode>,
}

impl OutboundEvent {
    fn kind(&self) -> EventKind {
        match self.status {
            MessageStatus::Delivered => EventKind::MessageDelivered,
            MessageStatus::Read | MessageStatus::Played => EventKind::MessageRead,
            MessageStatus::Failed | MessageStatus::Cancelled | MessageStatus::Expired => EventKind::MessageFailed,
            MessageStatus::Queued | MessageStatus::Sent => EventKind::MessageSent,
        }
    }
}

/// A message somebody wrote to the number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReceivedEvent {
    /// Our id.
    pub message: MessageId,
    /// WhatsApp's id.
    pub whatsapp_id: String,
    /// Who wrote.
    pub from: Contact,
    /// The chat.
    pub chat: ChatNo,
    /// The sender's own display name, where known.
    pub sender_name: Option<String>,
    /// The text; empty for kinds without one.
    pub text: String,
    /// When the sender wrote it, by WhatsApp's clock.
    pub written_at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_come_back() {
        for kind in EventKind::ALL {
            assert_eq!(EventKind::of_name(kind.name()), Some(kind));
        }
    }

    #[test]
    fn an_empty_list_wants_nothing_and_a_star_everything() {
        let none = EventFilter::parse([]).unwrap();
        let all = EventFilter::parse(["message.sent", "*"]).unwrap();
        for kind in EventKind::ALL {
            assert!(!none.wants(kind));
            assert!(all.wants(kind));
        }
        assert_eq!(EventFilter::parse(["message.sent", "message.typo"]), Err("message.typo"));
    }
}
