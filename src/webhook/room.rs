//! The shell of `domain::budget`: a request has a permit from before its event is read until its answer is there.

use std::sync::{Arc, Mutex, PoisonError};

use crate::domain::budget::{Budget, Class};
use crate::domain::id::NumberId;
use crate::telemetry::metrics;

/// Room for the webhook requests of the whole process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Room(Arc<Mutex<Budget>>);

/// Room for one request, until it is dropped.
#[derive(Debug)]
#[must_use = "without it the request is not counted"]
pub struct Permit {
    room: Room,
    number: NumberId,
    endpoint: u32,
    class: Class,
}

impl Room {
    /// Room for this many requests at once.
    #[must_use]
    pub fn new(most: usize) -> Self {
        let budget = Budget::new(most);
        metrics::webhook_room(budget.most());
        Self(Arc::new(Mutex::new(budget)))
    }

    /// Room for a request to an endpoint of `number`, if it may have it now.
    #[must_use]
    pub fn take(&self, number: NumberId, endpoint: u32, class: Class) -> Option<Permit> {
        let permit = || Permit { room: self.clone(), number, endpoint, class };
        self.change(class, |budget| budget.take(number, endpoint, class)).then(permit)
    }

    fn change<T>(&self, class: Class, change: impl FnOnce(&mut Budget) -> T) -> T {
        let mut budget = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut budget);
        metrics::webhook_requests(class.name(), budget.used(class));
        changed
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.room.change(self.class, |budget| budget.give_back(self.number, self.endpoint, self.class));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permit_gives_its_room_back() {
        let room = Room::new(1);
        let held = room.take(NumberId(1), 1, Class::Live);
        assert!(held.is_some() && room.take(NumberId(2), 1, Class::Live).is_none());
        drop(held);
        assert!(room.take(NumberId(2), 1, Class::Live).is_some());
    }
}
