//! Positions as opaque text: page tokens and cursors. A checksum tells a mangled one; none carries any authority, so
//! what it points at is authorised again.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;

/// What a position is in; one kind is never taken for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    Tenants = 1,
    Numbers = 2,
    Messages = 3,
    Events = 4,
    History = 5,
    Capacity = 6,
}

const WORD_BYTES: usize = 8;
const BODY_BYTES: usize = 1 + 2 * WORD_BYTES;
const CHECKSUM_BYTES: usize = 4;

/// The text of a position of two words.
pub(super) fn encode(kind: TokenKind, [first, second]: [u64; 2]) -> String {
    let mut bytes = vec![kind as u8];
    bytes.extend_from_slice(&first.to_be_bytes());
    bytes.extend_from_slice(&second.to_be_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_be_bytes());
    BASE64.encode(bytes)
}

/// The position in a text that `encode` made for the same kind.
pub(super) fn decode(kind: TokenKind, text: &str) -> Option<[u64; 2]> {
    let bytes = BASE64.decode(text).ok()?;
    if bytes.len() != BODY_BYTES + CHECKSUM_BYTES || bytes[0] != kind as u8 {
        return None;
    }
    let (body, checksum) = bytes.split_at(BODY_BYTES);
    if crc32fast::hash(body).to_be_bytes() != checksum {
        return None;
    }
    let word = |from: usize| body[from..from + WORD_BYTES].try_into().ok().map(u64::from_be_bytes);
    Some([word(1)?, word(1 + WORD_BYTES)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_come_back_and_nothing_else_does() {
        let token = encode(TokenKind::Messages, [7, u64::MAX]);
        assert_eq!(decode(TokenKind::Messages, &token), Some([7, u64::MAX]));
        assert_eq!(decode(TokenKind::Events, &token), None);
        for mangled in ["", "0", "AAAA", &token[1..], &token.replace('A', "B")] {
            assert_eq!(decode(TokenKind::Messages, mangled), None, "{mangled}");
        }
    }
}
