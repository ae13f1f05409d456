//! What the store asks of the disk beside sled's own reads and writes: make it durable, make it whole again, how much room
//! is left. Behind a trait so that tests can run the real store on a disk that lies and fails.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::error::StoreError;
use crate::telemetry::failpoint;

/// Room that must be there, in one piece, before a volume is opened again after the disk was full.
const PROBE_BYTES: usize = 4 * 1024 * 1024;
const PROBE_FILE: &str = "probe";
/// Log of a Db, below its directory.
pub(super) const LOG_FILE: &str = "db";
/// `ENOSPC` has a kind of its own; these come with a file size limit and with quotas.
const FULL: [io::ErrorKind; 3] =
    [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::FileTooLarge];

/// Bytes of the file system a directory is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What we may still write.
    pub free: u64,
    /// Free or not.
    pub total: u64,
}

/// The disk below one data directory.
pub(super) trait Disk: Send + Sync + std::fmt::Debug {
    /// A handle that makes the log of the Db at `path` durable.
    fn log(&self, path: &Path) -> io::Result<Box<dyn Log>>;

    /// Writes the log of a closed Db anew, so that what is in the page cache alone is on the disk as well: after a
    /// failed sync the kernel counts such pages as written.
    fn rewrite(&self, path: &Path) -> io::Result<()>;

    /// Whether there is room to go on: the log can grow.
    fn probe(&self, path: &Path) -> io::Result<()>;

    /// How much room is left.
    fn space(&self, dir: &Path) -> io::Result<Space>;
}

/// The log of an open Db.
pub(super) trait Log: Send {
    /// Before anything of a group is written.
    fn before_write(&mut self) -> io::Result<()>;

    /// Makes everything written durable. After an error it must not be called again.
    fn sync(&mut self) -> io::Result<()>;
}

/// The operating system's.
#[derive(Debug, Clone, Copy)]
pub(super) struct SystemDisk;

struct SystemLog {
    file: File,
    dir: PathBuf,
}

impl Disk for SystemDisk {
    fn log(&self, path: &Path) -> io::Result<Box<dyn Log>> {
        Ok(Box::new(SystemLog { file: File::open(path.join(LOG_FILE))?, dir: path.to_owned() }))
    }

    fn rewrite(&self, path: &Path) -> io::Result<()> {
        rewrite_log(path)
    }

    fn probe(&self, path: &Path) -> io::Result<()> {
        let file = path.join(PROBE_FILE);
        let probed = write_probe(path, &file);
        let _ = fs::remove_file(&file);
        probed
    }

    fn space(&self, dir: &Path) -> io::Result<Space> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(Space { free: stat.f_bavail * stat.f_frsize, total: stat.f_blocks * stat.f_frsize })
    }
}

impl Log for SystemLog {
    fn before_write(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        failpoint::reach_sync(&self.dir)?;
        self.file.sync_data()
    }
}

fn write_probe(path: &Path, probe: &Path) -> io::Result<()> {
    // Where the log would grow: a limit on the size of a file shows there, a full disk anywhere.
    let end = fs::metadata(path.join(LOG_FILE)).map_or(0, |log| log.len());
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(probe)?;
    file.write_all_at(&vec![1; PROBE_BYTES], end)?;
    failpoint::reach_sync(path)?;
    file.sync_data()
}

/// Copies the log beside itself, syncs the copy and puts it in the log's place.
pub(super) fn rewrite_log(path: &Path) -> io::Result<()> {
    let (log, copy) = (path.join(LOG_FILE), path.join("db.copy"));
    let copied = fs::copy(&log, &copy).and_then(|_| File::open(&copy)?.sync_all());
    if let Err(error) = copied {
        let _ = fs::remove_file(&copy);
        return Err(error);
    }
    fs::rename(&copy, &log)?;
    sync_dir(path)
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// What a failed read or write means to the store.
pub(super) fn refused(error: &io::Error) -> StoreError {
    if FULL.contains(&error.kind()) { StoreError::DiskFull } else { StoreError::Failed(error.to_string()) }
}

/// The same for what sled says.
pub(super) fn sled_refused(error: &sled::Error) -> StoreError {
    match error {
        sled::Error::Io(error) => refused(error),
        error => StoreError::Failed(error.to_string()),
    }
}
