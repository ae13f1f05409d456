//! What a linked device has not yet acknowledged, in order. A stanza stays here from its arrival until the device's
//! receipt or ack, so a client that dies between reading and storing gets it again at its next login.

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

    /// Removes the oldest stanza of this class and id; false when there is none.
    pub fn acknowledge(&mut self, class: &str, id: &str) -> bool {
        let found = self.waiting.iter().position(|waiting| {
            waiting.node.tag == class && waiting.node.attrs.get("id").is_some_and(|value| *value == id)
        });
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

    #[test]
    fn a_stanza_stays_until_it_is_acknowledged() {
        let mut backlog = Backlog::default();
        for id in ["a", "b", "c"] {
            assert!(backlog.push(message(id)));
        }
        assert!(backlog.acknowledge("message", "b"));
        assert!(!backlog.acknowledge("message", "b"));
        assert!(!backlog.acknowledge("receipt", "a"));
        let left: Vec<u64> = backlog.range(0, backlog.end(), 10).iter().map(|waiting| waiting.sequence).collect();
        assert_eq!(left, [0, 2]);
        assert_eq!(backlog.preview(), Preview { count: 2, messages: 2, ..Preview::default() });
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
