//! Before any call reaches a service: is there room, and how long may it take. Our own layer, because tonic's answers
//! an expired deadline with CANCELLED, and a JSON caller with an empty gRPC answer.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::Semaphore;

use crate::api::error::{ApiError, Reason};
use crate::api::grpc::server::STREAMING;
use crate::api::grpc::status;
use crate::telemetry::metrics::{self, Protocol};

const GRPC: &str = "application/grpc";
const GRPC_TIMEOUT: &str = "grpc-timeout";
/// Digits of a `grpc-timeout`, by the protocol.
const TIMEOUT_DIGITS_MAX: usize = 8;
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Limits of the public listener.
#[derive(Debug, Clone)]
pub(super) struct Admission {
    room: Arc<Semaphore>,
    deadline: Duration,
}

impl Admission {
    pub(super) fn new(concurrent_requests: usize, deadline: Duration) -> Self {
        Self { room: Arc::new(Semaphore::new(concurrent_requests.min(Semaphore::MAX_PERMITS))), deadline }
    }
}

pub(super) async fn admit(State(admission): State<Admission>, request: Request, next: Next) -> Response {
    let grpc = is_grpc(request.headers());
    let Ok(_room) = admission.room.try_acquire() else {
        return counted(grpc, &ApiError::from(Reason::Overloaded).retry_after(RETRY_AFTER));
    };
    if STREAMING.contains(&request.uri().path()) {
        // Room is held until the stream is open; open streams are limited by their connections.
        return next.run(request).await;
    }
    let asked = request.headers().get(GRPC_TIMEOUT).and_then(|value| value.to_str().ok()).and_then(timeout_of);
    let limit = asked.unwrap_or(admission.deadline).min(admission.deadline);
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => counted(grpc, &Reason::DeadlineExceeded.into()),
    }
}

fn counted(grpc: bool, error: &ApiError) -> Response {
    let protocol = if grpc { Protocol::Grpc } else { Protocol::Http };
    metrics::api_refused(protocol, error.reason.name());
    refusal(grpc, error)
}

/// The answer of a call that reached no service.
pub(super) fn refusal(grpc: bool, error: &ApiError) -> Response {
    if grpc {
        return status::response_of(error);
    }
    error.clone().into_response()
}

pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with(GRPC))
}

/// `100m`, `5S` and the like.
fn timeout_of(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > TIMEOUT_DIGITS_MAX || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::body::Body;
    use axum::middleware::from_fn_with_state;
    use axum::routing::get;
    use tower::ServiceExt as _;

    #[test]
    fn timeouts_are_read_as_the_protocol_writes_them() {
        for (text, expected) in [
            ("2H", Some(Duration::from_secs(7_200))),
            ("100m", Some(Duration::from_millis(100))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("", None),
            ("S", None),
            ("5", None),
            ("5x", None),
            ("123456789S", None),
            ("5é", None),
        ] {
            assert_eq!(timeout_of(text), expected, "{text}");
        }
    }

    async fn slow() -> &'static str {
        tokio::time::sleep(Duration::from_secs(3600)).await;
        "late"
    }

    async fn call(content_type: &str, grpc_timeout: &str) -> Response {
        let admission = Admission::new(1, Duration::from_millis(50));
        let router = Router::new().route("/slow", get(slow)).layer(from_fn_with_state(admission, admit));
        let request = Request::builder()
            .uri("/slow")
            .header(CONTENT_TYPE, content_type)
            .header(GRPC_TIMEOUT, grpc_timeout)
            .body(Body::empty())
            .unwrap();
        router.oneshot(request).await.unwrap()
    }

    #[tokio::test]
    async fn a_late_call_is_answered_in_its_own_protocol() {
        let grpc = call("application/grpc", "10m").await;
        assert_eq!((grpc.status().as_u16(), grpc.headers()["grpc-status"].to_str().unwrap()), (200, "4"));
        // Longer than allowed: the listener's own deadline counts.
        let json = call("application/json", "1H").await;
        assert_eq!(json.status().as_u16(), 504);
    }

    #[tokio::test]
    async fn without_room_a_call_is_shed_at_once() {
        let admission = Admission::new(0, Duration::from_secs(1));
        let router = Router::new().route("/slow", get(slow)).layer(from_fn_with_state(admission, admit));
        let request = Request::builder().uri("/slow").body(Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        assert_eq!(response.status().as_u16(), 503);
        assert_eq!(response.headers()["retry-after"], "1");
    }
}
