//! What a number takes of memory and disk.

use super::machine::{Number, Pending};
use crate::domain::change::SeenKey;
use crate::domain::delivery::DeliveryRow;
use crate::domain::id::ChatNo;
use crate::domain::ledger::{DiskRows, Memory, OUTBOX_ROW_HEAP_BYTES, SMALL_ROW_HEAP_BYTES, SessionMemory, entries};
use crate::domain::limiter::ChatPace;
use crate::domain::message::{MessageRecord, Progress};
use crate::domain::outbox::OutboxRow;

impl Number {
    /// Its memory without the session's, in bytes: an estimate that costs nothing to make.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let recent = [
            entries::<Pending>(self.pending.len(), SMALL_ROW_HEAP_BYTES),
            entries::<(String, ChatNo)>(self.fresh_chats.len(), SMALL_ROW_HEAP_BYTES),
            entries::<ChatNo>(self.recent_heard.len(), 0),
            entries::<SeenKey>(self.recent_seen.len(), SMALL_ROW_HEAP_BYTES),
            entries::<MessageRecord>(self.recent_placeholders.len(), SMALL_ROW_HEAP_BYTES),
            entries::<(u64, Progress)>(self.recent_progress.len(), 0),
            entries::<(ChatNo, ChatPace)>(self.limiter.paced_chats(), 0),
        ];
        Memory {
            outbox: entries::<OutboxRow>(self.outbox.len(), OUTBOX_ROW_HEAP_BYTES),
            webhooks: entries::<DeliveryRow>(self.deliveries.held(), SMALL_ROW_HEAP_BYTES),
            recent: recent.iter().sum(),
            session: SessionMemory::default(),
        }
    }

    /// Its rows on disk. Places that a refused request left empty count as well: the figure shows growth.
    #[must_use]
    pub fn disk_rows(&self) -> DiskRows {
        DiskRows {
            messages: self.counters.message.saturating_sub(self.counters.messages_removed),
            events: self.counters.event.saturating_sub(self.counters.events_removed),
            outbox: self.outbox.len() as u64,
            webhooks: self.deliveries.depth(),
        }
    }
}
