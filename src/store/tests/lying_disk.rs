//! A disk that keeps only what was synced. Its shadow is the log as of the last successful sync; a crash leaves the shadow
//! and, of everything written since, whichever sectors chance picks. It also fails, in the ways disks do.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::store::disk::{Disk, LOG_FILE, Log, Space, rewrite_log};
use crate::store::open::BORN_FILE;
use crate::telemetry::rng::Random;

/// What the kernel writes back, and forgets, as one.
const PAGE: usize = 4096;

/// How it behaves; shares are 0 to 1.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Manners {
    /// Syncs that fail: what they should have written counts as written all the same, as it does in the kernel.
    pub(super) syncs_failing: f64,
    /// Groups that find the disk full.
    pub(super) writes_failing: f64,
    /// It says that it synced, and did nothing.
    pub(super) forgets: bool,
}

#[derive(Debug, Default)]
struct Shadow {
    durable: Vec<u8>,
    /// Pages whose sync failed, as they were: no later sync writes them unless they change again.
    given_up: HashMap<usize, Vec<u8>>,
    failures: u64,
}

#[derive(Debug)]
pub(super) struct LyingDisk {
    shadow: Arc<Mutex<Shadow>>,
    manners: Mutex<Manners>,
    chance: Arc<Random>,
}

struct LyingLog {
    disk: Arc<LyingDisk>,
    path: std::path::PathBuf,
}

/// The disk as the volume holds it.
#[derive(Debug, Clone)]
pub(super) struct Shared(pub(super) Arc<LyingDisk>);

impl LyingDisk {
    pub(super) fn new(chance: Arc<Random>) -> Arc<Self> {
        Arc::new(Self { shadow: Arc::default(), manners: Mutex::default(), chance })
    }

    pub(super) fn behave(&self, manners: Manners) {
        *self.manners.lock().unwrap_or_else(PoisonError::into_inner) = manners;
    }

    /// How often it failed.
    pub(super) fn failures(&self) -> u64 {
        self.shadow().failures
    }

    fn manners(&self) -> Manners {
        *self.manners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shadow(&self) -> MutexGuard<'_, Shadow> {
        self.shadow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes to `to` what a power cut would leave of the Db at `from` now.
    pub(super) fn crash(&self, from: &Path, to: &Path) {
        let shadow = self.shadow();
        let written = fs::read(from.join(LOG_FILE)).unwrap();
        let mut image = shadow.durable.clone();
        // The length of a file is metadata: it may have reached the disk before the data.
        if self.chance.share() < 0.5 {
            image.resize(image.len().max(written.len()), 0);
        }
        let sector = if self.chance.share() < 0.5 { 512 } else { PAGE };
        let kept = [0.0, 0.1, 0.5, 0.9, 1.0][(self.chance.word() % 5) as usize];
        for (index, part) in written.chunks(sector).enumerate() {
            let place = index * sector..index * sector + part.len();
            if image.get(place.clone()) != Some(part) && self.chance.share() < kept {
                image.resize(image.len().max(place.end), 0);
                image[place].copy_from_slice(part);
            }
        }
        fs::create_dir_all(to).unwrap();
        fs::write(to.join(LOG_FILE), image).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let name = entry.unwrap().file_name();
            let text = name.to_string_lossy();
            // Written and synced, with their names, before the volume takes its first unit.
            let kept = text == "conf" || text == BORN_FILE || text.starts_with("snap.");
            if kept && !text.ends_with(".generating") {
                fs::copy(from.join(&name), to.join(&name)).unwrap();
            }
        }
        if self.chance.share() < 0.3 {
            let torn = vec![0x5a; (self.chance.word() % 300) as usize];
            fs::write(to.join("snap.0000000000001000.generating"), torn).unwrap();
        }
    }
}

impl Disk for Shared {
    fn log(&self, path: &Path) -> io::Result<Box<dyn Log>> {
        Ok(Box::new(LyingLog { disk: self.0.clone(), path: path.join(LOG_FILE) }))
    }

    fn rewrite(&self, path: &Path) -> io::Result<()> {
        rewrite_log(path)?;
        let mut shadow = self.0.shadow();
        shadow.durable = fs::read(path.join(LOG_FILE))?;
        shadow.given_up.clear();
        Ok(())
    }

    fn probe(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn space(&self, _dir: &Path) -> io::Result<Space> {
        Ok(Space { free: 1 << 40, total: 1 << 41 })
    }
}

impl Log for LyingLog {
    fn before_write(&mut self) -> io::Result<()> {
        if self.disk.chance.share() < self.disk.manners().writes_failing {
            self.disk.shadow().failures += 1;
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let manners = self.disk.manners();
        if manners.forgets {
            return Ok(());
        }
        let fails = self.disk.chance.share() < manners.syncs_failing;
        let mut shadow = self.disk.shadow();
        let written = fs::read(&self.path)?;
        for (page, now) in written.chunks(PAGE).enumerate() {
            let place = page * PAGE..page * PAGE + now.len();
            if shadow.durable.get(place.clone()) == Some(now) {
                continue;
            }
            if fails {
                shadow.given_up.insert(page, now.to_vec());
            } else if shadow.given_up.get(&page).is_none_or(|then| then != now) {
                shadow.given_up.remove(&page);
                let length = shadow.durable.len().max(place.end);
                shadow.durable.resize(length, 0);
                shadow.durable[place].copy_from_slice(now);
            }
        }
        if fails {
            shadow.failures += 1;
            return Err(io::Error::other("injected: the sync failed"));
        }
        Ok(())
    }
}
