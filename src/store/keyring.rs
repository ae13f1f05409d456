//! The keys a running store works with, opened by the master key: one per number, one for `meta` itself, and the secret
//! behind the hashed names. They lie in `meta`, wrapped; removing a number's row there is what erases the number.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::committer::RawOp;
use super::error::{OpenError, StoreError};
use super::master::{MasterKeyError, MasterKeys, UnwrapError, Wrapped};
use super::seal::{KEY_BYTES, Sealer, SecretBytes};
use super::volume::Volume;
use crate::domain::id::NumberId;
use crate::telemetry::rng::Random;

/// Version of everything below the data directory. 1 was not sealed and never shipped.
pub(super) const FORMAT: u32 = 2;
/// Key of the row that says it.
const SETTINGS: &[u8] = b"S";
/// First byte of a wrapped data key's row; the number's id follows.
const DATA_KEY: u8 = b'D';
const META_PURPOSE: &[u8] = b"switchboard meta";
/// Rows wrapped again in one unit.
const REWRAP_ROWS: usize = 200;

/// In clear: nobody could say which format it is otherwise.
#[derive(Debug, Serialize, Deserialize)]
struct Settings {
    #[serde(alias = "schema")]
    format: u32,
    /// The key of `meta` and the secret of the hashed names, one after the other.
    #[serde(default)]
    wrapped: Vec<u8>,
}

pub(super) struct Keyring {
    /// Seals the values of `meta`.
    pub(super) meta: Sealer,
    pub(super) hash_secret: Arc<SecretBytes>,
    pub(super) random: Arc<Random>,
    masters: MasterKeys,
}

/// What was read of the wrapped keys.
pub(super) struct Opened {
    pub(super) keyring: Keyring,
    pub(super) numbers: HashMap<NumberId, Arc<Sealer>>,
    /// Rows that an older master key wraps, ready to be written again.
    pub(super) to_wrap_again: Vec<RawOp>,
}

fn purpose(number: NumberId) -> Vec<u8> {
    let mut purpose = b"switchboard number ".to_vec();
    purpose.extend_from_slice(&number.0.to_be_bytes());
    purpose
}

pub(super) fn row_of(number: NumberId) -> Vec<u8> {
    let mut key = vec![DATA_KEY];
    key.extend_from_slice(&number.0.to_be_bytes());
    key
}

fn refused(what: &str, error: UnwrapError) -> OpenError {
    match error {
        UnwrapError::NotOurs(id) => MasterKeyError::NotOurs { id }.into(),
        UnwrapError::Damaged => StoreError::Corrupt(format!("the wrapped key of {what} does not open")).into(),
    }
}

fn secret(bytes: &[u8]) -> Result<SecretBytes, OpenError> {
    let bytes: [u8; KEY_BYTES] = bytes.try_into().map_err(|_| StoreError::Corrupt("length of a key".to_owned()))?;
    Ok(SecretBytes::new(bytes))
}

/// The format the directory says it has; `None` when it is new.
fn settings(volume: &Volume) -> Result<Option<Settings>, StoreError> {
    let Some(stored) = volume.db()?.get(SETTINGS)? else { return Ok(None) };
    serde_json::from_slice(&stored).map(Some).map_err(|_| StoreError::Corrupt("settings".to_owned()))
}

fn settings_row(format: u32, wrapped: Wrapped) -> Result<RawOp, StoreError> {
    let row = serde_json::to_vec(&Settings { format, wrapped: wrapped.0 });
    Ok(RawOp::Put(SETTINGS.to_vec(), row.map_err(|error| StoreError::Corrupt(error.to_string()))?))
}

/// Opens every key in `meta`; a new directory gets its own keys, and, if there is none, a master key file.
pub(super) fn open(volume: &Volume, master_file: &std::path::Path, random: &Arc<Random>) -> Result<Opened, OpenError> {
    let mut to_wrap_again = Vec::new();
    let (masters, both) = match settings(volume)? {
        Some(settings) if settings.format != FORMAT => {
            let path = volume.path().to_owned();
            return Err(OpenError::Format { path, found: settings.format, supported: FORMAT });
        }
        Some(settings) => {
            let masters = MasterKeys::load(master_file)?;
            let (both, older) = masters
                .unwrap(META_PURPOSE, &Wrapped(settings.wrapped))
                .map_err(|error| refused("the meta store", error))?;
            if older {
                to_wrap_again.push(settings_row(FORMAT, masters.wrap(META_PURPOSE, &both, random)?)?);
            }
            (masters, both)
        }
        None => {
            let masters = MasterKeys::load_or_create(master_file, random)?;
            let both = Zeroizing::new(random.bytes::<{ 2 * KEY_BYTES }>().to_vec());
            volume.write_now(vec![settings_row(FORMAT, masters.wrap(META_PURPOSE, &both, random)?)?])?;
            (masters, both)
        }
    };
    let (meta, hash_secret) = both.split_at(both.len().min(KEY_BYTES));
    let (meta, hash_secret) = (Sealer::new(&*secret(meta)?), Arc::new(secret(hash_secret)?));
    let mut numbers = HashMap::new();
    for (row, value) in volume.db()?.scan(&[DATA_KEY], &[DATA_KEY + 1], false, super::meta::ROWS_MAX)? {
        let id = row[1..].try_into().map_err(|_| StoreError::Corrupt("key of a number".to_owned()))?;
        let number = NumberId(u64::from_be_bytes(id));
        let (key, older) =
            masters.unwrap(&purpose(number), &Wrapped(value)).map_err(|error| refused("a number", error))?;
        if older {
            to_wrap_again.push(RawOp::Put(row, masters.wrap(&purpose(number), &key, random)?.0));
        }
        numbers.insert(number, Arc::new(Sealer::new(&*secret(&key)?)));
    }
    let keyring = Keyring { meta, hash_secret, random: random.clone(), masters };
    Ok(Opened { keyring, numbers, to_wrap_again })
}

/// Wraps again what an older master key wraps, so that it can be thrown away.
pub(super) fn wrap_again(volume: &Volume, rows: Vec<RawOp>, newest: &str) -> Result<(), StoreError> {
    if rows.is_empty() {
        return Ok(());
    }
    let count = rows.len();
    let mut rows = rows.into_iter().peekable();
    while rows.peek().is_some() {
        volume.write_now(rows.by_ref().take(REWRAP_ROWS).collect())?;
    }
    tracing::info!(data_keys = count, master_key = newest, "data keys wrapped under the newest master key");
    Ok(())
}

impl Keyring {
    pub(super) fn newest_master(&self) -> String {
        self.masters.newest_id()
    }

    pub(super) fn into_masters(self) -> MasterKeys {
        self.masters
    }

    /// A new number's data key, and the row that keeps it.
    pub(super) fn issue(&self, number: NumberId) -> Result<(Sealer, RawOp), StoreError> {
        let key = SecretBytes::new(self.random.bytes());
        let wrapped = self.masters.wrap(&purpose(number), &*key, &self.random)?;
        Ok((Sealer::new(&key), RawOp::Put(row_of(number), wrapped.0)))
    }
}
