//! Numbers: making, showing, running and removing them.

use std::sync::Arc;

use super::error::{ApiError, Reason};
use super::keys::new_key;
use super::service::{Api, display_name, page_size, tenant_only};
use super::tenants::{Page, page_of};
use super::token::TokenKind;
use crate::domain::access::Caller;
use crate::domain::id::NumberId;
use crate::domain::ledger::{DiskRows, Memory};
use crate::domain::lifecycle::{Desired, State};
use crate::domain::orders::{OwnLimits, PAUSE_MAX, Pause, SendingOrders};
use crate::domain::phone::{Contact, Phone};
use crate::domain::proxy::Proxy;
use crate::domain::retention::{DAYS_MAX, Retention};
use crate::domain::time::Timestamp;
use crate::number::handle::{Erased, NumberHandle, NumberView};
use crate::number::message::Control;
use crate::store::error::StoreError;
use crate::store::meta::{KeyRecord, KeySubject, NumberKind, NumberRecord};
use crate::webhook::guard::check_host;

/// Most entries of one page.
const PAGE_MAX: usize = 1000;

/// A number as its owner sees it.
#[derive(Debug, Clone)]
pub struct NumberCard {
    /// What was recorded of it.
    pub record: Arc<NumberRecord>,
    /// What it does now.
    pub view: NumberView,
    /// Crashes since the daemon started.
    pub restarts: u64,
    /// Whether a pause of its sending holds.
    pub paused: bool,
    /// What it takes.
    pub usage: NumberUsage,
}

/// What a number takes.
#[derive(Debug, Clone, Copy)]
pub struct NumberUsage {
    /// Memory, estimated, in bytes.
    pub memory: Memory,
    /// Rows on disk.
    pub disk: DiskRows,
    /// Bytes from WhatsApp since the daemon started.
    pub wire_received: u64,
    /// Bytes to WhatsApp.
    pub wire_sent: u64,
}

/// A number to make.
#[derive(Debug, Clone, Copy)]
pub struct NewNumber<'a> {
    /// What people call it.
    pub name: &'a str,
    /// Its phone number.
    pub phone: &'a str,
    /// How it connects.
    pub kind: NumberKind,
    /// What it keeps of its messages.
    pub retention: Retention,
    /// The URL of what it connects through; empty: directly.
    pub proxy: &'a str,
}

/// What to change of a number.
#[derive(Debug, Clone, Copy, Default)]
pub struct NumberChange<'a> {
    /// What people call it.
    pub name: Option<&'a str>,
    /// What it keeps of its messages.
    pub retention: Option<Retention>,
    /// The URL of what it connects through; empty: directly.
    pub proxy: Option<&'a str>,
}

/// What a number is told to keep, in words of either API.
///
/// # Errors
/// When the days do not fit.
pub fn keep_days(field: &'static str, days: i64) -> Result<Retention, ApiError> {
    let days = u16::try_from(days).ok().filter(|days| (1..=DAYS_MAX).contains(days));
    let wrong = || ApiError::field(field, format!("must be from 1 to {DAYS_MAX}"));
    days.map(Retention::KeepDays).ok_or_else(wrong)
}

impl Api {
    /// Makes a number and starts it; returns it with the text of its first key.
    ///
    /// # Errors
    /// See the contract.
    pub async fn create_number(&self, caller: Caller, order: NewNumber<'_>) -> Result<(NumberCard, String), ApiError> {
        let tenant = tenant_only(caller)?;
        let NewNumber { name, phone, kind, retention, proxy } = order;
        if kind == NumberKind::Official {
            return Err(Reason::KindNotSupported.into());
        }
        let now = self.parts.clock.now();
        let record = NumberRecord {
            id: NumberId(self.parts.random.word()),
            tenant,
            name: display_name(name)?,
            phone: Phone::parse(phone).map_err(|error| ApiError::field("phone_number", error.to_string()))?,
            kind,
            volume: self.parts.store.roomiest_volume(),
            created_at: now,
            retention,
            proxy: self.proxy_of(proxy)?,
            orders: SendingOrders::default(),
        };
        let id = record.id;
        let (key, key_record) = new_key(KeySubject::Number(id), &self.parts.random, now);
        let meta = self.parts.store.meta().clone();
        let fleet = self.parts.fleet.clone();
        self.to_the_end(async move {
            meta.create_number(record.clone(), vec![key_record]).await.map_err(|error| match error {
                StoreError::Conflict => Reason::NumberAlreadyExists.into(),
                error => ApiError::from(error),
            })?;
            fleet.add(&record).await;
            Ok(())
        })
        .await?;
        tracing::info!(number = %id, tenant = %tenant, "number created");
        Ok((self.card(self.number_seen(caller, id)?)?, key.text))
    }

    /// What a number is to connect through.
    fn proxy_of(&self, text: &str) -> Result<Option<Proxy>, ApiError> {
        if text.is_empty() {
            return Ok(None);
        }
        let proxy = Proxy::parse(text).map_err(|error| ApiError::field("proxy", error.to_string()))?;
        let allowed = check_host(&proxy.address().host, self.parts.proxy_policy);
        allowed.map_err(|error| ApiError::field("proxy", error.to_string()))?;
        Ok(Some(proxy))
    }

    /// Changes a number's name, what it keeps, what it connects through.
    ///
    /// # Errors
    /// See the contract.
    pub async fn update_number(
        &self,
        caller: Caller,
        named: &str,
        change: NumberChange<'_>,
    ) -> Result<NumberCard, ApiError> {
        tenant_only(caller)?;
        let id = self.number_meant(caller, named)?.id;
        let name = change.name.map(display_name).transpose()?;
        let retention = change.retention;
        let proxy = change.proxy.map(|text| self.proxy_of(text)).transpose()?;
        let meta = self.parts.store.meta().clone();
        let handle = self.handle_of(id)?;
        let record = self
            .to_the_end(async move {
                let before = meta.number(id).and_then(|record| record.proxy.clone());
                let rerouted = proxy.as_ref().is_some_and(|proxy| *proxy != before);
                let changed = meta.change_number(id, |record| {
                    record.name = name.unwrap_or_else(|| record.name.clone());
                    record.retention = retention.unwrap_or(record.retention);
                    record.proxy = proxy.unwrap_or_else(|| record.proxy.clone());
                });
                let record = changed.await?;
                // Every read goes by the record from now on; the number's own work follows it.
                handle.keep(record.retention);
                if rerouted {
                    // A number without an actor reads it when it starts.
                    let _ = handle.control(Control::Reconnect).await;
                }
                Ok(record)
            })
            .await?;
        self.card(record)
    }

    /// Sets a number's own limits, all of them; what is not set is as the daemon is configured. Holds at once.
    ///
    /// # Errors
    /// See the contract.
    pub async fn set_limits(&self, caller: Caller, named: &str, limits: OwnLimits) -> Result<NumberCard, ApiError> {
        tenant_only(caller)?;
        self.change_orders(caller, named, move |orders, _| orders.limits = limits).await
    }

    /// Holds everything a number would send, until the given moment or until it is told to go on. A pause that stands
    /// keeps its beginning.
    ///
    /// # Errors
    /// See the contract.
    pub async fn pause_sending(
        &self,
        caller: Caller,
        named: &str,
        until: Option<Timestamp>,
    ) -> Result<NumberCard, ApiError> {
        let now = self.parts.clock.now();
        self.number_meant(caller, named)?;
        if until.is_some_and(|until| until <= now || until > now.after(PAUSE_MAX)) {
            return Err(ApiError::field("until", "must be in the future and at most 366 days ahead"));
        }
        let pause = move |orders: &mut SendingOrders, now| {
            let since = orders.paused(now).map_or(now, |pause| pause.since);
            orders.pause = Some(Pause { since, until });
        };
        self.change_orders(caller, named, pause).await
    }

    /// Lets a number send again.
    ///
    /// # Errors
    /// See the contract.
    pub async fn resume_sending(&self, caller: Caller, named: &str) -> Result<NumberCard, ApiError> {
        self.change_orders(caller, named, |orders, _| orders.pause = None).await
    }

    /// Durable when this returns, whatever the number is doing; one that runs follows at once.
    async fn change_orders(
        &self,
        caller: Caller,
        named: &str,
        change: impl FnOnce(&mut SendingOrders, Timestamp) + Send + 'static,
    ) -> Result<NumberCard, ApiError> {
        let id = self.number_meant(caller, named)?.id;
        let (meta, now) = (self.parts.store.meta().clone(), self.parts.clock.now());
        let handle = self.handle_of(id)?;
        let record = self
            .to_the_end(async move {
                let changed = meta.change_number(id, |record| change(&mut record.orders, now));
                let record = changed.await?;
                handle.order_sending(record.orders);
                Ok(record)
            })
            .await?;
        self.card(record)
    }

    /// One number.
    ///
    /// # Errors
    /// See the contract.
    pub fn number(&self, caller: Caller, named: &str) -> Result<NumberCard, ApiError> {
        self.card(self.number_meant(caller, named)?)
    }

    /// The tenant's numbers, oldest first.
    ///
    /// # Errors
    /// See the contract.
    pub fn numbers(&self, caller: Caller, size: i32, token: &str) -> Result<Page<NumberCard>, ApiError> {
        let tenant = tenant_only(caller)?;
        let size = page_size(size, PAGE_MAX)?;
        let all = self.parts.store.meta().numbers(Some(tenant));
        let position = |record: &Arc<NumberRecord>| [record.created_at.0, record.id.0];
        let page = page_of(all, TokenKind::Numbers, position, size, token)?;
        // One that is being removed has no handle any more.
        let entries = page.entries.into_iter().filter_map(|record| self.card(record).ok()).collect();
        Ok(Page { entries, next: page.next })
    }

    /// All of the tenant's numbers, for the list without pages.
    ///
    /// # Errors
    /// See the contract.
    pub fn all_numbers(&self, caller: Caller) -> Result<Vec<NumberCard>, ApiError> {
        let tenant = tenant_only(caller)?;
        let all = self.parts.store.meta().numbers(Some(tenant));
        Ok(all.into_iter().filter_map(|record| self.card(record).ok()).collect())
    }

    /// The keys of a number, without their secrets.
    #[must_use]
    pub fn keys_of_number(&self, id: NumberId) -> Vec<Arc<KeyRecord>> {
        self.parts.store.meta().keys_of(KeySubject::Number(id))
    }

    /// Removes a number and everything of it.
    ///
    /// # Errors
    /// See the contract.
    pub async fn delete_number(&self, caller: Caller, named: &str) -> Result<(), ApiError> {
        tenant_only(caller)?;
        let id = self.number_meant(caller, named)?.id;
        let fleet = self.parts.fleet.clone();
        self.to_the_end(async move { Ok(fleet.remove(id).await?) }).await?;
        tracing::info!(number = %id, "number deleted");
        Ok(())
    }

    /// Erases everything that a number knows of a contact.
    ///
    /// # Errors
    /// See the contract.
    pub async fn erase_contact(&self, caller: Caller, named: &str, phone: &str) -> Result<Erased, ApiError> {
        let record = self.number_meant(caller, named)?;
        let phone = Phone::parse(phone).map_err(|error| ApiError::field("phone_number", error.to_string()))?;
        let erased = self.handle_of(record.id)?.erase(&Contact::of_phone(phone)).await?;
        tracing::info!(number = %record.id, ?erased, "contact erased by order");
        Ok(erased)
    }

    /// Gives a number an order; returns what it does right after taking it.
    ///
    /// # Errors
    /// See the contract.
    pub async fn control_number(&self, caller: Caller, named: &str, order: Control) -> Result<NumberCard, ApiError> {
        let record = self.number_meant(caller, named)?;
        self.handle_of(record.id)?.control(order).await?;
        self.card(record)
    }

    /// Unlinks the device at WhatsApp; harmless when there is none.
    ///
    /// # Errors
    /// See the contract.
    pub async fn logout_number(&self, caller: Caller, named: &str) -> Result<NumberCard, ApiError> {
        let record = self.number_meant(caller, named)?;
        let handle = self.handle_of(record.id)?;
        let view = handle.view();
        if view.linked && !view.state.is_connected() {
            return Err(Reason::NumberNotConnected.into());
        }
        handle.control(Control::Logout).await?;
        self.card(record)
    }

    /// Gives up the connection and opens another one; what only waits is tried now.
    ///
    /// # Errors
    /// See the contract.
    pub async fn restart_number(&self, caller: Caller, named: &str) -> Result<NumberCard, ApiError> {
        let record = self.number_meant(caller, named)?;
        let handle = self.handle_of(record.id)?;
        let view = handle.view();
        if view.desired == Desired::Stopped {
            return Err(Reason::NumberStopped.into());
        }
        if view.state.is_connected() || view.state == State::Connecting {
            handle.control(Control::Reconnect).await?;
        } else {
            self.start_now(&handle, record.id).await;
        }
        self.card(record)
    }

    /// Forgets crashes and ends whatever wait there is.
    async fn start_now(&self, handle: &NumberHandle, id: NumberId) {
        self.parts.fleet.reset(id);
        // A quarantined number has no actor to take the order; the reset starts it.
        let _ = handle.control(Control::Start).await;
    }

    /// Ends a quarantine, a park or a wait at once.
    ///
    /// # Errors
    /// See the contract.
    pub async fn reset_number(&self, caller: Caller, named: &str) -> Result<NumberCard, ApiError> {
        let record = self.number_meant(caller, named)?;
        let handle = self.handle_of(record.id)?;
        if handle.view().desired == Desired::Running {
            self.start_now(&handle, record.id).await;
        } else {
            self.parts.fleet.reset(record.id);
        }
        self.card(record)
    }

    fn card(&self, record: Arc<NumberRecord>) -> Result<NumberCard, ApiError> {
        let handle = self.parts.fleet.directory().get(record.id).ok_or(Reason::NumberNotFound)?;
        let paused = record.orders.paused(self.parts.clock.now()).is_some();
        let stats = handle.stats();
        let (memory, disk) = stats.usage();
        let (wire_received, wire_sent) = (stats.wire_received.value(), stats.wire_sent.value());
        let usage = NumberUsage { memory, disk, wire_received, wire_sent };
        Ok(NumberCard { view: handle.view(), restarts: stats.restarts.value(), paused, record, usage })
    }
}
