//! Two buffers the library reads back: plain text of what we sent (answers retry receipts) and messages between
//! decryption and the durability hook. Both have an age after which the library sweeps them.

use super::{LibraryResult, LinkBackend, SWEEP_ROWS_MAX, kind_key, leading_seconds, put, seconds_key};
use crate::store::key::Tag;
use crate::store::number_store::{Order, SCAN_ROWS_MAX};
use crate::store::unit::{Durability, Op, UNIT_BYTES_MAX, Unit};
use crate::telemetry::failpoint::{self, Failpoint};
use whatsapp_rust::wacore::store::traits::{PendingInboundKey, PendingInboundRow};
use whatsapp_rust::wacore::time::now_secs;

const SENT: u8 = 0;
const SENT_BY_TIME: u8 = 1;
/// Largest pending message that is buffered. WhatsApp's own clients make nothing near it.
const PENDING_BYTES_MAX: usize = UNIT_BYTES_MAX - 64 * 1024;

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

    fn pending_key(&self, chat: &str, sender: &str, id: &str) -> Vec<u8> {
        self.names("pending", &[chat, sender, id]).to_vec()
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
            ops.push(put(Tag::PendingInbound, self.pending_key(row.chat, row.sender, row.id), value));
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

    pub(super) async fn pending(&self, chat: &str, sender: &str, id: &str) -> LibraryResult<Option<Vec<u8>>> {
        let stored = self.get(Tag::PendingInbound, &self.pending_key(chat, sender, id)).await?;
        Ok(stored.as_deref().and_then(leading_seconds).map(|(_, message)| message.to_vec()))
    }

    /// A row that survives its own deletion is delivered again and recognised as known.
    pub(super) async fn forget_pending(&self, keys: &[PendingInboundKey<'_>]) -> LibraryResult<()> {
        let row = |key: &PendingInboundKey<'_>| Op::Delete {
            tag: Tag::PendingInbound,
            rest: self.pending_key(key.chat, key.sender, key.id),
        };
        failpoint::reach(Failpoint::PendingGone);
        self.commit_rows(keys.iter().map(row).collect(), Durability::RidesAlong).await
    }

    pub(super) async fn sweep_pending(&self, cutoff: i64) -> LibraryResult<u32> {
        // Usually empty: rows live from decryption to the hook's return.
        let rows = self.scan(Tag::PendingInbound, &[], None, Order::Ascending, SCAN_ROWS_MAX).await?;
        let mut unit = Unit::rides_along();
        let mut deleted = 0;
        for (rest, value) in rows {
            if leading_seconds(&value).is_none_or(|(at, _)| at < cutoff) {
                unit.delete(Tag::PendingInbound, rest);
                deleted += 1;
            }
        }
        self.commit(unit).await?;
        Ok(deleted)
    }
}
