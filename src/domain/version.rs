//! Which version of WhatsApp Web the process says it is, and when it asks which one is current. An operator's word comes
//! before what was looked up; what was looked up is good until WhatsApp says otherwise.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::time::Timestamp;

/// How often the current version is asked for, before jitter. WhatsApp publishes a few a month, and refuses one after
/// four to six months.
const REFRESH: Duration = Duration::from_hours(12);
/// First pause after a look-up that failed; doubles up to [`RETRY_LONGEST`].
const RETRY_FIRST: Duration = Duration::from_secs(30);
/// Longest pause after a look-up that failed.
const RETRY_LONGEST: Duration = Duration::from_hours(1);
/// Look-ups are this far apart, however often WhatsApp refuses the version.
const LOOKUPS_APART: Duration = Duration::from_secs(30);
/// A version whose last successful look-up is older than this should worry somebody: it lives for months, not for ever.
pub const WORRYING_AGE: Duration = Duration::from_hours(30 * 24);

/// A version of WhatsApp Web, for instance 2.3000.1234567890.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ClientVersion {
    /// First part.
    pub primary: u32,
    /// Second part.
    pub secondary: u32,
    /// Third part.
    pub tertiary: u32,
}

impl fmt::Display for ClientVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.primary, self.secondary, self.tertiary)
    }
}

/// Not three numbers with points between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be three numbers such as 2.3000.1234567890")]
pub struct NotAVersion;

impl FromStr for ClientVersion {
    type Err = NotAVersion;

    fn from_str(text: &str) -> Result<Self, NotAVersion> {
        let mut parts = text.split('.').map(|part| part.parse::<u32>().map_err(|_| NotAVersion));
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(primary), Some(secondary), Some(tertiary), None) => {
                Ok(Self { primary: primary?, secondary: secondary?, tertiary: tertiary? })
            }
            _ => Err(NotAVersion),
        }
    }
}

/// A version that was looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Which.
    pub version: ClientVersion,
    /// When.
    pub at: Timestamp,
}

/// What of it survives a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Kept {
    /// The operator's order.
    #[serde(default)]
    pub ordered: Option<ClientVersion>,
    /// The last one that was looked up.
    #[serde(default)]
    pub found: Option<Found>,
}

/// Where the version in force comes from; an earlier one goes before a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The operator's order over the API.
    Override,
    /// The configuration.
    Config,
    /// Looked up by this process.
    Fetched,
    /// Looked up by an earlier one.
    Kept,
}

impl Source {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Override, Self::Config, Self::Fetched, Self::Kept];

    /// Stable name for metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Override => "override",
            Self::Config => "config",
            Self::Fetched => "fetched",
            Self::Kept => "kept",
        }
    }
}

/// What is known of versions, and when to ask. Time is what has passed since some fixed moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versions {
    configured: Option<ClientVersion>,
    kept: Kept,
    found_here: bool,
    due: Duration,
    asked_at: Option<Duration>,
    failures: u32,
}

impl Versions {
    /// At the start of the process: a look-up is due at once.
    #[must_use]
    pub fn new(configured: Option<ClientVersion>, kept: Kept) -> Self {
        Self { configured, kept, found_here: false, due: Duration::ZERO, asked_at: None, failures: 0 }
    }

    /// The version to claim; none while nothing was ever found.
    #[must_use]
    pub fn in_force(&self) -> Option<(ClientVersion, Source)> {
        let looked_up = if self.found_here { Source::Fetched } else { Source::Kept };
        let ordered = self.kept.ordered.map(|version| (version, Source::Override));
        let configured = self.configured.map(|version| (version, Source::Config));
        let found = self.kept.found.map(|found| (found.version, looked_up));
        ordered.or(configured).or(found)
    }

    /// What is to be on disk.
    #[must_use]
    pub fn kept(&self) -> Kept {
        self.kept
    }

    /// How long until the next look-up; none while somebody has said which version it is.
    #[must_use]
    pub fn lookup_in(&self, now: Duration) -> Option<Duration> {
        let is_fixed = self.kept.ordered.or(self.configured).is_some();
        (!is_fixed).then(|| self.due.saturating_sub(now))
    }

    /// A look-up begins.
    pub fn asked(&mut self, now: Duration) {
        self.asked_at = Some(now);
    }

    /// It found a version; `jitter` is a factor around 1 on the pause until the next one.
    pub fn found(&mut self, found: Found, jitter: f64, now: Duration) {
        self.kept.found = Some(found);
        self.found_here = true;
        self.failures = 0;
        self.due = now.saturating_add(REFRESH.mul_f64(jitter));
    }

    /// It found nothing; what was known stays.
    pub fn lookup_failed(&mut self, now: Duration) {
        let pause = RETRY_FIRST.saturating_mul(1 << self.failures.min(10)).min(RETRY_LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.due = now.saturating_add(pause);
    }

    /// WhatsApp refused the version: another one is looked for, as soon as that may be. Until there is one, this one is
    /// still better than none.
    pub fn distrust(&mut self, now: Duration) {
        let earliest = self.asked_at.map_or(now, |asked| asked.saturating_add(LOOKUPS_APART)).max(now);
        self.due = self.due.min(earliest);
    }

    /// The operator says which version it is, or takes that back.
    pub fn order(&mut self, version: Option<ClientVersion>) {
        self.kept.ordered = version;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(tertiary: u32) -> ClientVersion {
        ClientVersion { primary: 2, secondary: 3000, tertiary }
    }

    fn found(tertiary: u32) -> Found {
        Found { version: version(tertiary), at: Timestamp(1_000) }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_version_reads_back_as_written() {
        assert_eq!("2.3000.1234567890".parse(), Ok(version(1_234_567_890)));
        assert_eq!(version(7).to_string(), "2.3000.7");
        for wrong in ["", "2", "2.3000", "2.3000.x", "2.3000.1.1", "2.3000.99999999999", "-2.3000.1"] {
            assert_eq!(wrong.parse::<ClientVersion>(), Err(NotAVersion), "{wrong}");
        }
    }

    #[test]
    fn the_operator_comes_first_and_what_was_kept_last() {
        let mut versions = Versions::new(None, Kept::default());
        assert_eq!(versions.in_force(), None);
        versions = Versions::new(None, Kept { ordered: None, found: Some(found(1)) });
        assert_eq!(versions.in_force(), Some((version(1), Source::Kept)));
        versions.found(found(2), 1.0, SECOND);
        assert_eq!(versions.in_force(), Some((version(2), Source::Fetched)));
        let mut versions = Versions::new(Some(version(3)), versions.kept());
        assert_eq!(versions.in_force(), Some((version(3), Source::Config)));
        versions.order(Some(version(4)));
        assert_eq!(versions.in_force(), Some((version(4), Source::Override)));
        let mut after_restart = Versions::new(Some(version(3)), versions.kept());
        assert_eq!(after_restart, versions, "an order and what was found survive");
        after_restart.order(None);
        assert_eq!(after_restart.in_force(), Some((version(3), Source::Config)));
    }

    #[test]
    fn it_is_looked_up_at_the_start_and_twice_a_day_and_sooner_after_a_failure() {
        let mut versions = Versions::new(None, Kept { ordered: None, found: Some(found(1)) });
        assert_eq!(versions.lookup_in(Duration::ZERO), Some(Duration::ZERO));
        let mut now = Duration::ZERO;
        for expected in [30, 60, 120, 240, 480, 960, 1_920, 3_600, 3_600] {
            versions.asked(now);
            versions.lookup_failed(now);
            assert_eq!(versions.lookup_in(now), Some(SECOND * expected));
            now += SECOND * expected;
        }
        assert_eq!(versions.in_force(), Some((version(1), Source::Kept)), "the last good one stays");
        versions.found(found(2), 0.9, now);
        assert_eq!(versions.lookup_in(now), Some(REFRESH.mul_f64(0.9)));
        versions.lookup_failed(now);
        assert_eq!(versions.lookup_in(now), Some(RETRY_FIRST), "a success starts over");
    }

    #[test]
    fn a_refusal_asks_again_but_ten_thousand_refusals_ask_once() {
        let mut versions = Versions::new(None, Kept::default());
        versions.asked(Duration::ZERO);
        versions.found(found(1), 1.0, Duration::ZERO);
        for _ in 0..10_000 {
            versions.distrust(SECOND);
        }
        assert_eq!(versions.lookup_in(SECOND), Some(SECOND * 29));
        assert_eq!(versions.in_force(), Some((version(1), Source::Fetched)), "better than none");
        versions.distrust(SECOND * 100);
        assert_eq!(versions.lookup_in(SECOND * 100), Some(Duration::ZERO));
    }

    #[test]
    fn nobody_is_asked_while_somebody_has_said_which_version_it_is() {
        assert_eq!(Versions::new(Some(version(1)), Kept::default()).lookup_in(SECOND), None);
        let mut versions = Versions::new(None, Kept::default());
        versions.order(Some(version(1)));
        versions.distrust(SECOND);
        assert_eq!(versions.lookup_in(SECOND), None);
        versions.order(None);
        assert_eq!(versions.lookup_in(SECOND), Some(Duration::ZERO));
    }
}
