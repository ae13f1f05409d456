//! One endpoint is down for a day while another one works, under steady traffic both ways: nothing is lost, order is
//! kept, memory stays flat and the one that works waits for nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use switchboard::domain::delivery::{ASIDE_MAX, IN_FLIGHT_MAX, SIDE_IN_FLIGHT_MAX, WINDOW_MAX};
use switchboard::domain::lifecycle::State;
use switchboard::domain::limiter::{Limits, NewRecipients, Pace};
use switchboard::domain::number::OnUnknown;
use switchboard::domain::retention::{Policy, Retention, Rules};

use super::endpoints::Mood;
use super::plan::Plan;
use super::world::{Happens, World};

const HOUR: u64 = 3_600_000;
const DOWN_FOR: u64 = 24 * HOUR;
/// Between two messages of the traffic, in turn one way and the other.
const BEAT: u64 = 10_000;
/// The longest that an event for the endpoint that works may be on its way, in milliseconds.
const WAITS_MAX: u64 = 1_000;
/// The longest that it may take until everything that was kept is delivered: the breaker's pause, and the work.
const DRAINS_WITHIN: u64 = HOUR;
/// Restarts of the process during the outage.
const RESTARTS: u64 = 3;

/// What one endpoint went through.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Tally {
    pub(crate) requests: u64,
    pub(crate) taken: u64,
    /// The longest from an event to its delivery, in milliseconds.
    pub(crate) slowest: u64,
}

/// What each endpoint went through, by its ordinal.
pub(crate) type Tallies = BTreeMap<u32, Tally>;

/// Nothing fails but what the test makes fail.
fn plan() -> Plan {
    let fast = Pace { interval: Duration::from_millis(1), burst: 100 };
    Plan {
        crash: 0,
        disk: 3,
        hop: 10,
        group: 64,
        pace: 50,
        cut_on_send: 0,
        not_written: 0,
        refused: 0,
        locked: 0,
        scheduled: 0,
        deadline: 0,
        opaque: 0,
        on_unknown: OnUnknown::Resend,
        ack_odd: 0,
        no_login: 0,
        proxy_down: 0,
        webhook: 0,
        answer_lost: 0,
        request_id: 0,
        hard_close: 0,
        drain: 0,
        endpoints: 2,
        people: 20,
        rules: Rules { policy: Policy::default(), retention: Retention::KeepAll },
        erase: 0,
        retention: 0,
        pauses: 0,
        limits: Limits { number: fast, chat: fast, new_recipients: NewRecipients::Unlimited },
        chapter: 0,
        chapters: 0,
    }
}

impl World {
    fn until(&mut self, what: &str, reached: impl Fn(&Self) -> bool) {
        let limit = self.now + DRAINS_WITHIN;
        while !reached(self) {
            assert!(self.now < limit, "not {what}: {}", self.unsettled());
            self.advance();
            self.check_windows();
        }
    }

    fn rows_in_memory(&self, endpoint: u32) -> usize {
        let Some(number) = &self.number else { return 0 };
        let (window, side) = number.deliveries().in_memory(endpoint);
        window + side
    }

    /// Traffic until a moment; gives the most rows of an endpoint that were in memory.
    fn busy_until(&mut self, end: u64, watched: u32) -> usize {
        let mut most = 0;
        let mut beat = 0u64;
        while self.now < end {
            if beat.is_multiple_of(2) {
                self.new_inbound();
            } else {
                self.new_call();
            }
            beat += 1;
            let next = self.now + BEAT;
            self.outside(BEAT, Happens::Stirs);
            while self.now < next {
                self.advance();
                self.check_windows();
                most = most.max(self.rows_in_memory(watched));
            }
        }
        most
    }
}

#[test]
fn a_day_without_one_endpoint_loses_nothing_and_delays_nobody() {
    let mut world = World::planned(20_261_122, plan());
    world.calm = true;
    world.outside(1, Happens::Nudges);
    world.until("online", |world| world.state().is_some_and(State::is_connected));
    for count in 1..=2 {
        world.add_endpoint();
        world.until("subscribed", |world| world.promises.hooks.known().count() == count);
    }
    let (down, up) = (1, 2);
    world.busy_until(world.now + HOUR, down);
    world.tallies.clear();
    world.moods.0.insert(down, Mood::Hanging);
    let before = world.disk.durable.counters.event;
    let mut most = 0;
    for part in 0..=RESTARTS {
        if part > 0 {
            world.crash();
            world.until("online again", |world| world.state().is_some_and(State::is_connected));
        }
        most = most.max(world.busy_until(world.now + DOWN_FOR / (RESTARTS + 1), down));
    }
    let events = world.disk.durable.counters.event - before;
    let kept = world.disk.durable.queued(down).count();
    let [dead, alive] = [down, up].map(|endpoint| world.tallies.get(&endpoint).copied().unwrap_or_default());
    world.moods.calm();
    let back = world.now;
    world.until("delivered", |world| {
        let hooks = &world.promises.hooks;
        hooks.owes_nothing() && !hooks.is_delivering() && world.disk.agrees()
    });
    let drained = world.now - back;
    let beside = world.tallies[&up].slowest;
    world.flush(usize::MAX);
    world.promises.all_kept(&world.disk.durable);
    println!(
        "{events} events while it was down, {kept} kept for it in the end, {most} rows in memory at most, {} attempts; \
         back: drained in {} ms; beside it {} delivered, the slowest after {beside} ms; {} late, {} gaps, {} dead",
        dead.requests,
        drained,
        alive.taken,
        world.promises.hooks.late,
        world.promises.hooks.gaps,
        world.promises.hooks.dead,
    );
    assert!(events > 10_000 && kept as u64 >= events / 2, "{kept} of {events} wait");
    assert_eq!((dead.taken, world.disk.durable.queued(down).count()), (0, 0));
    assert!((WINDOW_MAX / 2..=WINDOW_MAX + ASIDE_MAX).contains(&most), "{most} rows in memory");
    assert!(beside <= WAITS_MAX, "an event for the one that works waited {beside} ms");
    // One probe per pause at the longest, what was under way when it went down, and again after every restart.
    let pauses = DOWN_FOR / 240_000 + (RESTARTS + 1) * 12 * (IN_FLIGHT_MAX + SIDE_IN_FLIGHT_MAX) as u64;
    assert!(dead.requests <= pauses, "{} attempts", dead.requests);
    let hooks = &world.promises.hooks;
    assert_eq!((hooks.late, hooks.gaps, hooks.dead), (0, 0, 0), "all of it in order, nothing set aside");
}
