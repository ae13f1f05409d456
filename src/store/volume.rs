//! One volume: a Db with one tree and its committer. Numbers live in it as key ranges. When its disk fails it is
//! quarantined: nothing is read, written or acknowledged until it was opened again from what is on disk.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{oneshot, watch};

use super::committer::{Answer, Committer, CommitterStats, Failure, RawOp, Request, Shared};
use super::disk::Disk;
use super::error::StoreError;
use super::open;
use super::storage::{self, TRIM_LOG_BYTES};

/// What a volume is opened with, at first and again.
#[derive(Debug, Clone)]
pub(super) struct VolumeSettings {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) cache_bytes: u64,
    pub(super) disk: Arc<dyn Disk>,
}

/// Figures of a volume, for `/metrics`.
#[derive(Debug, Default)]
pub struct VolumeStats {
    /// Its committer's.
    pub committer: Arc<CommitterStats>,
    /// How often its disk failed.
    pub failures: AtomicU64,
    /// How often it was opened again.
    pub reopened: AtomicU64,
}

/// The Db while it is open. It ends with the first failure; whoever still holds it is refused.
pub(super) struct OpenDb {
    committer: Committer,
    shared: Arc<Shared>,
}

impl OpenDb {
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.shared.read(|tree| Ok(tree.get(key)?.map(|value| value.to_vec())))
    }

    /// Records in `[from, to)`, in key order or against it, `limit` at most.
    pub(super) fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        newest_first: bool,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        self.shared.read(|tree| {
            let range = tree.range(from..to);
            let taken: sled::Result<Vec<_>> =
                if newest_first { range.rev().take(limit).collect() } else { range.take(limit).collect() };
            Ok(taken?.into_iter().map(|(key, value)| (key.to_vec(), value.to_vec())).collect())
        })
    }

    /// Keys in `[from, to)` without their values, after `skip` of them, `limit` at most.
    pub(super) fn keys(
        &self,
        from: &[u8],
        to: &[u8],
        newest_first: bool,
        skip: usize,
        limit: usize,
    ) -> Result<Vec<Vec<u8>>, StoreError> {
        self.shared.read(|tree| {
            let range = tree.range(from..to);
            let key = |row: sled::Result<(sled::IVec, sled::IVec)>| row.map(|(key, _)| key.to_vec());
            if newest_first {
                range.rev().skip(skip).take(limit).map(key).collect()
            } else {
                range.skip(skip).take(limit).map(key).collect()
            }
        })
    }

    pub(super) fn submit(&self, request: Request) {
        self.committer.submit(request);
    }

    /// Writes and waits until it is on disk.
    pub(super) async fn write(&self, ops: Vec<RawOp>) -> Result<(), StoreError> {
        let (answer, outcome) = oneshot::channel();
        let done = Answer::to(move |outcome| drop(answer.send(outcome)));
        self.submit(Request { ops, checks: Vec::new(), bytes: 0, durable: true, done });
        outcome.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Why it is given up, if it is.
    pub(super) fn failure(&self) -> Option<&Failure> {
        self.shared.failure()
    }
}

pub(super) struct Volume {
    settings: VolumeSettings,
    current: RwLock<Result<Arc<OpenDb>, Failure>>,
    /// Counts openings.
    opened: watch::Sender<u64>,
    stats: Arc<VolumeStats>,
}

impl Volume {
    /// Opens or creates it; one that does not open is quarantined from the start.
    pub(super) fn new(settings: VolumeSettings) -> Self {
        let stats = Arc::new(VolumeStats::default());
        match storage::trim(&settings.path, settings.cache_bytes, settings.disk.as_ref(), TRIM_LOG_BYTES) {
            Ok(None) => {}
            Ok(Some(rebuilt)) => tracing::info!(volume = settings.name, %rebuilt, "log had outgrown its rows: copied"),
            Err(error) => {
                tracing::warn!(volume = settings.name, %error, "volume not copied, although its log is large");
            }
        }
        let opened = open_db(&settings, &stats);
        let opened = opened.map_err(|error| Failure { error, cache_suspect: false });
        Self { settings, current: RwLock::new(opened), opened: watch::Sender::new(1), stats }
    }

    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    pub(super) fn path(&self) -> &Path {
        &self.settings.path
    }

    pub(super) fn stats(&self) -> &Arc<VolumeStats> {
        &self.stats
    }

    fn current(&self) -> Result<Arc<OpenDb>, Failure> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let db = current.as_ref().map_err(Clone::clone)?;
        match db.failure() {
            None => Ok(db.clone()),
            Some(failure) => Err(failure.clone()),
        }
    }

    /// The Db, if its disk works.
    pub(super) fn db(&self) -> Result<Arc<OpenDb>, StoreError> {
        self.current().map_err(|failure| failure.error)
    }

    /// Why it is quarantined, if it is.
    pub(super) fn failure(&self) -> Option<Failure> {
        self.current().err()
    }

    /// Changes with every opening.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.opened.subscribe()
    }

    /// Writes and waits until it is on disk. Blocks: for opening and for commands, not for the runtime.
    pub(super) fn write_now(&self, ops: Vec<RawOp>) -> Result<(), StoreError> {
        let (answer, outcome) = std::sync::mpsc::channel();
        let done = Answer::to(move |outcome| drop(answer.send(outcome)));
        self.db()?.submit(Request { ops, checks: Vec::new(), bytes: 0, durable: true, done });
        outcome.recv().unwrap_or(Err(StoreError::Closed))
    }

    /// Opens a quarantined volume again from what is on disk. Blocks.
    ///
    /// # Errors
    /// When there is still no room, or it does not open; it stays as it was then. One that was set aside never does.
    pub(super) fn reopen(&self) -> Result<(), StoreError> {
        let Some(failure) = self.failure() else { return Ok(()) };
        if matches!(failure.error, StoreError::Damaged(_)) {
            return Err(failure.error);
        }
        let (settings, disk) = (&self.settings, &self.settings.disk);
        let refused = |error| super::disk::refused(&error);
        {
            let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
            if current.as_ref().is_ok_and(|db| !db.committer.has_ended()) {
                // sled's own threads let go a little later.
                return Err(StoreError::Busy);
            }
        }
        disk.probe(&settings.path).map_err(refused)?;
        if failure.cache_suspect {
            disk.rewrite(&settings.path).map_err(refused)?;
        }
        let opened = open_db(settings, &self.stats);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        match opened {
            Ok(db) => *current = Ok(db),
            Err(StoreError::Busy) => return Err(StoreError::Busy),
            Err(error) => {
                let cache_suspect = failure.cache_suspect || error != StoreError::DiskFull;
                *current = Err(Failure { error: error.clone(), cache_suspect });
                return Err(error);
            }
        }
        drop(current);
        self.stats.reopened.fetch_add(1, Ordering::Relaxed);
        self.opened.send_modify(|count| *count += 1);
        Ok(())
    }

    pub(super) fn close(&self) {
        if let Ok(db) = self.current.read().unwrap_or_else(PoisonError::into_inner).as_ref() {
            db.committer.close();
        }
    }
}

fn open_db(settings: &VolumeSettings, stats: &VolumeStats) -> Result<Arc<OpenDb>, StoreError> {
    let VolumeSettings { name, path, cache_bytes, disk } = settings;
    let (db, tree, log) = open::open(path, *cache_bytes, disk.as_ref())?;
    let committer = Committer::start(name, db, tree, log, stats.committer.clone())
        .map_err(|error| StoreError::Failed(format!("start committer: {error}")))?;
    let shared = committer.shared().clone();
    Ok(Arc::new(OpenDb { committer, shared }))
}
