//! Webhook records of a number: endpoints, their queues, attempt logs and dead letters.

use super::error::StoreError;
use super::key::Tag;
use super::number_store::{NumberStore, Order, SCAN_ROWS_MAX};
use super::records::{decode, encode, pair_key};
use super::unit::Unit;
use crate::domain::change::{AttemptRecord, Change};
use crate::domain::delivery::{DeadLetter, DeliveryRow, StoredEndpoint};
use crate::domain::endpoint::{DeliverySeq, Endpoint, EndpointState};
use crate::domain::id::EventSeq;
use crate::domain::time::Timestamp;

fn attempt_key(endpoint: u32, at: Timestamp, sequence: DeliverySeq) -> Vec<u8> {
    let mut key = pair_key(endpoint, at.0);
    key.extend_from_slice(&sequence.0.to_be_bytes());
    key
}

/// Writes a change of a webhook record; the others are not for here.
pub(super) fn write(change: Change, unit: &mut Unit) {
    match change {
        Change::Delivery(endpoint, row) => {
            unit.put(Tag::Delivery, pair_key(endpoint, row.sequence.0), encode(&row));
        }
        Change::DeliveryGone(endpoint, sequence) => {
            unit.delete(Tag::Delivery, pair_key(endpoint, sequence.0));
        }
        Change::DeadLetter(endpoint, dead) => {
            unit.put(Tag::DeadLetter, pair_key(endpoint, dead.row.event.0), encode(&dead));
        }
        Change::DeadLetterGone(endpoint, event) => {
            unit.delete(Tag::DeadLetter, pair_key(endpoint, event.0));
        }
        Change::Attempt(record) => {
            unit.put(Tag::Attempt, attempt_key(record.endpoint, record.at, record.sequence), encode(&record));
        }
        Change::Endpoint(endpoint) => {
            unit.put(Tag::Endpoint, endpoint.ordinal.to_be_bytes(), encode(&endpoint));
        }
        Change::EndpointState(ordinal, state) => {
            unit.put(Tag::EndpointState, ordinal.to_be_bytes(), encode(&state));
        }
        // Rows still queued for it are orphans that a later pass sweeps away.
        Change::EndpointGone(ordinal) => {
            unit.delete(Tag::Endpoint, ordinal.to_be_bytes());
        }
        _ => {}
    }
}

/// Rows of earlier versions are named by their event.
fn named(mut row: DeliveryRow) -> DeliveryRow {
    if row.sequence == DeliverySeq(0) {
        row.sequence = DeliverySeq(row.event.0);
    }
    row
}

impl NumberStore {
    /// Endpoints with what is queued for them.
    pub(super) async fn load_endpoints(&self) -> Result<Vec<StoredEndpoint>, StoreError> {
        let mut endpoints = Vec::new();
        for endpoint in self.endpoints().await? {
            let state = self.endpoint_state(endpoint.ordinal).await?;
            let queued = self.count(Tag::Delivery, &endpoint.ordinal.to_be_bytes()).await?;
            endpoints.push(StoredEndpoint { endpoint, state, queued });
        }
        Ok(endpoints)
    }

    async fn count(&self, tag: Tag, prefix: &[u8]) -> Result<u64, StoreError> {
        let (mut count, mut from): (u64, Option<Vec<u8>>) = (0, None);
        loop {
            let page = self.keys(tag, prefix, from.as_deref(), Order::Ascending, (0, SCAN_ROWS_MAX)).await?;
            count += page.len() as u64;
            if page.len() < SCAN_ROWS_MAX {
                return Ok(count);
            }
            from = page.into_iter().last();
        }
    }

    /// The endpoints of the number.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn endpoints(&self) -> Result<Vec<Endpoint>, StoreError> {
        let rows = self.scan_all(Tag::Endpoint, &[]).await?;
        rows.iter().map(|(_, value)| decode(value)).collect()
    }

    /// One endpoint.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn endpoint(&self, ordinal: u32) -> Result<Option<Endpoint>, StoreError> {
        self.get(Tag::Endpoint, &ordinal.to_be_bytes()).await?.map(|bytes| decode(&bytes)).transpose()
    }

    /// What moves with an endpoint's deliveries.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn endpoint_state(&self, ordinal: u32) -> Result<Option<EndpointState>, StoreError> {
        self.get(Tag::EndpointState, &ordinal.to_be_bytes()).await?.map(|bytes| decode(&bytes)).transpose()
    }

    /// Rows of an endpoint's queue after one of them, in order.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn deliveries(
        &self,
        endpoint: u32,
        after: DeliverySeq,
        limit: usize,
    ) -> Result<Vec<DeliveryRow>, StoreError> {
        let from = pair_key(endpoint, after.0);
        let rows = self.scan(Tag::Delivery, &endpoint.to_be_bytes(), Some(&from), Order::Ascending, limit).await?;
        rows.iter().map(|(_, value)| decode(value).map(named)).collect()
    }

    /// The webhook attempts of an endpoint that ended before a moment, newest first; without one, the last.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn attempts(
        &self,
        endpoint: u32,
        before: Option<(Timestamp, DeliverySeq)>,
        limit: usize,
    ) -> Result<Vec<AttemptRecord>, StoreError> {
        let from = before.map(|(at, sequence)| attempt_key(endpoint, at, sequence));
        let prefix = endpoint.to_be_bytes();
        let rows = self.scan(Tag::Attempt, &prefix, from.as_deref(), Order::Descending, limit).await?;
        let named = |mut record: AttemptRecord| {
            if record.sequence == DeliverySeq(0) {
                record.sequence = DeliverySeq(record.event.0);
            }
            record
        };
        rows.iter().map(|(_, value)| decode(value).map(named)).collect()
    }

    /// An endpoint's dead letters by their events, newest first, before an event.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn dead_letters(
        &self,
        endpoint: u32,
        before: Option<EventSeq>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let from = before.map(|event| pair_key(endpoint, event.0));
        let prefix = endpoint.to_be_bytes();
        let rows = self.scan(Tag::DeadLetter, &prefix, from.as_deref(), Order::Descending, limit).await?;
        let read = |value: &Vec<u8>| decode(value).map(|dead: DeadLetter| DeadLetter { row: named(dead.row), ..dead });
        rows.iter().map(|(_, value)| read(value)).collect()
    }

    /// The dead letter of one event.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn dead_letter(&self, endpoint: u32, event: EventSeq) -> Result<Option<DeadLetter>, StoreError> {
        let stored = self.get(Tag::DeadLetter, &pair_key(endpoint, event.0)).await?;
        let dead: Option<DeadLetter> = stored.map(|bytes| decode(&bytes)).transpose()?;
        Ok(dead.map(|dead| DeadLetter { row: named(dead.row), ..dead }))
    }

    /// How many dead letters an endpoint has.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn dead_letter_count(&self, endpoint: u32) -> Result<u64, StoreError> {
        self.count(Tag::DeadLetter, &endpoint.to_be_bytes()).await
    }
}
