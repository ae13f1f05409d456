//! `switchboard.v1.TenantService`.

use tonic::{Request, Response, Status, async_trait};

use super::convert;
use super::proto as pb;
use super::server::Service;

#[async_trait]
impl pb::tenant_service_server::TenantService for Service {
    async fn create_tenant(
        &self,
        request: Request<pb::CreateTenantRequest>,
    ) -> Result<Response<pb::CreateTenantResponse>, Status> {
        let call = self.begin("CreateTenant");
        let outcome = async {
            let caller = self.caller(&request)?;
            let (record, api_key) = self.api.create_tenant(caller, &request.get_ref().display_name).await?;
            Ok(pb::CreateTenantResponse { tenant: Some(convert::tenant(record)), api_key })
        };
        call.answer(outcome.await)
    }

    async fn get_tenant(&self, request: Request<pb::GetTenantRequest>) -> Result<Response<pb::Tenant>, Status> {
        let call = self.begin("GetTenant");
        let caller = self.caller(&request);
        let outcome = caller.and_then(|caller| self.api.tenant(caller, &request.get_ref().id));
        call.answer(outcome.map(convert::tenant))
    }

    async fn list_tenants(
        &self,
        request: Request<pb::ListTenantsRequest>,
    ) -> Result<Response<pb::ListTenantsResponse>, Status> {
        let call = self.begin("ListTenants");
        let caller = self.caller(&request);
        let asked = request.get_ref();
        let page = caller.and_then(|caller| self.api.tenants(caller, asked.page_size, &asked.page_token));
        call.answer(page.map(|page| pb::ListTenantsResponse {
            tenants: page.entries.into_iter().map(convert::tenant).collect(),
            next_page_token: page.next,
        }))
    }
}
