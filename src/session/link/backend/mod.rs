//! The library's storage traits over the number's store: one value is one number's Signal and device state.
//! Names (addresses, chats, message ids) never stand in a key in clear; where the library lists them, the value
//! carries them. Every batch is one unit. A failed write is reported once and ends the session unflushed.

mod app_state;
mod buffers;
mod codec;
mod device;
mod protocol;
mod repeats;
mod secrets;
mod signal;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Mutex;
use whatsapp_rust::wacore::store::error::StoreError as LibraryError;

pub use self::device::{ProvisionError, forget_device, is_linked, provision};
use crate::store::error::StoreError;
use crate::store::key::Tag;
use crate::store::number_store::{NumberStore, Order, SCAN_ROWS_MAX};
use crate::store::unit::{Durability, Op, Unit};

/// Result of a storage call, in the library's terms.
pub(super) type LibraryResult<T> = Result<T, LibraryError>;

/// Bytes one unit of a large batch may take: half of the store's limit, since cut values carry extra keys.
const BATCH_BYTES_MAX: usize = crate::store::unit::UNIT_BYTES_MAX / 2;
/// Rows one sweep of expired records looks at; the library sweeps every five minutes, so a backlog drains anyway.
const SWEEP_ROWS_MAX: usize = 500;
/// Pages a full listing reads before it gives up: a million rows.
const LIST_PAGES_MAX: usize = 1000;

/// Called once when a write failed.
pub(super) type OnFailure = Box<dyn Fn() + Send + Sync>;
/// Called with the WhatsApp id of a message that a crash has lost.
pub(super) type OnLoss = Box<dyn Fn(&str) + Send + Sync>;

/// When a message was taken in, and the key of the row that says so.
type Mark = (i64, [u8; 16]);

/// One number's storage as the library sees it.
pub(super) struct LinkBackend {
    store: NumberStore,
    /// Serialises every read-modify-write: the store has no transactions across a read.
    merging: Mutex<()>,
    sealed: AtomicBool,
    on_failure: OnFailure,
    on_loss: OnLoss,
    /// The marks of messages of this session that were taken in; oldest first.
    taken_in: std::sync::Mutex<VecDeque<Mark>>,
    /// Whether WhatsApp has delivered what it had kept.
    drained: AtomicBool,
}

impl LinkBackend {
    pub(super) fn new(store: NumberStore, on_failure: OnFailure, on_loss: OnLoss) -> Arc<Self> {
        Arc::new(Self {
            store,
            merging: Mutex::new(()),
            sealed: AtomicBool::new(false),
            on_failure,
            on_loss,
            taken_in: std::sync::Mutex::default(),
            drained: AtomicBool::new(false),
        })
    }

    /// From now on nothing is written, without the store counting as failed: what the client still holds in
    /// memory must not reach the disk.
    pub(super) fn seal(&self) {
        self.sealed.store(true, Ordering::Release);
    }

    /// Whether a device list of this user part is stored: whether we have written to it before.
    pub(super) async fn knows_devices_of(&self, user: &str) -> bool {
        self.device_list(user).await.is_ok_and(|list| list.is_some())
    }

    fn name(&self, kind: &str, name: &str) -> [u8; 16] {
        self.store.hashed(kind, name.as_bytes())
    }

    /// A key out of several names. They are joined with a byte that occurs in none of them.
    fn names(&self, kind: &str, names: &[&str]) -> [u8; 16] {
        self.store.hashed(kind, names.join("\0").as_bytes())
    }

    fn failed(&self, error: StoreError) -> LibraryError {
        if self.store.is_poisoned() || matches!(error, StoreError::Corrupt(_)) {
            (self.on_failure)();
        }
        LibraryError::Database(Box::new(error))
    }

    async fn get(&self, tag: Tag, rest: &[u8]) -> LibraryResult<Option<Vec<u8>>> {
        self.store.get(tag, rest).await.map_err(|error| self.failed(error))
    }

    async fn scan(
        &self,
        tag: Tag,
        prefix: &[u8],
        from: Option<&[u8]>,
        order: Order,
        limit: usize,
    ) -> LibraryResult<Vec<(Vec<u8>, Vec<u8>)>> {
        let rows = self.store.scan(tag, prefix, from, order, limit).await;
        rows.map_err(|error| self.failed(error))
    }

    /// All rows below a prefix, page by page.
    async fn list(&self, tag: Tag, prefix: &[u8]) -> LibraryResult<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut all: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        for _ in 0..LIST_PAGES_MAX {
            let from = all.last().map(|(key, _)| key.clone());
            let page = self.scan(tag, prefix, from.as_deref(), Order::Ascending, SCAN_ROWS_MAX).await?;
            let last = page.len() < SCAN_ROWS_MAX;
            all.extend(page);
            if last {
                break;
            }
        }
        Ok(all)
    }

    async fn commit(&self, unit: Unit) -> LibraryResult<()> {
        if unit.is_empty() {
            return Ok(());
        }
        if self.sealed.load(Ordering::Acquire) {
            return Err(LibraryError::Validation("the session is being dropped".to_owned()));
        }
        self.store.commit(unit).await.map_err(|error| self.failed(error))
    }

    /// Commits rows that may be too many for one unit, in order. Rows that fit stay atomic; larger batches are
    /// independent rows by the library's own contract (its default is one call per row).
    async fn commit_rows(&self, ops: Vec<Op>, durability: Durability) -> LibraryResult<()> {
        let empty = || match durability {
            Durability::Durable => Unit::durable(),
            Durability::RidesAlong => Unit::rides_along(),
        };
        let mut unit = empty();
        for op in ops {
            let bytes = match &op {
                Op::Put { rest, value, .. } => rest.len() + value.len(),
                Op::Delete { rest, .. } => rest.len(),
            };
            if !unit.is_empty() && unit.bytes() + bytes > BATCH_BYTES_MAX {
                self.commit(std::mem::replace(&mut unit, empty())).await?;
            }
            unit.ops.push(op);
        }
        self.commit(unit).await
    }

    /// Deletes every row below a prefix.
    async fn delete_below(&self, tag: Tag, prefix: &[u8]) -> LibraryResult<()> {
        let rows = self.list(tag, prefix).await?;
        let ops = rows.into_iter().map(|(rest, _)| Op::Delete { tag, rest }).collect();
        self.commit_rows(ops, Durability::RidesAlong).await
    }

    fn decode<T: serde::de::DeserializeOwned>(&self, bytes: &[u8]) -> LibraryResult<T> {
        codec::decode(bytes)
            .ok_or_else(|| self.failed(StoreError::Corrupt("a row of the session does not parse".to_owned())))
    }
}

fn put(tag: Tag, rest: Vec<u8>, value: Vec<u8>) -> Op {
    Op::Put { tag, rest, value }
}

fn encode<T: serde::Serialize>(value: &T) -> LibraryResult<Vec<u8>> {
    codec::encode(value).map_err(|error| LibraryError::Serialization(Box::new(error)))
}

/// A key of one kind within a family.
fn kind_key(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
    let mut key = vec![kind];
    for part in parts {
        key.extend_from_slice(part);
    }
    key
}

/// The library counts in seconds since the epoch and never before it.
fn seconds_key(seconds: i64) -> [u8; 8] {
    u64::try_from(seconds).unwrap_or(0).to_be_bytes()
}

/// Reads a big-endian number from the front of a value.
fn leading_seconds(value: &[u8]) -> Option<(i64, &[u8])> {
    let (head, rest) = value.split_first_chunk::<8>()?;
    Some((i64::try_from(u64::from_be_bytes(*head)).unwrap_or(i64::MAX), rest))
}
