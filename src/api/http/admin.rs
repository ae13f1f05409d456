//! The admin listener: metrics and probes. Not authenticated; it belongs inside.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
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

use crate::api::service::Api;
use crate::telemetry::collector;
use crate::telemetry::metrics::{self, CommitterFigures, Exposition};

const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// How long the supervisor may take to answer a probe.
const PING_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Admin {
    api: Arc<Api>,
    exposition: Exposition,
    /// One scrape at a time: a second one would only double the work.
    scraping: Mutex<()>,
}

/// The admin pages.
pub fn admin(api: Arc<Api>, exposition: Exposition) -> Router {
    let router = Router::new().route("/metrics", get(scrape)).route("/livez", get(alive)).route("/readyz", get(ready));
    #[cfg(feature = "sandbox")]
    let router = router.route("/debug/panic", axum::routing::post(make_panic));
    router.with_state(Arc::new(Admin { api, exposition, scraping: Mutex::new(()) }))
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
        for (volume, stats) in self.api.store().stats() {
            let figures = CommitterFigures {
                queued: stats.queued.load(Relaxed),
                groups: stats.groups.load(Relaxed),
                units: stats.units.load(Relaxed),
                sync: Duration::from_micros(stats.sync_micros.load(Relaxed)),
            };
            metrics::committer(&volume, figures);
        }
        metrics::volumes_failed(usize::from(self.api.store().has_failed_volume()));
        let mut text = self.exposition.render();
        let numbers = self.api.fleet().directory().all();
        let series = numbers.iter().map(|number| (number.labels(), number.stats()));
        collector::render(series, self.api.clock().now(), &mut text);
        text
    }

    /// Why calls are not to be sent here, if so.
    async fn unready(&self) -> Option<&'static str> {
        if self.api.drain().has_begun() {
            return Some("draining");
        }
        if self.api.store().has_failed_volume() {
            return Some("a volume of the store failed");
        }
        match tokio::time::timeout(PING_PATIENCE, self.api.fleet().ping()).await {
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
    let build = if admin.api.is_sandbox_build() { "sandbox" } else { "release" };
    let body = json!({
        "ready": unready.is_none(),
        "reason": unready,
        "build": build,
        "version": env!("CARGO_PKG_VERSION"),
        "numbers": admin.api.fleet().directory().len(),
    });
    (status, Json(body)).into_response()
}

/// Makes a number's actor panic: for tests of the supervisor.
#[cfg(feature = "sandbox")]
async fn make_panic(
    State(admin): State<Arc<Admin>>,
    axum::extract::Query(query): axum::extract::Query<std::collections::HashMap<String, String>>,
) -> StatusCode {
    let id = query.get("number").and_then(|number| number.parse().ok());
    let handle = id.and_then(|id| admin.api.fleet().directory().get(id));
    match handle {
        Some(handle) => {
            handle.make_panic();
            StatusCode::NO_CONTENT
        }
        None => StatusCode::NOT_FOUND,
    }
}
