//! Every attempt that became durable keeps every limit, over all restarts: counted from outside, by the moments at which
//! the machine decided on them.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use switchboard::domain::change::Change;
use switchboard::domain::id::{ChatNo, MessageSeq};
use switchboard::domain::limiter::{Limits, Pace};
use switchboard::domain::outbox::OutboxRow;
use switchboard::domain::time::Timestamp;

use super::world::START;

const DAY: u64 = 24 * 3_600_000;

/// An attempt on its way to the disk.
#[derive(Debug, Clone, Copy)]
struct Claim {
    at: u64,
    /// Its recipient had written.
    warm: bool,
}

/// All attempts.
#[derive(Debug, Default)]
pub(crate) struct Pacing {
    pub(crate) limits: Option<Limits>,
    claims: HashMap<(MessageSeq, u16), Claim>,
    counted: HashSet<(MessageSeq, u16)>,
    /// When each rate is at rest, in milliseconds.
    number: u64,
    chats: HashMap<ChatNo, u64>,
    /// When new recipients were counted.
    opened: Vec<(u64, ChatNo)>,
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap()
}

/// The plain algorithm, once more.
fn take(rest_at: &mut u64, pace: Pace, at: u64, whose: &str) {
    *rest_at = (*rest_at).max(at) + millis(pace.interval);
    let most = at + millis(pace.interval) * u64::from(pace.burst);
    assert!(*rest_at <= most, "{whose} sends early, by {} ms", *rest_at - most);
}

impl Pacing {
    /// The machine decides on an attempt.
    pub(crate) fn claiming(&mut self, row: &OutboxRow, warm: bool, paused: bool, now: u64) {
        let attempt = (row.seq, row.attempts);
        if row.attempts == 0 || self.counted.contains(&attempt) || self.claims.contains_key(&attempt) {
            return;
        }
        assert!(!paused, "{:?} is attempted during a pause", row.seq);
        self.claims.insert(attempt, Claim { at: now, warm });
    }

    /// Attempts become durable.
    pub(crate) fn flushing(&mut self, changes: &[Change]) {
        let Some(limits) = self.limits else { return };
        for change in changes {
            let Change::Outbox(row) = change else { continue };
            let attempt = (row.seq, row.attempts);
            let Some(claim) = self.claims.remove(&attempt) else { continue };
            self.counted.insert(attempt);
            take(&mut self.number, limits.number, claim.at, "the number");
            take(self.chats.entry(row.chat).or_default(), limits.chat, claim.at, "a chat");
            if !claim.warm {
                self.opening(row.chat, claim.at, &limits);
            }
        }
    }

    fn opening(&mut self, chat: ChatNo, at: u64, limits: &Limits) {
        // It was online for no longer than it exists.
        let Some(budget) = limits.new_recipients.per_day(Some(Timestamp(START)), Timestamp(at)) else { return };
        self.opened.retain(|(opened, _)| opened + DAY > at);
        if self.opened.iter().all(|(_, known)| *known != chat) {
            assert!(self.opened.len() < budget as usize, "more than {budget} new recipients in a day");
            self.opened.push((at, chat));
        }
    }

    /// What was not durable never happened.
    pub(crate) fn crashed(&mut self) {
        self.claims.clear();
    }
}
