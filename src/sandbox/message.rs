//! Fan-out: one `<message>` of a linked device becomes one stanza per device it is sealed for, and one ack.
//!
//! Whatever the server cannot read it copies; it looks into the Signal envelope only to catch a key used twice.

use crate::sandbox::address::{DeviceAddress, Namespace, resolve};
use crate::sandbox::phone::Delivery;
use crate::sandbox::stanza::{self, attr, children, jid, tag};
use crate::sandbox::world::World;
use whatsapp_rust::wacore_binary::{Jid, Node};

/// The server's word for a recipient that does not exist.
const NO_SUCH_RECIPIENT: u16 = 404;
/// Attributes of a message that its recipients see unchanged.
const KEPT: [&str; 3] = ["type", "edit", "category"];
/// Parts of a message that its recipients see unchanged.
const KEPT_PARTS: [&str; 2] = ["device-identity", "meta"];

/// Takes a message from a linked device; returns the ack, unless a fault swallows it.
pub fn from_device(world: &World, device: &DeviceAddress, node: &Node) -> Option<Node> {
    world.stats.messages.add(1);
    if world.faults.loses(&device.phone) {
        return None;
    }
    let refused = match world.faults.nack(&device.phone) {
        Some(code) => Some(code),
        None => fan_out(world, device, node),
    };
    if refused.is_some() {
        world.stats.nacks.add(1);
    }
    let muted = world.faults.drops_ack(&device.phone);
    (!muted).then(|| acknowledgement(node, refused))
}

fn acknowledgement(node: &Node, error: Option<u16>) -> Node {
    let id = attr(node, "id").unwrap_or_default().into_owned();
    let mut ack = tag("ack").attr("class", "message").attr("id", id);
    if let Some(to) = jid(node, "to") {
        ack = ack.attr("from", to);
    }
    ack = ack.attr("t", stanza::now());
    match error {
        Some(code) => ack.attr("error", code).build(),
        None => ack.build(),
    }
}

/// Delivers; the error code of the ack when nobody can get it.
fn fan_out(world: &World, device: &DeviceAddress, node: &Node) -> Option<u16> {
    let Some(to) = jid(node, "to") else { return Some(400) };
    let Some((target, addressing)) = resolve(&to) else {
        return Some(NO_SUCH_RECIPIENT);
    };
    if world.account(&target.phone).is_none() {
        return Some(NO_SUCH_RECIPIENT);
    }
    let name = world.name_of(&device.phone);
    let envelope = Envelope { from: device, to: &to, addressing, name: &name, node };
    let deliveries = match node.get_optional_child("enc") {
        // Of a repetition only the direct copy counts; a client may attach others for devices that have it already.
        Some(enc) => vec![envelope.seal(target, vec![enc.clone()])],
        None => envelope.participants(),
    };
    for delivery in &deliveries {
        world.stats.inspect(delivery);
    }
    world.deliver(deliveries);
    None
}

struct Envelope<'a> {
    from: &'a DeviceAddress,
    to: &'a Jid,
    addressing: Namespace,
    name: &'a str,
    node: &'a Node,
}

impl Envelope<'_> {
    fn participants(&self) -> Vec<Delivery> {
        let participants = self.node.get_optional_child("participants").map(children).unwrap_or_default();
        let sealed = participants.iter().filter_map(|to| {
            let (device, _) = resolve(&jid(to, "jid")?)?;
            Some(self.seal(device, children(to).to_vec()))
        });
        sealed.collect()
    }

    fn seal(&self, to: DeviceAddress, mut content: Vec<Node>) -> Delivery {
        let (alternative, other) = match self.addressing {
            Namespace::Phone => ("sender_lid", Namespace::Hidden),
            Namespace::Hidden => ("sender_pn", Namespace::Phone),
        };
        let id = attr(self.node, "id").unwrap_or_default().into_owned();
        let mut stanza = tag("message")
            .attr("from", self.addressing.device(self.from))
            .attr("id", id)
            .attr("t", stanza::now())
            .attr("notify", self.name)
            .attr(alternative, other.user(&self.from.phone));
        for key in KEPT {
            if let Some(value) = self.node.attrs.get(key) {
                stanza = stanza.attr(key, value.clone());
            }
        }
        let own_device = to.phone == self.from.phone;
        if own_device && attr(self.node, "category").is_none() {
            let named = jid(self.node, "recipient");
            stanza = stanza.attr("recipient", named.unwrap_or_else(|| self.to.clone()).to_non_ad());
        }
        content.extend(KEPT_PARTS.iter().filter_map(|part| self.node.get_optional_child(part)).cloned());
        Delivery { from: self.from.clone(), to, node: stanza.children(content).build() }
    }
}
