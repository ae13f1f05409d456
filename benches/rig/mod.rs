//! What the benches share: processes, provisioned data, callers.
#![allow(dead_code, reason = "no bench needs all of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::message_service_client::MessageServiceClient;
use switchboard::domain::access::{self, KeyKind};
use switchboard::domain::change::Change;
use switchboard::domain::id::{NumberId, TenantId};
use switchboard::domain::lifecycle::{Input, Life};
use switchboard::domain::number::{Commit, Ticket};
use switchboard::domain::orders::SendingOrders;
use switchboard::domain::phone::Phone;
use switchboard::domain::retention::Retention;
use switchboard::domain::time::Timestamp;
use switchboard::session::link;
use switchboard::store::layout::{Store, StoreSettings, VOLUMES};
use switchboard::store::meta::{KeyRecord, KeySubject, NumberKind, NumberRecord, TenantRecord};
use switchboard::telemetry::rng::Random;
use tonic::transport::Channel;
use tonic::{Request, Status};

pub const TENANT: TenantId = TenantId(1);
pub const PATIENCE: Duration = Duration::from_secs(600);

/// A child that does not outlive the bench.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn field(&self, file: &str, name: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/{file}", self.0.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Anonymous memory in KiB.
    pub fn anonymous_kib(&self) -> u64 {
        self.field("status", "RssAnon:")
    }

    pub fn cpu(&self) -> Duration {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let after_name = text.rsplit(')').next().unwrap();
        let fields: Vec<u64> = after_name.split_whitespace().skip(11).take(2).map(|f| f.parse().unwrap()).collect();
        // USER_HZ is 100 on every Linux there is.
        Duration::from_millis((fields[0] + fields[1]) * 10)
    }

    /// Sends SIGTERM and waits. Gives the exit status and how long it took.
    pub fn terminate(&mut self) -> (Option<i32>, Duration) {
        let begun = Instant::now();
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
        let status = self.0.wait().unwrap();
        (status.code(), begun.elapsed())
    }
}

/// A sandbox of its own process.
pub fn sandbox(binary: &str, address: &str, data: Option<&Path>) -> (Process, SocketAddr) {
    let mut command = Command::new(binary);
    command.args(["sandbox", "--listen", address]);
    if let Some(data) = data {
        command.arg("--data").arg(data);
    }
    let (process, line) = start(command, "sandbox ws://");
    let address = line.split("ws://").nth(1).unwrap().split('/').next().unwrap();
    (process, address.parse().unwrap())
}

/// A running daemon: its process, its API, its admin address, and how long it took to be ready.
pub struct Daemon {
    pub process: Process,
    pub api: SocketAddr,
    pub admin: SocketAddr,
    pub ready: Duration,
}

/// Starts a daemon on provisioned data. `FLEET_GATE` sets its connects per second.
pub fn serve(binary: &str, directory: &Path, sandbox: SocketAddr) -> Daemon {
    let mut command = Command::new(binary);
    command.arg("serve");
    for (name, value) in [
        ("DATA__DIR", directory.display().to_string()),
        ("API__LISTEN", "127.0.0.1:0".to_owned()),
        ("ADMIN__LISTEN", "127.0.0.1:0".to_owned()),
        ("WHATSAPP__URL", format!("ws://{sandbox}/ws/chat")),
        ("WHATSAPP__VERSION", "2.3000.1".to_owned()),
        ("LIMITS__MESSAGES_PER_SECOND", "1000".to_owned()),
        ("LIMITS__BURST", "1000".to_owned()),
        ("LIMITS__CHAT_SECONDS_PER_MESSAGE", "0".to_owned()),
        ("LIMITS__NEW_RECIPIENTS_PER_DAY", "unlimited".to_owned()),
        ("GATE__CONNECTS_PER_SECOND", gate().to_string()),
        ("LOG__LEVEL", "warn,switchboard::daemon=info".to_owned()),
    ] {
        command.env(format!("SWITCHBOARD__{name}"), value);
    }
    let begun = Instant::now();
    let (process, line) = start(command, "ready api=");
    let ready = begun.elapsed();
    let address = |name: &str| -> SocketAddr {
        line.split(&format!("{name}=")).nth(1).unwrap().split(' ').next().unwrap().trim().parse().unwrap()
    };
    Daemon { process, api: address("api"), admin: address("admin"), ready }
}

/// Connects per second the daemon may begin.
pub fn gate() -> usize {
    std::env::var("FLEET_GATE").map_or(200, |text| text.parse().unwrap())
}

pub fn http(to: SocketAddr, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(to).unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    // In one write: the second of two would wait for the first one's acknowledgement.
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

pub fn phone(index: usize) -> String {
    format!("1556{index:07}")
}

pub fn number_id(index: usize) -> NumberId {
    // Spread over the shards as random ids would be.
    NumberId((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// Writes the data directory a daemon with `count` linked numbers would have left behind.
pub async fn provision(directory: &Path, sandbox: SocketAddr, count: usize, random: &Arc<Random>) -> String {
    let store = Arc::new(Store::open(&StoreSettings::at(directory, random.clone())).unwrap());
    let meta = store.meta();
    let tenant = TenantRecord { id: TENANT, name: "bench".to_owned(), created_at: Timestamp(1) };
    meta.put_tenant(tenant).await.unwrap();
    let key = access::mint(KeyKind::Tenant, &random.bytes());
    meta.put_key(KeyRecord {
        id: key.id.clone(),
        subject: KeySubject::Tenant(TENANT),
        secret_hash: key.secret_hash,
        last4: key.last4.clone(),
        created_at: Timestamp(1),
        expires_at: None,
    })
    .await
    .unwrap();
    for index in 0..count {
        let device = http(sandbox, "POST", &format!("/admin/provision?phone={}", phone(index)));
        let record = NumberRecord {
            id: number_id(index),
            tenant: TENANT,
            name: format!("number {index}"),
            phone: Phone::parse(&phone(index)).unwrap(),
            kind: NumberKind::Linked,
            volume: (index % usize::from(VOLUMES)) as u8,
            created_at: Timestamp(1),
            retention: Retention::KeepAll,
            proxy: None,
            orders: SendingOrders::default(),
        };
        let (id, volume) = (record.id, record.volume);
        meta.create_number(record, Vec::new()).await.unwrap();
        let number = store.claim(id, volume).await.unwrap();
        link::provision(&number, &device).await.unwrap();
        let mut life = Life::new(Timestamp(1));
        life.step(Input::Pair, Timestamp(1));
        life.step(Input::Paired, Timestamp(1));
        let changes = vec![Change::Life(life)];
        let commit = Commit { ticket: Ticket(0), changes, unless_known: None, durable: false };
        number.commit(number.unit_of(commit)).await.unwrap();
    }
    store.close();
    key.text
}

pub fn start(mut command: Command, ready: &str) -> (Process, String) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let (lines, found) = std::sync::mpsc::channel();
    let outputs: [Box<dyn Read + Send>; 2] =
        [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
    for output in outputs {
        let lines = lines.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = lines.send(line);
            }
        });
    }
    let process = Process(child);
    let line = loop {
        let line = found.recv_timeout(PATIENCE).expect("the process said nothing");
        if line.contains(ready) {
            break line;
        }
        eprintln!("{line}");
    };
    std::thread::spawn(move || found.into_iter().for_each(drop));
    (process, line)
}

pub fn online(admin: SocketAddr) -> usize {
    let metrics = http(admin, "GET", "/metrics");
    metrics.lines().filter(|line| line.starts_with("switchboard_number_up{") && line.ends_with(" 1")).count()
}

pub fn until_online(admin: SocketAddr, count: usize, since: Instant) -> Duration {
    // A scrape renders twenty lines a number: looking all the time would be a load of its own.
    let pause = Duration::from_micros(20_000 + 50 * count as u64);
    loop {
        assert!(since.elapsed() < PATIENCE, "{} of {count} online", online(admin));
        if online(admin) >= count {
            return since.elapsed();
        }
        std::thread::sleep(pause);
    }
}

pub fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let index = ((sorted.len() as f64 * share) as usize).min(sorted.len() - 1);
    sorted[index].as_secs_f64() * 1000.0
}

#[derive(Clone)]
pub struct Sender {
    pub channel: Channel,
    pub key: String,
}

impl Sender {
    /// Sends, under a request id unless it is empty; the time until the answer.
    pub async fn send(&self, from: usize, to: usize, text: String, request_id: &str) -> Duration {
        self.try_send(from, to, text, request_id).await.unwrap()
    }

    pub async fn try_send(&self, from: usize, to: usize, text: String, request_id: &str) -> Result<Duration, Status> {
        let mut request = Request::new(proto::SendMessageRequest {
            number: number_id(from).to_string(),
            to: format!("+{}", phone(to)),
            content: Some(proto::send_message_request::Content::Text(text)),
            request_id: request_id.to_owned(),
            ..Default::default()
        });
        request.metadata_mut().insert("x-api-key", self.key.parse().unwrap());
        let begun = Instant::now();
        MessageServiceClient::new(self.channel.clone()).send_message(request).await?;
        Ok(begun.elapsed())
    }
}
