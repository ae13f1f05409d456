//! The only file that reads the system's clock. Everybody else is handed a [`Clock`], so that tests own time.

#[cfg(feature = "sandbox")]
use std::sync::atomic::AtomicI64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::domain::time::Timestamp;
use crate::telemetry::metrics;

/// A source of the present.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Wall-clock time; may go either way by some minutes when the system's clock is set.
    fn now(&self) -> Timestamp;

    /// Time since some fixed moment; never goes back. For measuring durations.
    fn monotonic(&self) -> Duration;

    /// WhatsApp has said what time it is, just now.
    fn server_says(&self, server: Timestamp);

    /// Puts time forward: for tests of what happens after days.
    #[cfg(feature = "sandbox")]
    fn put_forward(&self, by: Duration);

    /// Sets the system's clock so far ahead, or back: for tests of what must not follow.
    #[cfg(feature = "sandbox")]
    fn step_system(&self, millis: i64);
}

/// How far the system's clock may be from ours and is still followed.
const FOLLOWED: Duration = Duration::from_mins(5);

/// Our own time: the system's, unless that jumps. It goes on with the machine's uptime, which nobody sets.
#[derive(Debug, Clone, Copy)]
struct Steady {
    /// The time at the last moment at which the system's clock was trusted.
    wall: Timestamp,
    /// The uptime then.
    uptime: Duration,
    trust: Trust,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    System,
    /// The system's clock has jumped, and WhatsApp's has not.
    Own,
}

fn apart(one: Timestamp, other: Timestamp) -> Duration {
    Duration::from_millis(one.0.abs_diff(other.0))
}

impl Steady {
    fn starting(system: Timestamp, uptime: Duration) -> Self {
        Self { wall: system, uptime, trust: Trust::System }
    }

    fn own(&self, uptime: Duration) -> Timestamp {
        self.wall.after(uptime.saturating_sub(self.uptime))
    }

    fn read(&mut self, system: Timestamp, uptime: Duration) -> Timestamp {
        let own = self.own(uptime);
        if apart(system, own) > FOLLOWED {
            self.trust = Trust::Own;
            return own;
        }
        *self = Self::starting(system, uptime);
        system
    }

    /// WhatsApp says what time it is: the system's clock is right after all, or was set right.
    fn confirm(&mut self, server: Timestamp, system: Timestamp, uptime: Duration) {
        if self.trust == Trust::Own && apart(server, system) <= FOLLOWED {
            *self = Self::starting(system, uptime);
        }
    }
}

/// The system's clock, as far as it can be believed: after a jump of more than five minutes time goes on as before, until
/// the clock is back or WhatsApp's agrees with it. Otherwise a wrong clock would end bans and delete what is to be kept.
#[derive(Debug)]
pub struct SystemClock {
    started: Instant,
    steady: Mutex<Steady>,
    /// How far tests have put time forward, in milliseconds.
    #[cfg(feature = "sandbox")]
    ahead: AtomicU64,
    /// How far tests have set the system's clock, in milliseconds.
    #[cfg(feature = "sandbox")]
    stepped: AtomicI64,
}

/// Time since the machine started, sleep included.
fn uptime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or_default(), u32::try_from(now.tv_nsec).unwrap_or_default())
}

/// What the system's clock says.
fn system() -> Timestamp {
    // A clock before 1970 reads as 1970: every comparison stays defined.
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            steady: Mutex::new(Steady::starting(system(), uptime())),
            #[cfg(feature = "sandbox")]
            ahead: AtomicU64::new(0),
            #[cfg(feature = "sandbox")]
            stepped: AtomicI64::new(0),
        }
    }

    fn system(&self) -> Timestamp {
        #[cfg(feature = "sandbox")]
        return Timestamp(system().0.saturating_add_signed(self.stepped.load(Ordering::SeqCst)));
        #[cfg(not(feature = "sandbox"))]
        system()
    }

    /// Looks at or changes our own time; says so when that changes whom it trusts.
    fn with<T>(&self, act: impl FnOnce(&mut Steady) -> T) -> T {
        let mut steady = self.steady.lock().unwrap_or_else(PoisonError::into_inner);
        let before = steady.trust;
        let answer = act(&mut steady);
        let after = steady.trust;
        drop(steady);
        match (before, after) {
            (Trust::System, Trust::Own) => {
                tracing::error!("the system's clock has jumped: time goes on as before until WhatsApp agrees with it");
                metrics::clock_trusted(false);
            }
            (Trust::Own, Trust::System) => {
                tracing::warn!("the system's clock is followed again");
                metrics::clock_trusted(true);
            }
            (Trust::System, Trust::System) | (Trust::Own, Trust::Own) => {}
        }
        answer
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let (system, uptime) = (self.system(), uptime());
        let now = self.with(|steady| steady.read(system, uptime));
        #[cfg(feature = "sandbox")]
        let now = now.after(Duration::from_millis(self.ahead.load(Ordering::SeqCst)));
        now
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }

    fn server_says(&self, server: Timestamp) {
        let (system, uptime) = (self.system(), uptime());
        self.with(|steady| steady.confirm(server, system, uptime));
    }

    #[cfg(feature = "sandbox")]
    fn put_forward(&self, by: Duration) {
        self.ahead.fetch_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }

    #[cfg(feature = "sandbox")]
    fn step_system(&self, millis: i64) {
        self.stepped.fetch_add(millis, Ordering::SeqCst);
    }
}

/// A clock that stands still until it is told to move. For tests and simulations.
#[derive(Debug)]
pub struct ManualClock {
    wall_millis: AtomicU64,
    monotonic_millis: AtomicU64,
}

impl ManualClock {
    /// A clock that shows `now`.
    #[must_use]
    pub fn at(now: Timestamp) -> Self {
        Self { wall_millis: AtomicU64::new(now.0), monotonic_millis: AtomicU64::new(0) }
    }

    /// Lets `by` pass.
    pub fn advance(&self, by: Duration) {
        let millis = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.wall_millis.fetch_add(millis, Ordering::SeqCst);
        self.monotonic_millis.fetch_add(millis, Ordering::SeqCst);
    }

    /// Sets the wall clock, as an administrator would: monotonic time does not move.
    pub fn set(&self, now: Timestamp) {
        self.wall_millis.store(now.0, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.wall_millis.load(Ordering::SeqCst))
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.monotonic_millis.load(Ordering::SeqCst))
    }

    fn server_says(&self, _server: Timestamp) {}

    #[cfg(feature = "sandbox")]
    fn step_system(&self, _millis: i64) {}

    #[cfg(feature = "sandbox")]
    fn put_forward(&self, by: Duration) {
        self.wall_millis.fetch_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setting_the_wall_clock_back_does_not_turn_back_durations() {
        let clock = ManualClock::at(Timestamp(10_000));
        clock.advance(Duration::from_secs(5));
        clock.set(Timestamp(1));
        assert_eq!((clock.now(), clock.monotonic()), (Timestamp(1), Duration::from_secs(5)));
    }

    const NOON: Timestamp = Timestamp(1_800_000_000_000);

    fn minutes(minutes: u64) -> Duration {
        Duration::from_mins(minutes)
    }

    #[test]
    fn small_steps_are_followed_and_large_ones_are_not() {
        let mut clock = Steady::starting(NOON, minutes(10));
        assert_eq!(clock.read(NOON.after(minutes(4)), minutes(10)), NOON.after(minutes(4)), "set forward a little");
        assert_eq!(clock.read(NOON, minutes(10)), NOON, "and back");
        assert_eq!(clock.read(NOON.after(minutes(60)), minutes(11)), NOON.after(minutes(1)), "an hour forward");
        assert_eq!(clock.trust, Trust::Own);
        assert_eq!(clock.read(NOON.after(minutes(90)), minutes(41)), NOON.after(minutes(31)), "it runs on");
        assert_eq!(clock.read(Timestamp(0), minutes(42)), NOON.after(minutes(32)), "back to the beginning");
        assert_eq!(clock.read(NOON.after(minutes(34)), minutes(43)), NOON.after(minutes(34)), "set right");
        assert_eq!(clock.trust, Trust::System);
    }

    #[test]
    fn a_step_that_whatsapp_confirms_is_followed() {
        let mut clock = Steady::starting(NOON, minutes(0));
        let system = NOON.after(minutes(120));
        clock.read(system, minutes(1));
        clock.confirm(NOON.after(minutes(1)), system, minutes(1));
        assert_eq!(clock.read(system, minutes(1)), NOON.after(minutes(1)), "WhatsApp's clock has not jumped");
        clock.confirm(NOON.after(minutes(118)), system, minutes(2));
        assert_eq!(clock.read(system, minutes(2)), system, "ours was wrong");
    }

    #[test]
    fn sleep_is_no_step() {
        let mut clock = Steady::starting(NOON, minutes(0));
        assert_eq!(clock.read(NOON.after(minutes(600)), minutes(600)), NOON.after(minutes(600)));
        assert_eq!(clock.trust, Trust::System);
    }

    #[test]
    fn the_system_clock_is_past_2025_and_moves() {
        let clock = SystemClock::new();
        assert!(clock.now() > Timestamp(1_735_689_600_000));
        let before = clock.monotonic();
        assert!(clock.monotonic() >= before);
    }
}
