//! The device row: our identity, keys and login facts as one value, durable at every save. Also what the
//! rest of the daemon may ask of it without knowing the library: is it linked, put one in, take everything out.

use async_trait::async_trait;
use whatsapp_rust::wacore::store::Device;
use whatsapp_rust::wacore::store::traits::DeviceStore;

use super::{LibraryResult, LinkBackend, codec, put};
use crate::domain::phone::Phone;
use crate::store::error::StoreError;
use crate::store::key::Tag;
use crate::store::number_store::{NumberStore, Order, SCAN_ROWS_MAX};
use crate::store::unit::{Durability, Unit};
use crate::telemetry::failpoint::{self, Failpoint};

/// The library numbers devices of one store; a store here has exactly one.
const ONLY_DEVICE: i32 = 1;
/// Everything that belongs to a link and is worthless after it. The device itself goes first, so that a crash
/// in between leaves a number that is not linked.
const LINK_FAMILIES: [Tag; 12] = [
    Tag::Device,
    Tag::PreKey,
    Tag::SignedPreKey,
    Tag::Session,
    Tag::SenderKey,
    Tag::Identity,
    Tag::AppState,
    Tag::ProtocolCache,
    Tag::SentMessage,
    Tag::PendingInbound,
    Tag::AskedAgain,
    Tag::MessageSecret,
];

#[async_trait]
impl DeviceStore for LinkBackend {
    async fn save(&self, device: &Device) -> LibraryResult<()> {
        let value = super::encode(device)?;
        failpoint::reach(Failpoint::DeviceBeforeDurable);
        self.commit_rows(vec![put(Tag::Device, Vec::new(), value)], Durability::Durable).await?;
        failpoint::reach(Failpoint::DeviceAfterDurable);
        Ok(())
    }

    async fn load(&self) -> LibraryResult<Option<Device>> {
        let stored = self.get(Tag::Device, &[]).await?;
        stored.map(|bytes| self.decode(&bytes)).transpose()
    }

    async fn exists(&self) -> LibraryResult<bool> {
        Ok(self.get(Tag::Device, &[]).await?.is_some())
    }

    async fn create(&self) -> LibraryResult<i32> {
        Ok(ONLY_DEVICE)
    }
}

/// A device row that cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// The text is not a device row of this version.
    #[error("not a device row")]
    NotADevice,
    /// The row belongs to no account: it was never linked.
    #[error("the device row is not linked to an account")]
    NotLinked,
    /// The number already has a linked device; forget it first.
    #[error("the number is already linked")]
    AlreadyLinked,
    /// Writing it failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn phone_of(device: &Device) -> Option<Phone> {
    Phone::parse(&device.pn.as_ref()?.user).ok()
}

/// Whether the store holds the credentials of a linked device. An unreadable row counts as none.
pub async fn is_linked(store: &NumberStore) -> bool {
    let Ok(Some(bytes)) = store.get(Tag::Device, &[]).await else {
        return false;
    };
    codec::decode::<Device>(&bytes).is_some_and(|device| device.is_registered())
}

/// Takes over a ready device row (made by a sandbox, or moved here with its owner's consent while no other
/// session of it exists). Leftovers of an earlier link are removed; the row is durable when this returns.
///
/// # Errors
/// See [`ProvisionError`].
pub async fn provision(store: &NumberStore, device_json: &str) -> Result<Phone, ProvisionError> {
    let device: Device = serde_json::from_str(device_json).map_err(|_| ProvisionError::NotADevice)?;
    let phone = phone_of(&device).ok_or(ProvisionError::NotLinked)?;
    let row = codec::encode(&device).map_err(|_| ProvisionError::NotADevice)?;
    if is_linked(store).await {
        return Err(ProvisionError::AlreadyLinked);
    }
    forget_device(store).await?;
    let mut unit = Unit::durable();
    unit.put(Tag::Device, Vec::new(), row);
    store.commit(unit).await?;
    Ok(phone)
}

/// Deletes credentials and Signal state. History, outbox and events stay. Only for a store without a session:
/// a running client would write some of it back.
///
/// # Errors
/// When a read or a write fails.
pub async fn forget_device(store: &NumberStore) -> Result<(), StoreError> {
    for tag in LINK_FAMILIES {
        loop {
            let rows = store.scan(tag, &[], None, Order::Ascending, SCAN_ROWS_MAX).await?;
            if rows.is_empty() {
                break;
            }
            let mut unit = Unit::rides_along();
            for (rest, _) in rows {
                unit.delete(tag, rest);
            }
            store.commit(unit).await?;
        }
    }
    store.commit(Unit::durable()).await
}
