//! What every number is given to act with.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::message::GateTurn;
use crate::domain::gate::{Outcome, Priority};
use crate::domain::id::NumberId;
use crate::domain::number::SendingRules;
use crate::domain::proxy::{ProxyAddress, Way};
use crate::domain::retention::Policy;
use crate::domain::webhook::Schedule;
use crate::session::opener::Opener;
use crate::store::layout::Store;
use crate::telemetry::backoff::Shape;
use crate::telemetry::clock::Clock;
use crate::telemetry::rng::Random;
use crate::webhook::client::WebhookClient;
use crate::webhook::room::Room;

/// Numbers that look for what is too old at once.
pub const SWEEPS_AT_ONCE: usize = 4;

/// Shared by all numbers of the process.
pub struct Environment {
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Randomness.
    pub random: Arc<Random>,
    /// The disk.
    pub store: Arc<Store>,
    /// Sessions.
    pub opener: Arc<dyn Opener>,
    /// Turns to connect.
    pub gate: Arc<dyn Turnstile>,
    /// Whether proxies work.
    pub ways: Arc<dyn Ways>,
    /// Webhook deliveries.
    pub webhooks: WebhookClient,
    /// How many of them may be under way in the process, and whose turn it is.
    pub webhook_room: Room,
    /// When webhook deliveries are tried again.
    pub webhook_schedule: Schedule,
    /// What a number may send, and what it does in doubt.
    pub sending: SendingRules,
    /// How long things are kept.
    pub policy: Policy,
    /// Turns to look for what is too old, so that a fleet does not look all at once.
    pub sweeps: Arc<Semaphore>,
    /// Waits between its connections.
    pub reconnect: Shape,
}

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Environment")
    }
}

/// Gives turns to connect.
pub trait Turnstile: Send + Sync {
    /// Queues the number; `granted` is called once with its turn, unless it leaves first.
    fn ask(&self, number: NumberId, priority: Priority, granted: Box<dyn FnOnce(GateTurn) + Send>);
    /// Leaves the queue, or gives the turn back.
    fn leave(&self, number: NumberId);
    /// A number that waits got something to send.
    fn promote(&self, number: NumberId);
    /// Tells how a number's attempt ended. A refused version is also told by one that was online.
    fn report(&self, number: NumberId, outcome: Outcome);
}

/// Tells a number that the way through this proxy may be tried; false when there is nobody to tell.
pub type Wake = Box<dyn Fn(&ProxyAddress) -> bool + Send>;

/// Knows whether the proxies of numbers work.
pub trait Ways: Send + Sync {
    /// Whether the number may connect through the proxy. If not it waits, and is woken once when it may.
    fn enter(&self, proxy: &ProxyAddress, number: NumberId, wake: Wake) -> bool;
    /// What a connection through the proxy showed.
    fn ended(&self, proxy: &ProxyAddress, number: NumberId, way: Way);
}

/// A number's use of its proxy, from the wish to connect to the end of the attempt. Dropping it says that nothing was
/// learned: somebody else may try.
pub struct Passage {
    ways: Arc<dyn Ways>,
    number: NumberId,
    proxy: ProxyAddress,
    shown: Way,
}

impl Passage {
    /// The number goes this way.
    #[must_use]
    pub fn new(ways: Arc<dyn Ways>, number: NumberId, proxy: ProxyAddress) -> Self {
        Self { ways, number, proxy, shown: Way::Unknown }
    }

    /// Which proxy it is about.
    #[must_use]
    pub fn proxy(&self) -> &ProxyAddress {
        &self.proxy
    }

    /// The attempt is over.
    pub fn end(mut self, way: Way) {
        self.shown = way;
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.ways.ended(&self.proxy, self.number, self.shown);
    }
}

impl std::fmt::Debug for Passage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passage")
    }
}
