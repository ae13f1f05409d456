//! The data directory: lock, `meta/` and `volume-00..03/`. Opens what can be opened; a damaged volume costs only
//! the numbers that live in it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::committer::{CommitterStats, RawOp, Request};
use super::error::StoreError;
use super::key::{Tag, full_key};
use super::meta::Meta;
use super::number_store::NumberStore;
use super::volume::Volume;
use crate::domain::id::{Epoch, NumberId};

/// Volumes of a new data directory. A number's volume is a stored fact, so more can be added later.
pub const VOLUMES: u8 = 4;
/// Page cache of one volume, in bytes.
const VOLUME_CACHE_BYTES: u64 = 64 * 1024 * 1024;
/// Page cache of the meta Db, in bytes.
const META_CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// Records removed per batch when a number is erased.
const ERASE_ROWS: usize = 500;

/// The data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds it.
    #[error("data directory {0} is in use by another process")]
    InUse(PathBuf),
    /// Reading or writing it failed.
    #[error("data directory {path}: {error}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The control plane's own Db does not open.
    #[error("meta store: {0}")]
    Meta(StoreError),
}

/// Everything on disk.
pub struct Store {
    meta: Arc<Meta>,
    volumes: Vec<Result<Arc<Volume>, StoreError>>,
    _lock: File,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("volumes", &self.volumes.len()).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens or creates the data directory. `new_secret` is used only when it is created.
    /// Blocks on the disk: call it before the runtime serves anybody.
    ///
    /// # Errors
    /// When another process holds the directory or its meta Db does not open. A volume that does not open is
    /// reported by [`Self::claim`] for the numbers in it.
    pub fn open(dir: &Path, new_secret: [u8; 32]) -> Result<Self, OpenError> {
        let io = |error| OpenError::Io { path: dir.to_owned(), error };
        fs::create_dir_all(dir).map_err(io)?;
        let lock = File::options().create(true).truncate(false).write(true).open(dir.join("lock")).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(OpenError::InUse(dir.to_owned())),
            Err(fs::TryLockError::Error(error)) => return Err(io(error)),
        }
        let meta = Meta::open(&dir.join("meta"), META_CACHE_BYTES, new_secret).map_err(OpenError::Meta)?;
        let mut volumes = Vec::with_capacity(usize::from(VOLUMES));
        for index in 0..VOLUMES {
            let name = format!("volume-{index:02}");
            let opened = Volume::open(&name, &dir.join(&name), VOLUME_CACHE_BYTES);
            if let Err(error) = &opened {
                tracing::error!(volume = index, %error, "volume quarantined: its numbers are not served");
            }
            volumes.push(opened.map(Arc::new));
        }
        Ok(Self { meta: Arc::new(meta), volumes, _lock: lock })
    }

    /// What the daemon as a whole knows.
    #[must_use]
    pub fn meta(&self) -> &Arc<Meta> {
        &self.meta
    }

    fn volume(&self, index: u8) -> Result<&Arc<Volume>, StoreError> {
        match self.volumes.get(usize::from(index)) {
            Some(Ok(volume)) => Ok(volume),
            Some(Err(error)) => Err(error.clone()),
            None => Err(StoreError::Corrupt(format!("no volume {index}"))),
        }
    }

    /// Takes over a number: the next epoch is durable before this returns, and every older handle is fenced.
    ///
    /// # Errors
    /// When the number's volume failed.
    pub async fn claim(&self, number: NumberId, volume: u8) -> Result<NumberStore, StoreError> {
        let volume = self.volume(volume)?.clone();
        let key = full_key(number, Tag::Epoch, &[]);
        let previous = match volume.get(&key)?.as_deref() {
            None => 0,
            Some(bytes) => {
                bytes.try_into().map(u64::from_be_bytes).map_err(|_| StoreError::Corrupt("epoch".to_owned()))?
            }
        };
        let epoch = Epoch(previous + 1);
        let (answer, done) = tokio::sync::oneshot::channel();
        volume.submit(Request {
            bytes: 32,
            ops: vec![RawOp::Put(key, epoch.0.to_be_bytes().to_vec())],
            checks: Vec::new(),
            durable: true,
            done: Box::new(move |outcome| {
                let _ = answer.send(outcome);
            }),
        });
        done.await.unwrap_or(Err(StoreError::Closed))?;
        Ok(NumberStore::open(number, epoch, self.meta.secret(), volume))
    }

    /// Removes every record of a number, in paced batches. The epoch goes last, so a crash in between leaves
    /// a number whose erasure is repeated, never a half one that runs.
    ///
    /// # Errors
    /// When the number's volume failed.
    pub async fn erase(&self, number: NumberId, volume: u8) -> Result<(), StoreError> {
        let volume = self.volume(volume)?.clone();
        let from = number.0.to_be_bytes().to_vec();
        let to = super::key::after_prefix(&from).unwrap_or_else(|| vec![u8::MAX; 9]);
        loop {
            let rows = volume.scan(&from, &to, true, ERASE_ROWS)?;
            if rows.is_empty() {
                return Ok(());
            }
            let ops = rows.into_iter().map(|(key, _)| RawOp::Delete(key)).collect();
            let (answer, done) = tokio::sync::oneshot::channel();
            let done_box = Box::new(move |outcome| {
                let _ = answer.send(outcome);
            });
            volume.submit(Request { ops, checks: Vec::new(), bytes: 0, durable: true, done: done_box });
            done.await.unwrap_or(Err(StoreError::Closed))?;
        }
    }

    /// The volume a new number should live in: the one with the fewest.
    #[must_use]
    pub fn roomiest_volume(&self) -> u8 {
        let counts = self.meta.numbers_per_volume(VOLUMES);
        let usable = (0..VOLUMES).filter(|index| self.volume(*index).is_ok_and(|volume| !volume.is_failed()));
        usable.min_by_key(|index| counts[usize::from(*index)]).unwrap_or(0)
    }

    /// Committer figures by volume name.
    #[must_use]
    pub fn stats(&self) -> Vec<(String, Arc<CommitterStats>)> {
        let mut all = vec![("meta".to_owned(), self.meta.stats())];
        for (index, volume) in self.volumes.iter().enumerate() {
            if let Ok(volume) = volume {
                all.push((format!("volume-{index:02}"), volume.stats()));
            }
        }
        all
    }

    /// Whether a volume failed or never opened.
    #[must_use]
    pub fn has_failed_volume(&self) -> bool {
        self.volumes.iter().any(|volume| volume.as_ref().map_or(true, |volume| volume.is_failed()))
    }

    /// Writes what is queued, syncs and stops the committers. Blocks on the disk.
    pub fn close(&self) {
        for volume in self.volumes.iter().flatten() {
            volume.close();
        }
        self.meta.close();
    }
}
