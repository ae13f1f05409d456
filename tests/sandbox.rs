//! Unmodified whatsapp-rust clients against the sandbox in this process: linking, chatting both ways, being away, being
//! kicked, losing sessions. Everything waits on conditions with a deadline; nothing sleeps and hopes.
#![cfg(feature = "sandbox")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    clippy::large_futures,
    unreachable_pub,
    missing_docs,
    reason = "a test that cannot go on may panic"
)]

use async_trait::async_trait;
use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use switchboard::sandbox::server::{RunningSandbox, Sandbox, SandboxConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message as WsMessage;
use whatsapp_rust::bytes::Bytes;
use whatsapp_rust::store::persistence_manager::PersistenceManager;
use whatsapp_rust::types::presence::ReceiptType;
use whatsapp_rust::wacore::net::{
    DisconnectReason, HttpClient, HttpRequest, HttpResponse, Transport, TransportEvent, TransportFactory,
};
use whatsapp_rust::wacore::store::traits::{Backend, DeviceStore};
use whatsapp_rust::wacore::store::{Device, InMemoryBackend};
use whatsapp_rust::wacore::types::events::{Event, EventHandler, EventInterest, EventKind};
use whatsapp_rust::{Client, Jid, TokioRuntime, async_channel};

const PATIENCE: Duration = Duration::from_secs(30);
const ALICE: &str = "15550000001";
const BOB: &str = "15550000002";
const CAROL: &str = "15550000003";

// ---- transport ----------------------------------------------------------------------------------------------------

struct Factory {
    url: String,
}

struct Pipe {
    out: mpsc::Sender<Option<Bytes>>,
    _task: Guard,
}

struct Guard(JoinHandle<()>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[async_trait]
impl Transport for Pipe {
    async fn send(&self, data: Bytes) -> anyhow::Result<()> {
        Ok(self.out.send(Some(data)).await?)
    }

    async fn disconnect(&self) {
        let _ = self.out.send(None).await;
    }
}

#[async_trait]
impl TransportFactory for Factory {
    async fn create_transport(&self) -> anyhow::Result<(Arc<dyn Transport>, async_channel::Receiver<TransportEvent>)> {
        let address = self.url.trim_start_matches("ws://").split('/').next().unwrap_or_default();
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (socket, _) = tokio_tungstenite::client_async(self.url.as_str(), stream).await?;
        let (out, outgoing) = mpsc::channel(64);
        let (events, incoming) = async_channel::bounded(64);
        let task = Guard(tokio::spawn(pump(socket, outgoing, events)));
        Ok((Arc::new(Pipe { out, _task: task }), incoming))
    }
}

async fn pump(
    mut socket: WebSocketStream<TcpStream>,
    mut outgoing: mpsc::Receiver<Option<Bytes>>,
    events: async_channel::Sender<TransportEvent>,
) {
    let reason = loop {
        tokio::select! {
            data = outgoing.recv() => match data.flatten() {
                Some(data) => {
                    // Frames cut anywhere: the server must treat messages as a byte stream.
                    let middle = data.len() / 2;
                    for part in [data.slice(..middle), data.slice(middle..)] {
                        if socket.feed(WsMessage::Binary(part)).await.is_err() {
                            break;
                        }
                    }
                    let _ = socket.flush().await;
                }
                None => break DisconnectReason::Unknown,
            },
            message = socket.next() => match message {
                Some(Ok(WsMessage::Binary(data))) => {
                    let _ = events.send(TransportEvent::DataReceived(data)).await;
                }
                Some(Ok(WsMessage::Close(_))) | None => break DisconnectReason::StreamEnded,
                Some(Ok(_)) => {}
                Some(Err(error)) => break DisconnectReason::ReadError(error.to_string()),
            }
        }
    };
    drop(socket);
    let _ = events.send(TransportEvent::Disconnected(reason)).await;
}

struct NoHttp;

#[async_trait]
impl HttpClient for NoHttp {
    async fn execute(&self, _: HttpRequest) -> anyhow::Result<HttpResponse> {
        anyhow::bail!("the sandbox needs no HTTP client")
    }
}

// ---- a client and what it has seen --------------------------------------------------------------------------------

#[derive(Default)]
struct Seen {
    events: Mutex<Vec<Arc<Event>>>,
    news: Notify,
}

impl EventHandler for Seen {
    fn handle_event(&self, event: Arc<Event>) {
        self.events.lock().expect("lock").push(event);
        self.news.notify_waiters();
    }
}

impl Seen {
    async fn until<T>(&self, what: &str, find: impl Fn(&Event) -> Option<T>) -> T {
        let search = async {
            loop {
                let news = self.news.notified();
                if let Some(found) = self.events.lock().expect("lock").iter().find_map(|event| find(event)) {
                    return found;
                }
                news.await;
            }
        };
        tokio::time::timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
    }

    fn count(&self, matches: impl Fn(&Event) -> bool) -> usize {
        self.events.lock().expect("lock").iter().filter(|event| matches(event)).count()
    }

    async fn connected(&self) {
        self.until("Connected", |event| matches!(event, Event::Connected(_)).then_some(())).await;
    }

    async fn text(&self, wanted: &str) -> Jid {
        self.until(wanted, |event| texts(event).into_iter().find(|(text, _)| text == wanted).map(|(_, chat)| chat))
            .await
    }

    async fn receipt(&self, id: &str, kind: ReceiptType) {
        let find = |event: &Event| match event {
            Event::Receipt(receipt) if receipt.r#type == kind && receipt.message_ids.iter().any(|seen| seen == id) => {
                Some(())
            }
            _ => None,
        };
        self.until("a receipt", find).await;
    }

    async fn acked(&self, id: &str) -> Option<String> {
        let find = |event: &Event| match event {
            Event::ServerAck(ack) if ack.id == id => Some(ack.error.clone()),
            _ => None,
        };
        self.until("an ack", find).await
    }
}

fn texts(event: &Event) -> Vec<(String, Jid)> {
    let Event::Messages(batch) = event else {
        return Vec::new();
    };
    let text = |message: &whatsapp_rust::types::durability_hook::InboundMessage| {
        let text = message.message.conversation.clone();
        text.map(|text| (text, message.info.source.chat.clone()))
    };
    batch.messages.iter().filter_map(text).collect()
}

struct Number {
    client: Arc<Client>,
    seen: Arc<Seen>,
    backend: Arc<InMemoryBackend>,
}

impl Number {
    async fn new(url: String, backend: Arc<InMemoryBackend>) -> Self {
        let store: Arc<dyn Backend> = backend.clone();
        let persistence = Arc::new(PersistenceManager::new(store).await.expect("a persistence manager"));
        let client = Client::builder()
            .with_runtime(TokioRuntime)
            .with_persistence_manager(persistence)
            .with_transport_factory(Factory { url })
            .with_http_client(NoHttp)
            .with_version_override((2, 3000, 1_042_742_319))
            .with_skip_history_sync(true)
            .with_wanted_pre_key_count(30)
            .build()
            .await
            .expect("a client")
            .into_client();
        client.enable_auto_reconnect.store(false, Ordering::Relaxed);
        let seen = Arc::new(Seen::default());
        let kinds = [
            EventKind::Connected,
            EventKind::Disconnected,
            EventKind::PairSuccess,
            EventKind::PairError,
            EventKind::PairingQrCode,
            EventKind::LoggedOut,
            EventKind::StreamReplaced,
            EventKind::StreamError,
            EventKind::TemporaryBan,
            EventKind::ClientOutdated,
            EventKind::ConnectFailure,
            EventKind::Messages,
            EventKind::Receipt,
            EventKind::ServerAck,
            EventKind::UndecryptableMessage,
        ];
        client.subscribe(EventInterest::of(&kinds), seen.clone()).detach();
        Self { client, seen, backend }
    }

    /// One connection.
    fn run(&self) -> JoinHandle<()> {
        let client = Arc::clone(&self.client);
        tokio::spawn(async move { client.run().await })
    }

    async fn ended(run: JoinHandle<()>) {
        tokio::time::timeout(PATIENCE, run).await.expect("run() returns").expect("run() does not panic");
    }

    async fn leave(&self, run: JoinHandle<()>) {
        self.client.disconnect().await;
        Self::ended(run).await;
    }

    /// Links by QR code and comes back connected.
    async fn link(sandbox: &RunningSandbox, phone: &str, query: &str) -> (Self, JoinHandle<()>) {
        let number = Self::new(sandbox.ws_url(), Arc::new(InMemoryBackend::new())).await;
        let run = number.run();
        let code = number.seen.until("a QR code", |event| match event {
            Event::PairingQrCode(code) => Some(code.code.clone()),
            _ => None,
        });
        let code = code.await;
        let answer = post(sandbox, &format!("/admin/mock-phone/scan-qr?phone={phone}{query}"), &code).await;
        assert_eq!(answer["phone"], phone);
        number.seen.until("PairSuccess", |event| matches!(event, Event::PairSuccess(_)).then_some(())).await;
        Self::ended(run).await;
        let run = number.run();
        number.seen.connected().await;
        (number, run)
    }

    /// Logs in from a provisioned device row.
    async fn provisioned(sandbox: &RunningSandbox, phone: &str) -> (Self, JoinHandle<()>) {
        let row = request(sandbox, "POST", &format!("/admin/provision?phone={phone}"), "").await;
        let device: Device = serde_json::from_str(&row).expect("a device row");
        let backend = Arc::new(InMemoryBackend::new());
        backend.save(&device).await.expect("saved");
        let number = Self::new(sandbox.ws_url(), backend).await;
        let run = number.run();
        number.seen.connected().await;
        (number, run)
    }

    async fn send(&self, to: &str, text: &str) -> String {
        let sent = tokio::time::timeout(PATIENCE, self.client.send_text(Jid::pn(to), text)).await;
        sent.expect("in time").expect("sent").message_id
    }
}

// ---- the sandbox's HTTP side --------------------------------------------------------------------------------------

async fn start() -> RunningSandbox {
    start_with(None).await
}

async fn start_with(data: Option<std::path::PathBuf>) -> RunningSandbox {
    let listen = vec!["127.0.0.1:0".parse().expect("an address")];
    Sandbox::start(SandboxConfig { listen, data, seed: 1 }).await.expect("a sandbox")
}

async fn request(sandbox: &RunningSandbox, method: &str, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(sandbox.addr()).await.expect("connected");
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: sandbox\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("written");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("read");
    let answer = String::from_utf8(answer).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200"), "{method} {path}: {answer}");
    body.to_owned()
}

async fn post(sandbox: &RunningSandbox, path: &str, body: &str) -> Value {
    serde_json::from_str(&request(sandbox, "POST", path, body).await).expect("JSON")
}

async fn stats(sandbox: &RunningSandbox, phone: &str) -> Value {
    serde_json::from_str(&request(sandbox, "GET", &format!("/admin/stats?phone={phone}"), "").await).expect("JSON")
}

async fn shown(sandbox: &RunningSandbox, phone: &str) -> Vec<Value> {
    let lines = request(sandbox, "GET", &format!("/admin/mock-phone/messages?phone={phone}"), "").await;
    lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

async fn phone_sends(sandbox: &RunningSandbox, from: &str, to: &str, text: &str) -> String {
    let answer = post(sandbox, &format!("/admin/mock-phone/send?from={from}&to={to}"), text).await;
    answer["id"].as_str().expect("an id").to_owned()
}

/// Waits until `phone` shows `text` with `status`, and returns that line.
async fn phone_shows(sandbox: &RunningSandbox, phone: &str, text: &str, status: &str) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let lines = shown(sandbox, phone).await;
        let mut matching: Vec<_> = lines.into_iter().filter(|line| line["text"] == text).collect();
        if matching.first().is_some_and(|line| line["status"] == status) {
            assert_eq!(matching.len(), 1, "{text} is shown once");
            return matching.remove(0);
        }
        assert!(Instant::now() < deadline, "waited in vain for {text} ({status}): {matching:?}");
        tokio::task::yield_now().await;
    }
}

async fn no_key_was_reused(sandbox: &RunningSandbox) {
    let stats = stats(sandbox, ALICE).await;
    assert_eq!(stats["signal_keys_reused"], 0, "{stats}");
    assert_eq!(stats["signal_identical_resent"], 0, "{stats}");
    assert!(stats["signal_keys_inspected"].as_u64().is_some_and(|inspected| inspected > 0), "{stats}");
}

// ---- what must work -----------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_linked_numbers_chat_with_ticks() {
    let sandbox = start().await;
    let began = Instant::now();
    let (alice, alice_run) = Number::link(&sandbox, ALICE, "").await;
    assert!(began.elapsed() < Duration::from_secs(9), "the key share spares the wait of ten seconds");
    let (bob, bob_run) = Number::link(&sandbox, BOB, "").await;

    let id = alice.send(BOB, "hello bob").await;
    assert_eq!(alice.seen.acked(&id).await, None);
    bob.seen.text("hello bob").await;
    alice.seen.receipt(&id, ReceiptType::Delivered).await;
    let line = phone_shows(&sandbox, BOB, "hello bob", "sent").await;
    assert_eq!((&line["direction"], &line["times_received"]), (&Value::from("in"), &Value::from(1)));

    let answer = bob.send(ALICE, "hello alice").await;
    alice.seen.text("hello alice").await;
    bob.seen.receipt(&answer, ReceiptType::Delivered).await;

    bob.client.mark_as_read(&Jid::pn(ALICE), None, &[&id]).await.expect("read");
    alice.seen.receipt(&id, ReceiptType::Read).await;
    phone_shows(&sandbox, ALICE, "hello bob", "read").await;

    let read = post(&sandbox, &format!("/admin/mock-phone/read?phone={ALICE}&peer={BOB}"), "").await;
    assert_eq!(read["read"], 1);
    bob.seen.receipt(&answer, ReceiptType::Read).await;

    no_key_was_reused(&sandbox).await;
    alice.leave(alice_run).await;
    bob.leave(bob_run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phone_writes_to_a_linked_number_also_while_it_is_away() {
    let sandbox = start().await;
    let (alice, run) = Number::link(&sandbox, ALICE, "").await;
    phone_sends(&sandbox, CAROL, ALICE, "are you there").await;
    assert_eq!(alice.seen.text("are you there").await, Jid::pn(CAROL));
    phone_shows(&sandbox, CAROL, "are you there", "delivered").await;
    alice.leave(run).await;

    for text in ["one", "two", "three"] {
        phone_sends(&sandbox, CAROL, ALICE, text).await;
    }
    let back = Number::new(sandbox.ws_url(), alice.backend.clone()).await;
    let run = back.run();
    for text in ["one", "two", "three"] {
        back.seen.text(text).await;
    }
    back.seen.connected().await;
    back.leave(run).await;

    let again = Number::new(sandbox.ws_url(), alice.backend.clone()).await;
    let run = again.run();
    again.seen.connected().await;
    let repeats = again.seen.count(|event| matches!(event, Event::Messages(_)));
    assert_eq!(repeats, 0, "what was acknowledged does not come again");
    again.leave(run).await;
    let stats = stats(&sandbox, ALICE).await;
    assert_eq!(stats["devices"]["1"]["most_at_once"], 1, "{stats}");
    no_key_was_reused(&sandbox).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_backlog_arrives_whole_and_in_order() {
    let sandbox = start().await;
    let (alice, run) = Number::provisioned(&sandbox, ALICE).await;
    alice.leave(run).await;
    let written: Vec<String> = (0..300).map(|number| format!("number {number}")).collect();
    for text in &written {
        phone_sends(&sandbox, CAROL, ALICE, text).await;
    }
    let back = Number::new(sandbox.ws_url(), alice.backend.clone()).await;
    let run = back.run();
    back.seen.text("number 299").await;
    back.seen.connected().await;
    let events = back.seen.events.lock().expect("lock").clone();
    let arrived: Vec<String> = events.iter().flat_map(|event| texts(event)).map(|(text, _)| text).collect();
    assert_eq!(arrived, written);
    phone_shows(&sandbox, CAROL, "number 299", "delivered").await;
    back.leave(run).await;
    no_key_was_reused(&sandbox).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_can_be_linked_by_a_code_typed_into_the_phone() {
    let sandbox = start().await;
    let alice = Number::new(sandbox.ws_url(), Arc::new(InMemoryBackend::new())).await;
    let run = alice.run();
    alice.client.wait_for_socket(PATIENCE).await.expect("a socket");
    let wanted = whatsapp_rust::pair_code::PairCodeOptions { phone_number: ALICE.into(), ..Default::default() };
    let code = alice.client.pair_with_code(wanted).await.expect("a code");
    let spelled = format!("{}-{}", &code[..4], code[4..].to_lowercase());
    post(&sandbox, &format!("/admin/mock-phone/pair-code?phone={ALICE}"), &spelled).await;
    alice.seen.until("PairSuccess", |event| matches!(event, Event::PairSuccess(_)).then_some(())).await;
    Number::ended(run).await;
    let run = alice.run();
    alice.seen.connected().await;
    phone_sends(&sandbox, CAROL, ALICE, "linked by code").await;
    alice.seen.text("linked by code").await;
    alice.leave(run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hidden_ids_work_as_addresses() {
    let sandbox = start().await;
    let (alice, alice_run) = Number::link(&sandbox, ALICE, "&lid=true").await;
    let (bob, bob_run) = Number::link(&sandbox, BOB, "&lid=true").await;
    let id = alice.send(BOB, "by hidden id").await;
    let chat = bob.seen.text("by hidden id").await;
    assert!(chat.is_lid(), "{chat}");
    alice.seen.receipt(&id, ReceiptType::Delivered).await;
    let sent = post(&sandbox, &format!("/admin/mock-phone/send?from={CAROL}&to={ALICE}&lid=true"), "psst").await;
    assert!(sent["id"].is_string());
    assert!(alice.seen.text("psst").await.is_lid());
    alice.leave(alice_run).await;
    bob.leave(bob_run).await;
    no_key_was_reused(&sandbox).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provisioned_device_logs_in_by_ik() {
    let sandbox = start().await;
    let (alice, alice_run) = Number::provisioned(&sandbox, ALICE).await;
    let (bob, bob_run) = Number::provisioned(&sandbox, BOB).await;
    let report = stats(&sandbox, ALICE).await;
    assert_eq!((&report["logins"], &report["logins_by_ik"]), (&Value::from(2), &Value::from(2)));
    alice.send(BOB, "provisioned").await;
    bob.seen.text("provisioned").await;
    alice.leave(alice_run).await;
    bob.leave(bob_run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kicks_give_the_event_the_real_server_would() {
    let sandbox = start().await;
    type Expected = fn(&Event) -> bool;
    let cases: [(&str, Option<Expected>); 11] = [
        ("drop", Some(|event| matches!(event, Event::Disconnected(_)))),
        ("503", Some(|event| matches!(event, Event::Disconnected(_)))),
        ("429", Some(|event| matches!(event, Event::Disconnected(_)))),
        ("515", None),
        ("replaced", Some(|event| matches!(event, Event::StreamReplaced(_)))),
        ("401", Some(|event| matches!(event, Event::LoggedOut(_)))),
        ("516", Some(|event| matches!(event, Event::LoggedOut(_)))),
        ("402", Some(|event| matches!(event, Event::TemporaryBan(_)))),
        ("403", Some(|event| matches!(event, Event::LoggedOut(_)))),
        ("405", Some(|event| matches!(event, Event::ClientOutdated(_)))),
        ("device_removed", Some(|event| matches!(event, Event::LoggedOut(_)))),
    ];
    let terminal: Expected = |event| {
        matches!(
            event,
            Event::Disconnected(_)
                | Event::StreamReplaced(_)
                | Event::LoggedOut(_)
                | Event::TemporaryBan(_)
                | Event::ClientOutdated(_)
                | Event::ConnectFailure(_)
        )
    };
    for (index, (code, expected)) in cases.into_iter().enumerate() {
        let phone = format!("1555000{index:04}");
        let (number, run) = Number::provisioned(&sandbox, &phone).await;
        let answer = post(&sandbox, &format!("/admin/kick?phone={phone}&code={code}"), "").await;
        assert_eq!(answer["kicked"], 1, "{code}");
        Number::ended(run).await;
        match expected {
            Some(expected) => assert_eq!(number.seen.count(expected), 1, "{code}"),
            None => assert_eq!(number.seen.count(terminal), 0, "{code}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_can_be_refused_on_order() {
    let sandbox = start().await;
    let (alice, run) = Number::provisioned(&sandbox, ALICE).await;
    alice.leave(run).await;
    let order = format!(r#"{{"phone":"+{ALICE}","login_failure":{{"reason":402,"code":101,"expire":3600}}}}"#);
    post(&sandbox, "/admin/fault", &order).await;
    let banned = Number::new(sandbox.ws_url(), alice.backend.clone()).await;
    Number::ended(banned.run()).await;
    let expire = banned.seen.until("a ban", |event| match event {
        Event::TemporaryBan(ban) => Some(ban.expire.num_seconds()),
        _ => None,
    });
    assert_eq!(expire.await, 3_600);
    let back = Number::new(sandbox.ws_url(), alice.backend.clone()).await;
    let run = back.run();
    back.seen.connected().await;
    back.leave(run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_login_replaces_the_first() {
    let sandbox = start().await;
    let (first, first_run) = Number::provisioned(&sandbox, ALICE).await;
    let second = Number::new(sandbox.ws_url(), first.backend.clone()).await;
    let second_run = second.run();
    second.seen.connected().await;
    first.seen.until("StreamReplaced", |event| matches!(event, Event::StreamReplaced(_)).then_some(())).await;
    Number::ended(first_run).await;
    let stats = stats(&sandbox, ALICE).await;
    assert_eq!((&stats["conflicts"], &stats["devices"]["1"]["most_at_once"]), (&Value::from(1), &Value::from(2)));
    second.leave(second_run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phone_that_lost_its_sessions_asks_again_and_shows_the_message_once() {
    let sandbox = start().await;
    let (alice, run) = Number::link(&sandbox, ALICE, "").await;
    phone_sends(&sandbox, CAROL, ALICE, "hi").await;
    alice.seen.text("hi").await;
    alice.send(CAROL, "warm").await;
    phone_shows(&sandbox, CAROL, "warm", "sent").await;
    post(&sandbox, &format!("/admin/mock-phone/forget-sessions?phone={CAROL}"), "").await;

    let id = alice.send(CAROL, "can you read this").await;
    phone_shows(&sandbox, CAROL, "can you read this", "sent").await;
    alice.seen.receipt(&id, ReceiptType::Delivered).await;
    let report = stats(&sandbox, ALICE).await;
    assert!(report["retry_receipts_from_phones"].as_u64().is_some_and(|asked| asked > 0), "{report}");
    no_key_was_reused(&sandbox).await;
    alice.leave(run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_lost_its_session_asks_again_and_gets_the_message() {
    let sandbox = start().await;
    let (alice, run) = Number::link(&sandbox, ALICE, "").await;
    phone_sends(&sandbox, CAROL, ALICE, "hi").await;
    alice.seen.text("hi").await;
    // Only after an answer does the phone stop attaching its prekey to every message.
    alice.send(CAROL, "warm").await;
    phone_shows(&sandbox, CAROL, "warm", "sent").await;
    alice.leave(run).await;
    // What the client still writes behind would bring the session back.
    alice.client.flush_pending_signal_state().await.expect("flushed");

    let store: Arc<dyn Backend> = alice.backend.clone();
    let hidden = switchboard::sandbox::address::PhoneNumber::parse(CAROL).expect("a number").hidden();
    for user in [format!("{hidden}@lid"), format!("{CAROL}@c.us")] {
        for address in [user.clone(), format!("{user}.0")] {
            store.delete_session(&address).await.expect("deleted");
        }
    }
    let back = Number::new(sandbox.ws_url(), alice.backend.clone()).await;
    let run = back.run();
    back.seen.connected().await;
    phone_sends(&sandbox, CAROL, ALICE, "do you read me").await;
    back.seen.text("do you read me").await;
    let lost = back.seen.count(|event| matches!(event, Event::UndecryptableMessage(_)));
    assert_eq!(lost, 1, "the first copy could not be opened");
    let report = stats(&sandbox, ALICE).await;
    assert_eq!(report["retry_receipts"], 1, "{report}");
    no_key_was_reused(&sandbox).await;
    back.leave(run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_sent_again_with_its_id_is_shown_once() {
    let sandbox = start().await;
    let (alice, run) = Number::provisioned(&sandbox, ALICE).await;
    let (bob, bob_run) = Number::provisioned(&sandbox, BOB).await;
    post(&sandbox, "/admin/fault", &format!(r#"{{"phone":"{ALICE}","drop_acks":1}}"#)).await;
    let id = alice.send(BOB, "once").await;
    phone_shows(&sandbox, BOB, "once", "sent").await;
    let options = whatsapp_rust::SendOptions::default().with_message_id(&id);
    let message = whatsapp_rust::waproto::whatsapp::Message { conversation: Some("once".into()), ..Default::default() };
    alice.client.send_message_with_options(Jid::pn(BOB), message, options).await.expect("sent");
    assert_eq!(alice.seen.acked(&id).await, None);
    let deadline = Instant::now() + PATIENCE;
    while phone_shows(&sandbox, BOB, "once", "sent").await["times_received"] != 2 {
        assert!(Instant::now() < deadline);
    }
    no_key_was_reused(&sandbox).await;
    alice.leave(run).await;
    bob.leave(bob_run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_refuse_and_repeat() {
    let sandbox = start().await;
    let (alice, run) = Number::provisioned(&sandbox, ALICE).await;
    post(&sandbox, "/admin/fault", &format!(r#"{{"phone":"{ALICE}","nack":{{"code":463}},"duplicate":1}}"#)).await;
    let id = alice.send(BOB, "refused").await;
    assert_eq!(alice.seen.acked(&id).await.as_deref(), Some("463"));
    assert!(shown(&sandbox, BOB).await.is_empty());
    let id = alice.send(BOB, "accepted").await;
    assert_eq!(alice.seen.acked(&id).await, None);
    phone_sends(&sandbox, BOB, ALICE, "twice on the wire").await;
    phone_sends(&sandbox, BOB, ALICE, "after it").await;
    alice.seen.text("after it").await;
    let seen = alice.seen.count(|event| texts(event).iter().any(|(text, _)| text == "twice on the wire"));
    assert_eq!(seen, 1, "the library drops the repeated ciphertext");
    alice.leave(run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn some_numbers_are_not_on_whatsapp() {
    let sandbox = start().await;
    let (alice, run) = Number::provisioned(&sandbox, ALICE).await;
    post(&sandbox, &format!("/admin/mock-phone/absent?phone={CAROL}"), "").await;
    let asked = [BOB, CAROL, "99912345678"].map(Jid::pn);
    let answers = alice.client.contacts().is_on_whatsapp(&asked).await.expect("answered");
    let registered = |user: &str| answers.iter().any(|answer| answer.jid.user == user && answer.is_registered);
    assert!(registered(BOB), "{answers:?}");
    assert!(!registered(CAROL) && !registered("99912345678"), "{answers:?}");
    alice.leave(run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_sandbox_knows_everybody() {
    let data = std::env::temp_dir().join(format!("switchboard-sandbox-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&data);
    let sandbox = start_with(Some(data.clone())).await;
    let root = sandbox.root_hex();
    let (alice, run) = Number::link(&sandbox, ALICE, "").await;
    phone_sends(&sandbox, CAROL, ALICE, "before").await;
    alice.seen.text("before").await;
    alice.send(CAROL, "answer").await;
    phone_shows(&sandbox, CAROL, "answer", "sent").await;
    alice.leave(run).await;
    phone_sends(&sandbox, CAROL, ALICE, "while both were away").await;
    sandbox.shutdown().await.expect("written");

    let sandbox = start_with(Some(data.clone())).await;
    assert_eq!(sandbox.root_hex(), root);
    let back = Number::new(sandbox.ws_url(), alice.backend.clone()).await;
    let run = back.run();
    back.seen.text("while both were away").await;
    back.seen.connected().await;
    assert_eq!(stats(&sandbox, ALICE).await["logins_by_ik"], 1);
    phone_sends(&sandbox, CAROL, ALICE, "after").await;
    back.seen.text("after").await;
    back.send(CAROL, "still here").await;
    phone_shows(&sandbox, CAROL, "still here", "sent").await;
    phone_shows(&sandbox, CAROL, "answer", "sent").await;
    let report = stats(&sandbox, ALICE).await;
    assert_eq!((&report["retry_receipts"], &report["retry_receipts_from_phones"]), (&Value::from(0), &Value::from(0)));
    back.leave(run).await;
    sandbox.shutdown().await.expect("written");
    std::fs::remove_dir_all(&data).expect("removed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_server_never_connects_anybody() {
    let sandbox = start().await;
    let (alice, run) = Number::provisioned(&sandbox, ALICE).await;
    alice.leave(run).await;
    post(&sandbox, "/admin/fault", &format!(r#"{{"phone":"{ALICE}","mute_iq":["passive"]}}"#)).await;
    let stuck = Number::new(sandbox.ws_url(), alice.backend.clone()).await;
    let run = stuck.run();
    let deadline = Instant::now() + PATIENCE;
    while stats(&sandbox, ALICE).await["logins"] != 2 {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(stuck.seen.count(|event| matches!(event, Event::Connected(_))), 0);
    stuck.leave(run).await;
}
