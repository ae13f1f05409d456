//! A data directory of a test's own, with numbers in it, removed at the end.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::domain::id::{NumberId, TenantId};
use crate::domain::orders::SendingOrders;
use crate::domain::phone::Phone;
use crate::domain::retention::Retention;
use crate::domain::time::Timestamp;
use crate::store::error::OpenError;
use crate::store::layout::{Store, StoreSettings};
use crate::store::meta::{NumberKind, NumberRecord};
use crate::store::number_store::NumberStore;
use crate::telemetry::rng::Random;

pub(super) struct Home {
    pub(super) dir: PathBuf,
    pub(super) settings: StoreSettings,
}

impl Home {
    pub(super) fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("switchboard-store-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let settings = StoreSettings::at(&dir, Arc::new(Random::seeded(7)));
        Self { dir, settings }
    }

    pub(super) fn open(&self) -> Store {
        self.try_open().unwrap()
    }

    pub(super) fn try_open(&self) -> Result<Store, OpenError> {
        unlocked(|| Store::open(&self.settings))
    }
}

/// A process that another test starts at this moment holds copies of all locks until it is another program.
pub(super) fn unlocked<T>(mut open: impl FnMut() -> Result<T, OpenError>) -> Result<T, OpenError> {
    let by = Instant::now() + Duration::from_secs(20);
    loop {
        match open() {
            Err(OpenError::InUse(_)) if Instant::now() < by => std::thread::sleep(Duration::from_millis(5)),
            opened => return opened,
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

pub(super) fn record(id: u64) -> NumberRecord {
    NumberRecord {
        id: NumberId(id),
        tenant: TenantId(1),
        name: format!("planted name {id}"),
        phone: Phone::parse(&format!("1555{id:07}")).unwrap(),
        kind: NumberKind::Linked,
        volume: 0,
        created_at: Timestamp(1),
        retention: Retention::default(),
        proxy: None,
        orders: SendingOrders::default(),
    }
}

/// The number, made if it is not there yet, claimed.
pub(super) async fn claim(store: &Store, id: u64) -> NumberStore {
    if store.meta().number(NumberId(id)).is_none() {
        store.meta().create_number(record(id), Vec::new()).await.unwrap();
    }
    store.claim(NumberId(id), 0).await.unwrap()
}

/// Whether a file below the directory, the key files aside, holds these bytes.
pub(super) fn on_disk(dir: &std::path::Path, needle: &[u8]) -> Option<PathBuf> {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if path.ends_with("keys") {
                continue;
            }
            if let Some(found) = on_disk(&path, needle) {
                return Some(found);
            }
        } else if std::fs::read(&path).unwrap().windows(needle.len()).any(|window| window == needle) {
            return Some(path);
        }
    }
    None
}
