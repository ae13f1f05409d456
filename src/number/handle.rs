//! The way to a number for everybody else. It outlives the actor's restarts, admits before the mailbox (which has
//! no limit of its own) and answers every read without asking the actor.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ractor::ActorRef;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, oneshot, watch};

use super::message::{
    Accepted, Control, EndpointRefused, EraseRefused, NumberMessage, PasskeyNotTaken, PasskeyStep, SendRefused,
    StoreLost, Unserved,
};
use crate::domain::delivery::Backlog;
use crate::domain::endpoint::Endpoint;
use crate::domain::id::{EventSeq, MessageSeq, NumberId, TenantId};
use crate::domain::lifecycle::{Attention, Desired, LastError, Life, State};
use crate::domain::limiter::NewChats;
use crate::domain::message::{Content, Direction};
use crate::domain::number::{CancelOutcome, CancelTarget, EndpointOrder, SendRequest};
use crate::domain::orders::SendingOrders;
use crate::domain::outbox::Standing;
use crate::domain::phone::{Contact, Phone};
use crate::domain::retention::Retention;
use crate::domain::time::Timestamp;
use crate::session::contract::PasskeyRefused;
use crate::store::number_store::NumberStore;
use crate::telemetry::failpoint::{self, Failpoint};
use crate::telemetry::number_stats::{NumberStats, labels};
use crate::telemetry::rng::Random;

/// Calls under way at once per number; more are refused before they reach the mailbox.
pub const CALLS_MAX: usize = 64;

/// How often, and how many times, a call looks whether an erasure has ended.
const ERASE_LOOK_EVERY: Duration = Duration::from_millis(50);
const ERASE_LOOKS: usize = 60;

/// How long a call waits for a number that starts or restarts.
const START_PATIENCE: Duration = Duration::from_secs(3);

/// What anybody may see of a number's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumberView {
    /// Where it stands.
    pub state: State,
    /// When it is tried again by itself, if it is.
    pub next_attempt: Option<Timestamp>,
    /// Since when.
    pub since: Timestamp,
    /// Why: a stable code, or empty.
    pub reason: String,
    /// What the operator wants.
    pub desired: Desired,
    /// Whether credentials are stored.
    pub linked: bool,
    /// Where linking stands, while somebody is at it.
    pub pairing: Pairing,
    /// Whether it may write to people who never wrote to it.
    pub new_chats: NewChats,
    /// The last connection that ended other than as wanted.
    pub last_error: Option<LastError>,
    /// Who must act.
    pub attention: Attention,
}

/// Where linking stands.
#[derive(Clone, PartialEq, Eq)]
pub enum Pairing {
    /// Nobody is linking.
    Idle,
    /// Waiting for the first code.
    Starting,
    /// Show this code.
    QrCode {
        /// The text to encode.
        code: String,
        /// When the next one replaces it.
        expires_at: Timestamp,
    },
    /// Show this code, to be typed into the phone.
    Code {
        /// The code.
        code: String,
        /// Until when it works.
        expires_at: Timestamp,
    },
    /// Its owner is to unlock the account's passkey in a browser.
    PasskeyRequest {
        /// WebAuthn request options, as JSON.
        options: String,
        /// Until when WhatsApp waits for the answer.
        expires_at: Timestamp,
    },
    /// WhatsApp has the answer; the phone is at work.
    PasskeyAnswered,
    /// Its owner is to compare this code with the one on the phone.
    PasskeyCode {
        /// Two groups of four letters and digits.
        code: String,
        /// Until when the answer is waited for.
        expires_at: Timestamp,
    },
    /// The codes are the same; the phone is at work.
    PasskeyConfirmed,
    /// The phone accepted; logging in.
    Paired,
    /// It came to nothing; the view's reason says why.
    Failed,
}

impl std::fmt::Debug for Pairing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Idle => "Idle",
            Self::Starting => "Starting",
            Self::QrCode { .. } => "QrCode(…)",
            Self::Code { .. } => "Code(…)",
            Self::PasskeyRequest { .. } => "PasskeyRequest(…)",
            Self::PasskeyAnswered => "PasskeyAnswered",
            Self::PasskeyCode { .. } => "PasskeyCode(…)",
            Self::PasskeyConfirmed => "PasskeyConfirmed",
            Self::Paired => "Paired",
            Self::Failed => "Failed",
        })
    }
}

/// How far an erasure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erased {
    /// Nothing is left.
    Entirely,
    /// The order is durable and goes on, also after a restart.
    UnderWay,
}

/// The running incarnation.
#[derive(Debug)]
pub struct Live {
    pub(crate) actor: ActorRef<NumberMessage>,
    pub(crate) store: NumberStore,
}

impl Live {
    /// Why it did not answer: its disk, or else it ended.
    fn unserved(&self) -> Unserved {
        self.store.failure().map_or(Unserved::NotReady, |error| Unserved::from(&error))
    }
}

/// What a caller wants to send.
#[derive(Debug, Clone)]
pub struct SendCommand {
    /// The recipient.
    pub to: Contact,
    /// What to say.
    pub content: Content,
    /// Not before this moment.
    pub send_at: Option<Timestamp>,
    /// Not after this moment.
    pub expires_at: Option<Timestamp>,
    /// Refused if it would probably wait longer, from when it is due.
    pub max_wait: Option<Duration>,
    /// The caller's own reference.
    pub correlation_id: Option<String>,
    /// The caller's request id, unique within `scope`.
    pub request_id: Option<String>,
    /// Separates the request ids of different keys.
    pub scope: String,
}

/// The handle of one number.
#[derive(Debug)]
pub struct NumberHandle {
    id: NumberId,
    tenant: TenantId,
    phone: Phone,
    labels: Box<str>,
    stats: NumberStats,
    view: watch::Sender<NumberView>,
    /// How the queue of each endpoint stands, by its ordinal.
    backlogs: Mutex<Vec<(u32, Backlog)>>,
    events: watch::Sender<EventSeq>,
    event_floor: AtomicU64,
    live: watch::Sender<Option<Arc<Live>>>,
    /// Why there is no incarnation, when that is the disk's doing.
    lost: Mutex<Option<StoreLost>>,
    deleted: watch::Sender<bool>,
    calls: Arc<Semaphore>,
    slot: Arc<Semaphore>,
    answered_at_millis: AtomicU64,
    /// Streams that follow its capacity.
    capacity_watchers: AtomicUsize,
}

impl NumberHandle {
    /// A handle without an actor yet.
    #[must_use]
    pub fn new(id: NumberId, tenant: TenantId, phone: Phone, now: Timestamp) -> Self {
        let view = NumberView {
            state: State::Unlinked,
            next_attempt: None,
            since: now,
            reason: String::new(),
            desired: Desired::Running,
            linked: false,
            pairing: Pairing::Idle,
            new_chats: NewChats::Allowed,
            last_error: None,
            attention: Attention::None,
        };
        Self {
            id,
            tenant,
            phone,
            labels: labels(id, tenant),
            stats: NumberStats::default(),
            view: watch::Sender::new(view),
            backlogs: Mutex::default(),
            events: watch::Sender::new(EventSeq(0)),
            event_floor: AtomicU64::new(0),
            live: watch::Sender::new(None),
            lost: Mutex::new(None),
            deleted: watch::Sender::new(false),
            calls: Arc::new(Semaphore::new(CALLS_MAX)),
            slot: Arc::new(Semaphore::new(1)),
            answered_at_millis: AtomicU64::new(0),
            capacity_watchers: AtomicUsize::new(0),
        }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> NumberId {
        self.id
    }

    /// Its owner.
    #[must_use]
    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// Its phone number.
    #[must_use]
    pub fn phone(&self) -> &Phone {
        &self.phone
    }

    /// Its labels, ready for the collector.
    #[must_use]
    pub fn labels(&self) -> &str {
        &self.labels
    }

    /// Its figures.
    #[must_use]
    pub fn stats(&self) -> &NumberStats {
        &self.stats
    }

    /// What can be seen of it now.
    #[must_use]
    pub fn view(&self) -> NumberView {
        self.view.borrow().clone()
    }

    /// Whether the view tells this life already.
    pub(crate) fn shows(&self, life: &Life, new_chats: NewChats) -> bool {
        let view = self.view.borrow();
        view.new_chats == new_chats
            && view.state == life.state
            && view.since == life.since
            && view.reason == life.reason
            && view.desired == life.desired
            && view.linked == life.linked
            && view.last_error == life.last_error
            && view.attention == life.attention()
    }

    /// How an endpoint's queue stands; unknown until the number has started.
    #[must_use]
    pub fn backlog(&self, ordinal: u32) -> Option<Backlog> {
        let backlogs = self.backlogs.lock().unwrap_or_else(PoisonError::into_inner);
        backlogs.iter().find(|(known, _)| *known == ordinal).map(|(_, backlog)| *backlog)
    }

    /// Shows how the queues stand. Most steps change none of them.
    pub(crate) fn show_backlogs(&self, now: impl Iterator<Item = (u32, Backlog)> + Clone) {
        let mut shown = self.backlogs.lock().unwrap_or_else(PoisonError::into_inner);
        if !now.clone().eq(shown.iter().copied()) {
            shown.clear();
            shown.extend(now);
        }
    }

    /// Whether somebody follows its capacity closely.
    pub(crate) fn is_capacity_watched(&self) -> bool {
        self.capacity_watchers.load(Ordering::Relaxed) > 0
    }

    /// Somebody follows its capacity closely, or no longer does.
    pub fn watch_capacity(&self, begins: bool) {
        if begins {
            self.capacity_watchers.fetch_add(1, Ordering::Relaxed);
        } else {
            self.capacity_watchers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// What it is doing now.
    #[must_use]
    pub fn view_state(&self) -> State {
        self.view.borrow().state
    }

    /// Lets it look through what waits, and show what follows for its capacity; tells when it has. None while it does not
    /// run.
    #[must_use]
    pub fn look(&self) -> Option<oneshot::Receiver<()>> {
        let live = self.live.borrow().clone()?;
        let (reply, looked) = oneshot::channel();
        live.actor.cast(NumberMessage::Look(reply)).ok()?;
        Some(looked)
    }

    /// Follows what can be seen of it.
    #[must_use]
    pub fn watch_view(&self) -> watch::Receiver<NumberView> {
        self.view.subscribe()
    }

    /// Follows the last durable event.
    #[must_use]
    pub fn watch_events(&self) -> watch::Receiver<EventSeq> {
        self.events.subscribe()
    }

    /// Its records, for reading.
    ///
    /// # Errors
    /// Why they cannot be read now.
    pub fn store(&self) -> Result<NumberStore, Unserved> {
        let live = self.live.borrow();
        let store = live.as_ref().map(|live| live.store.clone());
        store.ok_or_else(|| self.why_lost().unwrap_or(Unserved::NotReady))
    }

    fn why_lost(&self) -> Option<Unserved> {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.as_ref().map(|lost| Unserved::from(&lost.0))
    }

    /// The one slot a socket of this number needs.
    #[must_use]
    pub(crate) fn slot(&self) -> &Arc<Semaphore> {
        &self.slot
    }

    pub(crate) fn change_view(&self, change: impl FnOnce(&mut NumberView)) {
        self.view.send_modify(change);
    }

    /// Says that the number is deleted: whoever follows it learns of it.
    pub fn delete(&self) {
        self.deleted.send_replace(true);
    }

    /// Follows whether it is deleted.
    #[must_use]
    pub fn watch_deleted(&self) -> watch::Receiver<bool> {
        self.deleted.subscribe()
    }

    /// The event log begins behind this event.
    pub(crate) fn events_begin_after(&self, seq: EventSeq) {
        self.event_floor.fetch_max(seq.0, Ordering::AcqRel);
    }

    /// The last event that is no longer part of the log.
    #[must_use]
    pub fn event_floor(&self) -> EventSeq {
        EventSeq(self.event_floor.load(Ordering::Acquire))
    }

    pub(crate) fn events_visible(&self, seq: EventSeq) {
        self.events.send_if_modified(|last| {
            let newer = seq > *last;
            *last = seq.max(*last);
            newer
        });
    }

    /// The number waits for its volume: calls are refused at once, with the reason.
    pub(crate) fn set_lost(&self, lost: &StoreLost) {
        *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(lost.clone());
    }

    /// The actor is there (`Some`) or gone.
    pub(crate) fn set_live(&self, live: Option<Live>) {
        if live.is_some() {
            *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.live.send_replace(live.map(Arc::new));
    }

    pub(crate) fn answered(&self, monotonic: Duration) {
        self.answered_at_millis.store(u64::try_from(monotonic.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// When the actor last answered the watchdog, on the monotonic clock.
    #[must_use]
    pub fn answered_at(&self) -> Duration {
        Duration::from_millis(self.answered_at_millis.load(Ordering::Relaxed))
    }

    /// The running incarnation. While it starts or restarts, waits for it a little; not while it waits for its volume.
    async fn live(&self) -> Result<Arc<Live>, Unserved> {
        if let Some(unserved) = self.why_lost() {
            return Err(unserved);
        }
        let mut incarnations = self.live.subscribe();
        if let Some(live) = incarnations.borrow_and_update().clone() {
            return Ok(live);
        }
        if self.view.borrow().state == State::Quarantined {
            return Err(Unserved::NotReady);
        }
        let started = incarnations.wait_for(Option::is_some);
        match tokio::time::timeout(START_PATIENCE, started).await {
            Ok(Ok(live)) => live.clone().ok_or(Unserved::NotReady),
            _ => Err(self.why_lost().unwrap_or(Unserved::NotReady)),
        }
    }

    /// Accepts a send: durable when this returns `Ok`. Cancelling the call does not undo it.
    ///
    /// # Errors
    /// See [`SendRefused`]; nothing was kept then, except possibly after `Unserved`: the
    /// number, or its disk, went down during the call. Asking again with the same request id is always safe.
    pub async fn send(&self, command: SendCommand, random: &Random) -> Result<Accepted, SendRefused> {
        let permit = self.calls.clone().try_acquire_owned().map_err(|_| SendRefused::Busy)?;
        let live = self.live().await?;
        if !live.store.has_room() {
            return Err(Unserved::DiskFull.into());
        }
        let chat = live.store.chat_of(&command.to).await.map_err(|error| Unserved::from(&error))?;
        let idempotency = command.request_id.as_ref().map(|request_id| {
            let key = live.store.idempotency_key(&command.scope, request_id);
            (key, body_digest(&command))
        });
        let standing = match chat {
            Some(chat) => live.store.standing(chat).await.map_err(|error| Unserved::from(&error))?,
            None => Standing::New,
        };
        let request = SendRequest {
            to: command.to,
            chat,
            standing,
            content: command.content,
            send_at: command.send_at,
            expires_at: command.expires_at,
            whatsapp_id: new_whatsapp_id(random),
            correlation_id: command.correlation_id,
            idempotency,
            max_wait: command.max_wait,
        };
        let (reply, answer) = oneshot::channel();
        let message = NumberMessage::Send { request: Box::new(request), reply, permit };
        failpoint::reach(Failpoint::AcceptAsked);
        live.actor.cast(message).map_err(|_| live.unserved())?;
        answer.await.unwrap_or_else(|_| Err(live.unserved().into()))
    }

    /// What a request was answered before, if its request id is remembered.
    ///
    /// # Errors
    /// `RequestIdReused` when it asked for something else, `Unserved` when its records cannot be read.
    pub async fn remembered(&self, command: &SendCommand) -> Result<Option<Accepted>, SendRefused> {
        let Some(request_id) = &command.request_id else { return Ok(None) };
        let live = self.live().await?;
        let key = live.store.idempotency_key(&command.scope, request_id);
        let record = live.store.idempotency(key).await.map_err(|error| Unserved::from(&error))?;
        match record {
            Some(record) if record.body != body_digest(command) => Err(SendRefused::RequestIdReused),
            Some(record) => Ok(Some(Accepted { seq: record.seq, created_at: record.created_at, predicted_wait: None })),
            None => Ok(None),
        }
    }

    /// Withdraws messages: durable when this returns `Ok`. What became of each, in the order asked.
    ///
    /// # Errors
    /// `Unserved` also when the number, or its disk, went down during the call; asking again is always safe.
    pub async fn cancel(&self, seqs: &[MessageSeq]) -> Result<Vec<(MessageSeq, CancelOutcome)>, SendRefused> {
        let _permit = self.calls.clone().try_acquire_owned().map_err(|_| SendRefused::Busy)?;
        let live = self.live().await?;
        let mut targets = Vec::with_capacity(seqs.len());
        for seq in seqs {
            let record = live.store.message(*seq).await.map_err(|error| Unserved::from(&error))?;
            let stored = match record.filter(|record| record.direction == Direction::Outbound) {
                Some(_) => Some(live.store.progress(*seq).await.map_err(|error| Unserved::from(&error))?),
                None => None,
            };
            targets.push(CancelTarget { seq: *seq, stored });
        }
        let (reply, answer) = oneshot::channel();
        live.actor.cast(NumberMessage::Cancel(targets, reply)).map_err(|_| live.unserved())?;
        Ok(answer.await.map_err(|_| live.unserved())?)
    }

    /// Gives an order. Its outcome shows in the view.
    ///
    /// # Errors
    /// See [`Unserved`].
    pub async fn control(&self, control: Control) -> Result<(), Unserved> {
        let live = self.live().await?;
        let (reply, answer) = oneshot::channel();
        live.actor.cast(NumberMessage::Control(control, reply)).map_err(|_| live.unserved())?;
        answer.await.map_err(|_| live.unserved())
    }

    /// Takes a step of linking with a passkey. WhatsApp has it when this returns `Ok`; what follows shows in the view.
    ///
    /// # Errors
    /// See [`PasskeyNotTaken`].
    pub async fn passkey(&self, step: PasskeyStep) -> Result<(), PasskeyNotTaken> {
        let gone = match step {
            PasskeyStep::Answer(_) => PasskeyNotTaken::NotRequested,
            PasskeyStep::Confirm(_) => PasskeyNotTaken::NoCode,
        };
        let live = self.live().await?;
        let (reply, taken) = oneshot::channel();
        live.actor.cast(NumberMessage::Passkey(step, reply)).map_err(|_| live.unserved())?;
        let verdict = taken.await.unwrap_or_else(|_| Err(live.unserved().into()))?;
        verdict.await.map_err(|_| gone)?.map_err(|PasskeyRefused| PasskeyNotTaken::Refused)
    }

    /// Erases a contact: its history, its chat and what events tell of it. Durable as an order when this returns; gives
    /// whether it was carried out within a little while, or goes on behind.
    ///
    /// # Errors
    /// See [`EraseRefused`].
    pub async fn erase(&self, contact: &Contact) -> Result<Erased, EraseRefused> {
        let live = self.live().await?;
        let unread = |error| Unserved::from(&error);
        let Some(chat) = live.store.chat_of(contact).await.map_err(unread)? else { return Ok(Erased::Entirely) };
        let (reply, answer) = oneshot::channel();
        live.actor.cast(NumberMessage::Erase(chat, reply)).map_err(|_| live.unserved())?;
        answer.await.unwrap_or_else(|_| Err(live.unserved().into()))?;
        for _ in 0..ERASE_LOOKS {
            if !live.store.is_being_erased(chat).await.map_err(unread)? {
                return Ok(Erased::Entirely);
            }
            tokio::time::sleep(ERASE_LOOK_EVERY).await;
        }
        Ok(Erased::UnderWay)
    }

    /// What it keeps was set, on disk. A number that starts just now reads it there.
    pub fn keep(&self, retention: Retention) {
        if let Some(live) = self.live.borrow().as_ref() {
            let _ = live.actor.cast(NumberMessage::Retention(retention));
        }
    }

    /// What is ordered about its sending was set, on disk. A number that starts just now reads it there.
    pub fn order_sending(&self, orders: SendingOrders) {
        if let Some(live) = self.live.borrow().as_ref() {
            let _ = live.actor.cast(NumberMessage::Orders(orders));
        }
    }

    /// Adds a webhook endpoint; its ordinal is chosen here.
    ///
    /// # Errors
    /// See [`EndpointRefused`].
    pub async fn add_endpoint(&self, endpoint: Endpoint) -> Result<Endpoint, EndpointRefused> {
        let live = self.live().await?;
        let (reply, answer) = oneshot::channel();
        let message = NumberMessage::AddEndpoint(Box::new(endpoint), reply);
        live.actor.cast(message).map_err(|_| live.unserved())?;
        answer.await.unwrap_or_else(|_| Err(live.unserved().into()))
    }

    /// Removes a webhook endpoint and what is queued for it.
    ///
    /// # Errors
    /// See [`EndpointRefused`].
    pub async fn remove_endpoint(&self, ordinal: u32) -> Result<(), EndpointRefused> {
        let live = self.live().await?;
        let (reply, answer) = oneshot::channel();
        let message = NumberMessage::RemoveEndpoint(ordinal, reply);
        live.actor.cast(message).map_err(|_| live.unserved())?;
        answer.await.unwrap_or_else(|_| Err(live.unserved().into()))
    }

    /// Changes a webhook endpoint, or sends something to it again. Durable when this returns.
    ///
    /// # Errors
    /// See [`EndpointRefused`].
    pub async fn change_endpoint(&self, ordinal: u32, order: EndpointOrder) -> Result<Endpoint, EndpointRefused> {
        let live = self.live().await?;
        let (reply, answer) = oneshot::channel();
        let message = NumberMessage::ChangeEndpoint(ordinal, order, reply);
        live.actor.cast(message).map_err(|_| live.unserved())?;
        answer.await.unwrap_or_else(|_| Err(live.unserved().into()))
    }

    /// Makes the actor panic: for tests of the supervisor.
    #[cfg(feature = "sandbox")]
    pub fn make_panic(&self) {
        if let Some(live) = self.live.borrow().clone() {
            let _ = live.actor.cast(NumberMessage::Panic);
        }
    }
}

/// `3EB0` and 18 hex digits, the shape of ids that WhatsApp Web clients make.
fn new_whatsapp_id(random: &Random) -> String {
    let bytes: [u8; 9] = random.bytes();
    let mut id = String::with_capacity(22);
    id.push_str("3EB0");
    for byte in bytes {
        id.push_str(&format!("{byte:02X}"));
    }
    id
}

fn body_digest(command: &SendCommand) -> [u8; 32] {
    let mut hasher = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_be_bytes());
        hasher.update(bytes);
    };
    for address in command.to.addresses() {
        part(address.as_bytes());
    }
    part(command.content.kind().as_bytes());
    part(command.content.text().as_bytes());
    part(command.correlation_id.as_deref().unwrap_or_default().as_bytes());
    // Only where given: requests remembered by earlier versions stay the same requests.
    for (name, at) in [("send_at", command.send_at), ("expires_at", command.expires_at)] {
        if let Some(at) = at {
            part(name.as_bytes());
            part(&at.0.to_be_bytes());
        }
    }
    hasher.finalize().into()
}
