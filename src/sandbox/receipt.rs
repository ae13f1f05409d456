//! Receipts: delivery, read, played and retry, from linked devices and from phones, carried to those who wrote.
//!
//! A tick concerns every device of the writer; a retry and the bookkeeping between an account's own devices concern
//! exactly one.

use crate::sandbox::address::{DeviceAddress, Namespace, resolve};
use crate::sandbox::phone::Delivery;
use crate::sandbox::stanza::{self, attr, children, jid, tag};
use crate::sandbox::world::World;
use whatsapp_rust::wacore_binary::{Jid, Node};

/// What a receipt says.
#[derive(Debug, Clone)]
pub struct Receipt {
    /// The messages it is about.
    pub ids: Vec<String>,
    /// The `type`; none is plain delivery.
    pub kind: Option<String>,
    /// The chat, when a device reports on a message of its own account.
    pub recipient: Option<Jid>,
    /// When.
    pub at: u64,
}

/// A receipt on its way.
#[derive(Debug, Clone)]
pub struct Tick {
    /// The device that reports.
    pub from: DeviceAddress,
    /// The device that wrote.
    pub to: DeviceAddress,
    /// How the writer is addressed.
    pub addressing: Namespace,
    /// What is reported.
    pub receipt: Receipt,
}

impl Receipt {
    /// The ids of a `<receipt>`: its own and those of its list.
    pub fn ids_of(node: &Node) -> Vec<String> {
        let listed = node.get_optional_child("list").map(children).unwrap_or_default();
        let listed = listed.iter().filter_map(|item| attr(item, "id"));
        attr(node, "id").into_iter().chain(listed).map(|id| id.into_owned()).collect()
    }
}

impl Tick {
    fn node(&self) -> Node {
        let receipt = &self.receipt;
        let mut node = tag("receipt").attr("from", self.addressing.device(&self.from));
        if let Some(id) = receipt.ids.first() {
            node = node.attr("id", id);
        }
        if let Some(kind) = &receipt.kind {
            node = node.attr("type", kind);
        }
        if let Some(recipient) = &receipt.recipient {
            node = node.attr("recipient", recipient);
        }
        node = node.attr("t", receipt.at);
        let more = receipt.ids.iter().skip(1).map(|id| tag("item").attr("id", id).build());
        let more: Vec<Node> = more.collect();
        if more.is_empty() { node.build() } else { node.children([tag("list").children(more).build()]).build() }
    }

    fn concerns_one_device(&self) -> bool {
        let kind = self.receipt.kind.as_deref();
        matches!(kind, Some("sender" | "peer_msg")) || self.from.phone == self.to.phone
    }

    /// The stanzas that carry this tick.
    pub fn deliveries(&self, world: &World) -> Vec<Delivery> {
        let node = self.node();
        let to = |device| Delivery {
            from: self.from.clone(),
            to: DeviceAddress::new(self.to.phone.clone(), device),
            node: node.clone(),
        };
        if self.concerns_one_device() {
            return vec![to(self.to.device)];
        }
        world.devices(&self.to.phone).into_iter().map(to).collect()
    }
}

/// Takes a receipt from a linked device: crosses off what it acknowledges, passes it on, acknowledges it.
pub fn from_device(world: &World, device: &DeviceAddress, node: &Node) -> Node {
    let ids = Receipt::ids_of(node);
    world.stats.receipts.add(1);
    let kind = attr(node, "type").map(|kind| kind.into_owned());
    // Asking again acknowledges nothing: the ack that follows clears the copy that could not be opened, and would
    // otherwise clear the repetition that may have arrived in between.
    if kind.as_deref() != Some("retry") {
        world.received(device, &ids);
    }
    let to = jid(node, "to");
    if let Some((writer, addressing)) = to.as_ref().and_then(resolve) {
        match kind.as_deref() {
            Some("retry") => {
                world.stats.retry_receipts.add(1);
                world.deliver(vec![retry(device, writer, addressing, node)]);
            }
            Some("read-self" | "played-self") => {
                world.deliver(to_own_devices(world, device, addressing, node, kind.as_deref(), to.as_ref()));
            }
            _ => {
                let recipient = jid(node, "recipient");
                let receipt = Receipt { ids, kind: kind.clone(), recipient, at: stanza::now() };
                let tick = Tick { from: device.clone(), to: writer, addressing, receipt };
                world.deliver(tick.deliveries(world));
            }
        }
    }
    acknowledgement(node, kind.as_deref(), to)
}

fn acknowledgement(node: &Node, kind: Option<&str>, to: Option<Jid>) -> Node {
    let id = attr(node, "id").unwrap_or_default().into_owned();
    let mut ack = tag("ack").attr("class", "receipt").attr("id", id);
    if let Some(to) = to {
        ack = ack.attr("from", to);
    }
    if let Some(kind) = kind {
        ack = ack.attr("type", kind);
    }
    if let Some(participant) = jid(node, "participant") {
        ack = ack.attr("participant", participant);
    }
    ack.build()
}

fn retry(device: &DeviceAddress, writer: DeviceAddress, addressing: Namespace, node: &Node) -> Delivery {
    let id = attr(node, "id").unwrap_or_default().into_owned();
    let mut receipt = tag("receipt")
        .attr("from", addressing.device(device))
        .attr("id", id)
        .attr("type", "retry")
        .attr("t", stanza::now());
    for key in ["recipient", "category"] {
        if let Some(value) = node.attrs.get(key) {
            receipt = receipt.attr(key, value.clone());
        }
    }
    let node = receipt.children(children(node).iter().cloned()).build();
    Delivery { from: device.clone(), to: writer, node }
}

fn to_own_devices(
    world: &World,
    device: &DeviceAddress,
    addressing: Namespace,
    node: &Node,
    kind: Option<&str>,
    chat: Option<&Jid>,
) -> Vec<Delivery> {
    let receipt = Receipt {
        ids: Receipt::ids_of(node),
        kind: kind.map(str::to_owned),
        recipient: chat.cloned(),
        at: stanza::now(),
    };
    let others = world.devices(&device.phone).into_iter().filter(|other| *other != device.device);
    let tick = |other| Tick {
        from: device.clone(),
        to: DeviceAddress::new(device.phone.clone(), other),
        addressing,
        receipt: receipt.clone(),
    };
    others.flat_map(|other| tick(other).deliveries(world)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_names_its_own_id_first() {
        let items = ["b", "c"].map(|id| tag("item").attr("id", id).build());
        let node = tag("receipt").attr("id", "a").children([tag("list").children(items).build()]).build();
        assert_eq!(Receipt::ids_of(&node), ["a", "b", "c"]);
    }
}
