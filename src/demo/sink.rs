//! A customer's webhook receiver: takes what comes, verifies every signature the way the Standard Webhooks
//! specification says, and remembers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// One webhook as it arrived.
#[derive(Debug, Clone)]
pub struct Received {
    /// The path's last part: which subscription it came by.
    pub subscription: String,
    /// `webhook-id`.
    pub id: String,
    /// Whether the signature is right.
    pub verified: bool,
    /// The body.
    pub body: serde_json::Value,
}

impl Received {
    /// The event's name.
    #[must_use]
    pub fn event(&self) -> &str {
        self.body["event"].as_str().unwrap_or_default()
    }
}

struct Shared {
    secrets: Mutex<HashMap<String, String>>,
    received: watch::Sender<Vec<Received>>,
    answer: Mutex<StatusCode>,
}

/// A running receiver.
pub struct Sink {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sink({})", self.address)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Sink {
    /// Listens on a free port.
    ///
    /// # Errors
    /// When there is none.
    pub async fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            secrets: Mutex::default(),
            received: watch::Sender::new(Vec::new()),
            answer: Mutex::new(StatusCode::OK),
        });
        let router = Router::new().route("/{subscription}", post(receive)).with_state(shared.clone());
        let server = tokio::task::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { address, shared, server })
    }

    /// Where a subscription of this name is to deliver.
    #[must_use]
    pub fn url(&self, subscription: &str) -> String {
        format!("http://{}/{subscription}", self.address)
    }

    /// Tells the receiver a subscription's secret.
    pub fn expect(&self, subscription: &str, secret: &str) {
        let mut secrets = self.shared.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        secrets.insert(subscription.to_owned(), secret.to_owned());
    }

    /// What it answers from now on.
    pub fn answer(&self, status: u16) {
        if let Ok(status) = StatusCode::from_u16(status) {
            *self.shared.answer.lock().unwrap_or_else(PoisonError::into_inner) = status;
        }
    }

    /// Everything so far, in order of arrival.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.borrow().clone()
    }

    /// Waits until something that arrived fits.
    pub async fn wait_for(&self, patience: Duration, fits: impl Fn(&Received) -> bool) -> Option<Received> {
        let mut changes = self.shared.received.subscribe();
        let found = changes.wait_for(|received| received.iter().any(&fits));
        let received = tokio::time::timeout(patience, found).await.ok()?.ok()?;
        received.iter().find(|received| fits(received)).cloned()
    }
}

async fn receive(
    State(shared): State<Arc<Shared>>,
    Path(subscription): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    let secret = shared.secrets.lock().unwrap_or_else(PoisonError::into_inner).get(&subscription).cloned();
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let id = header("webhook-id");
    let verified = secret.is_some_and(|secret| {
        verify(&secret, &id, &header("webhook-timestamp"), &header("webhook-signature"), &body).is_some()
    });
    let body = serde_json::from_slice(&body).unwrap_or_default();
    shared.received.send_modify(|received| received.push(Received { subscription, id, verified, body }));
    *shared.answer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The receiver's half of the specification, written apart from the sender's.
fn verify(secret: &str, id: &str, timestamp: &str, signatures: &str, body: &[u8]) -> Option<()> {
    let key = STANDARD.decode(secret.strip_prefix("whsec_")?).ok()?;
    signatures.split(' ').filter_map(|signature| signature.strip_prefix("v1,")).find_map(|signature| {
        let claimed = STANDARD.decode(signature).ok()?;
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).ok()?;
        mac.update(format!("{id}.{timestamp}.").as_bytes());
        mac.update(body);
        mac.verify_slice(&claimed).ok()
    })
}
