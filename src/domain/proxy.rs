//! Proxies that numbers connect through: what may be given as one, and whether it is asked at all. When connections
//! through one address fail in a row it is the proxy that is down: its numbers wait, one of them at a time tries it, and
//! all follow when that works.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use url::{Host, Url};

use super::close::CloseReason;
use super::id::NumberId;

/// Longest URL accepted, in bytes.
const URL_BYTES_MAX: usize = 1024;
/// Longest user and password, in bytes: SOCKS5 has one byte for each length (RFC 1929).
const CREDENTIAL_BYTES_MAX: usize = 255;
/// IANA's port for SOCKS.
const SOCKS_PORT: u16 = 1080;
/// Connections that fail in a row before the proxy is taken to be down.
const TRIP_AFTER: u32 = 5;
/// First pause before it is tried again; doubles with every try that fails.
const PAUSE_FIRST: Duration = Duration::from_secs(5);
/// Longest pause between two tries.
const PAUSE_LONGEST: Duration = Duration::from_mins(5);
/// A try that has told nothing by then is taken for lost: the turn at the gate, the connection and the log-in.
const PROBE_WITHIN: Duration = Duration::from_mins(5);

/// How a proxy is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scheme {
    /// HTTP CONNECT (RFC 9110, 9.3.6), without TLS to the proxy itself.
    Http,
    /// SOCKS5 (RFC 1928), names resolved by the proxy.
    Socks5,
}

/// User and password.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// The user.
    pub user: String,
    /// The password; it is sent to the proxy and shown to nobody.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

/// A proxy.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proxy {
    scheme: Scheme,
    address: ProxyAddress,
    credentials: Option<Credentials>,
}

/// Where a proxy is. Numbers that use the same one share its fate, whatever their credentials.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProxyAddress {
    /// A name, or an address without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

/// Neither where nor who belongs into a log.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("scheme", &self.scheme).finish_non_exhaustive()
    }
}

impl fmt::Debug for ProxyAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProxyAddress")
    }
}

/// Why a text is not taken for a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAProxy {
    /// Not a URL, or too long for one.
    #[error("is not a URL of at most {URL_BYTES_MAX} bytes")]
    Malformed,
    /// Another scheme.
    #[error("the scheme must be http, socks5 or socks5h")]
    Scheme,
    /// No host, or port 0.
    #[error("must name a host, and a port other than 0 if any")]
    Address,
    /// A path, a query or a fragment.
    #[error("must end after host and port")]
    Trailing,
    /// A user without a name, or characters that no proxy understands.
    #[error(
        "user and password must have at most {CREDENTIAL_BYTES_MAX} bytes, no control characters, the user no colon"
    )]
    Credentials,
}

impl Proxy {
    /// Reads a URL such as `socks5://user:password@proxy.example:1080` or `http://10.0.0.7:3128`.
    ///
    /// # Errors
    /// What is wrong with it; never the text itself.
    pub fn parse(text: &str) -> Result<Self, NotAProxy> {
        if text.len() > URL_BYTES_MAX {
            return Err(NotAProxy::Malformed);
        }
        let url = Url::parse(text).map_err(|_| NotAProxy::Malformed)?;
        let (scheme, default_port) = match url.scheme() {
            "http" => (Scheme::Http, 80),
            "socks5" | "socks5h" => (Scheme::Socks5, SOCKS_PORT),
            _ => return Err(NotAProxy::Scheme),
        };
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err(NotAProxy::Trailing);
        }
        // The parser takes the host of a scheme that it does not know as it stands.
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or(NotAProxy::Address)?;
        let host = match Host::parse(host).map_err(|_| NotAProxy::Address)? {
            Host::Domain(name) => name,
            Host::Ipv4(address) => address.to_string(),
            Host::Ipv6(address) => address.to_string(),
        };
        let port = url.port().unwrap_or(default_port);
        if port == 0 {
            return Err(NotAProxy::Address);
        }
        let credentials = credentials(url.username(), url.password())?;
        Ok(Self { scheme, address: ProxyAddress { host, port }, credentials })
    }

    /// How it is spoken to.
    #[must_use]
    pub const fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Where it is.
    #[must_use]
    pub const fn address(&self) -> &ProxyAddress {
        &self.address
    }

    /// What it is told about us.
    #[must_use]
    pub const fn credentials(&self) -> Option<&Credentials> {
        self.credentials.as_ref()
    }

    /// The URL without the password: for its owner to see.
    #[must_use]
    pub fn shown(&self) -> String {
        let scheme = match self.scheme {
            Scheme::Http => "http",
            Scheme::Socks5 => "socks5",
        };
        let user = self.credentials.as_ref().map(|credentials| &credentials.user);
        let user = user.map(|user| format!("{}@", utf8_percent_encode(user, NON_ALPHANUMERIC))).unwrap_or_default();
        format!("{scheme}://{user}{}", self.address.authority())
    }
}

impl ProxyAddress {
    /// `host:port`, an IPv6 address in brackets.
    #[must_use]
    pub fn authority(&self) -> String {
        let Self { host, port } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }
}

fn credentials(user: &str, password: Option<&str>) -> Result<Option<Credentials>, NotAProxy> {
    if user.is_empty() && password.is_none() {
        return Ok(None);
    }
    let plain = |text: &str| {
        let text = percent_decode_str(text).decode_utf8().map_err(|_| NotAProxy::Credentials)?.into_owned();
        let fits = text.len() <= CREDENTIAL_BYTES_MAX && !text.chars().any(char::is_control);
        fits.then_some(text).ok_or(NotAProxy::Credentials)
    };
    let (user, password) = (plain(user)?, plain(password.unwrap_or_default())?);
    if user.is_empty() || user.contains(':') {
        return Err(NotAProxy::Credentials);
    }
    Ok(Some(Credentials { user, password }))
}

/// What the end of a connection says of the proxy it went through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// WhatsApp was reached through it.
    Works,
    /// It was not reached, or did not lead to WhatsApp.
    Fails,
    /// Nothing: what ended it is the number's own matter, or ours.
    Unknown,
}

impl Way {
    /// What a connection's end says.
    #[must_use]
    pub const fn of(reason: &CloseReason) -> Self {
        match reason {
            CloseReason::ProxyUnreachable | CloseReason::ProxyRefused | CloseReason::Unreachable => Self::Fails,
            // Wrong credentials are one number's: others may have better ones for the same proxy.
            CloseReason::ProxyLoginRefused
            | CloseReason::Requested
            | CloseReason::PairingEnded
            | CloseReason::StoreFailed
            | CloseReason::Crashed => Self::Unknown,
            CloseReason::Recycled
            | CloseReason::ConnectionLost
            | CloseReason::Unresponsive
            | CloseReason::HandshakeSilent
            | CloseReason::HandshakeRefused
            | CloseReason::LoggedOut { .. }
            | CloseReason::Locked
            | CloseReason::Banned
            | CloseReason::TemporarilyBanned { .. }
            | CloseReason::Replaced
            | CloseReason::ClientOutdated
            | CloseReason::RateLimited
            | CloseReason::ServerError { .. }
            | CloseReason::Refused { .. }
            | CloseReason::UpgradeRefused { .. }
            | CloseReason::StreamError { .. }
            | CloseReason::AckOwed
            | CloseReason::NotWellFormed
            | CloseReason::PairingRefused { .. } => Self::Works,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    Works {
        /// In a row.
        failures: u32,
    },
    Down {
        /// When it may be tried again.
        until: Duration,
        /// The pause that was taken, without jitter.
        pause: Duration,
        /// Who tries it, and until when an answer is waited for.
        probe: Option<(NumberId, Duration)>,
    },
}

/// The breaker of one proxy and the numbers that wait for it. Time is what has passed since some fixed moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    stand: Stand,
    /// In order of asking, each once.
    waiting: VecDeque<NumberId>,
}

impl Default for Line {
    fn default() -> Self {
        Self { stand: Stand::Works { failures: 0 }, waiting: VecDeque::new() }
    }
}

/// What an end changed for the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// Nothing.
    Same,
    /// The proxy is taken to be down from now on.
    WentDown,
    /// It works again: these numbers waited for that.
    CameBack(Vec<NumberId>),
}

impl Line {
    /// A number wants to connect through it: whether it may. If not, it waits from now on.
    pub fn enter(&mut self, number: NumberId, now: Duration) -> bool {
        let Stand::Down { until, probe, .. } = &mut self.stand else { return true };
        match *probe {
            Some((trying, _)) if trying == number => true,
            Some((_, by)) if now < by => self.wait(number),
            _ if now < *until => self.wait(number),
            _ => {
                *probe = Some((number, now.saturating_add(PROBE_WITHIN)));
                self.waiting.retain(|waiting| *waiting != number);
                true
            }
        }
    }

    fn wait(&mut self, number: NumberId) -> bool {
        if !self.waiting.contains(&number) {
            self.waiting.push_back(number);
        }
        false
    }

    /// A connection through it ended, or came online; `jitter` is a factor around 1 on the pause that may follow.
    pub fn ended(&mut self, number: NumberId, way: Way, jitter: f64, now: Duration) -> Turn {
        let down =
            |pause: Duration| Stand::Down { until: now.saturating_add(pause.mul_f64(jitter)), pause, probe: None };
        match (&mut self.stand, way) {
            (Stand::Works { failures }, Way::Works) => {
                *failures = 0;
                Turn::Same
            }
            (Stand::Works { failures }, Way::Fails) => {
                *failures += 1;
                if *failures < TRIP_AFTER {
                    return Turn::Same;
                }
                self.stand = down(PAUSE_FIRST);
                Turn::WentDown
            }
            (Stand::Down { .. }, Way::Works) => {
                self.stand = Stand::Works { failures: 0 };
                Turn::CameBack(std::mem::take(&mut self.waiting).into())
            }
            (Stand::Down { pause, probe, .. }, Way::Fails) if probe.is_some_and(|(trying, _)| trying == number) => {
                self.stand = down((*pause * 2).min(PAUSE_LONGEST));
                Turn::Same
            }
            (Stand::Down { probe, .. }, Way::Unknown) if probe.is_some_and(|(trying, _)| trying == number) => {
                // It was never tried: somebody else does that at once.
                *probe = None;
                Turn::Same
            }
            (Stand::Works { .. }, Way::Unknown) | (Stand::Down { .. }, Way::Fails | Way::Unknown) => Turn::Same,
        }
    }

    /// Who is to try it now, of those who wait.
    pub fn next_probe(&mut self, now: Duration) -> Option<NumberId> {
        let Stand::Down { until, probe, .. } = &mut self.stand else { return None };
        let is_due = now >= *until && probe.is_none_or(|(_, by)| now >= by);
        let number = if is_due { self.waiting.pop_front() } else { None };
        if let Some(number) = number {
            *probe = Some((number, now.saturating_add(PROBE_WITHIN)));
        }
        number
    }

    /// How long until somebody who waits is to try it.
    #[must_use]
    pub fn next_probe_in(&self, now: Duration) -> Option<Duration> {
        let Stand::Down { until, probe, .. } = self.stand else { return None };
        let due = probe.map_or(until, |(_, by)| by.max(until));
        (!self.waiting.is_empty()).then(|| due.saturating_sub(now))
    }

    /// Whether it is taken to be down.
    #[must_use]
    pub fn is_down(&self) -> bool {
        matches!(self.stand, Stand::Down { .. })
    }

    /// Numbers that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether there is nothing to remember.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: NumberId = NumberId(1);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_url_becomes_a_proxy_and_is_shown_without_its_password() {
        let table = [
            ("socks5://proxy.example:9050", "socks5://proxy.example:9050"),
            ("socks5h://proxy.example", "socks5://proxy.example:1080"),
            ("http://proxy.example", "http://proxy.example:80"),
            ("http://Proxy.Example:3128/", "http://proxy.example:3128"),
            ("socks5://u:p%40ss@127.0.0.1:80", "socks5://u@127.0.0.1:80"),
            ("http://us%20er@[::1]:3128", "http://us%20er@[::1]:3128"),
            ("socks5://0x7f.1:1", "socks5://127.0.0.1:1"),
        ];
        for (text, shown) in table {
            assert_eq!(Proxy::parse(text).map(|proxy| proxy.shown()), Ok(shown.to_owned()), "{text}");
        }
        let proxy = Proxy::parse("socks5://u:p%40ss%3a@h:1").unwrap();
        let credentials = proxy.credentials().unwrap();
        assert_eq!((credentials.user.as_str(), credentials.password.as_str()), ("u", "p@ss:"));
        for hidden in ["p@ss", "h:1", "\"h\""] {
            assert!(!format!("{proxy:?} {:?} {credentials:?}", proxy.address()).contains(hidden), "{hidden} is shown");
        }
    }

    #[test]
    fn what_is_no_proxy_is_refused_with_its_reason() {
        let long = format!("http://{}", "h".repeat(URL_BYTES_MAX));
        let user = format!("http://{}@h", "u".repeat(256));
        let table = [
            ("", NotAProxy::Malformed),
            ("proxy:3128:x", NotAProxy::Scheme),
            ("https://h:1", NotAProxy::Scheme),
            ("socks4://h:1", NotAProxy::Scheme),
            ("http://", NotAProxy::Malformed),
            ("socks5://", NotAProxy::Address),
            ("socks5://h:0", NotAProxy::Address),
            ("socks5://a b:1", NotAProxy::Malformed),
            ("http://h:1/path", NotAProxy::Trailing),
            ("http://h:1/?q", NotAProxy::Trailing),
            ("socks5://h:1#f", NotAProxy::Trailing),
            ("http://:password@h", NotAProxy::Credentials),
            ("http://a%3Ab:c@h", NotAProxy::Credentials),
            ("http://a%0Ab:c@h", NotAProxy::Credentials),
            ("http://a%ff:c@h", NotAProxy::Credentials),
            (user.as_str(), NotAProxy::Credentials),
            (long.as_str(), NotAProxy::Malformed),
        ];
        for (text, why) in table {
            assert_eq!(Proxy::parse(text).err(), Some(why), "{text}");
        }
    }

    #[test]
    fn five_failures_in_a_row_open_it_then_one_tries_at_a_time_with_growing_pauses() {
        let mut line = Line::default();
        for number in 0..20 {
            let way = if number % 5 == 4 { Way::Works } else { Way::Fails };
            assert_eq!(line.ended(NumberId(number), way, 1.0, at(0)), Turn::Same, "not in a row");
        }
        for number in 0..4 {
            assert_eq!(line.ended(NumberId(number), Way::Fails, 1.0, at(0)), Turn::Same);
        }
        assert_eq!(line.ended(ONE, Way::Fails, 1.0, at(0)), Turn::WentDown);
        for number in 0..1_000 {
            assert!(!line.enter(NumberId(number), at(1)));
        }
        assert_eq!(line.ended(NumberId(7), Way::Fails, 1.0, at(1)), Turn::Same, "begun before");
        let mut now = at(0);
        for pause in [5, 10, 20, 40, 80, 160, 300, 300] {
            assert_eq!(line.next_probe_in(now), Some(at(pause)));
            assert_eq!(line.next_probe(now + at(pause - 1)), None);
            now += at(pause);
            let probe = line.next_probe(now).unwrap();
            assert_eq!(line.next_probe(now), None, "one at a time");
            assert!(line.enter(probe, now) && !line.enter(NumberId(2_000), now));
            assert_eq!(line.ended(probe, Way::Fails, 1.0, now), Turn::Same);
            assert!(!line.enter(probe, now));
        }
        now += PAUSE_LONGEST;
        let probe = line.next_probe(now).unwrap();
        let Turn::CameBack(waited) = line.ended(probe, Way::Works, 1.0, now) else { panic!("still down") };
        assert_eq!(waited.len(), 1_000, "all others, and the one that asked last");
        assert!(line.is_idle() && line.enter(ONE, now));
    }

    #[test]
    fn a_try_that_came_to_nothing_is_made_up_for() {
        let mut line = Line::default();
        for _ in 0..TRIP_AFTER {
            line.ended(ONE, Way::Fails, 1.0, at(0));
        }
        for number in 1..=3 {
            line.enter(NumberId(number), at(0));
        }
        assert_eq!(line.next_probe(at(5)), Some(ONE));
        line.ended(ONE, Way::Unknown, 1.0, at(6));
        assert_eq!(line.next_probe(at(6)), Some(NumberId(2)), "the next one at once");
        assert_eq!(line.next_probe_in(at(6)), Some(PROBE_WITHIN));
        assert_eq!(line.next_probe(at(6) + PROBE_WITHIN), Some(NumberId(3)), "the second one was never heard of");
    }

    #[test]
    fn credentials_of_one_number_do_not_cut_off_the_others() {
        assert_eq!(Way::of(&CloseReason::ProxyLoginRefused), Way::Unknown);
        assert_eq!(Way::of(&CloseReason::ProxyUnreachable), Way::Fails);
        assert_eq!(Way::of(&CloseReason::LoggedOut { code: 401 }), Way::Works);
    }

    proptest! {
        /// Whatever ends how: while it is down one tries at most, nobody waits twice, and nobody is forgotten.
        #[test]
        fn one_tries_at_most_and_nobody_is_forgotten(
            acts in proptest::collection::vec((0u64..20, 0u8..5, 0u64..20), 0..200),
        ) {
            let mut line = Line::default();
            let (mut now, mut waiting, mut trying) = (Duration::ZERO, Vec::new(), None);
            for (number, act, wait) in acts {
                now += at(wait);
                let number = NumberId(number);
                match act {
                    0 => {
                        let was_down = line.is_down();
                        if line.enter(number, now) {
                            waiting.retain(|other| *other != number);
                            if was_down {
                                trying = Some((number, now));
                            }
                        } else if !waiting.contains(&number) {
                            waiting.push(number);
                        }
                    }
                    1 => {
                        if let Some(probe) = line.next_probe(now) {
                            prop_assert!(trying.is_none_or(|(_, since)| now - since >= PROBE_WITHIN), "two at once");
                            prop_assert!(waiting.contains(&probe));
                            waiting.retain(|other| *other != probe);
                            trying = Some((probe, now));
                        }
                    }
                    act => {
                        let way = [Way::Works, Way::Fails, Way::Unknown][usize::from(act) - 2];
                        if trying.is_some_and(|(probe, _)| probe == number) || (way == Way::Works && line.is_down()) {
                            trying = None;
                        }
                        if let Turn::CameBack(back) = line.ended(number, way, 1.0, now) {
                            prop_assert_eq!(&back, &waiting);
                            waiting.clear();
                        }
                    }
                }
                prop_assert_eq!(line.waiting(), waiting.len());
                prop_assert!(line.is_down() || waiting.is_empty());
            }
        }
    }
}
