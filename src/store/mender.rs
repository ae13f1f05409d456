//! Looks after the disk: how much room is left, and which quarantined volume may be opened again. One thread; everything
//! it does may block.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::disk::{Disk, Space};
use super::error::StoreError;
use super::volume::Volume;
use crate::telemetry::clock::Clock;

/// How often it looks.
const EVERY: Duration = Duration::from_millis(500);
/// Between two tries to open a volume whose disk was full, at most.
const FULL_PAUSE_MAX: Duration = Duration::from_secs(8);
/// First wait before a volume is opened again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Two failures of a disk that is not full within this time: it is not trusted for a while.
const DISTRUST_WINDOW: Duration = Duration::from_mins(1);
/// First such while; it doubles.
const DISTRUST: Duration = Duration::from_mins(5);
const DISTRUST_MAX: Duration = Duration::from_hours(1);

/// Room on the file system of the data directory.
#[derive(Debug, Default)]
pub struct Room {
    free: AtomicU64,
    total: AtomicU64,
    low: AtomicBool,
}

impl Room {
    /// Whether there is enough to accept what can wait elsewhere. While there is not, new sends are refused, so that
    /// what is under way can be finished.
    #[must_use]
    pub fn is_enough(&self) -> bool {
        !self.low.load(Ordering::Relaxed)
    }

    /// The last figures.
    #[must_use]
    pub fn space(&self) -> Space {
        Space { free: self.free.load(Ordering::Relaxed), total: self.total.load(Ordering::Relaxed) }
    }

    fn set(&self, space: Space, low_water: u64) {
        self.free.store(space.free, Ordering::Relaxed);
        self.total.store(space.total, Ordering::Relaxed);
        let low = space.free < low_water;
        if self.low.swap(low, Ordering::Relaxed) != low {
            let (free_mib, mark_mib) = (space.free >> 20, low_water >> 20);
            if low {
                tracing::error!(free_mib, mark_mib, "disk nearly full: new sends are refused");
            } else {
                tracing::info!(free_mib, mark_mib, "room on the disk again: sends are accepted");
            }
        }
    }
}

/// What it looks after.
pub(super) struct Patients {
    pub(super) dir: PathBuf,
    pub(super) volumes: Vec<Arc<Volume>>,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) room: Arc<Room>,
    /// Free bytes below which new sends are refused.
    pub(super) low_water: u64,
}

/// Owns the thread; ends it when dropped.
pub(super) struct Mender {
    stop: Sender<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Mender {
    pub(super) fn start(patients: Patients) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let mut charts: Vec<Chart> = patients.volumes.iter().map(|_| Chart::default()).collect();
        patients.look_at_room();
        let thread = std::thread::Builder::new().name("store-mender".to_owned()).spawn(move || {
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                patients.look_at_room();
                for (volume, chart) in patients.volumes.iter().zip(&mut charts) {
                    chart.look_at(volume, patients.clock.monotonic());
                }
            }
        })?;
        Ok(Self { stop, thread: Mutex::new(Some(thread)) })
    }

    pub(super) fn stop(&self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.lock().ok().and_then(|mut slot| slot.take()) {
            let _ = thread.join();
        }
    }
}

impl Drop for Mender {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Patients {
    fn look_at_room(&self) {
        match self.disk.space(&self.dir) {
            Ok(space) => self.room.set(space, self.low_water),
            Err(error) => tracing::warn!(%error, "cannot ask how much room the disk has"),
        }
    }
}

/// What is known of one volume's failures.
#[derive(Debug, Default)]
struct Chart {
    /// When it may be opened again; `None` while it works.
    next_try: Option<Duration>,
    pause: Duration,
    last_failure: Option<Duration>,
    distrust: Duration,
}

impl Chart {
    fn look_at(&mut self, volume: &Volume, now: Duration) {
        let Some(failure) = volume.failure() else { return };
        let Some(next_try) = self.next_try else {
            volume.stats().failures.fetch_add(1, Ordering::Relaxed);
            let pause = self.failed(&failure.error, now);
            tracing::error!(
                volume = volume.name(),
                error = %failure.error,
                again_in_seconds = pause.as_secs(),
                "volume quarantined: its numbers are not served until it is open again"
            );
            return;
        };
        // One that was set aside waits for an operator.
        if now < next_try || matches!(failure.error, StoreError::Damaged(_)) {
            return;
        }
        match volume.reopen() {
            Ok(()) => {
                tracing::info!(volume = volume.name(), "volume open again");
                self.next_try = None;
            }
            Err(error) => {
                let most = match error {
                    StoreError::DiskFull | StoreError::Busy => FULL_PAUSE_MAX,
                    _ => DISTRUST,
                };
                self.pause = (self.pause * 2).min(most);
                self.next_try = Some(now + self.pause);
                tracing::warn!(volume = volume.name(), %error, "volume does not open yet");
            }
        }
    }

    /// Notes a failure and gives the wait before the volume is opened again. A full disk is nothing to distrust.
    fn failed(&mut self, error: &StoreError, now: Duration) -> Duration {
        self.pause = FIRST_PAUSE;
        if *error != StoreError::DiskFull {
            match self.last_failure {
                Some(last) if now.saturating_sub(last) <= DISTRUST_WINDOW.max(self.distrust * 2) => {
                    self.distrust = (self.distrust * 2).clamp(DISTRUST, DISTRUST_MAX);
                    self.pause = self.distrust;
                }
                _ => self.distrust = Duration::ZERO,
            }
            self.last_failure = Some(now);
        }
        self.next_try = Some(now + self.pause);
        self.pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_fails_twice_within_a_minute_is_not_trusted_and_a_full_one_is() {
        let mut chart = Chart::default();
        let broken = StoreError::Failed("EIO".to_owned());
        let at = Duration::from_secs;
        assert_eq!(chart.failed(&broken, at(10)), FIRST_PAUSE);
        assert_eq!(chart.failed(&broken, at(40)), DISTRUST, "second within a minute");
        assert_eq!(chart.failed(&broken, at(400)), DISTRUST * 2, "at once after its rest");
        assert_eq!(chart.failed(&StoreError::DiskFull, at(410)), FIRST_PAUSE);
        assert_eq!(
            chart.failed(&StoreError::DiskFull, at(412)),
            FIRST_PAUSE,
            "there is nothing wrong with a full disk"
        );
        assert_eq!(chart.failed(&broken, at(90_000)), FIRST_PAUSE, "long ago");
    }
}
