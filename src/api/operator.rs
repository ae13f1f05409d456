//! What only the operator of the daemon may see and change.

use super::error::ApiError;
use super::service::{Api, operator_only};
use crate::domain::access::Caller;
use crate::domain::version::{ClientVersion, NotAVersion};
use crate::session::link::VersionCard;

impl Api {
    /// The version of WhatsApp Web that is in force.
    ///
    /// # Errors
    /// See the contract.
    pub fn client_version(&self, caller: Caller) -> Result<VersionCard, ApiError> {
        operator_only(caller)?;
        Ok(self.parts.versions.card())
    }

    /// Says which version of WhatsApp Web it is; empty takes that back.
    ///
    /// # Errors
    /// See the contract.
    pub async fn set_client_version(&self, caller: Caller, text: &str) -> Result<VersionCard, ApiError> {
        operator_only(caller)?;
        let wrong = |error: NotAVersion| ApiError::field("version", error.to_string());
        let version: Option<ClientVersion> = if text.is_empty() { None } else { Some(text.parse().map_err(wrong)?) };
        let versions = self.parts.versions.clone();
        self.to_the_end(async move { Ok(versions.order(version).await?) }).await
    }
}
