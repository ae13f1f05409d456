//! What the sandbox has seen, for assertions: how many connections a number had at once, and whether any Signal
//! message key was ever used twice.

use crate::sandbox::address::{DeviceAddress, PhoneNumber};
use crate::sandbox::phone::Delivery;
use crate::sandbox::stanza::{attr, bytes};
use serde::Serialize;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use whatsapp_rust::wacore::libsignal::protocol::{PreKeySignalMessage, SignalMessage};

/// Message keys remembered per generation and shard; two generations are searched.
const KEYS_PER_SHARD: usize = 65_536;
const SHARDS: usize = 32;

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts up.
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters.
#[derive(Default)]
pub struct Stats {
    /// WebSockets accepted.
    pub accepted: Counter,
    /// Completed logins.
    pub logins: Counter,
    /// Logins by Noise IK.
    pub logins_by_ik: Counter,
    /// Logins refused.
    pub logins_refused: Counter,
    /// Devices linked.
    pub linked: Counter,
    /// Stanzas from clients.
    pub stanzas_in: Counter,
    /// Stanzas to clients.
    pub stanzas_out: Counter,
    /// `<message>` from clients.
    pub messages: Counter,
    /// `<message>` from phones.
    pub messages_from_phones: Counter,
    /// `<receipt>` from clients.
    pub receipts: Counter,
    /// Retry receipts from clients.
    pub retry_receipts: Counter,
    /// Retry receipts from phones.
    pub retry_receipts_from_phones: Counter,
    /// Messages refused with an error in their ack.
    pub nacks: Counter,
    /// Queries answered with "not implemented".
    pub unknown_queries: Counter,
    /// Second logins of a device that was still connected.
    pub conflicts: Counter,
    /// Stanzas dropped because a device's backlog was full.
    pub backlog_overflows: Counter,
    keys: Keys,
    connections: Mutex<HashMap<DeviceAddress, Connections>>,
}

#[derive(Debug, Default, Clone, Copy, Serialize)]
struct Connections {
    now: u32,
    most_at_once: u32,
    logins: u64,
}

#[derive(Default)]
struct Keys {
    shards: [Mutex<Generations>; SHARDS],
    inspected: Counter,
    reused: Counter,
    identical: Counter,
}

#[derive(Default)]
struct Generations {
    young: HashMap<u64, u64>,
    old: HashMap<u64, u64>,
}

/// Counts one connection until it is dropped.
pub struct Presence {
    stats: Arc<Stats>,
    device: DeviceAddress,
}

impl Drop for Presence {
    fn drop(&mut self) {
        let mut connections = self.stats.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connections) = connections.get_mut(&self.device) {
            connections.now = connections.now.saturating_sub(1);
        }
    }
}

fn digest(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl Keys {
    /// Records a key and what it sealed.
    fn record(&self, key: u64, sealed: u64) {
        self.inspected.add(1);
        let shard = &self.shards[key as usize % SHARDS];
        let mut generations = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let known = generations.young.get(&key).or_else(|| generations.old.get(&key)).copied();
        match known {
            Some(before) if before == sealed => self.identical.add(1),
            Some(_) => self.reused.add(1),
            None => {}
        }
        if generations.young.len() >= KEYS_PER_SHARD {
            generations.old = std::mem::take(&mut generations.young);
        }
        generations.young.insert(key, sealed);
    }
}

impl Stats {
    /// Counts a login; the connection counts until the guard is dropped.
    pub fn arrived(self: &Arc<Self>, device: &DeviceAddress) -> Presence {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = connections.entry(device.clone()).or_default();
        entry.now += 1;
        entry.logins += 1;
        entry.most_at_once = entry.most_at_once.max(entry.now);
        Presence { stats: Arc::clone(self), device: device.clone() }
    }

    /// Looks into every Signal envelope of a stanza for a message key seen before.
    pub fn inspect(&self, delivery: &Delivery) {
        for enc in delivery.node.get_children_by_tag("enc") {
            let content = bytes(enc).unwrap_or_default();
            let prekey = attr(enc, "type").is_some_and(|kind| kind == "pkmsg");
            let parsed = match prekey {
                true => PreKeySignalMessage::try_from(&content[..]).map(|message| message.message().clone()),
                false => SignalMessage::try_from(&content[..]),
            };
            let Ok(message) = parsed else { continue };
            let ratchet = message.sender_ratchet_key().public_key_bytes().to_vec();
            let key = digest((&delivery.from, &delivery.to, ratchet, message.counter()));
            self.keys.record(key, digest(message.serialized()));
        }
    }

    /// The report of `GET /admin/stats`; `whose` adds the connections of one number.
    pub fn report(&self, whose: Option<&PhoneNumber>) -> serde_json::Value {
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let mut devices = BTreeMap::new();
        let (mut now, mut most, mut doubled) = (0, 0, 0);
        for (device, connection) in connections.iter() {
            now += connection.now;
            most = most.max(connection.most_at_once);
            doubled += u32::from(connection.most_at_once > 1);
            if whose.is_some_and(|phone| *phone == device.phone) {
                devices.insert(device.device, *connection);
            }
        }
        serde_json::json!({
            "connections_now": now,
            "devices_seen": connections.len(),
            "most_at_once": most,
            "devices_connected_twice": doubled,
            "devices": devices,
            "accepted": self.accepted.get(),
            "logins": self.logins.get(),
            "logins_by_ik": self.logins_by_ik.get(),
            "logins_refused": self.logins_refused.get(),
            "linked": self.linked.get(),
            "stanzas_in": self.stanzas_in.get(),
            "stanzas_out": self.stanzas_out.get(),
            "messages": self.messages.get(),
            "messages_from_phones": self.messages_from_phones.get(),
            "receipts": self.receipts.get(),
            "retry_receipts": self.retry_receipts.get(),
            "retry_receipts_from_phones": self.retry_receipts_from_phones.get(),
            "nacks": self.nacks.get(),
            "unknown_queries": self.unknown_queries.get(),
            "conflicts": self.conflicts.get(),
            "backlog_overflows": self.backlog_overflows.get(),
            "signal_keys_inspected": self.keys.inspected.get(),
            "signal_keys_reused": self.keys.reused.get(),
            "signal_identical_resent": self.keys.identical.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_seal_one_thing_only() {
        let keys = Keys::default();
        keys.record(1, 10);
        keys.record(2, 20);
        keys.record(1, 10);
        assert_eq!((keys.reused.get(), keys.identical.get()), (0, 1));
        keys.record(1, 11);
        assert_eq!((keys.reused.get(), keys.inspected.get()), (1, 4));
    }

    #[test]
    fn connections_are_counted_per_device() {
        let stats = Arc::new(Stats::default());
        let phone = PhoneNumber::parse("15550000001").expect("plausible");
        let device = DeviceAddress::new(phone.clone(), 1);
        let first = stats.arrived(&device);
        let second = stats.arrived(&device);
        drop((first, second));
        let report = stats.report(Some(&phone));
        assert_eq!(report["connections_now"], 0);
        assert_eq!(report["devices"]["1"]["most_at_once"], 2);
        assert_eq!(report["devices_connected_twice"], 1);
    }
}
