//! Events and the webhook queue: numbered without a gap, queued in the same commit as what they tell of.

use super::interface::{Counted, Effect, EndpointOrder, Reply, ReplyId};
use super::machine::{Draft, Number, Then};
use crate::domain::change::{AttemptRecord, Change};
use crate::domain::delivery::{AttemptEnd, Course, DeadLetter, DeadReason, DeliveryRow, Fate, Logged, StoredEndpoint};
use crate::domain::endpoint::{DisabledReason, ENDPOINTS_MAX, Endpoint, EndpointState};
use crate::domain::event::{Event, EventBody};
use crate::domain::id::{ChatNo, EndpointId, EventId, EventSeq};
use crate::domain::time::Timestamp;
use crate::domain::webhook::{Answer, Schedule};

impl Number {
    /// Follows another schedule of webhook attempts than the published one.
    pub fn follow_schedule(&mut self, schedule: Schedule) {
        self.deliveries.follow(schedule);
    }

    pub(super) fn on_add_endpoint(&mut self, mut endpoint: Box<Endpoint>, reply: ReplyId, draft: &mut Draft) {
        let being_added = self.pending.iter().flat_map(|pending| &pending.then);
        let being_added = being_added.filter(|then| matches!(then, Then::EndpointAdded(_))).count();
        if self.deliveries.endpoints().count() + being_added >= ENDPOINTS_MAX {
            draft.effects.push(Effect::Reply(reply, Reply::TooManyEndpoints));
            return;
        }
        self.counters.endpoint += 1;
        endpoint.ordinal = self.counters.endpoint;
        draft.changes.push(Change::EndpointState(endpoint.ordinal, EndpointState::default()));
        draft.changes.push(Change::Endpoint((*endpoint).clone()));
        draft.changes.push(Change::Counters(self.counters));
        draft.durable = true;
        draft.then.push(Then::EndpointAdded(endpoint.clone()));
        draft.then.push(Then::Reply(reply, Reply::EndpointAdded(endpoint)));
    }

    pub(super) fn endpoint_added(&mut self, endpoint: Endpoint) {
        let state = Some(EndpointState::default());
        let stored = StoredEndpoint { endpoint, state, queued: 0 };
        self.deliveries.add_endpoint(stored, EventSeq(0));
    }

    pub(super) fn on_remove_endpoint(&mut self, ordinal: u32, reply: ReplyId, draft: &mut Draft) {
        if self.deliveries.remove_endpoint(ordinal).is_none() {
            draft.effects.push(Effect::Reply(reply, Reply::NoSuchEndpoint));
            return;
        }
        draft.changes.push(Change::EndpointGone(ordinal));
        draft.durable = true;
        draft.then.push(Then::Reply(reply, Reply::EndpointRemoved));
    }

    pub(super) fn on_endpoint_order(
        &mut self,
        ordinal: u32,
        order: EndpointOrder,
        reply: ReplyId,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        let done = match order {
            EndpointOrder::Update(update) => self.deliveries.update(ordinal, update, now).map(|(endpoint, state)| {
                draft.changes.push(Change::EndpointState(ordinal, state));
                draft.changes.push(Change::Endpoint(endpoint));
            }),
            EndpointOrder::Rotate { secret, overlap } => self
                .deliveries
                .rotate(ordinal, secret, overlap, now)
                .map(|endpoint| draft.changes.push(Change::Endpoint(endpoint))),
            EndpointOrder::Revive(dead) => self.deliveries.revive(ordinal, dead.row, now).map(|row| {
                draft.changes.push(Change::Delivery(ordinal, row));
                draft.changes.push(Change::DeadLetterGone(ordinal, row.event));
                draft.then.push(Then::Enqueued(ordinal, row));
            }),
            EndpointOrder::Resend { event, chat } => self.queue(ordinal, (event, chat), Course::Replay, now, draft),
            EndpointOrder::Replay(replay) => self
                .deliveries
                .begin_replay(ordinal, replay)
                .map(|state| draft.changes.push(Change::EndpointState(ordinal, state))),
        };
        let endpoint = self.deliveries.endpoint(ordinal).cloned();
        let answer = match (done, endpoint) {
            (_, None) => Reply::NoSuchEndpoint,
            (None, Some(_)) => Reply::ReplayBusy,
            (Some(()), Some(endpoint)) => {
                draft.durable = true;
                draft.then.push(Then::Reply(reply, Reply::EndpointChanged(Box::new(endpoint))));
                return;
            }
        };
        draft.effects.push(Effect::Reply(reply, answer));
    }

    /// Queues an event for an endpoint. `None` if it has no room, or is not there.
    fn queue(
        &mut self,
        ordinal: u32,
        (event, chat): (EventSeq, Option<ChatNo>),
        course: Course,
        now: Timestamp,
        draft: &mut Draft,
    ) -> Option<()> {
        let (row, state) = self.deliveries.queue(ordinal, event, chat, course, now)?;
        draft.changes.push(Change::Delivery(ordinal, row));
        draft.changes.push(Change::EndpointState(ordinal, state));
        draft.then.push(Then::Enqueued(ordinal, row));
        Some(())
    }

    pub(super) fn on_attempted(&mut self, end: AttemptEnd, now: Timestamp, draft: &mut Draft) {
        let ordinal = end.endpoint;
        let Some(ended) = self.deliveries.attempted(&end, now) else { return };
        let row = ended.row;
        match ended.fate {
            // Not awaited: a crash delivers it again, under the same id.
            Fate::Delivered => draft.changes.push(Change::DeliveryGone(ordinal, row.sequence)),
            Fate::Again => draft.changes.push(Change::Delivery(ordinal, row)),
            Fate::Waits => {}
            Fate::Dead(reason) => self.bury(ordinal, row, reason, now, draft),
        }
        if end.answer != Answer::Crowded {
            let counted = u16::from(!matches!(ended.fate, Fate::Again | Fate::Dead(_)));
            draft.changes.push(Change::Attempt(AttemptRecord {
                endpoint: ordinal,
                event: row.event,
                sequence: row.sequence,
                kind: end.kind,
                course: row.course,
                attempt: row.attempts.saturating_add(counted),
                at: now,
                status: end.answer.status(),
                outcome: end.answer.outcome().to_owned(),
                duration_ms: end.duration_ms,
                response: end.excerpt,
            }));
            self.retaining.attempt_logged();
        }
        if let Some(state) = ended.state {
            draft.changes.push(Change::EndpointState(ordinal, state));
        }
        if let Some(reason) = ended.disable {
            self.disable(ordinal, reason, now, draft);
        }
    }

    fn bury(&mut self, ordinal: u32, row: DeliveryRow, reason: DeadReason, now: Timestamp, draft: &mut Draft) {
        draft.changes.push(Change::DeliveryGone(ordinal, row.sequence));
        draft.changes.push(Change::DeadLetter(ordinal, DeadLetter { row, at: now, reason }));
        draft.effects.push(Effect::Count(Counted::DeadLetter(reason)));
        // Its chat goes on only then: after a crash it must not come back behind what overtook it.
        draft.durable = true;
        draft.then.push(Then::Buried(ordinal, row.sequence));
    }

    /// Stops an endpoint and tells the number's other endpoints and streams.
    fn disable(&mut self, ordinal: u32, reason: DisabledReason, now: Timestamp, draft: &mut Draft) {
        let Some(stored) = self.deliveries.disable(ordinal, reason, now) else { return };
        draft.changes.push(Change::Endpoint(stored));
        draft.effects.push(Effect::Count(Counted::EndpointDisabled(ordinal, reason)));
        let webhook = EndpointId { number: self.id, ordinal };
        self.record_event(EventBody::WebhookDisabled { webhook, reason }, now, draft);
    }

    pub(super) fn on_replay_loaded(&mut self, ordinal: u32, events: &[Logged], now: Timestamp, draft: &mut Draft) {
        let before = self.deliveries.state(ordinal);
        for logged in self.deliveries.replay_loaded(ordinal, events) {
            // There is room: a replay is read only while the whole queue is in memory.
            let queued = self.queue(ordinal, (logged.event, logged.chat), Course::Replay, now, draft);
            debug_assert!(queued.is_some());
        }
        let Some(state) = self.deliveries.state(ordinal).filter(|state| Some(*state) != before) else { return };
        draft.changes.push(Change::EndpointState(ordinal, state));
        // A position that was given out must never be given to another delivery.
        draft.durable = true;
    }

    /// Ends a step: what is stuck makes way, what is due goes, what is missing is read.
    pub(super) fn pump_deliveries(&mut self, now: Timestamp, draft: &mut Draft) {
        if self.draining {
            return;
        }
        let (moved, dropped) = self.deliveries.set_aside_stuck(now);
        for (ordinal, row) in moved {
            draft.changes.push(Change::Delivery(ordinal, row));
            draft.effects.push(Effect::Count(Counted::SetAside));
            // What overtakes it says so; after a crash it must still be known as late.
            draft.durable = true;
            draft.then.push(Then::SetAside(ordinal, row));
        }
        for (ordinal, row) in dropped {
            self.bury(ordinal, row, DeadReason::RetryLaneFull, now, draft);
        }
        draft.effects.extend(self.deliveries.take_due(now).into_iter().map(Effect::Deliver));
        draft.effects.extend(self.deliveries.pages_to_load().into_iter().map(Effect::LoadPage));
        draft.effects.extend(self.deliveries.replays_to_load().into_iter().map(Effect::LoadReplay));
        self.deliveries.rest();
    }

    /// Adds an event to the log and queues it for every endpoint that wants it, in the same commit. Durable also
    /// without an endpoint: a stream that was shown it must find the same event under its number after a crash.
    pub(super) fn record_event(&mut self, body: EventBody, now: Timestamp, draft: &mut Draft) {
        draft.durable = true;
        self.counters.event += 1;
        let seq = EventSeq(self.counters.event);
        let event = Event { id: EventId { number: self.id, seq }, at: now, body };
        let (kind, chat) = (event.kind(), event.chat());
        let wanting =
            self.deliveries.endpoints().filter(|endpoint| endpoint.is_active() && endpoint.filter.wants(kind));
        let wanting: Vec<u32> = wanting.map(|endpoint| endpoint.ordinal).collect();
        draft.changes.push(Change::Event(event));
        draft.changes.push(Change::Counters(self.counters));
        draft.then.push(Then::EventsVisible(seq));
        for ordinal in wanting {
            if self.queue(ordinal, (seq, chat), Course::Live, now, draft).is_none() {
                self.disable(ordinal, DisabledReason::QueueFull, now, draft);
            }
        }
    }
}
