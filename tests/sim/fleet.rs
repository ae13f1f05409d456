//! Two hundred numbers of one process for a day of trouble, in virtual time: lives, gate and proxies together, as the
//! shells wire them. Checked from outside: what WhatsApp sees and has said, and where every number ends.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Duration;

use switchboard::domain::close::CloseReason;
use switchboard::domain::gate::{Gate, GateLimits, Outcome, Priority};
use switchboard::domain::id::NumberId;
use switchboard::domain::lifecycle::{Effect, Input, Life, Purpose, State};
use switchboard::domain::proxy::{Line, Turn, Way};
use switchboard::domain::time::Timestamp;

use super::rng::Rng;

const NUMBERS: usize = 200;
const PROXIES: usize = 4;
const LIMITS: GateLimits = GateLimits { per_second: 20, burst: 20, concurrent: 32 };
const START: u64 = 1_700_000_000_000;
const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const TROUBLE: u64 = 24 * HOUR;
/// Longest that WhatsApp's word may hold a number after the last trouble: a ban without an end is taken for a day.
const CALM: u64 = 30 * HOUR;
const BAN_MAX: u64 = 12 * HOUR;
/// The shortest that a number told to slow down (429) stays away.
const RATE_LIMIT_LEAST: u64 = 5 * MINUTE;
const BACKOFF_MAX: u64 = 15 * MINUTE;
const WAY_LOOK: u64 = 15 * MINUTE;
/// After this a replacement cannot be the echo of a log-in of our own.
const ECHO_OVER: u64 = 3 * MINUTE;

/// How WhatsApp treats those who come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weather {
    Fair,
    Down,
    Overloaded,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happens {
    Ticks(usize),
    LogsIn(usize, u64),
    Answers(usize, u64),
    Requested(usize, u64),
    WayCloses(usize),
    WayOpens(usize),
    GateTurns,
    LineTurns,
    Stirs,
    WeatherChanges,
    VersionFound,
    Restarts,
}

/// What WhatsApp and the operator last said: where the number belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Demand {
    Online,
    LoggedOut,
    Replaced,
    Stopped,
}

struct Number {
    life: Life,
    failures: u32,
    connection: Option<u64>,
    has_turn: bool,
    passage: bool,
    demand: Demand,
    not_before: u64,
    /// When WhatsApp may last have been left with a log-in that is not over for it.
    last_cut: u64,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    attempts: u64,
    closed: BTreeMap<&'static str, u64>,
    restarts: u64,
    parked: u64,
    waited_for_proxies: u64,
    most_in_a_second: usize,
}

struct Fleet {
    rng: Rng,
    now: u64,
    order: u64,
    incarnation: u64,
    agenda: BinaryHeap<Reverse<(u64, u64, u64, Happens)>>,
    numbers: Vec<Number>,
    gate: Gate,
    lines: Vec<Line>,
    proxy_down: [bool; PROXIES],
    weather: Weather,
    version: u32,
    wanted: u32,
    next_connection: u64,
    recent: VecDeque<u64>,
    calm: bool,
    figures: Figures,
}

fn proxy_of(number: usize) -> Option<usize> {
    // Two thirds of the fleet are behind proxies.
    (!number.is_multiple_of(3)).then_some(number % PROXIES)
}

fn id(number: usize) -> NumberId {
    NumberId(number as u64)
}

impl Fleet {
    fn new(seed: u64) -> Self {
        let number = || {
            let mut life = Life::new(Timestamp(START));
            life.linked = true;
            life.state = State::Offline { retry_at: Timestamp(START) };
            let demand = Demand::Online;
            Number {
                life,
                failures: 0,
                connection: None,
                has_turn: false,
                passage: false,
                demand,
                not_before: 0,
                last_cut: 0,
            }
        };
        let mut fleet = Self {
            rng: Rng::new(seed),
            now: START,
            order: 0,
            incarnation: 1,
            agenda: BinaryHeap::new(),
            numbers: (0..NUMBERS).map(|_| number()).collect(),
            gate: Gate::new(LIMITS, Duration::ZERO),
            lines: (0..PROXIES).map(|_| Line::default()).collect(),
            proxy_down: [false; PROXIES],
            weather: Weather::Fair,
            version: 1,
            wanted: 1,
            next_connection: 1,
            recent: VecDeque::new(),
            calm: false,
            figures: Figures::default(),
        };
        for number in 0..NUMBERS {
            fleet.plan(0, Happens::Ticks(number));
        }
        fleet.outside(MINUTE, Happens::Stirs);
        fleet.outside(20 * MINUTE, Happens::WeatherChanges);
        fleet.outside(3 * HOUR, Happens::Restarts);
        fleet
    }

    /// Something that dies with the process.
    fn plan(&mut self, after: u64, what: Happens) {
        self.order += 1;
        self.agenda.push(Reverse((self.now + after, self.order, self.incarnation, what)));
    }

    /// Something that does not.
    fn outside(&mut self, after: u64, what: Happens) {
        self.order += 1;
        self.agenda.push(Reverse((self.now + after, self.order, 0, what)));
    }

    fn at(&self) -> Duration {
        Duration::from_millis(self.now - START)
    }

    fn run_for(&mut self, millis: u64) {
        let end = self.now + millis;
        while let Some(Reverse((at, ..))) = self.agenda.peek()
            && *at <= end
        {
            let Some(Reverse((at, _, incarnation, what))) = self.agenda.pop() else { break };
            self.now = at;
            if incarnation == 0 || incarnation == self.incarnation {
                self.happen(what);
                self.turns();
            }
        }
        self.now = end;
    }

    fn happen(&mut self, what: Happens) {
        match what {
            Happens::Ticks(number) => self.step(number, Input::Tick),
            Happens::LogsIn(number, no) => self.logs_in(number, no),
            Happens::Answers(number, no) => {
                if self.numbers[number].connection == Some(no) {
                    self.step(number, Input::Alive);
                    self.plan(70 * SECOND, Happens::Answers(number, no));
                }
            }
            Happens::Requested(number, no) => self.closed(number, no, CloseReason::Requested),
            Happens::WayCloses(number) => self.way_closes(number),
            Happens::WayOpens(number) => self.way_opens(number),
            Happens::GateTurns => {}
            Happens::LineTurns => self.line_turns(),
            Happens::Stirs => self.stirs(),
            Happens::WeatherChanges => self.weather_changes(),
            Happens::VersionFound => {
                self.version = self.wanted;
                let now = self.at();
                self.gate.version_changed(now);
            }
            Happens::Restarts => self.restarts(),
        }
    }

    fn step(&mut self, number: usize, input: Input) {
        let now = Timestamp(self.now);
        let before = self.numbers[number].life.state;
        let effects = self.numbers[number].life.step(input, now);
        for effect in effects {
            match effect {
                Effect::AskGate => self.ask(number),
                Effect::LeaveGate => {
                    self.numbers[number].has_turn = false;
                    self.drop_passage(number, Way::Unknown);
                    let at = self.at();
                    self.gate.leave(id(number), at);
                }
                Effect::Open(purpose) => self.open(number, purpose),
                Effect::Close => {
                    let no = self.numbers[number].connection.unwrap();
                    self.plan(20, Happens::Requested(number, no));
                }
                Effect::ResetBackoff => self.numbers[number].failures = 0,
            }
        }
        let state = self.numbers[number].life.state;
        if let Some(due) = state.next_attempt().filter(|_| state != before) {
            self.figures.parked += u64::from(matches!(state, State::Parked { .. }));
            self.plan(due.0.saturating_sub(self.now).max(1), Happens::Ticks(number));
        }
    }

    fn ask(&mut self, number: usize) {
        if self.numbers[number].life.state == State::AwaitingGate && !self.enter(number) {
            self.figures.waited_for_proxies += 1;
            self.plan(0, Happens::WayCloses(number));
            return;
        }
        let priority = match self.numbers[number].life.state {
            State::Linking => Priority::Person,
            _ if self.numbers[number].failures > 0 => Priority::Failed,
            _ if number.is_multiple_of(5) => Priority::Waiting,
            _ => Priority::Normal,
        };
        self.gate.ask(id(number), priority);
    }

    fn enter(&mut self, number: usize) -> bool {
        let Some(proxy) = proxy_of(number) else { return true };
        let at = self.at();
        let may = self.lines[proxy].enter(id(number), at);
        if may {
            self.numbers[number].passage = true;
        } else {
            self.drop_passage(number, Way::Unknown);
            self.plan_line_turn();
        }
        may
    }

    fn drop_passage(&mut self, number: usize, way: Way) {
        let Some(proxy) = proxy_of(number) else { return };
        if !std::mem::take(&mut self.numbers[number].passage) {
            return;
        }
        let (jitter, at) = (0.8 + self.rng.below(400) as f64 / 1000.0, self.at());
        if let Turn::CameBack(waited) = self.lines[proxy].ended(id(number), way, jitter, at) {
            for number in waited {
                self.plan(0, Happens::WayOpens(usize::try_from(number.0).unwrap()));
            }
        }
        self.plan_line_turn();
    }

    fn plan_line_turn(&mut self) {
        let at = self.at();
        if let Some(wait) = self.lines.iter().filter_map(|line| line.next_probe_in(at)).min() {
            let wait = u64::try_from(wait.as_millis()).unwrap();
            self.plan(wait.max(1), Happens::LineTurns);
        }
    }

    fn line_turns(&mut self) {
        let at = self.at();
        for proxy in 0..PROXIES {
            if let Some(number) = self.lines[proxy].next_probe(at) {
                self.plan(0, Happens::WayOpens(usize::try_from(number.0).unwrap()));
            }
        }
        self.plan_line_turn();
    }

    fn way_closes(&mut self, number: usize) {
        if self.numbers[number].life.state != State::AwaitingGate {
            return;
        }
        if self.enter(number) {
            self.ask(number);
            return;
        }
        let until = Timestamp(self.now + WAY_LOOK);
        self.step(number, Input::WayClosed { until });
    }

    fn way_opens(&mut self, number: usize) {
        self.step(number, Input::WayOpen);
        if self.numbers[number].life.state != State::AwaitingGate {
            self.numbers[number].passage = true;
            self.drop_passage(number, Way::Unknown);
        }
    }

    fn turns(&mut self) {
        let at = self.at();
        for number in self.gate.grant(at) {
            let number = usize::try_from(number.0).unwrap();
            let logs_in = self.numbers[number].life.state == State::AwaitingGate;
            if logs_in && !self.enter(number) {
                self.gate.leave(id(number), at);
                self.way_closes(number);
            } else {
                self.numbers[number].has_turn = true;
                self.step(number, Input::Granted);
            }
        }
        if let Some(wait) = self.gate.next_grant_in(at) {
            let wait = u64::try_from(wait.as_millis()).unwrap();
            self.plan(wait, Happens::GateTurns);
        }
    }

    /// WhatsApp sees somebody come: this is where a promise would break.
    fn open(&mut self, number: usize, purpose: Purpose) {
        let now = self.now;
        let Number { connection, demand, not_before, .. } = &mut self.numbers[number];
        assert_eq!(*connection, None, "number {number}: two sockets");
        match purpose {
            Purpose::Connect => assert_eq!(*demand, Demand::Online, "number {number} connects and must not"),
            Purpose::Pair => assert_ne!(*demand, Demand::Stopped, "number {number} links and must not"),
        }
        assert!(now >= *not_before, "number {number} is {} ms early", *not_before - now);
        let no = self.next_connection;
        *connection = Some(no);
        self.next_connection += 1;
        if purpose == Purpose::Pair {
            *demand = Demand::Online;
        }
        self.figures.attempts += 1;
        self.recent.push_back(now);
        while self.recent.front().is_some_and(|at| now - at >= SECOND) {
            self.recent.pop_front();
        }
        self.figures.most_in_a_second = self.figures.most_in_a_second.max(self.recent.len());
        let takes = 50 + self.rng.below(1_500);
        self.plan(takes, Happens::LogsIn(number, no));
    }

    fn logs_in(&mut self, number: usize, no: u64) {
        if self.numbers[number].connection != Some(no) {
            return;
        }
        let by_proxy = proxy_of(number).is_some_and(|proxy| self.proxy_down[proxy]);
        let refused = match self.weather {
            _ if by_proxy => Some(CloseReason::ProxyUnreachable),
            Weather::Down => Some(self.rng.pick(&[&CloseReason::Unreachable, &CloseReason::HandshakeSilent]).clone()),
            Weather::Overloaded if self.rng.chance(800) => Some(CloseReason::ServerError { code: 503 }),
            _ if self.version < self.wanted => Some(CloseReason::ClientOutdated),
            Weather::Fair | Weather::Overloaded => None,
        };
        if let Some(reason) = refused {
            self.closed(number, no, reason);
            return;
        }
        if self.numbers[number].life.state == State::Linking {
            self.step(number, Input::Paired);
        }
        self.attempt_ended(number, Outcome::Online, Way::Works);
        self.step(number, Input::Online);
        self.plan(5 * SECOND, Happens::Answers(number, no));
    }

    fn attempt_ended(&mut self, number: usize, outcome: Outcome, way: Way) {
        self.drop_passage(number, way);
        let had_turn = std::mem::take(&mut self.numbers[number].has_turn);
        if had_turn || outcome == Outcome::Outdated {
            let at = self.at();
            self.gate.report(id(number), outcome, at);
        }
    }

    fn closed(&mut self, number: usize, no: u64, reason: CloseReason) {
        if self.numbers[number].connection != Some(no) {
            return;
        }
        self.numbers[number].connection = None;
        *self.figures.closed.entry(reason.code()).or_default() += 1;
        self.attempt_ended(number, Outcome::of(&reason), Way::of(&reason));
        let linked = self.numbers[number].life.linked;
        let now = self.now;
        let Number { demand, not_before, last_cut, failures, .. } = &mut self.numbers[number];
        if reason.leaves_the_server_behind() {
            *last_cut = now;
        }
        match &reason {
            CloseReason::LoggedOut { .. } | CloseReason::Locked | CloseReason::Banned => *demand = Demand::LoggedOut,
            CloseReason::Replaced if *demand == Demand::Online => *demand = Demand::Replaced,
            CloseReason::TemporarilyBanned { until, .. } => *not_before = until.map_or(now + HOUR, |until| until.0),
            CloseReason::RateLimited => *not_before = now + RATE_LIMIT_LEAST,
            // Linking that failed is for a person to repeat.
            _ if !linked => *demand = Demand::LoggedOut,
            _ => {}
        }
        let ceiling = (SECOND << (*failures).min(20)).min(BACKOFF_MAX);
        *failures += 1;
        let backoff = Duration::from_millis(self.rng.below(ceiling).max(100));
        self.step(number, Input::Closed { reason, backoff });
    }

    // === the world ===

    /// Something befalls one number, or its operator does something.
    fn stirs(&mut self) {
        if self.calm {
            return;
        }
        let pause = self.rng.below(20 * SECOND);
        self.outside(pause, Happens::Stirs);
        let number = self.rng.index(NUMBERS);
        let Number { connection, last_cut, demand, .. } = &self.numbers[number];
        match (*connection, self.rng.below(20)) {
            (_, 0) => self.operator(number),
            (Some(no), 1) => {
                let ban = self.rng.below(BAN_MAX);
                let until = self.rng.chance(700).then_some(Timestamp(self.now + ban));
                let may_replace = self.now - last_cut > ECHO_OVER && *demand == Demand::Online;
                let reason = match self.rng.below(7) {
                    0 => CloseReason::LoggedOut { code: 401 },
                    1 => CloseReason::Banned,
                    2 | 3 => CloseReason::TemporarilyBanned { code: 101, until },
                    4 => CloseReason::Refused { code: 409 },
                    5 if may_replace => CloseReason::Replaced,
                    _ => CloseReason::RateLimited,
                };
                self.closed(number, no, reason);
            }
            (Some(no), 2..12) => {
                let reason = match self.rng.below(7) {
                    0 => CloseReason::Recycled,
                    1 => CloseReason::Unresponsive,
                    2 => CloseReason::ServerError { code: 503 },
                    3 => CloseReason::Refused { code: 400 },
                    4 => CloseReason::NotWellFormed,
                    5 => CloseReason::Crashed,
                    _ => CloseReason::ConnectionLost,
                };
                self.closed(number, no, reason);
            }
            _ => {}
        }
    }

    fn operator(&mut self, number: usize) {
        let Number { life, demand, not_before, .. } = &mut self.numbers[number];
        let order = match (life.state, self.rng.below(4)) {
            (State::LoggedOut | State::Unlinked, _) => Input::Pair,
            (State::Stopped | State::Replaced, _) => Input::Start,
            (State::Parked { .. }, 0) => Input::Start,
            (State::Parked { .. }, _) => return,
            (_, 0) => Input::Stop,
            _ => return,
        };
        match order {
            Input::Stop if *demand != Demand::LoggedOut => *demand = Demand::Stopped,
            // The operator's word ends a wait.
            Input::Start => (*demand, *not_before) = (Demand::Online, 0),
            Input::Pair => *not_before = 0,
            _ => {}
        }
        let unlinked = !life.linked;
        if order == Input::Start && unlinked {
            *demand = Demand::LoggedOut;
        }
        self.step(number, order);
    }

    fn weather_changes(&mut self) {
        if self.calm {
            return;
        }
        let pause = 10 * MINUTE + self.rng.below(30 * MINUTE);
        self.outside(pause, Happens::WeatherChanges);
        self.weather =
            self.rng.pick(&[Weather::Fair, Weather::Fair, Weather::Fair, Weather::Down, Weather::Overloaded]);
        for proxy in 0..PROXIES {
            self.proxy_down[proxy] = self.rng.chance(250);
        }
        if self.rng.chance(150) {
            self.wanted = self.version + 1;
            let found = MINUTE + self.rng.below(20 * MINUTE);
            self.outside(found, Happens::VersionFound);
        }
        if self.weather == Weather::Down {
            self.cut_all();
        }
    }

    fn cut_all(&mut self) {
        for number in 0..NUMBERS {
            if let Some(no) = self.numbers[number].connection {
                self.closed(number, no, CloseReason::ConnectionLost);
            }
        }
    }

    /// The process dies and comes back: what was in memory is gone, what was on disk is read.
    fn restarts(&mut self) {
        if self.calm {
            return;
        }
        let pause = HOUR + self.rng.below(4 * HOUR);
        self.outside(pause, Happens::Restarts);
        self.figures.restarts += 1;
        self.incarnation += 1;
        let at = self.at();
        self.gate = Gate::new(LIMITS, at);
        self.lines = (0..PROXIES).map(|_| Line::default()).collect();
        let now = Timestamp(self.now);
        for index in 0..NUMBERS {
            let number = &mut self.numbers[index];
            if number.connection.take().is_some() {
                number.last_cut = now.0;
            }
            (number.has_turn, number.passage, number.failures) = (false, false, 0);
            let linked = number.life.linked;
            number.life = number.life.clone().revived(linked, now);
            if matches!(number.life.state, State::Unlinked) && number.demand == Demand::Online {
                number.demand = Demand::LoggedOut;
            }
            let due = number.life.state.next_attempt().unwrap_or(now);
            self.plan(due.0.saturating_sub(now.0), Happens::Ticks(index));
        }
    }

    fn check_the_end(&self) {
        for (index, number) in self.numbers.iter().enumerate() {
            let state = number.life.state;
            let fits = match number.demand {
                Demand::Online => state == State::Online,
                Demand::LoggedOut => matches!(state, State::LoggedOut | State::Unlinked),
                Demand::Replaced => state == State::Replaced,
                Demand::Stopped => state == State::Stopped,
            };
            let (demand, reason) = (number.demand, &number.life.reason);
            assert!(fits, "number {index} is {state:?} ({reason}) and belongs {demand:?}");
        }
    }
}

fn run(seed: u64) -> Figures {
    let mut fleet = Fleet::new(seed);
    fleet.run_for(TROUBLE);
    fleet.calm = true;
    (fleet.weather, fleet.proxy_down, fleet.version) = (Weather::Fair, [false; PROXIES], fleet.wanted);
    let at = fleet.at();
    fleet.gate.version_changed(at);
    fleet.run_for(CALM);
    fleet.check_the_end();
    fleet.figures
}

#[test]
fn after_a_day_of_trouble_two_hundred_numbers_are_where_they_belong() {
    let base = super::setting("FLEET_BASE").unwrap_or(1);
    for seed in base..base + super::setting("FLEET_SEEDS").unwrap_or(3) {
        println!("seed {seed}");
        let figures = run(seed);
        println!("{figures:?}");
        let most = usize::try_from(LIMITS.burst + LIMITS.per_second).unwrap();
        assert!(figures.most_in_a_second <= most, "seed {seed}: {figures:?}");
        for reason in ["CLIENT_OUTDATED", "PROXY_UNREACHABLE", "TEMPORARILY_BANNED", "RATE_LIMITED", "REPLACED"] {
            assert!(figures.closed.contains_key(reason), "seed {seed}: no {reason}: {figures:?}");
        }
        assert!(figures.restarts > 0 && figures.parked > 0 && figures.waited_for_proxies > 0, "{figures:?}");
    }
}

#[test]
fn the_same_seed_is_the_same_day() {
    assert_eq!(run(7), run(7));
}
