//! `/v1/messages`: the seed's surface, for number keys.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

use super::answer::{Call, caller};
use super::body::Fields;
use crate::api::error::{ApiError, Reason};
use crate::api::messages::{MessageCard, SendOrder};
use crate::api::service::{Api, number_only};
use crate::domain::id::{MessageId, NumberId};
use crate::domain::message::MessageStatus;
use crate::domain::number::CancelOutcome;
use crate::domain::phone::Phone;
use crate::domain::time::Timestamp;

const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Fields of the product's send call that this version refuses rather than ignores.
const UNSUPPORTED: [&str; 12] = [
    "templateId",
    "variables",
    "media",
    "mediaType",
    "caption",
    "buttons",
    "header",
    "footer",
    "groupId",
    "newsletterId",
    "labels",
    "marketingOptions",
];

/// `POST /v1/messages/send`.
pub(super) async fn send(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Response {
    let call = Call::begin(&api, "POST /v1/messages/send");
    let outcome = accept(&api, &headers, &body).await;
    call.answer(StatusCode::ACCEPTED, outcome)
}

async fn accept(api: &Api, headers: &HeaderMap, body: &[u8]) -> Result<Value, ApiError> {
    let caller = caller(api, headers)?;
    number_only(caller)?;
    let mut fields = Fields::read(body)?;
    let (text, to) = (fields.text("text"), fields.text("destinationNumber"));
    let given_correlation = fields.text("correlationId");
    let (send_time, expire_time) = (fields.moment("deliverAt"), fields.moment("deliverUntil"));
    for field in UNSUPPORTED {
        fields.unsupported(field);
    }
    fields.end()?;
    let request_id = match headers.get(IDEMPOTENCY_KEY) {
        None => "",
        Some(value) => value.to_str().map_err(|_| ApiError::field("request_id", "must be printable ASCII"))?,
    };
    // A repeated request must be the same request, so its reference follows from it.
    let correlation_id = match (given_correlation, request_id) {
        (Some(given), _) => given,
        (None, "") => api.new_correlation_id(),
        (None, request_id) => request_id.to_owned(),
    };
    let order = SendOrder {
        number: "",
        to: to.as_deref().unwrap_or_default(),
        text: text.as_deref(),
        request_id,
        correlation_id: &correlation_id,
        send_time,
        expire_time,
        max_wait: None,
    };
    let card = api.send_message(caller, order).await?.message;
    let source = api.number(caller, "")?.record.phone.e164();
    Ok(json!({
        "id": card.id.to_string(),
        "correlationId": card.record.correlation_id,
        // What the call did; how far the message got since is told by events and `GET /v1/messages/{id}`.
        "status": MessageStatus::Queued.name(),
        "createdAt": card.record.created_at.to_string(),
        "origin": "API",
        "sourceNumber": source,
    }))
}

/// `DELETE /v1/messages/cancel`.
pub(super) async fn cancel(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Response {
    let call = Call::begin(&api, "DELETE /v1/messages/cancel");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        number_only(caller)?;
        let mut fields = Fields::read(&body)?;
        let ids = fields.texts("messageIds").unwrap_or_default();
        fields.end()?;
        let outcomes = api.cancel_messages(caller, "", &ids).await?;
        let (cancelled, failed): (Vec<_>, Vec<_>) =
            outcomes.into_iter().partition(|(_, outcome)| *outcome == CancelOutcome::Cancelled);
        let cancelled: Vec<&str> = cancelled.into_iter().map(|(id, _)| id).collect();
        let failed: Vec<Value> =
            failed.into_iter().map(|(id, outcome)| json!({"id": id, "reason": outcome.name()})).collect();
        Ok(json!({"cancelled": cancelled, "failed": failed}))
    };
    call.answer(StatusCode::OK, outcome.await)
}

/// `GET /v1/messages/{id}`, by our id, by WhatsApp's or by the caller's reference.
pub(super) async fn get(State(api): State<Arc<Api>>, headers: HeaderMap, Path(id): Path<String>) -> Response {
    let call = Call::begin(&api, "GET /v1/messages/{id}");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        let number = number_only(caller)?;
        let card = match find(&api, number, &id).await {
            None => api.message(caller, &id).await?,
            Some(found) => found?,
        };
        // The call tells of sends; received messages are in the history.
        let progress = card.progress.ok_or(Reason::MessageNotFound)?;
        let moment = |at: Option<Timestamp>| at.map(|at| at.to_string());
        let failure = progress.failure.map(crate::domain::message::FailureCode::name);
        Ok(json!({
            "id": card.id.to_string(),
            "status": progress.status.name(),
            "correlationId": card.record.correlation_id,
            "destinationNumber": card.peer.as_ref().map(Phone::e164),
            "template": null,
            "createdAt": card.record.created_at.to_string(),
            "deliverAt": moment(card.record.send_at),
            "deliverUntil": moment(card.record.expires_at),
            "sentAt": moment(progress.sent_at),
            "deliveredAt": moment(progress.delivered_at),
            "readAt": moment(progress.read_at),
            "externalMessageId": card.record.whatsapp_id,
            "errorMessage": failure,
            "errorCode": failure,
        }))
    };
    call.answer(StatusCode::OK, outcome.await)
}

/// By WhatsApp's id or the caller's reference, when the text is not an id of ours.
async fn find(api: &Api, number: NumberId, id: &str) -> Option<Result<MessageCard, ApiError>> {
    if id.parse::<MessageId>().is_ok() {
        return None;
    }
    Some(api.message_named(number, id).await)
}
