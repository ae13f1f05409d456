//! What survives a restart of the sandbox: the server's keys, and one JSON file per account with its phone's Signal
//! state, its linked devices and what they have not yet acknowledged. Files are replaced atomically.

use crate::sandbox::error::Result;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// A directory of JSON files; without a directory nothing is kept.
#[derive(Debug, Clone, Default)]
pub struct Files {
    directory: Option<PathBuf>,
}

const SERVER_FILE: &str = "server.json";
const ACCOUNTS: &str = "accounts";

impl Files {
    /// Opens `directory`, creating it.
    pub fn open(directory: Option<PathBuf>) -> Result<Self> {
        if let Some(directory) = &directory {
            std::fs::create_dir_all(directory.join(ACCOUNTS))?;
        }
        Ok(Self { directory })
    }

    /// Whether anything is kept at all.
    pub fn keeps(&self) -> bool {
        self.directory.is_some()
    }

    /// Reads the server's file.
    pub fn server<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        match &self.directory {
            Some(directory) => read(&directory.join(SERVER_FILE)),
            None => Ok(None),
        }
    }

    /// Replaces the server's file.
    pub fn save_server<T: Serialize>(&self, value: &T) -> Result<()> {
        match &self.directory {
            Some(directory) => replace(&directory.join(SERVER_FILE), value),
            None => Ok(()),
        }
    }

    /// Reads every account.
    pub fn accounts<T: DeserializeOwned>(&self) -> Result<Vec<T>> {
        let Some(directory) = &self.directory else {
            return Ok(Vec::new());
        };
        let mut accounts = Vec::new();
        for entry in std::fs::read_dir(directory.join(ACCOUNTS))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                accounts.extend(read(&path)?);
            }
        }
        Ok(accounts)
    }

    /// Replaces one account's file.
    pub fn save_account<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        match &self.directory {
            Some(directory) => replace(&directory.join(ACCOUNTS).join(format!("{name}.json")), value),
            None => Ok(()),
        }
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn replace<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, serde_json::to_vec(value)?)?;
    Ok(std::fs::rename(&draft, path)?)
}

/// Bytes as base64 text.
pub mod base64_bytes {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map_err(D::Error::custom)
    }
}

/// A map with bytes as base64 text.
pub mod base64_map {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
    use std::collections::BTreeMap;

    /// For `#[serde(with)]`.
    pub fn serialize<K: Serialize, S: Serializer>(
        map: &BTreeMap<K, Vec<u8>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(map.iter().map(|(key, bytes)| (key, STANDARD.encode(bytes))))
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, K: Deserialize<'de> + Ord, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<K, Vec<u8>>, D::Error> {
        let texts = BTreeMap::<K, String>::deserialize(deserializer)?;
        let decode = |(key, text): (K, String)| Ok((key, STANDARD.decode(text).map_err(D::Error::custom)?));
        texts.into_iter().map(decode).collect()
    }
}

/// A list of byte strings as base64 texts.
pub mod base64_list {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(list: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(|bytes| STANDARD.encode(bytes)))
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.into_iter().map(|text| STANDARD.decode(text).map_err(D::Error::custom)).collect()
    }
}
