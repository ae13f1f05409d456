//! A unit of work: the changes of one number that become durable together or not at all.

use super::error::StoreError;
use super::key::{KEY_BYTES_MAX, Tag};

/// Largest unit, keys and values together, in bytes.
pub const UNIT_BYTES_MAX: usize = 1 << 20;

/// One change of one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes the record.
    Put {
        /// Family.
        tag: Tag,
        /// Key within the family.
        rest: Vec<u8>,
        /// The bytes.
        value: Vec<u8>,
    },
    /// Removes the record; removing what is not there is fine.
    Delete {
        /// Family.
        tag: Tag,
        /// Key within the family.
        rest: Vec<u8>,
    },
}

/// What must hold on disk for the unit to be written; decided by the one writer of the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// No such record yet.
    Absent {
        /// Family.
        tag: Tag,
        /// Key within the family.
        rest: Vec<u8>,
    },
    /// Such a record exists: the change updates it and must not bring it back after a delete.
    Present {
        /// Family.
        tag: Tag,
        /// Key within the family.
        rest: Vec<u8>,
    },
}

/// Whether somebody waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Flushed and synced before it is answered.
    Durable,
    /// Written with the next group; may be lost in a crash. For echoes, logs and caches.
    RidesAlong,
}

/// Changes that belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Applied in order.
    pub ops: Vec<Op>,
    /// All must hold.
    pub checks: Vec<Check>,
    /// Who waits.
    pub durability: Durability,
}

impl Unit {
    /// An empty durable unit. Committing one waits for everything committed before it.
    #[must_use]
    pub fn durable() -> Self {
        Self { ops: Vec::new(), checks: Vec::new(), durability: Durability::Durable }
    }

    /// An empty unit nobody waits for.
    #[must_use]
    pub fn rides_along() -> Self {
        Self { ops: Vec::new(), checks: Vec::new(), durability: Durability::RidesAlong }
    }

    /// Adds a write.
    pub fn put(&mut self, tag: Tag, rest: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> &mut Self {
        self.ops.push(Op::Put { tag, rest: rest.into(), value: value.into() });
        self
    }

    /// Adds a removal.
    pub fn delete(&mut self, tag: Tag, rest: impl Into<Vec<u8>>) -> &mut Self {
        self.ops.push(Op::Delete { tag, rest: rest.into() });
        self
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of keys and values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.ops
            .iter()
            .map(|op| match op {
                Op::Put { rest, value, .. } => rest.len() + value.len() + 9,
                Op::Delete { rest, .. } => rest.len() + 9,
            })
            .sum()
    }

    /// Checks the limits of the store.
    ///
    /// # Errors
    /// `TooLarge`, naming the limit.
    pub fn validate(&self) -> Result<(), StoreError> {
        if self.bytes() > UNIT_BYTES_MAX {
            return Err(StoreError::TooLarge("unit over 1 MiB"));
        }
        let too_long = |rest: &[u8]| rest.len() + 9 > KEY_BYTES_MAX;
        for op in &self.ops {
            let (Op::Put { rest, .. } | Op::Delete { rest, .. }) = op;
            if too_long(rest) {
                return Err(StoreError::TooLarge("key over 512 bytes"));
            }
        }
        Ok(())
    }
}
