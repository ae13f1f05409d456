//! A daemon that dies again and again, soon after each start, does not fill the disk: the log is cleaned faster than a
//! life writes. The lives are processes, and they are killed.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::domain::id::NumberId;
use crate::store::disk::{LOG_FILE, SystemDisk};
use crate::store::key::Tag;
use crate::store::mender::Room;
use crate::store::number_store::{NumberKeys, NumberStore, Order};
use crate::store::seal::{Sealer, SecretBytes};
use crate::store::unit::Unit;
use crate::store::volume::{Volume, VolumeSettings};
use crate::telemetry::rng::Random;

/// Where a life finds its volume; set for the children only.
const HOME: &str = "SWITCHBOARD_GROWTH_DIR";
/// What a life says when it has written everything.
const WRITTEN: &str = "written everything";
/// Lives told, or `SWITCHBOARD_GROWTH_LIVES` of them.
const LIVES: u64 = 24;
/// A life that is not killed sooner.
const LIFE: Duration = Duration::from_millis(300);
const UNITS: u64 = 80;
/// Rows that stay, written by each unit.
const ROWS: u64 = 8;
/// Rows that are rewritten all the time, and how many of them by each unit.
const SESSIONS: u64 = 300;
const REWRITTEN: u64 = 12;
/// What lives in it is 7 MiB in the end. Cleaned as seldom as sled does by itself, the log takes 44 by then.
const LOG_MIB_MAX: u64 = 36;

fn volume_at(path: &Path) -> Volume {
    let (path, disk) = (path.to_owned(), Arc::new(SystemDisk));
    Volume::new(VolumeSettings { name: "growing".to_owned(), path, cache_bytes: 16 << 20, disk })
}

async fn claim(volume: &Volume) -> NumberStore {
    let keys = NumberKeys {
        sealer: Arc::new(Sealer::new(&[1; 32])),
        hash_secret: Arc::new(SecretBytes::new([9; 32])),
        random: Arc::new(Random::seeded(7)),
    };
    NumberStore::claim(NumberId(1), keys, volume.db().unwrap(), Arc::new(Room::default())).await.unwrap()
}

/// Begins where the last life ended, writes, and waits to be killed.
async fn live(path: &Path) {
    let volume = volume_at(path);
    let number = claim(&volume).await;
    let newest = number.scan(Tag::Message, &[], None, Order::Descending, 1).await.unwrap();
    let last = newest.first().map_or(0, |(key, _)| u64::from_be_bytes(key.as_slice().try_into().unwrap()) / ROWS);
    for seq in last + 1..=last + UNITS {
        // Nobody waits for the disk but at the end: a life is short.
        let mut unit = if seq == last + UNITS { Unit::durable() } else { Unit::rides_along() };
        for row in seq * ROWS..(seq + 1) * ROWS {
            unit.put(Tag::Message, row.to_be_bytes(), vec![row as u8; 300]);
        }
        for row in seq * REWRITTEN..(seq + 1) * REWRITTEN {
            unit.put(Tag::Session, (row * 7 % SESSIONS).to_be_bytes(), vec![row as u8; 3_000]);
        }
        number.commit(unit).await.unwrap();
    }
    println!("{WRITTEN}");
    std::thread::sleep(Duration::from_secs(600));
}

fn one_life(path: &Path) {
    let begun = Instant::now();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "store::tests::growth::a_daemon_that_dies_again_and_again_does_not_fill_the_disk",
            "--nocapture",
        ])
        .env(HOME, path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let wrote = lines.map_while(Result::ok).any(|line| line.ends_with(WRITTEN));
    std::thread::sleep(LIFE.saturating_sub(begun.elapsed()));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(wrote, "a life ended by itself");
}

fn log_mib(path: &Path) -> u64 {
    std::fs::metadata(path.join(LOG_FILE)).unwrap().len() >> 20
}

#[tokio::test]
async fn a_daemon_that_dies_again_and_again_does_not_fill_the_disk() {
    if let Some(path) = std::env::var_os(HOME) {
        return live(&PathBuf::from(path)).await;
    }
    let path = std::env::temp_dir().join(format!("switchboard-growth-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    let told = std::env::var("SWITCHBOARD_GROWTH_LIVES").ok().and_then(|text| text.parse().ok()).unwrap_or(LIVES);
    let mut sizes = Vec::new();
    for _ in 0..told {
        one_life(&path);
        sizes.push(log_mib(&path));
    }
    println!("MiB after each life: {sizes:?}");
    let volume = volume_at(&path);
    let number = claim(&volume).await;
    let rows = number.keys(Tag::Message, &[], None, Order::Ascending, (0, usize::MAX)).await.unwrap();
    assert_eq!(rows.len() as u64, told * UNITS * ROWS, "everything acknowledged is there");
    volume.close();
    let _ = std::fs::remove_dir_all(&path);
    assert!(sizes.iter().all(|mib| *mib <= LOG_MIB_MAX), "MiB after each life: {sizes:?}");
}
