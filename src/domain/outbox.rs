//! Accepted sends that WhatsApp has not acknowledged. One in flight per chat, in the order in which they took their
//! place in its queue: at acceptance, or when a scheduled one became due. Across chats the oldest ready one goes first.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::id::{ChatNo, MessageSeq};
use super::phone::Contact;
use super::time::Timestamp;

/// Sends in flight at once per number; the rest wait in order.
pub const IN_FLIGHT_MAX: usize = 32;
/// How long a send without a deadline of its own may wait, from its acceptance or from the time it is scheduled for.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(7 * 24 * 3600);
/// How far ahead a send may be scheduled.
pub const SCHEDULE_AHEAD_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long past its deadline a send is kept whose last attempt may have arrived: until the number is online again,
/// and at most this long.
pub const DOUBT_MAX: Duration = Duration::from_secs(3600);

/// When a send takes its place in its chat's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Schedule {
    /// At its acceptance.
    #[default]
    AtOnce,
    /// At this time; until then it stands in no queue and nothing waits for it.
    At(Timestamp),
    /// It became due and has its place.
    Joined {
        /// When it was scheduled for.
        at: Timestamp,
        /// The last send in front of it when it came; 0 if there was none.
        behind: MessageSeq,
        /// Its place among those that came behind the same one, from 1.
        order: u32,
    },
}

/// What the next attempt presumes about the recipient's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Devices {
    /// What is known of them holds.
    #[default]
    AsKnown,
    /// WhatsApp refused the message: ask for them again first. Done once per message.
    Refreshed,
}

/// What is known of the person a chat is with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Standing {
    /// They never wrote to this number: WhatsApp counts a message to them as a new chat.
    #[default]
    New,
    /// They have written.
    Warm,
}

/// What became of an attempt that did not settle its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsettled {
    /// It certainly did not get through, and that says nothing of the next one.
    NotThrough,
    /// It was refused, for now.
    Refused,
    /// Nobody knows.
    Unknown,
}

/// How far a message is from the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// Not on the wire, as far as anybody can tell: it can be withdrawn.
    Waiting,
    /// An attempt is under way, or one of unknown outcome was made.
    MayHaveLeft,
}

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
    /// When it takes its place.
    #[serde(default)]
    pub schedule: Schedule,
    /// Not after this moment; `None` in rows of earlier versions.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// Attempts of which it is known that they did not get through.
    #[serde(default)]
    pub answered: u16,
    /// Attempts that were refused for now.
    #[serde(default)]
    pub refusals: u16,
    /// What the next attempt presumes.
    #[serde(default)]
    pub devices: Devices,
}

impl OutboxRow {
    /// After this moment it is not sent any more.
    #[must_use]
    pub fn deadline(&self) -> Timestamp {
        self.expires_at.unwrap_or_else(|| self.queued_at().after(DEADLINE_DEFAULT))
    }

    /// Whether an attempt was made that may have arrived.
    #[must_use]
    pub fn is_doubtful(&self) -> bool {
        self.attempts > self.answered
    }

    /// When it took or takes its place in the queue.
    #[must_use]
    pub fn queued_at(&self) -> Timestamp {
        match self.schedule {
            Schedule::AtOnce => self.created_at,
            Schedule::At(at) | Schedule::Joined { at, .. } => self.created_at.max(at),
        }
    }

    /// Orders the rows of a chat's queue.
    fn place(&self) -> (MessageSeq, u32) {
        match self.schedule {
            Schedule::AtOnce | Schedule::At(_) => (self.seq, 0),
            Schedule::Joined { behind, order, .. } => (behind, order),
        }
    }

    fn expiry(&self) -> Timestamp {
        if self.is_doubtful() { self.deadline().after(DOUBT_MAX) } else { self.deadline() }
    }

    fn count(&mut self, outcome: Unsettled) {
        if outcome != Unsettled::Unknown {
            self.answered = self.answered.saturating_add(1).min(self.attempts);
        }
        if outcome == Unsettled::Refused {
            self.refusals = self.refusals.saturating_add(1);
        }
    }
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

/// The sends of one chat.
#[derive(Debug, Clone, Default)]
struct Line {
    standing: Standing,
    queue: VecDeque<MessageSeq>,
    /// Of this chat and not yet in its queue.
    scheduled: usize,
}

/// The outbox of one number.
#[derive(Debug, Clone, Default)]
pub struct Outbox {
    entries: BTreeMap<MessageSeq, Entry>,
    /// Scheduled, not due.
    later: BTreeMap<MessageSeq, OutboxRow>,
    due: BTreeSet<(Timestamp, MessageSeq)>,
    /// When each row that is not in flight expires.
    deadlines: BTreeSet<(Timestamp, MessageSeq)>,
    chats: HashMap<ChatNo, Line>,
    /// First of their chat, waiting: in chats with people who have written, and in others.
    ready: BTreeSet<MessageSeq>,
    ready_new: BTreeSet<MessageSeq>,
    in_flight: BTreeSet<MessageSeq>,
    /// Chats with more than one row in their queue.
    deep: BTreeSet<ChatNo>,
    /// Rows in queues of chats with people who have written.
    warm_rows: usize,
}

impl Outbox {
    /// The outbox as it was stored, and the chats of it in which the other side has written. Rows that were attempted
    /// count as unknown and simply wait for another attempt.
    #[must_use]
    pub fn restore(rows: impl IntoIterator<Item = OutboxRow>, warm: &HashSet<ChatNo>) -> Self {
        let mut rows: Vec<_> = rows.into_iter().collect();
        rows.sort_by_key(OutboxRow::place);
        let mut outbox = Self::default();
        for row in rows {
            let standing = if warm.contains(&row.chat) { Standing::Warm } else { Standing::New };
            outbox.push(row, standing);
        }
        outbox
    }

    /// Rows not settled.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len() + self.later.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.later.is_empty()
    }

    /// Rows that are scheduled and not due.
    #[must_use]
    pub fn scheduled(&self) -> usize {
        self.later.len()
    }

    /// Rows whose answer is awaited.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Rows in flight to people who never wrote.
    #[must_use]
    pub fn in_flight_new(&self) -> usize {
        let rows = self.in_flight.iter().filter_map(|seq| self.row(*seq));
        rows.filter(|row| self.standing(row.chat) == Standing::New).count()
    }

    /// Rows in a queue and not in flight.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.entries.len() - self.in_flight.len()
    }

    /// When the oldest row in a queue took its place.
    #[must_use]
    pub fn oldest(&self) -> Option<Timestamp> {
        self.entries.values().next().map(|entry| entry.row.queued_at())
    }

    /// Adds a row: behind every other of its chat, or among the scheduled ones. Rows come in the order of their
    /// sequence. What is known of the chat only grows.
    pub fn push(&mut self, row: OutboxRow, standing: Standing) {
        let seq = row.seq;
        let line = self.chats.entry(row.chat).or_default();
        if standing == Standing::Warm && line.standing == Standing::New {
            line.standing = Standing::Warm;
            self.warm_rows += line.queue.len();
        }
        self.deadlines.insert((row.expiry(), seq));
        if let Schedule::At(at) = row.schedule {
            line.scheduled += 1;
            self.due.insert((at, seq));
            self.later.insert(seq, row);
        } else {
            self.line_up(row);
        }
    }

    fn line_up(&mut self, row: OutboxRow) {
        let (seq, chat) = (row.seq, row.chat);
        self.entries.insert(seq, Entry { row, stage: Stage::Waiting });
        let line = self.chats.entry(chat).or_default();
        line.queue.push_back(seq);
        let depth = line.queue.len();
        self.warm_rows += usize::from(line.standing == Standing::Warm);
        match depth {
            1 => self.make_ready(seq, chat),
            2 => drop(self.deep.insert(chat)),
            _ => {}
        }
    }

    fn make_ready(&mut self, seq: MessageSeq, chat: ChatNo) {
        match self.standing(chat) {
            Standing::New => self.ready_new.insert(seq),
            Standing::Warm => self.ready.insert(seq),
        };
    }

    fn is_ready(&self, seq: MessageSeq) -> bool {
        self.ready.contains(&seq) || self.ready_new.contains(&seq)
    }

    fn not_ready(&mut self, seq: MessageSeq) {
        self.ready.remove(&seq);
        self.ready_new.remove(&seq);
    }

    /// Gives scheduled rows that are due, at most `most`, their place behind what waits in their chat now. Gives the
    /// rows as they are to be stored.
    pub fn release_due(&mut self, now: Timestamp, most: usize) -> Vec<OutboxRow> {
        let mut released = Vec::new();
        while let Some((at, seq)) = self.due.first().copied().filter(|(at, _)| *at <= now && released.len() < most) {
            self.due.remove(&(at, seq));
            let Some(mut row) = self.later.remove(&seq) else { continue };
            let line = self.chats.entry(row.chat).or_default();
            line.scheduled = line.scheduled.saturating_sub(1);
            let last = line.queue.back().and_then(|last| self.entries.get(last));
            let (behind, order) = last.map_or((MessageSeq(0), 0), |last| last.row.place());
            row.schedule = Schedule::Joined { at, behind, order: order.saturating_add(1) };
            released.push(row.clone());
            self.line_up(row);
        }
        released
    }

    /// When the next scheduled row is due.
    #[must_use]
    pub fn next_due(&self) -> Option<Timestamp> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Rows to be given up because their time is over, at most `most`. None of them is in flight.
    #[must_use]
    pub fn expired(&self, now: Timestamp, most: usize) -> Vec<MessageSeq> {
        self.deadlines.iter().take_while(|(at, _)| *at <= now).take(most).map(|(_, seq)| *seq).collect()
    }

    /// When the next row expires.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// One row.
    #[must_use]
    pub fn row(&self, seq: MessageSeq) -> Option<&OutboxRow> {
        self.entries.get(&seq).map(|entry| &entry.row).or_else(|| self.later.get(&seq))
    }

    /// How far a row is from the wire.
    #[must_use]
    pub fn position(&self, seq: MessageSeq) -> Option<Position> {
        let row = self.row(seq)?;
        let may_have_left = self.in_flight.contains(&seq) || row.is_doubtful();
        Some(if may_have_left { Position::MayHaveLeft } else { Position::Waiting })
    }

    /// What is known of a chat that has rows here; `New` for others.
    #[must_use]
    pub fn standing(&self, chat: ChatNo) -> Standing {
        self.chats.get(&chat).map_or(Standing::New, |line| line.standing)
    }

    /// The other side of a chat wrote.
    pub fn heard(&mut self, chat: ChatNo) {
        if let Some(line) = self.chats.get_mut(&chat) {
            if line.standing == Standing::New {
                self.warm_rows += line.queue.len();
            }
            line.standing = Standing::Warm;
            if let Some(first) = line.queue.front()
                && self.ready_new.remove(first)
            {
                self.ready.insert(*first);
            }
        }
    }

    /// Whether a new row of this chat would be first in line.
    #[must_use]
    pub fn is_idle(&self, chat: ChatNo) -> bool {
        let free = self.chats.get(&chat).is_none_or(|line| line.queue.is_empty());
        free && self.in_flight.len() < IN_FLIGHT_MAX
    }

    /// Every row of a chat, in flight or not.
    #[must_use]
    pub fn of_chat(&self, chat: ChatNo) -> Vec<MessageSeq> {
        let rows = self.entries.values().map(|entry| &entry.row).chain(self.later.values());
        rows.filter(|row| row.chat == chat).map(|row| row.seq).collect()
    }

    /// Whether an attempt of this row is under way.
    #[must_use]
    pub fn is_in_flight(&self, seq: MessageSeq) -> bool {
        self.in_flight.contains(&seq)
    }

    /// The in-flight row with this WhatsApp id.
    #[must_use]
    pub fn in_flight_with(&self, whatsapp_id: &str) -> Option<MessageSeq> {
        self.in_flight.iter().copied().find(|seq| self.entries[seq].row.whatsapp_id == whatsapp_id)
    }

    /// The ready rows of one lane, oldest first, whatever the window says.
    pub fn lane(&self, standing: Standing) -> impl Iterator<Item = MessageSeq> {
        let lane = if standing == Standing::Warm { &self.ready } else { &self.ready_new };
        lane.iter().copied()
    }

    /// The first row of a chat's queue, if it could go.
    #[must_use]
    pub fn ready_in(&self, chat: ChatNo) -> Option<MessageSeq> {
        let first = self.chats.get(&chat)?.queue.front().copied()?;
        self.is_ready(first).then_some(first)
    }

    /// Rows in a chat's queue that are not in flight.
    #[must_use]
    pub fn waiting_in(&self, chat: ChatNo) -> usize {
        let Some(line) = self.chats.get(&chat) else { return 0 };
        let flying = line.queue.front().is_some_and(|first| self.in_flight.contains(first));
        line.queue.len() - usize::from(flying)
    }

    /// The first row of a chat's queue that is not in flight.
    #[must_use]
    pub fn first_waiting(&self, chat: ChatNo) -> Option<MessageSeq> {
        self.chats.get(&chat)?.queue.iter().copied().find(|seq| !self.in_flight.contains(seq))
    }

    /// Rows in a chat's queue before this one that are not in flight.
    #[must_use]
    pub fn waiting_in_before(&self, chat: ChatNo, row: MessageSeq) -> usize {
        let Some(line) = self.chats.get(&chat) else { return 0 };
        line.queue.iter().take_while(|seq| **seq < row).filter(|seq| !self.in_flight.contains(seq)).count()
    }

    /// Rows of a lane before this one that are not in flight. Looks at every row before it.
    #[must_use]
    pub fn waiting_before(&self, standing: Standing, row: MessageSeq) -> usize {
        let waits = |entry: &&Entry| entry.stage == Stage::Waiting && self.standing(entry.row.chat) == standing;
        self.entries.range(..row).map(|(_, entry)| entry).filter(waits).count()
    }

    /// Rows of a lane in a queue and not in flight.
    #[must_use]
    pub fn waiting_of(&self, standing: Standing) -> usize {
        let flying_new = self.in_flight_new();
        match standing {
            Standing::Warm => self.warm_rows - (self.in_flight.len() - flying_new),
            Standing::New => self.entries.len() - self.warm_rows - flying_new,
        }
    }

    /// How many ready rows to people who never wrote come before this one; all of them without one.
    #[must_use]
    pub fn ready_new_before(&self, seq: Option<MessageSeq>) -> usize {
        seq.map_or(self.ready_new.len(), |seq| self.ready_new.range(..seq).count())
    }

    /// Whether a chat has more than one row in its queue.
    #[must_use]
    pub fn is_deep(&self, chat: ChatNo) -> bool {
        self.deep.contains(&chat)
    }

    /// Chats with more than one row in their queue.
    pub fn deep(&self) -> impl Iterator<Item = ChatNo> {
        self.deep.iter().copied()
    }

    /// Takes a ready row, if the window has room: its attempt is about to be made durable. Gives the row with the
    /// attempt counted.
    pub fn claim(&mut self, seq: MessageSeq) -> Option<OutboxRow> {
        if self.in_flight.len() >= IN_FLIGHT_MAX || !self.is_ready(seq) {
            return None;
        }
        let entry = self.entries.get_mut(&seq)?;
        self.deadlines.remove(&(entry.row.expiry(), seq));
        entry.stage = Stage::Claimed;
        entry.row.attempts = entry.row.attempts.saturating_add(1);
        let row = entry.row.clone();
        self.not_ready(seq);
        self.in_flight.insert(seq);
        Some(row)
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

    /// Whether this attempt is claimed and not yet on the wire.
    #[must_use]
    pub fn is_claimed(&self, seq: MessageSeq, attempts: u16) -> bool {
        self.entries.get(&seq).is_some_and(|entry| entry.stage == Stage::Claimed && entry.row.attempts == attempts)
    }

    /// Back to waiting: the attempt did not settle the message. It stays first of its chat. Gives the row as it is to
    /// be stored.
    pub fn give_back(
        &mut self,
        seq: MessageSeq,
        outcome: Unsettled,
        devices: Devices,
        not_before: Timestamp,
    ) -> Option<OutboxRow> {
        if !self.in_flight.remove(&seq) {
            return None;
        }
        let entry = self.entries.get_mut(&seq)?;
        entry.stage = Stage::Waiting;
        entry.row.not_before = not_before;
        entry.row.devices = devices;
        entry.row.count(outcome);
        self.deadlines.insert((entry.row.expiry(), seq));
        let row = entry.row.clone();
        self.make_ready(seq, row.chat);
        Some(row)
    }

    /// Moves what waits for one moment to another. Gives the rows as they are to be stored.
    pub fn postpone(&mut self, from: Timestamp, to: Timestamp) -> Vec<OutboxRow> {
        let waiting = self.entries.values_mut().filter(|entry| entry.row.not_before == from);
        let moved = waiting.map(|entry| {
            entry.row.not_before = to;
            entry.row.clone()
        });
        moved.collect()
    }

    /// The connection is gone: the outcome of every attempt that was handed over is unknown; all go again under the
    /// same id.
    pub fn give_back_all(&mut self) {
        for seq in self.in_flight.clone() {
            let Some(entry) = self.entries.get(&seq) else { continue };
            let outcome = if entry.stage == Stage::Claimed { Unsettled::NotThrough } else { Unsettled::Unknown };
            self.give_back(seq, outcome, entry.row.devices, Timestamp(0));
        }
    }

    /// Removes a row: WhatsApp has it, or never will. The next of its chat becomes ready.
    pub fn settle(&mut self, seq: MessageSeq) -> Option<OutboxRow> {
        if let Some(row) = self.later.remove(&seq) {
            if let Schedule::At(at) = row.schedule {
                self.due.remove(&(at, seq));
            }
            self.deadlines.remove(&(row.expiry(), seq));
            if let Some(line) = self.chats.get_mut(&row.chat) {
                line.scheduled = line.scheduled.saturating_sub(1);
            }
            self.forget_idle(row.chat);
            return Some(row);
        }
        let row = self.entries.remove(&seq)?.row;
        self.deadlines.remove(&(row.expiry(), seq));
        self.not_ready(seq);
        self.in_flight.remove(&seq);
        if let Some(line) = self.chats.get_mut(&row.chat) {
            let was_first = line.queue.front() == Some(&seq);
            line.queue.retain(|other| *other != seq);
            self.warm_rows -= usize::from(line.standing == Standing::Warm);
            if line.queue.len() == 1 {
                self.deep.remove(&row.chat);
            }
            if let Some(next) = line.queue.front().copied()
                && was_first
            {
                self.make_ready(next, row.chat);
            }
        }
        self.forget_idle(row.chat);
        Some(row)
    }

    fn forget_idle(&mut self, chat: ChatNo) {
        if self.chats.get(&chat).is_some_and(|line| line.queue.is_empty() && line.scheduled == 0) {
            self.chats.remove(&chat);
        }
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
            schedule: Schedule::AtOnce,
            expires_at: Some(Timestamp(1_000_000)),
            answered: 0,
            refusals: 0,
            devices: Devices::AsKnown,
        }
    }

    /// With `Standing::Warm` only those to people who have written.
    fn ready(outbox: &Outbox, to: Standing) -> Vec<u64> {
        let new = outbox.lane(Standing::New).filter(|_| to == Standing::New);
        let mut ready: Vec<_> = outbox.lane(Standing::Warm).chain(new).map(|seq| seq.0).collect();
        ready.sort_unstable();
        ready
    }

    /// Sends whatever may go, one after the other.
    fn send_all(outbox: &mut Outbox) -> Vec<u64> {
        let mut sent = Vec::new();
        while let Some(seq) = ready(outbox, Standing::New).first().copied().map(MessageSeq) {
            outbox.claim(seq).unwrap();
            outbox.settle(seq).unwrap();
            sent.push(seq.0);
        }
        sent
    }

    proptest! {
        /// Whatever fails and is given back: per chat rows leave in order, one at a time, and none is forgotten.
        #[test]
        fn per_chat_order_holds(chats in proptest::collection::vec(0u32..4, 1..40), choices in proptest::collection::vec(any::<u8>(), 400)) {
            let mut outbox = Outbox::default();
            for (seq, chat) in chats.iter().enumerate() {
                outbox.push(row(seq as u64, *chat), Standing::New);
            }
            let mut left: HashMap<u32, Vec<u64>> = HashMap::new();
            let mut flying: Vec<MessageSeq> = Vec::new();
            let mut choices = choices.into_iter().cycle();
            while !outbox.is_empty() {
                let full = outbox.in_flight() >= IN_FLIGHT_MAX;
                if let Some(seq) = ready(&outbox, Standing::New).first().filter(|_| !full).map(|seq| MessageSeq(*seq)) {
                    let seq = &seq;
                    let claimed = outbox.claim(*seq).unwrap();
                    prop_assert!(flying.iter().all(|other| outbox.row(*other).unwrap().chat != claimed.chat));
                    prop_assert!(outbox.on_wire(*seq, claimed.attempts, Timestamp(1)));
                    flying.push(*seq);
                }
                let choice = choices.next().unwrap();
                let index = usize::from(choice) % flying.len();
                let seq = flying.swap_remove(index);
                if choice % 5 == 0 {
                    outbox.give_back(seq, Unsettled::Unknown, Devices::AsKnown, Timestamp(0)).unwrap();
                } else {
                    let row = outbox.settle(seq).unwrap();
                    left.entry(row.chat.0).or_default().push(seq.0);
                }
            }
            for order in left.values() {
                prop_assert!(order.is_sorted());
            }
            prop_assert_eq!(left.values().map(Vec::len).sum::<usize>(), chats.len());
            prop_assert!(outbox.chats.is_empty() && outbox.ready_new.is_empty() && outbox.in_flight.is_empty());
            prop_assert!(outbox.deadlines.is_empty() && outbox.deep.is_empty());
            prop_assert_eq!(outbox.warm_rows, 0);
        }
    }

    #[test]
    fn the_window_is_bounded() {
        let mut outbox = Outbox::restore((0..100).map(|seq| row(seq, u32::try_from(seq).unwrap())), &HashSet::new());
        loop {
            let next = ready(&outbox, Standing::New).first().copied().map(MessageSeq);
            let Some(seq) = next.filter(|seq| outbox.claim(*seq).is_some()) else { break };
            assert!(outbox.is_in_flight(seq));
        }
        assert_eq!(outbox.in_flight(), IN_FLIGHT_MAX);
        outbox.give_back_all();
        assert_eq!(outbox.in_flight(), 0);
        assert_eq!(ready(&outbox, Standing::New).len(), 100);
    }

    #[test]
    fn a_scheduled_row_blocks_nobody_and_joins_behind_what_waits_also_after_a_restart() {
        let mut outbox = Outbox::default();
        outbox.push(OutboxRow { schedule: Schedule::At(Timestamp(500)), ..row(1, 7) }, Standing::New);
        outbox.push(OutboxRow { schedule: Schedule::At(Timestamp(500)), ..row(2, 7) }, Standing::New);
        outbox.push(row(3, 7), Standing::New);
        outbox.push(row(4, 7), Standing::New);
        assert_eq!((outbox.len(), outbox.scheduled(), outbox.next_due()), (4, 2, Some(Timestamp(500))));
        assert_eq!(ready(&outbox, Standing::New), [3], "what is not due blocks nobody");
        assert!(outbox.release_due(Timestamp(499), 10).is_empty(), "never early");
        let mut stored = outbox.release_due(Timestamp(500), 1);
        stored.extend(outbox.release_due(Timestamp(500), 10));
        outbox.push(row(5, 7), Standing::New);
        stored.extend([row(3, 7), row(4, 7), row(5, 7)]);
        stored.sort_by_key(|row| row.seq);
        let mut restored = Outbox::restore(stored, &HashSet::new());
        assert_eq!(send_all(&mut outbox), [3, 4, 1, 2, 5]);
        assert_eq!(send_all(&mut restored), [3, 4, 1, 2, 5]);
        assert!(outbox.is_empty() && outbox.chats.is_empty() && outbox.deadlines.is_empty());
    }

    #[test]
    fn what_may_have_left_expires_later_and_what_is_in_flight_not_at_all() {
        let mut outbox = Outbox::default();
        let deadline = Timestamp(1_000_000);
        outbox.push(row(1, 1), Standing::New);
        outbox.push(row(2, 2), Standing::New);
        assert_eq!(outbox.expired(deadline, 10), [MessageSeq(1), MessageSeq(2)]);
        outbox.claim(MessageSeq(1)).unwrap();
        assert_eq!(outbox.position(MessageSeq(1)), Some(Position::MayHaveLeft));
        assert_eq!(outbox.expired(deadline.after(DOUBT_MAX), 10), [MessageSeq(2)]);
        outbox.on_wire(MessageSeq(1), 1, Timestamp(5));
        outbox.give_back_all();
        assert_eq!(outbox.position(MessageSeq(1)), Some(Position::MayHaveLeft));
        assert_eq!(outbox.expired(deadline, 10), [MessageSeq(2)]);
        assert_eq!(outbox.expired(deadline.after(DOUBT_MAX), 10).len(), 2);
        outbox.claim(MessageSeq(1)).unwrap();
        outbox.give_back_all();
        assert!(outbox.row(MessageSeq(1)).unwrap().is_doubtful(), "the first attempt is still unanswered");
        outbox.claim(MessageSeq(2)).unwrap();
        outbox.give_back_all();
        assert_eq!(outbox.position(MessageSeq(2)), Some(Position::Waiting), "claimed is not handed over");
    }

    #[test]
    fn only_chats_that_were_heard_from_are_ready_during_a_hold() {
        let mut outbox = Outbox::restore([row(1, 1), row(2, 2), row(3, 2)], &HashSet::from([ChatNo(1)]));
        assert_eq!(ready(&outbox, Standing::Warm), [1]);
        assert_eq!(ready(&outbox, Standing::New), [1, 2], "in order across both");
        outbox.heard(ChatNo(2));
        assert_eq!(ready(&outbox, Standing::Warm), [1, 2]);
        outbox.settle(MessageSeq(2)).unwrap();
        assert_eq!(ready(&outbox, Standing::Warm), [1, 3], "the chat stays one that was heard from");
    }

    #[test]
    fn rows_of_the_first_version_are_read() {
        let stored = r#"{"seq":4,"chat":2,"whatsapp_id":"3EB0","to":{"phone":"5511999999999","lid":null},
            "correlation_id":null,"created_at":5,"attempts":1,"not_before":0}"#;
        let row: OutboxRow = serde_json::from_str(stored).unwrap();
        assert_eq!(row.deadline(), Timestamp(5).after(DEADLINE_DEFAULT));
        assert!(row.is_doubtful() && row.schedule == Schedule::AtOnce);
    }
}
