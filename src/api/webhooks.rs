//! Webhook endpoints of a number: managing them, seeing what became of deliveries, sending again.

use std::time::Duration;

use super::error::{ApiError, Reason};
use super::service::Api;
use crate::domain::access::Caller;
use crate::domain::change::AttemptRecord;
use crate::domain::delivery::{Backlog, DeadLetter, Dispatch};
use crate::domain::endpoint::{Endpoint, EndpointStatus, EndpointUpdate, Replay, SECRET_OVERLAP, SECRET_OVERLAP_MAX};
use crate::domain::event::{EventFilter, EventKind};
use crate::domain::id::{EndpointId, EventId, EventSeq, NumberId, TenantId};
use crate::domain::number::EndpointOrder;
use crate::domain::time::Timestamp;
use crate::store::number_store::NumberStore;
use crate::webhook::signature::Secret;
use crate::webhook::{guard, payload};

/// Most entries of the attempt log in one answer.
pub const ATTEMPTS_SHOWN_MAX: usize = 50;
/// Most dead letters in one answer.
const DEAD_LETTERS_SHOWN_MAX: usize = 500;
/// Entries of the attempt log that one look goes through.
const ATTEMPTS_READ: usize = 1000;
const NAME_CHARS_MAX: usize = 200;

/// An endpoint as its owner sees it.
#[derive(Debug)]
pub struct WebhookCard {
    /// Its id.
    pub id: EndpointId,
    /// The owner.
    pub tenant: TenantId,
    /// What was recorded of it.
    pub endpoint: Endpoint,
    /// When the last attempt ended, if there was one that is still logged.
    pub last_attempt: Option<Timestamp>,
    /// How its queue stands; unknown while the number starts.
    pub backlog: Option<Backlog>,
}

/// What an owner wants changed, as it was written.
#[derive(Debug, Default)]
pub struct WebhookPatch {
    /// What people call it.
    pub name: Option<String>,
    /// Where to POST.
    pub url: Option<String>,
    /// Which events; replaces the list.
    pub events: Option<Vec<String>>,
    /// Whether it receives anything.
    pub active: Option<bool>,
}

/// One entry of the attempt log.
#[derive(Debug)]
pub struct AttemptCard {
    /// What was recorded.
    pub record: AttemptRecord,
    /// The event.
    pub event: EventId,
    /// What was sent, if the event is still kept.
    pub payload: Option<Vec<u8>>,
}

/// A part of the event log; unset ends are open.
#[derive(Debug, Default, Clone, Copy)]
pub struct ReplayRange {
    /// The first event, by its sequence in the number's log.
    pub from: Option<u64>,
    /// The last one.
    pub through: Option<u64>,
    /// Recorded at this moment or later.
    pub since: Option<Timestamp>,
    /// Recorded before this moment.
    pub until: Option<Timestamp>,
}

impl Api {
    /// Subscribes a URL; the endpoint holds its signing secret.
    ///
    /// # Errors
    /// See the contract.
    pub async fn create_webhook(
        &self,
        caller: Caller,
        named: &str,
        name: &str,
        url: &str,
        events: &[String],
    ) -> Result<WebhookCard, ApiError> {
        if let Caller::Number { number, .. } = caller
            && !named.is_empty()
            && named != number.to_string()
        {
            return Err(Reason::NumberMismatch.into());
        }
        let record = self.number_meant(caller, named)?;
        let number = record.id;
        let filter = filter_of(events)?;
        let host = self.host_of(url)?;
        let secret = Secret::mint(&self.parts.random.bytes());
        let now = self.parts.clock.now();
        let endpoint = Endpoint {
            // The number chooses it.
            ordinal: 0,
            name: if name.is_empty() { host } else { name_of(name)? },
            url: url.to_owned(),
            filter,
            secrets: vec![secret.reveal()],
            overlap_until: None,
            status: EndpointStatus::Active,
            created_at: now,
            updated_at: now,
        };
        let endpoint = self.handle_of(number)?.add_endpoint(endpoint).await?;
        tracing::info!(number = %number, endpoint = endpoint.ordinal, "webhook created");
        let id = EndpointId { number, ordinal: endpoint.ordinal };
        Ok(WebhookCard { id, tenant: record.tenant, endpoint, last_attempt: None, backlog: None })
    }

    /// A number's endpoints, oldest first.
    ///
    /// # Errors
    /// See the contract.
    pub async fn webhooks(&self, caller: Caller, named: &str) -> Result<Vec<WebhookCard>, ApiError> {
        let record = self.number_meant(caller, named)?;
        let store = self.store_of(record.id)?;
        let mut cards = Vec::new();
        for endpoint in store.endpoints().await? {
            cards.push(self.webhook_card(record.id, record.tenant, endpoint, &store).await?);
        }
        Ok(cards)
    }

    /// One endpoint.
    ///
    /// # Errors
    /// See the contract.
    pub async fn webhook(&self, caller: Caller, id: &str) -> Result<WebhookCard, ApiError> {
        let (id, tenant, store) = self.webhook_meant(caller, id)?;
        let endpoint = store.endpoint(id.ordinal).await?.ok_or(Reason::WebhookNotFound)?;
        self.webhook_card(id.number, tenant, endpoint, &store).await
    }

    /// Changes an endpoint.
    ///
    /// # Errors
    /// See the contract.
    pub async fn update_webhook(&self, caller: Caller, id: &str, patch: WebhookPatch) -> Result<WebhookCard, ApiError> {
        let (id, tenant, store) = self.webhook_meant(caller, id)?;
        if let Some(url) = &patch.url {
            self.host_of(url)?;
        }
        let update = EndpointUpdate {
            name: patch.name.as_deref().map(name_of).transpose()?,
            url: patch.url,
            filter: patch.events.as_deref().map(filter_of).transpose()?,
            active: patch.active,
        };
        let order = EndpointOrder::Update(update);
        let endpoint = self.handle_of(id.number)?.change_endpoint(id.ordinal, order).await?;
        tracing::info!(number = %id.number, endpoint = id.ordinal, active = endpoint.is_active(), "webhook changed");
        self.webhook_card(id.number, tenant, endpoint, &store).await
    }

    /// Gives an endpoint another secret; the present one signs as well for the overlap.
    ///
    /// # Errors
    /// See the contract.
    pub async fn rotate_webhook_secret(
        &self,
        caller: Caller,
        id: &str,
        overlap: Option<Duration>,
    ) -> Result<WebhookCard, ApiError> {
        let (id, tenant, store) = self.webhook_meant(caller, id)?;
        let overlap = overlap.unwrap_or(SECRET_OVERLAP);
        if overlap > SECRET_OVERLAP_MAX {
            let problem = format!("must be at most {} seconds", SECRET_OVERLAP_MAX.as_secs());
            return Err(ApiError::field("overlap", problem));
        }
        let secret = Secret::mint(&self.parts.random.bytes()).reveal();
        let order = EndpointOrder::Rotate { secret, overlap };
        let endpoint = self.handle_of(id.number)?.change_endpoint(id.ordinal, order).await?;
        tracing::info!(number = %id.number, endpoint = id.ordinal, "webhook key rotated");
        self.webhook_card(id.number, tenant, endpoint, &store).await
    }

    /// The last attempts of an endpoint, newest first; of one kind of event, or of all.
    ///
    /// # Errors
    /// See the contract.
    pub async fn webhook_attempts(
        &self,
        caller: Caller,
        id: &str,
        limit: Option<i64>,
        event: &str,
    ) -> Result<Vec<AttemptCard>, ApiError> {
        let (id, _, store) = self.webhook_meant(caller, id)?;
        let limit = limit.map_or(Some(ATTEMPTS_SHOWN_MAX), |limit| usize::try_from(limit).ok());
        let limit = limit.filter(|limit| (1..=ATTEMPTS_SHOWN_MAX).contains(limit));
        let limit = limit.ok_or_else(|| ApiError::field("limit", format!("must be 1 to {ATTEMPTS_SHOWN_MAX}")))?;
        let kind = match event {
            "" => None,
            name => {
                Some(EventKind::of_name(name).ok_or_else(|| ApiError::field("event", "is not the name of an event"))?)
            }
        };
        store.endpoint(id.ordinal).await?.ok_or(Reason::WebhookNotFound)?;
        let handle = self.handle_of(id.number)?;
        let mut cards = Vec::new();
        for record in store.attempts(id.ordinal, None, ATTEMPTS_READ).await? {
            if cards.len() == limit {
                break;
            }
            if kind.is_some() && record.kind != kind {
                continue;
            }
            let event = EventId { number: id.number, seq: record.event };
            let dispatch = Dispatch::again(&record);
            let logged = store.event(record.event).await?;
            let payload = logged.and_then(|event| payload::body(&event, handle.phone(), &dispatch).ok());
            cards.push(AttemptCard { record, event, payload });
        }
        Ok(cards)
    }

    /// The dead letters of an endpoint, those of the newest events first, before an event; and how many there are.
    ///
    /// # Errors
    /// See the contract.
    pub async fn dead_letters(
        &self,
        caller: Caller,
        id: &str,
        limit: i32,
        before: &str,
    ) -> Result<(Vec<(EventId, DeadLetter)>, u64), ApiError> {
        let (id, _, store) = self.webhook_meant(caller, id)?;
        let limit = super::service::page_size(limit, DEAD_LETTERS_SHOWN_MAX)?;
        let before = match before {
            "" => None,
            before => Some(event_of(id, before)?),
        };
        store.endpoint(id.ordinal).await?.ok_or(Reason::WebhookNotFound)?;
        let dead = store.dead_letters(id.ordinal, before, limit).await?;
        let count = store.dead_letter_count(id.ordinal).await?;
        let named = dead.into_iter().map(|dead| (EventId { number: id.number, seq: dead.row.event }, dead));
        Ok((named.collect(), count))
    }

    /// Sends one event again: a dead letter under its own sequence, any other event of the log as a replay.
    ///
    /// # Errors
    /// See the contract.
    pub async fn redeliver(&self, caller: Caller, id: &str, event: &str) -> Result<WebhookCard, ApiError> {
        let (id, tenant, store) = self.webhook_meant(caller, id)?;
        let seq = event_of(id, event)?;
        let order = match store.dead_letter(id.ordinal, seq).await? {
            Some(dead) => EndpointOrder::Revive(dead),
            None => {
                let event = store.event(seq).await?.ok_or(Reason::EventNotFound)?;
                EndpointOrder::Resend { event: seq, chat: event.chat() }
            }
        };
        let endpoint = self.handle_of(id.number)?.change_endpoint(id.ordinal, order).await?;
        self.webhook_card(id.number, tenant, endpoint, &store).await
    }

    /// Sends a part of the event log again, to whoever wants these events now.
    ///
    /// # Errors
    /// See the contract.
    pub async fn replay(&self, caller: Caller, id: &str, range: ReplayRange) -> Result<WebhookCard, ApiError> {
        let (id, tenant, store) = self.webhook_meant(caller, id)?;
        let handle = self.handle_of(id.number)?;
        let last = *handle.watch_events().borrow();
        let mut after = EventSeq(range.from.map_or(0, |from| from.saturating_sub(1)));
        let mut through = EventSeq(range.through.unwrap_or(u64::MAX).min(last.0));
        if let Some(since) = range.since {
            after = after.max(last_before(&store, since, last).await?);
        }
        if let Some(until) = range.until {
            through = through.min(last_before(&store, until, last).await?);
        }
        if after >= through {
            return Err(ApiError::field("range", "holds no event"));
        }
        let order = EndpointOrder::Replay(Replay { after, through });
        let endpoint = handle.change_endpoint(id.ordinal, order).await?;
        tracing::info!(number = %id.number, endpoint = id.ordinal, after = after.0, through = through.0, "webhook replay");
        self.webhook_card(id.number, tenant, endpoint, &store).await
    }

    /// The webhook a caller names: another's answers like one that never existed.
    fn webhook_meant(&self, caller: Caller, id: &str) -> Result<(EndpointId, TenantId, NumberStore), ApiError> {
        if caller == Caller::Operator {
            return Err(Reason::OperatorScopeNotAllowed.into());
        }
        let id: EndpointId = id.parse().map_err(|_| Reason::WebhookNotFound)?;
        let record = self.number_seen(caller, id.number).map_err(|_| Reason::WebhookNotFound)?;
        Ok((id, record.tenant, self.store_of(id.number)?))
    }

    async fn webhook_card(
        &self,
        number: NumberId,
        tenant: TenantId,
        endpoint: Endpoint,
        store: &NumberStore,
    ) -> Result<WebhookCard, ApiError> {
        let id = EndpointId { number, ordinal: endpoint.ordinal };
        let last_attempt = store.attempts(endpoint.ordinal, None, 1).await?.first().map(|record| record.at);
        let backlog = self.handle_of(number)?.backlog(endpoint.ordinal);
        Ok(WebhookCard { id, tenant, endpoint, last_attempt, backlog })
    }

    fn host_of(&self, url: &str) -> Result<String, ApiError> {
        let checked = guard::check_url(url, self.parts.webhook_policy)
            .map_err(|refusal| ApiError::of_field(Reason::WebhookUrlRefused, "url", refusal.to_string()))?;
        Ok(checked.host_str().unwrap_or_default().to_owned())
    }

    /// Removes an endpoint and what waits for it.
    ///
    /// # Errors
    /// See the contract.
    pub async fn delete_webhook(&self, caller: Caller, id: &str) -> Result<(), ApiError> {
        let (id, ..) = self.webhook_meant(caller, id)?;
        self.handle_of(id.number)?.remove_endpoint(id.ordinal).await?;
        tracing::info!(number = %id.number, endpoint = id.ordinal, "webhook deleted");
        Ok(())
    }
}

fn filter_of(events: &[String]) -> Result<EventFilter, ApiError> {
    EventFilter::parse(events.iter().map(String::as_str))
        .map_err(|_| ApiError::field("events", "holds a name that is no event"))
}

fn name_of(name: &str) -> Result<String, ApiError> {
    let name = name.trim();
    if name.is_empty() || name.chars().count() > NAME_CHARS_MAX || name.chars().any(char::is_control) {
        let problem = format!("must have 1 to {NAME_CHARS_MAX} characters, none of them control characters");
        return Err(ApiError::field("name", problem));
    }
    Ok(name.to_owned())
}

/// An event of the webhook's own number.
fn event_of(webhook: EndpointId, event: &str) -> Result<EventSeq, ApiError> {
    let event: EventId = event.parse().map_err(|_| Reason::EventNotFound)?;
    if event.number == webhook.number { Ok(event.seq) } else { Err(Reason::EventNotFound.into()) }
}

/// The last event recorded before a moment, found by halving the log.
async fn last_before(store: &NumberStore, moment: Timestamp, last: EventSeq) -> Result<EventSeq, ApiError> {
    let (mut low, mut high) = (0, last.0);
    while low < high {
        let middle = low + (high - low) / 2;
        // The log may begin later, and have holes at its beginning.
        match store.events(EventSeq(middle), 1).await?.first() {
            Some(event) if event.at < moment => low = event.id.seq.0,
            _ => high = middle,
        }
    }
    Ok(EventSeq(low))
}
