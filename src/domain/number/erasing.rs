//! Erasing one contact: a durable order, carried out by the next pass and again after a crash until nothing of it is left.

use super::interface::{Counted, Effect, Reply, ReplyId};
use super::machine::{Draft, Number, Then};
use crate::domain::change::Change;
use crate::domain::id::{ChatNo, EventSeq, MessageSeq};
use crate::domain::retention::Erasure;
use crate::domain::time::Timestamp;

/// Contacts being erased at once per number; more are refused.
pub const ERASURES_MAX: usize = 64;

impl Number {
    /// Orders everything of a chat up to now to be erased. What waits to be sent to it is withdrawn; what may just be
    /// leaving is not, and the order is refused.
    pub(super) fn on_erase(&mut self, chat: ChatNo, reply: ReplyId, draft: &mut Draft) {
        let waiting = self.outbox.of_chat(chat);
        let leaving = waiting.iter().any(|seq| self.outbox.is_in_flight(*seq)) || self.is_accepting_for(chat);
        let known = self.retaining.erasures.iter().position(|erasure| erasure.chat == chat);
        let refused = if self.draining {
            Some(Reply::Draining)
        } else if leaving {
            Some(Reply::ContactBusy)
        } else if known.is_none() && self.retaining.erasures.len() >= ERASURES_MAX {
            Some(Reply::QueueFull)
        } else {
            None
        };
        if let Some(refused) = refused {
            draft.effects.push(Effect::Reply(reply, refused));
            return;
        }
        for seq in waiting {
            self.outbox.settle(seq);
            draft.changes.push(Change::OutboxGone(seq));
        }
        let through = MessageSeq(self.counters.message);
        let erasure = Erasure { chat, through, events_through: EventSeq(self.counters.event) };
        match known {
            Some(index) => self.retaining.erasures[index] = erasure,
            None => self.retaining.erasures.push(erasure),
        }
        draft.changes.push(Change::Erase(erasure));
        draft.durable = true;
        // Not looked for before that: a message may still be on its way to the disk in front of the order.
        self.retaining.ordered.push(chat);
        draft.then.push(Then::EraseOrdered(chat));
        draft.then.push(Then::Reply(reply, Reply::EraseBegun));
    }

    /// The order is on disk, and everything written before it.
    pub(super) fn erase_ordered(&mut self, chat: ChatNo, now: Timestamp) {
        if let Some(index) = self.retaining.ordered.iter().position(|ordered| *ordered == chat) {
            self.retaining.ordered.remove(index);
        }
        self.sweep_soon(now);
    }

    /// Everything of the chat that the order names is off the disk.
    pub(super) fn erased(&mut self, chat: ChatNo, draft: &mut Draft) {
        if self.retaining.ordered.contains(&chat) {
            // It was ordered again meanwhile: the next pass goes further.
            return;
        }
        self.retaining.erasure_done(chat);
        draft.changes.push(Change::Erased(chat));
        draft.effects.push(Effect::Count(Counted::ContactErased));
    }
}
