//! A disk as the store promises it: units in the order they were submitted, written in groups, all or nothing each.
//! A crash keeps a prefix of what was not flushed. Keeps two copies: what readers see, and what survives.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::rc::Rc;

use switchboard::domain::change::{AliasHash, Change, Counters, IdempotencyKey, IdempotencyRecord, SeenHash, SeenKey};
use switchboard::domain::delivery::{DeadLetter, DeliveryRow, StoredEndpoint};
use switchboard::domain::endpoint::{DeliverySeq, Endpoint, EndpointState};
use switchboard::domain::event::{Event, EventBody};
use switchboard::domain::id::{ChatNo, EventId, EventSeq, MessageSeq};
use switchboard::domain::lifecycle::Life;
use switchboard::domain::limiter::{ChatPace, LimiterRecord};
use switchboard::domain::message::{Content, Direction, MessageRecord, PLACEHOLDER_DIGEST, Progress};
use switchboard::domain::number::{Commit, Snapshot, Ticket};
use switchboard::domain::orders::SendingOrders;
use switchboard::domain::outbox::{OutboxRow, Standing};
use switchboard::domain::phone::Contact;
use switchboard::domain::retention::{Erasure, Removal, Rules};
use switchboard::domain::time::Timestamp;

use super::world::NUMBER;

/// The records of one number.
#[derive(Debug, Default)]
pub(crate) struct Records {
    pub(crate) life: Option<Life>,
    pub(crate) counters: Counters,
    pub(crate) messages: BTreeMap<MessageSeq, Rc<MessageRecord>>,
    pub(crate) whatsapp_ids: HashMap<String, MessageSeq>,
    pub(crate) progress: HashMap<MessageSeq, Progress>,
    pub(crate) outbox: BTreeMap<MessageSeq, OutboxRow>,
    pub(crate) idempotency: HashMap<IdempotencyKey, IdempotencyRecord>,
    pub(crate) chats: HashMap<ChatNo, Contact>,
    pub(crate) aliases: HashMap<String, ChatNo>,
    pub(crate) heard: HashSet<ChatNo>,
    pub(crate) seen: HashMap<SeenKey, MessageSeq>,
    pub(crate) limiter: LimiterRecord,
    pub(crate) paces: BTreeMap<ChatNo, ChatPace>,
    pub(crate) events: BTreeMap<EventSeq, Rc<Event>>,
    pub(crate) deliveries: BTreeMap<(u32, DeliverySeq), DeliveryRow>,
    pub(crate) erasures: BTreeMap<ChatNo, Erasure>,
    pub(crate) bodies: BTreeMap<MessageSeq, Content>,
    pub(crate) seen_times: BTreeMap<(Timestamp, SeenHash), SeenKey>,
    pub(crate) dead: BTreeMap<(u32, EventSeq), DeadLetter>,
    pub(crate) endpoints: BTreeMap<u32, Endpoint>,
    pub(crate) endpoint_states: BTreeMap<u32, EndpointState>,
}

impl Records {
    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Message(record) | Change::Filled(record) => {
                if record.direction == Direction::Outbound {
                    self.whatsapp_ids.insert(record.whatsapp_id.clone(), record.seq);
                }
                self.messages.insert(record.seq, Rc::new(record.clone()));
            }
            Change::Progress(seq, progress) => drop(self.progress.insert(*seq, *progress)),
            Change::Outbox(row) => drop(self.outbox.insert(row.seq, row.clone())),
            Change::Body(seq, content) => drop(self.bodies.insert(*seq, content.clone())),
            Change::OutboxGone(seq) => {
                self.outbox.remove(seq);
                self.bodies.remove(seq);
            }
            Change::Idempotency(key, record) => drop(self.idempotency.insert(*key, record.clone())),
            Change::Chat(chat, contact) => {
                for address in contact.addresses() {
                    self.aliases.insert(address, *chat);
                }
                self.chats.insert(*chat, contact.clone());
            }
            Change::Heard(chat) => drop(self.heard.insert(*chat)),
            Change::Seen(key, seq, at) => {
                self.seen.insert(key.clone(), *seq);
                self.seen_times.insert((*at, seen_hash(key)), key.clone());
            }
            Change::Event(event) => drop(self.events.insert(event.id.seq, Rc::new(event.clone()))),
            Change::Delivery(endpoint, row) => drop(self.deliveries.insert((*endpoint, row.sequence), *row)),
            Change::DeliveryGone(endpoint, sequence) => drop(self.deliveries.remove(&(*endpoint, *sequence))),
            Change::DeadLetter(endpoint, dead) => drop(self.dead.insert((*endpoint, dead.row.event), *dead)),
            Change::DeadLetterGone(endpoint, event) => drop(self.dead.remove(&(*endpoint, *event))),
            Change::Attempt(_) => {}
            Change::Endpoint(endpoint) => drop(self.endpoints.insert(endpoint.ordinal, endpoint.clone())),
            Change::EndpointState(ordinal, state) => drop(self.endpoint_states.insert(*ordinal, *state)),
            Change::EndpointGone(ordinal) => drop(self.endpoints.remove(ordinal)),
            Change::Counters(counters) => self.counters = *counters,
            Change::Life(life) => self.life = Some(life.clone()),
            Change::Removed(removal) => self.remove(removal),
            Change::Limiter(record) => self.limiter = *record,
            Change::ChatPace(chat, pace) => drop(self.paces.insert(*chat, *pace)),
            Change::ChatPaceGone(chat) => drop(self.paces.remove(chat)),
            Change::Erase(erasure) => drop(self.erasures.insert(erasure.chat, *erasure)),
            Change::Erased(chat) => drop(self.erasures.remove(chat)),
        }
    }

    /// Makes what `change` touched what `other` holds.
    fn revert(&mut self, change: &Change, other: &Self) {
        match change {
            Change::Message(record) | Change::Filled(record) => {
                back_sorted(&mut self.messages, &other.messages, &record.seq);
                back(&mut self.whatsapp_ids, &other.whatsapp_ids, &record.whatsapp_id);
            }
            Change::Progress(seq, _) => back(&mut self.progress, &other.progress, seq),
            Change::Outbox(OutboxRow { seq, .. }) | Change::OutboxGone(seq) => {
                back_sorted(&mut self.outbox, &other.outbox, seq);
                back_sorted(&mut self.bodies, &other.bodies, seq);
            }
            Change::Body(seq, _) => back_sorted(&mut self.bodies, &other.bodies, seq),
            Change::Idempotency(key, _) => back(&mut self.idempotency, &other.idempotency, key),
            Change::Chat(chat, contact) => {
                for address in contact.addresses() {
                    back(&mut self.aliases, &other.aliases, &address);
                }
                back(&mut self.chats, &other.chats, chat);
            }
            Change::Heard(chat) => {
                if !other.heard.contains(chat) {
                    self.heard.remove(chat);
                }
            }
            Change::Seen(key, _, at) => self.revert_seen(key, *at, other),
            Change::Event(event) => back_sorted(&mut self.events, &other.events, &event.id.seq),
            Change::Delivery(endpoint, DeliveryRow { sequence, .. }) | Change::DeliveryGone(endpoint, sequence) => {
                back_sorted(&mut self.deliveries, &other.deliveries, &(*endpoint, *sequence));
            }
            Change::DeadLetter(endpoint, DeadLetter { row: DeliveryRow { event, .. }, .. })
            | Change::DeadLetterGone(endpoint, event) => {
                back_sorted(&mut self.dead, &other.dead, &(*endpoint, *event));
            }
            Change::Attempt(_) => {}
            Change::EndpointState(ordinal, _) => {
                back_sorted(&mut self.endpoint_states, &other.endpoint_states, ordinal);
            }
            Change::Endpoint(Endpoint { ordinal, .. }) | Change::EndpointGone(ordinal) => {
                back_sorted(&mut self.endpoints, &other.endpoints, ordinal);
            }
            Change::Counters(_) => self.counters = other.counters,
            Change::Life(_) => self.life.clone_from(&other.life),
            Change::Limiter(_) => self.limiter = other.limiter,
            Change::ChatPace(chat, _) | Change::ChatPaceGone(chat) => back_sorted(&mut self.paces, &other.paces, chat),
            Change::Removed(removal) => self.revert_removal(removal, other),
            Change::Erase(Erasure { chat, .. }) | Change::Erased(chat) => {
                back_sorted(&mut self.erasures, &other.erasures, chat);
            }
        }
    }

    fn revert_seen(&mut self, key: &SeenKey, at: Timestamp, other: &Self) {
        back(&mut self.seen, &other.seen, key);
        back_sorted(&mut self.seen_times, &other.seen_times, &(at, seen_hash(key)));
    }

    fn remove(&mut self, removal: &Removal) {
        match removal {
            Removal::Idempotency(_, key) => drop(self.idempotency.remove(key)),
            Removal::Seen(at, hash) => {
                if let Some(key) = self.seen_times.remove(&(*at, *hash)) {
                    self.seen.remove(&key);
                }
            }
            Removal::Message { seq, whatsapp_id, .. } => {
                self.messages.remove(seq);
                if let Some(whatsapp_id) = whatsapp_id {
                    self.whatsapp_ids.remove(whatsapp_id);
                    self.progress.remove(seq);
                }
            }
            Removal::Chat(chat) => drop(self.chats.remove(chat)),
            Removal::Contact(chat, aliases) => {
                self.aliases.retain(|address, _| !aliases.contains(&alias_hash(address)));
                self.chats.remove(chat);
                self.heard.remove(chat);
            }
            Removal::EventBody(seq, at, kind) => {
                let id = EventId { number: NUMBER, seq: *seq };
                let emptied = Event { id, at: *at, body: EventBody::Erased(*kind) };
                self.events.insert(*seq, Rc::new(emptied));
            }
            Removal::Event(seq) => drop(self.events.remove(seq)),
            Removal::Delivery(endpoint, event) => drop(self.deliveries.remove(&(*endpoint, *event))),
            Removal::DeadLetter(endpoint, event) => drop(self.dead.remove(&(*endpoint, *event))),
            Removal::Attempt(..) => {}
            Removal::EndpointState(ordinal) => drop(self.endpoint_states.remove(ordinal)),
        }
    }

    fn revert_removal(&mut self, removal: &Removal, other: &Self) {
        match removal {
            Removal::Idempotency(_, key) => back(&mut self.idempotency, &other.idempotency, key),
            Removal::Seen(at, hash) => {
                if let Some(key) = other.seen_times.get(&(*at, *hash)) {
                    self.revert_seen(&key.clone(), *at, other);
                }
            }
            Removal::Message { seq, whatsapp_id, .. } => {
                back_sorted(&mut self.messages, &other.messages, seq);
                if let Some(whatsapp_id) = whatsapp_id {
                    back(&mut self.whatsapp_ids, &other.whatsapp_ids, whatsapp_id);
                    back(&mut self.progress, &other.progress, seq);
                }
            }
            Removal::Chat(chat) => back(&mut self.chats, &other.chats, chat),
            Removal::Contact(chat, aliases) => {
                let removed = other.aliases.iter().filter(|(address, _)| aliases.contains(&alias_hash(address)));
                self.aliases.extend(removed.map(|(address, chat)| (address.clone(), *chat)));
                back(&mut self.chats, &other.chats, chat);
                if other.heard.contains(chat) {
                    self.heard.insert(*chat);
                }
            }
            Removal::EventBody(seq, ..) | Removal::Event(seq) => back_sorted(&mut self.events, &other.events, seq),
            Removal::Delivery(endpoint, event) => {
                back_sorted(&mut self.deliveries, &other.deliveries, &(*endpoint, *event));
            }
            Removal::DeadLetter(endpoint, event) => back_sorted(&mut self.dead, &other.dead, &(*endpoint, *event)),
            Removal::Attempt(..) => {}
            Removal::EndpointState(ordinal) => back_sorted(&mut self.endpoint_states, &other.endpoint_states, ordinal),
        }
    }

    pub(crate) fn chat_of(&self, contact: &Contact) -> Option<ChatNo> {
        contact.addresses().iter().find_map(|address| self.aliases.get(address).copied())
    }

    /// Every address that leads to a chat.
    pub(crate) fn aliases_of(&self, chat: ChatNo) -> Vec<AliasHash> {
        let of_chat = self.aliases.iter().filter(|(_, known)| **known == chat);
        let mut hashes: Vec<_> = of_chat.map(|(address, _)| alias_hash(address)).collect();
        hashes.sort();
        hashes
    }

    pub(crate) fn standing(&self, chat: Option<ChatNo>) -> Standing {
        if chat.is_some_and(|chat| self.heard.contains(&chat)) { Standing::Warm } else { Standing::New }
    }

    /// The row of an inbound message that still has no content.
    pub(crate) fn placeholder(&self, key: SeenKey) -> Option<MessageRecord> {
        let seq = self.seen.get(&SeenKey { digest: PLACEHOLDER_DIGEST, ..key })?;
        let record = self.messages.get(seq)?;
        (record.content == Content::Undecryptable).then(|| MessageRecord::clone(record))
    }

    /// As the store's `load`.
    pub(crate) fn snapshot(&self, has_credentials: bool, rules: Rules) -> Snapshot {
        let endpoints = self.endpoints.values().map(|stored| StoredEndpoint {
            endpoint: stored.clone(),
            state: self.endpoint_states.get(&stored.ordinal).copied(),
            queued: self.queued(stored.ordinal).count() as u64,
        });
        Snapshot {
            life: self.life.clone(),
            has_credentials,
            counters: self.counters,
            outbox: self.outbox.values().cloned().collect(),
            warm: self.outbox.values().map(|row| row.chat).filter(|chat| self.heard.contains(chat)).collect(),
            limiter: self.limiter,
            paces: self.paces.iter().map(|(chat, pace)| (*chat, *pace)).collect(),
            orders: SendingOrders::default(),
            endpoints: endpoints.collect(),
            rules,
            erasures: self.erasures.values().copied().collect(),
        }
    }

    pub(crate) fn queued(&self, ordinal: u32) -> impl Iterator<Item = &DeliveryRow> {
        self.deliveries.range((ordinal, DeliverySeq(0))..=(ordinal, DeliverySeq(u64::MAX))).map(|(_, row)| row)
    }

    pub(crate) fn dead_of(&self, ordinal: u32) -> impl Iterator<Item = &DeadLetter> {
        self.dead.range((ordinal, EventSeq(0))..=(ordinal, EventSeq(u64::MAX))).map(|(_, dead)| dead)
    }
}

/// Stands for the store's keyed hash.
fn hash(of: &impl std::hash::Hash) -> [u8; 16] {
    let mut hasher = std::hash::DefaultHasher::new();
    of.hash(&mut hasher);
    u128::from(std::hash::Hasher::finish(&hasher)).to_be_bytes()
}

pub(crate) fn seen_hash(key: &SeenKey) -> SeenHash {
    SeenHash(hash(key))
}

pub(crate) fn alias_hash(address: &str) -> AliasHash {
    AliasHash(hash(&address))
}

fn back<K: Clone + Eq + std::hash::Hash, V: Clone>(map: &mut HashMap<K, V>, other: &HashMap<K, V>, key: &K) {
    match other.get(key) {
        Some(value) => drop(map.insert(key.clone(), value.clone())),
        None => drop(map.remove(key)),
    }
}

fn back_sorted<K: Clone + Ord, V: Clone>(map: &mut BTreeMap<K, V>, other: &BTreeMap<K, V>, key: &K) {
    match other.get(key) {
        Some(value) => drop(map.insert(key.clone(), value.clone())),
        None => drop(map.remove(key)),
    }
}

/// The disk. The world says when a group is taken and when it is flushed.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    /// What readers see: everything applied, flushed or not.
    pub(crate) visible: Records,
    /// What survives a crash for certain.
    pub(crate) durable: Records,
    queue: VecDeque<Commit>,
    /// Applied, not flushed.
    applied: VecDeque<Vec<Change>>,
    answers: Vec<(Ticket, bool)>,
    /// Commits whose answer has not reached the machine.
    unanswered: u64,
    /// Credentials live beside the number's own records and are durable at once.
    pub(crate) has_credentials: bool,
}

impl Disk {
    pub(crate) fn submit(&mut self, commit: Commit) {
        self.unanswered += 1;
        self.queue.push_back(commit);
    }

    /// The machine hears of a commit.
    pub(crate) fn answered(&mut self) {
        self.unanswered -= 1;
    }

    /// Nothing waits to be written.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.answers.is_empty()
    }

    /// Every commit is answered: the machine and the disk know the same.
    pub(crate) fn agrees(&self) -> bool {
        self.unanswered == 0
    }

    /// Writes the next group. Gives whether it must be flushed before its answers.
    pub(crate) fn write_group(&mut self, most: u64) -> bool {
        let mut durable = false;
        for _ in 0..most.min(1 << 20) {
            let Some(commit) = self.queue.pop_front() else { break };
            durable |= commit.durable;
            let ticket = commit.ticket;
            let written = self.write(commit);
            self.answers.push((ticket, written));
        }
        durable
    }

    fn write(&mut self, commit: Commit) -> bool {
        if commit.unless_known.is_some_and(|key| self.visible.idempotency.contains_key(&key)) {
            return false;
        }
        for change in &commit.changes {
            self.visible.apply(change);
        }
        self.applied.push_back(commit.changes);
        true
    }

    /// The next unit that reaches the platter, while there is one.
    pub(crate) fn next_unflushed(&mut self) -> Option<Vec<Change>> {
        self.applied.pop_front()
    }

    pub(crate) fn answers(&mut self) -> Vec<(Ticket, bool)> {
        std::mem::take(&mut self.answers)
    }

    /// How many units are not flushed.
    pub(crate) fn unflushed(&self) -> usize {
        self.applied.len()
    }

    /// Takes over everything submitted, as when only the number's task died.
    pub(crate) fn write_all(&mut self) {
        self.write_group(u64::MAX);
    }

    /// Forgets whatever was not flushed.
    pub(crate) fn lose(&mut self) {
        self.unanswered = 0;
        self.queue.clear();
        self.answers.clear();
        for changes in std::mem::take(&mut self.applied) {
            for change in &changes {
                self.visible.revert(change, &self.durable);
            }
        }
    }
}
