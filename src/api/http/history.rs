//! `GET /v1/messages/history` and `POST /v1/contacts/erase`, for number keys.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

use super::answer::{Call, caller};
use super::body::Fields;
use crate::api::history::{COUNTED_MAX, HistoryOrder, HistoryPage};
use crate::api::messages::MessageCard;
use crate::api::service::{Api, number_only};
use crate::domain::message::Direction;
use crate::domain::phone::Phone;
use crate::domain::time::Timestamp;
use crate::number::handle::Erased;

/// Says why a history is empty.
const RELAY_ONLY: &str = "PII_RELAY_ONLY";

pub(super) async fn list(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let call = Call::begin(&api, "GET /v1/messages/history");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        number_only(caller)?;
        let given = |name: &str| query.get(name).map(String::as_str).filter(|text| !text.is_empty());
        let order = HistoryOrder {
            start: given("startDate"),
            end: given("endDate"),
            page: given("page"),
            page_size: given("pageSize"),
            cursor: given("cursor"),
        };
        Ok(shown(&api.history(caller, &order).await?))
    };
    call.answer(StatusCode::OK, outcome.await)
}

/// `POST /v1/contacts/erase`: everything of one contact. The phone number is in the body, because paths end up in logs.
pub(super) async fn erase_contact(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Response {
    let call = Call::begin(&api, "POST /v1/contacts/erase");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        number_only(caller)?;
        let mut fields = Fields::read(&body)?;
        let contact = fields.text("contactNumber");
        fields.end()?;
        Ok(match api.erase_contact(caller, "", contact.as_deref().unwrap_or_default()).await? {
            Erased::Entirely => json!({"status": "ERASED"}),
            Erased::UnderWay => json!({"status": "ERASING"}),
        })
    };
    call.answer(StatusCode::OK, outcome.await)
}

fn shown(found: &HistoryPage) -> Value {
    let mut body = json!({
        "messages": found.entries.iter().map(shown_message).collect::<Vec<_>>(),
        "total": found.total,
        "totalIsExact": found.total < COUNTED_MAX,
        "page": found.page,
        "pageSize": found.page_size,
        "totalPages": found.total.div_ceil(found.page_size),
        "nextCursor": found.next,
    });
    if found.relays_only {
        body["notice"] = RELAY_ONLY.into();
    }
    body
}

fn shown_message(card: &MessageCard) -> Value {
    let record = &card.record;
    let (direction, origin) = match record.direction {
        Direction::Inbound => ("INBOUND", "CONTACT"),
        Direction::Outbound => ("OUTBOUND", "API"),
        Direction::OwnDevice => ("OUTBOUND", "DEVICE"),
    };
    let progress = card.progress;
    let moment = |at: Option<Timestamp>| at.map(|at| at.to_string());
    json!({
        "id": card.id.to_string(),
        "conversationId": format!("{}:{}", card.id.number, record.chat.0),
        "direction": direction,
        "providerKind": "PILOT_STATUS",
        "externalMessageId": record.whatsapp_id,
        "correlationId": record.correlation_id,
        "status": progress.map(|progress| progress.status.name()),
        "messageType": record.content.kind(),
        "origin": origin,
        "text": record.content.text(),
        "participantName": record.sender_name,
        "participantPhone": card.peer.as_ref().map(Phone::e164),
        "repliedToExternalId": null,
        "media": null,
        "sentAt": moment(progress.and_then(|progress| progress.sent_at)),
        "deliveredAt": moment(progress.and_then(|progress| progress.delivered_at)),
        "readAt": moment(progress.and_then(|progress| progress.read_at)),
        "providerTimestamp": record.written_at.to_string(),
        "createdAt": record.created_at.to_string(),
    })
}
