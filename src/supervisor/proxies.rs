//! The shell of `domain::proxy`: one breaker for each proxy that numbers of the process connect through, and the numbers
//! that wait for it to work again. No line and no label names a proxy: its address is its owner's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::domain::id::NumberId;
use crate::domain::proxy::{Line, ProxyAddress, Turn, Way};
use crate::number::environment::{Wake, Ways};
use crate::telemetry::clock::Clock;
use crate::telemetry::metrics;
use crate::telemetry::rng::Random;

/// How often it is looked whether somebody is to try a proxy, when nothing says sooner.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Pauses are spread this far, so that proxies that went down together are not tried together.
const JITTER_LEAST: f64 = 0.8;
const JITTER_RANGE: f64 = 0.4;

#[derive(Default)]
struct Known {
    line: Line,
    wakes: HashMap<NumberId, Wake>,
}

/// The breakers of all proxies in use. A proxy that works and has nobody waiting is not remembered.
pub struct ProxyLines {
    lines: Mutex<HashMap<ProxyAddress, Known>>,
    changed: Notify,
    clock: Arc<dyn Clock>,
    random: Arc<Random>,
}

impl std::fmt::Debug for ProxyLines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProxyLines")
    }
}

impl ProxyLines {
    /// Every proxy is taken to work.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, random: Arc<Random>) -> Arc<Self> {
        Arc::new(Self { lines: Mutex::default(), changed: Notify::new(), clock, random })
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<ProxyAddress, Known>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one number at a time try each proxy that is down, until dropped.
    pub async fn run(self: Arc<Self>) {
        loop {
            let pause = self.try_those_due();
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Gives how long until the next one is due.
    fn try_those_due(&self) -> Duration {
        let now = self.clock.monotonic();
        let mut lines = self.lines();
        let mut soonest = LOOK_EVERY;
        for (address, Known { line, wakes }) in lines.iter_mut() {
            while let Some(number) = line.next_probe(now) {
                let awake = wakes.remove(&number).is_some_and(|wake| wake(address));
                if awake {
                    break;
                }
                // Its actor is gone; who comes next will ask.
                line.ended(number, Way::Unknown, 1.0, now);
            }
            soonest = line.next_probe_in(now).map_or(soonest, |due| soonest.min(due));
        }
        show(&lines);
        soonest.max(Duration::from_millis(1))
    }
}

fn show(lines: &HashMap<ProxyAddress, Known>) {
    let down = lines.values().filter(|known| known.line.is_down()).count();
    metrics::proxies(down, lines.values().map(|known| known.line.waiting()).sum());
}

impl Ways for ProxyLines {
    fn enter(&self, proxy: &ProxyAddress, number: NumberId, wake: Wake) -> bool {
        let mut lines = self.lines();
        // A proxy that nobody has failed at is not known, and open.
        let Some(known) = lines.get_mut(proxy) else { return true };
        let may = known.line.enter(number, self.clock.monotonic());
        if may {
            known.wakes.remove(&number);
        } else {
            known.wakes.insert(number, wake);
        }
        drop(lines);
        self.changed.notify_one();
        may
    }

    fn ended(&self, proxy: &ProxyAddress, number: NumberId, way: Way) {
        let jitter = JITTER_LEAST + JITTER_RANGE * self.random.share();
        let mut lines = self.lines();
        let known = lines.entry(proxy.clone()).or_default();
        let mut woken = Vec::new();
        match known.line.ended(number, way, jitter, self.clock.monotonic()) {
            Turn::Same => {}
            Turn::WentDown => tracing::error!(%number, "the proxy of this number is down; all behind it wait for it"),
            Turn::CameBack(waited) => {
                tracing::info!(%number, numbers = waited.len(), "the proxy of this number works again");
                woken.extend(waited.iter().filter_map(|number| known.wakes.remove(number)));
            }
        }
        if known.line.is_idle() {
            lines.remove(proxy);
        }
        show(&lines);
        drop(lines);
        for wake in woken {
            wake(proxy);
        }
        self.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use crate::domain::proxy::Proxy;
    use crate::domain::time::Timestamp;
    use crate::telemetry::clock::ManualClock;

    fn address() -> ProxyAddress {
        Proxy::parse("socks5://127.0.0.1:9").unwrap().address().clone()
    }

    #[test]
    fn whoever_waits_is_woken_once_and_the_dead_are_passed_over() {
        let clock = Arc::new(ManualClock::at(Timestamp(0)));
        let lines = ProxyLines::new(clock.clone(), Arc::new(Random::seeded(1)));
        let woken = Arc::new(AtomicUsize::new(0));
        let wake = |alive: bool| -> Wake {
            let woken = woken.clone();
            Box::new(move |_| {
                woken.fetch_add(usize::from(alive), Ordering::SeqCst);
                alive
            })
        };
        let proxy = address();
        assert!(lines.enter(&proxy, NumberId(0), wake(true)) && lines.lines().is_empty());
        for number in 0..5 {
            lines.ended(&proxy, NumberId(number), Way::Fails);
        }
        for number in 0..100 {
            assert!(!lines.enter(&proxy, NumberId(number), wake(number >= 10)));
        }
        assert!(lines.try_those_due() > Duration::from_secs(3), "not yet");
        clock.advance(Duration::from_secs(7));
        lines.try_those_due();
        assert_eq!(woken.load(Ordering::SeqCst), 1, "one that lives");
        assert!(lines.enter(&proxy, NumberId(10), wake(true)), "it may try");
        lines.ended(&proxy, NumberId(10), Way::Works);
        assert_eq!(woken.load(Ordering::SeqCst), 90, "everybody else");
        assert!(lines.lines().is_empty(), "nothing is left to remember");
    }
}
