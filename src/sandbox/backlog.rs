//! What a linked device has not yet acknowledged, in order. A stanza stays here from its arrival until the device's
//! receipt or ack, so a client that dies between reading and storing gets it again at its next login.

use crate::sandbox::stanza::{attr, jid};
use std::collections::VecDeque;
use whatsapp_rust::wacore_binary::Node;

/// Stanzas kept per device; the newest are refused beyond it.
pub const BACKLOG_LIMIT: usize = 20_000;

/// A stanza waiting for its acknowledgement.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// Position in the device's order.
    pub sequence: u64,
    /// The stanza without its `offline` attribute.
    pub node: Node,
}

/// The ordered queue of one device.
#[derive(Debug, Default)]
pub struct Backlog {
    waiting: VecDeque<Waiting>,
    next: u64,
}

/// How many stanzas of each kind wait, as `<offline_preview>` tells it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Preview {
    /// All of them.
    pub count: usize,
    /// `<message>`
    pub messages: usize,
    /// `<receipt>`
    pub receipts: usize,
    /// `<notification>`
    pub notifications: usize,
}

impl Backlog {
    /// Appends; false when the queue is full.
    pub fn push(&mut self, node: Node) -> bool {
        if self.waiting.len() >= BACKLOG_LIMIT {
            return false;
        }
        self.waiting.push_back(Waiting { sequence: self.next, node });
        self.next += 1;
        true
    }

    /// Removes the oldest message of this id; false when there is none.
    pub fn received(&mut self, id: &str) -> bool {
        self.remove_first(|node| node.tag == "message" && attr(node, "id").is_some_and(|own| own == id))
    }

    /// Removes the oldest stanza that an `<ack>` can mean; false when there is none. A receipt carries the id of its
    /// message, so several of one id wait together, and only sender and type tell them apart.
    pub fn acknowledge(&mut self, ack: &Node) -> bool {
        self.remove_first(|node| {
            let is_receipt = node.tag == "receipt";
            attr(ack, "class").is_some_and(|class| node.tag == *class)
                && attr(ack, "id") == attr(node, "id")
                && jid(ack, "to") == jid(node, "from")
                && (!is_receipt || attr(ack, "type") == attr(node, "type"))
        })
    }

    fn remove_first(&mut self, is_meant: impl Fn(&Node) -> bool) -> bool {
        let found = self.waiting.iter().position(|waiting| is_meant(&waiting.node));
        found.and_then(|index| self.waiting.remove(index)).is_some()
    }

    /// The sequence the next stanza will get.
    pub fn end(&self) -> u64 {
        self.next
    }

    /// Up to `limit` stanzas with `from <= sequence < end`.
    pub fn range(&self, from: u64, end: u64, limit: usize) -> Vec<Waiting> {
        let start = self.waiting.partition_point(|waiting| waiting.sequence < from);
        self.waiting.iter().skip(start).take_while(|waiting| waiting.sequence < end).take(limit).cloned().collect()
    }

    /// What waits.
    pub fn preview(&self) -> Preview {
        let mut preview = Preview { count: self.waiting.len(), ..Preview::default() };
        for waiting in &self.waiting {
            match waiting.node.tag.as_ref() {
                "message" => preview.messages += 1,
                "receipt" => preview.receipts += 1,
                _ => preview.notifications += 1,
            }
        }
        preview
    }

    /// All that waits, oldest first.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.waiting.iter().map(|waiting| &waiting.node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::stanza::tag;

    fn message(id: &str) -> Node {
        tag("message").attr("id", id).build()
    }

    fn sequences(backlog: &Backlog) -> Vec<u64> {
        backlog.range(0, backlog.end(), 10).iter().map(|waiting| waiting.sequence).collect()
    }

    #[test]
    fn a_stanza_stays_until_it_is_acknowledged() {
        let mut backlog = Backlog::default();
        for id in ["a", "b", "c"] {
            assert!(backlog.push(message(id)));
        }
        assert!(backlog.received("b"));
        assert!(!backlog.received("b"));
        assert!(!backlog.acknowledge(&tag("ack").attr("class", "receipt").attr("id", "a").build()));
        assert_eq!(sequences(&backlog), [0, 2]);
        assert_eq!(backlog.preview(), Preview { count: 2, messages: 2, ..Preview::default() });
        assert!(backlog.acknowledge(&tag("ack").attr("class", "message").attr("id", "a").build()));
        assert_eq!(sequences(&backlog), [2]);
    }

    #[test]
    fn an_ack_means_the_receipt_of_its_sender_and_type() {
        let (ours, theirs) = ("15550000001@s.whatsapp.net", "15550000002@s.whatsapp.net");
        let receipt = |from: &'static str| tag("receipt").attr("id", "a").attr("from", from);
        let ack = |to: &'static str| tag("ack").attr("class", "receipt").attr("id", "a").attr("to", to);
        let mut backlog = Backlog::default();
        backlog.push(receipt(theirs).attr("type", "retry").build());
        backlog.push(receipt(ours).attr("type", "sender").build());
        backlog.push(receipt(theirs).build());
        assert!(backlog.acknowledge(&ack(theirs).build()));
        assert_eq!(sequences(&backlog), [0, 1]);
        assert!(backlog.acknowledge(&ack(ours).attr("type", "sender").build()));
        assert!(!backlog.acknowledge(&ack(ours).attr("type", "retry").build()));
        assert_eq!(sequences(&backlog), [0]);
    }

    #[test]
    fn a_range_respects_its_bounds() {
        let mut backlog = Backlog::default();
        for id in ["a", "b", "c", "d"] {
            backlog.push(message(id));
        }
        let sequences = |from, end, limit| -> Vec<u64> {
            backlog.range(from, end, limit).iter().map(|waiting| waiting.sequence).collect()
        };
        assert_eq!(sequences(1, 3, 10), [1, 2]);
        assert_eq!(sequences(0, 4, 1), [0]);
        assert_eq!(sequences(4, 9, 10), Vec::<u64>::new());
    }

    #[test]
    fn a_full_backlog_refuses() {
        let mut backlog = Backlog::default();
        assert!((0..BACKLOG_LIMIT).all(|_| backlog.push(message("x"))));
        assert!(!backlog.push(message("one too many")));
    }
}
