//! A webhook receiver that remembers what a comparison needs: who got what, in which order, how often.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// One event as a subscription got it.
#[derive(Debug, Clone)]
pub struct Delivered {
    /// `data.sequence`.
    pub sequence: u64,
    /// `webhook-id`.
    pub id: String,
    /// The other side of the chat, if the event belongs to one.
    pub chat: Option<String>,
    /// How often it came.
    pub times: u32,
    digest: [u8; 32],
}

#[derive(Default)]
struct Subscription {
    /// In the order of their first arrival.
    delivered: Vec<Delivered>,
    places: HashMap<String, usize>,
}

#[derive(Default)]
struct Shared {
    subscriptions: HashMap<String, Subscription>,
    problems: Vec<String>,
}

type Notes = Arc<Mutex<Shared>>;

/// A running receiver.
pub struct Sink {
    address: SocketAddr,
    notes: Notes,
    _server: JoinSet<()>,
}

impl Sink {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let notes = Notes::default();
        let router = Router::new().route("/{subscription}", post(receive)).with_state(notes.clone());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, notes, _server: server }
    }

    pub fn url(&self, subscription: &str) -> String {
        format!("http://{}/{subscription}", self.address)
    }

    /// What a subscription got, in the order of first arrival.
    pub fn delivered(&self, subscription: &str) -> Vec<Delivered> {
        let notes = self.notes.lock().unwrap();
        notes.subscriptions.get(subscription).map(|subscription| subscription.delivered.clone()).unwrap_or_default()
    }

    /// What was wrong with a single delivery.
    pub fn problems(&self) -> Vec<String> {
        self.notes.lock().unwrap().problems.clone()
    }
}

async fn receive(State(notes): State<Notes>, Path(name): Path<String>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let id = headers.get("webhook-id").and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
    let json: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    let data = &json["data"];
    let mut notes = notes.lock().unwrap();
    if data["id"] != id.as_str() || data["numberId"] != name.as_str() {
        notes.problems.push(format!("webhook {id} at {name}: its body speaks of another event: {json}"));
    }
    let digest = Sha256::digest(&body).into();
    let subscription = notes.subscriptions.entry(name.clone()).or_default();
    if let Some(place) = subscription.places.get(&id) {
        let known = &mut subscription.delivered[*place];
        known.times += 1;
        if known.digest != digest {
            let problem = format!("webhook {id} at {name}: it says something else the second time: {json}");
            notes.problems.push(problem);
        }
        return StatusCode::OK;
    }
    let peer = if json["event"] == "message.received" { &data["from"] } else { &data["to"] };
    let chat = peer.as_str().map(|phone| phone.trim_start_matches('+').to_owned());
    let sequence = data["sequence"].as_u64().unwrap_or(0);
    subscription.places.insert(id.clone(), subscription.delivered.len());
    subscription.delivered.push(Delivered { sequence, id, chat, times: 1, digest });
    StatusCode::OK
}
