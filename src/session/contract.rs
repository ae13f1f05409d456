//! What every kind of session takes and gives, so that the actor of a number never learns a protocol.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::domain::close::CloseReason;
use crate::domain::id::MessageSeq;
use crate::domain::ledger::SessionMemory;
use crate::domain::limiter::LockAnswer;
use crate::domain::message::{Content, Direction};
use crate::domain::outbox::Devices;
use crate::domain::passkey::Assertion;
use crate::domain::phone::{Contact, Lid, Phone};
use crate::domain::time::Timestamp;
use crate::domain::trouble::Trouble;

/// Commands a session holds before it must be asked again; the sender is told when it is full.
pub const COMMANDS_MAX: usize = 64;
/// Events waiting for the number's actor before the session stops reading from the socket.
pub const EVENTS_MAX: usize = 64;

/// What a session is asked to do. Small, as a channel holds room for 32 of them from the start, in every session.
#[derive(Debug)]
pub enum SessionCommand {
    /// Put one message on the wire. Answered by [`SessionEvent::Written`] or [`SessionEvent::NotWritten`].
    Send(Box<Outgoing>),
    /// Ask until when the account is locked for opening new chats. Answered by [`SessionEvent::Lock`], or not at all.
    AskLock,
    /// The person unlocked the passkey that [`SessionEvent::PasskeyRequest`] asks for. Answered when WhatsApp has it.
    AnswerPasskey(Box<Assertion>, oneshot::Sender<Result<(), PasskeyRefused>>),
    /// The person found the code of [`SessionEvent::PasskeyCode`] on the phone as well. Answered when WhatsApp knows.
    ConfirmPasskey(oneshot::Sender<Result<(), PasskeyRefused>>),
    /// Unlink this device on the server; the session then closes with `LoggedOut`.
    Logout,
    /// Close politely. The session ends with [`CloseReason::Requested`].
    Close,
}

/// One message to put on the wire.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Its history row, echoed in the answer.
    pub seq: MessageSeq,
    /// WhatsApp's id, the same at every attempt.
    pub whatsapp_id: String,
    /// The recipient.
    pub to: Contact,
    /// What it says.
    pub content: Content,
    /// Whether the recipient's devices must be asked for again first.
    pub devices: Devices,
}

/// What a session takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes that came since the session began.
    pub received: u64,
    /// Bytes that went.
    pub sent: u64,
    /// Its memory, estimated.
    pub memory: SessionMemory,
}

/// What a session tells. Exactly one `Closed` ends every session. It travels boxed, for the same reason.
#[derive(Debug)]
pub enum SessionEvent {
    /// Show this QR code; it replaces the previous one.
    QrCode {
        /// The text to encode.
        code: String,
        /// How long it is valid.
        valid_for: Duration,
    },
    /// Show this code, to be typed into the phone.
    PairingCode {
        /// Eight letters and digits.
        code: String,
        /// How long it is valid.
        valid_for: Duration,
    },
    /// WhatsApp links only with the account's passkey: its owner is to unlock it in a browser.
    PasskeyRequest {
        /// WebAuthn request options, as JSON.
        options: String,
        /// How long WhatsApp waits for the answer.
        valid_for: Duration,
    },
    /// Its owner is to compare this code with the one on the phone.
    PasskeyCode {
        /// Two groups of four letters and digits.
        code: String,
        /// How long we wait for the answer.
        valid_for: Duration,
    },
    /// The phone accepted us and the credentials are durable.
    Paired {
        /// The account's phone number.
        phone: Phone,
        /// Its linked identity.
        lid: Option<Lid>,
    },
    /// Logged in and drained: sends are possible now.
    Online,
    /// The server answered a ping or another question: proof that both directions work.
    Alive,
    /// Something is wrong with the connection, which stands.
    Troubled(Trouble),
    /// It no longer is.
    Relieved(Trouble),
    /// The message was handed to the socket. Not yet accepted by WhatsApp.
    Written {
        /// Which one.
        seq: MessageSeq,
    },
    /// The message did not reach the socket.
    NotWritten {
        /// Which one.
        seq: MessageSeq,
        /// What follows from it.
        error: SendError,
    },
    /// WhatsApp's answer to a message.
    Acked {
        /// The message, by WhatsApp's id.
        whatsapp_id: String,
        /// `None`: accepted. Otherwise WhatsApp's error code.
        error: Option<u16>,
    },
    /// A receipt of the other side.
    Receipt {
        /// The messages, by WhatsApp's id.
        whatsapp_ids: Vec<String>,
        /// Whose receipt it is.
        from: Contact,
        /// How far they got.
        kind: ReceiptKind,
        /// By WhatsApp's clock.
        at: Timestamp,
        /// Answered once what follows from it is on disk; WhatsApp is told only then.
        durable: oneshot::Sender<Result<(), NotDurable>>,
    },
    /// WhatsApp's clock, at this moment.
    ServerTime(Timestamp),
    /// What it takes, from time to time and at its end.
    Usage(Usage),
    /// What WhatsApp says of its lock on new chats.
    Lock(LockAnswer),
    /// Messages to make durable. WhatsApp gets its receipt only after `durable` was answered with `Ok`.
    Inbound {
        /// In the order of arrival.
        messages: Vec<Incoming>,
        /// Answered once everything is on disk; dropped or `Err` means: deliver again.
        durable: oneshot::Sender<Result<(), NotDurable>>,
    },
    /// The connection is over and its socket is really gone.
    Closed(CloseReason),
}

/// WhatsApp did not take the person's proof, or not in time. The session ends with `PairingRefused`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PasskeyRefused;

/// Why a message was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendError {
    /// No usable connection; try again when online.
    Offline,
    /// The call did not return in time: it may or may not have reached the wire.
    TimedOut,
    /// The recipient is not on WhatsApp.
    NoSuchRecipient,
    /// The library refuses to build the message; trying again will not help.
    Invalid,
    /// A store write failed; the session is about to close.
    StoreFailed,
    /// Anything else; worth another try.
    Other,
}

/// How far a receipt says a message got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceiptKind {
    /// On a device.
    Delivered,
    /// Opened.
    Read,
    /// Played.
    Played,
}

/// A received message, decrypted.
#[derive(Debug, Clone)]
pub struct Incoming {
    /// WhatsApp's id; not unique per sender, see `digest`.
    pub whatsapp_id: String,
    /// Inbound, or our own from another device.
    pub direction: Direction,
    /// The other side of the chat.
    pub chat: Contact,
    /// The sender's display name, where known.
    pub sender_name: Option<String>,
    /// What it says.
    pub content: Content,
    /// Hash of the decoded message, for telling a repeat from an id used twice.
    pub digest: [u8; 16],
    /// When it was written, by WhatsApp's clock.
    pub written_at: Timestamp,
}

/// The number could not make the messages durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotDurable;

/// The number's end of a running session. Dropping it closes the session.
#[derive(Debug)]
pub struct SessionHandle {
    /// Commands; `try_send` only.
    pub commands: mpsc::Sender<SessionCommand>,
}
