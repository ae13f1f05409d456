//! JSON answers: what a use case returned, or `{"error", "code", "details"}`.

use std::time::Duration;

use axum::Json;
use axum::http::header::{CACHE_CONTROL, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::api::error::ApiError;
use crate::api::service::Api;
use crate::domain::access::Caller;
use crate::telemetry::metrics::{self, Protocol};

const API_KEY: &str = "x-api-key";

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut details = Map::new();
        if !self.violations.is_empty() {
            let fields =
                self.violations.iter().map(|wrong| json!({"field": json_name(wrong.field), "problem": wrong.problem}));
            details.insert("fields".to_owned(), fields.collect());
        }
        details.extend(self.metadata.iter().map(|(key, value)| ((*key).to_owned(), Value::from(value.as_str()))));
        let mut body = json!({"error": self.reason.text(), "code": self.reason.name()});
        if !details.is_empty() {
            body["details"] = Value::Object(details);
        }
        let status = StatusCode::from_u16(self.reason.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(body)).into_response();
        if let Some(wait) = self.retry_after {
            let seconds = wait.as_secs().max(1);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }
}

/// The field's name in the JSON API.
fn json_name(field: &'static str) -> &'static str {
    match field {
        "to" => "destinationNumber",
        "phone_number" => "contactNumber",
        "request_id" => "Idempotency-Key",
        "correlation_id" => "correlationId",
        "send_time" => "deliverAt",
        "expire_time" => "deliverUntil",
        "ids" => "messageIds",
        field => field,
    }
}

/// A call under way; the name goes into the metrics.
pub(super) struct Call<'a> {
    api: &'a Api,
    method: &'static str,
    begun: Duration,
}

impl<'a> Call<'a> {
    pub(super) fn begin(api: &'a Api, method: &'static str) -> Self {
        Self { api, method, begun: api.clock().monotonic() }
    }

    /// Ends the call: counted, timed, and turned into JSON.
    pub(super) fn answer(self, status: StatusCode, outcome: Result<Value, ApiError>) -> Response {
        let code = outcome.as_ref().map_or_else(|error| error.reason.code().name(), |_| "OK");
        let took = self.api.clock().monotonic().saturating_sub(self.begun);
        metrics::api_request(Protocol::Http, self.method, code, took);
        match outcome {
            Ok(body) => (status, [(CACHE_CONTROL, "no-store")], Json(body)).into_response(),
            Err(error) => error.into_response(),
        }
    }
}

/// Who makes a call.
pub(super) fn caller(api: &Api, headers: &HeaderMap) -> Result<Caller, ApiError> {
    api.authenticate(headers.get(API_KEY).and_then(|value| value.to_str().ok()))
}
