//! How each record of a number is written and found again. Values are JSON behind the store's form byte: they
//! name their fields, so a later version reads an older one's.

use std::collections::HashSet;
use std::ops::RangeInclusive;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::StoreError;
use super::key::Tag;
use super::number_store::{NumberStore, Order, SCAN_ROWS_MAX};
use super::unit::{Check, Durability, Unit};
use super::webhooks;
use crate::domain::change::{Change, Counters, IdempotencyKey, IdempotencyRecord, SeenKey};
use crate::domain::event::Event;
use crate::domain::id::{ChatNo, EventSeq, MessageSeq};
use crate::domain::message::{Content, Direction, MessageRecord, PLACEHOLDER_DIGEST, Progress};
use crate::domain::number::{Commit, Snapshot};
use crate::domain::orders::SendingOrders;
use crate::domain::outbox::{OutboxRow, Standing};
use crate::domain::phone::Contact;
use crate::domain::retention::Rules;
use crate::domain::time::Timestamp;

pub(super) fn encode(record: &impl Serialize) -> Vec<u8> {
    // Records are plain data with string keys: serialising them cannot fail.
    serde_json::to_vec(record).unwrap_or_default()
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::Corrupt(error.to_string()))
}

pub(super) fn word(bytes: &[u8]) -> Result<u64, StoreError> {
    bytes.try_into().map(u64::from_be_bytes).map_err(|_| StoreError::Corrupt("sequence".to_owned()))
}

fn chat_no(bytes: &[u8]) -> Result<ChatNo, StoreError> {
    let no = bytes.try_into().map_err(|_| StoreError::Corrupt("chat".to_owned()))?;
    Ok(ChatNo(u32::from_be_bytes(no)))
}

pub(super) fn pair_key(first: u32, second: u64) -> Vec<u8> {
    let mut key = first.to_be_bytes().to_vec();
    key.extend_from_slice(&second.to_be_bytes());
    key
}

pub(super) fn time_key(at: Timestamp, name: &[u8]) -> Vec<u8> {
    let mut key = at.0.to_be_bytes().to_vec();
    key.extend_from_slice(name);
    key
}

fn seen_name(key: &SeenKey) -> Vec<u8> {
    let mut name = key.chat.0.to_be_bytes().to_vec();
    name.push(key.direction as u8);
    name.extend_from_slice(&key.digest);
    name.extend_from_slice(key.whatsapp_id.as_bytes());
    name
}

impl NumberStore {
    /// The unit that writes a commit of the domain.
    #[must_use]
    pub fn unit_of(&self, commit: Commit) -> Unit {
        let mut unit = if commit.durable { Unit::durable() } else { Unit::rides_along() };
        debug_assert!(commit.durable == (unit.durability == Durability::Durable));
        if let Some(key) = commit.unless_known {
            unit.checks.push(Check::Absent { tag: Tag::Idempotency, rest: key.0.to_vec() });
        }
        for change in commit.changes {
            self.write(change, &mut unit);
        }
        unit
    }

    fn write(&self, change: Change, unit: &mut Unit) {
        match change {
            Change::Message(record) | Change::Filled(record) => self.write_message(&record, unit),
            Change::Progress(seq, progress) => {
                unit.put(Tag::Progress, seq.0.to_be_bytes(), encode(&progress));
            }
            Change::Outbox(row) => {
                unit.put(Tag::Outbox, row.seq.0.to_be_bytes(), encode(&row));
            }
            Change::Body(seq, content) => {
                unit.put(Tag::OutboxBody, seq.0.to_be_bytes(), encode(&content));
            }
            Change::OutboxGone(seq) => {
                unit.delete(Tag::Outbox, seq.0.to_be_bytes()).delete(Tag::OutboxBody, seq.0.to_be_bytes());
            }
            Change::Idempotency(key, record) => {
                let expiry = time_key(record.expires_at, &key.0);
                unit.put(Tag::Idempotency, key.0, encode(&record)).put(Tag::IdempotencyExpiry, expiry, []);
            }
            Change::Chat(chat, contact) => {
                for address in contact.addresses() {
                    unit.put(Tag::ChatAlias, self.hashed("chat", address.as_bytes()), chat.0.to_be_bytes());
                }
                unit.put(Tag::Chat, chat.0.to_be_bytes(), encode(&contact));
            }
            Change::Heard(chat) => {
                unit.put(Tag::ChatHeard, chat.0.to_be_bytes(), []);
            }
            Change::Seen(key, seq, at) => {
                let hash = self.hashed("seen", &seen_name(&key));
                unit.put(Tag::Seen, hash, seq.0.to_be_bytes()).put(Tag::SeenTime, time_key(at, &hash), []);
            }
            Change::Event(event) => {
                unit.put(Tag::Event, event.id.seq.0.to_be_bytes(), encode(&event));
            }
            Change::Delivery(..)
            | Change::DeliveryGone(..)
            | Change::DeadLetter(..)
            | Change::DeadLetterGone(..)
            | Change::Attempt(_)
            | Change::Endpoint(_)
            | Change::EndpointState(..)
            | Change::EndpointGone(_) => webhooks::write(change, unit),
            Change::Counters(counters) => {
                unit.put(Tag::Counters, [], encode(&counters));
            }
            Change::Life(life) => {
                unit.put(Tag::Life, [], encode(&life));
            }
            Change::Removed(removal) => self.remove(removal, unit),
            Change::Limiter(record) => {
                unit.put(Tag::Limiter, [], encode(&record));
            }
            Change::ChatPace(chat, pace) => {
                unit.put(Tag::ChatPace, chat.0.to_be_bytes(), encode(&pace));
            }
            Change::ChatPaceGone(chat) => {
                unit.delete(Tag::ChatPace, chat.0.to_be_bytes());
            }
            Change::Erase(erasure) => Self::order_erasure(erasure, unit),
            Change::Erased(chat) => Self::end_erasure(chat, unit),
        }
    }

    fn write_message(&self, record: &MessageRecord, unit: &mut Unit) {
        let seq = record.seq.0.to_be_bytes();
        unit.put(Tag::Message, seq, encode(record));
        unit.put(Tag::ChatMessage, pair_key(record.chat.0, record.seq.0), []);
        if record.direction == Direction::Outbound {
            unit.put(Tag::WhatsappId, self.hashed("out", record.whatsapp_id.as_bytes()), seq);
            if let Some(reference) = &record.correlation_id {
                unit.put(Tag::CorrelationId, self.hashed("reference", reference.as_bytes()), seq);
            }
        }
    }

    /// Everything the number's machine is rebuilt from.
    ///
    /// # Errors
    /// When a record cannot be read.
    pub async fn load(&self) -> Result<Snapshot, StoreError> {
        let life = self.get(Tag::Life, &[]).await?.map(|bytes| decode(&bytes)).transpose()?;
        let counters = self.get(Tag::Counters, &[]).await?;
        let counters: Counters = counters.map(|bytes| decode(&bytes)).transpose()?.unwrap_or_default();
        let outbox = self.scan_all(Tag::Outbox, &[]).await?;
        let outbox: Vec<OutboxRow> = outbox.iter().map(|(_, value)| decode(value)).collect::<Result<_, _>>()?;
        let mut warm = HashSet::new();
        for chat in outbox.iter().map(|row| row.chat).collect::<HashSet<_>>() {
            if self.standing(chat).await? == Standing::Warm {
                warm.insert(chat);
            }
        }
        let limiter = self.get(Tag::Limiter, &[]).await?;
        let limiter = limiter.map(|bytes| decode(&bytes)).transpose()?.unwrap_or_default();
        let paces = self.scan_all(Tag::ChatPace, &[]).await?;
        let paces = paces.iter().map(|(key, value)| Ok((chat_no(key)?, decode(value)?)));
        let paces = paces.collect::<Result<_, StoreError>>()?;
        let endpoints = self.load_endpoints().await?;
        let erasures = self.scan_all(Tag::Erasure, &[]).await?;
        let erasures = erasures.iter().map(|(_, value)| decode(value)).collect::<Result<_, _>>()?;
        Ok(Snapshot {
            life,
            has_credentials: false,
            counters,
            outbox,
            warm,
            limiter,
            paces,
            endpoints,
            rules: Rules::default(),
            orders: SendingOrders::default(),
            erasures,
        })
    }

    /// Whether a contact is still being erased.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn is_being_erased(&self, chat: ChatNo) -> Result<bool, StoreError> {
        Ok(self.get(Tag::Erasure, &chat.0.to_be_bytes()).await?.is_some())
    }

    pub(super) async fn scan_all(&self, tag: Tag, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let mut all = Vec::new();
        let mut from: Option<Vec<u8>> = None;
        loop {
            let page = self.scan(tag, prefix, from.as_deref(), Order::Ascending, SCAN_ROWS_MAX).await?;
            let complete = page.len() < SCAN_ROWS_MAX;
            from = page.last().map(|(key, _)| key.clone());
            all.extend(page);
            if complete {
                return Ok(all);
            }
        }
    }

    /// The chat of a contact, by whichever address is known.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn chat_of(&self, contact: &Contact) -> Result<Option<ChatNo>, StoreError> {
        for address in contact.addresses() {
            if let Some(bytes) = self.get(Tag::ChatAlias, &self.hashed("chat", address.as_bytes())).await? {
                return Ok(Some(chat_no(&bytes)?));
            }
        }
        Ok(None)
    }

    /// The addresses of a chat.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn contact(&self, chat: ChatNo) -> Result<Option<Contact>, StoreError> {
        self.get(Tag::Chat, &chat.0.to_be_bytes()).await?.map(|bytes| decode(&bytes)).transpose()
    }

    /// Whether the other side of a chat ever wrote.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn standing(&self, chat: ChatNo) -> Result<Standing, StoreError> {
        let heard = self.get(Tag::ChatHeard, &chat.0.to_be_bytes()).await?;
        Ok(if heard.is_some() { Standing::Warm } else { Standing::New })
    }

    /// Whether an inbound message was taken in before.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn has_seen(&self, key: &SeenKey) -> Result<bool, StoreError> {
        Ok(self.get(Tag::Seen, &self.hashed("seen", &seen_name(key))).await?.is_some())
    }

    /// The row of an inbound message that still has no content.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn placeholder(&self, key: SeenKey) -> Result<Option<MessageRecord>, StoreError> {
        let key = SeenKey { digest: PLACEHOLDER_DIGEST, ..key };
        let Some(seq) = self.get(Tag::Seen, &self.hashed("seen", &seen_name(&key))).await? else {
            return Ok(None);
        };
        let record = self.message(MessageSeq(word(&seq)?)).await?;
        Ok(record.filter(|record| record.content == Content::Undecryptable))
    }

    /// The outbound message with this WhatsApp id.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn outbound_with(&self, whatsapp_id: &str) -> Result<Option<MessageRecord>, StoreError> {
        let Some(seq) = self.get(Tag::WhatsappId, &self.hashed("out", whatsapp_id.as_bytes())).await? else {
            return Ok(None);
        };
        self.message(MessageSeq(word(&seq)?)).await
    }

    /// The newest outbound message with this reference of its caller.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn correlated_with(&self, reference: &str) -> Result<Option<MessageRecord>, StoreError> {
        let Some(seq) = self.get(Tag::CorrelationId, &self.hashed("reference", reference.as_bytes())).await? else {
            return Ok(None);
        };
        self.message(MessageSeq(word(&seq)?)).await
    }

    /// One history row.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn message(&self, seq: MessageSeq) -> Result<Option<MessageRecord>, StoreError> {
        self.get(Tag::Message, &seq.0.to_be_bytes()).await?.map(|bytes| decode(&bytes)).transpose()
    }

    /// What an unsettled send says, where its history row does not.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn body(&self, seq: MessageSeq) -> Result<Option<Content>, StoreError> {
        self.get(Tag::OutboxBody, &seq.0.to_be_bytes()).await?.map(|bytes| decode(&bytes)).transpose()
    }

    /// The delivery progress of an outbound message.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn progress(&self, seq: MessageSeq) -> Result<Progress, StoreError> {
        let stored = self.get(Tag::Progress, &seq.0.to_be_bytes()).await?;
        Ok(stored.map(|bytes| decode(&bytes)).transpose()?.unwrap_or(Progress::QUEUED))
    }

    /// History rows, newest first, before `before`; of one chat or of all.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn messages(
        &self,
        chat: Option<ChatNo>,
        before: Option<MessageSeq>,
        limit: usize,
    ) -> Result<Vec<MessageRecord>, StoreError> {
        let Some(chat) = chat else {
            let from = before.map(|seq| seq.0.to_be_bytes());
            let from = from.as_ref().map(|bytes| bytes.as_slice());
            let rows = self.scan(Tag::Message, &[], from, Order::Descending, limit).await?;
            return rows.iter().map(|(_, value)| decode(value)).collect();
        };
        let from = before.map(|seq| pair_key(chat.0, seq.0));
        let index =
            self.scan(Tag::ChatMessage, &chat.0.to_be_bytes(), from.as_deref(), Order::Descending, limit).await?;
        let mut messages = Vec::with_capacity(index.len());
        for (key, _) in index {
            if let Some(message) = self.message(MessageSeq(word(&key[4..])?)).await? {
                messages.push(message);
            }
        }
        Ok(messages)
    }

    /// The first history row that was made at a moment or later; `None` when all are older. Halves the rows until it is
    /// found: they lie in the order in which they were made.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn first_message_since(&self, at: Timestamp) -> Result<Option<MessageSeq>, StoreError> {
        let Some(newest) = self.messages(None, None, 1).await?.pop() else { return Ok(None) };
        let (mut low, mut high) = (0, newest.seq.0 + 1);
        let mut first = None;
        // Every row up to `low` is older; the first row from `high` on, if any, is `first`.
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            let from = (middle - 1).to_be_bytes();
            let row = self.scan(Tag::Message, &[], Some(&from), Order::Ascending, 1).await?.pop();
            let record: Option<MessageRecord> = row.map(|(_, value)| decode(&value)).transpose()?;
            match record {
                Some(record) if record.created_at < at => low = record.seq.0,
                Some(record) => {
                    first = Some(record.seq);
                    high = middle;
                }
                None => high = middle,
            }
        }
        Ok(first)
    }

    /// How many history rows lie in a range, counted up to `most` and without reading them.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn count_messages(&self, range: RangeInclusive<u64>, most: usize) -> Result<usize, StoreError> {
        let from = range.start().checked_sub(1).map(u64::to_be_bytes);
        let from = from.as_ref().map(<[u8; 8]>::as_slice);
        let keys = self.keys(Tag::Message, &[], from, Order::Ascending, (0, most)).await?;
        let end = range.end().to_be_bytes();
        Ok(keys.iter().take_while(|key| key.as_slice() <= end.as_slice()).count())
    }

    /// The history rows of a range, newest first, after `skip` of them.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn messages_within(
        &self,
        range: RangeInclusive<u64>,
        (skip, limit): (usize, usize),
    ) -> Result<Vec<MessageRecord>, StoreError> {
        let from = range.end().checked_add(1).map(u64::to_be_bytes);
        let from = from.as_ref().map(<[u8; 8]>::as_slice);
        let keys = self.keys(Tag::Message, &[], from, Order::Descending, (skip, limit)).await?;
        let mut messages = Vec::with_capacity(keys.len());
        for key in keys {
            let seq = word(&key)?;
            if seq < *range.start() {
                break;
            }
            messages.extend(self.message(MessageSeq(seq)).await?);
        }
        Ok(messages)
    }

    /// The name a request id has in the store. `scope` separates callers.
    #[must_use]
    pub fn idempotency_key(&self, scope: &str, request_id: &str) -> IdempotencyKey {
        let mut name = scope.as_bytes().to_vec();
        name.push(0);
        name.extend_from_slice(request_id.as_bytes());
        IdempotencyKey(self.hashed("request", &name))
    }

    /// The answer a request id got.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn idempotency(&self, key: IdempotencyKey) -> Result<Option<IdempotencyRecord>, StoreError> {
        self.get(Tag::Idempotency, &key.0).await?.map(|bytes| decode(&bytes)).transpose()
    }

    /// Events after `after`, in order.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn events(&self, after: EventSeq, limit: usize) -> Result<Vec<Event>, StoreError> {
        let from = after.0.to_be_bytes();
        let rows = self.scan(Tag::Event, &[], Some(&from), Order::Ascending, limit).await?;
        rows.iter().map(|(_, value)| decode(value)).collect()
    }

    /// One event.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn event(&self, seq: EventSeq) -> Result<Option<Event>, StoreError> {
        self.get(Tag::Event, &seq.0.to_be_bytes()).await?.map(|bytes| decode(&bytes)).transpose()
    }
}
