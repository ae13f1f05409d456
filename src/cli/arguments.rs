//! What can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Keeps whole fleets of WhatsApp numbers connected.
#[derive(Debug, Parser)]
#[command(name = "switchboard", version)]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the daemon.
    Serve {
        /// TOML file; every key can also be set as SWITCHBOARD__SECTION__KEY.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Check or show the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Change the master key that seals the data directory.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Look at the volumes of a daemon that is down, and rebuild them.
    #[command(subcommand)]
    Storage(StorageCommand),
    /// Run the loopback WhatsApp.
    #[cfg(feature = "sandbox")]
    Sandbox {
        /// Where to listen; may be repeated when one address has too few ports.
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7480")]
        listen: Vec<std::net::SocketAddr>,
        /// Where to keep keys and accounts; without it everything is forgotten at the end.
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
        /// For everything left to chance.
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
    /// List the places at which SWITCHBOARD_FAILPOINT=NAME[:NTH] kills the daemon, for tests of what a crash leaves.
    #[cfg(feature = "sandbox")]
    Failpoints,
    /// Watch the whole thing work: two numbers link, chat and deliver webhooks, all on this machine.
    #[cfg(feature = "sandbox")]
    Demo {
        /// End after the story, with status 0 only if every step was verified.
        #[arg(long)]
        exit: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Report every mistake and exit with status 78 if there is one.
    Check {
        /// TOML file.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Print every key with its default and its meaning.
    Defaults,
}

#[derive(Debug, Subcommand)]
pub(super) enum StorageCommand {
    /// Read every volume, also those that were set aside, and say what is in it: works on copies, changes nothing.
    /// Status 0 only if all of it can be read.
    Check {
        /// TOML file of the daemon.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Build a volume anew. One that works only gives back the disk it wastes. One that was set aside keeps what can be
    /// read of it, but not what must never go back in time: its numbers must be linked again. The damaged files stay.
    Rebuild {
        /// Its name, such as volume-00.
        volume: String,
        /// Do so although something of a damaged volume is lost. Without this it only says what would be.
        #[arg(long)]
        accept_loss: bool,
        /// TOML file of the daemon.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// Put a new master key in front of the old one; the daemon's next start wraps every data key under it.
    RotateMaster {
        /// TOML file of the daemon.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Remove the older master keys; refused while something is still wrapped under them. The daemon must be down.
    DropOldMasters {
        /// TOML file of the daemon.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}
