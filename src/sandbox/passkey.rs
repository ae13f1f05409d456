//! Linking behind a passkey, the server's and the phone's side: a WebAuthn request instead of pair-success, then an
//! exchange of ephemeral keys of which both show a code, then the device's secret sealed for the phone. Shape and
//! mathematics as in the library's `wacore::shortcake`.

use crate::sandbox::address::PhoneNumber;
use crate::sandbox::authenticator::RELYING_PARTY;
use crate::sandbox::certificate::public_bytes;
use crate::sandbox::connection::Reaction;
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::pairing::{Slot, sign};
use crate::sandbox::stanza::{self, SERVER, child_bytes, fresh_id, tag};
use crate::sandbox::world::World;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;
use std::sync::PoisonError;
use std::time::{Duration, Instant};
use whatsapp_rust::buffa::Message as _;
use whatsapp_rust::wacore::libsignal::crypto::aes_256_gcm_decrypt;
use whatsapp_rust::wacore::libsignal::protocol::KeyPair;
use whatsapp_rust::wacore::shortcake::ShortcakeUtils;
use whatsapp_rust::wacore_binary::Node;
use whatsapp_rust::waproto::whatsapp::device_props::PlatformType;
use whatsapp_rust::waproto::whatsapp::{
    CompanionEphemeralIdentity, EncryptedPairingRequest, PairingRequest, PrimaryEphemeralIdentity, ProloguePayload,
};

/// How long the phone takes for its part. Clients expect what it does only after the answer to theirs.
const PHONE_TAKES: Duration = Duration::from_millis(150);
/// How long a phone waits for what follows the person's proof.
const PROVED_AT_MOST: Duration = Duration::from_secs(600);
/// Digits and letters in each half of a code.
const CODE_GROUP: usize = 4;

/// How far asking for a passkey has come on one connection.
#[derive(Default)]
pub enum Ceremony {
    /// Nobody asks, or it has ended.
    #[default]
    None,
    /// The person is to unlock it.
    Asked(Asked),
    /// The person did; the phone has shown its key and waits for the device's nonce.
    Proved(Box<Proved>),
    /// Both show the code.
    Revealed(Box<Revealed>),
}

/// The person is to unlock it.
pub struct Asked {
    whose: Whose,
    challenge: [u8; 32],
    reference: String,
    until: Instant,
}

/// The person did.
pub struct Proved {
    whose: Whose,
    reference: String,
    device: DeviceEphemeral,
    ephemeral: KeyPair,
    nonce: [u8; 32],
    until: Instant,
}

/// Both show the code.
pub struct Revealed {
    whose: Whose,
    key: [u8; 32],
    until: Instant,
}

/// The account that the device is to be linked to.
struct Whose {
    phone: PhoneNumber,
    hidden_addressing: bool,
}

/// What the device shows of itself before it reveals its nonce.
struct DeviceEphemeral {
    identity: Vec<u8>,
    public: [u8; 32],
    platform: PlatformType,
    commitment: [u8; 32],
}

impl Ceremony {
    /// Until when something is waited for.
    pub fn until(&self) -> Option<Instant> {
        match self {
            Self::None => None,
            Self::Asked(asked) => Some(asked.until),
            Self::Proved(proved) => Some(proved.until),
            Self::Revealed(revealed) => Some(revealed.until),
        }
    }
}

impl DeviceEphemeral {
    fn read(prologue: &[u8], reference: &str) -> Result<Self> {
        let prologue = ProloguePayload::decode_from_slice(prologue)?;
        let identity = prologue.companion_ephemeral_identity.ok_or(SandboxError::Malformed("ephemeral identity"))?;
        let hash = prologue.commitment.into_option().and_then(|commitment| commitment.hash);
        let read = CompanionEphemeralIdentity::decode_from_slice(&identity)?;
        if read.r#ref.as_deref() != Some(reference) {
            return Err(SandboxError::Conflict("another reference"));
        }
        let malformed = SandboxError::Malformed("ephemeral identity");
        let public = read.public_key.as_deref().and_then(stanza::key);
        let commitment = hash.as_deref().and_then(stanza::key);
        let (Some(public), Some(commitment), Some(platform)) = (public, commitment, read.device_type) else {
            return Err(malformed);
        };
        Ok(Self { identity, public, platform, commitment })
    }
}

/// Asks the device for the account's passkey, in place of linking it.
pub fn demand(slot: &Slot, phone: &PhoneNumber, hidden_addressing: bool, patience: Duration) -> Result<()> {
    let challenge: [u8; 32] = rand::random();
    let options = json!({
        "challenge": URL_SAFE_NO_PAD.encode(challenge),
        "timeout": u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
        "rpId": RELYING_PARTY,
        "allowCredentials": [],
        "userVerification": "required",
    });
    let request = tag("passkey_request_options").bytes(options.to_string().into_bytes()).build();
    let asked = Asked {
        whose: Whose { phone: phone.clone(), hidden_addressing },
        challenge,
        reference: fresh_id("4R"),
        until: Instant::now() + patience,
    };
    *slot.passkey.lock().unwrap_or_else(PoisonError::into_inner) = Ceremony::Asked(asked);
    if slot.link.post(notification("passkey_prologue_request", request)) {
        Ok(())
    } else {
        Err(SandboxError::Full("the device does not read"))
    }
}

fn notification(kind: &'static str, content: Node) -> Node {
    tag("notification")
        .attr("from", SERVER)
        .attr("id", fresh_id("pair-"))
        .attr("type", kind)
        .attr("t", stanza::now())
        .children([content])
        .build()
}

/// Takes a step of the device's side; `None` when the query is about something else. Whoever fails must begin again.
pub fn react(world: &World, slot: &Slot, iq: &Node) -> Option<Vec<Reaction>> {
    let step = ["ref", "passkey_prologue", "companion_nonce", "encrypted_pairing_request"];
    let step = step.into_iter().find_map(|name| iq.get_optional_child(name))?;
    let mut ceremony = slot.passkey.lock().unwrap_or_else(PoisonError::into_inner);
    let taken = take(world, slot, std::mem::take(&mut *ceremony), step);
    let (next, content, phone_says) = match taken {
        Ok(taken) => taken,
        Err(error) => {
            tracing::debug!(%error, "a passkey did not link a device");
            return Some(vec![Reaction::Reply(stanza::failure(iq, 403, "forbidden"))]);
        }
    };
    *ceremony = next;
    let later = phone_says.map(|node| Reaction::ReplyAfter { pause: PHONE_TAKES, node });
    Some(std::iter::once(Reaction::Reply(stanza::result(iq, content))).chain(later).collect())
}

/// What comes next, what the query is answered with, and what the phone says then.
type Taken = (Ceremony, Option<Node>, Option<Node>);

fn take(world: &World, slot: &Slot, ceremony: Ceremony, step: &Node) -> Result<Taken> {
    if ceremony.until().is_some_and(|until| Instant::now() > until) {
        return Err(SandboxError::Conflict("too late"));
    }
    match (step.tag.as_ref(), ceremony) {
        ("ref", Ceremony::Asked(asked)) => {
            let reference = tag("ref").bytes(asked.reference.as_bytes()).build();
            Ok((Ceremony::Asked(asked), Some(reference), None))
        }
        ("passkey_prologue", Ceremony::Asked(asked)) => {
            let (proved, shown) = prove(world, asked, step)?;
            Ok((Ceremony::Proved(Box::new(proved)), None, Some(shown)))
        }
        ("companion_nonce", Ceremony::Proved(proved)) => {
            let revealed = reveal(world, *proved, step)?;
            Ok((Ceremony::Revealed(Box::new(revealed)), None, None))
        }
        ("encrypted_pairing_request", Ceremony::Revealed(revealed)) => {
            let success = open(world, slot, &revealed, step)?;
            Ok((Ceremony::None, None, Some(success)))
        }
        _ => Err(SandboxError::Conflict("not the time for it")),
    }
}

/// The server checks the person's proof, then the phone answers with its own ephemeral key.
fn prove(world: &World, asked: Asked, prologue: &Node) -> Result<(Proved, Node)> {
    let part = |name| child_bytes(prologue, name).ok_or(SandboxError::Malformed("prologue"));
    let (credential, assertion) = (part("credential_id")?, part("webauthn_assertion")?);
    world.passkeys.verify(&asked.whose.phone, &asked.challenge, &credential, &assertion)?;
    let device = DeviceEphemeral::read(&part("prologue_payload")?, &asked.reference)?;
    let (ephemeral, nonce) = (KeyPair::generate(&mut rand::rng()), rand::random::<[u8; 32]>());
    let shown =
        PrimaryEphemeralIdentity { public_key: Some(public_bytes(&ephemeral)?.to_vec()), nonce: Some(nonce.to_vec()) };
    let shown = tag("primary_ephemeral_identity").bytes(shown.encode_to_vec()).build();
    let until = Instant::now() + PROVED_AT_MOST;
    let proved = Proved { whose: asked.whose, reference: asked.reference, device, ephemeral, nonce, until };
    Ok((proved, notification("crsc_continuation", shown)))
}

/// The device keeps what it was committed to, and the phone shows the code.
fn reveal(world: &World, proved: Proved, nonce: &Node) -> Result<Revealed> {
    let nonce = stanza::bytes(nonce).and_then(|bytes| stanza::key(&bytes));
    let nonce = nonce.ok_or(SandboxError::Malformed("nonce"))?;
    let Proved { whose, reference, device, ephemeral, nonce: own_nonce, until } = proved;
    if ShortcakeUtils::commitment_hash(&device.identity, &nonce) != device.commitment {
        return Err(SandboxError::Conflict("the device was committed to another nonce"));
    }
    let code = ShortcakeUtils::derive_verification_code(&nonce, &public_bytes(&ephemeral)?, &own_nonce);
    let (first, second) = code.split_at_checked(CODE_GROUP).ok_or(SandboxError::Malformed("code"))?;
    world.passkeys.show(&whose.phone, format!("{first}-{second}"))?;
    let key = ShortcakeUtils::derive_encryption_key(&ephemeral, &device.public, device.platform, &reference);
    let key = key.map_err(|_| SandboxError::Malformed("ephemeral key"))?;
    Ok(Revealed { whose, key, until })
}

/// The phone opens the device's secret and links it.
fn open(world: &World, slot: &Slot, revealed: &Revealed, sealed: &Node) -> Result<Node> {
    let sealed = stanza::bytes(sealed).ok_or(SandboxError::Malformed("pairing request"))?;
    let sealed = EncryptedPairingRequest::decode_from_slice(&sealed)?;
    let iv: Option<[u8; 12]> = sealed.iv.as_deref().and_then(|iv| iv.try_into().ok());
    let (Some(iv), Some(payload)) = (iv, sealed.encrypted_payload) else {
        return Err(SandboxError::Malformed("pairing request"));
    };
    let mut request = Vec::new();
    aes_256_gcm_decrypt(&revealed.key, &iv, b"", &payload, &mut request)
        .map_err(|_| SandboxError::Conflict("sealed with another key"))?;
    let request = PairingRequest::decode_from_slice(&request)?;
    let names = |key: &Option<Vec<u8>>, expected: &[u8; 32]| key.as_deref() == Some(expected.as_slice());
    if !names(&request.companion_public_key, &slot.registration.noise)
        || !names(&request.companion_identity_key, &slot.registration.identity)
    {
        return Err(SandboxError::Conflict("the request is for another device"));
    }
    let secret = request.adv_secret.ok_or(SandboxError::Malformed("pairing request"))?;
    let Whose { phone, hidden_addressing } = &revealed.whose;
    sign(world, slot, phone, &secret, *hidden_addressing).map(|(_, success)| success)
}
