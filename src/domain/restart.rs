//! The restart budget of one number: how many crashes it may have before it is set aside, and for how long.

use std::collections::VecDeque;
use std::time::Duration;

use super::time::Timestamp;

/// Crashes within [`WINDOW`] that lead to quarantine.
pub const CRASHES_MAX: usize = 5;
/// The window crashes are counted in.
pub const WINDOW: Duration = Duration::from_secs(60);
/// First quarantine; doubles with each one that did not help.
pub const QUARANTINE_MIN: Duration = Duration::from_secs(300);
/// Longest quarantine.
pub const QUARANTINE_MAX: Duration = Duration::from_secs(3600);

/// What to do about a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start again after the restart backoff.
    Restart,
    /// Leave it down for this long, then try once.
    Quarantine(Duration),
}

/// Crashes of one number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RestartBudget {
    crashes: VecDeque<Timestamp>,
    quarantines: u32,
}

impl RestartBudget {
    /// Counts a crash.
    pub fn record(&mut self, now: Timestamp) -> Verdict {
        while self.crashes.front().is_some_and(|first| now.since(*first) >= WINDOW) {
            self.crashes.pop_front();
        }
        self.crashes.push_back(now);
        // The one try after a quarantine has no budget of its own: it works or it goes back.
        let half_open = self.quarantines > 0 && self.crashes.len() == 1;
        if self.crashes.len() < CRASHES_MAX && !half_open {
            return Verdict::Restart;
        }
        self.crashes.clear();
        let pause = QUARANTINE_MIN.saturating_mul(1 << self.quarantines.min(10)).min(QUARANTINE_MAX);
        self.quarantines = self.quarantines.saturating_add(1);
        Verdict::Quarantine(pause)
    }

    /// The number ran well for a whole window, or an operator says to forget.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_in_a_minute_and_then_ever_longer() {
        let mut budget = RestartBudget::default();
        let mut now = Timestamp(1_000_000);
        for _ in 0..4 {
            assert_eq!(budget.record(now), Verdict::Restart);
            now = now.after(Duration::from_secs(2));
        }
        assert_eq!(budget.record(now), Verdict::Quarantine(QUARANTINE_MIN));
        now = now.after(QUARANTINE_MIN);
        assert_eq!(budget.record(now), Verdict::Quarantine(QUARANTINE_MIN * 2));
        for _ in 0..10 {
            now = now.after(QUARANTINE_MAX);
            budget.record(now);
        }
        assert_eq!(budget.record(now.after(QUARANTINE_MAX)), Verdict::Quarantine(QUARANTINE_MAX));
        budget.reset();
        assert_eq!(budget.record(now), Verdict::Restart);
    }

    #[test]
    fn rare_crashes_never_add_up() {
        let mut budget = RestartBudget::default();
        let mut now = Timestamp(0);
        for _ in 0..100 {
            now = now.after(Duration::from_secs(20));
            assert_eq!(budget.record(now), Verdict::Restart);
        }
    }
}
