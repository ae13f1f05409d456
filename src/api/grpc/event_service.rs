//! `switchboard.v1.EventService`.

use futures_util::stream::BoxStream;
use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto as pb;
use super::server::Service;
use super::stepwise::{self, Steps};
use crate::api::error::ApiError;
use crate::api::events::{EventStream, StreamOrder};

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
            Ok(stepwise::wire(self.api.events(caller, &order)?, STEPS_AHEAD, self.api.stream_patience()))
        };
        call.answer(open())
    }
}

/// Steps made ready for a client; gRPC's flow control decides when it takes them.
const STEPS_AHEAD: usize = 8;

#[async_trait]
impl Steps for EventStream {
    type Step = pb::StreamEventsResponse;

    fn cursor(&self) -> String {
        Self::cursor(self)
    }

    async fn next(&mut self) -> Result<Self::Step, ApiError> {
        let step = Self::next(self).await?;
        Ok(convert::stream_step(step, Self::cursor(self)))
    }
}
