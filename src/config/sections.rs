//! The sections as types that cannot be wrong: what leaves this file was checked, and nobody checks it again.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use url::Url;

use super::error::{ConfigErrors, Mistake};
use super::layers::{DEFAULTS, Layers, Raw, Setting};
use crate::domain::limiter::{NEW_RECIPIENTS_MAX, NewRecipients};
use crate::domain::number::OnUnknown;
use crate::domain::version::ClientVersion;
use crate::domain::webhook::Schedule;
use crate::telemetry::backoff::{RECONNECT_FLOOR, Shape};
use crate::telemetry::logging;

/// The whole configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `[data]`.
    pub data: Data,
    /// `[store]`.
    pub store: Store,
    /// `[api]`.
    pub api: Api,
    /// `[admin]`.
    pub admin: Admin,
    /// `[log]`.
    pub log: Log,
    /// `[whatsapp]`.
    pub whatsapp: Whatsapp,
    /// `[gate]`.
    pub gate: Gate,
    /// `[reconnect]`.
    pub reconnect: Shape,
    /// `[limits]`.
    pub limits: Limits,
    /// `[retention]`.
    pub retention: Retention,
    /// `[sending]`.
    pub sending: Sending,
    /// `[webhook]`.
    pub webhook: Webhook,
    /// `[shutdown]`.
    pub shutdown: Shutdown,
}

/// Where everything is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data {
    /// The data directory.
    pub dir: PathBuf,
}

/// How everything is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// The master key file; `None` is `keys/master.key` in the data directory.
    pub master_key_file: Option<PathBuf>,
    /// Free bytes below which new sends are refused.
    pub low_water_bytes: u64,
}

/// The public listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Api {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Calls answered at once.
    pub concurrent_requests: usize,
    /// Longest a call may take.
    pub deadline: Duration,
    /// How long a stream waits for a client that does not read.
    pub stream_patience: Duration,
}

/// The admin listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Where it listens.
    pub listen: SocketAddr,
}

/// Log lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// How they look.
    pub format: logging::Format,
    /// Which are written.
    pub level: String,
}

/// The way to WhatsApp.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Whatsapp {
    /// Its WebSocket.
    pub url: Url,
    /// The version to announce; `None` asks for it at the start.
    pub version: Option<ClientVersion>,
    /// Proxies of numbers in private networks.
    pub allow_private_proxies: bool,
}

/// How fast connections may be opened, by all numbers together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gate {
    /// In the long run.
    pub connects_per_second: u32,
    /// At once after a rest.
    pub burst: u32,
    /// Being opened at once.
    pub concurrent: usize,
}

/// What one number may send, unless it has limits of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Between two messages in the long run.
    pub interval: Duration,
    /// At once after a rest.
    pub burst: u32,
    /// Between two messages of one chat in the long run.
    pub chat_interval: Duration,
    /// At once within one chat after a rest.
    pub chat_burst: u32,
    /// People who never wrote to the number.
    pub new_recipients: NewRecipients,
}

/// How long what is not history is kept, and how often every number looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Events, for streams that come back.
    pub events: Duration,
    /// Most events of a number.
    pub events_max: u32,
    /// The log of webhook attempts.
    pub attempts: Duration,
    /// Most attempts of an endpoint.
    pub attempts_max: u32,
    /// Dead letters.
    pub dead_letters: Duration,
    /// Between two looks of a number for what is too old.
    pub sweep: Duration,
}

/// What is done with sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sending {
    /// With a message whose last attempt may have arrived.
    pub on_unknown: OnUnknown,
}

/// Webhook delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Webhook {
    /// When a delivery is attempted.
    pub schedule: Schedule,
    /// Limit of one attempt.
    pub timeout: Duration,
    /// Attempts under way at once in the process.
    pub concurrent: usize,
    /// Private targets and plain http.
    pub allow_private: bool,
}

/// The end of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shutdown {
    /// How long numbers may finish what is under way.
    pub grace: Duration,
}

impl Config {
    /// Reads the defaults, then `file`, then every `SWITCHBOARD__SECTION__KEY` of `env`; the last one to set a key
    /// wins.
    ///
    /// # Errors
    /// Every mistake in any of them.
    pub fn load(file: Option<&Path>, env: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigErrors> {
        let mut mistakes = Vec::new();
        let layers = Layers::read(file, env, &mut mistakes);
        let mut reader = Reader { layers: &layers, mistakes };
        let config = reader.config();
        match config {
            Some(config) if reader.mistakes.is_empty() => Ok(config),
            _ => Err(ConfigErrors(reader.mistakes)),
        }
    }

    /// The documentation of every key, which is also a file that changes nothing.
    #[must_use]
    pub const fn documentation() -> &'static str {
        DEFAULTS
    }
}

const PORTS: &str = "an address and a port, such as 127.0.0.1:7400";

/// Reads typed values and collects what is wrong with them.
struct Reader<'a> {
    layers: &'a Layers,
    mistakes: Vec<Mistake>,
}

impl Reader<'_> {
    fn config(&mut self) -> Option<Config> {
        // Every section is read before the first `?`, so that one mistake does not hide the next.
        let data = self.text("data", "dir", "a path", |text| (!text.is_empty()).then(|| PathBuf::from(text)));
        let store = self.store();
        let api = self.api();
        let admin = self.parsed("admin", "listen", PORTS);
        let log = self.log();
        let whatsapp = self.whatsapp();
        let gate = self.gate();
        let reconnect = self.reconnect();
        let limits = self.limits();
        let retention = self.retention();
        let on_unknown = self.text("sending", "on_unknown", "\"resend\" or \"fail\"", |text| match text {
            "resend" => Some(OnUnknown::Resend),
            "fail" => Some(OnUnknown::Fail),
            _ => None,
        });
        let timeout = self.seconds("webhook", "timeout_seconds", 1..=60);
        let schedule = self.schedule();
        let concurrent = self.integer("webhook", "concurrent", 1..=1_000_000);
        let allow_private = self.bool("webhook", "allow_private");
        let grace = self.seconds("shutdown", "grace_seconds", 0..=600);
        Some(Config {
            data: Data { dir: data? },
            store: store?,
            api: api?,
            admin: Admin { listen: admin? },
            log: log?,
            whatsapp: whatsapp?,
            gate: gate?,
            reconnect: reconnect?,
            limits: limits?,
            retention: retention?,
            sending: Sending { on_unknown: on_unknown? },
            webhook: Webhook {
                schedule: schedule?,
                timeout: timeout?,
                concurrent: concurrent? as usize,
                allow_private: allow_private?,
            },
            shutdown: Shutdown { grace: grace? },
        })
    }

    fn store(&mut self) -> Option<Store> {
        let path = |text: &str| Some((!text.is_empty()).then(|| PathBuf::from(text)));
        let master_key_file = self.text("store", "master_key_file", "a path, or \"\"", path);
        let low_water_mib = self.integer("store", "low_water_mib", 0..=1_048_576);
        Some(Store { master_key_file: master_key_file?, low_water_bytes: u64::from(low_water_mib?) << 20 })
    }

    fn api(&mut self) -> Option<Api> {
        let listen = self.parsed("api", "listen", PORTS);
        let concurrent_requests = self.integer("api", "concurrent_requests", 1..=1_000_000);
        let deadline = self.seconds("api", "deadline_seconds", 1..=600);
        let stream_patience = self.seconds("api", "stream_patience_seconds", 1..=3600);
        Some(Api {
            listen: listen?,
            concurrent_requests: concurrent_requests? as usize,
            deadline: deadline?,
            stream_patience: stream_patience?,
        })
    }

    fn log(&mut self) -> Option<Log> {
        let format = self.text("log", "format", "\"text\" or \"json\"", |text| match text {
            "text" => Some(logging::Format::Text),
            "json" => Some(logging::Format::Json),
            _ => None,
        });
        let level = self.text("log", "level", "a level or a list of filters", |text| {
            logging::check_level(text).is_ok().then(|| text.to_owned())
        });
        Some(Log { format: format?, level: level? })
    }

    fn whatsapp(&mut self) -> Option<Whatsapp> {
        let url = self.text("whatsapp", "url", "a ws:// or wss:// URL without user and password", |text| {
            let url = Url::parse(text).ok()?;
            let plain = url.username().is_empty() && url.password().is_none() && url.has_host();
            (plain && matches!(url.scheme(), "ws" | "wss")).then_some(url)
        });
        let form = "a version such as \"2.3000.1234567890\", or \"\"";
        let version = self.text("whatsapp", "version", form, |text| match text {
            "" => Some(None),
            text => text.parse().ok().map(Some),
        });
        let allow_private_proxies = self.bool("whatsapp", "allow_private_proxies");
        Some(Whatsapp { url: url?, version: version?, allow_private_proxies: allow_private_proxies? })
    }

    fn gate(&mut self) -> Option<Gate> {
        let connects_per_second = self.integer("gate", "connects_per_second", 1..=10_000);
        let burst = self.integer("gate", "burst", 1..=10_000);
        let concurrent = self.integer("gate", "concurrent", 1..=10_000);
        Some(Gate { connects_per_second: connects_per_second?, burst: burst?, concurrent: concurrent? as usize })
    }

    fn reconnect(&mut self) -> Option<Shape> {
        let first = self.float("reconnect", "first_seconds", 0.1..=60.0);
        let longest = self.float("reconnect", "longest_seconds", 0.1..=86_400.0);
        Some(Shape {
            first_ceiling: Duration::from_secs_f64(first?),
            last_ceiling: Duration::from_secs_f64(longest?),
            floor: RECONNECT_FLOOR,
        })
    }

    fn limits(&mut self) -> Option<Limits> {
        let rate = self.float("limits", "messages_per_second", 0.001..=1000.0);
        let burst = self.integer("limits", "burst", 1..=1000);
        let chat_seconds = self.float("limits", "chat_seconds_per_message", 0.0..=86_400.0);
        let chat_burst = self.integer("limits", "chat_burst", 1..=1000);
        let expected = "\"warm-up\", \"unlimited\", or an integer from 0 to 1000";
        let new_recipients = self.value("limits", "new_recipients_per_day", expected, |raw| {
            let budget = match raw {
                Raw::Text(text) | Raw::Untyped(text) if text == "warm-up" => return Some(NewRecipients::WarmUp),
                Raw::Text(text) | Raw::Untyped(text) if text == "unlimited" => return Some(NewRecipients::Unlimited),
                Raw::Integer(number) => u32::try_from(*number).ok(),
                Raw::Untyped(text) => text.parse().ok(),
                _ => None,
            };
            budget.filter(|budget| *budget <= NEW_RECIPIENTS_MAX).map(NewRecipients::PerDay)
        });
        Some(Limits {
            interval: Duration::from_secs_f64(1.0 / rate?),
            burst: burst?,
            chat_interval: Duration::from_secs_f64(chat_seconds?),
            chat_burst: chat_burst?,
            new_recipients: new_recipients?,
        })
    }

    fn retention(&mut self) -> Option<Retention> {
        let events = self.days("retention", "event_days", 1..=3650);
        let events_max = self.integer("retention", "event_count", 1000..=100_000_000);
        let attempts = self.days("retention", "attempt_days", 1..=3650);
        let attempts_max = self.integer("retention", "attempt_count", 50..=100_000);
        let dead_letters = self.days("retention", "dead_letter_days", 1..=3650);
        let sweep = self.seconds("retention", "sweep_seconds", 1..=86_400);
        Some(Retention {
            events: events?,
            events_max: events_max?,
            attempts: attempts?,
            attempts_max: attempts_max?,
            dead_letters: dead_letters?,
            sweep: sweep?,
        })
    }

    fn schedule(&mut self) -> Option<Schedule> {
        self.text("webhook", "schedule", "1 to 8 numbers of seconds", |text| {
            let waits = text.split_whitespace().map(|wait| Duration::try_from_secs_f64(wait.parse().ok()?).ok());
            Schedule::of(&waits.collect::<Option<Vec<Duration>>>()?)
        })
    }

    fn parsed<T: FromStr>(&mut self, section: &str, key: &str, expected: &str) -> Option<T> {
        self.text(section, key, expected, |text| text.parse().ok())
    }

    fn text<T>(&mut self, section: &str, key: &str, expected: &str, read: impl Fn(&str) -> Option<T>) -> Option<T> {
        self.value(section, key, expected, |raw| match raw {
            Raw::Text(text) | Raw::Untyped(text) => read(text),
            _ => None,
        })
    }

    fn bool(&mut self, section: &str, key: &str) -> Option<bool> {
        self.value(section, key, "true or false", |raw| match raw {
            Raw::Bool(yes) => Some(*yes),
            Raw::Untyped(text) => text.parse().ok(),
            _ => None,
        })
    }

    fn integer(&mut self, section: &str, key: &str, range: RangeInclusive<u32>) -> Option<u32> {
        let expected = format!("an integer from {} to {}", range.start(), range.end());
        self.value(section, key, &expected, |raw| {
            let number = match raw {
                Raw::Integer(number) => u32::try_from(*number).ok(),
                Raw::Untyped(text) => text.parse().ok(),
                _ => None,
            };
            number.filter(|number| range.contains(number))
        })
    }

    fn float(&mut self, section: &str, key: &str, range: RangeInclusive<f64>) -> Option<f64> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.value(section, key, &expected, |raw| {
            let number = match raw {
                Raw::Float(number) => Some(*number),
                Raw::Integer(number) => Some(*number as f64),
                Raw::Untyped(text) => text.parse().ok(),
                _ => None,
            };
            number.filter(|number| range.contains(number))
        })
    }

    fn seconds(&mut self, section: &str, key: &str, range: RangeInclusive<u32>) -> Option<Duration> {
        self.integer(section, key, range).map(|seconds| Duration::from_secs(seconds.into()))
    }

    fn days(&mut self, section: &str, key: &str, range: RangeInclusive<u32>) -> Option<Duration> {
        self.integer(section, key, range).map(|days| Duration::from_secs(u64::from(days) * 24 * 3600))
    }

    fn value<T>(&mut self, section: &str, key: &str, expected: &str, read: impl Fn(&Raw) -> Option<T>) -> Option<T> {
        let Some(setting) = self.layers.get(section, key) else {
            // Only a default.toml that lost a key gets here; the test of the defaults catches it.
            self.mistake(section, key, "default.toml".to_owned(), "has no default".to_owned());
            return None;
        };
        let value = read(&setting.raw);
        if value.is_none() {
            let problem = format!("expected {expected}, got {}", shown(setting));
            self.mistake(section, key, setting.place.clone(), problem);
        }
        value
    }

    fn mistake(&mut self, section: &str, key: &str, place: String, problem: String) {
        self.mistakes.push(Mistake { place, key: format!("{section}.{key}"), problem });
    }
}

fn shown(setting: &Setting) -> String {
    match &setting.raw {
        Raw::Text(text) => format!("{text:?}"),
        Raw::Integer(number) => number.to_string(),
        Raw::Float(number) => number.to_string(),
        Raw::Bool(yes) => yes.to_string(),
        // The environment is where people put secrets by mistake.
        Raw::Untyped(_) => "something else".to_owned(),
        Raw::Other(kind) => (*kind).to_owned(),
    }
}
