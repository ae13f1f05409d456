//! What one number takes: an estimate of its memory by part, and its rows on disk, so that growth can be attributed.

/// Heap of one outbox row beside the row itself, in bytes: its texts, and its places in the indexes.
pub const OUTBOX_ROW_HEAP_BYTES: u64 = 320;
/// Heap of one webhook row or of one thing remembered, in bytes, beside itself.
pub const SMALL_ROW_HEAP_BYTES: u64 = 96;

/// Memory of a number, in bytes. Estimates: what is counted is entries, not allocations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Accepted messages that are not settled.
    pub outbox: u64,
    /// Webhook deliveries held in memory; the others wait on disk.
    pub webhooks: u64,
    /// What was seen lately, pace of chats included.
    pub recent: u64,
    /// Its WhatsApp session.
    pub session: SessionMemory,
}

/// Memory of a WhatsApp session, in bytes; nothing while there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SessionMemory {
    /// What any connection takes before it has seen a message, as it was measured.
    pub connection: u64,
    /// Signal sessions, identities and sender keys.
    pub signal: u64,
    /// Devices and addresses of others.
    pub directory: u64,
    /// What waits to be written or answered.
    pub queues: u64,
}

/// Rows of a number on disk, by what they are. Small families that time bounds (prekeys, request ids) are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskRows {
    /// The history.
    pub messages: u64,
    /// The event log.
    pub events: u64,
    /// The outbox.
    pub outbox: u64,
    /// Webhook queues.
    pub webhooks: u64,
}

impl Memory {
    /// Every part by its name in the API and in metrics.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        let SessionMemory { connection, signal, directory, queues } = self.session;
        [
            ("outbox", self.outbox),
            ("webhooks", self.webhooks),
            ("recent", self.recent),
            ("connection", connection),
            ("signal", signal),
            ("directory", directory),
            ("queues", queues),
        ]
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }
}

impl DiskRows {
    /// Every part by its name in the API and in metrics.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, u64); 4] {
        let Self { messages, events, outbox, webhooks } = *self;
        [("messages", messages), ("events", events), ("outbox", outbox), ("webhooks", webhooks)]
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, rows)| rows).sum()
    }
}

/// `count` entries of a type and what each holds on the heap.
#[must_use]
pub fn entries<T>(count: usize, heap: u64) -> u64 {
    (count as u64).saturating_mul(size_of::<T>() as u64 + heap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_the_sum_of_what_is_named() {
        let session = SessionMemory { connection: 8, signal: 16, directory: 32, queues: 64 };
        let memory = Memory { outbox: 1, webhooks: 2, recent: 4, session };
        assert_eq!(memory.total(), 127);
        let rows = DiskRows { messages: 1, events: 2, outbox: 4, webhooks: 8 };
        assert_eq!(rows.total(), 15);
        let names: std::collections::HashSet<_> = memory.parts().iter().map(|(name, _)| *name).collect();
        assert_eq!(names.len(), 7);
        assert_eq!(entries::<u64>(3, 2), 30);
    }
}
