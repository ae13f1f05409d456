//! Power cuts in the middle of everything, on a disk that keeps only what was synced, and disks that fail under way. One
//! seed is one story; `SWITCHBOARD_CRASH_SEED=n` tells that one again, `SWITCHBOARD_CRASH_SEEDS=n` tells n of them. A seed
//! repeats every choice; when exactly the committer's thread is cut it does not.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::domain::id::NumberId;
use crate::store::error::StoreError;
use crate::store::key::Tag;
use crate::store::mender::Room;
use crate::store::number_store::{NumberKeys, NumberStore, Order};
use crate::store::seal::{Sealer, SecretBytes};
use crate::store::tests::lying_disk::{LyingDisk, Manners, Shared};
use crate::store::unit::Unit;
use crate::store::volume::{Volume, VolumeSettings};
use crate::telemetry::rng::Random;

/// Stories told in one run of the tests.
const SEEDS: u64 = 200;
const NUMBERS: usize = 2;
const WORKERS: u64 = 4;

/// What callers know of one number: nothing else may be relied on.
#[derive(Debug, Default, Clone, Copy)]
struct Known {
    /// Last unit that was answered as durable.
    durable: u64,
    /// Last epoch that was answered.
    epoch: u64,
}

/// What a run counted, for people.
#[derive(Debug, Default)]
struct Figures {
    cuts: AtomicU64,
    failures: AtomicU64,
    units: AtomicU64,
    unopened: AtomicU64,
}

struct Story {
    chance: Arc<Random>,
    dir: PathBuf,
    /// How many volumes it has lived in.
    lives: u64,
    disk: Arc<LyingDisk>,
    volume: Volume,
    known: Arc<Mutex<[Known; NUMBERS]>>,
    manners: Manners,
}

fn bytes_of(number: usize, seq: u64, length: usize) -> Vec<u8> {
    (0..length).map(|index| (index as u64 ^ seq.wrapping_mul(31) ^ number as u64) as u8).collect()
}

fn device_length(seq: u64) -> usize {
    10_000 + (seq as usize * 7_919) % 30_000
}

/// One unit: a row of its own, rows that every unit rewrites, a row that moves, sometimes a value of many pieces.
fn unit_of(number: usize, seq: u64) -> Unit {
    let mut unit = if seq.is_multiple_of(5) { Unit::rides_along() } else { Unit::durable() };
    unit.put(Tag::Message, seq.to_be_bytes(), bytes_of(number, seq, 250));
    unit.put(Tag::Session, [1], bytes_of(number, seq, 3_000));
    unit.delete(Tag::Outbox, (seq - 1).to_be_bytes());
    unit.put(Tag::Outbox, seq.to_be_bytes(), []);
    if seq.is_multiple_of(8) {
        unit.put(Tag::Device, [], bytes_of(number, seq, device_length(seq)));
    }
    unit.put(Tag::Counters, [], seq.to_be_bytes());
    unit
}

fn keys(number: usize, random: &Arc<Random>) -> NumberKeys {
    NumberKeys {
        sealer: Arc::new(Sealer::new(&[number as u8 + 1; 32])),
        hash_secret: Arc::new(SecretBytes::new([9; 32])),
        random: random.clone(),
    }
}

fn volume_at(path: &Path, disk: &Arc<LyingDisk>) -> Volume {
    let disk = Arc::new(Shared(disk.clone()));
    Volume::new(VolumeSettings { name: "lying".to_owned(), path: path.to_owned(), cache_bytes: 4 << 20, disk })
}

impl Story {
    fn begin(seed: u64, dir: &Path) -> Self {
        let _ = std::fs::remove_dir_all(dir);
        let chance = Arc::new(Random::seeded(seed));
        let disk = LyingDisk::new(chance.clone());
        let volume = volume_at(&dir.join("life-0"), &disk);
        let pick = |of: [f64; 4]| of[(chance.word() % 4) as usize];
        let manners = Manners {
            syncs_failing: pick([0.0, 0.0, 0.02, 0.1]),
            writes_failing: pick([0.0, 0.0, 0.02, 0.1]),
            forgets: false,
        };
        Self { chance, dir: dir.to_owned(), lives: 0, disk, volume, known: Arc::default(), manners }
    }

    async fn claim(&self, number: usize) -> Result<NumberStore, StoreError> {
        let (id, keys) = (NumberId(number as u64 + 1), keys(number, &self.chance));
        NumberStore::claim(id, keys, self.volume.db()?, Arc::new(Room::default())).await
    }

    /// Claims every number and checks all that was promised about it; gives the last unit that is there.
    async fn claim_and_check(&self) -> Result<Vec<(NumberStore, u64)>, StoreError> {
        let mut numbers = Vec::new();
        for number in 0..NUMBERS {
            let (old, store) = (self.claim(number).await?, self.claim(number).await?);
            let known = self.known.lock().unwrap()[number];
            assert!(old.epoch().0 > known.epoch, "number {number}: epoch {:?} after {}", old.epoch(), known.epoch);
            self.known.lock().unwrap()[number].epoch = store.epoch().0;
            assert_eq!(old.commit(Unit::durable()).await, Err(StoreError::Fenced), "number {number}");
            let last = last_of(number, &store).await?;
            assert!(last >= known.durable, "number {number}: {last} of {} acknowledged", known.durable);
            numbers.push((store, last));
        }
        Ok(numbers)
    }

    /// Commits units until the disk fails or enough is answered; some are still under way when it returns.
    fn write(&self, numbers: &[(NumberStore, u64)], figures: &Figures) {
        let units = 3 + self.chance.word() % 12;
        let (answer, answers) = std::sync::mpsc::channel();
        for step in 1..=units {
            for (number, (store, last)) in numbers.iter().enumerate() {
                let seq = last + step;
                let (known, answer) = (self.known.clone(), answer.clone());
                store.submit(unit_of(number, seq), move |outcome| {
                    if outcome.is_ok() && !seq.is_multiple_of(5) {
                        known.lock().unwrap()[number].durable = seq;
                    }
                    let _ = answer.send(());
                });
            }
        }
        figures.units.fetch_add(units * NUMBERS as u64, Ordering::Relaxed);
        let enough = self.chance.word() % (units * NUMBERS as u64 + 1);
        for _ in 0..enough {
            answers.recv().unwrap();
        }
    }

    /// The power fails; the next life begins with what is left.
    fn cut(&mut self) {
        let from = self.dir.join(format!("life-{}", self.lives));
        self.lives += 1;
        let to = self.dir.join(format!("life-{}", self.lives));
        // What was acknowledged until now must be there; what is acknowledged later happens in a world that is over.
        let known = *self.known.lock().unwrap();
        self.disk.crash(&from, &to);
        self.volume.close();
        self.known = Arc::new(Mutex::new(known));
        self.disk = LyingDisk::new(self.chance.clone());
        self.volume = volume_at(&to, &self.disk);
        let _ = std::fs::remove_dir_all(from);
    }

    fn mend(&self) {
        while let Err(error) = self.volume.reopen() {
            // sled's threads let go of a failed Db a little later.
            assert_eq!(error, StoreError::Busy, "a volume does not open again");
            std::thread::yield_now();
        }
    }
}

/// The last unit that is on disk, everything of it and nothing of a later one.
async fn last_of(number: usize, store: &NumberStore) -> Result<u64, StoreError> {
    let counter = store.get(Tag::Counters, &[]).await?;
    let last = counter.map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()));
    let rows = store.scan(Tag::Message, &[], None, Order::Ascending, 1_000).await?;
    assert_eq!(rows.len() as u64, last, "number {number}: rows without a gap and no half unit");
    for (seq, (key, value)) in (1u64..).zip(&rows) {
        assert_eq!(key.as_slice(), seq.to_be_bytes(), "number {number}");
        assert_eq!(*value, bytes_of(number, seq, 250), "number {number} row {seq}");
    }
    let outbox = store.scan(Tag::Outbox, &[], None, Order::Ascending, 10).await?;
    let outbox: Vec<_> = outbox.into_iter().map(|(key, _)| key).collect();
    let expected: Vec<_> = (last > 0).then(|| last.to_be_bytes().to_vec()).into_iter().collect();
    assert_eq!(outbox, expected, "number {number}");
    if last > 0 {
        assert_eq!(store.get(Tag::Session, &[1]).await?.unwrap(), bytes_of(number, last, 3_000), "number {number}");
    }
    let device = last / 8 * 8;
    let expected = (device > 0).then(|| bytes_of(number, device, device_length(device)));
    assert_eq!(store.get(Tag::Device, &[]).await?, expected, "number {number}: a value of many pieces");
    Ok(last)
}

async fn tell(story: &mut Story, figures: &Figures) {
    let cuts = 1 + u64::from(story.chance.word().is_multiple_of(4));
    for _ in 0..cuts {
        story.disk.behave(Manners::default());
        if story.volume.failure().is_some() {
            figures.unopened.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut numbers = story.claim_and_check().await.expect("a disk that does not fail");
        story.disk.behave(story.manners);
        for _ in 0..2 {
            story.write(&numbers, figures);
            if story.volume.failure().is_some() {
                // The disk failed under way: opened again, everything acknowledged is there.
                story.disk.behave(Manners::default());
                story.mend();
                numbers = story.claim_and_check().await.expect("mended");
                story.disk.behave(story.manners);
            } else {
                let settled =
                    futures_util::future::join_all(numbers.iter().map(|(store, _)| store.commit(Unit::durable())));
                if settled.await.iter().all(Result::is_ok) {
                    for (number, (store, last)) in numbers.iter_mut().enumerate() {
                        *last = last_of(number, store).await.unwrap_or(*last);
                    }
                } else {
                    story.disk.behave(Manners::default());
                    story.mend();
                    numbers = story.claim_and_check().await.expect("mended");
                    story.disk.behave(story.manners);
                }
            }
        }
        story.write(&numbers, figures);
        figures.failures.fetch_add(story.disk.failures(), Ordering::Relaxed);
        figures.cuts.fetch_add(1, Ordering::Relaxed);
        story.cut();
    }
    match story.volume.failure() {
        None => drop(story.claim_and_check().await.expect("a disk that does not fail")),
        Some(_) => drop(figures.unopened.fetch_add(1, Ordering::Relaxed)),
    }
    story.volume.close();
}

fn seeds() -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse().ok());
    match number("SWITCHBOARD_CRASH_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("SWITCHBOARD_CRASH_SEEDS").unwrap_or(SEEDS)).collect(),
    }
}

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("switchboard-crashes-{}-{name}", std::process::id()))
}

/// Tells the stories of all seeds; those that broke a promise come back with what they said.
fn tell_all(name: &str, seeds: &[u64], change: impl Fn(&mut Story) + Sync) -> (Figures, Vec<(u64, String)>) {
    let (figures, broken) = (Figures::default(), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (figures, broken, change) = (&figures, &broken, &change);
            scope.spawn(move || {
                for seed in seeds.iter().filter(|seed| *seed % WORKERS == worker) {
                    let dir = scratch(&format!("{name}-{seed}"));
                    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                        let mut story = Story::begin(*seed, &dir);
                        change(&mut story);
                        runtime.block_on(tell(&mut story, figures));
                    }));
                    if let Err(panic) = told {
                        let said = panic.downcast_ref::<String>().cloned();
                        broken.lock().unwrap().push((*seed, said.unwrap_or_else(|| "panic".to_owned())));
                    }
                    let _ = std::fs::remove_dir_all(&dir);
                }
            });
        }
    });
    (figures, broken.into_inner().unwrap())
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_acknowledged() {
    let seeds = seeds();
    let begun = std::time::Instant::now();
    let (figures, broken) = tell_all("honest", &seeds, |_| {});
    println!("{} seeds in {:?}: {figures:?}", seeds.len(), begun.elapsed());
    assert!(broken.is_empty(), "run again with SWITCHBOARD_CRASH_SEED=: {broken:#?}");
    assert_eq!(figures.unopened.load(Ordering::Relaxed), 0, "a volume did not open");
    if seeds.len() > 50 {
        assert!(figures.failures.load(Ordering::Relaxed) > 50, "the disk failed under way as well: {figures:?}");
    }
}

#[test]
fn the_method_notices_a_disk_that_forgets() {
    let seeds: Vec<u64> = (1_000..1_012).collect();
    let (figures, broken) = tell_all("forgets", &seeds, |story| {
        story.manners = Manners { forgets: true, ..Manners::default() };
    });
    let noticed = broken.len() as u64 + figures.unopened.load(Ordering::Relaxed);
    assert!(noticed * 2 > seeds.len() as u64, "{noticed} of {} noticed: {figures:?}", seeds.len());
}

#[tokio::test]
async fn units_that_wait_behind_a_full_disk_hear_that_it_is_full() {
    let dir = std::env::temp_dir().join(format!("switchboard-full-{}", std::process::id()));
    let story = Story::begin(1, &dir);
    for _ in 0..20 {
        story.disk.behave(Manners::default());
        if story.volume.failure().is_some() {
            story.mend();
        }
        let number = story.claim(0).await.unwrap();
        story.disk.behave(Manners { writes_failing: 1.0, ..Manners::default() });
        let (answer, mut answers) = tokio::sync::mpsc::unbounded_channel();
        // More than one group, submitted while the first one fails.
        for seq in 1..=500 {
            let answer = answer.clone();
            number.submit(unit_of(0, seq), move |outcome| drop(answer.send(outcome)));
        }
        drop(answer);
        while let Some(outcome) = answers.recv().await {
            assert_eq!(outcome, Err(StoreError::DiskFull));
        }
    }
    story.volume.close();
    let _ = std::fs::remove_dir_all(&dir);
}
