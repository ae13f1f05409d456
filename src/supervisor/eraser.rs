//! Removes what deleted numbers left on disk, behind everybody's back: also what a crash left half removed.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::store::layout::Store;

/// How long it rests when the disk refused, or when there is nothing to do.
const REST: Duration = Duration::from_secs(30);

/// Owns the task that removes; ends it when dropped.
#[derive(Debug)]
pub(super) struct Eraser {
    woken: Arc<Notify>,
    _task: JoinSet<()>,
}

impl Eraser {
    pub(super) fn start(store: Arc<Store>) -> Self {
        let woken = Arc::new(Notify::new());
        let mut task = JoinSet::new();
        let wake = woken.clone();
        task.spawn(async move {
            loop {
                erase_all(&store).await;
                let _ = tokio::time::timeout(REST, wake.notified()).await;
            }
        });
        Self { woken, _task: task }
    }

    /// A number was deleted.
    pub(super) fn wake(&self) {
        self.woken.notify_one();
    }
}

async fn erase_all(store: &Store) {
    for erasure in store.meta().erasures() {
        let number = erasure.number;
        match store.erase(erasure).await {
            Ok(()) => tracing::info!(%number, "records of a deleted number removed"),
            Err(error) => tracing::warn!(%number, %error, "records of a deleted number are not removed yet"),
        }
    }
}
