//! App-state keys, versions and MACs. The key share comes once from the phone and is durable; versions and MACs
//! ride along in order, so a crash leaves an older but consistent collection, which the next sync brings forward.

use std::collections::HashMap;

use async_trait::async_trait;
use whatsapp_rust::wacore::appstate::hash::HashState;
use whatsapp_rust::wacore::appstate::processor::AppStateMutationMAC;
use whatsapp_rust::wacore::store::traits::{AppStateSyncKey, AppSyncStore};

use super::{LibraryResult, LinkBackend, encode, kind_key, put};
use crate::store::key::Tag;
use crate::store::unit::{Durability, Op};

const SYNC_KEY: u8 = 1;
const LATEST_SYNC_KEY: u8 = 2;
const VERSION: u8 = 3;
const MUTATION_MAC: u8 = 4;

impl LinkBackend {
    fn sync_key_key(&self, key_id: &[u8]) -> Vec<u8> {
        kind_key(SYNC_KEY, &[&self.store.hashed("app-state-key", key_id)])
    }

    fn version_key(&self, collection: &str) -> Vec<u8> {
        kind_key(VERSION, &[&self.name("app-state", collection)])
    }

    fn mac_key(&self, collection: &str, index_mac: &[u8]) -> Vec<u8> {
        kind_key(MUTATION_MAC, &[&self.name("app-state", collection), index_mac])
    }
}

#[async_trait]
impl AppSyncStore for LinkBackend {
    async fn get_sync_key(&self, key_id: &[u8]) -> LibraryResult<Option<AppStateSyncKey>> {
        let stored = self.get(Tag::AppState, &self.sync_key_key(key_id)).await?;
        stored.map(|bytes| self.decode(&bytes)).transpose()
    }

    async fn set_sync_key(&self, key_id: &[u8], key: AppStateSyncKey) -> LibraryResult<()> {
        let ops = vec![
            put(Tag::AppState, self.sync_key_key(key_id), encode(&key)?),
            put(Tag::AppState, vec![LATEST_SYNC_KEY], key_id.to_vec()),
        ];
        self.commit_rows(ops, Durability::Durable).await
    }

    async fn get_version(&self, name: &str) -> LibraryResult<HashState> {
        match self.get(Tag::AppState, &self.version_key(name)).await? {
            Some(bytes) => self.decode(&bytes),
            None => Ok(HashState::default()),
        }
    }

    async fn set_version(&self, name: &str, state: HashState) -> LibraryResult<()> {
        let ops = vec![put(Tag::AppState, self.version_key(name), encode(&state)?)];
        self.commit_rows(ops, Durability::RidesAlong).await
    }

    async fn put_mutation_macs(
        &self,
        name: &str,
        _version: u64,
        mutations: &[AppStateMutationMAC],
    ) -> LibraryResult<()> {
        let row =
            |mac: &AppStateMutationMAC| put(Tag::AppState, self.mac_key(name, &mac.index_mac), mac.value_mac.clone());
        self.commit_rows(mutations.iter().map(row).collect(), Durability::RidesAlong).await
    }

    async fn get_mutation_mac(&self, name: &str, index_mac: &[u8]) -> LibraryResult<Option<Vec<u8>>> {
        self.get(Tag::AppState, &self.mac_key(name, index_mac)).await
    }

    async fn get_mutation_macs(
        &self,
        name: &str,
        index_macs: &[[u8; 32]],
    ) -> LibraryResult<HashMap<[u8; 32], Vec<u8>>> {
        let mut found = HashMap::with_capacity(index_macs.len());
        for index_mac in index_macs {
            if let Some(mac) = self.get_mutation_mac(name, index_mac).await? {
                found.insert(*index_mac, mac);
            }
        }
        Ok(found)
    }

    async fn delete_mutation_macs(&self, name: &str, index_macs: &[Vec<u8>]) -> LibraryResult<()> {
        let row = |index_mac: &Vec<u8>| Op::Delete { tag: Tag::AppState, rest: self.mac_key(name, index_mac) };
        self.commit_rows(index_macs.iter().map(row).collect(), Durability::RidesAlong).await
    }

    async fn clear_mutation_macs(&self, name: &str) -> LibraryResult<()> {
        self.delete_below(Tag::AppState, &self.mac_key(name, &[])).await
    }

    async fn get_latest_sync_key_id(&self) -> LibraryResult<Option<Vec<u8>>> {
        self.get(Tag::AppState, &[LATEST_SYNC_KEY]).await
    }
}
