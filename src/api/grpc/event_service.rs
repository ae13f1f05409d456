//! `switchboard.v1.EventService`.

use futures_util::stream::{self, BoxStream, StreamExt as _};
use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto as pb;
use super::server::Service;
use super::status::status_of;
use crate::api::events::{EventStream, StreamOrder};
use crate::telemetry::metrics::OpenStream;

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
                progress_interval: asked.progress_interval.as_ref().map(convert::duration).transpose()?,
            };
            Ok(wire_stream(self.api.events(caller, &order)?))
        };
        call.answer(open())
    }
}

/// Pulled by the consumer: gRPC's flow control is the only queue.
fn wire_stream(events: EventStream) -> BoxStream<'static, Result<pb::StreamEventsResponse, Status>> {
    let open = OpenStream::begin();
    let steps = stream::unfold(Some((events, open)), |state| async {
        let (mut events, open) = state?;
        match events.next().await {
            Ok(step) => Some((Ok(convert::stream_step(step, events.cursor())), Some((events, open)))),
            Err(error) => Some((Err(status_of(&error)), None)),
        }
    });
    steps.boxed()
}
