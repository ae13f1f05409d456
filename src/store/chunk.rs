//! A value as it is stored: sealed, and cut into pieces inside the same unit when it is larger than one page allows
//! (sled would put it into side files that it never syncs). The first byte says which form it has.

use super::error::StoreError;
use super::key::{Tag, full_key};
use super::seal::{OVERHEAD_BYTES, Sealer};
use crate::domain::id::NumberId;
use crate::telemetry::rng::Random;

/// Largest value of one record, in bytes, its leading byte included.
pub(super) const VALUE_BYTES_MAX: usize = 16 * 1024;

/// Sealed, in one record.
pub(super) const WHOLE: u8 = 1;
/// Sealed as one and then cut: the head says into how many pieces.
const CUT: u8 = 2;
/// Nothing at all: a row of an index, whose key says everything.
const EMPTY: u8 = 3;

fn piece_key(number: NumberId, tag: Tag, rest: &[u8], index: u16) -> Vec<u8> {
    let mut piece = Vec::with_capacity(rest.len() + 3);
    piece.push(tag as u8);
    piece.extend_from_slice(rest);
    piece.extend_from_slice(&index.to_be_bytes());
    full_key(number, Tag::Chunk, &piece)
}

/// The records that make up one value, by full key.
pub(super) fn encode(
    number: NumberId,
    tag: Tag,
    rest: &[u8],
    value: &[u8],
    sealer: &Sealer,
    random: &Random,
) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
    let key = full_key(number, tag, rest);
    if value.is_empty() {
        return Ok(vec![(key, vec![EMPTY])]);
    }
    if value.len() + OVERHEAD_BYTES <= VALUE_BYTES_MAX {
        let sealed = sealer.seal(&key, WHOLE, value, random)?;
        return Ok(vec![(key, sealed)]);
    }
    // Sealed before it is cut: pieces of two versions never make a value.
    let sealed = sealer.seal(&key, CUT, value, random)?;
    let pieces: Vec<&[u8]> = sealed.chunks(VALUE_BYTES_MAX).collect();
    let count = u16::try_from(pieces.len()).map_err(|_| StoreError::TooLarge("a value of too many pieces"))?;
    let mut head = vec![CUT];
    head.extend_from_slice(&count.to_be_bytes());
    let mut records = vec![(key, head)];
    for (index, piece) in (0u16..).zip(pieces) {
        records.push((piece_key(number, tag, rest, index), piece.to_vec()));
    }
    Ok(records)
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

/// Puts a value together again and opens it; `read` gets one record by its full key.
pub(super) fn decode(
    number: NumberId,
    tag: Tag,
    rest: &[u8],
    stored: &[u8],
    sealer: &Sealer,
    read: impl Fn(&[u8]) -> Result<Option<Vec<u8>>, StoreError>,
) -> Result<Vec<u8>, StoreError> {
    match stored.first() {
        Some(&EMPTY) if stored.len() == 1 => Ok(Vec::new()),
        Some(&WHOLE) => sealer.open(&full_key(number, tag, rest), stored),
        Some(&CUT) => {
            let mut sealed = Vec::new();
            for key in piece_keys(number, tag, rest, stored) {
                let piece = read(&key)?.ok_or_else(|| StoreError::Corrupt(format!("missing piece of {tag:?}")))?;
                sealed.extend_from_slice(&piece);
            }
            sealer.open(&full_key(number, tag, rest), &sealed)
        }
        _ => Err(StoreError::Corrupt(format!("unknown form of {tag:?}"))),
    }
}
