//! An account: one person's phone (device 0) and the devices linked to it, with the signatures that bind them.

use crate::sandbox::address::{DeviceAddress, Namespace, PhoneNumber};
use crate::sandbox::backlog::Backlog;
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::link::Link;
use crate::sandbox::persistence::{base64_bytes, base64_list};
use crate::sandbox::phone::{Person, StoredPerson};
use crate::sandbox::signal_store::{Bundle, SignedKey};
use crate::sandbox::stanza;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};
use whatsapp_rust::buffa::Message as _;
use whatsapp_rust::wacore_binary::{Node, OwnedNodeRef, marshal};
use whatsapp_rust::waproto::whatsapp::{
    ADVDeviceIdentity, ADVKeyIndexList, ADVSignedDeviceIdentity, ADVSignedKeyIndexList,
};

/// Devices one account may have linked at the same time.
const LINKED_LIMIT: usize = 32;
const ACCOUNT_SIGNATURE: [u8; 2] = [6, 0];
const DEVICE_SIGNATURE: [u8; 2] = [6, 1];
const KEY_INDEX_SIGNATURE: [u8; 2] = [6, 2];

/// An account behind its own lock.
pub struct Account {
    /// Its number.
    pub phone: PhoneNumber,
    /// Set when the state differs from its file.
    pub dirty: AtomicBool,
    saving: Mutex<()>,
    turn: Mutex<()>,
    state: Mutex<AccountState>,
}

/// What an account consists of.
pub struct AccountState {
    /// Device 0.
    pub person: Person,
    /// Devices 1 and up.
    pub companions: BTreeMap<u16, Companion>,
    raw_id: u32,
    next_device: u16,
    next_key_index: u32,
}

/// A linked device as the server knows it.
pub struct Companion {
    /// Its place in the account's signed list.
    pub key_index: u32,
    /// Chosen by the device.
    pub registration_id: u32,
    /// Public identity key.
    pub identity: [u8; 32],
    /// Static Noise key; a login with another one is refused.
    pub noise: [u8; 32],
    /// Signed prekey.
    pub signed: SignedKey,
    /// One-time prekeys nobody has taken yet.
    pub prekeys: VecDeque<(u32, [u8; 32])>,
    /// The ADV identity, signed by phone and device.
    pub device_identity: Vec<u8>,
    /// The phone still has to share its app-state key.
    pub wants_keys: bool,
    /// What the device has not acknowledged.
    pub backlog: Backlog,
    /// The live connection.
    pub link: Option<Arc<Link>>,
}

/// What a device says about itself when it is linked.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Chosen by the device.
    pub registration_id: u32,
    /// Public identity key.
    pub identity: [u8; 32],
    /// Static Noise key.
    pub noise: [u8; 32],
    /// Signed prekey.
    pub signed: SignedKey,
}

/// The signed device list of an account.
pub struct Listing {
    /// Device and key index of every linked device.
    pub companions: Vec<(u16, u32)>,
    /// The encoded `ADVSignedKeyIndexList`.
    pub key_index_list: Vec<u8>,
    /// Its timestamp.
    pub at: u64,
}

/// A place kept for a device that is being linked.
#[derive(Debug, Clone)]
pub struct Place {
    /// The device's number.
    pub device: u16,
    /// Its key index.
    pub key_index: u32,
    /// The identity the phone has signed; the device adds its own signature.
    pub identity: ADVSignedDeviceIdentity,
}

/// The stored form of an account.
#[derive(Serialize, Deserialize)]
pub struct StoredAccount {
    phone: PhoneNumber,
    person: StoredPerson,
    companions: BTreeMap<u16, StoredCompanion>,
    raw_id: u32,
    next_device: u16,
    next_key_index: u32,
}

#[derive(Serialize, Deserialize)]
struct StoredCompanion {
    key_index: u32,
    registration_id: u32,
    identity: [u8; 32],
    noise: [u8; 32],
    signed: SignedKey,
    prekeys: VecDeque<(u32, [u8; 32])>,
    #[serde(with = "base64_bytes")]
    device_identity: Vec<u8>,
    wants_keys: bool,
    #[serde(with = "base64_list")]
    backlog: Vec<Vec<u8>>,
}

impl Account {
    /// A person who has just bought a phone.
    pub fn new(phone: PhoneNumber) -> Result<Self> {
        let state = AccountState {
            person: Person::new(phone.clone())?,
            companions: BTreeMap::new(),
            raw_id: rand::random::<u32>() >> 1,
            next_device: 1,
            next_key_index: 1,
        };
        Ok(Self::assemble(phone, true, state))
    }

    fn assemble(phone: PhoneNumber, dirty: bool, state: AccountState) -> Self {
        let (saving, turn) = (Mutex::new(()), Mutex::new(()));
        Self { phone, dirty: AtomicBool::new(dirty), saving, turn, state: Mutex::new(state) }
    }

    /// Keeps two writers of the account's file apart, from taking the state to replacing the file.
    pub fn saving(&self) -> MutexGuard<'_, ()> {
        self.saving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the state. Never held while another account's is taken.
    pub fn state(&self) -> MutexGuard<'_, AccountState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what the phone does by itself in one order from sealing to delivery. Taken before any state, never inside.
    pub fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a stored account.
    pub fn restore(stored: StoredAccount) -> Result<Self> {
        let mut companions = BTreeMap::new();
        for (device, companion) in stored.companions {
            companions.insert(device, companion.restore()?);
        }
        let state = AccountState {
            person: Person::restore(stored.phone.clone(), stored.person)?,
            companions,
            raw_id: stored.raw_id,
            next_device: stored.next_device,
            next_key_index: stored.next_key_index,
        };
        Ok(Self::assemble(stored.phone, false, state))
    }

    /// The form to store.
    pub fn stored(&self) -> Result<StoredAccount> {
        let state = self.state();
        let companions = state.companions.iter().map(|(device, companion)| Ok((*device, companion.stored()?)));
        Ok(StoredAccount {
            phone: self.phone.clone(),
            person: state.person.stored()?,
            companions: companions.collect::<Result<_>>()?,
            raw_id: state.raw_id,
            next_device: state.next_device,
            next_key_index: state.next_key_index,
        })
    }

    /// Both spellings of one device.
    pub fn jids(&self, device: u16) -> [whatsapp_rust::Jid; 2] {
        let address = DeviceAddress::new(self.phone.clone(), device);
        [Namespace::Phone.device(&address), Namespace::Hidden.device(&address)]
    }
}

impl AccountState {
    /// Keeps a place for a device with this identity key and signs for it.
    pub fn reserve(&mut self, identity: &[u8; 32]) -> Result<Place> {
        if self.companions.len() >= LINKED_LIMIT {
            return Err(SandboxError::Full("linked devices of this phone"));
        }
        let (device, key_index) = (self.next_device, self.next_key_index);
        let details = ADVDeviceIdentity {
            raw_id: Some(self.raw_id),
            timestamp: Some(stanza::now()),
            key_index: Some(key_index),
            ..Default::default()
        }
        .encode_to_vec();
        let signature = self.sign(&ACCOUNT_SIGNATURE, &[&details, identity])?;
        self.next_device += 1;
        self.next_key_index += 1;
        let identity = ADVSignedDeviceIdentity {
            details: Some(details),
            account_signature_key: Some(self.person.signal.identity().public_key.public_key_bytes().to_vec()),
            account_signature: Some(signature),
            ..Default::default()
        };
        Ok(Place { device, key_index, identity })
    }

    fn sign(&self, prefix: &[u8], parts: &[&[u8]]) -> Result<Vec<u8>> {
        let message = [&[prefix], parts].concat().concat();
        let signature = self.person.signal.identity().private_key.calculate_signature(&message, &mut rand::rng())?;
        Ok(signature.to_vec())
    }

    /// The signed list of devices.
    pub fn listing(&self) -> Result<Listing> {
        let companions = self.companions.iter().map(|(device, companion)| (*device, companion.key_index));
        let companions: Vec<(u16, u32)> = companions.collect();
        let at = stanza::now();
        let details = ADVKeyIndexList {
            raw_id: Some(self.raw_id),
            timestamp: Some(at),
            current_index: Some(self.next_key_index - 1),
            valid_indexes: std::iter::once(0).chain(companions.iter().map(|(_, key_index)| *key_index)).collect(),
            ..Default::default()
        }
        .encode_to_vec();
        let signature = self.sign(&KEY_INDEX_SIGNATURE, &[&details])?;
        let signed =
            ADVSignedKeyIndexList { details: Some(details), account_signature: Some(signature), ..Default::default() };
        Ok(Listing { companions, key_index_list: signed.encode_to_vec(), at })
    }
}

/// The bytes a device signs to accept its place.
pub fn device_signature_input(identity: &ADVSignedDeviceIdentity, device_key: &[u8; 32]) -> Vec<u8> {
    let details = identity.details.as_deref().unwrap_or_default();
    let account = identity.account_signature_key.as_deref().unwrap_or_default();
    [&DEVICE_SIGNATURE, details, device_key, account].concat()
}

impl Companion {
    /// A device that has just taken its place.
    pub fn new(key_index: u32, registration: Registration, device_identity: Vec<u8>, wants_keys: bool) -> Self {
        Self {
            key_index,
            registration_id: registration.registration_id,
            identity: registration.identity,
            noise: registration.noise,
            signed: registration.signed,
            prekeys: VecDeque::new(),
            device_identity,
            wants_keys,
            backlog: Backlog::default(),
            link: None,
        }
    }

    /// Keys for someone who wants to write to this device; uses up a one-time prekey.
    pub fn bundle(&mut self) -> Bundle {
        Bundle {
            registration_id: self.registration_id,
            identity: self.identity,
            signed: self.signed.clone(),
            one_time: self.prekeys.pop_front(),
            device_identity: Some(self.device_identity.clone()),
        }
    }

    fn stored(&self) -> Result<StoredCompanion> {
        let backlog = self.backlog.nodes().map(marshal).collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(StoredCompanion {
            key_index: self.key_index,
            registration_id: self.registration_id,
            identity: self.identity,
            noise: self.noise,
            signed: self.signed.clone(),
            prekeys: self.prekeys.clone(),
            device_identity: self.device_identity.clone(),
            wants_keys: self.wants_keys,
            backlog,
        })
    }
}

impl StoredCompanion {
    fn restore(self) -> Result<Companion> {
        let mut backlog = Backlog::default();
        for bytes in self.backlog {
            backlog.push(decode(bytes)?);
        }
        Ok(Companion {
            key_index: self.key_index,
            registration_id: self.registration_id,
            identity: self.identity,
            noise: self.noise,
            signed: self.signed,
            prekeys: self.prekeys,
            device_identity: self.device_identity,
            wants_keys: self.wants_keys,
            backlog,
            link: None,
        })
    }
}

fn decode(mut marshalled: Vec<u8>) -> Result<Node> {
    if marshalled.is_empty() {
        return Err(SandboxError::Malformed("stored stanza"));
    }
    // The first byte says that the rest is not compressed.
    marshalled.remove(0);
    Ok(OwnedNodeRef::new(marshalled)?.to_owned_node())
}
