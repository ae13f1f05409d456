//! `switchboard.v1.OperatorService`.

use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto as pb;
use super::server::Service;

#[async_trait]
impl pb::operator_service_server::OperatorService for Service {
    async fn get_client_version(
        &self,
        request: Request<pb::GetClientVersionRequest>,
    ) -> Result<Response<pb::ClientVersion>, Status> {
        let call = self.begin("GetClientVersion");
        let outcome = self.caller(&request).and_then(|caller| self.api.client_version(caller));
        call.answer(outcome.map(convert::client_version))
    }

    async fn set_client_version(
        &self,
        request: Request<pb::SetClientVersionRequest>,
    ) -> Result<Response<pb::ClientVersion>, Status> {
        let call = self.begin("SetClientVersion");
        let outcome = async {
            let caller = self.caller(&request)?;
            self.api.set_client_version(caller, &request.get_ref().version).await
        };
        call.answer(outcome.await.map(convert::client_version))
    }
}
