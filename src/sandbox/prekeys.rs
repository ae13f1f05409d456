//! Published keys: what a linked device uploads, what the server tells it about them, and what it hands to others.

use crate::sandbox::account::Companion;
use crate::sandbox::address::{DeviceAddress, resolve};
use crate::sandbox::signal_store::{Bundle, SignedKey};
use crate::sandbox::stanza::{self, attr, bytes, child_bytes, children, jid, key, key_id, number, tag};
use crate::sandbox::world::World;
use whatsapp_rust::wacore::prekeys::compute_key_bundle_digest;
use whatsapp_rust::wacore_binary::{Jid, Node};

/// One-time prekeys the server stores per device; more are ignored.
const PREKEY_LIMIT: usize = 2_000;
/// Signal over Curve25519.
const KEY_TYPE: [u8; 1] = [5];
const UNREGISTERED: u16 = 406;

/// Answers an `encrypt` query of `device`.
pub fn answer(world: &World, device: &DeviceAddress, iq: &Node) -> Node {
    let Some(question) = children(iq).first() else {
        return stanza::failure(iq, 400, "bad-request");
    };
    let is_set = attr(iq, "type").is_some_and(|kind| kind == "set");
    match (is_set, question.tag.as_ref()) {
        (false, "count") => {
            let count = world.with_companion(device, |companion| companion.prekeys.len()).unwrap_or(0);
            stanza::result(iq, [tag("count").attr("value", count).build()])
        }
        (false, "digest") => match world.with_companion(device, digest) {
            Some(digest) => stanza::result(iq, [digest]),
            None => stanza::failure(iq, 404, "item-not-found"),
        },
        (false, "key") => stanza::result(iq, [hand_out(world, question)]),
        (true, "rotate") => accept(world, device, iq, |companion| rotate(companion, question)),
        (true, _) => accept(world, device, iq, |companion| upload(companion, iq)),
        _ => stanza::failure(iq, 501, "feature-not-implemented"),
    }
}

fn accept(world: &World, device: &DeviceAddress, iq: &Node, change: impl FnOnce(&mut Companion) -> Option<()>) -> Node {
    match world.change_companion(device, change).flatten() {
        Some(()) => stanza::result(iq, []),
        None => stanza::failure(iq, 400, "bad-request"),
    }
}

fn one_time_key(node: &Node) -> Option<(u32, [u8; 32])> {
    Some((number(&child_bytes(node, "id")?)?, key(&child_bytes(node, "value")?)?))
}

fn signed_key(node: &Node) -> Option<SignedKey> {
    let (id, key) = one_time_key(node)?;
    Some(SignedKey { id, key, signature: child_bytes(node, "signature")?.into_owned() })
}

fn upload(companion: &mut Companion, iq: &Node) -> Option<()> {
    let signed = signed_key(iq.get_optional_child("skey")?)?;
    let identity = key(&child_bytes(iq, "identity")?)?;
    let fresh = children(iq.get_optional_child("list")?).iter().filter_map(one_time_key);
    companion.registration_id = number(&child_bytes(iq, "registration")?)?;
    companion.identity = identity;
    companion.signed = signed;
    for (id, key) in fresh {
        companion.prekeys.retain(|(known, _)| *known != id);
        if companion.prekeys.len() < PREKEY_LIMIT {
            companion.prekeys.push_back((id, key));
        }
    }
    Some(())
}

fn rotate(companion: &mut Companion, rotate: &Node) -> Option<()> {
    companion.signed = signed_key(rotate.get_optional_child("skey")?)?;
    Some(())
}

fn signed_node(signed: &SignedKey) -> Node {
    let id = tag("id").bytes(key_id(signed.id)).build();
    let value = tag("value").bytes(signed.key).build();
    tag("skey").children([id, value, tag("signature").bytes(signed.signature.clone()).build()]).build()
}

fn one_time_node(id: u32, key: &[u8; 32]) -> Node {
    tag("key").children([tag("id").bytes(key_id(id)).build(), tag("value").bytes(*key).build()]).build()
}

fn digest(companion: &Companion) -> Node {
    let keys: Vec<&[u8]> = companion.prekeys.iter().map(|(_, key)| key.as_slice()).collect();
    let (signed, identity) = (&companion.signed, companion.identity);
    let hash = compute_key_bundle_digest(&identity, &signed.key, &signed.signature, &keys);
    let ids = companion.prekeys.iter().map(|(id, _)| tag("id").bytes(key_id(*id)).build());
    tag("digest")
        .children([
            tag("registration").bytes(companion.registration_id.to_be_bytes()).build(),
            tag("type").bytes(KEY_TYPE).build(),
            tag("identity").bytes(identity).build(),
            signed_node(signed),
            tag("list").children(ids).build(),
            tag("hash").bytes(hash).build(),
        ])
        .build()
}

fn hand_out(world: &World, question: &Node) -> Node {
    let asked = children(question).iter().filter_map(|user| jid(user, "jid"));
    tag("list").children(asked.map(|jid| user(world, jid))).build()
}

fn user(world: &World, jid: Jid) -> Node {
    let bundle = resolve(&jid).and_then(|(device, _)| world.bundle(&device));
    let node = tag("user").attr("jid", jid);
    match bundle {
        Some(bundle) => node.attr("t", stanza::now()).children(bundle.nodes()).build(),
        None => node.children([tag("error").attr("code", UNREGISTERED).attr("text", "not-acceptable").build()]).build(),
    }
}

impl Bundle {
    fn nodes(&self) -> Vec<Node> {
        let mut nodes = vec![
            tag("registration").bytes(self.registration_id.to_be_bytes()).build(),
            tag("type").bytes(KEY_TYPE).build(),
            tag("identity").bytes(self.identity).build(),
            signed_node(&self.signed),
        ];
        nodes.extend(self.one_time.iter().map(|(id, key)| one_time_node(*id, key)));
        nodes.extend(self.device_identity.iter().map(|bytes| tag("device-identity").bytes(bytes.clone()).build()));
        nodes
    }

    /// The `<keys>` of a retry receipt.
    pub fn retry_node(&self) -> Node {
        let nodes = self.nodes().into_iter().filter(|node| node.tag != "registration");
        tag("keys").children(nodes).build()
    }

    /// Reads the `<keys>` of a retry receipt.
    pub fn from_retry(keys: &Node, registration_id: u32) -> Option<Self> {
        Some(Self {
            registration_id,
            identity: key(&child_bytes(keys, "identity")?)?,
            signed: signed_key(keys.get_optional_child("skey")?)?,
            one_time: keys.get_optional_child("key").and_then(one_time_key),
            device_identity: keys.get_optional_child("device-identity").and_then(bytes).map(|bytes| bytes.into_owned()),
        })
    }
}
