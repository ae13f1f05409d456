//! The socket: TCP, TLS where the address asks for it, WebSocket. A dumb pipe of bytes. It holds the number's
//! slot until the socket is really gone, so that two sockets of one number cannot exist, and it remembers how
//! the connection came about and ended, because the library keeps that to itself.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context, bail};
use async_channel::{Receiver, Sender};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};
use whatsapp_rust::wacore::net::{DisconnectReason, Transport, TransportEvent, TransportFactory, WHATSAPP_WEB_ORIGIN};
use whatsapp_rust::wacore::runtime::Runtime;

use super::environment::LinkEnvironment;
use super::proxy::{self, ProxyFault};
use super::runtime::LinkRuntime;
use super::signals::Signals;
use crate::domain::proxy::Proxy;

/// Frames read and not yet taken by the client; a slow client slows the socket down instead of filling memory.
const EVENTS_MAX: usize = 16;
/// How often a reader that has stopped looks for room.
const ROOM_EVERY: Duration = Duration::from_millis(20);
/// tungstenite allocates this at once and clears it for every read; its default of 128 KiB is 1.2 GiB for ten thousand
/// numbers. Most frames are a few hundred bytes; a longer one makes room for itself.
const READ_BUFFER_BYTES: usize = 1024;
/// Largest WebSocket frame: WhatsApp's own frames are below 16 MiB (three length bytes).
const FRAME_BYTES_MAX: usize = 16 << 20;
/// How long a write may wait for the peer to read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long reading goes on after a failed write. A server that ends a connection says why and closes; our next
/// write then fails while its words still wait to be read.
const LAST_WORDS_WITHIN: Duration = Duration::from_millis(500);
/// How long closing may take before the socket is simply dropped.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a new connection waits for the previous socket of the same session.
const SLOT_TIMEOUT: Duration = Duration::from_secs(10);
/// The library waits this long for a step of the handshake; a failure later than this was silence.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(19);

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type Socket = WebSocketStream<Box<dyn Io>>;

/// How a connection came about, as far as the socket can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reached {
    /// No TCP, TLS or WebSocket connection.
    Nothing,
    /// Not even through the proxy.
    Proxy(ProxyFault),
    /// The upgrade to WebSocket was answered with this HTTP status.
    Status(u16),
    /// The server closed before it spoke.
    Dropped,
    /// Connected, and no byte came back in time.
    Silence,
    /// The server spoke, and the client closed: what it said was wrong.
    Refusal,
}

#[derive(Default)]
struct Story {
    status: Option<u16>,
    opened_at: Option<Instant>,
    proxy_fault: Option<ProxyFault>,
    heard: bool,
    ended_by_peer: bool,
    lasted: Duration,
}

/// The right of one number to have a socket.
pub(super) struct SocketSlot {
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    returned: Notify,
    current: Mutex<Weak<LinkTransport>>,
    story: Mutex<Story>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SocketSlot {
    pub(super) fn new(permit: OwnedSemaphorePermit) -> Arc<Self> {
        Arc::new(Self {
            permit: Mutex::new(Some(permit)),
            returned: Notify::new(),
            current: Mutex::default(),
            story: Mutex::default(),
        })
    }

    async fn take(self: &Arc<Self>) -> Lease {
        loop {
            let returned = self.returned.notified();
            if let Some(permit) = lock(&self.permit).take() {
                return Lease { slot: self.clone(), permit: Some(permit) };
            }
            returned.await;
        }
    }

    /// Ends the current socket without asking the library.
    pub(super) async fn close(&self) {
        let current = lock(&self.current).upgrade();
        if let Some(transport) = current {
            transport.abandon().await;
        }
    }

    /// Gives the permit back once no socket holds it any more. Waits as long as that takes: a `Closed` that is
    /// told too early is worse than one that is late.
    pub(super) async fn release(self: &Arc<Self>) {
        let mut lease = self.take().await;
        drop(lease.permit.take());
    }

    /// How far the last connection got, for one that never spoke the protocol.
    pub(super) fn reached(&self) -> Reached {
        let story = lock(&self.story);
        match story.opened_at {
            None => match (story.proxy_fault, story.status) {
                (Some(fault), _) => Reached::Proxy(fault),
                (None, Some(status)) => Reached::Status(status),
                (None, None) => Reached::Nothing,
            },
            Some(_) if story.ended_by_peer => Reached::Dropped,
            Some(_) if !story.heard || story.lasted >= HANDSHAKE_PATIENCE => Reached::Silence,
            Some(_) => Reached::Refusal,
        }
    }
}

/// The permit while a socket exists. Dropped after the socket, it goes back to the slot.
struct Lease {
    slot: Arc<SocketSlot>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            *lock(&self.slot.permit) = Some(permit);
            self.slot.returned.notify_waiters();
        }
    }
}

/// Makes the sockets of one session.
pub(super) struct LinkTransportFactory {
    pub(super) environment: Arc<LinkEnvironment>,
    pub(super) slot: Arc<SocketSlot>,
    pub(super) proxy: Option<Proxy>,
    pub(super) signals: Arc<Signals>,
    pub(super) runtime: Arc<LinkRuntime>,
}

impl LinkTransportFactory {
    async fn reach(&self) -> anyhow::Result<TcpStream> {
        let endpoint = self.environment.endpoint();
        if let Some(proxy) = &self.proxy {
            let target = (endpoint.host.as_str(), endpoint.port);
            let opened = proxy::open(proxy, target, self.environment.reach()).await;
            return opened.map_err(|fault| {
                lock(&self.slot.story).proxy_fault = Some(fault);
                anyhow::Error::msg(format!("proxy: {fault:?}"))
            });
        }
        let addresses: Vec<SocketAddr> =
            tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port)).await.context("name lookup")?.collect();
        let mut stream = None;
        for address in addresses {
            if endpoint.loopback_only && !address.ip().is_loopback() {
                bail!("this build or address may only speak to the loopback interface");
            }
            if let Ok(connected) = TcpStream::connect(address).await {
                stream = Some(connected);
                break;
            }
        }
        stream.context("connect")
    }

    async fn dial(&self) -> anyhow::Result<Socket> {
        let endpoint = self.environment.endpoint();
        let stream = self.reach().await?;
        stream.set_nodelay(true).context("socket option")?;
        let stream: Box<dyn Io> = match &endpoint.tls {
            Some((connector, name)) => Box::new(connector.connect(name.clone(), stream).await.context("TLS")?),
            None => Box::new(stream),
        };
        let mut request = endpoint.url.as_str().into_client_request().context("address")?;
        request.headers_mut().insert("Origin", HeaderValue::from_static(WHATSAPP_WEB_ORIGIN));
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            // The library coalesces frames itself; a second buffer would only be memory.
            .write_buffer_size(0)
            .max_message_size(Some(FRAME_BYTES_MAX))
            .max_frame_size(Some(FRAME_BYTES_MAX));
        let upgraded = client_async_with_config(request, stream, Some(config)).await;
        if let Err(WsError::Http(response)) = &upgraded {
            lock(&self.slot.story).status = Some(response.status().as_u16());
        }
        Ok(upgraded.context("WebSocket")?.0)
    }
}

#[async_trait]
impl TransportFactory for LinkTransportFactory {
    async fn create_transport(&self) -> anyhow::Result<(Arc<dyn Transport>, Receiver<TransportEvent>)> {
        *lock(&self.slot.story) = Story::default();
        let lease = timeout(SLOT_TIMEOUT, self.slot.take()).await.context("the previous socket is still open")?;
        let socket = self.dial().await.inspect_err(|error| {
            tracing::debug!(%error, "no connection");
        })?;
        lock(&self.slot.story).opened_at = Some(Instant::now());
        let lease = Arc::new(lease);
        let (sink, stream) = socket.split();
        let (events, received) = async_channel::bounded(EVENTS_MAX);
        let (closing, closed) = watch::channel(Closing::No);
        let transport = Arc::new(LinkTransport {
            sink: tokio::sync::Mutex::new(Some(Half { half: sink, lease: lease.clone() })),
            closing,
            signals: self.signals.clone(),
        });
        *lock(&self.slot.current) = Arc::downgrade(&transport);
        let stream = Half { half: stream, lease };
        self.runtime.spawn_detached(Box::pin(read(stream, events, closed, self.signals.clone())));
        Ok((transport, received))
    }
}

/// One direction of the socket. Field order matters: the socket goes before the right to have one.
struct Half<T> {
    half: T,
    lease: Arc<Lease>,
}

impl<T> Half<T> {
    fn story(&self) -> MutexGuard<'_, Story> {
        lock(&self.lease.slot.story)
    }

    fn ended(&self, by_peer: bool) {
        let mut story = self.story();
        story.ended_by_peer = by_peer;
        story.lasted = story.opened_at.map(|at| at.elapsed()).unwrap_or_default();
    }
}

fn reason_of(error: &WsError) -> DisconnectReason {
    match error {
        WsError::ConnectionClosed | WsError::AlreadyClosed => DisconnectReason::StreamEnded,
        // The kind only: the library logs it, and the full text may carry an address.
        WsError::Io(error) => DisconnectReason::ReadError(error.kind().to_string()),
        _ => DisconnectReason::ReadError("websocket protocol".to_owned()),
    }
}

/// Whether the socket is to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    No,
    /// A write failed: nothing more is written, but what has arrived is still read.
    AfterLastWords,
    Now,
}

/// Resolves when reading has to stop.
async fn stopped(closing: &mut watch::Receiver<Closing>) {
    let first = closing.wait_for(|closing| *closing != Closing::No).await.map(|closing| *closing);
    if let Ok(Closing::AfterLastWords) = first {
        let _ = timeout(LAST_WORDS_WITHIN, closing.wait_for(|closing| *closing == Closing::Now)).await;
    }
}

enum Heard {
    Data(Bytes),
    Nothing,
    End(DisconnectReason),
}

fn heard(message: Option<Result<Message, WsError>>) -> Heard {
    match message {
        Some(Ok(Message::Binary(data))) => Heard::Data(data),
        Some(Ok(Message::Close(frame))) => {
            let code = frame.as_ref().map(|frame| frame.code.into());
            Heard::End(DisconnectReason::ServerClose { code, reason: String::new() })
        }
        // tungstenite answers pings itself; WhatsApp sends no text.
        Some(Ok(_)) => Heard::Nothing,
        Some(Err(error)) => Heard::End(reason_of(&error)),
        None => Heard::End(DisconnectReason::StreamEnded),
    }
}

/// Gives what was read to the client, once there is room for the messages in it. A client that never gets there is
/// unresponsive, and its connection ends for that.
async fn hand_on(data: Bytes, events: &Sender<TransportEvent>, signals: &Signals) -> bool {
    let mut stopped = false;
    while signals.backlog.is_crowded(stopped) {
        if !stopped {
            tracing::warn!("messages arrive faster than they become durable: reading stops for a while");
            stopped = true;
        }
        sleep(ROOM_EVERY).await;
    }
    events.send(TransportEvent::DataReceived(data)).await.is_ok()
}

async fn read(
    mut stream: Half<SplitStream<Socket>>,
    events: Sender<TransportEvent>,
    mut closing: watch::Receiver<Closing>,
    signals: Arc<Signals>,
) {
    let until_stopped = stopped(&mut closing);
    tokio::pin!(until_stopped);
    let reason = loop {
        let message = tokio::select! {
            biased;
            () = &mut until_stopped => None,
            message = stream.half.next() => Some(message),
        };
        let data = match message.map(heard) {
            Some(Heard::Data(data)) => data,
            Some(Heard::Nothing) => continue,
            Some(Heard::End(reason)) => {
                stream.ended(true);
                break reason;
            }
            None => {
                stream.ended(false);
                break DisconnectReason::Unknown;
            }
        };
        stream.story().heard = true;
        let taken = tokio::select! {
            biased;
            () = &mut until_stopped => false,
            sent = hand_on(data, &events, &signals) => sent,
        };
        if !taken {
            stream.ended(false);
            break DisconnectReason::Unknown;
        }
    };
    // The socket goes first: whoever hears of the end may connect again at once.
    drop(stream);
    let _ = timeout(CLOSE_TIMEOUT, events.send(TransportEvent::Disconnected(reason))).await;
}

/// One open socket as the library sees it.
pub(super) struct LinkTransport {
    sink: tokio::sync::Mutex<Option<Half<SplitSink<Socket, Message>>>>,
    closing: watch::Sender<Closing>,
    signals: Arc<Signals>,
}

impl LinkTransport {
    /// Ends the socket at once, unread words included.
    async fn abandon(&self) {
        self.closing.send_replace(Closing::Now);
        self.sink.lock().await.take();
    }

    fn stop_writing(&self, sink: &mut Option<Half<SplitSink<Socket, Message>>>) {
        sink.take();
        self.closing.send_if_modified(|closing| {
            let first = *closing == Closing::No;
            if first {
                *closing = Closing::AfterLastWords;
            }
            first
        });
    }
}

#[async_trait]
impl Transport for LinkTransport {
    async fn send(&self, data: Bytes) -> anyhow::Result<()> {
        self.signals.before_write().await.map_err(anyhow::Error::msg)?;
        let mut closing = self.closing.subscribe();
        let mut sink = self.sink.lock().await;
        let Some(open) = sink.as_mut() else {
            bail!("the socket is closed");
        };
        let written = tokio::select! {
            biased;
            _ = closing.wait_for(|closing| *closing != Closing::No) => bail!("the socket is closing"),
            written = timeout(WRITE_TIMEOUT, open.half.send(Message::Binary(data))) => written,
        };
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                self.stop_writing(&mut sink);
                Err(anyhow::Error::msg(format!("write failed: {}", reason_of(&error))))
            }
            Err(_) => {
                self.stop_writing(&mut sink);
                bail!("the peer does not read")
            }
        }
    }

    /// Idempotent. After a failed write the library calls this at once; the reader then stops by itself.
    async fn disconnect(&self) {
        // Ends a write that waits for the peer, so that the lock below is free at once.
        let before = *self.closing.borrow();
        if before == Closing::No {
            self.closing.send_replace(Closing::Now);
        }
        let Some(mut open) = self.sink.lock().await.take() else {
            return;
        };
        if before == Closing::No {
            let _ = timeout(CLOSE_TIMEOUT, open.half.send(Message::Close(None))).await;
        }
    }
}
