//! Faults on order: what to mute, delay, refuse, drop, repeat or shuffle, for one number or for all.
//!
//! Everything that is left to chance draws from one seeded generator, so a failing run can be run again.

use crate::sandbox::address::PhoneNumber;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The longest delay that can be ordered.
const LONGEST_DELAY: u64 = 120_000;
/// How long WhatsApp gives a person to unlock a passkey, as seen in the wild: `"timeout":600000`.
const PASSKEY_PATIENCE: Duration = Duration::from_secs(600);

/// The body of `POST /admin/fault`; what is absent stays as it was.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Order {
    /// Whom it concerns; all numbers when absent.
    pub phone: Option<String>,
    /// Forget all earlier orders of this scope first; without a phone, all orders of every scope.
    pub clear: bool,
    /// Leave these queries unanswered: a namespace (`usync`), namespace and question (`encrypt:digest`), or `*` for all.
    pub mute_iq: Option<Vec<String>>,
    /// Answer queries with an error.
    pub refuse_iq: Option<RefusedQueries>,
    /// Answer every collection of the account's settings with this error.
    pub app_state_error: Option<u16>,
    /// What goes wrong before anybody is known; not for a single number.
    pub handshake: Option<HandshakeFaults>,
    /// Leave pings unanswered.
    pub mute_pings: Option<bool>,
    /// Write nothing at all.
    pub silence: Option<bool>,
    /// Write everything this much later.
    pub delay_ms: Option<u64>,
    /// Refuse messages with an error in their ack.
    pub nack: Option<Nack>,
    /// Swallow the acks of this many messages.
    pub drop_acks: Option<u32>,
    /// Take this many messages and do nothing with them: neither carried nor answered.
    pub lose: Option<u32>,
    /// Spoil this many ciphertexts that this number's phone seals for linked devices, repetitions included.
    pub spoil: Option<u32>,
    /// Keep what this number's phone is asked to repeat until this is taken back, as if it were off.
    pub hold_repeats: Option<bool>,
    /// For so many seconds the account is locked for new chats, as it says when it is asked; 0 is no lock. Without it
    /// such questions are not understood.
    pub locked_for: Option<u64>,
    /// Write this many stanzas of the backlog twice.
    pub duplicate: Option<u32>,
    /// Keep stanzas in the backlog although they were acknowledged, so that the next login gets them again.
    pub redeliver: Option<bool>,
    /// Write each batch of the backlog in reverse.
    pub reorder: Option<bool>,
    /// Refuse logins (405) that claim an older version of WhatsApp Web than this one.
    pub minimum_version: Option<String>,
    /// Refuse logins.
    pub login_failure: Option<LoginFailure>,
    /// Ask for the account's passkey before a device is linked.
    pub passkey: Option<bool>,
    /// How long the person has to unlock it; ten minutes when absent.
    pub passkey_timeout_ms: Option<u64>,
    /// How likely each `nack`, `drop_acks`, `lose`, `spoil` and `duplicate` is when it could happen; 1 when absent.
    pub chance: Option<f64>,
}

/// Refused messages.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nack {
    /// The error code.
    pub code: u16,
    /// How many.
    #[serde(default = "once")]
    pub count: u32,
}

/// Queries that are refused.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefusedQueries {
    /// Which, named as in `mute_iq`.
    pub queries: Vec<String>,
    /// The error code.
    pub code: u16,
}

/// Connections that fail before anybody is known.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandshakeFaults {
    /// How.
    pub fault: HandshakeFault,
    /// How many.
    #[serde(default = "once")]
    pub count: u32,
}

/// How a connection fails before anybody is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HandshakeFault {
    /// The upgrade to WebSocket is answered with this HTTP status.
    Status(u16),
    /// Nothing answers the first message.
    Silent,
    /// The answer's seal is broken.
    Garbled,
}

/// Refused logins.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoginFailure {
    /// The `reason` of `<failure>`.
    pub reason: u16,
    /// Its `code`, for bans.
    pub code: Option<u16>,
    /// Its `expire` in seconds, for bans.
    pub expire: Option<u64>,
    /// How many.
    #[serde(default = "once")]
    pub count: u32,
}

fn once() -> u32 {
    1
}

type Scope = Option<PhoneNumber>;

fn covers(named: &str, kind: &str) -> bool {
    named == "*" || kind.strip_prefix(named).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
}

fn covers_pings(kind: &str) -> bool {
    kind == "w:p" || kind == "w:p:ping"
}

/// The orders in force.
pub struct Faults {
    armed: AtomicBool,
    orders: Mutex<HashMap<Scope, Order>>,
    dice: Mutex<StdRng>,
}

impl Faults {
    /// No faults.
    pub fn new(seed: u64) -> Self {
        Self {
            armed: AtomicBool::new(false),
            orders: Mutex::new(HashMap::new()),
            dice: Mutex::new(StdRng::seed_from_u64(seed)),
        }
    }

    /// Takes an order; false when it names something that is not a phone number.
    pub fn order(&self, order: Order) -> bool {
        let scope = match order.phone.as_deref().map(PhoneNumber::parse) {
            Some(None) => return false,
            Some(phone) => phone,
            None => None,
        };
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        match (order.clear, &scope) {
            (true, None) => orders.clear(),
            (true, Some(_)) => drop(orders.remove(&scope)),
            (false, _) => {}
        }
        orders.entry(scope).or_default().merge(order);
        self.armed.store(true, Ordering::Release);
        true
    }

    /// Asks the order for this number, then the order for all.
    fn ask<T>(&self, phone: &PhoneNumber, question: impl Fn(&mut Order) -> Option<T>) -> Option<T> {
        if !self.armed.load(Ordering::Acquire) {
            return None;
        }
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let own = orders.get_mut(&Some(phone.clone())).and_then(&question);
        own.or_else(|| orders.get_mut(&None).and_then(&question))
    }

    fn hits(&self, order: &Order) -> bool {
        let chance = order.chance.unwrap_or(1.0);
        chance >= 1.0 || self.dice.lock().unwrap_or_else(PoisonError::into_inner).random::<f64>() < chance
    }

    /// Whether a query stays unanswered.
    pub fn mutes(&self, phone: &PhoneNumber, kind: &str) -> bool {
        let muted = |order: &mut Order| {
            let by_name = order.mute_iq.as_ref().is_some_and(|muted| muted.iter().any(|muted| covers(muted, kind)));
            let as_ping = order.mute_pings == Some(true) && covers_pings(kind);
            (by_name || as_ping).then_some(())
        };
        self.ask(phone, muted).is_some()
    }

    /// The error with which a query is refused.
    pub fn refuses(&self, phone: &PhoneNumber, kind: &str) -> Option<u16> {
        self.ask(phone, |order| {
            let refused = order.refuse_iq.as_ref()?;
            refused.queries.iter().any(|named| covers(named, kind)).then_some(refused.code)
        })
    }

    /// The error for every collection of the account's settings.
    pub fn app_state_error(&self, phone: &PhoneNumber) -> Option<u16> {
        self.ask(phone, |order| order.app_state_error)
    }

    /// Spends a connection that fails at its upgrade: the status.
    pub fn upgrade_failure(&self) -> Option<u16> {
        self.handshake(|fault| match fault {
            HandshakeFault::Status(status) => Some(status),
            HandshakeFault::Silent | HandshakeFault::Garbled => None,
        })
    }

    /// Spends a connection that fails in its handshake.
    pub fn handshake_failure(&self) -> Option<HandshakeFault> {
        self.handshake(|fault| (!matches!(fault, HandshakeFault::Status(_))).then_some(fault))
    }

    fn handshake<T>(&self, meant: impl Fn(HandshakeFault) -> Option<T>) -> Option<T> {
        if !self.armed.load(Ordering::Acquire) {
            return None;
        }
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let ordered = orders.get_mut(&None)?.handshake.as_mut().filter(|ordered| ordered.count > 0)?;
        let found = meant(ordered.fault)?;
        ordered.count -= 1;
        Some(found)
    }

    /// Whether nothing is written.
    pub fn silent(&self, phone: &PhoneNumber) -> bool {
        self.ask(phone, |order| order.silence).unwrap_or(false)
    }

    /// How much later everything is written.
    pub fn delay(&self, phone: &PhoneNumber) -> Option<Duration> {
        let delay = self.ask(phone, |order| order.delay_ms.filter(|delay| *delay > 0))?;
        Some(Duration::from_millis(delay.min(LONGEST_DELAY)))
    }

    /// The error for the next message.
    pub fn nack(&self, phone: &PhoneNumber) -> Option<u16> {
        self.ask(phone, |order| {
            let hits = order.nack.is_some_and(|nack| nack.count > 0) && self.hits(order);
            let nack = order.nack.as_mut().filter(|_| hits)?;
            nack.count -= 1;
            Some(nack.code)
        })
    }

    /// Whether the next ack is swallowed.
    pub fn drops_ack(&self, phone: &PhoneNumber) -> bool {
        self.ask(phone, |order| self.spend(order, |order| &mut order.drop_acks)).is_some()
    }

    /// Whether the next message is taken and forgotten.
    pub fn loses(&self, phone: &PhoneNumber) -> bool {
        self.ask(phone, |order| self.spend(order, |order| &mut order.lose)).is_some()
    }

    /// Whether the next ciphertext of this number's phone is spoiled.
    pub fn spoils(&self, phone: &PhoneNumber) -> bool {
        self.ask(phone, |order| self.spend(order, |order| &mut order.spoil)).is_some()
    }

    /// Whether requests to repeat a message wait.
    pub fn holds_repeats(&self, phone: &PhoneNumber) -> bool {
        self.ask(phone, |order| order.hold_repeats).unwrap_or(false)
    }

    /// For how many seconds the account says that it is locked for new chats.
    pub fn locked_for(&self, phone: &PhoneNumber) -> Option<u64> {
        self.ask(phone, |order| order.locked_for)
    }

    /// Whether the next stanza is written twice.
    pub fn duplicates(&self, phone: &PhoneNumber) -> bool {
        self.ask(phone, |order| self.spend(order, |order| &mut order.duplicate)).is_some()
    }

    fn spend(&self, order: &mut Order, counter: impl Fn(&mut Order) -> &mut Option<u32>) -> Option<()> {
        let left = counter(order).unwrap_or(0);
        if left == 0 || !self.hits(order) {
            return None;
        }
        *counter(order) = Some(left - 1);
        Some(())
    }

    /// Whether acknowledged stanzas stay.
    pub fn redelivers(&self, phone: &PhoneNumber) -> bool {
        self.ask(phone, |order| order.redeliver).unwrap_or(false)
    }

    /// Whether batches are reversed.
    pub fn reorders(&self, phone: &PhoneNumber) -> bool {
        self.ask(phone, |order| order.reorder).unwrap_or(false)
    }

    /// Whether a login with this version is refused for it.
    pub fn is_outdated(&self, phone: &PhoneNumber, claimed: [u32; 3]) -> bool {
        let minimum = self.ask(phone, |order| order.minimum_version.clone());
        minimum.is_some_and(|minimum| {
            let wanted: Vec<u32> = minimum.split('.').filter_map(|part| part.parse().ok()).collect();
            claimed.as_slice() < wanted.as_slice()
        })
    }

    /// How long the person has to unlock the passkey without which no device is linked, if one is asked for.
    pub fn asks_for_passkey(&self, phone: &PhoneNumber) -> Option<Duration> {
        self.ask(phone, |order| {
            let patience = order.passkey_timeout_ms.map_or(PASSKEY_PATIENCE, Duration::from_millis);
            (order.passkey == Some(true)).then_some(patience.min(PASSKEY_PATIENCE))
        })
    }

    /// How the next login fails.
    pub fn login_failure(&self, phone: &PhoneNumber) -> Option<LoginFailure> {
        self.ask(phone, |order| {
            let failure = order.login_failure.as_mut().filter(|failure| failure.count > 0)?;
            failure.count -= 1;
            Some(failure.clone())
        })
    }
}

impl Order {
    fn merge(&mut self, newer: Self) {
        self.mute_iq = newer.mute_iq.or(self.mute_iq.take());
        self.refuse_iq = newer.refuse_iq.or(self.refuse_iq.take());
        self.app_state_error = newer.app_state_error.or(self.app_state_error);
        self.handshake = newer.handshake.or(self.handshake);
        self.mute_pings = newer.mute_pings.or(self.mute_pings);
        self.silence = newer.silence.or(self.silence);
        self.delay_ms = newer.delay_ms.or(self.delay_ms);
        self.nack = newer.nack.or(self.nack);
        self.drop_acks = newer.drop_acks.or(self.drop_acks);
        self.lose = newer.lose.or(self.lose);
        self.spoil = newer.spoil.or(self.spoil);
        self.hold_repeats = newer.hold_repeats.or(self.hold_repeats);
        self.locked_for = newer.locked_for.or(self.locked_for);
        self.duplicate = newer.duplicate.or(self.duplicate);
        self.redeliver = newer.redeliver.or(self.redeliver);
        self.reorder = newer.reorder.or(self.reorder);
        self.minimum_version = newer.minimum_version.or(self.minimum_version.take());
        self.login_failure = newer.login_failure.or(self.login_failure.take());
        self.passkey = newer.passkey.or(self.passkey);
        self.passkey_timeout_ms = newer.passkey_timeout_ms.or(self.passkey_timeout_ms);
        self.chance = newer.chance.or(self.chance);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phone(digits: &str) -> PhoneNumber {
        PhoneNumber::parse(digits).expect("plausible")
    }

    fn order(json: &str) -> Order {
        serde_json::from_str(json).expect("an order")
    }

    #[test]
    fn a_nack_is_spent() {
        let faults = Faults::new(1);
        assert!(faults.order(order(r#"{"phone":"+15550000001","nack":{"code":463,"count":2}}"#)));
        let asked: Vec<_> = (0..3).map(|_| faults.nack(&phone("15550000001"))).collect();
        assert_eq!(asked, [Some(463), Some(463), None]);
        assert_eq!(faults.nack(&phone("15550000002")), None);
    }

    #[test]
    fn queries_are_muted_by_namespace_or_question() {
        let faults = Faults::new(1);
        faults.order(order(r#"{"mute_iq":["encrypt:digest","w:sync:app:state"],"mute_pings":true}"#));
        let any = phone("15550000001");
        assert!(faults.mutes(&any, "encrypt:digest"));
        assert!(!faults.mutes(&any, "encrypt:count"));
        assert!(faults.mutes(&any, "w:sync:app:state:sync"));
        assert!(faults.mutes(&any, "w:p:ping"));
        faults.order(order(r#"{"clear":true}"#));
        assert!(!faults.mutes(&any, "encrypt:digest"));
    }

    #[test]
    fn handshakes_fail_as_often_as_ordered() {
        let faults = Faults::new(1);
        faults.order(order(r#"{"handshake":{"fault":{"status":403},"count":2}}"#));
        assert_eq!(faults.handshake_failure(), None);
        let seen: Vec<_> = (0..3).map(|_| faults.upgrade_failure()).collect();
        assert_eq!(seen, [Some(403), Some(403), None]);
        faults.order(order(r#"{"handshake":{"fault":"garbled"}}"#));
        assert_eq!(faults.upgrade_failure(), None);
        assert_eq!(faults.handshake_failure(), Some(HandshakeFault::Garbled));
        assert_eq!(faults.handshake_failure(), None);
    }

    #[test]
    fn queries_are_refused_by_name_or_all() {
        let faults = Faults::new(1);
        let any = phone("15550000001");
        faults.order(order(r#"{"refuse_iq":{"queries":["encrypt"],"code":503}}"#));
        assert_eq!(faults.refuses(&any, "encrypt:digest"), Some(503));
        assert_eq!(faults.refuses(&any, "usync:usync"), None);
        faults.order(order(r#"{"refuse_iq":{"queries":["*"],"code":500}}"#));
        assert_eq!(faults.refuses(&any, "usync:usync"), Some(500));
    }

    #[test]
    fn chance_is_the_same_for_the_same_seed() {
        let draw = |seed| {
            let faults = Faults::new(seed);
            faults.order(order(r#"{"drop_acks":1000,"chance":0.5}"#));
            (0..64).map(|_| faults.drops_ack(&phone("15550000001"))).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }
}
