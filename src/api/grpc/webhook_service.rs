//! `switchboard.v1.WebhookService`.

use std::time::Duration;

use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto as pb;
use super::server::Service;
use crate::api::error::ApiError;
use crate::api::webhooks::{ReplayRange, WebhookPatch};

#[async_trait]
impl pb::webhook_service_server::WebhookService for Service {
    async fn create_webhook(
        &self,
        request: Request<pb::CreateWebhookRequest>,
    ) -> Result<Response<pb::CreateWebhookResponse>, Status> {
        let call = self.begin("CreateWebhook");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let card = self.api.create_webhook(caller, &asked.number, &asked.name, &asked.url, &asked.events).await?;
            let secret = card.endpoint.secrets.first().cloned().unwrap_or_default();
            Ok(pb::CreateWebhookResponse { webhook: Some(convert::webhook(card)), secret })
        };
        call.answer(outcome.await)
    }

    async fn list_webhooks(
        &self,
        request: Request<pb::ListWebhooksRequest>,
    ) -> Result<Response<pb::ListWebhooksResponse>, Status> {
        let call = self.begin("ListWebhooks");
        let outcome = async {
            let caller = self.caller(&request)?;
            let cards = self.api.webhooks(caller, &request.get_ref().number).await?;
            Ok(pb::ListWebhooksResponse { webhooks: cards.into_iter().map(convert::webhook).collect() })
        };
        call.answer(outcome.await)
    }

    async fn delete_webhook(&self, request: Request<pb::DeleteWebhookRequest>) -> Result<Response<()>, Status> {
        let call = self.begin("DeleteWebhook");
        let outcome = async {
            let caller = self.caller(&request)?;
            self.api.delete_webhook(caller, &request.get_ref().id).await
        };
        call.answer(outcome.await)
    }

    async fn get_webhook(&self, request: Request<pb::GetWebhookRequest>) -> Result<Response<pb::Webhook>, Status> {
        let call = self.begin("GetWebhook");
        let outcome = async {
            let caller = self.caller(&request)?;
            Ok(convert::webhook(self.api.webhook(caller, &request.get_ref().id).await?))
        };
        call.answer(outcome.await)
    }

    async fn update_webhook(
        &self,
        request: Request<pb::UpdateWebhookRequest>,
    ) -> Result<Response<pb::Webhook>, Status> {
        let call = self.begin("UpdateWebhook");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.into_inner();
            let webhook = asked.webhook.unwrap_or_default();
            let patch = patch_of(&webhook, &asked.update_mask.unwrap_or_default().paths)?;
            Ok(convert::webhook(self.api.update_webhook(caller, &webhook.id, patch).await?))
        };
        call.answer(outcome.await)
    }

    async fn rotate_webhook_secret(
        &self,
        request: Request<pb::RotateWebhookSecretRequest>,
    ) -> Result<Response<pb::RotateWebhookSecretResponse>, Status> {
        let call = self.begin("RotateWebhookSecret");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let overlap = asked.overlap.map(Duration::try_from);
            let overlap = overlap.transpose().map_err(|_| ApiError::field("overlap", "must not be negative"))?;
            let card = self.api.rotate_webhook_secret(caller, &asked.id, overlap).await?;
            let secret = card.endpoint.secrets.first().cloned().unwrap_or_default();
            Ok(pb::RotateWebhookSecretResponse { webhook: Some(convert::webhook(card)), secret })
        };
        call.answer(outcome.await)
    }

    async fn list_attempts(
        &self,
        request: Request<pb::ListAttemptsRequest>,
    ) -> Result<Response<pb::ListAttemptsResponse>, Status> {
        let call = self.begin("ListAttempts");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let limit = (asked.limit != 0).then_some(asked.limit.into());
            let cards = self.api.webhook_attempts(caller, &asked.id, limit, &asked.event).await?;
            Ok(pb::ListAttemptsResponse { attempts: cards.into_iter().map(convert::attempt).collect() })
        };
        call.answer(outcome.await)
    }

    async fn list_dead_letters(
        &self,
        request: Request<pb::ListDeadLettersRequest>,
    ) -> Result<Response<pb::ListDeadLettersResponse>, Status> {
        let call = self.begin("ListDeadLetters");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let (dead, count) = self.api.dead_letters(caller, &asked.id, asked.page_size, &asked.before_event).await?;
            let dead_letters = dead.into_iter().map(convert::dead_letter).collect();
            let total_count = i64::try_from(count).unwrap_or(i64::MAX);
            Ok(pb::ListDeadLettersResponse { dead_letters, total_count })
        };
        call.answer(outcome.await)
    }

    async fn redeliver(&self, request: Request<pb::RedeliverRequest>) -> Result<Response<pb::Webhook>, Status> {
        let call = self.begin("Redeliver");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            Ok(convert::webhook(self.api.redeliver(caller, &asked.id, &asked.event).await?))
        };
        call.answer(outcome.await)
    }

    async fn replay(&self, request: Request<pb::ReplayRequest>) -> Result<Response<pb::Webhook>, Status> {
        let call = self.begin("Replay");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let bound = |of: i64| u64::try_from(of).ok().filter(|of| *of > 0);
            let range = ReplayRange {
                from: bound(asked.from_sequence),
                through: bound(asked.through_sequence),
                since: convert::moment("start_time", asked.start_time.as_ref())?,
                until: convert::moment("end_time", asked.end_time.as_ref())?,
            };
            Ok(convert::webhook(self.api.replay(caller, &asked.id, range).await?))
        };
        call.answer(outcome.await)
    }
}

fn patch_of(webhook: &pb::Webhook, mask: &[String]) -> Result<WebhookPatch, ApiError> {
    let mut patch = WebhookPatch::default();
    for path in mask {
        match path.as_str() {
            "name" => patch.name = Some(webhook.name.clone()),
            "url" => patch.url = Some(webhook.url.clone()),
            "events" => patch.events = Some(webhook.events.clone()),
            "active" => patch.active = Some(webhook.active),
            _ => return Err(ApiError::field("update_mask", "may name name, url, events and active")),
        }
    }
    if mask.is_empty() {
        return Err(ApiError::field("update_mask", "must name what changes"));
    }
    Ok(patch)
}
