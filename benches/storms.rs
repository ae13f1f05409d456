//! A whole fleet in trouble: WhatsApp goes away and comes back, a thousand numbers panic at once, one number panics all
//! the time, a thousand busy numbers are drained. Nothing accepted may be lost, and the others should hardly notice.
//!
//! ```sh
//! cargo build --release --features sandbox --target-dir target/sandbox
//! FLEET_SANDBOX=target/sandbox/release/switchboard FLEET_NUMBERS=10000 cargo bench --bench storms
//! ```
//!
//! `STORMS` picks parts (`outage,impostor,panics,loop,drain`), `STORMS_MINUTES` says how long the one number goes on panicking.
//! The outage and the impostor are met by the default build, which checks certificates; panics can only be ordered from the sandbox's.

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

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::event_service_client::EventServiceClient;
use switchboard::api::grpc::proto::number_service_client::NumberServiceClient;
use switchboard::api::grpc::proto::stream_events_response::Step;
use switchboard::telemetry::rng::Random;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Request, Status};
use tonic_types::StatusExt as _;

use self::rig::{
    Daemon, PATIENCE, Process, Sender, gate, http, number_id, online, percentile, phone, provision, sandbox, serve,
    until_online,
};

/// Numbers that send while others suffer, and messages per second over all of them.
const SENDERS: usize = 100;
const RATE: u64 = 300;
/// How long before and after a storm their accept times are taken.
const WINDOW: Duration = Duration::from_secs(20);
/// Numbers that panic at once.
const PANICKING: usize = 1_000;
/// Orders to panic that are given at once.
const ORDERS: usize = 32;
/// How long nobody panics before and after the one that does.
const CALM: Duration = Duration::from_mins(2);
/// How often the one number is told to panic.
const PANIC_EVERY: Duration = Duration::from_millis(100);
/// Numbers that are busy when the daemon is drained, how often each of them sends, and those whose events are followed.
const BUSY: usize = 1_000;
const BUSY_EVERY: Duration = Duration::from_secs(2);
const FOLLOWED: usize = 100;
/// How long they are busy before that.
const BUSY_FOR: Duration = Duration::from_secs(15);
/// How long the sandbox stays away.
const AWAY: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(200);

fn metric(admin: SocketAddr, family: &str, skip: Option<&str>) -> f64 {
    let text = http(admin, "GET", "/metrics");
    let of_family = text.lines().filter(|line| line.starts_with(family));
    let counted = of_family.filter(|line| skip.is_none_or(|number| !line.contains(number)));
    counted.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

fn stat(sandbox: SocketAddr, name: &str) -> u64 {
    let stats: Value = serde_json::from_str(&http(sandbox, "GET", "/admin/stats")).unwrap();
    stats[name].as_u64().unwrap()
}

/// Sends that go on at the same rate until told to stop, each from one of the first numbers to another of them.
struct Load {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Vec<(Instant, Duration)>>,
}

impl Load {
    fn begin(sender: &Sender, senders: usize, tag: &'static str) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let (stopped, sender) = (stop.clone(), sender.clone());
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
            let mut calls = JoinSet::new();
            for index in 0_usize.. {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                ticks.tick().await;
                let (sender, from) = (sender.clone(), index % senders);
                let to = (from + senders / 2) % senders;
                calls.spawn(async move {
                    let begun = Instant::now();
                    (begun, sender.send(from, to, format!("{tag} {index}"), "").await)
                });
            }
            calls.join_all().await
        });
        Self { stop, task }
    }

    async fn end(self) -> Vec<(Instant, Duration)> {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.unwrap()
    }
}

/// Accept times of the calls that began in a window.
fn window(calls: &[(Instant, Duration)], from: Instant, to: Instant) -> String {
    let began = calls.iter().filter(|(at, _)| (from..to).contains(at));
    let mut took: Vec<_> = began.map(|(_, took)| *took).collect();
    took.sort();
    if took.is_empty() {
        return "no call".to_owned();
    }
    format!("{} calls, p50 {:.2} ms, p99 {:.2} ms", took.len(), percentile(&took, 0.5), percentile(&took, 0.99))
}

/// Why a number's last connection ended.
async fn refused_because(sender: &Sender, index: usize) -> String {
    let mut request = Request::new(proto::GetNumberRequest { number: number_id(index).to_string() });
    request.metadata_mut().insert("x-api-key", sender.key.parse().unwrap());
    let number = NumberServiceClient::new(sender.channel.clone()).get_number(request).await.unwrap().into_inner();
    number.last_error.map(|last| last.code).unwrap_or_default()
}

async fn connect(daemon: &Daemon, key: &str) -> Sender {
    let channel = Channel::from_shared(format!("http://{}", daemon.api)).unwrap().connect().await.unwrap();
    Sender { channel, key: key.to_owned() }
}

/// The texts that phones show, and how often.
fn shown(sandbox: SocketAddr, phones: usize) -> HashMap<String, usize> {
    let mut texts = HashMap::new();
    for index in 0..phones {
        let lines = http(sandbox, "GET", &format!("/admin/mock-phone/messages?phone={}", phone(index)));
        for line in lines.lines().filter(|line| !line.is_empty()) {
            let line: Value = serde_json::from_str(line).unwrap();
            // What it wrote itself stands there as well.
            if line["direction"] != "out" {
                *texts.entry(line["text"].as_str().unwrap().to_owned()).or_default() += 1;
            }
        }
    }
    texts
}

/// Waits until everything accepted is shown, and says what is missing or doubled.
fn compare(sandbox: SocketAddr, phones: usize, accepted: &[String]) -> String {
    let begun = Instant::now();
    loop {
        let texts = shown(sandbox, phones);
        let missing = accepted.iter().filter(|text| !texts.contains_key(*text)).count();
        let doubled = accepted.iter().filter(|text| texts.get(*text).is_some_and(|count| *count > 1)).count();
        if missing == 0 || begun.elapsed() > PATIENCE {
            return format!("{} accepted, {missing} missing, {doubled} shown twice", accepted.len());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

struct World {
    sandbox_binary: String,
    directory: PathBuf,
    sandbox_data: PathBuf,
    sandbox: Process,
    sandbox_address: SocketAddr,
    key: String,
    count: usize,
}

impl World {
    /// `lasting`: the sandbox is to survive its own end. It then writes everything anew again and again, which costs more
    /// the longer it runs, so parts that can do without are measured without.
    async fn begin(count: usize, lasting: bool) -> Self {
        let sandbox_binary =
            std::env::var("FLEET_SANDBOX").expect("FLEET_SANDBOX: a binary built with --features sandbox");
        let home: PathBuf = std::env::temp_dir().join(format!("switchboard-storms-{}", std::process::id()));
        let (directory, sandbox_data) = (home.join("data"), home.join("sandbox"));
        let random = Arc::new(Random::from_system().unwrap());
        let kept = lasting.then_some(sandbox_data.as_path());
        let (sandbox, sandbox_address) = sandbox(&sandbox_binary, "127.0.0.1:0", kept);
        let begun = Instant::now();
        let key = provision(&directory, sandbox_address, count, &random).await;
        println!("{count} numbers provisioned in {:.1} s", begun.elapsed().as_secs_f64());
        Self { sandbox_binary, directory, sandbox_data, sandbox, sandbox_address, key, count }
    }

    fn serve(&self, binary: &str) -> Daemon {
        let begun = Instant::now();
        let daemon = serve(binary, &self.directory, self.sandbox_address);
        let half = until_online(daemon.admin, self.count / 2, begun);
        let all = until_online(daemon.admin, self.count, begun);
        println!(
            "API ready after {:.2} s, half Online after {:.2} s, all after {:.2} s, {:.2} CPU-s",
            daemon.ready.as_secs_f64(),
            half.as_secs_f64(),
            all.as_secs_f64(),
            daemon.process.cpu().as_secs_f64()
        );
        daemon
    }

    /// WhatsApp is away for a while and comes back to a fleet that has gone on accepting.
    async fn outage(&mut self, daemon: &Daemon) {
        let sender = connect(daemon, &self.key).await;
        let senders = SENDERS.min(self.count);
        let (load, begun) = (Load::begin(&sender, senders, "outage"), Instant::now());
        tokio::time::sleep(WINDOW).await;
        let (gone, (_, saved)) = (Instant::now(), self.sandbox.terminate());
        tokio::time::sleep(AWAY).await;
        let (process, _) = sandbox(&self.sandbox_binary, &self.sandbox_address.to_string(), Some(&self.sandbox_data));
        self.sandbox = process;
        let back = Instant::now();
        let curve = self.recovery(back).await;
        let all = until_online(daemon.admin, self.count, back);
        tokio::time::sleep(WINDOW).await;
        let calls = load.end().await;
        println!(
            "outage of {:.1} s (of them {:.1} s to save the sandbox): {curve}; all Online {:.2} s after it came back",
            (back - gone).as_secs_f64(),
            saved.as_secs_f64(),
            all.as_secs_f64()
        );
        println!("  accept before: {}", window(&calls, begun, gone));
        println!("  accept during: {}", window(&calls, gone, back));
        println!("  accept while they come back: {}", window(&calls, back, back + all));
        println!("  accept after: {}", window(&calls, back + all, Instant::now()));
        let accepted: Vec<_> = (0..calls.len()).map(|index| format!("outage {index}")).collect();
        println!("  {}", compare(self.sandbox_address, senders, &accepted));
    }

    /// Somebody else answers at WhatsApp's address, with a certificate chain of its own: nobody may log in there.
    async fn impostor(&mut self, daemon: &Daemon) {
        self.sandbox.terminate();
        let address = self.sandbox_address.to_string();
        let (impostor, _) = sandbox(&self.sandbox_binary, &address, None);
        let begun = Instant::now();
        let sender = connect(daemon, &self.key).await;
        let looked_at = SENDERS.min(self.count);
        // While nobody gets through, the gate lets one number at a time try: few are refused, the others wait.
        let mut refused = 0;
        let mut first = None;
        while first.is_none_or(|first: Duration| begun.elapsed() - first < WINDOW) {
            assert!(begun.elapsed() < PATIENCE, "no number is refused");
            tokio::time::sleep(LOOK_EVERY).await;
            assert_eq!(stat(self.sandbox_address, "logins"), 0, "a number took the impostor for WhatsApp");
            refused = 0;
            for index in 0..looked_at {
                refused += usize::from(refused_because(&sender, index).await == "HANDSHAKE_REFUSED");
            }
            if refused > 0 {
                first = first.or_else(|| Some(begun.elapsed()));
            }
        }
        println!(
            "impostor: the first HANDSHAKE_REFUSED after {:.1} s, {refused} of {looked_at} numbers say so {:.0} s later; {} of {} are online, {} logins at the impostor's",
            first.unwrap_or_default().as_secs_f64(),
            WINDOW.as_secs_f64(),
            online(daemon.admin),
            self.count,
            stat(self.sandbox_address, "logins")
        );
        drop(impostor);
        let (process, _) = sandbox(&self.sandbox_binary, &address, Some(&self.sandbox_data));
        self.sandbox = process;
        let back = Instant::now();
        let all = tokio::task::block_in_place(|| until_online(daemon.admin, self.count, back));
        println!("  all Online {:.2} s after the real one came back", all.as_secs_f64());
    }

    /// How fast the fleet comes back, and how many connections a second are opened for that at most.
    async fn recovery(&self, back: Instant) -> String {
        let mut opened: Vec<(Instant, u64)> = Vec::new();
        let mut marks = Vec::new();
        let shares = [0.1, 0.5, 0.9, 1.0];
        while marks.len() < shares.len() {
            assert!(back.elapsed() < PATIENCE, "not all are back");
            let now = Instant::now();
            opened.push((now, stat(self.sandbox_address, "accepted")));
            let connected = stat(self.sandbox_address, "connections_now");
            while marks.len() < shares.len() && connected as f64 >= shares[marks.len()] * self.count as f64 {
                marks.push(back.elapsed().as_secs_f64());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let second = Duration::from_secs(1);
        let rate = |(at, count): &(Instant, u64)| {
            let before = opened.iter().rev().find(|(earlier, _)| *at - *earlier.min(at) >= second);
            before.map_or(0.0, |(earlier, then)| (count - then) as f64 / (*at - *earlier).as_secs_f64())
        };
        let most = opened.iter().map(rate).fold(0.0, f64::max);
        format!(
            "10/50/90/100 % connected after {:.1}/{:.1}/{:.1}/{:.1} s, at most {most:.0} connections opened in a second (gate {} and as much again at once)",
            marks[0],
            marks[1],
            marks[2],
            marks[3],
            gate()
        )
    }

    fn panic(&self, daemon: &Daemon, index: usize) {
        http(daemon.admin, "POST", &format!("/debug/panic?number={}", number_id(index)));
    }

    /// Many numbers crash at the same moment; others go on sending.
    async fn panics(&self, daemon: &Daemon) {
        let sender = connect(daemon, &self.key).await;
        let senders = SENDERS.min(self.count / 2);
        let (load, begun) = (Load::begin(&sender, senders, "panics"), Instant::now());
        tokio::time::sleep(WINDOW).await;
        let restarts = metric(daemon.admin, "switchboard_number_restarts_total", None);
        let crash = Instant::now();
        let last = (senders + PANICKING).min(self.count);
        let order = |from: usize| (from..last).step_by(ORDERS).for_each(|index| self.panic(daemon, index));
        tokio::task::block_in_place(|| {
            std::thread::scope(|scope| {
                (senders..senders + ORDERS).for_each(|from| drop(scope.spawn(move || order(from))));
            });
        });
        let ordered = crash.elapsed();
        let all = tokio::task::block_in_place(|| until_online(daemon.admin, self.count, crash));
        tokio::time::sleep(WINDOW).await;
        let calls = load.end().await;
        println!(
            "{} numbers panic within {:.2} s: all Online again {:.2} s after the first, {} restarts",
            last - senders,
            ordered.as_secs_f64(),
            all.as_secs_f64(),
            metric(daemon.admin, "switchboard_number_restarts_total", None) - restarts
        );
        println!("  accept of others before: {}", window(&calls, begun, crash));
        println!("  accept of others during: {}", window(&calls, crash, crash + all));
        println!("  accept of others after: {}", window(&calls, crash + all, Instant::now()));
    }

    /// One number crashes whenever it runs.
    async fn one_panics(&self, daemon: &Daemon) {
        let minutes: u64 = std::env::var("STORMS_MINUTES").map_or(10, |text| text.parse().unwrap());
        let sender = connect(daemon, &self.key).await;
        let senders = SENDERS.min(self.count / 2);
        let (load, begun) = (Load::begin(&sender, senders, "loop"), Instant::now());
        let (victim, calm) = (self.count - 1, CALM.min(Duration::from_secs(30 * minutes)));
        tokio::time::sleep(calm).await;
        let storm = Instant::now();
        let mut ticks = tokio::time::interval(PANIC_EVERY);
        while storm.elapsed() < Duration::from_secs(60 * minutes) {
            ticks.tick().await;
            self.panic(daemon, victim);
        }
        let over = Instant::now();
        tokio::time::sleep(calm).await;
        let calls = load.end().await;
        let id = number_id(victim).to_string();
        let metrics = http(daemon.admin, "GET", "/metrics");
        let of_victim = |family: &str| metrics.lines().find(|line| line.starts_with(family) && line.contains(&id));
        println!(
            "one number told to panic every {PANIC_EVERY:?} for {minutes} min: {:?}, siblings' restarts {}",
            of_victim("switchboard_number_restarts_total"),
            metric(daemon.admin, "switchboard_number_restarts_total", Some(&id))
        );
        println!("  {:?}", of_victim("switchboard_number_state"));
        println!("  accept of siblings before: {}", window(&calls, begun, storm));
        println!("  accept of siblings during: {}", window(&calls, storm, over));
        println!("  accept of siblings after: {}", window(&calls, over, Instant::now()));
    }

    /// A daemon with many busy numbers is told to end; another one goes on.
    async fn drain(&self, mut daemon: Daemon, binary: &str) -> Daemon {
        let sender = connect(&daemon, &self.key).await;
        let busy = BUSY.min(self.count);
        let accepted = Arc::<Mutex<Vec<String>>>::default();
        let mut working = JoinSet::new();
        for from in 0..busy {
            working.spawn(keep_busy(sender.clone(), from, busy, accepted.clone()));
        }
        let mut following = JoinSet::new();
        for index in 0..FOLLOWED.min(busy) {
            let sender = sender.clone();
            following.spawn(async move { (index, follow(&sender, index, String::new(), None).await) });
        }
        tokio::time::sleep(BUSY_FOR).await;
        let (status, took) = tokio::task::block_in_place(|| daemon.process.terminate());
        working.join_all().await;
        let ends = following.join_all().await;
        println!("drain of {busy} busy numbers: exit status {status:?} after {:.2} s", took.as_secs_f64());
        let daemon = self.serve(binary);
        let sender = connect(&daemon, &self.key).await;
        let (mut whole, mut gaps) = (0, 0);
        for (index, end) in ends {
            let Some(cursor) = end.cursor else { continue };
            let next = follow(&sender, index, cursor, end.last).await;
            whole += 1;
            gaps += usize::from(end.gap || next.gap);
        }
        println!("  {whole} of {} streams ended with a cursor, {gaps} gaps", FOLLOWED.min(busy));
        let accepted = accepted.lock().unwrap().clone();
        println!("  {}", compare(self.sandbox_address, busy, &accepted));
        daemon
    }
}

/// Sends until it is refused, and notes what was accepted.
async fn keep_busy(sender: Sender, from: usize, busy: usize, accepted: Arc<Mutex<Vec<String>>>) {
    tokio::time::sleep(BUSY_EVERY.mul_f64(from as f64 / busy as f64)).await;
    let mut ticks = tokio::time::interval(BUSY_EVERY);
    for index in 0.. {
        ticks.tick().await;
        let text = format!("busy {from} {index}");
        let to = (from + busy / 2) % busy;
        if sender.try_send(from, to, text.clone(), "").await.is_err() {
            return;
        }
        accepted.lock().unwrap().push(text);
    }
}

/// How a stream ended.
struct End {
    last: Option<i64>,
    gap: bool,
    cursor: Option<String>,
}

/// Reads a number's events from a cursor until the stream ends, or, when it goes on from one, has caught up.
async fn follow(sender: &Sender, index: usize, cursor: String, mut last: Option<i64>) -> End {
    let resumed = !cursor.is_empty();
    let number = number_id(index).to_string();
    let mut request = Request::new(proto::StreamEventsRequest { number, resume_cursor: cursor, ..Default::default() });
    request.metadata_mut().insert("x-api-key", sender.key.parse().unwrap());
    let mut steps = EventServiceClient::new(sender.channel.clone()).stream_events(request).await.unwrap().into_inner();
    let mut gap = false;
    loop {
        match steps.message().await {
            Ok(Some(response)) => match response.step.unwrap() {
                Step::Event(event) => {
                    gap |= last.is_some_and(|last| event.sequence != last + 1);
                    last = Some(event.sequence);
                }
                Step::Progress(progress) if resumed && progress.caught_up => return End { last, gap, cursor: None },
                Step::Progress(_) => {}
            },
            Ok(None) => return End { last, gap, cursor: None },
            Err(status) => return End { last, gap, cursor: cursor_in(&status) },
        }
    }
}

fn cursor_in(status: &Status) -> Option<String> {
    let details = status.get_error_details();
    details.error_info().and_then(|info| info.metadata.get("cursor").cloned())
}

#[tokio::main]
async fn main() {
    // Cargo passes `--bench`; under `cargo test --benches` it does not, and there is nothing to test here.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let count: usize = std::env::var("FLEET_NUMBERS").map_or(100, |text| text.parse().unwrap());
    let parts = std::env::var("STORMS").unwrap_or("outage,impostor,panics,loop,drain".to_owned());
    let wanted = |part: &str| parts.split(',').any(|wanted| wanted == part);
    let lasting = wanted("outage") || wanted("impostor");
    let mut world = World::begin(count, lasting).await;
    if lasting {
        let mut daemon = world.serve(env!("CARGO_BIN_EXE_switchboard"));
        if wanted("outage") {
            world.outage(&daemon).await;
        }
        if wanted("impostor") {
            world.impostor(&daemon).await;
        }
        let (status, took) = daemon.process.terminate();
        println!("drain of {count} idle numbers: exit status {status:?} after {:.2} s", took.as_secs_f64());
    }
    if !["panics", "loop", "drain"].into_iter().any(wanted) {
        let _ = std::fs::remove_dir_all(world.directory.parent().unwrap());
        return;
    }
    let with_panics = world.sandbox_binary.clone();
    let mut daemon = world.serve(&with_panics);
    if wanted("panics") {
        world.panics(&daemon).await;
    }
    if wanted("loop") {
        world.one_panics(&daemon).await;
    }
    if wanted("drain") {
        daemon = world.drain(daemon, &with_panics).await;
    }
    println!("sandbox: {}", http(world.sandbox_address, "GET", "/admin/stats"));
    drop(daemon);
    drop(world.sandbox);
    let _ = std::fs::remove_dir_all(world.directory.parent().unwrap());
}
