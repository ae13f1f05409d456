//! People's passkeys, both ends of WebAuthn: the browser that answers a request with the person's key (ES256), and the
//! relying party's check of the answer. <https://www.w3.org/TR/webauthn-3/#sctn-verifying-assertion>

use crate::sandbox::address::PhoneNumber;
use crate::sandbox::error::{Result, SandboxError};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Whom a passkey of WhatsApp is for.
pub const RELYING_PARTY: &str = "whatsapp.com";
/// Where a browser asks for it.
const ORIGIN: &str = "https://web.whatsapp.com";
/// People who have one.
const PASSKEY_LIMIT: usize = 20_000;
/// The person was there, and proved to be the one.
const PRESENT_AND_VERIFIED: u8 = 0b101;
/// Hash of the relying party, flags, counter.
const AUTHENTICATOR_DATA: usize = 32 + 1 + 4;

/// One person's passkey.
struct Passkey {
    credential: [u8; 16],
    key: EcdsaKeyPair,
    used: u32,
    /// The code that the phone shows while a device is being linked.
    shown: Option<String>,
}

/// Everybody's passkeys. Made when first needed; they do not outlive the process.
#[derive(Default)]
pub struct Passkeys(Mutex<HashMap<PhoneNumber, Passkey>>);

/// The part of the request options that an authenticator reads.
#[derive(Deserialize)]
struct Options {
    challenge: String,
    #[serde(rename = "rpId")]
    relying_party: String,
}

#[derive(Deserialize)]
struct Answer {
    id: String,
    #[serde(rename = "rawId")]
    raw_id: String,
    #[serde(rename = "type")]
    kind: String,
    response: Response,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    #[serde(rename = "clientDataJSON")]
    client_data: String,
    authenticator_data: String,
    signature: String,
}

#[derive(Deserialize)]
struct ClientData {
    #[serde(rename = "type")]
    kind: String,
    challenge: String,
    origin: String,
}

impl Passkey {
    fn new() -> Result<Self> {
        let refused = |_| SandboxError::Conflict("no key could be made");
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).map_err(refused)?;
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_ref(), &random);
        let key = key.map_err(|_| SandboxError::Conflict("no key could be made"))?;
        Ok(Self { credential: rand::random(), key, used: 0, shown: None })
    }

    fn answer(&mut self, options: &Options) -> Result<Value> {
        let client_data = json!({
            "type": "webauthn.get",
            "challenge": options.challenge,
            "origin": ORIGIN,
            "crossOrigin": false,
        });
        let client_data = client_data.to_string();
        self.used += 1;
        let mut authenticator_data = Sha256::digest(options.relying_party.as_bytes()).to_vec();
        authenticator_data.push(PRESENT_AND_VERIFIED);
        authenticator_data.extend_from_slice(&self.used.to_be_bytes());
        let signed = signed_bytes(&authenticator_data, client_data.as_bytes());
        let signature = self.key.sign(&SystemRandom::new(), &signed);
        let signature = signature.map_err(|_| SandboxError::Conflict("the key does not sign"))?;
        let id = URL_SAFE_NO_PAD.encode(self.credential);
        Ok(json!({
            "id": id,
            "rawId": id,
            "type": "public-key",
            "authenticatorAttachment": "platform",
            "clientExtensionResults": {},
            "response": {
                "clientDataJSON": URL_SAFE_NO_PAD.encode(client_data),
                "authenticatorData": URL_SAFE_NO_PAD.encode(authenticator_data),
                "signature": URL_SAFE_NO_PAD.encode(signature),
                "userHandle": URL_SAFE_NO_PAD.encode(b"sandbox"),
            },
        }))
    }

    fn verify(&self, challenge: &[u8], credential: &[u8], answer: &[u8]) -> Result<()> {
        let answer: Answer = serde_json::from_slice(answer)?;
        let client_data = decoded(&answer.response.client_data)?;
        let said: ClientData = serde_json::from_slice(&client_data)?;
        let authenticator_data = decoded(&answer.response.authenticator_data)?;
        let own = URL_SAFE_NO_PAD.encode(self.credential);
        let relying_party = Sha256::digest(RELYING_PARTY.as_bytes());
        let flags = authenticator_data.get(relying_party.len()).copied().unwrap_or_default();
        let problem = if credential != self.credential || answer.id != own || answer.raw_id != own {
            Some("another credential")
        } else if answer.kind != "public-key" || said.kind != "webauthn.get" || said.origin != ORIGIN {
            Some("not an assertion for WhatsApp Web")
        } else if said.challenge != URL_SAFE_NO_PAD.encode(challenge) {
            Some("another challenge")
        } else if authenticator_data.len() < AUTHENTICATOR_DATA || !authenticator_data.starts_with(&relying_party) {
            Some("for somebody else")
        } else if flags & PRESENT_AND_VERIFIED != PRESENT_AND_VERIFIED {
            Some("the person was not verified")
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(SandboxError::Conflict(problem));
        }
        let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, self.key.public_key().as_ref());
        let verified =
            public.verify(&signed_bytes(&authenticator_data, &client_data), &decoded(&answer.response.signature)?);
        verified.map_err(|_| SandboxError::Conflict("the signature is wrong"))
    }
}

fn signed_bytes(authenticator_data: &[u8], client_data: &[u8]) -> Vec<u8> {
    [authenticator_data, Sha256::digest(client_data).as_slice()].concat()
}

fn decoded(text: &str) -> Result<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| SandboxError::Malformed("base64url"))
}

impl Passkeys {
    fn all(&self) -> MutexGuard<'_, HashMap<PhoneNumber, Passkey>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of<T>(&self, phone: &PhoneNumber, act: impl FnOnce(&mut Passkey) -> Result<T>) -> Result<T> {
        let mut all = self.all();
        if !all.contains_key(phone) {
            if all.len() >= PASSKEY_LIMIT {
                return Err(SandboxError::Full("passkeys"));
            }
            all.insert(phone.clone(), Passkey::new()?);
        }
        all.get_mut(phone).map_or(Err(SandboxError::NotFound("passkey")), act)
    }

    /// The person unlocks the passkey in a browser: request options in, what `navigator.credentials.get` gives out.
    pub fn answer(&self, phone: &PhoneNumber, options: &str) -> Result<Value> {
        let options: Options = serde_json::from_str(options)?;
        self.of(phone, |passkey| passkey.answer(&options))
    }

    /// Whether an answer to `challenge` was made with this person's passkey.
    pub fn verify(&self, phone: &PhoneNumber, challenge: &[u8], credential: &[u8], answer: &[u8]) -> Result<()> {
        self.of(phone, |passkey| passkey.verify(challenge, credential, answer))
    }

    /// The phone shows this code.
    pub fn show(&self, phone: &PhoneNumber, code: String) -> Result<()> {
        self.of(phone, |passkey| {
            passkey.shown = Some(code);
            Ok(())
        })
    }

    /// The code that the phone shows.
    pub fn shown(&self, phone: &PhoneNumber) -> Option<String> {
        self.all().get(phone)?.shown.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHALLENGE: [u8; 4] = [1, 2, 3, 4];

    fn phone(digits: &str) -> PhoneNumber {
        PhoneNumber::parse(digits).expect("plausible")
    }

    fn options(challenge: &[u8], relying_party: &str) -> String {
        json!({ "challenge": URL_SAFE_NO_PAD.encode(challenge), "rpId": relying_party }).to_string()
    }

    fn verdict(passkeys: &Passkeys, answer: &Value) -> std::result::Result<(), String> {
        let credential = decoded(answer["rawId"].as_str().expect("an id")).expect("base64url");
        let verified = passkeys.verify(&phone("15550000001"), &CHALLENGE, &credential, answer.to_string().as_bytes());
        verified.map_err(|error| error.to_string())
    }

    #[test]
    fn only_the_persons_own_answer_to_this_request_is_taken() {
        let passkeys = Passkeys::default();
        let (own, other) = (phone("15550000001"), phone("15550000002"));
        let asked = options(&CHALLENGE, RELYING_PARTY);
        let right = passkeys.answer(&own, &asked).expect("an answer");
        assert_eq!(verdict(&passkeys, &right), Ok(()));
        let foreign = passkeys.answer(&other, &asked).expect("an answer");
        assert_eq!(verdict(&passkeys, &foreign), Err("conflict: another credential".to_owned()));
        let stale = passkeys.answer(&own, &options(&[9; 4], RELYING_PARTY)).expect("an answer");
        assert_eq!(verdict(&passkeys, &stale), Err("conflict: another challenge".to_owned()));
        let elsewhere = passkeys.answer(&own, &options(&CHALLENGE, "example.com")).expect("an answer");
        assert_eq!(verdict(&passkeys, &elsewhere), Err("conflict: for somebody else".to_owned()));
        let mut unsigned = right.clone();
        unsigned["response"]["signature"] = foreign["response"]["signature"].clone();
        assert_eq!(verdict(&passkeys, &unsigned), Err("conflict: the signature is wrong".to_owned()));
        let mut unverified = right;
        let mut data = Sha256::digest(RELYING_PARTY.as_bytes()).to_vec();
        data.extend_from_slice(&[1, 0, 0, 0, 1]);
        unverified["response"]["authenticatorData"] = URL_SAFE_NO_PAD.encode(data).into();
        assert_eq!(verdict(&passkeys, &unverified), Err("conflict: the person was not verified".to_owned()));
    }
}
