//! `switchboard.v1.NumberService`.

use futures_util::stream::{self, BoxStream, StreamExt as _};
use tonic::{Request, Response, Status, async_trait};

use super::proto as pb;
use super::server::Service;
use super::status::status_of;
use super::{convert, limits};
use crate::api::numbers::NewNumber;
use crate::api::pairing::PairingWatch;
use crate::number::handle::Erased;
use crate::number::message::Control;
use crate::telemetry::metrics::OpenStream;

#[async_trait]
impl pb::number_service_server::NumberService for Service {
    type PairNumberStream = BoxStream<'static, Result<pb::PairNumberResponse, Status>>;

    async fn create_number(
        &self,
        request: Request<pb::CreateNumberRequest>,
    ) -> Result<Response<pb::CreateNumberResponse>, Status> {
        let call = self.begin("CreateNumber");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let kind = convert::kind_of(asked.kind)?;
            let retention = convert::retention_of(asked.retention.as_ref())?;
            let (name, phone) = (asked.display_name.as_str(), asked.phone_number.as_str());
            let order = NewNumber { name, phone, kind, retention, proxy: &asked.proxy };
            let (card, api_key) = self.api.create_number(caller, order).await?;
            Ok(pb::CreateNumberResponse { number: Some(convert::number(card)), api_key })
        };
        call.answer(outcome.await)
    }

    async fn get_number(&self, request: Request<pb::GetNumberRequest>) -> Result<Response<pb::Number>, Status> {
        let call = self.begin("GetNumber");
        let caller = self.caller(&request);
        let outcome = caller.and_then(|caller| self.api.number(caller, &request.get_ref().number));
        call.answer(outcome.map(convert::number))
    }

    async fn list_numbers(
        &self,
        request: Request<pb::ListNumbersRequest>,
    ) -> Result<Response<pb::ListNumbersResponse>, Status> {
        let call = self.begin("ListNumbers");
        let caller = self.caller(&request);
        let asked = request.get_ref();
        let page = caller.and_then(|caller| self.api.numbers(caller, asked.page_size, &asked.page_token));
        call.answer(page.map(|page| pb::ListNumbersResponse {
            numbers: page.entries.into_iter().map(convert::number).collect(),
            next_page_token: page.next,
        }))
    }

    async fn update_number(&self, request: Request<pb::UpdateNumberRequest>) -> Result<Response<pb::Number>, Status> {
        let call = self.begin("UpdateNumber");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let number = asked.number.clone().unwrap_or_default();
            let change = convert::number_change(&number, asked.update_mask.as_ref())?;
            self.api.update_number(caller, &number.id, change).await.map(convert::number)
        };
        call.answer(outcome.await)
    }

    async fn erase_contact(
        &self,
        request: Request<pb::EraseContactRequest>,
    ) -> Result<Response<pb::EraseContactResponse>, Status> {
        let call = self.begin("EraseContact");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let state = match self.api.erase_contact(caller, &asked.number, &asked.phone_number).await? {
                Erased::Entirely => pb::ErasureState::Erased,
                Erased::UnderWay => pb::ErasureState::UnderWay,
            };
            Ok(pb::EraseContactResponse { state: state.into() })
        };
        call.answer(outcome.await)
    }

    async fn delete_number(&self, request: Request<pb::DeleteNumberRequest>) -> Result<Response<()>, Status> {
        let call = self.begin("DeleteNumber");
        let outcome = async {
            let caller = self.caller(&request)?;
            self.api.delete_number(caller, &request.get_ref().number).await
        };
        call.answer(outcome.await)
    }

    async fn pair_number(
        &self,
        request: Request<pb::PairNumberRequest>,
    ) -> Result<Response<Self::PairNumberStream>, Status> {
        let call = self.begin("PairNumber");
        let outcome = async {
            let caller = self.caller(&request)?;
            let by = convert::link_by(request.get_ref().method)?;
            let watch = self.api.pair_number(caller, &request.get_ref().number, by).await?;
            Ok(pairing_stream(watch))
        };
        call.answer(outcome.await)
    }

    async fn answer_passkey(
        &self,
        request: Request<pb::AnswerPasskeyRequest>,
    ) -> Result<Response<pb::AnswerPasskeyResponse>, Status> {
        let call = self.begin("AnswerPasskey");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            self.api.answer_passkey(caller, &asked.number, &asked.assertion_json).await?;
            Ok(pb::AnswerPasskeyResponse {})
        };
        call.answer(outcome.await)
    }

    async fn confirm_passkey(
        &self,
        request: Request<pb::ConfirmPasskeyRequest>,
    ) -> Result<Response<pb::ConfirmPasskeyResponse>, Status> {
        let call = self.begin("ConfirmPasskey");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            self.api.confirm_passkey(caller, &asked.number, &asked.code).await?;
            Ok(pb::ConfirmPasskeyResponse {})
        };
        call.answer(outcome.await)
    }

    async fn start_number(&self, request: Request<pb::StartNumberRequest>) -> Result<Response<pb::Number>, Status> {
        let number = request.get_ref().number.clone();
        self.control("StartNumber", &request, &number, Control::Start).await
    }

    async fn stop_number(&self, request: Request<pb::StopNumberRequest>) -> Result<Response<pb::Number>, Status> {
        let number = request.get_ref().number.clone();
        self.control("StopNumber", &request, &number, Control::Stop).await
    }

    async fn logout_number(&self, request: Request<pb::LogoutNumberRequest>) -> Result<Response<pb::Number>, Status> {
        let call = self.begin("LogoutNumber");
        let outcome = async {
            let caller = self.caller(&request)?;
            self.api.logout_number(caller, &request.get_ref().number).await.map(convert::number)
        };
        call.answer(outcome.await)
    }

    async fn restart_number(&self, request: Request<pb::RestartNumberRequest>) -> Result<Response<pb::Number>, Status> {
        let call = self.begin("RestartNumber");
        let outcome = async {
            let caller = self.caller(&request)?;
            self.api.restart_number(caller, &request.get_ref().number).await.map(convert::number)
        };
        call.answer(outcome.await)
    }

    async fn set_limits(&self, request: Request<pb::SetLimitsRequest>) -> Result<Response<pb::Number>, Status> {
        let call = self.begin("SetLimits");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let limits = limits::own_limits_of(asked.limits.as_ref())?;
            self.api.set_limits(caller, &asked.number, limits).await.map(convert::number)
        };
        call.answer(outcome.await)
    }

    async fn pause_sending(&self, request: Request<pb::PauseSendingRequest>) -> Result<Response<pb::Number>, Status> {
        let call = self.begin("PauseSending");
        let outcome = async {
            let caller = self.caller(&request)?;
            let asked = request.get_ref();
            let until = convert::moment("until", asked.until.as_ref())?;
            self.api.pause_sending(caller, &asked.number, until).await.map(convert::number)
        };
        call.answer(outcome.await)
    }

    async fn resume_sending(&self, request: Request<pb::ResumeSendingRequest>) -> Result<Response<pb::Number>, Status> {
        let call = self.begin("ResumeSending");
        let outcome = async {
            let caller = self.caller(&request)?;
            self.api.resume_sending(caller, &request.get_ref().number).await.map(convert::number)
        };
        call.answer(outcome.await)
    }

    async fn reset_number(&self, request: Request<pb::ResetNumberRequest>) -> Result<Response<pb::Number>, Status> {
        let call = self.begin("ResetNumber");
        let outcome = async {
            let caller = self.caller(&request)?;
            self.api.reset_number(caller, &request.get_ref().number).await.map(convert::number)
        };
        call.answer(outcome.await)
    }
}

impl Service {
    async fn control<T: Sync>(
        &self,
        method: &'static str,
        request: &Request<T>,
        number: &str,
        order: Control,
    ) -> Result<Response<pb::Number>, Status> {
        let call = self.begin(method);
        let outcome = async {
            let caller = self.caller(request)?;
            self.api.control_number(caller, number, order).await.map(convert::number)
        };
        call.answer(outcome.await)
    }
}

fn pairing_stream(watch: PairingWatch) -> BoxStream<'static, Result<pb::PairNumberResponse, Status>> {
    let open = OpenStream::begin();
    let steps = stream::unfold(Some((watch, open)), |state| async {
        let (mut watch, open) = state?;
        match watch.next().await {
            Ok(Some(step)) => Some((Ok(convert::pairing_step(step)), Some((watch, open)))),
            Ok(None) => None,
            Err(error) => Some((Err(status_of(&error)), None)),
        }
    });
    steps.boxed()
}
