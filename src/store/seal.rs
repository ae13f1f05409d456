//! Sealing of values: XChaCha20-Poly1305 with a random nonce. What is authenticated beside the value is its full key and
//! its form, so that no value can be moved to another key, another number or another meaning.

use chacha20poly1305::aead::{Aead, AeadInOut, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

use super::error::StoreError;
use crate::telemetry::rng::Random;

/// Length of every key, in bytes.
pub const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
/// What sealing adds to a value, its form byte included, in bytes.
pub const OVERHEAD_BYTES: usize = 1 + NONCE_BYTES + TAG_BYTES;

/// A key of this store: wiped from memory when it is dropped, never printed.
pub(super) type SecretBytes = Zeroizing<[u8; KEY_BYTES]>;

/// Seals and opens under one key; the key is wiped with it.
#[derive(Clone)]
pub struct Sealer(XChaCha20Poly1305);

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer")
    }
}

impl Sealer {
    /// Seals under this key.
    #[must_use]
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        Self(XChaCha20Poly1305::new(key.into()))
    }

    /// Seals `value` for the record `key`: form, nonce, ciphertext, tag.
    ///
    /// # Errors
    /// `TooLarge`, far above any unit.
    pub fn seal(&self, key: &[u8], form: u8, value: &[u8], random: &Random) -> Result<Vec<u8>, StoreError> {
        let nonce = random.bytes::<NONCE_BYTES>();
        let mut sealed = Vec::with_capacity(value.len() + OVERHEAD_BYTES);
        sealed.push(form);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(value);
        let text = &mut sealed[1 + NONCE_BYTES..];
        let tag = self.0.encrypt_inout_detached(&XNonce::from(nonce), &bound_to(key, form), text.into());
        sealed.extend_from_slice(&tag.map_err(|_| StoreError::TooLarge("a value that cannot be sealed"))?);
        Ok(sealed)
    }

    /// Opens what [`Self::seal`] made for the same record.
    ///
    /// # Errors
    /// `Corrupt` when a bit of value, key or form is another one.
    pub fn open(&self, key: &[u8], sealed: &[u8]) -> Result<Vec<u8>, StoreError> {
        let unreadable = || StoreError::Corrupt("the seal of a value is broken".to_owned());
        let (form, rest) = sealed.split_first().ok_or_else(unreadable)?;
        let (nonce, msg) = rest.split_first_chunk::<NONCE_BYTES>().ok_or_else(unreadable)?;
        let aad = &bound_to(key, *form);
        self.0.decrypt(&XNonce::from(*nonce), Payload { msg, aad }).map_err(|_| unreadable())
    }
}

fn bound_to(key: &[u8], form: u8) -> Vec<u8> {
    let mut bound = Vec::with_capacity(key.len() + 1);
    bound.extend_from_slice(key);
    bound.push(form);
    bound
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_value_opens_only_as_what_it_was() {
        let (random, value) = (Random::seeded(1), b"ring the bell twice".as_slice());
        let sealer = Sealer::new(&random.bytes());
        let sealed = sealer.seal(b"key", 1, value, &random).unwrap();
        assert_eq!(sealed.len(), value.len() + OVERHEAD_BYTES);
        assert!(!sealed.windows(4).any(|window| window == &value[..4]));
        assert_eq!(sealer.open(b"key", &sealed).unwrap(), value);
        assert!(sealer.open(b"yek", &sealed).is_err(), "another record's");
        assert!(Sealer::new(&random.bytes()).open(b"key", &sealed).is_err(), "another number's");
        for index in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[index] ^= 1;
            assert!(sealer.open(b"key", &changed).is_err(), "byte {index}");
            assert!(sealer.open(b"key", &sealed[..index]).is_err(), "cut at {index}");
        }
        assert_ne!(sealer.seal(b"key", 1, value, &random).unwrap(), sealed, "a nonce is used once");
    }
}
