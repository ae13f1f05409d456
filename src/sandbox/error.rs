//! Everything that can go wrong inside the sandbox, typed, so that a refusal at the HTTP door and a closed socket can
//! both say why.

use whatsapp_rust::buffa;
use whatsapp_rust::wacore::handshake::{HandshakeError, NoiseError};
use whatsapp_rust::wacore::libsignal::protocol::{CurveError, SignalProtocolError};
use whatsapp_rust::wacore_binary::error::BinaryError;

/// Why the sandbox refused or gave up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The peer sent something the protocol does not allow at this point.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// The request names something that does not exist.
    #[error("not found: {0}")]
    NotFound(&'static str),
    /// The request is understood but contradicts the present state.
    #[error("conflict: {0}")]
    Conflict(&'static str),
    /// A queue or table with a named limit is full.
    #[error("full: {0}")]
    Full(&'static str),
    /// The Noise handshake failed.
    #[error("handshake: {0}")]
    Handshake(#[from] HandshakeError),
    /// A transport frame did not authenticate.
    #[error("noise: {0}")]
    Noise(#[from] NoiseError),
    /// Signal refused to encrypt or decrypt.
    #[error("signal: {0}")]
    Signal(#[from] SignalProtocolError),
    /// A curve operation failed.
    #[error("curve: {0}")]
    Curve(#[from] CurveError),
    /// A node could not be encoded or decoded.
    #[error("node: {0}")]
    Node(#[from] BinaryError),
    /// A protobuf could not be decoded.
    #[error("protobuf: {0}")]
    Protobuf(#[from] buffa::DecodeError),
    /// A frame does not fit the wire format.
    #[error("frame: {0}")]
    Frame(String),
    /// The WebSocket under a client failed.
    #[error("websocket: {0}")]
    WebSocket(Box<tokio_tungstenite::tungstenite::Error>),
    /// The peer closed the connection.
    #[error("closed by the peer")]
    Closed,
    /// The peer did not speak in time.
    #[error("timed out")]
    TimedOut,
    /// A file could not be read or written.
    #[error("file: {0}")]
    File(#[from] std::io::Error),
    /// A file or a request body is not the JSON expected.
    #[error("json: {0}")]
    Json(#[from] serde_json::Error),
}

impl From<tokio_tungstenite::tungstenite::Error> for SandboxError {
    fn from(error: tokio_tungstenite::tungstenite::Error) -> Self {
        Self::WebSocket(Box::new(error))
    }
}

/// The sandbox's result.
pub type Result<T> = std::result::Result<T, SandboxError>;
