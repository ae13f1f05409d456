//! `switchboard.v1.WebhookService`.

use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto as pb;
use super::server::Service;

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
            let card = self.api.create_webhook(caller, &asked.number, &asked.url, &asked.events).await?;
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
}
