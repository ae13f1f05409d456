//! The composition root: builds every part in order, binds, runs, drains. The only place that wires.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::api::Api;
use crate::api::server::{self, Served};
use crate::config::Config;
use crate::domain::gate::GateLimits;
use crate::domain::limiter::{Limits, Pace};
use crate::number::environment::Environment;
use crate::session::contract::SessionHandle;
use crate::session::link::{self, LinkConfig, LinkEnvironment, LinkParams, Purpose};
use crate::session::opener::{OpenPurpose, OpenRequest, Opener};
use crate::store::layout::{OpenError, Store};
use crate::supervisor::fleet::Fleet;
use crate::supervisor::gate::ConnectGate;
use crate::telemetry::clock::{Clock, SystemClock};
use crate::telemetry::metrics::Exposition;
use crate::telemetry::rng::Random;
use crate::webhook::client::{self, WebhookClient};
use crate::webhook::guard::Policy;

/// Time kept back from the grace period for closing sessions and the store.
const CLOSING_TIME: Duration = Duration::from_secs(5);

/// The daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A listener.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// Anything else that had to be there.
    #[error("{part}: {error}")]
    Part {
        /// Which part.
        part: &'static str,
        /// What it said.
        error: String,
    },
}

fn part<E: std::fmt::Display>(part: &'static str) -> impl FnOnce(E) -> StartError {
    move |error| StartError::Part { part, error: error.to_string() }
}

/// A running daemon.
pub struct Daemon {
    api: Arc<Api>,
    fleet: Fleet,
    store: Arc<Store>,
    gate: Arc<ConnectGate>,
    sessions: Arc<LinkEnvironment>,
    public: Served,
    admin: Served,
    grace: Duration,
    root_ended: JoinHandle<()>,
    gate_task: AbortOnDrop,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("public", &self.public.address()).finish_non_exhaustive()
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Opens linked sessions.
struct LinkedOpener(Arc<LinkEnvironment>);

impl Opener for LinkedOpener {
    fn open(&self, request: OpenRequest) -> SessionHandle {
        let purpose = match request.purpose {
            OpenPurpose::Pair { expected } => Purpose::Pair { expected },
            OpenPurpose::Connect => Purpose::Connect,
        };
        let OpenRequest { store, slot, events, span, .. } = request;
        link::open(&self.0, LinkParams { store, purpose, slot, events, span })
    }
}

impl Daemon {
    /// Builds and starts everything. The API answers when this returns; numbers connect behind.
    ///
    /// # Errors
    /// See [`StartError`]; nothing runs then.
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        let public = listen(config.api.listen).await?;
        let admin = listen(config.admin.listen).await?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let random = Arc::new(Random::from_system().map_err(part("randomness"))?);
        let exposition = Exposition::install().map_err(part("metrics"))?;
        let (dir, secret) = (config.data.dir.clone(), random.bytes());
        let opened = tokio::task::spawn_blocking(move || Store::open(&dir, secret)).await;
        let store = Arc::new(opened.map_err(part("store"))??);
        let operator_key = server::ensure_operator_key(store.meta(), &random, clock.as_ref(), &config.data.dir);
        operator_key.await.map_err(part("operator key"))?;
        let version = config.whatsapp.version.map(|version| (version.primary, version.secondary, version.tertiary));
        let link = LinkConfig { url: config.whatsapp.url.to_string(), client_version: version };
        let sessions = LinkEnvironment::new(link).map_err(part("whatsapp"))?;
        let gate = ConnectGate::new(gate_limits(config), clock.clone());
        let policy = if config.webhook.allow_private { Policy::AllowPrivate } else { Policy::PublicOnly };
        let webhooks = WebhookClient::new(client::Config { policy, timeout: config.webhook.timeout });
        let environment = Arc::new(Environment {
            clock: clock.clone(),
            random: random.clone(),
            store: store.clone(),
            opener: Arc::new(LinkedOpener(sessions.clone())),
            gate: gate.clone(),
            webhooks: webhooks.map_err(part("webhooks"))?,
            limits: limits(config),
        });
        let gate_task = AbortOnDrop(tokio::task::spawn(gate.clone().run()));
        let (fleet, root_ended) = Fleet::start(environment).await.map_err(part("supervisor"))?;
        let api = Api::new(store.clone(), fleet.clone(), clock, random, policy, sessions.is_sandbox_build());
        let public = server::serve_public(public, &api, &config.api).map_err(part("api"))?;
        let admin = server::serve_admin(admin, &api, exposition).map_err(part("admin"))?;
        tracing::info!(api = %public.address(), admin = %admin.address(), "ready");
        let grace = config.shutdown.grace;
        Ok(Self { api, fleet, store, gate, sessions, public, admin, grace, root_ended, gate_task })
    }

    /// Where gRPC and the JSON API answer.
    #[must_use]
    pub fn public_address(&self) -> SocketAddr {
        self.public.address()
    }

    /// Where metrics and probes answer.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.address()
    }

    /// The numbers.
    #[must_use]
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// Returns when the supervisor has died: nothing can go on then.
    pub async fn supervisor_died(&mut self) {
        let _ = (&mut self.root_ended).await;
    }

    /// Goes down in order: no new sends, streams end, numbers finish and close, then the store. `hurry` skips to
    /// the store.
    pub async fn drain(self, hurry: impl Future<Output = ()>) {
        tracing::info!("draining");
        self.api.begin_drain();
        self.gate.close();
        let deadline = self.grace.saturating_sub(CLOSING_TIME);
        let orderly = async {
            self.fleet.drain(deadline).await;
            self.sessions.shutdown(CLOSING_TIME).await;
            self.public.shutdown(Duration::from_secs(1)).await;
        };
        tokio::select! {
            () = orderly => {}
            () = hurry => tracing::warn!("drain cut short"),
        }
        drop(self.gate_task);
        let store = self.store;
        let _ = tokio::task::spawn_blocking(move || store.close()).await;
        self.admin.shutdown(Duration::from_millis(100)).await;
        tracing::info!("stopped");
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|error| StartError::Listen { address, error })
}

fn gate_limits(config: &Config) -> GateLimits {
    GateLimits {
        per_second: config.gate.connects_per_second,
        burst: config.gate.burst,
        concurrent: config.gate.concurrent,
    }
}

fn limits(config: &Config) -> Limits {
    Limits {
        number: Pace { interval: config.limits.interval, burst: config.limits.burst },
        chat: Pace { interval: config.limits.chat_interval, burst: config.limits.chat_burst },
    }
}
