//! Linked sessions against the sandbox in this process: pairing, chatting, restarting, every way to end. Everything
//! waits on a condition with a deadline; nothing sleeps and hopes.
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

use std::collections::VecDeque;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use switchboard::domain::close::CloseReason;
use switchboard::domain::id::{MessageSeq, NumberId, TenantId};
use switchboard::domain::lifecycle::LinkBy;
use switchboard::domain::message::{Content, Direction};
use switchboard::domain::outbox::Devices;
use switchboard::domain::phone::{Contact, Phone};
use switchboard::domain::time::Timestamp;
use switchboard::sandbox::server::{RunningSandbox, Sandbox, SandboxConfig};
use switchboard::session::contract::{
    EVENTS_MAX, Incoming, NotDurable, Outgoing, ReceiptKind, SendError, SessionCommand, SessionEvent, SessionHandle,
};
use switchboard::session::link::{self, LinkConfig, LinkEnvironment, LinkParams, Purpose};
use switchboard::store::key::Tag;
use switchboard::store::layout::{Store, StoreSettings};
use switchboard::store::meta::{NumberKind, NumberRecord};
use switchboard::store::number_store::{NumberStore, Order};
use switchboard::store::unit::Unit;
use switchboard::telemetry::rng::Random;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);
const ALICE: &str = "15550000001";
const BOB: &str = "15550000002";
const CAROL: &str = "15550000003";

// ---- the world ----------------------------------------------------------------------------------------------------

/// A sandbox, a data directory and the environment of its sessions.
struct World {
    sandbox: RunningSandbox,
    environment: Arc<LinkEnvironment>,
    http: reqwest::Client,
    store: Store,
    dir: PathBuf,
}

fn environment(url: String) -> Arc<LinkEnvironment> {
    LinkEnvironment::new(LinkConfig {
        url,
        client_version: "2.3000.1".parse().ok(),
        meta: None,
        ..LinkConfig::default()
    })
    .unwrap()
}

impl World {
    async fn start(name: &str) -> Self {
        let sandbox =
            Sandbox::start(SandboxConfig { listen: vec!["127.0.0.1:0".parse().unwrap()], data: None, seed: 7 })
                .await
                .unwrap();
        let environment = environment(sandbox.ws_url());
        let dir = std::env::temp_dir().join(format!("switchboard-session-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        Self {
            store: Store::open(&StoreSettings::at(&dir, Arc::new(Random::seeded(7)))).unwrap(),
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            sandbox,
            environment,
            dir,
        }
    }

    async fn post(&self, path: &str, body: &str) -> String {
        let url = format!("http://{}{path}", self.sandbox.addr());
        let answer = self.http.post(url).body(body.to_owned()).send().await.unwrap();
        let ok = answer.status().is_success();
        let text = answer.text().await.unwrap();
        assert!(ok, "{path}: {text}");
        text
    }

    async fn stats(&self) -> Value {
        let url = format!("http://{}/admin/stats", self.sandbox.addr());
        let text = self.http.get(url).send().await.unwrap().text().await.unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Texts the phone shows with the number of times each arrived.
    async fn shown(&self, phone: &str) -> Vec<(String, u64)> {
        let url = format!("http://{}/admin/mock-phone/messages?phone={phone}", self.sandbox.addr());
        let text = self.http.get(url).send().await.unwrap().text().await.unwrap();
        let line = |line: &str| {
            let message: Value = serde_json::from_str(line).unwrap();
            let text = message["text"].as_str().unwrap().to_owned();
            (text, message["times_received"].as_u64().unwrap())
        };
        text.lines().map(line).collect()
    }

    async fn claim(&self, id: u64) -> NumberStore {
        let record = NumberRecord {
            id: NumberId(id),
            tenant: TenantId(1),
            name: format!("number {id}"),
            phone: Phone::parse(&format!("1555{id:07}")).unwrap(),
            kind: NumberKind::Linked,
            volume: 0,
            created_at: Timestamp(1),
            retention: switchboard::domain::retention::Retention::KeepAll,
            proxy: None,
            orders: switchboard::domain::orders::SendingOrders::default(),
        };
        if self.store.meta().number(record.id).is_none() {
            self.store.meta().create_number(record, Vec::new()).await.unwrap();
        }
        self.store.claim(NumberId(id), 0).await.unwrap()
    }

    /// A number that is linked without a code.
    async fn provisioned(&self, id: u64, phone: &str) -> Number {
        let row = self.post(&format!("/admin/provision?phone={phone}"), "").await;
        let store = self.claim(id).await;
        assert_eq!(link::provision(&store, &row).await.unwrap(), Phone::parse(phone).unwrap());
        Number::new(self, phone, store)
    }

    /// A number that is linked by scanning its code; `lid` for an account that is addressed by LID.
    async fn paired(&self, id: u64, phone: &str, lid: bool) -> Number {
        let mut number = Number::new(self, phone, self.claim(id).await);
        number.pair();
        let code = number.qr().await;
        self.post(&format!("/admin/mock-phone/scan-qr?phone={phone}&lid={lid}"), &code).await;
        let paired = number
            .until(|event| match event {
                SessionEvent::Paired { phone, .. } => Some(phone.clone()),
                _ => None,
            })
            .await;
        assert_eq!(paired.digits(), phone);
        number.online().await;
        number
    }

    async fn end(self) {
        assert_eq!(self.environment.shutdown(Duration::from_secs(20)).await, 0);
        self.sandbox.shutdown().await.unwrap();
        self.store.close();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

// ---- a number -----------------------------------------------------------------------------------------------------

/// What the number's actor will be: a store, a slot, and what the session told.
struct Number {
    environment: Arc<LinkEnvironment>,
    phone: &'static str,
    store: NumberStore,
    slots: Arc<Semaphore>,
    session: Option<SessionHandle>,
    events: mpsc::Receiver<SessionEvent>,
    /// Events seen while waiting for others.
    seen: VecDeque<SessionEvent>,
    inbox: Vec<Incoming>,
    next_seq: u64,
}

impl Number {
    fn new(world: &World, phone: &str, store: NumberStore) -> Self {
        let phone = [ALICE, BOB, CAROL].into_iter().find(|known| *known == phone).unwrap();
        Self {
            environment: world.environment.clone(),
            phone,
            store,
            slots: Arc::new(Semaphore::new(1)),
            session: None,
            events: mpsc::channel(1).1,
            seen: VecDeque::new(),
            inbox: Vec::new(),
            next_seq: 0,
        }
    }

    fn contact(&self) -> Contact {
        Contact::of_phone(Phone::parse(self.phone).unwrap())
    }

    fn open(&mut self, purpose: Purpose) {
        let slot = self.slots.clone().try_acquire_owned().expect("the previous socket is gone");
        let (events, told) = mpsc::channel(EVENTS_MAX);
        self.events = with_receipts_answered(told);
        let params = LinkParams {
            store: self.store.clone(),
            purpose,
            proxy: None,
            slot,
            events,
            span: tracing::info_span!("session", number = %self.store.number()),
        };
        self.session = Some(link::open(&self.environment, params));
    }

    fn pair(&mut self) {
        let expected = Phone::parse(self.phone).unwrap();
        self.open(Purpose::Pair { expected, by: LinkBy::QrCode });
    }

    fn connect(&mut self) {
        self.open(Purpose::Connect);
    }

    /// The next event; messages are made durable at once and kept.
    async fn event(&mut self) -> SessionEvent {
        let event = timeout(PATIENCE, self.events.recv()).await.expect("an event in time");
        match event.expect("an event before the end") {
            SessionEvent::Inbound { messages, durable } => {
                self.inbox.extend(messages.iter().cloned());
                durable.send(Ok(())).unwrap();
                SessionEvent::Inbound { messages, durable: oneshot::channel().0 }
            }
            event => event,
        }
    }

    /// Waits for an event, also among those passed over before.
    async fn until<T>(&mut self, wanted: impl Fn(&SessionEvent) -> Option<T>) -> T {
        for index in 0..self.seen.len() {
            if let Some(found) = wanted(&self.seen[index]) {
                self.seen.remove(index);
                return found;
            }
        }
        loop {
            let event = self.event().await;
            if let Some(found) = wanted(&event) {
                return found;
            }
            assert!(!matches!(event, SessionEvent::Closed(_)), "closed too early: {event:?}");
            self.seen.push_back(event);
        }
    }

    async fn qr(&mut self) -> String {
        self.until(|event| match event {
            SessionEvent::QrCode { code, .. } => Some(code.clone()),
            _ => None,
        })
        .await
    }

    async fn online(&mut self) {
        self.until(|event| matches!(event, SessionEvent::Online).then_some(())).await;
    }

    async fn closed(&mut self) -> CloseReason {
        loop {
            if let SessionEvent::Closed(reason) = self.event().await {
                assert_eq!(self.slots.available_permits(), 1, "the socket is gone before the end is told");
                assert!(self.events.recv().await.is_none(), "nothing after the end");
                self.session = None;
                self.seen.clear();
                return reason;
            }
        }
    }

    fn command(&self, command: SessionCommand) {
        self.session.as_ref().unwrap().commands.try_send(command).unwrap();
    }

    async fn close(&mut self) {
        self.command(SessionCommand::Close);
        assert_eq!(self.closed().await, CloseReason::Requested);
    }

    fn send(&mut self, to: &Contact, text: &str) -> (MessageSeq, String) {
        self.next_seq += 1;
        let seq = MessageSeq(self.next_seq);
        let whatsapp_id = format!("3EB0{}{:016X}", self.phone, self.next_seq);
        self.command(SessionCommand::Send(Box::new(Outgoing {
            seq,
            whatsapp_id: whatsapp_id.clone(),
            to: to.clone(),
            content: Content::Text(text.to_owned()),
            devices: Devices::AsKnown,
        })));
        (seq, whatsapp_id)
    }

    async fn written(&mut self, seq: MessageSeq) -> Result<(), SendError> {
        self.until(|event| match event {
            SessionEvent::Written { seq: written } if *written == seq => Some(Ok(())),
            SessionEvent::NotWritten { seq: failed, error } if *failed == seq => Some(Err(*error)),
            _ => None,
        })
        .await
    }

    async fn acked(&mut self, id: &str) -> Option<u16> {
        self.until(|event| match event {
            SessionEvent::Acked { whatsapp_id, error } if whatsapp_id == id => Some(*error),
            _ => None,
        })
        .await
    }

    async fn receipt(&mut self, id: &str, wanted: ReceiptKind) -> Contact {
        self.until(|event| match event {
            SessionEvent::Receipt { whatsapp_ids, from, kind, .. }
                if *kind == wanted && whatsapp_ids.iter().any(|seen| seen == id) =>
            {
                Some(from.clone())
            }
            _ => None,
        })
        .await
    }

    /// Sends and waits for WhatsApp's acceptance.
    async fn say(&mut self, to: &Contact, text: &str) -> String {
        let (seq, id) = self.send(to, text);
        assert_eq!(self.written(seq).await, Ok(()));
        assert_eq!(self.acked(&id).await, None);
        id
    }

    /// Waits until a text has arrived and returns how it came.
    async fn hear(&mut self, text: &str) -> Incoming {
        let by = Instant::now() + PATIENCE;
        loop {
            if let Some(index) = self.inbox.iter().position(|message| message.content.text() == text) {
                return self.inbox.remove(index);
            }
            assert!(Instant::now() < by, "{text} did not arrive");
            let event = self.event().await;
            assert!(!matches!(event, SessionEvent::Closed(_)), "closed too early: {event:?}");
            self.seen.push_back(event);
        }
    }
}

/// Says of every receipt at once that it is durable: the session writes nothing while one is not.
fn with_receipts_answered(mut events: mpsc::Receiver<Box<SessionEvent>>) -> mpsc::Receiver<SessionEvent> {
    let (onward, told) = mpsc::channel(EVENTS_MAX);
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            let event = match *event {
                SessionEvent::Receipt { whatsapp_ids, from, kind, at, durable } => {
                    let _ = durable.send(Ok(()));
                    SessionEvent::Receipt { whatsapp_ids, from, kind, at, durable: oneshot::channel().0 }
                }
                event => event,
            };
            if onward.send(event).await.is_err() {
                break;
            }
        }
    });
    told
}

async fn eventually<F: Future<Output = bool>>(what: &str, check: impl Fn() -> F) {
    let by = Instant::now() + PATIENCE;
    while !check().await {
        assert!(Instant::now() < by, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

// ---- the tests ----------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_numbers_link_chat_restart_and_go_on() {
    let world = World::start("chat").await;
    let mut alice = world.paired(1, ALICE, false).await;
    let mut bob = world.paired(2, BOB, false).await;

    let id = alice.say(&bob.contact(), "hello").await;
    let heard = bob.hear("hello").await;
    assert_eq!((heard.whatsapp_id.as_str(), heard.direction), (id.as_str(), Direction::Inbound));
    assert_eq!(heard.chat.phone, alice.contact().phone);
    let from = alice.receipt(&id, ReceiptKind::Delivered).await;
    assert_eq!(from.phone, bob.contact().phone);
    bob.say(&heard.chat, "hello yourself").await;
    alice.hear("hello yourself").await;
    eventually("the phone shows both", || async { world.shown(BOB).await.len() == 2 }).await;

    world.post(&format!("/admin/mock-phone/read?phone={BOB}&peer={ALICE}"), "").await;
    alice.receipt(&id, ReceiptKind::Read).await;
    alice.until(|event| matches!(event, SessionEvent::Alive).then_some(())).await;

    alice.close().await;
    bob.say(&alice.contact(), "while you were away").await;
    alice.connect();
    alice.online().await;
    alice.hear("while you were away").await;
    for round in 0..3 {
        let text = format!("again {round}");
        alice.say(&bob.contact(), &text).await;
        bob.hear(&text).await;
    }
    let own = world.post(&format!("/admin/mock-phone/send?from={ALICE}&to={BOB}"), "from the phone itself").await;
    assert!(own.contains("id"));
    let own = alice.hear("from the phone itself").await;
    assert_eq!((own.direction, own.chat.phone), (Direction::OwnDevice, bob.contact().phone));

    let stats = world.stats().await;
    for never in ["retry_receipts", "retry_receipts_from_phones", "devices_connected_twice", "conflicts"] {
        assert_eq!(stats[never], 0, "{never} {stats}");
    }
    assert_eq!(stats["signal_keys_reused"], 0, "{stats}");
    alice.close().await;
    bob.close().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accounts_addressed_by_lid_are_known_by_both_addresses() {
    let world = World::start("lid").await;
    let mut alice = world.paired(1, ALICE, true).await;
    let mut bob = world.paired(2, BOB, true).await;
    let id = alice.say(&bob.contact(), "hello").await;
    let heard = bob.hear("hello").await;
    assert_eq!(heard.chat.phone, alice.contact().phone);
    assert!(heard.chat.lid.is_some());
    let from = alice.receipt(&id, ReceiptKind::Delivered).await;
    assert_eq!(from.phone, bob.contact().phone);
    // A chat that is known by its LID alone can be answered too.
    let by_lid = Contact { phone: None, lid: heard.chat.lid };
    bob.say(&by_lid, "hello yourself").await;
    assert_eq!(alice.hear("hello yourself").await.chat.phone, bob.contact().phone);
    alice.close().await;
    bob.close().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_cannot_be_decrypted_keeps_its_place_and_comes_again() {
    let world = World::start("amnesia").await;
    let mut alice = world.provisioned(1, ALICE).await;
    alice.connect();
    alice.online().await;
    let from_bob = format!("/admin/mock-phone/send?from={BOB}&to={ALICE}");
    world.post(&from_bob, "first").await;
    let first = alice.hear("first").await;
    alice.say(&first.chat, "answer").await;
    eventually("the phone has the answer", || async { world.shown(BOB).await.len() == 2 }).await;
    world.post(&from_bob, "second").await;
    alice.hear("second").await;
    // What is not acknowledged yet would come again and mend the session before the message that matters.
    eventually("both are acknowledged", || async { world.stats().await["receipts"] == 2 }).await;
    alice.close().await;

    let sessions = alice.store.scan(Tag::Session, &[], None, Order::Ascending, 100).await;
    let mut unit = Unit::durable();
    for (rest, _) in sessions.unwrap() {
        unit.delete(Tag::Session, rest);
    }
    alice.store.commit(unit).await.unwrap();
    alice.connect();
    alice.online().await;
    world.post(&from_bob, "after amnesia").await;
    let heard = alice.hear("after amnesia").await;
    let is_placeholder = |message: &&Incoming| message.content == Content::Undecryptable;
    let same = |message: &&Incoming| message.whatsapp_id == heard.whatsapp_id;
    let placeholder = alice.inbox.iter().filter(is_placeholder).find(same);
    let placeholder = placeholder.expect("its place was kept");
    assert_eq!(placeholder.chat.phone, heard.chat.phone);
    assert_ne!(placeholder.digest, heard.digest);
    alice.close().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_acknowledged_before_it_is_durable() {
    let world = World::start("durable").await;
    let mut alice = world.provisioned(1, ALICE).await;
    let mut bob = world.provisioned(2, BOB).await;
    alice.connect();
    bob.connect();
    alice.online().await;
    bob.online().await;
    alice.say(&bob.contact(), "warm").await;
    bob.hear("warm").await;

    let receipts = || async { world.stats().await["receipts"].as_u64().unwrap() };
    eventually("the first message is acknowledged", || async { receipts().await == 1 }).await;
    alice.send(&bob.contact(), "slow disk");
    let held = loop {
        match timeout(PATIENCE, bob.events.recv()).await.unwrap().unwrap() {
            SessionEvent::Inbound { messages, durable } => {
                assert_eq!(messages[0].content.text(), "slow disk");
                break durable;
            }
            event => bob.seen.push_back(event),
        }
    };
    // Another chat goes on meanwhile, and its receipt is the only one that leaves.
    world.post(&format!("/admin/mock-phone/send?from={CAROL}&to={BOB}"), "fast").await;
    bob.hear("fast").await;
    eventually("the other chat is acknowledged", || async { receipts().await == 2 }).await;

    // Refused once: offered again, and acknowledged only then.
    held.send(Err(NotDurable)).unwrap();
    bob.hear("slow disk").await;
    eventually("the receipt goes out", || async { receipts().await == 3 }).await;
    alice.close().await;
    bob.close().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_made_durable_comes_again_after_a_reconnect() {
    let world = World::start("redelivery").await;
    let mut alice = world.provisioned(1, ALICE).await;
    alice.connect();
    alice.online().await;
    world.post(&format!("/admin/mock-phone/send?from={BOB}&to={ALICE}"), "do not lose me").await;
    loop {
        let event = timeout(PATIENCE, alice.events.recv()).await.unwrap().unwrap();
        if let SessionEvent::Inbound { durable, .. } = event {
            // The number's store fails: the message stays unanswered and everything is dropped.
            alice.store.poison();
            drop(durable);
            break;
        }
    }
    assert_eq!(alice.closed().await, CloseReason::StoreFailed);

    alice.store = world.claim(1).await;
    alice.connect();
    alice.hear("do not lose me").await;
    alice.online().await;
    eventually("the phone's message is delivered once", || async { world.shown(BOB).await.len() == 1 }).await;
    alice.close().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_lost_between_the_saved_ratchet_and_its_copy_is_asked_for_again() {
    let world = World::start("lost").await;
    let mut alice = world.paired(1, ALICE, false).await;
    let write = format!("/admin/mock-phone/send?from={BOB}&to={ALICE}");
    world.post(&write, "before").await;
    alice.hear("before").await;
    world.post(&write, "lost").await;
    let held = loop {
        let event = timeout(PATIENCE, alice.events.recv()).await.unwrap().unwrap();
        if let SessionEvent::Inbound { durable, .. } = event {
            break durable;
        }
    };
    // Nobody makes it durable; the end of the session saves the ratchet that opened it.
    alice.close().await;
    drop(held);
    let rows = alice.store.scan(Tag::PendingInbound, &[], None, Order::Ascending, 100).await.unwrap();
    assert!(!rows.is_empty());
    let mut unit = Unit::durable();
    for (rest, _) in rows {
        unit.delete(Tag::PendingInbound, rest);
    }
    alice.store.commit(unit).await.unwrap();

    alice.connect();
    alice.online().await;
    alice.hear("lost").await;
    assert_eq!(world.stats().await["retry_receipts"], 1, "its sender was asked");
    alice.close().await;
    alice.connect();
    alice.online().await;
    world.post(&write, "after").await;
    alice.hear("after").await;
    assert!(alice.inbox.is_empty(), "nothing came twice");
    assert_eq!(world.stats().await["retry_receipts"], 1);
    alice.close().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_phone_is_refused_and_the_right_one_can_still_scan() {
    let world = World::start("wrong").await;
    let mut alice = Number::new(&world, ALICE, world.claim(1).await);
    alice.pair();
    let code = alice.qr().await;
    world.post(&format!("/admin/mock-phone/scan-qr?phone={CAROL}"), &code).await;
    let refused = CloseReason::PairingRefused { code: "WRONG_NUMBER".to_owned() };
    assert_eq!(alice.closed().await, refused);
    assert!(!link::is_linked(&alice.store).await);
    assert_eq!(world.stats().await["linked"], 0, "the phone was never told yes");

    alice.pair();
    let code = alice.qr().await;
    world.post(&format!("/admin/mock-phone/scan-qr?phone={ALICE}"), &code).await;
    alice.online().await;
    assert!(link::is_linked(&alice.store).await);
    alice.close().await;

    alice.pair();
    let linked = CloseReason::PairingRefused { code: "ALREADY_LINKED".to_owned() };
    assert_eq!(alice.closed().await, linked);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_to_end_has_its_reason() {
    let world = World::start("kicks").await;
    let mut alice = world.provisioned(1, ALICE).await;
    let table = [
        ("drop", CloseReason::ConnectionLost),
        ("515", CloseReason::Recycled),
        ("xmlstreamend", CloseReason::Recycled),
        ("503", CloseReason::ServerError { code: 503 }),
        ("500", CloseReason::ServerError { code: 500 }),
        ("429", CloseReason::RateLimited),
        ("replaced", CloseReason::Replaced),
        ("403", CloseReason::Locked),
        ("405", CloseReason::ClientOutdated),
        ("406", CloseReason::Banned),
        ("401", CloseReason::LoggedOut { code: 401 }),
        ("516", CloseReason::LoggedOut { code: 516 }),
    ];
    for (code, expected) in table {
        alice.connect();
        alice.online().await;
        world.post(&format!("/admin/kick?phone={ALICE}&code={code}"), "").await;
        assert_eq!(alice.closed().await, expected, "{code}");
    }
    alice.connect();
    alice.online().await;
    world.post(&format!("/admin/kick?phone={ALICE}&code=402"), "").await;
    match alice.closed().await {
        CloseReason::TemporarilyBanned { code: 101, until } => assert!(until.is_some()),
        other => panic!("{other:?}"),
    }
    let stats = world.stats().await;
    assert_eq!(stats["most_at_once"], 1, "never two sockets: {stats}");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_login_has_its_reason() {
    let world = World::start("logins").await;
    let mut alice = world.provisioned(1, ALICE).await;
    let table = [
        (401, CloseReason::LoggedOut { code: 401 }),
        (405, CloseReason::ClientOutdated),
        (409, CloseReason::Refused { code: 409 }),
        (500, CloseReason::ServerError { code: 500 }),
    ];
    for (reason, expected) in table {
        let order = format!(r#"{{"phone":"{ALICE}","login_failure":{{"reason":{reason},"count":1}}}}"#);
        world.post("/admin/fault", &order).await;
        alice.connect();
        assert_eq!(alice.closed().await, expected);
    }
    alice.connect();
    alice.online().await;
    alice.close().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sends_answer_what_became_of_them() {
    let world = World::start("sends").await;
    let mut alice = world.provisioned(1, ALICE).await;
    let bob = Contact::of_phone(Phone::parse(BOB).unwrap());

    // A login that hangs: the session is open and not online.
    let order = format!(r#"{{"phone":"{ALICE}","mute_iq":["passive"]}}"#);
    world.post("/admin/fault", &order).await;
    alice.connect();
    let (too_early, _) = alice.send(&bob, "too early");
    assert_eq!(alice.written(too_early).await, Err(SendError::Offline));
    alice.close().await;
    world.post("/admin/fault", r#"{"clear":true}"#).await;
    alice.connect();
    alice.online().await;

    world.post(&format!("/admin/mock-phone/absent?phone={CAROL}"), "").await;
    let carol = Contact::of_phone(Phone::parse(CAROL).unwrap());
    let (nobody, _) = alice.send(&carol, "anybody there?");
    assert_eq!(alice.written(nobody).await, Err(SendError::NoSuchRecipient));

    let order = format!(r#"{{"phone":"{ALICE}","nack":{{"code":463,"count":1}}}}"#);
    world.post("/admin/fault", &order).await;
    let (seq, id) = alice.send(&bob, "refused by the server");
    assert_eq!(alice.written(seq).await, Ok(()));
    assert_eq!(alice.acked(&id).await, Some(463));

    // One chat: the order of asking is the order of arriving.
    let sent: Vec<(MessageSeq, String)> = (0..20).map(|n| alice.send(&bob, &format!("n{n}"))).collect();
    for (seq, id) in &sent {
        assert_eq!(alice.written(*seq).await, Ok(()));
        assert_eq!(alice.acked(id).await, None);
    }
    let expected: Vec<String> = (0..20).map(|n| format!("n{n}")).collect();
    eventually("all arrive in order", || async {
        let shown = world.shown(BOB).await;
        let texts: Vec<String> = shown.iter().map(|(text, _)| text.clone()).collect();
        texts == expected && shown.iter().all(|(_, times)| *times == 1)
    })
    .await;

    alice.store.poison();
    alice.send(&bob, "after the disk failed");
    assert_eq!(alice.closed().await, CloseReason::StoreFailed);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logout_dropped_handle_and_shutdown_close_politely() {
    let world = World::start("polite").await;
    let mut alice = world.provisioned(1, ALICE).await;
    alice.connect();
    alice.online().await;
    alice.session = None;
    assert_eq!(alice.closed().await, CloseReason::Requested);

    alice.connect();
    alice.online().await;
    alice.command(SessionCommand::Logout);
    assert_eq!(alice.closed().await, CloseReason::LoggedOut { code: 401 });
    link::forget_device(&alice.store).await.unwrap();
    alice.connect();
    assert_eq!(alice.closed().await, CloseReason::LoggedOut { code: 401 }, "nothing to log in with");

    let mut bob = world.provisioned(2, BOB).await;
    bob.connect();
    bob.online().await;
    assert_eq!(world.environment.shutdown(Duration::from_secs(20)).await, 0);
    assert_eq!(bob.closed().await, CloseReason::Requested);
    assert_eq!(world.stats().await["connections_now"], 0);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_whatsapp_is_told_apart() {
    let world = World::start("strangers").await;
    let mut alice = world.provisioned(1, ALICE).await;

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    alice.environment = environment(format!("ws://{address}/ws/chat"));
    alice.connect();
    assert_eq!(alice.closed().await, CloseReason::Unreachable);

    for (answer, expected) in
        [(Some(b"\x00\x00\x05hello".as_slice()), CloseReason::HandshakeRefused), (None, CloseReason::HandshakeSilent)]
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            use futures_util::{SinkExt, StreamExt};
            use tokio_tungstenite::tungstenite::Message;
            let (stream, _) = listener.accept().await.unwrap();
            let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
            while let Some(Ok(message)) = socket.next().await {
                if let (Message::Binary(_), Some(answer)) = (message, answer) {
                    let _ = socket.send(Message::Binary(answer.into())).await;
                }
            }
        });
        alice.environment = environment(format!("ws://{address}/ws/chat"));
        alice.connect();
        assert_eq!(alice.closed().await, expected);
        serving.await.unwrap();
    }

    // A build that does not check certificates never leaves this machine.
    assert!(link::is_sandbox_build());
    alice.environment = environment("ws://192.0.2.1:80/ws/chat".to_owned());
    alice.connect();
    assert_eq!(alice.closed().await, CloseReason::Unreachable);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_answering_is_left() {
    let world = World::start("silence").await;
    let mut alice = world.provisioned(1, ALICE).await;
    alice.connect();
    alice.online().await;
    let begun = Instant::now();
    let order = format!(r#"{{"phone":"{ALICE}","silence":true}}"#);
    world.post("/admin/fault", &order).await;
    let reason = loop {
        let event = timeout(Duration::from_secs(120), alice.events.recv()).await.unwrap();
        if let Some(SessionEvent::Closed(reason)) = event {
            break reason;
        }
    };
    assert!(matches!(reason, CloseReason::ConnectionLost | CloseReason::Unresponsive), "{reason:?}");
    assert!(begun.elapsed() < Duration::from_secs(95), "{:?}", begun.elapsed());
    world.post("/admin/fault", r#"{"clear":true}"#).await;
    alice.connect();
    alice.online().await;
    alice.close().await;
    world.end().await;
}
