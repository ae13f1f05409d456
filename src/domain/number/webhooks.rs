//! Events and the webhook queue: numbered without a gap, queued in the same commit as what they tell of.

use super::interface::{Effect, Reply, ReplyId};
use super::machine::{Draft, Number, Then};
use crate::domain::change::{AttemptRecord, Change};
use crate::domain::delivery::{Attempted, DeliveryRow, ENDPOINTS_MAX, Endpoint};
use crate::domain::event::{Event, EventBody};
use crate::domain::id::{EventId, EventSeq};
use crate::domain::time::Timestamp;

impl Number {
    pub(super) fn on_add_endpoint(&mut self, mut endpoint: Box<Endpoint>, reply: ReplyId, draft: &mut Draft) {
        let being_added = self.pending.iter().flat_map(|pending| &pending.then);
        let being_added = being_added.filter(|then| matches!(then, Then::EndpointAdded(_))).count();
        if self.deliveries.endpoints().count() + being_added >= ENDPOINTS_MAX {
            draft.effects.push(Effect::Reply(reply, Reply::TooManyEndpoints));
            return;
        }
        self.counters.endpoint += 1;
        endpoint.ordinal = self.counters.endpoint;
        draft.changes.push(Change::Endpoint((*endpoint).clone()));
        draft.changes.push(Change::Counters(self.counters));
        draft.durable = true;
        draft.then.push(Then::EndpointAdded(endpoint.clone()));
        draft.then.push(Then::Reply(reply, Reply::EndpointAdded(endpoint)));
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

    pub(super) fn on_attempted(
        &mut self,
        record: AttemptRecord,
        attempted: Attempted,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        let (endpoint, event) = (record.endpoint, record.event);
        match attempted {
            Attempted::Delivered => {
                // Not awaited: a crash delivers it again, under the same id.
                if self.deliveries.done(endpoint, event).is_some() {
                    draft.changes.push(Change::DeliveryGone(endpoint, event));
                }
            }
            Attempted::Again(pause) => {
                if let Some(row) = self.deliveries.again(endpoint, event, now.after(pause)) {
                    draft.changes.push(Change::Delivery(endpoint, row));
                }
            }
            Attempted::Dead => self.bury(endpoint, event, draft),
            Attempted::EndpointGone => {
                self.bury(endpoint, event, draft);
                if let Some(stored) = self.deliveries.deactivate(endpoint) {
                    draft.changes.push(Change::Endpoint(stored));
                }
            }
        }
        self.retaining.attempt_logged();
        draft.changes.push(Change::Attempt(record));
    }

    pub(super) fn bury(&mut self, endpoint: u32, event: EventSeq, draft: &mut Draft) {
        if let Some(row) = self.deliveries.done(endpoint, event) {
            draft.changes.push(Change::DeliveryGone(endpoint, event));
            draft.changes.push(Change::DeadLetter(endpoint, row));
            draft.durable = true;
        }
    }

    /// Adds an event to the log and queues it for every endpoint that wants it, in the same commit. Durable also
    /// without an endpoint: a stream that was shown it must find the same event under its number after a crash.
    pub(super) fn record_event(&mut self, body: EventBody, now: Timestamp, draft: &mut Draft) {
        draft.durable = true;
        self.counters.event += 1;
        let seq = EventSeq(self.counters.event);
        let event = Event { id: EventId { number: self.id, seq }, at: now, body };
        let row = DeliveryRow { event: seq, chat: event.chat(), attempts: 0, due: now, queued_at: now };
        let kind = event.kind();
        let wanting = self.deliveries.endpoints().filter(|endpoint| endpoint.active && endpoint.filter.wants(kind));
        for ordinal in wanting.map(|endpoint| endpoint.ordinal) {
            draft.changes.push(Change::Delivery(ordinal, row));
            draft.then.push(Then::Enqueued(ordinal, row));
        }
        draft.changes.push(Change::Event(event));
        draft.changes.push(Change::Counters(self.counters));
        draft.then.push(Then::EventsVisible(seq));
    }
}
