//! Webhook receivers that throttle, redirect, reset, trickle and lie; and secrets while they are being changed.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;
use switchboard::demo::client::OwnedNumber;
use switchboard::demo::phones::{CallError, call};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::harness::{World, until};

const SHOP: &str = "15551300001";
const CUSTOMER: &str = "15551300099";
/// A number looks at the clock every second: it may have been put forward.
const AWAKE: (&str, &str) = ("RETENTION__SWEEP_SECONDS", "1");
const HOUR: u64 = 3600;

/// One request as it came.
#[derive(Debug, Clone)]
struct Request {
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(header, _)| header == name);
        found.map(|(_, value)| value.as_str()).unwrap_or_default()
    }

    fn text(&self) -> String {
        let body: Value = serde_json::from_slice(&self.body).unwrap();
        body["data"]["content"].as_str().unwrap().to_owned()
    }

    /// The signatures that a secret explains.
    fn signed_with(&self, secret: &str) -> usize {
        let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
        mac.update(format!("{}.{}.", self.header("webhook-id"), self.header("webhook-timestamp")).as_bytes());
        mac.update(&self.body);
        let expected = format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()));
        self.header("webhook-signature").split(' ').filter(|signature| **signature == expected).count()
    }
}

async fn read_request(socket: &mut TcpStream) -> Option<Request> {
    let (mut seen, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let read = socket.read(&mut chunk).await.ok().filter(|read| *read > 0)?;
        seen.extend_from_slice(&chunk[..read]);
        let Some(end) = seen.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8(seen[..end].to_vec()).unwrap();
        let headers = head.lines().skip(1).filter_map(|line| line.split_once(": "));
        let headers: Vec<_> = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
        let request = Request { headers, body: seen[end + 4..].to_vec() };
        if request.body.len() >= request.header("content-length").parse().unwrap() {
            return Some(request);
        }
    }
}

/// What a receiver does with its next request.
#[derive(Debug, Clone)]
enum Manner {
    /// Answers so.
    Says(String),
    /// Resets the connection without a word.
    Resets,
    /// Answers one byte at a time, for ever.
    Trickles(&'static [u8]),
}

fn says(status: &str, headers: &str) -> Manner {
    Manner::Says(format!("HTTP/1.1 {status}\r\n{headers}content-length: 0\r\nconnection: close\r\n\r\n"))
}

/// A receiver that deals with its first requests as told, one after the other, and takes all that follow.
struct Receiver {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    _server: JoinSet<()>,
}

impl Receiver {
    async fn start(manners: Vec<Manner>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::<Mutex<Vec<Request>>>::default();
        let (seen, mut server) = (requests.clone(), JoinSet::new());
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut socket, _)) = listener.accept().await {
                let (seen, manners) = (seen.clone(), manners.clone());
                connections.spawn(async move {
                    let Some(request) = read_request(&mut socket).await else { return };
                    let nth = {
                        let mut seen = seen.lock().unwrap();
                        seen.push(request);
                        seen.len() - 1
                    };
                    behave(socket, manners.get(nth).cloned().unwrap_or_else(|| says("200 OK", ""))).await;
                });
            }
        });
        Self { address, requests, _server: server }
    }

    fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

async fn behave(mut socket: TcpStream, manner: Manner) {
    match manner {
        Manner::Says(answer) => drop(socket.write_all(answer.as_bytes()).await),
        Manner::Resets => socket.set_zero_linger().unwrap(),
        Manner::Trickles(endless) => {
            for byte in endless.iter().chain(std::iter::repeat(&b'x')) {
                // The rhythm of somebody who means harm; nothing waits for it to end.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                if socket.write_all(&[*byte]).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn ask(world: &World, key: &str, method: &str, path: &str, body: &Value) -> Value {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    match call(world.api(), method, path, &[("x-api-key", key)], &body).await {
        Ok(text) => serde_json::from_str(&text).unwrap_or_default(),
        Err(CallError::Status { status, body }) => panic!("{method} {path}: {status} {body}"),
        Err(error) => panic!("{method} {path}: {error}"),
    }
}

/// Gives the webhook's id and its secret.
async fn subscribe(world: &World, shop: &OwnedNumber, url: &str) -> (String, String) {
    let made =
        ask(world, &shop.key, "POST", "/v1/webhooks", &json!({"url": url, "events": ["message.received"]})).await;
    (made["id"].as_str().unwrap().to_owned(), made["secret"].as_str().unwrap().to_owned())
}

/// The outcomes of a webhook's attempts, oldest first, once there are so many.
async fn outcomes(world: &World, shop: &OwnedNumber, hook: &str, count: usize) -> Vec<String> {
    until(&format!("{count} attempts are logged"), async || {
        let logs = ask(world, &shop.key, "GET", &format!("/v1/webhooks/{hook}/logs"), &Value::Null).await;
        let outcome = |entry: &Value| entry["outcome"].as_str().unwrap().to_owned();
        let outcomes: Vec<_> = logs.as_array().unwrap().iter().rev().map(outcome).collect();
        (outcomes.len() >= count).then_some(outcomes)
    })
    .await
}

async fn write(world: &World, shop: &OwnedNumber, text: &str) {
    world.phones.write(CUSTOMER, SHOP, text).await.unwrap();
    world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == text).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_a_wait_gets_it_and_an_hour_at_most() {
    let world = World::with(&[AWAKE]).await;
    let (_, _, numbers) = world.tenant("throttled", &[SHOP]).await;
    let shop = &numbers[0];
    let wait = |seconds: &str| says("429 Slow", &format!("retry-after: {seconds}\r\n"));
    let absurd = wait("99999999999");
    let receiver = Receiver::start(vec![wait("600"), absurd]).await;
    let (hook, _) = subscribe(&world, shop, &receiver.url()).await;
    write(&world, shop, "one").await;
    outcomes(&world, shop, &hook, 1).await;
    write(&world, shop, "two").await;
    // Far beyond the schedule's own five seconds, and before the time it asked for.
    world.put_clock_forward(300).await;
    write(&world, shop, "three").await;
    assert_eq!(receiver.requests().len(), 1, "nothing of the queue is tried meanwhile");
    world.put_clock_forward(301).await;
    outcomes(&world, shop, &hook, 2).await;
    world.put_clock_forward(HOUR - 300).await;
    write(&world, shop, "four").await;
    assert_eq!(receiver.requests().len(), 2, "one request looks, and waits as it is told");
    world.put_clock_forward(301).await;
    let outcomes = outcomes(&world, shop, &hook, 6).await;
    let delivered = "delivered";
    assert_eq!(outcomes, ["throttled", "throttled", delivered, delivered, delivered, delivered]);
    let texts: Vec<_> = receiver.requests().iter().map(Request::text).collect();
    assert_eq!(texts, ["one", "one", "one", "two", "three", "four"], "in order, whatever it asks");
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_resets_garbage_and_trickles_are_failures_and_hold_nothing() {
    let quick = ("WEBHOOK__SCHEDULE", "0 0.05 0.05 0.05 0.05 0.05 0.05 0.05");
    let world = World::with(&[AWAKE, quick, ("WEBHOOK__TIMEOUT_SECONDS", "1")]).await;
    let (_, _, numbers) = world.tenant("hostile", &[SHOP]).await;
    let shop = &numbers[0];
    let elsewhere = Receiver::start(Vec::new()).await;
    let located = format!("location: {}\r\n", elsewhere.url());
    let garbage = |answer: &str| Manner::Says(answer.to_owned());
    let cases = [
        (vec![says("307 Elsewhere", &located), says("301 For good", &located)], vec!["redirected", "redirected"]),
        (vec![Manner::Resets, Manner::Resets], vec!["no_answer", "no_answer"]),
        (vec![garbage("SSH-2.0-what\r\n\r\n"), garbage("")], vec!["no_answer", "no_answer"]),
        (vec![garbage(&format!("HTTP/1.1 200 OK\r\nx: {}\r\n", "y".repeat(600_000)))], vec!["no_answer"]),
        // Headers that never end, and a body that never does.
        (vec![Manner::Trickles(b"HTTP/1.1 200 OK\r\nx: ")], vec!["no_answer"]),
        (vec![Manner::Trickles(b"HTTP/1.1 503 Oh\r\n\r\n")], vec!["server_error"]),
        // What it says is nobody's business but the log's.
        (vec![garbage("HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope")], Vec::new()),
        (vec![garbage("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1\r\n\r\n{")], Vec::new()),
    ];
    let mut receivers = Vec::new();
    for (manners, expected) in cases {
        let receiver = Receiver::start(manners).await;
        let (hook, _) = subscribe(&world, shop, &receiver.url()).await;
        receivers.push((receiver, hook, expected));
    }
    write(&world, shop, "take this").await;
    for (receiver, hook, mut expected) in receivers {
        expected.push("delivered");
        assert_eq!(outcomes(&world, shop, &hook, expected.len()).await, expected);
        let requests = receiver.requests();
        assert_eq!(requests.len(), expected.len());
        assert!(requests.iter().all(|request| request.text() == "take this"));
        assert!(requests.iter().all(|request| request.header("webhook-id") == requests[0].header("webhook-id")));
    }
    assert_eq!(elsewhere.requests().len(), 0, "nobody is followed");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_secrets_sign_while_one_replaces_the_other_and_then_the_new_one_alone() {
    let mut world = World::with(&[AWAKE]).await;
    let (_, _, numbers) = world.tenant("rotation", &[SHOP]).await;
    let shop = &numbers[0].clone();
    let receiver = Receiver::start(Vec::new()).await;
    let (hook, old) = subscribe(&world, shop, &receiver.url()).await;
    let signatures = async |world: &World, text: &str, secrets: &[&str]| {
        write(world, shop, text).await;
        // One from before a kill may come once more.
        let request = until(&format!("{text:?} came"), async || {
            receiver.requests().into_iter().find(|request| request.text() == text)
        })
        .await;
        let each: Vec<_> = secrets.iter().map(|secret| request.signed_with(secret)).collect();
        (request.header("webhook-signature").split(' ').count(), each)
    };
    assert_eq!(signatures(&world, "before", &[&old]).await, (1, vec![1]));
    let rotate = format!("/v1/webhooks/{hook}/rotate");
    let rotated = ask(&world, &shop.key, "POST", &rotate, &json!({"overlapSeconds": 2 * HOUR})).await;
    let new = rotated["secret"].as_str().unwrap().to_owned();
    assert_ne!(new, old);
    assert_eq!(signatures(&world, "overlap", &[&old, &new]).await, (2, vec![1, 1]));
    world.kill_and_restart();
    assert_eq!(signatures(&world, "after a kill", &[&old, &new]).await, (2, vec![1, 1]));
    world.put_clock_forward(2 * HOUR).await;
    assert_eq!(signatures(&world, "past it", &[&old, &new]).await, (1, vec![0, 1]));
    // Who gives no time gets a day; a secret that leaked goes at once.
    let rotated = ask(&world, &shop.key, "POST", &rotate, &json!({})).await;
    let newer = rotated["secret"].as_str().unwrap().to_owned();
    assert_eq!(signatures(&world, "again", &[&old, &new, &newer]).await, (2, vec![0, 1, 1]));
    let rotated = ask(&world, &shop.key, "POST", &rotate, &json!({"overlapSeconds": 0})).await;
    let newest = rotated["secret"].as_str().unwrap().to_owned();
    assert_eq!(signatures(&world, "at once", &[&new, &newer, &newest]).await, (1, vec![0, 0, 1]));
}
