//! A bad line between the daemon and its WhatsApp, in toxiproxy's words: cut, reset, half-open, silence, latency,
//! bandwidth, slicer, corruption. Everything left to chance comes from the seed.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

const CHUNK: usize = 16 * 1024;

/// From the daemon's point of view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To WhatsApp.
    Up,
    /// From it.
    Down,
}

/// How bad the line is.
#[derive(Debug, Clone, Default)]
pub struct Toxics {
    /// New connections are reset at once.
    pub refuse: bool,
    /// New connections are taken and nothing answers.
    pub half_open: bool,
    /// What goes these ways disappears; nothing is closed.
    pub silent: Vec<Way>,
    /// Every chunk waits so long.
    pub latency: Option<Range<Duration>>,
    /// Bytes a second and way.
    pub bandwidth: Option<u32>,
    /// One byte at a time.
    pub slice: bool,
    /// One bit is flipped in about every so many bytes that go this way.
    pub corrupt: Option<(Way, usize)>,
    /// Connections are reset in the middle of a chunk, after at most so many bytes of one way.
    pub reset_within: Option<usize>,
}

/// How connections end when they are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// FIN, as a server that ends.
    Close,
    /// RST, as a router that forgot.
    Reset,
}

/// The line.
pub struct Proxy {
    pub address: SocketAddr,
    toxics: watch::Sender<Toxics>,
    cuts: watch::Sender<(u64, Cut)>,
    taken: Arc<AtomicU64>,
    _line: JoinSet<()>,
}

impl Proxy {
    pub async fn start(target: SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (toxics, cuts) = (watch::Sender::new(Toxics::default()), watch::Sender::new((0, Cut::Close)));
        let taken = Arc::new(AtomicU64::new(0));
        let (heard, cut, counted) = (toxics.subscribe(), cuts.subscribe(), taken.clone());
        let mut line = JoinSet::new();
        line.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                while connections.try_join_next().is_some() {}
                let nth = counted.fetch_add(1, Ordering::Relaxed);
                let random = StdRng::seed_from_u64(seed ^ nth << 8);
                connections.spawn(connection(socket, target, heard.clone(), cut.clone(), random));
            }
        });
        Self { address, toxics, cuts, taken, _line: line }
    }

    /// The line is like this from now on.
    pub fn set(&self, toxics: Toxics) {
        self.toxics.send_replace(toxics);
    }

    /// Ends every open connection.
    pub fn cut(&self, how: Cut) {
        self.cuts.send_modify(|(count, last)| {
            *count += 1;
            *last = how;
        });
    }

    /// Connections so far.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}

async fn connection(
    socket: TcpStream,
    target: SocketAddr,
    toxics: watch::Receiver<Toxics>,
    mut cuts: watch::Receiver<(u64, Cut)>,
    mut random: StdRng,
) {
    cuts.mark_unchanged();
    let (refuse, half_open) = {
        let now = toxics.borrow();
        (now.refuse, now.half_open)
    };
    if refuse {
        let _ = socket.set_zero_linger();
        return;
    }
    if half_open {
        let _ = cuts.changed().await;
        return;
    }
    let Ok(upstream) = TcpStream::connect(target).await else { return };
    let _ = (socket.set_nodelay(true), upstream.set_nodelay(true));
    let line = |way, seed| Line { way, toxics: toxics.clone(), random: StdRng::seed_from_u64(seed), passed: 0 };
    let (up, down) = (line(Way::Up, random.random()), line(Way::Down, random.random()));
    let ((from_daemon, to_daemon), (from_server, to_server)) = (socket.into_split(), upstream.into_split());
    let (mut to_server, mut to_daemon) = (to_server, to_daemon);
    let reset = tokio::select! {
        reset = up.carry(from_daemon, &mut to_server) => reset,
        reset = down.carry(from_server, &mut to_daemon) => reset,
        _ = cuts.changed() => cuts.borrow().1 == Cut::Reset,
    };
    if reset {
        let _ = (to_daemon.as_ref().set_zero_linger(), to_server.as_ref().set_zero_linger());
    }
}

/// One way of one connection.
struct Line {
    way: Way,
    toxics: watch::Receiver<Toxics>,
    random: StdRng,
    passed: usize,
}

impl Line {
    /// Carries until an end closes; true when both are to be reset.
    async fn carry(mut self, mut from: OwnedReadHalf, to: &mut OwnedWriteHalf) -> bool {
        let mut chunk = vec![0; CHUNK];
        let mut doomed_at = None;
        loop {
            let Ok(read @ 1..) = from.read(&mut chunk).await else { return false };
            let toxics = self.toxics.borrow().clone();
            if toxics.silent.contains(&self.way) {
                continue;
            }
            if let Some(latency) = toxics.latency.clone() {
                sleep(self.random.random_range(latency)).await;
            }
            let bytes = &mut chunk[..read];
            self.spoil(&toxics, bytes);
            if let Some(within) = toxics.reset_within {
                let at = *doomed_at.get_or_insert_with(|| self.passed + self.random.random_range(1..=within));
                if self.passed + read >= at {
                    let _ = to.write_all(&bytes[..at.saturating_sub(self.passed).min(read)]).await;
                    return true;
                }
            }
            self.passed += read;
            if self.write(&toxics, bytes, to).await.is_err() {
                return false;
            }
        }
    }

    fn spoil(&mut self, toxics: &Toxics, bytes: &mut [u8]) {
        let Some((way, every)) = toxics.corrupt else { return };
        if way == self.way && self.random.random_range(0..every) < bytes.len() {
            let at = self.random.random_range(0..bytes.len());
            bytes[at] ^= 1 << self.random.random_range(0..8);
        }
    }

    async fn write(&mut self, toxics: &Toxics, bytes: &[u8], to: &mut OwnedWriteHalf) -> std::io::Result<()> {
        let piece = if toxics.slice { 1 } else { bytes.len() };
        for piece in bytes.chunks(piece) {
            to.write_all(piece).await?;
            if toxics.slice {
                tokio::task::yield_now().await;
            }
        }
        if let Some(bandwidth) = toxics.bandwidth {
            sleep(Duration::from_secs_f64(bytes.len() as f64 / f64::from(bandwidth))).await;
        }
        Ok(())
    }
}
