//! Between domain types and the generated ones. Nothing generated leaves this folder.

use std::time::Duration;

use super::{limits, proto as pb};
use crate::api::error::ApiError;
use crate::api::events::Step;
use crate::api::messages::MessageCard;
use crate::api::numbers::{NumberCard, NumberChange, NumberUsage, keep_days};
use crate::api::pairing::PairingStep;
use crate::api::webhooks::{AttemptCard, WebhookCard};
use crate::domain::delivery::DeadLetter;
use crate::domain::endpoint::EndpointStatus;
use crate::domain::event::{Event, EventBody};
use crate::domain::id::{EventId, MessageId};
use crate::domain::lifecycle::{Attention, Desired, LinkBy};
use crate::domain::limiter::NewChats;
use crate::domain::message::{Direction, FailureCode, MessageStatus};
use crate::domain::number::CancelOutcome;
use crate::domain::phone::{Contact, Phone};
use crate::domain::proxy::Proxy;
use crate::domain::retention::Retention;
use crate::domain::time::Timestamp;
use crate::domain::version::Source;
use crate::session::link::VersionCard;
use crate::store::meta::{NumberKind, TenantRecord};

pub(super) fn time(at: Timestamp) -> prost_types::Timestamp {
    let nanos = (at.0 % 1000) as i32 * 1_000_000;
    prost_types::Timestamp { seconds: i64::try_from(at.as_secs()).unwrap_or(i64::MAX), nanos }
}

pub(super) fn duration(field: &'static str, duration: &prost_types::Duration) -> Result<Duration, ApiError> {
    let seconds = u64::try_from(duration.seconds);
    let nanos = u32::try_from(duration.nanos);
    match (seconds, nanos) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
        _ => Err(ApiError::field(field, "must not be negative")),
    }
}

pub(super) fn interval(
    field: &'static str,
    asked: Option<&prost_types::Duration>,
) -> Result<Option<Duration>, ApiError> {
    asked.map(|asked| duration(field, asked)).transpose()
}

pub(super) fn moment(field: &'static str, at: Option<&prost_types::Timestamp>) -> Result<Option<Timestamp>, ApiError> {
    let Some(at) = at else { return Ok(None) };
    match (u64::try_from(at.seconds), u64::try_from(at.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => {
            Ok(Some(Timestamp(seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000))))
        }
        _ => Err(ApiError::field(field, "must be a time after 1970")),
    }
}

pub(super) fn cancel_result(id: &str, outcome: CancelOutcome) -> pb::CancelResult {
    let cancelled = outcome == CancelOutcome::Cancelled;
    let reason = if cancelled { String::new() } else { outcome.name().to_owned() };
    pb::CancelResult { id: id.to_owned(), cancelled, reason }
}

pub(super) fn kind_of(kind: i32) -> Result<NumberKind, ApiError> {
    match pb::NumberKind::try_from(kind) {
        Ok(pb::NumberKind::Unspecified | pb::NumberKind::Linked) => Ok(NumberKind::Linked),
        Ok(pb::NumberKind::Official) => Ok(NumberKind::Official),
        Err(_) => Err(ApiError::field("kind", "is not known")),
    }
}

pub(super) fn tenant(record: TenantRecord) -> pb::Tenant {
    pb::Tenant { id: record.id.to_string(), display_name: record.name, create_time: Some(time(record.created_at)) }
}

pub(super) fn client_version(card: VersionCard) -> pb::ClientVersion {
    let source = match card.in_force.map(|(_, source)| source) {
        None => pb::ClientVersionSource::Unspecified,
        Some(Source::Override) => pb::ClientVersionSource::Override,
        Some(Source::Config) => pb::ClientVersionSource::Config,
        Some(Source::Fetched) => pb::ClientVersionSource::Fetched,
        Some(Source::Kept) => pb::ClientVersionSource::Kept,
    };
    pb::ClientVersion {
        version: card.in_force.map(|(version, _)| version.to_string()).unwrap_or_default(),
        source: source.into(),
        looked_up_version: card.found.map(|found| found.version.to_string()).unwrap_or_default(),
        lookup_time: card.found.map(|found| time(found.at)),
    }
}

pub(super) fn number(card: NumberCard) -> pb::Number {
    let NumberCard { record, view, restarts, paused, usage } = card;
    let kind = match record.kind {
        NumberKind::Linked => pb::NumberKind::Linked,
        NumberKind::Official => pb::NumberKind::Official,
    };
    let held = match view.new_chats {
        NewChats::Held { until, reason } => Some((until, reason)),
        NewChats::Allowed | NewChats::Probing => None,
    };
    let desired = match view.desired {
        Desired::Running => pb::DesiredState::Running,
        Desired::Stopped => pb::DesiredState::Stopped,
    };
    let paused = record.orders.pause.filter(|_| paused);
    pb::Number {
        id: record.id.to_string(),
        tenant: record.tenant.to_string(),
        display_name: record.name.clone(),
        phone_number: record.phone.e164(),
        kind: kind.into(),
        // The codes of the domain are the numbers of the contract; a test holds them together.
        state: i32::from(view.state.code()),
        state_change_time: Some(time(view.since)),
        reason: view.reason,
        next_attempt_time: view.next_attempt.map(time),
        restart_count: i64::try_from(restarts).unwrap_or(i64::MAX),
        desired_state: desired.into(),
        create_time: Some(time(record.created_at)),
        retention: Some(retention(record.retention)),
        proxy: record.proxy.as_ref().map(Proxy::shown).unwrap_or_default(),
        new_chats_held_until: held.map(|(until, _)| time(until)),
        last_error: view.last_error.map(|last| pb::NumberError {
            code: last.code,
            detail: last.detail.map(i32::from).unwrap_or_default(),
            time: Some(time(last.at)),
        }),
        attention: attention(view.attention).into(),
        new_chats_held_reason: held.map(|(_, reason)| reason.name().to_owned()).unwrap_or_default(),
        own_limits: Some(limits::own_limits(record.orders.limits)),
        paused_since: paused.map(|pause| time(pause.since)),
        paused_until: paused.and_then(|pause| pause.until).map(time),
        usage: Some(number_usage(usage)),
    }
}

fn number_usage(usage: NumberUsage) -> pb::NumberUsage {
    let figure = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let named =
        |parts: &[(&str, u64)]| parts.iter().map(|(name, value)| ((*name).to_owned(), figure(*value))).collect();
    pb::NumberUsage {
        memory_bytes: named(&usage.memory.parts()),
        disk_rows: named(&usage.disk.parts()),
        wire_received_bytes: figure(usage.wire_received),
        wire_sent_bytes: figure(usage.wire_sent),
    }
}

fn attention(attention: Attention) -> pb::Attention {
    match attention {
        Attention::None => pb::Attention::None,
        Attention::Owner => pb::Attention::Owner,
        Attention::Operator => pb::Attention::Operator,
    }
}

fn retention(retention: Retention) -> pb::Retention {
    let (mode, days) = match retention {
        Retention::KeepAll => (pb::RetentionMode::KeepAll, 0),
        Retention::KeepDays(days) => (pb::RetentionMode::KeepDays, days),
        Retention::RelayOnly => (pb::RetentionMode::RelayOnly, 0),
    };
    pb::Retention { mode: mode.into(), days: days.into() }
}

pub(super) fn retention_of(asked: Option<&pb::Retention>) -> Result<Retention, ApiError> {
    let Some(asked) = asked else { return Ok(Retention::KeepAll) };
    match pb::RetentionMode::try_from(asked.mode) {
        Ok(pb::RetentionMode::KeepDays) => keep_days("retention.days", asked.days.into()),
        Ok(_) if asked.days != 0 => Err(ApiError::field("retention.days", "needs the mode that keeps days")),
        Ok(pb::RetentionMode::Unspecified | pb::RetentionMode::KeepAll) => Ok(Retention::KeepAll),
        Ok(pb::RetentionMode::RelayOnly) => Ok(Retention::RelayOnly),
        Err(_) => Err(ApiError::field("retention.mode", "is not known")),
    }
}

pub(super) fn number_change<'a>(
    number: &'a pb::Number,
    mask: Option<&prost_types::FieldMask>,
) -> Result<NumberChange<'a>, ApiError> {
    let mut change = NumberChange::default();
    for path in mask.iter().flat_map(|mask| &mask.paths) {
        match path.as_str() {
            "display_name" => change.name = Some(&number.display_name),
            "proxy" => change.proxy = Some(&number.proxy),
            "retention" => change.retention = Some(retention_of(number.retention.as_ref())?),
            _ => return Err(ApiError::field("update_mask", "may name display_name, retention and proxy only")),
        }
    }
    if change.name.is_none() && change.retention.is_none() && change.proxy.is_none() {
        return Err(ApiError::field("update_mask", "must name what to change"));
    }
    Ok(change)
}

pub(super) fn message(card: MessageCard) -> pb::Message {
    let MessageCard { id, record, progress, peer } = card;
    let direction = match record.direction {
        Direction::Inbound => pb::MessageDirection::Inbound,
        Direction::Outbound => pb::MessageDirection::Outbound,
        Direction::OwnDevice => pb::MessageDirection::OwnDevice,
    };
    let status = progress.map_or(pb::MessageStatus::Unspecified, |progress| status(progress.status));
    let moment = |at: Option<Timestamp>| at.map(time);
    pb::Message {
        id: id.to_string(),
        number: id.number.to_string(),
        direction: direction.into(),
        peer_phone_number: peer.as_ref().map(Phone::e164).unwrap_or_default(),
        peer_name: record.sender_name.unwrap_or_default(),
        text: record.content.text().to_owned(),
        kind: record.content.kind().to_owned(),
        status: status.into(),
        create_time: Some(time(record.created_at)),
        sent_time: moment(progress.and_then(|progress| progress.sent_at)),
        delivered_time: moment(progress.and_then(|progress| progress.delivered_at)),
        read_time: moment(progress.and_then(|progress| progress.read_at)),
        failed_time: moment(progress.and_then(|progress| progress.failed_at)),
        written_time: Some(time(record.written_at)),
        failure_code: failure(progress.and_then(|progress| progress.failure)),
        whatsapp_id: record.whatsapp_id,
        correlation_id: record.correlation_id.unwrap_or_default(),
        send_time: moment(record.send_at),
        expire_time: moment(record.expires_at),
    }
}

pub(super) fn webhook(card: WebhookCard) -> pb::Webhook {
    let WebhookCard { id, endpoint, backlog, .. } = card;
    let (disabled_reason, inactive_since) = match endpoint.status {
        EndpointStatus::Active => ("", None),
        EndpointStatus::Paused { since } => ("", Some(since)),
        EndpointStatus::Disabled { reason, at } => (reason.code(), Some(at)),
    };
    pb::Webhook {
        id: id.to_string(),
        number: id.number.to_string(),
        events: endpoint.filter.names().into_iter().map(str::to_owned).collect(),
        active: endpoint.is_active(),
        create_time: Some(time(endpoint.created_at)),
        url: endpoint.url,
        name: endpoint.name,
        disabled_reason: disabled_reason.to_owned(),
        inactive_since: inactive_since.map(time),
        overlap_end_time: endpoint.overlap_until.map(time),
        queue_depth: backlog.map(|backlog| i64::try_from(backlog.queued).unwrap_or(i64::MAX)),
        breaker: backlog.map(|backlog| backlog.breaker.code().to_owned()).unwrap_or_default(),
        next_attempt_time: backlog.and_then(|backlog| backlog.next_attempt).map(time),
    }
}

pub(super) fn attempt(card: AttemptCard) -> pb::Attempt {
    let AttemptCard { record, event, .. } = card;
    pb::Attempt {
        event: event.to_string(),
        r#type: record.kind.map(|kind| kind.name().to_owned()).unwrap_or_default(),
        sequence: i64::try_from(record.sequence.0).unwrap_or(i64::MAX),
        attempt: record.attempt.into(),
        outcome: record.outcome,
        status_code: record.status.map_or(0, i32::from),
        response: record.response,
        duration: prost_types::Duration::try_from(Duration::from_millis(record.duration_ms)).ok(),
        end_time: Some(time(record.at)),
    }
}

pub(super) fn dead_letter((event, dead): (EventId, DeadLetter)) -> pb::DeadLetter {
    pb::DeadLetter {
        event: event.to_string(),
        sequence: i64::try_from(dead.row.sequence.0).unwrap_or(i64::MAX),
        reason: dead.reason.code().to_owned(),
        attempts: dead.row.attempts.into(),
        queue_time: Some(time(dead.row.queued_at)),
        dead_time: Some(time(dead.at)),
    }
}

/// What the phone is given.
///
/// # Errors
/// A method that does not exist.
pub(super) fn link_by(method: i32) -> Result<LinkBy, ApiError> {
    match pb::PairingMethod::try_from(method) {
        Ok(pb::PairingMethod::Unspecified | pb::PairingMethod::QrCode) => Ok(LinkBy::QrCode),
        Ok(pb::PairingMethod::PairingCode) => Ok(LinkBy::PairingCode),
        Err(_) => Err(ApiError::field("method", "is not a pairing method")),
    }
}

pub(super) fn pairing_step(step: PairingStep) -> pb::PairNumberResponse {
    use pb::pair_number_response::Step as Wire;
    let step = match step {
        PairingStep::QrCode { code, expires_at } => {
            Wire::QrCode(pb::QrCode { code, expire_time: Some(time(expires_at)) })
        }
        PairingStep::PairingCode { code, expires_at } => {
            Wire::PairingCode(pb::PairingCode { code, expire_time: Some(time(expires_at)) })
        }
        PairingStep::PasskeyRequest { options, expires_at } => Wire::PasskeyRequest(pb::PasskeyRequest {
            request_options_json: options,
            expire_time: Some(time(expires_at)),
        }),
        PairingStep::PasskeyCode { code, expires_at } => {
            Wire::PasskeyConfirmation(pb::PasskeyConfirmation { code, expire_time: Some(time(expires_at)) })
        }
        PairingStep::Paired(phone) => Wire::Paired(pb::Paired { phone_number: phone.e164() }),
        PairingStep::Online => Wire::Online(pb::PairedOnline {}),
        PairingStep::Failed(reason) => Wire::Failed(pb::PairingFailed { reason }),
    };
    pb::PairNumberResponse { step: Some(step) }
}

pub(super) fn stream_step(step: Step, cursor: String) -> pb::StreamEventsResponse {
    use pb::stream_events_response::Step as Wire;
    let step = match step {
        Step::Event(event) => Wire::Event(self::event(*event)),
        Step::Progress { caught_up } => Wire::Progress(pb::Progress { caught_up }),
    };
    pb::StreamEventsResponse { cursor, step: Some(step) }
}

fn event(event: Event) -> pb::Event {
    use pb::event::Body;
    let kind = event.kind().name().to_owned();
    let EventId { number, seq } = event.id;
    let body = match event.body {
        EventBody::Outbound(body) => Body::MessageProgress(pb::MessageProgress {
            message: body.message.to_string(),
            whatsapp_id: body.whatsapp_id,
            correlation_id: body.correlation_id.unwrap_or_default(),
            to: phone_of(&body.to),
            status: status(body.status).into(),
            failure_code: failure(body.failure),
        }),
        EventBody::Received(body) => Body::MessageReceived(pb::MessageReceived {
            message: MessageId::to_string(&body.message),
            whatsapp_id: body.whatsapp_id,
            from: phone_of(&body.from),
            sender_name: body.sender_name.unwrap_or_default(),
            text: body.text,
            written_time: Some(time(body.written_at)),
        }),
        EventBody::NumberCreated | EventBody::NumberConnected | EventBody::NumberRecovered | EventBody::Erased(_) => {
            Body::NumberChange(pb::NumberChange::default())
        }
        EventBody::NumberDegraded { reason } => {
            Body::NumberChange(pb::NumberChange { reason, ..pb::NumberChange::default() })
        }
        EventBody::NumberDisconnected { reason, reconnecting } => {
            Body::NumberChange(pb::NumberChange { reason, reconnecting })
        }
        EventBody::WebhookDisabled { webhook, reason } => {
            Body::WebhookChange(pb::WebhookChange { webhook: webhook.to_string(), reason: reason.code().to_owned() })
        }
    };
    pb::Event {
        id: event.id.to_string(),
        r#type: kind,
        number: number.to_string(),
        sequence: i64::try_from(seq.0).unwrap_or(i64::MAX),
        create_time: Some(time(event.at)),
        body: Some(body),
    }
}

fn phone_of(contact: &Contact) -> String {
    contact.phone.as_ref().map(Phone::e164).unwrap_or_default()
}

fn failure(code: Option<FailureCode>) -> String {
    code.map(|code| code.name().to_owned()).unwrap_or_default()
}

fn status(status: MessageStatus) -> pb::MessageStatus {
    match status {
        MessageStatus::Queued => pb::MessageStatus::Queued,
        MessageStatus::Sent => pb::MessageStatus::Sent,
        MessageStatus::Delivered => pb::MessageStatus::Delivered,
        MessageStatus::Read => pb::MessageStatus::Read,
        MessageStatus::Played => pb::MessageStatus::Played,
        MessageStatus::Failed => pb::MessageStatus::Failed,
        MessageStatus::Cancelled => pb::MessageStatus::Cancelled,
        MessageStatus::Expired => pb::MessageStatus::Expired,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lifecycle::State;
    use crate::telemetry::number_stats::STATE_NAMES;

    #[test]
    fn states_are_the_same_in_domain_contract_and_metrics() {
        let at = Timestamp(1);
        let states = [
            State::Unlinked,
            State::Linking,
            State::Offline { retry_at: at },
            State::AwaitingGate,
            State::Connecting,
            State::Online,
            State::Parked { until: at },
            State::Replaced,
            State::LoggedOut,
            State::Stopped,
            State::Quarantined,
        ];
        for state in states {
            let wire = pb::NumberState::try_from(i32::from(state.code())).unwrap();
            assert_eq!(wire.as_str_name(), format!("NUMBER_STATE_{}", state.name()));
            assert_eq!(STATE_NAMES[usize::from(state.code())], state.name().to_lowercase());
        }
    }

    #[test]
    fn times_keep_their_milliseconds() {
        assert_eq!(time(Timestamp(1_234)), prost_types::Timestamp { seconds: 1, nanos: 234_000_000 });
        assert!(duration("max_wait", &prost_types::Duration { seconds: -1, nanos: 0 }).is_err());
    }
}
