//! The pure core in a simulated world: one number, its disk, WhatsApp, callers and webhook endpoints, in virtual time
//! and from one seed. Storms of faults with crashes at any point, then a calm in which every promise must be kept.
//!
//! `SIM_SEED=n` runs one seed and prints its last steps (`SIM_STEPS=n` of them), `SIM_SEEDS=n` runs more of them,
//! `SIM_BASE=n` others.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a broken promise ends the test")]

mod callers;
mod disk;
mod endpoints;
mod fleet;
mod gate;
mod outage;
mod pacing;
mod people;
mod plan;
mod promises;
mod rng;
mod storm;
mod subscriptions;
mod sweeps;
mod wire;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use world::{Figures, World};

/// Where the seeds start when nobody says otherwise.
const BASE: u64 = 20_261_122_000_000;
/// Worlds of one run.
const SEEDS: u64 = 300;
/// Inputs that one run must at least come to.
const INPUTS_MIN: u64 = 1_000_000;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Runs one world; on a broken promise gives what was broken.
fn run(seed: u64) -> Result<Figures, String> {
    catch_unwind(AssertUnwindSafe(|| World::new(seed, false).run())).map_err(|broken| told(broken.as_ref()))
}

fn told(broken: &(dyn std::any::Any + Send)) -> String {
    let text = broken.downcast_ref::<String>().cloned();
    text.or_else(|| broken.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Runs a world again, watching it, and gives its plan and last steps.
fn watch(seed: u64) -> String {
    let mut world = World::new(seed, true);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    let outcome = outcome.map_or_else(|broken| told(broken.as_ref()), |figures| format!("kept: {figures:?}"));
    let steps: Vec<String> = world.trace.take().unwrap_or_default().into();
    format!("{:#?}\n{}\n=> {outcome}", world.plan, steps.join("\n"))
}

fn add(total: &mut Figures, one: Figures) {
    total.inputs += one.inputs;
    total.ticks += one.ticks;
    total.crashes += one.crashes;
    total.units_lost += one.units_lost;
    total.drains += one.drains;
    total.connections += one.connections;
    total.transmits += one.transmits;
    total.repeats += one.repeats;
    total.messages += one.messages;
    total.events += one.events;
    total.requests += one.requests;
    total.conflicts += one.conflicts;
    total.late += one.late;
    total.gaps += one.gaps;
    total.replayed += one.replayed;
    total.dead += one.dead;
    total.window_most = total.window_most.max(one.window_most);
    total.virtual_millis += one.virtual_millis;
}

/// Each world is one thread's; several run side by side.
fn run_all(seeds: std::ops::Range<u64>) -> (Figures, Vec<(u64, String)>) {
    let next = AtomicU64::new(seeds.start);
    let result = Mutex::new((Figures::default(), Vec::new()));
    let worker = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            let outcome = run(seed);
            let mut result = result.lock().unwrap_or_else(PoisonError::into_inner);
            match outcome {
                Ok(figures) => add(&mut result.0, figures),
                Err(broken) => result.1.push((seed, broken)),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, std::num::NonZero::get) {
            scope.spawn(worker);
        }
    });
    let (figures, mut broken) = result.into_inner().unwrap_or_else(PoisonError::into_inner);
    broken.sort();
    (figures, broken)
}

#[test]
fn no_promise_breaks_in_any_storm() {
    if let Some(seed) = setting("SIM_SEED") {
        println!("{}", watch(seed));
        assert_eq!(run(seed).err(), None, "seed {seed}");
        return;
    }
    let base = setting("SIM_BASE").unwrap_or(BASE);
    let seeds = setting("SIM_SEEDS").unwrap_or(SEEDS);
    println!("base seed {base}, {seeds} seeds");
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let begun = std::time::Instant::now();
    let (figures, broken) = run_all(base..base + seeds);
    let steps = broken.first().map(|(seed, _)| watch(*seed));
    std::panic::set_hook(hook);
    println!("{figures:?} in {:?}", begun.elapsed());
    for (seed, what) in broken.iter().take(200) {
        println!("SIM_SEED={seed} {}", what.lines().next().unwrap_or_default());
    }
    if let Some(steps) = steps {
        panic!("{} of {seeds} seeds broke a promise; the first one:\n{steps}", broken.len());
    }
    assert!(seeds < SEEDS || figures.inputs >= INPUTS_MIN, "only {} inputs", figures.inputs);
}

#[test]
fn the_same_seed_is_the_same_world() {
    for seed in BASE..BASE + 3 {
        assert_eq!(run(seed), run(seed));
    }
}
