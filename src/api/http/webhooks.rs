//! `/v1/webhooks`: the seed's surface, for tenant and number keys, and what it lacked: rotation, dead letters, sending
//! again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

use super::answer::{Call, caller};
use super::body::Fields;
use crate::api::error::{ApiError, Reason};
use crate::api::service::Api;
use crate::api::webhooks::{AttemptCard, ReplayRange, WebhookCard, WebhookPatch};
use crate::domain::access::Caller;
use crate::domain::endpoint::EndpointStatus;
use crate::domain::time::Timestamp;

const NUMBER_ID: &str = "x-whatsapp-number-id";

/// `GET /v1/webhooks`: a bare array, of the number named or of everything the key may see.
pub(super) async fn list(State(api): State<Arc<Api>>, headers: HeaderMap) -> Response {
    let call = Call::begin(&api, "GET /v1/webhooks");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        let named = headers.get(NUMBER_ID).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let mut cards = Vec::new();
        match (caller, named) {
            (Caller::Tenant(_), "") => {
                for number in api.all_numbers(caller)? {
                    cards.extend(api.webhooks(caller, &number.record.id.to_string()).await?);
                }
            }
            _ => cards = api.webhooks(caller, named).await?,
        }
        Ok(cards.iter().map(shown).collect())
    };
    call.answer(StatusCode::OK, outcome.await)
}

/// `POST /v1/webhooks`; the only answer with the secret, besides that of a rotation.
pub(super) async fn create(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Response {
    let call = Call::begin(&api, "POST /v1/webhooks");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        let mut fields = Fields::read(&body)?;
        let (url, name) = (fields.text("url").unwrap_or_default(), fields.text("name").unwrap_or_default());
        let events = fields.texts("events").unwrap_or_default();
        let number = fields.text("whatsappNumberId").unwrap_or_default();
        fields.end()?;
        let card = api.create_webhook(caller, &number, &name, &url, &events).await?;
        Ok(with_secret(&card))
    };
    call.answer(StatusCode::CREATED, outcome.await)
}

/// `GET /v1/webhooks/{id}`.
pub(super) async fn get(State(api): State<Arc<Api>>, headers: HeaderMap, Path(id): Path<String>) -> Response {
    let call = Call::begin(&api, "GET /v1/webhooks/{id}");
    let outcome = async { Ok(shown(&api.webhook(caller(&api, &headers)?, &id).await?)) };
    call.answer(StatusCode::OK, outcome.await)
}

/// `PATCH /v1/webhooks/{id}`.
pub(super) async fn change(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Path(id): Path<String>,
    body: Bytes,
) -> Response {
    let call = Call::begin(&api, "PATCH /v1/webhooks/{id}");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        let mut fields = Fields::read(&body)?;
        let patch = WebhookPatch {
            name: fields.text("name"),
            url: fields.text("url"),
            events: fields.texts("events"),
            active: fields.flag("active"),
        };
        fields.end()?;
        Ok(shown(&api.update_webhook(caller, &id, patch).await?))
    };
    call.answer(StatusCode::OK, outcome.await)
}

/// `DELETE /v1/webhooks/{id}`.
pub(super) async fn remove(State(api): State<Arc<Api>>, headers: HeaderMap, Path(id): Path<String>) -> Response {
    let call = Call::begin(&api, "DELETE /v1/webhooks/{id}");
    let outcome = async {
        api.delete_webhook(caller(&api, &headers)?, &id).await?;
        Ok(json!({"id": id, "deleted": true}))
    };
    call.answer(StatusCode::OK, outcome.await)
}

/// `GET /v1/webhooks/{id}/logs?limit=1..50&event=`.
pub(super) async fn logs(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Path(id): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let call = Call::begin(&api, "GET /v1/webhooks/{id}/logs");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        let limit = query.get("limit").map(|limit| limit.parse::<i64>().unwrap_or(-1));
        let event = query.get("event").map(String::as_str).unwrap_or_default();
        let cards = api.webhook_attempts(caller, &id, limit, event).await?;
        Ok(cards.iter().map(shown_attempt).collect())
    };
    call.answer(StatusCode::OK, outcome.await)
}

/// `POST /v1/webhooks/{id}/rotate` with `overlapSeconds`.
pub(super) async fn rotate(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Path(id): Path<String>,
    body: Bytes,
) -> Response {
    let call = Call::begin(&api, "POST /v1/webhooks/{id}/rotate");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        let mut fields = Fields::read(if body.is_empty() { b"{}" } else { &body })?;
        let overlap = fields.integer("overlapSeconds");
        fields.end()?;
        let negative = || ApiError::field("overlapSeconds", "must not be negative");
        let overlap = overlap.map(|seconds| u64::try_from(seconds).map_err(|_| negative())).transpose()?;
        let card = api.rotate_webhook_secret(caller, &id, overlap.map(Duration::from_secs)).await?;
        Ok(with_secret(&card))
    };
    call.answer(StatusCode::OK, outcome.await)
}

/// `GET /v1/webhooks/{id}/dead-letters?limit=&before=`.
pub(super) async fn dead_letters(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Path(id): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let call = Call::begin(&api, "GET /v1/webhooks/{id}/dead-letters");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        let limit = query.get("limit").map_or(0, |limit| limit.parse::<i32>().unwrap_or(-1));
        let before = query.get("before").map(String::as_str).unwrap_or_default();
        let (dead, count) = api.dead_letters(caller, &id, limit, before).await?;
        let shown = dead.iter().map(|(event, dead)| {
            json!({
                "id": event.to_string(),
                "sequence": dead.row.sequence.0,
                "reason": dead.reason.code(),
                "attempts": dead.row.attempts,
                "queuedAt": dead.row.queued_at.to_string(),
                "createdAt": dead.at.to_string(),
            })
        });
        Ok(json!({"deadLetters": shown.collect::<Vec<_>>(), "totalCount": count}))
    };
    call.answer(StatusCode::OK, outcome.await)
}

/// `POST /v1/webhooks/{id}/redeliver` with `eventId`.
pub(super) async fn redeliver(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Path(id): Path<String>,
    body: Bytes,
) -> Response {
    let call = Call::begin(&api, "POST /v1/webhooks/{id}/redeliver");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        let mut fields = Fields::read(&body)?;
        let event = fields.text("eventId");
        fields.end()?;
        let event = event.ok_or_else(|| ApiError::field("eventId", "is required"))?;
        Ok(shown(&api.redeliver(caller, &id, &event).await?))
    };
    call.answer(StatusCode::ACCEPTED, outcome.await)
}

/// `POST /v1/webhooks/{id}/replay` with `fromSequence`, `throughSequence`, `since`, `until`.
pub(super) async fn replay(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Path(id): Path<String>,
    body: Bytes,
) -> Response {
    let call = Call::begin(&api, "POST /v1/webhooks/{id}/replay");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        let mut fields = Fields::read(if body.is_empty() { b"{}" } else { &body })?;
        let (from, through) = (fields.integer("fromSequence"), fields.integer("throughSequence"));
        let (since, until) = (fields.moment("since"), fields.moment("until"));
        fields.end()?;
        let bound = |of: Option<i64>| of.map(|of| u64::try_from(of).map_err(|_| Reason::ValidationError)).transpose();
        let range = ReplayRange { from: bound(from)?, through: bound(through)?, since, until };
        Ok(shown(&api.replay(caller, &id, range).await?))
    };
    call.answer(StatusCode::ACCEPTED, outcome.await)
}

fn shown(card: &WebhookCard) -> Value {
    let endpoint = &card.endpoint;
    let number = card.id.number.to_string();
    let (disabled_reason, inactive_since) = match endpoint.status {
        EndpointStatus::Active => (None, None),
        EndpointStatus::Paused { since } => (None, Some(since)),
        EndpointStatus::Disabled { reason, at } => (Some(reason.code()), Some(at)),
    };
    let moment = |at: Option<Timestamp>| at.map(|at| at.to_string());
    json!({
        "id": card.id.to_string(),
        "tenantId": card.tenant.to_string(),
        "name": endpoint.name,
        "url": endpoint.url,
        "environment": "LIVE",
        "active": endpoint.is_active(),
        "disabledReason": disabled_reason,
        "inactiveSince": moment(inactive_since),
        "events": endpoint.filter.names(),
        "apiKeys": [],
        "lastTriggered": moment(card.last_attempt),
        "queueDepth": card.backlog.map(|backlog| backlog.queued),
        "breaker": card.backlog.map(|backlog| backlog.breaker.code()),
        "nextAttempt": moment(card.backlog.and_then(|backlog| backlog.next_attempt)),
        "whatsappNumberIds": [number],
        "whatsappInstanceIds": [number],
        "overlapUntil": moment(endpoint.overlap_until),
        "createdAt": endpoint.created_at.to_string(),
        "updatedAt": endpoint.updated_at.to_string(),
    })
}

fn with_secret(card: &WebhookCard) -> Value {
    let mut body = shown(card);
    body["secret"] = card.endpoint.secrets.first().map(String::as_str).into();
    body
}

fn shown_attempt(card: &AttemptCard) -> Value {
    let record = &card.record;
    let payload = card.payload.as_ref().and_then(|payload| serde_json::from_slice::<Value>(payload).ok());
    json!({
        "event": record.kind.map(|kind| kind.name()),
        "id": card.event.to_string(),
        "sequence": record.sequence.0,
        "attempt": record.attempt,
        "status": if record.outcome == "delivered" { "SUCCESS" } else { "FAILED" },
        "outcome": record.outcome,
        "statusCode": record.status,
        "payload": payload,
        "response": record.response,
        "durationMs": record.duration_ms,
        "createdAt": record.at.to_string(),
    })
}
