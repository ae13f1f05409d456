//! Numbers behind proxies of the test's own: HTTP CONNECT and SOCKS5, with and without a login. A proxy that is down is
//! tried by one number at a time, and all behind it come back when it works.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::{Attention, NumberState};
use switchboard::demo::client::{Caller, OwnedNumber};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::{World, until};

const CUSTOMER: &str = "15556100099";
const PASSWORD: &str = "seven-planted-herons";
const ALLOWED: (&str, &str) = ("WHATSAPP__ALLOW_PRIVATE_PROXIES", "true");

/// A proxy that speaks both languages, wants a login if it was given one, and counts.
#[derive(Default)]
struct State {
    attempts: AtomicUsize,
    tunnels: AtomicUsize,
    broken: AtomicBool,
    wants_login: bool,
}

struct TestProxy {
    state: Arc<State>,
    address: SocketAddr,
    tunnels: Arc<tokio::sync::Mutex<JoinSet<()>>>,
    _serving: JoinSet<()>,
}

impl TestProxy {
    async fn start(wants_login: bool) -> Self {
        let state = Arc::new(State { wants_login, ..State::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tunnels = Arc::new(tokio::sync::Mutex::new(JoinSet::new()));
        let mut serving = JoinSet::new();
        let (shared, open) = (state.clone(), tunnels.clone());
        serving.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                shared.attempts.fetch_add(1, Ordering::SeqCst);
                if !shared.broken.load(Ordering::SeqCst) {
                    let state = shared.clone();
                    open.lock().await.spawn(async move {
                        let _ = serve(&state, stream).await;
                    });
                }
            }
        });
        Self { state, address, tunnels, _serving: serving }
    }

    fn url(&self, scheme: &str, login: &str) -> String {
        format!("{scheme}://{login}{}", self.address)
    }

    fn attempts(&self) -> usize {
        self.state.attempts.load(Ordering::SeqCst)
    }

    fn tunnels(&self) -> usize {
        self.state.tunnels.load(Ordering::SeqCst)
    }

    /// From now on everybody who connects is sent away, and whoever is connected is cut.
    async fn break_down(&self) {
        self.state.broken.store(true, Ordering::SeqCst);
        self.tunnels.lock().await.abort_all();
    }

    fn mend(&self) {
        self.state.broken.store(false, Ordering::SeqCst);
    }
}

async fn serve(state: &State, mut stream: TcpStream) -> Option<()> {
    let mut first = [0];
    stream.peek(&mut first).await.ok()?;
    let target = if first == [5] { socks5(state, &mut stream).await? } else { http(state, &mut stream).await? };
    let mut beyond = TcpStream::connect(target).await.ok()?;
    state.tunnels.fetch_add(1, Ordering::SeqCst);
    let _ = copy_bidirectional(&mut stream, &mut beyond).await;
    Some(())
}

async fn http(state: &State, stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).ok()?;
    let target = head.strip_prefix("CONNECT ")?.split(' ').next()?.to_owned();
    // "user:" and the password.
    let login = "Basic dXNlcjpzZXZlbi1wbGFudGVkLWhlcm9ucw==";
    let may = !state.wants_login || head.contains(login);
    let answer = if may { "200 Connection established" } else { "407 Proxy Authentication Required" };
    stream.write_all(format!("HTTP/1.1 {answer}\r\n\r\n").as_bytes()).await.ok()?;
    may.then_some(target)
}

async fn socks5(state: &State, stream: &mut TcpStream) -> Option<String> {
    let mut methods = [0; 2];
    stream.read_exact(&mut methods).await.ok()?;
    let mut offered = vec![0; methods[1].into()];
    stream.read_exact(&mut offered).await.ok()?;
    let method = if state.wants_login { 2 } else { 0 };
    if !offered.contains(&method) {
        stream.write_all(&[5, 255]).await.ok()?;
        return None;
    }
    stream.write_all(&[5, method]).await.ok()?;
    if state.wants_login {
        stream.read_u8().await.ok()?;
        let mut words = Vec::new();
        for _ in 0..2 {
            let mut word = vec![0; stream.read_u8().await.ok()?.into()];
            stream.read_exact(&mut word).await.ok()?;
            words.push(word);
        }
        let may = words == [b"user".to_vec(), PASSWORD.as_bytes().to_vec()];
        stream.write_all(&[1, u8::from(!may)]).await.ok()?;
        may.then_some(())?;
    }
    let mut request = [0; 10];
    stream.read_exact(&mut request).await.ok()?;
    let [5, 1, 0, 1, a, b, c, d, high, low] = request else { return None };
    stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await.ok()?;
    Some(format!("{a}.{b}.{c}.{d}:{}", u16::from_be_bytes([high, low])))
}

async fn set_proxy(tenant: &Caller, number: &str, url: &str) -> Result<proto::Number, tonic::Status> {
    let request = proto::UpdateNumberRequest {
        number: Some(proto::Number { id: number.to_owned(), proxy: url.to_owned(), ..proto::Number::default() }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["proxy".to_owned()] }),
    };
    Ok(tenant.numbers().update_number(request).await?.into_inner())
}

async fn sends(world: &World, number: &OwnedNumber, text: &str) {
    number.caller.send_text(CUSTOMER, text, text).await.unwrap();
    until("it is shown", async || (world.copies(CUSTOMER, text).await == 1).then_some(())).await;
}

fn holds(folder: &Path, needle: &[u8]) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return holds(&path, needle);
        }
        std::fs::read(&path).unwrap().windows(needle.len()).any(|piece| piece == needle)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_connect_through_their_proxies_and_nobody_sees_the_password() {
    let mut world = World::with(&[ALLOWED]).await;
    let (web, socks) = (TestProxy::start(true).await, TestProxy::start(true).await);
    let login = format!("user:{PASSWORD}@");

    // Linked through one, from the first connection on.
    let (tenant, tenant_key) = world.operator.create_tenant("proxies").await.unwrap();
    let request = proto::CreateNumberRequest {
        display_name: "behind".to_owned(),
        phone_number: "+15556100001".to_owned(),
        proxy: web.url("http", &login),
        ..proto::CreateNumberRequest::default()
    };
    let made = tenant.numbers().create_number(request).await.unwrap().into_inner();
    let id = made.number.as_ref().unwrap().id.clone();
    assert_eq!(made.number.unwrap().proxy, web.url("http", "user@"));
    let caller = tenant.with_key(&made.api_key).unwrap();
    let behind = OwnedNumber { id, phone: "15556100001".to_owned(), caller, key: made.api_key };
    world.link(&tenant, &behind).await;
    assert!(web.tunnels() >= 1 && socks.tunnels() == 0);
    sends(&world, &behind, "through connect").await;

    // Moved to the other one while it is connected, and back to none.
    let changed = set_proxy(&tenant, &behind.id, &socks.url("socks5", &login)).await.unwrap();
    assert_eq!(changed.proxy, socks.url("socks5", "user@"));
    until("it goes through the other one", async || (socks.tunnels() == 1).then_some(())).await;
    world.until_state(&tenant, &behind.id, NumberState::Online).await;
    sends(&world, &behind, "through socks").await;
    let accepted = socks.attempts();
    set_proxy(&tenant, &behind.id, &socks.url("socks5h", &login)).await.unwrap();
    assert_eq!(world.number(&tenant, &behind.id).await.state(), NumberState::Online, "the same one: nothing to do");

    // A restart reads it back.
    assert!(!holds(&world.data(), PASSWORD.as_bytes()), "the password lies on disk in clear");
    world.kill_and_restart();
    let tenant = world.caller(&tenant_key).await;
    until("it is back through the proxy", async || (socks.attempts() > accepted).then_some(())).await;
    world.until_state(&tenant, &behind.id, NumberState::Online).await;

    // A wrong password is told apart, and stops nobody else.
    let wrong = socks.url("socks5", "user:wrong@");
    set_proxy(&tenant, &behind.id, &wrong).await.unwrap();
    until("the refusal is told", async || {
        let shown = world.number(&tenant, &behind.id).await;
        (shown.reason == "PROXY_AUTH_FAILED" && shown.attention() == Attention::Owner).then_some(())
    })
    .await;
    set_proxy(&tenant, &behind.id, "").await.unwrap();
    let (attempts, number) = (socks.attempts(), world.until_state(&tenant, &behind.id, NumberState::Online).await);
    assert_eq!((number.proxy.as_str(), socks.attempts() <= attempts + 1), ("", true), "directly");
    for wrong in ["ftp://127.0.0.1:1", "socks5://", "http://127.0.0.1:1/path"] {
        let refused = set_proxy(&tenant, &behind.id, wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{wrong}");
        assert!(!refused.message().contains("127.0.0.1"), "{refused:?}");
    }
    let stats = world.phones.stats().await.unwrap();
    assert_eq!((&stats["devices_connected_twice"], &stats["signal_keys_reused"]), (&0.into(), &0.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_proxy_is_refused_unless_allowed() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("proxies", &["15556110001"]).await;
    for private in ["socks5://127.0.0.1:1080", "http://10.0.0.1:3128", "socks5://[::1]:1080", "http://localhost:80"] {
        let refused = set_proxy(&tenant, &numbers[0].id, private).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{private}");
    }
    assert_eq!(world.number(&tenant, &numbers[0].id).await.proxy, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_is_down_is_tried_by_one_number_at_a_time_and_all_come_back() {
    const BEHIND: usize = 8;
    let world = World::with(&[ALLOWED, ("RECONNECT__LONGEST_SECONDS", "1")]).await;
    let proxy = TestProxy::start(false).await;
    let phones: Vec<String> = (0..=BEHIND).map(|number| format!("155562{number:05}")).collect();
    let phones: Vec<&str> = phones.iter().map(String::as_str).collect();
    let (tenant, _, numbers) = world.tenant("proxies", &phones).await;
    let (free, behind) = numbers.split_first().unwrap();
    for (number, scheme) in behind.iter().zip(["socks5", "http"].into_iter().cycle()) {
        set_proxy(&tenant, &number.id, &proxy.url(scheme, "")).await.unwrap();
    }
    until("all go through the proxy", async || (proxy.tunnels() == BEHIND).then_some(())).await;
    for number in behind {
        world.until_state(&tenant, &number.id, NumberState::Online).await;
    }

    let before = proxy.attempts();
    proxy.break_down().await;
    let waiting = async || world.metric("switchboard_proxy_waiting", "").await;
    until("all wait for it", async || (waiting().await >= (BEHIND - 1) as f64).then_some(())).await;
    assert_eq!(world.metric("switchboard_proxies_down", "").await, 1.0);
    // Five failures open it; each may have been on its way once more.
    let storm = proxy.attempts() - before;
    assert!((5..=5 + BEHIND + 1).contains(&storm), "{storm} attempts");
    let down = until("they say why", async || {
        let mut reasons = Vec::new();
        for number in behind {
            let number = world.number(&tenant, &number.id).await;
            reasons.push((number.state(), number.reason));
        }
        let waits = reasons.iter().filter(|(state, why)| *state == NumberState::Offline && why == "PROXY_DOWN").count();
        (waits >= BEHIND - 1).then_some(reasons)
    })
    .await;
    assert_eq!(down.len(), BEHIND);
    // One at a time: with pauses of about 5 and 10 seconds eight numbers come to two tries, not to sixteen or more.
    let before = proxy.attempts();
    until("two more tries", async || (proxy.attempts() >= before + 2).then_some(())).await;
    assert_eq!(proxy.attempts(), before + 2);
    assert!(waiting().await >= (BEHIND - 1) as f64);
    assert_eq!(world.number(&tenant, &free.id).await.state(), NumberState::Online, "no matter of others");

    for (index, number) in behind.iter().enumerate() {
        let text = format!("kept {index}");
        number.caller.send_text(CUSTOMER, &text, &text).await.unwrap();
    }
    proxy.mend();
    for number in behind {
        world.until_state(&tenant, &number.id, NumberState::Online).await;
    }
    assert_eq!((waiting().await, world.metric("switchboard_proxies_down", "").await), (0.0, 0.0));
    for index in 0..BEHIND {
        let text = format!("kept {index}");
        until(&format!("{text} is shown"), async || (world.copies(CUSTOMER, &text).await == 1).then_some(())).await;
    }
    assert_eq!(world.phones.stats().await.unwrap()["devices_connected_twice"], 0);
}
