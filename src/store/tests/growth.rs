//! A store that is killed again and again, soon after each start and while sled cleans its log, loses nothing, and the log
//! stays below what was written. The lives are processes.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::domain::id::NumberId;
use crate::store::committer::{Answer, RawOp, Request};
use crate::store::disk::{LOG_FILE, SystemDisk};
use crate::store::key::{Tag, full_key};
use crate::store::volume::{OpenDb, Volume, VolumeSettings};

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

fn volume_at(path: &Path) -> Volume {
    let (path, disk) = (path.to_owned(), Arc::new(SystemDisk));
    Volume::new(VolumeSettings { name: "growing".to_owned(), path, cache_bytes: 16 << 20, disk })
}

fn put(tag: Tag, row: u64, seq: u64, bytes: usize) -> RawOp {
    RawOp::Put(full_key(NumberId(1), tag, &row.to_be_bytes()), vec![seq as u8; bytes])
}

/// The rows that stay.
fn rows(db: &OpenDb) -> Vec<Vec<u8>> {
    let (from, to) = (full_key(NumberId(1), Tag::Message, &[]), full_key(NumberId(1), Tag::ChatMessage, &[]));
    db.keys(&from, &to, false, 0, usize::MAX).unwrap()
}

/// Begins where the last life ended, writes, and waits to be killed.
fn live(path: &Path) {
    let volume = volume_at(path);
    let db = volume.db().unwrap();
    let last = rows(&db).len() as u64 / ROWS;
    let (answer, answers) = std::sync::mpsc::channel();
    for seq in last + 1..=last + UNITS {
        let mut ops: Vec<_> = (seq * ROWS..(seq + 1) * ROWS).map(|row| put(Tag::Message, row, seq, 300)).collect();
        let rewritten = seq * REWRITTEN..(seq + 1) * REWRITTEN;
        ops.extend(rewritten.map(|row| put(Tag::Session, row * 7 % SESSIONS, seq, 3_000)));
        let answer = answer.clone();
        let done = Answer::to(move |outcome| answer.send(outcome).unwrap());
        // Nobody waits for the disk but at the end: a life is short.
        db.submit(Request { ops, checks: Vec::new(), bytes: 0, durable: seq == last + UNITS, done });
        answers.recv().unwrap().unwrap();
    }
    println!("{WRITTEN}");
    std::thread::sleep(Duration::from_secs(600));
}

fn one_life(path: &Path) {
    let begun = Instant::now();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "store::tests::growth::a_store_that_is_killed_again_and_again_loses_nothing_and_is_cleaned",
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

#[test]
fn a_store_that_is_killed_again_and_again_loses_nothing_and_is_cleaned() {
    if let Some(path) = std::env::var_os(HOME) {
        return live(&PathBuf::from(path));
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
    assert_eq!(rows(&volume.db().unwrap()).len() as u64, told * UNITS * ROWS, "everything acknowledged is there");
    volume.close();
    let _ = std::fs::remove_dir_all(&path);
    let written = told * UNITS * (ROWS * 300 + REWRITTEN * 3_000);
    assert!(sizes.iter().all(|mib| *mib <= written >> 20), "MiB after each life: {sizes:?}");
}
