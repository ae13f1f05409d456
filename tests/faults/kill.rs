//! The daemon dies under load, at random moments and at every failpoint, and nothing that was promised breaks.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use switchboard::telemetry::failpoint::{self, Failpoint};
use tokio::time::sleep;

use crate::load::{Load, Pace, setting};
use crate::process::Daemon;
use crate::verdict::{Verdict, settle};
use crate::world::{CUSTOMERS, World, customer, link, own_phone, until};

/// A failpoint that is not reached within this time was not part of the load.
const REACHED_WITHIN: Duration = Duration::from_secs(30);
/// How often a life is given the chance to answer what an earlier one was asked, and how long each has.
const ANSWER_TRIES: u32 = 20;
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// How often phones lose their keys, and how many then.
const FORGET_EVERY: Duration = Duration::from_millis(500);
const FORGETFUL: usize = 4;
/// One kill in so many is followed by a SIGTERM.
const DRAIN_EVERY: u32 = 10;
/// Messages a second, all chats and both directions together, without `RATE`.
const RATE: u32 = 60;

/// Lives of the daemon, one after the other.
struct Lives {
    world: Arc<World>,
    daemon: Option<Daemon>,
    random: StdRng,
    kills: usize,
    /// Lives that ended politely.
    drains: usize,
    /// From the start of the process to all numbers Online.
    online: Vec<Duration>,
    /// Linked during the run, so that linking is killed as well.
    newcomers: usize,
}

impl Lives {
    fn start_again(&mut self, failpoint: Option<&str>) {
        self.daemon = Some(self.world.plan.start(failpoint, &self.world.log));
        self.kills += 1;
    }

    /// Waits until all numbers are online; false when the daemon is dead before.
    async fn all_online(&mut self) -> bool {
        let daemon = self.daemon.as_mut().unwrap();
        self.world.all_online(|| daemon.ended().is_some()).await.is_some()
    }

    /// One life that ends with SIGKILL: sometimes while it starts, mostly under load.
    async fn random_kill(&mut self) {
        if self.random.random_range(0..3) == 0 {
            let typical = self.online.last().copied().unwrap_or(Duration::from_secs(1));
            sleep(typical.mul_f64(self.random.random_range(0.0..1.2))).await;
        } else {
            assert!(self.all_online().await, "the daemon died by itself:\n{}", self.world.last_words());
            self.online.push(self.daemon.as_ref().unwrap().begun.elapsed());
            sleep(Duration::from_millis(self.random.random_range(0..700))).await;
        }
        self.daemon.take().unwrap().kill();
        self.start_again(None);
        if self.random.random_range(0..DRAIN_EVERY) == 0 {
            self.drain().await;
        }
    }

    /// One life that ends as an operator ends it, under load.
    async fn drain(&mut self) {
        assert!(self.all_online().await, "the daemon died by itself:\n{}", self.world.last_words());
        self.daemon.as_ref().unwrap().terminate();
        let status = until("the daemon has drained", async || self.daemon.as_mut().unwrap().ended()).await;
        assert!(status.success(), "drained, and ended with {status}:\n{}", self.world.last_words());
        self.daemon = Some(self.world.plan.start(None, &self.world.log));
        self.drains += 1;
    }

    /// One life that ends at `name`, reached for the first time or a later one.
    async fn killed_at(&mut self, name: &str) {
        if name == Failpoint::RepeatBeforeWire.name() {
            return self.killed_before_an_answer().await;
        }
        let most = if name.starts_with("group") { 200 } else { 8 };
        let nth = if once_a_life(name) { 1 } else { self.random.random_range(1..=most) };
        self.ended_at(name, nth).await;
        self.start_again(None);
    }

    /// A life reaches this place only if the one before left a request for a repeat that nothing has settled since: the
    /// message itself may go out again first, and then there is nothing to answer.
    async fn killed_before_an_answer(&mut self) {
        for _ in 0..ANSWER_TRIES {
            self.ended_at(Failpoint::RepeatNoted.name(), 1).await;
            self.start_again(Some(Failpoint::RepeatBeforeWire.name()));
            let _ = tokio::time::timeout(ANSWER_WITHIN, async {
                while self.daemon.as_mut().unwrap().ended().is_none() {
                    sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
            if self.daemon.as_mut().unwrap().ended().is_some() {
                return self.start_again(None);
            }
        }
        panic!("no life answered a request that an earlier one had left");
    }

    async fn ended_at(&mut self, name: &str, nth: u32) {
        drop(self.daemon.take());
        self.start_again(Some(&format!("{name}:{nth}")));
        if name.starts_with("drain") {
            self.all_online().await;
            self.daemon.as_ref().unwrap().terminate();
        }
        let begun = Instant::now();
        let mut forgetting = Duration::ZERO;
        while self.daemon.as_mut().unwrap().ended().is_none() {
            assert!(begun.elapsed() < REACHED_WITHIN, "{name}:{nth} was not reached");
            if name.starts_with("device") || name.starts_with("paired") {
                self.link_newcomer().await;
            }
            if name.starts_with("repeat") && begun.elapsed() > forgetting {
                forgetting += FORGET_EVERY;
                self.forget().await;
            }
            sleep(Duration::from_millis(5)).await;
        }
        let status = self.daemon.as_mut().unwrap().ended().unwrap();
        assert!(status.code().is_none(), "{name}:{nth}: the daemon ended by itself: {status}");
    }

    /// Some customers' phones lose their keys, so that they ask for their next message again. Not often: a phone asks
    /// five times for one message, and one that loses its keys before every answer has asked in vain.
    async fn forget(&mut self) {
        for _ in 0..FORGETFUL {
            let number = self.random.random_range(0..self.world.numbers.len());
            let phone = customer(number, self.random.random_range(0..CUSTOMERS));
            self.world.forgetful.lock().unwrap().insert(phone.clone());
            self.world.phones.forget_sessions(&phone).await.unwrap();
        }
    }

    /// A person links one more number. The daemon may die meanwhile.
    async fn link_newcomer(&mut self) {
        let phone = own_phone(90_000 + self.newcomers);
        self.newcomers += 1;
        let Ok(number) = self.world.tenant.create_number(&phone, &phone).await else { return };
        let linking = link(&self.world.tenant, self.world.phones, &number);
        let _ = tokio::time::timeout(REACHED_WITHIN, linking).await;
    }
}

/// Whether a life reaches the place only once.
fn once_a_life(name: &str) -> bool {
    name.starts_with("drain") || name.starts_with("repeat") || name.starts_with("paired") || name.starts_with("device")
}

struct Plan {
    numbers: usize,
    kills: usize,
    rounds: usize,
    rate: u32,
    seed: u64,
    /// Only these, or all.
    points: String,
}

impl Plan {
    fn wants(&self, name: &str) -> bool {
        self.points.is_empty() || self.points.contains(name)
    }
}

async fn run(plan: Plan) {
    let begun = Instant::now();
    println!(
        "seed {}: {} numbers, {} random kills, every failpoint {} times",
        plan.seed, plan.numbers, plan.kills, plan.rounds
    );
    let (world, daemon) = World::start(plan.numbers, plan.seed, &[], async |address| address).await;
    let chats = plan.numbers as u32 * 5;
    let pace = Pace { pause: Duration::from_secs(1) * chats / plan.rate.max(1), at_most: u32::MAX };
    let mut load = Load::start(&world, plan.seed, pace);
    let random = StdRng::seed_from_u64(plan.seed);
    let mut lives = Lives {
        world: world.clone(),
        daemon: Some(daemon),
        random,
        kills: 0,
        drains: 0,
        online: Vec::new(),
        newcomers: 0,
    };
    println!("{:.1} s: linked, traffic flows", begun.elapsed().as_secs_f64());
    for kill in 0..plan.kills {
        lives.random_kill().await;
        if (kill + 1) % 25 == 0 {
            progress(&lives, &load, begun);
        }
    }
    for round in 0..plan.rounds {
        for name in failpoint::names().filter(|name| plan.wants(name)) {
            lives.killed_at(name).await;
        }
        println!("failpoints, round {}", round + 1);
        progress(&lives, &load, begun);
    }
    assert!(lives.all_online().await, "the daemon died by itself:\n{}", world.last_words());
    let record = load.finish(true).await;
    let verdict = settle(&world, &load.shared, &record).await;
    println!("{} numbers replaced by a dead life of theirs", world.replaced.load(Ordering::Relaxed));
    report(&lives, &verdict, load.shared.polls.load(Ordering::Relaxed), begun);
    let bound = (lives.kills as u64) * u64::from(chats);
    assert!(verdict.wire_repeats <= bound, "{} wire repeats, at most {bound}", verdict.wire_repeats);
    assert!(
        verdict.violations.is_empty(),
        "seed {}: {} violations:\n  {}\nlog:\n{}",
        plan.seed,
        verdict.violations.len(),
        verdict.violations.join("\n  "),
        world.last_words()
    );
}

fn progress(lives: &Lives, load: &Load, begun: Instant) {
    println!(
        "{:.0} s: {} kills, {} accepted, {} written by phones, Online after {:.2} s",
        begun.elapsed().as_secs_f64(),
        lives.kills,
        load.shared.accepted.load(Ordering::Relaxed),
        load.shared.written.load(Ordering::Relaxed),
        lives.online.last().copied().unwrap_or_default().as_secs_f64()
    );
}

fn report(lives: &Lives, verdict: &Verdict, polls: u64, begun: Instant) {
    let mut online = lives.online.clone();
    online.sort();
    let at =
        |share: f64| online.get((online.len() as f64 * share) as usize).or(online.last()).copied().unwrap_or_default();
    println!("{} kills and {} drains in {:.0} s", lives.kills, lives.drains, begun.elapsed().as_secs_f64());
    println!("restart to all Online: p50 {:.2} s, max {:.2} s", at(0.5).as_secs_f64(), at(1.0).as_secs_f64());
    println!(
        "{} accepted ({} answers stayed out), {} inbound, {} events, {polls} polls",
        verdict.accepted, verdict.unknown, verdict.inbound, verdict.events
    );
    println!(
        "{} wire repeats, {} webhooks repeated, {} messages without a delivery receipt, {} undecryptable, {} chats with a late one",
        verdict.wire_repeats, verdict.webhooks_repeated, verdict.without_receipt, verdict.undecryptable, verdict.late
    );
    println!("sandbox: {}", verdict.stats);
    println!("{} violations", verdict.violations.len());
}

/// Short unless told otherwise: `KILLS`, `NUMBERS`, `FAILPOINT_ROUNDS`, `FAILPOINTS`, `RATE`, `KILL_SEED`, `FAULTS_BINARY`.
#[tokio::test(flavor = "multi_thread")]
async fn no_promise_breaks_when_the_daemon_is_killed() {
    let kills = setting("KILLS", 12);
    run(Plan {
        numbers: setting("NUMBERS", if kills > 100 { 50 } else { 4 }),
        kills,
        rounds: setting("FAILPOINT_ROUNDS", 1),
        rate: setting("RATE", RATE),
        seed: setting("KILL_SEED", 1),
        points: setting("FAILPOINTS", String::new()),
    })
    .await;
}
