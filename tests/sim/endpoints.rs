//! Webhook endpoints of customers: they take events, refuse them, hang, say that they are gone, and come and go.

use std::collections::BTreeMap;

use switchboard::domain::change::AttemptRecord;
use switchboard::domain::delivery::{Attempted, DeliveryRow, Endpoint};
use switchboard::domain::event::{EventFilter, EventKind};
use switchboard::domain::number::{Input, Reply};
use switchboard::domain::time::Timestamp;
use switchboard::domain::webhook::{Answer, Verdict, verdict};

use super::callers::Waiter;
use super::world::{Happens, World};

/// How an endpoint feels about requests; those not listed are fine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Failing,
    Hanging,
    Gone,
}

/// The moods of all endpoints.
#[derive(Debug, Default)]
pub(crate) struct Moods(BTreeMap<u32, Mood>);

impl Moods {
    /// Everybody is fine again. Who said that it is gone stays gone.
    pub(crate) fn calm(&mut self) {
        self.0.retain(|_, mood| *mood == Mood::Gone);
    }
}

impl World {
    pub(crate) fn add_endpoint(&mut self) {
        let filter = if self.rng.chance(700) {
            EventFilter::All
        } else {
            EventFilter::Only(vec![EventKind::MessageReceived, EventKind::MessageDelivered, EventKind::NumberConnected])
        };
        let endpoint = Endpoint {
            ordinal: 0,
            name: String::new(),
            url: String::new(),
            filter,
            secrets: Vec::new(),
            active: true,
            created_at: Timestamp(self.now),
        };
        if self.number.is_some() {
            let reply = self.reply_id();
            self.waiters.insert(reply, Waiter::AddEndpoint);
            self.step(Input::AddEndpoint(Box::new(endpoint), reply));
        }
    }

    pub(crate) fn endpoint_answered(&mut self, answer: Reply) {
        match answer {
            Reply::EndpointAdded(endpoint) => self.promises.endpoint_added(*endpoint, &self.disk.durable),
            Reply::TooManyEndpoints => {}
            other => panic!("an endpoint was answered {other:?}"),
        }
    }

    fn some_endpoint(&mut self) -> Option<u32> {
        let known: Vec<u32> = self.promises.endpoints().collect();
        (!known.is_empty()).then(|| self.rng.pick(&known))
    }

    pub(crate) fn remove_endpoint(&mut self) {
        let Some(ordinal) = self.some_endpoint() else { return };
        if self.number.is_some() {
            self.promises.endpoint_gone(ordinal);
            let reply = self.reply_id();
            self.waiters.insert(reply, Waiter::RemoveEndpoint);
            self.step(Input::RemoveEndpoint(ordinal, reply));
        }
    }

    pub(crate) fn change_mood(&mut self) {
        let Some(ordinal) = self.some_endpoint() else { return };
        match self.rng.below(20) {
            0 => drop(self.moods.0.insert(ordinal, Mood::Gone)),
            1..=4 => drop(self.moods.0.insert(ordinal, Mood::Hanging)),
            5..=9 => drop(self.moods.0.insert(ordinal, Mood::Failing)),
            _ => drop(self.moods.0.remove(&ordinal)),
        }
    }

    /// A request leaves. What the endpoint takes it has taken at once: nothing may count on its answer.
    pub(crate) fn deliver(&mut self, ordinal: u32, row: DeliveryRow) {
        self.figures.requests += 1;
        self.promises.delivering(ordinal, row.event, &self.disk.durable);
        let status = |code| Answer::Status { code, retry_after: None };
        let odd = self.fault(self.plan.webhook);
        let (answer, takes, pause) = match self.moods.0.get(&ordinal) {
            Some(Mood::Gone) => (status(410), false, 0),
            Some(Mood::Failing) => (status(500), false, 0),
            Some(Mood::Hanging) => (Answer::Silence, false, 15_000),
            // Taken, but the answer is lost.
            None if odd && self.rng.chance(300) => (Answer::Silence, true, 15_000),
            None if odd => (status(503), false, 0),
            None => (status(204), true, 0),
        };
        if takes {
            let event = self.disk.durable.events[&row.event].clone();
            self.promises.delivered(ordinal, &event);
        }
        let attempt = u32::from(row.attempts) + 1;
        let share = f64::from(u32::try_from(self.rng.below(1000)).unwrap_or(0)) / 1000.0;
        let attempted = match verdict(answer, attempt, share) {
            Verdict::Delivered => Attempted::Delivered,
            Verdict::Retry(pause) => Attempted::Again(pause),
            Verdict::Disable => Attempted::EndpointGone,
            Verdict::DeadLetter => Attempted::Dead,
        };
        let delay = pause + self.hop();
        let record = AttemptRecord {
            endpoint: ordinal,
            event: row.event,
            attempt: row.attempts.saturating_add(1),
            at: Timestamp(self.now + delay),
            status: None,
            outcome: answer.outcome().to_owned(),
            duration_ms: delay,
        };
        self.inside(delay, Happens::RequestEnds(record, attempted));
    }

    pub(crate) fn request_ends(&mut self, record: AttemptRecord, attempted: Attempted) {
        self.promises.request_ended(record.endpoint, record.event);
        if attempted == Attempted::EndpointGone {
            self.promises.endpoint_gone(record.endpoint);
        }
        self.step(Input::Attempted(record, attempted));
    }
}
