//! The only file that reads the system's clock. Everybody else is handed a [`Clock`], so that tests own time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::domain::time::Timestamp;

/// A source of the present.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Wall-clock time; may jump either way when the system's clock is set.
    fn now(&self) -> Timestamp;

    /// Time since some fixed moment; never goes back. For measuring durations.
    fn monotonic(&self) -> Duration;

    /// Puts the wall clock forward, as an administrator would: for tests of what happens after days.
    #[cfg(feature = "sandbox")]
    fn put_forward(&self, by: Duration);
}

/// The system's clock.
#[derive(Debug)]
pub struct SystemClock {
    started: Instant,
    /// How far tests have put the wall clock forward, in milliseconds.
    #[cfg(feature = "sandbox")]
    ahead: AtomicU64,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            #[cfg(feature = "sandbox")]
            ahead: AtomicU64::new(0),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        // A clock before 1970 reads as 1970: every comparison stays defined.
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = Timestamp(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX));
        #[cfg(feature = "sandbox")]
        let now = now.after(Duration::from_millis(self.ahead.load(Ordering::SeqCst)));
        now
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }

    #[cfg(feature = "sandbox")]
    fn put_forward(&self, by: Duration) {
        self.ahead.fetch_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX), Ordering::SeqCst);
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

    #[test]
    fn the_system_clock_is_past_2025_and_moves() {
        let clock = SystemClock::new();
        assert!(clock.now() > Timestamp(1_735_689_600_000));
        let before = clock.monotonic();
        assert!(clock.monotonic() >= before);
    }
}
