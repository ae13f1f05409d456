//! Who may have one of the process's webhook requests. Each costs a socket, so all numbers share one budget: whoever
//! holds much of it is refused first, so that there is always some left for whoever holds nothing; and what nobody
//! waits for may only use a part.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;

use super::id::NumberId;

/// The part of the budget that is open to background requests is this one.
const BACKGROUND_PART: usize = 2;

/// Whether somebody waits for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The first attempt of an event.
    Live,
    /// A repeat, a probe, a late delivery or a replay.
    Background,
}

impl Class {
    /// Label for the metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Background => "background",
        }
    }
}

/// The budget and who holds what of it. Grows only with the numbers that hold something.
#[derive(Debug)]
pub struct Budget {
    most: usize,
    live: usize,
    background: usize,
    numbers: HashMap<NumberId, usize>,
    endpoints: HashMap<(NumberId, u32), usize>,
}

impl Budget {
    /// A budget of this many requests, of which nobody holds any.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), live: 0, background: 0, numbers: HashMap::new(), endpoints: HashMap::new() }
    }

    /// Requests of one class under way.
    #[must_use]
    pub fn used(&self, class: Class) -> usize {
        match class {
            Class::Live => self.live,
            Class::Background => self.background,
        }
    }

    /// Requests that may be under way.
    #[must_use]
    pub fn most(&self) -> usize {
        self.most
    }

    /// Takes one for an endpoint of a number: if the number holds fewer than are left for others, and the endpoint no
    /// more than are then left for its siblings. Whoever holds nothing gets one as long as there is any.
    pub fn take(&mut self, number: NumberId, endpoint: u32, class: Class) -> bool {
        let free = self.most - self.live - self.background;
        let room = match class {
            Class::Live => free,
            Class::Background => free.min((self.most / BACKGROUND_PART).max(1).saturating_sub(self.background)),
        };
        let of_number = self.numbers.get(&number).copied().unwrap_or(0);
        let of_endpoint = self.endpoints.get(&(number, endpoint)).copied().unwrap_or(0);
        if of_number >= room || (of_endpoint > 0 && of_endpoint >= (room - of_number) / 2) {
            return false;
        }
        self.numbers.insert(number, of_number + 1);
        self.endpoints.insert((number, endpoint), of_endpoint + 1);
        *self.of(class) += 1;
        true
    }

    /// Gives back what [`Self::take`] gave.
    pub fn give_back(&mut self, number: NumberId, endpoint: u32, class: Class) {
        if one_less(&mut self.endpoints, (number, endpoint)) && one_less(&mut self.numbers, number) {
            let used = self.of(class);
            *used = used.saturating_sub(1);
        }
    }

    fn of(&mut self, class: Class) -> &mut usize {
        match class {
            Class::Live => &mut self.live,
            Class::Background => &mut self.background,
        }
    }
}

/// Gives whether there was one.
fn one_less<K: Eq + Hash>(held: &mut HashMap<K, usize>, of: K) -> bool {
    let Entry::Occupied(mut entry) = held.entry(of) else { return false };
    *entry.get_mut() -= 1;
    if *entry.get() == 0 {
        entry.remove();
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take_all(budget: &mut Budget, number: u64, endpoint: u32, class: Class) -> usize {
        std::iter::from_fn(|| budget.take(NumberId(number), endpoint, class).then_some(())).take(1000).count()
    }

    #[test]
    fn whoever_takes_what_it_can_get_leaves_some_for_everybody_else() {
        let mut budget = Budget::new(64);
        let taken: Vec<usize> = (1..=30).map(|number| take_all(&mut budget, number, 1, Class::Live)).collect();
        assert!(taken.is_sorted_by(|one, next| one >= next), "{taken:?}");
        assert!(taken[0] == 16 && taken[9] > 0 && taken.iter().sum::<usize>() == 64, "{taken:?}");
        budget.give_back(NumberId(1), 1, Class::Live);
        assert_eq!(take_all(&mut budget, 1, 1, Class::Live), 0, "not for who holds most");
        assert_eq!(take_all(&mut budget, 31, 1, Class::Live), 1);
    }

    #[test]
    fn one_endpoint_leaves_some_for_its_siblings() {
        let mut budget = Budget::new(4);
        assert_eq!(take_all(&mut budget, 1, 1, Class::Live), 1);
        assert_eq!(take_all(&mut budget, 1, 2, Class::Live), 1);
        assert_eq!(take_all(&mut budget, 1, 3, Class::Live), 0, "the rest is for other numbers");
        assert_eq!(take_all(&mut budget, 2, 1, Class::Live), 1);
    }

    #[test]
    fn background_leaves_a_part_to_what_somebody_waits_for() {
        let mut budget = Budget::new(16);
        let taken: usize = (1..=100).map(|number| take_all(&mut budget, number, 1, Class::Background)).sum();
        assert_eq!((taken, budget.used(Class::Background)), (8, 8));
        let taken: usize = (101..=200).map(|number| take_all(&mut budget, number, 1, Class::Live)).sum();
        assert_eq!((taken, budget.used(Class::Live)), (8, 8));
        budget.give_back(NumberId(101), 1, Class::Live);
        assert!(!budget.take(NumberId(300), 1, Class::Background), "what became free is not for it");
        assert!(budget.take(NumberId(300), 1, Class::Live));
    }

    #[test]
    fn the_smallest_budget_still_serves_everybody_in_turn() {
        let mut budget = Budget::new(0);
        for (number, class) in [(1, Class::Live), (2, Class::Background)] {
            assert!(budget.take(NumberId(number), 1, class));
            assert!(!budget.take(NumberId(3), 1, Class::Live));
            budget.give_back(NumberId(number), 1, class);
        }
    }

    proptest! {
        #[test]
        fn it_is_never_overdrawn_and_nothing_of_it_is_lost(
            most in 1usize..40, steps in proptest::collection::vec((0u64..12, any::<bool>(), any::<bool>()), 0..300),
        ) {
            let mut budget = Budget::new(most);
            let mut held = Vec::new();
            for (holder, takes, live) in steps {
                let class = if live { Class::Live } else { Class::Background };
                let (number, endpoint) = (NumberId(holder / 2), u32::from(holder % 2 == 0));
                if takes && budget.take(number, endpoint, class) {
                    held.push((number, endpoint, class));
                } else if let Some(index) = held.iter().position(|(of, ..)| *of == number) {
                    let (number, endpoint, class) = held.swap_remove(index);
                    budget.give_back(number, endpoint, class);
                }
                prop_assert!(held.len() <= most);
                let of = |class| held.iter().filter(|(.., of)| *of == class).count();
                prop_assert_eq!(budget.used(Class::Live), of(Class::Live));
                prop_assert_eq!(budget.used(Class::Background), of(Class::Background));
                prop_assert!(of(Class::Background) <= (most / BACKGROUND_PART).max(1));
            }
            for (number, endpoint, class) in held {
                budget.give_back(number, endpoint, class);
            }
            prop_assert!(budget.numbers.is_empty() && budget.endpoints.is_empty());
            prop_assert_eq!((budget.live, budget.background), (0, 0));
        }
    }
}
