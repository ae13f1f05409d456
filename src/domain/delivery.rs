//! The webhook queue of one number as far as memory is concerned: per endpoint a window over the rows on disk. Events
//! of one chat go in order; a slow endpoint only delays itself; an event that stays stuck is set aside, so that its
//! chat goes on with a declared gap; late ones and replays have a lane of their own.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::breaker::{Admits, Breaker, Pauses, Stand};
use super::change::AttemptRecord;
use super::endpoint::{DeliverySeq, DisabledReason, Endpoint, EndpointState, EndpointStatus, EndpointUpdate, Replay};
use super::event::EventKind;
use super::id::{ChatNo, EventSeq};
use super::time::Timestamp;
use super::webhook::{self, Answer, Schedule, Tells, Verdict};

/// Rows of one endpoint's queue held in memory; the others wait on disk.
pub const WINDOW_MAX: usize = 64;
/// Requests under way at once to one endpoint of one number.
pub const IN_FLIGHT_MAX: usize = 4;
/// Requests with late deliveries and replays, beside those: live ones never wait for them.
pub const SIDE_IN_FLIGHT_MAX: usize = 1;
/// How long a failing event may hold up its chat before it is set aside.
pub const BLOCK_MAX: Duration = Duration::from_mins(10);
/// Events set aside at once; one more becomes a dead letter.
pub const ASIDE_MAX: usize = 256;
/// Late deliveries and replays of one endpoint up to which more are taken on request.
pub const SIDE_ROOM: usize = 128;
/// Rows of a replay queued at once; the others are read from the event log when these are through.
pub const REPLAY_MAX: usize = 16;
/// Events read at once from the log for a replay; those the endpoint does not want are passed over.
pub const REPLAY_READ: usize = 128;
/// Rows of one endpoint; at the limit it is disabled, and a replay brings what came after.
pub const QUEUE_MAX: u64 = 1_000_000;
/// Dead letters kept of one endpoint, newest.
pub const DEAD_LETTERS_MAX: usize = 10_000;
/// Missing events that a delivery names; it counts them all.
pub const GAP_NAMED_MAX: usize = 16;

/// The way a delivery takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum Course {
    /// In its place.
    #[default]
    Live,
    /// After others of its chat: it was stuck, or comes back from the dead letters.
    Late,
    /// Sent again on request.
    Replay,
}

/// One event waiting for one endpoint; also what is stored of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveryRow {
    /// The event.
    pub event: EventSeq,
    /// Its chat, whose order is kept.
    pub chat: Option<ChatNo>,
    /// Attempts made that count.
    pub attempts: u16,
    /// Not before this moment.
    pub due: Timestamp,
    /// When it was queued.
    pub queued_at: Timestamp,
    /// Its place in the endpoint's queue, and its name there. 0 in rows of earlier versions, which means the event's.
    #[serde(default)]
    pub sequence: DeliverySeq,
    /// The way it takes.
    #[serde(default)]
    pub course: Course,
    /// Since when it holds up its chat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck_since: Option<Timestamp>,
}

/// Why a delivery was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum DeadReason {
    /// Every attempt of the schedule failed.
    #[default]
    Exhausted,
    /// The endpoint refused it, as often as such an answer is asked for again.
    Rejected,
    /// It was stuck, and too many were set aside already.
    RetryLaneFull,
    /// Its event is not kept any more.
    EventGone,
}

impl DeadReason {
    /// Stable code for the API.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Exhausted => "EXHAUSTED",
            Self::Rejected => "REJECTED",
            Self::RetryLaneFull => "RETRY_LANE_FULL",
            Self::EventGone => "EVENT_GONE",
        }
    }
}

/// A delivery that was given up; also what is stored of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// As it was.
    #[serde(flatten)]
    pub row: DeliveryRow,
    /// When it was given up.
    #[serde(default)]
    pub at: Timestamp,
    /// Why.
    #[serde(default)]
    pub reason: DeadReason,
}

/// A delivery to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dispatch {
    /// The endpoint.
    pub endpoint: u32,
    /// What.
    pub row: DeliveryRow,
    /// Whether nobody waits for it: a repeat, a probe, a late one or a replay.
    pub background: bool,
    /// Earlier events of its chat that this endpoint has not got, oldest first; [`GAP_NAMED_MAX`] at most.
    pub missing: Vec<(DeliverySeq, EventSeq)>,
    /// How many they are in all.
    pub missing_count: usize,
}

impl Dispatch {
    /// What was dispatched when an attempt was logged, as far as the log tells.
    #[must_use]
    pub fn again(record: &AttemptRecord) -> Self {
        let row = DeliveryRow {
            event: record.event,
            chat: None,
            attempts: record.attempt.saturating_sub(1),
            due: record.at,
            queued_at: record.at,
            sequence: record.sequence,
            course: record.course,
            stuck_since: None,
        };
        Self { endpoint: record.endpoint, row, background: true, missing: Vec::new(), missing_count: 0 }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub struct AttemptEnd {
    /// The endpoint.
    pub endpoint: u32,
    /// The delivery.
    pub sequence: DeliverySeq,
    /// What came back.
    pub answer: Answer,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// The beginning of the response, for the delivery log.
    pub excerpt: String,
    /// The kind of the event, where it could be read.
    pub kind: Option<EventKind>,
    /// Random, uniform in 0..1.
    pub jitter: f64,
}

/// What became of a delivery after an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The endpoint has it.
    Delivered,
    /// It is tried again; its row changed.
    Again,
    /// It is tried again; nothing of it changed.
    Waits,
    /// It was given up.
    Dead(DeadReason),
}

/// What follows from an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The delivery, as it is now.
    pub row: DeliveryRow,
    /// What became of it.
    pub fate: Fate,
    /// The endpoint's state, if it changed.
    pub state: Option<EndpointState>,
    /// The endpoint must be disabled.
    pub disable: Option<DisabledReason>,
}

/// What is known of an endpoint when the number starts.
#[derive(Debug, Clone)]
pub struct StoredEndpoint {
    /// Its record.
    pub endpoint: Endpoint,
    /// What moves with its deliveries; none in data of earlier versions.
    pub state: Option<EndpointState>,
    /// Rows in its queue.
    pub queued: u64,
}

/// How an endpoint's queue stands, for those who look on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Deliveries that wait or are under way.
    pub queued: u64,
    /// Whether it is asked at all.
    pub breaker: Stand,
    /// When the next attempt is due; none while nothing waits for a moment.
    pub next_attempt: Option<Timestamp>,
}

/// What is being done with a row in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle,
    InFlight,
    /// It makes way for its chat, as soon as that is durable.
    Moving,
}

#[derive(Debug, Clone)]
struct Waiting {
    row: DeliveryRow,
    stage: Stage,
}

impl Waiting {
    fn is_idle(&self) -> bool {
        self.stage == Stage::Idle
    }
}

/// A page of an endpoint's rows must be read from disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadPage {
    /// Whose rows.
    pub endpoint: u32,
    /// Only rows after this one.
    pub after: DeliverySeq,
}

/// Events of a replay must be read from the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadReplay {
    /// For whom.
    pub endpoint: u32,
    /// Which.
    pub replay: Replay,
}

/// An event of the log, as far as a replay needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Logged {
    /// Its place.
    pub event: EventSeq,
    /// Its chat.
    pub chat: Option<ChatNo>,
    /// Its kind.
    pub kind: EventKind,
}

#[derive(Debug, Clone)]
struct Lane {
    endpoint: Endpoint,
    state: EndpointState,
    breaker: Breaker,
    /// Live rows, in order.
    window: BTreeMap<DeliverySeq, Waiting>,
    /// Late rows and replays.
    side: BTreeMap<DeliverySeq, Waiting>,
    /// Rows on disk, those in memory included.
    total: u64,
    /// Every row on disk up to here is, or was, in memory.
    loaded_through: DeliverySeq,
    /// Rows after this one may be read before they are flushed, and are not counted yet.
    durable_through: DeliverySeq,
    /// A page is being read; holds `total` as it was when the read began.
    loading: Option<u64>,
    loading_replay: bool,
    proof: Proof,
    rest: Rest,
}

/// Whether the endpoint took anything since the number started: before that, nobody knows whether it was down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    Missing,
    There,
}

/// Whether a lane was looked at since it changed: most steps of a number do not touch most of its lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    Changed,
    /// Nothing becomes due before this moment.
    Until(Option<Timestamp>),
}

impl Lane {
    fn new(stored: StoredEndpoint, last_event: EventSeq) -> Self {
        // Rows of earlier versions are named by their events, so new names begin after the last of these.
        let first = EndpointState { last_sequence: DeliverySeq(last_event.0), ..EndpointState::default() };
        let state = stored.state.unwrap_or(first);
        Self {
            endpoint: stored.endpoint,
            state,
            breaker: Breaker::default(),
            window: BTreeMap::new(),
            side: BTreeMap::new(),
            total: stored.queued,
            loaded_through: DeliverySeq(0),
            durable_through: state.last_sequence,
            loading: None,
            loading_replay: false,
            // With an empty queue there is nothing that an outage may have touched.
            proof: if stored.queued == 0 { Proof::There } else { Proof::Missing },
            rest: Rest::Changed,
        }
    }

    fn rests(&self, now: Timestamp) -> bool {
        match self.rest {
            Rest::Changed => false,
            Rest::Until(due) => due.is_none_or(|due| now < due),
        }
    }

    fn backlog(&self) -> Backlog {
        let next_attempt = match self.rest {
            Rest::Changed => None,
            Rest::Until(due) => due,
        };
        Backlog { queued: self.total, breaker: self.breaker.stand(), next_attempt }
    }

    fn in_memory(&self) -> usize {
        self.window.len() + self.side.len()
    }

    fn has_more_on_disk(&self) -> bool {
        self.total > self.in_memory() as u64
    }

    fn waiting(&mut self, sequence: DeliverySeq) -> Option<&mut Waiting> {
        self.window.get_mut(&sequence).or_else(|| self.side.get_mut(&sequence))
    }

    fn in_flight(of: &BTreeMap<DeliverySeq, Waiting>) -> usize {
        of.values().filter(|waiting| waiting.stage == Stage::InFlight).count()
    }

    /// The rows that are first of their chat, in order. The window is small: a list beats hashing at every step.
    fn heads(&self) -> impl Iterator<Item = &Waiting> {
        let mut chats: Vec<Option<ChatNo>> = Vec::new();
        self.window.values().filter(move |waiting| {
            let first = !chats.contains(&waiting.row.chat);
            if first {
                chats.push(waiting.row.chat);
            }
            first
        })
    }

    fn set_aside(&self) -> impl Iterator<Item = &DeliveryRow> {
        self.side.values().map(|waiting| &waiting.row).filter(|row| row.course == Course::Late)
    }

    fn outgoing(&self, row: DeliveryRow, background: bool) -> Dispatch {
        let earlier = |other: &&DeliveryRow| other.chat == row.chat && other.sequence < row.sequence;
        let declares = row.course == Course::Live;
        let missing_count = if declares { self.set_aside().filter(earlier).count() } else { 0 };
        let named = self.set_aside().filter(earlier).take(missing_count.min(GAP_NAMED_MAX));
        let missing = named.map(|other| (other.sequence, other.event)).collect();
        let endpoint = self.endpoint.ordinal;
        Dispatch { endpoint, row, background: background || row.attempts > 0, missing, missing_count }
    }

    /// What may go now, in order.
    fn choose(&self, now: Timestamp) -> Vec<Dispatch> {
        if !self.endpoint.is_active() {
            return Vec::new();
        }
        match self.breaker.admits(now) {
            Admits::Nothing => Vec::new(),
            Admits::Probe => self.probe().map(|row| self.outgoing(row, true)).into_iter().collect(),
            Admits::All => {
                let free = IN_FLIGHT_MAX.saturating_sub(Self::in_flight(&self.window));
                let due = |waiting: &&Waiting| waiting.is_idle() && waiting.row.due <= now;
                let live = self.heads().filter(due).take(free).map(|waiting| self.outgoing(waiting.row, false));
                let free = SIDE_IN_FLIGHT_MAX.saturating_sub(Self::in_flight(&self.side));
                let side = self.side.values().filter(due).take(free);
                live.chain(side.map(|waiting| self.outgoing(waiting.row, true))).collect()
            }
        }
    }

    /// The oldest delivery asks for all: whether it is due does not matter, its attempt does not count.
    fn probe(&self) -> Option<DeliveryRow> {
        if Self::in_flight(&self.window) + Self::in_flight(&self.side) > 0 {
            return None;
        }
        let first = self.window.values().next().or_else(|| self.side.values().next());
        first.filter(|waiting| waiting.is_idle()).map(|waiting| waiting.row)
    }

    fn next_due(&self) -> Option<Timestamp> {
        if !self.endpoint.is_active() {
            return None;
        }
        if !self.breaker.is_closed() {
            return self.probe().and(self.breaker.opens_up_at());
        }
        let idle = |waiting: &&Waiting| waiting.is_idle();
        let live = (Self::in_flight(&self.window) < IN_FLIGHT_MAX)
            .then(|| self.heads().filter(idle).map(|waiting| waiting.row.due).min());
        let side = (Self::in_flight(&self.side) < SIDE_IN_FLIGHT_MAX)
            .then(|| self.side.values().filter(idle).map(|waiting| waiting.row.due).min());
        let stuck = self.window.values().filter(idle).filter_map(|waiting| waiting.row.stuck_since);
        let stuck = stuck.min().map(|since| since.after(BLOCK_MAX));
        [live.flatten(), side.flatten(), stuck].into_iter().flatten().min()
    }

    /// The endpoint is back, or asked for another chance: whatever waits for a later attempt goes at once.
    fn begin_anew(&mut self, now: Timestamp) {
        for waiting in self.window.values_mut().chain(self.side.values_mut()) {
            waiting.row.due = waiting.row.due.min(now);
            waiting.row.stuck_since = None;
        }
    }

    fn take_out(&mut self, sequence: DeliverySeq) -> Option<DeliveryRow> {
        let waiting = self.window.remove(&sequence).or_else(|| self.side.remove(&sequence))?;
        self.total = self.total.saturating_sub(1);
        Some(waiting.row)
    }

    /// Notes what an answer tells of the endpoint. Gives whether an attempt counts against its delivery.
    fn learn(&mut self, end: &AttemptEnd, schedule: &Schedule, now: Timestamp) -> bool {
        match end.answer.tells() {
            Tells::Success | Tells::Rejects => {
                let was_down = self.breaker.answered();
                let first = end.answer.tells() == Tells::Success && self.proof == Proof::Missing;
                if first {
                    self.proof = Proof::There;
                }
                if was_down || first {
                    self.begin_anew(now);
                }
                true
            }
            Tells::Trouble(asked) => {
                let (first, longest) = schedule.pauses();
                let jitter = webhook::jitter_factor(end.jitter);
                self.breaker.failed(end.sequence, now, Pauses { first, longest, asked, jitter });
                self.breaker.is_closed()
            }
            Tells::NotAsked => {
                self.breaker.not_sent(now.after(crowded_pause(end.jitter)));
                false
            }
            Tells::Impossible => {
                self.breaker.not_sent(now);
                true
            }
            Tells::Gone => false,
        }
    }

    /// Whether the endpoint's state changed, and whether it is hopeless.
    fn note_success(&mut self, tells: Tells, now: Timestamp) -> (bool, bool) {
        let before = self.state.failing_since;
        match tells {
            Tells::Success => self.state.failing_since = None,
            Tells::Rejects | Tells::Trouble(_) | Tells::Gone => {
                self.state.failing_since.get_or_insert(now);
            }
            Tells::Impossible | Tells::NotAsked => {}
        }
        let hopeless = self.state.failing_since.is_some_and(|since| webhook::is_hopeless(since, now));
        (before != self.state.failing_since, hopeless)
    }

    fn attempted(&mut self, end: &AttemptEnd, schedule: &Schedule, now: Timestamp) -> Option<Ended> {
        self.waiting(end.sequence)?.stage = Stage::Idle;
        let counts = self.learn(end, schedule, now);
        let tells = end.answer.tells();
        let (changed, hopeless) = self.note_success(tells, now);
        let mut disable = hopeless.then_some(DisabledReason::Failing);
        let waiting = self.waiting(end.sequence)?;
        let fate = match tells {
            Tells::Success => Fate::Delivered,
            Tells::Gone => {
                disable = Some(DisabledReason::Gone);
                Fate::Waits
            }
            Tells::Impossible => Fate::Dead(DeadReason::EventGone),
            Tells::NotAsked => {
                waiting.row.due = now.after(crowded_pause(end.jitter));
                Fate::Waits
            }
            Tells::Rejects | Tells::Trouble(_) if !counts => Fate::Waits,
            Tells::Rejects | Tells::Trouble(_) => {
                waiting.row.attempts = waiting.row.attempts.saturating_add(1);
                waiting.row.stuck_since.get_or_insert(now);
                match webhook::verdict(schedule, end.answer, waiting.row.attempts.into(), end.jitter) {
                    Verdict::Retry(pause) => {
                        waiting.row.due = now.after(pause);
                        Fate::Again
                    }
                    Verdict::DeadLetter if tells == Tells::Rejects => Fate::Dead(DeadReason::Rejected),
                    Verdict::DeadLetter => Fate::Dead(DeadReason::Exhausted),
                }
            }
        };
        let row = waiting.row;
        match fate {
            Fate::Delivered => drop(self.take_out(end.sequence)),
            Fate::Dead(_) => waiting.stage = Stage::Moving,
            Fate::Again | Fate::Waits => {}
        }
        Some(Ended { row, fate, state: changed.then_some(self.state), disable })
    }

    /// Moves what has held up its chat for too long out of its way. Gives the rows as they are to be stored, and those
    /// for which there is no room.
    fn set_aside_stuck(&mut self, now: Timestamp) -> (Vec<DeliveryRow>, Vec<DeliveryRow>) {
        let (mut moved, mut dropped) = (Vec::new(), Vec::new());
        if !self.endpoint.is_active() || !self.breaker.is_closed() {
            return (moved, dropped);
        }
        let stuck = |waiting: &&Waiting| {
            waiting.is_idle() && waiting.row.stuck_since.is_some_and(|since| now.since(since) >= BLOCK_MAX)
        };
        let stuck: Vec<DeliverySeq> = self.window.values().filter(stuck).map(|waiting| waiting.row.sequence).collect();
        for sequence in stuck {
            let room = self.set_aside().count() + moved.len() < ASIDE_MAX;
            let Some(waiting) = self.window.get_mut(&sequence) else { continue };
            waiting.stage = Stage::Moving;
            if room {
                moved.push(DeliveryRow { course: Course::Late, stuck_since: None, ..waiting.row });
            } else {
                dropped.push(waiting.row);
            }
        }
        (moved, dropped)
    }

    /// It is on disk that the row makes way.
    fn moved(&mut self, row: DeliveryRow) {
        if self.window.remove(&row.sequence).is_some() {
            self.side.insert(row.sequence, Waiting { row, stage: Stage::Idle });
        }
    }

    fn insert(&mut self, row: DeliveryRow) {
        let of = if row.course == Course::Live { &mut self.window } else { &mut self.side };
        of.entry(row.sequence).or_insert(Waiting { row, stage: Stage::Idle });
        self.loaded_through = self.loaded_through.max(row.sequence);
    }

    fn wants_replay_page(&self) -> bool {
        let queued = || self.side.values().filter(|waiting| waiting.row.course == Course::Replay).count();
        self.state.replay.is_some()
            && !self.loading_replay
            && self.endpoint.is_active()
            && self.breaker.is_closed()
            && !self.has_more_on_disk()
            && queued() <= REPLAY_MAX / 2
    }
}

/// The webhook queue of one number.
#[derive(Debug, Clone)]
pub struct Deliveries {
    lanes: Vec<Lane>,
    schedule: Schedule,
}

impl Default for Deliveries {
    fn default() -> Self {
        Self { lanes: Vec::new(), schedule: Schedule::PUBLISHED }
    }
}

impl Deliveries {
    /// Follows another schedule than the published one.
    pub fn follow(&mut self, schedule: Schedule) {
        self.schedule = schedule;
    }

    /// Adds an endpoint; none of its rows are in memory yet. `last_event` names rows of earlier versions.
    pub fn add_endpoint(&mut self, stored: StoredEndpoint, last_event: EventSeq) {
        self.lanes.push(Lane::new(stored, last_event));
    }

    /// Removes an endpoint and forgets its rows.
    pub fn remove_endpoint(&mut self, ordinal: u32) -> Option<Endpoint> {
        let index = self.lanes.iter().position(|lane| lane.endpoint.ordinal == ordinal)?;
        Some(self.lanes.remove(index).endpoint)
    }

    /// Stops an endpoint; what is queued stays. Gives what must be stored, if it was active.
    pub fn disable(&mut self, ordinal: u32, reason: DisabledReason, now: Timestamp) -> Option<Endpoint> {
        let lane = self.lane(ordinal).filter(|lane| lane.endpoint.is_active())?;
        lane.endpoint.status = EndpointStatus::Disabled { reason, at: now };
        lane.endpoint.updated_at = now;
        Some(lane.endpoint.clone())
    }

    /// Changes an endpoint. One that is started again, or moved, begins anew with everything that is queued.
    pub fn update(
        &mut self,
        ordinal: u32,
        update: EndpointUpdate,
        now: Timestamp,
    ) -> Option<(Endpoint, EndpointState)> {
        let lane = self.lane(ordinal)?;
        let moved = update.url.as_ref().is_some_and(|url| *url != lane.endpoint.url);
        let was_active = lane.endpoint.is_active();
        lane.endpoint.update(update, now);
        if moved || (!was_active && lane.endpoint.is_active()) {
            lane.breaker = Breaker::default();
            lane.state.failing_since = None;
            lane.begin_anew(now);
        }
        Some((lane.endpoint.clone(), lane.state))
    }

    /// Gives an endpoint another secret.
    pub fn rotate(&mut self, ordinal: u32, secret: String, overlap: Duration, now: Timestamp) -> Option<Endpoint> {
        let lane = self.lane(ordinal)?;
        lane.endpoint.rotate(secret, overlap, now);
        Some(lane.endpoint.clone())
    }

    /// One lane, to be changed.
    fn lane(&mut self, ordinal: u32) -> Option<&mut Lane> {
        let lane = self.lanes.iter_mut().find(|lane| lane.endpoint.ordinal == ordinal)?;
        lane.rest = Rest::Changed;
        Some(lane)
    }

    /// Nothing of this step changes a lane any more.
    pub fn rest(&mut self) {
        for lane in &mut self.lanes {
            if lane.rest == Rest::Changed {
                lane.rest = Rest::Until(lane.next_due());
            }
        }
    }

    /// The endpoints.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.lanes.iter().map(|lane| &lane.endpoint)
    }

    /// One endpoint.
    #[must_use]
    pub fn endpoint(&self, ordinal: u32) -> Option<&Endpoint> {
        self.endpoints().find(|endpoint| endpoint.ordinal == ordinal)
    }

    /// Rows queued for all endpoints.
    #[must_use]
    pub fn depth(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.total).sum()
    }

    /// Rows in memory.
    #[must_use]
    pub fn held(&self) -> usize {
        self.lanes.iter().map(|lane| lane.window.len() + lane.side.len()).sum()
    }

    /// Rows of one endpoint in memory: in the window, and beside it.
    #[must_use]
    pub fn in_memory(&self, ordinal: u32) -> (usize, usize) {
        let lane = self.lanes.iter().find(|lane| lane.endpoint.ordinal == ordinal);
        lane.map_or((0, 0), |lane| (lane.window.len(), lane.side.len()))
    }

    /// How each endpoint's queue stands, as of the last [`Self::rest`]; in the order of the endpoints.
    pub fn backlogs(&self) -> impl Iterator<Item = (u32, Backlog)> + Clone {
        self.lanes.iter().map(|lane| (lane.endpoint.ordinal, lane.backlog()))
    }

    /// Whether a late delivery or a replay of this event waits beside a queue.
    #[must_use]
    pub fn holds_aside(&self, event: EventSeq) -> bool {
        self.lanes.iter().any(|lane| lane.side.values().any(|waiting| waiting.row.event == event))
    }

    /// When the oldest row in memory was queued.
    #[must_use]
    pub fn oldest(&self) -> Option<Timestamp> {
        let first = |lane: &Lane| {
            let rows = lane.window.values().next().into_iter().chain(lane.side.values().next());
            rows.map(|waiting| waiting.row.queued_at).min()
        };
        self.lanes.iter().filter_map(first).min()
    }

    /// Gives an event its place in an endpoint's queue. The row is not there before [`Self::enqueued`]. `None` if there
    /// is no room for it, or no endpoint.
    pub fn queue(
        &mut self,
        ordinal: u32,
        event: EventSeq,
        chat: Option<ChatNo>,
        course: Course,
        now: Timestamp,
    ) -> Option<(DeliveryRow, EndpointState)> {
        let lane = self.lane(ordinal)?;
        let room = match course {
            Course::Live => lane.total < QUEUE_MAX,
            Course::Late | Course::Replay => lane.side.len() < SIDE_ROOM,
        };
        if !room {
            return None;
        }
        lane.state.last_sequence.0 += 1;
        let sequence = lane.state.last_sequence;
        let (attempts, stuck_since) = (0, None);
        let row = DeliveryRow { event, chat, attempts, due: now, queued_at: now, sequence, course, stuck_since };
        Some((row, lane.state))
    }

    /// Brings a dead letter back under its own name. `None` if there is no room for it beside the queue.
    pub fn revive(&mut self, ordinal: u32, row: DeliveryRow, now: Timestamp) -> Option<DeliveryRow> {
        let lane = self.lane(ordinal)?;
        let room = lane.side.len() < SIDE_ROOM;
        let (course, stuck_since) = (if row.course == Course::Replay { Course::Replay } else { Course::Late }, None);
        room.then_some(DeliveryRow { attempts: 0, due: now, queued_at: now, course, stuck_since, ..row })
    }

    /// Takes in a row that has become durable.
    pub fn enqueued(&mut self, ordinal: u32, row: DeliveryRow) {
        let Some(lane) = self.lane(ordinal) else { return };
        lane.durable_through = lane.durable_through.max(row.sequence);
        if lane.waiting(row.sequence).is_some() {
            return;
        }
        let window_is_complete = !lane.has_more_on_disk() && lane.loading.is_none();
        lane.total += 1;
        let has_room = row.course != Course::Live || lane.window.len() < WINDOW_MAX;
        if (window_is_complete && has_room) || row.sequence <= lane.loaded_through {
            lane.insert(row);
        }
    }

    /// Pages that must be read: windows that ran half empty with more rows on disk.
    pub fn pages_to_load(&mut self) -> Vec<LoadPage> {
        let mut pages = Vec::new();
        for lane in &mut self.lanes {
            let low = lane.window.len() <= WINDOW_MAX / 2;
            if lane.endpoint.is_active() && low && lane.has_more_on_disk() && lane.loading.is_none() {
                lane.loading = Some(lane.total);
                pages.push(LoadPage { endpoint: lane.endpoint.ordinal, after: lane.loaded_through });
            }
        }
        pages
    }

    /// A page was read; `rows` are in order. Rows that are not durable yet come again by [`Self::enqueued`].
    pub fn loaded(&mut self, ordinal: u32, mut rows: Vec<DeliveryRow>, now: Timestamp) {
        let Some(lane) = self.lane(ordinal) else { return };
        rows.retain(|row| row.sequence <= lane.durable_through);
        let counted = lane.loading.take();
        if rows.is_empty() && counted == Some(lane.total) {
            // Rows were counted that are not there, and none came since; memory is the truth.
            lane.total = lane.in_memory() as u64;
        }
        for row in rows {
            // Attempted by an earlier life of the number, if at all. Nobody knows whether the endpoint was down then:
            // how long it holds up its chat counts from here.
            lane.insert(match lane.proof {
                Proof::Missing => DeliveryRow { stuck_since: row.stuck_since.map(|_| now), ..row },
                Proof::There => DeliveryRow { stuck_since: None, due: row.due.min(now), ..row },
            });
        }
    }

    /// Takes every row that may go now: due, first of its chat in its lane, within the lane's concurrency, and as its
    /// breaker allows.
    pub fn take_due(&mut self, now: Timestamp) -> Vec<Dispatch> {
        let mut taken = Vec::new();
        for lane in self.lanes.iter_mut().filter(|lane| !lane.rests(now)) {
            lane.rest = Rest::Changed;
            for outgoing in lane.choose(now) {
                lane.breaker.probe();
                if let Some(waiting) = lane.waiting(outgoing.row.sequence) {
                    waiting.stage = Stage::InFlight;
                }
                taken.push(outgoing);
            }
        }
        taken
    }

    /// An attempt ended. `None` if the delivery is not known any more.
    pub fn attempted(&mut self, end: &AttemptEnd, now: Timestamp) -> Option<Ended> {
        let schedule = self.schedule;
        self.lane(end.endpoint)?.attempted(end, &schedule, now)
    }

    /// Moves what has held up its chat for too long out of its way. Gives the rows to store, and the dead letters.
    pub fn set_aside_stuck(&mut self, now: Timestamp) -> (Vec<(u32, DeliveryRow)>, Vec<(u32, DeliveryRow)>) {
        let (mut moved, mut dropped) = (Vec::new(), Vec::new());
        for lane in self.lanes.iter_mut().filter(|lane| !lane.rests(now)) {
            let ordinal = lane.endpoint.ordinal;
            let (aside, dead) = lane.set_aside_stuck(now);
            moved.extend(aside.into_iter().map(|row| (ordinal, row)));
            dropped.extend(dead.into_iter().map(|row| (ordinal, row)));
        }
        (moved, dropped)
    }

    /// What a row that makes way is now has become durable: its chat goes on.
    pub fn moved(&mut self, ordinal: u32, row: DeliveryRow) {
        if let Some(lane) = self.lane(ordinal) {
            lane.moved(row);
        }
    }

    /// A delivery that was given up is durably a dead letter: its chat goes on.
    pub fn gone(&mut self, ordinal: u32, sequence: DeliverySeq) {
        if let Some(lane) = self.lane(ordinal) {
            lane.take_out(sequence);
        }
    }

    /// The next moment at which something becomes due that is not under way.
    #[must_use]
    pub fn next_due(&self) -> Option<Timestamp> {
        let due = |lane: &Lane| match lane.rest {
            Rest::Changed => lane.next_due(),
            Rest::Until(due) => due,
        };
        self.lanes.iter().filter_map(due).min()
    }

    /// Begins to send a part of the event log again. `None` if a replay is under way.
    pub fn begin_replay(&mut self, ordinal: u32, replay: Replay) -> Option<EndpointState> {
        let lane = self.lane(ordinal)?;
        if lane.state.replay.is_some() {
            return None;
        }
        lane.state.replay = Some(replay);
        Some(lane.state)
    }

    /// Parts of the event log that must be read for replays.
    pub fn replays_to_load(&mut self) -> Vec<LoadReplay> {
        let mut loads = Vec::new();
        for lane in &mut self.lanes {
            if let Some(replay) = lane.state.replay.filter(|_| lane.wants_replay_page()) {
                lane.loading_replay = true;
                loads.push(LoadReplay { endpoint: lane.endpoint.ordinal, replay });
            }
        }
        loads
    }

    /// A part of the log was read for a replay: [`REPLAY_READ`] events, or fewer if there are no more. Gives those to
    /// queue; the replay goes on behind the last one.
    pub fn replay_loaded(&mut self, ordinal: u32, events: &[Logged]) -> Vec<Logged> {
        let Some(lane) = self.lane(ordinal) else { return Vec::new() };
        lane.loading_replay = false;
        let Some(replay) = lane.state.replay.as_mut() else { return Vec::new() };
        let mut wanted = Vec::new();
        let mut complete = events.len() < REPLAY_READ;
        for logged in events {
            if logged.event > replay.through {
                complete = true;
                break;
            }
            if wanted.len() >= REPLAY_MAX {
                complete = false;
                break;
            }
            replay.after = logged.event;
            if lane.endpoint.filter.wants(logged.kind) {
                wanted.push(*logged);
            }
        }
        if complete || replay.after >= replay.through {
            lane.state.replay = None;
        }
        wanted
    }

    /// The state of an endpoint, to be stored.
    #[must_use]
    pub fn state(&self, ordinal: u32) -> Option<EndpointState> {
        self.lanes.iter().find(|lane| lane.endpoint.ordinal == ordinal).map(|lane| lane.state)
    }
}

fn crowded_pause(jitter: f64) -> Duration {
    Duration::from_secs(1).mul_f64(1.0 + jitter.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::event::EventFilter;

    const NOW: Timestamp = Timestamp(1_000_000);
    const OK: Answer = Answer::Status { code: 200, retry_after: None };
    const BAD: Answer = Answer::Status { code: 500, retry_after: None };

    fn stored(ordinal: u32, queued: u64) -> StoredEndpoint {
        let endpoint = Endpoint {
            ordinal,
            name: String::new(),
            url: "https://example.com".to_owned(),
            filter: EventFilter::All,
            secrets: Vec::new(),
            overlap_until: None,
            status: EndpointStatus::Active,
            created_at: Timestamp(0),
            updated_at: Timestamp(0),
        };
        let state = EndpointState { last_sequence: DeliverySeq(queued), ..EndpointState::default() };
        StoredEndpoint { endpoint, state: Some(state), queued }
    }

    fn one_endpoint() -> Deliveries {
        let mut deliveries = Deliveries::default();
        deliveries.add_endpoint(stored(1, 0), EventSeq(0));
        deliveries
    }

    /// Queues the next event of a chat, durably.
    fn add(deliveries: &mut Deliveries, chat: u32) -> DeliverySeq {
        let next = deliveries.state(1).unwrap().last_sequence.0 + 1;
        let queued = deliveries.queue(1, EventSeq(next), Some(ChatNo(chat)), Course::Live, NOW);
        let (row, _) = queued.unwrap();
        deliveries.enqueued(1, row);
        row.sequence
    }

    fn row(sequence: u64, chat: u32) -> DeliveryRow {
        DeliveryRow {
            event: EventSeq(sequence),
            chat: Some(ChatNo(chat)),
            attempts: 0,
            due: NOW,
            queued_at: NOW,
            sequence: DeliverySeq(sequence),
            course: Course::Live,
            stuck_since: None,
        }
    }

    fn taken(deliveries: &mut Deliveries, now: Timestamp) -> Vec<u64> {
        deliveries.take_due(now).iter().map(|dispatch| dispatch.row.sequence.0).collect()
    }

    fn answer(deliveries: &mut Deliveries, sequence: u64, answer: Answer, now: Timestamp) -> Ended {
        let end = AttemptEnd {
            endpoint: 1,
            sequence: DeliverySeq(sequence),
            answer,
            duration_ms: 1,
            excerpt: String::new(),
            kind: None,
            jitter: 0.5,
        };
        deliveries.attempted(&end, now).unwrap()
    }

    /// Lets a row fail until it is set aside, beside another chat that works.
    fn stuck(deliveries: &mut Deliveries) -> Timestamp {
        let mut now = NOW;
        add(deliveries, 1);
        while now.since(NOW) < BLOCK_MAX {
            for sequence in taken(deliveries, now) {
                answer(deliveries, sequence, BAD, now);
            }
            now = deliveries.next_due().unwrap();
        }
        let (moved, dropped) = deliveries.set_aside_stuck(now);
        assert_eq!((moved.len(), dropped.len()), (1, 0));
        assert_eq!(taken(deliveries, now), [] as [u64; 0], "not before it is durable");
        deliveries.moved(1, moved[0].1);
        now
    }

    #[test]
    fn one_chat_keeps_its_order_and_others_pass() {
        let mut deliveries = one_endpoint();
        for chat in [1, 1, 2] {
            add(&mut deliveries, chat);
        }
        assert_eq!(taken(&mut deliveries, NOW), [1, 3]);
        assert_eq!(answer(&mut deliveries, 1, BAD, NOW).fate, Fate::Again);
        assert_eq!(answer(&mut deliveries, 3, OK, NOW).fate, Fate::Delivered);
        let due = NOW.after(Duration::from_secs(5));
        assert_eq!(taken(&mut deliveries, NOW), [] as [u64; 0], "2 waits for 1");
        assert_eq!(deliveries.next_due(), Some(due));
        assert_eq!(taken(&mut deliveries, due), [1]);
        answer(&mut deliveries, 1, OK, due);
        assert_eq!(taken(&mut deliveries, due), [2]);
    }

    #[test]
    fn a_row_that_is_read_before_its_flush_waits_for_it() {
        let mut deliveries = Deliveries::default();
        deliveries.add_endpoint(stored(1, 1), EventSeq(0));
        assert_eq!(deliveries.pages_to_load().len(), 1);
        deliveries.loaded(1, vec![row(1, 1), row(2, 2)], NOW);
        assert_eq!(taken(&mut deliveries, NOW), [1], "2 may still be lost in a crash");
        deliveries.enqueued(1, row(2, 2));
        assert_eq!(taken(&mut deliveries, NOW), [2]);
        answer(&mut deliveries, 1, OK, NOW);
        answer(&mut deliveries, 2, OK, NOW);
        assert_eq!((deliveries.depth(), deliveries.pages_to_load()), (0, Vec::new()));
    }

    #[test]
    fn memory_stays_flat_and_nothing_is_skipped() {
        let mut deliveries = one_endpoint();
        let total = 1000;
        for chat in 1..=total {
            add(&mut deliveries, chat);
            assert!(deliveries.in_memory(1).0 <= WINDOW_MAX);
        }
        let mut delivered = Vec::new();
        while deliveries.depth() > 0 {
            for page in deliveries.pages_to_load() {
                let after = u32::try_from(page.after.0).unwrap();
                let rows = (after + 1..=total).take(WINDOW_MAX / 2).map(|at| row(at.into(), at));
                deliveries.loaded(1, rows.collect(), NOW);
            }
            for sequence in taken(&mut deliveries, NOW) {
                answer(&mut deliveries, sequence, OK, NOW);
                delivered.push(sequence);
            }
        }
        assert_eq!(delivered, (1..=u64::from(total)).collect::<Vec<_>>());
    }

    #[test]
    fn a_stuck_event_makes_way_and_what_overtakes_it_says_so() {
        let mut deliveries = one_endpoint();
        let now = stuck(&mut deliveries);
        add(&mut deliveries, 1);
        add(&mut deliveries, 2);
        let dispatched = deliveries.take_due(now);
        let told: Vec<_> = dispatched.iter().map(|one| (one.row.sequence.0, one.missing_count)).collect();
        assert_eq!(told, [(2, 1), (3, 0)]);
        assert_eq!(dispatched[0].missing, [(DeliverySeq(1), EventSeq(1))]);
        // The late one has its turn on its own schedule, beside the others, and says that it is late.
        let due = deliveries.next_due().unwrap();
        let late = deliveries.take_due(due);
        assert_eq!((late.len(), late[0].row.sequence, late[0].row.course), (1, DeliverySeq(1), Course::Late));
        answer(&mut deliveries, 1, OK, due);
        add(&mut deliveries, 1);
        answer(&mut deliveries, 2, OK, due);
        assert_eq!(deliveries.take_due(due)[0].missing_count, 0, "nothing is missing any more");
    }

    #[test]
    fn a_restart_during_an_outage_makes_nobody_late() {
        let mut deliveries = Deliveries::default();
        deliveries.add_endpoint(stored(1, 2), EventSeq(0));
        deliveries.pages_to_load();
        let due = NOW.after(Duration::from_hours(2));
        let failed = DeliveryRow { attempts: 4, due, stuck_since: Some(Timestamp(1)), ..row(1, 1) };
        deliveries.loaded(1, vec![failed, row(2, 2)], NOW);
        assert_eq!(deliveries.set_aside_stuck(NOW), (Vec::new(), Vec::new()), "it counts from here");
        assert_eq!(taken(&mut deliveries, NOW), [2]);
        answer(&mut deliveries, 2, OK, NOW);
        assert_eq!(taken(&mut deliveries, NOW), [1], "it is up: what waited for that goes at once, in order");
    }

    #[test]
    fn an_event_that_never_works_is_given_up_after_eight_attempts() {
        let mut deliveries = one_endpoint();
        add(&mut deliveries, 1);
        let (mut now, mut attempts) = (NOW, 0);
        loop {
            for (ordinal, row) in deliveries.set_aside_stuck(now).0 {
                deliveries.moved(ordinal, row);
            }
            let sequences = taken(&mut deliveries, now);
            attempts += sequences.len();
            let ended = sequences.first().map(|sequence| answer(&mut deliveries, *sequence, BAD, now));
            if let Some(Ended { fate: Fate::Dead(reason), row, .. }) = ended {
                assert_eq!((deliveries.depth(), deliveries.next_due()), (1, None), "until that is durable");
                deliveries.gone(1, row.sequence);
                assert_eq!((reason, attempts, deliveries.depth()), (DeadReason::Exhausted, 8, 0));
                break;
            }
            now = deliveries.next_due().unwrap();
        }
    }

    #[test]
    fn an_endpoint_that_is_down_is_probed_and_nothing_counts() {
        let mut deliveries = one_endpoint();
        for chat in 1..=10 {
            add(&mut deliveries, chat);
        }
        let mut now = NOW;
        for sequence in taken(&mut deliveries, now) {
            answer(&mut deliveries, sequence, Answer::Silence, now);
        }
        deliveries.rest();
        let (_, backlog) = deliveries.backlogs().next().unwrap();
        assert_eq!((backlog.queued, backlog.breaker), (10, Stand::Open));
        assert_eq!(backlog.next_attempt, deliveries.next_due());
        let mut probes = 0;
        while now.since(NOW) < Duration::from_hours(24) {
            now = deliveries.next_due().unwrap();
            assert_eq!(deliveries.set_aside_stuck(now), (Vec::new(), Vec::new()), "nothing is stuck: all is down");
            assert_eq!(taken(&mut deliveries, now), [1], "one at a time, the oldest");
            assert_eq!(answer(&mut deliveries, 1, Answer::Silence, now).fate, Fate::Waits);
            probes += 1;
        }
        assert!((285..=300).contains(&probes), "{probes} probes");
        now = deliveries.next_due().unwrap();
        let mut delivered = Vec::new();
        while deliveries.depth() > 0 {
            for sequence in taken(&mut deliveries, now) {
                answer(&mut deliveries, sequence, OK, now);
                delivered.push(sequence);
            }
        }
        assert_eq!(delivered, (1..=10).collect::<Vec<_>>(), "at once, in order");
    }

    #[test]
    fn hopeless_after_five_days_and_anew_when_started_again() {
        let mut deliveries = one_endpoint();
        add(&mut deliveries, 1);
        let mut now = NOW;
        taken(&mut deliveries, now);
        assert_eq!(answer(&mut deliveries, 1, BAD, now).state.unwrap().failing_since, Some(NOW));
        now = now.after(webhook::DISABLE_AFTER);
        taken(&mut deliveries, now);
        assert_eq!(answer(&mut deliveries, 1, BAD, now).disable, Some(DisabledReason::Failing));
        assert!(deliveries.disable(1, DisabledReason::Failing, now).is_some());
        assert!(deliveries.disable(1, DisabledReason::Failing, now).is_none(), "told once");
        assert_eq!((taken(&mut deliveries, now), deliveries.next_due()), (Vec::new(), None));
        let start = EndpointUpdate { active: Some(true), ..EndpointUpdate::default() };
        assert_eq!(deliveries.update(1, start, now).unwrap().1.failing_since, None);
        assert_eq!(taken(&mut deliveries, now), [1], "what is queued goes on");
    }

    #[test]
    fn gone_keeps_the_delivery_for_who_comes_back() {
        let mut deliveries = one_endpoint();
        add(&mut deliveries, 1);
        taken(&mut deliveries, NOW);
        let ended = answer(&mut deliveries, 1, Answer::Status { code: 410, retry_after: None }, NOW);
        assert_eq!((ended.fate, ended.disable), (Fate::Waits, Some(DisabledReason::Gone)));
        assert_eq!(deliveries.depth(), 1);
    }

    #[test]
    fn a_replay_is_paced_and_live_ones_go_first() {
        let mut deliveries = one_endpoint();
        let replay = Replay { after: EventSeq(0), through: EventSeq(300) };
        assert!(deliveries.begin_replay(1, replay).is_some() && deliveries.begin_replay(1, replay).is_none());
        let (mut replayed, mut pages) = (Vec::new(), 0);
        let logged = |event| Logged { event: EventSeq(event), chat: Some(ChatNo(1)), kind: EventKind::MessageSent };
        while deliveries.depth() > 0 || deliveries.state(1).unwrap().replay.is_some() {
            for load in deliveries.replays_to_load() {
                pages += 1;
                let events: Vec<_> = (load.replay.after.0 + 1..=400).take(REPLAY_READ).map(logged).collect();
                for logged in deliveries.replay_loaded(1, &events) {
                    let queued = deliveries.queue(1, logged.event, logged.chat, Course::Replay, NOW);
                    deliveries.enqueued(1, queued.unwrap().0);
                }
            }
            assert!(deliveries.in_memory(1).1 <= REPLAY_MAX + REPLAY_MAX / 2, "{:?}", deliveries.in_memory(1));
            add(&mut deliveries, 1);
            let dispatched = deliveries.take_due(NOW);
            assert!(!dispatched[0].background && dispatched[1..].iter().all(|one| one.background), "live first");
            assert!(dispatched.len() <= 1 + SIDE_IN_FLIGHT_MAX);
            for one in dispatched {
                if one.row.course == Course::Replay {
                    replayed.push(one.row.event.0);
                }
                answer(&mut deliveries, one.row.sequence.0, OK, NOW);
            }
        }
        assert_eq!(replayed, (1..=300).collect::<Vec<_>>());
        assert!(pages > 10, "{pages} pages");
    }

    #[test]
    fn a_dead_letter_comes_back_under_its_own_name() {
        let mut deliveries = one_endpoint();
        add(&mut deliveries, 1);
        add(&mut deliveries, 1);
        for now in [NOW, NOW.after(Duration::from_mins(1)), NOW.after(Duration::from_mins(9))] {
            taken(&mut deliveries, now);
            answer(&mut deliveries, 1, Answer::Status { code: 404, retry_after: None }, now);
        }
        deliveries.gone(1, DeliverySeq(1));
        assert_eq!(taken(&mut deliveries, NOW), [2]);
        let row = deliveries.revive(1, row(1, 1), NOW).unwrap();
        assert_eq!((row.course, row.attempts), (Course::Late, 0));
        deliveries.enqueued(1, row);
        deliveries.enqueued(1, row);
        assert_eq!((deliveries.depth(), taken(&mut deliveries, NOW)), (2, vec![1]));
    }

    #[test]
    fn what_waits_for_a_socket_is_asked_again_and_does_not_count() {
        let mut deliveries = one_endpoint();
        add(&mut deliveries, 1);
        taken(&mut deliveries, NOW);
        let ended = answer(&mut deliveries, 1, Answer::Crowded, NOW);
        assert_eq!((ended.fate, ended.row.attempts, ended.state), (Fate::Waits, 0, None));
        let due = deliveries.next_due().unwrap();
        assert!(due > NOW && due.since(NOW) <= Duration::from_secs(2));
    }
}
