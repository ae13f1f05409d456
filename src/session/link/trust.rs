//! Is the certificate check of the Noise handshake compiled in? The library's trust root is a constant and its
//! check can be switched off by a cargo feature that any crate of the build may set, so the build asks itself.

use whatsapp_rust::buffa::{Message, MessageField};
use whatsapp_rust::wacore::handshake::HandshakeUtils;
use whatsapp_rust::waproto::whatsapp::CertChain;
use whatsapp_rust::waproto::whatsapp::cert_chain::NoiseCertificate;
use whatsapp_rust::waproto::whatsapp::cert_chain::noise_certificate::Details;

const KEY: [u8; 32] = [9; 32];
const SERIAL: u32 = 1;

/// A chain that is right in every respect but its signatures.
fn forged_chain() -> Vec<u8> {
    let certificate = |serial: u32, issuer_serial: u32| NoiseCertificate {
        details: Some(
            Details {
                serial: Some(serial),
                issuer_serial: Some(issuer_serial),
                key: Some(KEY.to_vec()),
                not_before: Some(0),
                not_after: Some(u64::from(u32::MAX)),
            }
            .encode_to_vec(),
        ),
        signature: Some(vec![0; 64]),
    };
    CertChain {
        leaf: MessageField::some(certificate(2, SERIAL)),
        intermediate: MessageField::some(certificate(SERIAL, 0)),
    }
    .encode_to_vec()
}

/// Whether this build accepts a forged certificate chain. Such a build must never leave the loopback interface.
#[must_use]
pub fn is_sandbox_build() -> bool {
    HandshakeUtils::verify_server_cert(&forged_chain(), &KEY).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_agrees_with_the_feature() {
        assert_eq!(is_sandbox_build(), cfg!(feature = "sandbox"));
    }
}
