//! Streams that may end and be resumed: each has its own task, so that a client that reads nothing is noticed. Its steps
//! wait so long and then go, and when it reads on it finds where it was.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::{Status, async_trait};

use super::status::status_of;
use crate::api::error::{ApiError, Reason};
use crate::telemetry::metrics::{self, OpenStream};

/// Where steps come from.
#[async_trait]
pub(super) trait Steps: Send + 'static {
    /// What the client gets.
    type Step: Send + 'static;

    /// Where it is: what a client passes to go on after the steps so far.
    fn cursor(&self) -> String;

    /// The next step, with the cursor after it.
    async fn next(&mut self) -> Result<Self::Step, ApiError>;
}

/// The wire's form of `steps`, of which `ahead` are made ready before the client takes them.
pub(super) fn wire<S: Steps>(
    steps: S,
    ahead: usize,
    patience: Duration,
) -> BoxStream<'static, Result<S::Step, Status>> {
    let (ready, received) = mpsc::channel(ahead);
    let ended = Arc::new(OnceLock::new());
    let mut producer = JoinSet::new();
    producer.spawn(produce(steps, ready, ended.clone(), patience));
    // The task ends with the stream that owns it.
    let state = (received, ended, producer, OpenStream::begin());
    let wire = stream::unfold(Some(state), |state| async {
        let (mut received, ended, producer, open) = state?;
        match received.recv().await {
            Some(step) => Some((Ok(step), Some((received, ended, producer, open)))),
            None => ended.get().cloned().map(|status| (Err(status), None)),
        }
    });
    wire.boxed()
}

async fn produce<S: Steps>(
    mut steps: S,
    ready: mpsc::Sender<S::Step>,
    ended: Arc<OnceLock<Status>>,
    patience: Duration,
) {
    loop {
        let before = steps.cursor();
        let step = match steps.next().await {
            Ok(step) => step,
            Err(error) => {
                let _ = ended.set(status_of(&error));
                return;
            }
        };
        match tokio::time::timeout(patience, ready.send(step)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => {
                let slow = ApiError::from(Reason::SlowConsumer).with("cursor", before);
                let _ = ended.set(status_of(&slow));
                metrics::slow_stream();
                return;
            }
        }
    }
}
