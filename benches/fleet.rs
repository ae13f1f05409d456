//! A whole fleet on the release build: time to all Online, memory, idle CPU, accept latency, CPU per message.
//!
//! The sandbox runs in its own process, so nothing of it is counted. Numbers are provisioned: their devices carry the
//! sandbox's certificate chain, so the daemon is the default build, with verification on.
//!
//! ```sh
//! cargo build --release --features sandbox --target-dir target/sandbox
//! FLEET_SANDBOX=target/sandbox/release/switchboard FLEET_NUMBERS=1000 cargo bench --bench fleet
//! ```

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
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use switchboard::telemetry::rng::Random;
use tonic::transport::Channel;

use self::rig::{Daemon, PATIENCE, Sender, http, percentile, provision, sandbox, serve, until_online};

/// Numbers that send, and messages per second over all of them, in the latency part.
const SENDERS: usize = 100;
const RATE_PER_SECOND: u64 = 500;
const RATE_SECONDS: u64 = 20;
/// Messages in the saturated part.
const SATURATED: usize = 20_000;
const SATURATED_CALLS: usize = 128;

fn sent(admin: SocketAddr) -> u64 {
    let metrics = http(admin, "GET", "/metrics");
    let lines = metrics.lines().filter(|line| line.starts_with("switchboard_number_messages_sent_total{"));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

async fn until_sent(admin: SocketAddr, count: u64) {
    let begun = Instant::now();
    while sent(admin) < count {
        assert!(begun.elapsed() < PATIENCE, "{} of {count} sent", sent(admin));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Pairs write to each other; every contact is warm after the first round.
fn peer(from: usize, senders: usize) -> usize {
    (from + senders / 2) % senders
}

async fn paced(sender: &Sender, senders: usize) -> Vec<Duration> {
    let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 / RATE_PER_SECOND));
    let mut calls = tokio::task::JoinSet::new();
    for index in 0..RATE_PER_SECOND * RATE_SECONDS {
        ticks.tick().await;
        let sender = sender.clone();
        let from = index as usize % senders;
        calls.spawn(async move { sender.send(from, peer(from, senders), format!("paced {index}"), "").await });
    }
    let mut took = calls.join_all().await;
    took.sort();
    took
}

async fn saturated(sender: &Sender, senders: usize) -> Vec<Duration> {
    let mut workers = tokio::task::JoinSet::new();
    for worker in 0..SATURATED_CALLS {
        let sender = sender.clone();
        workers.spawn(async move {
            let mut took = Vec::new();
            for index in (worker..SATURATED).step_by(SATURATED_CALLS) {
                let from = index % senders;
                took.push(sender.send(from, peer(from, senders), format!("saturated {index}"), "").await);
            }
            took
        });
    }
    let mut took: Vec<_> = workers.join_all().await.into_iter().flatten().collect();
    took.sort();
    took
}

#[tokio::main]
async fn main() {
    // Cargo passes `--bench`; under `cargo test --benches` it does not, and there is nothing to test here.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let count: usize = std::env::var("FLEET_NUMBERS").map_or(100, |text| text.parse().unwrap());
    let sandbox_binary = std::env::var("FLEET_SANDBOX").expect("FLEET_SANDBOX: a binary built with --features sandbox");
    let directory: PathBuf = std::env::temp_dir().join(format!("switchboard-fleet-{}", std::process::id()));
    let random = Arc::new(Random::from_system().unwrap());

    let (sandbox, sandbox_address) = sandbox(&sandbox_binary, "127.0.0.1:0", None);
    let begun = Instant::now();
    let key = provision(&directory, sandbox_address, count, &random).await;
    println!("{count} numbers provisioned in {:.1} s", begun.elapsed().as_secs_f64());

    let begun = Instant::now();
    let Daemon { process: daemon, api, admin, ready } =
        serve(env!("CARGO_BIN_EXE_switchboard"), &directory, sandbox_address);
    println!("API ready after {:.2} s", ready.as_secs_f64());
    let half = until_online(admin, count / 2, begun);
    let all = until_online(admin, count, begun);
    println!("half Online after {:.2} s, all after {:.2} s", half.as_secs_f64(), all.as_secs_f64());
    println!(
        "CPU until then: {:.2} s, {:.2} ms a number",
        daemon.cpu().as_secs_f64(),
        daemon.cpu().as_secs_f64() * 1000.0 / count as f64
    );
    std::thread::sleep(Duration::from_secs(5));
    let memory = daemon.anonymous_kib();
    println!(
        "anonymous memory idle: {:.1} MiB, {:.1} KiB a number",
        memory as f64 / 1024.0,
        memory as f64 / count as f64
    );
    let (cpu, idle) = (daemon.cpu(), Instant::now());
    std::thread::sleep(Duration::from_secs(20));
    let share = (daemon.cpu() - cpu).as_secs_f64() / idle.elapsed().as_secs_f64();
    println!("CPU idle: {:.1} % of a core", share * 100.0);

    let channel = Channel::from_shared(format!("http://{api}")).unwrap().connect().await.unwrap();
    let sender = Sender { channel, key };
    let senders = SENDERS.min(count);
    for from in 0..senders {
        sender.send(from, peer(from, senders), "warm".to_owned(), "").await;
    }
    let mut expected = senders as u64;
    until_sent(admin, expected).await;
    let cpu = daemon.cpu();
    let took = paced(&sender, senders).await;
    expected += RATE_PER_SECOND * RATE_SECONDS;
    until_sent(admin, expected).await;
    let per_message = (daemon.cpu() - cpu).as_secs_f64() * 1000.0 / took.len() as f64;
    println!(
        "paced {RATE_PER_SECOND}/s over {senders} numbers: accept p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms; {per_message:.2} ms CPU a message",
        percentile(&took, 0.5),
        percentile(&took, 0.99),
        percentile(&took, 1.0)
    );
    let (cpu, begun) = (daemon.cpu(), Instant::now());
    let took = saturated(&sender, senders).await;
    expected += SATURATED as u64;
    until_sent(admin, expected).await;
    let wall = begun.elapsed().as_secs_f64();
    let cpu = (daemon.cpu() - cpu).as_secs_f64();
    println!(
        "saturated, {SATURATED_CALLS} calls at once: {:.0} messages/s, {:.0} a CPU second ({:.2} ms CPU each, sent and received); accept p50 {:.1} ms, p99 {:.1} ms",
        SATURATED as f64 / wall,
        SATURATED as f64 / cpu,
        cpu * 1000.0 / SATURATED as f64,
        percentile(&took, 0.5),
        percentile(&took, 0.99)
    );
    let memory = daemon.anonymous_kib();
    println!("anonymous memory after traffic: {:.1} MiB", memory as f64 / 1024.0);
    println!("sandbox: {}", http(sandbox_address, "GET", "/admin/stats"));
    drop((daemon, sandbox));
    let _ = std::fs::remove_dir_all(&directory);
}
