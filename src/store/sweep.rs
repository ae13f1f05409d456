//! Finding what is too old, and how its removal is written. Every look is one range of at most a batch of rows, from
//! its oldest end; nothing is found by going through everything.

use std::collections::{BTreeMap, BTreeSet};

use super::error::StoreError;
use super::key::Tag;
use super::number_store::{NumberStore, Order, SCAN_ROWS_MAX};
use super::records::{decode, encode, pair_key, time_key, word};
use super::unit::Unit;
use crate::domain::change::{AliasHash, IdempotencyKey, SeenHash};
use crate::domain::delivery::{Course, DEAD_LETTERS_MAX, DeliveryRow};
use crate::domain::endpoint::DeliverySeq;
use crate::domain::event::{Event, EventBody};
use crate::domain::id::{ChatNo, EventId, EventSeq, MessageSeq};
use crate::domain::message::{Direction, MessageRecord};
use crate::domain::retention::{Erasure, Found, Removal, SWEEP_ROWS, Sweep};
use crate::domain::time::Timestamp;

const NOTHING: Found = Found { removals: Vec::new(), next: None, aged: None };

fn gone(removals: Vec<Removal>, next: Option<Sweep>) -> Found {
    Found { removals, next, aged: None }
}

fn corrupt(what: &str) -> StoreError {
    StoreError::Corrupt(what.to_owned())
}

/// A key of a time and a hash.
fn timed(key: &[u8]) -> Result<(Timestamp, [u8; 16]), StoreError> {
    let (at, hash) = key.split_at_checked(8).ok_or_else(|| corrupt("time key"))?;
    Ok((Timestamp(word(at)?), hash.try_into().map_err(|_| corrupt("time key"))?))
}

/// A key of an ordinal and a sequence.
fn pair(key: &[u8]) -> Result<(u32, u64), StoreError> {
    let (first, second) = key.split_at_checked(4).ok_or_else(|| corrupt("pair key"))?;
    let first = first.try_into().map(u32::from_be_bytes).map_err(|_| corrupt("pair key"))?;
    Ok((first, word(second.get(..8).ok_or_else(|| corrupt("pair key"))?)?))
}

/// The ordinal in which a key begins.
fn ordinal(key: &[u8]) -> Result<u32, StoreError> {
    let bytes = key.get(..4).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u32::from_be_bytes).ok_or_else(|| corrupt("ordinal"))
}

impl NumberStore {
    /// Looks for rows that may go.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn find(&self, sweep: Sweep) -> Result<Found, StoreError> {
        match sweep {
            Sweep::Idempotency(until) => {
                let keys = self.timed_before(Tag::IdempotencyExpiry, Timestamp(until.0.saturating_add(1))).await?;
                let next = (keys.len() == SWEEP_ROWS).then_some(Sweep::Idempotency(until));
                let row = |(at, key)| Removal::Idempotency(at, IdempotencyKey(key));
                Ok(gone(keys.into_iter().map(row).collect(), next))
            }
            Sweep::Seen(before) => {
                let keys = self.timed_before(Tag::SeenTime, before).await?;
                let next = (keys.len() == SWEEP_ROWS).then_some(Sweep::Seen(before));
                Ok(gone(keys.into_iter().map(|(at, hash)| Removal::Seen(at, SeenHash(hash))).collect(), next))
            }
            Sweep::ErasedMessages { erasure, after } => self.erased_messages(erasure, after).await,
            Sweep::ErasedEvents { erasure, after } => self.erased_events(erasure, after).await,
            Sweep::ErasedContact(erasure) => self.erased_contact(erasure).await,
            Sweep::Messages { after, through, before } => self.old_messages(after, through, before).await,
            Sweep::EventAge { after, before } => self.event_age(after, before).await,
            Sweep::Events { after, through, dead_letters_hold, endpoints } => {
                self.unneeded_events(after, through, dead_letters_hold, endpoints).await
            }
            Sweep::DeadLetters { endpoint, after, before } => self.old_dead_letters(endpoint, after, before).await,
            Sweep::Attempts { endpoint, before, keep } => self.old_attempts(endpoint, before, keep).await,
            Sweep::Orphans { living, through } => self.orphans(living, through).await,
        }
    }

    /// The oldest keys of an index by time that lie before a moment.
    async fn timed_before(&self, tag: Tag, before: Timestamp) -> Result<Vec<(Timestamp, [u8; 16])>, StoreError> {
        let mut found = Vec::new();
        for key in self.keys(tag, &[], None, Order::Ascending, (0, SWEEP_ROWS)).await? {
            let (at, name) = timed(&key)?;
            if at >= before {
                break;
            }
            found.push((at, name));
        }
        Ok(found)
    }

    async fn old_messages(
        &self,
        after: MessageSeq,
        through: MessageSeq,
        before: Timestamp,
    ) -> Result<Found, StoreError> {
        // Most looks find nothing: the oldest row alone says so.
        let oldest = self.history_after(after, 1).await?;
        if oldest.first().is_none_or(|record| record.seq > through && record.created_at >= before) {
            return Ok(NOTHING);
        }
        let rows = self.history_after(after, SWEEP_ROWS).await?;
        let full = rows.len() == SWEEP_ROWS;
        let mut old = Vec::with_capacity(rows.len());
        for record in rows {
            if record.seq > through && record.created_at >= before {
                break;
            }
            old.push(record);
        }
        let next = old.last().filter(|_| full && old.len() == SWEEP_ROWS);
        let next = next.map(|last| Sweep::Messages { after: last.seq, through, before });
        let mut removals: Vec<Removal> = old.iter().map(message_removal).collect();
        removals.extend(self.emptied_chats(&old).await?);
        Ok(gone(removals, next))
    }

    async fn erased_messages(&self, erasure: Erasure, after: MessageSeq) -> Result<Found, StoreError> {
        let chat = erasure.chat.0;
        let from = pair_key(chat, after.0);
        let prefix = chat.to_be_bytes();
        let keys = self.keys(Tag::ChatMessage, &prefix, Some(&from), Order::Ascending, (0, SWEEP_ROWS)).await?;
        let mut removals = Vec::with_capacity(keys.len());
        let mut next = None;
        for key in &keys {
            let seq = MessageSeq(pair(key)?.1);
            if seq > erasure.through {
                return Ok(gone(removals, None));
            }
            removals.push(match self.message(seq).await? {
                Some(record) => message_removal(&record),
                None => Removal::Message { seq, chat: erasure.chat, whatsapp_id: None, correlation_id: None },
            });
            next = (keys.len() == SWEEP_ROWS).then_some(Sweep::ErasedMessages { erasure, after: seq });
        }
        Ok(gone(removals, next))
    }

    async fn erased_events(&self, erasure: Erasure, after: EventSeq) -> Result<Found, StoreError> {
        let events = self.events(after, SWEEP_ROWS).await?;
        let named = events.iter().filter(|event| event.id.seq <= erasure.events_through);
        let named = named.filter(|event| event.chat() == Some(erasure.chat));
        let removals = named.map(|event| Removal::EventBody(event.id.seq, event.at, event.kind())).collect();
        let last = events.last().map(|event| event.id.seq).filter(|seq| *seq < erasure.events_through);
        let next = last.filter(|_| events.len() == SWEEP_ROWS);
        Ok(gone(removals, next.map(|after| Sweep::ErasedEvents { erasure, after })))
    }

    /// Nothing to remove when they have written again since.
    async fn erased_contact(&self, erasure: Erasure) -> Result<Found, StoreError> {
        let left = self.keys(Tag::ChatMessage, &erasure.chat.0.to_be_bytes(), None, Order::Ascending, (0, 1)).await?;
        if !left.is_empty() {
            return Ok(gone(Vec::new(), None));
        }
        let aliases = self.aliases(erasure.chat).await?;
        let known = !aliases.is_empty() || self.contact(erasure.chat).await?.is_some();
        Ok(gone(known.then_some(Removal::Contact(erasure.chat, aliases)).into_iter().collect(), None))
    }

    /// Every address that leads to a chat. Read through all of them: it is done for one contact that is erased, and its
    /// record may know fewer.
    async fn aliases(&self, chat: ChatNo) -> Result<Vec<AliasHash>, StoreError> {
        let mut found = Vec::new();
        let mut from: Option<Vec<u8>> = None;
        loop {
            let page = self.scan(Tag::ChatAlias, &[], from.as_deref(), Order::Ascending, SCAN_ROWS_MAX).await?;
            let of_chat = page.iter().filter(|(_, value)| *value == chat.0.to_be_bytes());
            let hashes = of_chat.map(|(key, _)| key.as_slice().try_into().map(AliasHash));
            for hash in hashes {
                found.push(hash.map_err(|_| StoreError::Corrupt("alias".to_owned()))?);
            }
            from = page.last().map(|(key, _)| key.clone());
            if page.len() < SCAN_ROWS_MAX {
                return Ok(found);
            }
        }
    }

    async fn history_after(&self, after: MessageSeq, limit: usize) -> Result<Vec<MessageRecord>, StoreError> {
        let rows = self.scan(Tag::Message, &[], Some(&after.0.to_be_bytes()), Order::Ascending, limit).await?;
        rows.iter().map(|(_, value)| decode(value)).collect()
    }

    /// The chats that have no message but these.
    async fn emptied_chats(&self, going: &[MessageRecord]) -> Result<Vec<Removal>, StoreError> {
        let mut spans: BTreeMap<ChatNo, (MessageSeq, MessageSeq)> = BTreeMap::new();
        for record in going {
            spans.entry(record.chat).or_insert((record.seq, record.seq)).1 = record.seq;
        }
        let mut emptied = Vec::new();
        for (chat, (first, last)) in spans {
            let prefix = chat.0.to_be_bytes();
            let newest = self.keys(Tag::ChatMessage, &prefix, None, Order::Descending, (0, 1)).await?;
            // An older one may have stayed because it is not settled.
            let oldest = self.keys(Tag::ChatMessage, &prefix, None, Order::Ascending, (0, 1)).await?;
            let mut left = false;
            for key in newest.iter().chain(&oldest) {
                let seq = pair(key)?.1;
                left |= seq < first.0 || seq > last.0;
            }
            if !left {
                emptied.push(Removal::Chat(chat));
            }
        }
        Ok(emptied)
    }

    async fn event_age(&self, after: EventSeq, before: Timestamp) -> Result<Found, StoreError> {
        let mut aged = after;
        let oldest = self.events(after, 1).await?;
        if oldest.first().is_none_or(|event| event.at >= before) {
            return Ok(Found { aged: Some(aged), ..NOTHING });
        }
        let events = self.events(after, SWEEP_ROWS).await?;
        let full = events.len() == SWEEP_ROWS;
        for event in &events {
            if event.at >= before {
                return Ok(Found { aged: Some(aged), ..NOTHING });
            }
            aged = event.id.seq;
        }
        let next = full.then_some(Sweep::EventAge { after: aged, before });
        Ok(Found { aged: Some(aged), next, ..NOTHING })
    }

    async fn unneeded_events(
        &self,
        after: EventSeq,
        through: EventSeq,
        dead_letters_hold: bool,
        endpoints: Vec<u32>,
    ) -> Result<Found, StoreError> {
        let from = after.0.to_be_bytes();
        let keys = self.keys(Tag::Event, &[], Some(&from), Order::Ascending, (0, SWEEP_ROWS)).await?;
        let full = keys.len() == SWEEP_ROWS;
        let mut old = Vec::with_capacity(keys.len());
        for key in &keys {
            old.push(word(key)?);
        }
        old.retain(|seq| *seq <= through.0);
        let Some((first, last)) = old.first().copied().zip(old.last().copied()) else { return Ok(NOTHING) };
        let mut needed = BTreeSet::new();
        // The queues before the dead letters: what moves meanwhile moves that way.
        let held = [(Tag::Delivery, true), (Tag::DeadLetter, dead_letters_hold)];
        for (tag, _) in held.into_iter().filter(|(_, holds)| *holds) {
            for endpoint in &endpoints {
                needed.extend(match tag {
                    Tag::Delivery => self.queued_events(*endpoint, first, last).await?,
                    _ => self.named_events(tag, *endpoint, first, last).await?,
                });
            }
        }
        let next = (full && old.len() == keys.len()).then_some(Sweep::Events {
            after: EventSeq(last),
            through,
            dead_letters_hold,
            endpoints,
        });
        let unneeded = old.into_iter().filter(|seq| !needed.contains(seq));
        Ok(gone(unneeded.map(|seq| Removal::Event(EventSeq(seq))).collect(), next))
    }

    /// Which events from `first` to `last` an endpoint's rows of a family name. No more than there are events.
    async fn named_events(&self, tag: Tag, endpoint: u32, first: u64, last: u64) -> Result<Vec<u64>, StoreError> {
        let prefix = endpoint.to_be_bytes();
        let from = pair_key(endpoint, first.saturating_sub(1));
        let mut named = Vec::new();
        let mut from = (first > 0).then_some(from);
        loop {
            let keys = self.keys(tag, &prefix, from.as_deref(), Order::Ascending, (0, SWEEP_ROWS)).await?;
            for key in &keys {
                let (_, seq) = pair(key)?;
                if seq > last {
                    return Ok(named);
                }
                named.push(seq);
            }
            if keys.len() < SWEEP_ROWS {
                return Ok(named);
            }
            from = keys.last().cloned();
        }
    }

    /// Which events from `first` to `last` wait in an endpoint's queue. Late ones lie in front, live ones in the order of
    /// their events; a replay that lies behind is known to the number's machine.
    async fn queued_events(&self, endpoint: u32, first: u64, last: u64) -> Result<Vec<u64>, StoreError> {
        let mut queued = Vec::new();
        let mut after = DeliverySeq(0);
        loop {
            let rows = self.deliveries(endpoint, after, SWEEP_ROWS).await?;
            for row in &rows {
                if row.course == Course::Live && row.event.0 > last {
                    return Ok(queued);
                }
                if row.event.0 >= first && row.event.0 <= last {
                    queued.push(row.event.0);
                }
                after = row.sequence;
            }
            if rows.len() < SWEEP_ROWS {
                return Ok(queued);
            }
        }
    }

    async fn old_dead_letters(&self, endpoint: u32, after: EventSeq, before: Timestamp) -> Result<Found, StoreError> {
        let from = pair_key(endpoint, after.0);
        let prefix = endpoint.to_be_bytes();
        let rows = self.scan(Tag::DeadLetter, &prefix, Some(&from), Order::Ascending, SWEEP_ROWS).await?;
        let mut removals = Vec::new();
        let mut young = false;
        for (_, value) in &rows {
            let row: DeliveryRow = decode(value)?;
            // They lie in the order of their events, which is nearly that of their age.
            young = row.queued_at >= before;
            if !young {
                removals.push(Removal::DeadLetter(endpoint, row.event));
            }
        }
        if removals.is_empty() {
            let from = (DEAD_LETTERS_MAX, SWEEP_ROWS);
            let beyond = self.keys(Tag::DeadLetter, &prefix, None, Order::Descending, from).await?;
            let next = (beyond.len() == SWEEP_ROWS).then_some(Sweep::DeadLetters { endpoint, after, before });
            for key in beyond {
                removals.push(Removal::DeadLetter(endpoint, EventSeq(pair(&key)?.1)));
            }
            return Ok(gone(removals, next));
        }
        let last = rows.last().filter(|_| rows.len() == SWEEP_ROWS && !young);
        let next = match last {
            Some((key, _)) => Some(Sweep::DeadLetters { endpoint, after: EventSeq(pair(key)?.1), before }),
            None => None,
        };
        Ok(gone(removals, next))
    }

    async fn old_attempts(&self, endpoint: u32, before: Timestamp, keep: Option<u32>) -> Result<Found, StoreError> {
        let prefix = endpoint.to_be_bytes();
        let keys = self.keys(Tag::Attempt, &prefix, None, Order::Ascending, (0, SWEEP_ROWS)).await?;
        let mut removals = Vec::new();
        for key in keys {
            let (_, at) = pair(&key)?;
            if at >= before.0 {
                break;
            }
            removals.push(Removal::Attempt(endpoint, key));
        }
        let again = Sweep::Attempts { endpoint, before, keep };
        if removals.len() == SWEEP_ROWS {
            return Ok(gone(removals, Some(again)));
        }
        let Some(keep) = keep.filter(|_| removals.is_empty()) else {
            let next = keep.is_some().then_some(again);
            return Ok(gone(removals, next));
        };
        let keep = usize::try_from(keep).unwrap_or(usize::MAX);
        let beyond = self.keys(Tag::Attempt, &prefix, None, Order::Descending, (keep, SWEEP_ROWS)).await?;
        let next = (beyond.len() == SWEEP_ROWS).then_some(again);
        Ok(gone(beyond.into_iter().map(|key| Removal::Attempt(endpoint, key)).collect(), next))
    }

    async fn orphans(&self, living: Vec<u32>, through: u32) -> Result<Found, StoreError> {
        let mut removals = Vec::new();
        for tag in [Tag::Delivery, Tag::DeadLetter, Tag::Attempt, Tag::EndpointState] {
            let mut from: Option<Vec<u8>> = None;
            while removals.len() < SWEEP_ROWS {
                let room = SWEEP_ROWS - removals.len();
                let keys = self.keys(tag, &[], from.as_deref(), Order::Ascending, (0, room)).await?;
                let Some(first) = keys.first() else { break };
                let endpoint = ordinal(first)?;
                if endpoint > through {
                    break;
                }
                if living.contains(&endpoint) {
                    // Behind everything of this endpoint.
                    from = Some([endpoint.to_be_bytes().as_slice(), &[u8::MAX; 32]].concat());
                    continue;
                }
                from = None;
                for key in &keys {
                    let of = ordinal(key)?;
                    if of != endpoint {
                        from = Some([endpoint.to_be_bytes().as_slice(), &[u8::MAX; 32]].concat());
                        break;
                    }
                    removals.push(match tag {
                        Tag::Delivery => Removal::Delivery(of, DeliverySeq(pair(key)?.1)),
                        Tag::DeadLetter => Removal::DeadLetter(of, EventSeq(pair(key)?.1)),
                        Tag::EndpointState => Removal::EndpointState(of),
                        _ => Removal::Attempt(of, key.clone()),
                    });
                    from = Some(key.clone());
                }
            }
        }
        let next = (removals.len() >= SWEEP_ROWS).then_some(Sweep::Orphans { living, through });
        Ok(gone(removals, next))
    }

    pub(super) fn order_erasure(erasure: Erasure, unit: &mut Unit) {
        unit.put(Tag::Erasure, erasure.chat.0.to_be_bytes(), encode(&erasure));
    }

    pub(super) fn end_erasure(chat: ChatNo, unit: &mut Unit) {
        unit.delete(Tag::Erasure, chat.0.to_be_bytes());
    }

    pub(super) fn remove(&self, removal: Removal, unit: &mut Unit) {
        match removal {
            Removal::Idempotency(expires_at, key) => {
                unit.delete(Tag::Idempotency, key.0).delete(Tag::IdempotencyExpiry, time_key(expires_at, &key.0));
            }
            Removal::Seen(at, hash) => {
                unit.delete(Tag::Seen, hash.0).delete(Tag::SeenTime, time_key(at, &hash.0));
            }
            Removal::Message { seq, chat, whatsapp_id, correlation_id } => {
                unit.delete(Tag::Message, seq.0.to_be_bytes());
                unit.delete(Tag::ChatMessage, pair_key(chat.0, seq.0));
                // A newer message with the same reference is then found by its other names only.
                if let Some(reference) = correlation_id {
                    unit.delete(Tag::CorrelationId, self.hashed("reference", reference.as_bytes()));
                }
                if let Some(whatsapp_id) = whatsapp_id {
                    unit.delete(Tag::WhatsappId, self.hashed("out", whatsapp_id.as_bytes()));
                    unit.delete(Tag::Progress, seq.0.to_be_bytes());
                }
            }
            Removal::Chat(chat) => {
                unit.delete(Tag::Chat, chat.0.to_be_bytes());
            }
            Removal::Contact(chat, aliases) => {
                for alias in aliases {
                    unit.delete(Tag::ChatAlias, alias.0);
                }
                unit.delete(Tag::Chat, chat.0.to_be_bytes()).delete(Tag::ChatHeard, chat.0.to_be_bytes());
            }
            Removal::EventBody(seq, at, kind) => {
                let id = EventId { number: self.number(), seq };
                let emptied = Event { id, at, body: EventBody::Erased(kind) };
                unit.put(Tag::Event, seq.0.to_be_bytes(), encode(&emptied));
            }
            Removal::Event(seq) => {
                unit.delete(Tag::Event, seq.0.to_be_bytes());
            }
            Removal::Delivery(endpoint, sequence) => {
                unit.delete(Tag::Delivery, pair_key(endpoint, sequence.0));
            }
            Removal::DeadLetter(endpoint, event) => {
                unit.delete(Tag::DeadLetter, pair_key(endpoint, event.0));
            }
            Removal::Attempt(_, key) => {
                unit.delete(Tag::Attempt, key);
            }
            Removal::EndpointState(endpoint) => {
                unit.delete(Tag::EndpointState, endpoint.to_be_bytes());
            }
        }
    }
}

fn message_removal(record: &MessageRecord) -> Removal {
    let outbound = record.direction == Direction::Outbound;
    let whatsapp_id = outbound.then(|| record.whatsapp_id.clone());
    Removal::Message { seq: record.seq, chat: record.chat, whatsapp_id, correlation_id: record.correlation_id.clone() }
}
