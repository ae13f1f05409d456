//! The Signal state of one simulated phone: identity, prekeys, one session per device it has talked to.
//!
//! Everything is in memory, so the library's async traits never wait and are driven to their end synchronously; that
//! lets a phone live behind a plain mutex.

use crate::sandbox::address::DeviceAddress;
use crate::sandbox::certificate::{key_pair, public_bytes};
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::persistence::{base64_bytes, base64_map};
use crate::sandbox::stanza;
use async_trait::async_trait;
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use whatsapp_rust::wacore::libsignal::protocol::{
    self as signal, CiphertextMessage, CiphertextMessageType, DeviceId, Direction, GenericSignedPreKey, IdentityChange,
    IdentityKey, IdentityKeyPair, IdentityKeyStore, KeyPair, PreKeyBundle, PreKeyId, PreKeyRecord, PreKeySignalMessage,
    PreKeyStore, ProtocolAddress, PublicKey, SessionRecord, SessionStore, SignalMessage, SignalProtocolError,
    SignedPreKeyId, SignedPreKeyRecord, SignedPreKeyStore, Timestamp, UsePQRatchet,
};

/// One-time prekeys handed out and not yet used; the oldest is forgotten beyond it.
const ONE_TIME_LIMIT: usize = 512;
const SIGNED_PREKEY_ID: u32 = 1;

type SignalResult<T> = std::result::Result<T, SignalProtocolError>;

/// The Signal state of a phone.
pub struct SignalStore {
    identity: KeyPair,
    registration_id: u32,
    signed_prekey: KeyPair,
    signed_prekey_signature: Vec<u8>,
    one_time: BTreeMap<u32, KeyPair>,
    next_one_time: u32,
    sessions: HashMap<String, SessionRecord>,
    identities: HashMap<String, IdentityKey>,
    lease_raised: bool,
}

/// The stored form of a [`SignalStore`].
#[derive(Serialize, Deserialize)]
pub struct StoredSignal {
    #[serde(with = "base64_bytes")]
    identity: Vec<u8>,
    registration_id: u32,
    #[serde(with = "base64_bytes")]
    signed_prekey: Vec<u8>,
    #[serde(with = "base64_map")]
    one_time: BTreeMap<u32, Vec<u8>>,
    next_one_time: u32,
    #[serde(with = "base64_map")]
    sessions: BTreeMap<String, Vec<u8>>,
    #[serde(with = "base64_map")]
    identities: BTreeMap<String, Vec<u8>>,
}

/// The keys a device shows to someone who wants to write to it for the first time.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Distinguishes re-installations.
    pub registration_id: u32,
    /// Public identity key.
    pub identity: [u8; 32],
    /// Signed prekey.
    pub signed: SignedKey,
    /// One-time prekey.
    pub one_time: Option<(u32, [u8; 32])>,
    /// The ADV identity of a companion; a phone has none.
    pub device_identity: Option<Vec<u8>>,
}

/// A published signed prekey.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SignedKey {
    /// Its id.
    pub id: u32,
    /// Public half.
    pub key: [u8; 32],
    /// By the identity key.
    #[serde(with = "base64_bytes")]
    pub signature: Vec<u8>,
}

/// A ciphertext and the `type` its `<enc>` carries.
pub struct Sealed {
    /// `pkmsg` or `msg`.
    pub kind: &'static str,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Drives a future that cannot wait.
fn settle<T>(future: impl Future<Output = SignalResult<T>>) -> Result<T> {
    let settled = future.now_or_never().ok_or(SandboxError::Malformed("an in-memory store waited"))?;
    Ok(settled?)
}

fn address(device: &DeviceAddress) -> ProtocolAddress {
    ProtocolAddress::new(&device.session_name(), DeviceId::from(0))
}

fn sign(identity: &KeyPair, key: &KeyPair) -> Result<Vec<u8>> {
    let signature = identity.private_key.calculate_signature(&key.public_key.serialize(), &mut rand::rng())?;
    Ok(signature.to_vec())
}

impl SignalStore {
    /// A new phone's state.
    pub fn generate() -> Result<Self> {
        let mut rng = rand::rng();
        let (identity, signed_prekey) = (KeyPair::generate(&mut rng), KeyPair::generate(&mut rng));
        let registration_id = rand::random::<u32>() & 0x3fff | 1;
        let signed_prekey_signature = sign(&identity, &signed_prekey)?;
        Ok(Self {
            identity,
            registration_id,
            signed_prekey,
            signed_prekey_signature,
            one_time: BTreeMap::new(),
            next_one_time: 1,
            sessions: HashMap::new(),
            identities: HashMap::new(),
            lease_raised: false,
        })
    }

    /// Reads a stored state. Sending chains skip what may already have been sent.
    pub fn restore(stored: StoredSignal) -> Result<Self> {
        let identity = key_pair(&stored.identity)?;
        let signed_prekey = key_pair(&stored.signed_prekey)?;
        let signed_prekey_signature = sign(&identity, &signed_prekey)?;
        let mut store = Self {
            identity,
            registration_id: stored.registration_id,
            signed_prekey,
            signed_prekey_signature,
            one_time: BTreeMap::new(),
            next_one_time: stored.next_one_time,
            sessions: HashMap::new(),
            identities: HashMap::new(),
            lease_raised: false,
        };
        for (id, private) in stored.one_time {
            store.one_time.insert(id, key_pair(&private)?);
        }
        for (name, bytes) in stored.sessions {
            store.sessions.insert(name, SessionRecord::deserialize(&bytes)?);
        }
        for (name, bytes) in stored.identities {
            store.identities.insert(name, PublicKey::from_djb_public_key_bytes(&bytes)?.into());
        }
        Ok(store)
    }

    /// The form to store.
    pub fn stored(&self) -> Result<StoredSignal> {
        let private = |pair: &KeyPair| pair.private_key.serialize().to_vec();
        let sessions = self.sessions.iter().map(|(name, record)| Ok((name.clone(), record.serialize()?)));
        let identities = self.identities.iter();
        Ok(StoredSignal {
            identity: private(&self.identity),
            registration_id: self.registration_id,
            signed_prekey: private(&self.signed_prekey),
            one_time: self.one_time.iter().map(|(id, pair)| (*id, private(pair))).collect(),
            next_one_time: self.next_one_time,
            sessions: sessions.collect::<SignalResult<_>>()?,
            identities: identities.map(|(name, key)| (name.clone(), raw(key.public_key()))).collect(),
        })
    }

    /// The identity, which is also the account's signature key.
    pub fn identity(&self) -> &KeyPair {
        &self.identity
    }

    /// Stays the same until the phone is reset.
    pub fn registration_id(&self) -> u32 {
        self.registration_id
    }

    /// Whether a message sent now would need no bundle.
    pub fn knows(&self, device: &DeviceAddress) -> bool {
        self.sessions.get(&device.session_name()).is_some_and(|record| record.session_state().is_some())
    }

    /// Forgets every session, as a phone restored from an old backup would.
    pub fn forget_sessions(&mut self) {
        self.sessions.clear();
    }

    /// Forgets the session with one device.
    pub fn forget(&mut self, device: &DeviceAddress) {
        self.sessions.remove(&device.session_name());
    }

    /// True once after a send raised a counter lease: the state must be stored before the ciphertext leaves.
    pub fn take_lease_raised(&mut self) -> bool {
        std::mem::take(&mut self.lease_raised)
    }

    /// Keys for someone who wants to write to this phone, with a fresh one-time prekey.
    pub fn bundle(&mut self) -> Result<Bundle> {
        let id = self.next_one_time;
        self.next_one_time = id % 0x00ff_fffe + 1;
        let pair = KeyPair::generate(&mut rand::rng());
        let one_time = (id, public_bytes(&pair)?);
        self.one_time.insert(id, pair);
        while self.one_time.len() > ONE_TIME_LIMIT {
            self.one_time.pop_first();
        }
        Ok(Bundle {
            registration_id: self.registration_id,
            identity: public_bytes(&self.identity)?,
            signed: SignedKey {
                id: SIGNED_PREKEY_ID,
                key: public_bytes(&self.signed_prekey)?,
                signature: self.signed_prekey_signature.clone(),
            },
            one_time: Some(one_time),
            device_identity: None,
        })
    }

    /// Starts a session with a device from its published keys.
    pub fn begin(&mut self, device: &DeviceAddress, bundle: &Bundle) -> Result<()> {
        let one_time = match &bundle.one_time {
            Some((id, key)) => Some((PreKeyId::from(*id), PublicKey::from_djb_public_key_bytes(key)?)),
            None => None,
        };
        let bundle = PreKeyBundle::new(
            bundle.registration_id,
            DeviceId::from(0),
            one_time,
            SignedPreKeyId::from(bundle.signed.id),
            PublicKey::from_djb_public_key_bytes(&bundle.signed.key)?,
            bundle.signed.signature.clone(),
            PublicKey::from_djb_public_key_bytes(&bundle.identity)?.into(),
        )?;
        let (mut sessions, mut identities, _) = self.views();
        let (mut rng, address) = (rand::rng(), address(device));
        let begun = signal::process_prekey_bundle(
            &address,
            &mut sessions,
            &mut identities,
            &bundle,
            &mut rng,
            UsePQRatchet::No,
        );
        settle(begun).map(drop)
    }

    /// Encrypts for a device with which there is a session.
    pub fn seal(&mut self, device: &DeviceAddress, plaintext: &[u8]) -> Result<Sealed> {
        let (mut sessions, mut identities, _) = self.views();
        let sealed = settle(signal::message_encrypt(plaintext, &address(device), &mut sessions, &mut identities))?;
        if let Some(record) = self.sessions.get_mut(&device.session_name())
            && record.has_pending_reservation()
        {
            record.clear_pending_reservation();
            self.lease_raised = true;
        }
        let kind = if sealed.message_type() == CiphertextMessageType::PreKey { "pkmsg" } else { "msg" };
        Ok(Sealed { kind, bytes: sealed.serialize().to_vec() })
    }

    /// Decrypts what a device has sent.
    pub fn open(&mut self, device: &DeviceAddress, kind: &str, bytes: &[u8]) -> Result<Vec<u8>> {
        let message = match kind {
            "pkmsg" => CiphertextMessage::PreKeySignalMessage(PreKeySignalMessage::try_from(bytes)?),
            "msg" => CiphertextMessage::SignalMessage(SignalMessage::try_from(bytes)?),
            _ => return Err(SandboxError::Malformed("unknown kind of ciphertext")),
        };
        let (mut sessions, mut identities, mut prekeys) = self.views();
        let signed = prekeys.signed_view();
        let mut rng = rand::rng();
        let opened = settle(signal::message_decrypt(
            &message,
            &address(device),
            &mut sessions,
            &mut identities,
            &mut prekeys,
            &signed,
            &mut rng,
            UsePQRatchet::No,
        ))?;
        if let Some(used) = opened.consumed_prekey_id {
            self.one_time.remove(&u32::from(used));
        }
        Ok(opened.plaintext)
    }

    /// The library wants its stores as separate mutable objects.
    fn views(&mut self) -> (Sessions<'_>, Identities<'_>, Prekeys<'_>) {
        let identities =
            Identities { own: &self.identity, registration_id: self.registration_id, known: &mut self.identities };
        let prekeys = Prekeys {
            one_time: &mut self.one_time,
            signed: &self.signed_prekey,
            signature: &self.signed_prekey_signature,
        };
        (Sessions(&mut self.sessions), identities, prekeys)
    }
}

fn raw(key: &PublicKey) -> Vec<u8> {
    key.public_key_bytes().to_vec()
}

/// True for the error a repeated ciphertext gives.
pub fn is_repeat(error: &SandboxError) -> bool {
    matches!(error, SandboxError::Signal(SignalProtocolError::DuplicatedMessage(..)))
}

/// Where the authentication code of a sealed message ends.
pub fn last_of_message(sealed: &[u8]) -> Option<usize> {
    let Ok(first) = PreKeySignalMessage::try_from(sealed) else { return sealed.len().checked_sub(1) };
    let message = first.message().serialized();
    let start = sealed.windows(message.len()).position(|window| window == message)?;
    (start + message.len()).checked_sub(1)
}

struct Sessions<'a>(&'a mut HashMap<String, SessionRecord>);

#[async_trait]
impl SessionStore for Sessions<'_> {
    async fn load_session(&self, address: &ProtocolAddress) -> SignalResult<Option<SessionRecord>> {
        Ok(self.0.get(address.name()).cloned())
    }

    async fn has_session(&self, address: &ProtocolAddress) -> SignalResult<bool> {
        Ok(self.0.contains_key(address.name()))
    }

    async fn store_session(&mut self, address: &ProtocolAddress, record: SessionRecord) -> SignalResult<()> {
        self.0.insert(address.name().to_owned(), record);
        Ok(())
    }
}

struct Identities<'a> {
    own: &'a KeyPair,
    registration_id: u32,
    known: &'a mut HashMap<String, IdentityKey>,
}

#[async_trait]
impl IdentityKeyStore for Identities<'_> {
    async fn get_identity_key_pair(&self) -> SignalResult<IdentityKeyPair> {
        Ok(self.own.clone().into())
    }

    async fn get_local_registration_id(&self) -> SignalResult<u32> {
        Ok(self.registration_id)
    }

    async fn save_identity(
        &mut self,
        address: &ProtocolAddress,
        identity: &IdentityKey,
    ) -> SignalResult<IdentityChange> {
        let before = self.known.insert(address.name().to_owned(), *identity);
        let changed = before.is_some_and(|before| before != *identity);
        Ok(if changed { IdentityChange::ReplacedExisting } else { IdentityChange::NewOrUnchanged })
    }

    /// A person trusts whoever writes: linking a device again must not need a ceremony.
    async fn is_trusted_identity(&self, _: &ProtocolAddress, _: &IdentityKey, _: Direction) -> SignalResult<bool> {
        Ok(true)
    }

    async fn get_identity(&self, address: &ProtocolAddress) -> SignalResult<Option<IdentityKey>> {
        Ok(self.known.get(address.name()).copied())
    }
}

struct Prekeys<'a> {
    one_time: &'a mut BTreeMap<u32, KeyPair>,
    signed: &'a KeyPair,
    signature: &'a [u8],
}

struct SignedView<'a> {
    pair: &'a KeyPair,
    signature: &'a [u8],
}

impl<'a> Prekeys<'a> {
    fn signed_view(&self) -> SignedView<'a> {
        SignedView { pair: self.signed, signature: self.signature }
    }
}

#[async_trait]
impl PreKeyStore for Prekeys<'_> {
    async fn get_pre_key(&self, id: PreKeyId) -> SignalResult<PreKeyRecord> {
        let pair = self.one_time.get(&u32::from(id)).ok_or(SignalProtocolError::InvalidPreKeyId)?;
        Ok(PreKeyRecord::new(id, pair))
    }

    async fn save_pre_key(&mut self, id: PreKeyId, record: &PreKeyRecord) -> SignalResult<()> {
        self.one_time.insert(u32::from(id), record.key_pair()?);
        Ok(())
    }

    async fn remove_pre_key(&mut self, id: PreKeyId) -> SignalResult<()> {
        self.one_time.remove(&u32::from(id));
        Ok(())
    }
}

#[async_trait]
impl SignedPreKeyStore for SignedView<'_> {
    async fn get_signed_pre_key(&self, id: SignedPreKeyId) -> SignalResult<SignedPreKeyRecord> {
        if u32::from(id) != SIGNED_PREKEY_ID {
            return Err(SignalProtocolError::InvalidSignedPreKeyId);
        }
        let created = Timestamp::from_epoch_millis(stanza::now() * 1_000);
        Ok(SignedPreKeyRecord::new(id, created, self.pair, self.signature))
    }

    async fn save_signed_pre_key(&mut self, _: SignedPreKeyId, _: &SignedPreKeyRecord) -> SignalResult<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::address::PhoneNumber;

    fn device(phone: &str) -> DeviceAddress {
        DeviceAddress::new(PhoneNumber::parse(phone).expect("plausible"), 0)
    }

    #[test]
    fn two_phones_talk_and_notice_a_repeat() {
        let (alice, bob) = (device("15550000001"), device("15550000002"));
        let mut of_alice = SignalStore::generate().expect("store");
        let mut of_bob = SignalStore::generate().expect("store");
        of_alice.begin(&bob, &of_bob.bundle().expect("bundle")).expect("session");
        let first = of_alice.seal(&bob, b"hello").expect("sealed");
        assert_eq!(first.kind, "pkmsg");
        assert!(of_alice.take_lease_raised());
        assert_eq!(of_bob.open(&alice, first.kind, &first.bytes).expect("opened"), b"hello");
        let repeat = of_bob.open(&alice, first.kind, &first.bytes).expect_err("a repeat");
        assert!(is_repeat(&repeat));
        let answer = of_bob.seal(&alice, b"hi").expect("sealed");
        assert_eq!(answer.kind, "msg");
        assert_eq!(of_alice.open(&bob, answer.kind, &answer.bytes).expect("opened"), b"hi");
    }

    #[test]
    fn a_restored_phone_goes_on_without_using_a_key_twice() {
        let (alice, bob) = (device("15550000001"), device("15550000002"));
        let mut of_alice = SignalStore::generate().expect("store");
        let mut of_bob = SignalStore::generate().expect("store");
        of_alice.begin(&bob, &of_bob.bundle().expect("bundle")).expect("session");
        let before = of_alice.seal(&bob, b"one").expect("sealed");
        let json = serde_json::to_string(&of_alice.stored().expect("stored")).expect("json");
        let after_store = of_alice.seal(&bob, b"two").expect("sealed");
        let mut restored = SignalStore::restore(serde_json::from_str(&json).expect("json")).expect("restored");
        let after_restart = restored.seal(&bob, b"three").expect("sealed");
        for (sealed, text) in [(before, "one"), (after_store, "two"), (after_restart, "three")] {
            assert_eq!(of_bob.open(&alice, sealed.kind, &sealed.bytes).expect("opened"), text.as_bytes());
        }
    }
}
