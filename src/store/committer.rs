//! The one writer of a Db: an OS thread that merges what waits into one batch, flushes, syncs and answers.
//! sled's own flush does not survive a power cut and its async flush deadlocks; `fdatasync` after each group
//! is what makes an answer mean "on disk". Each group wakes all of sled's threads, so a busy Db writes few large ones
//! (`linger`).

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Instant;

use super::disk::{Log, refused, sled_refused};
use super::error::StoreError;
use super::linger::Linger;
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
type Completion = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Whom to answer. One that is dropped unanswered, with a queue that died, answers why that died.
pub(super) struct Answer {
    done: Option<Completion>,
    /// The Db in whose queue it is.
    queued_for: Option<Arc<Shared>>,
}

impl Answer {
    pub(super) fn to(done: impl FnOnce(Result<(), StoreError>) + Send + 'static) -> Self {
        Self { done: Some(Box::new(done)), queued_for: None }
    }

    fn give(mut self, outcome: Result<(), StoreError>) {
        if let Some(done) = self.done.take() {
            done(outcome);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            let failure = self.queued_for.as_ref().and_then(|db| db.failure());
            done(Err(failure.map_or(StoreError::Closed, |failure| failure.error.clone())));
        }
    }
}

pub(super) struct Request {
    pub(super) ops: Vec<RawOp>,
    pub(super) checks: Vec<RawCheck>,
    pub(super) bytes: usize,
    pub(super) durable: bool,
    pub(super) done: Answer,
}

/// What a group has so far; `None` for what it removes.
type Overlay = HashMap<Vec<u8>, Option<Vec<u8>>>;

enum Job {
    /// Boxed: a queue has its room from the start.
    Commit(Box<Request>),
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

/// How a Db came to be given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) error: StoreError,
    /// A sync failed, or worse: what the page cache says need not be on the disk.
    pub(super) cache_suspect: bool,
}

/// An open Db as readers and the committer share it. Once it failed nobody reads or writes it any more.
pub(super) struct Shared {
    tree: RwLock<Option<sled::Tree>>,
    failure: OnceLock<Failure>,
}

impl Shared {
    pub(super) fn failure(&self) -> Option<&Failure> {
        self.failure.get()
    }

    /// Reads, unless the Db failed or was closed.
    pub(super) fn read<T>(&self, read: impl FnOnce(&sled::Tree) -> sled::Result<T>) -> Result<T, StoreError> {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        match (&*tree, self.failure()) {
            (Some(tree), None) => read(tree).map_err(|error| sled_refused(&error)),
            (_, Some(failure)) => Err(failure.error.clone()),
            (None, None) => Err(StoreError::Closed),
        }
    }

    fn let_go(&self) {
        *self.tree.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The committer of one Db. Dropping it closes the thread after what was queued.
pub(super) struct Committer {
    jobs: SyncSender<Job>,
    shared: Arc<Shared>,
    stats: Arc<CommitterStats>,
    thread: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Committer {
    pub(super) fn start(
        name: &str,
        db: sled::Db,
        tree: sled::Tree,
        log: Box<dyn Log>,
        stats: Arc<CommitterStats>,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = sync_channel(QUEUE_UNITS_MAX);
        let shared = Arc::new(Shared { tree: RwLock::new(Some(tree.clone())), failure: OnceLock::new() });
        let fences = HashMap::new();
        let mut worker = Worker { db, tree, log, queue, fences, shared: shared.clone(), stats: stats.clone() };
        let thread = std::thread::Builder::new().name(format!("commit-{name}")).spawn(move || worker.run())?;
        Ok(Self { jobs, shared, stats, thread: std::sync::Mutex::new(Some(thread)) })
    }

    /// Queues a unit; `done` is called once it is on disk, or not. When this fails `done` was called with the error.
    pub(super) fn submit(&self, mut request: Request) {
        if let Some(failure) = self.shared.failure() {
            return request.done.give(Err(failure.error.clone()));
        }
        request.done.queued_for = Some(self.shared.clone());
        self.stats.queued.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.jobs.try_send(Job::Commit(Box::new(request))) {
            self.stats.queued.fetch_sub(1, Ordering::Relaxed);
            match error {
                TrySendError::Full(Job::Commit(request)) => request.done.give(Err(StoreError::Busy)),
                // Dropped with the job, it says why nobody takes it.
                TrySendError::Full(Job::Close) | TrySendError::Disconnected(_) => {}
            }
        }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether a failed Db is really closed: sled's own threads may still hold on to it.
    pub(super) fn has_ended(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Writes what is queued and ends the thread.
    pub(super) fn close(&self) {
        let thread = self.thread.lock().ok().and_then(|mut slot| slot.take());
        if let Some(thread) = thread {
            // The thread drains the queue in order, so this blocks only as long as the disk does.
            let _ = self.jobs.send(Job::Close);
            // One that failed ends by itself, if sled lets it: it has nothing to write and nobody waits for it. And the
            // last handle may be dropped by an answer, on the thread itself.
            let own = thread.thread().id() == std::thread::current().id();
            if self.shared.failure().is_none() && !own {
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.close();
    }
}

struct Worker {
    db: sled::Db,
    tree: sled::Tree,
    log: Box<dyn Log>,
    queue: Receiver<Job>,
    /// The newest values of the records that units ask for by value: an epoch for each number, asked for by all of its
    /// units. Nobody else writes here, so they need not be read again.
    fences: HashMap<Vec<u8>, Vec<u8>>,
    shared: Arc<Shared>,
    stats: Arc<CommitterStats>,
}

/// Units that are written together.
struct Group {
    units: Vec<Request>,
    bytes: usize,
}

impl Group {
    fn of(first: Request) -> Self {
        Self { bytes: first.bytes, units: vec![first] }
    }

    fn has_room(&self) -> bool {
        self.units.len() < GROUP_UNITS_MAX && self.bytes < GROUP_BYTES_MAX
    }

    /// Takes what waits, as long as there is room; whether the queue goes on.
    fn take_from(&mut self, queue: &Receiver<Job>) -> bool {
        while self.has_room() {
            match queue.try_recv() {
                Ok(Job::Commit(request)) => {
                    self.bytes += request.bytes;
                    self.units.push(*request);
                }
                Ok(Job::Close) => return false,
                Err(_) => break,
            }
        }
        true
    }
}

impl Worker {
    fn run(&mut self) {
        let (mut linger, mut begun) = (Linger::default(), None::<Instant>);
        let mut open = true;
        while open && self.shared.failure().is_none() {
            let Ok(Job::Commit(first)) = self.queue.recv() else {
                break;
            };
            let mut group = Group::of(*first);
            open = group.take_from(&self.queue);
            if open
                && group.has_room()
                && let Some(wait) = begun.and_then(|begun| linger.wait(begun.elapsed()))
            {
                let before = group.units.len();
                std::thread::sleep(wait);
                open = group.take_from(&self.queue);
                linger.waited(group.units.len() - before);
            }
            begun = Some(Instant::now());
            self.commit(group.units);
        }
        if self.shared.failure().is_none() {
            let _ = self.sync();
        }
        self.stats.queued.store(0, Ordering::Relaxed);
        self.shared.let_go();
    }

    fn commit(&mut self, group: Vec<Request>) {
        self.stats.queued.fetch_sub(group.len() as u64, Ordering::Relaxed);
        let mut overlay = Overlay::new();
        let mut answers = Vec::with_capacity(group.len());
        let mut durable = false;
        for request in group {
            let staged = self.stage(request.checks, request.ops, &mut overlay);
            durable |= request.durable && staged.is_ok();
            answers.push((request.done, staged));
        }
        // sled panics where it does not expect the disk's answer.
        let written = catch_unwind(AssertUnwindSafe(|| self.write(overlay, durable)));
        let written = written.unwrap_or_else(|_| Err(suspect("panic while writing".to_owned())));
        let written = written.map_err(|failure| {
            // A failed sync is never tried again: the kernel may have dropped the pages it could not write.
            let _ = self.shared.failure.set(failure.clone());
            failure.error
        });
        self.stats.groups.fetch_add(1, Ordering::Relaxed);
        let units = answers.iter().filter(|(_, staged)| staged.is_ok()).count();
        self.stats.units.fetch_add(units as u64, Ordering::Relaxed);
        // Refusals as well only now: answers keep the order of the units, and the record that one was refused for may
        // be of this very group.
        for (done, staged) in answers {
            done.give(written.clone().and(staged));
        }
    }

    fn current(&self, key: &[u8], overlay: &Overlay) -> Result<Option<Vec<u8>>, StoreError> {
        if let Some(staged) = overlay.get(key) {
            return Ok(staged.clone());
        }
        let stored = self.tree.get(key).map_err(|error| sled_refused(&error))?;
        Ok(stored.map(|value| value.to_vec()))
    }

    /// Whether a record has this value.
    fn stands(&mut self, key: Vec<u8>, expected: &[u8], overlay: &Overlay) -> Result<bool, StoreError> {
        if let Some(value) = self.fences.get(&key) {
            return Ok(value == expected);
        }
        let current = self.current(&key, overlay)?;
        let stands = current.as_deref() == Some(expected);
        if let Some(value) = current {
            self.fences.insert(key, value);
        }
        Ok(stands)
    }

    /// Adds one unit to the group if its checks hold against what the group has so far.
    fn stage(&mut self, checks: Vec<RawCheck>, ops: Vec<RawOp>, overlay: &mut Overlay) -> Result<(), StoreError> {
        for check in checks {
            match check {
                RawCheck::Absent(key) if self.current(&key, overlay)?.is_some() => return Err(StoreError::Conflict),
                RawCheck::Present(key) if self.current(&key, overlay)?.is_none() => return Err(StoreError::Conflict),
                RawCheck::Equals(key, expected, otherwise) => {
                    if !self.stands(key, &expected, overlay)? {
                        return Err(otherwise);
                    }
                }
                RawCheck::Absent(_) | RawCheck::Present(_) => {}
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
        for (key, value) in &staged {
            match (self.fences.get_mut(key), value) {
                (None, _) => {}
                (Some(known), Some(value)) => known.clone_from(value),
                (Some(_), None) => drop(self.fences.remove(key)),
            }
        }
        overlay.extend(staged);
        Ok(())
    }

    fn write(&mut self, overlay: Overlay, durable: bool) -> Result<(), Failure> {
        let plain = |error| Failure { error, cache_suspect: false };
        self.log.before_write().map_err(|error| plain(refused(&error)))?;
        if !overlay.is_empty() {
            let mut batch = sled::Batch::default();
            for (key, value) in overlay {
                match value {
                    Some(value) => batch.insert(key, value),
                    None => batch.remove(key),
                }
            }
            failpoint::reach(Failpoint::GroupBeforeApply);
            self.tree.apply_batch(batch).map_err(|error| plain(sled_refused(&error)))?;
            failpoint::reach(Failpoint::GroupAfterApply);
        }
        if durable { self.sync() } else { Ok(()) }
    }

    fn sync(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        // sled's flush syncs nothing, so its failure says nothing about what was synced before.
        let flushed = self.db.flush().map_err(|error| sled_refused(&error));
        flushed.map_err(|error| Failure { error, cache_suspect: false })?;
        failpoint::reach(Failpoint::GroupAfterFlush);
        let synced = self.log.sync().map_err(|error| refused(&error));
        synced.map_err(|error| Failure { error, cache_suspect: true })?;
        failpoint::reach(Failpoint::GroupAfterSync);
        let micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.stats.sync_micros.fetch_add(micros, Ordering::Relaxed);
        Ok(())
    }
}

fn suspect(what: String) -> Failure {
    Failure { error: StoreError::Failed(what), cache_suspect: true }
}
