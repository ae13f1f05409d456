//! The responder's half of the Noise handshake: XX for a client that has never been here, IK for one that knows our
//! static key, XXfallback for one that knows a wrong one. Pure: bytes in, bytes out.

use crate::sandbox::certificate::{ServerIdentity, public_bytes};
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::stanza;
use whatsapp_rust::buffa::{Message as _, MessageField};
use whatsapp_rust::wacore::handshake::{NoiseCipher, NoiseHandshake};
use whatsapp_rust::wacore::libsignal::protocol::KeyPair;
use whatsapp_rust::wacore_binary::consts::{NOISE_PATTERN_IK, NOISE_PATTERN_XX, NOISE_PATTERN_XXFALLBACK};
use whatsapp_rust::waproto::whatsapp::HandshakeMessage;
use whatsapp_rust::waproto::whatsapp::handshake_message::{ClientHello, ServerHello};

const MAGIC: [u8; 2] = *b"WA";
const ROUTING_MAGIC: [u8; 2] = *b"ED";
const HEADER_LENGTH: usize = 4;
/// Magic, two version bytes and a three-byte length precede the routing bytes.
const ROUTING_PREFIX: usize = 7;

/// A finished handshake.
pub struct Established {
    /// For frames to the client.
    pub send: NoiseCipher,
    /// For frames from the client.
    pub receive: NoiseCipher,
    /// The client's static Noise key.
    pub client_static: [u8; 32],
    /// The encoded `ClientPayload`.
    pub payload: Vec<u8>,
}

/// What follows a client hello.
pub enum Answer {
    /// IK: send this, done.
    Complete {
        /// The server hello.
        hello: Vec<u8>,
        /// The result.
        established: Box<Established>,
    },
    /// XX and XXfallback: send this, then wait for the client's finish.
    AwaitFinish {
        /// The server hello.
        hello: Vec<u8>,
        /// What the finish is fed to.
        pending: Box<Pending>,
    },
}

/// A handshake waiting for the client's finish.
pub struct Pending {
    noise: NoiseHandshake,
    ephemeral: KeyPair,
}

/// Finds the connection header: `Some((prologue, length))` once enough bytes are there.
pub fn header(bytes: &[u8]) -> Result<Option<([u8; HEADER_LENGTH], usize)>> {
    let Some(magic) = bytes.first_chunk::<2>() else {
        return Ok(None);
    };
    let skip = match *magic {
        MAGIC => 0,
        ROUTING_MAGIC => match bytes.get(4..ROUTING_PREFIX) {
            Some(length) => ROUTING_PREFIX + length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)),
            None => return Ok(None),
        },
        _ => return Err(SandboxError::Malformed("connection header")),
    };
    let Some(header) = bytes.get(skip..skip + HEADER_LENGTH) else {
        return Ok(None);
    };
    match *header {
        [b'W', b'A', major, minor] => Ok(Some(([b'W', b'A', major, minor], skip + HEADER_LENGTH))),
        _ => Err(SandboxError::Malformed("connection header")),
    }
}

/// Answers a client hello.
pub fn answer(identity: &ServerIdentity, prologue: &[u8], hello: &[u8]) -> Result<Answer> {
    let hello = HandshakeMessage::decode_from_slice(hello)?;
    let hello = hello.client_hello.into_option().ok_or(SandboxError::Malformed("client hello missing"))?;
    let ephemeral = required_key(hello.ephemeral.as_deref(), "client ephemeral")?;
    if hello.r#static.is_none() {
        return offer(identity, NOISE_PATTERN_XX, prologue, &ephemeral);
    }
    match resume(identity, prologue, &ephemeral, &hello) {
        Ok(answer) => Ok(answer),
        // The client believed in another static key: show ours and let it start over with the ephemeral it has sent.
        Err(_) => offer(identity, NOISE_PATTERN_XXFALLBACK, prologue, &ephemeral),
    }
}

fn required_key(bytes: Option<&[u8]>, what: &'static str) -> Result<[u8; 32]> {
    bytes.and_then(stanza::key).ok_or(SandboxError::Malformed(what))
}

fn offer(identity: &ServerIdentity, pattern: &str, prologue: &[u8], client: &[u8; 32]) -> Result<Answer> {
    let mut noise = NoiseHandshake::new(pattern, prologue)?;
    noise.authenticate(client);
    let ephemeral = KeyPair::generate(&mut rand::rng());
    let public = public_bytes(&ephemeral)?;
    noise.authenticate(&public);
    noise.mix_shared_secret(ephemeral.private_key.serialize(), client)?;
    let encrypted_static = noise.encrypt(&public_bytes(identity.noise())?)?;
    noise.mix_shared_secret(identity.noise().private_key.serialize(), client)?;
    let payload = noise.encrypt(identity.chain())?;
    let hello = server_hello(public, Some(encrypted_static), payload);
    Ok(Answer::AwaitFinish { hello, pending: Box::new(Pending { noise, ephemeral }) })
}

fn resume(identity: &ServerIdentity, prologue: &[u8], client: &[u8; 32], hello: &ClientHello) -> Result<Answer> {
    let own = identity.noise();
    let mut noise = NoiseHandshake::new(NOISE_PATTERN_IK, prologue)?;
    noise.authenticate(&public_bytes(own)?);
    noise.authenticate(client);
    noise.mix_shared_secret(own.private_key.serialize(), client)?;
    let client_static = noise.decrypt(hello.r#static.as_deref().unwrap_or_default())?;
    let client_static = required_key(Some(&client_static), "client static")?;
    noise.mix_shared_secret(own.private_key.serialize(), &client_static)?;
    let payload = noise.decrypt(hello.payload.as_deref().unwrap_or_default())?;

    let ephemeral = KeyPair::generate(&mut rand::rng());
    let public = public_bytes(&ephemeral)?;
    noise.authenticate(&public);
    noise.mix_shared_secret(ephemeral.private_key.serialize(), client)?;
    noise.mix_shared_secret(ephemeral.private_key.serialize(), &client_static)?;
    let certificate = noise.encrypt(identity.chain())?;
    let hello = server_hello(public, None, certificate);
    Ok(Answer::Complete { hello, established: Box::new(established(noise, client_static, payload)?) })
}

fn server_hello(ephemeral: [u8; 32], encrypted_static: Option<Vec<u8>>, payload: Vec<u8>) -> Vec<u8> {
    HandshakeMessage {
        server_hello: MessageField::some(ServerHello {
            ephemeral: Some(ephemeral.to_vec()),
            r#static: encrypted_static,
            payload: Some(payload),
            ..Default::default()
        }),
        ..Default::default()
    }
    .encode_to_vec()
}

fn established(noise: NoiseHandshake, client_static: [u8; 32], payload: Vec<u8>) -> Result<Established> {
    // The library names the ciphers from the initiator's point of view.
    let (receive, send) = noise.finish()?;
    Ok(Established { send, receive, client_static, payload })
}

impl Pending {
    /// Reads the client's finish.
    pub fn finish(self, bytes: &[u8]) -> Result<Established> {
        let Self { mut noise, ephemeral } = self;
        let finish = HandshakeMessage::decode_from_slice(bytes)?;
        let finish = finish.client_finish.into_option().ok_or(SandboxError::Malformed("client finish missing"))?;
        let client_static = noise.decrypt(finish.r#static.as_deref().unwrap_or_default())?;
        let client_static = required_key(Some(&client_static), "client static")?;
        noise.mix_shared_secret(ephemeral.private_key.serialize(), &client_static)?;
        let payload = noise.decrypt(finish.payload.as_deref().unwrap_or_default())?;
        established(noise, client_static, payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::certificate::ServerKeys;
    use whatsapp_rust::wacore::handshake::{
        IkHandshakeState, IkServerHelloOutcome, XxFallbackHandshakeState, XxHandshakeState,
    };
    use whatsapp_rust::wacore_binary::consts::WA_CONN_HEADER;

    fn server() -> ServerIdentity {
        ServerIdentity::new(ServerKeys::generate()).expect("identity")
    }

    #[test]
    fn a_new_client_gets_in_by_xx() {
        let (server, client) = (server(), KeyPair::generate(&mut rand::rng()));
        let mut state = XxHandshakeState::new(client.clone(), b"login".to_vec(), &WA_CONN_HEADER).expect("state");
        let hello = state.build_client_hello().expect("hello");
        let Ok(Answer::AwaitFinish { hello, pending }) = answer(&server, &WA_CONN_HEADER, &hello) else {
            panic!("XX waits for a finish")
        };
        let finish = state.read_server_hello_and_build_client_finish(&hello).expect("accepted");
        let established = pending.finish(&finish).expect("finished");
        assert_eq!(established.payload, b"login");
        assert_eq!(established.client_static, public_bytes(&client).expect("key"));
        let outcome = state.finish().expect("outcome");
        let sealed = outcome.write_cipher.encrypt_with_counter(0, b"up").expect("encrypt");
        let mut opened = sealed;
        established.receive.decrypt_in_place_with_counter(0, &mut opened).expect("decrypt");
        assert_eq!(opened, b"up");
    }

    #[test]
    fn a_client_that_knows_the_key_gets_in_by_ik() {
        let (server, client) = (server(), KeyPair::generate(&mut rand::rng()));
        let known = public_bytes(server.noise()).expect("key");
        let mut state = IkHandshakeState::new(client, known, b"login".to_vec(), &WA_CONN_HEADER).expect("state");
        let hello = state.build_client_hello().expect("hello");
        let Ok(Answer::Complete { hello, established }) = answer(&server, &WA_CONN_HEADER, &hello) else {
            panic!("IK is one round trip")
        };
        assert_eq!(established.payload, b"login");
        assert!(matches!(state.read_server_hello(&hello), Ok(IkServerHelloOutcome::Continue(_))));
    }

    #[test]
    fn a_client_with_a_stale_key_falls_back() {
        let (server, client) = (server(), KeyPair::generate(&mut rand::rng()));
        let stale = public_bytes(&KeyPair::generate(&mut rand::rng())).expect("key");
        let mut state = IkHandshakeState::new(client, stale, b"login".to_vec(), &WA_CONN_HEADER).expect("state");
        let hello = state.build_client_hello().expect("hello");
        let Ok(Answer::AwaitFinish { hello, pending }) = answer(&server, &WA_CONN_HEADER, &hello) else {
            panic!("a stale key needs the fallback")
        };
        let Ok(IkServerHelloOutcome::Fallback(inputs)) = state.read_server_hello(&hello) else {
            panic!("the client sees the fallback")
        };
        let mut fallback = XxFallbackHandshakeState::from_ik_failure(*inputs, &WA_CONN_HEADER).expect("state");
        let finish = fallback.build_client_finish().expect("finish");
        assert_eq!(pending.finish(&finish).expect("finished").payload, b"login");
    }

    #[test]
    fn the_header_may_be_preceded_by_routing_bytes() {
        assert_eq!(header(b"WA").expect("short"), None);
        assert_eq!(header(b"WA\x06\x03rest").expect("plain"), Some((*b"WA\x06\x03", 4)));
        assert_eq!(header(b"ED\x00\x01\x00\x00\x02xyWA\x06\x03").expect("routed"), Some((*b"WA\x06\x03", 13)));
        assert_eq!(header(b"ED\x00\x01\x00\x00\x02xy").expect("short"), None);
        assert!(header(b"GET / HTTP").is_err());
    }
}
