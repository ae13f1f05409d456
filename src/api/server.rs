//! The two listeners of the daemon: what runs on them, and how they end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::grpc::server::ReflectionError;
use super::http::admin::admin;
use super::http::server::{public, serve};
use super::service::Api;
use crate::telemetry::metrics::Exposition;

/// How often recorded samples are folded into their buckets.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Limits of the public listener.
#[derive(Debug, Clone, Copy)]
pub struct PublicLimits {
    /// Calls answered at once; more are refused.
    pub concurrent_requests: usize,
    /// Longest a call without a stream may take.
    pub deadline: Duration,
}

/// The listener does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its address is not known.
    #[error("listener: {0}")]
    Listener(#[from] std::io::Error),
    /// The services do not start.
    #[error(transparent)]
    Services(#[from] ReflectionError),
}

/// A running listener. Dropping it cuts every connection.
#[derive(Debug)]
pub struct Served {
    address: SocketAddr,
    tasks: JoinSet<()>,
}

impl Served {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until every connection finished its calls, which starts with the drain; cuts what is left after
    /// `patience`.
    pub async fn shutdown(mut self, patience: Duration) {
        let finished = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(patience, finished).await.is_err() {
            self.tasks.shutdown().await;
        }
    }
}

/// Serves gRPC and the JSON API.
///
/// # Errors
/// When the listener has no address.
pub async fn serve_public(listener: TcpListener, api: &Arc<Api>, limits: PublicLimits) -> Result<Served, ServeError> {
    let address = listener.local_addr()?;
    let (router, health) = public(api, limits).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(serve(listener, router, Some(api.drain())));
    let mut drain = api.drain();
    tasks.spawn(async move {
        drain.begun().await;
        health.set_serving(false).await;
    });
    Ok(Served { address, tasks })
}

/// Serves metrics and probes. Goes on through the drain, so that it can be watched; `Served::shutdown` ends it.
///
/// # Errors
/// When the listener has no address.
pub fn serve_admin(listener: TcpListener, api: &Arc<Api>, exposition: Exposition) -> Result<Served, ServeError> {
    let address = listener.local_addr()?;
    let mut tasks = JoinSet::new();
    let upkeep = exposition.clone();
    tasks.spawn(serve(listener, admin(api.clone(), exposition), None));
    tasks.spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP_INTERVAL).await;
            upkeep.upkeep();
        }
    });
    Ok(Served { address, tasks })
}
