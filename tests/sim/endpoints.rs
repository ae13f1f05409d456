//! Webhook endpoints of customers: they take events, refuse them, hang, throttle, say that they are gone; their owners
//! stop them, start them, move them, give them other secrets and want things again.

use std::collections::BTreeMap;
use std::time::Duration;

use switchboard::domain::delivery::{AttemptEnd, Dispatch};
use switchboard::domain::endpoint::{Endpoint, EndpointStatus, EndpointUpdate, Replay};
use switchboard::domain::event::{EventBody, EventFilter};
use switchboard::domain::id::EventSeq;
use switchboard::domain::number::{EndpointOrder, Input, Reply};
use switchboard::domain::time::Timestamp;
use switchboard::domain::webhook::Answer;

use super::callers::Waiter;
use super::subscriptions::WANTED_BY_ALL;
use super::world::{Happens, World};

/// How an endpoint feels about requests; those not listed are fine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Failing,
    Hanging,
    Gone,
    /// 429, and wait.
    Throttling,
    /// 404.
    Rejecting,
    /// Some events it cannot digest, whatever happens.
    Picky,
    /// Every second request fails.
    Flapping,
}

/// The moods of all endpoints.
#[derive(Debug, Default)]
pub(crate) struct Moods(pub(crate) BTreeMap<u32, Mood>);

impl Moods {
    /// Everybody is fine again.
    pub(crate) fn calm(&mut self) {
        self.0.clear();
    }
}

fn filter(all: bool) -> EventFilter {
    if all { EventFilter::All } else { EventFilter::Only(WANTED_BY_ALL.to_vec()) }
}

impl World {
    pub(crate) fn add_endpoint(&mut self) {
        let endpoint = Endpoint {
            ordinal: 0,
            name: String::new(),
            url: String::new(),
            filter: filter(self.rng.chance(700)),
            secrets: vec!["first".to_owned()],
            overlap_until: None,
            status: EndpointStatus::Active,
            created_at: Timestamp(self.now),
            updated_at: Timestamp(self.now),
        };
        if self.number.is_some() {
            let reply = self.reply_id();
            self.waiters.insert(reply, Waiter::AddEndpoint);
            self.step(Input::AddEndpoint(Box::new(endpoint), reply));
        }
    }

    pub(crate) fn endpoint_answered(&mut self, answer: Reply) {
        match answer {
            Reply::EndpointAdded(endpoint) => self.promises.hooks.added(*endpoint, &self.disk.durable),
            Reply::TooManyEndpoints => {}
            other => panic!("an endpoint was answered {other:?}"),
        }
    }

    fn some_endpoint(&mut self) -> Option<u32> {
        let known: Vec<u32> = self.promises.hooks.known().collect();
        (!known.is_empty()).then(|| self.rng.pick(&known))
    }

    pub(crate) fn remove_endpoint(&mut self) {
        let Some(ordinal) = self.some_endpoint() else { return };
        if self.number.is_some() {
            self.promises.hooks.removed(ordinal);
            let reply = self.reply_id();
            self.waiters.insert(reply, Waiter::RemoveEndpoint);
            self.step(Input::RemoveEndpoint(ordinal, reply));
        }
    }

    pub(crate) fn change_mood(&mut self) {
        let Some(ordinal) = self.some_endpoint() else { return };
        let mood = match self.rng.below(24) {
            0 => Mood::Gone,
            1..=3 => Mood::Hanging,
            4..=7 => Mood::Failing,
            8..=9 => Mood::Throttling,
            10 => Mood::Rejecting,
            11..=14 => Mood::Picky,
            15..=16 => Mood::Flapping,
            _ => {
                self.moods.0.remove(&ordinal);
                return;
            }
        };
        self.moods.0.insert(ordinal, mood);
    }

    /// Its owner orders something.
    pub(crate) fn order_of_endpoint(&mut self) {
        let Some(ordinal) = self.some_endpoint() else { return };
        let last = self.disk.durable.counters.event;
        let order = match self.rng.below(10) {
            0..3 => {
                let active = self.rng.chance(600);
                EndpointOrder::Update(EndpointUpdate { active: Some(active), ..EndpointUpdate::default() })
            }
            3 => {
                let filter = Some(filter(self.rng.chance(700)));
                EndpointOrder::Update(EndpointUpdate { filter, ..EndpointUpdate::default() })
            }
            4 => EndpointOrder::Update(EndpointUpdate { url: Some(format!("{last}")), ..EndpointUpdate::default() }),
            5 => EndpointOrder::Rotate { secret: format!("secret {last}"), overlap: Duration::from_hours(1) },
            6..8 => {
                let dead: Vec<_> = self.disk.visible.dead_of(ordinal).copied().collect();
                if dead.is_empty() {
                    return;
                }
                EndpointOrder::Revive(self.rng.pick(&dead))
            }
            8 => {
                let event = EventSeq(1 + self.rng.below(last));
                if event.0 <= self.event_floor.0 {
                    return;
                }
                let Some(event) = self.disk.durable.events.get(&event) else { return };
                EndpointOrder::Resend { event: event.id.seq, chat: event.chat() }
            }
            _ => {
                let after = self.rng.below(last);
                let through = EventSeq((after + 1 + self.rng.below(400)).min(last));
                EndpointOrder::Replay(Replay { after: EventSeq(after), through })
            }
        };
        self.order_endpoint(ordinal, order);
    }

    fn order_endpoint(&mut self, ordinal: u32, order: EndpointOrder) {
        if self.number.is_none() {
            return;
        }
        let replay = match &order {
            EndpointOrder::Replay(replay) => Some(*replay),
            _ => None,
        };
        let reply = self.reply_id();
        self.waiters.insert(reply, Waiter::ChangeEndpoint(ordinal, replay));
        self.step(Input::Endpoint(ordinal, order, reply));
    }

    pub(crate) fn endpoint_changed(&mut self, ordinal: u32, replay: Option<Replay>, answer: &Reply) {
        match (answer, replay) {
            (Reply::EndpointChanged(_), Some(replay)) => {
                self.promises.hooks.replaying(ordinal, replay, &self.disk.durable);
            }
            (Reply::EndpointChanged(_) | Reply::NoSuchEndpoint | Reply::ReplayBusy, _) => {}
            (other, _) => panic!("an order for an endpoint was answered {other:?}"),
        }
    }

    /// Whoever stands still is started again: what is queued must go on.
    pub(crate) fn start_endpoints(&mut self) {
        let Some(number) = &self.number else { return };
        let stopped = number.deliveries().endpoints().filter(|endpoint| !endpoint.is_active());
        let stopped: Vec<u32> = stopped.map(|endpoint| endpoint.ordinal).collect();
        for ordinal in stopped {
            let start = EndpointUpdate { active: Some(true), ..EndpointUpdate::default() };
            self.order_endpoint(ordinal, EndpointOrder::Update(start));
        }
    }

    /// A request leaves. What the endpoint takes it has taken at once: nothing may count on its answer.
    pub(crate) fn deliver(&mut self, dispatch: Dispatch) {
        self.figures.requests += 1;
        let (ordinal, row) = (dispatch.endpoint, dispatch.row);
        self.promises.hooks.delivering(&dispatch, &self.disk.durable);
        let status = |code| Answer::Status { code, retry_after: None };
        let odd = self.fault(self.plan.webhook);
        let mood = self.moods.0.get(&ordinal).copied();
        let event = self.disk.durable.events.get(&row.event).cloned();
        // Of an erased contact nothing is sent.
        let event = event.filter(|event| !matches!(event.body, EventBody::Erased(_)));
        let (answer, takes, pause) = match mood {
            _ if event.is_none() => (Answer::Unreadable, false, 0),
            _ if self.fault(self.plan.webhook / 4) => (Answer::Crowded, false, 0),
            Some(Mood::Gone) => (status(410), false, 0),
            Some(Mood::Failing) => (status(500), false, 0),
            Some(Mood::Hanging) => (Answer::Silence, false, 15_000),
            Some(Mood::Rejecting) => (status(404), false, 0),
            Some(Mood::Throttling) => {
                (Answer::Status { code: 429, retry_after: Some(Duration::from_secs(90)) }, false, 0)
            }
            Some(Mood::Picky) if row.event.0.is_multiple_of(5) => (status(500), false, 0),
            Some(Mood::Flapping) if self.rng.chance(500) => (status(502), false, 0),
            // Taken, but the answer is lost.
            _ if odd && self.rng.chance(300) => (Answer::Silence, true, 15_000),
            _ if odd => (status(503), false, 0),
            _ => (status(204), true, 0),
        };
        let tally = self.tallies.entry(ordinal).or_default();
        tally.requests += 1;
        if let Some(event) = event.filter(|_| takes) {
            // What a crash made come twice was there in time.
            if !self.promises.hooks.has_received(ordinal, row.sequence) {
                tally.taken += 1;
                tally.slowest = tally.slowest.max(self.now - event.at.0);
            }
            self.promises.hooks.delivered(&dispatch, &event, &self.disk.durable);
        }
        let delay = pause + self.hop();
        let end = AttemptEnd {
            endpoint: ordinal,
            sequence: row.sequence,
            answer,
            duration_ms: delay,
            excerpt: String::new(),
            kind: None,
            jitter: f64::from(u32::try_from(self.rng.below(1000)).unwrap_or(0)) / 1000.0,
        };
        self.inside(delay, Happens::RequestEnds(Box::new(end)));
    }

    pub(crate) fn request_ends(&mut self, end: AttemptEnd) {
        self.promises.hooks.request_ended(end.endpoint, end.sequence);
        self.step(Input::Attempted(end));
    }

    /// Memory per endpoint stays within its limits, whatever waits on disk.
    pub(crate) fn check_windows(&mut self) {
        use switchboard::domain::delivery::{ASIDE_MAX, REPLAY_MAX, SIDE_ROOM, WINDOW_MAX};
        let Some(number) = &self.number else { return };
        for endpoint in number.deliveries().endpoints() {
            let (window, side) = number.deliveries().in_memory(endpoint.ordinal);
            assert!(window <= WINDOW_MAX, "{window} rows in a window");
            // Orders under way were let in together.
            assert!(side <= ASIDE_MAX + SIDE_ROOM + 2 * REPLAY_MAX, "{side} rows beside a window");
            self.figures.window_most = self.figures.window_most.max(window as u64);
        }
    }
}
