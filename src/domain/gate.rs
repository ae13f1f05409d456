//! How fast sessions may be opened by the whole process. Two buckets and a limit on attempts under way; fewer while most
//! attempts fail, one at a time while all do or while WhatsApp refuses our version. First come, first served within a
//! class; numbers with waiting sends go first, those that failed last go last, nobody waits for ever.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use super::close::CloseReason;
use super::id::NumberId;

/// Outcomes that are looked at together.
const WINDOW: usize = 100;
/// Outcomes of one number among them, so that a few numbers in trouble slow nobody else down.
const WINDOW_PER_NUMBER: usize = 5;
/// Older outcomes tell nothing of the present.
const WINDOW_FOR: Duration = Duration::from_mins(10);
/// The slowest pace is this fraction of the configured one,
const FLOOR_FRACTION: u64 = 32;
/// but one attempt a second always may, in thousandths.
const FLOOR_LEAST: u64 = 1000;
/// Each success lets a lowered pace grow by this fraction of itself: a window in which most fail still ends lower than
/// it began, and from the floor it takes some 350 successes.
const GROWTH_FRACTION: u64 = 100;
/// First pause between two canaries; doubles with every one that fails.
const CANARY_PAUSE_FIRST: Duration = Duration::from_secs(2);
/// Longest pause between two canaries.
const CANARY_PAUSE_LONGEST: Duration = Duration::from_mins(5);
/// Attempts to link under way at once. They have a limit of their own: a person may look at a code for minutes.
const PEOPLE_AT_ONCE: usize = 256;
/// Every so many turns go to whoever has waited longest, whatever its class.
const OLDEST_EVERY: u64 = 8;

/// The gate's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateLimits {
    /// Sessions opened per second in the long run.
    pub per_second: u32,
    /// Sessions opened at once after a rest.
    pub burst: u32,
    /// Attempts to log in under way at once.
    pub concurrent: usize,
}

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody sits in front of a QR code: passes whatever happens to the others, never above the configured pace.
    Person,
    /// Sends are waiting.
    Waiting,
    /// Nothing special.
    Normal,
    /// The last attempt failed.
    Failed,
}

/// How an attempt ended, as far as it concerns the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It came online.
    Online,
    /// The server or the way to it failed: the next number may meet the same.
    Failed,
    /// The server refuses our version: everybody will meet the same.
    Outdated,
    /// What ended it is the number's own matter, or ours.
    Own,
}

impl Outcome {
    /// What the end of a connection that never came online says.
    #[must_use]
    pub const fn of(reason: &CloseReason) -> Self {
        match reason {
            CloseReason::ClientOutdated => Self::Outdated,
            // A server that recycles or refuses most of those who come is to be asked less, too.
            CloseReason::Recycled
            | CloseReason::ConnectionLost
            | CloseReason::Unresponsive
            | CloseReason::Unreachable
            | CloseReason::HandshakeSilent
            | CloseReason::HandshakeRefused
            | CloseReason::RateLimited
            | CloseReason::ServerError { .. }
            | CloseReason::Refused { .. }
            | CloseReason::UpgradeRefused { .. }
            | CloseReason::StreamError { .. }
            | CloseReason::AckOwed
            | CloseReason::NotWellFormed => Self::Failed,
            // Proxies have breakers of their own.
            CloseReason::ProxyUnreachable
            | CloseReason::ProxyRefused
            | CloseReason::ProxyLoginRefused
            | CloseReason::Requested
            | CloseReason::LoggedOut { .. }
            | CloseReason::Locked
            | CloseReason::Banned
            | CloseReason::TemporarilyBanned { .. }
            | CloseReason::Replaced
            | CloseReason::PairingEnded
            | CloseReason::PairingRefused { .. }
            | CloseReason::StoreFailed
            | CloseReason::Crashed => Self::Own,
        }
    }
}

/// Why only canaries go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A whole window of attempts failed.
    Failing,
    /// WhatsApp refused our version (405).
    Outdated,
}

/// What operators should hear of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Most attempts fail: the pace was halved.
    Slowed,
    /// Everybody waits; one canary at a time is tried.
    Held(Cause),
    /// A canary failed; the next one goes after this pause.
    CanaryFailed(Duration),
    /// A canary came online: the others follow, slowly at first.
    Released(Cause),
    /// The pace is the configured one again.
    Restored,
}

/// How the gate works at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// At the configured pace.
    Open,
    /// Slower, because attempts failed.
    Slowed,
    /// One canary at a time.
    Held(Cause),
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Open, Self::Slowed, Self::Held(Cause::Failing), Self::Held(Cause::Outdated)];

    /// Stable name for metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Slowed => "slowed",
            Self::Held(Cause::Failing) => "held_failing",
            Self::Held(Cause::Outdated) => "held_outdated",
        }
    }
}

/// What is seen of the gate from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// Numbers waiting.
    pub waiting: usize,
    /// Attempts under way, those to link included.
    pub under_way: usize,
    /// Thousandths of an attempt per second, canaries apart.
    pub rate_milli: u64,
    /// How it works.
    pub mode: Mode,
    /// Whether a canary is under way.
    pub canary: bool,
}

/// A token bucket in millionths of a token, so that a millisecond at any rate is a whole number.
#[derive(Debug)]
struct Bucket {
    level: u64,
    refilled_at: Duration,
}

const TOKEN: u64 = 1_000_000;

impl Bucket {
    fn refill(&mut self, rate_milli: u64, burst: u64, now: Duration) {
        let elapsed = u64::try_from(now.saturating_sub(self.refilled_at).as_millis()).unwrap_or(u64::MAX);
        self.level = self.level.saturating_add(elapsed.saturating_mul(rate_milli)).min(burst * TOKEN);
        // What is less than a millisecond stays for the next time.
        self.refilled_at = self.refilled_at.saturating_add(Duration::from_millis(elapsed));
    }

    fn has_one(&self) -> bool {
        self.level >= TOKEN
    }

    fn take(&mut self) {
        self.level = self.level.saturating_sub(TOKEN);
    }

    fn ready_in(&self, rate_milli: u64) -> Duration {
        Duration::from_millis(TOKEN.saturating_sub(self.level).div_ceil(rate_milli.max(1)))
    }
}

/// In whose place an attempt runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    Person,
    Fleet,
}

#[derive(Debug, Clone, Copy)]
struct Attempt {
    lane: Lane,
    /// Counts decisions of the gate: an attempt that began before the last one says nothing against it.
    era: u64,
}

#[derive(Debug, Clone, Copy)]
enum Canary {
    /// The next one may go from then on.
    Due(Duration),
    UnderWay(NumberId),
}

#[derive(Debug, Clone, Copy)]
enum Flow {
    Flowing,
    Held { cause: Cause, canary: Canary, pause: Duration },
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    number: NumberId,
    failed: bool,
    at: Duration,
}

/// The gate. Time is what has passed since some fixed moment.
#[derive(Debug)]
pub struct Gate {
    limits: GateLimits,
    /// By class, in order of asking.
    queues: BTreeMap<Priority, BTreeMap<u64, NumberId>>,
    queued: HashMap<NumberId, (Priority, u64)>,
    next_place: u64,
    turns: u64,
    under_way: HashMap<NumberId, Attempt>,
    people: usize,
    /// The configured pace, for everybody.
    whole: Bucket,
    /// The present pace, for all but people.
    present: Bucket,
    rate_milli: u64,
    flow: Flow,
    era: u64,
    window: VecDeque<Seen>,
    /// Numbers that met a 405 during this hold: only they can tell whether it is over.
    outdated: BTreeSet<NumberId>,
}

impl Gate {
    /// A gate at rest.
    #[must_use]
    pub fn new(limits: GateLimits, now: Duration) -> Self {
        let full = || Bucket { level: u64::from(limits.burst.max(1)) * TOKEN, refilled_at: now };
        Self {
            limits,
            queues: BTreeMap::new(),
            queued: HashMap::new(),
            next_place: 0,
            turns: 0,
            under_way: HashMap::new(),
            people: 0,
            whole: full(),
            present: full(),
            rate_milli: full_rate(limits),
            flow: Flow::Flowing,
            era: 0,
            window: VecDeque::with_capacity(WINDOW),
            outdated: BTreeSet::new(),
        }
    }

    /// A number wants to connect. Asking again keeps its place, unless the class is another one.
    pub fn ask(&mut self, number: NumberId, priority: Priority) {
        let same = self.queued.get(&number).is_some_and(|(queued, _)| *queued == priority);
        if same || self.under_way.contains_key(&number) {
            return;
        }
        self.leave_queue(number);
        let place = self.next_place;
        self.next_place += 1;
        self.queued.insert(number, (priority, place));
        self.queues.entry(priority).or_default().insert(place, number);
    }

    /// A number that waits got something to send: it goes before those that have nothing, in the order of their asking.
    pub fn promote(&mut self, number: NumberId) {
        let Some((priority @ Priority::Normal, place)) = self.queued.get_mut(&number) else { return };
        *priority = Priority::Waiting;
        let place = *place;
        self.queues.entry(Priority::Normal).or_default().remove(&place);
        self.queues.entry(Priority::Waiting).or_default().insert(place, number);
    }

    fn leave_queue(&mut self, number: NumberId) {
        if let Some((priority, place)) = self.queued.remove(&number)
            && let Some(queue) = self.queues.get_mut(&priority)
        {
            queue.remove(&place);
        }
    }

    /// A number no longer wants its turn, or gives it back unused.
    pub fn leave(&mut self, number: NumberId, now: Duration) {
        self.leave_queue(number);
        self.report(number, Outcome::Own, now);
    }

    /// A number's attempt is over. A refused version may also be told by a number that was online.
    pub fn report(&mut self, number: NumberId, outcome: Outcome, now: Duration) -> Option<Notice> {
        let attempt = self.under_way.remove(&number);
        if attempt.is_some_and(|attempt| attempt.lane == Lane::Person) {
            self.people -= 1;
        }
        let stale = attempt.is_some_and(|attempt| attempt.era != self.era);
        if outcome == Outcome::Outdated {
            return self.on_outdated(number, stale, now);
        }
        attempt?;
        match self.flow {
            Flow::Flowing => self.on_flowing(number, outcome, stale, now),
            Flow::Held { cause, canary, pause } => {
                let is_canary = matches!(canary, Canary::UnderWay(canary) if canary == number);
                match outcome {
                    // A version is only proved by a number that was refused; that the server works, by anybody.
                    Outcome::Online if is_canary || cause == Cause::Failing => Some(self.release(cause, now)),
                    Outcome::Failed if is_canary => Some(self.canary_failed(cause, pause, now)),
                    Outcome::Own if is_canary => {
                        self.flow = Flow::Held { cause, canary: Canary::Due(now.saturating_add(pause)), pause };
                        None
                    }
                    Outcome::Online | Outcome::Failed | Outcome::Outdated | Outcome::Own => None,
                }
            }
        }
    }

    fn on_outdated(&mut self, number: NumberId, stale: bool, now: Duration) -> Option<Notice> {
        match self.flow {
            // It tried with the version from before the release.
            Flow::Flowing if stale => None,
            Flow::Flowing | Flow::Held { cause: Cause::Failing, .. } => {
                self.outdated.insert(number);
                Some(self.hold(Cause::Outdated, now))
            }
            Flow::Held { cause: Cause::Outdated, canary, pause } => {
                self.outdated.insert(number);
                let is_canary = matches!(canary, Canary::UnderWay(canary) if canary == number);
                is_canary.then(|| self.canary_failed(Cause::Outdated, pause, now))
            }
        }
    }

    fn on_flowing(&mut self, number: NumberId, outcome: Outcome, stale: bool, now: Duration) -> Option<Notice> {
        match outcome {
            Outcome::Online => {
                self.note(number, false, now);
                let full = full_rate(self.limits);
                if self.rate_milli == full {
                    return None;
                }
                self.set_rate(self.rate_milli + self.rate_milli / GROWTH_FRACTION, now);
                (self.rate_milli == full).then_some(Notice::Restored)
            }
            Outcome::Failed if !stale => {
                self.note(number, true, now);
                self.judge(now)
            }
            Outcome::Failed | Outcome::Outdated | Outcome::Own => None,
        }
    }

    fn note(&mut self, number: NumberId, failed: bool, now: Duration) {
        self.window.retain(|seen| now.saturating_sub(seen.at) < WINDOW_FOR);
        let of_number = self.window.iter().filter(|seen| seen.number == number).count();
        if of_number >= WINDOW_PER_NUMBER
            && let Some(oldest) = self.window.iter().position(|seen| seen.number == number)
        {
            self.window.remove(oldest);
        }
        if self.window.len() >= WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(Seen { number, failed, at: now });
    }

    fn judge(&mut self, now: Duration) -> Option<Notice> {
        let failed = self.window.iter().filter(|seen| seen.failed).count();
        if self.window.len() < WINDOW || failed * 2 <= WINDOW {
            return None;
        }
        if failed == WINDOW {
            return Some(self.hold(Cause::Failing, now));
        }
        if self.rate_milli == floor_rate(self.limits) {
            return None;
        }
        self.window.clear();
        self.era += 1;
        self.set_rate(self.rate_milli / 2, now);
        Some(Notice::Slowed)
    }

    fn hold(&mut self, cause: Cause, now: Duration) -> Notice {
        self.era += 1;
        self.window.clear();
        let pause = CANARY_PAUSE_FIRST;
        self.flow = Flow::Held { cause, canary: Canary::Due(now.saturating_add(pause)), pause };
        Notice::Held(cause)
    }

    fn canary_failed(&mut self, cause: Cause, pause: Duration, now: Duration) -> Notice {
        let pause = (pause * 2).min(CANARY_PAUSE_LONGEST);
        self.flow = Flow::Held { cause, canary: Canary::Due(now.saturating_add(pause)), pause };
        Notice::CanaryFailed(pause)
    }

    fn release(&mut self, cause: Cause, now: Duration) -> Notice {
        self.era += 1;
        self.flow = Flow::Flowing;
        self.outdated.clear();
        self.set_rate(0, now);
        // What was saved up during the hold is not for the release.
        self.present.level = self.present.level.min(TOKEN);
        Notice::Released(cause)
    }

    /// We claim another version of WhatsApp Web from now on: whoever waits for that has a reason to try.
    pub fn version_changed(&mut self, now: Duration) {
        if let Flow::Held { cause: Cause::Outdated, canary, pause } = &mut self.flow {
            *pause = CANARY_PAUSE_FIRST;
            if matches!(canary, Canary::Due(_)) {
                *canary = Canary::Due(now);
            }
        }
    }

    fn set_rate(&mut self, rate_milli: u64, now: Duration) {
        self.refill(now);
        self.rate_milli = rate_milli.clamp(floor_rate(self.limits), full_rate(self.limits));
        self.present.level = self.present.level.min(self.burst() * TOKEN);
    }

    /// A limit in proportion to the present pace, at least one.
    fn scaled(&self, limit: u64) -> u64 {
        (limit.saturating_mul(self.rate_milli) / full_rate(self.limits)).max(1)
    }

    fn burst(&self) -> u64 {
        self.scaled(u64::from(self.limits.burst))
    }

    fn concurrent(&self) -> usize {
        usize::try_from(self.scaled(self.limits.concurrent as u64)).unwrap_or(usize::MAX)
    }

    fn refill(&mut self, now: Duration) {
        let burst = self.burst();
        self.present.refill(self.rate_milli, burst, now);
        self.whole.refill(full_rate(self.limits), u64::from(self.limits.burst.max(1)), now);
    }

    /// The numbers that may connect now.
    pub fn grant(&mut self, now: Duration) -> Vec<NumberId> {
        self.refill(now);
        let mut granted = Vec::new();
        while self.whole.has_one()
            && self.people < PEOPLE_AT_ONCE
            && let Some(number) = self.first_of(Priority::Person)
        {
            self.people += 1;
            self.let_through(number, Lane::Person);
            granted.push(number);
        }
        while self.has_room_for_fleet() && self.whole.has_one() && self.fleet_ready_in(now).is_zero() {
            let Some(number) = self.next() else { break };
            if let Flow::Held { canary, .. } = &mut self.flow {
                *canary = Canary::UnderWay(number);
            } else {
                self.present.take();
            }
            self.let_through(number, Lane::Fleet);
            granted.push(number);
        }
        granted
    }

    fn let_through(&mut self, number: NumberId, lane: Lane) {
        self.whole.take();
        self.leave_queue(number);
        self.under_way.insert(number, Attempt { lane, era: self.era });
    }

    /// Whether another attempt fits in; the present pace is another matter.
    fn has_room_for_fleet(&self) -> bool {
        let fleet = self.under_way.len() - self.people;
        match self.flow {
            Flow::Flowing => fleet < self.concurrent(),
            Flow::Held { canary: Canary::Due(_), .. } => fleet < self.limits.concurrent,
            Flow::Held { canary: Canary::UnderWay(_), .. } => false,
        }
    }

    fn fleet_ready_in(&self, now: Duration) -> Duration {
        match self.flow {
            Flow::Flowing => self.present.ready_in(self.rate_milli),
            Flow::Held { canary: Canary::Due(at), .. } => at.saturating_sub(now),
            Flow::Held { canary: Canary::UnderWay(_), .. } => Duration::MAX,
        }
    }

    fn first_of(&self, class: Priority) -> Option<NumberId> {
        self.queues.get(&class)?.first_key_value().map(|(_, number)| *number)
    }

    /// Whose turn it is among those that log in.
    fn next(&mut self) -> Option<NumberId> {
        if let Flow::Held { cause: Cause::Outdated, .. } = self.flow
            && let Some(number) = self.outdated.iter().find(|number| self.queued.contains_key(number))
        {
            return Some(*number);
        }
        let first = |(class, queue): (&Priority, &BTreeMap<u64, NumberId>)| {
            let (place, number) = queue.first_key_value()?;
            (*class != Priority::Person).then_some((*place, *number))
        };
        let mut firsts = self.queues.iter().filter_map(first);
        self.turns += 1;
        if self.turns.is_multiple_of(OLDEST_EVERY) {
            firsts.min().map(|(_, number)| number)
        } else {
            firsts.next().map(|(_, number)| number)
        }
    }

    /// How long until the next grant is possible, if only time is missing.
    #[must_use]
    pub fn next_grant_in(&self, now: Duration) -> Option<Duration> {
        let whole = self.whole.ready_in(full_rate(self.limits));
        let people = self.first_of(Priority::Person).is_some();
        let others = self.queued.len() > self.queues.get(&Priority::Person).map_or(0, BTreeMap::len);
        let person = (people && self.people < PEOPLE_AT_ONCE).then_some(whole);
        let fleet = (others && self.has_room_for_fleet()).then(|| whole.max(self.fleet_ready_in(now)));
        let first = [person, fleet].into_iter().flatten().min()?;
        Some(first.max(Duration::from_millis(1)))
    }

    /// What is seen of it.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let (mode, canary) = match self.flow {
            Flow::Flowing if self.rate_milli == full_rate(self.limits) => (Mode::Open, false),
            Flow::Flowing => (Mode::Slowed, false),
            Flow::Held { cause, canary, .. } => (Mode::Held(cause), matches!(canary, Canary::UnderWay(_))),
        };
        let rate_milli = if matches!(mode, Mode::Held(_)) { 0 } else { self.rate_milli };
        let (waiting, under_way) = (self.queued.len(), self.under_way.len());
        Figures { waiting, under_way, rate_milli, mode, canary }
    }
}

fn full_rate(limits: GateLimits) -> u64 {
    u64::from(limits.per_second.max(1)) * 1000
}

fn floor_rate(limits: GateLimits) -> u64 {
    (full_rate(limits) / FLOOR_FRACTION).max(FLOOR_LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: GateLimits = GateLimits { per_second: 200, burst: 200, concurrent: 256 };
    const SECOND: Duration = Duration::from_secs(1);

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// A gate and numbers that never run out; each attempt ends as told, at once.
    struct Crowd {
        gate: Gate,
        now: Duration,
        next: u64,
    }

    impl Crowd {
        fn new(limits: GateLimits) -> Self {
            Self { gate: Gate::new(limits, Duration::ZERO), now: Duration::ZERO, next: 0 }
        }

        fn fill(&mut self, count: u64) {
            for number in self.next..self.next + count {
                self.gate.ask(NumberId(number), Priority::Normal);
            }
            self.next += count;
        }

        fn granted(&mut self) -> Vec<NumberId> {
            self.gate.grant(self.now)
        }

        fn report(&mut self, number: NumberId, outcome: Outcome) -> Option<Notice> {
            self.gate.report(number, outcome, self.now)
        }

        fn mode(&self) -> Mode {
            self.gate.figures().mode
        }

        fn rate(&self) -> u64 {
            self.gate.figures().rate_milli
        }

        /// Lets attempts through until one has the result of being noticed.
        fn until_notice(&mut self, mut outcome: impl FnMut(u64) -> Outcome) -> Notice {
            for count in 0..1_000_000 {
                self.fill(1);
                for number in self.granted() {
                    if let Some(notice) = self.report(number, outcome(count)) {
                        return notice;
                    }
                }
                self.now += at(5);
            }
            panic!("nothing happened");
        }

        fn canary(&mut self) -> NumberId {
            let wait = self.gate.next_grant_in(self.now).expect("somebody waits and none is under way");
            assert_eq!(self.granted(), [], "not before its time");
            self.now += wait;
            let granted = self.granted();
            assert_eq!(granted.len(), 1, "one at a time");
            assert_eq!(self.granted(), []);
            assert_eq!(self.gate.next_grant_in(self.now), None, "nothing goes before it has ended");
            granted[0]
        }
    }

    #[derive(Debug, Clone)]
    enum Act {
        Ask(u64, Priority),
        Ends(usize, Outcome),
        Leave(u64),
        NewVersion,
        Wait(u64),
    }

    fn act() -> impl Strategy<Value = Act> {
        let priority = proptest::sample::select(vec![
            Priority::Person,
            Priority::Waiting,
            Priority::Normal,
            Priority::Normal,
            Priority::Failed,
        ]);
        let outcome = proptest::sample::select(vec![
            Outcome::Online,
            Outcome::Failed,
            Outcome::Failed,
            Outcome::Failed,
            Outcome::Outdated,
            Outcome::Own,
        ]);
        prop_oneof![
            6 => (0u64..400, priority).prop_map(|(number, priority)| Act::Ask(number, priority)),
            6 => (0usize..50, outcome).prop_map(|(index, outcome)| Act::Ends(index, outcome)),
            1 => (0u64..400).prop_map(Act::Leave),
            1 => Just(Act::NewVersion),
            3 => (0u64..3_000).prop_map(Act::Wait),
        ]
    }

    proptest! {
        /// Whatever is asked for and however it ends: never above the pace in any stretch of time, never more under way
        /// than allowed, one canary at a time, nobody let through twice or without asking.
        #[test]
        fn never_faster_than_the_pace_nor_more_than_allowed_at_once(
            per_second in 1u32..50, burst in 1u32..20, concurrent in 1usize..10,
            acts in proptest::collection::vec(act(), 1..400),
        ) {
            let limits = GateLimits { per_second, burst, concurrent };
            let mut now = Duration::ZERO;
            let mut gate = Gate::new(limits, now);
            let (mut open, mut asked, mut grants) = (Vec::new(), BTreeSet::new(), Vec::new());
            for act in acts {
                match act {
                    Act::Ask(number, priority) => {
                        gate.ask(NumberId(number), priority);
                        if !open.contains(&NumberId(number)) {
                            asked.insert(NumberId(number));
                        }
                    }
                    Act::Ends(index, outcome) => {
                        if let Some(number) = open.get(index).copied() {
                            open.swap_remove(index);
                            gate.report(number, outcome, now);
                        }
                    }
                    Act::Leave(number) => {
                        open.retain(|open| *open != NumberId(number));
                        asked.remove(&NumberId(number));
                        gate.leave(NumberId(number), now);
                    }
                    Act::NewVersion => gate.version_changed(now),
                    Act::Wait(millis) => now += at(millis),
                }
                let held = matches!(gate.figures().mode, Mode::Held(_));
                let before = open.len() - gate.people;
                for number in gate.grant(now) {
                    prop_assert!(asked.remove(&number), "nobody asked");
                    open.push(number);
                    grants.push(now);
                }
                let figures = gate.figures();
                prop_assert_eq!(figures.under_way, open.len());
                prop_assert_eq!(figures.waiting, asked.len());
                prop_assert!(gate.people <= PEOPLE_AT_ONCE);
                let fleet = open.len() - gate.people;
                prop_assert!(fleet <= concurrent);
                prop_assert!(!held || fleet <= before + 1, "more than a canary");
            }
            for (index, begin) in grants.iter().enumerate() {
                for (count, end) in grants[index..].iter().enumerate() {
                    let passed = u64::try_from((*end - *begin).as_millis()).unwrap_or(u64::MAX);
                    let most = u64::from(burst) + (passed * u64::from(per_second)).div_ceil(1000);
                    prop_assert!((count as u64) < most, "{} within {passed} ms", count + 1);
                }
            }
        }

        /// Numbers of a better class that never end to come do not keep anybody waiting for ever.
        #[test]
        fn no_class_starves(ahead in 0u64..20, failed in 1u64..20) {
            let mut gate = Gate::new(GateLimits { per_second: 1000, burst: 1, concurrent: 1 }, Duration::ZERO);
            for number in 0..ahead {
                gate.ask(NumberId(number), Priority::Normal);
            }
            for number in 0..failed {
                gate.ask(NumberId(100 + number), Priority::Failed);
            }
            let mut served = BTreeSet::new();
            let turns = (ahead + failed) * OLDEST_EVERY;
            for turn in 1..=turns {
                gate.ask(NumberId(1_000 + turn), Priority::Waiting);
                gate.ask(NumberId(10_000 + turn), Priority::Waiting);
                for number in gate.grant(at(turn)) {
                    gate.report(number, Outcome::Online, at(turn));
                    served.insert(number);
                }
            }
            for number in (0..ahead).chain(100..100 + failed) {
                prop_assert!(served.contains(&NumberId(number)), "{number} starved");
            }
        }
    }

    #[test]
    fn people_first_failures_last_and_fifo_within() {
        let limits = GateLimits { per_second: 1000, burst: 1000, concurrent: 1000 };
        let mut gate = Gate::new(limits, Duration::ZERO);
        gate.ask(NumberId(1), Priority::Failed);
        gate.ask(NumberId(2), Priority::Normal);
        gate.ask(NumberId(3), Priority::Normal);
        gate.ask(NumberId(4), Priority::Waiting);
        gate.ask(NumberId(5), Priority::Person);
        gate.ask(NumberId(6), Priority::Normal);
        gate.ask(NumberId(2), Priority::Waiting);
        gate.ask(NumberId(3), Priority::Normal);
        gate.promote(NumberId(6));
        gate.promote(NumberId(1));
        assert_eq!(gate.grant(Duration::ZERO), [5, 4, 6, 2, 3, 1].map(NumberId));
    }

    #[test]
    fn each_end_says_something_of_the_fleet_or_nothing() {
        let of = |reason: CloseReason| Outcome::of(&reason);
        assert_eq!(of(CloseReason::ClientOutdated), Outcome::Outdated);
        for reason in [
            CloseReason::Unreachable,
            CloseReason::ConnectionLost,
            CloseReason::HandshakeSilent,
            CloseReason::ServerError { code: 503 },
            CloseReason::RateLimited,
        ] {
            assert_eq!(of(reason), Outcome::Failed);
        }
        for reason in [
            CloseReason::Requested,
            CloseReason::LoggedOut { code: 401 },
            CloseReason::Banned,
            CloseReason::Replaced,
            CloseReason::PairingEnded,
            CloseReason::ProxyUnreachable,
            CloseReason::StoreFailed,
        ] {
            assert_eq!(of(reason), Outcome::Own);
        }
    }

    #[test]
    fn when_most_attempts_fail_the_pace_is_halved_with_every_window_down_to_a_floor() {
        let mut crowd = Crowd::new(LIMITS);
        let most = |count: u64| if count.is_multiple_of(10) { Outcome::Online } else { Outcome::Failed };
        let mut rate = crowd.rate();
        while rate / 2 >= floor_rate(LIMITS) {
            assert_eq!(crowd.until_notice(most), Notice::Slowed);
            // The few successes of a window let it grow a little in between.
            assert!((rate / 2..rate * 2 / 3).contains(&crowd.rate()), "{} after {rate}", crowd.rate());
            rate = crowd.rate();
        }
        assert_eq!(crowd.until_notice(most), Notice::Slowed);
        assert_eq!((crowd.mode(), crowd.rate()), (Mode::Slowed, floor_rate(LIMITS)));
        assert!(crowd.gate.concurrent() < LIMITS.concurrent, "fewer at once as well");
    }

    #[test]
    fn a_minority_of_failures_slows_nobody_down() {
        let mut crowd = Crowd::new(LIMITS);
        for count in 0..2_000u64 {
            crowd.fill(1);
            for number in crowd.granted() {
                let outcome = if count.is_multiple_of(2) { Outcome::Online } else { Outcome::Failed };
                assert_eq!(crowd.report(number, outcome), None);
            }
            crowd.now += at(5);
        }
        assert_eq!((crowd.mode(), crowd.rate()), (Mode::Open, full_rate(LIMITS)));
    }

    #[test]
    fn a_few_numbers_that_always_fail_slow_nobody_down() {
        let mut crowd = Crowd::new(LIMITS);
        for _ in 0..10_000 {
            for number in 0..10 {
                crowd.gate.ask(NumberId(number), Priority::Failed);
            }
            for number in crowd.granted() {
                assert_eq!(crowd.report(number, Outcome::Failed), None);
            }
            crowd.now += SECOND;
        }
        assert_eq!(crowd.mode(), Mode::Open);
    }

    #[test]
    fn while_everything_fails_one_canary_at_a_time_goes_with_growing_pauses() {
        let mut crowd = Crowd::new(LIMITS);
        assert_eq!(crowd.until_notice(|_| Outcome::Failed), Notice::Held(Cause::Failing));
        crowd.fill(1_000);
        let mut pause = CANARY_PAUSE_FIRST;
        for _ in 0..12 {
            let before = crowd.now;
            let canary = crowd.canary();
            assert_eq!(crowd.now - before, pause);
            assert!(crowd.gate.figures().canary);
            crowd.now += SECOND;
            pause = (pause * 2).min(CANARY_PAUSE_LONGEST);
            assert_eq!(crowd.report(canary, Outcome::Failed), Some(Notice::CanaryFailed(pause)));
        }
        assert_eq!(pause, CANARY_PAUSE_LONGEST);
        let logged_out = crowd.canary();
        assert_eq!(crowd.report(logged_out, Outcome::Own), None, "that was its own matter");
        let canary = crowd.canary();
        assert_eq!(crowd.report(canary, Outcome::Online), Some(Notice::Released(Cause::Failing)));
        assert_eq!(crowd.rate(), floor_rate(LIMITS), "slowly at first");
        crowd.fill(2_000);
        assert!(crowd.granted().len() <= 1, "no burst");
        let released = crowd.now;
        assert_eq!(crowd.until_notice(|_| Outcome::Online), Notice::Restored);
        assert!(crowd.now - released < Duration::from_mins(1), "{:?}", crowd.now - released);
        assert_eq!(crowd.mode(), Mode::Open);
    }

    #[test]
    fn attempts_from_before_a_hold_neither_prolong_it_nor_count_after_it() {
        let mut crowd = Crowd::new(LIMITS);
        crowd.fill(200);
        let early = crowd.granted();
        assert_eq!(early.len(), 200);
        for number in &early[..100] {
            crowd.report(*number, Outcome::Failed);
        }
        assert_eq!(crowd.mode(), Mode::Held(Cause::Failing));
        crowd.fill(200);
        for number in &early[100..150] {
            assert_eq!(crowd.report(*number, Outcome::Failed), None);
        }
        let canary = crowd.canary();
        assert_eq!(
            crowd.report(early[150], Outcome::Online),
            Some(Notice::Released(Cause::Failing)),
            "anybody proves it"
        );
        for number in &early[151..] {
            assert_eq!(crowd.report(*number, Outcome::Failed), None);
        }
        assert_eq!(crowd.report(canary, Outcome::Failed), None);
        assert_eq!(crowd.mode(), Mode::Slowed);
    }

    #[test]
    fn a_refused_version_stops_everybody_until_one_that_was_refused_comes_through() {
        let mut crowd = Crowd::new(LIMITS);
        crowd.fill(20);
        let granted = crowd.granted();
        crowd.fill(500);
        assert_eq!(crowd.report(granted[7], Outcome::Outdated), Some(Notice::Held(Cause::Outdated)));
        assert_eq!(crowd.report(granted[8], Outcome::Outdated), None);
        assert_eq!(crowd.report(granted[0], Outcome::Online), None, "its account is not asked for it yet");
        crowd.gate.ask(granted[7], Priority::Failed);
        crowd.gate.ask(granted[8], Priority::Failed);
        let canary = crowd.canary();
        assert_eq!(canary, granted[7], "whoever was refused knows");
        assert_eq!(crowd.report(canary, Outcome::Outdated), Some(Notice::CanaryFailed(CANARY_PAUSE_FIRST * 2)));
        crowd.gate.ask(canary, Priority::Failed);
        crowd.gate.version_changed(crowd.now);
        let before = crowd.now;
        crowd.now += at(1);
        let canary = crowd.granted();
        assert_eq!(canary, [granted[7]], "a new version is tried at once");
        assert_eq!(crowd.report(canary[0], Outcome::Online), Some(Notice::Released(Cause::Outdated)));
        assert!(crowd.now - before < SECOND);
        assert_eq!(crowd.report(granted[9], Outcome::Outdated), None, "it began before the release");
        assert_eq!(crowd.mode(), Mode::Slowed);
    }

    #[test]
    fn one_that_was_online_and_is_told_so_stops_everybody_too() {
        let mut crowd = Crowd::new(LIMITS);
        assert_eq!(crowd.report(NumberId(1), Outcome::Outdated), Some(Notice::Held(Cause::Outdated)));
        crowd.fill(10);
        let canary = crowd.canary();
        assert_eq!(crowd.report(canary, Outcome::Online), Some(Notice::Released(Cause::Outdated)));
    }

    #[test]
    fn somebody_in_front_of_a_code_passes_whatever_happens_but_not_without_limit() {
        let mut crowd = Crowd::new(LIMITS);
        crowd.report(NumberId(1), Outcome::Outdated);
        crowd.fill(10);
        let mut people = 0;
        for number in 0..1_000 {
            crowd.gate.ask(NumberId(1_000_000 + number), Priority::Person);
        }
        for _ in 0..60 {
            people += crowd.granted().iter().filter(|number| number.0 >= 1_000_000).count();
            crowd.now += SECOND;
        }
        assert_eq!(people, PEOPLE_AT_ONCE);
        assert!(crowd.gate.figures().under_way > LIMITS.concurrent, "they take nobody's place: the canary goes too");
    }
}
