//! The control plane's Db: tenants, numbers, keys, settings. Small, so it is held in memory whole and every
//! change is written through before it can be seen. Values are sealed: a number's under its own data key, the others
//! under the key of `meta`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::chunk::WHOLE;
use super::committer::RawOp;
use super::error::{OpenError, StoreError};
use super::keyring::{self, Keyring};
use super::master::MasterKeyError;
use super::number_store::NumberKeys;
use super::seal::Sealer;
use super::volume::Volume;
use crate::domain::id::{NumberId, TenantId};
use crate::domain::orders::SendingOrders;
use crate::domain::phone::Phone;
use crate::domain::proxy::Proxy;
use crate::domain::retention::Retention;
use crate::domain::time::Timestamp;
use crate::domain::version::Kept;
use crate::telemetry::rng::Random;

/// Rows read when the Db is opened; far above any fleet this process can hold.
pub(super) const ROWS_MAX: usize = 4_000_000;

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
    /// What it keeps of its messages.
    #[serde(default)]
    pub retention: Retention,
    /// What it connects through, if anything.
    #[serde(default)]
    pub proxy: Option<Proxy>,
    /// What its owner orders about its sending.
    #[serde(default)]
    pub orders: SendingOrders,
}

/// A deleted number whose records are still to be removed. They cannot be read any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Erasure {
    /// Whose.
    pub number: NumberId,
    /// Where they are.
    pub volume: u8,
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

#[derive(Default)]
struct Tables {
    tenants: HashMap<TenantId, TenantRecord>,
    numbers: HashMap<NumberId, Arc<NumberRecord>>,
    phones: HashMap<Phone, NumberId>,
    keys: HashMap<String, Arc<KeyRecord>>,
    sealers: HashMap<NumberId, Arc<Sealer>>,
    erasures: HashMap<NumberId, Erasure>,
    client_version: Kept,
}

/// The control plane's records.
pub struct Meta {
    volume: Arc<Volume>,
    keyring: Keyring,
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
const ERASURE: u8 = b'E';
const CLIENT_VERSION: u8 = b'V';

fn key_of(tag: u8, id: &[u8]) -> Vec<u8> {
    let mut key = vec![tag];
    key.extend_from_slice(id);
    key
}

fn number_of(key: &[u8]) -> Result<NumberId, StoreError> {
    let id = key[1..].try_into().map_err(|_| StoreError::Corrupt("key of a number".to_owned()))?;
    Ok(NumberId(u64::from_be_bytes(id)))
}

fn encode(key: Vec<u8>, record: &impl Serialize, sealer: &Sealer, random: &Random) -> Result<RawOp, StoreError> {
    let bytes = serde_json::to_vec(record).map_err(|error| StoreError::Corrupt(error.to_string()))?;
    let sealed = sealer.seal(&key, WHOLE, &bytes, random)?;
    Ok(RawOp::Put(key, sealed))
}

fn decode<T: DeserializeOwned>(key: &[u8], sealed: &[u8], sealer: &Sealer) -> Result<T, StoreError> {
    // The parser's own message may quote the value.
    serde_json::from_slice(&sealer.open(key, sealed)?).map_err(|_| StoreError::Corrupt("a row of meta".to_owned()))
}

impl Meta {
    pub(super) fn open(volume: Arc<Volume>, master_file: &Path, random: &Arc<Random>) -> Result<Self, OpenError> {
        let keyring::Opened { keyring, numbers, to_wrap_again } = keyring::open(&volume, master_file, random)?;
        keyring::wrap_again(&volume, to_wrap_again, &keyring.newest_master())?;
        let mut tables = Tables { sealers: numbers, ..Tables::default() };
        for (key, value) in volume.db()?.scan(&[], &[u8::MAX], false, ROWS_MAX)? {
            tables.read(&key, &value, &keyring.meta)?;
        }
        Ok(Self { volume, keyring, tables: RwLock::new(tables), writer: Mutex::new(()) })
    }

    /// Leaves only the newest master key in the file, if nothing is wrapped under another one. Gives how many went.
    pub(super) fn drop_older_masters(volume: &Volume, file: &Path, random: &Arc<Random>) -> Result<usize, OpenError> {
        // A directory that is new has no settings: nothing can be wrapped under a key that would go.
        let opened = keyring::open(volume, file, random)?;
        match opened.to_wrap_again.len() {
            0 => Ok(opened.keyring.into_masters().drop_older(file)?),
            wrapped => Err(MasterKeyError::StillUsed { wrapped }.into()),
        }
    }

    /// What a number's records are sealed and named with; none once it was deleted.
    pub(super) fn keys_for(&self, number: NumberId) -> Result<NumberKeys, StoreError> {
        let sealer = self.tables().sealers.get(&number).cloned().ok_or(StoreError::Erased)?;
        let Keyring { hash_secret, random, .. } = &self.keyring;
        Ok(NumberKeys { sealer, hash_secret: hash_secret.clone(), random: random.clone() })
    }

    fn sealed(&self, key: Vec<u8>, record: &impl Serialize) -> Result<RawOp, StoreError> {
        encode(key, record, &self.keyring.meta, &self.keyring.random)
    }

    fn tables(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, apply: impl FnOnce(&mut Tables)) {
        apply(&mut self.tables.write().unwrap_or_else(PoisonError::into_inner));
    }

    async fn write(&self, ops: Vec<RawOp>) -> Result<(), StoreError> {
        self.volume.db()?.write(ops).await
    }

    /// Stores a tenant.
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn put_tenant(&self, record: TenantRecord) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        self.write(vec![self.sealed(key_of(TENANT, &record.id.0.to_be_bytes()), &record)?]).await?;
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

    /// Stores a new number together with its API keys and its own data key. `Conflict` when its phone number is taken.
    ///
    /// # Errors
    /// `Conflict`, or when the disk refuses.
    pub async fn create_number(&self, record: NumberRecord, keys: Vec<KeyRecord>) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        if self.tables().phones.contains_key(&record.phone) {
            return Err(StoreError::Conflict);
        }
        let (sealer, data_key) = self.keyring.issue(record.id)?;
        let row = key_of(NUMBER, &record.id.0.to_be_bytes());
        let mut ops = vec![data_key, encode(row, &record, &sealer, &self.keyring.random)?];
        for key in &keys {
            ops.push(self.sealed(key_of(KEY, key.id.as_bytes()), key)?);
        }
        self.write(ops).await?;
        self.change(|tables| {
            tables.sealers.insert(record.id, Arc::new(sealer));
            tables.insert_number(record);
            tables.keys.extend(keys.into_iter().map(|key| (key.id.clone(), Arc::new(key))));
        });
        Ok(())
    }

    /// Changes an existing number's record, as it is at that moment; gives the changed one.
    ///
    /// # Errors
    /// `Erased` when it was deleted, or when the disk refuses.
    pub async fn change_number(
        &self,
        id: NumberId,
        change: impl FnOnce(&mut NumberRecord),
    ) -> Result<Arc<NumberRecord>, StoreError> {
        let _one = self.writer.lock().await;
        let (sealer, record) = {
            let tables = self.tables();
            (tables.sealers.get(&id).cloned(), tables.numbers.get(&id).cloned())
        };
        let (Some(sealer), Some(record)) = (sealer, record) else { return Err(StoreError::Erased) };
        let mut record = (*record).clone();
        change(&mut record);
        let row = key_of(NUMBER, &record.id.0.to_be_bytes());
        self.write(vec![encode(row, &record, &sealer, &self.keyring.random)?]).await?;
        let changed = Arc::new(record.clone());
        self.change(|tables| tables.insert_number(record));
        Ok(changed)
    }

    /// Destroys a number's data key, its record and every API key that speaks for it: when this returns nobody can
    /// read what the number wrote. Its records are listed as an [`Erasure`] until [`Self::erased`].
    ///
    /// # Errors
    /// When the disk refuses; the number is as it was then.
    pub async fn begin_erasure(&self, id: NumberId) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        let Some(record) = self.number(id) else { return Ok(()) };
        let keys: Vec<String> = {
            let tables = self.tables();
            let of_number = tables.keys.values().filter(|key| key.subject == KeySubject::Number(id));
            of_number.map(|key| key.id.clone()).collect()
        };
        let mut ops = vec![
            RawOp::Delete(keyring::row_of(id)),
            RawOp::Delete(key_of(NUMBER, &id.0.to_be_bytes())),
            RawOp::Put(key_of(ERASURE, &id.0.to_be_bytes()), vec![record.volume]),
        ];
        ops.extend(keys.iter().map(|key| RawOp::Delete(key_of(KEY, key.as_bytes()))));
        self.write(ops).await?;
        self.change(|tables| {
            tables.sealers.remove(&id);
            tables.numbers.remove(&id);
            tables.phones.remove(&record.phone);
            tables.keys.retain(|key, _| !keys.contains(key));
            tables.erasures.insert(id, Erasure { number: id, volume: record.volume });
        });
        Ok(())
    }

    /// Deleted numbers whose records are still there.
    #[must_use]
    pub fn erasures(&self) -> Vec<Erasure> {
        self.tables().erasures.values().copied().collect()
    }

    /// The records of a deleted number are gone.
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn erased(&self, id: NumberId) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        self.write(vec![RawOp::Delete(key_of(ERASURE, &id.0.to_be_bytes()))]).await?;
        self.change(|tables| {
            tables.erasures.remove(&id);
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
        self.write(vec![self.sealed(key_of(KEY, record.id.as_bytes()), &record)?]).await?;
        self.change(|tables| drop(tables.keys.insert(record.id.clone(), Arc::new(record))));
        Ok(())
    }

    /// One key by its public part.
    #[must_use]
    pub fn key(&self, id: &str) -> Option<Arc<KeyRecord>> {
        self.tables().keys.get(id).cloned()
    }

    /// What is kept of the version of WhatsApp Web.
    #[must_use]
    pub fn client_version(&self) -> Kept {
        self.tables().client_version
    }

    /// Changes what is kept of the version of WhatsApp Web.
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn keep_client_version(&self, change: impl FnOnce(&mut Kept)) -> Result<(), StoreError> {
        let _one = self.writer.lock().await;
        let mut kept = self.client_version();
        change(&mut kept);
        self.write(vec![self.sealed(key_of(CLIENT_VERSION, &[]), &kept)?]).await?;
        self.change(|tables| tables.client_version = kept);
        Ok(())
    }

    /// The keys that speak for a subject.
    #[must_use]
    pub fn keys_of(&self, subject: KeySubject) -> Vec<Arc<KeyRecord>> {
        let tables = self.tables();
        let mut keys: Vec<_> = tables.keys.values().filter(|key| key.subject == subject).cloned().collect();
        keys.sort_by_key(|key| key.created_at);
        keys
    }
}

impl Tables {
    fn insert_number(&mut self, record: NumberRecord) {
        self.phones.insert(record.phone.clone(), record.id);
        self.numbers.insert(record.id, Arc::new(record));
    }

    /// Takes in one row; the data keys are there already.
    fn read(&mut self, key: &[u8], value: &[u8], meta: &Sealer) -> Result<(), StoreError> {
        match key.first() {
            Some(&TENANT) => {
                let record: TenantRecord = decode(key, value, meta)?;
                self.tenants.insert(record.id, record);
            }
            Some(&NUMBER) => {
                let id = number_of(key)?;
                let lost = || StoreError::Corrupt("a number without its data key".to_owned());
                let sealer = self.sealers.get(&id).ok_or_else(lost)?;
                self.insert_number(decode(key, value, sealer)?);
            }
            Some(&KEY) => {
                let record: KeyRecord = decode(key, value, meta)?;
                self.keys.insert(record.id.clone(), Arc::new(record));
            }
            Some(&CLIENT_VERSION) => self.client_version = decode(key, value, meta)?,
            Some(&ERASURE) => {
                let number = number_of(key)?;
                let [volume] = *value else { return Err(StoreError::Corrupt("an erasure".to_owned())) };
                self.erasures.insert(number, Erasure { number, volume });
            }
            _ => {}
        }
        Ok(())
    }
}
