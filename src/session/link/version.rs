//! The version of WhatsApp Web that the process says it is: one for all sessions, looked up by one task, kept on disk.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};
use whatsapp_rust::wacore::net::HttpClient;

use crate::domain::version::{ClientVersion, Found, Source, Versions, WORRYING_AGE};
use crate::store::error::StoreError;
use crate::store::meta::Meta;
use crate::telemetry::clock::Clock;
use crate::telemetry::metrics;

/// Longest time one look-up may take.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a session waits for the first version of all.
const FIRST_WITHIN: Duration = Duration::from_secs(25);
/// How far pauses between look-ups are spread.
const JITTER: std::ops::Range<f64> = 0.9..1.1;

/// What an operator sees of the version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionCard {
    /// The version in force and where it comes from; none while nothing was ever found.
    pub in_force: Option<(ClientVersion, Source)>,
    /// The last successful look-up.
    pub found: Option<Found>,
}

/// The version of the process. Sessions read it, one task looks it up, the operator may say which it is.
pub struct ClientVersions {
    state: Mutex<Versions>,
    in_force: watch::Sender<Option<ClientVersion>>,
    look: Notify,
    http: Arc<dyn HttpClient>,
    clock: Arc<dyn Clock>,
    meta: Option<Arc<Meta>>,
    /// One order at a time, so that the disk and the memory agree on the last one.
    ordering: tokio::sync::Mutex<()>,
    started: Instant,
}

impl std::fmt::Debug for ClientVersions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientVersions").field("in_force", &*self.in_force.borrow()).finish_non_exhaustive()
    }
}

impl ClientVersions {
    pub(super) fn new(
        configured: Option<ClientVersion>,
        meta: Option<Arc<Meta>>,
        http: Arc<dyn HttpClient>,
        clock: Arc<dyn Clock>,
    ) -> Arc<Self> {
        let kept = meta.as_ref().map(|meta| meta.client_version()).unwrap_or_default();
        let state = Versions::new(configured, kept);
        let in_force = watch::Sender::new(state.in_force().map(|(version, _)| version));
        let versions = Self {
            state: Mutex::new(state),
            in_force,
            look: Notify::new(),
            http,
            clock,
            meta,
            ordering: tokio::sync::Mutex::default(),
            started: Instant::now(),
        };
        versions.show();
        Arc::new(versions)
    }

    fn state(&self) -> MutexGuard<'_, Versions> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whenever another version comes into force.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<ClientVersion>> {
        self.in_force.subscribe()
    }

    /// What an operator sees.
    #[must_use]
    pub fn card(&self) -> VersionCard {
        let state = self.state();
        VersionCard { in_force: state.in_force(), found: state.kept().found }
    }

    /// The version to claim. Waits only while there never was one; `None` when none is found in time.
    pub(super) async fn current(&self) -> Option<ClientVersion> {
        let mut watching = self.in_force.subscribe();
        let found = timeout(FIRST_WITHIN, watching.wait_for(Option::is_some)).await;
        found.ok()?.ok().and_then(|version| *version)
    }

    /// WhatsApp refused the version: it is looked up again.
    pub(super) fn distrust(&self) {
        self.state().distrust(self.started.elapsed());
        self.look.notify_one();
    }

    /// The operator says which version it is, or with `None` takes that back. Durable when this returns.
    ///
    /// # Errors
    /// When the disk refuses; the version is as it was then.
    pub async fn order(&self, version: Option<ClientVersion>) -> Result<VersionCard, StoreError> {
        let _one = self.ordering.lock().await;
        if let Some(meta) = &self.meta {
            meta.keep_client_version(|kept| kept.ordered = version).await?;
        }
        self.state().order(version);
        self.publish();
        self.look.notify_one();
        Ok(self.card())
    }

    /// Looks it up whenever that is due, until dropped.
    pub async fn run(self: Arc<Self>) {
        loop {
            let pause = self.state().lookup_in(self.started.elapsed());
            match pause {
                Some(Duration::ZERO) => self.look_up().await,
                Some(pause) => {
                    tokio::select! {
                        () = sleep(pause) => {}
                        () = self.look.notified() => {}
                    }
                }
                None => self.look.notified().await,
            }
        }
    }

    async fn look_up(&self) {
        self.state().asked(self.started.elapsed());
        let lookup = whatsapp_rust::version::fetch_latest_app_version(&self.http);
        let Ok(Ok((primary, secondary, tertiary))) = timeout(LOOKUP_TIMEOUT, lookup).await else {
            self.not_found();
            return;
        };
        let found = Found { version: ClientVersion { primary, secondary, tertiary }, at: self.clock.now() };
        self.state().found(found, rand::random_range(JITTER), self.started.elapsed());
        self.publish();
        if let Some(meta) = &self.meta
            && meta.keep_client_version(|kept| kept.found = Some(found)).await.is_err()
        {
            tracing::warn!("the version of whatsapp web could not be kept: a restart has to find it again");
        }
    }

    fn not_found(&self) {
        self.state().lookup_failed(self.started.elapsed());
        let age = self.card().found.map(|found| self.clock.now().since(found.at));
        let age_hours = age.map(|age| age.as_secs() / 3600);
        if age.is_some_and(|age| age < WORRYING_AGE) {
            tracing::warn!(age_hours, "version of whatsapp web not found, the last one is used");
        } else {
            tracing::error!(age_hours, "version of whatsapp web not found for too long");
        }
    }

    fn publish(&self) {
        let in_force = self.card().in_force;
        let version = in_force.map(|(version, _)| version);
        let changed = self.in_force.send_if_modified(|before| {
            let changed = *before != version;
            *before = version;
            changed
        });
        if changed && let Some((version, source)) = in_force {
            tracing::info!(%version, source = source.name(), "version of whatsapp web");
        }
        self.show();
    }

    fn show(&self) {
        let card = self.card();
        for source in Source::ALL {
            let is_present = card.in_force.is_some_and(|(_, present)| present == source);
            metrics::client_version_source(source.name(), is_present);
        }
        metrics::client_version_found(card.found.map_or(0, |found| found.at.as_secs()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::clock::SystemClock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use anyhow::bail;
    use async_trait::async_trait;
    use whatsapp_rust::wacore::net::{HttpRequest, HttpResponse};

    use crate::store::layout::{Store, StoreSettings};
    use crate::telemetry::rng::Random;

    /// Serves the script that names the version, and counts who asks; 0 is a server that fails.
    #[derive(Default)]
    struct Web {
        tertiary: AtomicU32,
        asked: AtomicU32,
    }

    #[async_trait]
    impl HttpClient for Web {
        async fn execute(&self, _request: HttpRequest) -> anyhow::Result<HttpResponse> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            match self.tertiary.load(Ordering::SeqCst) {
                0 => bail!("no answer"),
                tertiary => {
                    let body = format!(r#"x={{"dynamic_data":{{\"client_revision\":{tertiary},\"a\":1}}}}"#);
                    Ok(HttpResponse { status_code: 200, body: body.into_bytes() })
                }
            }
        }
    }

    fn version(tertiary: u32) -> ClientVersion {
        ClientVersion { primary: 2, secondary: 3000, tertiary }
    }

    #[tokio::test]
    async fn it_is_looked_up_once_for_everybody_and_the_last_good_one_stays() {
        let web = Arc::new(Web::default());
        web.tertiary.store(7, Ordering::SeqCst);
        let versions = ClientVersions::new(None, None, web.clone(), Arc::new(SystemClock::new()));
        let _running = Abort(tokio::task::spawn(versions.clone().run()));
        let mut sessions = tokio::task::JoinSet::new();
        for _ in 0..1_000 {
            let versions = versions.clone();
            sessions.spawn(async move { versions.current().await });
        }
        assert!(sessions.join_all().await.iter().all(|found| *found == Some(version(7))));
        assert_eq!(web.asked.load(Ordering::SeqCst), 1, "one for all");
        web.tertiary.store(8, Ordering::SeqCst);
        let mut watching = versions.watch();
        versions.look_up().await;
        assert!(watching.has_changed().unwrap(), "the gate hears of it");
        assert_eq!(*watching.borrow_and_update(), Some(version(8)));
        web.tertiary.store(0, Ordering::SeqCst);
        versions.look_up().await;
        assert_eq!(versions.current().await, Some(version(8)));
        assert!(!watching.has_changed().unwrap());
    }

    #[tokio::test]
    async fn nobody_is_asked_while_an_order_holds() {
        let web = Arc::new(Web::default());
        web.tertiary.store(7, Ordering::SeqCst);
        let versions = ClientVersions::new(None, None, web.clone(), Arc::new(SystemClock::new()));
        versions.order(Some(version(9))).await.unwrap();
        let _running = Abort(tokio::task::spawn(versions.clone().run()));
        versions.distrust();
        assert_eq!((versions.current().await, web.asked.load(Ordering::SeqCst)), (Some(version(9)), 0));
        let mut watching = versions.watch();
        versions.order(None).await.unwrap();
        watching.wait_for(|now| *now == Some(version(7))).await.unwrap();
        assert_eq!(web.asked.load(Ordering::SeqCst), 1, "not before");
    }

    #[tokio::test]
    async fn what_was_found_or_ordered_survives_a_restart_without_an_answer() {
        let dir = std::env::temp_dir().join(format!("switchboard-version-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let settings = StoreSettings::at(&dir, Arc::new(Random::seeded(7)));
        let web = Arc::new(Web::default());
        web.tertiary.store(7, Ordering::SeqCst);
        let store = Store::open(&settings).unwrap();
        ClientVersions::new(None, Some(store.meta().clone()), web.clone(), Arc::new(SystemClock::new()))
            .look_up()
            .await;
        store.close();
        drop(store);
        web.tertiary.store(0, Ordering::SeqCst);
        let store = Store::open(&settings).unwrap();
        let versions = ClientVersions::new(None, Some(store.meta().clone()), web.clone(), Arc::new(SystemClock::new()));
        versions.look_up().await;
        assert_eq!(versions.current().await, Some(version(7)));
        assert_eq!(versions.card().in_force, Some((version(7), Source::Kept)));
        versions.order(Some(version(9))).await.unwrap();
        store.close();
        drop((store, versions));
        let store = Store::open(&settings).unwrap();
        let versions =
            ClientVersions::new(Some(version(8)), Some(store.meta().clone()), web, Arc::new(SystemClock::new()));
        assert_eq!(versions.card().in_force, Some((version(9), Source::Override)));
        assert_eq!(versions.card().found.map(|found| found.version), Some(version(7)));
        store.close();
        std::fs::remove_dir_all(&dir).unwrap();
    }

    struct Abort(tokio::task::JoinHandle<()>);

    impl Drop for Abort {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
}
