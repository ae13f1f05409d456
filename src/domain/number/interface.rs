//! What can happen to a number and what follows from it: the words its machine speaks with the shell.

use std::collections::HashSet;
use std::time::Duration;

use crate::domain::capacity::Limiting;
use crate::domain::change::{Change, Counters, IdempotencyKey};
use crate::domain::delivery::StoredEndpoint;
use crate::domain::delivery::{
    AttemptEnd, DeadLetter, DeadReason, DeliveryRow, Dispatch, LoadPage, LoadReplay, Logged,
};
use crate::domain::endpoint::{DisabledReason, Endpoint, EndpointUpdate, Replay};
use crate::domain::id::{ChatNo, EventSeq, MessageSeq};
use crate::domain::lifecycle::{self, Life, State};
use crate::domain::limiter::{ChatPace, LimiterRecord, Limits, LockAnswer, LockReason};
use crate::domain::message::{Content, Direction, FailureCode, MessageRecord, MessageStatus, Progress};
use crate::domain::orders::SendingOrders;
use crate::domain::outbox::{Devices, OutboxRow, Standing};
use crate::domain::phone::Contact;
use crate::domain::retention::{Erasure, Found, Retention, Rules, Sweep};
use crate::domain::time::Timestamp;

/// Names a commit; answered by [`Input::Stored`] in the order of the commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Names a caller who waits; the shell holds the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplyId(pub u64);

/// A send, checked and resolved by the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendRequest {
    /// The recipient.
    pub to: Contact,
    /// Their chat, if the disk knew it.
    pub chat: Option<ChatNo>,
    /// Whether they ever wrote, as far as the disk knew.
    pub standing: Standing,
    /// What to say.
    pub content: Content,
    /// Not before this moment.
    pub send_at: Option<Timestamp>,
    /// Not after this moment; `None` is the default deadline.
    pub expires_at: Option<Timestamp>,
    /// WhatsApp's id for it, chosen now and kept for every attempt.
    pub whatsapp_id: String,
    /// The caller's own reference.
    pub correlation_id: Option<String>,
    /// The request id and the digest of what it asked.
    pub idempotency: Option<(IdempotencyKey, [u8; 32])>,
    /// Refused if it would probably wait longer than this, from when it is due.
    pub max_wait: Option<Duration>,
}

/// An inbound message, resolved against the disk by the shell.
#[derive(Debug, Clone)]
pub struct Arrived {
    /// The other side of the chat.
    pub contact: Contact,
    /// Its chat, if the disk knew it.
    pub chat: Option<ChatNo>,
    /// Whether the disk has it already.
    pub seen: bool,
    /// Whether the other side ever wrote, as far as the disk knew.
    pub standing: Standing,
    /// The row on disk that stands for this message and has no content yet.
    pub placeholder: Option<Box<MessageRecord>>,
    /// Inbound, or our own from another device.
    pub direction: Direction,
    /// WhatsApp's id.
    pub whatsapp_id: String,
    /// Hash of the decoded message.
    pub digest: [u8; 16],
    /// The sender's display name.
    pub sender_name: Option<String>,
    /// What it says.
    pub content: Content,
    /// By WhatsApp's clock.
    pub written_at: Timestamp,
}

/// A message a receipt speaks of, resolved against the disk by the shell.
#[derive(Debug, Clone)]
pub struct Receipted {
    /// Its history row.
    pub seq: MessageSeq,
    /// WhatsApp's id.
    pub whatsapp_id: String,
    /// Its chat.
    pub chat: ChatNo,
    /// The recipient.
    pub to: Contact,
    /// The caller's own reference.
    pub correlation_id: Option<String>,
    /// Its progress on disk.
    pub progress: Progress,
}

/// A message somebody wants to withdraw, resolved against the disk by the shell.
#[derive(Debug, Clone, Copy)]
pub struct CancelTarget {
    /// Its history row.
    pub seq: MessageSeq,
    /// Its progress on disk; `None`: there is no such outbound message.
    pub stored: Option<Progress>,
}

/// What became of one message that was to be withdrawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelOutcome {
    /// It is withdrawn, now or before, and will never be sent.
    Cancelled,
    /// There is no such message.
    NotFound,
    /// It is on its way, or an attempt of unknown outcome was made.
    InFlight,
    /// WhatsApp has it.
    AlreadySent,
    /// It failed before.
    AlreadyFailed,
    /// Its deadline passed before.
    AlreadyExpired,
}

impl CancelOutcome {
    /// The public name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cancelled => "CANCELED",
            Self::NotFound => "NOT_FOUND",
            Self::InFlight => "IN_FLIGHT",
            Self::AlreadySent => "ALREADY_SENT",
            Self::AlreadyFailed => "ALREADY_FAILED",
            Self::AlreadyExpired => "ALREADY_EXPIRED",
        }
    }
}

/// What is done with a message whose last attempt may have arrived when its answer was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnUnknown {
    /// Sent again under the same id: the recipient's WhatsApp shows it once.
    #[default]
    Resend,
    /// Failed, unless a receipt proves that it arrived: never twice on the wire, perhaps never at all.
    Fail,
}

/// What a number may send, and what it does in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendingRules {
    /// What it may send.
    pub limits: Limits,
    /// What is done in doubt.
    pub on_unknown: OnUnknown,
}

/// What can happen to a number.
#[derive(Debug)]
pub enum Input {
    /// To its connection.
    Life(lifecycle::Input),
    /// Somebody wants to send.
    Send(Box<SendRequest>, ReplyId),
    /// A commit ended: `false` means its precondition did not hold. A failed disk never comes here: the actor ends.
    Stored(Ticket, bool),
    /// The session could not write an attempt.
    NotWritten {
        /// Which message.
        seq: MessageSeq,
        /// What follows.
        retry: Retry,
    },
    /// WhatsApp answered a message.
    Acked {
        /// By WhatsApp's id.
        whatsapp_id: String,
        /// Its error code.
        error: Option<u16>,
    },
    /// The other side's receipt.
    Receipts {
        /// Of which messages.
        messages: Vec<Receipted>,
        /// How far they got.
        status: MessageStatus,
        /// By WhatsApp's clock.
        at: Timestamp,
        /// Answered when what follows from it is durable.
        reply: ReplyId,
    },
    /// What WhatsApp says of its lock on new chats.
    Lock(LockAnswer),
    /// Somebody withdraws messages.
    Cancel(Vec<CancelTarget>, ReplyId),
    /// Messages arrived and must become durable before the reply.
    Arrived(Vec<Arrived>, ReplyId),
    /// Somebody adds a webhook endpoint; its ordinal is given here.
    AddEndpoint(Box<Endpoint>, ReplyId),
    /// Somebody removes one.
    RemoveEndpoint(u32, ReplyId),
    /// Somebody changes one, or wants something sent again.
    Endpoint(u32, EndpointOrder, ReplyId),
    /// A webhook attempt ended.
    Attempted(AttemptEnd),
    /// A page of the webhook queue was read.
    PageLoaded(u32, Vec<DeliveryRow>),
    /// A part of the event log was read for a replay.
    ReplayLoaded(u32, Vec<Logged>),
    /// What the number keeps was set.
    Retention(Retention),
    /// What its owner orders about its sending was set.
    Orders(SendingOrders),
    /// A look for what is too old ended.
    Swept(Found),
    /// Somebody wants everything of a chat erased.
    Erase(ChatNo, ReplyId),
    /// No new sends; finish what waits for an answer, then close.
    Drain,
    /// Time went by.
    Tick,
}

/// What an endpoint's owner orders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointOrder {
    /// Change it.
    Update(EndpointUpdate),
    /// Another secret.
    Rotate {
        /// The new one.
        secret: String,
        /// How long the present one signs as well.
        overlap: Duration,
    },
    /// Try a dead letter again, under its own name.
    Revive(DeadLetter),
    /// Send one event of the log again.
    Resend {
        /// Which.
        event: EventSeq,
        /// Its chat.
        chat: Option<ChatNo>,
    },
    /// Send a part of the log again.
    Replay(Replay),
}

/// What follows from an attempt that did not reach the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// When the number is online again.
    WhenOnline,
    /// After a pause.
    Later,
    /// Its outcome is unknown: wait for an answer as if it had been written.
    Unknown,
    /// Never.
    Never(FailureCode),
}

/// What a caller is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The message is durable.
    Accepted {
        /// Its history row.
        seq: MessageSeq,
        /// When.
        created_at: Timestamp,
        /// How long it will probably wait; unknown while the number is not online.
        predicted_wait: Option<Duration>,
    },
    /// Too many unsettled sends.
    QueueFull,
    /// It would wait longer than its caller likes. Nothing of it is kept.
    WaitTooLong {
        /// How long it would probably wait; unknown when nobody can tell.
        wait: Option<Duration>,
        /// What for.
        limiting: Limiting,
    },
    /// The number is going down.
    Draining,
    /// The endpoint is durable.
    EndpointAdded(Box<Endpoint>),
    /// The number has as many endpoints as it may.
    TooManyEndpoints,
    /// The endpoint is gone.
    EndpointRemoved,
    /// There is no such endpoint.
    NoSuchEndpoint,
    /// The change is durable; this is the endpoint now.
    EndpointChanged(Box<Endpoint>),
    /// A replay is under way already, or too much waits beside the queue.
    ReplayBusy,
    /// The order to erase is durable.
    EraseBegun,
    /// A message to the contact may just be leaving.
    ContactBusy,
    /// The messages, or what follows from the receipts, are durable.
    InboundDurable,
    /// What became of each message, in the order asked; durable.
    Cancelled(Vec<(MessageSeq, CancelOutcome)>),
}

/// A transmission order for the session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Its history row.
    pub seq: MessageSeq,
    /// WhatsApp's id.
    pub whatsapp_id: String,
    /// The recipient.
    pub to: Contact,
    /// What to say, if it is still at hand; otherwise it is read from the history.
    pub content: Option<Content>,
    /// Whether the recipient's devices must be asked for first.
    pub devices: Devices,
}

/// Changes that become durable together.
#[derive(Debug, Clone, PartialEq)]
pub struct Commit {
    /// Echoed by [`Input::Stored`].
    pub ticket: Ticket,
    /// In order.
    pub changes: Vec<Change>,
    /// Written only if this request id is new.
    pub unless_known: Option<IdempotencyKey>,
    /// Whether somebody waits for the disk.
    pub durable: bool,
}

/// What must be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write.
    Commit(Commit),
    /// Act on the connection.
    Life(lifecycle::Effect),
    /// Hand a message to the session.
    Transmit(Transmit),
    /// Ask WhatsApp until when new chats are locked; answered by [`Input::Lock`], or not at all.
    AskLock,
    /// Answer a caller.
    Reply(ReplyId, Reply),
    /// The request id is known: answer from its record, or refuse if the question was another.
    ReplyFromRecord(ReplyId, IdempotencyKey, [u8; 32]),
    /// Try to deliver an event to an endpoint.
    Deliver(Dispatch),
    /// Read more of the webhook queue.
    LoadPage(LoadPage),
    /// Read events for a replay.
    LoadReplay(LoadReplay),
    /// Events up to here are durable: wake the streams.
    EventsVisible(EventSeq),
    /// The log begins behind this event from now on.
    EventFloor(EventSeq),
    /// Look for rows that are too old; answered by [`Input::Swept`].
    Sweep(Sweep),
    /// The state changed: show it, count it, log it.
    StateChanged {
        /// Before.
        from: State,
        /// After.
        to: State,
    },
    /// Count for the metrics.
    Count(Counted),
    /// Everything is finished: the actor may end.
    Drained,
}

/// Things worth counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// WhatsApp accepted a message, this long after we did.
    Sent(Duration),
    /// Messages were received.
    Received(u64),
    /// A message failed for good.
    Failed(FailureCode),
    /// A message went over the wire again.
    Resent,
    /// So many rows are removed because they were kept long enough.
    Swept(u64),
    /// The number went through everything it may forget.
    SweepPassed,
    /// WhatsApp refused to open a chat: new ones are held.
    Held(LockReason),
    /// A webhook delivery was given up.
    DeadLetter(DeadReason),
    /// A webhook delivery was set aside, so that its chat goes on.
    SetAside,
    /// A webhook endpoint was stopped.
    EndpointDisabled(u32, DisabledReason),
    /// Nothing is left of a contact.
    ContactErased,
}

/// What a number is rebuilt from.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Its life, if it ever had one.
    pub life: Option<Life>,
    /// Whether credentials are stored: they become durable before the life that knows of them.
    pub has_credentials: bool,
    /// High-water marks.
    pub counters: Counters,
    /// Unsettled sends, in order.
    pub outbox: Vec<OutboxRow>,
    /// Their chats in which the other side has written.
    pub warm: HashSet<ChatNo>,
    /// State of the limiter.
    pub limiter: LimiterRecord,
    /// What it remembers of chats.
    pub paces: Vec<(ChatNo, ChatPace)>,
    /// Endpoints, each with what is queued for it.
    pub endpoints: Vec<StoredEndpoint>,
    /// How long things are kept.
    pub rules: Rules,
    /// What the owner orders about sending.
    pub orders: SendingOrders,
    /// Contacts being erased.
    pub erasures: Vec<Erasure>,
}
