//! How fast sessions may be opened by the whole process: a token bucket and a limit on attempts under way.
//! First come, first served within a class; numbers with waiting sends go first, those that failed last go last.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::id::NumberId;
use super::time::Timestamp;

/// The gate's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateLimits {
    /// Sessions opened per second in the long run.
    pub per_second: u32,
    /// Sessions opened at once after a rest.
    pub burst: u32,
    /// Attempts under way at once.
    pub concurrent: usize,
}

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody sits in front of a QR code.
    Person,
    /// Sends are waiting.
    Waiting,
    /// Nothing special.
    Normal,
    /// The last attempt failed.
    Failed,
}

const CLASSES: [Priority; 4] = [Priority::Person, Priority::Waiting, Priority::Normal, Priority::Failed];

/// The gate.
#[derive(Debug)]
pub struct Gate {
    limits: GateLimits,
    queues: HashMap<Priority, VecDeque<NumberId>>,
    queued: HashMap<NumberId, Priority>,
    under_way: HashMap<NumberId, ()>,
    /// Thousandths of a token.
    tokens_milli: u64,
    refilled_at: Timestamp,
}

impl Gate {
    /// A gate at rest.
    #[must_use]
    pub fn new(limits: GateLimits, now: Timestamp) -> Self {
        Self {
            limits,
            queues: HashMap::new(),
            queued: HashMap::new(),
            under_way: HashMap::new(),
            tokens_milli: u64::from(limits.burst.max(1)) * 1000,
            refilled_at: now,
        }
    }

    /// A number wants to connect. Asking again only changes its class.
    pub fn ask(&mut self, number: NumberId, priority: Priority) {
        if self.under_way.contains_key(&number) {
            return;
        }
        self.leave_queue(number);
        self.queued.insert(number, priority);
        self.queues.entry(priority).or_default().push_back(number);
    }

    fn leave_queue(&mut self, number: NumberId) {
        if let Some(priority) = self.queued.remove(&number)
            && let Some(queue) = self.queues.get_mut(&priority)
        {
            queue.retain(|other| *other != number);
        }
    }

    /// A number's attempt is over, or it no longer wants one.
    pub fn leave(&mut self, number: NumberId) {
        self.leave_queue(number);
        self.under_way.remove(&number);
    }

    /// Numbers waiting.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queued.len()
    }

    /// Attempts under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    fn refill(&mut self, now: Timestamp) {
        let elapsed = now.0.saturating_sub(self.refilled_at.0);
        let full = u64::from(self.limits.burst.max(1)) * 1000;
        let gained = elapsed.saturating_mul(u64::from(self.limits.per_second));
        self.tokens_milli = self.tokens_milli.saturating_add(gained).min(full);
        self.refilled_at = now;
    }

    /// The numbers that may connect now.
    pub fn grant(&mut self, now: Timestamp) -> Vec<NumberId> {
        self.refill(now);
        let mut granted = Vec::new();
        while self.tokens_milli >= 1000 && self.under_way.len() < self.limits.concurrent {
            let Some(number) = self.next() else { break };
            self.tokens_milli -= 1000;
            self.under_way.insert(number, ());
            granted.push(number);
        }
        granted
    }

    fn next(&mut self) -> Option<NumberId> {
        for class in CLASSES {
            if let Some(number) = self.queues.get_mut(&class).and_then(VecDeque::pop_front) {
                self.queued.remove(&number);
                return Some(number);
            }
        }
        None
    }

    /// How long until the next grant is possible, if only tokens are missing.
    #[must_use]
    pub fn next_grant_in(&self) -> Option<Duration> {
        if self.queued.is_empty() || self.under_way.len() >= self.limits.concurrent {
            return None;
        }
        let missing = 1000u64.saturating_sub(self.tokens_milli);
        Some(Duration::from_millis(missing.div_ceil(u64::from(self.limits.per_second.max(1))).max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_faster_than_the_rate_nor_more_than_allowed_at_once(
            per_second in 1u32..50, burst in 1u32..20, concurrent in 1usize..10, waits in proptest::collection::vec(0u64..300, 1..100),
        ) {
            let limits = GateLimits { per_second, burst, concurrent };
            let mut now = Timestamp(1_000_000);
            let mut gate = Gate::new(limits, now);
            for number in 0..1000 {
                gate.ask(NumberId(number), Priority::Normal);
            }
            let begun = now;
            let mut total = 0u64;
            for wait in waits {
                now = Timestamp(now.0 + wait);
                let granted = gate.grant(now);
                total += granted.len() as u64;
                prop_assert!(gate.under_way() <= concurrent);
                prop_assert!(total <= u64::from(burst) + (now.0 - begun.0) * u64::from(per_second) / 1000 + 1);
                for number in granted {
                    gate.leave(number);
                }
            }
        }
    }

    #[test]
    fn people_first_failures_last_and_fifo_within() {
        let limits = GateLimits { per_second: 1000, burst: 1000, concurrent: 1000 };
        let mut gate = Gate::new(limits, Timestamp(0));
        gate.ask(NumberId(1), Priority::Failed);
        gate.ask(NumberId(2), Priority::Normal);
        gate.ask(NumberId(3), Priority::Normal);
        gate.ask(NumberId(4), Priority::Waiting);
        gate.ask(NumberId(5), Priority::Person);
        gate.ask(NumberId(2), Priority::Waiting);
        assert_eq!(gate.grant(Timestamp(0)), [5, 4, 2, 3, 1].map(NumberId));
    }
}
