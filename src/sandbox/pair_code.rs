//! Linking by a code typed into the phone: both sides wrap an ephemeral key with the code, the device sends a bundle
//! only the right code opens, and both derive the secret that a QR code would have carried.

use crate::sandbox::address::{PhoneNumber, resolve};
use crate::sandbox::certificate::public_bytes;
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::pairing::{Slot, accept};
use crate::sandbox::stanza::{self, SERVER, attr, child_bytes, fresh_id, jid, tag};
use crate::sandbox::world::World;
use std::sync::{Arc, PoisonError};
use whatsapp_rust::wacore::crypto::hkdf_sha256_into;
use whatsapp_rust::wacore::libsignal::crypto::aes_256_gcm_decrypt;
use whatsapp_rust::wacore::libsignal::protocol::{KeyPair, PublicKey};
use whatsapp_rust::wacore::pair_code::PairCodeUtils;
use whatsapp_rust::wacore_binary::Node;

/// Numbers that devices want to be linked to at the same time.
const CODE_LIMIT: usize = 20_000;
const SALT: usize = 32;
const NONCE: usize = 12;
const KEY: usize = 32;
const BUNDLE_KEY: &[u8] = b"link_code_pairing_key_bundle_encryption_key";
const ADV_SECRET: &[u8] = b"adv_secret";

/// A device that shows a pairing code.
pub struct ShownCode {
    /// Its connection.
    pub slot: Arc<Slot>,
    reference: String,
    wrapped_ephemeral: Vec<u8>,
}

/// A phone's half of the exchange.
pub struct Exchange {
    phone: PhoneNumber,
    ephemeral: KeyPair,
    device_ephemeral: [u8; KEY],
    hidden_addressing: bool,
}

/// Answers a stage of the device's side.
pub fn answer(world: &World, slot: &Arc<Slot>, iq: &Node, stage: &Node) -> Node {
    let answered = match attr(stage, "stage").as_deref() {
        Some("companion_hello") => hello(world, slot, stage).map(|reference| {
            let reference = tag("link_code_pairing_ref").bytes(reference.as_bytes()).build();
            stanza::result(iq, [tag("link_code_companion_reg").children([reference]).build()])
        }),
        Some("companion_finish") => finish(world, slot, stage).map(|()| stanza::result(iq, [])),
        _ => Err(SandboxError::Malformed("stage")),
    };
    answered.unwrap_or_else(|error| {
        tracing::debug!(%error, "a pairing code did not work");
        stanza::failure(iq, 400, "bad-request")
    })
}

fn hello(world: &World, slot: &Arc<Slot>, stage: &Node) -> Result<String> {
    let wanted = jid(stage, "jid").as_ref().and_then(resolve).ok_or(SandboxError::Malformed("number to link"))?;
    let phone = wanted.0.phone;
    world.require(&phone)?;
    let wrapped = child_bytes(stage, "link_code_pairing_wrapped_companion_ephemeral_pub");
    let wrapped_ephemeral = wrapped.ok_or(SandboxError::Malformed("ephemeral key"))?.into_owned();
    let reference = fresh_id("3R");
    let shown = ShownCode { slot: Arc::clone(slot), reference: reference.clone(), wrapped_ephemeral };
    let mut codes = world.pairings.codes.lock().unwrap_or_else(PoisonError::into_inner);
    if codes.len() >= CODE_LIMIT && !codes.contains_key(&phone) {
        return Err(SandboxError::Full("pairing codes"));
    }
    codes.insert(phone, shown);
    Ok(reference)
}

/// The person enters a code on the phone. Slow by design: the code is stretched twice.
pub fn enter(world: &World, phone: &PhoneNumber, code: &str, hidden_addressing: bool) -> Result<()> {
    let code: String = code.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_uppercase();
    if !PairCodeUtils::validate_code(&code) {
        return Err(SandboxError::Malformed("pairing code"));
    }
    let (slot, reference, wrapped) = {
        let codes = world.pairings.codes.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = codes.get(phone).ok_or(SandboxError::NotFound("a device that shows a code for this number"))?;
        (Arc::clone(&shown.slot), shown.reference.clone(), shown.wrapped_ephemeral.clone())
    };
    let device_ephemeral = PairCodeUtils::decrypt_primary_ephemeral_pub(&wrapped, &code);
    let device_ephemeral = device_ephemeral.map_err(|_| SandboxError::Malformed("ephemeral key"))?;
    let ephemeral = KeyPair::generate(&mut rand::rng());
    let wrapped = PairCodeUtils::encrypt_ephemeral_pub(&public_bytes(&ephemeral)?, &code);
    let identity = public_bytes(world.require(phone)?.state().person.signal.identity())?;
    let exchange = Exchange { phone: phone.clone(), ephemeral, device_ephemeral, hidden_addressing };
    *slot.exchange.lock().unwrap_or_else(PoisonError::into_inner) = Some(exchange);
    let notification = tag("notification")
        .attr("from", SERVER)
        .attr("id", fresh_id("pair-"))
        .attr("type", "link_code_companion_reg")
        .attr("t", stanza::now())
        .children([tag("link_code_companion_reg")
            .attr("stage", "primary_hello")
            .children([
                tag("link_code_pairing_wrapped_primary_ephemeral_pub").bytes(wrapped).build(),
                tag("primary_identity_pub").bytes(identity).build(),
                tag("link_code_pairing_ref").bytes(reference.as_bytes()).build(),
            ])
            .build()])
        .build();
    if slot.link.post(notification) { Ok(()) } else { Err(SandboxError::Full("the device does not read")) }
}

fn finish(world: &World, slot: &Slot, stage: &Node) -> Result<()> {
    let exchange = slot.exchange.lock().unwrap_or_else(PoisonError::into_inner).take();
    let exchange = exchange.ok_or(SandboxError::Conflict("nobody has entered the code"))?;
    let wrapped = child_bytes(stage, "link_code_pairing_wrapped_key_bundle");
    let wrapped = wrapped.ok_or(SandboxError::Malformed("key bundle"))?;
    let device = PublicKey::from_djb_public_key_bytes(&slot.registration.identity)?;
    let account = world.require(&exchange.phone)?;
    let (own, shared_identity) = {
        let state = account.state();
        let identity = state.person.signal.identity();
        (public_bytes(identity)?, identity.calculate_agreement(&device)?)
    };
    let device_ephemeral = PublicKey::from_djb_public_key_bytes(&exchange.device_ephemeral)?;
    let shared_ephemeral = exchange.ephemeral.calculate_agreement(&device_ephemeral)?;
    let random = open_bundle(&wrapped, &shared_ephemeral, &slot.registration.identity, &own)?;
    let secret = derive(&[shared_ephemeral, shared_identity, random].concat(), None, ADV_SECRET)?;
    accept(world, slot, &exchange.phone, &secret, exchange.hidden_addressing).map(drop)
}

/// Opens the device's bundle: its identity key, the phone's identity key, and random bytes.
fn open_bundle(wrapped: &[u8], shared: &[u8; KEY], device: &[u8; KEY], own: &[u8; KEY]) -> Result<[u8; KEY]> {
    let malformed = SandboxError::Malformed("key bundle");
    let Some((salt, rest)) = wrapped.split_first_chunk::<SALT>() else {
        return Err(malformed);
    };
    let Some((nonce, sealed)) = rest.split_first_chunk::<NONCE>() else {
        return Err(malformed);
    };
    let key = derive(shared, Some(salt), BUNDLE_KEY)?;
    let mut bundle = Vec::new();
    aes_256_gcm_decrypt(&key, nonce, b"", sealed, &mut bundle).map_err(|_| SandboxError::Conflict("wrong code"))?;
    let (identities, random) = bundle.split_at_checked(2 * KEY).ok_or(malformed)?;
    if identities != [*device, *own].concat() {
        return Err(SandboxError::Conflict("the bundle is for somebody else"));
    }
    stanza::key(random).ok_or(SandboxError::Malformed("key bundle"))
}

fn derive(secret: &[u8], salt: Option<&[u8]>, purpose: &[u8]) -> Result<[u8; KEY]> {
    let mut key = [0; KEY];
    hkdf_sha256_into(secret, salt, purpose, &mut key).map_err(|_| SandboxError::Malformed("key derivation"))?;
    Ok(key)
}
