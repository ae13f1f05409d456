//! Secrets of messages, with which later edits, poll votes and replies to them are decrypted. They ride along:
//! losing one in a crash costs an edit that cannot be read, never a message.

use std::collections::HashMap;

use async_trait::async_trait;
use whatsapp_rust::wacore::store::traits::{
    MsgSecretEntry, MsgSecretStore, merge_msg_secret_expiry, merge_msg_secret_message_ts,
};

use super::{LibraryResult, LinkBackend, SWEEP_ROWS_MAX, kind_key, leading_seconds, put, seconds_key};
use crate::store::key::Tag;
use crate::store::number_store::Order;
use crate::store::unit::{Durability, Op};

const ROW: u8 = 0;
const BY_EXPIRY: u8 = 1;

/// A stored secret: expiry, time of the message, the 32 bytes.
#[derive(Clone)]
struct Row {
    expires_at: i64,
    message_ts: i64,
    secret: Vec<u8>,
}

impl Row {
    fn decode(value: &[u8]) -> Option<Self> {
        let (expires_at, rest) = leading_seconds(value)?;
        let (message_ts, secret) = leading_seconds(rest)?;
        Some(Self { expires_at, message_ts, secret: secret.to_vec() })
    }

    fn encode(&self) -> Vec<u8> {
        let mut value = seconds_key(self.expires_at).to_vec();
        value.extend_from_slice(&seconds_key(self.message_ts));
        value.extend_from_slice(&self.secret);
        value
    }
}

fn expiry_key(expires_at: i64, hash: &[u8]) -> Vec<u8> {
    kind_key(BY_EXPIRY, &[&seconds_key(expires_at), hash])
}

impl LinkBackend {
    async fn secret(&self, hash: &[u8]) -> LibraryResult<Option<Row>> {
        let stored = self.get(Tag::MessageSecret, &kind_key(ROW, &[hash])).await?;
        Ok(stored.as_deref().and_then(Row::decode))
    }
}

#[async_trait]
impl MsgSecretStore for LinkBackend {
    async fn put_msg_secrets(&self, entries: Vec<MsgSecretEntry>) -> LibraryResult<usize> {
        let _merging = self.merging.lock().await;
        let mut merged: HashMap<[u8; 16], Row> = HashMap::with_capacity(entries.len());
        let mut ops = Vec::with_capacity(entries.len() * 2);
        for entry in &entries {
            let hash = self.names("message-secret", &[&entry.chat, &entry.sender, &entry.msg_id]);
            let existing = match merged.get(&hash) {
                Some(row) => Some(row.clone()),
                None => self.secret(&hash).await?,
            };
            let mut row =
                Row { expires_at: entry.expires_at, message_ts: entry.message_ts, secret: entry.secret.to_vec() };
            if let Some(existing) = existing {
                row.expires_at = merge_msg_secret_expiry(existing.expires_at, row.expires_at);
                row.message_ts = merge_msg_secret_message_ts(existing.message_ts, row.message_ts);
                let rest = expiry_key(existing.expires_at, &hash);
                ops.push(Op::Delete { tag: Tag::MessageSecret, rest });
            }
            merged.insert(hash, row);
        }
        for (hash, row) in merged {
            if row.expires_at != 0 {
                ops.push(put(Tag::MessageSecret, expiry_key(row.expires_at, &hash), Vec::new()));
            }
            ops.push(put(Tag::MessageSecret, kind_key(ROW, &[&hash]), row.encode()));
        }
        self.commit_rows(ops, Durability::RidesAlong).await?;
        Ok(entries.len())
    }

    async fn get_msg_secret(&self, chat: &str, sender: &str, msg_id: &str) -> LibraryResult<Option<Vec<u8>>> {
        let found = self.get_msg_secret_with_ts(chat, sender, msg_id).await?;
        Ok(found.map(|(secret, _)| secret))
    }

    async fn get_msg_secret_with_ts(
        &self,
        chat: &str,
        sender: &str,
        msg_id: &str,
    ) -> LibraryResult<Option<(Vec<u8>, i64)>> {
        let hash = self.names("message-secret", &[chat, sender, msg_id]);
        Ok(self.secret(&hash).await?.map(|row| (row.secret, row.message_ts)))
    }

    async fn delete_expired_msg_secrets(&self, cutoff_timestamp: i64) -> LibraryResult<u32> {
        let _merging = self.merging.lock().await;
        let rows = self.scan(Tag::MessageSecret, &[BY_EXPIRY], None, Order::Ascending, SWEEP_ROWS_MAX).await?;
        let mut ops = Vec::new();
        let mut deleted = 0;
        for (key, _) in rows {
            let Some((expires_at, hash)) = key.get(1..).and_then(leading_seconds) else {
                continue;
            };
            if expires_at > cutoff_timestamp {
                break;
            }
            let rest = kind_key(ROW, &[hash]);
            ops.push(Op::Delete { tag: Tag::MessageSecret, rest });
            ops.push(Op::Delete { tag: Tag::MessageSecret, rest: key });
            deleted += 1;
        }
        self.commit_rows(ops, Durability::RidesAlong).await?;
        Ok(deleted)
    }
}
