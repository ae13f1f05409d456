//! The public listener: gRPC and JSON on one port, over HTTP/1.1 and HTTP/2 without TLS. Connections are owned tasks;
//! at the drain each finishes the calls it has, and what is left at the end is cut.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{delete, get, post};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::admission::{Admission, admit, is_grpc, refusal};
use super::load::report_load;
use super::{history, messages, numbers, webhooks};
use crate::api::drain::Drain;
use crate::api::error::{ApiError, Reason};
use crate::api::grpc::server::{Health, ReflectionError, routes};
use crate::api::service::Api;

/// Largest JSON body.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// Connections of one listener; more wait in the system's queue.
const CONNECTIONS_MAX: usize = 16_384;
const STREAMS_PER_CONNECTION_MAX: u32 = 256;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after the system refused a connection, for instance for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits of the public listener.
#[derive(Debug, Clone, Copy)]
pub struct PublicLimits {
    /// Calls answered at once.
    pub concurrent_requests: usize,
    /// Longest a call may take.
    pub deadline: Duration,
}

/// The public surface: every gRPC service and the JSON API.
///
/// # Errors
/// Never with the descriptor set that was built in.
pub async fn public(api: &Arc<Api>, limits: PublicLimits) -> Result<(Router, Health), ReflectionError> {
    let (grpc, health) = routes(api).await?;
    let json = Router::new()
        .route("/v1/messages/send", post(messages::send))
        .route("/v1/messages/cancel", delete(messages::cancel))
        .route("/v1/messages/history", get(history::list))
        .route("/v1/messages/{id}", get(messages::get))
        .route("/v1/contacts/erase", post(history::erase_contact))
        .route("/v1/numbers", get(numbers::list))
        .route("/v1/numbers/{id}", get(numbers::get).patch(numbers::change))
        .route("/v1/webhooks", get(webhooks::list).post(webhooks::create))
        .route("/v1/webhooks/{id}", get(webhooks::get).patch(webhooks::change).delete(webhooks::remove))
        .route("/v1/webhooks/{id}/logs", get(webhooks::logs))
        .route("/v1/webhooks/{id}/rotate", post(webhooks::rotate))
        .route("/v1/webhooks/{id}/dead-letters", get(webhooks::dead_letters))
        .route("/v1/webhooks/{id}/redeliver", post(webhooks::redeliver))
        .route("/v1/webhooks/{id}/replay", post(webhooks::replay))
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(api.clone());
    let admission = Admission::new(limits.concurrent_requests, limits.deadline);
    let router = grpc
        .into_axum_router()
        .merge(json)
        .fallback(path_not_found)
        .layer(axum::middleware::map_response(too_large))
        .layer(from_fn_with_state(admission, admit))
        .layer(from_fn_with_state(api.clone(), report_load));
    Ok((router, health))
}

async fn path_not_found(request: Request) -> Response {
    refusal(is_grpc(request.headers()), &Reason::PathNotFound.into())
}

async fn method_not_allowed() -> ApiError {
    Reason::MethodNotAllowed.into()
}

/// The body limit answers with plain text of its own.
async fn too_large(response: Response) -> Response {
    if response.status().as_u16() == Reason::PayloadTooLarge.http_status() {
        return refusal(false, &Reason::PayloadTooLarge.into());
    }
    response
}

/// Serves until the drain, then lets every connection finish its calls. Dropping the future cuts what is left.
pub async fn serve(listener: TcpListener, router: Router, mut drain: Drain) {
    let mut connections = JoinSet::new();
    let graceful = GracefulShutdown::new();
    loop {
        tokio::select! {
            () = drain.begun() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((socket, _)) => {
                    connections.spawn(connection(socket, router.clone(), &graceful));
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    graceful.shutdown().await;
    while connections.join_next().await.is_some() {}
}

fn connection(socket: TcpStream, router: Router, graceful: &GracefulShutdown) -> impl Future<Output = ()> + use<> {
    // Small answers must not wait for the other side's delayed ack.
    let _ = socket.set_nodelay(true);
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
    let service = TowerToHyperService::new(router);
    let served = builder.serve_connection_with_upgrades(TokioIo::new(socket), service).into_owned();
    let watched = graceful.watch(served);
    async move {
        if let Err(error) = watched.await {
            tracing::debug!(error = %error, "connection ended");
        }
    }
}
