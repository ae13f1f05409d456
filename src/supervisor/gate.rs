//! The shell of `domain::gate`: gives turns to connect, one process-wide queue for boot, storms and restarts alike.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use crate::domain::gate::{Cause, Figures, Gate, GateLimits, Mode, Notice, Outcome, Priority};
use crate::domain::id::NumberId;
use crate::number::environment::Turnstile;
use crate::number::message::GateTurn;
use crate::telemetry::clock::Clock;
use crate::telemetry::metrics;

type Granted = Box<dyn FnOnce(GateTurn) + Send>;

struct Queue {
    gate: Gate,
    waiting: HashMap<NumberId, Granted>,
    closed: bool,
}

/// Gives turns to connect.
pub struct ConnectGate {
    queue: Mutex<Queue>,
    changed: Notify,
    clock: Arc<dyn Clock>,
    own: Weak<Self>,
}

impl std::fmt::Debug for ConnectGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConnectGate")
    }
}

impl ConnectGate {
    /// A gate at rest; it grants only while [`Self::run`] runs.
    #[must_use]
    pub fn new(limits: GateLimits, clock: Arc<dyn Clock>) -> Arc<Self> {
        let gate = Gate::new(limits, clock.monotonic());
        let queue = Queue { gate, waiting: HashMap::new(), closed: false };
        Arc::new_cyclic(|own| Self { queue: Mutex::new(queue), changed: Notify::new(), clock, own: own.clone() })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No more turns: the process is going down.
    pub fn close(&self) {
        self.queue().closed = true;
    }

    /// The sessions claim another version of WhatsApp Web from now on.
    pub fn version_changed(&self) {
        self.queue().gate.version_changed(self.clock.monotonic());
        self.changed.notify_one();
    }

    /// Gives turns until dropped.
    pub async fn run(self: Arc<Self>) {
        loop {
            let pause = self.grant();
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep(pause.unwrap_or(Duration::from_secs(1))) => {}
            }
        }
    }

    fn grant(&self) -> Option<Duration> {
        let mut turns = Vec::new();
        let pause = {
            let mut queue = self.queue();
            if queue.closed {
                return None;
            }
            let now = self.clock.monotonic();
            for number in queue.gate.grant(now) {
                match queue.waiting.remove(&number) {
                    Some(granted) => turns.push((number, granted)),
                    None => queue.gate.leave(number, now),
                }
            }
            show(queue.gate.figures());
            queue.gate.next_grant_in(now)
        };
        for (number, granted) in turns {
            metrics::gate_grant();
            let own = self.own.clone();
            let give_back = Box::new(move || {
                if let Some(gate) = own.upgrade() {
                    gate.leave(number);
                }
            });
            granted(GateTurn(Some(give_back)));
        }
        pause
    }
}

impl Turnstile for ConnectGate {
    fn ask(&self, number: NumberId, priority: Priority, granted: Granted) {
        {
            let mut queue = self.queue();
            queue.gate.ask(number, priority);
            queue.waiting.insert(number, granted);
        }
        self.changed.notify_one();
    }

    fn leave(&self, number: NumberId) {
        let forgotten = {
            let mut queue = self.queue();
            queue.gate.leave(number, self.clock.monotonic());
            queue.waiting.remove(&number)
        };
        drop(forgotten);
        self.changed.notify_one();
    }

    fn promote(&self, number: NumberId) {
        self.queue().gate.promote(number);
    }

    fn report(&self, number: NumberId, outcome: Outcome) {
        let notice = self.queue().gate.report(number, outcome, self.clock.monotonic());
        if let Some(notice) = notice {
            tell(notice);
        }
        self.changed.notify_one();
    }
}

fn show(figures: Figures) {
    metrics::gate(figures.waiting, figures.under_way, figures.rate_milli as f64 / 1000.0);
    for mode in Mode::ALL {
        metrics::gate_mode(mode.name(), mode == figures.mode);
    }
}

/// One line for each turn of events; those at `error` are worth waking somebody for.
fn tell(notice: Notice) {
    match notice {
        Notice::Slowed => tracing::warn!("gate: most connections fail, the pace is halved"),
        Notice::Held(Cause::Failing) => {
            tracing::error!("gate: every connection fails, one at a time is tried from now on");
        }
        Notice::Held(Cause::Outdated) => {
            tracing::error!("gate: whatsapp refuses our version (405), the fleet waits for another one");
        }
        Notice::CanaryFailed(pause) => {
            metrics::gate_canary_failed();
            tracing::warn!(pause_seconds = pause.as_secs(), "gate: the canary failed");
        }
        Notice::Released(cause) => {
            metrics::gate_released();
            tracing::info!(?cause, "gate: the canary came online, the others follow");
        }
        Notice::Restored => tracing::info!("gate: back at the configured pace"),
    }
}
