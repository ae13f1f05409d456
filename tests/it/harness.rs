//! One world per test: sandbox in this process, daemon in its own, all on ephemeral ports and temporary data.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::pair_number_response::Step;
use switchboard::demo::client::{Caller, OwnedNumber};
use switchboard::demo::phones::{Phones, call};
use switchboard::demo::sink::{Received, Sink};
use tokio::task::JoinSet;

use switchboard::sandbox::server::{RunningSandbox, Sandbox, SandboxConfig};

/// Longest any condition may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

static WORLDS: AtomicU32 = AtomicU32::new(0);

/// A directory that goes away.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        let count = WORLDS.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("switchboard-it-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The daemon as a child process.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) api: SocketAddr,
    pub(crate) admin: SocketAddr,
}

impl Daemon {
    /// Starts it, to die at a failpoint if one is given.
    pub(crate) fn start(
        directory: &Directory,
        ws_url: &str,
        settings: &[(&str, &str)],
        failpoint: Option<&str>,
    ) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_switchboard"));
        command.arg("serve").stderr(Stdio::piped()).stdin(Stdio::null());
        let defaults = [
            ("DATA__DIR", directory.0.join("data").display().to_string()),
            ("API__LISTEN", "127.0.0.1:0".to_owned()),
            ("ADMIN__LISTEN", "127.0.0.1:0".to_owned()),
            ("WHATSAPP__URL", ws_url.to_owned()),
            ("WHATSAPP__VERSION", "2.3000.1".to_owned()),
            ("WEBHOOK__ALLOW_PRIVATE", "true".to_owned()),
            ("LIMITS__MESSAGES_PER_SECOND", "1000".to_owned()),
            ("LIMITS__BURST", "1000".to_owned()),
            ("LIMITS__CHAT_SECONDS_PER_MESSAGE", "0".to_owned()),
            ("LIMITS__NEW_RECIPIENTS_PER_DAY", "unlimited".to_owned()),
        ];
        for (key, value) in defaults {
            command.env(format!("SWITCHBOARD__{key}"), value);
        }
        for (key, value) in settings {
            command.env(format!("SWITCHBOARD__{key}"), value);
        }
        if let Some(failpoint) = failpoint {
            command.env("SWITCHBOARD_FAILPOINT", failpoint);
        }
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut seen = Vec::new();
        let ready = loop {
            let Some(Ok(line)) = lines.next() else { panic!("the daemon ended: {seen:#?}") };
            if line.contains("ready api=") {
                break line;
            }
            seen.push(line);
        };
        // Somebody has to read on, or the pipe fills up. Shown by the runner when the test fails.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| println!("daemon: {line}")));
        let address = |name: &str| {
            let text = ready.split(&format!("{name}=")).nth(1).unwrap().split(' ').next().unwrap();
            text.trim().parse().unwrap()
        };
        Self { child, api: address("api"), admin: address("admin") }
    }

    /// Largest file the daemon may write from now on; `None` lifts the limit.
    pub(crate) fn limit_files(&self, bytes: Option<u64>) {
        use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
        let most = getrlimit(Resource::Fsize).maximum;
        let pid = Pid::from_raw(self.child.id().cast_signed());
        prlimit(pid, Resource::Fsize, Rlimit { current: bytes.or(most), maximum: most }).unwrap();
    }

    /// SIGKILL: no goodbye.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Whether it has died by itself.
    pub(crate) fn is_dead(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// SIGTERM, and the exit status.
    pub(crate) fn terminate(&mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) struct World {
    pub(crate) sandbox: RunningSandbox,
    pub(crate) daemon: Option<Daemon>,
    pub(crate) sink: Sink,
    pub(crate) phones: Phones,
    pub(crate) operator: Caller,
    settings: Vec<(&'static str, &'static str)>,
    directory: Directory,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(&[]).await
    }

    pub(crate) async fn with(settings: &[(&'static str, &'static str)]) -> Self {
        let directory = Directory::new();
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let sandbox = Sandbox::start(SandboxConfig { listen, data: None, seed: 7 }).await.unwrap();
        let daemon = Daemon::start(&directory, &sandbox.ws_url(), settings, None);
        let key = std::fs::read_to_string(directory.0.join("data/keys/operator.key")).unwrap();
        let operator = Caller::connect(daemon.api, key.trim()).await.unwrap();
        let phones = Phones { sandbox: sandbox.addr() };
        let sink = Sink::start().await.unwrap();
        let settings = settings.to_vec();
        Self { sandbox, daemon: Some(daemon), sink, phones, operator, settings, directory }
    }

    /// The daemon's data directory.
    pub(crate) fn data(&self) -> PathBuf {
        self.directory.0.join("data")
    }

    pub(crate) fn api(&self) -> SocketAddr {
        self.daemon.as_ref().unwrap().api
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        self.daemon.as_ref().unwrap().admin
    }

    /// Sets more for the daemons that are started from now on.
    pub(crate) fn change_settings(&mut self, settings: &[(&'static str, &'static str)]) {
        self.settings.extend(settings);
    }

    /// The operator, after a restart.
    pub(crate) async fn operator_again(&self) -> Caller {
        let key = std::fs::read_to_string(self.data().join("keys/operator.key")).unwrap();
        self.caller(key.trim()).await
    }

    /// Kills the daemon and starts it again on the same data. Callers made before must connect again.
    pub(crate) fn kill_and_restart(&mut self) {
        self.daemon.take().unwrap().kill();
        self.start_again();
    }

    pub(crate) fn start_again(&mut self) {
        self.start_to_die_at(None);
    }

    /// Starts it on the same data, to die at a failpoint.
    pub(crate) fn start_to_die_at(&mut self, failpoint: Option<&str>) {
        self.daemon = Some(Daemon::start(&self.directory, &self.sandbox.ws_url(), &self.settings, failpoint));
    }

    pub(crate) async fn caller(&self, key: &str) -> Caller {
        Caller::connect(self.api(), key).await.unwrap()
    }

    /// A tenant with linked, subscribed numbers.
    pub(crate) async fn tenant(&self, name: &str, phones: &[&str]) -> (Caller, String, Vec<OwnedNumber>) {
        let (tenant, key) = self.operator.create_tenant(name).await.unwrap();
        let mut numbers = Vec::new();
        for phone in phones {
            let number = tenant.create_number(phone, phone).await.unwrap();
            self.subscribe(&number).await;
            self.link(&tenant, &number).await;
            numbers.push(number);
        }
        (tenant, key, numbers)
    }

    pub(crate) async fn subscribe(&self, number: &OwnedNumber) {
        let request = proto::CreateWebhookRequest {
            url: self.sink.url(&number.id),
            events: vec!["*".to_owned()],
            ..proto::CreateWebhookRequest::default()
        };
        let made = number.caller.webhooks().create_webhook(request).await.unwrap().into_inner();
        self.sink.expect(&number.id, &made.secret);
    }

    pub(crate) async fn link(&self, tenant: &Caller, number: &OwnedNumber) {
        let request = proto::PairNumberRequest { number: number.id.clone(), ..Default::default() };
        let mut steps = tenant.numbers().pair_number(request).await.unwrap().into_inner();
        let mut scanned = false;
        let linked = async {
            while let Some(step) = steps.message().await.unwrap() {
                match step.step.unwrap() {
                    Step::QrCode(shown) if !scanned => {
                        self.phones.scan(&number.phone, &shown.code).await.unwrap();
                        scanned = true;
                    }
                    Step::QrCode(_) | Step::PairingCode(_) | Step::Paired(_) => {}
                    Step::PasskeyRequest(_) | Step::PasskeyConfirmation(_) => panic!("a passkey is asked for"),
                    Step::Online(_) => return,
                    Step::Failed(failed) => panic!("linking failed: {}", failed.reason),
                }
            }
            panic!("the stream ended without an outcome");
        };
        tokio::time::timeout(PATIENCE, linked).await.expect("linking took too long");
    }

    pub(crate) async fn number(&self, tenant: &Caller, id: &str) -> proto::Number {
        let request = proto::GetNumberRequest { number: id.to_owned() };
        tenant.numbers().get_number(request).await.unwrap().into_inner()
    }

    /// Waits until the number is in the state.
    pub(crate) async fn until_state(&self, tenant: &Caller, id: &str, state: proto::NumberState) -> proto::Number {
        until(&format!("{id} is {state:?}"), async || {
            let number = self.number(tenant, id).await;
            (number.state() == state).then_some(number)
        })
        .await
    }

    /// Online, or degraded: a crash in the moment after a Signal ratchet makes what comes next unreadable at first.
    pub(crate) async fn until_connected(&self, tenant: &Caller, id: &str) {
        until(&format!("{id} is connected"), async || {
            let state = self.number(tenant, id).await.state();
            matches!(state, proto::NumberState::Online | proto::NumberState::Degraded).then_some(())
        })
        .await;
    }

    pub(crate) async fn webhook(
        &self,
        number: &OwnedNumber,
        event: &str,
        fits: impl Fn(&Received) -> bool,
    ) -> Received {
        let of_number =
            |received: &Received| received.event() == event && received.subscription == number.id && fits(received);
        let found = self.sink.wait_for(PATIENCE, of_number).await;
        found.unwrap_or_else(|| panic!("no {event} for {}: {:#?}", number.id, self.sink.received()))
    }

    /// How often a phone shows a text.
    pub(crate) async fn copies(&self, phone: &str, text: &str) -> usize {
        let shown = self.phones.shown(phone).await.unwrap();
        shown.iter().filter(|message| message["text"] == text).count()
    }

    pub(crate) async fn metrics(&self) -> String {
        call(self.admin(), "GET", "/metrics", &[], "").await.unwrap()
    }

    /// Orders the sandbox to misbehave.
    pub(crate) async fn fault(&self, order: &serde_json::Value) {
        self.phones.post("/admin/fault", &order.to_string()).await.unwrap();
    }

    pub(crate) async fn put_clock_forward(&self, seconds: u64) {
        put_forward(self.admin(), seconds).await;
    }

    /// Until it is dropped the daemon's clock makes twenty seconds of one: enough for pauses to pass, and too little
    /// for an answer on its way to be overdue.
    pub(crate) fn in_haste(&self) -> JoinSet<()> {
        let (admin, mut haste) = (self.admin(), JoinSet::new());
        haste.spawn(async move {
            let mut seconds = tokio::time::interval(Duration::from_secs(1));
            loop {
                seconds.tick().await;
                put_forward(admin, 19).await;
            }
        });
        haste
    }

    /// The value of a per-number series, or with an empty number of one that has none.
    pub(crate) async fn metric(&self, family: &str, number: &str) -> f64 {
        let text = self.metrics().await;
        let begins = if number.is_empty() { format!("{family} ") } else { format!("{family}{{") };
        let line = text.lines().find(|line| line.starts_with(&begins) && line.contains(number));
        line.and_then(|line| line.rsplit(' ').next()).and_then(|value| value.parse().ok()).unwrap_or(f64::NAN)
    }
}

pub(crate) async fn put_forward(admin: SocketAddr, seconds: u64) {
    call(admin, "POST", &format!("/debug/clock?seconds={seconds}"), &[], "").await.unwrap();
}

/// Tries until there is a value, for as long as anything may take.
pub(crate) async fn until<T>(what: &str, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "waited too long until {what}");
        // A poll, not a delay: the condition ends the wait.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}
