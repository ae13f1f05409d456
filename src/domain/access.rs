//! API keys and whom they speak for. A key is `ps_<kind>_<id>_<secret><crc>`: the prefix for secret scanners, the id to
//! find it by, 160 random bits, and a checksum so that a typo is told from a wrong key without a look at the store.

use std::fmt;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::id::{NumberId, TenantId};
use super::time::Timestamp;

/// Random bytes one key is made from.
pub const RANDOM_BYTES: usize = ID_RANDOM_BYTES + SECRET_RANDOM_BYTES;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const PREFIX: &str = "ps";
const ID_CHARS: usize = 12;
const ID_RANDOM_BYTES: usize = 9;
const SECRET_CHARS: usize = 27;
const SECRET_RANDOM_BYTES: usize = 20;
const CHECKSUM_CHARS: usize = 6;

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyKind {
    /// The operator of the daemon.
    Operator,
    /// A tenant.
    Tenant,
    /// One number.
    Number,
}

impl KeyKind {
    const ALL: [Self; 3] = [Self::Operator, Self::Tenant, Self::Number];

    const fn mark(self) -> &'static str {
        match self {
            Self::Operator => "op",
            Self::Tenant => "tn",
            Self::Number => "nb",
        }
    }
}

/// A key that was just made: the text for its owner, and the parts to keep. The text is never kept.
pub struct MintedKey {
    /// What the owner presents.
    pub text: String,
    /// Public part, by which it is found.
    pub id: String,
    /// SHA-256 of the secret.
    pub secret_hash: [u8; 32],
    /// Last characters of the text, for people to tell keys apart.
    pub last4: String,
}

impl fmt::Debug for MintedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MintedKey({})", self.id)
    }
}

/// Makes a key from random bytes of cryptographic quality.
#[must_use]
pub fn mint(kind: KeyKind, random: &[u8; RANDOM_BYTES]) -> MintedKey {
    let (for_id, for_secret) = random.split_at(ID_RANDOM_BYTES);
    let mut for_id = for_id.to_vec();
    // Twelve digits hold 71 bits.
    for_id[0] &= 0x7f;
    let id = base62(&for_id, ID_CHARS);
    let secret = base62(for_secret, SECRET_CHARS);
    let mut text = format!("{PREFIX}_{}_{id}_{secret}", kind.mark());
    text.push_str(&checksum(&text));
    MintedKey { last4: text[text.len() - 4..].to_owned(), secret_hash: hash(&secret), id, text }
}

/// A key somebody presented: well-formed and free of typos, nothing more.
pub struct PresentedKey {
    kind: KeyKind,
    id: String,
    secret: String,
}

impl fmt::Debug for PresentedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PresentedKey({:?} {})", self.kind, self.id)
    }
}

/// The text is not a key: wrong shape or wrong checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a well-formed api key")]
pub struct MalformedKey;

impl PresentedKey {
    /// Reads a key as it came in a header.
    ///
    /// # Errors
    /// Anything that could not have been minted.
    pub fn parse(text: &str) -> Result<Self, MalformedKey> {
        if !text.is_ascii() || text.len() < CHECKSUM_CHARS {
            return Err(MalformedKey);
        }
        let (body, crc) = text.split_at(text.len() - CHECKSUM_CHARS);
        if checksum(body) != crc {
            return Err(MalformedKey);
        }
        let mut parts = body.split('_');
        let (Some(PREFIX), Some(mark), Some(id), Some(secret), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(MalformedKey);
        };
        let kind = KeyKind::ALL.into_iter().find(|kind| kind.mark() == mark);
        let shaped = is_base62(id, ID_CHARS) && is_base62(secret, SECRET_CHARS);
        match kind {
            Some(kind) if shaped => Ok(Self { kind, id: id.to_owned(), secret: secret.to_owned() }),
            _ => Err(MalformedKey),
        }
    }

    /// What it claims to be for. Only the stored record says what it is for.
    #[must_use]
    pub fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The public part.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether this is the key that was stored, and still alive. Takes the same time whether the id is unknown
    /// (`None`), expired or the secret wrong.
    #[must_use]
    pub fn is_genuine(&self, stored: Option<StoredKey<'_>>, now: Timestamp) -> bool {
        const NOBODY: [u8; 32] = [0; 32];
        let (known, kept, alive) = match stored {
            Some(stored) => (true, stored.secret_hash, stored.expires_at.is_none_or(|end| now < end)),
            None => (false, &NOBODY, false),
        };
        let same: bool = hash(&self.secret).ct_eq(kept).into();
        same & known & alive
    }
}

/// What was kept of a key, as far as a check needs it.
#[derive(Debug, Clone, Copy)]
pub struct StoredKey<'a> {
    /// SHA-256 of the secret.
    pub secret_hash: &'a [u8; 32],
    /// When it ends, if ever.
    pub expires_at: Option<Timestamp>,
}

/// Who makes a call, after the key was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Caller {
    /// The operator of the daemon: tenants, never their messages.
    Operator,
    /// A tenant: everything of its numbers.
    Tenant(TenantId),
    /// One number: only itself.
    Number {
        /// Which one.
        number: NumberId,
        /// Its owner.
        tenant: TenantId,
    },
}

impl Caller {
    /// The tenant the caller belongs to; the operator belongs to none.
    #[must_use]
    pub const fn tenant(self) -> Option<TenantId> {
        match self {
            Self::Operator => None,
            Self::Tenant(tenant) | Self::Number { tenant, .. } => Some(tenant),
        }
    }

    /// Whether a number of this owner exists as far as the caller can tell. `false` answers like a number that never
    /// existed.
    #[must_use]
    pub fn sees_number(self, number: NumberId, owner: TenantId) -> bool {
        match self {
            Self::Operator => false,
            Self::Tenant(tenant) => tenant == owner,
            Self::Number { number: own, tenant } => own == number && tenant == owner,
        }
    }
}

fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

fn checksum(body: &str) -> String {
    base62(&crc32fast::hash(body.as_bytes()).to_be_bytes(), CHECKSUM_CHARS)
}

fn is_base62(text: &str, chars: usize) -> bool {
    text.len() == chars && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// The big-endian value of `bytes` in base 62, padded to `chars` digits.
fn base62(bytes: &[u8], chars: usize) -> String {
    let mut value = bytes.to_vec();
    let mut digits = vec![0u8; chars];
    for digit in digits.iter_mut().rev() {
        let mut remainder = 0u32;
        for byte in &mut value {
            let dividend = (remainder << 8) | u32::from(*byte);
            // The quotient fits: the remainder is below 62, so the dividend is below 62 * 256.
            *byte = (dividend / 62) as u8;
            remainder = dividend % 62;
        }
        *digit = ALPHABET[remainder as usize];
    }
    debug_assert!(value.iter().all(|byte| *byte == 0), "more bits than {chars} digits hold");
    digits.into_iter().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stored(key: &MintedKey, expires_at: Option<Timestamp>) -> Option<StoredKey<'_>> {
        Some(StoredKey { secret_hash: &key.secret_hash, expires_at })
    }

    #[test]
    fn a_key_has_the_published_shape() {
        let key = mint(KeyKind::Number, &[0xff; RANDOM_BYTES]);
        assert_eq!(key.text.len(), "ps_nb_".len() + 12 + 1 + 27 + 6);
        assert!(key.text.starts_with("ps_nb_"), "{}", key.text);
        assert!(key.text.ends_with(&key.last4));
        assert!(!format!("{key:?}").contains(&key.text[20..40]));
    }

    #[test]
    fn what_was_never_minted_is_malformed() {
        let key = mint(KeyKind::Tenant, &[7; RANDOM_BYTES]).text;
        for text in ["", "ps_tn", "ps_tn_abc_def", "é", &key[1..], &key.replace("tn", "xx"), &format!("{key} ")] {
            assert_eq!(PresentedKey::parse(text).map(drop), Err(MalformedKey), "{text}");
        }
    }

    #[test]
    fn only_the_stored_secret_opens_and_only_until_it_ends() {
        let key = mint(KeyKind::Tenant, &[1; RANDOM_BYTES]);
        let other = mint(KeyKind::Tenant, &[2; RANDOM_BYTES]);
        let presented = PresentedKey::parse(&key.text).unwrap();
        assert_eq!((presented.id(), presented.kind()), (key.id.as_str(), KeyKind::Tenant));
        let now = Timestamp(1_000);
        assert!(presented.is_genuine(stored(&key, None), now));
        assert!(presented.is_genuine(stored(&key, Some(Timestamp(1_001))), now));
        assert!(!presented.is_genuine(stored(&key, Some(now)), now), "expired");
        assert!(!presented.is_genuine(stored(&other, None), now), "another secret");
        assert!(!presented.is_genuine(None, now), "unknown id");
    }

    #[test]
    fn a_caller_sees_its_own_and_nothing_else() {
        let (mine, other) = (TenantId(1), TenantId(2));
        let number = NumberId(10);
        let own = Caller::Number { number, tenant: mine };
        assert!(Caller::Tenant(mine).sees_number(number, mine));
        assert!(own.sees_number(number, mine));
        assert!(!own.sees_number(NumberId(11), mine));
        assert!(!Caller::Tenant(other).sees_number(number, mine));
        assert!(!Caller::Operator.sees_number(number, mine), "the operator reads no messages");
    }

    proptest! {
        #[test]
        fn every_minted_key_is_read_back(random in proptest::array::uniform29(any::<u8>())) {
            for kind in KeyKind::ALL {
                let key = mint(kind, &random);
                let presented = PresentedKey::parse(&key.text).unwrap();
                prop_assert_eq!(presented.kind(), kind);
                prop_assert!(presented.is_genuine(stored(&key, None), Timestamp(0)));
            }
        }

        #[test]
        fn one_wrong_character_is_a_typo(random in proptest::array::uniform29(any::<u8>()), at in 0usize..52, by in 1u8..62) {
            let key = mint(KeyKind::Operator, &random).text;
            let mut bytes = key.into_bytes();
            let position = ALPHABET.iter().position(|byte| *byte == bytes[at]);
            let Some(position) = position else { return Ok(()) };
            bytes[at] = ALPHABET[(position + by as usize) % 62];
            let text = String::from_utf8(bytes).unwrap();
            prop_assert!(PresentedKey::parse(&text).is_err());
        }

        #[test]
        fn junk_is_refused_without_a_panic(text in "\\PC{0,80}") {
            let _ = PresentedKey::parse(&text);
        }
    }
}
