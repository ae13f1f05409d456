//! Messages between the socket and the library's decryption. The library queues them without a limit, so reading stops
//! while too many wait; and those that had waited for this connection are remembered, in case one of them was lost.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use whatsapp_rust::wacore_binary::{Node, OwnedNodeRef};

use super::stanza;

/// Messages that wait for their turn before reading stops. WhatsApp holds back the others.
const QUEUED_MAX: usize = 1024;
/// Reading goes on when no more than these wait.
const QUEUED_LOW: usize = QUEUED_MAX / 2;
/// Messages remembered of those that had waited for this connection.
const WAITED_MAX: usize = QUEUED_MAX + 64;

/// The messages of one connection.
#[derive(Default)]
pub(super) struct Backlog {
    /// What the library has not begun to decrypt: it drops a stanza then.
    queued: Mutex<VecDeque<Weak<OwnedNodeRef>>>,
    /// The newest messages that had waited for this connection, without what is sealed in them.
    waited: Mutex<VecDeque<Node>>,
    /// Those of them that a crash has lost.
    lost: Mutex<VecDeque<Node>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Backlog {
    /// A stanza arrived; runs before the library looks at it.
    pub(super) fn hear(&self, node: &Arc<OwnedNodeRef>) {
        let stanza = node.get();
        if !stanza::is_message(stanza) {
            return;
        }
        let mut queued = lock(&self.queued);
        while queued.front().is_some_and(|first| first.strong_count() == 0) {
            queued.pop_front();
        }
        queued.push_back(Arc::downgrade(node));
        drop(queued);
        if stanza::is_delivered_again(stanza) {
            let mut waited = lock(&self.waited);
            if waited.len() >= WAITED_MAX {
                waited.pop_front();
            }
            waited.push_back(Node { content: None, ..stanza.to_owned() });
        }
    }

    /// Whether reading has to stop, or has stopped and may not go on.
    pub(super) fn is_crowded(&self, stopped: bool) -> bool {
        let most = if stopped { QUEUED_LOW } else { QUEUED_MAX };
        let mut queued = lock(&self.queued);
        if queued.len() > most {
            queued.retain(|stanza| stanza.strong_count() > 0);
        }
        queued.len() > most
    }

    /// A crash has lost this message: its sender must be asked for it.
    pub(super) fn lose(&self, whatsapp_id: &str) {
        let mut waited = lock(&self.waited);
        let is_it = |stanza: &Node| stanza.as_node_ref().get_attr("id").is_some_and(|id| id.as_str() == whatsapp_id);
        let found = waited.iter().position(is_it).and_then(|index| waited.remove(index));
        drop(waited);
        lock(&self.lost).extend(found);
    }

    /// The next message that a crash has lost.
    pub(super) fn next_lost(&self) -> Option<Node> {
        lock(&self.lost).pop_front()
    }

    /// Whether a crash has lost any that are not asked for.
    pub(super) fn has_lost(&self) -> bool {
        !lock(&self.lost).is_empty()
    }

    /// What waited for this connection has been looked at. A lost message among what has not comes again.
    pub(super) fn forget_waited(&self) {
        *lock(&self.waited) = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whatsapp_rust::NodeBuilder;

    fn message(id: usize, waited: bool) -> Arc<OwnedNodeRef> {
        let mut node =
            NodeBuilder::new("message").attr("id", id.to_string()).attr("from", "5511999990001@s.whatsapp.net");
        if waited {
            node = node.attr("offline", "1");
        }
        node = node.children([NodeBuilder::new("enc").bytes(vec![1; 100]).build()]);
        Arc::new(owned(&node.build()))
    }

    fn owned(node: &Node) -> OwnedNodeRef {
        let bytes = whatsapp_rust::wacore_binary::marshal::marshal(node).unwrap();
        OwnedNodeRef::new(bytes[1..].to_vec()).unwrap()
    }

    #[test]
    fn reading_stops_at_the_limit_and_goes_on_when_half_is_done() {
        let backlog = Backlog::default();
        let mut library: VecDeque<_> = VecDeque::new();
        for id in 0..=QUEUED_MAX {
            assert!(!backlog.is_crowded(false), "{id}");
            library.push_back(message(id, false));
            backlog.hear(library.back().unwrap());
        }
        assert!(backlog.is_crowded(false));
        library.drain(..QUEUED_LOW);
        assert!(backlog.is_crowded(true), "not before half of it is done");
        library.pop_front();
        assert!(!backlog.is_crowded(true));
        assert!(backlog.lock_queued() <= QUEUED_LOW);
    }

    #[test]
    fn only_what_had_waited_can_be_lost_and_its_content_is_not_kept() {
        let backlog = Backlog::default();
        for (id, waited) in [(1, true), (2, false), (3, true)] {
            backlog.hear(&message(id, waited));
        }
        for id in ["3", "2", "3", "4"] {
            backlog.lose(id);
        }
        assert!(backlog.next_lost().is_some_and(|lost| lost.content.is_none()));
        assert!(!backlog.has_lost());
        backlog.forget_waited();
        backlog.lose("1");
        assert!(backlog.next_lost().is_none());
    }

    impl Backlog {
        fn lock_queued(&self) -> usize {
            lock(&self.queued).len()
        }
    }
}
