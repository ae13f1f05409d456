//! A bad line to WhatsApp, under load in both directions: cut every second, sliced, slow, wrong, silent. Nothing is
//! lost, nothing shown twice, nothing out of order, and every number ends online again.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use switchboard::api::grpc::proto::{GetNumberRequest, NumberState};
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::load::{Load, Pace, setting};
use crate::process::Daemon;
use crate::proxy::{Cut, Proxy, Toxics, Way};
use crate::verdict::{Verdict, settle};
use crate::world::{World, until};

/// Numbers try again at once, as if the line were not that bad.
const IMPATIENT: [(&str, &str); 2] = [("RECONNECT__FIRST_SECONDS", "0.2"), ("RECONNECT__LONGEST_SECONDS", "0.4")];
/// How long each kind of bad line lasts.
const SPELL: Duration = Duration::from_secs(3);
/// Messages that may be asked for again although no process died: a connection that is torn down may hold one.
const REPEATS_MAX: u64 = 20;
/// A dead line must be noticed within this time.
const NOTICED_WITHIN: Duration = Duration::from_secs(90);

async fn behind_a_bad_line(numbers: usize, seed: u64) -> (Arc<World>, Daemon, Proxy) {
    let line = OnceLock::new();
    let (world, daemon) = World::start(numbers, seed, &IMPATIENT, async |sandbox| {
        let proxy = Proxy::start(sandbox, seed).await;
        let address = proxy.address;
        assert!(line.set(proxy).is_ok());
        address
    })
    .await;
    (world, daemon, line.into_inner().unwrap())
}

/// Ends the load and compares.
async fn nothing_broke(world: &World, mut load: Load, now: bool, seed: u64, what: &str) -> Verdict {
    let record = load.finish(now).await;
    world.all_online(|| false).await;
    let verdict = settle(world, &load.shared, &record).await;
    println!(
        "{what}: {} accepted, {} inbound, {} wire repeats, {} webhooks repeated, {} without a delivery receipt, {} undecryptable\nsandbox: {}",
        verdict.accepted,
        verdict.inbound,
        verdict.wire_repeats,
        verdict.webhooks_repeated,
        verdict.without_receipt,
        verdict.undecryptable,
        verdict.stats
    );
    assert!(
        verdict.violations.is_empty(),
        "seed {seed}, {what}: {} violations:\n  {}\nlog:\n{}",
        verdict.violations.len(),
        verdict.violations.join("\n  "),
        world.last_words()
    );
    verdict
}

/// `CUT_MESSAGES` a chat (200), `CUT_SECONDS` for all of them (20), `CUT_SEED`.
#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_every_second_lose_nothing() {
    let (messages, seconds, seed) = (setting("CUT_MESSAGES", 200), setting("CUT_SECONDS", 20), setting("CUT_SEED", 1));
    let (world, _daemon, proxy) = behind_a_bad_line(2, seed).await;
    let pause = Duration::from_secs(seconds) / messages;
    let load = Load::start(&world, seed, Pace { pause, at_most: messages });
    let mut random = StdRng::seed_from_u64(seed);
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut cuts = 0;
    while !load.is_done() {
        ticks.tick().await;
        proxy.cut(if random.random() { Cut::Close } else { Cut::Reset });
        cuts += 1;
    }
    println!("{cuts} cuts, {} connections", proxy.taken());
    nothing_broke(&world, load, false, seed, "cut every second").await;
}

/// `LINE_SEED`; `LINE_LONG=1` adds lines that are dead without a word, which takes minutes.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_line_loses_nothing_and_heals() {
    let seed = setting("LINE_SEED", 1);
    let (world, _daemon, proxy) = behind_a_bad_line(2, seed).await;
    let load = Load::start(&world, seed, Pace { pause: Duration::from_millis(150), at_most: u32::MAX });
    let millis = Duration::from_millis;
    let spells = [
        ("sliced", Toxics { slice: true, ..Toxics::default() }),
        ("late", Toxics { latency: Some(millis(20)..millis(150)), ..Toxics::default() }),
        ("narrow", Toxics { bandwidth: Some(16 * 1024), ..Toxics::default() }),
        ("wrong on the way up", Toxics { corrupt: Some((Way::Up, 8 * 1024)), ..Toxics::default() }),
        ("reset in the middle", Toxics { reset_within: Some(6 * 1024), ..Toxics::default() }),
        ("refused", Toxics { refuse: true, ..Toxics::default() }),
        ("half-open", Toxics { half_open: true, ..Toxics::default() }),
    ];
    for (name, toxics) in spells {
        let cuts = toxics.refuse || toxics.half_open || toxics.corrupt.is_some();
        proxy.set(toxics);
        if cuts {
            proxy.cut(Cut::Reset);
        }
        sleep(SPELL).await;
        proxy.set(Toxics::default());
        if cuts {
            // What hangs in a half-open connection, or was spoilt unnoticed, has the long test.
            proxy.cut(Cut::Reset);
        }
        let begun = Instant::now();
        world.all_online(|| false).await;
        println!("{name}: online {:.2} s after it", begun.elapsed().as_secs_f64());
    }
    if setting("LINE_LONG", 0) != 0 {
        dead_lines(&world, &proxy).await;
    }
    let verdict = nothing_broke(&world, load, true, seed, "bad line").await;
    let asked = |stat: &str| verdict.stats[stat].as_u64().unwrap();
    let repeats = asked("retry_receipts") + asked("retry_receipts_from_phones");
    assert!(repeats <= REPEATS_MAX, "nobody crashed, and {repeats} messages were asked for again");
}

/// A line that is dead, or lies, and closes nothing: noticed only by what does not come back.
async fn dead_lines(world: &World, proxy: &Proxy) {
    let spells = [
        ("nothing comes", Toxics { silent: vec![Way::Down], ..Toxics::default() }),
        ("nothing goes", Toxics { silent: vec![Way::Up], ..Toxics::default() }),
        ("silence", Toxics { silent: vec![Way::Up, Way::Down], ..Toxics::default() }),
        ("wrong on the way down", Toxics { corrupt: Some((Way::Down, 1024)), ..Toxics::default() }),
    ];
    for (name, toxics) in spells {
        world.all_online(|| false).await;
        let begun = Instant::now();
        proxy.set(toxics);
        until(&format!("{name}: noticed"), async || (state(world).await != NumberState::Online).then_some(())).await;
        let noticed = begun.elapsed();
        proxy.set(Toxics::default());
        world.all_online(|| false).await;
        let healed = (begun.elapsed() - noticed).as_secs_f64();
        println!("{name}: noticed after {:.1} s, online {healed:.1} s later", noticed.as_secs_f64());
        assert!(noticed <= NOTICED_WITHIN, "{name}: noticed only after {noticed:?}");
    }
}

async fn state(world: &World) -> NumberState {
    let request = GetNumberRequest { number: world.numbers[0].id.clone() };
    let answer = world.tenant.numbers().get_number(request).await;
    answer.map_or(NumberState::Unspecified, |answer| answer.into_inner().state())
}
