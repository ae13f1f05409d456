//! All accounts, and the carrying of stanzas between them.
//!
//! Locks: one account's state at a time, never two; a phone's own turn before any state. Stanzas that answer stanzas go
//! through one work list, so no lock is held while another account is visited.

use crate::sandbox::account::{Account, AccountState, Companion, Listing, StoredAccount};
use crate::sandbox::address::{DeviceAddress, Namespace, PhoneNumber};
use crate::sandbox::authenticator::Passkeys;
use crate::sandbox::certificate::{ServerIdentity, ServerKeys};
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::faults::Faults;
use crate::sandbox::pairing::Pairings;
use crate::sandbox::persistence::Files;
use crate::sandbox::phone::{Delivery, Errand, Person, Shown};
use crate::sandbox::signal_store::Bundle;
use crate::sandbox::stanza::{fresh_id, now, tag};
use crate::sandbox::stats::Stats;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use whatsapp_rust::wacore_binary::Node;

/// Accounts one sandbox may have.
const ACCOUNT_LIMIT: usize = 200_000;
/// A device is told that it should publish more prekeys when so many are left.
const PREKEYS_LOW: usize = 10;
/// Requests to repeat a message that wait for an order to be taken back; more are forgotten.
const HELD_LIMIT: usize = 1_024;

/// Everything the sandbox knows.
pub struct World {
    /// Noise keys and certificates.
    pub identity: ServerIdentity,
    /// Orders to misbehave.
    pub faults: Faults,
    /// Counters.
    pub stats: Arc<Stats>,
    /// Devices waiting to be linked.
    pub pairings: Pairings,
    /// What people unlock to link a device.
    pub passkeys: Passkeys,
    files: Files,
    accounts: RwLock<HashMap<PhoneNumber, Arc<Account>>>,
    absent: Mutex<HashSet<PhoneNumber>>,
    held: Mutex<Vec<(PhoneNumber, Errand)>>,
}

impl World {
    /// Opens a world, with what an earlier one has left in `files`.
    pub fn open(files: Files, seed: u64) -> Result<Self> {
        let keys = match files.server::<ServerKeys>()? {
            Some(keys) => keys,
            None => {
                let keys = ServerKeys::generate();
                files.save_server(&keys)?;
                keys
            }
        };
        let mut accounts = HashMap::new();
        for stored in files.accounts::<StoredAccount>()? {
            let account = Account::restore(stored)?;
            accounts.insert(account.phone.clone(), Arc::new(account));
        }
        Ok(Self {
            identity: ServerIdentity::new(keys)?,
            faults: Faults::new(seed),
            stats: Arc::default(),
            pairings: Pairings::default(),
            passkeys: Passkeys::default(),
            files,
            accounts: RwLock::new(accounts),
            held: Mutex::default(),
            absent: Mutex::default(),
        })
    }

    /// Says whether a number is on WhatsApp.
    pub fn set_absent(&self, phone: &PhoneNumber, absent: bool) {
        let mut numbers = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        if absent {
            numbers.insert(phone.clone());
        } else {
            numbers.remove(phone);
        }
    }

    fn is_absent(&self, phone: &PhoneNumber) -> bool {
        phone.absent_by_convention() || self.absent.lock().unwrap_or_else(PoisonError::into_inner).contains(phone)
    }

    /// The account of a number. Whoever is mentioned for the first time gets a phone, unless the number is absent.
    pub fn account(&self, phone: &PhoneNumber) -> Option<Arc<Account>> {
        if let Some(account) = self.accounts.read().unwrap_or_else(PoisonError::into_inner).get(phone) {
            return Some(Arc::clone(account));
        }
        if self.is_absent(phone) {
            return None;
        }
        let account = Arc::new(Account::new(phone.clone()).ok()?);
        let mut accounts = self.accounts.write().unwrap_or_else(PoisonError::into_inner);
        if accounts.len() >= ACCOUNT_LIMIT && !accounts.contains_key(phone) {
            return None;
        }
        Some(Arc::clone(accounts.entry(phone.clone()).or_insert(account)))
    }

    /// The account, or an error for the HTTP door.
    pub fn require(&self, phone: &PhoneNumber) -> Result<Arc<Account>> {
        self.account(phone).ok_or(SandboxError::NotFound("this number is not on WhatsApp"))
    }

    fn with_state<T>(&self, phone: &PhoneNumber, read: impl FnOnce(&mut AccountState) -> T) -> Option<T> {
        let account = self.account(phone)?;
        let answer = read(&mut account.state());
        Some(answer)
    }

    fn change_state<T>(&self, phone: &PhoneNumber, change: impl FnOnce(&mut AccountState) -> T) -> Option<T> {
        let account = self.account(phone)?;
        let answer = change(&mut account.state());
        account.dirty.store(true, Ordering::Release);
        Some(answer)
    }

    /// Looks at a linked device.
    pub fn with_companion<T>(&self, device: &DeviceAddress, read: impl FnOnce(&Companion) -> T) -> Option<T> {
        self.with_state(&device.phone, |state| state.companions.get(&device.device).map(read)).flatten()
    }

    /// Changes a linked device.
    pub fn change_companion<T>(&self, device: &DeviceAddress, change: impl FnOnce(&mut Companion) -> T) -> Option<T> {
        self.change_state(&device.phone, |state| state.companions.get_mut(&device.device).map(change)).flatten()
    }

    /// The name others see.
    pub fn name_of(&self, phone: &PhoneNumber) -> String {
        self.with_state(phone, |state| state.person.name.clone()).unwrap_or_default()
    }

    /// All devices of a number, the phone first.
    pub fn devices(&self, phone: &PhoneNumber) -> Vec<u16> {
        let list = |state: &mut AccountState| std::iter::once(0).chain(state.companions.keys().copied()).collect();
        self.with_state(phone, list).unwrap_or_default()
    }

    /// The signed device list.
    pub fn listing(&self, phone: &PhoneNumber) -> Option<Listing> {
        self.with_state(phone, |state| state.listing().ok()).flatten()
    }

    /// The keys a device shows to a stranger.
    pub fn bundle(&self, device: &DeviceAddress) -> Option<Bundle> {
        let take = |state: &mut AccountState| match device.device {
            0 => Some((state.person.signal.bundle().ok()?, None)),
            number => {
                let companion = state.companions.get_mut(&number)?;
                Some((companion.bundle(), Some(companion.prekeys.len())))
            }
        };
        let (bundle, left) = self.change_state(&device.phone, take).flatten()?;
        if left == Some(PREKEYS_LOW) {
            self.tell_of_prekeys(device, PREKEYS_LOW);
        }
        Some(bundle)
    }

    /// Forgets the one-time prekeys of a number's devices, as if many had asked for them. How many devices.
    pub fn drain_prekeys(&self, phone: &PhoneNumber) -> Result<usize> {
        self.require(phone)?;
        let devices = self.devices(phone).into_iter().filter(|device| *device != 0);
        let devices: Vec<_> = devices.map(|device| DeviceAddress::new(phone.clone(), device)).collect();
        for device in &devices {
            self.change_companion(device, |companion| companion.prekeys.clear());
            self.tell_of_prekeys(device, 0);
        }
        Ok(devices.len())
    }

    fn tell_of_prekeys(&self, device: &DeviceAddress, left: usize) {
        let node = tag("notification")
            .attr("from", "s.whatsapp.net")
            .attr("id", fresh_id("3C"))
            .attr("type", "encrypt")
            .attr("t", now())
            .children([tag("count").attr("value", left).build()])
            .build();
        self.hand_over(Delivery { from: device.clone(), to: device.clone(), node });
    }

    /// Crosses off messages a device says it has received.
    pub fn received(&self, device: &DeviceAddress, ids: &[String]) {
        if self.faults.redelivers(&device.phone) {
            return;
        }
        self.change_companion(device, |companion| {
            for id in ids {
                companion.backlog.received(id);
            }
        });
    }

    /// Crosses off what a device acknowledges.
    pub fn acknowledge(&self, device: &DeviceAddress, ack: &Node) {
        if !self.faults.redelivers(&device.phone) {
            self.change_companion(device, |companion| companion.backlog.acknowledge(ack));
        }
    }

    /// Carries stanzas to their devices, and whatever phones do about them.
    pub fn deliver(&self, deliveries: Vec<Delivery>) {
        let mut work = VecDeque::from(deliveries);
        while let Some(delivery) = work.pop_front() {
            if delivery.to.device != 0 {
                self.hand_over(delivery);
                continue;
            }
            let receive = |state: &mut AccountState| state.person.receive(&delivery.from, &delivery.node);
            for errand in self.change_state(&delivery.to.phone, receive).unwrap_or_default() {
                work.extend(self.run(&delivery.to.phone, errand));
            }
        }
    }

    fn hand_over(&self, delivery: Delivery) {
        let link = self.change_companion(&delivery.to, |companion| {
            let taken = companion.backlog.push(delivery.node);
            (taken, companion.link.clone())
        });
        match link {
            Some((true, Some(link))) => link.wake(),
            Some((false, _)) => self.stats.backlog_overflows.add(1),
            Some((true, None)) | None => {}
        }
    }

    fn run(&self, phone: &PhoneNumber, errand: Errand) -> Vec<Delivery> {
        match errand {
            Errand::Deliver(delivery) => {
                self.stats.retry_receipts_from_phones.add(1);
                vec![delivery]
            }
            Errand::Tick(tick) => tick.deliveries(self),
            Errand::Repeat { .. } if self.faults.holds_repeats(phone) => {
                let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                if held.len() < HELD_LIMIT {
                    held.push((phone.clone(), errand));
                }
                Vec::new()
            }
            Errand::Repeat { to, id, count, keys } => {
                let Some(keys) = keys.or_else(|| self.bundle(&to)) else {
                    return Vec::new();
                };
                self.phone_seals(phone, |person| {
                    person.signal.begin(&to, &keys)?;
                    Ok(vec![person.repeat(&id, &to, count)?])
                })
            }
            Errand::ShareKeys(to) => self.share_keys(&to),
        }
    }

    /// Does what phones were asked to repeat while an order kept them from it, where there is none any more.
    pub fn repeat_held(&self) {
        let held = std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner));
        for (phone, errand) in held {
            let deliveries = self.run(&phone, errand);
            self.deliver(deliveries);
        }
    }

    /// Lets a phone seal something and makes its state safe before the result may leave.
    fn phone_seals(
        &self,
        phone: &PhoneNumber,
        seal: impl FnOnce(&mut Person) -> Result<Vec<Delivery>>,
    ) -> Vec<Delivery> {
        let Some(account) = self.account(phone) else {
            return Vec::new();
        };
        let (sealed, raised) = {
            let mut state = account.state();
            let sealed = seal(&mut state.person);
            (sealed, state.person.signal.take_lease_raised())
        };
        account.dirty.store(true, Ordering::Release);
        let stored = if raised { self.save(&account) } else { Ok(()) };
        match stored.and(sealed) {
            Ok(mut deliveries) => {
                self.stats.messages_from_phones.add(u64::from(!deliveries.is_empty()));
                deliveries.iter().for_each(|delivery| self.stats.inspect(delivery));
                let to_devices = deliveries.iter_mut().filter(|delivery| delivery.to.device != 0);
                to_devices.filter(|_| self.faults.spoils(phone)).for_each(Delivery::spoil);
                deliveries
            }
            Err(error) => {
                tracing::debug!(%error, "a phone could not seal");
                Vec::new()
            }
        }
    }

    fn keys_for_strangers(&self, phone: &PhoneNumber, devices: &[DeviceAddress]) -> Vec<(DeviceAddress, Bundle)> {
        let unknown = |state: &mut AccountState| -> Vec<DeviceAddress> {
            devices.iter().filter(|device| !state.person.signal.knows(device)).cloned().collect()
        };
        let strangers = self.with_state(phone, unknown).unwrap_or_default();
        strangers.into_iter().filter_map(|device| self.bundle(&device).map(|bundle| (device, bundle))).collect()
    }

    /// The phone gives a linked device the key of the app state.
    pub fn share_keys(&self, to: &DeviceAddress) -> Vec<Delivery> {
        let strangers = self.keys_for_strangers(&to.phone, std::slice::from_ref(to));
        self.phone_seals(&to.phone, |person| {
            for (device, bundle) in &strangers {
                person.signal.begin(device, bundle)?;
            }
            Ok(vec![person.share_keys(to)?])
        })
    }

    /// A person writes on the phone; the id of the message, which is `id` if given: also one that was used before.
    pub fn write(
        &self,
        from: &PhoneNumber,
        to: &PhoneNumber,
        text: &str,
        addressing: Namespace,
        id: Option<String>,
    ) -> Result<String> {
        let sender = self.require(from)?;
        self.require(to)?;
        let of = |phone: &PhoneNumber| -> Vec<DeviceAddress> {
            let devices = self.devices(phone).into_iter();
            devices.map(|device| DeviceAddress::new(phone.clone(), device)).collect()
        };
        let _turn = sender.turn();
        let mut targets = of(to);
        targets.extend(of(from));
        targets.retain(|device| device.device != 0 || device.phone != *from);
        targets.dedup();
        let strangers = self.keys_for_strangers(from, &targets);
        let given = id.unwrap_or_else(|| fresh_id("3A"));
        let mut id = None;
        let deliveries = self.phone_seals(from, |person| {
            for (device, bundle) in &strangers {
                person.signal.begin(device, bundle)?;
            }
            let deliveries = person.write(given.clone(), to, text, addressing, &targets)?;
            id = Some(given);
            Ok(deliveries)
        });
        self.deliver(deliveries);
        id.ok_or(SandboxError::Conflict("the phone could not seal the message"))
    }

    /// A person reads a chat; how many ticks that sent.
    pub fn read(&self, phone: &PhoneNumber, peer: &PhoneNumber) -> Result<usize> {
        let reader = self.require(phone)?;
        let _turn = reader.turn();
        let ticks = self.change_state(phone, |state| state.person.read_all(peer)).unwrap_or_default();
        for tick in &ticks {
            self.deliver(tick.deliveries(self));
        }
        Ok(ticks.iter().map(|tick| tick.receipt.ids.len()).sum())
    }

    /// What a phone shows.
    pub fn messages(&self, phone: &PhoneNumber) -> Result<Vec<Shown>> {
        let account = self.require(phone)?;
        let state = account.state();
        Ok(state.person.messages().cloned().collect())
    }

    /// A phone loses its sessions.
    pub fn forget_sessions(&self, phone: &PhoneNumber) -> Result<()> {
        self.require(phone)?;
        self.change_state(phone, |state| state.person.signal.forget_sessions());
        Ok(())
    }

    /// Writes one account's file.
    pub fn save(&self, account: &Account) -> Result<()> {
        if !self.files.keeps() {
            return Ok(());
        }
        let _saving = account.saving();
        account.dirty.store(false, Ordering::Release);
        self.files.save_account(account.phone.as_str(), &account.stored()?)
    }

    /// Writes the file of every account that has changed.
    pub fn save_all(&self) -> Result<()> {
        if !self.files.keeps() {
            return Ok(());
        }
        let accounts: Vec<_> =
            self.accounts.read().unwrap_or_else(PoisonError::into_inner).values().map(Arc::clone).collect();
        for account in accounts.iter().filter(|account| account.dirty.load(Ordering::Acquire)) {
            self.save(account)?;
        }
        Ok(())
    }
}
