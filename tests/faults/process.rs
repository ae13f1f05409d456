//! The daemon and the sandbox as child processes. The daemon's ports are chosen once, so that callers find it again.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Lines of the daemon's log kept for a report.
const LOG_LINES: usize = 200;

static DIRECTORIES: AtomicU32 = AtomicU32::new(0);

/// The program under test: `FAULTS_BINARY` (built with `--features sandbox`), or the one cargo built.
fn binary() -> PathBuf {
    std::env::var_os("FAULTS_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_switchboard").into(), PathBuf::from)
}

/// A directory that goes away.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new() -> Self {
        let count = DIRECTORIES.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("switchboard-faults-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if std::env::var_os("FAULTS_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.0);
        } else {
            eprintln!("kept: {}", self.0.display());
        }
    }
}

/// A loopback address nobody listens on.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The loopback WhatsApp, in a process of its own.
pub struct Sandbox {
    child: Child,
    pub address: SocketAddr,
}

impl Sandbox {
    pub fn start(seed: u64) -> Self {
        let address = free_address();
        let mut command = Command::new(binary());
        command.args(["sandbox", "--listen", &address.to_string(), "--seed", &seed.to_string()]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).stdin(Stdio::null()).spawn().unwrap();
        let line = BufReader::new(child.stdout.take().unwrap()).lines().next().unwrap().unwrap();
        assert!(line.starts_with("sandbox ws://"), "{line}");
        Self { child, address }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How the daemon is started, every time.
#[derive(Clone)]
pub struct Plan {
    pub data: PathBuf,
    pub api: SocketAddr,
    pub admin: SocketAddr,
    settings: Vec<(&'static str, String)>,
}

/// What the daemon's log said, over all its lives.
pub type Log = Arc<Mutex<VecDeque<String>>>;

impl Plan {
    /// A daemon that talks to the WhatsApp at `whatsapp`, with limits that never slow a test down.
    pub fn new(data: PathBuf, whatsapp: SocketAddr, settings: &[(&'static str, &str)]) -> Self {
        let (api, admin) = (free_address(), free_address());
        let mut all = vec![
            ("DATA__DIR", data.display().to_string()),
            ("API__LISTEN", api.to_string()),
            ("ADMIN__LISTEN", admin.to_string()),
            ("WHATSAPP__URL", format!("ws://{whatsapp}/ws/chat")),
            ("WHATSAPP__VERSION", "2.3000.1".to_owned()),
            ("WEBHOOK__ALLOW_PRIVATE", "true".to_owned()),
            ("LIMITS__MESSAGES_PER_SECOND", "1000".to_owned()),
            ("LIMITS__BURST", "1000".to_owned()),
            ("LIMITS__CHAT_SECONDS_PER_MESSAGE", "0".to_owned()),
            ("LIMITS__NEW_RECIPIENTS_PER_DAY", "unlimited".to_owned()),
            ("LOG__LEVEL", std::env::var("FAULTS_LOG").unwrap_or("warn,switchboard::daemon=info".to_owned())),
        ];
        all.extend(settings.iter().map(|(key, value)| (*key, (*value).to_owned())));
        Self { data, api, admin, settings: all }
    }

    /// Starts it, to die at `failpoint` if one is given.
    pub fn start(&self, failpoint: Option<&str>, log: &Log) -> Daemon {
        let mut command = Command::new(binary());
        command.arg("serve").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        for (key, value) in &self.settings {
            command.env(format!("SWITCHBOARD__{key}"), value);
        }
        match failpoint {
            Some(order) => command.env("SWITCHBOARD_FAILPOINT", order),
            None => command.env_remove("SWITCHBOARD_FAILPOINT"),
        };
        let begun = Instant::now();
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready = Arc::new(OnceLock::new());
        let (told, kept, aloud) = (ready.clone(), log.clone(), std::env::var_os("FAULTS_LOG").is_some());
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if line.contains("ready api=") {
                    let _ = told.set(Instant::now());
                }
                if aloud {
                    eprintln!("daemon: {line}");
                }
                let mut kept = kept.lock().unwrap();
                if kept.len() >= LOG_LINES {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
        });
        Daemon { child, begun, ready }
    }
}

/// One life of the daemon.
pub struct Daemon {
    child: Child,
    pub begun: Instant,
    ready: Arc<OnceLock<Instant>>,
}

impl Daemon {
    /// How long it took until its API answered.
    pub fn ready_after(&self) -> Option<Duration> {
        self.ready.get().map(|at| at.duration_since(self.begun))
    }

    /// SIGKILL: no goodbye.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
