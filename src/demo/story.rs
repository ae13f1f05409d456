//! The story the demo tells. Every step is verified before the next one begins, and its time is printed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tonic::Status;

use super::client::{Caller, OwnedNumber};
use super::phones::{CallError, Phones};
use super::sink::Sink;
use crate::api::grpc::proto;
use crate::api::grpc::proto::pair_number_response::Step;
use crate::config::sections::Config;
use crate::daemon::{Daemon, StartError};
use crate::sandbox::server::{RunningSandbox, Sandbox, SandboxConfig};

/// Nothing in the demo takes longer on a working machine.
const PATIENCE: Duration = Duration::from_secs(30);
const SHOP: &str = "15550100001";
const SUPPORT: &str = "15550100002";
const CUSTOMER: &str = "15550100099";

/// A step could not be verified.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The daemon did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The sandbox did not start, or a file is missing.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The daemon refused.
    #[error("the daemon answered {:?}: {}", .0.code(), .0.message())]
    Api(#[from] Status),
    /// The sandbox refused.
    #[error("the sandbox {0}")]
    Sandbox(#[from] CallError),
    /// Something did not happen.
    #[error("not verified: {0}")]
    NotVerified(String),
}

fn unless(holds: bool, claim: &str) -> Result<(), DemoError> {
    if holds { Ok(()) } else { Err(DemoError::NotVerified(claim.to_owned())) }
}

/// The daemon and the sandbox, on fresh temporary data.
struct Stage {
    directory: PathBuf,
    sandbox: RunningSandbox,
    daemon: Daemon,
    sink: Sink,
    operator_key: String,
}

/// The usual address if it is free, otherwise any.
fn address(port: u16) -> SocketAddr {
    let usual = SocketAddr::from(([127, 0, 0, 1], port));
    match std::net::TcpListener::bind(usual) {
        Ok(_) => usual,
        Err(_) => SocketAddr::from(([127, 0, 0, 1], 0)),
    }
}

impl Stage {
    async fn set() -> Result<Self, DemoError> {
        let directory = std::env::temp_dir().join(format!("switchboard-demo-{}", std::process::id()));
        let sandbox = SandboxConfig { listen: vec![address(7480)], data: None, seed: 1 };
        let sandbox = Sandbox::start(sandbox).await?;
        let settings = [
            ("DATA__DIR", directory.display().to_string()),
            ("API__LISTEN", address(7400).to_string()),
            ("ADMIN__LISTEN", address(7401).to_string()),
            ("WHATSAPP__URL", sandbox.ws_url()),
            ("WHATSAPP__VERSION", "2.3000.1".to_owned()),
            ("WEBHOOK__ALLOW_PRIVATE", "true".to_owned()),
        ];
        let settings = settings.map(|(key, value)| (format!("SWITCHBOARD__{key}"), value));
        let config = Config::load(None, settings).map_err(|mistakes| DemoError::NotVerified(mistakes.to_string()))?;
        let daemon = Daemon::start(&config).await?;
        let operator_key = std::fs::read_to_string(directory.join("keys").join("operator.key"))?.trim().to_owned();
        Ok(Self { directory, sandbox, daemon, sink: Sink::start().await?, operator_key })
    }

    fn phones(&self) -> Phones {
        Phones { sandbox: self.sandbox.addr() }
    }

    async fn clear(self) {
        self.daemon.drain(tokio::time::sleep(PATIENCE)).await;
        // The phones are not needed again; neither is what they knew.
        let _ = self.sandbox.shutdown().await;
        remove(&self.directory);
    }
}

fn remove(directory: &Path) {
    let _ = std::fs::remove_dir_all(directory);
}

/// Prints one line per verified step.
struct Narrator<'a> {
    say: &'a dyn Fn(&str),
    begun: Instant,
    step: Instant,
}

impl Narrator<'_> {
    fn done(&mut self, what: &str) {
        let took = self.step.elapsed();
        (self.say)(&format!("  {:>8.1} ms  {what}", took.as_secs_f64() * 1000.0));
        self.step = Instant::now();
    }
}

/// Tells the story; then, unless `leave`, keeps everything running until `stopped`.
///
/// # Errors
/// The first step that could not be verified.
pub async fn tell(leave: bool, say: impl Fn(&str), stopped: impl Future<Output = ()>) -> Result<(), DemoError> {
    let mut narrator = Narrator { say: &say, begun: Instant::now(), step: Instant::now() };
    say("Switchboard demo: a loopback WhatsApp, the daemon and a customer's platform, all in this process.");
    let stage = Stage::set().await?;
    narrator.done("sandbox, daemon and webhook receiver are up, on fresh data");
    let outcome = scenes(&stage, &mut narrator).await;
    match &outcome {
        Ok((shop, tenant_key)) => {
            let total = narrator.begun.elapsed();
            say(&format!("Every step verified, {:.2} s in all.", total.as_secs_f64()));
            if !leave {
                invite(&stage, shop, tenant_key, &say);
                stopped.await;
            }
        }
        Err(error) => say(&format!("  FAILED  {error}")),
    }
    stage.clear().await;
    outcome.map(drop)
}

async fn scenes(stage: &Stage, narrator: &mut Narrator<'_>) -> Result<(OwnedNumber, String), DemoError> {
    let operator = Caller::connect(stage.daemon.public_address(), &stage.operator_key).await?;
    let (tenant, tenant_key) = operator.create_tenant("Demo Shop").await?;
    let shop = tenant.create_number("Shop", SHOP).await?;
    let support = tenant.create_number("Support", SUPPORT).await?;
    for number in [&shop, &support] {
        subscribe(stage, number).await?;
    }
    narrator.done("a tenant, two numbers and a webhook for each, by gRPC");
    for number in [&shop, &support] {
        link(stage, &tenant, number).await?;
        narrator.done(&format!("{} linked: its phone scanned the QR code, and it is online", number.id));
    }
    chat(stage, &shop, &support, narrator).await?;
    answer(stage, &shop, narrator).await?;
    isolation(stage, &shop, &support)?;
    narrator.done("neither number saw anything of the other");
    let stats = stage.phones().stats().await?;
    let reused = &stats["signal_keys_reused"];
    unless(reused.as_u64() == Some(0), "no Signal message key was used twice")?;
    narrator.done("no Signal message key was used twice");
    Ok((shop, tenant_key))
}

async fn subscribe(stage: &Stage, number: &OwnedNumber) -> Result<(), DemoError> {
    let request = proto::CreateWebhookRequest {
        url: stage.sink.url(&number.id),
        events: vec!["*".to_owned()],
        ..proto::CreateWebhookRequest::default()
    };
    let made = number.caller.webhooks().create_webhook(request).await?.into_inner();
    stage.sink.expect(&number.id, &made.secret);
    Ok(())
}

async fn link(stage: &Stage, tenant: &Caller, number: &OwnedNumber) -> Result<(), DemoError> {
    let request = proto::PairNumberRequest { number: number.id.clone(), ..Default::default() };
    let mut steps = tenant.numbers().pair_number(request).await?.into_inner();
    let phones = stage.phones();
    let mut scanned = false;
    loop {
        let step = tokio::time::timeout(PATIENCE, steps.message()).await;
        let step = step.map_err(|_| DemoError::NotVerified("linking took too long".to_owned()))??;
        match step.and_then(|step| step.step) {
            Some(Step::QrCode(shown)) if !scanned => {
                phones.scan(&number.phone, &shown.code).await?;
                scanned = true;
            }
            Some(Step::QrCode(_) | Step::PairingCode(_) | Step::Paired(_)) => {}
            Some(Step::PasskeyRequest(_) | Step::PasskeyConfirmation(_)) => {
                return Err(DemoError::NotVerified("the sandbox asks for a passkey".to_owned()));
            }
            Some(Step::Online(_)) => return Ok(()),
            Some(Step::Failed(failed)) => return Err(DemoError::NotVerified(format!("linking: {}", failed.reason))),
            None => return Err(DemoError::NotVerified("linking ended without an outcome".to_owned())),
        }
    }
}

/// One number writes to the other; the other one's person reads it.
async fn chat(
    stage: &Stage,
    shop: &OwnedNumber,
    support: &OwnedNumber,
    narrator: &mut Narrator<'_>,
) -> Result<(), DemoError> {
    let text = "Hello from the shop";
    let sent = shop.caller.send_text(&support.phone, text, "demo-1").await?;
    narrator.done("SendMessage answered: the message is on disk");
    let again = shop.caller.send_text(&support.phone, text, "demo-1").await?;
    unless(sent.id == again.id, "the same request id gives the same message")?;
    let told = |event: &'static str| {
        let id = sent.id.clone();
        let fits = move |received: &super::sink::Received| {
            received.event() == event && received.body["data"]["internalMessageId"] == id.as_str()
        };
        expect_webhook(stage, event, shop, fits)
    };
    told("message.sent").await?;
    told("message.delivered").await?;
    narrator.done("signed webhooks message.sent and message.delivered");
    let phones = stage.phones();
    let shown = phones.shown(&support.phone).await?;
    let copies = shown.iter().filter(|message| message["text"] == text).count();
    unless(copies == 1, "the recipient's phone shows it exactly once")?;
    phones.read(&support.phone, &shop.phone).await?;
    told("message.read").await?;
    narrator.done("the recipient's phone shows it once; it is read, and the webhook message.read says so");
    let request = proto::GetMessageRequest { id: sent.id.clone() };
    let message = shop.caller.messages().get_message(request).await?.into_inner();
    unless(message.status() == proto::MessageStatus::Read, "GetMessage says READ")?;
    let fits = |received: &super::sink::Received| received.body["data"]["content"] == text;
    expect_webhook(stage, "message.received", support, fits).await?;
    narrator.done("the other number received it: decrypted, in its history, signed webhook");
    Ok(())
}

/// A customer writes to the shop.
async fn answer(stage: &Stage, shop: &OwnedNumber, narrator: &mut Narrator<'_>) -> Result<(), DemoError> {
    let text = "Is the blue one in stock?";
    stage.phones().write(CUSTOMER, &shop.phone, text).await?;
    let fits = |received: &super::sink::Received| received.body["data"]["content"] == text;
    expect_webhook(stage, "message.received", shop, fits).await?;
    let request = proto::ListMessagesRequest { page_size: 10, ..proto::ListMessagesRequest::default() };
    let history = shop.caller.messages().list_messages(request).await?.into_inner().messages;
    unless(history.first().is_some_and(|message| message.text == text), "the history begins with the newest message")?;
    narrator.done("a customer's phone wrote: webhook message.received, and it is in the history");
    Ok(())
}

async fn expect_webhook(
    stage: &Stage,
    event: &str,
    number: &OwnedNumber,
    fits: impl Fn(&super::sink::Received) -> bool,
) -> Result<(), DemoError> {
    let of_number = |received: &super::sink::Received| {
        received.event() == event && received.subscription == number.id && fits(received)
    };
    let received = stage.sink.wait_for(PATIENCE, of_number).await;
    let received = received.ok_or_else(|| DemoError::NotVerified(format!("webhook {event} arrived")))?;
    unless(received.verified, &format!("the signature of webhook {event}"))?;
    unless(received.body["data"]["numberId"] == number.id.as_str(), "the webhook names its number")
}

fn isolation(stage: &Stage, shop: &OwnedNumber, support: &OwnedNumber) -> Result<(), DemoError> {
    for (number, other) in [(shop, support), (support, shop)] {
        for received in stage.sink.received().iter().filter(|received| received.subscription == number.id) {
            let named = received.body["data"]["numberId"].as_str();
            unless(named == Some(&number.id) && named != Some(&other.id), "webhooks stay with their number")?;
        }
    }
    Ok(())
}

/// Lines to paste.
fn invite(stage: &Stage, shop: &OwnedNumber, tenant_key: &str, say: &impl Fn(&str)) {
    let (api, admin, sandbox) = (stage.daemon.public_address(), stage.daemon.admin_address(), stage.sandbox.addr());
    say("\nIt stays up until Ctrl-C. To try it from another terminal:\n");
    say(&format!("curl -X POST http://{api}/v1/messages/send -H 'x-api-key: {}' \\", shop.key));
    say("  -H 'Content-Type: application/json' \\");
    say(&format!("  -d '{{\"text\":\"Hello!\",\"destinationNumber\":\"+{CUSTOMER}\"}}'"));
    say(&format!("curl http://{api}/v1/numbers -H 'x-api-key: {tenant_key}'"));
    say(&format!("curl 'http://{sandbox}/admin/mock-phone/messages?phone={CUSTOMER}'    # what the phone shows"));
    say(&format!("curl -X POST 'http://{sandbox}/admin/mock-phone/send?from={CUSTOMER}&to={SHOP}' -d 'Thanks!'"));
    say(&format!("curl http://{admin}/metrics"));
}
