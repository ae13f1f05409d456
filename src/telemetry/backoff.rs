//! How long to wait before trying again. The crate `backoff` is used as a calculator of the growing ceiling and named
//! in this file alone; the jitter below the ceiling is ours, so that a seed repeats it.

use std::time::Duration;

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff as _;

use super::rng::Random;

/// Shape of one kind of wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The longest the first wait can be.
    pub first_ceiling: Duration,
    /// The longest any can be.
    pub last_ceiling: Duration,
    /// No wait is shorter: a full jitter may otherwise draw next to nothing, many times in a row.
    pub floor: Duration,
}

/// Shortest wait between two connections of a number.
pub const RECONNECT_FLOOR: Duration = Duration::from_millis(100);
const RESTART: Shape = Shape {
    first_ceiling: Duration::from_millis(500),
    last_ceiling: Duration::from_mins(1),
    floor: Duration::from_millis(250),
};
const GROWTH: f64 = 2.0;

/// Waits that grow from failure to failure, with full jitter, and never come to an end.
#[derive(Debug)]
pub struct Backoff {
    ceiling: ExponentialBackoff,
    floor: Duration,
}

impl Backoff {
    /// Between two connections of a number.
    #[must_use]
    pub fn connection(shape: Shape) -> Self {
        Self::of(shape)
    }

    /// Between two starts of a crashed actor: up to 0.5 s at first, up to 60 s in the end.
    #[must_use]
    pub fn restart() -> Self {
        Self::of(RESTART)
    }

    fn of(shape: Shape) -> Self {
        Self {
            ceiling: ExponentialBackoff {
                current_interval: shape.first_ceiling,
                initial_interval: shape.first_ceiling,
                randomization_factor: 0.0,
                multiplier: GROWTH,
                max_interval: shape.last_ceiling,
                // The crate gives up after 15 minutes unless told otherwise.
                max_elapsed_time: None,
                ..ExponentialBackoff::default()
            },
            floor: shape.floor,
        }
    }

    /// The next wait.
    pub fn next_delay(&mut self, random: &Random) -> Duration {
        let longest = self.ceiling.max_interval;
        let ceiling = self.ceiling.next_backoff().unwrap_or(longest);
        ceiling.mul_f64(random.share()).max(self.floor)
    }

    /// Starts over; call it once the connection or the actor proved healthy.
    pub fn reset(&mut self) {
        self.ceiling.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONNECTION: Shape =
        Shape { first_ceiling: Duration::from_secs(1), last_ceiling: Duration::from_mins(15), floor: RECONNECT_FLOOR };

    #[test]
    fn it_never_gives_up_and_stays_below_its_ceiling() {
        let random = Random::seeded(1);
        for (mut backoff, shape) in [(Backoff::connection(CONNECTION), CONNECTION), (Backoff::restart(), RESTART)] {
            let mut ceiling = shape.first_ceiling;
            for _ in 0..10_000 {
                let delay = backoff.next_delay(&random);
                assert!(delay >= shape.floor && delay <= ceiling, "{delay:?} above {ceiling:?}");
                ceiling = (ceiling * 2).min(shape.last_ceiling);
            }
        }
    }

    #[test]
    fn the_calculator_itself_has_no_end() {
        let mut backoff = Backoff::connection(CONNECTION);
        backoff.ceiling.start_time -= Duration::from_hours(24 * 365).min(Duration::from_hours(1));
        assert!(backoff.ceiling.next_backoff().is_some(), "gives up by elapsed time");
    }

    #[test]
    fn jitter_spreads_over_the_whole_range() {
        let random = Random::seeded(2);
        let mut backoff = Backoff::connection(CONNECTION);
        for _ in 0..20 {
            let _ = backoff.next_delay(&random);
        }
        let delays: Vec<_> = (0..1_000).map(|_| backoff.next_delay(&random)).collect();
        let below_half = delays.iter().filter(|delay| **delay < CONNECTION.last_ceiling / 2).count();
        assert!((400..600).contains(&below_half), "{below_half} of 1000");
    }

    #[test]
    fn reset_starts_over() {
        let random = Random::seeded(3);
        let mut backoff = Backoff::restart();
        for _ in 0..20 {
            let _ = backoff.next_delay(&random);
        }
        backoff.reset();
        assert!(backoff.next_delay(&random) <= RESTART.first_ceiling);
    }
}
