//! Opening a Db so that a crash during an earlier open, or a damaged checkpoint, does not become a crash loop.

use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use super::disk::{Disk, LOG_FILE, Log, refused, sled_refused};
use super::error::StoreError;

/// sled's file cannot be larger than this per record without side files; see `chunk`.
const SEGMENT_BYTES: usize = 2 * 1024 * 1024;

/// Between two runs of sled's flusher, which is the only caller of its segment clean-up, and cleans one segment a run. A
/// run also syncs the log, so an idle Db should see few of them.
const CLEAN_EVERY: Duration = Duration::from_millis(500);
/// A log that has grown needs them more often: where lives are short, or writing is heavy, sled otherwise cleans less than
/// it writes, and the log grows without end.
const CLEAN_EVERY_MIN: Duration = Duration::from_millis(100);
/// From this size on the pause shrinks in proportion.
const LEAN_LOG_BYTES: u64 = 16 * 1024 * 1024;

fn clean_every(log_bytes: u64) -> Duration {
    let shrunk = CLEAN_EVERY.mul_f64(LEAN_LOG_BYTES as f64 / log_bytes.max(LEAN_LOG_BYTES) as f64);
    shrunk.max(CLEAN_EVERY_MIN)
}

fn config(path: &Path, cache_bytes: u64) -> sled::Config {
    let log_bytes = fs::metadata(path.join(LOG_FILE)).map_or(0, |log| log.len());
    let clean_every = u64::try_from(clean_every(log_bytes).as_millis()).unwrap_or(u64::MAX);
    sled::Config::new()
        .path(path)
        .segment_size(SEGMENT_BYTES)
        .cache_capacity(cache_bytes)
        .mode(sled::Mode::HighThroughput)
        .flush_every_ms(Some(clean_every))
}

fn checkpoints(path: &Path, unfinished_only: bool) -> std::io::Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && (!unfinished_only || name.ends_with(".generating")) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn remove_checkpoints(path: &Path, unfinished_only: bool) -> std::io::Result<()> {
    for file in checkpoints(path, unfinished_only)? {
        fs::remove_file(file)?;
    }
    Ok(())
}

fn copy_aside(path: &Path) -> std::io::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    let aside = Path::new(&aside);
    if aside.exists() {
        // What was found first is what somebody will want to look at.
        return Ok(());
    }
    fs::create_dir_all(aside)?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), aside.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn try_open(path: &Path, cache_bytes: u64) -> Result<(sled::Db, sled::Tree), StoreError> {
    let open = || -> sled::Result<_> {
        let db = config(path, cache_bytes).open()?;
        let tree = db.open_tree("d")?;
        db.flush()?;
        Ok((db, tree))
    };
    // sled panics on some damaged logs; a panic here must cost one volume, not the process.
    match catch_unwind(AssertUnwindSafe(open)) {
        // A Db that was just given up: sled's own threads hold its lock a little longer. Nothing is wrong with it.
        Ok(Err(error)) if error.to_string().contains("could not acquire lock") => Err(StoreError::Busy),
        Ok(opened) => opened.map_err(|error| sled_refused(&error)),
        Err(_) => Err(StoreError::Failed("the log is damaged (panic while opening)".to_owned())),
    }
}

/// Says that the Db was complete once: the row below is in it, or what was in it is lost.
pub(super) const BORN_FILE: &str = "born";
/// Shorter than any number's key, and of no row of `meta`.
const BORN_ROW: &[u8] = &[0];

/// A Db that lost its log's beginning, or its checkpoint, can open without an error and be empty. Nobody must take that
/// for a new one: sequences and Signal state would begin again.
fn check_birth(path: &Path, db: &sled::Db, tree: &sled::Tree, log: &mut dyn Log) -> Result<(), StoreError> {
    let io = |error| refused(&error);
    let born = path.join(BORN_FILE);
    let known = tree.get(BORN_ROW).map_err(|error| sled_refused(&error))?.is_some();
    if born.exists() {
        let lost = || StoreError::Failed("it opens empty: its records are lost".to_owned());
        return if known { Ok(()) } else { Err(lost()) };
    }
    if !known {
        tree.insert(BORN_ROW, &[1]).and_then(|_| db.flush()).map_err(|error| sled_refused(&error))?;
    }
    log.sync().map_err(io)?;
    File::create(&born).and_then(|file| file.sync_all()).map_err(io)?;
    File::open(path).and_then(|dir| dir.sync_all()).map_err(io)
}

fn sync_new_files(path: &Path) -> std::io::Result<()> {
    for name in ["conf", LOG_FILE] {
        File::open(path.join(name))?.sync_all()?;
    }
    File::open(path)?.sync_all()?;
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Opens or creates the Db at `path`, with its one tree and the handle that makes its log durable.
///
/// # Errors
/// `DiskFull` or `Busy`, which leave everything as it was, or `Failed` when it cannot be opened, also not without its
/// checkpoints; the damaged files were copied beside it.
pub(super) fn open(
    path: &Path,
    cache_bytes: u64,
    disk: &dyn Disk,
) -> Result<(sled::Db, sled::Tree, Box<dyn Log>), StoreError> {
    let io = |error| refused(&error);
    fs::create_dir_all(path).map_err(io)?;
    remove_checkpoints(path, true).map_err(io)?;
    let (db, tree) = match try_open(path, cache_bytes) {
        Ok(opened) => opened,
        Err(error @ (StoreError::DiskFull | StoreError::Busy)) => return Err(error),
        Err(first) => {
            tracing::error!(error = %first, "volume does not open, trying without its checkpoints");
            copy_aside(path).map_err(io)?;
            remove_checkpoints(path, false).map_err(io)?;
            try_open(path, cache_bytes)?
        }
    };
    sync_new_files(path).map_err(io)?;
    let mut log = disk.log(path).map_err(io)?;
    log.sync().map_err(io)?;
    check_birth(path, &db, &tree, log.as_mut())?;
    Ok((db, tree, log))
}
