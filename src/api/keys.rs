//! Making keys. The first start writes the operator's to a file that only the daemon's user can read; it never
//! appears in a log.

use std::io;
use std::path::{Path, PathBuf};

use crate::domain::access::{KeyKind, MintedKey, mint};
use crate::domain::time::Timestamp;
use crate::store::error::StoreError;
use crate::store::meta::{KeyRecord, KeySubject, Meta};
use crate::store::secret_file;
use crate::telemetry::clock::Clock;
use crate::telemetry::rng::Random;

/// Below the data directory.
const OPERATOR_KEY_FILE: &str = "keys/operator.key";

/// The operator's key cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OperatorKeyError {
    /// The file cannot be written.
    #[error("{path}: {error}")]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A new key for a subject, and the record to keep of it.
pub(super) fn new_key(subject: KeySubject, random: &Random, now: Timestamp) -> (MintedKey, KeyRecord) {
    let kind = match subject {
        KeySubject::Operator => KeyKind::Operator,
        KeySubject::Tenant(_) => KeyKind::Tenant,
        KeySubject::Number(_) => KeyKind::Number,
    };
    let key = mint(kind, &random.bytes());
    let record = KeyRecord {
        id: key.id.clone(),
        subject,
        secret_hash: key.secret_hash,
        last4: key.last4.clone(),
        created_at: now,
        expires_at: None,
    };
    (key, record)
}

/// Makes the operator's key on the first start and returns where it is; on later starts only tells where it was put.
/// A crash in between leaves a file whose key is unknown; the next start replaces it.
///
/// # Errors
/// When the file or the record cannot be written.
pub async fn ensure_operator_key(
    meta: &Meta,
    random: &Random,
    clock: &dyn Clock,
    data: &Path,
) -> Result<PathBuf, OperatorKeyError> {
    let path = data.join(OPERATOR_KEY_FILE);
    if !meta.keys_of(KeySubject::Operator).is_empty() {
        return Ok(path);
    }
    let (key, record) = new_key(KeySubject::Operator, random, clock.now());
    secret_file::write(&path, &format!("{}\n", key.text))
        .map_err(|error| OperatorKeyError::File { path: path.clone(), error })?;
    // The file comes first: a key that is accepted and that nobody has could not be replaced.
    meta.put_key(record).await?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::access::PresentedKey;
    use crate::store::layout::{Store, StoreSettings};
    use crate::store::secret_file::OWNER_ONLY;
    use crate::telemetry::clock::ManualClock;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Arc;

    #[tokio::test]
    async fn the_first_start_writes_the_key_and_later_ones_leave_it() {
        let data = std::env::temp_dir().join(format!("switchboard-operator-key-{}", std::process::id()));
        let _ = fs::remove_dir_all(&data);
        let store = Store::open(&StoreSettings::at(&data, Arc::new(Random::seeded(7)))).unwrap();
        let (random, clock) = (Random::seeded(1), ManualClock::at(Timestamp(1)));
        let path = ensure_operator_key(store.meta(), &random, &clock, &data).await.unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, OWNER_ONLY);
        let presented = PresentedKey::parse(text.trim()).unwrap();
        assert_eq!(store.meta().key(presented.id()).unwrap().subject, KeySubject::Operator);
        ensure_operator_key(store.meta(), &random, &clock, &data).await.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        store.close();
        fs::remove_dir_all(&data).unwrap();
    }
}
