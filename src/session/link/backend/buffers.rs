//! Two buffers the library reads back: plain text of what we sent (answers retry receipts) and messages between
//! decryption and the durability hook. Both have an age after which the library sweeps them.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::{LibraryResult, LinkBackend, Mark, SWEEP_ROWS_MAX, kind_key, leading_seconds, put, seconds_key};
use crate::session::link::contact::contact_of;
use crate::store::key::Tag;
use crate::store::number_store::{Order, SCAN_ROWS_MAX};
use crate::store::unit::{Durability, Op, UNIT_BYTES_MAX, Unit};
use crate::telemetry::failpoint::{self, Failpoint};
use whatsapp_rust::Jid;
use whatsapp_rust::wacore::store::error::StoreError as LibraryError;
use whatsapp_rust::wacore::store::traits::{PendingInboundKey, PendingInboundRow};
use whatsapp_rust::wacore::time::now_secs;

const SENT: u8 = 0;
const SENT_BY_TIME: u8 = 1;
/// Largest pending message that is buffered. WhatsApp's own clients make nothing near it.
const PENDING_BYTES_MAX: usize = UNIT_BYTES_MAX - 64 * 1024;

/// How long a message that was taken in stays marked, at least. WhatsApp delivers again what it has no acknowledgement
/// for: what came within the 90 s that a dead connection takes to end, once the next one stands, however late.
const MARK_KEPT_SECONDS: i64 = 600;
/// Marks of one session; the oldest go first. Fewer than a busy number gets in 90 s, and each message above it would be
/// asked for again: 45 a second have room.
const MARKS_MAX: usize = 4096;

/// A row between decryption and acknowledgement.
enum Pending<'a> {
    /// A copy of the message, made at this time.
    Copy(i64, &'a [u8]),
    /// The message is in the history since this time.
    TakenIn(i64),
}

impl<'a> Pending<'a> {
    fn read(value: &'a [u8]) -> Self {
        match leading_seconds(value) {
            Some((at, [])) => Self::TakenIn(at),
            Some((at, message)) => Self::Copy(at, message),
            None => Self::TakenIn(0),
        }
    }
}

/// Takes out the marks that are too old or too many.
fn outlived(taken_in: &mut VecDeque<Mark>, now: i64) -> Vec<Op> {
    let mut ops = Vec::new();
    while let Some((at, _)) = taken_in.front() {
        if taken_in.len() <= MARKS_MAX && *at >= now - MARK_KEPT_SECONDS {
            break;
        }
        let gone = taken_in.pop_front();
        ops.extend(gone.map(|(_, rest)| Op::Delete { tag: Tag::PendingInbound, rest: rest.to_vec() }));
    }
    ops
}

/// Whether a chat is one between two people: only those are in the history.
fn is_person(chat: &str) -> bool {
    chat.parse::<Jid>().is_ok_and(|jid| contact_of([&jid]).is_some())
}

impl LinkBackend {
    /// The row rides along although a retry receipt may need it after a crash: the acknowledgement that ends our
    /// own retries is written durably later and to the same volume, which is written in order.
    pub(super) async fn keep_sent(&self, chat: &str, id: &str, payload: &[u8]) -> LibraryResult<()> {
        let hash = self.names("sent", &[chat, id]);
        let now = seconds_key(now_secs());
        let mut value = now.to_vec();
        value.extend_from_slice(payload);
        let ops = vec![
            put(Tag::SentMessage, kind_key(SENT, &[&hash]), value),
            put(Tag::SentMessage, kind_key(SENT_BY_TIME, &[&now, &hash]), Vec::new()),
        ];
        self.commit_rows(ops, Durability::RidesAlong).await
    }

    /// Reads only, although the library means to take: it puts the row back at once, and a crash in between, or the
    /// retry receipt of another device, would find nothing. Rows leave by their age.
    pub(in crate::session::link) async fn sent(&self, chat: &str, id: &str) -> LibraryResult<Option<Vec<u8>>> {
        let key = kind_key(SENT, &[&self.names("sent", &[chat, id])]);
        let stored = self.get(Tag::SentMessage, &key).await?;
        Ok(stored.as_deref().and_then(leading_seconds).map(|(_, payload)| payload.to_vec()))
    }

    pub(super) async fn sweep_sent(&self, cutoff: i64) -> LibraryResult<u32> {
        let _merging = self.merging.lock().await;
        let rows = self.scan(Tag::SentMessage, &[SENT_BY_TIME], None, Order::Ascending, SWEEP_ROWS_MAX).await?;
        let mut unit = Unit::rides_along();
        let mut deleted = 0;
        for (index, _) in rows {
            let Some((sent_at, hash)) = index.get(1..).and_then(leading_seconds) else {
                continue;
            };
            if sent_at >= cutoff {
                break;
            }
            let key = kind_key(SENT, &[hash]);
            // A message sent again under the same id has a younger row behind an older index entry.
            let stored = self.get(Tag::SentMessage, &key).await?;
            if stored.as_deref().and_then(leading_seconds).is_some_and(|(at, _)| at < cutoff) {
                unit.delete(Tag::SentMessage, key);
                deleted += 1;
            }
            unit.delete(Tag::SentMessage, index);
        }
        self.commit(unit).await?;
        Ok(deleted)
    }

    fn pending_key(&self, chat: &str, sender: &str, id: &str) -> [u8; 16] {
        self.names("pending", &[chat, sender, id])
    }

    /// Rides along, which is enough: the row is needed only if the advanced ratchet is on disk, and the session
    /// that carries it is written durably after it, to the same volume, which is written in order. A failure
    /// poisons the store, because the ratchet must then not be written either.
    pub(super) async fn buffer_pending(&self, rows: &[PendingInboundRow<'_>]) -> LibraryResult<()> {
        let now = seconds_key(now_secs());
        let mut ops = Vec::with_capacity(rows.len());
        for row in rows {
            if row.message.len() > PENDING_BYTES_MAX {
                tracing::warn!(
                    bytes = row.message.len(),
                    "message too large to buffer, a crash before the hook would lose it"
                );
                continue;
            }
            let mut value = now.to_vec();
            value.extend_from_slice(row.message);
            ops.push(put(Tag::PendingInbound, self.pending_key(row.chat, row.sender, row.id).to_vec(), value));
        }
        failpoint::reach(Failpoint::PendingBefore);
        let written = self.commit_rows(ops, Durability::RidesAlong).await;
        failpoint::reach(Failpoint::PendingAfter);
        if written.is_err() {
            self.store.poison();
            (self.on_failure)();
        }
        written
    }

    /// Asked by the library when a message arrives whose ratchet has already moved past it. Without a copy it would
    /// acknowledge the message as known, and with a mark that is right. With neither, a crash came between the saved
    /// ratchet and the copy: the message is nowhere, so it must not be acknowledged, and its sender is asked for it.
    pub(super) async fn pending(&self, chat: &str, sender: &str, id: &str) -> LibraryResult<Option<Vec<u8>>> {
        let stored = self.get(Tag::PendingInbound, &self.pending_key(chat, sender, id)).await?;
        match stored.as_deref().map(Pending::read) {
            Some(Pending::Copy(_, message)) => Ok(Some(message.to_vec())),
            Some(Pending::TakenIn(_)) => Ok(None),
            None if is_person(chat) => {
                (self.on_loss)(id);
                Err(LibraryError::Validation("a message was opened and lost in a crash".to_owned()))
            }
            None => Ok(None),
        }
    }

    /// The messages are in the history. What is left of each is a mark, for as long as it may come again. A copy that
    /// survives is delivered again and recognised as known; a mark that does not survive costs a repeat.
    pub(super) async fn forget_pending(&self, keys: &[PendingInboundKey<'_>]) -> LibraryResult<()> {
        let ops = self.marks_for(keys, now_secs());
        failpoint::reach(Failpoint::PendingGone);
        self.commit_rows(ops, Durability::RidesAlong).await
    }

    fn marks_for(&self, keys: &[PendingInboundKey<'_>], now: i64) -> Vec<Op> {
        let mut taken_in = self.taken_in();
        let mut ops = Vec::with_capacity(keys.len() * 2);
        for key in keys {
            let rest = self.pending_key(key.chat, key.sender, key.id);
            ops.push(put(Tag::PendingInbound, rest.to_vec(), seconds_key(now).to_vec()));
            taken_in.push_back((now, rest));
        }
        ops.extend(outlived(&mut taken_in, now));
        ops
    }

    fn taken_in(&self) -> MutexGuard<'_, VecDeque<Mark>> {
        self.taken_in.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What WhatsApp had kept for this connection has arrived: marks of earlier sessions have done their work.
    pub(in crate::session::link) async fn drained(&self) -> LibraryResult<u32> {
        self.drained.store(true, Ordering::Release);
        self.sweep_pending(0).await
    }

    /// Removes marks that are not needed any more, and copies from before `cutoff`.
    pub(super) async fn sweep_pending(&self, cutoff: i64) -> LibraryResult<u32> {
        let now = now_secs();
        if !self.drained.load(Ordering::Acquire) {
            // After an outage the marks are old, and needed.
            return Ok(0);
        }
        let marks = outlived(&mut self.taken_in(), now);
        self.commit_rows(marks, Durability::RidesAlong).await?;
        let rows = self.scan(Tag::PendingInbound, &[], None, Order::Ascending, SCAN_ROWS_MAX).await?;
        let mut unit = Unit::rides_along();
        let mut deleted = 0;
        for (rest, value) in rows {
            let is_old = match Pending::read(&value) {
                Pending::Copy(at, _) => at < cutoff,
                Pending::TakenIn(at) => at < now - MARK_KEPT_SECONDS,
            };
            if is_old {
                unit.delete(Tag::PendingInbound, rest);
                deleted += 1;
            }
        }
        self.commit(unit).await?;
        Ok(deleted)
    }
}
