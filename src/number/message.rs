//! The mailbox of a number. Everything that took time comes back as one of these.

use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::domain::capacity::Limiting;
use crate::domain::change::IdempotencyRecord;
use crate::domain::close::CloseReason;
use crate::domain::delivery::{AttemptEnd, DeliveryRow, Logged};
use crate::domain::endpoint::Endpoint;
use crate::domain::id::{ChatNo, MessageSeq};
use crate::domain::lifecycle::LinkBy;
use crate::domain::limiter::LockAnswer;
use crate::domain::message::MessageStatus;
use crate::domain::number::{Arrived, CancelOutcome, CancelTarget, EndpointOrder, Receipted, ReplyId, SendRequest};
use crate::domain::number::{Snapshot, Ticket};
use crate::domain::orders::SendingOrders;
use crate::domain::passkey::Assertion;
use crate::domain::proxy::ProxyAddress;
use crate::domain::retention::{Found, Retention};
use crate::domain::time::Timestamp;
use crate::domain::trouble::Trouble;
use crate::session::contract::{PasskeyRefused, SendError, SessionCommand, Usage};
use crate::store::error::StoreError;
use crate::store::number_store::NumberStore;

/// Counts the connections of one actor; what an older one still says is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionNo(pub u64);

/// A turn to connect; dropping it lets the next one go.
pub struct GateTurn(pub Option<Box<dyn FnOnce() + Send>>);

impl Drop for GateTurn {
    fn drop(&mut self) {
        if let Some(give_back) = self.0.take() {
            give_back();
        }
    }
}

impl std::fmt::Debug for GateTurn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GateTurn")
    }
}

/// A durable acceptance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// The history row.
    pub seq: MessageSeq,
    /// When it was accepted; the first time, if the request was a repeat.
    pub created_at: Timestamp,
    /// How long it will probably wait; unknown while the number is not online.
    pub predicted_wait: Option<Duration>,
}

/// Why a number serves nobody at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    /// It is starting, restarting or quarantined.
    #[error("the number is not served at this moment")]
    NotReady,
    /// There is no room on the disk, or too little to begin something new.
    #[error("the disk is full")]
    DiskFull,
    /// The number's volume is quarantined.
    #[error("the store is not available")]
    StoreFailed,
}

impl From<&StoreError> for Unserved {
    fn from(error: &StoreError) -> Self {
        match error {
            StoreError::DiskFull => Self::DiskFull,
            _ => Self::StoreFailed,
        }
    }
}

/// Why a send was not accepted. Nothing of it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendRefused {
    /// The number serves nobody.
    #[error(transparent)]
    Unserved(#[from] Unserved),
    /// Too many calls at once for this number.
    #[error("too many calls at once for this number")]
    Busy,
    /// Too many unsettled sends.
    #[error("the number's queue is full")]
    QueueFull,
    /// It would wait longer than its caller likes.
    #[error("the message would wait too long")]
    WaitTooLong {
        /// How long it would probably wait; unknown when nobody can tell.
        wait: Option<Duration>,
        /// What for.
        limiting: Limiting,
    },
    /// The daemon is going down.
    #[error("the daemon is draining")]
    Draining,
    /// The request id was used for something else.
    #[error("the request id was used before for another request")]
    RequestIdReused,
}

/// The number's own store failed. The actor ends, which is not a crash of the number's: its successor reads everything
/// again as soon as the volume is open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the number's store failed: {0}")]
pub struct StoreLost(pub StoreError);

impl StoreLost {
    /// Stable code for the number's state.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self.0 {
            StoreError::DiskFull => "DISK_FULL",
            _ => "STORE_FAILED",
        }
    }
}

/// Why a change of endpoints was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EndpointRefused {
    /// The number serves nobody.
    #[error(transparent)]
    Unserved(#[from] Unserved),
    /// No such endpoint.
    #[error("no such webhook")]
    NotFound,
    /// The number has as many as it may.
    #[error("the number has as many webhooks as it may")]
    TooMany,
    /// A replay is under way, or too much waits to be sent again.
    #[error("the webhook is busy sending again")]
    ReplayBusy,
}

/// Why a contact is not erased now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EraseRefused {
    /// The number serves nobody.
    #[error(transparent)]
    Unserved(#[from] Unserved),
    /// A message to the contact may just be leaving.
    #[error("a message to the contact is in flight")]
    InFlight,
    /// Too many contacts are being erased.
    #[error("too many contacts are being erased")]
    TooMany,
}

/// What an operator can order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Connect whenever possible.
    Start,
    /// Disconnect and stay down.
    Stop,
    /// Show codes, if it is not linked.
    Pair(LinkBy),
    /// Unlink the device at WhatsApp.
    Logout,
    /// Give up the connection, if there is one, and connect anew, through the proxy that is recorded now.
    Reconnect,
}

/// What a person does to link with a passkey.
#[derive(Debug)]
pub enum PasskeyStep {
    /// Unlocks it: the browser's proof.
    Answer(Assertion),
    /// Finds this code on the phone.
    Confirm(String),
}

/// Where WhatsApp's answer to such a step comes; dropped when the linking has ended.
pub type PasskeyVerdict = oneshot::Receiver<Result<(), PasskeyRefused>>;

/// Why such a step came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PasskeyNotTaken {
    /// The number serves nobody.
    #[error(transparent)]
    Unserved(#[from] Unserved),
    /// Nobody asks for a passkey, or no longer.
    #[error("no passkey is asked for")]
    NotRequested,
    /// There is no code to compare, or no longer.
    #[error("there is no code to confirm")]
    NoCode,
    /// The phone shows another code.
    #[error("the codes differ")]
    OtherCode,
    /// WhatsApp did not take it; the linking has ended.
    #[error("WhatsApp did not take it")]
    Refused,
}

/// Whoever waits for an answer of the machine.
#[derive(Debug)]
pub(super) enum Waiter {
    Send(oneshot::Sender<Result<Accepted, SendRefused>>, OwnedSemaphorePermit),
    AddEndpoint(oneshot::Sender<Result<Endpoint, EndpointRefused>>),
    RemoveEndpoint(oneshot::Sender<Result<(), EndpointRefused>>),
    ChangeEndpoint(oneshot::Sender<Result<Endpoint, EndpointRefused>>),
    Inbound(oneshot::Sender<()>),
    Cancel(oneshot::Sender<Vec<(MessageSeq, CancelOutcome)>>),
    Erase(oneshot::Sender<Result<(), EraseRefused>>),
}

/// An event of the session, resolved against the disk.
#[derive(Debug)]
pub(super) enum FromSession {
    Opened(mpsc::Sender<SessionCommand>),
    QrCode { code: String, valid_for: Duration },
    PairingCode { code: String, valid_for: Duration },
    PasskeyRequest { options: String, valid_for: Duration },
    PasskeyCode { code: String, valid_for: Duration },
    Paired,
    Online,
    Alive,
    Troubled(Trouble),
    Relieved(Trouble),
    ServerTime(Timestamp),
    Usage(Usage),
    Written,
    NotWritten { seq: MessageSeq, error: SendError },
    Acked { whatsapp_id: String, error: Option<u16> },
    Receipts { messages: Vec<Receipted>, status: MessageStatus, at: Timestamp, durable: oneshot::Sender<()> },
    Lock(LockAnswer),
    Arrived { messages: Vec<Arrived>, durable: oneshot::Sender<()> },
    Closed(CloseReason),
}

/// The mailbox.
#[derive(Debug)]
pub enum NumberMessage {
    #[doc(hidden)]
    Internal(Internal),
    /// Accept a send; answered when durable.
    Send {
        /// What.
        request: Box<SendRequest>,
        /// To whom.
        reply: oneshot::Sender<Result<Accepted, SendRefused>>,
        /// Admission, given back with the answer.
        permit: OwnedSemaphorePermit,
    },
    /// An order; answered when taken.
    Control(Control, oneshot::Sender<()>),
    /// A step of linking with a passkey; answered with where WhatsApp's answer will come.
    Passkey(PasskeyStep, oneshot::Sender<Result<PasskeyVerdict, PasskeyNotTaken>>),
    /// Withdraw messages; answered when durable.
    Cancel(Vec<CancelTarget>, oneshot::Sender<Vec<(MessageSeq, CancelOutcome)>>),
    /// Add a webhook endpoint.
    AddEndpoint(Box<Endpoint>, oneshot::Sender<Result<Endpoint, EndpointRefused>>),
    /// Remove one.
    RemoveEndpoint(u32, oneshot::Sender<Result<(), EndpointRefused>>),
    /// What it keeps was set; on disk already.
    Retention(Retention),
    /// What its owner orders about its sending was set; on disk already.
    Orders(SendingOrders),
    /// Change one, or send something again.
    ChangeEndpoint(u32, EndpointOrder, oneshot::Sender<Result<Endpoint, EndpointRefused>>),
    /// Erase a contact; answered when the order is durable.
    Erase(ChatNo, oneshot::Sender<Result<(), EraseRefused>>),
    /// Look through what waits and show what follows for its capacity; answered when it is shown.
    Look(oneshot::Sender<()>),
    /// The watchdog asks for a sign of life.
    Ping,
    /// Finish what waits for an answer, close politely, end.
    Drain,
    /// Panic in the handler: for tests of the supervisor.
    #[cfg(feature = "sandbox")]
    Panic,
}

/// What the number's own tasks say.
#[derive(Debug)]
pub struct Internal(pub(super) Inner);

#[derive(Debug)]
pub(super) enum Inner {
    Loaded(Box<Result<(NumberStore, Snapshot), StoreError>>),
    Stored(Ticket, Result<(), StoreError>),
    Record(ReplyId, [u8; 32], Result<Option<IdempotencyRecord>, StoreError>),
    Granted(GateTurn),
    /// The proxy is down.
    WayClosed,
    /// The way through this proxy may be tried.
    WayOpen(ProxyAddress),
    Session(ConnectionNo, FromSession, Option<OwnedSemaphorePermit>),
    Attempted(AttemptEnd),
    PageLoaded(u32, Result<Vec<DeliveryRow>, StoreError>),
    ReplayLoaded(u32, Result<Vec<Logged>, StoreError>),
    Swept(Box<Result<Found, StoreError>>),
    Wake,
}

impl From<Inner> for NumberMessage {
    fn from(inner: Inner) -> Self {
        Self::Internal(Internal(inner))
    }
}
