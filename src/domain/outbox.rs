//! Accepted sends that WhatsApp has not acknowledged. One in flight per chat, in the order of acceptance; across
//! chats the oldest ready one goes first.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::id::{ChatNo, MessageSeq};
use super::phone::Contact;
use super::time::Timestamp;

/// Sends in flight at once per number; the rest wait in order.
pub const IN_FLIGHT_MAX: usize = 32;

/// One accepted send; also what is stored of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutboxRow {
    /// Its history row.
    pub seq: MessageSeq,
    /// Its chat.
    pub chat: ChatNo,
    /// WhatsApp's id, the same at every attempt.
    pub whatsapp_id: String,
    /// The recipient.
    pub to: Contact,
    /// The caller's own reference.
    pub correlation_id: Option<String>,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// Attempts that may have reached the wire.
    pub attempts: u16,
    /// Not before this moment.
    pub not_before: Timestamp,
}

/// Where a row stands in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waits for its turn.
    Waiting,
    /// Its attempt is being made durable.
    Claimed,
    /// Handed to the session.
    OnWire { since: Timestamp },
}

#[derive(Debug, Clone)]
struct Entry {
    row: OutboxRow,
    stage: Stage,
}

/// The outbox of one number.
#[derive(Debug, Clone, Default)]
pub struct Outbox {
    entries: BTreeMap<MessageSeq, Entry>,
    chats: HashMap<ChatNo, VecDeque<MessageSeq>>,
    /// First of their chat, waiting.
    ready: BTreeSet<MessageSeq>,
    in_flight: BTreeSet<MessageSeq>,
}

impl Outbox {
    /// The outbox as it was stored. Rows that were attempted count as unknown and simply wait for another attempt.
    #[must_use]
    pub fn restore(rows: impl IntoIterator<Item = OutboxRow>) -> Self {
        let mut outbox = Self::default();
        for row in rows {
            outbox.push(row);
        }
        outbox
    }

    /// Rows not settled.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Rows whose answer is awaited.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// When the oldest row was accepted.
    #[must_use]
    pub fn oldest(&self) -> Option<Timestamp> {
        self.entries.values().next().map(|entry| entry.row.created_at)
    }

    /// Adds a row behind every other of its chat. Rows come in the order of their sequence.
    pub fn push(&mut self, row: OutboxRow) {
        let (seq, chat) = (row.seq, row.chat);
        self.entries.insert(seq, Entry { row, stage: Stage::Waiting });
        let queue = self.chats.entry(chat).or_default();
        queue.push_back(seq);
        if queue.len() == 1 {
            self.ready.insert(seq);
        }
    }

    /// One row.
    #[must_use]
    pub fn row(&self, seq: MessageSeq) -> Option<&OutboxRow> {
        self.entries.get(&seq).map(|entry| &entry.row)
    }

    /// Whether a new row of this chat would be first in line.
    #[must_use]
    pub fn is_idle(&self, chat: ChatNo) -> bool {
        !self.chats.contains_key(&chat) && self.in_flight.len() < IN_FLIGHT_MAX
    }

    /// The in-flight row with this WhatsApp id.
    #[must_use]
    pub fn in_flight_with(&self, whatsapp_id: &str) -> Option<MessageSeq> {
        self.in_flight.iter().copied().find(|seq| self.entries[seq].row.whatsapp_id == whatsapp_id)
    }

    /// Rows that could go now as far as order is concerned, oldest first; empty while the window is full.
    pub fn ready(&self) -> impl Iterator<Item = &OutboxRow> {
        let open = self.in_flight.len() < IN_FLIGHT_MAX;
        self.ready.iter().filter(move |_| open).filter_map(|seq| self.entries.get(seq)).map(|entry| &entry.row)
    }

    /// Takes a ready row, if the window has room: its attempt is about to be made durable. Gives the row with the
    /// attempt counted.
    pub fn claim(&mut self, seq: MessageSeq) -> Option<OutboxRow> {
        if self.in_flight.len() >= IN_FLIGHT_MAX || !self.ready.remove(&seq) {
            return None;
        }
        let entry = self.entries.get_mut(&seq)?;
        entry.stage = Stage::Claimed;
        entry.row.attempts = entry.row.attempts.saturating_add(1);
        self.in_flight.insert(seq);
        Some(entry.row.clone())
    }

    /// The claimed attempt is durable and goes to the session. False if it is no longer this attempt's turn.
    pub fn on_wire(&mut self, seq: MessageSeq, attempts: u16, now: Timestamp) -> bool {
        match self.entries.get_mut(&seq) {
            Some(entry) if entry.stage == Stage::Claimed && entry.row.attempts == attempts => {
                entry.stage = Stage::OnWire { since: now };
                true
            }
            _ => false,
        }
    }

    /// Back to waiting: the attempt failed or its outcome is unknown. It stays first of its chat.
    pub fn give_back(&mut self, seq: MessageSeq, not_before: Timestamp) {
        if let Some(entry) = self.entries.get_mut(&seq)
            && self.in_flight.remove(&seq)
        {
            entry.stage = Stage::Waiting;
            entry.row.not_before = not_before;
            self.ready.insert(seq);
        }
    }

    /// The connection is gone: every attempt's outcome is unknown, all go again under the same id.
    pub fn give_back_all(&mut self) {
        for seq in self.in_flight.clone() {
            self.give_back(seq, Timestamp(0));
        }
    }

    /// Removes a row: WhatsApp has it, or never will. The next of its chat becomes ready.
    pub fn settle(&mut self, seq: MessageSeq) -> Option<OutboxRow> {
        let entry = self.entries.remove(&seq)?;
        self.ready.remove(&seq);
        self.in_flight.remove(&seq);
        let chat = entry.row.chat;
        if let Some(queue) = self.chats.get_mut(&chat) {
            let was_first = queue.front() == Some(&seq);
            queue.retain(|other| *other != seq);
            match queue.front() {
                Some(next) if was_first => {
                    self.ready.insert(*next);
                }
                Some(_) => {}
                None => {
                    self.chats.remove(&chat);
                }
            }
        }
        Some(entry.row)
    }

    /// When the oldest unanswered attempt was handed over.
    #[must_use]
    pub fn oldest_on_wire(&self) -> Option<Timestamp> {
        let since = self.in_flight.iter().filter_map(|seq| match self.entries.get(seq)?.stage {
            Stage::OnWire { since } => Some(since),
            Stage::Waiting | Stage::Claimed => None,
        });
        since.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::phone::Phone;
    use proptest::prelude::*;

    fn row(seq: u64, chat: u32) -> OutboxRow {
        OutboxRow {
            seq: MessageSeq(seq),
            chat: ChatNo(chat),
            whatsapp_id: format!("3EB0{seq:016X}"),
            to: Contact::of_phone(Phone::parse("5511999999999").unwrap()),
            correlation_id: None,
            created_at: Timestamp(seq),
            attempts: 0,
            not_before: Timestamp(0),
        }
    }

    proptest! {
        /// Whatever fails and is given back: per chat rows leave in order, one at a time, and none is forgotten.
        #[test]
        fn per_chat_order_holds(chats in proptest::collection::vec(0u32..4, 1..40), choices in proptest::collection::vec(any::<u8>(), 400)) {
            let mut outbox = Outbox::default();
            for (seq, chat) in chats.iter().enumerate() {
                outbox.push(row(seq as u64, *chat));
            }
            let mut left: HashMap<u32, Vec<u64>> = HashMap::new();
            let mut flying: Vec<MessageSeq> = Vec::new();
            let mut choices = choices.into_iter().cycle();
            while !outbox.is_empty() {
                let ready: Vec<_> = outbox.ready().map(|row| row.seq).collect();
                if let Some(seq) = ready.first() {
                    let claimed = outbox.claim(*seq).unwrap();
                    prop_assert!(flying.iter().all(|other| outbox.row(*other).unwrap().chat != claimed.chat));
                    prop_assert!(outbox.on_wire(*seq, claimed.attempts, Timestamp(1)));
                    flying.push(*seq);
                }
                let choice = choices.next().unwrap();
                let index = usize::from(choice) % flying.len();
                let seq = flying.swap_remove(index);
                if choice % 5 == 0 {
                    outbox.give_back(seq, Timestamp(0));
                } else {
                    let row = outbox.settle(seq).unwrap();
                    left.entry(row.chat.0).or_default().push(seq.0);
                }
            }
            for order in left.values() {
                prop_assert!(order.is_sorted());
            }
            prop_assert_eq!(left.values().map(Vec::len).sum::<usize>(), chats.len());
            prop_assert!(outbox.chats.is_empty() && outbox.ready.is_empty() && outbox.in_flight.is_empty());
        }
    }

    #[test]
    fn the_window_is_bounded() {
        let mut outbox = Outbox::restore((0..100).map(|seq| row(seq, u32::try_from(seq).unwrap())));
        loop {
            let next = outbox.ready().map(|row| row.seq).next();
            let Some(seq) = next else { break };
            outbox.claim(seq);
        }
        assert_eq!(outbox.in_flight(), IN_FLIGHT_MAX);
        outbox.give_back_all();
        assert_eq!(outbox.in_flight(), 0);
        assert_eq!(outbox.ready().count(), 100);
    }
}
