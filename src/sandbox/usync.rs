//! The directory: is a number on WhatsApp, what is its hidden id, which devices does it have.

use crate::sandbox::address::{Namespace, PhoneNumber, resolve};
use crate::sandbox::stanza::{self, bytes, children, jid, tag};
use crate::sandbox::world::World;
use whatsapp_rust::wacore_binary::{Jid, Node};

/// What one `<user>` of a query asks for.
struct Asked {
    phone: Option<PhoneNumber>,
    jid: Option<Jid>,
    contact: Option<String>,
}

/// Answers a `usync` query.
pub fn answer(world: &World, iq: &Node) -> Node {
    let Some(usync) = iq.get_optional_child("usync") else {
        return stanza::failure(iq, 400, "bad-request");
    };
    let protocols: Vec<&str> = match usync.get_optional_child("query") {
        Some(query) => children(query).iter().map(|protocol| protocol.tag.as_ref()).collect(),
        None => Vec::new(),
    };
    let users = usync.get_optional_child("list").map(children).unwrap_or_default();
    let users = users.iter().map(|node| user(world, &protocols, &Asked::read(node)));
    let list = tag("list").children(users).build();
    let results =
        protocols.iter().map(|protocol| tag_of(protocol)).filter_map(|name| name.map(|name| tag(name).build()));
    let mut answer = tag("usync");
    for key in ["sid", "mode", "context", "index", "last"] {
        if let Some(value) = usync.attrs.get(key) {
            answer = answer.attr(key, value.clone());
        }
    }
    stanza::result(iq, [answer.children([tag("result").children(results).build(), list]).build()])
}

fn tag_of(protocol: &str) -> Option<&'static str> {
    ["devices", "contact", "lid", "status", "business", "disappearing_mode", "picture"]
        .into_iter()
        .find(|known| *known == protocol)
}

impl Asked {
    fn read(node: &Node) -> Self {
        let jid = jid(node, "jid").or_else(|| jid(node, "pn_jid"));
        let contact = node.get_optional_child("contact").and_then(bytes);
        let contact = contact.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).filter(|text| !text.is_empty());
        let by_jid = jid.as_ref().and_then(resolve).map(|(device, _)| device.phone);
        let phone = by_jid.or_else(|| contact.as_deref().and_then(PhoneNumber::parse));
        Self { phone, jid, contact }
    }
}

fn user(world: &World, protocols: &[&str], asked: &Asked) -> Node {
    let phone = asked.phone.as_ref();
    let known = phone.filter(|phone| world.account(phone).is_some());
    let jid = asked.jid.as_ref().map(Jid::to_non_ad).or_else(|| phone.map(|phone| Namespace::Phone.user(phone)));
    let mut node = tag("user");
    if let Some(jid) = jid {
        node = node.attr("jid", jid);
    }
    if let Some(known) = known {
        node = node.attr("pn_jid", Namespace::Phone.user(known));
    }
    let answers = protocols.iter().filter_map(|protocol| match (*protocol, known) {
        ("contact", known) => Some(contact(asked, known.is_some())),
        (_, None) => None,
        ("devices", Some(phone)) => Some(devices(world, phone)),
        ("lid", Some(phone)) => Some(tag("lid").attr("val", Namespace::Hidden.user(phone)).build()),
        ("status", Some(_)) => Some(tag("status").attr("t", stanza::now()).bytes("on the sandbox".as_bytes()).build()),
        ("disappearing_mode", Some(_)) => Some(tag("disappearing_mode").attr("duration", 0).attr("t", 0).build()),
        ("business", Some(_)) => Some(tag("business").build()),
        _ => None,
    });
    node.children(answers).build()
}

fn contact(asked: &Asked, on_whatsapp: bool) -> Node {
    let node = tag("contact").attr("type", if on_whatsapp { "in" } else { "out" });
    match &asked.contact {
        Some(text) => node.bytes(text.as_bytes()).build(),
        None => node.build(),
    }
}

fn devices(world: &World, phone: &PhoneNumber) -> Node {
    let Some(listing) = world.listing(phone) else {
        return tag("devices").build();
    };
    let companions = listing
        .companions
        .iter()
        .map(|(device, key_index)| tag("device").attr("id", *device).attr("key-index", *key_index).build());
    let primary = tag("device").attr("id", 0).build();
    let list = tag("device-list").children(std::iter::once(primary).chain(companions)).build();
    let index = tag("key-index-list").attr("ts", listing.at).bytes(listing.key_index_list).build();
    tag("devices").children([list, index]).build()
}
