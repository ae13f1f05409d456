//! Opening a Db so that a crash during an earlier open does not become a crash loop, and so that a damaged one is neither
//! touched again nor taken for a new one: it is set aside, and stays shut until an operator decides.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::disk::{Disk, LOG_FILE, Log, refused, sled_refused, sync_dir};
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
const LEAN_LOG_BYTES: u64 = 8 * 1024 * 1024;

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

/// sled's record of its own settings.
const CONFIG_FILE: &str = "conf";
/// Damaged copies of one volume that are told apart.
const SET_ASIDE_MAX: u32 = 1000;
/// What an exchange puts in the volume's place, and what it replaced.
pub(super) const REPLACED: &str = ".old";

/// The place beside a volume with this at the end of its name.
pub(super) fn beside(volume: &Path, suffix: &str) -> PathBuf {
    let mut place = volume.as_os_str().to_owned();
    place.push(suffix);
    place.into()
}

fn set_aside_places(volume: &Path) -> impl Iterator<Item = PathBuf> {
    let suffix = |count| if count == 1 { ".damaged".to_owned() } else { format!(".damaged-{count}") };
    (1..=SET_ASIDE_MAX).map(move |count| beside(volume, &suffix(count)))
}

/// The damaged files of a volume that were found last.
pub(super) fn newest_set_aside(volume: &Path) -> Option<PathBuf> {
    set_aside_places(volume).take_while(|place| place.exists()).last()
}

/// Moves a damaged volume out of everybody's way: sled's every try to open it would write to it.
fn set_aside(volume: &Path) -> std::io::Result<PathBuf> {
    let full = || std::io::Error::other("too many damaged copies");
    let place = set_aside_places(volume).find(|place| !place.exists()).ok_or_else(full)?;
    fs::rename(volume, &place)?;
    volume.parent().map_or(Ok(()), sync_dir)?;
    Ok(place)
}

/// Puts a complete new Db in a volume's place. A crash in between leaves the old one, see [`settle`].
pub(super) fn exchange(volume: &Path, fresh: &Path) -> std::io::Result<()> {
    let (old, parent) = (beside(volume, REPLACED), volume.parent());
    if old.exists() {
        fs::remove_dir_all(&old)?;
    }
    fs::rename(volume, &old)?;
    fs::rename(fresh, volume)?;
    parent.map_or(Ok(()), sync_dir)?;
    fs::remove_dir_all(&old)
}

/// A volume that is not there: new, or in the middle of an exchange, or set aside.
fn settle(volume: &Path) -> Result<(), StoreError> {
    if volume.exists() {
        return Ok(());
    }
    let old = beside(volume, REPLACED);
    if old.exists() {
        return fs::rename(old, volume).map_err(|error| refused(&error));
    }
    match newest_set_aside(volume) {
        Some(place) => Err(StoreError::Damaged(format!("its files are in {}", place.display()))),
        None => Ok(()),
    }
}

/// Removes sled's checkpoints, or only those that were never finished.
pub(super) fn remove_checkpoints(path: &Path, unfinished_only: bool) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && (!unfinished_only || name.ends_with(".generating")) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Removes sled's record of its own settings; the next open writes it again.
pub(super) fn remove_config(path: &Path) -> std::io::Result<()> {
    let config = path.join(CONFIG_FILE);
    if config.exists() { fs::remove_file(config) } else { Ok(()) }
}

/// Copies the files of a Db that nobody writes to.
pub(super) fn copy_files(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let place = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_files(&entry.path(), &place)?;
        } else {
            fs::copy(entry.path(), place)?;
        }
    }
    Ok(())
}

/// Opens it as it is.
pub(super) fn try_open(path: &Path, cache_bytes: u64) -> Result<(sled::Db, sled::Tree), StoreError> {
    let open = || -> sled::Result<_> {
        let db = config(path, cache_bytes).open()?;
        let tree = db.open_tree("d")?;
        db.flush()?;
        Ok((db, tree))
    };
    // sled panics on some damaged logs; a panic here must cost one volume, not the process.
    match catch_unwind(AssertUnwindSafe(open)) {
        Ok(opened) => opened.map_err(|error| why_shut(&error)),
        Err(_) => Err(StoreError::Damaged("panic while opening".to_owned())),
    }
}

fn why_shut(error: &sled::Error) -> StoreError {
    match error {
        // A Db that was just given up: sled's own threads hold its lock a little longer. Nothing is wrong with it.
        error if error.to_string().contains("could not acquire lock") => StoreError::Busy,
        sled::Error::Corruption { .. } | sled::Error::ReportableBug(_) => StoreError::Damaged(error.to_string()),
        sled::Error::Io(error) if error.kind() == ErrorKind::UnexpectedEof => StoreError::Damaged(error.to_string()),
        error => sled_refused(error),
    }
}

/// Says that the Db was complete once: the row below is in it, or what was in it is lost.
pub(super) const BORN_FILE: &str = "born";
/// Shorter than any number's key, and of no row of `meta`.
pub(super) const BORN_ROW: &[u8] = &[0];

/// Whether it was complete once, and is not any more.
pub(super) fn lost_its_birth(path: &Path, tree: &sled::Tree) -> Result<bool, StoreError> {
    let known = tree.get(BORN_ROW).map_err(|error| sled_refused(&error))?.is_some();
    Ok(!known && path.join(BORN_FILE).exists())
}

pub(super) fn opens_empty() -> StoreError {
    StoreError::Damaged("it opens without its records".to_owned())
}

/// A Db that lost its log's beginning, or its checkpoint, can open without an error and be empty. Nobody must take that
/// for a new one: sequences and Signal state would begin again.
fn check_birth(path: &Path, db: &sled::Db, tree: &sled::Tree, log: &mut dyn Log) -> Result<(), StoreError> {
    let io = |error| refused(&error);
    let born = path.join(BORN_FILE);
    if born.exists() {
        return if lost_its_birth(path, tree)? { Err(opens_empty()) } else { Ok(()) };
    }
    if tree.get(BORN_ROW).map_err(|error| sled_refused(&error))?.is_none() {
        tree.insert(BORN_ROW, &[1]).and_then(|_| db.flush()).map_err(|error| sled_refused(&error))?;
    }
    log.sync().map_err(io)?;
    File::create(&born).and_then(|file| file.sync_all()).map_err(io)?;
    sync_dir(path).map_err(io)
}

fn sync_new_files(path: &Path) -> std::io::Result<()> {
    for name in [CONFIG_FILE, LOG_FILE] {
        File::open(path.join(name))?.sync_all()?;
    }
    sync_dir(path)?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// An open Db, its one tree, and the handle that makes its log durable.
pub(super) type Opened = (sled::Db, sled::Tree, Box<dyn Log>);

/// Opens or creates the Db at `path`.
///
/// # Errors
/// `DiskFull`, `Busy` or `Failed`, which leave everything as it was, or `Damaged`: its files were moved aside, now or
/// earlier, and no new Db is begun in their place.
pub(super) fn open(path: &Path, cache_bytes: u64, disk: &dyn Disk) -> Result<Opened, StoreError> {
    settle(path)?;
    match open_sound(path, cache_bytes, disk) {
        Err(StoreError::Damaged(why)) => {
            // sled also panics when the disk refuses: that is no damage.
            disk.probe(path).map_err(|error| refused(&error))?;
            let place = set_aside(path).map_err(|error| refused(&error))?;
            tracing::error!(
                error = why,
                files = %place.display(),
                "volume is damaged and was set aside: see `switchboard storage check`"
            );
            Err(StoreError::Damaged(why))
        }
        outcome => outcome,
    }
}

fn open_sound(path: &Path, cache_bytes: u64, disk: &dyn Disk) -> Result<Opened, StoreError> {
    let io = |error| refused(&error);
    fs::create_dir_all(path).map_err(io)?;
    remove_checkpoints(path, true).map_err(io)?;
    let (db, tree) = try_open(path, cache_bytes)?;
    sync_new_files(path).map_err(io)?;
    let mut log = disk.log(path).map_err(io)?;
    log.sync().map_err(io)?;
    check_birth(path, &db, &tree, log.as_mut())?;
    Ok((db, tree, log))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_the_log_the_more_often_it_is_cleaned() {
        assert_eq!(clean_every(0), CLEAN_EVERY);
        assert_eq!(clean_every(LEAN_LOG_BYTES), CLEAN_EVERY);
        assert_eq!(clean_every(LEAN_LOG_BYTES * 2), CLEAN_EVERY / 2);
        assert_eq!(clean_every(u64::MAX), CLEAN_EVERY_MIN);
    }
}
