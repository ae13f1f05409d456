//! Really damaged files: nothing is deleted, nothing is taken for new, and what can be read is kept when an operator says so.

use std::fs;
use std::path::{Path, PathBuf};

use super::home::{Home, claim};
use crate::domain::change::Counters;
use crate::domain::id::NumberId;
use crate::store::disk::{LOG_FILE, SystemDisk};
use crate::store::error::StoreError;
use crate::store::key::Tag;
use crate::store::number_store::{NumberStore, Order};
use crate::store::records::{decode, encode};
use crate::store::storage::{Lost, RebuildError, check, rebuild, trim};
use crate::store::unit::Unit;
use crate::telemetry::rng::Random;

const ROWS: u64 = 3_000;
const VOLUME: &str = "volume-00";

fn row(seq: u64) -> Vec<u8> {
    (0..300u64).map(|index| (index ^ seq.wrapping_mul(31)) as u8).collect()
}

/// One number with a history, a session, a send and a webhook that wait, and an event.
async fn fill(home: &Home) {
    let store = home.open();
    let number = claim(&store, 1).await;
    for from in (0..ROWS).step_by(100) {
        let mut unit = Unit::durable();
        for seq in from..from + 100 {
            unit.put(Tag::Message, seq.to_be_bytes(), row(seq));
        }
        unit.put(Tag::Session, [1], row(from));
        unit.put(Tag::Device, [], vec![7; 40_000]);
        unit.put(Tag::Outbox, ROWS.to_be_bytes(), row(1));
        unit.put(Tag::Delivery, [2], row(2));
        unit.put(Tag::Event, 5u64.to_be_bytes(), row(3));
        unit.put(Tag::Counters, [], encode(&Counters { message: ROWS, event: 5, ..Counters::default() }));
        number.commit(unit).await.unwrap();
    }
    store.close();
}

async fn history(number: &NumberStore) -> Vec<u64> {
    let mut seqs = Vec::new();
    for (key, value) in number.scan_all(Tag::Message, &[]).await.unwrap() {
        let seq = u64::from_be_bytes(key.as_slice().try_into().unwrap());
        assert_eq!(value, row(seq), "row {seq}");
        seqs.push(seq);
    }
    seqs
}

/// sled's checkpoint of the volume.
fn checkpoint(volume: &Path) -> PathBuf {
    let mut files = fs::read_dir(volume).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.file_name().unwrap().to_string_lossy().starts_with("snap.")).unwrap()
}

fn files_of(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let mut all: Vec<_> = files.map(|path| (path.clone(), fs::read(&path).unwrap())).collect();
    all.sort();
    all
}

#[tokio::test]
async fn a_damaged_volume_is_set_aside_and_rebuilt_only_on_an_order() {
    let home = Home::new("damaged");
    fill(&home).await;
    // Opened once more, so that there is a checkpoint.
    home.open().close();
    let (volume, aside) = (home.dir.join(VOLUME), home.dir.join("volume-00.damaged"));
    let snap = checkpoint(&volume);
    let mut bytes = fs::read(&snap).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    fs::write(&snap, bytes).unwrap();

    for _ in 0..2 {
        let store = home.open();
        let refused = store.claim(NumberId(1), 0).await.unwrap_err();
        assert!(matches!(refused, StoreError::Damaged(_)), "{refused}");
        assert_eq!(store.report().iter().filter(|volume| volume.failure.is_some()).count(), 1, "the others work");
        assert!(!volume.exists() && aside.exists(), "set aside, and no empty one in its place");
        store.close();
    }
    let before = files_of(&aside);
    let checked = check(&home.settings).unwrap();
    let unsound: Vec<_> = checked.iter().filter(|volume| !volume.is_sound()).map(|volume| &volume.name).collect();
    assert_eq!(unsound, ["volume-00.damaged"], "{checked:?}");

    let refused = rebuild(&home.settings, VOLUME, false).await.unwrap_err();
    assert!(matches!(refused, RebuildError::WouldLose { sends: 1, deliveries: 1, events: 1, .. }), "{refused}");
    assert!(!volume.exists(), "nothing was changed");

    let rebuilt = rebuild(&home.settings, VOLUME, true).await.unwrap();
    assert_eq!(rebuilt.lost, Some(Lost { unlinked: 1, sends: 1, deliveries: 1, events: 1 }), "{rebuilt}");
    assert_eq!(files_of(&aside), before, "the damaged files are as they were");
    let store = home.open();
    let number = claim(&store, 1).await;
    assert_eq!(history(&number).await, (0..ROWS).collect::<Vec<_>>(), "the log itself was whole");
    for gone in [Tag::Device, Tag::Session, Tag::Outbox, Tag::Delivery, Tag::Event, Tag::Chunk] {
        let left = number.keys(gone, &[], None, Order::Ascending, (0, 10)).await.unwrap();
        assert!(left.is_empty(), "{gone:?}");
    }
    let counters: Counters = decode(&number.get(Tag::Counters, &[]).await.unwrap().unwrap()).unwrap();
    assert!(counters.message >= ROWS + 1_000_000 && counters.event > 1_000_000);
    assert_eq!(counters.event_floor, counters.event, "whoever holds an old cursor is told that it expired");
    store.close();
}

/// Breaks the closed volume somewhere, in one of the ways disks do.
fn damage(volume: &Path, chance: &Random) -> String {
    let log = volume.join(LOG_FILE);
    let mut bytes = fs::read(&log).unwrap();
    let at = (chance.word() % bytes.len() as u64) as usize;
    let what = chance.word() % 5;
    match what {
        0 => bytes.truncate(at),
        1 => bytes[at..].fill(0),
        2 => bytes[at..].iter_mut().take(4096).for_each(|byte| *byte = chance.word() as u8),
        3 => bytes[..at].fill(0xff),
        _ => fs::write(volume.join("conf"), b"not a configuration").unwrap(),
    }
    fs::write(&log, bytes).unwrap();
    if chance.share() < 0.5 {
        fs::remove_file(checkpoint(volume)).unwrap();
        return format!("way {what} at {at}, no checkpoint");
    }
    format!("way {what} at {at}")
}

#[tokio::test]
async fn however_a_volume_is_damaged_nothing_is_taken_for_new_and_a_rebuild_always_opens() {
    let whole = Home::new("damage-whole");
    fill(&whole).await;
    whole.open().close();
    let (mut noticed, mut kept) = (0, 0);
    for seed in 0..16 {
        let chance = Random::seeded(seed);
        let home = Home::new(&format!("damage-{seed}"));
        crate::store::open::copy_files(&whole.dir, &home.dir).unwrap();
        let how = damage(&home.dir.join(VOLUME), &chance);
        let store = home.open();
        let claimed = store.claim(NumberId(1), 0).await;
        if let Ok(number) = &claimed
            && let Ok(rows) = number.scan_all(Tag::Message, &[]).await
        {
            assert!(!rows.is_empty(), "seed {seed}, {how}: it opened as if it were new");
        }
        drop(claimed);
        store.close();
        drop(store);
        if !home.dir.join("volume-00.damaged").exists() {
            continue;
        }
        noticed += 1;
        let rebuilt =
            rebuild(&home.settings, VOLUME, true).await.unwrap_or_else(|error| panic!("seed {seed}, {how}: {error}"));
        println!("seed {seed}, {how}: {rebuilt}");
        let store = home.open();
        let number = claim(&store, 1).await;
        kept += usize::from(!history(&number).await.is_empty());
        number.commit(Unit::durable()).await.unwrap();
        store.close();
    }
    println!("{noticed} of 16 noticed, {kept} kept a history");
    assert!(noticed >= 4, "{noticed}");
}

#[tokio::test]
async fn a_log_that_outgrew_its_rows_is_copied_at_a_start_and_a_lean_one_is_not() {
    const MIB: u64 = 1 << 20;
    let home = Home::new("trim");
    fill(&home).await;
    let (volume, disk) = (home.dir.join(VOLUME), SystemDisk);
    let log = || fs::metadata(volume.join(LOG_FILE)).unwrap().len();
    assert!(log() > 4 * MIB, "{}", log());
    assert!(trim(&volume, MIB, &disk, 1 << 30).unwrap().is_none(), "too small to be looked at");
    let before = log();
    let trimmed = trim(&volume, MIB, &disk, 4 * MIB).unwrap().expect("copied");
    assert!(log() < before && trimmed.lost.is_none(), "{trimmed}");
    assert!(trim(&volume, MIB, &disk, 1).unwrap().is_none(), "now it is lean");
    let store = home.open();
    let number = claim(&store, 1).await;
    assert_eq!(history(&number).await, (0..ROWS).collect::<Vec<_>>());
    assert_eq!(number.get(Tag::Device, &[]).await.unwrap().unwrap(), vec![7; 40_000], "Signal state is as it was");
    store.close();
}

#[tokio::test]
async fn a_volume_that_works_gives_back_the_disk_it_wastes_and_nothing_else() {
    let home = Home::new("compact");
    fill(&home).await;
    let store = home.open();
    let number = claim(&store, 1).await;
    for from in (0..ROWS - 100).step_by(100) {
        let mut unit = Unit::durable();
        for seq in from..from + 100 {
            unit.delete(Tag::Message, seq.to_be_bytes());
        }
        unit.put(Tag::Device, [], vec![8; 40_000]);
        number.commit(unit).await.unwrap();
    }
    drop(number);
    store.close();
    drop(store);
    let rebuilt = rebuild(&home.settings, VOLUME, false).await.unwrap();
    assert_eq!(rebuilt.lost, None);
    assert!(rebuilt.disk_bytes.1 < rebuilt.disk_bytes.0, "{rebuilt}");
    // A crash between the two renames of an exchange.
    let volume = home.dir.join(VOLUME);
    fs::rename(&volume, crate::store::open::beside(&volume, crate::store::open::REPLACED)).unwrap();
    let store = home.open();
    let number = claim(&store, 1).await;
    assert_eq!(history(&number).await, (ROWS - 100..ROWS).collect::<Vec<_>>());
    assert_eq!(number.get(Tag::Device, &[]).await.unwrap().unwrap(), vec![8; 40_000], "Signal state is as it was");
    assert!(matches!(rebuild(&home.settings, VOLUME, false).await, Err(RebuildError::Open(_))), "a daemon runs");
    store.close();
}
