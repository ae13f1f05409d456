//! Why a connection ended, in the terms decisions are made in. The session translates what it saw on the wire;
//! `lifecycle` gives each reason its verdict.

use serde::{Deserialize, Serialize};

use super::time::Timestamp;

/// The end of one connection to WhatsApp.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CloseReason {
    /// We asked for it.
    Requested,
    /// The server recycles the stream: code 515, a plain end of stream. Routine.
    Recycled,
    /// The socket died or was closed without a word.
    ConnectionLost,
    /// Bytes may flow but nothing answers.
    Unresponsive,
    /// No TCP, TLS or WebSocket connection came about.
    Unreachable,
    /// The number's proxy is not there, or does not answer.
    ProxyUnreachable,
    /// The number's proxy refuses to connect, or does not get there itself.
    ProxyRefused,
    /// The number's proxy refuses user and password, or wants some.
    ProxyLoginRefused,
    /// WhatsApp's edge answered the WebSocket upgrade with an HTTP status.
    UpgradeRefused {
        /// The status.
        status: u16,
    },
    /// The Noise handshake brought no answer in time.
    HandshakeSilent,
    /// The certificate chain or a seal in the handshake was wrong: somebody is in between, or the root changed.
    HandshakeRefused,
    /// 401, 516, `device_removed`: the account owner unlinked this device.
    LoggedOut {
        /// WhatsApp's code.
        code: u16,
    },
    /// 403: the account is locked.
    Locked,
    /// 406: the account is banned.
    Banned,
    /// 402: banned until a moment.
    TemporarilyBanned {
        /// WhatsApp's reason code, for instance 101 (wrote to too many strangers).
        code: u16,
        /// When the ban ends, if the server said so.
        until: Option<Timestamp>,
    },
    /// Another connection took over the same device.
    Replaced,
    /// 405: the server no longer speaks to this version.
    ClientOutdated,
    /// 429.
    RateLimited,
    /// 500, 503.
    ServerError {
        /// WhatsApp's code.
        code: u16,
    },
    /// Any other refusal after login.
    Refused {
        /// WhatsApp's code; 0 when it gave none.
        code: u16,
    },
    /// The server ended the stream with an error nobody knows.
    StreamError {
        /// WhatsApp's code; 0 when it gave none.
        code: u16,
    },
    /// The server recycles the stream until it gets the ack of a stanza it sent.
    AckOwed,
    /// The server could not parse what we sent.
    NotWellFormed,
    /// All QR codes were shown and none was scanned, or the pairing was given up.
    PairingEnded,
    /// Pairing failed: wrong signature, or another phone scanned than was expected.
    PairingRefused {
        /// Stable code, for instance `WRONG_NUMBER`.
        code: String,
    },
    /// Our own store failed; the session was dropped unflushed.
    StoreFailed,
    /// A task of the session panicked or hung.
    Crashed,
}

impl CloseReason {
    /// Whether the server may know less of the end than we do: it may still be working on what the socket carried.
    #[must_use]
    pub const fn leaves_the_server_behind(&self) -> bool {
        matches!(
            self,
            Self::ConnectionLost | Self::Unresponsive | Self::HandshakeSilent | Self::StoreFailed | Self::Crashed
        )
    }

    /// Stable code for the API, events, metrics and logs.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Requested => "REQUESTED",
            Self::Recycled => "RECYCLED",
            Self::ConnectionLost => "CONNECTION_LOST",
            Self::Unresponsive => "UNRESPONSIVE",
            Self::Unreachable => "UNREACHABLE",
            Self::ProxyUnreachable => "PROXY_UNREACHABLE",
            Self::ProxyRefused => "PROXY_REFUSED",
            Self::ProxyLoginRefused => "PROXY_AUTH_FAILED",
            Self::UpgradeRefused { .. } => "UPGRADE_REFUSED",
            Self::HandshakeSilent => "HANDSHAKE_SILENT",
            Self::HandshakeRefused => "HANDSHAKE_REFUSED",
            Self::LoggedOut { .. } => "LOGGED_OUT",
            Self::Locked => "ACCOUNT_LOCKED",
            Self::Banned => "ACCOUNT_BANNED",
            Self::TemporarilyBanned { .. } => "TEMPORARILY_BANNED",
            Self::Replaced => "REPLACED",
            Self::ClientOutdated => "CLIENT_OUTDATED",
            Self::RateLimited => "RATE_LIMITED",
            Self::ServerError { .. } => "SERVER_ERROR",
            Self::Refused { .. } => "REFUSED",
            Self::StreamError { .. } => "STREAM_ERROR",
            Self::AckOwed => "ACK_OWED",
            Self::NotWellFormed => "NOT_WELL_FORMED",
            Self::PairingEnded => "PAIRING_ENDED",
            Self::PairingRefused { .. } => "PAIRING_REFUSED",
            Self::StoreFailed => "STORE_FAILED",
            Self::Crashed => "SESSION_CRASHED",
        }
    }

    /// WhatsApp's own number for it, if it gave one.
    #[must_use]
    pub const fn detail(&self) -> Option<u16> {
        match self {
            Self::LoggedOut { code }
            | Self::TemporarilyBanned { code, .. }
            | Self::ServerError { code }
            | Self::Refused { code }
            | Self::StreamError { code }
            | Self::UpgradeRefused { status: code } => Some(*code),
            Self::Locked => Some(403),
            Self::Banned => Some(406),
            Self::ClientOutdated => Some(405),
            Self::RateLimited => Some(429),
            Self::Requested
            | Self::Recycled
            | Self::ConnectionLost
            | Self::Unresponsive
            | Self::Unreachable
            | Self::ProxyUnreachable
            | Self::ProxyRefused
            | Self::ProxyLoginRefused
            | Self::HandshakeSilent
            | Self::HandshakeRefused
            | Self::Replaced
            | Self::AckOwed
            | Self::NotWellFormed
            | Self::PairingEnded
            | Self::PairingRefused { .. }
            | Self::StoreFailed
            | Self::Crashed => None,
        }
    }
}
