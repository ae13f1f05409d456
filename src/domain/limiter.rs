//! When a number may send: a generic cell rate algorithm (GCRA) per number and one per chat, on the wall clock.
//! It answers with a moment, it never waits; taking and asking are one step, so nothing can overtake.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::id::ChatNo;
use super::time::Timestamp;

/// Chats whose pace is remembered at once; those at rest are forgotten first.
const CHATS_MAX: usize = 1024;

/// A pace: one every `interval`, with `burst` allowed at once after a rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// Time between two messages in the long run.
    pub interval: Duration,
    /// How many may go at once after a rest; at least 1.
    pub burst: u32,
}

/// What a number is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// All messages of the number.
    pub number: Pace,
    /// Messages within one chat.
    pub chat: Pace,
}

impl Limits {
    /// Conservative defaults for linked numbers: 1 message a second (burst 5), within one chat 1 every 6 s (burst 5).
    pub const LINKED: Self = Self {
        number: Pace { interval: Duration::from_secs(1), burst: 5 },
        chat: Pace { interval: Duration::from_secs(6), burst: 5 },
    };
}

/// Which layer said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitLayer {
    /// The number's own rate.
    NumberRate,
    /// The rate within the chat.
    PairRate,
}

/// Not now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotBefore {
    /// The first moment at which it would be granted if nothing else were sent.
    pub at: Timestamp,
    /// Who said no.
    pub layer: LimitLayer,
}

/// Theoretical arrival time: the moment the bucket would be at rest, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Bucket {
    rest_at: u64,
}

impl Bucket {
    fn millis(duration: Duration) -> u64 {
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
    }

    fn window(pace: Pace) -> u64 {
        Self::millis(pace.interval).saturating_mul(u64::from(pace.burst.max(1)))
    }

    /// A stored time further ahead than a full bucket can only come from a clock that was set back.
    fn settled(self, pace: Pace, now: Timestamp) -> u64 {
        self.rest_at.min(now.0.saturating_add(Self::window(pace))).max(now.0)
    }

    fn free_at(self, pace: Pace, now: Timestamp) -> Timestamp {
        let next = self.settled(pace, now).saturating_add(Self::millis(pace.interval));
        Timestamp(next.saturating_sub(Self::window(pace)).max(now.0))
    }

    fn take(&mut self, pace: Pace, now: Timestamp) {
        self.rest_at = self.settled(pace, now).saturating_add(Self::millis(pace.interval));
    }

    fn available(self, pace: Pace, now: Timestamp) -> u32 {
        let used = self.settled(pace, now).saturating_sub(now.0);
        let interval = Self::millis(pace.interval).max(1);
        let free = Self::window(pace).saturating_sub(used) / interval;
        u32::try_from(free).unwrap_or(u32::MAX)
    }
}

/// Shortest and longest time new chats are held, whatever WhatsApp says.
const HOLD_MIN: Duration = Duration::from_secs(60);
const HOLD_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long they are held when WhatsApp does not say until when, or says that the cap of a day is reached.
pub const HOLD_DEFAULT: Duration = Duration::from_secs(24 * 3600);
/// How long they are held when WhatsApp refused one and says that there is no lock.
pub const HOLD_UNEXPLAINED: Duration = Duration::from_secs(3600);

/// Why new chats are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockReason {
    /// The account is locked for writing to people who never wrote to it (463).
    ReachOutLock,
    /// It opened as many chats as it may for now (475).
    NewChatCap,
}

impl LockReason {
    /// The public name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ReachOutLock => "REACH_OUT_LOCK",
            Self::NewChatCap => "NEW_CHAT_CAP",
        }
    }
}

/// What WhatsApp answers when it is asked for the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockAnswer {
    /// It ends then.
    Until(Timestamp),
    /// There is a lock, and nobody says until when.
    Open,
    /// There is none.
    None,
}

/// Whether the number may write to people who never wrote to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum NewChats {
    /// It may.
    #[default]
    Allowed,
    /// It may not; such sends stay in the queue.
    Held {
        /// Before this moment.
        until: Timestamp,
        /// Why.
        reason: LockReason,
    },
    /// The hold is over. One such send at a time goes, until WhatsApp accepts one.
    Probing,
}

impl NewChats {
    /// Held from now on because WhatsApp refused one; an earlier hold is not made shorter. A refusal for the reason for
    /// which they are held is of a message that had left before, or of a chat that goes on: it says nothing new.
    #[must_use]
    pub fn refused(self, reason: LockReason, now: Timestamp) -> Self {
        let until = now.after(HOLD_DEFAULT);
        match self {
            Self::Held { until: before, reason: known } if before > until || (known == reason && before > now) => self,
            _ => Self::Held { until, reason },
        }
    }

    /// Held as long as WhatsApp says, if it is held for its lock.
    #[must_use]
    pub fn explained(self, answer: LockAnswer, now: Timestamp) -> Self {
        let Self::Held { reason: LockReason::ReachOutLock, .. } = self else { return self };
        let until = match answer {
            LockAnswer::Until(at) => at.clamp(now.after(HOLD_MIN), now.after(HOLD_MAX)),
            LockAnswer::Open => now.after(HOLD_DEFAULT),
            LockAnswer::None => now.after(HOLD_UNEXPLAINED),
        };
        Self::Held { until, reason: LockReason::ReachOutLock }
    }

    /// As it is at `now`. A clock that was set back far does not prolong a hold for ever.
    #[must_use]
    pub fn at(self, now: Timestamp) -> Self {
        match self {
            Self::Held { until, .. } if until <= now || until > now.after(2 * HOLD_MAX) => Self::Probing,
            other => other,
        }
    }
}

/// What is stored of the limiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LimiterRecord {
    /// Whether new chats may be opened.
    #[serde(default)]
    pub new_chats: NewChats,
}

/// The limiter of one number.
#[derive(Debug, Clone)]
pub struct Limiter {
    limits: Limits,
    number: Bucket,
    chats: HashMap<ChatNo, Bucket>,
}

impl Limiter {
    /// At rest.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, number: Bucket::default(), chats: HashMap::new() }
    }

    /// Takes one message to `chat`, if every layer allows it now.
    ///
    /// # Errors
    /// The first layer that refuses, and when to ask again. Nothing is taken then.
    pub fn try_take(&mut self, chat: ChatNo, now: Timestamp) -> Result<(), NotBefore> {
        self.peek(chat, now)?;
        self.number.take(self.limits.number, now);
        if self.chats.len() >= CHATS_MAX && !self.chats.contains_key(&chat) {
            self.forget_resting(now);
        }
        self.chats.entry(chat).or_default().take(self.limits.chat, now);
        Ok(())
    }

    /// Whether a message to `chat` would be granted now.
    ///
    /// # Errors
    /// As [`Self::try_take`].
    pub fn peek(&self, chat: ChatNo, now: Timestamp) -> Result<(), NotBefore> {
        let number_at = self.number.free_at(self.limits.number, now);
        if number_at > now {
            return Err(NotBefore { at: number_at, layer: LimitLayer::NumberRate });
        }
        let bucket = self.chats.get(&chat).copied().unwrap_or_default();
        let chat_at = bucket.free_at(self.limits.chat, now);
        if chat_at > now {
            return Err(NotBefore { at: chat_at, layer: LimitLayer::PairRate });
        }
        Ok(())
    }

    /// Messages the number could send at once to chats at rest.
    #[must_use]
    pub fn available(&self, now: Timestamp) -> u32 {
        self.number.available(self.limits.number, now)
    }

    /// When the number's own rate lets the `position`-th message from now go (0 = the next one).
    #[must_use]
    pub fn predicted(&self, position: usize, now: Timestamp) -> Timestamp {
        let pace = self.limits.number;
        let ahead = u64::try_from(position).unwrap_or(u64::MAX).saturating_add(1);
        let rest_at =
            self.number.settled(pace, now).saturating_add(Bucket::millis(pace.interval).saturating_mul(ahead));
        Timestamp(rest_at.saturating_sub(Bucket::window(pace)).max(now.0))
    }

    /// Chats at rest carry no information. If all are busy the one nearest to rest goes: it may then send early by
    /// less than one burst, which is harmless beside unbounded memory.
    fn forget_resting(&mut self, now: Timestamp) {
        self.chats.retain(|_, bucket| bucket.rest_at > now.0);
        if self.chats.len() >= CHATS_MAX {
            let nearest = self.chats.iter().min_by_key(|(_, bucket)| bucket.rest_at).map(|(chat, _)| *chat);
            if let Some(chat) = nearest {
                self.chats.remove(&chat);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(interval_ms: u64, burst: u32) -> Limits {
        let pace = Pace { interval: Duration::from_millis(interval_ms), burst };
        Limits { number: pace, chat: Pace { interval: Duration::ZERO, burst: 1 } }
    }

    proptest! {
        #[test]
        fn no_window_holds_more_than_burst_plus_rate(
            interval in 1u64..500, burst in 1u32..8, waits in proptest::collection::vec(0u64..400, 1..120),
        ) {
            let mut limiter = Limiter::new(limits(interval, burst));
            let mut now = Timestamp(1_000_000);
            let mut granted = Vec::new();
            for wait in waits {
                now = Timestamp(now.0 + wait);
                if limiter.try_take(ChatNo(1), now).is_ok() {
                    granted.push(now.0);
                }
            }
            for (index, from) in granted.iter().enumerate() {
                for (count, to) in granted[index..].iter().enumerate() {
                    let allowed = u64::from(burst) + (to - from) / interval;
                    prop_assert!((count as u64) < allowed, "{} in {} ms", count + 1, to - from);
                }
            }
        }

        #[test]
        fn the_moment_it_names_is_exact(interval in 2u64..500, burst in 1u32..8) {
            let mut limiter = Limiter::new(limits(interval, burst));
            let now = Timestamp(50_000);
            while limiter.try_take(ChatNo(1), now).is_ok() {}
            let not_before = limiter.peek(ChatNo(1), now).unwrap_err();
            prop_assert!(limiter.peek(ChatNo(1), Timestamp(not_before.at.0 - 1)).is_err());
            prop_assert!(limiter.peek(ChatNo(1), not_before.at).is_ok());
        }

        #[test]
        fn a_clock_set_back_blocks_for_one_window_at_most(back in 0u64..10_000_000) {
            let mut limiter = Limiter::new(limits(1000, 5));
            let now = Timestamp(100_000_000);
            while limiter.try_take(ChatNo(1), now).is_ok() {}
            let earlier = Timestamp(now.0 - back);
            if let Err(not_before) = limiter.peek(ChatNo(1), earlier) {
                prop_assert!(not_before.at.0 - earlier.0 <= 5_000);
            }
        }
    }

    #[test]
    fn the_prediction_is_what_happens() {
        let mut limiter = Limiter::new(limits(1000, 3));
        let mut now = Timestamp(1_000_000);
        let predicted: Vec<_> = (0..8).map(|position| limiter.predicted(position, now)).collect();
        for expected in predicted {
            while limiter.try_take(ChatNo(1), now).is_err() {
                now = Timestamp(now.0 + 1);
            }
            assert_eq!(now, expected);
        }
    }

    #[test]
    fn one_chat_waits_and_another_does_not() {
        let mut limiter = Limiter::new(Limits {
            number: Pace { interval: Duration::from_millis(1), burst: 100 },
            chat: Pace { interval: Duration::from_secs(6), burst: 1 },
        });
        let now = Timestamp(1_000_000);
        assert!(limiter.try_take(ChatNo(1), now).is_ok());
        let refused = limiter.try_take(ChatNo(1), now).unwrap_err();
        assert_eq!((refused.layer, refused.at), (LimitLayer::PairRate, Timestamp(1_006_000)));
        assert!(limiter.try_take(ChatNo(2), now).is_ok());
    }

    #[test]
    fn a_hold_ends_when_whatsapp_says_within_bounds() {
        let now = Timestamp(1_000_000_000_000);
        let held = NewChats::Allowed.refused(LockReason::ReachOutLock, now);
        let until = |new_chats: NewChats| match new_chats {
            NewChats::Held { until, .. } => until,
            other => panic!("{other:?}"),
        };
        assert_eq!(until(held), now.after(HOLD_DEFAULT));
        let hour = now.after(Duration::from_secs(3600));
        assert_eq!(until(held.explained(LockAnswer::Until(hour), now)), hour);
        assert_eq!(until(held.explained(LockAnswer::Until(Timestamp(5)), now)), now.after(HOLD_MIN));
        assert_eq!(until(held.explained(LockAnswer::Until(Timestamp(u64::MAX)), now)), now.after(HOLD_MAX));
        assert_eq!(until(held.explained(LockAnswer::None, now)), now.after(HOLD_UNEXPLAINED));
        let long = held.explained(LockAnswer::Until(now.after(HOLD_MAX)), now);
        assert_eq!(long.refused(LockReason::NewChatCap, hour), long, "never made shorter by a refusal");
        let known = held.explained(LockAnswer::Until(hour), now);
        assert_eq!(known.refused(LockReason::ReachOutLock, Timestamp(hour.0 - 1)), known, "what it said still holds");
        assert_eq!(until(known.refused(LockReason::ReachOutLock, hour)), hour.after(HOLD_DEFAULT));
        assert_eq!(until(known.refused(LockReason::NewChatCap, now)), now.after(HOLD_DEFAULT));
        let cap = NewChats::Probing.refused(LockReason::NewChatCap, now);
        assert_eq!(cap.explained(LockAnswer::None, now), cap, "the lock says nothing of the cap");
        assert_eq!(held.at(now.after(HOLD_DEFAULT)), NewChats::Probing);
        assert_eq!(held.at(Timestamp(now.0 + 5)), held);
        assert_eq!(held.at(Timestamp(0)), NewChats::Probing, "a clock set back does not hold for years");
        assert_eq!(NewChats::Allowed.at(now), NewChats::Allowed);
    }

    #[test]
    fn memory_is_bounded() {
        let mut limiter = Limiter::new(Limits {
            number: Pace { interval: Duration::ZERO, burst: 1 },
            chat: Pace { interval: Duration::from_secs(600), burst: 1 },
        });
        for chat in 0..5000 {
            let _ = limiter.try_take(ChatNo(chat), Timestamp(1_000_000));
        }
        assert!(limiter.chats.len() <= CHATS_MAX);
    }
}
