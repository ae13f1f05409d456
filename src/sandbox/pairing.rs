//! Linking a device: references for the QR code, the phone that scans it and signs the device's identity, the
//! device's counter-signature, and the restart that ends it.

use crate::sandbox::account::{Companion, Place, Registration, device_signature_input};
use crate::sandbox::address::{DeviceAddress, PhoneNumber};
use crate::sandbox::connection::Reaction;
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::link::{Farewell, Link};
use crate::sandbox::pair_code::{self, Exchange, ShownCode};
use crate::sandbox::passkey::{self, Ceremony};
use crate::sandbox::signal_store::SignedKey;
use crate::sandbox::stanza::{self, SERVER, attr, bytes, fresh_id, number, tag};
use crate::sandbox::world::World;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use whatsapp_rust::buffa::Message as _;
use whatsapp_rust::wacore::companion_reg::NATIVE_CAMERA_DEEP_LINK_PREFIX;
use whatsapp_rust::wacore::libsignal::crypto::hmac_sha256;
use whatsapp_rust::wacore::libsignal::protocol::PublicKey;
use whatsapp_rust::wacore_binary::Node;
use whatsapp_rust::waproto::whatsapp::client_payload::DevicePairingRegistrationData;
use whatsapp_rust::waproto::whatsapp::{ADVSignedDeviceIdentity, ADVSignedDeviceIdentityHMAC, ClientPairingProps};

/// References a client gets per connection.
const REFERENCES: usize = 6;
/// The first reference is shown this long, every other [`NEXT_SHOWN`]; a scan may come a little late.
const FIRST_SHOWN: Duration = Duration::from_secs(60);
const NEXT_SHOWN: Duration = Duration::from_secs(20);
const LATE_SCAN: Duration = Duration::from_secs(5);
/// A connection that is not linked by then is closed.
pub const UNLINKED_AT_MOST: Duration = Duration::from_secs(185);
/// Clients handle pair-success on a task of their own; a restart that overtakes it confuses them.
const PAUSE_BEFORE_RESTART: Duration = Duration::from_millis(150);
/// References in circulation.
const REFERENCE_LIMIT: usize = 60_000;
const RESTART: u16 = 515;

/// A connection that shows a QR code or a pairing code.
pub struct Slot {
    /// The connection.
    pub link: Arc<Link>,
    /// Who is at its other end.
    pub registration: Registration,
    /// The exchange a phone has begun by entering the pairing code.
    pub exchange: Mutex<Option<Exchange>>,
    /// How far asking for a passkey has come.
    pub passkey: Mutex<Ceremony>,
    opened: Instant,
    scanned: Mutex<Option<(PhoneNumber, Place)>>,
}

/// All references in circulation.
#[derive(Default)]
pub struct Pairings {
    /// Devices that show a pairing code, by the number they want to be linked to.
    pub codes: Mutex<HashMap<PhoneNumber, ShownCode>>,
    slots: Mutex<HashMap<String, (Arc<Slot>, Duration)>>,
}

/// Withdraws a connection's references when it ends.
pub struct Offer {
    world: Arc<World>,
    slot: Arc<Slot>,
    references: Vec<String>,
}

impl Drop for Offer {
    fn drop(&mut self) {
        let mut slots = self.world.pairings.slots.lock().unwrap_or_else(PoisonError::into_inner);
        for reference in &self.references {
            slots.remove(reference);
        }
        drop(slots);
        let mut codes = self.world.pairings.codes.lock().unwrap_or_else(PoisonError::into_inner);
        codes.retain(|_, code| !Arc::ptr_eq(&code.slot, &self.slot));
    }
}

impl Registration {
    /// Reads what an unregistered client sends in its payload.
    pub fn read(data: &DevicePairingRegistrationData, noise: [u8; 32]) -> Option<Self> {
        Some(Self {
            registration_id: number(data.e_regid.as_deref()?)?,
            identity: stanza::key(data.e_ident.as_deref()?)?,
            noise,
            signed: SignedKey {
                id: number(data.e_skey_id.as_deref()?)?,
                key: stanza::key(data.e_skey_val.as_deref()?)?,
                signature: data.e_skey_sig.clone()?,
            },
        })
    }
}

impl Offer {
    /// Puts new references into circulation; the query that shows them to the client.
    pub fn open(world: &Arc<World>, link: Arc<Link>, registration: Registration) -> Result<(Self, Node)> {
        let slot = Arc::new(Slot {
            link,
            registration,
            exchange: Mutex::new(None),
            passkey: Mutex::default(),
            opened: Instant::now(),
            scanned: Mutex::new(None),
        });
        let references: Vec<String> = (0..REFERENCES).map(|_| fresh_id("2R")).collect();
        let mut slots = world.pairings.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() + REFERENCES > REFERENCE_LIMIT {
            return Err(SandboxError::Full("devices waiting to be linked"));
        }
        let mut until = FIRST_SHOWN;
        for reference in &references {
            slots.insert(reference.clone(), (Arc::clone(&slot), until + LATE_SCAN));
            until += NEXT_SHOWN;
        }
        drop(slots);
        let shown = references.iter().map(|reference| tag("ref").bytes(reference.as_bytes()).build());
        let query = tag("iq")
            .attr("from", SERVER)
            .attr("type", "set")
            .attr("id", fresh_id("pair-"))
            .attr("xmlns", "md")
            .children([tag("pair-device").children(shown).build()])
            .build();
        Ok((Self { world: Arc::clone(world), slot, references }, query))
    }

    /// Until when a passkey is waited for, if one is.
    pub fn waits_until(&self) -> Option<Instant> {
        self.slot.passkey.lock().unwrap_or_else(PoisonError::into_inner).until()
    }

    /// Takes a stanza from a client that is not linked yet.
    pub fn react(&self, node: &Node) -> Vec<Reaction> {
        if node.tag != "iq" {
            return Vec::new();
        }
        if let Some(signed) = node.get_optional_child("pair-device-sign") {
            return match self.finish(signed) {
                Ok(()) => vec![restart()],
                Err(error) => {
                    tracing::debug!(%error, "a device could not take its place");
                    vec![Reaction::CloseAfter { pause: Duration::ZERO, farewell: Farewell::Drop }]
                }
            };
        }
        if let Some(stage) = node.get_optional_child("link_code_companion_reg") {
            return vec![Reaction::Reply(pair_code::answer(&self.world, &self.slot, node, stage))];
        }
        if let Some(reactions) = passkey::react(&self.world, &self.slot, node) {
            return reactions;
        }
        let question = attr(node, "type").is_some_and(|kind| kind == "get" || kind == "set");
        if question { vec![Reaction::Reply(stanza::result(node, []))] } else { Vec::new() }
    }

    fn finish(&self, signed: &Node) -> Result<()> {
        let scanned = self.slot.scanned.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (phone, place) = scanned.ok_or(SandboxError::Malformed("a signature nobody asked for"))?;
        let identity = signed.get_optional_child("device-identity").and_then(bytes);
        let identity = identity.ok_or(SandboxError::Malformed("device identity missing"))?;
        let accepted = ADVSignedDeviceIdentity::decode_from_slice(&identity)?;
        let registration = self.slot.registration.clone();
        let input = device_signature_input(&place.identity, &registration.identity);
        let key = PublicKey::from_djb_public_key_bytes(&registration.identity)?;
        if !key.verify_signature(&input, accepted.device_signature.as_deref().unwrap_or_default()) {
            return Err(SandboxError::Malformed("device signature"));
        }
        // Clients send the account key back empty; others need it to check the chain.
        let complete =
            ADVSignedDeviceIdentity { device_signature: accepted.device_signature, ..place.identity.clone() };
        let companion = Companion::new(place.key_index, registration, complete.encode_to_vec(), true);
        let account = self.world.require(&phone)?;
        account.state().companions.insert(place.device, companion);
        self.world.stats.linked.add(1);
        self.world.save(&account)
    }
}

fn restart() -> Reaction {
    let error = tag("stream:error").attr("code", RESTART).build();
    Reaction::CloseAfter { pause: PAUSE_BEFORE_RESTART, farewell: Farewell::Stanza(Box::new(error)) }
}

/// The parts of a QR code that matter to a phone.
struct Code {
    reference: String,
    noise: [u8; 32],
    identity: [u8; 32],
    secret: Vec<u8>,
}

impl Code {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix(NATIVE_CAMERA_DEEP_LINK_PREFIX).unwrap_or(text);
        let mut parts = text.split(',');
        let reference = parts.next()?.to_owned();
        let mut decoded = parts.map(|part| STANDARD.decode(part).ok());
        Some(Self {
            reference,
            noise: stanza::key(&decoded.next()??)?,
            identity: stanza::key(&decoded.next()??)?,
            secret: decoded.next()??,
        })
    }
}

/// A phone scans the text of a QR code: see [`accept`].
pub fn scan(world: &World, phone: &PhoneNumber, text: &str, hidden_addressing: bool) -> Result<Option<DeviceAddress>> {
    let code = Code::parse(text).ok_or(SandboxError::Malformed("QR text"))?;
    let slot = {
        let slots = world.pairings.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let (slot, valid) = slots.get(&code.reference).ok_or(SandboxError::NotFound("reference of the QR code"))?;
        if slot.opened.elapsed() > *valid {
            return Err(SandboxError::Conflict("the QR code has expired"));
        }
        Arc::clone(slot)
    };
    if slot.registration.noise != code.noise || slot.registration.identity != code.identity {
        return Err(SandboxError::Conflict("the QR code shows other keys than the connection"));
    }
    accept(world, &slot, phone, &code.secret, hidden_addressing)
}

/// A person accepts the device in `slot`: the phone signs its identity and the server tells the device, which is linked
/// when it has signed too; its number is returned at once. `None`: the account's passkey is asked for first.
pub fn accept(
    world: &World,
    slot: &Slot,
    phone: &PhoneNumber,
    secret: &[u8],
    hidden_addressing: bool,
) -> Result<Option<DeviceAddress>> {
    if let Some(patience) = world.faults.asks_for_passkey(phone) {
        world.require(phone)?;
        passkey::demand(slot, phone, hidden_addressing, patience)?;
        return Ok(None);
    }
    let (device, success) = sign(world, slot, phone, secret, hidden_addressing)?;
    if slot.link.post(success) { Ok(Some(device)) } else { Err(SandboxError::Full("the device does not read")) }
}

/// The phone signs the identity of the device in `slot`: its number, and what the server tells it.
pub fn sign(
    world: &World,
    slot: &Slot,
    phone: &PhoneNumber,
    secret: &[u8],
    hidden_addressing: bool,
) -> Result<(DeviceAddress, Node)> {
    let account = world.require(phone)?;
    let mut scanned = slot.scanned.lock().unwrap_or_else(PoisonError::into_inner);
    if scanned.is_some() {
        return Err(SandboxError::Conflict("the device is being linked already"));
    }
    let (place, name) = {
        let mut state = account.state();
        (state.reserve(&slot.registration.identity)?, state.person.name.clone())
    };
    let device = DeviceAddress::new(phone.clone(), place.device);
    let success = success(&account.jids(place.device), &place, secret, &name, hidden_addressing);
    *scanned = Some((phone.clone(), place));
    Ok((device, success))
}

fn success(jids: &[whatsapp_rust::Jid; 2], place: &Place, secret: &[u8], name: &str, hidden_addressing: bool) -> Node {
    let details = place.identity.encode_to_vec();
    let hmac = hmac_sha256(secret, &details).to_vec();
    let sealed =
        ADVSignedDeviceIdentityHMAC { details: Some(details), hmac: Some(hmac), ..Default::default() }.encode_to_vec();
    let [jid, lid] = jids;
    let mut content = vec![
        tag("device-identity").bytes(sealed).build(),
        tag("biz").attr("name", name).build(),
        tag("device").attr("jid", jid).attr("lid", lid).build(),
        tag("platform").attr("name", "android").build(),
    ];
    if hidden_addressing {
        let props = ClientPairingProps { is_chat_db_lid_migrated: Some(true), ..Default::default() };
        content.push(tag("client-props").bytes(props.encode_to_vec()).build());
    }
    tag("iq")
        .attr("from", SERVER)
        .attr("type", "set")
        .attr("id", fresh_id("pair-"))
        .attr("xmlns", "md")
        .attr("t", stanza::now())
        .children([tag("pair-success").children(content).build()])
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_read_bare_and_behind_the_link() {
        let key = STANDARD.encode([7; 32]);
        let bare = format!("2RAB,{key},{key},{key},1");
        for text in [bare.clone(), format!("{NATIVE_CAMERA_DEEP_LINK_PREFIX}{bare}\n")] {
            let code = Code::parse(&text).expect("a code");
            assert_eq!((code.reference.as_str(), code.noise, code.secret.len()), ("2RAB", [7; 32], 32));
        }
        assert!(Code::parse("2RAB,notbase64").is_none());
    }
}
