//! `switchboard.v1.EventService`.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto as pb;
use super::server::Service;
use super::status::status_of;
use crate::api::error::{ApiError, Reason};
use crate::api::events::{EventStream, StreamOrder};
use crate::telemetry::metrics::{self, OpenStream};

#[async_trait]
impl pb::event_service_server::EventService for Service {
    type StreamEventsStream = BoxStream<'static, Result<pb::StreamEventsResponse, Status>>;

    async fn stream_events(
        &self,
        request: Request<pb::StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        let call = self.begin("StreamEvents");
        let open = || {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let order = StreamOrder {
                number: &asked.number,
                types: &asked.types,
                cursor: &asked.resume_cursor,
                progress_interval: convert::interval("progress_interval", asked.progress_interval.as_ref())?,
                key: self.key_id(&request),
            };
            Ok(wire_stream(self.api.events(caller, &order)?, self.api.stream_patience()))
        };
        call.answer(open())
    }
}

/// Steps made ready for a client; gRPC's flow control decides when it takes them.
const STEPS_AHEAD: usize = 8;

/// A stream with its own task, so that a client that reads nothing is noticed: its steps wait so long and then go, and
/// when it reads on it finds where it was.
fn wire_stream(
    events: EventStream,
    patience: Duration,
) -> BoxStream<'static, Result<pb::StreamEventsResponse, Status>> {
    let (steps, received) = mpsc::channel(STEPS_AHEAD);
    let ended = Arc::new(OnceLock::new());
    let mut producer = JoinSet::new();
    producer.spawn(produce(events, steps, ended.clone(), patience));
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

async fn produce(
    mut events: EventStream,
    steps: mpsc::Sender<pb::StreamEventsResponse>,
    ended: Arc<OnceLock<Status>>,
    patience: Duration,
) {
    loop {
        let before = events.cursor();
        let step = match events.next().await {
            Ok(step) => convert::stream_step(step, events.cursor()),
            Err(error) => {
                let _ = ended.set(status_of(&error));
                return;
            }
        };
        match tokio::time::timeout(patience, steps.send(step)).await {
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
