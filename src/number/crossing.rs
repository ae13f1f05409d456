//! The failpoints on both sides of a commit: which of them a commit passes follows from what it changes.

use crate::domain::change::Change;
use crate::domain::message::Direction;
use crate::domain::number::Commit;
use crate::telemetry::failpoint::{self, Failpoint};

const SIDES: [(Failpoint, Failpoint); 7] = [
    (Failpoint::AcceptBeforeDurable, Failpoint::AcceptAfterDurable),
    (Failpoint::ClaimBeforeDurable, Failpoint::ClaimAfterDurable),
    (Failpoint::SettleBeforeDurable, Failpoint::SettleAfterDurable),
    (Failpoint::StatusBeforeDurable, Failpoint::StatusAfterDurable),
    (Failpoint::InboundBeforeDurable, Failpoint::InboundAfterDurable),
    (Failpoint::WebhookBeforeRemoval, Failpoint::WebhookAfterRemoval),
    (Failpoint::LifeBeforeDurable, Failpoint::LifeAfterDurable),
];

/// The failpoints of one commit, by their place in the table.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Crossing([bool; SIDES.len()]);

impl Crossing {
    /// Nothing is looked at in a build without failpoints.
    pub(super) fn of(commit: &Commit) -> Self {
        let mut sides = [false; SIDES.len()];
        if !failpoint::COMPILED_IN {
            return Self(sides);
        }
        for change in &commit.changes {
            let side = match change {
                Change::Message(message) if message.direction == Direction::Outbound => 0,
                Change::Outbox(row) if row.attempts > 0 => 1,
                Change::OutboxGone(_) => 2,
                Change::Progress(..) => 3,
                Change::Message(_) => 4,
                Change::DeliveryGone(..) => 5,
                Change::Life(_) => 6,
                _ => continue,
            };
            sides[side] = true;
        }
        Self(sides)
    }

    /// It is about to be handed to the store.
    pub(super) fn before(self) {
        self.passed().for_each(|(before, _)| failpoint::reach(before));
    }

    /// The store wrote it.
    pub(super) fn after(self) {
        self.passed().for_each(|(_, after)| failpoint::reach(after));
    }

    fn passed(self) -> impl Iterator<Item = (Failpoint, Failpoint)> {
        SIDES.into_iter().zip(self.0).filter_map(|(side, passes)| passes.then_some(side))
    }
}
