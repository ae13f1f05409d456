//! What all use cases share: the parts they work on, who calls, and which number is meant. Authorisation comes first:
//! before validation, and before anybody learns whether something exists.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use super::capacity::WATCHERS_MAX;
use super::drain::Drain;
use super::error::{ApiError, Reason};
use crate::domain::access::{Caller, PresentedKey, StoredKey};
use crate::domain::id::{NumberId, TenantId};
use crate::number::handle::NumberHandle;
use crate::session::link::ClientVersions;
use crate::store::layout::Store;
use crate::store::meta::{KeySubject, NumberRecord};
use crate::store::number_store::NumberStore;
use crate::supervisor::fleet::Fleet;
use crate::telemetry::clock::Clock;
use crate::telemetry::load::LoadMeter;
use crate::telemetry::rng::Random;
use crate::webhook::guard::Policy;

/// Entries of a page when the caller does not say.
const PAGE_SIZE_DEFAULT: usize = 50;
/// Longest name people may give.
const NAME_CHARS_MAX: usize = 100;

/// What the use cases work on.
#[derive(Debug)]
pub struct Parts {
    /// The disk.
    pub store: Arc<Store>,
    /// The numbers.
    pub fleet: Fleet,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Randomness for keys and ids.
    pub random: Arc<Random>,
    /// The version of WhatsApp Web.
    pub versions: Arc<ClientVersions>,
    /// Which webhook targets are allowed.
    pub webhook_policy: Policy,
    /// Which proxies are allowed.
    pub proxy_policy: Policy,
    /// The end of the daemon.
    pub drain: Drain,
    /// How long a stream waits for a client that does not read.
    pub stream_patience: Duration,
    /// How busy the process is.
    pub load: LoadMeter,
}

/// The use cases.
#[derive(Debug)]
pub struct Api {
    pub(super) parts: Parts,
    /// What must not stop half-way when its caller hangs up.
    ongoing: Mutex<JoinSet<()>>,
    /// Places for streams that follow capacities.
    pub(super) capacity_watchers: Arc<Semaphore>,
    /// Tells this life of the daemon from others.
    pub(super) life: u64,
}

impl Api {
    /// The use cases over these parts.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        let (capacity_watchers, life) = (Arc::new(Semaphore::new(WATCHERS_MAX)), parts.random.word());
        Arc::new(Self { parts, ongoing: Mutex::new(JoinSet::new()), capacity_watchers, life })
    }

    /// The time.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.parts.clock
    }

    /// The numbers.
    #[must_use]
    pub fn fleet(&self) -> &Fleet {
        &self.parts.fleet
    }

    /// How busy the process is.
    #[must_use]
    pub fn load(&self) -> &LoadMeter {
        &self.parts.load
    }

    /// The end of the daemon.
    #[must_use]
    pub fn drain(&self) -> Drain {
        self.parts.drain.clone()
    }

    /// The public part of the key in `x-api-key`, by which it is looked up again.
    #[must_use]
    pub fn key_id(&self, key: Option<&str>) -> String {
        key.and_then(|text| PresentedKey::parse(text).ok()).map(|key| key.id().to_owned()).unwrap_or_default()
    }

    /// How long a stream waits for a client that does not read.
    #[must_use]
    pub fn stream_patience(&self) -> Duration {
        self.parts.stream_patience
    }

    /// Who calls, by the text of `x-api-key`.
    ///
    /// # Errors
    /// `Unauthorized`, the same for a missing, unknown, mistyped, expired and revoked key.
    pub fn authenticate(&self, key: Option<&str>) -> Result<Caller, ApiError> {
        let presented = key.and_then(|text| PresentedKey::parse(text).ok()).ok_or(Reason::Unauthorized)?;
        let meta = self.parts.store.meta();
        let record = meta.key(presented.id());
        let stored =
            record.as_ref().map(|record| StoredKey { secret_hash: &record.secret_hash, expires_at: record.expires_at });
        let genuine = presented.is_genuine(stored, self.parts.clock.now());
        let subject = record.filter(|_| genuine).map(|record| record.subject).ok_or(Reason::Unauthorized)?;
        match subject {
            KeySubject::Operator => Ok(Caller::Operator),
            KeySubject::Tenant(tenant) => Ok(Caller::Tenant(tenant)),
            KeySubject::Number(number) => {
                let record = meta.number(number).ok_or(Reason::Unauthorized)?;
                Ok(Caller::Number { number, tenant: record.tenant })
            }
        }
    }

    /// The number a request means: the one it names, or the key's own when it names none.
    ///
    /// # Errors
    /// `NumberNotFound`, also for another tenant's; `NumberRequired`; `OperatorScopeNotAllowed`.
    pub(super) fn number_meant(&self, caller: Caller, named: &str) -> Result<Arc<NumberRecord>, ApiError> {
        let id = match (caller, named) {
            (Caller::Operator, _) => return Err(Reason::OperatorScopeNotAllowed.into()),
            (Caller::Number { number, .. }, "") => number,
            (Caller::Tenant(_), "") => return Err(Reason::NumberRequired.into()),
            (_, named) => named.parse::<NumberId>().map_err(|_| Reason::NumberNotFound)?,
        };
        self.number_seen(caller, id)
    }

    pub(super) fn number_seen(&self, caller: Caller, id: NumberId) -> Result<Arc<NumberRecord>, ApiError> {
        let record = self.parts.store.meta().number(id);
        let seen = record.filter(|record| caller.sees_number(id, record.tenant));
        Ok(seen.ok_or(Reason::NumberNotFound)?)
    }

    pub(super) fn handle_of(&self, id: NumberId) -> Result<Arc<NumberHandle>, ApiError> {
        Ok(self.parts.fleet.directory().get(id).ok_or(Reason::NumberUnavailable)?)
    }

    pub(super) fn store_of(&self, id: NumberId) -> Result<NumberStore, ApiError> {
        Ok(self.handle_of(id)?.store()?)
    }

    /// A reference for a message whose caller gave none.
    #[must_use]
    pub fn new_correlation_id(&self) -> String {
        format!("cor_{:016x}", self.parts.random.word())
    }

    /// Does the work to its end even if the caller hangs up: a number must not be recorded and never started.
    pub(super) async fn to_the_end<T, W>(&self, work: W) -> Result<T, ApiError>
    where
        T: Send + 'static,
        W: Future<Output = Result<T, ApiError>> + Send + 'static,
    {
        if self.parts.drain.has_begun() {
            return Err(Reason::Draining.into());
        }
        let (done, outcome) = oneshot::channel();
        {
            let mut ongoing = self.ongoing.lock().unwrap_or_else(PoisonError::into_inner);
            while ongoing.try_join_next().is_some() {}
            ongoing.spawn(async move {
                let _ = done.send(work.await);
            });
        }
        outcome.await.unwrap_or(Err(Reason::Internal.into()))
    }
}

/// The tenant a call is made for; number keys may not make it.
pub(super) fn tenant_only(caller: Caller) -> Result<TenantId, ApiError> {
    match caller {
        Caller::Tenant(tenant) => Ok(tenant),
        Caller::Number { .. } => Err(Reason::NumberScopeNotAllowed.into()),
        Caller::Operator => Err(Reason::OperatorScopeNotAllowed.into()),
    }
}

/// The number a call is made for; tenant keys may not make it.
pub(super) fn number_only(caller: Caller) -> Result<NumberId, ApiError> {
    match caller {
        Caller::Number { number, .. } => Ok(number),
        Caller::Tenant(_) => Err(Reason::TenantScopeNotAllowed.into()),
        Caller::Operator => Err(Reason::OperatorScopeNotAllowed.into()),
    }
}

pub(super) fn operator_only(caller: Caller) -> Result<(), ApiError> {
    match caller {
        Caller::Operator => Ok(()),
        Caller::Tenant(_) | Caller::Number { .. } => Err(Reason::OperatorScopeRequired.into()),
    }
}

/// The page size meant by a request: 0 is the default, too much is the most.
pub(super) fn page_size(asked: i32, most: usize) -> Result<usize, ApiError> {
    match usize::try_from(asked) {
        Ok(0) => Ok(PAGE_SIZE_DEFAULT),
        Ok(size) => Ok(size.min(most)),
        Err(_) => Err(ApiError::field("page_size", "must not be negative")),
    }
}

/// A name people gave, trimmed.
pub(super) fn display_name(text: &str) -> Result<String, ApiError> {
    let name = text.trim();
    if name.is_empty() || name.chars().count() > NAME_CHARS_MAX || name.chars().any(char::is_control) {
        let problem = format!("must have 1 to {NAME_CHARS_MAX} characters, none of them control characters");
        return Err(ApiError::field("display_name", problem));
    }
    Ok(name.to_owned())
}
