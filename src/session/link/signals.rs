//! What the parts of one session tell each other: why it ends, whether it is online, when the server last
//! answered, and the one queue through which everything reaches the number. Handlers of the library run
//! synchronously and must only ever touch this.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::Id;
use tokio::time::{Instant, timeout};
use whatsapp_rust::Client;
use whatsapp_rust::Jid;
use whatsapp_rust::store::persistence_manager::PersistenceManager;
use whatsapp_rust::types::events::InboundMessage;

use super::backend::LinkBackend;
use super::backlog::Backlog;
use super::barrier::Barrier;
use super::repeats::{ASKED_MAX, Asked, AskedName};
use super::stanza::Certainty;
use crate::domain::close::CloseReason;
use crate::domain::lifecycle::LinkBy;
use crate::domain::phone::{Lid, Phone};
use crate::domain::time::Timestamp;
use crate::domain::trouble::Trouble;
use crate::session::contract::{Incoming, ReceiptKind, SessionEvent};

/// Events between the library's handlers and the pump. The number's own queue behind it is shorter, so this one
/// only fills when the number does not keep up at all.
pub(super) const QUEUE_MAX: usize = 1024;
/// Recovered messages waiting for the disk.
pub(super) const RECOVERED_MAX: usize = 64;
/// Pairing codes of one session.
const CODES_MAX: u8 = 3;
/// Shortest time between two `Alive` events: the number wants to know that it lives, not every beat.
const ALIVE_EVERY: Duration = Duration::from_secs(25);

/// How long anything may wait with being written because what was heard is not durable yet.
const HEARD_WITHIN: Duration = Duration::from_secs(30);

/// One entry of the queue. Boxed, because a channel holds room for 32 entries from the start, in every session.
pub(super) enum Queued {
    /// Ready to be handed on.
    Event(Box<SessionEvent>),
    Receipt(Box<RawReceipt>),
    /// The place of a message that could not be decrypted. Queued before the sender is asked to repeat it, so it
    /// cannot come after its content.
    Placeholder(Box<Incoming>),
    /// A device asks for a message again.
    Asked(Box<Asked>),
    /// A device has what it asked for.
    Confirmed(Box<AskedName>),
}

#[cfg(test)]
impl Queued {
    /// What it tells the number, if it is ready.
    pub(super) fn event(self) -> Option<SessionEvent> {
        match self {
            Self::Event(event) => Some(*event),
            Self::Receipt(_) | Self::Placeholder(_) | Self::Asked(_) | Self::Confirmed(_) => None,
        }
    }
}

/// A receipt whose sender's other address is still to be looked up, which the handler cannot do.
pub(super) struct RawReceipt {
    pub(super) whatsapp_ids: Vec<String>,
    pub(super) from: Jid,
    pub(super) also: Option<Jid>,
    pub(super) kind: ReceiptKind,
    pub(super) at: Timestamp,
}

/// The account that accepted us.
#[derive(Debug, Clone)]
pub(super) struct PairedAs {
    pub(super) phone: Phone,
    pub(super) lid: Option<Lid>,
}

/// Whether a pairing code is to be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum CodeRequest {
    #[default]
    Idle,
    Wanted,
}

#[derive(Default)]
struct Progress {
    ending: Option<(Certainty, CloseReason)>,
    paired: Option<PairedAs>,
    last_answer: Option<Instant>,
    last_heard: Option<Instant>,
    /// Logged in and drained, without a word from the server that answers us.
    unproved: bool,
    code: CodeRequest,
    codes: u8,
    /// Until when the next step of a passkey is waited for.
    passkey_until: Option<Instant>,
    /// The library's task that shows codes.
    rotation: Option<Id>,
    /// What is wrong with the connection.
    troubles: Vec<Trouble>,
    last_alive: Option<Instant>,
}

/// Shared by everything that belongs to one session.
pub(super) struct Signals {
    /// The phone a pairing is for.
    pub(super) expected: Option<Phone>,
    /// What it is given.
    pub(super) link_by: LinkBy,
    progress: Mutex<Progress>,
    wake: Notify,
    online: AtomicBool,
    answering_pairing: AtomicBool,
    sealed: AtomicBool,
    dropped: AtomicU64,
    receipts: Barrier,
    repeats: Barrier,
    /// Messages that were heard and are not decrypted.
    pub(super) backlog: Backlog,
    /// Requests for a repeat that are on disk, or on their way there; and when this session answered.
    asked: Mutex<HashMap<AskedName, Option<Instant>>>,
    queue: mpsc::Sender<Queued>,
    recovered: mpsc::Sender<Box<InboundMessage>>,
    client: OnceLock<Weak<Client>>,
    persistence: OnceLock<Weak<PersistenceManager>>,
    backend: OnceLock<Weak<LinkBackend>>,
}

impl Signals {
    pub(super) fn new(
        expected: Option<Phone>,
        link_by: LinkBy,
        queue: mpsc::Sender<Queued>,
        recovered: mpsc::Sender<Box<InboundMessage>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            expected,
            link_by,
            progress: Mutex::default(),
            wake: Notify::new(),
            online: AtomicBool::new(false),
            answering_pairing: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            receipts: Barrier::default(),
            repeats: Barrier::default(),
            asked: Mutex::default(),
            backlog: Backlog::default(),
            queue,
            recovered,
            client: OnceLock::new(),
            persistence: OnceLock::new(),
            backend: OnceLock::new(),
        })
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the client known to those that look things up in it. Once per session.
    pub(super) fn attach(&self, client: &Arc<Client>) {
        let _ = self.client.set(Arc::downgrade(client));
        let _ = self.persistence.set(Arc::downgrade(&client.persistence_manager()));
    }

    /// Makes the store known, for what is noted of requests for a repeat. Once per session.
    pub(super) fn attach_backend(&self, backend: &Arc<LinkBackend>) {
        let _ = self.backend.set(Arc::downgrade(backend));
    }

    /// The session's store, while there is one.
    pub(super) fn backend(&self) -> Option<Arc<LinkBackend>> {
        self.backend.get()?.upgrade()
    }

    /// The session's client, while there is one.
    pub(super) fn client(&self) -> Option<Arc<Client>> {
        self.client.get()?.upgrade()
    }

    /// Records why the connection ends. A more certain reason replaces a less certain one, never the reverse.
    pub(super) fn note(&self, certainty: Certainty, reason: CloseReason) {
        let mut progress = self.progress();
        if progress.ending.as_ref().is_none_or(|(known, _)| *known < certainty) {
            progress.ending = Some((certainty, reason));
        }
        drop(progress);
        if certainty == Certainty::EndNow {
            self.wake.notify_one();
        }
    }

    /// Ends the session for a reason of our own.
    pub(super) fn end(&self, reason: CloseReason) {
        self.note(Certainty::EndNow, reason);
    }

    /// The reason recorded so far, if it is at least that certain.
    pub(super) fn ending(&self, at_least: Certainty) -> Option<CloseReason> {
        let progress = self.progress();
        let (certainty, reason) = progress.ending.as_ref()?;
        (*certainty >= at_least).then(|| reason.clone())
    }

    /// Between the two connections of a pairing: the restart after the scan is not the end.
    pub(super) fn next_connection(&self) {
        let mut progress = self.progress();
        if progress.ending.as_ref().is_some_and(|(known, _)| *known < Certainty::EndNow) {
            progress.ending = None;
        }
        progress.last_answer = None;
        progress.last_heard = None;
        progress.unproved = false;
        drop(progress);
        self.answering_pairing.store(false, Ordering::Release);
    }

    /// Resolves when something happened that the driver must look at; may resolve once too often.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// A stanza arrived: the handshake is over and the server speaks to us.
    pub(super) fn hear(&self) {
        self.progress().last_heard = Some(Instant::now());
    }

    /// Whether any stanza arrived on this connection.
    pub(super) fn has_heard(&self) -> bool {
        self.progress().last_heard.is_some()
    }

    /// The server answered something.
    pub(super) fn answered(&self) {
        self.answered_at(Instant::now());
    }

    fn answered_at(&self, now: Instant) {
        let mut progress = self.progress();
        progress.last_answer = Some(now);
        if progress.ending.as_ref().is_some_and(|(known, _)| *known == Certainty::Maybe) {
            progress.ending = None;
        }
        if std::mem::take(&mut progress.unproved) {
            drop(progress);
            self.go_online();
            return;
        }
        let due = progress.last_alive.is_none_or(|last| now.duration_since(last) >= ALIVE_EVERY);
        if !due || !self.is_online() {
            return;
        }
        progress.last_alive = Some(now);
        drop(progress);
        self.tell(SessionEvent::Alive);
    }

    /// How long ago the server last answered.
    pub(super) fn silence(&self) -> Option<Duration> {
        Some(self.progress().last_answer?.elapsed())
    }

    /// How long ago anything arrived.
    pub(super) fn quiet(&self) -> Option<Duration> {
        Some(self.progress().last_heard?.elapsed())
    }

    /// Logged in and drained. It counts once the server has answered a question of ours.
    pub(super) fn connected(&self) {
        let mut progress = self.progress();
        if progress.last_answer.is_none() {
            progress.unproved = true;
            drop(progress);
            self.wake.notify_one();
            return;
        }
        drop(progress);
        self.go_online();
    }

    /// Whether only an answer of the server is missing.
    pub(super) fn is_unproved(&self) -> bool {
        self.progress().unproved
    }

    fn go_online(&self) {
        if !self.online.swap(true, Ordering::AcqRel) {
            self.tell(SessionEvent::Online);
            let troubles = self.progress().troubles.clone();
            for trouble in troubles {
                self.tell(SessionEvent::Troubled(trouble));
            }
        }
        self.wake.notify_one();
    }

    /// The server is ready to link.
    pub(super) fn want_first_code(&self) {
        if self.progress().codes == 0 {
            self.want_code();
        }
    }

    /// The code that is shown works no longer.
    pub(super) fn want_code(&self) {
        let mut progress = self.progress();
        if progress.codes >= CODES_MAX {
            drop(progress);
            return self.end(CloseReason::PairingEnded);
        }
        progress.codes += 1;
        progress.code = CodeRequest::Wanted;
        drop(progress);
        self.wake.notify_one();
    }

    /// Takes over to ask for a code, if one is wanted.
    pub(super) fn takes_code(&self) -> bool {
        std::mem::take(&mut self.progress().code) == CodeRequest::Wanted
    }

    /// Whether a phone is still to accept us.
    pub(super) fn is_linking(&self) -> bool {
        self.expected.is_some() && self.progress().paired.is_none()
    }

    /// The library shows codes in this task. At the end of the last one it would disconnect.
    pub(super) fn rotates_codes(&self, task: Option<Id>) {
        self.progress().rotation = task;
    }

    /// Takes over to end that task, once a passkey is asked for: a person may need longer than codes last.
    pub(super) fn takes_rotation(&self) -> Option<Id> {
        let mut progress = self.progress();
        progress.passkey_until?;
        progress.rotation.take()
    }

    /// Somebody has so long for the next step of linking with a passkey.
    pub(super) fn await_passkey(&self, within: Duration) {
        self.progress().passkey_until = Some(Instant::now() + within);
        self.wake.notify_one();
    }

    /// Until when the next step of linking with a passkey is waited for, if it is.
    pub(super) fn passkey_until(&self) -> Option<Instant> {
        self.progress().passkey_until
    }

    /// Something is wrong with the connection. Told once it stands.
    pub(super) fn trouble(&self, trouble: Trouble) {
        let mut progress = self.progress();
        if progress.troubles.contains(&trouble) {
            return;
        }
        progress.troubles.push(trouble);
        drop(progress);
        if self.is_online() {
            self.tell(SessionEvent::Troubled(trouble));
        }
    }

    /// It no longer is.
    pub(super) fn relieve(&self, trouble: Trouble) {
        let mut progress = self.progress();
        let known = progress.troubles.len();
        progress.troubles.retain(|other| *other != trouble);
        let is_news = progress.troubles.len() < known;
        drop(progress);
        if is_news {
            self.tell(SessionEvent::Relieved(trouble));
        }
    }

    /// Whether sends are possible.
    pub(super) fn is_online(&self) -> bool {
        self.online.load(Ordering::Acquire)
    }

    /// A pair-success is being answered: from here on the credentials go to disk before anything goes to the wire.
    pub(super) fn answer_pairing(&self) {
        self.answering_pairing.store(true, Ordering::Release);
    }

    /// Whether a pair-success arrived on this connection.
    pub(super) fn is_answering_pairing(&self) -> bool {
        self.answering_pairing.load(Ordering::Acquire)
    }

    /// The phone accepted us.
    pub(super) fn pair(&self, paired: PairedAs) {
        self.progress().paired = Some(paired);
        self.wake.notify_one();
    }

    /// Who accepted us, if anybody did.
    pub(super) fn paired(&self) -> Option<PairedAs> {
        self.progress().paired.clone()
    }

    /// Nothing more goes to the wire: whatever the client still wants to say was not made durable.
    pub(super) fn seal(&self) {
        self.sealed.store(true, Ordering::Release);
    }

    /// Called by the transport before every write. Whatever tells the server that a receipt was heard is written after
    /// its handler returned, so the whole connection waits here until the receipts and the requests for a repeat heard
    /// so far are durable.
    ///
    /// # Errors
    /// When the session is sealed, or the credentials of a pairing, a receipt or a request did not reach the disk.
    pub(super) async fn before_write(&self) -> Result<(), &'static str> {
        if self.sealed.load(Ordering::Acquire) {
            return Err("the session is sealed");
        }
        if self.is_answering_pairing() {
            let persistence = self.persistence.get().and_then(Weak::upgrade);
            let flushed = match persistence {
                Some(persistence) => persistence.flush().await.is_ok(),
                None => false,
            };
            if !flushed {
                return Err("the credentials are not durable");
            }
        }
        let caught_up = async {
            self.receipts.caught_up().await;
            self.repeats.caught_up().await;
        };
        timeout(HEARD_WITHIN, caught_up).await.map_err(|_| "what was heard is not durable")?;
        // Whoever could not make it durable may have sealed the session meanwhile.
        if self.sealed.load(Ordering::Acquire) {
            return Err("the session is sealed");
        }
        Ok(())
    }

    /// Queues an event from a synchronous handler. A full queue drops it: the outbox resends what was never
    /// acknowledged, and a receipt costs one rung of the ladder.
    pub(super) fn tell(&self, event: SessionEvent) {
        self.push(Queued::Event(Box::new(event)));
    }

    /// Queues an entry from a synchronous handler; see [`Self::tell`].
    pub(super) fn push(&self, entry: Queued) {
        if self.queue.try_send(entry).is_err() {
            let dropped = self.dropped.fetch_add(1, Ordering::Relaxed) + 1;
            if dropped.is_power_of_two() {
                tracing::warn!(dropped, "session event dropped: the number does not keep up");
            }
        }
    }

    /// Queues a receipt. One that finds no room must come again, so the connection ends before the server is told.
    pub(super) fn push_receipt(&self, receipt: RawReceipt) {
        self.receipts.hear();
        self.push_or_end(Queued::Receipt(Box::new(receipt)));
    }

    /// Queues a device's request for a repeat; one without room ends the connection, as a receipt does.
    pub(super) fn push_asked(&self, asked: Asked) {
        let mut known = self.asked();
        if known.len() >= ASKED_MAX && !known.contains_key(&asked.name()) {
            tracing::warn!(most = ASKED_MAX, "too many requests for repeats: a crash would forget this one");
            return;
        }
        known.insert(asked.name(), None);
        drop(known);
        self.repeats.hear();
        self.push_or_end(Queued::Asked(Box::new(asked)));
    }

    fn push_or_end(&self, entry: Queued) {
        if self.queue.try_send(entry).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            self.receipt_lost();
        }
    }

    fn asked(&self) -> MutexGuard<'_, HashMap<AskedName, Option<Instant>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that earlier connections left open.
    pub(super) fn expect_confirmation(&self, left: &[Asked]) {
        self.asked().extend(left.iter().map(|asked| (asked.name(), None)));
    }

    /// Whether any request is open that this session has not answered besides the library for so long.
    pub(super) fn has_unanswered(&self, patience: Duration) -> bool {
        self.asked().values().any(|answered| answered.is_none_or(|at| at.elapsed() >= patience))
    }

    /// Claims an answer to a request. False: it is settled, or has had an answer of this session within `patience`.
    pub(super) fn claim_answer(&self, name: &AskedName, patience: Duration) -> bool {
        let mut known = self.asked();
        let Some(answered) = known.get_mut(name) else { return false };
        let due = answered.is_none_or(|at| at.elapsed() >= patience);
        if due {
            *answered = Some(Instant::now());
        }
        due
    }

    /// A device has a message, whether it had asked for it or not.
    pub(super) fn confirmed(&self, device: &str, whatsapp_id: &str) {
        let mut known = self.asked();
        if known.is_empty() {
            return;
        }
        let name = (device.to_owned(), whatsapp_id.to_owned());
        if known.remove(&name).is_some() {
            drop(known);
            self.push(Queued::Confirmed(Box::new(name)));
        }
    }

    /// A crash has lost this message: its sender must be asked for it.
    pub(super) fn lose(&self, whatsapp_id: &str) {
        self.backlog.lose(whatsapp_id);
        self.wake.notify_one();
    }

    /// What follows from the oldest request for a repeat that was not durable is.
    pub(super) fn asked_durable(&self) {
        self.repeats.durable();
    }

    /// What follows from the oldest receipt that was not durable is.
    pub(super) fn receipt_durable(&self) {
        self.receipts.durable();
    }

    /// A receipt, or a request for a repeat, did not reach the disk: nothing more is written, and the next connection brings it again.
    pub(super) fn receipt_lost(&self) {
        self.seal();
        self.end(CloseReason::StoreFailed);
    }

    /// Queues an event and waits for room. False: the session is over.
    pub(super) async fn deliver(&self, event: SessionEvent) -> bool {
        self.queue.send(Queued::Event(Box::new(event))).await.is_ok()
    }

    /// Whether nobody takes events any more.
    pub(super) fn is_over(&self) -> bool {
        self.queue.is_closed()
    }

    /// Queues a message that was recovered outside the durability hook.
    pub(super) fn push_recovered(&self, message: InboundMessage) {
        if self.recovered.try_send(Box::new(message)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Events dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signals() -> (Arc<Signals>, mpsc::Receiver<Queued>) {
        let (queue, entries) = mpsc::channel(4);
        let (late, _) = mpsc::channel(1);
        (Signals::new(None, LinkBy::QrCode, queue, late), entries)
    }

    #[tokio::test]
    async fn a_more_certain_reason_wins_and_the_first_of_equals() {
        let (signals, _entries) = signals();
        signals.note(Certainty::Maybe, CloseReason::Refused { code: 777 });
        signals.note(Certainty::Ending, CloseReason::ConnectionLost);
        signals.note(Certainty::Ending, CloseReason::Recycled);
        assert_eq!(signals.ending(Certainty::Maybe), Some(CloseReason::ConnectionLost));
        assert_eq!(signals.ending(Certainty::EndNow), None);
        signals.end(CloseReason::StoreFailed);
        signals.end(CloseReason::Crashed);
        assert_eq!(signals.ending(Certainty::EndNow), Some(CloseReason::StoreFailed));
        signals.next_connection();
        assert_eq!(signals.ending(Certainty::EndNow), Some(CloseReason::StoreFailed));
    }

    #[tokio::test]
    async fn a_request_gets_another_answer_when_its_patience_is_over_until_it_is_confirmed() {
        let (signals, _entries) = signals();
        let device = "5511999990001@s.whatsapp.net".to_owned();
        let asked = Asked { device, recipient: None, whatsapp_id: "3EB0".to_owned(), count: 1, at: 0, answers: 0 };
        let (name, hour) = (asked.name(), Duration::from_hours(1));
        assert!(!signals.claim_answer(&name, hour), "nobody asked");
        signals.push_asked(asked.clone());
        assert!(signals.has_unanswered(hour) && signals.claim_answer(&name, hour));
        assert!(!signals.has_unanswered(hour) && !signals.claim_answer(&name, hour), "it has its answer");
        assert!(signals.has_unanswered(Duration::ZERO) && signals.claim_answer(&name, Duration::ZERO), "not confirmed");
        signals.push_asked(asked);
        assert!(signals.claim_answer(&name, hour), "asked again");
        signals.confirmed(&name.0, &name.1);
        assert!(!signals.has_unanswered(Duration::ZERO) && !signals.claim_answer(&name, Duration::ZERO));
    }

    #[tokio::test]
    async fn an_answer_takes_back_a_mere_suspicion() {
        let (signals, _entries) = signals();
        signals.note(Certainty::Maybe, CloseReason::Refused { code: 777 });
        signals.answered();
        assert_eq!(signals.ending(Certainty::Maybe), None);
    }

    #[tokio::test]
    async fn alive_is_told_once_online_and_not_on_every_answer() {
        let (signals, mut entries) = signals();
        let now = Instant::now();
        signals.connected();
        assert!(!signals.is_online(), "nothing has answered");
        signals.answered_at(now);
        signals.connected();
        signals.answered_at(now);
        signals.answered_at(now);
        signals.answered_at(now + ALIVE_EVERY);
        let mut told = Vec::new();
        while let Ok(Queued::Event(event)) = entries.try_recv() {
            told.push(format!("{event:?}"));
        }
        assert_eq!(told, ["Online", "Alive", "Alive"]);
    }

    #[tokio::test]
    async fn a_full_queue_drops_and_counts() {
        let (signals, mut entries) = signals();
        for _ in 0..6 {
            signals.tell(SessionEvent::Alive);
        }
        assert_eq!(signals.dropped(), 2);
        entries.close();
        while entries.recv().await.is_some() {}
        assert!(!signals.deliver(SessionEvent::Alive).await);
    }
}
