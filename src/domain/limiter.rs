//! When a number may send: a generic cell rate algorithm (GCRA) per number and one per chat, and a budget of people it
//! writes to first, all on the wall clock. It answers with a moment, it never waits; taking and asking are one step, so
//! nothing can overtake. What it knows is small enough to be written with every attempt: a restart gives nothing anew.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::id::ChatNo;
use super::outbox::Standing;
use super::time::Timestamp;

/// Chats whose pace is remembered at once, beside those that count as new recipients; those at rest are forgotten first.
pub const CHATS_MAX: usize = 1024;
/// With fewer chats nobody looks which are at rest.
const CHATS_FEW: usize = 64;
/// Largest budget of new recipients that is counted.
pub const NEW_RECIPIENTS_MAX: u32 = 1000;
/// The time over which new recipients are counted.
pub const DAY: Duration = Duration::from_secs(24 * 3600);
/// How many new recipients a number may write to in 24 hours, by the days since it was first online. The steps follow
/// what operators of linked devices report; WhatsApp publishes nothing.
pub const WARM_UP: [(u32, u32); 5] = [(28, 300), (14, 160), (7, 80), (3, 40), (0, 20)];

/// A pace: one every `interval`, with `burst` allowed at once after a rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// Time between two messages in the long run.
    pub interval: Duration,
    /// How many may go at once after a rest; at least 1.
    pub burst: u32,
}

/// How many people who never wrote to the number it may write to within 24 hours. One counts once in that time, however
/// many messages follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum NewRecipients {
    /// By [`WARM_UP`].
    #[default]
    WarmUp,
    /// So many.
    PerDay(u32),
    /// Nobody counts.
    Unlimited,
}

impl NewRecipients {
    /// The budget of a number that was first online at `warm_since`; none: it is not limited.
    #[must_use]
    pub fn per_day(self, warm_since: Option<Timestamp>, now: Timestamp) -> Option<u32> {
        match self {
            Self::Unlimited => None,
            Self::PerDay(budget) => Some(budget.min(NEW_RECIPIENTS_MAX)),
            Self::WarmUp => {
                let age = warm_since.map_or(Duration::ZERO, |since| now.since(since));
                WARM_UP.iter().find(|(days, _)| age >= DAY * *days).map(|(_, budget)| *budget)
            }
        }
    }
}

/// What a number is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// All messages of the number.
    pub number: Pace,
    /// Messages within one chat.
    pub chat: Pace,
    /// People who never wrote to it.
    pub new_recipients: NewRecipients,
}

impl Limits {
    /// Conservative defaults for linked numbers: 1 message a second (burst 5), within one chat 1 every 6 s (burst 5), new
    /// recipients by the warm-up.
    pub const LINKED: Self = Self {
        number: Pace { interval: Duration::from_secs(1), burst: 5 },
        chat: Pace { interval: Duration::from_secs(6), burst: 5 },
        new_recipients: NewRecipients::WarmUp,
    };
}

/// Which layer said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitLayer {
    /// The number's own rate.
    NumberRate,
    /// The rate within the chat.
    PairRate,
    /// The budget of new recipients.
    NewRecipients,
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

    /// When the `position`-th message from now may go (0 = the next one).
    fn nth_at(self, pace: Pace, position: u64, now: Timestamp) -> Timestamp {
        let rest_at = self
            .settled(pace, now)
            .saturating_add(Self::millis(pace.interval).saturating_mul(position.saturating_add(1)));
        Timestamp(rest_at.saturating_sub(Self::window(pace)).max(now.0))
    }

    /// How many may go until `then`, that moment included.
    fn count_until(self, pace: Pace, now: Timestamp, then: Timestamp) -> u64 {
        let Some(interval) = Some(Self::millis(pace.interval)).filter(|interval| *interval > 0) else {
            return u64::MAX;
        };
        let room = then.0.max(now.0).saturating_add(Self::window(pace)).saturating_sub(self.settled(pace, now));
        room / interval
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

/// What is stored of the limiter, beside its chats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LimiterRecord {
    /// Whether new chats may be opened.
    #[serde(default)]
    pub new_chats: NewChats,
    /// When the number's own rate is at rest.
    #[serde(default)]
    pub rest_at: Timestamp,
    /// When the number was first online; unset in records of earlier versions.
    #[serde(default)]
    pub warm_since: Option<Timestamp>,
}

/// What is stored of a chat that was written to lately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ChatPace {
    /// When its rate is at rest.
    pub rest_at: Timestamp,
    /// When it was written to as that of a new recipient, if that still counts.
    #[serde(default)]
    pub opened_at: Option<Timestamp>,
}

impl ChatPace {
    fn bucket(self) -> Bucket {
        Bucket { rest_at: self.rest_at.0 }
    }
}

/// The number's own rate and where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meter {
    pace: Pace,
    bucket: Bucket,
}

impl Meter {
    /// Messages that may go at once.
    #[must_use]
    pub fn available(&self, now: Timestamp) -> u32 {
        self.bucket.available(self.pace, now)
    }

    /// When the next one may go.
    #[must_use]
    pub fn free_at(&self, now: Timestamp) -> Timestamp {
        self.bucket.free_at(self.pace, now)
    }

    /// Messages a second in the long run.
    #[must_use]
    pub fn rate(&self) -> f64 {
        1.0 / self.pace.interval.as_secs_f64().max(0.001)
    }
}

/// What a grant changed; to be written with the attempt it was given for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The chat as it is now.
    pub chat: ChatPace,
    /// Chats that carry no information any more.
    pub forgotten: Vec<ChatNo>,
}

/// The limiter of one number.
#[derive(Debug, Clone)]
pub struct Limiter {
    limits: Limits,
    number: Bucket,
    chats: HashMap<ChatNo, ChatPace>,
    /// Chats of new recipients that count, oldest first.
    openings: BTreeSet<(Timestamp, ChatNo)>,
    warm_since: Option<Timestamp>,
    /// With so many chats it is time to look which are at rest.
    look_at: usize,
}

impl Limiter {
    /// At rest.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self::restore(limits, &LimiterRecord::default(), [])
    }

    /// As it was stored.
    #[must_use]
    pub fn restore(
        limits: Limits,
        record: &LimiterRecord,
        chats: impl IntoIterator<Item = (ChatNo, ChatPace)>,
    ) -> Self {
        let chats: HashMap<_, _> = chats.into_iter().collect();
        let openings = chats.iter().filter_map(|(chat, pace)| pace.opened_at.map(|at| (at, *chat))).collect();
        let number = Bucket { rest_at: record.rest_at.0 };
        let look_at = chats.len().max(CHATS_FEW);
        Self { limits, number, chats, openings, warm_since: record.warm_since, look_at }
    }

    /// Chats whose pace is remembered.
    #[must_use]
    pub fn paced_chats(&self) -> usize {
        self.chats.len()
    }

    /// What is stored of it; `new_chats` is kept beside it.
    #[must_use]
    pub fn record(&self, new_chats: NewChats) -> LimiterRecord {
        LimiterRecord { new_chats, rest_at: Timestamp(self.number.rest_at), warm_since: self.warm_since }
    }

    /// What it goes by.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Other limits from now on. What was sent still counts.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// The number is online. Gives whether that was news.
    pub fn warm(&mut self, now: Timestamp) -> bool {
        let first = self.warm_since.is_none();
        self.warm_since.get_or_insert(now);
        first
    }

    /// New recipients of more than a day ago do not count any more. Some that lie ahead were counted by a clock that was
    /// set back: they count from now on.
    pub fn age(&mut self, now: Timestamp) {
        while let Some((at, chat)) = self.openings.first().copied().filter(|(at, _)| at.after(DAY) <= now) {
            self.openings.remove(&(at, chat));
            if let Some(pace) = self.chats.get_mut(&chat) {
                pace.opened_at = None;
            }
        }
        while let Some((at, chat)) = self.openings.last().copied().filter(|(at, _)| *at > now) {
            self.openings.remove(&(at, chat));
            self.openings.insert((now, chat));
            if let Some(pace) = self.chats.get_mut(&chat) {
                pace.opened_at = Some(now);
            }
        }
    }

    /// Takes one message to `chat`, if every layer allows it now.
    ///
    /// # Errors
    /// The first layer that refuses, and when to ask again. Nothing is taken then.
    pub fn try_take(&mut self, chat: ChatNo, standing: Standing, now: Timestamp) -> Result<Grant, NotBefore> {
        self.age(now);
        self.peek(chat, standing, now)?;
        self.number.take(self.limits.number, now);
        let forgotten = if self.chats.len() >= self.look_at { self.forget_resting(chat, now) } else { Vec::new() };
        let opens = self.opens(chat, standing);
        let pace = self.chats.entry(chat).or_default();
        let mut bucket = pace.bucket();
        bucket.take(self.limits.chat, now);
        pace.rest_at = Timestamp(bucket.rest_at);
        if opens {
            pace.opened_at = Some(now);
            self.openings.insert((now, chat));
        }
        Ok(Grant { chat: *pace, forgotten })
    }

    /// Whether a message to `chat` would be granted now.
    ///
    /// # Errors
    /// As [`Self::try_take`].
    pub fn peek(&self, chat: ChatNo, standing: Standing, now: Timestamp) -> Result<(), NotBefore> {
        let number_at = self.number.free_at(self.limits.number, now);
        if number_at > now {
            return Err(NotBefore { at: number_at, layer: LimitLayer::NumberRate });
        }
        let chat_at = self.bucket_of(Some(chat)).free_at(self.limits.chat, now);
        if chat_at > now {
            return Err(NotBefore { at: chat_at, layer: LimitLayer::PairRate });
        }
        if self.opens(chat, standing) {
            let at = self.opening_at(0, now).unwrap_or(now.after(DAY));
            if at > now {
                return Err(NotBefore { at, layer: LimitLayer::NewRecipients });
            }
        }
        Ok(())
    }

    fn bucket_of(&self, chat: Option<ChatNo>) -> Bucket {
        chat.and_then(|chat| self.chats.get(&chat)).map_or_else(Bucket::default, |pace| pace.bucket())
    }

    /// Whether a message to this chat would count as one to a new recipient.
    fn opens(&self, chat: ChatNo, standing: Standing) -> bool {
        let limited = self.limits.new_recipients != NewRecipients::Unlimited;
        limited && standing == Standing::New && !self.is_open(chat)
    }

    /// Whether the chat counts as that of a new recipient already.
    #[must_use]
    pub fn is_open(&self, chat: ChatNo) -> bool {
        self.chats.get(&chat).is_some_and(|pace| pace.opened_at.is_some())
    }

    /// Chats of new recipients that count.
    pub fn opened(&self) -> impl Iterator<Item = ChatNo> {
        self.openings.iter().map(|(_, chat)| *chat)
    }

    /// Chats whose own rate is not at rest.
    pub fn busy(&self, now: Timestamp) -> impl Iterator<Item = ChatNo> {
        self.chats.iter().filter(move |(_, pace)| pace.rest_at > now).map(|(chat, _)| *chat)
    }

    /// New recipients that may still be written to; none: nobody counts.
    #[must_use]
    pub fn new_recipients_left(&self, now: Timestamp) -> Option<u32> {
        let budget = self.limits.new_recipients.per_day(self.warm_since, now)?;
        let used = self.openings.iter().filter(|(at, _)| at.after(DAY) > now).count();
        Some(budget.saturating_sub(u32::try_from(used).unwrap_or(u32::MAX)))
    }

    /// When the `position`-th new recipient from now may be written to (0 = the next one), by the present budget; none:
    /// never.
    #[must_use]
    pub fn opening_at(&self, position: usize, now: Timestamp) -> Option<Timestamp> {
        let Some(budget) = self.limits.new_recipients.per_day(self.warm_since, now) else { return Some(now) };
        let budget = usize::try_from(budget).unwrap_or(usize::MAX);
        if budget == 0 {
            return None;
        }
        let expiry = |(at, _): &(Timestamp, ChatNo)| at.after(DAY).max(now);
        let counted = self.openings.len();
        let (mut position, mut later) = (position, Duration::ZERO);
        loop {
            if counted.saturating_add(position) < budget {
                return Some(now.after(later));
            }
            // It takes the place of the one that stops counting as this one.
            let freed = counted + position - budget;
            if let Some(at) = self.openings.iter().nth(freed).map(expiry) {
                return Some(at.after(later));
            }
            position = freed - counted;
            later = later.saturating_add(DAY);
        }
    }

    /// The number's own rate.
    #[must_use]
    pub fn meter(&self) -> Meter {
        Meter { pace: self.limits.number, bucket: self.number }
    }

    /// When the number's own rate lets the next message go.
    #[must_use]
    pub fn free_at(&self, now: Timestamp) -> Timestamp {
        self.number.free_at(self.limits.number, now)
    }

    /// When the number's own rate lets the `position`-th message from now go (0 = the next one).
    #[must_use]
    pub fn predicted(&self, position: u64, now: Timestamp) -> Timestamp {
        self.number.nth_at(self.limits.number, position, now)
    }

    /// How many messages the number's own rate lets go until `then`.
    #[must_use]
    pub fn allowed(&self, now: Timestamp, then: Timestamp) -> u64 {
        self.number.count_until(self.limits.number, now, then)
    }

    /// When a chat's own rate lets the `position`-th message from now go; a chat that is not known is at rest.
    #[must_use]
    pub fn predicted_in(&self, chat: Option<ChatNo>, position: u64, now: Timestamp) -> Timestamp {
        self.bucket_of(chat).nth_at(self.limits.chat, position, now)
    }

    /// How many messages a chat's own rate lets go until `then`.
    #[must_use]
    pub fn allowed_in(&self, chat: ChatNo, now: Timestamp, then: Timestamp) -> u64 {
        self.bucket_of(Some(chat)).count_until(self.limits.chat, now, then)
    }

    /// Chats at rest carry no information. If all are busy the one nearest to rest goes: it may then send early by
    /// less than one burst, which is harmless beside unbounded memory.
    fn forget_resting(&mut self, but: ChatNo, now: Timestamp) -> Vec<ChatNo> {
        let idle = |(chat, pace): (&ChatNo, &ChatPace)| {
            (*chat != but && pace.opened_at.is_none()).then_some((pace.rest_at, *chat))
        };
        let mut forgotten: Vec<ChatNo> = Vec::new();
        forgotten.extend(self.chats.iter().filter_map(idle).filter(|(at, _)| *at <= now).map(|(_, chat)| chat));
        let kept = self.chats.len() - forgotten.len();
        if kept >= CHATS_MAX + self.openings.len() {
            let nearest = self.chats.iter().filter_map(idle).filter(|(at, _)| *at > now).min();
            forgotten.extend(nearest.map(|(_, chat)| chat));
        }
        for chat in &forgotten {
            self.chats.remove(chat);
        }
        self.look_at = (2 * self.chats.len()).clamp(CHATS_FEW, (CHATS_MAX + self.openings.len()).max(CHATS_FEW));
        forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(interval_ms: u64, burst: u32) -> Limits {
        let pace = Pace { interval: Duration::from_millis(interval_ms), burst };
        Limits {
            number: pace,
            chat: Pace { interval: Duration::ZERO, burst: 1 },
            new_recipients: NewRecipients::Unlimited,
        }
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
                if limiter.try_take(ChatNo(1), Standing::New, now).is_ok() {
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

        /// The plain algorithm is the one of the crate `governor`, on a clock of whole milliseconds.
        #[test]
        fn it_grants_what_governor_grants(
            interval in 1u32..500, burst in 1u32..8, waits in proptest::collection::vec(0u64..900, 1..200),
        ) {
            use governor::clock::FakeRelativeClock;
            use governor::{Quota, RateLimiter};
            let clock = FakeRelativeClock::default();
            let quota = Quota::with_period(Duration::from_millis(interval.into())).unwrap();
            let quota = quota.allow_burst(burst.try_into().unwrap());
            let governor = RateLimiter::direct_with_clock(quota, clock.clone());
            let mut limiter = Limiter::new(limits(interval.into(), burst));
            let mut now = Timestamp(1_000_000);
            for (step, wait) in waits.into_iter().enumerate() {
                clock.advance(Duration::from_millis(wait));
                now = Timestamp(now.0 + wait);
                if step % 7 == 6 {
                    limiter = Limiter::restore(*limiter.limits(), &limiter.record(NewChats::Allowed), []);
                }
                let granted = limiter.try_take(ChatNo(1), Standing::New, now).is_ok();
                prop_assert_eq!(granted, governor.check().is_ok(), "at {}", now.0);
            }
        }

        #[test]
        fn what_goes_until_a_moment_is_counted_right(
            interval in 1u64..500, burst in 1u32..8, taken in 0u32..8, position in 0u64..50,
        ) {
            let mut limiter = Limiter::new(limits(interval, burst));
            let now = Timestamp(1_000_000);
            for _ in 0..taken {
                let _ = limiter.try_take(ChatNo(1), Standing::New, now);
            }
            let (bucket, pace) = (limiter.number, limiter.limits.number);
            let at = bucket.nth_at(pace, position, now);
            prop_assert!(bucket.count_until(pace, now, at) > position);
            prop_assert!(at == now || bucket.count_until(pace, now, Timestamp(at.0 - 1)) <= position);
        }

        #[test]
        fn the_moment_it_names_is_exact(interval in 2u64..500, burst in 1u32..8) {
            let mut limiter = Limiter::new(limits(interval, burst));
            let now = Timestamp(50_000);
            while limiter.try_take(ChatNo(1), Standing::New, now).is_ok() {}
            let not_before = limiter.peek(ChatNo(1), Standing::New, now).unwrap_err();
            prop_assert!(limiter.peek(ChatNo(1), Standing::New, Timestamp(not_before.at.0 - 1)).is_err());
            prop_assert!(limiter.peek(ChatNo(1), Standing::New, not_before.at).is_ok());
        }

        #[test]
        fn a_clock_set_back_blocks_for_one_window_at_most(back in 0u64..10_000_000) {
            let mut limiter = Limiter::new(limits(1000, 5));
            let now = Timestamp(100_000_000);
            while limiter.try_take(ChatNo(1), Standing::New, now).is_ok() {}
            let earlier = Timestamp(now.0 - back);
            if let Err(not_before) = limiter.peek(ChatNo(1), Standing::New, earlier) {
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
            while limiter.try_take(ChatNo(1), Standing::New, now).is_err() {
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
            new_recipients: NewRecipients::Unlimited,
        });
        let now = Timestamp(1_000_000);
        assert!(limiter.try_take(ChatNo(1), Standing::New, now).is_ok());
        let refused = limiter.try_take(ChatNo(1), Standing::New, now).unwrap_err();
        assert_eq!((refused.layer, refused.at), (LimitLayer::PairRate, Timestamp(1_006_000)));
        assert!(limiter.try_take(ChatNo(2), Standing::New, now).is_ok());
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
            new_recipients: NewRecipients::Unlimited,
        });
        for chat in 0..5000 {
            let _ = limiter.try_take(ChatNo(chat), Standing::New, Timestamp(1_000_000));
        }
        assert!(limiter.chats.len() <= CHATS_MAX + 1);
    }

    #[test]
    fn new_recipients_are_counted_once_a_day_and_replies_never() {
        let open = Pace { interval: Duration::ZERO, burst: 1 };
        let limits = Limits { number: open, chat: open, new_recipients: NewRecipients::PerDay(2) };
        let mut limiter = Limiter::new(limits);
        let now = Timestamp(1_000_000_000);
        let mut rows = HashMap::new();
        for (chat, later) in [(1, 0), (1, 5), (2, 10)] {
            let grant = limiter.try_take(ChatNo(chat), Standing::New, Timestamp(now.0 + later)).unwrap();
            rows.insert(ChatNo(chat), grant.chat);
        }
        // The same after a restart.
        let mut limiter = Limiter::restore(limits, &limiter.record(NewChats::Allowed), rows);
        let at = Timestamp(now.0 + 20);
        assert_eq!(limiter.new_recipients_left(at), Some(0));
        let refused = limiter.try_take(ChatNo(3), Standing::New, at).unwrap_err();
        assert_eq!(refused, NotBefore { at: now.after(DAY), layer: LimitLayer::NewRecipients });
        assert!(limiter.try_take(ChatNo(3), Standing::Warm, at).is_ok(), "a reply");
        assert!(limiter.try_take(ChatNo(2), Standing::New, at).is_ok(), "the same recipient");
        let positions: Vec<_> = (0..4).map(|position| limiter.opening_at(position, at).unwrap().0 - now.0).collect();
        let day = 86_400_000;
        assert_eq!(positions, [day, day + 10, 2 * day, 2 * day + 10]);
        assert!(limiter.try_take(ChatNo(3), Standing::New, now.after(DAY)).is_ok());
        assert_eq!(limiter.new_recipients_left(Timestamp(now.after(2 * DAY).0 - 1)), Some(1));
        limiter.age(Timestamp(5));
        assert_eq!(limiter.opening_at(0, Timestamp(5)), Some(Timestamp(5).after(DAY)), "a clock set back far");
        limiter.set_limits(Limits { new_recipients: NewRecipients::PerDay(0), ..limits });
        assert_eq!(limiter.opening_at(0, now), None);
    }

    #[test]
    fn the_budget_grows_with_the_days_since_it_was_first_online() {
        let since = Timestamp(1_700_000_000_000);
        let after = |days: u32| NewRecipients::WarmUp.per_day(Some(since), since.after(DAY * days));
        assert_eq!([0, 2, 3, 7, 14, 28, 400].map(|days| after(days).unwrap()), [20, 20, 40, 80, 160, 300, 300]);
        assert_eq!(NewRecipients::WarmUp.per_day(None, since), Some(20));
        let mut limiter = Limiter::new(Limits::LINKED);
        assert!(limiter.warm(since) && !limiter.warm(since.after(DAY)));
        assert_eq!(limiter.record(NewChats::Allowed).warm_since, Some(since));
    }

    #[test]
    fn records_of_the_first_version_are_read() {
        let record: LimiterRecord = serde_json::from_str("{\"new_chats\":\"Allowed\"}").unwrap();
        assert_eq!(record, LimiterRecord::default());
    }
}
