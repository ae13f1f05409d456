//! `switchboard.v1.CapacityService`.

use futures_util::stream::BoxStream;
use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto as pb;
use super::server::Service;
use super::stepwise::{self, Steps};
use crate::api::capacity::{CapacityCard, CapacityWatch, WatchOrder, WatchStep};
use crate::api::error::ApiError;
use crate::domain::capacity::{Health, Outlook};

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
            Ok(stepwise::wire(self.api.watch_capacity(caller, &order)?, STEPS_AHEAD, self.api.stream_patience()))
        };
        call.answer(open())
    }
}

/// Steps made ready for a client. A slow one gets fewer and larger changes: nothing is gathered while it does not read.
const STEPS_AHEAD: usize = 2;

#[async_trait]
impl Steps for CapacityWatch {
    type Step = pb::WatchCapacityResponse;

    fn cursor(&self) -> String {
        Self::cursor(self)
    }

    async fn next(&mut self) -> Result<Self::Step, ApiError> {
        let step = Self::next(self).await?;
        Ok(response(step, Self::cursor(self)))
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
