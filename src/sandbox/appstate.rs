//! The account's settings store: collections are always empty here, but clients insist on the key that would open
//! them, and on an answer for every collection they ask about.

use crate::sandbox::persistence::base64_bytes;
use crate::sandbox::stanza::{self, attr, children, tag};
use serde::{Deserialize, Serialize};
use whatsapp_rust::buffa::MessageField;
use whatsapp_rust::wacore_binary::Node;
use whatsapp_rust::waproto::whatsapp as wa;
use whatsapp_rust::waproto::whatsapp::message::protocol_message::Type;
use whatsapp_rust::waproto::whatsapp::message::{
    AppStateSyncKey, AppStateSyncKeyData, AppStateSyncKeyFingerprint, AppStateSyncKeyId, AppStateSyncKeyShare,
    ProtocolMessage,
};

/// The key a phone shares with its linked devices.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AppStateKey {
    #[serde(with = "base64_bytes")]
    id: Vec<u8>,
    #[serde(with = "base64_bytes")]
    data: Vec<u8>,
    fingerprint: u32,
    created: u64,
}

impl AppStateKey {
    /// A new key.
    pub fn generate() -> Self {
        let tail = rand::random::<u32>().to_be_bytes();
        Self {
            id: [&[0, 0], tail.as_slice()].concat(),
            data: rand::random::<[u8; 32]>().to_vec(),
            fingerprint: rand::random(),
            created: stanza::now(),
        }
    }

    /// The message that shares it.
    pub fn share(&self) -> wa::Message {
        let fingerprint = AppStateSyncKeyFingerprint {
            raw_id: Some(self.fingerprint),
            current_index: Some(0),
            device_indexes: vec![0],
        };
        let data = AppStateSyncKeyData {
            key_data: Some(self.data.clone()),
            fingerprint: MessageField::some(fingerprint),
            timestamp: Some(self.created as i64 * 1_000),
        };
        let key = AppStateSyncKey {
            key_id: MessageField::some(AppStateSyncKeyId { key_id: Some(self.id.clone()) }),
            key_data: MessageField::some(data),
        };
        let protocol = ProtocolMessage {
            r#type: Some(Type::AppStateSyncKeyShare),
            app_state_sync_key_share: MessageField::some(AppStateSyncKeyShare { keys: vec![key] }),
            ..Default::default()
        };
        wa::Message { protocol_message: MessageField::some(protocol), ..Default::default() }
    }
}

/// Answers a `w:sync:app:state` query: nothing has changed, and a patch is taken as it is. Or, on order, every collection
/// is refused with `error`.
pub fn answer(iq: &Node, error: Option<u16>) -> Node {
    let asked = iq.get_optional_child("sync").map(children).unwrap_or_default();
    let collections = asked.iter().filter(|node| node.tag == "collection").map(|collection| {
        let version: u64 = attr(collection, "version").and_then(|version| version.parse().ok()).unwrap_or(0);
        let patched = u64::from(collection.get_optional_child("patch").is_some());
        let name = attr(collection, "name").unwrap_or_default().into_owned();
        if let Some(code) = error {
            let error = tag("error").attr("code", code).attr("text", "refused-on-order").build();
            return tag("collection").attr("name", name).attr("type", "error").children([error]).build();
        }
        tag("collection").attr("name", name).attr("version", version + patched).build()
    });
    stanza::result(iq, [tag("sync").children(collections).build()])
}
