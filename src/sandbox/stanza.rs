//! Small words for reading and writing binary nodes, shared by every stanza module.
//!
//! Ids and attribute strings must never contain an at sign unless they are JIDs: the codec would encode them as one.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};
use whatsapp_rust::wacore_binary::builder::NodeBuilder;
use whatsapp_rust::wacore_binary::{Jid, Node, NodeContent};

/// The server's own name in `from` and `to`.
pub const SERVER: &str = "s.whatsapp.net";

/// Starts a node.
pub fn tag(name: &'static str) -> NodeBuilder {
    NodeBuilder::new(name)
}

/// An attribute as text.
pub fn attr<'a>(node: &'a Node, key: &str) -> Option<Cow<'a, str>> {
    node.attrs.get(key).map(|value| value.as_str())
}

/// An attribute as a JID.
pub fn jid(node: &Node, key: &str) -> Option<Jid> {
    node.attrs.get(key)?.to_jid()
}

/// The children, or none.
pub fn children(node: &Node) -> &[Node] {
    node.children().unwrap_or_default()
}

/// The content as bytes, also when a client sent it as a string token.
pub fn bytes(node: &Node) -> Option<Cow<'_, [u8]>> {
    match node.content.as_ref()? {
        NodeContent::Bytes(bytes) => Some(Cow::Borrowed(bytes)),
        NodeContent::String(text) => Some(Cow::Borrowed(text.as_bytes())),
        NodeContent::Nodes(_) => None,
    }
}

/// The bytes of a named child.
pub fn child_bytes<'a>(node: &'a Node, name: &str) -> Option<Cow<'a, [u8]>> {
    bytes(node.get_optional_child(name)?)
}

/// A big-endian number of up to four bytes.
pub fn number(bytes: &[u8]) -> Option<u32> {
    (!bytes.is_empty() && bytes.len() <= 4).then(|| bytes.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
}

/// The three-byte form in which key ids travel.
pub fn key_id(id: u32) -> Vec<u8> {
    id.to_be_bytes()[1..].to_vec()
}

/// Exactly 32 bytes, as every public key is.
pub fn key(bytes: &[u8]) -> Option<[u8; 32]> {
    bytes.try_into().ok()
}

/// The good answer to `iq`.
pub fn result(iq: &Node, content: impl IntoIterator<Item = Node>) -> Node {
    let content: Vec<Node> = content.into_iter().collect();
    let answer = answer(iq, "result");
    if content.is_empty() { answer.build() } else { answer.children(content).build() }
}

/// The bad answer to `iq`.
pub fn failure(iq: &Node, code: u16, text: &'static str) -> Node {
    answer(iq, "error").children([tag("error").attr("code", code).attr("text", text).build()]).build()
}

fn answer(iq: &Node, kind: &'static str) -> NodeBuilder {
    let id = attr(iq, "id").unwrap_or_default().into_owned();
    tag("iq").attr("from", SERVER).attr("type", kind).attr("id", id)
}

/// Seconds since the epoch by the wall clock.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// A fresh id: hexadecimal, so it can never be mistaken for a JID.
pub fn fresh_id(prefix: &str) -> String {
    format!("{prefix}{:016X}", rand::random::<u64>())
}
