//! The one writer of a Db: an OS thread that merges what waits into one batch, flushes, syncs and answers.
//! sled's own flush does not survive a power cut and its async flush deadlocks; `fdatasync` after each group
//! is what makes an answer mean "on disk".

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use super::error::StoreError;
use crate::telemetry::failpoint::{self, Failpoint};

/// Units waiting for the disk before callers are told `Busy`.
const QUEUE_UNITS_MAX: usize = 16 * 1024;
/// Units merged into one batch; sled holds a process-wide lock while it writes one.
const GROUP_UNITS_MAX: usize = 64;
/// Bytes merged into one batch.
const GROUP_BYTES_MAX: usize = 256 * 1024;

/// What the committer does with one record, by full key.
pub(super) enum RawOp {
    Put(Vec<u8>, Vec<u8>),
    Delete(Vec<u8>),
    /// Deletes the record and, where it was cut, its pieces.
    DeletePieces(Vec<u8>, PieceKeys),
}

/// Gives the keys of a cut value's pieces from its stored head.
pub(super) type PieceKeys = Box<dyn FnOnce(&[u8]) -> Vec<Vec<u8>> + Send>;

/// A precondition by full key.
pub(super) enum RawCheck {
    Absent(Vec<u8>),
    Present(Vec<u8>),
    Equals(Vec<u8>, Vec<u8>, StoreError),
}

/// Called on the committer thread: hand the result on, never work here.
pub(super) type Completion = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

pub(super) struct Request {
    pub(super) ops: Vec<RawOp>,
    pub(super) checks: Vec<RawCheck>,
    pub(super) bytes: usize,
    pub(super) durable: bool,
    pub(super) done: Completion,
}

enum Job {
    Commit(Request),
    Close,
}

/// Figures of one committer, for `/metrics`.
#[derive(Debug, Default)]
pub struct CommitterStats {
    /// Units waiting.
    pub queued: AtomicU64,
    /// Groups written.
    pub groups: AtomicU64,
    /// Units written.
    pub units: AtomicU64,
    /// Time spent in flush and fdatasync, in microseconds.
    pub sync_micros: AtomicU64,
}

/// The committer of one Db. Dropping it closes the thread after what was queued.
pub(super) struct Committer {
    jobs: SyncSender<Job>,
    failed: Arc<AtomicBool>,
    pub(super) stats: Arc<CommitterStats>,
    thread: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Committer {
    pub(super) fn start(name: &str, db: sled::Db, tree: sled::Tree, log: File) -> std::io::Result<Self> {
        let (jobs, queue) = sync_channel(QUEUE_UNITS_MAX);
        let failed = Arc::new(AtomicBool::new(false));
        let stats = Arc::new(CommitterStats::default());
        let mut worker = Worker { db, tree, log, queue, failed: failed.clone(), stats: stats.clone() };
        let thread = std::thread::Builder::new().name(format!("commit-{name}")).spawn(move || worker.run())?;
        Ok(Self { jobs, failed, stats, thread: std::sync::Mutex::new(Some(thread)) })
    }

    /// Queues a unit; `done` is called once it is on disk, or not. When this fails `done` was called with the error.
    pub(super) fn submit(&self, request: Request) {
        if self.failed.load(Ordering::Acquire) {
            (request.done)(Err(quarantined()));
            return;
        }
        self.stats.queued.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.jobs.try_send(Job::Commit(request)) {
            self.stats.queued.fetch_sub(1, Ordering::Relaxed);
            let (job, reason) = match error {
                TrySendError::Full(job) => (job, StoreError::Busy),
                TrySendError::Disconnected(job) => (job, StoreError::Closed),
            };
            if let Job::Commit(request) = job {
                (request.done)(Err(reason));
            }
        }
    }

    pub(super) fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Writes what is queued and ends the thread.
    pub(super) fn close(&self) {
        let thread = self.thread.lock().ok().and_then(|mut slot| slot.take());
        if let Some(thread) = thread {
            // The thread drains the queue in order, so this blocks only as long as the disk does.
            let _ = self.jobs.send(Job::Close);
            let _ = thread.join();
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.close();
    }
}

fn quarantined() -> StoreError {
    StoreError::Failed("an earlier write failed".to_owned())
}

struct Worker {
    db: sled::Db,
    tree: sled::Tree,
    log: File,
    queue: Receiver<Job>,
    failed: Arc<AtomicBool>,
    stats: Arc<CommitterStats>,
}

impl Worker {
    fn run(&mut self) {
        loop {
            let Ok(Job::Commit(first)) = self.queue.recv() else {
                break;
            };
            let mut bytes = first.bytes;
            let mut group = vec![first];
            let mut closing = false;
            while group.len() < GROUP_UNITS_MAX && bytes < GROUP_BYTES_MAX {
                match self.queue.try_recv() {
                    Ok(Job::Commit(request)) => {
                        bytes += request.bytes;
                        group.push(request);
                    }
                    Ok(Job::Close) => {
                        closing = true;
                        break;
                    }
                    Err(_) => break,
                }
            }
            self.commit(group);
            if closing {
                break;
            }
        }
        if !self.failed.load(Ordering::Acquire) {
            let _ = self.sync();
        }
    }

    fn commit(&mut self, group: Vec<Request>) {
        self.stats.queued.fetch_sub(group.len() as u64, Ordering::Relaxed);
        if self.failed.load(Ordering::Acquire) {
            for request in group {
                (request.done)(Err(quarantined()));
            }
            return;
        }
        let mut overlay: HashMap<Vec<u8>, Option<Vec<u8>>> = HashMap::new();
        let mut answers = Vec::with_capacity(group.len());
        let mut durable = false;
        for request in group {
            let staged = self.stage(request.checks, request.ops, &mut overlay);
            durable |= request.durable && staged.is_ok();
            answers.push((request.done, staged));
        }
        let written = self.write(overlay, durable);
        if let Err(error) = &written {
            // A failed sync is never tried again: the kernel may have dropped the pages it could not write.
            self.failed.store(true, Ordering::Release);
            tracing::error!(%error, "volume quarantined after a failed write");
        }
        self.stats.groups.fetch_add(1, Ordering::Relaxed);
        let units = answers.iter().filter(|(_, staged)| staged.is_ok()).count();
        self.stats.units.fetch_add(units as u64, Ordering::Relaxed);
        // Refusals as well only now: answers keep the order of the units, and the record that one was refused for may
        // be of this very group.
        for (done, staged) in answers {
            done(written.clone().and(staged));
        }
    }

    fn current(&self, key: &[u8], overlay: &HashMap<Vec<u8>, Option<Vec<u8>>>) -> Result<Option<Vec<u8>>, StoreError> {
        if let Some(staged) = overlay.get(key) {
            return Ok(staged.clone());
        }
        let stored = self.tree.get(key).map_err(|error| StoreError::Failed(error.to_string()))?;
        Ok(stored.map(|value| value.to_vec()))
    }

    /// Adds one unit to the group if its checks hold against what the group has so far.
    fn stage(
        &self,
        checks: Vec<RawCheck>,
        ops: Vec<RawOp>,
        overlay: &mut HashMap<Vec<u8>, Option<Vec<u8>>>,
    ) -> Result<(), StoreError> {
        for check in checks {
            match check {
                RawCheck::Absent(key) if self.current(&key, overlay)?.is_some() => return Err(StoreError::Conflict),
                RawCheck::Present(key) if self.current(&key, overlay)?.is_none() => return Err(StoreError::Conflict),
                RawCheck::Equals(key, expected, otherwise)
                    if self.current(&key, overlay)?.as_ref() != Some(&expected) =>
                {
                    return Err(otherwise);
                }
                RawCheck::Absent(_) | RawCheck::Present(_) | RawCheck::Equals(..) => {}
            }
        }
        // Looked up before anything is staged, so that a failed read leaves nothing of the unit behind.
        let mut staged = Vec::with_capacity(ops.len());
        for op in ops {
            match op {
                RawOp::Put(key, value) => staged.push((key, Some(value))),
                RawOp::Delete(key) => staged.push((key, None)),
                RawOp::DeletePieces(key, pieces) => {
                    if let Some(head) = self.current(&key, overlay)? {
                        staged.extend(pieces(&head).into_iter().map(|piece| (piece, None)));
                    }
                }
            }
        }
        overlay.extend(staged);
        Ok(())
    }

    fn write(&self, overlay: HashMap<Vec<u8>, Option<Vec<u8>>>, durable: bool) -> Result<(), StoreError> {
        if !overlay.is_empty() {
            let mut batch = sled::Batch::default();
            for (key, value) in overlay {
                match value {
                    Some(value) => batch.insert(key, value),
                    None => batch.remove(key),
                }
            }
            failpoint::reach(Failpoint::GroupBeforeApply);
            self.tree.apply_batch(batch).map_err(|error| StoreError::Failed(error.to_string()))?;
            failpoint::reach(Failpoint::GroupAfterApply);
        }
        if durable { self.sync() } else { Ok(()) }
    }

    fn sync(&self) -> Result<(), StoreError> {
        let begun = std::time::Instant::now();
        self.db.flush().map_err(|error| StoreError::Failed(error.to_string()))?;
        failpoint::reach(Failpoint::GroupAfterFlush);
        self.log.sync_data().map_err(|error| StoreError::Failed(error.to_string()))?;
        failpoint::reach(Failpoint::GroupAfterSync);
        let micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.stats.sync_micros.fetch_add(micros, Ordering::Relaxed);
        Ok(())
    }
}
