//! Opaque identifiers as customers see them: a prefix that names the kind, then lowercase Crockford base32.
//! An id of something a number owns carries the number's id, so that it can be found without an index and
//! never collides with another number's.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Characters of a 64-bit value in base32.
const WORD_CHARS: usize = 13;

/// The text is not an id of the expected kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {kind} id")]
pub struct InvalidId {
    /// The prefix that was expected, for instance `num`.
    pub kind: &'static str,
}

fn encode_word(mut value: u64, out: &mut String) {
    let mut digits = [0u8; WORD_CHARS];
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[(value & 31) as usize];
        value >>= 5;
    }
    out.extend(digits.iter().map(|digit| char::from(*digit)));
}

fn decode_word(text: &str) -> Option<u64> {
    if text.len() != WORD_CHARS {
        return None;
    }
    let mut value: u64 = 0;
    for byte in text.bytes() {
        let digit = ALPHABET.iter().position(|candidate| *candidate == byte)? as u64;
        value = value.checked_mul(32)?.checked_add(digit)?;
    }
    Some(value)
}

fn decode_words<const N: usize>(text: &str, kind: &'static str) -> Result<[u64; N], InvalidId> {
    let invalid = InvalidId { kind };
    let rest = text.strip_prefix(kind).and_then(|rest| rest.strip_prefix('_')).ok_or(invalid)?;
    if !rest.is_ascii() || rest.len() != N * WORD_CHARS {
        return Err(invalid);
    }
    let mut words = [0u64; N];
    for (index, word) in words.iter_mut().enumerate() {
        *word = decode_word(&rest[index * WORD_CHARS..(index + 1) * WORD_CHARS]).ok_or(invalid)?;
    }
    Ok(words)
}

macro_rules! text_form {
    ($name:ident, $kind:literal, $words:literal, $from:expr, $into:expr) => {
        impl $name {
            /// The prefix of this kind of id.
            pub const KIND: &'static str = $kind;
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let words: [u64; $words] = $into(*self);
                let mut text = String::with_capacity($kind.len() + 1 + words.len() * WORD_CHARS);
                text.push_str($kind);
                text.push('_');
                for word in words {
                    encode_word(word, &mut text);
                }
                f.write_str(&text)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let words: [u64; $words] = decode_words(text, $kind)?;
                $from(words).ok_or(InvalidId { kind: $kind })
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// One WhatsApp connection. Random, never the phone number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NumberId(pub u64);
text_form!(NumberId, "num", 1, |[n]: [u64; 1]| Some(NumberId(n)), |id: NumberId| [id.0]);

/// The owner of numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(pub u64);
text_form!(TenantId, "ten", 1, |[n]: [u64; 1]| Some(TenantId(n)), |id: TenantId| [id.0]);

/// Position of a message in its number's history; grows by arrival, both directions share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MessageSeq(pub u64);

/// Position of an event in its number's gap-free log; the first event is 1.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EventSeq(pub u64);

/// A message as customers name it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId {
    /// The number that sent or received it.
    pub number: NumberId,
    /// Its place in the number's history.
    pub seq: MessageSeq,
}
text_form!(
    MessageId,
    "msg",
    2,
    |[n, s]: [u64; 2]| Some(MessageId { number: NumberId(n), seq: MessageSeq(s) }),
    |id: MessageId| [id.number.0, id.seq.0]
);

/// An event as customers name it; stable over webhook retries.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId {
    /// The number it tells of.
    pub number: NumberId,
    /// Its place in the number's log.
    pub seq: EventSeq,
}
text_form!(
    EventId,
    "evt",
    2,
    |[n, s]: [u64; 2]| Some(EventId { number: NumberId(n), seq: EventSeq(s) }),
    |id: EventId| [id.number.0, id.seq.0]
);

/// A webhook subscription of one number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId {
    /// The number whose events it receives.
    pub number: NumberId,
    /// Counts up from 1 within the number; never used again after a delete.
    pub ordinal: u32,
}
text_form!(
    EndpointId,
    "whk",
    2,
    |[n, o]: [u64; 2]| Some(EndpointId { number: NumberId(n), ordinal: u32::try_from(o).ok()? }),
    |id: EndpointId| [id.number.0, u64::from(id.ordinal)]
);

/// Place of a contact or group in its number's chat table; short, so that keys stay short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ChatNo(pub u32);

/// Incarnation of a number's ownership; a write with an older one is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub u64);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_id_survives_its_text(n in any::<u64>(), s in any::<u64>(), o in any::<u32>()) {
            let number = NumberId(n);
            prop_assert_eq!(number.to_string().parse::<NumberId>(), Ok(number));
            let message = MessageId { number, seq: MessageSeq(s) };
            prop_assert_eq!(message.to_string().parse::<MessageId>(), Ok(message));
            let endpoint = EndpointId { number, ordinal: o };
            prop_assert_eq!(endpoint.to_string().parse::<EndpointId>(), Ok(endpoint));
        }

        #[test]
        fn junk_is_refused_without_a_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<MessageId>();
        }
    }

    #[test]
    fn a_kind_is_not_taken_for_another() {
        let number = NumberId(7).to_string();
        assert_eq!(number.parse::<TenantId>(), Err(InvalidId { kind: "ten" }));
        assert!("num_zzzzzzzzzzzzz".parse::<NumberId>().is_err(), "more than 64 bits");
        assert!("num_0000000000007x".parse::<NumberId>().is_err());
    }
}
