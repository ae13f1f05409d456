//! What all sessions of the process share: the address, TLS, the HTTP pool, the version of WhatsApp Web we say
//! we are, and the ownership of every session's task.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use whatsapp_rust::wacore::net::{HttpClient, WHATSAPP_WEB_WS_URL};

use super::http::LinkHttp;
use super::trust::is_sandbox_build;

/// A version of WhatsApp Web, for instance 2.3000.1026131876.
pub type ClientVersion = (u32, u32, u32);

/// How long a version is good for. WhatsApp expires versions after weeks; the library asks daily.
const VERSION_FRESH: Duration = Duration::from_secs(24 * 3600);
/// Pause after a failed look-up, so that ten thousand numbers do not each wait for the same dead host.
const VERSION_RETRY: Duration = Duration::from_secs(30);
/// Longest time one look-up may take.
const VERSION_TIMEOUT: Duration = Duration::from_secs(20);

/// Where WhatsApp is.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// WebSocket address; [`LinkConfig::default`] is WhatsApp's own. `ws://` is for loopback only.
    pub url: String,
    /// The version to claim. `None`: the current one, looked up once and then daily.
    pub client_version: Option<ClientVersion>,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self { url: WHATSAPP_WEB_WS_URL.to_owned(), client_version: None }
    }
}

/// The environment cannot be set up as configured.
#[derive(Debug, thiserror::Error)]
pub enum EnvironmentError {
    /// The address is not a `ws://` or `wss://` URL with a host.
    #[error("not a WebSocket address (ws:// or wss:// with a host)")]
    Address,
    /// The TLS settings were refused.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The HTTP client was refused.
    #[error("HTTP client: {0}")]
    Http(#[from] reqwest::Error),
}

pub(super) struct Endpoint {
    pub(super) url: String,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: Option<(TlsConnector, ServerName<'static>)>,
    /// Without TLS, or without a certificate check in the handshake, nothing may leave the machine.
    pub(super) loopback_only: bool,
}

#[derive(Default)]
struct Versions {
    known: Option<(ClientVersion, Instant)>,
    failed_at: Option<Instant>,
}

/// Shared by all linked sessions of the process.
pub struct LinkEnvironment {
    endpoint: Endpoint,
    http: Arc<dyn HttpClient>,
    fixed_version: Option<ClientVersion>,
    versions: tokio::sync::Mutex<Versions>,
    sandbox_build: bool,
    sessions: Mutex<JoinSet<()>>,
    stop: watch::Sender<bool>,
}

impl std::fmt::Debug for LinkEnvironment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkEnvironment")
            .field("host", &self.endpoint.host)
            .field("sandbox_build", &self.sandbox_build)
            .finish_non_exhaustive()
    }
}

fn tls_config() -> Result<rustls::ClientConfig, rustls::Error> {
    let roots: rustls::RootCertStore = webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect();
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    Ok(builder.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth())
}

fn endpoint(text: &str, tls: &rustls::ClientConfig, sandbox_build: bool) -> Result<Endpoint, EnvironmentError> {
    let url = url::Url::parse(text).map_err(|_| EnvironmentError::Address)?;
    let host = url.host_str().ok_or(EnvironmentError::Address)?;
    let host = host.trim_matches(['[', ']']).to_owned();
    let (default_port, is_secure) = match url.scheme() {
        "wss" => (443, true),
        "ws" => (80, false),
        _ => return Err(EnvironmentError::Address),
    };
    let tls = if is_secure {
        let name = ServerName::try_from(host.clone()).map_err(|_| EnvironmentError::Address)?;
        Some((TlsConnector::from(Arc::new(tls.clone())), name))
    } else {
        None
    };
    Ok(Endpoint {
        url: text.to_owned(),
        port: url.port().unwrap_or(default_port),
        host,
        tls,
        loopback_only: sandbox_build || !is_secure,
    })
}

impl LinkEnvironment {
    /// Sets up what sessions share. Nothing is contacted yet.
    ///
    /// # Errors
    /// See [`EnvironmentError`].
    pub fn new(config: LinkConfig) -> Result<Arc<Self>, EnvironmentError> {
        // Another part of the process may have been first; both install the same.
        let _ = ring::default_provider().install_default();
        let sandbox_build = is_sandbox_build();
        if sandbox_build {
            tracing::warn!("sandbox build: certificates are not checked, only the loopback interface is reachable");
        }
        let tls = tls_config()?;
        let endpoint = endpoint(&config.url, &tls, sandbox_build)?;
        Ok(Arc::new(Self {
            endpoint,
            http: Arc::new(LinkHttp::new(tls, sandbox_build)?),
            fixed_version: config.client_version,
            versions: tokio::sync::Mutex::default(),
            sandbox_build,
            sessions: Mutex::default(),
            stop: watch::Sender::new(false),
        }))
    }

    /// Whether this build accepts forged certificates and therefore stays on the loopback interface.
    #[must_use]
    pub fn is_sandbox_build(&self) -> bool {
        self.sandbox_build
    }

    /// Sessions whose tasks have not ended.
    #[must_use]
    pub fn live_sessions(&self) -> usize {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        while sessions.try_join_next().is_some() {}
        sessions.len()
    }

    /// Asks every session to close politely and waits for them, at most `deadline`; then drops what is left.
    /// Sessions opened afterwards close at once. Returns how many had to be dropped.
    pub async fn shutdown(&self, deadline: Duration) -> usize {
        self.stop.send_replace(true);
        let until = Instant::now() + deadline;
        let mut sessions = std::mem::take(&mut *self.sessions.lock().unwrap_or_else(PoisonError::into_inner));
        while !sessions.is_empty() {
            if timeout_at(until, sessions.join_next()).await.is_err() {
                break;
            }
        }
        let left = sessions.len();
        sessions.shutdown().await;
        left
    }

    pub(super) fn own(&self, session: impl Future<Output = ()> + Send + 'static) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        while sessions.try_join_next().is_some() {}
        sessions.spawn(session);
    }

    pub(super) fn stop_signal(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(super) fn http(&self) -> Arc<dyn HttpClient> {
        self.http.clone()
    }

    /// The version to claim. The last one that worked is used when the look-up fails; `None` only when there never
    /// was one.
    pub(super) async fn client_version(&self) -> Option<ClientVersion> {
        if self.fixed_version.is_some() {
            return self.fixed_version;
        }
        // Held during the look-up: everybody else would ask the same.
        let mut versions = self.versions.lock().await;
        let known = versions.known.map(|(version, _)| version);
        let is_fresh = versions.known.is_some_and(|(_, at)| at.elapsed() < VERSION_FRESH);
        let failed_lately = versions.failed_at.is_some_and(|at| at.elapsed() < VERSION_RETRY);
        if is_fresh || failed_lately {
            return known;
        }
        let lookup = whatsapp_rust::version::fetch_latest_app_version(&self.http);
        if let Ok(Ok(version)) = timeout(VERSION_TIMEOUT, lookup).await {
            versions.known = Some((version, Instant::now()));
            versions.failed_at = None;
            return Some(version);
        }
        tracing::warn!(has_earlier = known.is_some(), "version of WhatsApp Web not found");
        versions.failed_at = Some(Instant::now());
        known
    }

    /// The server called the version outdated: look it up again before the next connection.
    pub(super) async fn distrust_version(&self) {
        let mut versions = self.versions.lock().await;
        // The version itself stays: it is still better than none.
        if let Some((version, _)) = versions.known
            && let Some(long_ago) = Instant::now().checked_sub(VERSION_FRESH)
        {
            versions.known = Some((version, long_ago));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str, sandbox_build: bool) -> Result<Endpoint, EnvironmentError> {
        endpoint(url, &tls_config().unwrap(), sandbox_build)
    }

    #[test]
    fn what_is_not_protected_stays_on_this_machine() {
        let real = parse(WHATSAPP_WEB_WS_URL, false).unwrap();
        assert!(real.tls.is_some() && !real.loopback_only);
        assert_eq!((real.host.as_str(), real.port), ("web.whatsapp.com", 443));
        let plain = parse("ws://127.0.0.1:7480/ws/chat", false).unwrap();
        assert!(plain.tls.is_none() && plain.loopback_only);
        assert!(parse(WHATSAPP_WEB_WS_URL, true).unwrap().loopback_only);
        for url in ["http://127.0.0.1", "ws://", "x"] {
            assert!(parse(url, false).is_err(), "{url}");
        }
    }

    #[tokio::test]
    async fn a_version_that_was_found_survives_a_failing_look_up() {
        let config = LinkConfig { url: "ws://127.0.0.1:9/".to_owned(), client_version: None };
        let environment = LinkEnvironment::new(config).unwrap();
        environment.versions.lock().await.failed_at = Some(Instant::now());
        assert_eq!(environment.client_version().await, None);
        environment.versions.lock().await.known = Some(((2, 3000, 1), Instant::now()));
        environment.distrust_version().await;
        assert_eq!(environment.client_version().await, Some((2, 3000, 1)));
    }
}
