//! The master key file: wraps the data keys of the numbers and of `meta`. It may hold several keys, newest first, so
//! that the master key is changed without touching a value: every data key is wrapped again under the newest.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

use super::error::StoreError;
use super::seal::{KEY_BYTES, OVERHEAD_BYTES, Sealer, SecretBytes};
use super::secret_file;
use crate::telemetry::rng::Random;

/// Keys one file may hold; each rotation adds one until the old ones are dropped.
const KEYS_MAX: usize = 16;
const ID_BYTES: usize = 8;
/// First byte of a wrapped key's sealed part.
const FORM: u8 = 1;
/// Anybody but the owner.
const OTHERS: u32 = 0o077;
const HEADER: &str = "# Switchboard's master keys, newest first. Whoever has them and the data directory can read it; \
                      without them nobody can.\n";

/// The master key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MasterKeyError {
    /// It cannot be read or written.
    #[error("master key file {path}: {error}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Others than its owner may touch it.
    #[error("master key file {path}: its mode is {mode:o}, others than the owner can touch it: chmod 600")]
    Permissions {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// There is data and no key: a new one could not open it.
    #[error("master key file {path} is missing, and the data directory was sealed with it: put it back")]
    Missing {
        /// Which file.
        path: PathBuf,
    },
    /// It does not hold what this program writes.
    #[error("master key file {path}, line {line}: {problem}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong; never the key.
        problem: &'static str,
    },
    /// The data was sealed with a key that the file does not hold.
    #[error("the data directory is sealed under master key {id}, which is not in the master key file")]
    NotOurs {
        /// The id of the key that is needed.
        id: String,
    },
    /// Something is still wrapped under a key that was to go.
    #[error("{wrapped} data keys are still wrapped under an older master key: start the daemon once, then try again")]
    StillUsed {
        /// How many.
        wrapped: usize,
    },
}

struct MasterKey {
    id: [u8; ID_BYTES],
    key: SecretBytes,
}

impl MasterKey {
    fn new(key: SecretBytes) -> Self {
        // The name of a key follows from it, so that a mistyped key is noticed before it is used.
        let mut hasher = Sha256::new();
        hasher.update(b"switchboard master key id");
        hasher.update(*key);
        let mut id = [0; ID_BYTES];
        id.copy_from_slice(&hasher.finalize()[..ID_BYTES]);
        Self { id, key }
    }

    fn line(&self) -> Zeroizing<String> {
        let text = Zeroizing::new(STANDARD.encode(*self.key));
        Zeroizing::new(format!("{} {}\n", hex(&self.id), *text))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The master keys of one installation, newest first; never empty.
pub struct MasterKeys(Vec<MasterKey>);

impl std::fmt::Debug for MasterKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| hex(&key.id))).finish()
    }
}

/// A data key as it lies on disk: the master key's id, then the key sealed under it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Wrapped(pub(super) Vec<u8>);

impl MasterKeys {
    /// Reads the file.
    ///
    /// # Errors
    /// See [`MasterKeyError`].
    pub fn load(path: &Path) -> Result<Self, MasterKeyError> {
        let io = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => MasterKeyError::Missing { path: path.to_owned() },
            _ => MasterKeyError::Io { path: path.to_owned(), error },
        };
        let mode = fs::metadata(path).map_err(io)?.permissions().mode() & 0o777;
        if mode & OTHERS != 0 {
            return Err(MasterKeyError::Permissions { path: path.to_owned(), mode });
        }
        let text = Zeroizing::new(fs::read_to_string(path).map_err(io)?);
        Self::parse(&text).map_err(|(line, problem)| MasterKeyError::Malformed { path: path.to_owned(), line, problem })
    }

    /// Reads the file, or makes it with one new key when there is none.
    ///
    /// # Errors
    /// See [`MasterKeyError`].
    pub fn load_or_create(path: &Path, random: &Random) -> Result<Self, MasterKeyError> {
        match Self::load(path) {
            Err(MasterKeyError::Missing { .. }) => {
                let keys = Self(vec![MasterKey::new(SecretBytes::new(random.bytes()))]);
                keys.save(path)?;
                Ok(keys)
            }
            loaded => loaded,
        }
    }

    fn parse(text: &str) -> Result<Self, (usize, &'static str)> {
        let mut keys = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |problem| (index + 1, problem);
            let (id, key) = line.split_once(' ').ok_or(wrong("expected an id and a key"))?;
            let decoded = STANDARD.decode(key.trim()).map_err(|_| wrong("the key is not base64"))?;
            let mut decoded = Zeroizing::new(decoded);
            let bytes: [u8; KEY_BYTES] = decoded.as_slice().try_into().map_err(|_| wrong("a key has 32 bytes"))?;
            decoded.zeroize();
            let key = MasterKey::new(SecretBytes::new(bytes));
            if hex(&key.id) != id {
                return Err(wrong("the id is not this key's: a character is missing or another one"));
            }
            keys.push(key);
        }
        match keys.len() {
            0 => Err((1, "there is no key in it")),
            1..=KEYS_MAX => Ok(Self(keys)),
            _ => Err((1, "more than 16 keys")),
        }
    }

    fn save(&self, path: &Path) -> Result<(), MasterKeyError> {
        let mut text = Zeroizing::new(String::from(HEADER));
        for key in &self.0 {
            text.push_str(&key.line());
        }
        secret_file::write(path, &text).map_err(|error| MasterKeyError::Io { path: path.to_owned(), error })
    }

    /// Puts a new key in front of the others, in the file; returns its id. The next start wraps every data key under it.
    ///
    /// # Errors
    /// See [`MasterKeyError`].
    pub fn rotate(path: &Path, random: &Random) -> Result<String, MasterKeyError> {
        let mut keys = Self::load(path)?;
        if keys.0.len() >= KEYS_MAX {
            let problem = "it holds 16 keys: drop the older ones first";
            return Err(MasterKeyError::Malformed { path: path.to_owned(), line: 1, problem });
        }
        keys.0.insert(0, MasterKey::new(SecretBytes::new(random.bytes())));
        keys.save(path)?;
        Ok(keys.newest_id())
    }

    /// Leaves only the newest key in the file.
    pub(super) fn drop_older(&mut self, path: &Path) -> Result<usize, MasterKeyError> {
        let dropped = self.0.split_off(1).len();
        self.save(path)?;
        Ok(dropped)
    }

    /// The name of the key that wraps from now on.
    #[must_use]
    pub fn newest_id(&self) -> String {
        self.0.first().map(|key| hex(&key.id)).unwrap_or_default()
    }

    /// Wraps a data key for one purpose under the newest master key.
    pub(super) fn wrap(&self, purpose: &[u8], key: &[u8], random: &Random) -> Result<Wrapped, StoreError> {
        let newest = self.0.first().ok_or_else(|| StoreError::Corrupt("no master key".to_owned()))?;
        let mut wrapped = Vec::with_capacity(ID_BYTES + key.len() + OVERHEAD_BYTES);
        wrapped.extend_from_slice(&newest.id);
        wrapped.extend_from_slice(&Sealer::new(&newest.key).seal(purpose, FORM, key, random)?);
        Ok(Wrapped(wrapped))
    }

    /// The data key, and whether it is wrapped under an older master key.
    pub(super) fn unwrap(&self, purpose: &[u8], wrapped: &Wrapped) -> Result<(Zeroizing<Vec<u8>>, bool), UnwrapError> {
        let (id, sealed) = wrapped.0.split_first_chunk::<ID_BYTES>().ok_or(UnwrapError::Damaged)?;
        let position = self.0.iter().position(|key| key.id == *id);
        let position = position.ok_or_else(|| UnwrapError::NotOurs(hex(id)))?;
        let opened = Sealer::new(&self.0[position].key).open(purpose, sealed).map_err(|_| UnwrapError::Damaged)?;
        Ok((Zeroizing::new(opened), position > 0))
    }
}

/// A wrapped key does not open.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum UnwrapError {
    NotOurs(String),
    Damaged,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("switchboard-master-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn the_file_is_made_once_and_belongs_to_its_owner() {
        let dir = directory("made");
        let (path, random) = (dir.join("keys/master.key"), Random::seeded(1));
        assert!(matches!(MasterKeys::load(&path), Err(MasterKeyError::Missing { .. })));
        let made = MasterKeys::load_or_create(&path, &random).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(MasterKeys::load_or_create(&path, &random).unwrap().newest_id(), made.newest_id());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(MasterKeys::load(&path), Err(MasterKeyError::Permissions { mode: 0o640, .. })));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_an_older_key_wrapped_opens_until_it_is_dropped() {
        let dir = directory("rotate");
        let (path, random) = (dir.join("master.key"), Random::seeded(2));
        let first = MasterKeys::load_or_create(&path, &random).unwrap();
        let wrapped = first.wrap(b"one", &[7; KEY_BYTES], &random).unwrap();
        assert_eq!(first.unwrap(b"two", &wrapped), Err(UnwrapError::Damaged), "another number's");
        assert_eq!(MasterKeys::rotate(&path, &random).unwrap(), MasterKeys::load(&path).unwrap().newest_id());
        let mut both = MasterKeys::load(&path).unwrap();
        let (key, older) = both.unwrap(b"one", &wrapped).unwrap();
        assert_eq!((key.as_slice(), older), ([7; KEY_BYTES].as_slice(), true));
        let again = both.wrap(b"one", &key, &random).unwrap();
        assert_eq!(both.drop_older(&path).unwrap(), 1);
        let newest = MasterKeys::load(&path).unwrap();
        assert_eq!(newest.unwrap(b"one", &wrapped), Err(UnwrapError::NotOurs(first.newest_id())));
        assert!(!newest.unwrap(b"one", &again).unwrap().1);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_mistyped_key_is_named_by_its_line_and_never_shown() {
        let dir = directory("typo");
        let (path, random) = (dir.join("master.key"), Random::seeded(3));
        MasterKeys::load_or_create(&path, &random).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        let key = good.lines().last().unwrap().split(' ').nth(1).unwrap().to_owned();
        let swapped = if key.starts_with('A') { "B" } else { "A" };
        for bad in [good.replace(&key, &format!("{swapped}{}", &key[1..])), good.replace(&key, "short"), String::new()]
        {
            secret_file::write(&path, &bad).unwrap();
            let error = MasterKeys::load(&path).unwrap_err();
            assert!(matches!(error, MasterKeyError::Malformed { .. }), "{error}");
            assert!(!error.to_string().contains(&key[4..12]));
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
