//! The data directory: lock, `keys/`, `meta/` and `volume-00..03/`. Opens what can be opened; a damaged volume costs only
//! the numbers that live in it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::committer::{CommitterStats, RawOp, Request};
use super::error::{OpenError, StoreError};
use super::key::{Tag, full_key};
use super::meta::{Erasure, Meta};
use super::number_store::NumberStore;
use super::volume::Volume;
use crate::domain::id::{Epoch, NumberId};
use crate::telemetry::rng::Random;

/// Volumes of a new data directory. A number's volume is a stored fact, so more can be added later.
pub const VOLUMES: u8 = 4;
/// Page cache of one volume, in bytes.
const VOLUME_CACHE_BYTES: u64 = 64 * 1024 * 1024;
/// Page cache of the meta Db, in bytes.
const META_CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// Records removed per batch when a number is erased.
const ERASE_ROWS: usize = 500;

/// Pause between two such batches: an erasure is in nobody's way.
const ERASE_PAUSE: Duration = Duration::from_millis(10);
/// The master key file, unless another one is set, below the data directory.
const MASTER_KEY_FILE: &str = "keys/master.key";

/// What a store is opened with.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// The data directory.
    pub dir: PathBuf,
    /// The master key file.
    pub master_key_file: PathBuf,
    /// For keys and nonces.
    pub random: Arc<Random>,
}

impl StoreSettings {
    /// Everything in one directory.
    #[must_use]
    pub fn at(dir: &Path, random: Arc<Random>) -> Self {
        Self { dir: dir.to_owned(), master_key_file: dir.join(MASTER_KEY_FILE), random }
    }
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

/// Makes the directory if there is none, and holds it against other processes.
fn lock(dir: &Path) -> Result<File, OpenError> {
    let io = |error| OpenError::Io { path: dir.to_owned(), error };
    fs::create_dir_all(dir).map_err(io)?;
    let lock = File::options().create(true).truncate(false).write(true).open(dir.join("lock")).map_err(io)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => Err(OpenError::InUse(dir.to_owned())),
        Err(fs::TryLockError::Error(error)) => Err(io(error)),
    }
}

impl Store {
    /// Opens or creates the data directory; a new one gets its keys, and a master key file if there is none.
    /// Blocks on the disk: call it before the runtime serves anybody.
    ///
    /// # Errors
    /// When another process holds the directory, its master key or format is not ours, or its meta Db does not open.
    /// A volume that does not open is reported by [`Self::claim`] for the numbers in it.
    pub fn open(settings: &StoreSettings) -> Result<Self, OpenError> {
        let dir = settings.dir.as_path();
        let lock = lock(dir)?;
        let meta = Volume::open("meta", &dir.join("meta"), META_CACHE_BYTES)?;
        let meta = Meta::open(meta, &settings.master_key_file, &settings.random)?;
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

    /// Leaves only the newest master key in the file: for a data directory that no daemon holds. Gives how many went.
    ///
    /// # Errors
    /// Also when something is still wrapped under an older one: the daemon has not started since the rotation.
    pub fn drop_older_masters(settings: &StoreSettings) -> Result<usize, OpenError> {
        let _lock = lock(&settings.dir)?;
        let meta = Volume::open("meta", &settings.dir.join("meta"), META_CACHE_BYTES)?;
        Meta::drop_older_masters(&meta, &settings.master_key_file, &settings.random)
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
    /// `Erased` when the number was deleted, else when its volume failed.
    pub async fn claim(&self, number: NumberId, volume: u8) -> Result<NumberStore, StoreError> {
        let volume = self.volume(volume)?.clone();
        let keys = self.meta.keys_for(number)?;
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
        Ok(NumberStore::open(number, epoch, keys, volume))
    }

    /// Removes the records of a deleted number, in paced batches, and then the note that they are to be removed: a
    /// crash in between only means that the next start goes on. The epoch goes first, which fences off whoever still
    /// writes; nothing of it can be read meanwhile, since [`Meta::begin_erasure`] destroyed its key.
    ///
    /// # Errors
    /// When the number's volume, or `meta`, failed.
    pub async fn erase(&self, erasure: Erasure) -> Result<(), StoreError> {
        let volume = self.volume(erasure.volume)?.clone();
        let from = erasure.number.0.to_be_bytes().to_vec();
        let to = super::key::after_prefix(&from).unwrap_or_else(|| vec![u8::MAX; 9]);
        loop {
            let rows = volume.scan(&from, &to, false, ERASE_ROWS)?;
            if rows.is_empty() {
                return self.meta.erased(erasure.number).await;
            }
            let ops = rows.into_iter().map(|(key, _)| RawOp::Delete(key)).collect();
            let (answer, done) = tokio::sync::oneshot::channel();
            let done_box = Box::new(move |outcome| {
                let _ = answer.send(outcome);
            });
            volume.submit(Request { ops, checks: Vec::new(), bytes: 0, durable: true, done: done_box });
            done.await.unwrap_or(Err(StoreError::Closed))?;
            tokio::time::sleep(ERASE_PAUSE).await;
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
