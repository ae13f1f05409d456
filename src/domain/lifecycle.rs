//! The life of one number's connection: one state, one verdict per way a connection can end. Total: every state
//! answers every input.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::close::CloseReason;
use super::time::Timestamp;
use super::trouble::Trouble;

/// Online this long, with an answered ping, before the backoff starts over.
pub const STABLE_AFTER: Duration = Duration::from_secs(60);
/// A recycled stream reconnects at once, but not more often than this.
const IMMEDIATE_RECONNECT_EVERY: Duration = Duration::from_secs(60);
/// Longest wait after the end of a ban.
const BAN_JITTER: Duration = Duration::from_secs(60);
/// Pause when WhatsApp's edge refuses the connection by HTTP status.
const EDGE_PAUSE: Duration = Duration::from_secs(15 * 60);
/// A temporary ban without an end.
const BAN_DEFAULT: Duration = Duration::from_secs(24 * 3600);
/// First pause after a 429; doubles each time.
const RATE_LIMIT_PAUSE_MIN: Duration = Duration::from_secs(300);
/// Longest pause after a 429.
const RATE_LIMIT_PAUSE_MAX: Duration = Duration::from_secs(7200);
/// Pause after a refusal that waiting seldom heals; somebody has to look.
const REFUSED_PAUSE: Duration = Duration::from_secs(6 * 3600);
/// Failures of one kind in a row that turn backing off into parking.
const SUSPICIOUS_FAILURES: u32 = 3;
/// Failures of one kind in a row after which an operator should look, although it is tried again.
const ALIKE_ALERT: u32 = 10;
/// The same for handshakes refused by us or by the server: somebody may stand in between, or WhatsApp's root changed.
const HANDSHAKE_ALERT: u32 = 2;

/// Where a number stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Never linked, or its credentials are gone.
    Unlinked,
    /// Showing QR codes.
    Linking,
    /// No connection; the next try is at `retry_at`.
    Offline {
        /// When to ask the gate.
        retry_at: Timestamp,
    },
    /// Wants to connect, waits for its turn.
    AwaitingGate,
    /// Opening the connection, logging in, draining.
    Connecting,
    /// Logged in and drained.
    Online,
    /// As `Online`, and something is wrong; the reason says what.
    Degraded,
    /// Not connecting before `until`: WhatsApp or prudence said so.
    Parked {
        /// Earliest next try.
        until: Timestamp,
    },
    /// Another connection took over this device; fighting for it would evict each other for ever.
    Replaced,
    /// Unlinked by the account owner, locked or banned: needs linking again.
    LoggedOut,
    /// The operator wants it down.
    Stopped,
    /// Crashed too often; the supervisor tries again by itself, later.
    Quarantined,
}

impl State {
    /// Stable name for metrics, logs and the API.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unlinked => "UNLINKED",
            Self::Linking => "LINKING",
            Self::Offline { .. } => "OFFLINE",
            Self::AwaitingGate => "AWAITING_GATE",
            Self::Connecting => "CONNECTING",
            Self::Online => "ONLINE",
            Self::Degraded => "DEGRADED",
            Self::Parked { .. } => "PARKED",
            Self::Replaced => "REPLACED",
            Self::LoggedOut => "LOGGED_OUT",
            Self::Stopped => "STOPPED",
            Self::Quarantined => "QUARANTINED",
        }
    }

    /// Numeric code for the `state` metric and the wire; stable.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Unlinked => 1,
            Self::Linking => 2,
            Self::Offline { .. } => 3,
            Self::AwaitingGate => 4,
            Self::Connecting => 5,
            Self::Online => 6,
            Self::Degraded => 7,
            Self::Parked { .. } => 8,
            Self::Replaced => 9,
            Self::LoggedOut => 10,
            Self::Stopped => 11,
            Self::Quarantined => 12,
        }
    }

    /// Whether there is a connection over which messages go.
    #[must_use]
    pub const fn is_connected(self) -> bool {
        matches!(self, Self::Online | Self::Degraded)
    }

    /// When it changes by itself, if it does.
    #[must_use]
    pub const fn next_attempt(self) -> Option<Timestamp> {
        match self {
            Self::Offline { retry_at } => Some(retry_at),
            Self::Parked { until } => Some(until),
            Self::Unlinked
            | Self::Linking
            | Self::AwaitingGate
            | Self::Connecting
            | Self::Online
            | Self::Degraded
            | Self::Replaced
            | Self::LoggedOut
            | Self::Stopped
            | Self::Quarantined => None,
        }
    }
}

/// What the operator wants; theirs alone, never changed by what WhatsApp does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Desired {
    /// Connected whenever possible.
    Running,
    /// Down.
    Stopped,
}

/// What a phone is given to link a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LinkBy {
    /// A QR code to scan.
    #[default]
    QrCode,
    /// A code to type in.
    PairingCode,
}

/// What a session is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Link a new device.
    Pair,
    /// Log in with the stored one.
    Connect,
}

/// How far linking has come; [`State::Linking`] covers the wait for the gate as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum LinkingStep {
    /// No session yet.
    #[default]
    AwaitsGate,
    /// A session was opened and has not ended.
    Opened,
}

/// What can happen to a number's connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The operator wants it up.
    Start,
    /// The operator wants it down.
    Stop,
    /// Somebody asks for QR codes.
    Pair,
    /// The gate lets it connect.
    Granted,
    /// The phone accepted the link; credentials are durable.
    Paired,
    /// Logged in and drained.
    Online,
    /// The server answered something.
    Alive,
    /// Something is wrong with the connection.
    Troubled(Trouble),
    /// It no longer is.
    Relieved(Trouble),
    /// The connection ended; `backoff` is the wait the calculator proposes.
    Closed {
        /// Why.
        reason: CloseReason,
        /// Proposed wait, jitter included.
        backoff: Duration,
    },
    /// Its proxy is down: no turn to connect makes sense before that works again, or before `until`.
    WayClosed {
        /// When to look again at the latest.
        until: Timestamp,
    },
    /// Its proxy works again, may be tried, or is another one now.
    WayOpen,
    /// Time went by.
    Tick,
}

/// Why a number is offline whose proxy is down.
pub const PROXY_DOWN: &str = "PROXY_DOWN";

/// What must be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Ask the gate for a turn.
    AskGate,
    /// Leave the gate's queue.
    LeaveGate,
    /// Open a session.
    Open(Purpose),
    /// Close the session politely.
    Close,
    /// Start the connection backoff over.
    ResetBackoff,
}

/// How long after a socket went without a word the server may still come to a log-in that was on it.
const ECHO_WINDOW: Duration = Duration::from_secs(120);
/// Wait after our own echo, so that the server has seen the last of it.
const ECHO_PAUSE: Duration = Duration::from_secs(5);
/// A replacement is taken for our own echo once in this time.
const ECHO_EVERY: Duration = Duration::from_secs(3600);

/// A connection that ended other than as wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// Why: the code of its [`CloseReason`].
    pub code: String,
    /// WhatsApp's number for it, if it gave one.
    pub detail: Option<u16>,
    /// When.
    pub at: Timestamp,
}

/// Who must act before a number works as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Nobody: it is well, or heals by itself.
    None,
    /// Its owner: it must be linked, or the account needs them.
    Owner,
    /// The operator: something is refused that waiting seldom heals.
    Operator,
}

impl Attention {
    /// Stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Owner => "OWNER",
            Self::Operator => "OPERATOR",
        }
    }
}

/// The life of one number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// Where it stands.
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// Why it came there: a stable code, empty when nothing went wrong.
    pub reason: String,
    /// What the operator wants.
    pub desired: Desired,
    /// Whether credentials are stored.
    pub linked: bool,
    /// What is wrong with the present connection.
    #[serde(default)]
    troubles: Vec<Trouble>,
    /// The last connection that ended other than as wanted.
    #[serde(default)]
    pub last_error: Option<LastError>,
    #[serde(default)]
    alike: u32,
    rate_limits: u32,
    last_immediate: Option<Timestamp>,
    /// Until when the server may still come to a log-in of ours whose socket is gone.
    #[serde(default)]
    echo_until: Option<Timestamp>,
    /// When a replacement was last taken for our own echo.
    #[serde(default)]
    last_echo: Option<Timestamp>,
    #[serde(default)]
    linking: LinkingStep,
    stable: bool,
}

impl Life {
    /// A number that was just created.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        Self {
            state: State::Unlinked,
            since: now,
            reason: String::new(),
            desired: Desired::Running,
            linked: false,
            troubles: Vec::new(),
            last_error: None,
            alike: 0,
            rate_limits: 0,
            last_immediate: None,
            echo_until: None,
            last_echo: None,
            linking: LinkingStep::AwaitsGate,
            stable: false,
        }
    }

    /// The same life after a restart of the process or of the actor: no connection exists any more, everything
    /// that must not connect by itself stays as it was. Credentials found on disk while linking mean that the crash
    /// came between the phone's consent and our note of it.
    #[must_use]
    pub fn revived(mut self, has_credentials: bool, now: Timestamp) -> Self {
        if self.state == State::Linking {
            self.linked |= has_credentials;
        }
        if self.has_session() {
            self.echo_until = Some(now.after(ECHO_WINDOW));
        }
        let state = match self.state {
            State::Linking if self.linked => State::Offline { retry_at: now },
            State::Linking => State::Unlinked,
            State::Offline { .. }
            | State::AwaitingGate
            | State::Connecting
            | State::Online
            | State::Degraded
            | State::Quarantined => self.resting_state(now),
            kept @ (State::Unlinked | State::Parked { .. } | State::Replaced | State::LoggedOut | State::Stopped) => {
                kept
            }
        };
        if self.desired == Desired::Stopped {
            self.enter(State::Stopped, now);
        } else {
            self.enter(state, now);
        }
        self.stable = false;
        self.troubles.clear();
        self
    }

    fn enter(&mut self, state: State, now: Timestamp) {
        if self.state != state {
            self.state = state;
            self.since = now;
            self.linking = LinkingStep::AwaitsGate;
        }
    }

    fn has_session(&self) -> bool {
        match self.state {
            State::Connecting | State::Online | State::Degraded => true,
            State::Linking => self.linking == LinkingStep::Opened,
            State::Unlinked
            | State::Offline { .. }
            | State::AwaitingGate
            | State::Parked { .. }
            | State::Replaced
            | State::LoggedOut
            | State::Stopped
            | State::Quarantined => false,
        }
    }

    /// One step. Pure: the same life, input and moment always give the same result.
    pub fn step(&mut self, input: Input, now: Timestamp) -> Vec<Effect> {
        match input {
            Input::Start => self.start(now),
            Input::Stop => self.stop(now),
            Input::Pair => self.pair(now),
            Input::Granted => self.granted(now),
            Input::Paired => {
                self.linked = true;
                self.reason.clear();
                Vec::new()
            }
            Input::Online => self.online(now),
            Input::Alive => self.alive(now),
            Input::Troubled(trouble) => self.troubled(trouble, now),
            Input::Relieved(trouble) => self.relieved(trouble, now),
            Input::Closed { reason, backoff } => self.closed(&reason, backoff, now),
            Input::WayClosed { until } => self.way_closed(until, now),
            Input::WayOpen => self.way_open(now),
            Input::Tick => self.tick(now),
        }
    }

    fn way_closed(&mut self, until: Timestamp, now: Timestamp) -> Vec<Effect> {
        match self.state {
            State::AwaitingGate => {
                PROXY_DOWN.clone_into(&mut self.reason);
                self.enter(State::Offline { retry_at: until }, now);
                vec![Effect::LeaveGate]
            }
            // Linking is for a person to repeat; the others want no turn.
            State::Unlinked
            | State::Linking
            | State::Offline { .. }
            | State::Connecting
            | State::Online
            | State::Degraded
            | State::Parked { .. }
            | State::Replaced
            | State::LoggedOut
            | State::Stopped
            | State::Quarantined => Vec::new(),
        }
    }

    fn way_open(&mut self, now: Timestamp) -> Vec<Effect> {
        match self.state {
            State::Offline { .. } => {
                self.enter(State::Offline { retry_at: now }, now);
                self.tick(now)
            }
            // WhatsApp's word and the operator's stand whatever the way.
            State::Unlinked
            | State::Linking
            | State::AwaitingGate
            | State::Connecting
            | State::Online
            | State::Degraded
            | State::Parked { .. }
            | State::Replaced
            | State::LoggedOut
            | State::Stopped
            | State::Quarantined => Vec::new(),
        }
    }

    fn resting_state(&self, now: Timestamp) -> State {
        if self.linked { State::Offline { retry_at: now } } else { State::Unlinked }
    }

    fn start(&mut self, now: Timestamp) -> Vec<Effect> {
        self.desired = Desired::Running;
        match self.state {
            // The operator's word also ends a wait and a stand-off.
            State::Stopped | State::Offline { .. } | State::Parked { .. } | State::Replaced | State::Quarantined => {
                self.enter(self.resting_state(now), now);
                self.tick(now)
            }
            State::Unlinked
            | State::Linking
            | State::AwaitingGate
            | State::Connecting
            | State::Online
            | State::Degraded
            | State::LoggedOut => Vec::new(),
        }
    }

    fn stop(&mut self, now: Timestamp) -> Vec<Effect> {
        self.desired = Desired::Stopped;
        if self.has_session() {
            return vec![Effect::LeaveGate, Effect::Close];
        }
        let waiting = matches!(self.state, State::AwaitingGate | State::Linking);
        if self.state != State::LoggedOut {
            self.enter(State::Stopped, now);
        }
        if waiting { vec![Effect::LeaveGate] } else { Vec::new() }
    }

    fn pair(&mut self, now: Timestamp) -> Vec<Effect> {
        match self.state {
            State::Unlinked | State::LoggedOut => {
                self.desired = Desired::Running;
                self.linked = false;
                self.reason.clear();
                self.enter(State::Linking, now);
                vec![Effect::AskGate]
            }
            State::Linking
            | State::Offline { .. }
            | State::AwaitingGate
            | State::Connecting
            | State::Online
            | State::Degraded
            | State::Parked { .. }
            | State::Replaced
            | State::Stopped
            | State::Quarantined => Vec::new(),
        }
    }

    fn granted(&mut self, now: Timestamp) -> Vec<Effect> {
        match self.state {
            State::Linking if self.linking == LinkingStep::AwaitsGate => {
                self.linking = LinkingStep::Opened;
                vec![Effect::Open(Purpose::Pair)]
            }
            State::AwaitingGate => {
                self.enter(State::Connecting, now);
                vec![Effect::Open(Purpose::Connect)]
            }
            // A turn that was taken back while its word was on the way, or the second one of two.
            State::Unlinked
            | State::Linking
            | State::Offline { .. }
            | State::Connecting
            | State::Online
            | State::Degraded
            | State::Parked { .. }
            | State::Replaced
            | State::LoggedOut
            | State::Stopped
            | State::Quarantined => vec![Effect::LeaveGate],
        }
    }

    fn online(&mut self, now: Timestamp) -> Vec<Effect> {
        match self.state {
            State::Linking | State::Connecting if self.has_session() => {
                self.enter(State::Online, now);
                self.reason.clear();
                self.stable = false;
                Vec::new()
            }
            // A session nobody should have.
            State::Unlinked
            | State::Linking
            | State::Connecting
            | State::Offline { .. }
            | State::AwaitingGate
            | State::Parked { .. }
            | State::Replaced
            | State::LoggedOut
            | State::Stopped
            | State::Quarantined => vec![Effect::Close],
            State::Online | State::Degraded => Vec::new(),
        }
    }

    fn troubled(&mut self, trouble: Trouble, now: Timestamp) -> Vec<Effect> {
        if self.state.is_connected() {
            if let Err(place) = self.troubles.binary_search(&trouble) {
                self.troubles.insert(place, trouble);
            }
            self.name_trouble(now);
        }
        Vec::new()
    }

    fn relieved(&mut self, trouble: Trouble, now: Timestamp) -> Vec<Effect> {
        if self.state.is_connected() {
            self.troubles.retain(|known| *known != trouble);
            self.name_trouble(now);
        }
        Vec::new()
    }

    fn name_trouble(&mut self, now: Timestamp) {
        let (state, reason) = match self.troubles.first() {
            Some(first) => (State::Degraded, first.code()),
            None => (State::Online, ""),
        };
        reason.clone_into(&mut self.reason);
        self.enter(state, now);
    }

    /// Who must act.
    #[must_use]
    pub fn attention(&self) -> Attention {
        let temporarily_banned = CloseReason::TemporarilyBanned { code: 0, until: None }.code();
        match self.state {
            State::Unlinked | State::LoggedOut => Attention::Owner,
            State::Parked { .. } if self.reason == temporarily_banned => Attention::Owner,
            State::Parked { .. } if self.reason == CloseReason::RateLimited.code() => Attention::None,
            State::Parked { .. } | State::Degraded | State::Replaced | State::Quarantined => Attention::Operator,
            // Its owner gave it the proxy and the proxy's password.
            State::Offline { .. } | State::AwaitingGate | State::Connecting
                if self.reason == CloseReason::ProxyLoginRefused.code() =>
            {
                Attention::Owner
            }
            State::Offline { .. } | State::AwaitingGate | State::Connecting if self.alike >= self.alert_after() => {
                Attention::Operator
            }
            State::Linking
            | State::Offline { .. }
            | State::AwaitingGate
            | State::Connecting
            | State::Online
            | State::Stopped => Attention::None,
        }
    }

    fn alert_after(&self) -> u32 {
        if self.reason == CloseReason::HandshakeRefused.code() { HANDSHAKE_ALERT } else { ALIKE_ALERT }
    }

    fn alive(&mut self, now: Timestamp) -> Vec<Effect> {
        if self.state.is_connected() && !self.stable && now.since(self.since) >= STABLE_AFTER {
            self.stable = true;
            self.alike = 0;
            self.rate_limits = 0;
            return vec![Effect::ResetBackoff];
        }
        Vec::new()
    }

    fn tick(&mut self, now: Timestamp) -> Vec<Effect> {
        match self.state {
            State::Offline { retry_at: due } | State::Parked { until: due } if now >= due => {
                self.enter(State::AwaitingGate, now);
                vec![Effect::AskGate]
            }
            State::Unlinked
            | State::Linking
            | State::Offline { .. }
            | State::AwaitingGate
            | State::Connecting
            | State::Online
            | State::Degraded
            | State::Parked { .. }
            | State::Replaced
            | State::LoggedOut
            | State::Stopped
            | State::Quarantined => Vec::new(),
        }
    }

    fn closed(&mut self, reason: &CloseReason, backoff: Duration, now: Timestamp) -> Vec<Effect> {
        if !self.has_session() {
            // Nothing was open; what this state waits for is not ended by it.
            return Vec::new();
        }
        let pairing = self.state == State::Linking && !self.linked;
        self.count(reason, now);
        let verdict = self.verdict(reason, backoff, now);
        self.troubles.clear();
        reason.code().clone_into(&mut self.reason);
        if let CloseReason::PairingRefused { code } = reason {
            self.reason.clone_from(code);
        }
        self.stable = false;
        let state = match (self.desired, verdict) {
            (_, State::LoggedOut) => {
                self.linked = false;
                State::LoggedOut
            }
            (Desired::Stopped, _) => State::Stopped,
            // A failed attempt to link is for the person at the screen to repeat.
            (Desired::Running, _) if pairing => State::Unlinked,
            (Desired::Running, other) => other,
        };
        self.enter(state, now);
        self.tick(now)
    }

    /// Whether a replacement is probably our own work: the last log-in of a life that was killed, or of a socket that was
    /// cut, may reach the server after its successor's. Taken so once an hour, so that two daemons with the same
    /// credentials do not evict each other for ever.
    fn is_echo(&self, now: Timestamp) -> bool {
        let recent = self.last_echo.is_some_and(|last| now.since(last) < ECHO_EVERY);
        !recent && self.echo_until.is_some_and(|until| now <= until)
    }

    /// Counts endings of one kind in a row. Those that are wanted or routine neither count nor end such a row.
    fn count(&mut self, reason: &CloseReason, now: Timestamp) {
        if matches!(reason, CloseReason::Requested | CloseReason::Recycled) {
            return;
        }
        let same = self.last_error.as_ref().is_some_and(|last| last.code == reason.code());
        self.alike = if same { self.alike.saturating_add(1) } else { 1 };
        self.last_error = Some(LastError { code: reason.code().to_owned(), detail: reason.detail(), at: now });
    }

    /// The verdict for each reason; sources: whatsmeow's and whatsapp-rust's handling of the same codes.
    fn verdict(&mut self, reason: &CloseReason, backoff: Duration, now: Timestamp) -> State {
        let back_off = State::Offline { retry_at: now.after(backoff) };
        let suspicious = self.alike >= SUSPICIOUS_FAILURES;
        if reason.leaves_the_server_behind() {
            self.echo_until = Some(now.after(ECHO_WINDOW));
        }
        match reason {
            CloseReason::Recycled => {
                let again = self.last_immediate.is_some_and(|last| now.since(last) < IMMEDIATE_RECONNECT_EVERY);
                if again {
                    return back_off;
                }
                self.last_immediate = Some(now);
                State::Offline { retry_at: now }
            }
            CloseReason::Requested
            | CloseReason::ConnectionLost
            | CloseReason::Unresponsive
            | CloseReason::Unreachable
            | CloseReason::ProxyUnreachable
            | CloseReason::ProxyRefused
            | CloseReason::ProxyLoginRefused
            | CloseReason::AckOwed
            | CloseReason::StreamError { .. }
            | CloseReason::HandshakeSilent
            // What stands between everybody and WhatsApp is seldom there for hours; the gate keeps the fleet quiet
            // meanwhile, and the first that gets through again releases it.
            | CloseReason::HandshakeRefused
            | CloseReason::ServerError { .. }
            | CloseReason::StoreFailed
            | CloseReason::Crashed => back_off,
            CloseReason::NotWellFormed | CloseReason::Refused { code: 0 | 400 } => {
                if suspicious {
                    State::Parked { until: now.after(REFUSED_PAUSE) }
                } else {
                    back_off
                }
            }
            CloseReason::UpgradeRefused { status: 403 | 429 } => State::Parked { until: now.after(EDGE_PAUSE) },
            CloseReason::UpgradeRefused { .. } => back_off,
            CloseReason::Refused { .. } => State::Parked { until: now.after(REFUSED_PAUSE) },
            CloseReason::LoggedOut { .. } | CloseReason::Locked | CloseReason::Banned => State::LoggedOut,
            CloseReason::TemporarilyBanned { until, .. } => {
                // A little later than it ends, and not everybody at the same moment.
                State::Parked { until: until.unwrap_or(now.after(BAN_DEFAULT)).max(now).after(backoff.min(BAN_JITTER)) }
            }
            CloseReason::Replaced if self.is_echo(now) => {
                self.last_echo = Some(now);
                State::Offline { retry_at: now.after(backoff.max(ECHO_PAUSE)) }
            }
            CloseReason::Replaced => State::Replaced,
            // At the gate, which lets nobody but a canary through until one comes online.
            CloseReason::ClientOutdated => State::Offline { retry_at: now },
            CloseReason::RateLimited => {
                let doubled = RATE_LIMIT_PAUSE_MIN.saturating_mul(1 << self.rate_limits.min(10));
                self.rate_limits = self.rate_limits.saturating_add(1);
                State::Parked { until: now.after(doubled.min(RATE_LIMIT_PAUSE_MAX)) }
            }
            CloseReason::PairingEnded | CloseReason::PairingRefused { .. } => {
                if self.linked {
                    back_off
                } else {
                    State::Unlinked
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: Timestamp = Timestamp(1_000_000_000);
    /// A dash: the state stays. The last row is linking with a session; the first, linking that waits for its turn.
    const TABLE: &str = "
             |Start|Stop|Pair|Granted|Paired|Online|Alive|Troubled|Relieved|Closed: connection lost|Way closed|Way open|Tick
unlinked     | - | stopped | linking+ask | -+leave | - | -+close | - | - | - | - | - | - | -
linking      | - | stopped+leave | - | -+pair | - | -+close | - | - | - | - | - | - | -
offline      | awaiting_gate+ask | stopped | - | -+leave | - | -+close | - | - | - | - | - | awaiting_gate+ask | awaiting_gate+ask
awaiting_gate| - | stopped+leave | - | connecting+connect | - | -+close | - | - | - | - | offline+leave | - | -
connecting   | - | -+leave+close | - | -+leave | - | online | - | - | - | offline | - | - | -
online       | - | -+leave+close | - | -+leave | - | - | - | degraded | - | offline | - | - | -
degraded     | - | -+leave+close | - | -+leave | - | - | - | - | online | offline | - | - | -
parked       | awaiting_gate+ask | stopped | - | -+leave | - | -+close | - | - | - | - | - | - | awaiting_gate+ask
replaced     | awaiting_gate+ask | stopped | - | -+leave | - | -+close | - | - | - | - | - | - | -
logged_out   | - | - | linking+ask | -+leave | - | -+close | - | - | - | - | - | - | -
stopped      | awaiting_gate+ask | - | - | -+leave | - | -+close | - | - | - | - | - | - | -
quarantined  | awaiting_gate+ask | stopped | - | -+leave | - | -+close | - | - | - | - | - | - | -
linking      | - | -+leave+close | - | -+leave | - | online | - | - | - | unlinked | - | - | -
";
    const BACKOFF: Duration = Duration::from_secs(7);

    fn online() -> Life {
        let mut life = Life::new(NOW);
        life.linked = true;
        life.enter(State::Online, NOW);
        life
    }

    fn after(reason: CloseReason) -> State {
        let mut life = online();
        life.step(Input::Closed { reason, backoff: BACKOFF }, NOW);
        life.state
    }

    #[test]
    fn each_reason_has_its_verdict() {
        let back_off = State::Offline { retry_at: NOW.after(BACKOFF) };
        let parked = |pause: Duration| State::Parked { until: NOW.after(pause) };
        let until = Timestamp(NOW.0 + 12_345);
        let table = [
            (CloseReason::Requested, back_off),
            (CloseReason::Recycled, State::AwaitingGate),
            (CloseReason::ConnectionLost, back_off),
            (CloseReason::Unresponsive, back_off),
            (CloseReason::Unreachable, back_off),
            (CloseReason::ProxyUnreachable, back_off),
            (CloseReason::ProxyRefused, back_off),
            (CloseReason::ProxyLoginRefused, back_off),
            (CloseReason::HandshakeSilent, back_off),
            (CloseReason::HandshakeRefused, back_off),
            (CloseReason::LoggedOut { code: 401 }, State::LoggedOut),
            (CloseReason::Locked, State::LoggedOut),
            (CloseReason::Banned, State::LoggedOut),
            (
                CloseReason::TemporarilyBanned { code: 101, until: Some(until) },
                State::Parked { until: until.after(BACKOFF) },
            ),
            (CloseReason::TemporarilyBanned { code: 101, until: None }, parked(BAN_DEFAULT + BACKOFF)),
            (CloseReason::Replaced, State::Replaced),
            // Every number meets it at once and none can heal it: they wait together, at the gate, for the one canary
            // that tries the next version. Parked for an hour each, they would be down for an hour after it was healed.
            (CloseReason::ClientOutdated, State::AwaitingGate),
            (CloseReason::RateLimited, parked(RATE_LIMIT_PAUSE_MIN)),
            (CloseReason::ServerError { code: 503 }, back_off),
            (CloseReason::Refused { code: 400 }, back_off),
            (CloseReason::Refused { code: 415 }, parked(REFUSED_PAUSE)),
            (CloseReason::Refused { code: 501 }, parked(REFUSED_PAUSE)),
            (CloseReason::Refused { code: 0 }, back_off),
            (CloseReason::UpgradeRefused { status: 403 }, parked(EDGE_PAUSE)),
            (CloseReason::UpgradeRefused { status: 429 }, parked(EDGE_PAUSE)),
            (CloseReason::UpgradeRefused { status: 502 }, back_off),
            (CloseReason::AckOwed, back_off),
            (CloseReason::StreamError { code: 777 }, back_off),
            (CloseReason::ServerError { code: 500 }, back_off),
            (CloseReason::NotWellFormed, back_off),
            (CloseReason::StoreFailed, back_off),
            (CloseReason::Crashed, back_off),
        ];
        for (reason, expected) in table {
            assert_eq!(after(reason.clone()), expected, "{reason:?}");
        }
    }

    #[test]
    fn what_goes_on_failing_is_parked_or_shown_to_an_operator() {
        let parks_at_the_third =
            [CloseReason::NotWellFormed, CloseReason::Refused { code: 0 }, CloseReason::Refused { code: 400 }];
        let called_at = |reason: &CloseReason| {
            (1..=ALIKE_ALERT + 1).find(|times| {
                let mut life = online();
                for _ in 0..*times {
                    life.enter(State::Connecting, NOW);
                    life.step(Input::Closed { reason: reason.clone(), backoff: BACKOFF }, NOW);
                }
                let parked = matches!(life.state, State::Parked { .. });
                assert_eq!(
                    parked,
                    parks_at_the_third.contains(reason) && *times >= SUSPICIOUS_FAILURES,
                    "{reason:?} {times}"
                );
                life.attention() == Attention::Operator
            })
        };
        for reason in &parks_at_the_third {
            assert_eq!(called_at(reason), Some(SUSPICIOUS_FAILURES), "{reason:?}");
        }
        assert_eq!(called_at(&CloseReason::HandshakeRefused), Some(HANDSHAKE_ALERT));
        assert_eq!(called_at(&CloseReason::HandshakeSilent), Some(ALIKE_ALERT));
        assert_eq!(called_at(&CloseReason::Unreachable), Some(ALIKE_ALERT));
    }

    #[test]
    fn an_echo_of_our_own_is_no_replacement_but_once_an_hour() {
        let close = |reason| Input::Closed { reason, backoff: BACKOFF };
        let online_at = |life: &mut Life, now| {
            life.enter(State::Online, now);
        };
        let waits =
            |life: &Life, now: Timestamp| life.state == State::Offline { retry_at: now.after(BACKOFF.max(ECHO_PAUSE)) };
        let mut killed = online().revived(true, NOW);
        online_at(&mut killed, NOW);
        killed.step(close(CloseReason::Replaced), NOW.after(ECHO_WINDOW));
        assert!(waits(&killed, NOW.after(ECHO_WINDOW)), "{:?}", killed.state);
        for (later, expected) in [(ECHO_EVERY / 2, false), (ECHO_EVERY * 2, true)] {
            let mut life = killed.clone();
            let now = NOW.after(ECHO_WINDOW).after(later);
            online_at(&mut life, now);
            life.step(close(CloseReason::ConnectionLost), now);
            online_at(&mut life, now);
            life.step(close(CloseReason::Replaced), now);
            assert_eq!(waits(&life, now), expected);
            assert_eq!(life.state == State::Replaced, !expected);
        }
        let mut late = online().revived(true, NOW);
        let now = NOW.after(ECHO_WINDOW + Duration::from_millis(1));
        online_at(&mut late, now);
        late.step(close(CloseReason::Replaced), now);
        assert_eq!(late.state, State::Replaced, "somebody else");
    }

    #[test]
    fn a_second_recycle_within_a_minute_backs_off() {
        let mut life = online();
        let close = || Input::Closed { reason: CloseReason::Recycled, backoff: BACKOFF };
        assert_eq!(life.step(close(), NOW), vec![Effect::AskGate]);
        assert_eq!(life.step(Input::Granted, NOW), vec![Effect::Open(Purpose::Connect)]);
        life.step(Input::Online, NOW);
        assert_eq!(life.step(close(), NOW.after(Duration::from_secs(5))), Vec::new());
        assert!(matches!(life.state, State::Offline { .. }));
    }

    #[test]
    fn the_backoff_is_reset_by_a_minute_online_and_an_answer() {
        let mut life = online();
        assert_eq!(life.step(Input::Alive, NOW.after(Duration::from_secs(59))), Vec::new());
        assert_eq!(life.step(Input::Alive, NOW.after(STABLE_AFTER)), vec![Effect::ResetBackoff]);
        assert_eq!(life.step(Input::Alive, NOW.after(STABLE_AFTER * 2)), Vec::new());
    }

    #[test]
    fn linking_that_fails_waits_for_a_person() {
        let mut life = Life::new(NOW);
        assert_eq!(life.step(Input::Pair, NOW), vec![Effect::AskGate]);
        assert_eq!(life.step(Input::Granted, NOW), vec![Effect::Open(Purpose::Pair)]);
        life.step(Input::Closed { reason: CloseReason::ConnectionLost, backoff: BACKOFF }, NOW);
        assert_eq!(life.state, State::Unlinked);
    }

    #[test]
    fn a_number_whose_proxy_is_down_waits_offline_and_goes_on_when_it_works() {
        let mut life = online();
        life.enter(State::AwaitingGate, NOW);
        let until = NOW.after(Duration::from_secs(600));
        assert_eq!(life.step(Input::WayClosed { until }, NOW), [Effect::LeaveGate]);
        assert_eq!((life.state, life.reason.as_str()), (State::Offline { retry_at: until }, PROXY_DOWN));
        assert_eq!(life.step(Input::Granted, NOW), [Effect::LeaveGate], "a turn that was on its way");
        assert_eq!(life.step(Input::WayOpen, NOW), [Effect::AskGate]);
        assert_eq!(life.step(Input::WayOpen, NOW), []);
        assert_eq!(life.state, State::AwaitingGate);
        let mut stopped = online();
        stopped.enter(State::Stopped, NOW);
        assert_eq!(stopped.step(Input::WayOpen, NOW), []);
    }

    #[test]
    fn a_turn_that_comes_after_the_stop_opens_nothing() {
        let mut life = Life::new(NOW);
        life.step(Input::Pair, NOW);
        life.step(Input::Stop, NOW);
        assert_eq!(life.step(Input::Granted, NOW), vec![Effect::LeaveGate]);
    }

    #[test]
    fn a_close_without_a_session_changes_nothing() {
        let mut life = online();
        life.step(Input::Closed { reason: CloseReason::LoggedOut { code: 401 }, backoff: BACKOFF }, NOW);
        let before = life.clone();
        assert_eq!(life.step(Input::Closed { reason: CloseReason::Recycled, backoff: BACKOFF }, NOW), Vec::new());
        assert_eq!(life, before);
    }

    const STATES: [State; 13] = [
        State::Unlinked,
        State::Linking,
        State::Offline { retry_at: NOW },
        State::AwaitingGate,
        State::Connecting,
        State::Online,
        State::Degraded,
        State::Parked { until: NOW },
        State::Replaced,
        State::LoggedOut,
        State::Stopped,
        State::Quarantined,
        // Its codes are shown: a session is open.
        State::Linking,
    ];

    fn row(index: usize, state: State) -> String {
        let inputs = [
            Input::Start,
            Input::Stop,
            Input::Pair,
            Input::Granted,
            Input::Paired,
            Input::Online,
            Input::Alive,
            Input::Troubled(Trouble::PrekeysMissing),
            Input::Relieved(Trouble::PrekeysMissing),
            Input::Closed { reason: CloseReason::ConnectionLost, backoff: BACKOFF },
            Input::WayClosed { until: NOW.after(BACKOFF) },
            Input::WayOpen,
            Input::Tick,
        ];
        let mut row = format!("{:13}", state.name().to_lowercase());
        for input in inputs {
            let mut life = Life::new(NOW);
            life.linked = !matches!(state, State::Unlinked | State::Linking);
            life.state = state;
            if state == State::Degraded {
                life.troubles.push(Trouble::PrekeysMissing);
            }
            if index == STATES.len() - 1 {
                life.linking = LinkingStep::Opened;
            }
            let effects: String = life
                .step(input, NOW)
                .iter()
                .map(|effect| match effect {
                    Effect::AskGate => "+ask",
                    Effect::LeaveGate => "+leave",
                    Effect::Open(Purpose::Pair) => "+pair",
                    Effect::Open(Purpose::Connect) => "+connect",
                    Effect::Close => "+close",
                    Effect::ResetBackoff => "+reset",
                })
                .collect();
            let name = if life.state == state { "-".to_owned() } else { life.state.name().to_lowercase() };
            row.push_str(&format!("| {name}{effects} "));
        }
        row.trim_end().to_owned()
    }

    #[test]
    fn every_state_answers_every_input() {
        let rows: Vec<_> = STATES.iter().enumerate().map(|(index, state)| row(index, *state)).collect();
        let (_head, table) = TABLE.trim().split_once('\n').unwrap();
        assert_eq!(rows.join("\n"), table, "\n{}", rows.join("\n"));
    }

    fn inputs() -> impl Strategy<Value = Input> {
        let reasons = vec![
            CloseReason::Recycled,
            CloseReason::ConnectionLost,
            CloseReason::LoggedOut { code: 401 },
            CloseReason::Replaced,
            CloseReason::RateLimited,
            CloseReason::TemporarilyBanned { code: 101, until: None },
            CloseReason::Requested,
            CloseReason::PairingEnded,
        ];
        let closed = proptest::sample::select(reasons)
            .prop_map(|reason| Input::Closed { reason, backoff: Duration::from_secs(3) });
        prop_oneof![
            Just(Input::Start),
            Just(Input::Stop),
            Just(Input::Pair),
            Just(Input::Granted),
            Just(Input::Paired),
            Just(Input::Online),
            Just(Input::Alive),
            Just(Input::Tick),
            Just(Input::WayClosed { until: Timestamp(NOW.0 + 60_000) }),
            Just(Input::WayOpen),
            closed,
        ]
    }

    proptest! {
        /// Whatever comes in whatever order: parked and logged-out numbers never connect early, and a session is
        /// opened only from a state that has none.
        #[test]
        fn nothing_connects_that_must_not(steps in proptest::collection::vec((inputs(), 0u64..400_000), 0..60)) {
            let mut life = Life::new(NOW);
            let mut now = NOW;
            let mut open = false;
            for (input, wait) in steps {
                now = Timestamp(now.0 + wait);
                let before = life.clone();
                open &= !matches!(input, Input::Closed { .. });
                let effects = life.step(input.clone(), now);
                let opens = effects.iter().any(|effect| matches!(effect, Effect::Open(_)));
                let asks = effects.contains(&Effect::AskGate);
                if let State::Parked { until } = before.state
                    && now < until && matches!(input, Input::Tick | Input::WayOpen)
                {
                    prop_assert!(!asks && !opens);
                }
                if before.state == State::LoggedOut && input != Input::Pair {
                    prop_assert!(!asks && !opens);
                }
                if opens {
                    prop_assert!(matches!(before.state, State::AwaitingGate | State::Linking));
                    prop_assert!(input == Input::Granted);
                    prop_assert!(!open, "a second session is opened");
                    open = true;
                }
                if life.desired == Desired::Stopped {
                    prop_assert!(!asks && !opens);
                }
            }
        }
    }

    #[test]
    fn what_comes_too_late_opens_nothing() {
        let mut life = Life::new(NOW);
        life.step(Input::Pair, NOW);
        life.step(Input::Stop, NOW);
        assert_eq!(life.step(Input::Granted, NOW), [Effect::LeaveGate], "stopped while its turn was on the way");
        life.step(Input::Start, NOW);
        life.step(Input::Pair, NOW);
        assert_eq!(life.step(Input::Granted, NOW), [Effect::Open(Purpose::Pair)]);
        assert_eq!(life.step(Input::Granted, NOW), [Effect::LeaveGate], "both turns came, one session is open");
        let mut life = online();
        life.step(Input::Closed { reason: CloseReason::LoggedOut { code: 401 }, backoff: BACKOFF }, NOW);
        let late = Input::Closed { reason: CloseReason::Recycled, backoff: BACKOFF };
        assert_eq!(life.step(late, NOW), [], "there was nothing left to end");
        assert_eq!(life.state, State::LoggedOut);
    }

    #[test]
    fn a_revived_life_never_claims_a_connection() {
        for state in [State::Online, State::Connecting, State::AwaitingGate] {
            let mut life = online();
            life.state = state;
            assert_eq!(life.revived(true, NOW).state, State::Offline { retry_at: NOW });
        }
        let mut parked = online();
        parked.state = State::Parked { until: Timestamp(NOW.0 + 5) };
        assert_eq!(parked.clone().revived(true, NOW).state, parked.state);
    }
}
