//! The admin listener: metrics and probes. Not authenticated; it belongs inside.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;
use tokio::sync::Mutex;

use crate::api::drain::Drain;
use crate::store::layout::Store;
use crate::supervisor::fleet::Fleet;
use crate::telemetry::clock::Clock;
use crate::telemetry::collector;
use crate::telemetry::metrics::{self, Exposition, VolumeFigures};

const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// How long the supervisor may take to answer a probe.
const PING_PATIENCE: Duration = Duration::from_secs(2);

/// What the admin pages show.
#[derive(Debug)]
pub struct AdminParts {
    /// The disk.
    pub store: Arc<Store>,
    /// The numbers, once they are booted: the listener opens before that.
    pub fleet: Arc<OnceLock<Fleet>>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The metrics of the process.
    pub exposition: Exposition,
    /// The end of the daemon.
    pub drain: Drain,
}

#[derive(Debug)]
struct Admin {
    parts: AdminParts,
    /// One scrape at a time: a second one would only double the work.
    scraping: Mutex<()>,
}

/// The admin pages.
pub fn admin(parts: AdminParts) -> Router {
    let router = Router::new().route("/metrics", get(scrape)).route("/livez", get(alive)).route("/readyz", get(ready));
    #[cfg(feature = "sandbox")]
    let router = router
        .route("/debug/panic", axum::routing::post(make_panic))
        .route("/debug/clock", axum::routing::post(put_clock_forward))
        .route("/debug/clock-step", axum::routing::post(step_clock));
    router.with_state(Arc::new(Admin { parts, scraping: Mutex::new(()) }))
}

async fn scrape(State(admin): State<Arc<Admin>>) -> Response {
    let _one = admin.scraping.lock().await;
    let worker = admin.clone();
    match tokio::task::spawn_blocking(move || worker.render()).await {
        Ok(text) => ([(CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

impl Admin {
    fn render(&self) -> String {
        let parts = &self.parts;
        let report = parts.store.report();
        for volume in &report {
            let (stats, committer) = (&volume.stats, &volume.stats.committer);
            let figures = VolumeFigures {
                queued: committer.queued.load(Relaxed),
                groups: committer.groups.load(Relaxed),
                units: committer.units.load(Relaxed),
                sync: Duration::from_micros(committer.sync_micros.load(Relaxed)),
                open: volume.failure.is_none(),
                failures: stats.failures.load(Relaxed),
                reopened: stats.reopened.load(Relaxed),
                disk_bytes: volume.disk_bytes,
            };
            metrics::volume(&volume.name, figures);
        }
        metrics::volumes_failed(report.iter().filter(|volume| volume.failure.is_some()).count());
        let space = parts.store.room().space();
        metrics::room(space.free, space.total, !parts.store.room().is_enough());
        metrics::erasures_waiting(parts.store.meta().erasures().len());
        let mut text = parts.exposition.render();
        let numbers = parts.fleet.get().map(|fleet| fleet.directory().all()).unwrap_or_default();
        let series = numbers.iter().map(|number| (number.labels(), number.stats()));
        collector::render(series, parts.clock.now(), &mut text);
        text
    }

    /// Why calls are not to be sent here, if so.
    async fn unready(&self) -> Option<&'static str> {
        let parts = &self.parts;
        if parts.drain.has_begun() {
            return Some("draining");
        }
        let report = parts.store.report();
        // While one volume works its numbers are served, and calls for the others have their typed answer.
        if report.iter().skip(1).all(|volume| volume.failure.is_some()) {
            return Some("every volume of the store failed");
        }
        let Some(fleet) = parts.fleet.get() else { return Some("booting") };
        match tokio::time::timeout(PING_PATIENCE, fleet.ping()).await {
            Ok(true) => None,
            Ok(false) | Err(_) => Some("the supervisor does not answer"),
        }
    }
}

/// The process answers: that is all. Restarting it would not help against a slow disk or a closed WhatsApp.
async fn alive() -> &'static str {
    "ok\n"
}

async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    let unready = admin.unready().await;
    let status = if unready.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let build = if cfg!(feature = "sandbox") { "sandbox" } else { "release" };
    let body = json!({
        "ready": unready.is_none(),
        "reason": unready,
        "build": build,
        "version": env!("CARGO_PKG_VERSION"),
        "store": store_detail(&admin.parts.store),
        "numbers": admin.parts.fleet.get().map(|fleet| fleet.directory().len()),
    });
    (status, Json(body)).into_response()
}

/// What is wrong with the disk, by volume.
fn store_detail(store: &Store) -> serde_json::Value {
    let failed = store.report().into_iter().filter_map(|volume| Some((volume.name, volume.failure?)));
    let failed: serde_json::Map<_, _> = failed.map(|(name, error)| (name, json!(error.to_string()))).collect();
    json!({ "failed": failed, "low_space": !store.room().is_enough() })
}

/// Makes a number's actor panic: for tests of the supervisor.
#[cfg(feature = "sandbox")]
async fn make_panic(
    State(admin): State<Arc<Admin>>,
    axum::extract::Query(query): axum::extract::Query<std::collections::HashMap<String, String>>,
) -> StatusCode {
    let id = query.get("number").and_then(|number| number.parse().ok());
    let handle = id.and_then(|id| admin.parts.fleet.get()?.directory().get(id));
    match handle {
        Some(handle) => {
            handle.make_panic();
            StatusCode::NO_CONTENT
        }
        None => StatusCode::NOT_FOUND,
    }
}

/// Puts the daemon's wall clock forward: for tests of what happens after days.
#[cfg(feature = "sandbox")]
async fn put_clock_forward(
    State(admin): State<Arc<Admin>>,
    axum::extract::Query(query): axum::extract::Query<std::collections::HashMap<String, String>>,
) -> StatusCode {
    match query.get("seconds").and_then(|seconds| seconds.parse().ok()) {
        Some(seconds) => {
            admin.parts.clock.put_forward(Duration::from_secs(seconds));
            StatusCode::NO_CONTENT
        }
        None => StatusCode::BAD_REQUEST,
    }
}

/// Sets what the system's clock says: for tests of clocks that jump.
#[cfg(feature = "sandbox")]
async fn step_clock(
    State(admin): State<Arc<Admin>>,
    axum::extract::Query(query): axum::extract::Query<std::collections::HashMap<String, String>>,
) -> StatusCode {
    match query.get("seconds").and_then(|seconds| seconds.parse::<i64>().ok()) {
        Some(seconds) => {
            admin.parts.clock.step_system(seconds.saturating_mul(1000));
            StatusCode::NO_CONTENT
        }
        None => StatusCode::BAD_REQUEST,
    }
}
