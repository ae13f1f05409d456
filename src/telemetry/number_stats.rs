//! The figures of one number, as atomics: its actor writes, `/metrics` and the API read without asking the actor.
//! Written with relaxed ordering: each figure stands for itself.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::domain::capacity::Basis;
use crate::domain::id::{NumberId, TenantId};
use crate::domain::ledger::{DiskRows, Memory, SessionMemory};
use crate::domain::lifecycle::Attention;
use crate::domain::time::Timestamp;

/// A number's state as one label value; the position is the code of `switchboard_number_state`.
pub const STATE_NAMES: [&str; 13] = [
    "unspecified",
    "unlinked",
    "linking",
    "offline",
    "awaiting_gate",
    "connecting",
    "online",
    "degraded",
    "parked",
    "replaced",
    "logged_out",
    "stopped",
    "quarantined",
];

/// The figures of one number.
#[derive(Debug, Default)]
pub struct NumberStats {
    state: AtomicU8,
    desired_up: AtomicBool,
    up: AtomicBool,
    /// Crashes of the actor since the daemon started.
    pub restarts: Counter,
    /// Connections opened after the first.
    pub reconnects: Counter,
    /// Messages WhatsApp acknowledged.
    pub sent: Counter,
    /// Messages received and made durable.
    pub received: Counter,
    /// Messages that will never be sent.
    pub failed: Counter,
    /// Bytes that came from WhatsApp since the daemon started, as they were on the wire without TLS.
    pub wire_received: Counter,
    /// Bytes that went to WhatsApp.
    pub wire_sent: Counter,
    /// Accepted messages that WhatsApp has not acknowledged.
    pub outbox: Queue,
    /// Deliveries that wait for an endpoint.
    pub webhooks: Queue,
    capacity: Mutex<Option<Basis>>,
    taken: Mutex<(Memory, DiskRows)>,
    attention: AtomicU8,
    new_chats_held_until: AtomicU64,
    last_activity: AtomicU64,
}

/// Counts up.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `by` more.
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// The count.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Depth and age of something that waits.
#[derive(Debug, Default)]
pub struct Queue {
    depth: AtomicU64,
    oldest: AtomicU64,
}

impl Queue {
    /// What it holds now, and since when its oldest entry waits.
    pub fn set(&self, depth: u64, oldest: Option<Timestamp>) {
        self.depth.store(depth, Ordering::Relaxed);
        self.oldest.store(oldest.map_or(0, |oldest| oldest.0), Ordering::Relaxed);
    }

    /// How many entries wait.
    #[must_use]
    pub fn depth(&self) -> u64 {
        self.depth.load(Ordering::Relaxed)
    }

    /// How long the oldest entry has waited; zero when nothing waits.
    #[must_use]
    pub fn oldest_age(&self, now: Timestamp) -> Duration {
        match self.oldest.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            oldest => now.since(Timestamp(oldest)),
        }
    }
}

impl NumberStats {
    /// The state changed. `code` is a position in [`STATE_NAMES`]; `up` says whether sends are possible in it.
    pub fn set_state(&self, code: u8, up: bool) {
        self.state.store(code, Ordering::Relaxed);
        self.up.store(up, Ordering::Relaxed);
    }

    /// Position in [`STATE_NAMES`].
    #[must_use]
    pub fn state_code(&self) -> u8 {
        self.state.load(Ordering::Relaxed)
    }

    /// Whether sends are possible.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// What it takes of memory, its session left as it was, and of disk.
    pub fn set_taken(&self, memory: Memory, disk: DiskRows) {
        let mut taken = self.taken();
        *taken = (Memory { session: taken.0.session, ..memory }, disk);
    }

    /// Its actor is gone, and with it all that it held.
    pub fn let_go_of_memory(&self) {
        self.taken().0 = Memory::default();
    }

    /// What its session takes of memory.
    pub fn set_session_memory(&self, session: SessionMemory) {
        self.taken().0.session = session;
    }

    /// What it takes of memory and of disk.
    #[must_use]
    pub fn usage(&self) -> (Memory, DiskRows) {
        *self.taken()
    }

    fn taken(&self) -> MutexGuard<'_, (Memory, DiskRows)> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who must act: nobody, its owner, or the operator.
    pub fn set_attention(&self, attention: Attention) {
        self.attention.store(attention as u8, Ordering::Relaxed);
    }

    /// Who must act, as a figure: 0 nobody, 1 its owner, 2 the operator.
    #[must_use]
    pub fn attention(&self) -> u8 {
        self.attention.load(Ordering::Relaxed)
    }

    /// The owner wants it connected, or not.
    pub fn set_desired_up(&self, desired: bool) {
        self.desired_up.store(desired, Ordering::Relaxed);
    }

    /// Whether the owner wants it connected.
    #[must_use]
    pub fn is_desired_up(&self) -> bool {
        self.desired_up.load(Ordering::Relaxed)
    }

    /// What its capacity follows from changed, or only time went by.
    pub fn set_capacity(&self, basis: Basis) {
        let mut shown = self.capacity.lock().unwrap_or_else(PoisonError::into_inner);
        *shown = match *shown {
            Some(before) if before.says_the_same_as(&basis) => return,
            Some(before) => Some(Basis { revision: before.revision + 1, ..basis }),
            None => Some(basis),
        };
    }

    /// What its capacity follows from; none before it has started.
    #[must_use]
    pub fn capacity(&self) -> Option<Basis> {
        *self.capacity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends that would go out at once.
    #[must_use]
    pub fn send_budget_remaining(&self, now: Timestamp) -> u64 {
        let basis = self.capacity().filter(|_| self.is_up());
        basis.map_or(0, |basis| basis.at(now).available_now.into())
    }

    /// Until when messages to people who never wrote are held.
    pub fn set_new_chats_held_until(&self, until: Option<Timestamp>) {
        self.new_chats_held_until.store(until.map_or(0, |until| until.0), Ordering::Relaxed);
    }

    /// Until when messages to people who never wrote are held, if they are.
    #[must_use]
    pub fn new_chats_held_until(&self) -> Option<Timestamp> {
        match self.new_chats_held_until.load(Ordering::Relaxed) {
            0 => None,
            at => Some(Timestamp(at)),
        }
    }

    /// Traffic in either direction.
    pub fn touch(&self, now: Timestamp) {
        self.last_activity.fetch_max(now.0, Ordering::Relaxed);
    }

    /// The last traffic in either direction, if any since the daemon started.
    #[must_use]
    pub fn last_activity(&self) -> Option<Timestamp> {
        match self.last_activity.load(Ordering::Relaxed) {
            0 => None,
            at => Some(Timestamp(at)),
        }
    }
}

/// The label text of one number's series; made once, when the number's stats are.
#[must_use]
pub fn labels(number: NumberId, tenant: TenantId) -> Box<str> {
    format!("number=\"{number}\",tenant=\"{tenant}\"").into()
}
