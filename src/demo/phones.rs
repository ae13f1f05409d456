//! The people with the phones: the sandbox's HTTP interface, called as anybody would.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest answer read, in bytes.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection.
    #[error("no answer: {0}")]
    Io(#[from] std::io::Error),
    /// The answer was no success.
    #[error("answered {status}: {body}")]
    Status {
        /// HTTP status.
        status: u16,
        /// What it said.
        body: String,
    },
}

/// One HTTP call to a loopback server, one connection each.
///
/// # Errors
/// When there is no answer, or another status than 2xx.
pub async fn call(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Result<String, CallError> {
    let mut stream = TcpStream::connect(to).await?;
    let mut head =
        format!("{method} {path} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunk(body) } else { body.to_owned() };
    if (200..300).contains(&status) { Ok(body) } else { Err(CallError::Status { status, body }) }
}

fn unchunk(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else { break };
        let Some(piece) = after.get(..size).filter(|piece| !piece.is_empty()) else { break };
        body.push_str(piece);
        rest = after.get(size + 2..).unwrap_or("");
    }
    body
}

/// The phones of one sandbox.
#[derive(Debug, Clone, Copy)]
pub struct Phones {
    /// Where the sandbox listens.
    pub sandbox: SocketAddr,
}

impl Phones {
    /// A person scans a QR code.
    ///
    /// # Errors
    /// When the sandbox refuses.
    pub async fn scan(&self, phone: &str, code: &str) -> Result<(), CallError> {
        self.post(&format!("/admin/mock-phone/scan-qr?phone={phone}"), code).await.map(drop)
    }

    /// A person writes.
    ///
    /// # Errors
    /// When the sandbox refuses.
    pub async fn write(&self, from: &str, to: &str, text: &str) -> Result<(), CallError> {
        self.post(&format!("/admin/mock-phone/send?from={from}&to={to}"), text).await.map(drop)
    }

    /// A person opens a chat.
    ///
    /// # Errors
    /// When the sandbox refuses.
    pub async fn read(&self, phone: &str, peer: &str) -> Result<(), CallError> {
        self.post(&format!("/admin/mock-phone/read?phone={phone}&peer={peer}"), "").await.map(drop)
    }

    /// A phone loses its keys: it asks again for what is sent to it next.
    ///
    /// # Errors
    /// When the sandbox refuses.
    pub async fn forget_sessions(&self, phone: &str) -> Result<(), CallError> {
        self.post(&format!("/admin/mock-phone/forget-sessions?phone={phone}"), "").await.map(drop)
    }

    /// What a person sees: JSON objects, oldest first.
    ///
    /// # Errors
    /// When the sandbox refuses.
    pub async fn shown(&self, phone: &str) -> Result<Vec<serde_json::Value>, CallError> {
        let path = format!("/admin/mock-phone/messages?phone={phone}");
        let lines = call(self.sandbox, "GET", &path, &[], "").await?;
        Ok(lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// WhatsApp ends a connection.
    ///
    /// # Errors
    /// When the sandbox refuses.
    pub async fn kick(&self, phone: &str, code: &str) -> Result<(), CallError> {
        self.post(&format!("/admin/kick?phone={phone}&code={code}"), "").await.map(drop)
    }

    /// The sandbox's counters.
    ///
    /// # Errors
    /// When the sandbox refuses.
    pub async fn stats(&self) -> Result<serde_json::Value, CallError> {
        let text = call(self.sandbox, "GET", "/admin/stats", &[], "").await?;
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    /// The sandbox's counters, with the connections of one phone's devices under `devices`.
    ///
    /// # Errors
    /// When the sandbox refuses.
    pub async fn stats_of(&self, phone: &str) -> Result<serde_json::Value, CallError> {
        let text = call(self.sandbox, "GET", &format!("/admin/stats?phone={phone}"), &[], "").await?;
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    /// Any other call of the sandbox.
    ///
    /// # Errors
    /// When the sandbox refuses.
    pub async fn post(&self, path: &str, body: &str) -> Result<String, CallError> {
        call(self.sandbox, "POST", path, &[], body).await
    }
}
