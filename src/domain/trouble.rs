//! What can be wrong with a connection that stands.

use serde::{Deserialize, Serialize};

use super::time::Timestamp;

/// One thing that is wrong while messages still go. The order is that in which they are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Trouble {
    /// WhatsApp has no keys left to give to people who write for the first time, and ours do not reach it.
    PrekeysMissing,
    /// Many of the messages that arrive cannot be decrypted.
    Undecryptable,
    /// WhatsApp refuses to give the account's settings. Linking again heals it.
    AppStateRefused,
}

impl Trouble {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::PrekeysMissing, Self::Undecryptable, Self::AppStateRefused];

    /// Stable code for the API, events, metrics and logs.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::PrekeysMissing => "PREKEYS_MISSING",
            Self::Undecryptable => "UNDECRYPTABLE_MESSAGES",
            Self::AppStateRefused => "APP_STATE_REFUSED",
        }
    }
}

/// Length of one window of [`Legibility`], in milliseconds.
const WINDOW_MILLIS: u64 = 10 * 60 * 1000;
/// So many messages of a window must be unreadable at least before anybody is troubled.
const UNREADABLE_MIN: u32 = 5;
/// And more than one in so many.
const UNREADABLE_ONE_IN: u32 = 50;

/// How many of the messages that arrive can be read, over this window of ten minutes and the one before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Legibility {
    window: u64,
    now: Counted,
    before: Counted,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counted {
    arrived: u32,
    unreadable: u32,
}

impl Legibility {
    fn turn(&mut self, now: Timestamp) {
        let window = now.0 / WINDOW_MILLIS;
        if window != self.window {
            self.before = if window == self.window + 1 { self.now } else { Counted::default() };
            self.now = Counted::default();
            self.window = window;
        }
    }

    /// A message arrived and was read.
    pub fn read(&mut self, now: Timestamp) {
        self.turn(now);
        self.now.arrived = self.now.arrived.saturating_add(1);
    }

    /// A message arrived and could not be read.
    pub fn unreadable(&mut self, now: Timestamp) {
        self.read(now);
        self.now.unreadable = self.now.unreadable.saturating_add(1);
    }

    /// Whether too many cannot be read.
    #[must_use]
    pub fn is_bad(mut self, now: Timestamp) -> bool {
        self.turn(now);
        let unreadable = self.now.unreadable.saturating_add(self.before.unreadable);
        let arrived = self.now.arrived.saturating_add(self.before.arrived);
        unreadable >= UNREADABLE_MIN && unreadable.saturating_mul(UNREADABLE_ONE_IN) > arrived
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(5 * WINDOW_MILLIS);

    #[test]
    fn a_few_bad_ones_among_many_are_normal_and_a_share_is_not() {
        let mut legibility = Legibility::default();
        for _ in 0..UNREADABLE_MIN {
            assert!(!legibility.is_bad(NOW));
            legibility.unreadable(NOW);
        }
        assert!(legibility.is_bad(NOW));
        for _ in 0..300 {
            legibility.read(NOW);
        }
        assert!(!legibility.is_bad(NOW), "less than one in fifty");
    }

    #[test]
    fn it_is_forgotten_after_two_windows() {
        let mut legibility = Legibility::default();
        for _ in 0..50 {
            legibility.unreadable(NOW);
        }
        assert!(legibility.is_bad(Timestamp(NOW.0 + WINDOW_MILLIS)));
        assert!(!legibility.is_bad(Timestamp(NOW.0 + 2 * WINDOW_MILLIS)));
    }
}
