//! Ten thousand numbers at the gate through everything that can happen to a fleet at once, in virtual time: the server
//! goes away, comes back, is overloaded, refuses the version. Checked from outside: what the server sees.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::time::Duration;

use switchboard::domain::gate::{Gate, GateLimits, Outcome, Priority};
use switchboard::domain::id::NumberId;

use super::rng::Rng;

const LIMITS: GateLimits = GateLimits { per_second: 200, burst: 200, concurrent: 256 };
const NUMBERS: u64 = 10_000;
const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
/// From the server's return until a canary finds it: the longest pause and one attempt.
const FOUND_WITHIN: u64 = 6 * MINUTE;
/// From then until everybody is online: ten thousand at the configured pace, and the slow start.
const BACK_WITHIN: u64 = 2 * MINUTE;
/// Longest wait of a number between two attempts, in milliseconds.
const BACKOFF_MAX: u64 = 60 * SECOND;

/// How the server treats those who come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Up,
    /// Nobody gets through.
    Down,
    /// Four of five do not get through.
    Overloaded,
    /// Versions below this one are refused.
    Wants(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happens {
    Asks(u64),
    Ends(u64, u32),
    Turns,
}

/// What the server saw in one chapter.
#[derive(Debug, Default)]
struct Seen {
    attempts: u64,
    refused: u64,
    most_in_a_second: usize,
}

struct World {
    rng: Rng,
    gate: Gate,
    now: u64,
    order: u64,
    agenda: BinaryHeap<Reverse<(u64, u64, Happens)>>,
    online: HashSet<u64>,
    failures: HashMap<u64, u32>,
    server: Server,
    version: u32,
    recent: Vec<u64>,
    next_turn: u64,
    seen: Seen,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            rng: Rng::new(seed),
            gate: Gate::new(LIMITS, Duration::ZERO),
            now: 0,
            order: 0,
            agenda: BinaryHeap::new(),
            online: HashSet::new(),
            failures: HashMap::new(),
            server: Server::Up,
            version: 1,
            recent: Vec::new(),
            next_turn: u64::MAX,
            seen: Seen::default(),
        };
        for number in 0..NUMBERS {
            world.plan(0, Happens::Asks(number));
        }
        world
    }

    fn plan(&mut self, after: u64, what: Happens) {
        self.order += 1;
        self.agenda.push(Reverse((self.now + after, self.order, what)));
    }

    fn at(&self) -> Duration {
        Duration::from_millis(self.now)
    }

    fn step(&mut self) {
        let Some(Reverse((at, _, what))) = self.agenda.pop() else {
            self.now += SECOND;
            return;
        };
        self.now = at;
        match what {
            Happens::Asks(number) => {
                let failed = self.failures.contains_key(&number);
                let waiting = number.is_multiple_of(7);
                let priority = match (failed, waiting) {
                    (true, _) => Priority::Failed,
                    (false, true) => Priority::Waiting,
                    (false, false) => Priority::Normal,
                };
                self.gate.ask(NumberId(number), priority);
            }
            Happens::Ends(number, version) => self.ends(number, version),
            Happens::Turns => self.next_turn = u64::MAX,
        }
        self.turns();
    }

    fn ends(&mut self, number: u64, version: u32) {
        let outcome = match self.server {
            Server::Up => Outcome::Online,
            Server::Down => Outcome::Failed,
            Server::Overloaded if self.rng.chance(800) => Outcome::Failed,
            Server::Wants(wanted) if version < wanted => Outcome::Outdated,
            Server::Overloaded | Server::Wants(_) => Outcome::Online,
        };
        self.gate.report(NumberId(number), outcome, self.at());
        match outcome {
            Outcome::Online => {
                self.online.insert(number);
                self.failures.remove(&number);
            }
            // Whoever was refused for its version waits at the gate.
            Outcome::Outdated => {
                self.seen.refused += 1;
                self.failures.insert(number, 1);
                self.plan(0, Happens::Asks(number));
            }
            Outcome::Failed | Outcome::Own => {
                self.seen.refused += 1;
                let failures = self.failures.entry(number).or_default();
                *failures += 1;
                let ceiling = (SECOND << (*failures).min(10)).min(BACKOFF_MAX);
                let pause = self.rng.below(ceiling);
                self.plan(pause, Happens::Asks(number));
            }
        }
    }

    fn turns(&mut self) {
        let granted = self.gate.grant(self.at());
        for number in granted {
            self.seen.attempts += 1;
            self.recent.push(self.now);
            let takes = 20 + self.rng.below(400);
            self.plan(takes, Happens::Ends(number.0, self.version));
        }
        let begin = self.now.saturating_sub(SECOND - 1);
        self.recent.retain(|at| *at >= begin);
        self.seen.most_in_a_second = self.seen.most_in_a_second.max(self.recent.len());
        let figures = self.gate.figures();
        assert!(figures.under_way <= LIMITS.concurrent, "{figures:?}");
        if let Some(wait) = self.gate.next_grant_in(self.at()) {
            let due = self.now + u64::try_from(wait.as_millis()).unwrap();
            if due < self.next_turn {
                self.next_turn = due;
                self.plan(due - self.now, Happens::Turns);
            }
        }
    }

    /// A chapter of the story: how the server is, and that everybody's connection broke.
    fn chapter(&mut self, server: Server, cut: bool) {
        self.server = server;
        self.seen = Seen::default();
        if cut {
            let mut lost: Vec<u64> = self.online.drain().collect();
            lost.sort_unstable();
            for number in lost {
                let pause = self.rng.below(SECOND);
                self.plan(pause, Happens::Asks(number));
            }
        }
    }

    fn run_for(&mut self, millis: u64) {
        let end = self.now + millis;
        while self.now < end {
            self.step();
        }
    }

    /// Gives how long it took until everybody was online.
    fn until_all_online(&mut self, within: u64) -> u64 {
        let begun = self.now;
        while self.online.len() < usize::try_from(NUMBERS).unwrap() {
            self.step();
            assert!(self.now - begun <= within, "{} online after {} ms", self.online.len(), self.now - begun);
        }
        self.now - begun
    }
}

/// Attempts while a hold lasts: one at each pause, plus those that were under way when it began.
fn canaries_within(millis: u64) -> u64 {
    let (mut pause, mut passed, mut count) = (2 * SECOND, 0, 0);
    while passed <= millis {
        count += 1;
        passed += pause;
        pause = (pause * 2).min(5 * MINUTE);
    }
    count
}

#[test]
fn a_fleet_of_ten_thousand_through_every_storm() {
    for seed in 1..=2 {
        let mut world = World::new(seed);
        let boot = world.until_all_online(BACK_WITHIN);
        let most = usize::try_from(LIMITS.burst + LIMITS.per_second).unwrap();
        assert!(world.seen.most_in_a_second <= most, "seed {seed}: {:?}", world.seen);
        assert!(boot >= (NUMBERS - 200) * SECOND / 200, "seed {seed}: faster than the pace: {boot} ms");

        world.chapter(Server::Down, true);
        world.run_for(60 * MINUTE);
        // Until the hold a window and what was under way; in it a canary now and then instead of ten thousand.
        let allowed = 100 + LIMITS.concurrent as u64 + canaries_within(60 * MINUTE);
        assert!(world.seen.attempts <= allowed, "seed {seed}: {:?} for {allowed}", world.seen);
        world.chapter(Server::Up, false);
        let back = world.until_all_online(FOUND_WITHIN + BACK_WITHIN);
        assert!(world.seen.most_in_a_second <= most, "seed {seed}: {:?}", world.seen);

        world.chapter(Server::Overloaded, true);
        world.run_for(2 * MINUTE);
        let full = u64::from(LIMITS.per_second) * 120;
        assert!(world.seen.attempts < full / 3, "seed {seed}: it was not spared: {:?}", world.seen);
        world.chapter(Server::Up, false);
        world.until_all_online(FOUND_WITHIN + BACK_WITHIN);

        world.chapter(Server::Wants(2), true);
        world.run_for(30 * MINUTE);
        let allowed = LIMITS.concurrent as u64 + canaries_within(30 * MINUTE);
        assert!(world.seen.attempts <= allowed, "seed {seed}: {:?} for {allowed}", world.seen);
        world.version = 2;
        let now = world.at();
        world.gate.version_changed(now);
        world.turns();
        let refused = world.seen.refused;
        let healed = world.until_all_online(BACK_WITHIN);
        assert!(world.seen.refused <= refused + 1, "seed {seed}: only a canary that was under way is still refused");
        println!("seed {seed}: boot {boot} ms, back after an outage {back} ms, after a new version {healed} ms");
    }
}
