//! Traffic in both directions, and a record of what every participant was told: callers that ask again after any
//! doubt, phones that write and read, streams that resume by cursor, callers that poll statuses.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prost::Message as _;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sha2::{Digest, Sha256};
use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::stream_events_response::Step;
use switchboard::demo::client::OwnedNumber;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::Code;

use crate::world::{CUSTOMERS, World, customer, neighbour};

/// Longest a caller waits for an answer before it counts the outcome as unknown.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Pause before a caller asks again.
const AGAIN_AFTER: Duration = Duration::from_millis(30);
/// Every how many accepted sends one is asked for again although it was answered.
const REPEATED_EVERY: u32 = 8;
/// Messages whose status is polled.
const POLLED: usize = 64;

/// One send, as its caller saw it.
#[derive(Debug, Clone)]
pub struct Sent {
    pub text: String,
    /// Our id, from the answer.
    pub id: String,
    pub whatsapp_id: String,
}

/// One chat of a number of ours, in the order of acceptance.
#[derive(Debug)]
pub struct SentChat {
    pub number: usize,
    pub peer: String,
    pub sent: Vec<Sent>,
    pub unknown: u64,
}

/// One chat of a phone with a number of ours.
#[derive(Debug)]
pub struct WrittenChat {
    pub number: usize,
    pub from: String,
    pub written: Vec<String>,
}

/// One event as a stream told it.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    pub id: String,
    pub kind: String,
    pub chat: String,
    /// The message and the rung it reached, for its progress.
    pub progress: Option<(String, i32)>,
    pub digest: [u8; 32],
}

/// Everything that was promised and written.
#[derive(Debug, Default)]
pub struct Record {
    pub sent: Vec<SentChat>,
    pub written: Vec<WrittenChat>,
}

/// What tasks share.
pub struct Shared {
    world: Arc<World>,
    /// No more sends and writes.
    closing: AtomicBool,
    pub accepted: AtomicU64,
    pub written: AtomicU64,
    /// Chats that have had their messages.
    done: AtomicU64,
    problems: Mutex<Vec<String>>,
    pub polls: AtomicU64,
    /// What each number's stream told, in order from sequence 1.
    told: Vec<Mutex<Vec<Told>>>,
    /// The highest rung anybody was told, by message; the newest messages only.
    rungs: Mutex<Rungs>,
}

#[derive(Default)]
struct Rungs {
    by_message: HashMap<String, i32>,
    newest: Vec<(usize, String)>,
    next: usize,
}

impl Rungs {
    fn accepted(&mut self, number: usize, message: &str) {
        self.by_message.entry(message.to_owned()).or_insert(proto::MessageStatus::Queued.into());
        let entry = (number, message.to_owned());
        if self.newest.len() < POLLED {
            self.newest.push(entry);
        } else {
            let (_, gone) = std::mem::replace(&mut self.newest[self.next], entry);
            self.by_message.remove(&gone);
        }
        self.next = (self.next + 1) % POLLED;
    }

    fn reached(&mut self, message: &str, rung: i32) {
        if let Some(highest) = self.by_message.get_mut(message) {
            *highest = rung.max(*highest);
        }
    }
}

impl Shared {
    fn problem(&self, text: String) {
        eprintln!("VIOLATION {text}");
        self.problems.lock().unwrap().push(text);
    }

    /// What was wrong with a single answer.
    pub fn problems(&self) -> Vec<String> {
        self.problems.lock().unwrap().clone()
    }

    /// What a number's stream has told so far.
    pub fn told(&self, number: usize) -> Vec<Told> {
        self.told[number].lock().unwrap().clone()
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }
}

/// Running traffic.
pub struct Load {
    pub shared: Arc<Shared>,
    senders: JoinSet<SentChat>,
    writers: JoinSet<WrittenChat>,
    /// Streams and polls; they end with the load.
    _watching: JoinSet<()>,
}

/// What a text is padded with: also two, three and four bytes a letter.
const WORDS: [&str; 8] = ["parcel", "käse", "東京", "🚚", "at", "noon", "a rather longer word than the others", "?"];

fn text(random: &mut StdRng, head: String) -> String {
    let mut text = head;
    for _ in 0..random.random_range(0..20) {
        text.push(' ');
        text.push_str(WORDS[random.random_range(0..WORDS.len())]);
    }
    text
}

/// A number from the environment.
pub fn setting<T: std::str::FromStr>(name: &str, otherwise: T) -> T {
    std::env::var(name).ok().map_or(otherwise, |text| text.parse().ok().unwrap_or_else(|| panic!("{name}={text}")))
}

/// How fast and how much.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Between two messages of one chat, about.
    pub pause: Duration,
    /// Messages a chat, if they are counted.
    pub at_most: u32,
}

impl Load {
    /// Starts traffic of every number with its customers and its neighbour.
    pub fn start(world: &Arc<World>, seed: u64, pace: Pace) -> Self {
        let shared = Arc::new(Shared {
            world: world.clone(),
            closing: AtomicBool::new(false),
            accepted: AtomicU64::new(0),
            written: AtomicU64::new(0),
            done: AtomicU64::new(0),
            problems: Mutex::default(),
            polls: AtomicU64::new(0),
            told: world.numbers.iter().map(|_| Mutex::default()).collect(),
            rungs: Mutex::default(),
        });
        let (mut senders, mut writers, mut watching) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
        let count = world.numbers.len();
        for index in 0..count {
            let random = |which: usize| StdRng::seed_from_u64(seed ^ ((index as u64) << 32 | (which as u64) << 16));
            for which in 0..CUSTOMERS {
                let peer = customer(index, which);
                senders.spawn(send(shared.clone(), index, peer.clone(), random(which), pace));
                writers.spawn(write(shared.clone(), index, peer, random(100 + which), pace));
            }
            if let Some(other) = neighbour(index, count) {
                let peer = world.numbers[other].phone.clone();
                senders.spawn(send(shared.clone(), index, peer, random(200), pace));
            }
            watching.spawn(follow(shared.clone(), index));
        }
        watching.spawn(poll(shared.clone(), StdRng::seed_from_u64(seed)));
        Self { shared, senders, writers, _watching: watching }
    }

    /// Whether every chat has had its messages.
    pub fn is_done(&self) -> bool {
        let here = self.shared.world.numbers.len();
        let chats = here * (CUSTOMERS + usize::from(here > 1));
        self.shared.done.load(Ordering::Relaxed) >= (chats + here * CUSTOMERS) as u64
    }

    /// Waits until every chat has had its messages, or ends them now and waits for the answers that are due.
    pub async fn finish(&mut self, now: bool) -> Record {
        self.shared.closing.store(now, Ordering::Relaxed);
        let sent = std::mem::take(&mut self.senders).join_all().await;
        let written = std::mem::take(&mut self.writers).join_all().await;
        Record { sent, written }
    }
}

async fn pause(random: &mut StdRng, pace: Pace) {
    sleep(pace.pause.mul_f64(random.random_range(0.2..1.8))).await;
}

/// Sends one after the other into one chat. After any doubt it asks again with the same request id.
async fn send(shared: Arc<Shared>, number: usize, peer: String, mut random: StdRng, pace: Pace) -> SentChat {
    let caller = &shared.world.numbers[number].caller;
    let mut chat = SentChat { number, peer: peer.clone(), sent: Vec::new(), unknown: 0 };
    for nth in 0..pace.at_most {
        pause(&mut random, pace).await;
        if shared.is_closing() {
            break;
        }
        let text = text(&mut random, format!("{number}>{peer} #{nth}"));
        let request_id = format!("{number}-{peer}-{nth}");
        let message = loop {
            match timeout(ANSWER_WITHIN, caller.send_text(&peer, &text, &request_id)).await {
                Ok(Ok(message)) => break Some(message),
                Ok(Err(status)) if is_definite(&status) => {
                    shared.problem(format!("{request_id}: refused for good: {status}"));
                    break None;
                }
                Ok(Err(_)) | Err(_) => chat.unknown += 1,
            }
            sleep(AGAIN_AFTER).await;
        };
        let Some(message) = message else { continue };
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        shared.rungs.lock().unwrap().accepted(number, &message.id);
        let sent = Sent { text, id: message.id, whatsapp_id: message.whatsapp_id };
        if nth % REPEATED_EVERY == 0 {
            ask_again(&shared, &shared.world.numbers[number], &peer, &sent, &request_id).await;
        }
        chat.sent.push(sent);
    }
    shared.done.fetch_add(1, Ordering::Relaxed);
    chat
}

/// Whether asking again cannot help. Refusals for lack of room pass.
fn is_definite(status: &tonic::Status) -> bool {
    !matches!(
        status.code(),
        Code::Unavailable
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Internal
            | Code::Cancelled
    )
}

async fn ask_again(shared: &Shared, number: &OwnedNumber, peer: &str, sent: &Sent, request_id: &str) {
    let asked = timeout(ANSWER_WITHIN, number.caller.send_text(peer, &sent.text, request_id)).await;
    if let Ok(Ok(message)) = asked
        && (message.id != sent.id || message.whatsapp_id != sent.whatsapp_id)
    {
        shared.problem(format!("{request_id}: answered as {} first and as {} then", sent.id, message.id));
    }
}

/// A customer writes to a number of ours, and sometimes reads what came.
async fn write(shared: Arc<Shared>, number: usize, from: String, mut random: StdRng, pace: Pace) -> WrittenChat {
    let (phones, to) = (shared.world.phones, shared.world.numbers[number].phone.clone());
    let mut chat = WrittenChat { number, from: from.clone(), written: Vec::new() };
    for nth in 0..pace.at_most {
        pause(&mut random, pace).await;
        if shared.is_closing() {
            break;
        }
        let text = text(&mut random, format!("{from}>{number} #{nth}"));
        phones.write(&from, &to, &text).await.unwrap();
        shared.written.fetch_add(1, Ordering::Relaxed);
        chat.written.push(text);
        if random.random_range(0..4) == 0 {
            phones.read(&from, &to).await.unwrap();
        }
    }
    shared.done.fetch_add(1, Ordering::Relaxed);
    chat
}

/// Follows a number's events, resuming by cursor: a step must be the one after the last.
async fn follow(shared: Arc<Shared>, number: usize) {
    let mut cursor = String::new();
    let caller = &shared.world.numbers[number].caller;
    loop {
        let request = proto::StreamEventsRequest {
            resume_cursor: cursor.clone(),
            progress_interval: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
            ..Default::default()
        };
        let mut stream = match timeout(ANSWER_WITHIN, caller.events().stream_events(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) if is_definite(&status) => {
                shared.problem(format!("number {number}: the stream cannot resume: {status}"));
                break;
            }
            Ok(Err(_)) | Err(_) => {
                sleep(AGAIN_AFTER).await;
                continue;
            }
        };
        while let Ok(Ok(Some(step))) = timeout(ANSWER_WITHIN, stream.message()).await {
            cursor = step.cursor;
            if let Some(Step::Event(event)) = step.step {
                take(&shared, number, event);
            }
        }
    }
}

fn take(shared: &Shared, number: usize, event: proto::Event) {
    let mut told = shared.told[number].lock().unwrap();
    if event.sequence != told.len() as i64 + 1 {
        shared.problem(format!("number {number}: event {} after {}", event.sequence, told.len()));
    }
    let event = described(&event);
    if let Some((message, rung)) = &event.progress {
        shared.rungs.lock().unwrap().reached(message, *rung);
    }
    told.push(event);
}

/// What is kept of an event.
pub fn described(event: &proto::Event) -> Told {
    let (chat, progress) = match &event.body {
        Some(proto::event::Body::MessageProgress(body)) => (body.to.clone(), Some((body.message.clone(), body.status))),
        Some(proto::event::Body::MessageReceived(body)) => (body.from.clone(), None),
        Some(proto::event::Body::NumberChange(_) | proto::event::Body::WebhookChange(_)) | None => {
            (String::new(), None)
        }
    };
    Told {
        id: event.id.clone(),
        kind: event.r#type.clone(),
        chat: chat.trim_start_matches('+').to_owned(),
        progress,
        digest: Sha256::digest(event.encode_to_vec()).into(),
    }
}

/// Asks for the status of messages: never lower than what anybody was told before.
async fn poll(shared: Arc<Shared>, mut random: StdRng) {
    loop {
        sleep(Duration::from_millis(5)).await;
        let (number, id, known) = {
            let rungs = shared.rungs.lock().unwrap();
            if rungs.newest.is_empty() {
                continue;
            }
            let (number, id) = rungs.newest[random.random_range(0..rungs.newest.len())].clone();
            let known = rungs.by_message.get(&id).copied().unwrap_or(0);
            (number, id, known)
        };
        let request = proto::GetMessageRequest { id: id.clone() };
        let mut messages = shared.world.numbers[number].caller.messages();
        let message = match timeout(ANSWER_WITHIN, messages.get_message(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) if status.code() == Code::NotFound => {
                shared.problem(format!("{id}: accepted, and not found now"));
                continue;
            }
            Ok(Err(_)) | Err(_) => continue,
        };
        shared.polls.fetch_add(1, Ordering::Relaxed);
        if message.status < known {
            shared.problem(format!("{id}: was at rung {known} and is at {} now", message.status));
        }
        shared.rungs.lock().unwrap().reached(&id, message.status);
    }
}
