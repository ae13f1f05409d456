//! One world in virtual time: the machine, its disk, WhatsApp, callers and endpoints. Whatever happens is an entry
//! of one queue ordered by time; the seed alone decides the rest, so a failure can be watched again.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap, VecDeque};

use switchboard::domain::change::IdempotencyKey;
use switchboard::domain::delivery::{AttemptEnd, DeliveryRow, LoadPage, LoadReplay, Logged, REPLAY_READ, WINDOW_MAX};
use switchboard::domain::endpoint::DeliverySeq;
use switchboard::domain::id::{EventSeq, NumberId};
use switchboard::domain::lifecycle::{self, Purpose, State};
use switchboard::domain::message::{Content, MessageStatus};
use switchboard::domain::number::{
    CancelTarget, Effect, Input, Number, Reply, ReplyId, SendRequest, SendingRules, Ticket, Transmit,
};
use switchboard::domain::orders::SendingOrders;
use switchboard::domain::retention::{Found, Sweep};
use switchboard::domain::time::Timestamp;

use super::callers::{Callers, Waiter};
use super::disk::Disk;
use super::endpoints::Moods;
use super::outage::Tallies;
use super::plan::Plan;
use super::promises::Promises;
use super::rng::Rng;
use super::sweeps::Reader;
use super::wire::{FromSession, Session, Whatsapp, Wire};

pub(crate) const NUMBER: NumberId = NumberId(7);
pub(crate) const START: u64 = 1_700_000_000_000;
/// Steps that are shown when a promise breaks and `SIM_STEPS` does not say otherwise.
const STEPS_SHOWN: u64 = 60;
/// Useless ticks in one second of virtual time, beyond those that other inputs explain.
const IDLE_TICKS_MAX: u64 = 20;
/// When a number whose proxy is down looks again by itself, and when the proxy works at the latest, in milliseconds.
const PROXY_LOOK: u64 = 900_000;
const PROXY_BACK_WITHIN: u64 = 30_000;

/// Something that happens.
#[derive(Debug)]
pub(crate) enum Happens {
    /// The disk takes the next group.
    DiskWrites,
    /// The disk flushes it.
    DiskFlushes,
    Stored(Ticket, bool),
    /// The gate decides; then its word is on the way.
    GateGrants(u64),
    Granted,
    /// The proxy is down, or works again.
    WayCloses,
    WayOpens,
    SessionOpens(u64, Purpose),
    /// The pump takes the next event of a session.
    Pumps(u64),
    Arrives(u64, FromSession),
    /// The session tries to write.
    Writes(u64, Transmit, Content),
    /// WhatsApp learns that messages are durable here.
    InboundAcked(u64, Vec<usize>),
    Emits(u64, Wire),
    Receipt(String, MessageStatus),
    Asks(usize),
    Send(Box<SendRequest>, usize, u64),
    Cancels(Vec<CancelTarget>),
    ReadsRecord(ReplyId, IdempotencyKey, [u8; 32]),
    ReadsPage(LoadPage),
    Page(u32, Vec<DeliveryRow>),
    ReadsReplay(LoadReplay),
    ReplayPage(u32, Vec<Logged>),
    Looks(Sweep),
    Swept(Found),
    RequestEnds(Box<AttemptEnd>),
    Wakes(u64),
    /// The world stirs: traffic and trouble.
    Stirs,
    /// The operator looks after the number.
    Nudges,
    Boots,
}

#[derive(Debug)]
struct Scheduled {
    at: u64,
    no: u64,
    /// The incarnation it is meant for; 0 for things outside the process.
    incarnation: u64,
    what: Happens,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.no) == (other.at, other.no)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.no).cmp(&(other.at, other.no))
    }
}

/// What a run came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Figures {
    pub(crate) inputs: u64,
    pub(crate) ticks: u64,
    pub(crate) crashes: u64,
    pub(crate) units_lost: u64,
    pub(crate) drains: u64,
    pub(crate) connections: u64,
    pub(crate) transmits: u64,
    pub(crate) repeats: u64,
    pub(crate) messages: u64,
    pub(crate) events: u64,
    pub(crate) requests: u64,
    pub(crate) conflicts: u64,
    pub(crate) late: u64,
    pub(crate) gaps: u64,
    pub(crate) replayed: u64,
    pub(crate) dead: u64,
    pub(crate) window_most: u64,
    pub(crate) virtual_millis: u64,
}

/// Ticks of the present second.
#[derive(Debug, Default)]
struct Second {
    no: u64,
    idle_ticks: u64,
    others: u64,
}

/// One world.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    heap: BinaryHeap<Reverse<Scheduled>>,
    next_no: u64,
    pub(crate) incarnation: u64,
    pub(crate) number: Option<Number>,
    pub(crate) disk: Disk,
    pub(crate) disk_busy: bool,
    /// When the last answer of the disk arrives.
    answered_at: u64,
    pub(crate) promises: Promises,
    pub(crate) session: Option<Session>,
    pub(crate) next_connection: u64,
    pub(crate) whatsapp: Whatsapp,
    pub(crate) callers: Callers,
    pub(crate) waiters: HashMap<ReplyId, Waiter>,
    pub(crate) next_reply: u64,
    pub(crate) moods: Moods,
    pub(crate) tallies: Tallies,
    pub(crate) reader: Reader,
    /// What the owner orders about sending.
    pub(crate) orders: SendingOrders,
    /// What readers are told that the log begins behind.
    pub(crate) event_floor: EventSeq,
    /// The turn asked for, if one is.
    gate: Option<u64>,
    next_turn: u64,
    wake: Option<(u64, u64)>,
    /// Since when it drains.
    pub(crate) draining: Option<u64>,
    pub(crate) drained: bool,
    /// Faults are over: everything must settle.
    pub(crate) calm: bool,
    second: Second,
    pub(crate) figures: Figures,
    /// The last steps, if anybody wants to see them.
    pub(crate) trace: Option<VecDeque<String>>,
    steps_shown: u64,
}

impl World {
    pub(crate) fn new(seed: u64, traced: bool) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::draw(&mut rng);
        Self::of(plan, rng, traced)
    }

    /// A world that is like this, whatever its seed.
    pub(crate) fn planned(seed: u64, plan: Plan) -> Self {
        Self::of(plan, Rng::new(seed), false)
    }

    fn of(plan: Plan, rng: Rng, traced: bool) -> Self {
        let mut world = Self {
            plan,
            rng,
            now: START,
            heap: BinaryHeap::new(),
            next_no: 0,
            incarnation: 0,
            number: None,
            disk: Disk::default(),
            disk_busy: false,
            answered_at: 0,
            promises: Promises::default(),
            session: None,
            next_connection: 1,
            whatsapp: Whatsapp::default(),
            callers: Callers::default(),
            waiters: HashMap::new(),
            next_reply: 1,
            moods: Moods::default(),
            tallies: Tallies::default(),
            reader: Reader::default(),
            orders: SendingOrders::default(),
            event_floor: EventSeq(0),
            gate: None,
            next_turn: 0,
            wake: None,
            draining: None,
            drained: false,
            calm: false,
            second: Second::default(),
            figures: Figures::default(),
            trace: traced.then(VecDeque::new),
            steps_shown: super::setting("SIM_STEPS").unwrap_or(STEPS_SHOWN),
        };
        world.promises.pacing.limits = Some(world.plan.limits);
        world.promises.retention_set(world.plan.rules.retention, Timestamp(START));
        world.outside(0, Happens::Boots);
        world
    }

    /// Schedules something that a crash does not undo.
    pub(crate) fn outside(&mut self, delay: u64, what: Happens) {
        self.schedule(delay, 0, what);
    }

    /// Schedules something of this incarnation.
    pub(crate) fn inside(&mut self, delay: u64, what: Happens) {
        self.schedule(delay, self.incarnation, what);
    }

    fn schedule(&mut self, delay: u64, incarnation: u64, what: Happens) {
        let no = self.next_no;
        self.next_no += 1;
        self.heap.push(Reverse(Scheduled { at: self.now + delay, no, incarnation, what }));
    }

    /// The way from one part to another.
    pub(crate) fn hop(&mut self) -> u64 {
        self.rng.below(self.plan.hop + 1)
    }

    /// Whether something goes wrong now.
    pub(crate) fn fault(&mut self, per_mille: u64) -> bool {
        !self.calm && self.rng.chance(per_mille)
    }

    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            if trace.len() as u64 >= self.steps_shown {
                trace.pop_front();
            }
            trace.push_back(format!("{:>12} {}", self.now - START, line()));
        }
    }

    /// Lets the next thing happen.
    pub(crate) fn advance(&mut self) {
        let Some(Reverse(next)) = self.heap.pop() else { panic!("the world stands still") };
        self.now = next.at;
        if next.incarnation == 0 || next.incarnation == self.incarnation {
            self.happen(next.what);
        }
    }

    fn happen(&mut self, what: Happens) {
        match what {
            Happens::DiskWrites => self.disk_writes(),
            Happens::DiskFlushes => self.disk_flushes(),
            Happens::Stored(ticket, written) => {
                self.disk.answered();
                self.step(Input::Stored(ticket, written));
            }
            Happens::GateGrants(turn) => {
                if self.gate == Some(turn) {
                    self.gate = None;
                    let delay = self.hop();
                    if self.state() == Some(State::AwaitingGate) && self.fault(self.plan.proxy_down) {
                        let back = delay + 1 + self.rng.below(PROXY_BACK_WITHIN);
                        self.inside(delay, Happens::WayCloses);
                        self.inside(back, Happens::WayOpens);
                    } else {
                        self.inside(delay, Happens::Granted);
                    }
                }
            }
            Happens::WayCloses => {
                let until = Timestamp(self.now + PROXY_LOOK);
                self.step(Input::Life(lifecycle::Input::WayClosed { until }));
            }
            Happens::WayOpens => self.step(Input::Life(lifecycle::Input::WayOpen)),
            Happens::Granted => self.step(Input::Life(lifecycle::Input::Granted)),
            Happens::SessionOpens(no, purpose) => self.session_opens(no, purpose),
            Happens::Pumps(no) => self.pump(no),
            Happens::Arrives(no, event) => self.session_says(no, event),
            Happens::Writes(no, transmit, content) => self.session_writes(no, &transmit, &content),
            Happens::InboundAcked(no, which) => self.inbound_acked(no, &which),
            Happens::Emits(no, wire) => self.emit(no, wire),
            Happens::Receipt(whatsapp_id, status) => self.receipt(whatsapp_id, status),
            Happens::Asks(call) => self.caller_asks(call),
            Happens::Send(request, call, incarnation) => self.send(request, call, incarnation),
            Happens::Cancels(targets) => self.cancels(targets),
            Happens::ReadsRecord(reply, key, body) => self.read_record(reply, key, body),
            Happens::ReadsPage(page) => self.read_page(page),
            Happens::Page(endpoint, rows) => self.step(Input::PageLoaded(endpoint, rows)),
            Happens::ReadsReplay(load) => self.read_replay(load),
            Happens::ReplayPage(endpoint, events) => self.step(Input::ReplayLoaded(endpoint, events)),
            Happens::Looks(sweep) => {
                let found = self.disk.visible.find(sweep);
                let delay = self.hop();
                self.inside(delay, Happens::Swept(found));
            }
            Happens::Swept(found) => self.step(Input::Swept(found)),
            Happens::RequestEnds(end) => self.request_ends(*end),
            Happens::Wakes(no) => {
                if self.wake.is_some_and(|(_, set)| set == no) {
                    self.wake = None;
                    self.step(Input::Tick);
                }
            }
            Happens::Stirs => self.stir(),
            Happens::Nudges => self.nudge(),
            Happens::Boots => self.boot(),
        }
        if self.drained {
            self.after_drain();
        }
    }

    // === the machine ===

    pub(crate) fn step(&mut self, input: Input) {
        let Some(number) = &mut self.number else { return };
        let is_tick = matches!(input, Input::Tick);
        let line = self.trace.is_some().then(|| format!("{input:?}"));
        let now = Timestamp(self.now);
        let effects = number.step(input, now);
        let wake = number.next_wake();
        if let Some(line) = line {
            self.note(|| line);
        }
        self.figures.inputs += 1;
        self.count_tick(is_tick, effects.is_empty());
        assert!(!is_tick || wake.is_none_or(|due| due > now), "after a tick the next one is due at once: {wake:?}");
        if let Some(due) = wake {
            self.set_timer(due.0);
        }
        self.perform(effects);
    }

    fn count_tick(&mut self, is_tick: bool, idle: bool) {
        let second = self.now / 1000;
        if self.second.no != second {
            self.second = Second { no: second, ..Second::default() };
        }
        if !is_tick {
            self.second.others += 1;
            return;
        }
        self.figures.ticks += 1;
        self.second.idle_ticks += u64::from(idle);
        let idle = self.second.idle_ticks;
        assert!(idle <= IDLE_TICKS_MAX + self.second.others, "{idle} useless ticks in one second");
    }

    /// As the shell does: one timer for the earliest thing due; one that is too early stays.
    fn set_timer(&mut self, due: u64) {
        if self.wake.is_some_and(|(set, _)| set <= due) {
            return;
        }
        let no = self.next_no;
        self.wake = Some((due, no));
        self.inside(due.saturating_sub(self.now).max(1), Happens::Wakes(no));
    }

    pub(crate) fn perform(&mut self, effects: Vec<Effect>) {
        if self.fault(self.plan.crash) {
            return self.crash();
        }
        for effect in effects {
            if self.trace.is_some() {
                let line = format!("    {effect:?}");
                self.note(|| line);
            }
            self.perform_one(effect);
            if self.fault(self.plan.crash) {
                return self.crash();
            }
        }
    }

    fn perform_one(&mut self, effect: Effect) {
        let hop = self.hop();
        match effect {
            Effect::Commit(commit) => {
                self.promises.hooks.ordered(&commit);
                self.promises.claiming(&commit.changes, self.orders.paused(Timestamp(self.now)).is_some(), self.now);
                self.disk.submit(commit);
                self.start_disk();
            }
            Effect::Life(effect) => self.perform_life(effect),
            Effect::Transmit(transmit) => self.transmit(transmit),
            Effect::AskLock => self.ask_lock(),
            Effect::Reply(reply, answer) => self.reply(reply, answer),
            Effect::ReplyFromRecord(reply, key, body) => {
                self.figures.conflicts += 1;
                self.inside(hop, Happens::ReadsRecord(reply, key, body));
            }
            Effect::Deliver(dispatch) => self.deliver(dispatch),
            Effect::LoadPage(page) => self.inside(hop, Happens::ReadsPage(page)),
            Effect::LoadReplay(load) => self.inside(hop, Happens::ReadsReplay(load)),
            Effect::EventsVisible(seq) => self.promises.events_visible(seq, &self.disk.durable),
            Effect::EventFloor(seq) => self.event_floor = self.event_floor.max(seq),
            Effect::Sweep(sweep) => self.inside(hop, Happens::Looks(sweep)),
            Effect::StateChanged { to, .. } => self.promises.state_changed(to),
            Effect::Count(_) => {}
            Effect::Drained => self.drained = true,
        }
    }

    fn perform_life(&mut self, effect: lifecycle::Effect) {
        match effect {
            lifecycle::Effect::AskGate => {
                self.promises.asking_the_gate(Timestamp(self.now));
                assert!(self.draining.is_none(), "asks the gate while it goes down");
                let turn = self.next_turn;
                self.next_turn += 1;
                self.gate = Some(turn);
                let delay = self.hop() * 5;
                self.inside(delay, Happens::GateGrants(turn));
            }
            lifecycle::Effect::LeaveGate => self.gate = None,
            lifecycle::Effect::Open(purpose) => self.open(purpose),
            lifecycle::Effect::Close => self.close(),
            lifecycle::Effect::ResetBackoff => {}
        }
    }

    pub(crate) fn state(&self) -> Option<State> {
        self.number.as_ref().map(|number| number.life().state)
    }

    // === the disk ===

    fn start_disk(&mut self) {
        if !self.disk_busy {
            self.disk_busy = true;
            let delay = self.rng.below(self.plan.disk + 1);
            self.inside(delay, Happens::DiskWrites);
        }
    }

    fn disk_writes(&mut self) {
        if self.disk.write_group(self.plan.group) {
            let delay = self.rng.below(self.plan.disk + 1);
            self.inside(delay, Happens::DiskFlushes);
        } else {
            self.answer_group();
        }
    }

    fn disk_flushes(&mut self) {
        self.flush(usize::MAX);
        self.answer_group();
    }

    /// Brings up to `most` units to the platter.
    pub(crate) fn flush(&mut self, most: usize) {
        for _ in 0..most {
            let Some(changes) = self.disk.next_unflushed() else { break };
            self.promises.flushing(&changes, &self.disk.durable, Timestamp(self.now));
            for change in &changes {
                self.disk.durable.apply(change);
            }
        }
    }

    fn answer_group(&mut self) {
        self.disk_busy = false;
        // Answers keep their order: entries of one moment do, and none is quicker than the one before.
        let delay = self.hop().max(self.answered_at.saturating_sub(self.now));
        self.answered_at = self.now + delay;
        for (ticket, written) in self.disk.answers() {
            self.inside(delay, Happens::Stored(ticket, written));
        }
        if !self.disk.is_idle() {
            self.disk_busy = true;
            self.inside(delay, Happens::DiskWrites);
        }
    }

    fn read_page(&mut self, page: LoadPage) {
        let range = (page.endpoint, DeliverySeq(page.after.0 + 1))..=(page.endpoint, DeliverySeq(u64::MAX));
        let rows = self.disk.visible.deliveries.range(range).map(|(_, row)| *row).take(WINDOW_MAX / 2).collect();
        let delay = self.hop();
        self.inside(delay, Happens::Page(page.endpoint, rows));
    }

    fn read_replay(&mut self, load: LoadReplay) {
        let range = EventSeq(load.replay.after.0 + 1)..;
        let events = self.disk.visible.events.range(range).map(|(_, event)| event.logged()).take(REPLAY_READ);
        let events = events.collect();
        let delay = self.hop();
        self.inside(delay, Happens::ReplayPage(load.endpoint, events));
    }

    // === crashes ===

    /// The process dies here. Of what was not flushed a prefix survives.
    pub(crate) fn crash(&mut self) {
        self.note(|| "CRASH".to_owned());
        self.figures.crashes += 1;
        match self.rng.below(3) {
            0 => {}
            1 => {
                let kept = self.rng.index(self.disk.unflushed() + 1);
                self.flush(kept);
            }
            // Only the number's task died: the disk goes on with what it was given.
            _ => {
                self.disk.write_all();
                self.flush(usize::MAX);
            }
        }
        self.figures.units_lost += self.disk.unflushed() as u64;
        self.disk.lose();
        self.end_incarnation();
        let delay = self.rng.below(2000);
        self.outside(delay, Happens::Boots);
    }

    fn end_incarnation(&mut self) {
        self.incarnation += 1;
        self.number = None;
        self.disk_busy = false;
        self.answered_at = 0;
        self.gate = None;
        self.wake = None;
        self.draining = None;
        self.drained = false;
        self.connection_lost();
        self.promises.crashed(&self.disk.durable);
        self.promises.pacing.crashed();
        let mut waiters: Vec<_> = std::mem::take(&mut self.waiters).into_iter().collect();
        waiters.sort_by_key(|(reply, _)| *reply);
        for (_, waiter) in waiters {
            self.unanswered(waiter);
        }
    }

    fn boot(&mut self) {
        self.incarnation += 1;
        self.note(|| "BOOT".to_owned());
        let sending = SendingRules { limits: self.plan.limits, on_unknown: self.plan.on_unknown };
        // As the shell tells the streams when it has read the records.
        self.event_floor = self.event_floor.max(EventSeq(self.disk.visible.counters.event_floor));
        let mut snapshot = self.disk.visible.snapshot(self.disk.has_credentials, self.plan.rules);
        snapshot.orders = self.orders;
        let (number, effects) = Number::restore(NUMBER, snapshot, sending, Timestamp(self.now));
        self.number = Some(number);
        self.perform(effects);
        self.step(Input::Tick);
    }

    pub(crate) fn drain(&mut self) {
        if self.number.is_some() && self.draining.is_none() {
            self.draining = Some(self.now);
            self.figures.drains += 1;
            self.step(Input::Drain);
        }
    }

    /// The machine says that it is done: the session closes, then the process ends.
    fn after_drain(&mut self) {
        self.drained = false;
        if self.number.is_none() {
            return;
        }
        if self.session.is_some() {
            self.close();
        } else if !self.promises.hooks.is_delivering() {
            assert!(self.disk.is_idle(), "drained with commits under way");
            self.flush(usize::MAX);
            self.end_incarnation();
            let delay = self.rng.below(2000);
            self.outside(delay, Happens::Boots);
        }
    }

    pub(crate) fn reply_id(&mut self) -> ReplyId {
        let id = ReplyId(self.next_reply);
        self.next_reply += 1;
        id
    }

    fn reply(&mut self, reply: ReplyId, answer: Reply) {
        let Some(waiter) = self.waiters.remove(&reply) else { panic!("{reply:?} was answered twice") };
        match waiter {
            Waiter::Send(call) => self.send_answered(call, answer),
            Waiter::Inbound(no, which) => {
                assert_eq!(answer, Reply::InboundDurable);
                self.inbound_durable(no, which);
            }
            Waiter::Receipts => assert_eq!(answer, Reply::InboundDurable),
            Waiter::Cancel(asked) => self.cancel_answered(&asked, &answer),
            Waiter::AddEndpoint => self.endpoint_answered(answer),
            Waiter::RemoveEndpoint => {}
            Waiter::ChangeEndpoint(ordinal, replay) => self.endpoint_changed(ordinal, replay, &answer),
            Waiter::Erase(chat) => match answer {
                Reply::EraseBegun => {
                    let known = self.disk.durable.erasures.contains_key(&chat) || self.promises.was_erased(chat);
                    assert!(known, "an erasure was answered before it was durable");
                }
                Reply::ContactBusy | Reply::QueueFull | Reply::Draining => {}
                other => panic!("an erasure was answered {other:?}"),
            },
        }
    }
}
