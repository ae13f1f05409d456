//! Logs: one line per state change, as text for people or JSON for machines, on standard error. The WhatsApp library
//! is kept quiet by default, because its lines tell of every stanza of every number.

use std::io;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::redaction::Redacted;

/// Targets of the WhatsApp library. Losing and regaining connections is its daily bread and our own line already.
const QUIET: [&str; 9] = [
    "Client=error",
    "Client/Recv=error",
    "Client/Send=error",
    "Client/PDO=error",
    "whatsapp_rust=error",
    "wacore=error",
    "sled=warn",
    "h2=warn",
    "ractor=warn",
];

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The log cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not one.
    #[error("log level {level:?}: {reason}")]
    Filter {
        /// What was given.
        level: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Somebody else set it up already.
    #[error("the log is set up already")]
    AlreadySet,
}

/// Sets up the process's log. `level` is a level (`info`) or a list of filters (`info,switchboard::number=debug`);
/// what it names itself overrides the quiet defaults.
///
/// # Errors
/// When the filter cannot be read, or a log is set up already.
pub fn init(format: Format, level: &str) -> Result<(), LogError> {
    let filter = filter(level)?;
    let writer = || Redacted(io::stderr());
    let registry = tracing_subscriber::registry().with(filter);
    let installed = match format {
        Format::Text => registry.with(tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false)).try_init(),
        Format::Json => registry
            .with(
                tracing_subscriber::fmt::layer()
                    .json()
                    .flatten_event(true)
                    .with_current_span(true)
                    .with_span_list(false)
                    .with_writer(writer),
            )
            .try_init(),
    };
    installed.map_err(|_| LogError::AlreadySet)
}

/// Checks a filter without setting anything up.
///
/// # Errors
/// When it cannot be read.
pub fn check_level(level: &str) -> Result<(), LogError> {
    filter(level).map(drop)
}

fn filter(level: &str) -> Result<EnvFilter, LogError> {
    let wrong = |reason: String| LogError::Filter { level: level.to_owned(), reason };
    if level.trim().is_empty() {
        return Err(wrong("it is empty".to_owned()));
    }
    let all = format!("{},{level}", QUIET.join(","));
    EnvFilter::builder().parse(&all).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_lists_are_read_and_typos_are_not() {
        for level in ["info", "debug,switchboard::number=trace", "warn,Client/Recv=debug"] {
            assert!(check_level(level).is_ok(), "{level}");
        }
        for level in ["", "  ", "info,switchboard=loud"] {
            assert!(check_level(level).is_err(), "{level}");
        }
    }
}
