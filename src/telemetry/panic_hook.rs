//! What happens when code panics: it is counted, and its place is logged, a few times a minute at most. Never the
//! payload and never a backtrace: both may carry message bodies, and capturing a backtrace stalls the process.

use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};

use super::clock::Clock;
use super::metrics;

/// Lines a minute; the counter goes on.
const LINES_PER_MINUTE: u64 = 10;
const LINE_BITS: u32 = 16;

/// Installs the hook for the whole process, once; later calls change nothing.
pub fn install(clock: Arc<dyn Clock>) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let budget = LineBudget::default();
        panic::set_hook(Box::new(move |info| {
            metrics::panicked();
            let minute = clock.monotonic().as_secs() / 60;
            if !budget.take(minute) {
                return;
            }
            let (file, line) = info.location().map_or(("unknown", 0), |place| (place.file(), place.line()));
            let thread = std::thread::current();
            tracing::error!(file, line, thread = thread.name().unwrap_or("unnamed"), "panic");
        }));
    });
}

/// Minute and lines spent in it, in one word.
#[derive(Debug, Default)]
struct LineBudget(AtomicU64);

impl LineBudget {
    fn take(&self, minute: u64) -> bool {
        let update = |word: u64| {
            let (known_minute, spent) = (word >> LINE_BITS, word & ((1 << LINE_BITS) - 1));
            let spent = if known_minute == minute { spent } else { 0 };
            (spent < LINES_PER_MINUTE).then_some((minute << LINE_BITS) | (spent + 1))
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_logged_ten_times_a_minute() {
        let budget = LineBudget::default();
        for minute in [0, 1, 7] {
            let lines = (0..1_000).filter(|_| budget.take(minute)).count();
            assert_eq!(lines as u64, LINES_PER_MINUTE, "minute {minute}");
        }
    }
}
