//! What the library remembers about the world: device lists, LID mappings, tokens, sender-key distribution,
//! base keys. All of it can be fetched or made again, so it rides along with the next durable write.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use whatsapp_rust::wacore::store::traits::{
    DeviceListRecord, LidPnMappingEntry, PendingInboundKey, PendingInboundRow, ProtocolStore, TcTokenEntry,
};

use super::{LibraryResult, LinkBackend, SWEEP_ROWS_MAX, encode, kind_key, put};
use crate::store::key::Tag;
use crate::store::unit::{Durability, Op};

const SENDER_KEY_DEVICE: u8 = 1;
const LID: u8 = 2;
const LID_OF_PHONE: u8 = 3;
const BASE_KEY: u8 = 4;
const DEVICES: u8 = 5;
const GROUP: u8 = 6;
const TOKEN: u8 = 7;

const TAG: Tag = Tag::ProtocolCache;

/// A token together with the name the library lists it by.
#[derive(Serialize, Deserialize)]
struct NamedToken {
    jid: String,
    entry: TcTokenEntry,
}

impl LinkBackend {
    fn cache_key(&self, kind: u8, name: &str) -> Vec<u8> {
        kind_key(kind, &[&self.name("protocol", name)])
    }

    fn sender_key_device_key(&self, group: &str, device: &str) -> Vec<u8> {
        let device = self.name("protocol", device);
        kind_key(SENDER_KEY_DEVICE, &[&self.name("protocol", group), &device])
    }

    fn base_key_key(&self, address: &str, message_id: &str) -> Vec<u8> {
        kind_key(BASE_KEY, &[&self.names("base-key", &[address, message_id])])
    }

    pub(super) async fn device_list(&self, user: &str) -> LibraryResult<Option<DeviceListRecord>> {
        let stored = self.get(TAG, &self.cache_key(DEVICES, user)).await?;
        stored.map(|bytes| self.decode(&bytes)).transpose()
    }

    async fn lid_mapping(&self, lid: &str) -> LibraryResult<Option<LidPnMappingEntry>> {
        let stored = self.get(TAG, &self.cache_key(LID, lid)).await?;
        stored.map(|bytes| self.decode(&bytes)).transpose()
    }

    async fn token(&self, jid: &str) -> LibraryResult<Option<TcTokenEntry>> {
        let Some(bytes) = self.get(TAG, &self.cache_key(TOKEN, jid)).await? else {
            return Ok(None);
        };
        Ok(Some(self.decode::<NamedToken>(&bytes)?.entry))
    }

    async fn write_token(&self, jid: &str, entry: TcTokenEntry) -> LibraryResult<()> {
        let named = NamedToken { jid: jid.to_owned(), entry };
        let ops = vec![put(TAG, self.cache_key(TOKEN, jid), encode(&named)?)];
        self.commit_rows(ops, Durability::RidesAlong).await
    }

    async fn write(&self, rest: Vec<u8>, value: Vec<u8>) -> LibraryResult<()> {
        self.commit_rows(vec![put(TAG, rest, value)], Durability::RidesAlong).await
    }

    async fn remove(&self, rest: Vec<u8>) -> LibraryResult<()> {
        self.commit_rows(vec![Op::Delete { tag: TAG, rest }], Durability::RidesAlong).await
    }

    async fn tokens(&self) -> LibraryResult<Vec<(Vec<u8>, NamedToken)>> {
        let rows = self.list(TAG, &[TOKEN]).await?;
        let decoded = rows.into_iter().map(|(key, value)| Ok((key, self.decode(&value)?)));
        decoded.collect()
    }
}

#[async_trait]
impl ProtocolStore for LinkBackend {
    async fn get_sender_key_devices(&self, group_jid: &str) -> LibraryResult<Vec<(String, bool)>> {
        let rows = self.list(TAG, &self.cache_key(SENDER_KEY_DEVICE, group_jid)).await?;
        let read = rows.into_iter().filter_map(|(_, value)| {
            let (has_key, device) = value.split_first()?;
            Some((String::from_utf8(device.to_vec()).ok()?, *has_key != 0))
        });
        Ok(read.collect())
    }

    async fn set_sender_key_status(&self, group_jid: &str, entries: &[(&str, bool)]) -> LibraryResult<()> {
        let row = |(device, has_key): &(&str, bool)| {
            let mut value = vec![u8::from(*has_key)];
            value.extend_from_slice(device.as_bytes());
            put(TAG, self.sender_key_device_key(group_jid, device), value)
        };
        self.commit_rows(entries.iter().map(row).collect(), Durability::RidesAlong).await
    }

    async fn clear_sender_key_devices(&self, group_jid: &str) -> LibraryResult<()> {
        self.delete_below(TAG, &self.cache_key(SENDER_KEY_DEVICE, group_jid)).await
    }

    async fn delete_sender_key_device_rows(&self, device_jids: &[&str]) -> LibraryResult<()> {
        let gone: Vec<[u8; 16]> = device_jids.iter().map(|jid| self.name("protocol", jid)).collect();
        let rows = self.list(TAG, &[SENDER_KEY_DEVICE]).await?;
        let ops = rows
            .into_iter()
            .filter(|(key, _)| gone.iter().any(|device| key.ends_with(device)))
            .map(|(rest, _)| Op::Delete { tag: TAG, rest });
        self.commit_rows(ops.collect(), Durability::RidesAlong).await
    }

    async fn clear_all_sender_key_devices(&self) -> LibraryResult<()> {
        self.delete_below(TAG, &[SENDER_KEY_DEVICE]).await
    }

    async fn get_lid_mapping(&self, lid: &str) -> LibraryResult<Option<LidPnMappingEntry>> {
        self.lid_mapping(lid).await
    }

    async fn get_pn_mapping(&self, phone: &str) -> LibraryResult<Option<LidPnMappingEntry>> {
        let Some(lid) = self.get(TAG, &self.cache_key(LID_OF_PHONE, phone)).await? else {
            return Ok(None);
        };
        match String::from_utf8(lid) {
            Ok(lid) => self.lid_mapping(&lid).await,
            Err(_) => Ok(None),
        }
    }

    async fn put_lid_mapping(&self, entry: &LidPnMappingEntry) -> LibraryResult<()> {
        self.put_lid_mappings(std::slice::from_ref(entry)).await
    }

    async fn put_lid_mappings(&self, entries: &[LidPnMappingEntry]) -> LibraryResult<()> {
        let _merging = self.merging.lock().await;
        let mut ops = Vec::with_capacity(entries.len() * 2);
        for entry in entries {
            let previous = self.lid_mapping(&entry.lid).await?;
            if let Some(previous) = previous.filter(|previous| previous.phone_number != entry.phone_number) {
                let rest = self.cache_key(LID_OF_PHONE, &previous.phone_number);
                ops.push(Op::Delete { tag: TAG, rest });
            }
            let by_phone = self.cache_key(LID_OF_PHONE, &entry.phone_number);
            ops.push(put(TAG, by_phone, entry.lid.clone().into_bytes()));
            ops.push(put(TAG, self.cache_key(LID, &entry.lid), encode(entry)?));
        }
        self.commit_rows(ops, Durability::RidesAlong).await
    }

    async fn get_all_lid_mappings(&self) -> LibraryResult<Vec<LidPnMappingEntry>> {
        let rows = self.list(TAG, &[LID]).await?;
        rows.iter().map(|(_, value)| self.decode(value)).collect()
    }

    async fn save_base_key(&self, address: &str, message_id: &str, base_key: &[u8]) -> LibraryResult<()> {
        self.write(self.base_key_key(address, message_id), base_key.to_vec()).await
    }

    async fn has_same_base_key(&self, address: &str, message_id: &str, current: &[u8]) -> LibraryResult<bool> {
        let stored = self.get(TAG, &self.base_key_key(address, message_id)).await?;
        Ok(stored.as_deref() == Some(current))
    }

    async fn delete_base_key(&self, address: &str, message_id: &str) -> LibraryResult<()> {
        self.remove(self.base_key_key(address, message_id)).await
    }

    async fn update_device_list(&self, record: DeviceListRecord) -> LibraryResult<()> {
        self.update_device_lists(vec![record]).await
    }

    async fn update_device_lists(&self, records: Vec<DeviceListRecord>) -> LibraryResult<()> {
        let mut ops = Vec::with_capacity(records.len());
        for record in &records {
            ops.push(put(TAG, self.cache_key(DEVICES, &record.user), encode(record)?));
        }
        self.commit_rows(ops, Durability::RidesAlong).await
    }

    async fn get_devices(&self, user: &str) -> LibraryResult<Option<DeviceListRecord>> {
        self.device_list(user).await
    }

    async fn delete_devices(&self, user: &str) -> LibraryResult<()> {
        self.remove(self.cache_key(DEVICES, user)).await
    }

    async fn get_group_metadata(&self, group_jid: &str) -> LibraryResult<Option<Vec<u8>>> {
        self.get(TAG, &self.cache_key(GROUP, group_jid)).await
    }

    async fn put_group_metadata(&self, group_jid: &str, blob: &[u8]) -> LibraryResult<()> {
        self.write(self.cache_key(GROUP, group_jid), blob.to_vec()).await
    }

    async fn delete_group_metadata(&self, group_jid: &str) -> LibraryResult<()> {
        self.remove(self.cache_key(GROUP, group_jid)).await
    }

    async fn get_tc_token(&self, jid: &str) -> LibraryResult<Option<TcTokenEntry>> {
        self.token(jid).await
    }

    async fn put_tc_token(&self, jid: &str, entry: &TcTokenEntry) -> LibraryResult<()> {
        let _merging = self.merging.lock().await;
        self.write_token(jid, entry.clone()).await
    }

    async fn delete_tc_token(&self, jid: &str) -> LibraryResult<()> {
        let _merging = self.merging.lock().await;
        self.remove(self.cache_key(TOKEN, jid)).await
    }

    async fn get_all_tc_token_jids(&self) -> LibraryResult<Vec<String>> {
        Ok(self.tokens().await?.into_iter().map(|(_, token)| token.jid).collect())
    }

    async fn delete_expired_tc_tokens(&self, token_cutoff: i64, sender_cutoff: i64) -> LibraryResult<u32> {
        let _merging = self.merging.lock().await;
        let stale = self.tokens().await?.into_iter().filter(|(_, token)| {
            let entry = &token.entry;
            let received = !entry.token.is_empty() && entry.token_timestamp >= token_cutoff;
            let issued = entry.sender_timestamp.is_some_and(|at| at >= sender_cutoff);
            !received && !issued
        });
        let ops: Vec<Op> = stale.take(SWEEP_ROWS_MAX).map(|(rest, _)| Op::Delete { tag: TAG, rest }).collect();
        let deleted = u32::try_from(ops.len()).unwrap_or(u32::MAX);
        self.commit_rows(ops, Durability::RidesAlong).await?;
        Ok(deleted)
    }

    async fn touch_tc_token_sender_timestamp(&self, jid: &str, sender_timestamp: i64) -> LibraryResult<()> {
        let _merging = self.merging.lock().await;
        let mut entry = self.token(jid).await?.unwrap_or(TcTokenEntry {
            token: Vec::new(),
            token_timestamp: sender_timestamp,
            sender_timestamp: None,
        });
        let forward = entry.sender_timestamp.map_or(sender_timestamp, |at| at.max(sender_timestamp));
        entry.sender_timestamp = Some(forward);
        self.write_token(jid, entry).await
    }

    async fn store_received_tc_token(&self, jid: &str, token: &[u8], token_timestamp: i64) -> LibraryResult<()> {
        let _merging = self.merging.lock().await;
        let existing = self.token(jid).await?;
        let is_newer = |entry: &TcTokenEntry| !entry.token.is_empty() && token_timestamp < entry.token_timestamp;
        if existing.as_ref().is_some_and(is_newer) {
            return Ok(());
        }
        let entry = TcTokenEntry {
            token: token.to_vec(),
            token_timestamp,
            sender_timestamp: existing.and_then(|entry| entry.sender_timestamp),
        };
        self.write_token(jid, entry).await
    }

    async fn store_sent_message(&self, chat_jid: &str, message_id: &str, payload: &[u8]) -> LibraryResult<()> {
        self.keep_sent(chat_jid, message_id, payload).await
    }

    async fn take_sent_message(&self, chat_jid: &str, message_id: &str) -> LibraryResult<Option<Vec<u8>>> {
        self.sent(chat_jid, message_id).await
    }

    async fn delete_expired_sent_messages(&self, cutoff_timestamp: i64) -> LibraryResult<u32> {
        self.sweep_sent(cutoff_timestamp).await
    }

    async fn store_pending_inbound(&self, chat: &str, sender: &str, id: &str, message: &[u8]) -> LibraryResult<()> {
        let row = PendingInboundRow { chat, sender, id, message };
        self.buffer_pending(&[row]).await
    }

    async fn get_pending_inbound(&self, chat: &str, sender: &str, id: &str) -> LibraryResult<Option<Vec<u8>>> {
        self.pending(chat, sender, id).await
    }

    async fn delete_pending_inbound(&self, chat: &str, sender: &str, id: &str) -> LibraryResult<()> {
        self.forget_pending(&[PendingInboundKey { chat, sender, id }]).await
    }

    async fn delete_expired_pending_inbound(&self, cutoff_timestamp: i64) -> LibraryResult<u32> {
        self.sweep_pending(cutoff_timestamp).await
    }

    async fn store_pending_inbound_batch(&self, rows: &[PendingInboundRow<'_>]) -> LibraryResult<()> {
        self.buffer_pending(rows).await
    }

    async fn delete_pending_inbound_batch(&self, keys: &[PendingInboundKey<'_>]) -> LibraryResult<()> {
        self.forget_pending(keys).await
    }
}
