//! How busy the process is, for routers: its share of the CPU, calls and failures per second, and how much of the room
//! for calls is taken. Measured when somebody asks, at most once a second.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Figures younger than this are given again.
const FRESH: Duration = Duration::from_secs(1);
/// Ticks of `/proc/self/stat` per second: the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// How busy the process is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Share of all cores.
    pub cpu: f64,
    /// Calls answered per second.
    pub calls: f64,
    /// Calls per second that failed.
    pub failures: f64,
    /// Share of the room for calls that is taken.
    pub room: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    at: Duration,
    ticks: u64,
    calls: u64,
    failures: u64,
    load: Load,
}

/// Counts what the figures need.
#[derive(Debug)]
pub struct LoadMeter {
    calls: AtomicU64,
    failures: AtomicU64,
    under_way: AtomicUsize,
    room: usize,
    last: Mutex<Sample>,
}

impl LoadMeter {
    /// For a listener that takes so many calls at once.
    #[must_use]
    pub fn new(room: usize) -> Self {
        Self {
            calls: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            under_way: AtomicUsize::new(0),
            room: room.max(1),
            last: Mutex::default(),
        }
    }

    /// A call begins.
    #[must_use]
    pub fn begin(&self) -> UnderWay<'_> {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay(self)
    }

    /// The figures; `now` is monotonic.
    #[must_use]
    pub fn load(&self, now: Duration) -> Load {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let room = self.under_way.load(Ordering::Relaxed) as f64 / self.room as f64;
        let took = now.saturating_sub(last.at);
        if took >= FRESH {
            let ticks = cpu_ticks().unwrap_or(last.ticks);
            let (calls, failures) = (self.calls.load(Ordering::Relaxed), self.failures.load(Ordering::Relaxed));
            let each_second = |new: u64, old: u64| new.saturating_sub(old) as f64 / took.as_secs_f64();
            let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as f64;
            let load = Load {
                cpu: each_second(ticks, last.ticks) / TICKS_PER_SECOND / cores,
                calls: each_second(calls, last.calls),
                failures: each_second(failures, last.failures),
                room,
            };
            *last = Sample { at: now, ticks, calls, failures, load };
        }
        Load { room, ..last.load }
    }
}

/// A call under way; one that is given up without an end counts as answered by nobody.
#[derive(Debug)]
pub struct UnderWay<'a>(&'a LoadMeter);

impl UnderWay<'_> {
    /// It was answered.
    pub fn end(self, failed: bool) {
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        self.0.failures.fetch_add(u64::from(failed), Ordering::Relaxed);
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// User and system time of the process.
fn cpu_ticks() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in brackets may hold anything.
    let fields: Vec<_> = stat.rsplit(')').next()?.split_whitespace().skip(11).take(2).collect();
    fields.iter().map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_of_the_time_since_they_were_last_taken() {
        let meter = LoadMeter::new(4);
        let _one = meter.begin();
        for failed in [false, true, false, false] {
            meter.begin().end(failed);
        }
        let load = meter.load(Duration::from_secs(2));
        assert_eq!((load.calls, load.failures, load.room), (2.0, 0.5, 0.25));
        let begun = std::time::Instant::now();
        while cpu_ticks() <= Some(meter.last.lock().unwrap().ticks) {
            assert!(begun.elapsed() < Duration::from_secs(30), "work takes no time");
        }
        assert_eq!(meter.load(Duration::from_millis(2500)).calls, 2.0, "fresh enough");
        let later = meter.load(Duration::from_secs(4));
        assert_eq!((later.calls, later.failures), (0.0, 0.0));
        assert!(later.cpu > 0.0);
    }
}
