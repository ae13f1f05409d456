//! What the daemon promises, checked from outside: by what reached the platter, the wire, the callers and the
//! endpoints, never by what the machine says of itself. A broken promise panics.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use switchboard::domain::change::{Change, IdempotencyKey};
use switchboard::domain::delivery::Course;
use switchboard::domain::event::{Event, EventBody};
use switchboard::domain::id::{ChatNo, EventSeq, MessageSeq};
use switchboard::domain::lifecycle::{Desired, Life, State};
use switchboard::domain::limiter::{LockAnswer, NewChats};
use switchboard::domain::message::{Content, Direction, MessageRecord, MessageStatus};
use switchboard::domain::number::{CancelOutcome, Transmit};
use switchboard::domain::outbox::Schedule;
use switchboard::domain::phone::Contact;
use switchboard::domain::retention::{Erasure, RELAY_ROWS_KEPT, Removal, Retention, Rules, SEEN_KEPT};
use switchboard::domain::time::Timestamp;

use super::disk::Records;
use super::pacing::Pacing;
use super::people;
use super::subscriptions::Subscriptions;

/// What makes an inbound message the same one, as its sender sees it.
pub(crate) type InboundName = (u64, Direction, String, String);

/// A time in which nothing may connect.
#[derive(Debug, Clone, Copy)]
enum Quiet {
    Until(Timestamp),
    UntilTold,
}

/// A message somebody was promised.
#[derive(Debug)]
struct Accepted {
    whatsapp_id: String,
    person: u64,
    text: String,
}

/// The answer a request id got.
#[derive(Debug, Clone, Copy)]
struct Answered {
    body: [u8; 32],
    seq: MessageSeq,
    at: Timestamp,
}

/// How long a repeated request gets the same answer.
const REPEATABLE: Duration = Duration::from_secs(24 * 3600);
/// New chats are held.
#[derive(Debug, Clone, Copy)]
struct Hold {
    until: u64,
    /// WhatsApp's lock, of which it says more when it is asked.
    lock: bool,
}

const HOUR: u64 = 3_600_000;
const MINUTE: u64 = 60_000;
const WEEK: u64 = 7 * 24 * HOUR;

/// After this moment a message is not sent.
fn deadline(record: &MessageRecord) -> u64 {
    record.expires_at.map_or_else(|| record.send_at.unwrap_or_default().max(record.created_at).0 + WEEK, |at| at.0)
}

/// The ledger.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    accepted: BTreeMap<MessageSeq, Accepted>,
    /// When each was answered first.
    accepted_at: HashMap<MessageSeq, u64>,
    answered: HashMap<IdempotencyKey, Answered>,
    /// What was kept when: since when, until when.
    retentions: Vec<(Timestamp, Option<Timestamp>, Retention)>,
    /// People who were erased.
    forgotten_people: HashSet<u64>,
    /// Inbound messages of people who were erased.
    forgotten: HashSet<InboundName>,
    /// Contacts that were ordered to be erased.
    erasures: Vec<Erasure>,
    /// Settled messages that went.
    gone: BTreeSet<MessageSeq>,
    visible: EventSeq,
    rungs: HashMap<MessageSeq, u8>,
    inbound: HashMap<InboundName, MessageSeq>,
    /// Inbound messages that were told.
    told: HashSet<MessageSeq>,
    chats: HashMap<u64, ChatNo>,
    /// Attempts handed to the session.
    transmitted: HashMap<MessageSeq, u16>,
    first_sent: HashMap<ChatNo, MessageSeq>,
    /// Withdrawn, and answered so; or told to be expired.
    withdrawn: HashSet<MessageSeq>,
    /// Until when nobody who never wrote may be written to: every word on it, in order; the last one counts.
    holds: Vec<Hold>,
    /// People who wrote, as far as the machine was told.
    wrote: HashSet<u64>,
    /// Rows without content: by person, direction and WhatsApp's id.
    placeholders: HashMap<(u64, Direction, String), MessageSeq>,
    flying: HashMap<ChatNo, MessageSeq>,
    /// What people see: by person and WhatsApp's id.
    shown: HashMap<(u64, String), String>,
    pub(crate) repeats: u64,
    pub(crate) transmits: u64,
    pub(crate) hooks: Subscriptions,
    quiet: Option<Quiet>,
    pub(crate) pacing: Pacing,
}

pub(crate) fn rung(status: MessageStatus) -> u8 {
    match status {
        MessageStatus::Queued => 0,
        MessageStatus::Failed | MessageStatus::Cancelled | MessageStatus::Expired => 1,
        MessageStatus::Sent => 2,
        MessageStatus::Delivered => 3,
        MessageStatus::Read => 4,
        MessageStatus::Played => 5,
    }
}

impl Promises {
    // === the disk ===

    /// A unit reaches the platter; `before` is what was there.
    pub(crate) fn flushing(&mut self, changes: &[Change], before: &Records, now: Timestamp) {
        self.hooks.flushing(changes, before);
        self.pacing.flushing(changes);
        let mut events = before.counters.event;
        for change in changes {
            match change {
                Change::Message(record) => self.message_flushed(record, changes, before),
                Change::Filled(record) => self.fill_flushed(record, changes, before),
                Change::Progress(seq, progress) => {
                    let old = before.progress.get(seq).map_or(0, |progress| rung(progress.status));
                    assert!(rung(progress.status) > old, "{seq:?} does not climb: {old} to {:?}", progress.status);
                    if progress.status == MessageStatus::Expired {
                        let due = before.messages.get(seq).map(|record| deadline(record));
                        assert!(due.is_some_and(|due| due <= now.0), "{seq:?} expires before its time");
                        self.withdrawn.insert(*seq);
                    }
                }
                Change::Outbox(row) => {
                    let settled = before.progress.contains_key(&row.seq);
                    assert!(!settled, "{:?} is settled and returns to the outbox", row.seq);
                }
                Change::OutboxGone(seq) => {
                    let settled = changes.iter().any(|other| matches!(other, Change::Progress(of, _) if of == seq));
                    let erased = changes.iter().any(|other| matches!(other, Change::Erase(_)));
                    assert!(
                        settled || erased || before.progress.contains_key(seq),
                        "{seq:?} left the outbox without an outcome"
                    );
                }
                Change::Idempotency(key, _) => {
                    assert!(!before.idempotency.contains_key(key), "a request id was taken twice");
                }
                Change::Chat(chat, contact) => {
                    let person = people::person(contact);
                    let known = *self.chats.entry(person).or_insert(*chat);
                    // That two addresses are one person's is forgotten with them.
                    let forgotten = self.forgotten_people.contains(&person);
                    assert!(forgotten || known == *chat, "person {person} got a second chat");
                }
                Change::Event(event) => {
                    events += 1;
                    assert_eq!(event.id.seq, EventSeq(events), "the event log has a gap");
                    self.event_flushed(event);
                }
                Change::Erase(erasure) => self.erasure_flushed(erasure, before),
                Change::Removed(removal) => self.removal_flushed(removal, changes, before, now),
                Change::Counters(counters) => {
                    let old = before.counters;
                    let back = counters.message < old.message
                        || counters.event < old.event
                        || counters.chat < old.chat
                        || counters.endpoint < old.endpoint;
                    assert!(!back, "a counter went back: {old:?} to {counters:?}");
                }
                _ => {}
            }
        }
        let counted = changes.iter().rev().find_map(|change| match change {
            Change::Counters(counters) => Some(counters.event),
            _ => None,
        });
        assert!(events == before.counters.event || counted == Some(events), "events without their counter");
    }

    fn message_flushed(&mut self, record: &MessageRecord, changes: &[Change], before: &Records) {
        assert!(!before.messages.contains_key(&record.seq), "{:?} was written twice", record.seq);
        let person = Self::person_of(record, changes, before);
        if record.direction != Direction::Outbound {
            let name = (person, record.direction, record.whatsapp_id.clone());
            if record.content == Content::Undecryptable {
                self.placeholders.insert(name, record.seq);
            } else {
                // Somebody erased may have two chats since: nobody knows that their addresses are one person's.
                let beside = self.placeholders.get(&name).filter(|_| !self.forgotten_people.contains(&person));
                assert_eq!(beside, None, "{:?} stands beside the row that waits for its content", record.seq);
            }
            let name = Self::inbound_name(person, record, changes);
            let twice = self.inbound.insert(name, record.seq);
            // It comes again under the other address, which nobody knows to be theirs any more.
            let forgotten = self.forgotten_people.contains(&person);
            assert!(forgotten || twice.is_none(), "inbound {:?} is in the history twice", record.seq);
        }
    }

    fn person_of(record: &MessageRecord, changes: &[Change], before: &Records) -> u64 {
        let in_unit = changes.iter().find_map(|change| match change {
            Change::Chat(chat, contact) if *chat == record.chat => Some(contact),
            _ => None,
        });
        let contact = in_unit.or_else(|| before.chats.get(&record.chat));
        let Some(contact) = contact else { panic!("{:?} is filed in a chat nobody can find", record.seq) };
        people::person(contact)
    }

    /// Also a number that only relays keeps the digest, which here is the text.
    fn inbound_name(person: u64, record: &MessageRecord, changes: &[Change]) -> InboundName {
        // The last one: a row may get its content in the unit that makes it.
        let digest = changes.iter().rev().find_map(|change| match change {
            Change::Seen(key, seq, _) if *seq == record.seq => Some(key.digest),
            _ => None,
        });
        let Some(digest) = digest else { panic!("inbound {:?} is not marked as seen", record.seq) };
        let text = String::from_utf8_lossy(&digest).trim_end_matches('\0').to_owned();
        let text = if record.content == Content::Undecryptable { String::new() } else { text };
        (person, record.direction, record.whatsapp_id.clone(), text)
    }

    fn fill_flushed(&mut self, record: &MessageRecord, changes: &[Change], before: &Records) {
        let in_unit = changes.iter().find_map(|change| match change {
            Change::Message(old) if old.seq == record.seq => Some(old),
            _ => None,
        });
        let old = in_unit.or_else(|| before.messages.get(&record.seq).map(|old| &**old));
        let Some(old) = old else { panic!("{:?} is filled and was never there", record.seq) };
        assert_eq!(old.content, Content::Undecryptable, "{:?} is filled twice", record.seq);
        let same =
            MessageRecord { content: record.content.clone(), sender_name: record.sender_name.clone(), ..old.clone() };
        assert_eq!(same, *record, "{:?} changes in more than its content", record.seq);
        let person = Self::person_of(record, changes, before);
        let name = (person, record.direction, record.whatsapp_id.clone());
        let waited = self.placeholders.remove(&name);
        let forgotten = self.forgotten_people.contains(&person);
        assert!(forgotten || waited == Some(record.seq), "another row than {:?} waits for its content", record.seq);
        let name = Self::inbound_name(person, record, changes);
        let twice = self.inbound.insert(name, record.seq);
        assert!(forgotten || twice.is_none(), "inbound {:?} is in the history twice", record.seq);
    }

    fn event_flushed(&mut self, event: &Event) {
        if let EventBody::Received(body) = &event.body {
            assert!(!body.text.is_empty(), "{:?} is told although nobody can read it", body.message.seq);
            assert!(self.told.insert(body.message.seq), "{:?} is told twice", body.message.seq);
        }
        let EventBody::Outbound(body) = &event.body else { return };
        let told = self.rungs.entry(body.message.seq).or_default();
        assert!(rung(body.status) > *told, "{:?} is told to go from {told} to {:?}", body.message.seq, body.status);
        *told = rung(body.status);
    }

    // === callers ===

    pub(crate) fn accepted(
        &mut self,
        seq: MessageSeq,
        request: Option<(IdempotencyKey, [u8; 32])>,
        text: &str,
        durable: &Records,
        now: Timestamp,
    ) {
        let mut made_at = now;
        if let Some(record) = durable.messages.get(&seq) {
            let body = durable.bodies.get(&seq).map_or(record.content.text(), |body| body.text());
            let settled = record.content == Content::NotKept && !durable.outbox.contains_key(&seq);
            assert!(settled || body == text, "{seq:?} says something else than was asked");
            made_at = record.created_at;
            let erased = self.is_erased(seq, record.chat);
            if let Some(contact) = durable.chats.get(&record.chat).filter(|_| !erased) {
                let (whatsapp_id, person) = (record.whatsapp_id.clone(), people::person(contact));
                self.accepted.insert(seq, Accepted { whatsapp_id, person, text: text.to_owned() });
            }
        } else {
            assert!(self.gone.contains(&seq), "{seq:?} was answered before it was durable");
        }
        self.accepted_at.entry(seq).or_insert(now.0);
        if let Some((key, body)) = request {
            let first = *self.answered.entry(key).or_insert(Answered { body, seq, at: made_at });
            if now.since(first.at) < REPEATABLE {
                assert_eq!((first.body, first.seq), (body, seq), "one request id, two messages");
            } else {
                self.answered.insert(key, Answered { body, seq, at: made_at });
            }
        }
    }

    // === what goes ===

    pub(crate) fn retention_set(&mut self, retention: Retention, now: Timestamp) {
        if let Some((_, until, _)) = self.retentions.last_mut() {
            *until = Some(now);
        }
        self.retentions.push((now, None, retention));
    }

    /// Whether a message was ever outside of what was kept.
    fn may_go(&self, made_at: Timestamp, now: Timestamp) -> bool {
        self.retentions.iter().any(|(from, until, retention)| {
            let age = until.unwrap_or(now).since(made_at);
            match retention {
                Retention::KeepAll => false,
                Retention::KeepDays(days) => age > REPEATABLE * u32::from(*days),
                Retention::RelayOnly => made_at <= *from || age > RELAY_ROWS_KEPT,
            }
        })
    }

    fn removal_flushed(&mut self, removal: &Removal, changes: &[Change], before: &Records, now: Timestamp) {
        match removal {
            Removal::Idempotency(expires_at, key) => {
                let record = &before.idempotency[key];
                assert!(record.expires_at == *expires_at && *expires_at <= now, "a request id is forgotten early");
                assert!(now.since(record.created_at) >= REPEATABLE, "a request id is forgotten early");
            }
            Removal::Seen(at, _) => assert!(now.since(*at) >= SEEN_KEPT, "an inbound digest is forgotten early"),
            Removal::Message { seq, .. } => {
                let Some(record) = before.messages.get(seq) else { panic!("{seq:?} goes twice") };
                let erased = self.is_erased(*seq, record.chat);
                assert!(erased || self.may_go(record.created_at, now), "{seq:?} goes while it is to be kept");
                assert!(!before.outbox.contains_key(seq), "{seq:?} goes unsettled");
                self.gone.insert(*seq);
                self.placeholders.retain(|_, waiting| waiting != seq);
                if let Some(accepted) = self.accepted.remove(seq)
                    && !erased
                {
                    self.check(*seq, &accepted, before);
                }
            }
            Removal::Chat(chat) => {
                let gone = |seq: &MessageSeq| {
                    let it = |change: &Change| matches!(change, Change::Removed(Removal::Message { seq: of, .. }) if of == seq);
                    changes.iter().any(it)
                };
                let left = before.messages.values().find(|record| record.chat == *chat && !gone(&record.seq));
                assert!(left.is_none(), "{chat:?} goes and has messages");
            }
            Removal::Contact(chat, aliases) => {
                assert!(self.erasures.iter().any(|erasure| erasure.chat == *chat), "{chat:?} goes and nobody asked");
                assert_eq!(before.aliases_of(*chat), *aliases, "an address of somebody erased still leads to {chat:?}");
                // Its row may be gone for having been empty.
                let filed = || self.chats.iter().find(|(_, known)| *known == chat).map(|(person, _)| *person);
                let Some(person) = before.chats.get(chat).map(people::person).or_else(filed) else {
                    assert!(!aliases.is_empty(), "{chat:?} goes twice");
                    return;
                };
                if self.chats.get(&person) == Some(chat) {
                    self.chats.remove(&person);
                } else {
                    assert!(self.forgotten_people.contains(&person), "person {person} had a second chat");
                }
                self.forgotten_people.insert(person);
                // Whatever comes again after this is new.
                let (gone, kept) =
                    std::mem::take(&mut self.inbound).into_iter().partition(|((of, ..), _)| *of == person);
                self.inbound = kept;
                let gone: HashMap<InboundName, MessageSeq> = gone;
                self.forgotten.extend(gone.into_keys());
            }
            Removal::EventBody(seq, ..) => {
                let event = &before.events[seq];
                let asked = |erasure: &Erasure| event.chat() == Some(erasure.chat) && *seq <= erasure.events_through;
                assert!(self.erasures.iter().any(asked), "{seq:?} is emptied and nobody asked");
            }
            Removal::Event(seq) => {
                // A replay may come too late for what it was to send.
                let queued = before.deliveries.iter().find(|((endpoint, _), row)| {
                    row.event == *seq && row.course != Course::Replay && before.endpoints.contains_key(endpoint)
                });
                assert_eq!(queued, None, "{seq:?} goes while an endpoint waits for it");
                assert!(seq.0 <= before.counters.event_floor, "{seq:?} goes while it is part of the log");
            }
            Removal::Delivery(endpoint, _) | Removal::EndpointState(endpoint) => {
                assert!(!before.endpoints.contains_key(endpoint), "a row of a living endpoint {endpoint} goes");
            }
            Removal::DeadLetter(..) | Removal::Attempt(..) => {}
        }
    }

    fn erasure_flushed(&mut self, erasure: &Erasure, before: &Records) {
        self.erasures.push(*erasure);
        // What was promised of them is withdrawn.
        let of_chat = |seq: &MessageSeq| before.messages.get(seq).is_some_and(|record| record.chat == erasure.chat);
        self.accepted.retain(|seq, _| *seq > erasure.through || !of_chat(seq));
        // A row of theirs is not filled any more.
        self.placeholders.retain(|_, seq| *seq > erasure.through || !of_chat(seq));
    }

    fn is_erased(&self, seq: MessageSeq, chat: ChatNo) -> bool {
        self.erasures.iter().any(|erasure| erasure.chat == chat && seq <= erasure.through)
    }

    pub(crate) fn was_erased(&self, chat: ChatNo) -> bool {
        self.erasures.iter().any(|erasure| erasure.chat == chat)
    }

    /// What is left of somebody who was erased.
    pub(crate) fn left_of_erased(&self, records: &Records) -> Option<String> {
        let message = records.messages.values().find(|record| self.is_erased(record.seq, record.chat));
        let event = records.events.values().find(|event| {
            let asked =
                |erasure: &Erasure| event.chat() == Some(erasure.chat) && event.id.seq <= erasure.events_through;
            self.erasures.iter().any(asked)
        });
        let order = records.erasures.keys().next();
        let found = [
            message.map(|record| format!("message {:?} of somebody erased", record.seq)),
            event.map(|event| format!("event {:?} of somebody erased", event.id.seq)),
            order.map(|chat| format!("the order to erase {chat:?}")),
        ];
        found.into_iter().flatten().next()
    }

    /// A reader of the stream is told that its cursor is too old.
    pub(crate) fn cursor_expired(&self, position: EventSeq, floor: EventSeq) {
        assert!(floor > position, "an expired cursor that is not");
    }

    pub(crate) fn visible_events(&self) -> EventSeq {
        self.visible
    }

    /// What should have gone, if anything is left of it. Sweeps have had their time since `margin`.
    pub(crate) fn left_over(records: &Records, rules: &Rules, now: Timestamp, margin: Duration) -> Option<String> {
        let then = Timestamp(now.0.saturating_sub(u64::try_from(margin.as_millis()).unwrap_or(0)));
        let relayed = records.counters.relays_since.unwrap_or(MessageSeq(0));
        let old_message = records.messages.values().find(|record| {
            let old = record.seq <= relayed || record.created_at < rules.messages_before(then);
            old && !records.outbox.contains_key(&record.seq)
        });
        let old_event = records.events.values().find(|event| {
            let seq = event.id.seq;
            let queued = records.deliveries.values().any(|row| row.event == seq);
            let dead = records.dead.keys().any(|(_, event)| *event == seq);
            event.at < rules.events_before(then) && !queued && !dead
        });
        let old_request = records.idempotency.values().find(|record| record.expires_at < then);
        let old_dead = records.dead.values().find(|dead| dead.row.queued_at < rules.dead_letters_before(then));
        let orphan = records.deliveries.keys().find(|(endpoint, _)| !records.endpoints.contains_key(endpoint));
        let old_seen = records.seen_times.keys().find(|(at, _)| then.since(*at) > SEEN_KEPT);
        let body = records.bodies.keys().find(|seq| !records.outbox.contains_key(seq));
        let found = [
            old_message.map(|record| format!("message {:?}", record.seq)),
            old_event.map(|event| format!("event {:?}", event.id.seq)),
            old_request.map(|record| format!("the request id of {:?}", record.seq)),
            old_dead.map(|dead| format!("dead letter {:?}", dead.row.event)),
            orphan.map(|row| format!("orphan {row:?}")),
            old_seen.map(|row| format!("digest {row:?}")),
            body.map(|seq| format!("the text of {seq:?}")),
        ];
        found.into_iter().flatten().next()
    }

    /// One of the messages accepted lately.
    pub(crate) fn some_accepted(&self, draw: u64) -> Option<MessageSeq> {
        let recent = self.accepted.len().min(30);
        let back = usize::try_from(draw).unwrap_or(0).checked_rem(recent)?;
        self.accepted.keys().rev().nth(back).copied()
    }

    pub(crate) fn cancelled(&mut self, seq: MessageSeq, outcome: CancelOutcome, durable: &Records) {
        let status = durable.progress.get(&seq).map(|progress| progress.status);
        if self.gone.contains(&seq) {
            return;
        }
        match outcome {
            CancelOutcome::Cancelled => {
                assert_eq!(status, Some(MessageStatus::Cancelled), "{seq:?} was answered before it was durable");
                self.withdrawn.insert(seq);
            }
            CancelOutcome::NotFound => panic!("{seq:?} was accepted and is not found"),
            CancelOutcome::InFlight => {}
            CancelOutcome::AlreadySent => {
                assert!(status.is_some_and(|status| rung(status) >= 2), "{seq:?}: {status:?}");
            }
            CancelOutcome::AlreadyFailed | CancelOutcome::AlreadyExpired => {
                assert!(status.is_some_and(|status| rung(status) >= 1), "{seq:?}: {status:?}");
            }
        }
    }

    pub(crate) fn inbound_acknowledged(&self, name: &InboundName) {
        let known = self.inbound.contains_key(name) || self.forgotten.contains(name);
        assert!(known, "inbound {name:?} was acknowledged before it was durable");
    }

    // === the wire ===

    /// The machine orders these changes to be written.
    pub(crate) fn claiming(&mut self, changes: &[Change], paused: bool, now: u64) {
        for change in changes {
            if let Change::Outbox(row) = change {
                let warm = self.wrote.contains(&people::person(&row.to));
                self.pacing.claiming(row, warm, paused, now);
            }
        }
    }

    /// WhatsApp's answer to an attempt reaches the machine.
    pub(crate) fn answer_told(&mut self, error: Option<u16>, now: u64) {
        let lock = error == Some(463);
        if lock || error == Some(475) {
            let until = now + 24 * HOUR;
            let known = self.holds.last().is_some_and(|hold| hold.lock == lock && hold.until > now);
            if !known && self.holds.last().is_none_or(|hold| hold.until <= until) {
                self.holds.push(Hold { until, lock });
            }
        }
    }

    /// WhatsApp's word on its lock reaches the machine.
    pub(crate) fn lock_told(&mut self, answer: LockAnswer, now: u64) {
        if self.holds.last().is_some_and(|hold| hold.lock && hold.until > now) {
            let until = match answer {
                LockAnswer::Until(at) => at.0.max(now + MINUTE),
                LockAnswer::Open => now + 24 * HOUR,
                LockAnswer::None => now + HOUR,
            };
            self.holds.push(Hold { until, lock: true });
        }
    }

    pub(crate) fn somebody_wrote(&mut self, person: u64) {
        self.wrote.insert(person);
    }

    /// A message reaches WhatsApp.
    pub(crate) fn not_withdrawn(&self, seq: MessageSeq) {
        assert!(!self.withdrawn.contains(&seq), "{seq:?} reaches WhatsApp after it was withdrawn or expired");
    }

    fn in_time(&self, record: &MessageRecord, to: &Contact, now: u64) {
        let seq = record.seq;
        self.not_withdrawn(seq);
        assert!(record.send_at.is_none_or(|at| at.0 <= now), "{seq:?} is transmitted before its time");
        assert!(now < deadline(record), "{seq:?} is transmitted after its deadline");
        let hold = self.holds.last().filter(|hold| now < hold.until && !self.wrote.contains(&people::person(to)));
        assert!(hold.is_none(), "{seq:?} opens a chat during a hold: {hold:?}");
    }

    /// Sends of one chat leave in the order of acceptance; a scheduled one behind what waited when it was due.
    fn in_order(&mut self, record: &MessageRecord, durable: &Records) {
        let seq = record.seq;
        let Some(at) = record.send_at.filter(|at| *at > record.created_at) else {
            let last = self.first_sent.insert(record.chat, seq);
            assert!(last < Some(seq), "{seq:?} follows {last:?} in one chat");
            return;
        };
        let rows = durable.outbox.values().filter(|row| row.chat == record.chat && row.schedule == Schedule::AtOnce);
        let overtaken = rows
            .filter(|row| {
                self.accepted_at.get(&row.seq).is_some_and(|answered| *answered < at.0)
                    && !self.transmitted.contains_key(&row.seq)
            })
            .map(|row| row.seq)
            .next();
        assert_eq!(overtaken, None, "{seq:?} was scheduled and overtakes in {:?}", record.chat);
    }

    pub(crate) fn transmitting(&mut self, transmit: &Transmit, life: &Life, durable: &Records, now: u64) {
        let seq = transmit.seq;
        assert!(life.state.is_connected(), "{seq:?} is transmitted while the number is not online");
        let Some(row) = durable.outbox.get(&seq) else { panic!("{seq:?} is transmitted without a durable row") };
        let sent = self.transmitted.entry(seq).or_default();
        *sent += 1;
        assert!(*sent <= row.attempts, "{seq:?}: transmission {sent}, but {} attempts are durable", row.attempts);
        assert_eq!((&row.whatsapp_id, &row.to), (&transmit.whatsapp_id, &transmit.to), "{seq:?} changed its name");
        let first = *sent == 1;
        self.repeats += u64::from(!first);
        let record = &durable.messages[&seq];
        self.in_time(record, &transmit.to, now);
        if first {
            self.in_order(record, durable);
        }
        let other = self.flying.insert(row.chat, seq);
        assert_eq!(other, None, "{seq:?} leaves while its chat has one in flight");
        assert!(self.flying.len() <= switchboard::domain::outbox::IN_FLIGHT_MAX, "too many in flight");
        self.transmits += 1;
    }

    /// An attempt ended, as far as the machine has been told. Gives whether it was under way.
    pub(crate) fn landed(&mut self, seq: MessageSeq, visible: &Records) -> bool {
        let chat = visible.messages.get(&seq).map(|record| record.chat);
        let flying = chat.filter(|chat| self.flying.get(chat) == Some(&seq));
        flying.is_some_and(|chat| self.flying.remove(&chat).is_some())
    }

    /// Every attempt ended: the connection is gone.
    pub(crate) fn all_landed(&mut self) {
        self.flying.clear();
    }

    /// A person's phone gets a message. Gives whether it shows: the first time only.
    pub(crate) fn arrived_at_phone(&mut self, transmit: &Transmit, text: &str) -> bool {
        let name = (people::person(&transmit.to), transmit.whatsapp_id.clone());
        match self.shown.get(&name) {
            Some(first) => {
                assert_eq!(first, text, "{:?} was repeated with another text", transmit.seq);
                false
            }
            None => {
                self.shown.insert(name, text.to_owned());
                true
            }
        }
    }

    pub(crate) fn events_visible(&mut self, seq: EventSeq, durable: &Records) {
        self.visible = self.visible.max(seq);
        assert!(durable.counters.event >= seq.0, "{seq:?} is shown to streams before it is durable");
    }

    // === connecting ===

    pub(crate) fn state_changed(&mut self, to: State) {
        self.quiet = match to {
            State::Parked { until } => Some(Quiet::Until(until)),
            State::LoggedOut | State::Replaced | State::Stopped | State::Unlinked => Some(Quiet::UntilTold),
            _ => None,
        };
    }

    /// The operator's word ends a quiet time.
    pub(crate) fn told(&mut self) {
        self.quiet = None;
    }

    pub(crate) fn asking_the_gate(&self, now: Timestamp) {
        match self.quiet {
            None => {}
            Some(Quiet::Until(until)) => assert!(now >= until, "asks the gate before {until}"),
            Some(Quiet::UntilTold) => panic!("asks the gate although nobody said so"),
        }
    }

    // === ends ===

    /// The process is gone; what the next one knows is on disk.
    pub(crate) fn crashed(&mut self, durable: &Records) {
        self.visible = EventSeq(durable.counters.event);
        self.flying.clear();
        self.hooks.crashed(durable);
        // A word that had not reached the disk is forgotten; the one before it counts again.
        match durable.limiter.new_chats {
            NewChats::Held { until, .. } => {
                while self.holds.last().is_some_and(|hold| hold.until != until.0) {
                    self.holds.pop();
                }
                assert!(!self.holds.is_empty(), "the hold on disk is none that was told");
            }
            NewChats::Allowed | NewChats::Probing => self.holds.clear(),
        }
        let wrote = self.inbound.keys().filter(|(_, direction, ..)| *direction == Direction::Inbound);
        self.wrote = wrote.map(|(person, ..)| *person).collect();
        match &durable.life {
            Some(life) if life.desired == Desired::Stopped => self.state_changed(State::Stopped),
            // Credentials may be on disk although the phone's consent is not noted yet.
            Some(life) if life.state != State::Linking => self.state_changed(life.state),
            _ => self.quiet = None,
        }
    }

    /// After the storm, with everything answered: nothing is owed to anybody.
    pub(crate) fn all_kept(&self, durable: &Records) {
        self.hooks.all_kept(durable);
        for (seq, accepted) in &self.accepted {
            self.check(*seq, accepted, durable);
        }
    }

    fn check(&self, seq: MessageSeq, accepted: &Accepted, durable: &Records) {
        let failed = durable.progress.get(&seq).is_some_and(|progress| rung(progress.status) == 1);
        let text = self.shown.get(&(accepted.person, accepted.whatsapp_id.clone()));
        assert!(failed || text.is_some(), "{seq:?} was accepted and is neither shown nor failed");
        assert!(text.is_none_or(|text| *text == accepted.text), "{seq:?} shows another text");
    }
}
