//! Load reports for routers of the ORCA family (gRFC A51): in the trailers of every answered send, and as a stream of its
//! own. They speak of this process; what each number could send is told by `CapacityService`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use prost::Message as _;
use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto::xds::data::orca::v3::OrcaLoadReport;
use super::proto::xds::service::orca::v3::OrcaLoadReportRequest;
use super::proto::xds::service::orca::v3::open_rca_service_server::OpenRcaService;
use super::server::Service;
use super::status::status_of;
use crate::api::error::{ApiError, Reason};
use crate::api::service::Api;
use crate::telemetry::metrics::OpenStream;

/// The call whose answers carry a report.
pub const REPORTED: &str = "/switchboard.v1.MessageService/SendMessage";
/// Its name there.
pub const TRAILER: &str = "endpoint-load-metrics-bin";
/// Shortest and longest time between two reports of a stream; the shortest is what gRFC A51 proposes for servers.
const INTERVAL_MIN: Duration = Duration::from_secs(30);
const INTERVAL_MAX: Duration = Duration::from_hours(1);

fn report(api: &Api) -> OrcaLoadReport {
    let load = api.load().load(api.clock().monotonic());
    OrcaLoadReport {
        cpu_utilization: load.cpu,
        mem_utilization: 0.0,
        request_cost: HashMap::new(),
        utilization: HashMap::new(),
        rps_fractional: load.calls,
        eps: load.failures,
        named_metrics: HashMap::new(),
        // Whatever runs out first.
        application_utilization: load.cpu.max(load.room),
    }
}

/// The report of this moment, as it stands in the trailer.
#[must_use]
pub fn trailer(api: &Api) -> String {
    BASE64.encode(report(api).encode_to_vec())
}

#[async_trait]
impl OpenRcaService for Service {
    type StreamCoreMetricsStream = BoxStream<'static, Result<OrcaLoadReport, Status>>;

    /// Needs no key: balancers have none, and a report names nobody.
    async fn stream_core_metrics(
        &self,
        request: Request<OrcaLoadReportRequest>,
    ) -> Result<Response<Self::StreamCoreMetricsStream>, Status> {
        let call = self.begin("StreamCoreMetrics");
        let asked = convert::interval("report_interval", request.get_ref().report_interval.as_ref());
        call.answer(asked.map(|asked| reports(self.api.clone(), asked)))
    }
}

fn reports(api: Arc<Api>, asked: Option<Duration>) -> BoxStream<'static, Result<OrcaLoadReport, Status>> {
    let interval = asked.unwrap_or(INTERVAL_MIN).clamp(INTERVAL_MIN, INTERVAL_MAX);
    let first = (api, Duration::ZERO, OpenStream::begin());
    let wire = stream::unfold(Some(first), move |state| async move {
        let (api, pause, open) = state?;
        let mut drain = api.drain();
        tokio::select! {
            () = drain.begun() => return Some((Err(status_of(&ApiError::from(Reason::Draining))), None)),
            () = tokio::time::sleep(pause) => {}
        }
        Some((Ok(report(&api)), Some((api, interval, open))))
    });
    wire.boxed()
}
