//! Finds numbers without asking any actor.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::domain::id::NumberId;
use crate::number::handle::NumberHandle;

/// Every number of the process, running or not.
#[derive(Debug, Default)]
pub struct Directory {
    numbers: RwLock<HashMap<NumberId, Arc<NumberHandle>>>,
}

impl Directory {
    /// One number.
    #[must_use]
    pub fn get(&self, id: NumberId) -> Option<Arc<NumberHandle>> {
        self.numbers.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// All of them, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<NumberHandle>> {
        self.numbers.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.numbers.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn insert(&self, handle: Arc<NumberHandle>) {
        self.numbers.write().unwrap_or_else(PoisonError::into_inner).insert(handle.id(), handle);
    }

    pub(super) fn remove(&self, id: NumberId) {
        self.numbers.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}
