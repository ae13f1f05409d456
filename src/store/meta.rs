//! The control plane's Db: tenants, numbers, keys, settings. Small, so it is held in memory whole and every
//! change is written through before it can be seen.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, oneshot};

use super::committer::{CommitterStats, RawOp, Request};
use super::error::StoreError;
use super::volume::Volume;
use crate::domain::id::{NumberId, TenantId};
use crate::domain::phone::Phone;
use crate::domain::time::Timestamp;

const SCHEMA_VERSION: u32 = 1;
/// Rows read when the Db is opened; far above any fleet this process can hold.
const ROWS_MAX: usize = 4_000_000;

/// A tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantRecord {
    /// Its id.
    pub id: TenantId,
    /// What people call it.
    pub name: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// How a number connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NumberKind {
    /// Linked device (QR).
    Linked,
    /// Meta's Cloud API.
    Official,
}

/// A number, as the control plane knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumberRecord {
    /// Its id.
    pub id: NumberId,
    /// Its owner.
    pub tenant: TenantId,
    /// What people call it.
    pub name: String,
    /// The phone number that must scan, and the one that did.
    pub phone: Phone,
    /// How it connects.
    pub kind: NumberKind,
    /// The volume its records live in.
    pub volume: u8,
    /// When it was made.
    pub created_at: Timestamp,
    /// Being erased: not served, finished at the next start if a crash came in between.
    pub deleting: bool,
}

/// Whom a key speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum KeySubject {
    /// The operator of the daemon: tenants.
    Operator,
    /// A tenant: its numbers.
    Tenant(TenantId),
    /// One number.
    Number(NumberId),
}

/// A key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// Public part, by which it is found.
    pub id: String,
    /// Whom it speaks for.
    pub subject: KeySubject,
    /// SHA-256 of the secret.
    pub secret_hash: [u8; 32],
    /// Last characters, for people to tell keys apart.
    pub last4: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends, if ever.
    pub expires_at: Option<Timestamp>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Settings {
    schema: u32,
    secret: [u8; 32],
}

#[derive(Default)]
struct Tables {
    tenants: HashMap<TenantId, TenantRecord>,
    numbers: HashMap<NumberId, Arc<NumberRecord>>,
    phones: HashMap<Phone, NumberId>,
    keys: HashMap<String, Arc<KeyRecord>>,
}

/// The control plane's records.
pub struct Meta {
    volume: Volume,
    secret: [u8; 32],
    tables: RwLock<Tables>,
    /// One change at a time, so that uniqueness is decided once.
    writer: Mutex<()>,
}

impl std::fmt::Debug for Meta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Meta")
    }
}

const TENANT: u8 = b'T';
const NUMBER: u8 = b'N';
const KEY: u8 = b'K';
const SETTINGS: &[u8] = b"S";

fn key_of(tag: u8, id: &[u8]) -> Vec<u8> {
    let mut key = vec![tag];
    key.extend_from_slice(id);
    key
}

fn encode(record: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|error| StoreError::Corrupt(error.to_string()))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::Corrupt(error.to_string()))
}

impl Meta {
    pub(super) fn open(path: &Path, cache_bytes: u64, new_secret: [u8; 32]) -> Result<Self, StoreError> {
        let volume = Volume::open("meta", path, cache_bytes)?;
        let secret = match volume.get(SETTINGS)? {
            Some(bytes) => {
                let settings: Settings = decode(&bytes)?;
                if settings.schema != SCHEMA_VERSION {
                    return Err(StoreError::Corrupt(format!("schema {} is not supported", settings.schema)));
                }
                settings.secret
            }
            None => {
                let settings = Settings { schema: SCHEMA_VERSION, secret: new_secret };
                let (answer, done) = std::sync::mpsc::channel();
                volume.submit(Request {
                    ops: vec![RawOp::Put(SETTINGS.to_vec(), encode(&settings)?)],
                    checks: Vec::new(),
                    bytes: 64,
                    durable: true,
                    done: Box::new(move |outcome| drop(answer.send(outcome))),
                });
                done.recv().unwrap_or(Err(StoreError::Closed))?;
                new_secret
            }
        };
        let mut tables = Tables::default();
        for (key, value) in volume.scan(&[], &[u8::MAX], false, ROWS_MAX)? {
            match key.first() {
                Some(&TENANT) => {
                    let record: TenantRecord = decode(&value)?;
                    tables.tenants.insert(record.id, record);
                }
                Some(&NUMBER) => tables.insert_number(decode(&value)?),
                Some(&KEY) => {
                    let record: KeyRecord = decode(&value)?;
                    tables.keys.insert(record.id.clone(), Arc::new(record));
                }
                _ => {}
            }
        }
        Ok(Self { volume, secret, tables: RwLock::new(tables), writer: Mutex::new(()) })
    }

    pub(super) fn secret(&self) -> [u8; 32] {
        self.secret
    }

    fn tables(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, apply: impl FnOnce(&mut Tables)) {
        apply(&mut self.tables.write().unwrap_or_else(PoisonError::into_inner));
    }

    async fn write(&self, ops: Vec<RawOp>) -> Result<(), StoreError> {
        let (answer, done) = oneshot::channel();
        let done_box = Box::new(move |outcome| {
            let _ = answer.send(outcome);
        });
        self.volume.submit(Request { ops, checks: Vec::new(), bytes: 0, durable: true, done: done_box });
        done.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Stores a tenant.
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn put_tenant(&self, record: TenantRecord) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        self.write(vec![RawOp::Put(key_of(TENANT, &record.id.0.to_be_bytes()), encode(&record)?)]).await?;
        self.change(|tables| drop(tables.tenants.insert(record.id, record)));
        Ok(())
    }

    /// One tenant.
    #[must_use]
    pub fn tenant(&self, id: TenantId) -> Option<TenantRecord> {
        self.tables().tenants.get(&id).cloned()
    }

    /// All tenants, oldest first.
    #[must_use]
    pub fn tenants(&self) -> Vec<TenantRecord> {
        let mut all: Vec<_> = self.tables().tenants.values().cloned().collect();
        all.sort_by_key(|tenant| (tenant.created_at, tenant.id));
        all
    }

    /// Stores a new number together with its keys. `Conflict` when its phone number is taken.
    ///
    /// # Errors
    /// `Conflict`, or when the disk refuses.
    pub async fn create_number(&self, record: NumberRecord, keys: Vec<KeyRecord>) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        if self.tables().phones.contains_key(&record.phone) {
            return Err(StoreError::Conflict);
        }
        let mut ops = vec![RawOp::Put(key_of(NUMBER, &record.id.0.to_be_bytes()), encode(&record)?)];
        for key in &keys {
            ops.push(RawOp::Put(key_of(KEY, key.id.as_bytes()), encode(key)?));
        }
        self.write(ops).await?;
        self.change(|tables| {
            tables.insert_number(record);
            tables.keys.extend(keys.into_iter().map(|key| (key.id.clone(), Arc::new(key))));
        });
        Ok(())
    }

    /// Changes an existing number's record.
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn update_number(&self, record: NumberRecord) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        self.write(vec![RawOp::Put(key_of(NUMBER, &record.id.0.to_be_bytes()), encode(&record)?)]).await?;
        self.change(|tables| tables.insert_number(record));
        Ok(())
    }

    /// Forgets a number and every key that speaks for it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn remove_number(&self, id: NumberId) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        let keys: Vec<String> = {
            let tables = self.tables();
            let of_number = tables.keys.values().filter(|key| key.subject == KeySubject::Number(id));
            of_number.map(|key| key.id.clone()).collect()
        };
        let mut ops = vec![RawOp::Delete(key_of(NUMBER, &id.0.to_be_bytes()))];
        ops.extend(keys.iter().map(|key| RawOp::Delete(key_of(KEY, key.as_bytes()))));
        self.write(ops).await?;
        self.change(|tables| {
            if let Some(record) = tables.numbers.remove(&id) {
                tables.phones.remove(&record.phone);
            }
            tables.keys.retain(|key, _| !keys.contains(key));
        });
        Ok(())
    }

    /// One number.
    #[must_use]
    pub fn number(&self, id: NumberId) -> Option<Arc<NumberRecord>> {
        self.tables().numbers.get(&id).cloned()
    }

    /// All numbers, of one tenant or of all, oldest first.
    #[must_use]
    pub fn numbers(&self, tenant: Option<TenantId>) -> Vec<Arc<NumberRecord>> {
        let tables = self.tables();
        let wanted = tables.numbers.values().filter(|record| tenant.is_none_or(|tenant| record.tenant == tenant));
        let mut all: Vec<_> = wanted.cloned().collect();
        all.sort_by_key(|record| (record.created_at, record.id));
        all
    }

    pub(super) fn numbers_per_volume(&self, volumes: u8) -> Vec<usize> {
        let mut counts = vec![0; usize::from(volumes)];
        for record in self.tables().numbers.values() {
            if let Some(count) = counts.get_mut(usize::from(record.volume)) {
                *count += 1;
            }
        }
        counts
    }

    /// Stores a key.
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn put_key(&self, record: KeyRecord) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        self.write(vec![RawOp::Put(key_of(KEY, record.id.as_bytes()), encode(&record)?)]).await?;
        self.change(|tables| drop(tables.keys.insert(record.id.clone(), Arc::new(record))));
        Ok(())
    }

    /// One key by its public part.
    #[must_use]
    pub fn key(&self, id: &str) -> Option<Arc<KeyRecord>> {
        self.tables().keys.get(id).cloned()
    }

    /// The keys that speak for a subject.
    #[must_use]
    pub fn keys_of(&self, subject: KeySubject) -> Vec<Arc<KeyRecord>> {
        let tables = self.tables();
        let mut keys: Vec<_> = tables.keys.values().filter(|key| key.subject == subject).cloned().collect();
        keys.sort_by_key(|key| key.created_at);
        keys
    }

    pub(super) fn stats(&self) -> Arc<CommitterStats> {
        self.volume.stats()
    }

    pub(super) fn close(&self) {
        self.volume.close();
    }
}

impl Tables {
    fn insert_number(&mut self, record: NumberRecord) {
        self.phones.insert(record.phone.clone(), record.id);
        self.numbers.insert(record.id, Arc::new(record));
    }
}
