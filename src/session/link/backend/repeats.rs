//! Requests of devices for messages they could not open, until they confirm them.

use whatsapp_rust::wacore::store::error::StoreError as LibraryError;

use super::{LibraryResult, LinkBackend, encode, put};
use crate::session::link::repeats::{ASKED_MAX, Asked};
use crate::store::key::Tag;
use crate::store::number_store::Order;
use crate::store::unit::{Durability, Op};

impl LinkBackend {
    fn asked_key(&self, device: &str, id: &str) -> Vec<u8> {
        self.names("asked", &[device, id]).to_vec()
    }

    /// Notes a request, durably.
    pub(in crate::session::link) async fn note_asked(&self, asked: &Asked) -> LibraryResult<()> {
        let row = put(Tag::AskedAgain, self.asked_key(&asked.device, &asked.whatsapp_id), encode(asked)?);
        self.commit_rows(vec![row], Durability::Durable).await
    }

    /// Requests that are not confirmed.
    pub(in crate::session::link) async fn asked(&self) -> LibraryResult<Vec<Asked>> {
        let rows = self.scan(Tag::AskedAgain, &[], None, Order::Ascending, ASKED_MAX).await?;
        rows.iter().map(|(_, value)| self.decode(value)).collect()
    }

    /// The device has the message. A row that survives its removal costs one more answer.
    pub(in crate::session::link) async fn forget_asked(&self, device: &str, id: &str) -> Result<(), LibraryError> {
        let rest = self.asked_key(device, id);
        self.commit_rows(vec![Op::Delete { tag: Tag::AskedAgain, rest }], Durability::RidesAlong).await
    }
}
