//! Standard Webhooks 1.0: what is signed is `id.timestamp.body`, the signature is HMAC-SHA256 in base64 after `v1,`, and
//! a secret in rotation adds a second signature after a blank.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// Header with the event's id, the same at every attempt.
pub const ID_HEADER: &str = "webhook-id";
/// Header with the time of the attempt, in seconds since the Unix epoch.
pub const TIMESTAMP_HEADER: &str = "webhook-timestamp";
/// Header with the signatures.
pub const SIGNATURE_HEADER: &str = "webhook-signature";
/// Random bytes of a new secret.
pub const SECRET_BYTES: usize = 32;

const PREFIX: &str = "whsec_";
const VERSION: &str = "v1,";
const SECRET_BYTES_ALLOWED: std::ops::RangeInclusive<usize> = 24..=64;

/// A signing secret. Prints as nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// The text is not a signing secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a webhook secret: `whsec_` and 24 to 64 bytes in base64")]
pub struct InvalidSecret;

impl Secret {
    /// A secret made from random bytes of cryptographic quality.
    #[must_use]
    pub fn mint(random: &[u8; SECRET_BYTES]) -> Self {
        Self(random.to_vec())
    }

    /// Reads `whsec_…`.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(text: &str) -> Result<Self, InvalidSecret> {
        let encoded = text.strip_prefix(PREFIX).ok_or(InvalidSecret)?;
        let bytes = BASE64.decode(encoded).map_err(|_| InvalidSecret)?;
        if !SECRET_BYTES_ALLOWED.contains(&bytes.len()) {
            return Err(InvalidSecret);
        }
        Ok(Self(bytes))
    }

    /// The secret in clear: for its owner, once, and for the store.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}", BASE64.encode(&self.0))
    }

    fn sign(&self, id: &str, timestamp_seconds: u64, body: &[u8]) -> Option<String> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        mac.update(format!("{id}.{timestamp_seconds}.").as_bytes());
        mac.update(body);
        Some(format!("{VERSION}{}", BASE64.encode(mac.finalize().into_bytes())))
    }
}

/// The value of [`SIGNATURE_HEADER`]: one signature for each secret.
#[must_use]
pub fn signatures(secrets: &[Secret], id: &str, timestamp_seconds: u64, body: &[u8]) -> String {
    let all = secrets.iter().filter_map(|secret| secret.sign(id, timestamp_seconds, body));
    all.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    /// The vector of the specification's own test suites.
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    #[test]
    fn the_familiar_vector() {
        let secret = Secret::parse(SECRET).unwrap();
        assert_eq!(signatures(&[secret], ID, 1_614_265_330, BODY), SIGNATURE);
    }

    #[test]
    fn two_secrets_make_two_signatures_and_a_flipped_byte_another() {
        let secrets = [Secret::parse(SECRET).unwrap(), Secret::mint(&[3; SECRET_BYTES])];
        let header = signatures(&secrets, ID, 1_614_265_330, BODY);
        let (first, second) = header.split_once(' ').unwrap();
        assert_eq!(first, SIGNATURE);
        assert!(second.starts_with(VERSION) && second != first);
        assert_ne!(signatures(&secrets[..1], ID, 1_614_265_330, b"{}"), SIGNATURE);
    }

    #[test]
    fn secrets_come_back_and_print_as_nothing() {
        let secret = Secret::mint(&[5; SECRET_BYTES]);
        assert_eq!(Secret::parse(&secret.reveal()), Ok(secret.clone()));
        assert_eq!(format!("{secret:?}"), "Secret");
        for text in ["", "whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_c2hvcnQ=", "whsec_!!!"] {
            assert_eq!(Secret::parse(text), Err(InvalidSecret), "{text}");
        }
    }
}
