//! One client's socket: Noise frames in and out of a byte stream that WebSocket messages cut anywhere, and the loop
//! that reads the client, writes its backlog and obeys the link.

use crate::sandbox::address::PhoneNumber;
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::faults::HandshakeFault;
use crate::sandbox::handshake::{self, Answer, Established};
use crate::sandbox::link::{Farewell, Link};
use crate::sandbox::login::{Admission, Progress, Session, admit};
use crate::sandbox::message;
use crate::sandbox::pairing::{Offer, UNLINKED_AT_MOST};
use crate::sandbox::query;
use crate::sandbox::receipt;
use crate::sandbox::stanza::{attr, tag};
use crate::sandbox::world::World;
use futures_util::{SinkExt, StreamExt};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{sleep, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use whatsapp_rust::bytes::BytesMut;
use whatsapp_rust::wacore::framing::{FrameDecoder, append_frame_into, encode_frame};
use whatsapp_rust::wacore_binary::util::unpack_bytes;
use whatsapp_rust::wacore_binary::{Node, OwnedNodeRef, marshal};

const HANDSHAKE_AT_MOST: Duration = Duration::from_secs(20);
/// A client that is kept waiting on order for its first answer gets this long to give up.
const SILENT_AT_MOST: Duration = Duration::from_secs(60);
/// A client that does not take what is written for this long is gone.
const WRITE_AT_MOST: Duration = Duration::from_secs(30);
const CLOSE_AT_MOST: Duration = Duration::from_secs(1);
/// Stanzas of a backlog written in one go.
const BATCH: usize = 64;

/// What a stanza of a client makes the connection do.
pub enum Reaction {
    /// Write this.
    Reply(Node),
    /// Write this a little later.
    ReplyAfter {
        /// How much.
        pause: Duration,
        /// What.
        node: Node,
    },
    /// The device is ready for its backlog.
    Active,
    /// End the connection.
    CloseAfter {
        /// When.
        pause: Duration,
        /// How.
        farewell: Farewell,
    },
}

/// Who is at the other end.
enum Peer {
    Unlinked(Box<Offer>),
    Device(Box<Session>),
}

impl Peer {
    fn phone(&self) -> Option<&PhoneNumber> {
        match self {
            Self::Unlinked(_) => None,
            Self::Device(session) => Some(&session.device.phone),
        }
    }

    /// Until when a device that is not linked is given time beyond the usual.
    fn waits_until(&self) -> Option<Instant> {
        match self {
            Self::Unlinked(offer) => offer.waits_until().filter(|until| *until > Instant::now()),
            Self::Device(_) => None,
        }
    }
}

/// Serves one WebSocket until it ends.
pub async fn run<S>(mut socket: WebSocketStream<S>, world: Arc<World>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    world.stats.accepted.add(1);
    let link = Arc::new(Link::default());
    let fault = world.faults.handshake_failure();
    if fault == Some(HandshakeFault::Silent) {
        // Until the client gives up.
        let left = async { while matches!(socket.next().await, Some(Ok(_))) {} };
        let _ = timeout(SILENT_AT_MOST, left).await;
        return;
    }
    let greeted = timeout(HANDSHAKE_AT_MOST, greet(socket, &world, &link, fault)).await;
    let ended = match greeted.unwrap_or(Err(SandboxError::TimedOut)) {
        Ok(Some((mut wire, mut peer))) => {
            let ended = serve(&mut wire, &mut peer, &world, &link).await;
            // In this order: a device counts as connected until its socket is really closed.
            drop(wire);
            drop(peer);
            ended
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

async fn greet<S>(
    socket: WebSocketStream<S>,
    world: &Arc<World>,
    link: &Arc<Link>,
    fault: Option<HandshakeFault>,
) -> Result<Option<(Wire<S>, Peer)>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut stream = ByteStream { socket, frames: FrameDecoder::new() };
    let (established, by_ik) = stream.shake_hands(world, fault).await?;
    let admission = admit(world, link, by_ik, &established).await?;
    let mut wire = Wire { stream, keys: established, sent: 0, received: 0 };
    match admission {
        Admission::Unlinked(offer, query) => {
            wire.send(world, &[query]).await?;
            Ok(Some((wire, Peer::Unlinked(offer))))
        }
        Admission::Device(session, success) => {
            wire.send(world, &[success]).await?;
            Ok(Some((wire, Peer::Device(session))))
        }
        Admission::Refused(failure) => {
            wire.part(world, Farewell::Stanza(Box::new(failure))).await;
            Ok(None)
        }
    }
}

async fn serve<S>(wire: &mut Wire<S>, peer: &mut Peer, world: &Arc<World>, link: &Link) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let deadline = sleep(UNLINKED_AT_MOST);
    tokio::pin!(deadline);
    loop {
        let unlinked = matches!(peer, Peer::Unlinked(_));
        tokio::select! {
            node = wire.next() => {
                world.stats.stanzas_in.add(1);
                let reactions = react(world, peer, &node?);
                if carry_out(wire, peer, world, link, reactions).await? {
                    return Ok(());
                }
            }
            () = link.woken() => {
                let (posted, farewell) = link.collect();
                send(wire, peer, world, &posted).await?;
                if write_backlog(wire, peer, world).await? {
                    link.wake();
                }
                if let Some(farewell) = farewell {
                    wire.part(world, farewell).await;
                    return Ok(());
                }
            }
            () = &mut deadline, if unlinked => {
                if let Some(until) = peer.waits_until() {
                    deadline.as_mut().reset(until.into());
                    continue;
                }
                wire.part(world, Farewell::Stanza(Box::new(tag("xmlstreamend").build()))).await;
                return Ok(());
            }
        }
    }
}

fn react(world: &Arc<World>, peer: &Peer, node: &Node) -> Vec<Reaction> {
    let session = match peer {
        Peer::Unlinked(offer) => return offer.react(node),
        Peer::Device(session) => session,
    };
    let device = &session.device;
    match node.tag.as_ref() {
        "iq" => match attr(node, "type").as_deref() {
            Some("get" | "set") => query::react(world, device, node),
            _ => Vec::new(),
        },
        "message" => message::from_device(world, device, node).map(Reaction::Reply).into_iter().collect(),
        "receipt" => vec![Reaction::Reply(receipt::from_device(world, device, node))],
        "ack" => {
            world.acknowledge(device, node);
            Vec::new()
        }
        // Presence, chat state, calls, session telemetry and pulls of a backlog that is pushed anyway.
        _ => Vec::new(),
    }
}

/// Carries out reactions; true when the connection has ended.
async fn carry_out<S>(
    wire: &mut Wire<S>,
    peer: &mut Peer,
    world: &Arc<World>,
    link: &Link,
    reactions: Vec<Reaction>,
) -> Result<bool>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    for reaction in reactions {
        match reaction {
            Reaction::Reply(node) => send(wire, peer, world, &[node]).await?,
            Reaction::ReplyAfter { pause, node } => {
                sleep(pause).await;
                send(wire, peer, world, &[node]).await?;
            }
            Reaction::Active => {
                let preview = become_active(world, peer);
                send(wire, peer, world, preview.as_slice()).await?;
                link.wake();
            }
            Reaction::CloseAfter { pause, farewell } => {
                sleep(pause).await;
                wire.part(world, farewell).await;
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Writes, unless or when a fault says so.
async fn send<S>(wire: &mut Wire<S>, peer: &Peer, world: &World, nodes: &[Node]) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if nodes.is_empty() {
        return Ok(());
    }
    if let Some(phone) = peer.phone() {
        if world.faults.silent(phone) {
            return Ok(());
        }
        if let Some(delay) = world.faults.delay(phone) {
            sleep(delay).await;
        }
    }
    wire.send(world, nodes).await
}

fn become_active(world: &World, peer: &mut Peer) -> Option<Node> {
    let Peer::Device(session) = peer else { return None };
    if session.progress != Progress::Passive {
        return None;
    }
    let seen =
        world.with_companion(&session.device, |companion| (companion.backlog.preview(), companion.backlog.end()));
    let (preview, end) = seen?;
    session.progress = Progress::Draining { next: 0, end, written: 0 };
    if preview.count == 0 {
        return None;
    }
    let preview = tag("offline_preview")
        .attr("count", preview.count)
        .attr("message", preview.messages)
        .attr("receipt", preview.receipts)
        .attr("notification", preview.notifications)
        .attr("appdata", 0)
        .attr("call", 0)
        .build();
    Some(tag("ib").attr("from", "s.whatsapp.net").children([preview]).build())
}

/// Writes a batch of the backlog; true when there may be more.
async fn write_backlog<S>(wire: &mut Wire<S>, peer: &mut Peer, world: &World) -> Result<bool>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Peer::Device(session) = &mut *peer else {
        return Ok(false);
    };
    let batch = next_batch(world, session);
    let more = !batch.is_empty();
    send(wire, peer, world, &batch).await?;
    Ok(more)
}

fn next_batch(world: &World, session: &mut Session) -> Vec<Node> {
    let (from, end) = match session.progress {
        Progress::Passive => return Vec::new(),
        Progress::Draining { next, end, .. } => (next, end),
        Progress::Live { next } => (next, u64::MAX),
    };
    let batch = world.with_companion(&session.device, |companion| companion.backlog.range(from, end, BATCH));
    let batch = batch.unwrap_or_default();
    let next = batch.last().map_or(from, |last| last.sequence + 1);
    let written = batch.len();
    let mut nodes: Vec<Node> = batch.into_iter().map(|waiting| waiting.node).collect();
    match &mut session.progress {
        Progress::Passive => {}
        Progress::Live { next: position } => *position = next,
        Progress::Draining { written: before, .. } if nodes.is_empty() => {
            let offline = tag("offline").attr("count", *before).build();
            nodes.push(tag("ib").attr("from", "s.whatsapp.net").children([offline]).build());
            session.progress = Progress::Live { next: end };
            return nodes;
        }
        Progress::Draining { next: position, written: before, .. } => {
            for (index, node) in nodes.iter_mut().enumerate() {
                node.attrs.insert("offline", *before + index);
            }
            *position = next;
            *before += written;
        }
    }
    misplace(world, &session.device.phone, nodes)
}

fn misplace(world: &World, phone: &PhoneNumber, mut nodes: Vec<Node>) -> Vec<Node> {
    if world.faults.reorders(phone) {
        nodes.reverse();
    }
    let twice = |node: Node| {
        let copy = world.faults.duplicates(phone).then(|| node.clone());
        std::iter::once(node).chain(copy)
    };
    nodes.into_iter().flat_map(twice).collect()
}

/// Bytes and frames, before and under encryption.
struct ByteStream<S> {
    socket: WebSocketStream<S>,
    frames: FrameDecoder,
}

/// The server's hello; its last byte belongs to the seal of its payload.
fn spoilt(mut hello: Vec<u8>, fault: Option<HandshakeFault>) -> Vec<u8> {
    if fault == Some(HandshakeFault::Garbled)
        && let Some(last) = hello.last_mut()
    {
        *last ^= 1;
    }
    hello
}

/// An encrypted connection.
struct Wire<S> {
    stream: ByteStream<S>,
    keys: Established,
    sent: u32,
    received: u32,
}

impl<S> ByteStream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    async fn bytes(&mut self) -> Result<bytes::Bytes> {
        loop {
            match self.socket.next().await.ok_or(SandboxError::Closed)?? {
                Message::Binary(bytes) => return Ok(bytes),
                Message::Close(_) => return Err(SandboxError::Closed),
                _ => {}
            }
        }
    }

    async fn frame(&mut self) -> Result<BytesMut> {
        loop {
            if let Some(frame) = self.frames.decode_frame() {
                return Ok(frame);
            }
            let bytes = self.bytes().await?;
            self.frames.feed(&bytes);
        }
    }

    async fn write(&mut self, bytes: Vec<u8>) -> Result<()> {
        let written = timeout(WRITE_AT_MOST, self.socket.send(Message::Binary(bytes.into()))).await;
        Ok(written.map_err(|_| SandboxError::TimedOut)??)
    }

    async fn write_frame(&mut self, payload: &[u8]) -> Result<()> {
        let frame = encode_frame(payload, None).map_err(|error| SandboxError::Frame(error.to_string()))?;
        self.write(frame).await
    }

    async fn shake_hands(&mut self, world: &World, fault: Option<HandshakeFault>) -> Result<(Established, bool)> {
        let mut start = Vec::new();
        let prologue = loop {
            if let Some((prologue, length)) = handshake::header(&start)? {
                self.frames.feed(&start[length..]);
                break prologue;
            }
            start.extend_from_slice(&self.bytes().await?);
        };
        let hello = self.frame().await?;
        match handshake::answer(&world.identity, &prologue, &hello)? {
            Answer::Complete { hello, established } => {
                self.write_frame(&spoilt(hello, fault)).await?;
                Ok((*established, true))
            }
            Answer::AwaitFinish { hello, pending } => {
                self.write_frame(&spoilt(hello, fault)).await?;
                let finish = self.frame().await?;
                Ok((pending.finish(&finish)?, false))
            }
        }
    }
}

impl<S> Wire<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    /// The next stanza. Cancelling it loses nothing: what has been read stays in the decoder.
    async fn next(&mut self) -> Result<Node> {
        let mut frame = self.stream.frame().await?;
        let counter = self.received;
        self.received = counter.checked_add(1).ok_or(SandboxError::Closed)?;
        self.keys.receive.decrypt_in_place_with_counter(counter, &mut frame)?;
        Ok(OwnedNodeRef::new(unpack_bytes(frame)?)?.to_owned_node())
    }

    async fn send(&mut self, world: &World, nodes: &[Node]) -> Result<()> {
        let mut frames = Vec::new();
        for node in nodes {
            let mut payload = marshal(node)?;
            let counter = self.sent;
            self.sent = counter.checked_add(1).ok_or(SandboxError::Closed)?;
            self.keys.send.encrypt_in_place_with_counter(counter, &mut payload)?;
            append_frame_into(&payload, None, &mut frames).map_err(|error| SandboxError::Frame(error.to_string()))?;
        }
        world.stats.stanzas_out.add(nodes.len() as u64);
        self.stream.write(frames).await
    }

    /// Says goodbye; a peer that does not listen is left alone.
    async fn part(&mut self, world: &World, farewell: Farewell) {
        let Farewell::Stanza(node) = farewell else { return };
        if self.send(world, &[*node]).await.is_ok() {
            // The close frame is a courtesy; the socket closes either way.
            let _ = timeout(CLOSE_AT_MOST, self.stream.socket.close(None)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::persistence::Files;
    use tokio_tungstenite::tungstenite::protocol::Role;

    /// Ten thousand of them live in one process.
    const LARGEST: usize = 8 * 1024;

    #[tokio::test]
    async fn the_state_of_a_connection_is_small() {
        let world = Arc::new(World::open(Files::default(), 1).expect("a world"));
        let (_, stream) = tokio::io::duplex(64);
        let socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
        let connection = run(socket, world);
        assert!(size_of_val(&connection) <= LARGEST, "{} bytes", size_of_val(&connection));
    }
}
