//! `switchboard.v1.MessageService`.

use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto as pb;
use super::server::Service;
use crate::api::messages::SendOrder;

#[async_trait]
impl pb::message_service_server::MessageService for Service {
    async fn send_message(
        &self,
        request: Request<pb::SendMessageRequest>,
    ) -> Result<Response<pb::SendMessageResponse>, Status> {
        let call = self.begin("SendMessage");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let text = asked.content.as_ref().map(|content| match content {
                pb::send_message_request::Content::Text(text) => text.as_str(),
            });
            let order = SendOrder {
                number: &asked.number,
                to: &asked.to,
                text,
                request_id: &asked.request_id,
                correlation_id: &asked.correlation_id,
                send_time: convert::moment("send_time", asked.send_time.as_ref())?,
                expire_time: convert::moment("expire_time", asked.expire_time.as_ref())?,
                max_wait: convert::interval("max_wait", asked.max_wait.as_ref())?,
            };
            let sent = self.api.send_message(caller, order).await?;
            Ok(pb::SendMessageResponse {
                message: Some(convert::message(sent.message)),
                predicted_wait: sent.predicted_wait.and_then(|wait| prost_types::Duration::try_from(wait).ok()),
            })
        };
        call.answer(outcome.await)
    }

    async fn cancel_messages(
        &self,
        request: Request<pb::CancelMessagesRequest>,
    ) -> Result<Response<pb::CancelMessagesResponse>, Status> {
        let call = self.begin("CancelMessages");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let outcomes = self.api.cancel_messages(caller, &asked.number, &asked.ids).await?;
            let results = outcomes.into_iter().map(|(id, outcome)| convert::cancel_result(id, outcome)).collect();
            Ok(pb::CancelMessagesResponse { results })
        };
        call.answer(outcome.await)
    }

    async fn get_message(&self, request: Request<pb::GetMessageRequest>) -> Result<Response<pb::Message>, Status> {
        let call = self.begin("GetMessage");
        let outcome = async {
            let caller = self.caller(&request)?;
            self.api.message(caller, &request.get_ref().id).await.map(convert::message)
        };
        call.answer(outcome.await)
    }

    async fn list_messages(
        &self,
        request: Request<pb::ListMessagesRequest>,
    ) -> Result<Response<pb::ListMessagesResponse>, Status> {
        let call = self.begin("ListMessages");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let (peer, token) = (&asked.peer_phone_number, &asked.page_token);
            let page = self.api.messages(caller, &asked.number, peer, asked.page_size, token).await?;
            Ok(pb::ListMessagesResponse {
                messages: page.entries.into_iter().map(convert::message).collect(),
                next_page_token: page.next,
            })
        };
        call.answer(outcome.await)
    }
}
