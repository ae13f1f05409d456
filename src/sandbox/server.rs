//! The listener: one port for WebSocket clients on any path and for the HTTP admin interface, and the embeddable
//! [`Sandbox`] around it.

use crate::sandbox::admin;
use crate::sandbox::connection;
use crate::sandbox::error::Result as SandboxResult;
use crate::sandbox::persistence::Files;
use crate::sandbox::world::World;
use axum::Router;
use axum::body::Body;
use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tower::ServiceExt;

/// Sockets open at the same time; more are closed on arrival.
const CONNECTION_LIMIT: usize = 60_000;
/// Small buffers, because there are thousands of them.
const READ_BUFFER: usize = 4 * 1024;
const WRITE_BUFFER: usize = 0;
const HTTP_BUFFER: usize = 16 * 1024;
const MESSAGE_LIMIT: usize = 32 * 1024 * 1024;
/// How often changed accounts are written.
const SAVE_EVERY: Duration = Duration::from_millis(250);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How to run a sandbox.
#[derive(Debug, Clone, Default)]
pub struct SandboxConfig {
    /// Addresses to listen on; the first may have port 0. Several share one world, for when ports run out.
    pub listen: Vec<SocketAddr>,
    /// Where to keep keys and accounts; nowhere when absent.
    pub data: Option<PathBuf>,
    /// For everything left to chance.
    pub seed: u64,
}

/// Starts sandboxes.
pub struct Sandbox;

/// A running sandbox. Dropping it ends every task and connection at once.
pub struct RunningSandbox {
    addr: SocketAddr,
    world: Arc<World>,
    stop: watch::Sender<bool>,
    parts: JoinSet<()>,
}

impl Sandbox {
    /// Opens the data, binds every address and starts serving.
    pub async fn start(config: SandboxConfig) -> io::Result<RunningSandbox> {
        let world = Files::open(config.data).and_then(|files| World::open(files, config.seed));
        let world = Arc::new(world.map_err(io::Error::other)?);
        let mut listeners = Vec::new();
        for address in &config.listen {
            listeners.push(TcpListener::bind(address).await?);
        }
        let first = listeners.first().ok_or_else(|| io::Error::other("no address to listen on"))?;
        let addr = first.local_addr()?;
        let (stop, stopped) = watch::channel(false);
        let router = admin::router(Arc::clone(&world));
        let mut parts = JoinSet::new();
        for listener in listeners {
            parts.spawn(accept(listener, Arc::clone(&world), router.clone(), stopped.clone()));
        }
        parts.spawn(keep(Arc::clone(&world), stopped));
        Ok(RunningSandbox { addr, world, stop, parts })
    }
}

impl RunningSandbox {
    /// The first address listened on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where WhatsApp clients connect.
    pub fn ws_url(&self) -> String {
        format!("ws://{}/ws/chat", self.addr)
    }

    /// The root of the certificate chain, in hexadecimal.
    pub fn root_hex(&self) -> String {
        self.world.identity.root_hex()
    }

    /// The world, for callers in the same process that would otherwise go through HTTP.
    pub fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// Closes every connection and writes what has changed.
    pub async fn shutdown(mut self) -> SandboxResult<()> {
        // Nobody listening any more is as good as stopped.
        let _ = self.stop.send(true);
        while self.parts.join_next().await.is_some() {}
        self.world.save_all()
    }
}

/// Runs a sandbox until `until` is ready: the body of the `sandbox` command. `started` learns the address and root.
pub async fn run(
    config: SandboxConfig,
    started: impl FnOnce(&RunningSandbox),
    until: impl Future<Output = ()>,
) -> SandboxResult<()> {
    let running = Sandbox::start(config).await?;
    started(&running);
    until.await;
    running.shutdown().await
}

async fn keep(world: Arc<World>, mut stopped: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(SAVE_EVERY) => {}
            _ = stopped.changed() => return,
        }
        let world = Arc::clone(&world);
        let saved = tokio::task::spawn_blocking(move || world.save_all()).await;
        if let Ok(Err(error)) = saved {
            tracing::warn!(%error, "accounts could not be written");
        }
    }
}

async fn accept(listener: TcpListener, world: Arc<World>, router: Router, mut stopped: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() < CONNECTION_LIMIT => {
                    connections.spawn(serve(stream, Arc::clone(&world), router.clone()));
                }
                Ok(_) => tracing::warn!(limit = CONNECTION_LIMIT, "too many connections"),
                Err(error) => {
                    tracing::warn!(%error, "could not accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = stopped.changed() => return,
        }
    }
}

async fn serve(stream: TcpStream, world: Arc<World>, router: Router) {
    // Without it every small stanza would wait for the previous one's TCP ack.
    let _ = stream.set_nodelay(true);
    let upgrade: Arc<Mutex<Option<OnUpgrade>>> = Arc::default();
    let slot = Arc::clone(&upgrade);
    let refusing = Arc::clone(&world);
    let service = service_fn(move |request| answer(request, router.clone(), Arc::clone(&slot), Arc::clone(&refusing)));
    let mut http = http1::Builder::new();
    http.max_buf_size(HTTP_BUFFER);
    let served = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
    if let Err(error) = served {
        tracing::debug!(%error, "http connection ended");
    }
    let upgrade = upgrade.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(upgrade) = upgrade else { return };
    if let Ok(upgraded) = upgrade.await {
        let socket = TokioIo::new(upgraded);
        let websocket = WebSocketStream::from_raw_socket(socket, Role::Server, Some(websocket_config())).await;
        connection::run(websocket, world).await;
    }
}

fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_write_buffer_size(MESSAGE_LIMIT)
        .max_message_size(Some(MESSAGE_LIMIT))
        .max_frame_size(Some(MESSAGE_LIMIT))
}

async fn answer(
    mut request: Request<Incoming>,
    router: Router,
    slot: Arc<Mutex<Option<OnUpgrade>>>,
    world: Arc<World>,
) -> Result<Response<Body>, Infallible> {
    let Some(accept) = websocket_accept(request.headers()) else {
        return router.oneshot(request.map(Body::new)).await;
    };
    let mut response = Response::new(Body::empty());
    if let Some(status) = world.faults.upgrade_failure().and_then(|status| StatusCode::from_u16(status).ok()) {
        *response.status_mut() = status;
        return Ok(response);
    }
    let Ok(value) = accept.parse() else {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        return Ok(response);
    };
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(hyper::upgrade::on(&mut request));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, http::HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, http::HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, value);
    Ok(response)
}

/// The accept key, when the request wants a WebSocket.
fn websocket_accept(headers: &HeaderMap) -> Option<String> {
    let wants = headers.get(UPGRADE)?.to_str().ok()?.eq_ignore_ascii_case("websocket");
    let key = headers.get(SEC_WEBSOCKET_KEY)?;
    wants.then(|| derive_accept_key(key.as_bytes()))
}
