//! Values larger than one page allows are cut into pieces inside the same unit: sled would put them into side
//! files that it never syncs. Every value starts with one byte that says whole or cut.

use super::error::StoreError;
use super::key::{Tag, full_key};
use crate::domain::id::NumberId;

/// Largest value of one record, in bytes, its leading byte included.
pub(super) const VALUE_BYTES_MAX: usize = 16 * 1024;

const WHOLE: u8 = 1;
const CUT: u8 = 2;

fn piece_key(number: NumberId, tag: Tag, rest: &[u8], index: u16) -> Vec<u8> {
    let mut piece = Vec::with_capacity(rest.len() + 3);
    piece.push(tag as u8);
    piece.extend_from_slice(rest);
    piece.extend_from_slice(&index.to_be_bytes());
    full_key(number, Tag::Chunk, &piece)
}

/// The records that make up one value.
pub(super) fn encode(number: NumberId, tag: Tag, rest: &[u8], value: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let key = full_key(number, tag, rest);
    if value.len() < VALUE_BYTES_MAX {
        let mut stored = Vec::with_capacity(value.len() + 1);
        stored.push(WHOLE);
        stored.extend_from_slice(value);
        return vec![(key, stored)];
    }
    let pieces: Vec<&[u8]> = value.chunks(VALUE_BYTES_MAX - 1).collect();
    let count = u16::try_from(pieces.len()).unwrap_or(u16::MAX);
    let mut head = vec![CUT];
    head.extend_from_slice(&count.to_be_bytes());
    let mut records = vec![(key, head)];
    for (index, piece) in (0u16..).zip(pieces) {
        records.push((piece_key(number, tag, rest, index), piece.to_vec()));
    }
    records
}

/// How many pieces a stored head has; zero for a whole value.
pub(super) fn piece_count(stored: &[u8]) -> u16 {
    match stored {
        [CUT, high, low] => u16::from_be_bytes([*high, *low]),
        _ => 0,
    }
}

/// The keys of the pieces behind a stored head.
pub(super) fn piece_keys(number: NumberId, tag: Tag, rest: &[u8], stored: &[u8]) -> Vec<Vec<u8>> {
    (0..piece_count(stored)).map(|index| piece_key(number, tag, rest, index)).collect()
}

/// Puts a value together again; `read` gets one record by its full key.
pub(super) fn decode(
    number: NumberId,
    tag: Tag,
    rest: &[u8],
    stored: &[u8],
    read: impl Fn(&[u8]) -> Result<Option<Vec<u8>>, StoreError>,
) -> Result<Vec<u8>, StoreError> {
    match stored.first() {
        Some(&WHOLE) => Ok(stored[1..].to_vec()),
        Some(&CUT) => {
            let mut value = Vec::new();
            for key in piece_keys(number, tag, rest, stored) {
                let piece = read(&key)?.ok_or_else(|| StoreError::Corrupt(format!("missing piece of {tag:?}")))?;
                value.extend_from_slice(&piece);
            }
            Ok(value)
        }
        _ => Err(StoreError::Corrupt(format!("unknown form of {tag:?}"))),
    }
}
