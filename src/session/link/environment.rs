//! What all sessions of the process share: the address, TLS, the HTTP pool, the version of WhatsApp Web, and the
//! ownership of every session's task.

use std::future::Future;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use whatsapp_rust::wacore::net::{HttpClient, WHATSAPP_WEB_WS_URL};

use super::http::LinkHttp;
use super::proxy::Reach;
use super::trust::is_sandbox_build;
use super::version::ClientVersions;
use crate::domain::version::ClientVersion;
use crate::store::meta::Meta;
use crate::telemetry::clock::{Clock, SystemClock};

/// Where WhatsApp is.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// WebSocket address; [`LinkConfig::default`] is WhatsApp's own. `ws://` is for loopback only.
    pub url: String,
    /// The version to claim. `None`: the current one, which is looked up, unless the operator says another.
    pub client_version: Option<ClientVersion>,
    /// Which addresses a proxy of a number may have.
    pub proxies: fn(IpAddr) -> bool,
    /// Where the version is kept; without it, it is found again after a restart.
    pub meta: Option<Arc<Meta>>,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            url: WHATSAPP_WEB_WS_URL.to_owned(),
            client_version: None,
            proxies: |_| true,
            meta: None,
            clock: Arc::new(SystemClock::new()),
        }
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

/// Shared by all linked sessions of the process.
pub struct LinkEnvironment {
    endpoint: Endpoint,
    http: Arc<dyn HttpClient>,
    versions: Arc<ClientVersions>,
    proxies: fn(IpAddr) -> bool,
    clock: Arc<dyn Clock>,
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
        let http: Arc<dyn HttpClient> = Arc::new(LinkHttp::new(tls, sandbox_build)?);
        Ok(Arc::new(Self {
            endpoint,
            versions: ClientVersions::new(config.client_version, config.meta, http.clone(), config.clock.clone()),
            http,
            proxies: config.proxies,
            clock: config.clock,
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

    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The version of WhatsApp Web that all sessions claim.
    #[must_use]
    pub fn versions(&self) -> &Arc<ClientVersions> {
        &self.versions
    }

    /// Which addresses a proxy may have.
    pub(super) fn reach(&self) -> Reach {
        Reach { loopback_only: self.endpoint.loopback_only, allows: self.proxies }
    }

    pub(super) fn http(&self) -> Arc<dyn HttpClient> {
        self.http.clone()
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
}
