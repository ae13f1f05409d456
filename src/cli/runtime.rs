//! Arguments to configuration to telemetry to one command.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::arguments::{Arguments, Command, ConfigCommand, KeysCommand, StorageCommand};
use super::exit;
use crate::config::sections::Config;
use crate::daemon::{self, Daemon};
use crate::telemetry::clock::SystemClock;
#[cfg(feature = "sandbox")]
use crate::telemetry::failpoint;
use crate::telemetry::{logging, panic_hook};

/// Runs what the command line says and gives the exit status.
#[must_use]
pub fn run() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve { config } => serve(config.as_deref()),
        Command::Config(ConfigCommand::Check { config }) => match load(config.as_deref()) {
            Ok(_) => ExitCode::SUCCESS,
            Err(code) => code,
        },
        Command::Config(ConfigCommand::Defaults) => {
            print(Config::documentation());
            ExitCode::SUCCESS
        }
        Command::Keys(command) => keys(command),
        Command::Storage(command) => storage(command),
        #[cfg(feature = "sandbox")]
        Command::Sandbox { listen, data, seed } => {
            sandbox(crate::sandbox::server::SandboxConfig { listen, data, seed })
        }
        #[cfg(feature = "sandbox")]
        Command::Failpoints => {
            failpoint::names().for_each(|name| print(&format!("{name}\n")));
            ExitCode::SUCCESS
        }
        #[cfg(feature = "sandbox")]
        Command::Demo { exit } => demo(exit),
    }
}

fn print(text: &str) {
    use std::io::Write;
    // A closed pipe is the reader's choice.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn complain(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "switchboard: {text}");
}

fn load(file: Option<&Path>) -> Result<Config, ExitCode> {
    // `vars` panics on any variable that is not UTF-8, also on those of others.
    let env = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())));
    Config::load(file, env).map_err(|mistakes| {
        complain(&mistakes.to_string());
        exit::code(exit::CONFIG)
    })
}

fn keys(command: KeysCommand) -> ExitCode {
    let (KeysCommand::RotateMaster { config } | KeysCommand::DropOldMasters { config }) = &command;
    let config = match load(config.as_deref()) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let done = match command {
        KeysCommand::RotateMaster { .. } => daemon::rotate_master_key(&config)
            .map(|id| format!("new master key {id}: restart the daemon, then drop the old ones\n")),
        KeysCommand::DropOldMasters { .. } => {
            daemon::drop_old_master_keys(&config).map(|count| format!("{count} older master keys removed\n"))
        }
    };
    match done {
        Ok(text) => {
            print(&text);
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&error.to_string());
            exit::code(exit::UNAVAILABLE)
        }
    }
}

fn storage(command: StorageCommand) -> ExitCode {
    let (StorageCommand::Check { config } | StorageCommand::Rebuild { config, .. }) = &command;
    let config = match load(config.as_deref()) {
        Ok(config) => config,
        Err(code) => return code,
    };
    block_on(async {
        let sound = match command {
            StorageCommand::Check { .. } => daemon::check_storage(&config).map(|volumes| {
                volumes.iter().for_each(|volume| print(&format!("{volume}\n")));
                volumes.iter().all(|volume| volume.is_sound())
            }),
            StorageCommand::Rebuild { volume, accept_loss, .. } => {
                let rebuilt = daemon::rebuild_volume(&config, &volume, accept_loss).await;
                rebuilt.map(|rebuilt| {
                    print(&format!("{volume}: {rebuilt}\n"));
                    true
                })
            }
        };
        match sound {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => exit::code(exit::UNAVAILABLE),
            Err(error) => {
                complain(&error.to_string());
                exit::code(exit::UNAVAILABLE)
            }
        }
    })
}

fn block_on(work: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => {
            complain(&error.to_string());
            exit::code(exit::SOFTWARE)
        }
    }
}

fn serve(file: Option<&Path>) -> ExitCode {
    let config = match load(file) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if let Err(error) = logging::init(config.log.format, &config.log.level) {
        complain(&error.to_string());
        return exit::code(exit::CONFIG);
    }
    #[cfg(feature = "sandbox")]
    if let Some(Err(error)) = std::env::var("SWITCHBOARD_FAILPOINT").ok().map(|order| failpoint::arm(&order)) {
        complain(&error.to_string());
        return exit::code(exit::CONFIG);
    }
    panic_hook::install(Arc::new(SystemClock::new()));
    block_on(async {
        let mut signals = match Signals::new() {
            Ok(signals) => signals,
            Err(error) => {
                complain(&error.to_string());
                return exit::code(exit::SOFTWARE);
            }
        };
        let mut daemon = match Daemon::start(&config).await {
            Ok(daemon) => daemon,
            Err(error) => {
                complain(&error.to_string());
                return exit::code(exit::UNAVAILABLE);
            }
        };
        let died = tokio::select! {
            () = signals.next() => false,
            () = daemon.supervisor_died() => true,
        };
        daemon.drain(signals.next()).await;
        if died { exit::code(exit::SOFTWARE) } else { ExitCode::SUCCESS }
    })
}

/// A write beyond the limit on the size of a file: it kills whoever does not listen. The write then fails as on a full
/// disk, which the store knows how to handle.
const SIGXFSZ: i32 = 25;

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    _too_large: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            _too_large: signal(SignalKind::from_raw(SIGXFSZ))?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(feature = "sandbox")]
fn sandbox(config: crate::sandbox::server::SandboxConfig) -> ExitCode {
    if let Err(error) = logging::init(logging::Format::Text, "info") {
        complain(&error.to_string());
    }
    block_on(async {
        let stopped = async {
            match Signals::new() {
                Ok(mut signals) => signals.next().await,
                Err(error) => complain(&error.to_string()),
            }
        };
        let started = |sandbox: &crate::sandbox::server::RunningSandbox| {
            print(&format!("sandbox {} {}\n", sandbox.ws_url(), sandbox.root_hex()));
        };
        match crate::sandbox::server::run(config, started, stopped).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&error.to_string());
                exit::code(exit::UNAVAILABLE)
            }
        }
    })
}

#[cfg(feature = "sandbox")]
fn demo(leave: bool) -> ExitCode {
    if let Err(error) = logging::init(logging::Format::Text, "warn") {
        complain(&error.to_string());
    }
    block_on(async {
        let stopped = async {
            match Signals::new() {
                Ok(mut signals) => signals.next().await,
                Err(error) => complain(&error.to_string()),
            }
        };
        match crate::demo::story::tell(leave, |line| print(&format!("{line}\n")), stopped).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&error.to_string());
                exit::code(exit::SOFTWARE)
            }
        }
    })
}
