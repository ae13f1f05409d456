//! A customer's platform: the generated gRPC client with a key.

use std::net::SocketAddr;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::api::grpc::proto;
use crate::api::grpc::proto::capacity_service_client::CapacityServiceClient;
use crate::api::grpc::proto::event_service_client::EventServiceClient;
use crate::api::grpc::proto::message_service_client::MessageServiceClient;
use crate::api::grpc::proto::number_service_client::NumberServiceClient;
use crate::api::grpc::proto::operator_service_client::OperatorServiceClient;
use crate::api::grpc::proto::tenant_service_client::TenantServiceClient;
use crate::api::grpc::proto::webhook_service_client::WebhookServiceClient;

/// Puts the key on every call.
#[derive(Debug, Clone)]
pub struct WithKey(MetadataValue<Ascii>);

impl Interceptor for WithKey {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("x-api-key", self.0.clone());
        Ok(request)
    }
}

type Keyed = InterceptedService<Channel, WithKey>;

/// One caller: a connection and a key.
#[derive(Debug, Clone)]
pub struct Caller {
    channel: Channel,
    key: WithKey,
}

/// A number as its owner holds it after making it.
#[derive(Debug, Clone)]
pub struct OwnedNumber {
    /// Its id.
    pub id: String,
    /// Its phone number, digits only.
    pub phone: String,
    /// Acts as this number.
    pub caller: Caller,
    /// Its key.
    pub key: String,
}

impl Caller {
    /// Connects to a daemon with a key.
    ///
    /// # Errors
    /// When the daemon does not answer or the key is no header value.
    pub async fn connect(daemon: SocketAddr, key: &str) -> Result<Self, Status> {
        let wrong = |error: &dyn std::fmt::Display| Status::internal(error.to_string());
        let endpoint = Endpoint::from_shared(format!("http://{daemon}")).map_err(|error| wrong(&error))?;
        let channel =
            endpoint.connect_timeout(Duration::from_secs(5)).connect().await.map_err(|error| wrong(&error))?;
        let key = MetadataValue::try_from(key).map_err(|error| wrong(&error))?;
        Ok(Self { channel, key: WithKey(key) })
    }

    /// The same connection with another key.
    ///
    /// # Errors
    /// When the key is no header value.
    pub fn with_key(&self, key: &str) -> Result<Self, Status> {
        let key = MetadataValue::try_from(key).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Self { channel: self.channel.clone(), key: WithKey(key) })
    }

    /// Tenants.
    #[must_use]
    pub fn tenants(&self) -> TenantServiceClient<Keyed> {
        TenantServiceClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    /// What only the operator may.
    #[must_use]
    pub fn operator(&self) -> OperatorServiceClient<Keyed> {
        OperatorServiceClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    /// Numbers.
    #[must_use]
    pub fn numbers(&self) -> NumberServiceClient<Keyed> {
        NumberServiceClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    /// Messages.
    #[must_use]
    pub fn messages(&self) -> MessageServiceClient<Keyed> {
        MessageServiceClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    /// Events.
    #[must_use]
    pub fn events(&self) -> EventServiceClient<Keyed> {
        EventServiceClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    /// Capacities.
    #[must_use]
    pub fn capacity(&self) -> CapacityServiceClient<Keyed> {
        CapacityServiceClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    /// Webhooks.
    #[must_use]
    pub fn webhooks(&self) -> WebhookServiceClient<Keyed> {
        WebhookServiceClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    /// Makes a tenant and gives the caller that manages it, with its key.
    ///
    /// # Errors
    /// What the daemon says.
    pub async fn create_tenant(&self, name: &str) -> Result<(Self, String), Status> {
        let request = proto::CreateTenantRequest { display_name: name.to_owned() };
        let made = self.tenants().create_tenant(request).await?.into_inner();
        Ok((self.with_key(&made.api_key)?, made.api_key))
    }

    /// Makes a linked number.
    ///
    /// # Errors
    /// What the daemon says.
    pub async fn create_number(&self, name: &str, phone: &str) -> Result<OwnedNumber, Status> {
        let request = proto::CreateNumberRequest {
            display_name: name.to_owned(),
            phone_number: format!("+{phone}"),
            kind: proto::NumberKind::Linked.into(),
            ..proto::CreateNumberRequest::default()
        };
        let made = self.numbers().create_number(request).await?.into_inner();
        let number = made.number.ok_or_else(|| Status::internal("no number in the answer"))?;
        let caller = self.with_key(&made.api_key)?;
        Ok(OwnedNumber { id: number.id, phone: phone.to_owned(), caller, key: made.api_key })
    }

    /// Sends a text as the number whose key this is.
    ///
    /// # Errors
    /// What the daemon says.
    pub async fn send_text(&self, to: &str, text: &str, request_id: &str) -> Result<proto::Message, Status> {
        let request = proto::SendMessageRequest {
            to: format!("+{to}"),
            content: Some(proto::send_message_request::Content::Text(text.to_owned())),
            request_id: request_id.to_owned(),
            ..proto::SendMessageRequest::default()
        };
        let answer = self.messages().send_message(request).await?.into_inner();
        answer.message.ok_or_else(|| Status::internal("no message in the answer"))
    }
}
