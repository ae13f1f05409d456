//! The seam: everything one number has on disk, opened for one epoch. Nothing outside this folder assumes a
//! local disk; a shared database can stand behind the same calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;

use super::chunk;
use super::committer::{Answer, RawCheck, RawOp, Request};
use super::error::StoreError;
use super::key::{Tag, after_prefix, full_key, hashed};
use super::mender::Room;
use super::seal::{Sealer, SecretBytes};
use super::unit::{Check, Durability, Op, Unit};
use super::volume::OpenDb;
use crate::domain::id::{Epoch, NumberId};
use crate::telemetry::rng::Random;

/// Rows one scan may return.
pub const SCAN_ROWS_MAX: usize = 1000;

/// Which way a scan goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Smallest key first.
    Ascending,
    /// Largest key first.
    Descending,
}

/// The store of one number. Clones share the poison: after one failed durable write none of them writes again.
#[derive(Clone)]
pub struct NumberStore {
    inner: Arc<Inner>,
}

struct Inner {
    number: NumberId,
    epoch: Epoch,
    keys: NumberKeys,
    db: Arc<OpenDb>,
    room: Arc<Room>,
    poisoned: AtomicBool,
}

/// What a number's records are sealed and named with.
pub(super) struct NumberKeys {
    pub(super) sealer: Arc<Sealer>,
    pub(super) hash_secret: Arc<SecretBytes>,
    pub(super) random: Arc<Random>,
}

impl std::fmt::Debug for NumberStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NumberStore({:?} {:?})", self.inner.number, self.inner.epoch)
    }
}

impl NumberStore {
    pub(super) fn open(number: NumberId, epoch: Epoch, keys: NumberKeys, db: Arc<OpenDb>, room: Arc<Room>) -> Self {
        Self { inner: Arc::new(Inner { number, epoch, keys, db, room, poisoned: AtomicBool::new(false) }) }
    }

    /// Takes over a number: the next epoch is durable before this returns, and every older handle is fenced.
    pub(super) async fn claim(
        number: NumberId,
        keys: NumberKeys,
        db: Arc<OpenDb>,
        room: Arc<Room>,
    ) -> Result<Self, StoreError> {
        let key = full_key(number, Tag::Epoch, &[]);
        let previous = match db.get(&key)?.as_deref() {
            None => 0,
            Some(bytes) => {
                bytes.try_into().map(u64::from_be_bytes).map_err(|_| StoreError::Corrupt("epoch".to_owned()))?
            }
        };
        let epoch = Epoch(previous + 1);
        db.write(vec![RawOp::Put(key, epoch.0.to_be_bytes().to_vec())]).await?;
        Ok(Self::open(number, epoch, keys, db, room))
    }

    /// Whose store it is.
    #[must_use]
    pub fn number(&self) -> NumberId {
        self.inner.number
    }

    /// The incarnation it was opened for.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.inner.epoch
    }

    /// Whether a durable write failed; the owner must drop everything and open again.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.inner.poisoned.load(Ordering::Acquire) || self.inner.db.failure().is_some()
    }

    /// Why its volume is quarantined, if it is.
    #[must_use]
    pub fn failure(&self) -> Option<StoreError> {
        self.inner.db.failure().map(|failure| failure.error.clone())
    }

    /// Whether the disk has room for new sends.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.inner.room.is_enough()
    }

    /// Refuses every later write, as after a failed one.
    pub fn poison(&self) {
        self.inner.poisoned.store(true, Ordering::Release);
    }

    /// A 16-byte stand-in for a name that must not stand in a key in clear.
    #[must_use]
    pub fn hashed(&self, kind: &str, name: &[u8]) -> [u8; 16] {
        hashed(&self.inner.keys.hash_secret, self.inner.number, kind, name)
    }

    /// One record.
    ///
    /// # Errors
    /// `Failed` or `Corrupt`.
    // Async although sled answers at once: a shared database would not.
    #[expect(clippy::unused_async, reason = "the seam is async for stores that are not local")]
    pub async fn get(&self, tag: Tag, rest: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let db = &self.inner.db;
        let Some(stored) = db.get(&full_key(self.inner.number, tag, rest))? else {
            return Ok(None);
        };
        let sealer = &self.inner.keys.sealer;
        chunk::decode(self.inner.number, tag, rest, &stored, sealer, |key| db.get(key)).map(Some)
    }

    /// Records of one family whose key starts with `prefix`, as (rest of the key after the tag, value).
    /// `from` is an exclusive start: in ascending order only larger keys, in descending order only smaller ones.
    /// At most [`SCAN_ROWS_MAX`] rows.
    ///
    /// # Errors
    /// `Failed` or `Corrupt`.
    #[expect(clippy::unused_async, reason = "the seam is async for stores that are not local")]
    pub async fn scan(
        &self,
        tag: Tag,
        prefix: &[u8],
        from: Option<&[u8]>,
        order: Order,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let number = self.inner.number;
        let Some((low, high)) = self.range(tag, prefix, from, order) else {
            return Ok(Vec::new());
        };
        let db = &self.inner.db;
        let rows = db.scan(&low, &high, order == Order::Descending, limit.min(SCAN_ROWS_MAX))?;
        let mut decoded = Vec::with_capacity(rows.len());
        for (key, stored) in rows {
            let rest = key[9..].to_vec();
            let value = chunk::decode(number, tag, &rest, &stored, &self.inner.keys.sealer, |key| db.get(key))?;
            decoded.push((rest, value));
        }
        Ok(decoded)
    }

    /// The keys that [`Self::scan`] would give, `skip` of them left out, without reading a value. As many as `limit`
    /// says: the caller bounds it.
    ///
    /// # Errors
    /// `Failed`.
    #[expect(clippy::unused_async, reason = "the seam is async for stores that are not local")]
    pub async fn keys(
        &self,
        tag: Tag,
        prefix: &[u8],
        from: Option<&[u8]>,
        order: Order,
        (skip, limit): (usize, usize),
    ) -> Result<Vec<Vec<u8>>, StoreError> {
        let Some((low, high)) = self.range(tag, prefix, from, order) else {
            return Ok(Vec::new());
        };
        let keys = self.inner.db.keys(&low, &high, order == Order::Descending, skip, limit)?;
        Ok(keys.into_iter().map(|key| key[9..].to_vec()).collect())
    }

    /// The full keys `[low, high)` of a scan; `None` when there are none.
    fn range(&self, tag: Tag, prefix: &[u8], from: Option<&[u8]>, order: Order) -> Option<(Vec<u8>, Vec<u8>)> {
        let number = self.inner.number;
        let mut low = full_key(number, tag, prefix);
        let mut high = after_prefix(&low)?;
        match (from, order) {
            (Some(from), Order::Ascending) => {
                low = full_key(number, tag, from);
                low.push(0);
            }
            (Some(from), Order::Descending) => high = full_key(number, tag, from),
            (None, _) => {}
        }
        (low < high).then_some((low, high))
    }

    /// Writes a unit and waits until it is as durable as it asks to be.
    ///
    /// # Errors
    /// `Conflict` leaves the store usable; anything else poisons it.
    pub async fn commit(&self, unit: Unit) -> Result<(), StoreError> {
        let (answer, result) = oneshot::channel();
        self.submit(unit, move |outcome| {
            let _ = answer.send(outcome);
        });
        result.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Queues a unit and returns at once; `done` runs on the committer thread and must only hand the result on.
    /// Units of one number are applied in the order they were submitted.
    pub fn submit(&self, unit: Unit, done: impl FnOnce(Result<(), StoreError>) + Send + 'static) {
        if let Some(failure) = self.inner.db.failure() {
            return done(Err(failure.error.clone()));
        }
        if self.is_poisoned() {
            return done(Err(StoreError::Failed("the number's store is poisoned".to_owned())));
        }
        let staged = unit.validate().and_then(|()| self.ops_of(unit.ops));
        match staged {
            Ok((ops, bytes)) => self.inner.db.submit(self.request(ops, bytes, unit.checks, unit.durability, done)),
            Err(error) => done(Err(error)),
        }
    }

    /// The records to write, sealed, and their size.
    fn ops_of(&self, changes: Vec<Op>) -> Result<(Vec<RawOp>, usize), StoreError> {
        let (number, keys) = (self.inner.number, &self.inner.keys);
        let mut ops = Vec::with_capacity(changes.len());
        let mut bytes = 0;
        for op in changes {
            let (Op::Put { tag, ref rest, .. } | Op::Delete { tag, ref rest }) = op;
            if may_be_cut(tag) {
                let rest = rest.clone();
                let key = full_key(number, tag, &rest);
                let pieces = Box::new(move |head: &[u8]| chunk::piece_keys(number, tag, &rest, head));
                ops.push(RawOp::DeletePieces(key, pieces));
            }
            match op {
                Op::Put { tag, rest, value } => {
                    for (key, value) in chunk::encode(number, tag, &rest, &value, &keys.sealer, &keys.random)? {
                        bytes += key.len() + value.len();
                        ops.push(RawOp::Put(key, value));
                    }
                }
                Op::Delete { tag, rest } => {
                    bytes += rest.len();
                    ops.push(RawOp::Delete(full_key(number, tag, &rest)));
                }
            }
        }
        Ok((ops, bytes))
    }

    fn request(
        &self,
        ops: Vec<RawOp>,
        bytes: usize,
        checks: Vec<Check>,
        durability: Durability,
        done: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) -> Request {
        let number = self.inner.number;
        let wanted = checks;
        let durable = durability == Durability::Durable;
        let mut checks = vec![RawCheck::Equals(
            full_key(number, Tag::Epoch, &[]),
            self.inner.epoch.0.to_be_bytes().to_vec(),
            StoreError::Fenced,
        )];
        checks.extend(wanted.into_iter().map(|check| match check {
            Check::Absent { tag, rest } => RawCheck::Absent(full_key(number, tag, &rest)),
            Check::Present { tag, rest } => RawCheck::Present(full_key(number, tag, &rest)),
        }));
        let inner = self.inner.clone();
        Request {
            ops,
            checks,
            bytes,
            durable,
            done: Answer::to(move |outcome| {
                let harmless = match &outcome {
                    Ok(()) | Err(StoreError::Conflict) => true,
                    Err(StoreError::Busy) => !durable,
                    Err(_) => false,
                };
                if !harmless {
                    inner.poisoned.store(true, Ordering::Release);
                }
                done(outcome);
            }),
        }
    }
}

/// Families whose values can outgrow one record. For the others the committer need not look at the old value.
fn may_be_cut(tag: Tag) -> bool {
    matches!(
        tag,
        Tag::Device
            | Tag::Session
            | Tag::SenderKey
            | Tag::AppState
            | Tag::ProtocolCache
            | Tag::SentMessage
            | Tag::PendingInbound
            | Tag::Message
            | Tag::OutboxBody
            | Tag::Event
    )
}
