//! The gRPC services behind one router: the contract, health and reflection.

use std::sync::Arc;
use std::time::Duration;

use tonic::service::Routes;
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use super::proto;
use super::proto::xds::service::orca::v3::open_rca_service_server::OpenRcaServiceServer;
use super::status::status_of;
use crate::api::error::ApiError;
use crate::api::service::Api;
use crate::domain::access::Caller;
use crate::telemetry::metrics::{self, Protocol};

/// Calls whose answer has no end: no deadline is put on them.
pub const STREAMING: [&str; 7] = [
    "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics",
    "/switchboard.v1.CapacityService/WatchCapacity",
    "/switchboard.v1.NumberService/PairNumber",
    "/switchboard.v1.EventService/StreamEvents",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

const API_KEY: &str = "x-api-key";
const OVERALL: &str = "";

/// What `grpc.health.v1` tells.
#[derive(Debug, Clone)]
pub struct Health(HealthReporter);

impl Health {
    /// Tells that calls are served, or no longer.
    pub async fn set_serving(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        let services = [
            OVERALL,
            "switchboard.v1.TenantService",
            "switchboard.v1.NumberService",
            "switchboard.v1.OperatorService",
            "switchboard.v1.MessageService",
            "switchboard.v1.EventService",
            "switchboard.v1.CapacityService",
            "switchboard.v1.WebhookService",
        ];
        for service in services {
            self.0.set_service_status(service, status).await;
        }
    }
}

/// The descriptor set that was built in cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("reflection: {0}")]
pub struct ReflectionError(String);

/// All services.
///
/// # Errors
/// Never with the descriptor set that was built in.
pub async fn routes(api: &Arc<Api>) -> Result<(Routes, Health), ReflectionError> {
    let reporter = HealthReporter::new();
    let health = Health(reporter.clone());
    health.set_serving(true).await;
    let wrong = |error: tonic_reflection::server::Error| ReflectionError(error.to_string());
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let service = || Service { api: api.clone() };
    let routes = Routes::new(proto::tenant_service_server::TenantServiceServer::new(service()))
        .add_service(proto::number_service_server::NumberServiceServer::new(service()))
        .add_service(proto::operator_service_server::OperatorServiceServer::new(service()))
        .add_service(proto::message_service_server::MessageServiceServer::new(service()))
        .add_service(proto::event_service_server::EventServiceServer::new(service()))
        .add_service(proto::capacity_service_server::CapacityServiceServer::new(service()))
        .add_service(proto::webhook_service_server::WebhookServiceServer::new(service()))
        .add_service(OpenRcaServiceServer::new(service()))
        .add_service(HealthServer::new(HealthService::from_health_reporter(reporter)))
        .add_service(reflection().build_v1().map_err(wrong)?)
        .add_service(reflection().build_v1alpha().map_err(wrong)?);
    Ok((routes, health))
}

/// Every service of the contract, over the same use cases.
#[derive(Debug, Clone)]
pub(super) struct Service {
    pub(super) api: Arc<Api>,
}

impl Service {
    /// A call begins; the name goes into the metrics.
    pub(super) fn begin(&self, method: &'static str) -> Call<'_> {
        Call { api: &self.api, method, begun: self.api.clock().monotonic() }
    }

    /// Who makes a call.
    pub(super) fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ApiError> {
        self.api.authenticate(presented(request))
    }

    /// The public part of the key a call is made with.
    pub(super) fn key_id<T>(&self, request: &Request<T>) -> String {
        self.api.key_id(presented(request))
    }
}

fn presented<T>(request: &Request<T>) -> Option<&str> {
    request.metadata().get(API_KEY).and_then(|value| value.to_str().ok())
}

/// A call under way.
pub(super) struct Call<'a> {
    api: &'a Api,
    method: &'static str,
    begun: Duration,
}

impl Call<'_> {
    /// Ends the call: counted, timed, and turned into what gRPC carries.
    pub(super) fn answer<T>(self, outcome: Result<T, ApiError>) -> Result<Response<T>, Status> {
        let code = outcome.as_ref().map_or_else(|error| error.reason.code().name(), |_| "OK");
        let took = self.api.clock().monotonic().saturating_sub(self.begun);
        metrics::api_request(Protocol::Grpc, self.method, code, took);
        outcome.map(Response::new).map_err(|error| status_of(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;
    use std::collections::BTreeSet;

    #[test]
    fn every_streaming_method_is_known_to_the_deadline() {
        let set = prost_types::FileDescriptorSet::decode(proto::DESCRIPTOR_SET).unwrap();
        let mut streaming = BTreeSet::new();
        for file in set.file {
            for service in &file.service {
                for method in service.method.iter().filter(|method| method.server_streaming()) {
                    streaming.insert(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
                }
            }
        }
        let ours: BTreeSet<_> =
            STREAMING.iter().filter(|path| !path.starts_with("/grpc")).map(|path| (*path).to_owned()).collect();
        assert_eq!(streaming, ours);
    }

    #[test]
    fn the_contract_is_commented_throughout() {
        let set = prost_types::FileDescriptorSet::decode(proto::DESCRIPTOR_SET).unwrap();
        for file in set.file.iter().filter(|file| file.package() == "switchboard.v1") {
            let info = file.source_code_info.as_ref().unwrap();
            for location in &info.location {
                // Paths of messages, enums, services and their members; see descriptor.proto.
                let named = matches!(location.path.as_slice(), [4..=6, _] | [4..=6, _, 2, _] | [4, _, 8, _]);
                assert!(
                    !named || !location.leading_comments().trim().is_empty(),
                    "{} at {:?} has no comment",
                    file.name(),
                    location.path
                );
            }
        }
    }
}
