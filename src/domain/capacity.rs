//! What a router needs to know of a number: what it could send now, how long the next message would wait, and why.

use super::lifecycle::State;
use super::limiter::{LimitLayer, LockReason, Meter};
use super::orders::Pause;
use super::time::Timestamp;

/// What keeps the next message from leaving at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limiting {
    /// Nothing does.
    Nothing,
    /// The number's own rate, or what waits for it.
    NumberRate,
    /// The rate within the chat.
    PairRate,
    /// The budget of new recipients.
    NewRecipients,
    /// WhatsApp's lock or cap on new chats.
    NewChatsHeld(LockReason),
    /// Its owner paused it.
    Paused,
    /// It is not connected.
    Disconnected,
}

impl Limiting {
    /// The public name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "",
            Self::NumberRate => "NUMBER_RATE",
            Self::PairRate => "PAIR_RATE",
            Self::NewRecipients => "NEW_RECIPIENTS",
            Self::NewChatsHeld(reason) => reason.name(),
            Self::Paused => "PAUSED",
            Self::Disconnected => "DISCONNECTED",
        }
    }
}

impl From<LimitLayer> for Limiting {
    fn from(layer: LimitLayer) -> Self {
        match layer {
            LimitLayer::NumberRate => Self::NumberRate,
            LimitLayer::PairRate => Self::PairRate,
            LimitLayer::NewRecipients => Self::NewRecipients,
        }
    }
}

/// When a message would leave, and what it waits for longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outlook {
    /// When; none: not by itself.
    pub at: Option<Timestamp>,
    /// What it waits for.
    pub limiting: Limiting,
}

impl Outlook {
    /// Nothing is in the way.
    #[must_use]
    pub fn at_once(now: Timestamp) -> Self {
        Self { at: Some(now), limiting: Limiting::Nothing }
    }

    /// This too must be waited for; whatever takes longest is named.
    pub fn wait_for(&mut self, at: Option<Timestamp>, limiting: Limiting) {
        let longer = match (self.at, at) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(before), Some(at)) => at > before,
        };
        if longer {
            (self.at, self.limiting) = (at, limiting);
        }
    }
}

/// How well a number does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It sends.
    Good,
    /// It sends, and not to everybody, or not at this moment: it is held or paused.
    Limited,
    /// It is not connected and comes back by itself.
    Recovering,
    /// It does not come back by itself.
    Down,
}

/// What a number shows with every step: enough to tell its capacity at any later moment without asking it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Basis {
    /// What it is doing.
    pub state: State,
    /// Since when; or since when it is paused, if that is later.
    pub since: Timestamp,
    /// The number's own rate and where it stands.
    pub meter: Meter,
    /// Accepted and unsettled sends.
    pub queue_depth: u64,
    /// Those of them that wait for their turn.
    pub waiting: u64,
    /// New recipients that may still be written to within the day; none: nobody counts.
    pub new_recipients_left: Option<u32>,
    /// What a message to somebody who has written waits for, the number's own rate aside where nothing waits.
    pub outlook: Outlook,
    /// The same to somebody who has not.
    pub outlook_new: Outlook,
    /// Until when it is paused, if it is.
    pub pause: Option<Pause>,
    /// Whether WhatsApp's locks hold new chats.
    pub held: bool,
    /// When any of this changed last.
    pub changed_at: Timestamp,
    /// Counts the changes.
    pub revision: u64,
}

impl Basis {
    /// Whether only time went by since `other`.
    #[must_use]
    pub fn says_the_same_as(&self, other: &Self) -> bool {
        *self == Self { changed_at: self.changed_at, revision: self.revision, ..*other }
    }

    /// The capacity at a moment, as long as nothing happens until then.
    #[must_use]
    pub fn at(&self, now: Timestamp) -> Capacity {
        let paused = self.pause.is_some_and(|pause| !pause.is_over(now));
        let outlook = |then: Outlook| {
            let mut outlook = match then.at {
                Some(at) if at <= now => Outlook::at_once(now),
                _ => then,
            };
            outlook.wait_for(Some(self.meter.free_at(now)), Limiting::NumberRate);
            outlook
        };
        let (outlook, outlook_new) = (outlook(self.outlook), outlook(self.outlook_new));
        let queued = outlook.limiting == Limiting::NumberRate;
        let sends = self.state.is_connected() && !paused && !queued;
        Capacity {
            state: self.state,
            health: self.health(paused),
            since: self.since,
            available_now: if sends { self.meter.available(now) } else { 0 },
            sustainable_rate: if paused { 0.0 } else { self.meter.rate() },
            queue_depth: self.queue_depth,
            new_recipients_left: self.new_recipients_left,
            outlook,
            outlook_new,
        }
    }

    fn health(&self, paused: bool) -> Health {
        match self.state {
            State::Degraded => Health::Limited,
            State::Online if paused || self.held => Health::Limited,
            State::Online => Health::Good,
            State::AwaitingGate | State::Connecting | State::Linking => Health::Recovering,
            _ if self.state.next_attempt().is_some() => Health::Recovering,
            _ => Health::Down,
        }
    }
}

/// The capacity of a number at a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Capacity {
    /// What it is doing.
    pub state: State,
    /// How well.
    pub health: Health,
    /// Since when it is in this state, or paused.
    pub since: Timestamp,
    /// Messages that would leave at once, to chats at rest.
    pub available_now: u32,
    /// Messages a second in the long run.
    pub sustainable_rate: f64,
    /// Accepted and unsettled sends.
    pub queue_depth: u64,
    /// New recipients that may still be written to within the day; none: nobody counts.
    pub new_recipients_left: Option<u32>,
    /// When the next message to somebody who has written would leave.
    pub outlook: Outlook,
    /// The same to somebody who has not.
    pub outlook_new: Outlook,
}

/// Moments that differ by less are the same to a watcher, in milliseconds.
const SAME_MOMENT: u64 = 100;

impl Capacity {
    /// Whether a watcher that knows `before` has to hear of it. A wait that only went by is no news.
    #[must_use]
    pub fn is_news_after(&self, before: &Self) -> bool {
        let near = |one: Outlook, other: Outlook| {
            one.limiting == other.limiting
                && match (one.at, other.at) {
                    (Some(at), Some(other)) => {
                        at.0.abs_diff(other.0) < SAME_MOMENT || one.limiting == Limiting::Nothing
                    }
                    (at, other) => at == other,
                }
        };
        let same = Self { outlook: before.outlook, outlook_new: before.outlook_new, ..*self } == *before;
        !(same && near(self.outlook, before.outlook) && near(self.outlook_new, before.outlook_new))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::id::ChatNo;
    use crate::domain::limiter::{Limiter, Limits, NewChats};
    use crate::domain::outbox::Standing;

    const NOW: Timestamp = Timestamp(1_700_000_000_000);

    fn basis(state: State) -> Basis {
        let mut limiter = Limiter::new(Limits::LINKED);
        for chat in 0..5 {
            limiter.try_take(ChatNo(chat), Standing::Warm, NOW).unwrap();
        }
        assert_eq!(limiter.record(NewChats::Allowed).rest_at, NOW.after(Duration::from_secs(5)));
        Basis {
            state,
            since: NOW,
            meter: limiter.meter(),
            queue_depth: 0,
            waiting: 0,
            new_recipients_left: Some(20),
            outlook: Outlook::at_once(NOW),
            outlook_new: Outlook::at_once(NOW),
            pause: None,
            held: false,
            changed_at: NOW,
            revision: 0,
        }
    }

    #[test]
    fn the_budget_comes_back_with_time_alone() {
        let basis = basis(State::Online);
        let spent = basis.at(NOW);
        assert_eq!((spent.available_now, spent.outlook.limiting), (0, Limiting::NumberRate));
        assert_eq!(spent.outlook.at, Some(NOW.after(Duration::from_secs(1))));
        let later = basis.at(NOW.after(Duration::from_millis(2500)));
        assert_eq!((later.available_now, later.outlook.limiting, later.health), (2, Limiting::Nothing, Health::Good));
        assert!(later.is_news_after(&spent) && !later.is_news_after(&later));
    }

    #[test]
    fn a_number_that_cannot_send_has_nothing_to_give_and_says_why() {
        let later = NOW.after(Duration::from_secs(60));
        let mut paused = basis(State::Online);
        paused.pause = Some(Pause { since: NOW, until: Some(later.after(Duration::from_secs(1))) });
        paused.outlook.wait_for(paused.pause.and_then(|pause| pause.until), Limiting::Paused);
        let shown = paused.at(later);
        assert_eq!((shown.available_now, shown.health, shown.outlook.limiting), (0, Health::Limited, Limiting::Paused));
        assert_eq!(paused.at(later.after(Duration::from_secs(1))).available_now, 5, "it ends by itself");
        let mut stopped = basis(State::Stopped);
        stopped.outlook.wait_for(None, Limiting::Disconnected);
        let shown = stopped.at(later);
        assert_eq!((shown.available_now, shown.health, shown.outlook.at), (0, Health::Down, None));
        assert_eq!(basis(State::Offline { retry_at: later }).at(NOW).health, Health::Recovering);
    }
}
