//! The composition root: builds every part in order, binds, runs, drains. The only place that wires.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::api::drain::{self, DrainTrigger};
use crate::api::grpc::server::Health;
use crate::api::http::admin::{AdminParts, admin};
use crate::api::http::server::{PublicLimits, public, serve};
use crate::api::keys::ensure_operator_key;
use crate::api::service::{Api, Parts};
use crate::config::sections::Config;
use crate::domain::gate::GateLimits;
use crate::domain::limiter::{Limits, Pace};
use crate::domain::number::SendingRules;
use crate::domain::retention::Policy as Keeping;
use crate::domain::version::ClientVersion;
use crate::number::environment::{Environment, SWEEPS_AT_ONCE};
use crate::session::contract::SessionHandle;
use crate::session::link::{self, LinkConfig, LinkEnvironment, LinkParams, Purpose};
use crate::session::opener::{OpenPurpose, OpenRequest, Opener};
use crate::store::error::{OpenError, StoreError};
use crate::store::layout::{Store, StoreSettings};
use crate::store::master::MasterKeys;
use crate::store::number_store::NumberStore;
use crate::store::storage::{self, Checked, RebuildError, Rebuilt};
use crate::supervisor::fleet::Fleet;
use crate::supervisor::gate::ConnectGate;
use crate::supervisor::proxies::ProxyLines;
use crate::telemetry::clock::{Clock, SystemClock};
use crate::telemetry::descriptors;
use crate::telemetry::failpoint::{self, Failpoint};
use crate::telemetry::load::LoadMeter;
use crate::telemetry::metrics::Exposition;
use crate::telemetry::rng::Random;
use crate::telemetry::service_manager;
use crate::webhook::client::{self, WebhookClient};
use crate::webhook::guard::{self, Policy};
use crate::webhook::room::Room;

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
    fleet: Fleet,
    store: Arc<Store>,
    gate: Arc<ConnectGate>,
    sessions: Arc<LinkEnvironment>,
    health: Health,
    public: Listener,
    admin: Listener,
    grace: Duration,
    root_ended: JoinHandle<()>,
    /// What runs beside the numbers.
    tasks: Vec<AbortOnDrop>,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("public", &self.public.address).finish_non_exhaustive()
    }
}

/// A listener and the task that serves it.
struct Listener {
    address: SocketAddr,
    drain: DrainTrigger,
    served: AbortOnDrop,
}

impl Listener {
    fn serve(listener: TcpListener, address: SocketAddr, router: Router, drain: (DrainTrigger, drain::Drain)) -> Self {
        let (trigger, drain) = drain;
        let served = AbortOnDrop(tokio::task::spawn(serve(listener, router, drain)));
        Self { address, drain: trigger, served }
    }

    /// Takes no more connections and lets the open ones finish, for as long as `patience`.
    async fn close(mut self, patience: Duration) {
        self.drain.begin();
        let _ = tokio::time::timeout(patience, &mut self.served.0).await;
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

#[async_trait::async_trait]
impl Opener for LinkedOpener {
    fn open(&self, request: OpenRequest) -> SessionHandle {
        let purpose = match request.purpose {
            OpenPurpose::Pair { expected, by } => Purpose::Pair { expected, by },
            OpenPurpose::Connect => Purpose::Connect,
        };
        let OpenRequest { store, proxy, slot, events, span, .. } = request;
        link::open(&self.0, LinkParams { store, purpose, proxy, slot, events, span })
    }

    async fn is_linked(&self, store: &NumberStore) -> bool {
        link::is_linked(store).await
    }

    async fn forget(&self, store: &NumberStore) -> Result<(), StoreError> {
        link::forget_device(store).await
    }
}

impl Daemon {
    /// Builds and starts everything. The API answers when this returns; numbers connect behind.
    ///
    /// # Errors
    /// See [`StartError`]; nothing runs then.
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        let (public_listener, public_address) = listen(config.api.listen).await?;
        let (admin_listener, admin_address) = listen(config.admin.listen).await?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let random = Arc::new(Random::from_system().map_err(part("randomness"))?);
        let exposition = Exposition::install().map_err(part("metrics"))?;
        let settings = store_settings(config, random.clone());
        let opened = tokio::task::spawn_blocking(move || Store::open(&settings)).await;
        let store = Arc::new(opened.map_err(part("store"))??);
        descriptors::ensure(store.meta().numbers(None).len()).map_err(part("open files"))?;
        let operator_key = ensure_operator_key(store.meta(), &random, clock.as_ref(), &config.data.dir).await;
        let operator_key = operator_key.map_err(part("operator key"))?;
        let (booted, admin_drain) = (Arc::new(OnceLock::new()), drain::channel());
        let parts = AdminParts {
            store: store.clone(),
            fleet: booted.clone(),
            clock: clock.clone(),
            exposition,
            drain: admin_drain.1.clone(),
        };
        let admin = Listener::serve(admin_listener, admin_address, admin(parts), admin_drain);
        let policy = if config.webhook.allow_private { Policy::AllowPrivate } else { Policy::PublicOnly };
        let Built { sessions, gate, ways, environment } = environment(config, &store, &clock, &random, policy)?;
        let tasks = [
            AbortOnDrop(tokio::task::spawn(gate.clone().run())),
            AbortOnDrop(tokio::task::spawn(ways.run())),
            AbortOnDrop(tokio::task::spawn(sessions.versions().clone().run())),
            AbortOnDrop(tokio::task::spawn(tell_gate_of_versions(sessions.versions().watch(), gate.clone()))),
        ];
        let (fleet, root_ended) = Fleet::start(environment).await.map_err(part("supervisor"))?;
        let watchdog = AbortOnDrop(tokio::task::spawn(feed_watchdog(fleet.clone())));
        let public_drain = drain::channel();
        let api = Api::new(Parts {
            store: store.clone(),
            fleet: fleet.clone(),
            clock,
            random,
            versions: sessions.versions().clone(),
            webhook_policy: policy,
            proxy_policy: proxy_policy(config),
            drain: public_drain.1.clone(),
            stream_patience: config.api.stream_patience,
            load: LoadMeter::new(config.api.concurrent_requests),
        });
        let _ = booted.set(fleet.clone());
        let limits =
            PublicLimits { concurrent_requests: config.api.concurrent_requests, deadline: config.api.deadline };
        let (router, health) = public(&api, limits).await.map_err(part("api"))?;
        let public = Listener::serve(public_listener, public_address, router, public_drain);
        tracing::info!(operator_key = %operator_key.display(), "operator key");
        tracing::info!(api = %public.address, admin = %admin.address, "ready");
        service_manager::ready();
        let grace = config.shutdown.grace;
        let tasks = tasks.into_iter().chain([watchdog]).collect();
        Ok(Self { fleet, store, gate, sessions, health, public, admin, grace, root_ended, tasks })
    }

    /// Where gRPC and the JSON API answer.
    #[must_use]
    pub fn public_address(&self) -> SocketAddr {
        self.public.address
    }

    /// Where metrics and probes answer.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.address
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
        service_manager::stopping();
        failpoint::reach(Failpoint::DrainBegun);
        let Self { fleet, store, gate, sessions, health, public, admin, grace, tasks, .. } = self;
        health.set_serving(false).await;
        gate.close();
        let deadline = grace.saturating_sub(CLOSING_TIME);
        let orderly = async {
            // Streams end with their cursor; calls under way are answered while the numbers finish.
            tokio::join!(fleet.drain(deadline), public.close(deadline));
            sessions.shutdown(CLOSING_TIME).await;
        };
        tokio::select! {
            () = orderly => {}
            () = hurry => tracing::warn!("drain cut short"),
        }
        drop(tasks);
        failpoint::reach(Failpoint::DrainBeforeClose);
        let closing = store.clone();
        let _ = tokio::task::spawn_blocking(move || closing.close()).await;
        failpoint::reach(Failpoint::DrainAfterClose);
        admin.close(Duration::from_millis(200)).await;
        tracing::info!("stopped");
    }
}

/// Where and how everything is kept.
#[must_use]
pub fn store_settings(config: &Config, random: Arc<Random>) -> StoreSettings {
    let mut settings = StoreSettings::at(&config.data.dir, random);
    settings.low_water_bytes = config.store.low_water_bytes;
    if let Some(file) = &config.store.master_key_file {
        settings.master_key_file.clone_from(file);
    }
    settings
}

/// Puts a new master key in front of the old ones and returns its id; the next start uses it.
///
/// # Errors
/// When the file cannot be read or written.
pub fn rotate_master_key(config: &Config) -> Result<String, StartError> {
    let random = Random::from_system().map_err(part("randomness"))?;
    let settings = store_settings(config, Arc::new(random));
    Ok(MasterKeys::rotate(&settings.master_key_file, &settings.random).map_err(OpenError::from)?)
}

/// Removes every master key but the newest and returns how many went.
///
/// # Errors
/// When a daemon runs, or something is still wrapped under an older key.
pub fn drop_old_master_keys(config: &Config) -> Result<usize, StartError> {
    let random = Random::from_system().map_err(part("randomness"))?;
    Ok(Store::drop_older_masters(&store_settings(config, Arc::new(random)))?)
}

/// Looks at every volume of a daemon that is down.
///
/// # Errors
/// When it is not down, or there is no room for a copy.
pub fn check_storage(config: &Config) -> Result<Vec<Checked>, RebuildError> {
    storage::check(&store_settings(config, Arc::new(random_of_system()?)))
}

/// Builds one volume of a daemon that is down anew.
///
/// # Errors
/// See [`RebuildError`].
pub async fn rebuild_volume(config: &Config, name: &str, accept_loss: bool) -> Result<Rebuilt, RebuildError> {
    storage::rebuild(&store_settings(config, Arc::new(random_of_system()?)), name, accept_loss).await
}

fn random_of_system() -> Result<Random, StoreError> {
    Random::from_system().map_err(|error| StoreError::Failed(format!("randomness: {error}")))
}

/// What numbers act with, and the parts of it that run by themselves.
struct Built {
    sessions: Arc<LinkEnvironment>,
    gate: Arc<ConnectGate>,
    ways: Arc<ProxyLines>,
    environment: Arc<Environment>,
}

/// What every number acts with.
fn environment(
    config: &Config,
    store: &Arc<Store>,
    clock: &Arc<dyn Clock>,
    random: &Arc<Random>,
    policy: Policy,
) -> Result<Built, StartError> {
    let link = LinkConfig {
        url: config.whatsapp.url.to_string(),
        client_version: config.whatsapp.version,
        proxies: match proxy_policy(config) {
            Policy::PublicOnly => |address| guard::check_address(address, Policy::PublicOnly).is_ok(),
            Policy::AllowPrivate => |_| true,
        },
        meta: Some(store.meta().clone()),
        clock: clock.clone(),
    };
    let sessions = LinkEnvironment::new(link).map_err(part("whatsapp"))?;
    let gate = ConnectGate::new(gate_limits(config), clock.clone());
    let ways = ProxyLines::new(clock.clone(), random.clone());
    let webhooks = WebhookClient::new(client::Config { policy, timeout: config.webhook.timeout });
    let environment = Arc::new(Environment {
        clock: clock.clone(),
        random: random.clone(),
        store: store.clone(),
        opener: Arc::new(LinkedOpener(sessions.clone())),
        gate: gate.clone(),
        ways: ways.clone(),
        webhooks: webhooks.map_err(part("webhooks"))?,
        webhook_room: Room::new(config.webhook.concurrent),
        webhook_schedule: config.webhook.schedule,
        sending: SendingRules { limits: limits(config), on_unknown: config.sending.on_unknown },
        policy: policy_of(config),
        sweeps: Arc::new(Semaphore::new(SWEEPS_AT_ONCE)),
        reconnect: config.reconnect,
    });
    Ok(Built { sessions, gate, ways, environment })
}

fn proxy_policy(config: &Config) -> Policy {
    if config.whatsapp.allow_private_proxies { Policy::AllowPrivate } else { Policy::PublicOnly }
}

/// Tells the service manager that the supervisor answers; one that does not is restarted from outside.
async fn feed_watchdog(fleet: Fleet) {
    let Some(every) = service_manager::alive_every() else { return };
    loop {
        match tokio::time::timeout(every, fleet.ping()).await {
            Ok(true) => service_manager::alive(),
            // It is gone: the daemon goes down, or is about to.
            Ok(false) => return,
            Err(_) => tracing::error!("the supervisor does not answer"),
        }
        tokio::time::sleep(every).await;
    }
}

async fn tell_gate_of_versions(mut versions: watch::Receiver<Option<ClientVersion>>, gate: Arc<ConnectGate>) {
    while versions.changed().await.is_ok() {
        gate.version_changed();
    }
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |error| StartError::Listen { address, error };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
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
        new_recipients: config.limits.new_recipients,
    }
}

fn policy_of(config: &Config) -> Keeping {
    let retention = &config.retention;
    Keeping {
        events_kept: retention.events,
        events_max: retention.events_max.into(),
        attempts_kept: retention.attempts,
        attempts_max: retention.attempts_max,
        dead_letters_kept: retention.dead_letters,
        sweep_every: retention.sweep,
    }
}
