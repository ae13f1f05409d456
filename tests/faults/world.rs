//! A tenant with linked, subscribed numbers, customers' phones around them, and what the daemon and the phones show.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::pair_number_response::Step;
use switchboard::demo::client::{Caller, OwnedNumber};
use switchboard::demo::phones::{Phones, call};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::process::{Daemon, Directory, Log, Plan, Sandbox};
use crate::sink::Sink;

/// Longest any condition may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Numbers that take longer than this to come online are looked at.
const GHOST_AFTER: Duration = Duration::from_secs(10);
/// Customers of each number.
pub const CUSTOMERS: usize = 2;
/// Numbers being linked at once.
const LINKING_AT_ONCE: usize = 8;

/// Everything but the daemon's present life.
pub struct World {
    pub plan: Plan,
    pub sink: Sink,
    pub phones: Phones,
    pub numbers: Vec<OwnedNumber>,
    pub tenant: Caller,
    pub log: Log,
    /// Numbers an operator had to start because a dead life of theirs had replaced them.
    pub replaced: AtomicU64,
    /// Phones that were made to lose their keys.
    pub forgetful: Mutex<HashSet<String>>,
    // Last, so that the daemon's files and its WhatsApp outlive it.
    _sandbox: Sandbox,
    _directory: Directory,
}

/// The phone number of our `index`th number.
pub fn own_phone(index: usize) -> String {
    format!("1557{index:07}")
}

/// The `which`th customer of our `index`th number.
pub fn customer(index: usize, which: usize) -> String {
    format!("1558{index:05}{which:02}")
}

/// The number of ours that number `index` writes to.
pub fn neighbour(index: usize, numbers: usize) -> Option<usize> {
    (numbers > 1).then(|| (index + 1) % numbers)
}

impl World {
    /// Starts everything and links the numbers by QR code. `between` may put something between the daemon and its
    /// WhatsApp: it gets the sandbox's address and gives the one to connect to.
    pub async fn start(
        numbers: usize,
        seed: u64,
        settings: &[(&'static str, &str)],
        between: impl AsyncFnOnce(std::net::SocketAddr) -> std::net::SocketAddr,
    ) -> (Arc<Self>, Daemon) {
        let directory = Directory::new();
        let sandbox = Sandbox::start(seed);
        let whatsapp = between(sandbox.address).await;
        let plan = Plan::new(directory.0.join("data"), whatsapp, settings);
        let log = Log::default();
        let daemon = plan.start(None, &log);
        until("the API answers", async || daemon.ready_after()).await;
        let key = std::fs::read_to_string(plan.data.join("keys/operator.key")).unwrap();
        let operator = Caller::connect(plan.api, key.trim()).await.unwrap();
        let (tenant, _) = operator.create_tenant("faults").await.unwrap();
        let phones = Phones { sandbox: sandbox.address };
        let sink = Sink::start().await;
        let mut world = Self {
            plan,
            sink,
            phones,
            numbers: Vec::new(),
            tenant,
            log,
            replaced: AtomicU64::new(0),
            forgetful: Mutex::default(),
            _sandbox: sandbox,
            _directory: directory,
        };
        for index in 0..numbers {
            world.numbers.push(world.create(&own_phone(index)).await);
        }
        let mut linking = JoinSet::new();
        for number in world.numbers.clone() {
            if linking.len() >= LINKING_AT_ONCE {
                linking.join_next().await.unwrap().unwrap();
            }
            let (tenant, phones) = (world.tenant.clone(), world.phones);
            linking.spawn(async move {
                let linked = tokio::time::timeout(PATIENCE, link(&tenant, phones, &number)).await;
                linked.expect("linking took too long").unwrap();
            });
        }
        linking.join_all().await;
        (Arc::new(world), daemon)
    }

    /// A number with one webhook for everything, not linked yet.
    pub async fn create(&self, phone: &str) -> OwnedNumber {
        let number = self.tenant.create_number(phone, phone).await.unwrap();
        let request = proto::CreateWebhookRequest {
            url: self.sink.url(&number.id),
            events: vec!["*".to_owned()],
            ..proto::CreateWebhookRequest::default()
        };
        number.caller.webhooks().create_webhook(request).await.unwrap();
        number
    }

    /// Numbers the daemon counts as online.
    pub async fn online(&self) -> usize {
        let metrics = call(self.plan.admin, "GET", "/metrics", &[], "").await.unwrap_or_default();
        metrics.lines().filter(|line| line.starts_with("switchboard_number_up{") && line.ends_with(" 1")).count()
    }

    /// Waits until every number is online; `None` when `gave_up` said so first.
    pub async fn all_online(&self, mut gave_up: impl FnMut() -> bool) -> Option<()> {
        let begun = Instant::now();
        let mut looked_at = Duration::ZERO;
        while self.online().await < self.numbers.len() {
            if gave_up() {
                return None;
            }
            if begun.elapsed() > looked_at + GHOST_AFTER {
                looked_at = begun.elapsed();
                self.start_replaced().await;
            }
            if begun.elapsed() > PATIENCE {
                panic!("not all numbers come online:\n{}log:\n{}", self.offline().await, self.last_words());
            }
            sleep(Duration::from_millis(10)).await;
        }
        Some(())
    }

    /// A login that a killed life left in its socket can arrive after its successor's, which WhatsApp then ends as
    /// replaced; by design only an operator's word opens it again. Counted, so that it is seen.
    async fn start_replaced(&self) {
        for number in &self.numbers {
            let request = proto::GetNumberRequest { number: number.id.clone() };
            let Ok(shown) = self.tenant.numbers().get_number(request).await else { continue };
            if shown.into_inner().state() == proto::NumberState::Replaced {
                let request = proto::StartNumberRequest { number: number.id.clone() };
                let started = self.tenant.numbers().start_number(request).await.is_ok();
                self.replaced.fetch_add(u64::from(started), Ordering::Relaxed);
            }
        }
    }

    /// The numbers that are not online, and why.
    async fn offline(&self) -> String {
        let mut lines = format!("sandbox: {}\n", self.phones.stats().await.unwrap());
        for number in &self.numbers {
            let request = proto::GetNumberRequest { number: number.id.clone() };
            match self.tenant.numbers().get_number(request).await.map(tonic::Response::into_inner) {
                Ok(shown) if shown.state() == proto::NumberState::Online => {}
                Ok(shown) => lines.push_str(&format!("{shown:?}\n")),
                Err(status) => lines.push_str(&format!("{}: {status}\n", number.id)),
            }
        }
        lines
    }

    /// Everything a number's history holds, oldest first.
    pub async fn history(&self, number: &OwnedNumber) -> Vec<proto::Message> {
        let mut messages = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = proto::ListMessagesRequest { page_size: 500, page_token, ..Default::default() };
            let page = number.caller.messages().list_messages(request).await.unwrap().into_inner();
            messages.extend(page.messages);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                messages.reverse();
                return messages;
            }
        }
    }

    /// What is kept of the daemon's log.
    pub fn last_words(&self) -> String {
        self.log.lock().unwrap().iter().map(|line| format!("    {line}\n")).collect()
    }
}

/// Links a number by QR code, as a person would. An error is the daemon gone in the middle of it.
pub async fn link(tenant: &Caller, phones: Phones, number: &OwnedNumber) -> Result<(), tonic::Status> {
    let request = proto::PairNumberRequest { number: number.id.clone(), ..Default::default() };
    let mut steps = tenant.numbers().pair_number(request).await?.into_inner();
    let mut scanned = false;
    while let Some(step) = steps.message().await? {
        match step.step.unwrap() {
            Step::QrCode(shown) if !scanned => {
                phones
                    .scan(&number.phone, &shown.code)
                    .await
                    .map_err(|error| tonic::Status::aborted(error.to_string()))?;
                scanned = true;
            }
            Step::QrCode(_) | Step::PairingCode(_) | Step::Paired(_) => {}
            Step::PasskeyRequest(_) | Step::PasskeyConfirmation(_) => panic!("a passkey is asked for"),
            Step::Online(_) => return Ok(()),
            Step::Failed(failed) => return Err(tonic::Status::failed_precondition(failed.reason)),
        }
    }
    Err(tonic::Status::aborted("the stream ended without an outcome"))
}

/// Tries until there is a value, for as long as anything may take.
pub async fn until<T>(what: &str, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "waited too long until {what}");
        sleep(Duration::from_millis(10)).await;
    }
}
