//! What was heard from the server and must be durable before anything more is written to it.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

/// Counts entries heard, and those of them that are durable. Entries become durable in the order they were heard.
#[derive(Debug)]
pub(super) struct Barrier {
    heard: AtomicU64,
    durable: watch::Sender<u64>,
}

impl Default for Barrier {
    fn default() -> Self {
        Self { heard: AtomicU64::new(0), durable: watch::Sender::new(0) }
    }
}

impl Barrier {
    /// One more was heard.
    pub(super) fn hear(&self) {
        self.heard.fetch_add(1, Ordering::AcqRel);
    }

    /// The oldest that was not durable is.
    pub(super) fn durable(&self) {
        self.durable.send_modify(|durable| *durable += 1);
    }

    /// Resolves when all that were heard before this call are durable.
    pub(super) async fn caught_up(&self) {
        let heard = self.heard.load(Ordering::Acquire);
        let mut durable = self.durable.subscribe();
        // The sender lives as long as `self`.
        let _ = durable.wait_for(|durable| *durable >= heard).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn waits_for_what_was_heard_before_and_nothing_else() {
        let barrier = Barrier::default();
        assert!(barrier.caught_up().now_or_never().is_some());
        barrier.hear();
        barrier.hear();
        let mut waiting = Box::pin(barrier.caught_up());
        assert!(waiting.as_mut().now_or_never().is_none());
        barrier.hear();
        barrier.durable();
        assert!(waiting.as_mut().now_or_never().is_none());
        barrier.durable();
        assert!(waiting.as_mut().now_or_never().is_some(), "the third came later");
        assert!(barrier.caught_up().now_or_never().is_none());
    }
}
