//! `/v1/numbers`: the seed's surface, for tenant keys. Shows the seed's three states.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

use super::answer::{Call, caller};
use crate::api::numbers::NumberCard;
use crate::api::service::{Api, tenant_only};
use crate::domain::lifecycle::State as Life;
use crate::store::meta::{KeyRecord, NumberKind};

/// `GET /v1/numbers`: a bare array.
pub(super) async fn list(State(api): State<Arc<Api>>, headers: HeaderMap) -> Response {
    let call = Call::begin(&api, "GET /v1/numbers");
    let cards = caller(&api, &headers).and_then(|caller| api.all_numbers(caller));
    let outcome = cards.map(|cards| cards.iter().map(|card| shown(&api, card)).collect());
    call.answer(StatusCode::OK, outcome)
}

/// `GET /v1/numbers/{id}`.
pub(super) async fn get(State(api): State<Arc<Api>>, headers: HeaderMap, Path(id): Path<String>) -> Response {
    let call = Call::begin(&api, "GET /v1/numbers/{id}");
    let one = || {
        let caller = caller(&api, &headers)?;
        tenant_only(caller)?;
        let card = api.number(caller, &id)?;
        let mut body = shown(&api, &card);
        body["health"] = json!({
            "qualityRating": null,
            "messagingLimitTier": null,
            "metaStatus": null,
            "sendable": is_open(&card),
        });
        body["meta"] = Value::Null;
        Ok(body)
    };
    call.answer(StatusCode::OK, one())
}

fn shown(api: &Api, card: &NumberCard) -> Value {
    let record = &card.record;
    let keys: Vec<Value> = api.keys_of_number(record.id).iter().map(|key| shown_key(key)).collect();
    json!({
        "id": record.id.to_string(),
        "instanceName": record.id.to_string(),
        "number": record.phone.digits(),
        "name": record.name,
        "provider": match record.kind {
            NumberKind::Linked => "PILOT_STATUS",
            NumberKind::Official => "META",
        },
        "apiKeys": keys,
        "state": state_of(card.view.state),
        "isFullyConnected": is_open(card),
        "createdAt": record.created_at.to_string(),
        "updatedAt": card.view.since.max(record.created_at).to_string(),
    })
}

fn shown_key(key: &KeyRecord) -> Value {
    json!({"name": key.id, "keyPrefix": format!("ps_nb_{}", key.id), "keyLast4": key.last4})
}

fn is_open(card: &NumberCard) -> bool {
    state_of(card.view.state) == "OPEN"
}

const fn state_of(state: Life) -> &'static str {
    match state {
        Life::Online => "OPEN",
        Life::Linking | Life::Offline { .. } | Life::AwaitingGate | Life::Connecting => "CONNECTING",
        Life::Unlinked | Life::Parked { .. } | Life::Replaced | Life::LoggedOut | Life::Stopped | Life::Quarantined => {
            "CLOSE"
        }
    }
}
