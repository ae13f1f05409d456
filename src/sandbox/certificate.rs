//! The server's long-lived keys and the certificate chain it shows: root signs intermediate, intermediate signs the
//! Noise static key, both with XEdDSA. Kept across restarts, or every client's cached chain would be worthless.

use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::persistence::base64_bytes;
use crate::sandbox::stanza;
use serde::{Deserialize, Serialize};
use whatsapp_rust::buffa::{Message as _, MessageField};
use whatsapp_rust::wacore::libsignal::protocol::{KeyPair, PrivateKey};
use whatsapp_rust::wacore::store::{CachedNoiseCert, CachedServerCertChain};
use whatsapp_rust::waproto::whatsapp::CertChain;
use whatsapp_rust::waproto::whatsapp::cert_chain::NoiseCertificate;
use whatsapp_rust::waproto::whatsapp::cert_chain::noise_certificate::Details;

const INTERMEDIATE_SERIAL: u32 = 1;
const LEAF_SERIAL: u32 = 2;
/// Clients insist on seeing this serial of the root, so it must be encoded although it is the default.
const ROOT_SERIAL: u32 = 0;
const DAY: u64 = 86_400;
const VALIDITY: u64 = 3_650 * DAY;

/// What is stored of a server's identity.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerKeys {
    #[serde(with = "base64_bytes")]
    root: Vec<u8>,
    #[serde(with = "base64_bytes")]
    intermediate: Vec<u8>,
    #[serde(with = "base64_bytes")]
    noise: Vec<u8>,
    not_before: u64,
}

/// A server's identity, ready to use.
pub struct ServerIdentity {
    keys: ServerKeys,
    root_public: [u8; 32],
    noise: KeyPair,
    chain: Vec<u8>,
    cached: CachedServerCertChain,
}

impl ServerKeys {
    /// New keys, valid from yesterday so that a skewed clock does not matter.
    pub fn generate() -> Self {
        let private = || KeyPair::generate(&mut rand::rng()).private_key.serialize().to_vec();
        Self { root: private(), intermediate: private(), noise: private(), not_before: stanza::now() - DAY }
    }
}

/// Rebuilds a key pair from its private half.
pub fn key_pair(private: &[u8]) -> Result<KeyPair> {
    let private = PrivateKey::deserialize(private)?;
    Ok(KeyPair::new(private.public_key()?, private))
}

/// The 32 bytes of a key pair's public half.
pub fn public_bytes(pair: &KeyPair) -> Result<[u8; 32]> {
    stanza::key(pair.public_key.public_key_bytes()).ok_or(SandboxError::Malformed("public key length"))
}

impl ServerIdentity {
    /// Signs the chain.
    pub fn new(keys: ServerKeys) -> Result<Self> {
        let root = key_pair(&keys.root)?;
        let intermediate = key_pair(&keys.intermediate)?;
        let noise = key_pair(&keys.noise)?;
        let not_after = keys.not_before + VALIDITY;
        let certificate = |serial, issuer_serial, subject: &KeyPair, issuer: &KeyPair| -> Result<NoiseCertificate> {
            let details = Details {
                serial: Some(serial),
                issuer_serial: Some(issuer_serial),
                key: Some(public_bytes(subject)?.to_vec()),
                not_before: Some(keys.not_before),
                not_after: Some(not_after),
            }
            .encode_to_vec();
            let signature = issuer.private_key.calculate_signature(&details, &mut rand::rng())?;
            Ok(NoiseCertificate { details: Some(details), signature: Some(signature.to_vec()) })
        };
        let chain = CertChain {
            intermediate: MessageField::some(certificate(INTERMEDIATE_SERIAL, ROOT_SERIAL, &intermediate, &root)?),
            leaf: MessageField::some(certificate(LEAF_SERIAL, INTERMEDIATE_SERIAL, &noise, &intermediate)?),
        }
        .encode_to_vec();
        let cached = |pair: &KeyPair| -> Result<CachedNoiseCert> {
            let (not_before, not_after) = (keys.not_before as i64, not_after as i64);
            Ok(CachedNoiseCert { key: public_bytes(pair)?, not_before, not_after })
        };
        let cached = CachedServerCertChain { intermediate: cached(&intermediate)?, leaf: cached(&noise)? };
        let root_public = public_bytes(&root)?;
        Ok(Self { keys, root_public, noise, chain, cached })
    }

    /// What to store.
    pub fn keys(&self) -> &ServerKeys {
        &self.keys
    }

    /// The public half of the root, in hexadecimal: what a client has to trust.
    pub fn root_hex(&self) -> String {
        self.root_public.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The static Noise key.
    pub fn noise(&self) -> &KeyPair {
        &self.noise
    }

    /// The encoded chain as the handshake carries it.
    pub fn chain(&self) -> &[u8] {
        &self.chain
    }

    /// The chain as a client caches it after a first handshake.
    pub fn cached_chain(&self) -> CachedServerCertChain {
        self.cached.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use whatsapp_rust::wacore::handshake::HandshakeUtils;
    use whatsapp_rust::wacore::libsignal::protocol::PublicKey;

    #[test]
    fn the_chain_is_signed_down_to_the_noise_key() {
        let identity = ServerIdentity::new(ServerKeys::generate()).expect("chain");
        let chain = CertChain::decode_from_slice(identity.chain()).expect("decode");
        let intermediate = chain.intermediate.into_option().expect("intermediate");
        let leaf = chain.leaf.into_option().expect("leaf");
        let verify = |key: &[u8], certificate: &NoiseCertificate| {
            let key = PublicKey::from_djb_public_key_bytes(key).expect("key");
            let details = certificate.details.as_deref().expect("details");
            key.verify_signature(details, certificate.signature.as_deref().expect("signature"))
        };
        assert!(verify(&identity.root_public, &intermediate));
        let details = Details::decode_from_slice(intermediate.details.as_deref().expect("details")).expect("decode");
        assert_eq!(details.issuer_serial, Some(0));
        assert!(verify(details.key.as_deref().expect("key"), &leaf));
        let noise = public_bytes(identity.noise()).expect("key");
        let seen = HandshakeUtils::verify_server_cert(identity.chain(), &noise).map(|chain| chain.leaf_key);
        assert_eq!(seen.ok(), Some(noise));
    }

    #[test]
    fn stored_keys_give_the_same_identity() {
        let first = ServerIdentity::new(ServerKeys::generate()).expect("chain");
        let again = ServerIdentity::new(first.keys().clone()).expect("chain");
        assert_eq!(first.root_hex(), again.root_hex());
        assert_eq!(first.cached_chain(), again.cached_chain());
    }
}
