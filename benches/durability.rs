//! What durability costs on an optimised build: accepts per second and their latency at 1, 16 and 256 callers, webhook
//! deliveries per second, how long an event takes to an endpoint that works beside one that hangs, and how long a daemon
//! with a long history takes to come back after SIGKILL.
//!
//! Numbers are offline while accepts and webhooks are measured, so nothing else is done meanwhile; the part with
//! numbers online says so. The data are filled through the store, the daemon and the sandbox are processes of their own.
//!
//! ```sh
//! cargo bench --features sandbox --bench durability
//! ```
//!
//! `DURABILITY_ROWS` (1,000,000) is the length of the history, `DURABILITY_SECONDS` (10) the length of each measurement.

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
    reason = "a bench that cannot go on may panic"
)]

mod rig;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::message_service_client::MessageServiceClient;
use switchboard::api::grpc::proto::webhook_service_client::WebhookServiceClient;
use switchboard::domain::change::Change;
use switchboard::domain::delivery::{Course, DeliveryRow};
use switchboard::domain::event::{Event, EventBody, ReceivedEvent};
use switchboard::domain::id::{ChatNo, EventId, EventSeq, MessageId, MessageSeq};
use switchboard::domain::message::{Content, Direction, MessageRecord};
use switchboard::domain::number::{Commit, Ticket};
use switchboard::domain::phone::{Contact, Phone};
use switchboard::domain::time::Timestamp;
use switchboard::store::layout::{Store, StoreSettings, VOLUMES};
use switchboard::store::number_store::NumberStore;
use switchboard::telemetry::rng::Random;
use tonic::Request;
use tonic::transport::Channel;

use self::rig::{PATIENCE, Process, Sender, http, number_id, percentile, provision, start, until_online};

/// Numbers that accept and deliver.
const NUMBERS: usize = 100;
/// Callers on one connection.
const CALLERS_A_CHANNEL: usize = 32;
/// Webhooks waiting for each number.
const WEBHOOKS: usize = 200;
/// Numbers whose webhook delay is measured; as many others may hang.
const MEASURED: usize = 10;
/// Between two of their sends.
const SEND_EVERY: Duration = Duration::from_millis(20);
/// Chats of the long history.
const CHATS: u64 = 1000;
/// Rows written at once.
const FILL: u64 = 500;
const RECOVERIES: usize = 5;

fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

/// A directory that goes away.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("switchboard-durability-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Daemon {
    process: Process,
    api: SocketAddr,
    admin: SocketAddr,
    ready_after: Duration,
}

fn serve(directory: &Path, whatsapp: &str) -> Daemon {
    let mut command = Command::new(env!("CARGO_BIN_EXE_switchboard"));
    command.arg("serve");
    for (name, value) in [
        ("DATA__DIR", directory.display().to_string()),
        ("API__LISTEN", "127.0.0.1:0".to_owned()),
        ("ADMIN__LISTEN", "127.0.0.1:0".to_owned()),
        ("WHATSAPP__URL", format!("ws://{whatsapp}/ws/chat")),
        ("WHATSAPP__VERSION", "2.3000.1".to_owned()),
        ("WEBHOOK__ALLOW_PRIVATE", "true".to_owned()),
        ("LIMITS__MESSAGES_PER_SECOND", "1000".to_owned()),
        ("LIMITS__BURST", "1000".to_owned()),
        ("LIMITS__CHAT_SECONDS_PER_MESSAGE", "0".to_owned()),
        ("LIMITS__NEW_RECIPIENTS_PER_DAY", "unlimited".to_owned()),
        ("LOG__LEVEL", "error,switchboard::daemon=info".to_owned()),
    ] {
        command.env(format!("SWITCHBOARD__{name}"), value);
    }
    let begun = Instant::now();
    let (process, line) = start(command, "ready api=");
    let ready_after = begun.elapsed();
    let address =
        |name: &str| line.split(&format!("{name}=")).nth(1).unwrap().split(' ').next().unwrap().trim().parse().unwrap();
    Daemon { process, api: address("api"), admin: address("admin"), ready_after }
}

async fn channel(api: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{api}")).unwrap().connect().await.unwrap()
}

fn keyed<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-api-key", key.parse().unwrap());
    request
}

/// `callers` that send as soon as they were answered, each call under its own request id.
async fn accepts(daemon: &Daemon, key: &str, callers: usize, what: &str) {
    let span = Duration::from_secs(setting("DURABILITY_SECONDS", 10));
    let mut channels = Vec::new();
    for _ in 0..callers.div_ceil(CALLERS_A_CHANNEL) {
        channels.push(channel(daemon.api).await);
    }
    let (begun, cpu) = (Instant::now(), daemon.process.cpu());
    let mut calling = tokio::task::JoinSet::new();
    for caller in 0..callers {
        let sender = Sender { channel: channels[caller / CALLERS_A_CHANNEL].clone(), key: key.to_owned() };
        let what = what.to_owned();
        calling.spawn(async move {
            let mut took = Vec::new();
            while begun.elapsed() < span {
                let nth = took.len();
                let from = (caller + nth * 7) % NUMBERS;
                let request_id = format!("{what}-{callers}-{caller}-{nth}");
                took.push(sender.send(from, (from + 1) % NUMBERS, format!("accept {nth}"), &request_id).await);
            }
            took
        });
    }
    let mut took: Vec<_> = calling.join_all().await.into_iter().flatten().collect();
    let (wall, cpu) = (begun.elapsed().as_secs_f64(), daemon.process.cpu() - cpu);
    took.sort();
    println!(
        "{what}, {callers} callers: {:.0} accepts/s, p50 {:.2} ms, p99 {:.2} ms, max {:.1} ms; {:.2} ms CPU each",
        took.len() as f64 / wall,
        percentile(&took, 0.5),
        percentile(&took, 0.99),
        percentile(&took, 1.0),
        cpu.as_secs_f64() * 1000.0 / took.len() as f64
    );
}

fn now() -> Timestamp {
    Timestamp(u64::try_from(SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap())
}

fn customer(chat: u64) -> Contact {
    Contact::of_phone(Phone::parse(&format!("1559{chat:07}")).unwrap())
}

async fn write(store: &NumberStore, changes: Vec<Change>) {
    let commit = Commit { ticket: Ticket(0), changes, unless_known: None, durable: false };
    store.commit(store.unit_of(commit)).await.unwrap();
}

fn store_at(directory: &Path, random: &Arc<Random>) -> Store {
    Store::open(&StoreSettings::at(directory, random.clone())).unwrap()
}

async fn count(State(arrived): State<Arc<AtomicUsize>>) {
    arrived.fetch_add(1, Ordering::Relaxed);
}

/// Every number has events waiting for its webhook; a receiver in this process takes them all.
async fn webhooks(directory: &Path, key: &str, random: &Arc<Random>) {
    let arrived = Arc::new(AtomicUsize::new(0));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let router = Router::new().route("/", post(count)).with_state(arrived.clone());
    let mut receiver = tokio::task::JoinSet::new();
    receiver.spawn(async move { axum::serve(listener, router).await.unwrap() });
    let daemon = serve(directory, "127.0.0.1:1");
    let mut client = WebhookServiceClient::new(channel(daemon.api).await);
    for index in 0..NUMBERS {
        let request = proto::CreateWebhookRequest {
            number: number_id(index).to_string(),
            url: url.clone(),
            events: vec!["message.received".to_owned()],
            name: String::new(),
        };
        client.create_webhook(keyed(request, key)).await.unwrap();
    }
    drop(daemon);
    let store = store_at(directory, random);
    for index in 0..NUMBERS {
        enqueue(&store, index).await;
    }
    store.close();
    drop(store);
    let total = NUMBERS * WEBHOOKS;
    let daemon = serve(directory, "127.0.0.1:1");
    let first = Instant::now();
    let cpu = daemon.process.cpu();
    while arrived.load(Ordering::Relaxed) < total {
        assert!(first.elapsed() < PATIENCE, "{} of {total} delivered", arrived.load(Ordering::Relaxed));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (wall, cpu) = (first.elapsed().as_secs_f64(), (daemon.process.cpu() - cpu).as_secs_f64());
    println!(
        "webhooks, {NUMBERS} endpoints, receiver on this machine: {:.0} deliveries/s, {:.2} ms CPU each",
        total as f64 / wall,
        cpu * 1000.0 / total as f64
    );
}

/// From an event to its delivery, as a receiver sees it. Both ends have this machine's clock.
#[derive(Clone, Default)]
struct Delays(Arc<Mutex<Vec<Duration>>>);

async fn note_delay(State(delays): State<Delays>, body: String) {
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let at = Timestamp::parse(body["data"]["createdAt"].as_str().unwrap()).unwrap();
    delays.0.lock().unwrap().push(now().since(at));
}

async fn subscribe(daemon: &Daemon, key: &str, index: usize, url: &str) -> String {
    let mut client = WebhookServiceClient::new(channel(daemon.api).await);
    let (number, url, name) = (number_id(index).to_string(), url.to_owned(), String::new());
    let request = proto::CreateWebhookRequest { number, url, events: vec!["message.sent".to_owned()], name };
    let made = client.create_webhook(keyed(request, key)).await.unwrap().into_inner();
    made.webhook.unwrap().id
}

/// Takes connections and never answers.
async fn hanging() -> (String, tokio::task::JoinSet<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let mut holding = tokio::task::JoinSet::new();
    holding.spawn(async move {
        let mut held = Vec::new();
        while let Ok(connection) = listener.accept().await {
            held.push(connection);
        }
    });
    (url, holding)
}

/// How long events are on their way to an endpoint that works: alone, and beside endpoints that hang.
async fn beside_a_hanging_one(daemon: &Daemon, key: &str) {
    let delays = Delays::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let router = Router::new().route("/", post(note_delay)).with_state(delays.clone());
    let mut receiver = tokio::task::JoinSet::new();
    receiver.spawn(async move { axum::serve(listener, router).await.unwrap() });
    for index in 0..MEASURED {
        subscribe(daemon, key, index, &url).await;
    }
    let (hangs, _holding) = hanging().await;
    let mut alone = None;
    for (what, hang) in [
        ("alone", 0..0),
        ("beside a hanging one on the same numbers", 0..MEASURED),
        ("beside hanging ones on other numbers", MEASURED..2 * MEASURED),
    ] {
        let mut made = Vec::new();
        for index in hang {
            made.push(subscribe(daemon, key, index, &hangs).await);
        }
        let sent = send_evenly(daemon, key, what).await;
        let begun = Instant::now();
        while delays.0.lock().unwrap().len() < sent {
            assert!(begun.elapsed() < PATIENCE, "{what}: {} of {sent}", delays.0.lock().unwrap().len());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut took = std::mem::take(&mut *delays.0.lock().unwrap());
        took.sort();
        let (p50, p99) = (percentile(&took, 0.5), percentile(&took, 0.99));
        let (first50, first99) = *alone.get_or_insert((p50, p99));
        println!(
            "webhook delay, {what}: {} deliveries, p50 {p50:.1} ms, p99 {p99:.1} ms; {:.2} and {:.2} times alone",
            took.len(),
            p50 / first50.max(1.0),
            p99 / first99.max(1.0)
        );
        let mut client = WebhookServiceClient::new(channel(daemon.api).await);
        for id in made {
            client.delete_webhook(keyed(proto::DeleteWebhookRequest { id }, key)).await.unwrap();
        }
    }
}

/// Sends at one pace from every number that is measured or may hang. Gives how many were sent by the measured ones.
async fn send_evenly(daemon: &Daemon, key: &str, what: &str) -> usize {
    let span = Duration::from_secs(setting("DURABILITY_SECONDS", 10));
    let sender = Sender { channel: channel(daemon.api).await, key: key.to_owned() };
    let mut pace = tokio::time::interval(SEND_EVERY);
    let (begun, mut nth, mut measured) = (Instant::now(), 0, 0);
    while begun.elapsed() < span {
        pace.tick().await;
        let from = nth % (2 * MEASURED);
        sender.send(from, (from + 1) % NUMBERS, format!("delay {nth}"), &format!("{what}-{nth}")).await;
        measured += usize::from(from < MEASURED);
        nth += 1;
    }
    measured
}

async fn enqueue(store: &Store, index: usize) {
    let number = store.claim(number_id(index), (index % usize::from(VOLUMES)) as u8).await.unwrap();
    let snapshot = number.load().await.unwrap();
    let mut counters = snapshot.counters;
    let stored = &snapshot.endpoints[0];
    let (endpoint, mut state) = (stored.endpoint.ordinal, stored.state.unwrap_or_default());
    let mut changes = Vec::new();
    for nth in 0..WEBHOOKS as u64 {
        counters.event += 1;
        let (seq, chat) = (EventSeq(counters.event), ChatNo(u32::try_from(nth % 50 + 1).unwrap()));
        let body = EventBody::Received(ReceivedEvent {
            message: MessageId { number: number.number(), seq: MessageSeq(nth + 1) },
            whatsapp_id: format!("3A{nth:018}"),
            from: customer(nth % 50),
            chat,
            sender_name: None,
            text: "when will my parcel arrive?".to_owned(),
            written_at: now(),
        });
        changes.push(Change::Event(Event { id: EventId { number: number.number(), seq }, at: now(), body }));
        state.last_sequence.0 += 1;
        let row = DeliveryRow {
            event: seq,
            chat: Some(chat),
            attempts: 0,
            due: Timestamp(0),
            queued_at: now(),
            sequence: state.last_sequence,
            course: Course::Live,
            stuck_since: None,
        };
        changes.push(Change::Delivery(endpoint, row));
    }
    changes.push(Change::EndpointState(endpoint, state));
    changes.push(Change::Counters(counters));
    write(&number, changes).await;
}

/// A number's whole past.
async fn fill(directory: &Path, rows: u64, random: &Arc<Random>) {
    let store = store_at(directory, random);
    let number = store.claim(number_id(0), 0).await.unwrap();
    let mut counters = number.load().await.unwrap().counters;
    let chats = (1..=CHATS).map(|chat| Change::Chat(ChatNo(chat as u32), customer(chat))).collect();
    write(&number, chats).await;
    let at = now();
    for first in (1..=rows).step_by(FILL as usize) {
        let row = |seq: u64| {
            let direction = if seq.is_multiple_of(2) { Direction::Outbound } else { Direction::Inbound };
            Change::Message(MessageRecord {
                seq: MessageSeq(seq),
                chat: ChatNo((seq % CHATS + 1) as u32),
                direction,
                whatsapp_id: format!("3EB0{seq:018X}"),
                correlation_id: None,
                content: Content::Text(format!("line {seq} of a long conversation about parcels")),
                sender_name: None,
                created_at: at,
                written_at: at,
                send_at: None,
                expires_at: None,
            })
        };
        let last = (first + FILL - 1).min(rows);
        counters.message = last;
        counters.chat = CHATS as u32;
        let mut changes: Vec<_> = (first..=last).map(row).collect();
        changes.push(Change::Counters(counters));
        write(&number, changes).await;
    }
    store.close();
}

/// Kills a daemon with a long history and waits for it to come back.
async fn recovery(sandbox: SocketAddr, random: &Arc<Random>) {
    let rows = setting("DURABILITY_ROWS", 1_000_000);
    let directory = Directory::new("recovery");
    let key = provision(&directory.0, sandbox, 1, random).await;
    let begun = Instant::now();
    fill(&directory.0, rows, random).await;
    println!("{rows} history rows written in {:.1} s", begun.elapsed().as_secs_f64());
    let mut daemon = serve(&directory.0, &sandbox.to_string());
    until_online(daemon.admin, 1, Instant::now());
    for nth in 0..RECOVERIES {
        let sender = Sender { channel: channel(daemon.api).await, key: key.clone() };
        for line in 0..200 {
            sender.send(0, 1, format!("before kill {nth}: {line}"), "").await;
        }
        // Dropping it is SIGKILL.
        drop(daemon);
        let begun = Instant::now();
        daemon = serve(&directory.0, &sandbox.to_string());
        let mut client = MessageServiceClient::new(channel(daemon.api).await);
        let request =
            proto::ListMessagesRequest { number: number_id(0).to_string(), page_size: 50, ..Default::default() };
        while client.list_messages(keyed(request.clone(), &key)).await.is_err() {
            assert!(begun.elapsed() < PATIENCE, "the history does not come back");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let readable = begun.elapsed().as_secs_f64();
        let online = until_online(daemon.admin, 1, begun).as_secs_f64();
        println!(
            "SIGKILL {}: API ready after {:.2} s, history readable {readable:.2} s, Online {online:.2} s",
            nth + 1,
            daemon.ready_after.as_secs_f64()
        );
    }
    let stored: u64 = std::fs::read_dir(&directory.0).unwrap().map(|entry| size_of_all(&entry.unwrap().path())).sum();
    println!(
        "on disk: {:.0} MiB; anonymous memory {:.0} MiB",
        stored as f64 / 1048576.0,
        daemon.process.anonymous_kib() as f64 / 1024.0
    );
}

fn size_of_all(path: &Path) -> u64 {
    match std::fs::read_dir(path) {
        Ok(entries) => entries.map(|entry| size_of_all(&entry.unwrap().path())).sum(),
        Err(_) => path.metadata().map_or(0, |data| data.len()),
    }
}

#[tokio::main]
async fn main() {
    // Cargo passes `--bench`; under `cargo test --benches` it does not, and there is nothing to test here.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let random = Arc::new(Random::from_system().unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_switchboard"));
    command.args(["sandbox", "--listen", "127.0.0.1:0"]);
    let (_sandbox, line) = start(command, "sandbox ws://");
    let address: SocketAddr = line.split("ws://").nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
    let directory = Directory::new("accepts");
    let key = provision(&directory.0, address, NUMBERS, &random).await;
    webhooks(&directory.0, &key, &random).await;
    let daemon = serve(&directory.0, "127.0.0.1:1");
    for callers in [1, 16, 256] {
        accepts(&daemon, &key, callers, "numbers offline").await;
    }
    drop(daemon);
    drop(directory);
    let directory = Directory::new("online");
    let key = provision(&directory.0, address, NUMBERS, &random).await;
    let daemon = serve(&directory.0, &address.to_string());
    until_online(daemon.admin, NUMBERS, Instant::now());
    for callers in [1, 16, 256] {
        accepts(&daemon, &key, callers, "numbers online and sending").await;
    }
    beside_a_hanging_one(&daemon, &key).await;
    println!("sandbox: {}", http(address, "GET", "/admin/stats"));
    drop(daemon);
    drop(directory);
    recovery(address, &random).await;
}
