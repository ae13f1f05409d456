//! Webhook endpoints of a number.

use super::error::{ApiError, Reason};
use super::service::Api;
use crate::domain::access::Caller;
use crate::domain::endpoint::{Endpoint, EndpointStatus};
use crate::domain::event::EventFilter;
use crate::domain::id::EndpointId;
use crate::webhook::guard;
use crate::webhook::signature::Secret;

/// An endpoint as its owner sees it.
#[derive(Debug)]
pub struct WebhookCard {
    /// Its id.
    pub id: EndpointId,
    /// What was recorded of it.
    pub endpoint: Endpoint,
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
        url: &str,
        events: &[String],
    ) -> Result<WebhookCard, ApiError> {
        let number = self.number_meant(caller, named)?.id;
        let filter = EventFilter::parse(events.iter().map(String::as_str))
            .map_err(|_| ApiError::field("events", "holds a name that is no event"))?;
        let checked = guard::check_url(url, self.parts.webhook_policy)
            .map_err(|refusal| ApiError::of_field(Reason::WebhookUrlRefused, "url", refusal.to_string()))?;
        let secret = Secret::mint(&self.parts.random.bytes());
        let now = self.parts.clock.now();
        let endpoint = Endpoint {
            // The number chooses it.
            ordinal: 0,
            name: checked.host_str().unwrap_or_default().to_owned(),
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
        Ok(WebhookCard { id: EndpointId { number, ordinal: endpoint.ordinal }, endpoint })
    }

    /// A number's endpoints, oldest first.
    ///
    /// # Errors
    /// See the contract.
    pub async fn webhooks(&self, caller: Caller, named: &str) -> Result<Vec<WebhookCard>, ApiError> {
        let number = self.number_meant(caller, named)?.id;
        let endpoints = self.store_of(number)?.endpoints().await?;
        let card = |endpoint: Endpoint| WebhookCard { id: EndpointId { number, ordinal: endpoint.ordinal }, endpoint };
        Ok(endpoints.into_iter().map(card).collect())
    }

    /// Removes an endpoint and what waits for it.
    ///
    /// # Errors
    /// See the contract.
    pub async fn delete_webhook(&self, caller: Caller, id: &str) -> Result<(), ApiError> {
        if caller == Caller::Operator {
            return Err(Reason::OperatorScopeNotAllowed.into());
        }
        let id: EndpointId = id.parse().map_err(|_| Reason::WebhookNotFound)?;
        self.number_seen(caller, id.number).map_err(|_| Reason::WebhookNotFound)?;
        self.handle_of(id.number)?.remove_endpoint(id.ordinal).await?;
        tracing::info!(number = %id.number, endpoint = id.ordinal, "webhook deleted");
        Ok(())
    }
}
