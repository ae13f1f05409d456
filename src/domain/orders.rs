//! What a number's owner orders about its sending: limits of its own, and a pause.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::limiter::{Limits, NewRecipients, Pace};
use super::time::Timestamp;

/// Bounds of what may be set, the same as of the daemon's own settings.
pub const MESSAGES_PER_SECOND_MIN: f64 = 0.001;
/// Most messages per second.
pub const MESSAGES_PER_SECOND_MAX: f64 = 1000.0;
/// Largest burst, of the number and within a chat.
pub const BURST_MAX: u32 = 1000;
/// Longest time between two messages of a chat.
pub const CHAT_SECONDS_MAX: f64 = 86_400.0;
/// How far ahead a pause may end.
pub const PAUSE_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// Limits of a number's own; what is not set is as the daemon is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OwnLimits {
    /// Time between two messages in the long run.
    #[serde(default)]
    pub interval: Option<Duration>,
    /// How many may go at once after a rest.
    #[serde(default)]
    pub burst: Option<u32>,
    /// Time between two messages of one chat in the long run.
    #[serde(default)]
    pub chat_interval: Option<Duration>,
    /// How many may go at once within one chat after a rest.
    #[serde(default)]
    pub chat_burst: Option<u32>,
    /// People who never wrote to it.
    #[serde(default)]
    pub new_recipients: Option<NewRecipients>,
}

impl OwnLimits {
    /// What holds for the number.
    #[must_use]
    pub fn over(&self, default: Limits) -> Limits {
        let pace = |interval: Option<Duration>, burst: Option<u32>, default: Pace| Pace {
            interval: interval.unwrap_or(default.interval),
            burst: burst.unwrap_or(default.burst),
        };
        Limits {
            number: pace(self.interval, self.burst, default.number),
            chat: pace(self.chat_interval, self.chat_burst, default.chat),
            new_recipients: self.new_recipients.unwrap_or(default.new_recipients),
        }
    }
}

/// Nothing is sent for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Since when.
    pub since: Timestamp,
    /// Until when; none: until it is told to go on.
    #[serde(default)]
    pub until: Option<Timestamp>,
}

impl Pause {
    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

/// All of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SendingOrders {
    /// Its own limits.
    #[serde(default)]
    pub limits: OwnLimits,
    /// The last pause that was ordered and not taken back.
    #[serde(default)]
    pub pause: Option<Pause>,
}

impl SendingOrders {
    /// The pause that holds at this moment.
    #[must_use]
    pub fn paused(&self, now: Timestamp) -> Option<Pause> {
        self.pause.filter(|pause| !pause.is_over(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_set_is_the_default_and_old_records_set_nothing() {
        let none: SendingOrders = serde_json::from_str("{}").unwrap();
        assert_eq!(none.limits.over(Limits::LINKED), Limits::LINKED);
        let own = OwnLimits { burst: Some(9), new_recipients: Some(NewRecipients::Unlimited), ..OwnLimits::default() };
        let limits = own.over(Limits::LINKED);
        assert_eq!(limits.number, Pace { burst: 9, ..Limits::LINKED.number });
        assert_eq!((limits.chat, limits.new_recipients), (Limits::LINKED.chat, NewRecipients::Unlimited));
    }

    #[test]
    fn a_pause_ends_when_it_says() {
        let orders = |until| SendingOrders { pause: Some(Pause { since: Timestamp(1), until }), ..Default::default() };
        assert!(orders(None).paused(Timestamp(u64::MAX)).is_some());
        assert!(orders(Some(Timestamp(9))).paused(Timestamp(8)).is_some());
        assert!(orders(Some(Timestamp(9))).paused(Timestamp(9)).is_none());
    }
}
