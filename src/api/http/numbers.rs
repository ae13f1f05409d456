//! `/v1/numbers`: the seed's surface, for tenant keys. Shows the seed's three states.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

use super::answer::{Call, caller};
use super::body::Fields;
use crate::api::error::ApiError;
use crate::api::numbers::{NumberCard, NumberChange, keep_days};
use crate::api::service::{Api, tenant_only};
use crate::domain::lifecycle::State as Life;
use crate::domain::retention::Retention;
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

/// `PATCH /v1/numbers/{id}`: the name, what it keeps, or both.
pub(super) async fn change(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    Path(id): Path<String>,
    body: Bytes,
) -> Response {
    let call = Call::begin(&api, "PATCH /v1/numbers/{id}");
    let outcome = async {
        let caller = caller(&api, &headers)?;
        tenant_only(caller)?;
        let mut fields = Fields::read(&body)?;
        let (name, mode) = (fields.text("name"), fields.text("piiMode"));
        let days = fields.integer("piiRetentionDays");
        fields.end()?;
        let retention = retention_of(mode.as_deref(), days)?;
        if name.is_none() && retention.is_none() {
            return Err(ApiError::field("body", "must say what to change"));
        }
        let change = NumberChange { name: name.as_deref(), retention, ..NumberChange::default() };
        let card = api.update_number(caller, &id, change).await?;
        Ok(shown(&api, &card))
    };
    call.answer(StatusCode::OK, outcome.await)
}

fn retention_of(mode: Option<&str>, days: Option<i64>) -> Result<Option<Retention>, ApiError> {
    let retention = match (mode, days) {
        (None, None) => return Ok(None),
        (Some("STORE_X_DAYS"), Some(days)) => keep_days("piiRetentionDays", days)?,
        (Some("STORE_X_DAYS"), None) => return Err(ApiError::field("piiRetentionDays", "is missing")),
        (_, Some(_)) => return Err(ApiError::field("piiRetentionDays", "needs piiMode STORE_X_DAYS")),
        (Some("STORE_INDEFINITE"), None) => Retention::KeepAll,
        (Some("RELAY_ONLY"), None) => Retention::RelayOnly,
        (Some(_), None) => {
            return Err(ApiError::field("piiMode", "must be among STORE_INDEFINITE, STORE_X_DAYS, RELAY_ONLY"));
        }
    };
    Ok(Some(retention))
}

const fn mode_of(retention: Retention) -> &'static str {
    match retention {
        Retention::KeepAll => "STORE_INDEFINITE",
        Retention::KeepDays(_) => "STORE_X_DAYS",
        Retention::RelayOnly => "RELAY_ONLY",
    }
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
        "piiMode": mode_of(record.retention),
        "piiRetentionDays": match record.retention {
            Retention::KeepDays(days) => Some(days),
            Retention::KeepAll | Retention::RelayOnly => None,
        },
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
        Life::Online | Life::Degraded => "OPEN",
        Life::Linking | Life::Offline { .. } | Life::AwaitingGate | Life::Connecting => "CONNECTING",
        Life::Unlinked | Life::Parked { .. } | Life::Replaced | Life::LoggedOut | Life::Stopped | Life::Quarantined => {
            "CLOSE"
        }
    }
}
