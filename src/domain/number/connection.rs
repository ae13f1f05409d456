//! Its connection: what its life does to the outbox, and what customers are told of it.

use super::interface::Effect;
use super::machine::{Draft, Number};
use crate::domain::ack;
use crate::domain::change::Change;
use crate::domain::close::CloseReason;
use crate::domain::event::EventBody;
use crate::domain::lifecycle::{self, State};
use crate::domain::time::Timestamp;
use crate::domain::trouble::{Legibility, Trouble};

impl Number {
    pub(super) fn on_life(&mut self, input: lifecycle::Input, now: Timestamp, draft: &mut Draft) {
        if input == lifecycle::Input::Alive && self.life.state == State::Degraded && !self.legibility.is_bad(now) {
            self.on_life(lifecycle::Input::Relieved(Trouble::Undecryptable), now, draft);
        }
        let before = self.life.clone();
        let closing = match &input {
            lifecycle::Input::Closed { reason, .. } => Some(reason.clone()),
            _ => None,
        };
        if self.draining && input == lifecycle::Input::Granted {
            draft.effects.push(Effect::Life(lifecycle::Effect::LeaveGate));
            return;
        }
        let mut effects = self.life.step(input, now);
        if self.draining {
            // Whoever goes down does not queue up again; the next incarnation does.
            effects.retain(|effect| *effect != lifecycle::Effect::AskGate);
        }
        draft.effects.extend(effects.into_iter().map(Effect::Life));
        if closing.is_some() {
            self.distrusted_since = None;
            self.legibility = Legibility::default();
            self.outbox.give_back_all();
        }
        if self.life == before {
            return;
        }
        draft.changes.push(Change::Life(self.life.clone()));
        let (from, to) = (before.state, self.life.state);
        if from == to {
            // Linked or desired changed: facts that must survive.
            draft.durable = true;
            return;
        }
        draft.durable |= !matches!(to, State::Offline { .. } | State::AwaitingGate | State::Connecting);
        draft.effects.push(Effect::StateChanged { from, to });
        match (from, to) {
            (_, State::Degraded) if self.counters.announced_connected => {
                let reason = self.life.reason.clone();
                self.record_event(EventBody::NumberDegraded { reason }, now, draft);
            }
            (State::Degraded, State::Online) => self.record_event(EventBody::NumberRecovered, now, draft),
            _ => self.announce(closing.as_ref(), now, draft),
        }
    }

    /// Tells customers when the connection stands or is gone. A routine recycle that heals at once is not told.
    pub(super) fn announce(&mut self, closing: Option<&CloseReason>, now: Timestamp, draft: &mut Draft) {
        if self.life.state.is_connected() {
            if !self.counters.announced_connected {
                self.counters.announced_connected = true;
                self.record_event(EventBody::NumberConnected, now, draft);
            }
            return;
        }
        let under_way = matches!(self.life.state, State::AwaitingGate | State::Connecting | State::Linking);
        let rests = matches!(self.life.state, State::Parked { .. } | State::Replaced | State::LoggedOut);
        if !self.counters.announced_connected && rests && closing.is_some() {
            // It was told to come back by itself, and will not, or not soon.
            let reconnecting = matches!(self.life.state, State::Parked { .. });
            let reason = self.life.reason.clone();
            self.record_event(EventBody::NumberDisconnected { reason, reconnecting }, now, draft);
            return;
        }
        if !self.counters.announced_connected
            || (under_way && closing.is_none_or(|reason| *reason == CloseReason::Recycled))
        {
            return;
        }
        self.counters.announced_connected = false;
        let reconnecting = matches!(
            self.life.state,
            State::Offline { .. } | State::AwaitingGate | State::Connecting | State::Parked { .. }
        );
        let given = self.life.reason.as_str();
        let reason = if given.is_empty() { self.life.state.name() } else { given }.to_owned();
        self.record_event(EventBody::NumberDisconnected { reason, reconnecting }, now, draft);
    }

    pub(super) fn on_tick(&mut self, now: Timestamp, draft: &mut Draft) {
        if !self.draining {
            self.on_life(lifecycle::Input::Tick, now, draft);
        }
        let overdue = self.outbox.oldest_on_wire().is_some_and(|since| now.since(since) >= ack::ACK_TIMEOUT);
        if overdue && self.distrusted_since.is_none() && self.life.state.is_connected() {
            // What the server thinks of these is unknown. A new connection settles it; this one sends nothing more.
            self.distrusted_since = Some(now);
            draft.effects.push(Effect::Life(lifecycle::Effect::Close));
        }
    }
}
