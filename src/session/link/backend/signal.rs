//! Identities, sessions, prekeys and sender keys. Sessions and sender keys are durable before `Ok`: the library
//! leases message keys in them and sends only after, so that no key is ever used twice. What the library writes
//! after a durable session (consumed prekeys, identities) rides along: a volume is written in order.

use std::sync::Arc;

use async_trait::async_trait;
use whatsapp_rust::bytes::Bytes;
use whatsapp_rust::wacore::store::traits::SignalStore;

use super::{LibraryResult, LinkBackend, put};
use crate::store::key::Tag;
use crate::store::number_store::{Order, SCAN_ROWS_MAX};
use crate::store::unit::{Durability, Op};
use crate::telemetry::failpoint::{self, Failpoint};

impl LinkBackend {
    /// `user@server` or `user:device@server`: the user hashed, the rest in clear, so that everything of one user
    /// is one range.
    fn address_key(&self, address: &str) -> Vec<u8> {
        let cut = address.find(['@', ':']).unwrap_or(address.len());
        let (user, rest) = address.split_at(cut);
        let mut key = self.name("signal-user", user).to_vec();
        key.extend_from_slice(rest.as_bytes());
        key
    }

    async fn lease(&self, sessions: Vec<Op>) -> LibraryResult<()> {
        failpoint::reach(Failpoint::LeaseBeforeDurable);
        self.commit_rows(sessions, Durability::Durable).await?;
        failpoint::reach(Failpoint::LeaseAfterDurable);
        Ok(())
    }

    fn sender_key_key(&self, address: &str) -> Vec<u8> {
        self.name("sender-key", address).to_vec()
    }
}

fn id_of(key: &[u8]) -> Option<u32> {
    key.try_into().ok().map(u32::from_be_bytes)
}

#[async_trait]
impl SignalStore for LinkBackend {
    async fn put_identity(&self, address: &str, key: [u8; 32]) -> LibraryResult<()> {
        let ops = vec![put(Tag::Identity, self.address_key(address), key.to_vec())];
        self.commit_rows(ops, Durability::RidesAlong).await
    }

    async fn put_identities_batch(&self, identities: &[(Arc<str>, [u8; 32])]) -> LibraryResult<()> {
        let row = |(address, key): &(Arc<str>, [u8; 32])| put(Tag::Identity, self.address_key(address), key.to_vec());
        self.commit_rows(identities.iter().map(row).collect(), Durability::RidesAlong).await
    }

    async fn load_identity(&self, address: &str) -> LibraryResult<Option<[u8; 32]>> {
        let stored = self.get(Tag::Identity, &self.address_key(address)).await?;
        Ok(stored.and_then(|bytes| bytes.try_into().ok()))
    }

    async fn delete_identity(&self, address: &str) -> LibraryResult<()> {
        let rest = self.address_key(address);
        self.commit_rows(vec![Op::Delete { tag: Tag::Identity, rest }], Durability::Durable).await
    }

    async fn get_session(&self, address: &str) -> LibraryResult<Option<Bytes>> {
        let stored = self.get(Tag::Session, &self.address_key(address)).await?;
        Ok(stored.map(Bytes::from))
    }

    async fn put_session(&self, address: &str, session: &[u8]) -> LibraryResult<()> {
        self.lease(vec![put(Tag::Session, self.address_key(address), session.to_vec())]).await
    }

    async fn put_sessions_batch(&self, sessions: &[(Arc<str>, Bytes)]) -> LibraryResult<()> {
        let row = |(address, record): &(Arc<str>, Bytes)| put(Tag::Session, self.address_key(address), record.to_vec());
        self.lease(sessions.iter().map(row).collect()).await
    }

    async fn delete_session(&self, address: &str) -> LibraryResult<()> {
        let rest = self.address_key(address);
        self.commit_rows(vec![Op::Delete { tag: Tag::Session, rest }], Durability::Durable).await
    }

    async fn has_signal_state_for_user(&self, user: &str) -> LibraryResult<bool> {
        let prefix = self.name("signal-user", user);
        for tag in [Tag::Session, Tag::Identity] {
            if !self.scan(tag, &prefix, None, Order::Ascending, 1).await?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn store_prekey(&self, id: u32, record: &[u8], _uploaded: bool) -> LibraryResult<()> {
        let ops = vec![put(Tag::PreKey, id.to_be_bytes().to_vec(), record.to_vec())];
        self.commit_rows(ops, Durability::Durable).await
    }

    async fn store_prekeys_batch(&self, keys: &[(u32, Bytes)], _uploaded: bool) -> LibraryResult<()> {
        let row = |(id, record): &(u32, Bytes)| put(Tag::PreKey, id.to_be_bytes().to_vec(), record.to_vec());
        self.commit_rows(keys.iter().map(row).collect(), Durability::Durable).await
    }

    async fn load_prekey(&self, id: u32) -> LibraryResult<Option<Bytes>> {
        Ok(self.get(Tag::PreKey, &id.to_be_bytes()).await?.map(Bytes::from))
    }

    async fn load_prekeys_batch(&self, ids: &[u32]) -> LibraryResult<Vec<(u32, Bytes)>> {
        let mut found = Vec::with_capacity(ids.len());
        for id in ids {
            if let Some(record) = self.load_prekey(*id).await? {
                found.push((*id, record));
            }
        }
        Ok(found)
    }

    /// Nothing reads the mark: the library keeps its watermarks in the device. Not writing it is the surest way
    /// never to bring back a key that was used meanwhile.
    async fn mark_prekeys_uploaded(&self, _ids: &[u32]) -> LibraryResult<()> {
        Ok(())
    }

    async fn remove_prekey(&self, id: u32) -> LibraryResult<()> {
        let rest = id.to_be_bytes().to_vec();
        self.commit_rows(vec![Op::Delete { tag: Tag::PreKey, rest }], Durability::RidesAlong).await
    }

    async fn get_max_prekey_id(&self) -> LibraryResult<u32> {
        let last = self.scan(Tag::PreKey, &[], None, Order::Descending, 1).await?;
        Ok(last.first().and_then(|(key, _)| id_of(key)).unwrap_or(0))
    }

    async fn store_signed_prekey(&self, id: u32, record: &[u8]) -> LibraryResult<()> {
        let ops = vec![put(Tag::SignedPreKey, id.to_be_bytes().to_vec(), record.to_vec())];
        self.commit_rows(ops, Durability::Durable).await
    }

    async fn load_signed_prekey(&self, id: u32) -> LibraryResult<Option<Vec<u8>>> {
        self.get(Tag::SignedPreKey, &id.to_be_bytes()).await
    }

    async fn load_all_signed_prekeys(&self) -> LibraryResult<Vec<(u32, Vec<u8>)>> {
        let rows = self.scan(Tag::SignedPreKey, &[], None, Order::Ascending, SCAN_ROWS_MAX).await?;
        let pairs = rows.into_iter().filter_map(|(key, value)| Some((id_of(&key)?, value)));
        Ok(pairs.collect())
    }

    async fn remove_signed_prekey(&self, id: u32) -> LibraryResult<()> {
        let rest = id.to_be_bytes().to_vec();
        self.commit_rows(vec![Op::Delete { tag: Tag::SignedPreKey, rest }], Durability::RidesAlong).await
    }

    async fn put_sender_key(&self, address: &str, record: &[u8]) -> LibraryResult<()> {
        let ops = vec![put(Tag::SenderKey, self.sender_key_key(address), record.to_vec())];
        self.commit_rows(ops, Durability::Durable).await
    }

    async fn put_sender_keys_batch(&self, sender_keys: &[(Arc<str>, Bytes)]) -> LibraryResult<()> {
        let row =
            |(address, record): &(Arc<str>, Bytes)| put(Tag::SenderKey, self.sender_key_key(address), record.to_vec());
        self.commit_rows(sender_keys.iter().map(row).collect(), Durability::Durable).await
    }

    async fn get_sender_key(&self, address: &str) -> LibraryResult<Option<Vec<u8>>> {
        self.get(Tag::SenderKey, &self.sender_key_key(address)).await
    }

    async fn delete_sender_key(&self, address: &str) -> LibraryResult<()> {
        let rest = self.sender_key_key(address);
        self.commit_rows(vec![Op::Delete { tag: Tag::SenderKey, rest }], Durability::Durable).await
    }
}
