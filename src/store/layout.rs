//! The data directory: lock, `keys/`, `meta/` and `volume-00..03/`. Opens what can be opened; a damaged volume costs only
//! the numbers that live in it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::committer::RawOp;
use super::disk::{Disk, SystemDisk};
use super::error::{OpenError, StoreError};
use super::mender::{Mender, Patients, Room};
use super::meta::{Erasure, Meta};
use super::number_store::NumberStore;
use super::volume::{Volume, VolumeSettings, VolumeStats};
use crate::domain::id::NumberId;
use crate::telemetry::clock::{Clock, SystemClock};
use crate::telemetry::rng::Random;

/// Volumes of a new data directory. A number's volume is a stored fact, so more can be added later.
pub const VOLUMES: u8 = 4;
/// Page cache of one volume, in bytes.
pub(super) const VOLUME_CACHE_BYTES: u64 = 64 * 1024 * 1024;
/// Page cache of the meta Db, in bytes.
pub(super) const META_CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// Records removed per batch when a number is erased.
const ERASE_ROWS: usize = 500;

/// Pause between two such batches: an erasure is in nobody's way.
const ERASE_PAUSE: Duration = Duration::from_millis(10);
/// The master key file, unless another one is set, below the data directory.
const MASTER_KEY_FILE: &str = "keys/master.key";

/// Free bytes below which new sends are refused, unless set.
const LOW_WATER_BYTES: u64 = 512 * 1024 * 1024;

/// What a store is opened with.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// The data directory.
    pub dir: PathBuf,
    /// The master key file.
    pub master_key_file: PathBuf,
    /// Free bytes below which new sends are refused.
    pub low_water_bytes: u64,
    /// For keys and nonces.
    pub random: Arc<Random>,
    /// For pauses.
    pub clock: Arc<dyn Clock>,
    pub(super) disk: Arc<dyn Disk>,
}

impl StoreSettings {
    /// Everything in one directory, on the system's disk and clock.
    #[must_use]
    pub fn at(dir: &Path, random: Arc<Random>) -> Self {
        Self {
            dir: dir.to_owned(),
            master_key_file: dir.join(MASTER_KEY_FILE),
            low_water_bytes: LOW_WATER_BYTES,
            random,
            clock: Arc::new(SystemClock::new()),
            disk: Arc::new(SystemDisk),
        }
    }

    pub(super) fn volume(&self, name: &str, cache_bytes: u64) -> Volume {
        let (path, disk) = (self.dir.join(name), self.disk.clone());
        Volume::new(VolumeSettings { name: name.to_owned(), path, cache_bytes, disk })
    }
}

/// One volume, or `meta`, as an operator sees it.
#[derive(Debug, Clone)]
pub struct VolumeReport {
    /// Its name, which is its directory's.
    pub name: String,
    /// Why it is quarantined, if it is.
    pub failure: Option<StoreError>,
    /// Its figures.
    pub stats: Arc<VolumeStats>,
    /// What its files take, in bytes.
    pub disk_bytes: u64,
}

/// Everything on disk.
pub struct Store {
    meta: Arc<Meta>,
    /// `meta`'s, then the numbers'.
    volumes: Vec<Arc<Volume>>,
    room: Arc<Room>,
    mender: Mender,
    _lock: File,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("volumes", &self.volumes.len()).finish_non_exhaustive()
    }
}

/// Makes the directory if there is none, and holds it against other processes.
pub(super) fn lock(dir: &Path) -> Result<File, OpenError> {
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
        let meta_volume = Arc::new(settings.volume("meta", META_CACHE_BYTES));
        let meta = Meta::open(meta_volume.clone(), &settings.master_key_file, &settings.random)?;
        let mut volumes = vec![meta_volume];
        for index in 0..VOLUMES {
            volumes.push(Arc::new(settings.volume(&format!("volume-{index:02}"), VOLUME_CACHE_BYTES)));
        }
        let room = Arc::new(Room::default());
        let patients = Patients {
            dir: dir.to_owned(),
            volumes: volumes.clone(),
            disk: settings.disk.clone(),
            clock: settings.clock.clone(),
            room: room.clone(),
            low_water: settings.low_water_bytes,
        };
        let mender = Mender::start(patients).map_err(|error| OpenError::Io { path: dir.to_owned(), error })?;
        Ok(Self { meta: Arc::new(meta), volumes, room, mender, _lock: lock })
    }

    /// Leaves only the newest master key in the file: for a data directory that no daemon holds. Gives how many went.
    ///
    /// # Errors
    /// Also when something is still wrapped under an older one: the daemon has not started since the rotation.
    pub fn drop_older_masters(settings: &StoreSettings) -> Result<usize, OpenError> {
        let _lock = lock(&settings.dir)?;
        let meta = settings.volume("meta", META_CACHE_BYTES);
        Meta::drop_older_masters(&meta, &settings.master_key_file, &settings.random)
    }

    /// What the daemon as a whole knows.
    #[must_use]
    pub fn meta(&self) -> &Arc<Meta> {
        &self.meta
    }

    fn volume(&self, index: u8) -> Result<&Arc<Volume>, StoreError> {
        self.volumes.get(usize::from(index) + 1).ok_or_else(|| StoreError::Corrupt(format!("no volume {index}")))
    }

    /// Takes over a number: the next epoch is durable before this returns, and every older handle is fenced.
    ///
    /// # Errors
    /// `Erased` when the number was deleted, else when its volume failed.
    pub async fn claim(&self, number: NumberId, volume: u8) -> Result<NumberStore, StoreError> {
        let db = self.volume(volume)?.db()?;
        NumberStore::claim(number, self.meta.keys_for(number)?, db, self.room.clone()).await
    }

    /// Returns when the volume is open: at once, or as soon as its disk works again.
    pub async fn volume_opened(&self, volume: u8) {
        let Ok(volume) = self.volume(volume) else { return };
        let mut opened = volume.watch();
        while volume.failure().is_some() {
            if opened.changed().await.is_err() {
                return;
            }
        }
    }

    /// Removes the records of a deleted number, in paced batches, and then the note that they are to be removed: a
    /// crash in between only means that the next start goes on. The epoch goes first, which fences off whoever still
    /// writes; nothing of it can be read meanwhile, since [`Meta::begin_erasure`] destroyed its key.
    ///
    /// # Errors
    /// When the number's volume, or `meta`, failed.
    pub async fn erase(&self, erasure: Erasure) -> Result<(), StoreError> {
        let db = self.volume(erasure.volume)?.db()?;
        let from = erasure.number.0.to_be_bytes().to_vec();
        let to = super::key::after_prefix(&from).unwrap_or_else(|| vec![u8::MAX; 9]);
        loop {
            let rows = db.scan(&from, &to, false, ERASE_ROWS)?;
            if rows.is_empty() {
                return self.meta.erased(erasure.number).await;
            }
            db.write(rows.into_iter().map(|(key, _)| RawOp::Delete(key)).collect()).await?;
            tokio::time::sleep(ERASE_PAUSE).await;
        }
    }

    /// The volume a new number should live in: the one with the fewest.
    #[must_use]
    pub fn roomiest_volume(&self) -> u8 {
        let counts = self.meta.numbers_per_volume(VOLUMES);
        let usable = (0..VOLUMES).filter(|index| self.volume(*index).is_ok_and(|volume| volume.failure().is_none()));
        usable.min_by_key(|index| counts[usize::from(*index)]).unwrap_or(0)
    }

    /// Every volume as an operator sees it, `meta` first. Asks the file system for sizes.
    #[must_use]
    pub fn report(&self) -> Vec<VolumeReport> {
        let report = |volume: &Arc<Volume>| VolumeReport {
            name: volume.name().to_owned(),
            failure: volume.failure().map(|failure| failure.error),
            stats: volume.stats().clone(),
            disk_bytes: size_of(volume.path()),
        };
        self.volumes.iter().map(report).collect()
    }

    /// Room on the file system of the data directory.
    #[must_use]
    pub fn room(&self) -> &Room {
        &self.room
    }

    /// Writes what is queued, syncs and stops the committers. Blocks on the disk.
    pub fn close(&self) {
        self.mender.stop();
        // `meta` last: it knows of everything that the others hold.
        for volume in self.volumes.iter().rev() {
            volume.close();
        }
    }
}

/// Bytes the files of a directory take on disk.
pub(super) fn size_of(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().filter_map(|entry| entry.metadata().ok());
    sizes.map(|file| file.blocks() * 512).sum()
}
