//! What the store's looks for old rows find, and a reader of the event stream that comes and goes.

use std::collections::BTreeSet;

use switchboard::domain::delivery::Course;
use switchboard::domain::id::{ChatNo, EventSeq, MessageSeq};
use switchboard::domain::message::Direction;
use switchboard::domain::number::Input;
use switchboard::domain::retention::{Found, Removal, Retention, SWEEP_ROWS, Sweep};

use super::disk::Records;
use super::world::World;

fn gone(removals: Vec<Removal>, next: Option<Sweep>) -> Found {
    Found { removals, next, aged: None }
}

impl Records {
    /// As the store's `find`.
    pub(crate) fn find(&self, sweep: Sweep) -> Found {
        match sweep {
            Sweep::Idempotency(until) => {
                let mut old: Vec<_> = self.idempotency.iter().map(|(key, record)| (record.expires_at, *key)).collect();
                old.retain(|(expires_at, _)| *expires_at <= until);
                old.sort();
                old.truncate(SWEEP_ROWS);
                let next = (old.len() == SWEEP_ROWS).then_some(Sweep::Idempotency(until));
                gone(old.into_iter().map(|(at, key)| Removal::Idempotency(at, key)).collect(), next)
            }
            Sweep::Seen(before) => {
                let old = self.seen_times.keys().take_while(|(at, _)| *at < before).take(SWEEP_ROWS);
                let removals: Vec<_> = old.map(|(at, hash)| Removal::Seen(*at, *hash)).collect();
                let next = (removals.len() == SWEEP_ROWS).then_some(Sweep::Seen(before));
                gone(removals, next)
            }
            Sweep::ErasedMessages { erasure, after } => {
                let rows = self.messages.range(MessageSeq(after.0 + 1)..=erasure.through.max(MessageSeq(after.0 + 1)));
                let rows = rows.filter(|(seq, record)| **seq <= erasure.through && record.chat == erasure.chat);
                let rows: Vec<_> = rows.take(SWEEP_ROWS).map(|(_, record)| record.clone()).collect();
                let next = rows.last().filter(|_| rows.len() == SWEEP_ROWS);
                let next = next.map(|last| Sweep::ErasedMessages { erasure, after: last.seq });
                let removal = |record: &std::rc::Rc<switchboard::domain::message::MessageRecord>| {
                    let outbound = record.direction == Direction::Outbound;
                    let whatsapp_id = outbound.then(|| record.whatsapp_id.clone());
                    Removal::Message { seq: record.seq, chat: record.chat, whatsapp_id, correlation_id: None }
                };
                gone(rows.iter().map(removal).collect(), next)
            }
            Sweep::ErasedEvents { erasure, after } => {
                let rows: Vec<_> = self.events.range(EventSeq(after.0 + 1)..).take(SWEEP_ROWS).collect();
                let named = rows.iter().filter(|(seq, _)| **seq <= erasure.events_through);
                let named = named.filter(|(_, event)| event.chat() == Some(erasure.chat));
                let removals = named.map(|(seq, event)| Removal::EventBody(**seq, event.at, event.kind())).collect();
                let last = rows.last().map(|(seq, _)| **seq).filter(|seq| *seq < erasure.events_through);
                let next = last.filter(|_| rows.len() == SWEEP_ROWS);
                gone(removals, next.map(|after| Sweep::ErasedEvents { erasure, after }))
            }
            Sweep::ErasedContact(erasure) => {
                let left = self.messages.values().any(|record| record.chat == erasure.chat);
                let aliases = self.aliases_of(erasure.chat);
                let known = !aliases.is_empty() || self.chats.contains_key(&erasure.chat);
                let removal = (known && !left).then_some(Removal::Contact(erasure.chat, aliases));
                gone(removal.into_iter().collect(), None)
            }
            Sweep::Messages { after, through, before } => {
                let rows = self.messages.range(MessageSeq(after.0 + 1)..).map(|(_, record)| record);
                let old = rows.take_while(|record| record.seq <= through || record.created_at < before);
                let old: Vec<_> = old.take(SWEEP_ROWS).collect();
                let next = old.last().filter(|_| old.len() == SWEEP_ROWS);
                let next = next.map(|last| Sweep::Messages { after: last.seq, through, before });
                let mut removals = Vec::new();
                for record in &old {
                    let outbound = record.direction == Direction::Outbound;
                    let whatsapp_id = outbound.then(|| record.whatsapp_id.clone());
                    let (seq, chat) = (record.seq, record.chat);
                    removals.push(Removal::Message { seq, chat, whatsapp_id, correlation_id: None });
                }
                let chats: BTreeSet<ChatNo> = old.iter().map(|record| record.chat).collect();
                let last = |chat| old.iter().filter(|record| record.chat == chat).map(|record| record.seq).max();
                let first = |chat| old.iter().find(|record| record.chat == chat).map(|record| record.seq);
                let of_chat =
                    |chat| self.messages.values().filter(move |record| record.chat == chat).map(|record| record.seq);
                let emptied =
                    |chat: &ChatNo| of_chat(*chat).max() <= last(*chat) && of_chat(*chat).min() >= first(*chat);
                removals.extend(chats.into_iter().filter(emptied).map(Removal::Chat));
                gone(removals, next)
            }
            Sweep::EventAge { after, before } => {
                let rows = self.events.range(EventSeq(after.0 + 1)..).map(|(_, event)| event);
                let old: Vec<_> = rows.take_while(|event| event.at < before).take(SWEEP_ROWS).collect();
                let aged = old.last().map_or(after, |event| event.id.seq);
                let next = (old.len() == SWEEP_ROWS).then_some(Sweep::EventAge { after: aged, before });
                Found { removals: Vec::new(), next, aged: Some(aged) }
            }
            Sweep::Events { after, through, dead_letters_hold, endpoints } => {
                let rows = self.events.range(EventSeq(after.0 + 1)..=through.max(EventSeq(after.0 + 1)));
                let old: Vec<EventSeq> =
                    rows.map(|(seq, _)| *seq).filter(|seq| *seq <= through).take(SWEEP_ROWS).collect();
                let last = old.last().copied().unwrap_or_default();
                let held = |endpoint: &u32| {
                    let rows = self.queued(*endpoint).take_while(|row| row.course != Course::Live || row.event <= last);
                    rows.map(|row| row.event).collect::<BTreeSet<EventSeq>>()
                };
                let held: BTreeSet<EventSeq> = endpoints.iter().flat_map(held).collect();
                let needed = |seq: &EventSeq| {
                    let queued = |_: &u32| held.contains(seq);
                    let dead = |endpoint: &u32| dead_letters_hold && self.dead.contains_key(&(*endpoint, *seq));
                    endpoints.iter().any(|endpoint| queued(endpoint) || dead(endpoint))
                };
                let removals = old.iter().filter(|seq| !needed(seq)).map(|seq| Removal::Event(*seq)).collect();
                let next = old.last().filter(|_| old.len() == SWEEP_ROWS).copied();
                gone(removals, next.map(|after| Sweep::Events { after, through, dead_letters_hold, endpoints }))
            }
            Sweep::DeadLetters { endpoint, after, before } => {
                let rows = self.dead.range((endpoint, EventSeq(after.0 + 1))..=(endpoint, EventSeq(u64::MAX)));
                let rows: Vec<_> = rows.take(SWEEP_ROWS).map(|(_, dead)| dead.row).collect();
                let young = rows.last().is_some_and(|row| row.queued_at >= before);
                let old = rows.iter().filter(|row| row.queued_at < before);
                let removals = old.map(|row| Removal::DeadLetter(endpoint, row.event)).collect();
                let next = rows.last().filter(|_| rows.len() == SWEEP_ROWS && !young);
                let next = next.map(|row| Sweep::DeadLetters { endpoint, after: row.event, before });
                gone(removals, next)
            }
            // Attempts are not kept here.
            Sweep::Attempts { .. } => gone(Vec::new(), None),
            Sweep::Orphans { living, through } => {
                let orphan = |endpoint: &u32| *endpoint <= through && !living.contains(endpoint);
                let queued = self.deliveries.keys().filter(|(endpoint, _)| orphan(endpoint));
                let queued = queued.map(|(endpoint, event)| Removal::Delivery(*endpoint, *event));
                let dead = self.dead.keys().filter(|(endpoint, _)| orphan(endpoint));
                let dead = dead.map(|(endpoint, event)| Removal::DeadLetter(*endpoint, *event));
                let states = self.endpoint_states.keys().filter(|endpoint| orphan(endpoint));
                let states = states.map(|endpoint| Removal::EndpointState(*endpoint));
                let removals: Vec<_> = queued.chain(dead).chain(states).take(SWEEP_ROWS).collect();
                let next = (removals.len() == SWEEP_ROWS).then_some(Sweep::Orphans { living, through });
                gone(removals, next)
            }
        }
    }
}

/// A reader of the stream: it reads now and then, and goes on from its cursor.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    position: EventSeq,
}

impl World {
    /// The owner changes what is kept: on disk at once, and then the machine is told.
    pub(crate) fn change_retention(&mut self) {
        let modes = [Retention::KeepAll, Retention::KeepDays(1), Retention::KeepDays(3), Retention::RelayOnly];
        let retention = self.rng.pick(&modes);
        self.plan.rules.retention = retention;
        self.promises.retention_set(retention, switchboard::domain::time::Timestamp(self.now));
        self.step(Input::Retention(retention));
    }

    /// Somebody asks to be forgotten.
    pub(crate) fn erase_somebody(&mut self) {
        let person = self.rng.below(self.plan.people);
        let chat = self.disk.visible.chat_of(&super::people::contact(person, super::people::Known::Phone));
        if let Some(chat) = chat.filter(|_| self.number.is_some()) {
            let reply = self.reply_id();
            self.waiters.insert(reply, super::callers::Waiter::Erase(chat));
            self.step(Input::Erase(chat, reply));
        }
    }

    /// The reader gets a page, as the API gives it: what is durable and part of the log, or word that its cursor is too old.
    pub(crate) fn read_stream(&mut self) {
        let visible = self.promises.visible_events();
        let floor = self.event_floor;
        if self.reader.position < floor {
            self.promises.cursor_expired(self.reader.position, floor);
            self.reader.position = floor;
        }
        let page = self.disk.visible.events.range(EventSeq(self.reader.position.0 + 1)..);
        let page: Vec<EventSeq> = page.map(|(seq, _)| *seq).take_while(|seq| *seq <= visible).take(20).collect();
        for seq in page {
            assert_eq!(seq.0, self.reader.position.0 + 1, "the stream has a gap that nobody was told of");
            self.reader.position = seq;
        }
    }
}
