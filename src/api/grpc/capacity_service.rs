//! `switchboard.v1.CapacityService`.

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
use crate::api::capacity::{CapacityCard, CapacityWatch, WatchOrder, WatchStep};
use crate::api::error::{ApiError, Reason};
use crate::domain::capacity::{Health, Outlook};
use crate::telemetry::metrics::{self, OpenStream};

#[async_trait]
impl pb::capacity_service_server::CapacityService for Service {
    type WatchCapacityStream = BoxStream<'static, Result<pb::WatchCapacityResponse, Status>>;

    async fn get_capacity(
        &self,
        request: Request<pb::GetCapacityRequest>,
    ) -> Result<Response<pb::GetCapacityResponse>, Status> {
        let call = self.begin("GetCapacity");
        let outcome = async {
            let caller = self.caller(&request)?;
            let cards = self.api.capacities(caller, &request.get_ref().numbers).await?;
            Ok(pb::GetCapacityResponse { capacities: cards.into_iter().map(capacity).collect() })
        };
        call.answer(outcome.await)
    }

    async fn watch_capacity(
        &self,
        request: Request<pb::WatchCapacityRequest>,
    ) -> Result<Response<Self::WatchCapacityStream>, Status> {
        let call = self.begin("WatchCapacity");
        let open = || {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let order = WatchOrder {
                numbers: &asked.numbers,
                cursor: &asked.resume_cursor,
                interval: convert::interval("min_interval", asked.min_interval.as_ref())?,
                progress_interval: convert::interval("progress_interval", asked.progress_interval.as_ref())?,
                key: self.key_id(&request),
            };
            Ok(wire_stream(self.api.watch_capacity(caller, &order)?, self.api.stream_patience()))
        };
        call.answer(open())
    }
}

/// Steps made ready for a client. A slow one gets fewer and larger changes: nothing is gathered while it does not read.
const STEPS_AHEAD: usize = 2;

/// A stream with its own task, so that a client that reads nothing is noticed.
fn wire_stream(
    watch: CapacityWatch,
    patience: Duration,
) -> BoxStream<'static, Result<pb::WatchCapacityResponse, Status>> {
    let (steps, received) = mpsc::channel(STEPS_AHEAD);
    let ended = Arc::new(OnceLock::new());
    let mut producer = JoinSet::new();
    producer.spawn(produce(watch, steps, ended.clone(), patience));
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
    mut watch: CapacityWatch,
    steps: mpsc::Sender<pb::WatchCapacityResponse>,
    ended: Arc<OnceLock<Status>>,
    patience: Duration,
) {
    loop {
        let before = watch.cursor();
        let step = match watch.next().await {
            Ok(step) => response(step, watch.cursor()),
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

fn response(step: WatchStep, cursor: String) -> pb::WatchCapacityResponse {
    pb::WatchCapacityResponse {
        cursor,
        changed: step.changed.into_iter().map(capacity).collect(),
        removed: step.removed.iter().map(ToString::to_string).collect(),
        reset: step.reset,
        caught_up: step.caught_up,
    }
}

fn capacity(card: CapacityCard) -> pb::Capacity {
    let CapacityCard { number, capacity, at } = card;
    let health = match capacity.health {
        Health::Good => pb::NumberHealth::Good,
        Health::Limited => pb::NumberHealth::Limited,
        Health::Recovering => pb::NumberHealth::Recovering,
        Health::Down => pb::NumberHealth::Down,
    };
    let wait = |outlook: Outlook| {
        let wait = outlook.at.map(|until| until.since(at));
        wait.and_then(|wait| prost_types::Duration::try_from(wait).ok())
    };
    pb::Capacity {
        number: number.to_string(),
        state: i32::from(capacity.state.code()),
        health: health.into(),
        since: Some(convert::time(capacity.since)),
        available_now: i32::try_from(capacity.available_now).unwrap_or(i32::MAX),
        sustainable_rate: capacity.sustainable_rate,
        queue_depth: i64::try_from(capacity.queue_depth).unwrap_or(i64::MAX),
        predicted_wait: wait(capacity.outlook),
        limiting_reason: capacity.outlook.limiting.name().to_owned(),
        new_recipient_wait: wait(capacity.outlook_new),
        new_recipient_limiting_reason: capacity.outlook_new.limiting.name().to_owned(),
        new_recipients_left: capacity.new_recipients_left.map(|left| i32::try_from(left).unwrap_or(i32::MAX)),
        observe_time: Some(convert::time(at)),
    }
}
