//! The ractor callbacks of one number: message in, step, perform. Waits for nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};

use super::environment::{Environment, Passage};
use super::handle::{Live, NumberHandle, Pairing};
use super::message::{
    Accepted, ConnectionNo, Control, FromSession, GateTurn, Inner, Internal, NumberMessage, PasskeyNotTaken,
    PasskeyStep, PasskeyVerdict, SendRefused, StoreLost, Unserved, Waiter,
};
use crate::domain::change::IdempotencyRecord;
use crate::domain::close::CloseReason;
use crate::domain::gate::{Outcome, Priority};
use crate::domain::id::{EventSeq, NumberId};
use crate::domain::ledger::SessionMemory;
use crate::domain::lifecycle::{self, Purpose};
use crate::domain::limiter::NewChats;
use crate::domain::message::FailureCode;
use crate::domain::number::{Effect, Input, Number, ReplyId, Retry, Snapshot};
use crate::domain::passkey::is_same_code;
use crate::domain::proxy::{Proxy, ProxyAddress, Way};
use crate::domain::retention::Rules;
use crate::domain::time::Timestamp;
use crate::session::contract::{SendError, SessionCommand, Usage};
use crate::store::error::StoreError;
use crate::store::number_store::NumberStore;
use crate::telemetry::backoff::Backoff;
use crate::telemetry::failpoint::{self, Failpoint};
use crate::telemetry::metrics;

/// Longest sleep while something is due later: a wall clock that was set forward is noticed within it.
const WAKE_WITHIN: Duration = Duration::from_secs(60);
/// So long after something was due its timer is not waited for any more.
const WAKE_LATE: Duration = Duration::from_secs(1);

/// A number whose proxy is down looks again by itself after this; as a rule it is woken before.
const WAY_LOOK: Duration = Duration::from_mins(15);

/// The actor. All its knowledge is in [`NumberState`].
#[derive(Debug)]
pub struct NumberActor;

/// What a number is started with.
#[derive(Debug)]
pub struct Arguments {
    /// Its handle, which outlives it.
    pub handle: Arc<NumberHandle>,
    /// The volume its records live in.
    pub volume: u8,
    /// What it acts with.
    pub environment: Arc<Environment>,
}

/// A task of the number panicked.
#[derive(Debug, thiserror::Error)]
#[error("a task of the number panicked")]
struct TaskPanicked;

/// One running number.
#[derive(Debug)]
pub struct NumberState {
    pub(super) handle: Arc<NumberHandle>,
    pub(super) environment: Arc<Environment>,
    pub(super) span: tracing::Span,
    pub(super) loaded: Option<Loaded>,
    pub(super) backoff: Backoff,
    pub(super) turn: Option<GateTurn>,
    /// As what it waits at the gate.
    pub(super) asked: Option<Priority>,
    /// How its last attempt to connect ended, in this life.
    pub(super) last_attempt: Option<Outcome>,
    /// The proxy that it waits at the gate for, or that its attempt goes through.
    pub(super) through: Option<Passage>,
    pub(super) connection: Connection,
    pub(super) next_connection: u64,
    /// What the present session has told of itself.
    pub(super) usage: Usage,
    /// What the phone is given that is to be linked.
    pub(super) link_by: lifecycle::LinkBy,
    pub(super) waiters: HashMap<ReplyId, Waiter>,
    pub(super) next_reply: u64,
    pub(super) wake: Option<(Timestamp, AbortHandle)>,
    /// Everything the number has running; dropped, and so ended, with it.
    pub(super) tasks: JoinSet<()>,
    pub(super) deliveries: JoinSet<()>,
    pub(super) draining: bool,
}

/// What only exists once the records were read.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) number: Number,
    pub(super) store: NumberStore,
}

/// The number's connection, as far as the shell is concerned.
#[derive(Debug)]
pub(super) enum Connection {
    None,
    /// Waiting for the slot, or for the session to start.
    Opening {
        no: ConnectionNo,
        close_wanted: bool,
    },
    Open {
        no: ConnectionNo,
        commands: mpsc::Sender<SessionCommand>,
    },
}

impl Connection {
    fn no(&self) -> Option<ConnectionNo> {
        match self {
            Self::None => None,
            Self::Opening { no, .. } | Self::Open { no, .. } => Some(*no),
        }
    }
}

impl Actor for NumberActor {
    type Msg = NumberMessage;
    type State = NumberState;
    type Arguments = Arguments;

    async fn pre_start(
        &self,
        myself: ActorRef<NumberMessage>,
        arguments: Arguments,
    ) -> Result<NumberState, ActorProcessingErr> {
        let Arguments { handle, volume, environment } = arguments;
        let span = tracing::info_span!("number", number = %handle.id());
        handle.answered(environment.clock.monotonic());
        let backoff = Backoff::connection(environment.reconnect);
        let mut state = NumberState {
            handle,
            environment,
            span,
            loaded: None,
            backoff,
            turn: None,
            asked: None,
            last_attempt: None,
            through: None,
            connection: Connection::None,
            next_connection: 1,
            usage: Usage::default(),
            link_by: lifecycle::LinkBy::default(),
            waiters: HashMap::new(),
            next_reply: 1,
            wake: None,
            tasks: JoinSet::new(),
            deliveries: JoinSet::new(),
            draining: false,
        };
        let (environment, number) = (state.environment.clone(), state.handle.id());
        state.tasks.spawn(async move {
            let loaded = load(&environment, number, volume).await;
            let _ = myself.cast(Inner::Loaded(Box::new(loaded)).into());
        });
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<NumberMessage>,
        message: NumberMessage,
        state: &mut NumberState,
    ) -> Result<(), ActorProcessingErr> {
        let span = state.span.clone();
        let _entered = span.enter();
        state.reap()?;
        match message {
            NumberMessage::Internal(Internal(inner)) => {
                state.on_internal(inner, &myself).map_err(|error| state.lost(error))?;
            }
            NumberMessage::Send { request, reply, permit } => {
                if state.loaded.is_none() {
                    let _ = reply.send(Err(Unserved::NotReady.into()));
                } else {
                    let id = state.wait(Waiter::Send(reply, permit));
                    state.step(Input::Send(request, id), &myself);
                }
            }
            NumberMessage::Cancel(targets, reply) => {
                if state.loaded.is_some() {
                    let id = state.wait(Waiter::Cancel(reply));
                    state.step(Input::Cancel(targets, id), &myself);
                }
            }
            NumberMessage::Control(control, reply) => {
                state.on_control(control, &myself);
                let _ = reply.send(());
            }
            NumberMessage::Passkey(step, reply) => drop(reply.send(state.on_passkey(step))),
            NumberMessage::AddEndpoint(endpoint, reply) => {
                let id = state.wait(Waiter::AddEndpoint(reply));
                state.step(Input::AddEndpoint(endpoint, id), &myself);
            }
            NumberMessage::RemoveEndpoint(ordinal, reply) => {
                let id = state.wait(Waiter::RemoveEndpoint(reply));
                state.step(Input::RemoveEndpoint(ordinal, id), &myself);
            }
            NumberMessage::Erase(chat, reply) => {
                let id = state.wait(Waiter::Erase(reply));
                state.step(Input::Erase(chat, id), &myself);
            }
            NumberMessage::Retention(retention) => state.step(Input::Retention(retention), &myself),
            NumberMessage::Orders(orders) => state.step(Input::Orders(orders), &myself),
            NumberMessage::ChangeEndpoint(ordinal, order, reply) => {
                let id = state.wait(Waiter::ChangeEndpoint(reply));
                state.step(Input::Endpoint(ordinal, order, id), &myself);
            }
            NumberMessage::Look(reply) => {
                state.show_capacity();
                let _ = reply.send(());
            }
            NumberMessage::Ping => state.handle.answered(state.environment.clock.monotonic()),
            NumberMessage::Drain => {
                state.draining = true;
                if state.loaded.is_none() {
                    myself.stop(None);
                }
                state.step(Input::Drain, &myself);
            }
            #[cfg(feature = "sandbox")]
            #[expect(clippy::panic, reason = "the point of this message")]
            NumberMessage::Panic => panic!("ordered by a test"),
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _myself: ActorRef<NumberMessage>,
        state: &mut NumberState,
    ) -> Result<(), ActorProcessingErr> {
        state.turn = None;
        state.through = None;
        state.connection = Connection::None;
        state.tasks.abort_all();
        state.deliveries.abort_all();
        Ok(())
    }
}

async fn load(environment: &Environment, number: NumberId, volume: u8) -> Result<(NumberStore, Snapshot), StoreError> {
    let store = environment.store.claim(number, volume).await?;
    let mut snapshot = store.load().await?;
    snapshot.has_credentials = environment.opener.is_linked(&store).await;
    Ok((store, snapshot))
}

impl NumberState {
    fn reap(&mut self) -> Result<(), TaskPanicked> {
        while let Some(ended) = self.tasks.try_join_next() {
            if ended.is_err_and(|error| error.is_panic()) {
                return Err(TaskPanicked);
            }
        }
        while let Some(ended) = self.deliveries.try_join_next() {
            if ended.is_err_and(|error| error.is_panic()) {
                return Err(TaskPanicked);
            }
        }
        Ok(())
    }

    pub(super) fn wait(&mut self, waiter: Waiter) -> ReplyId {
        let id = ReplyId(self.next_reply);
        self.next_reply += 1;
        self.waiters.insert(id, waiter);
        id
    }

    /// One step of the machine, and what follows from it.
    pub(super) fn step(&mut self, input: Input, myself: &ActorRef<NumberMessage>) {
        let now = self.environment.clock.now();
        let Some(loaded) = &mut self.loaded else { return };
        let effects = loaded.number.step(input, now);
        self.perform(effects, myself);
        self.keep_place();
        self.publish(now);
        self.schedule(now, myself);
    }

    fn on_internal(&mut self, inner: Inner, myself: &ActorRef<NumberMessage>) -> Result<(), StoreError> {
        match inner {
            Inner::Loaded(loaded) => self.on_loaded(*loaded, myself)?,
            Inner::Stored(ticket, Ok(())) => self.step(Input::Stored(ticket, true), myself),
            Inner::Stored(ticket, Err(StoreError::Conflict)) => self.step(Input::Stored(ticket, false), myself),
            Inner::Stored(_, Err(error)) => return Err(error),
            Inner::Record(reply, body, record) => self.answer_from_record(reply, body, record?),
            Inner::Granted(turn) => {
                self.asked = None;
                self.granted(turn, myself);
            }
            Inner::WayClosed => self.ask_way_again(myself),
            Inner::WayOpen(proxy) => self.way_open(&proxy, myself),
            Inner::Session(connection, event, credit) => {
                if self.connection.no() == Some(connection) {
                    self.on_session(connection, event, myself);
                }
                drop(credit);
            }
            Inner::Attempted(end) => self.step(Input::Attempted(end), myself),
            Inner::PageLoaded(endpoint, rows) => self.step(Input::PageLoaded(endpoint, rows?), myself),
            Inner::ReplayLoaded(endpoint, events) => self.step(Input::ReplayLoaded(endpoint, events?), myself),
            Inner::Swept(found) => self.step(Input::Swept((*found)?), myself),
            Inner::Wake => {
                self.wake = None;
                self.step(Input::Tick, myself);
            }
        }
        Ok(())
    }

    fn on_loaded(
        &mut self,
        loaded: Result<(NumberStore, Snapshot), StoreError>,
        myself: &ActorRef<NumberMessage>,
    ) -> Result<(), StoreError> {
        let (store, mut snapshot) = loaded?;
        let now = self.environment.clock.now();
        let durable_events = EventSeq(snapshot.counters.event);
        self.handle.events_begin_after(EventSeq(snapshot.counters.event_floor));
        // Whoever sets it looks for the actor afterwards: either this sees the record, or the actor gets the message.
        self.handle.set_live(Some(Live { actor: myself.clone(), store: store.clone() }));
        let record = self.environment.store.meta().number(self.handle.id());
        snapshot.orders = record.as_ref().map(|record| record.orders).unwrap_or_default();
        let retention = record.map(|record| record.retention).unwrap_or_default();
        snapshot.rules = Rules { policy: self.environment.policy, retention };
        let (mut number, effects) = Number::restore(self.handle.id(), snapshot, self.environment.sending, now);
        number.follow_schedule(self.environment.webhook_schedule);
        self.loaded = Some(Loaded { number, store });
        self.handle.events_visible(durable_events);
        self.perform(effects, myself);
        self.publish(now);
        if self.draining {
            self.step(Input::Drain, myself);
        } else {
            self.step(Input::Tick, myself);
        }
        Ok(())
    }

    /// Why the actor ends. Those who wait for the disk hear the reason; what became of their unit the disk knows.
    fn lost(&mut self, error: StoreError) -> ActorProcessingErr {
        // What cannot be read, or is somebody else's, is no matter of the disk: that counts as a crash.
        if matches!(error, StoreError::Corrupt(_) | StoreError::Fenced | StoreError::TooLarge(_)) {
            return error.into();
        }
        let lost = StoreLost(error);
        for (_, waiter) in self.waiters.drain() {
            if let Waiter::Send(reply, _permit) = waiter {
                let _ = reply.send(Err(Unserved::from(&lost.0).into()));
            }
        }
        lost.into()
    }

    fn answer_from_record(&mut self, reply: ReplyId, body: [u8; 32], record: Option<IdempotencyRecord>) {
        let Some(Waiter::Send(answer, _permit)) = self.waiters.remove(&reply) else { return };
        let outcome = match record {
            Some(record) if record.body == body => {
                Ok(Accepted { seq: record.seq, created_at: record.created_at, predicted_wait: None })
            }
            Some(_) => Err(SendRefused::RequestIdReused),
            // It expired between the check and the look: the caller may ask again.
            None => Err(Unserved::NotReady.into()),
        };
        let _ = answer.send(outcome);
    }

    fn on_control(&mut self, control: Control, myself: &ActorRef<NumberMessage>) {
        match control {
            Control::Start => self.step(Input::Life(lifecycle::Input::Start), myself),
            Control::Stop => self.step(Input::Life(lifecycle::Input::Stop), myself),
            Control::Pair(by) => {
                // Whoever joins in gets what is shown already.
                if !self.loaded.as_ref().is_some_and(|loaded| loaded.number.life().state == lifecycle::State::Linking) {
                    self.link_by = by;
                }
                self.step(Input::Life(lifecycle::Input::Pair), myself);
            }
            Control::Reconnect => self.reconnect(myself),
            Control::Logout => {
                if let Connection::Open { commands, .. } = &self.connection {
                    let _ = commands.try_send(SessionCommand::Logout);
                }
            }
        }
    }

    fn note_usage(&mut self, usage: Usage) {
        let stats = self.handle.stats();
        stats.wire_received.add(usage.received.saturating_sub(self.usage.received));
        stats.wire_sent.add(usage.sent.saturating_sub(self.usage.sent));
        stats.set_session_memory(usage.memory);
        self.usage = usage;
    }

    fn show_pairing(&self, pairing: Pairing) {
        self.handle.change_view(|view| view.pairing = pairing);
    }

    fn show_capacity(&self) {
        let Some(Loaded { number, .. }) = &self.loaded else { return };
        self.handle.stats().set_capacity(number.basis(true, self.environment.clock.now()));
    }

    /// Takes a step of linking with a passkey, if it is the time for it; each only once.
    fn on_passkey(&mut self, step: PasskeyStep) -> Result<PasskeyVerdict, PasskeyNotTaken> {
        let (reply, verdict) = oneshot::channel();
        let (command, next, gone) = match (step, self.handle.view().pairing) {
            (PasskeyStep::Answer(assertion), Pairing::PasskeyRequest { .. }) => {
                let command = SessionCommand::AnswerPasskey(Box::new(assertion), reply);
                (command, Pairing::PasskeyAnswered, PasskeyNotTaken::NotRequested)
            }
            (PasskeyStep::Confirm(seen), Pairing::PasskeyCode { code, .. }) => {
                if !is_same_code(&seen, &code) {
                    return Err(PasskeyNotTaken::OtherCode);
                }
                (SessionCommand::ConfirmPasskey(reply), Pairing::PasskeyConfirmed, PasskeyNotTaken::NoCode)
            }
            (PasskeyStep::Answer(_), _) => return Err(PasskeyNotTaken::NotRequested),
            (PasskeyStep::Confirm(_), _) => return Err(PasskeyNotTaken::NoCode),
        };
        let Connection::Open { commands, .. } = &self.connection else { return Err(gone) };
        commands.try_send(command).map_err(|_| gone)?;
        self.show_pairing(next);
        Ok(verdict)
    }

    fn on_session(&mut self, no: ConnectionNo, event: FromSession, myself: &ActorRef<NumberMessage>) {
        let now = self.environment.clock.now();
        // What a session says of itself is no sign that anything came or went.
        if !matches!(event, FromSession::Opened(_) | FromSession::Usage(_) | FromSession::Closed(_)) {
            self.handle.stats().touch(now);
        }
        match event {
            FromSession::Opened(commands) => {
                let close = matches!(self.connection, Connection::Opening { close_wanted: true, .. });
                self.connection = Connection::Open { no, commands };
                self.usage = Usage::default();
                if close {
                    self.close_connection(myself);
                }
            }
            FromSession::QrCode { code, valid_for } => {
                self.show_pairing(Pairing::QrCode { code, expires_at: now.after(valid_for) });
            }
            FromSession::PairingCode { code, valid_for } => {
                self.show_pairing(Pairing::Code { code, expires_at: now.after(valid_for) });
            }
            FromSession::PasskeyRequest { options, valid_for } => {
                self.show_pairing(Pairing::PasskeyRequest { options, expires_at: now.after(valid_for) });
            }
            FromSession::PasskeyCode { code, valid_for } => {
                self.show_pairing(Pairing::PasskeyCode { code, expires_at: now.after(valid_for) });
            }
            FromSession::Paired => {
                self.show_pairing(Pairing::Paired);
                self.step(Input::Life(lifecycle::Input::Paired), myself);
            }
            FromSession::Online => {
                self.attempt_ended(Outcome::Online, Way::Works);
                self.step(Input::Life(lifecycle::Input::Online), myself);
            }
            FromSession::Troubled(trouble) => self.step(Input::Life(lifecycle::Input::Troubled(trouble)), myself),
            FromSession::Relieved(trouble) => self.step(Input::Life(lifecycle::Input::Relieved(trouble)), myself),
            FromSession::ServerTime(at) => self.environment.clock.server_says(at),
            FromSession::Usage(usage) => self.note_usage(usage),
            FromSession::Alive => self.step(Input::Life(lifecycle::Input::Alive), myself),
            FromSession::Written => {}
            FromSession::NotWritten { seq, error } => {
                self.step(Input::NotWritten { seq, retry: retry_of(error) }, myself);
            }
            FromSession::Acked { whatsapp_id, error } => {
                failpoint::reach(Failpoint::AckReceived);
                self.step(Input::Acked { whatsapp_id, error }, myself);
            }
            FromSession::Receipts { messages, status, at, durable } => {
                let reply = self.wait(Waiter::Inbound(durable));
                self.step(Input::Receipts { messages, status, at, reply }, myself);
            }
            FromSession::Lock(answer) => self.step(Input::Lock(answer), myself),
            FromSession::Arrived { messages, durable } => {
                let id = self.wait(Waiter::Inbound(durable));
                self.step(Input::Arrived(messages, id), myself);
            }
            FromSession::Closed(reason) => {
                metrics::connection_closed(reason.code());
                if reason != CloseReason::Requested {
                    self.handle.stats().reconnects.add(1);
                }
                self.attempt_ended(Outcome::of(&reason), Way::of(&reason));
                self.connection = Connection::None;
                self.handle.stats().set_session_memory(SessionMemory::default());
                let backoff = self.backoff.next_delay(&self.environment.random);
                self.step(Input::Life(lifecycle::Input::Closed { reason, backoff }), myself);
            }
        }
    }

    /// The gate hears how an attempt ended. What ends a connection that was online is no matter of the gate's, except
    /// that WhatsApp refuses our version.
    fn attempt_ended(&mut self, outcome: Outcome, way: Way) {
        if let Some(passage) = self.through.take() {
            passage.end(way);
        }
        if self.turn.is_none() && outcome != Outcome::Outdated {
            return;
        }
        self.environment.gate.report(self.handle.id(), outcome);
        self.last_attempt = Some(outcome);
        self.turn = None;
    }

    /// The proxy it connects through, as it is set at this moment.
    pub(super) fn proxy(&self) -> Option<Proxy> {
        self.environment.store.meta().number(self.handle.id())?.proxy.clone()
    }

    /// Whether its proxy, if it has one, may be tried. If not, it hears when it may.
    pub(super) fn may_use_way(&mut self, myself: &ActorRef<NumberMessage>) -> bool {
        let proxy = self.proxy();
        if let Some(proxy) = &proxy {
            let actor = myself.clone();
            let wake = Box::new(move |proxy: &ProxyAddress| actor.cast(Inner::WayOpen(proxy.clone()).into()).is_ok());
            if !self.environment.ways.enter(proxy.address(), self.handle.id(), wake) {
                self.through = None;
                return false;
            }
        }
        self.go_through(proxy.as_ref());
        true
    }

    /// From now on it uses this proxy, or none.
    pub(super) fn go_through(&mut self, proxy: Option<&Proxy>) {
        let address = proxy.map(Proxy::address);
        if self.through.as_ref().map(Passage::proxy) != address {
            let (ways, number) = (&self.environment.ways, self.handle.id());
            self.through = address.map(|address| Passage::new(ways.clone(), number, address.clone()));
        }
    }

    /// Its turn at the gate has come; its proxy may have gone down while it waited.
    fn granted(&mut self, turn: GateTurn, myself: &ActorRef<NumberMessage>) {
        let logs_in = self.loaded.as_ref().is_some_and(|loaded| loaded.number.purpose() == Purpose::Connect);
        if logs_in && !self.may_use_way(myself) {
            drop(turn);
            self.way_closed(myself);
            return;
        }
        self.turn = Some(turn);
        self.step(Input::Life(lifecycle::Input::Granted), myself);
    }

    /// Its proxy was down when it wanted a turn. It may work by now: then the word of that has been missed.
    fn ask_way_again(&mut self, myself: &ActorRef<NumberMessage>) {
        let state = self.loaded.as_ref().map(|loaded| loaded.number.life().state);
        if state != Some(lifecycle::State::AwaitingGate) {
            return;
        }
        if self.may_use_way(myself) {
            self.ask_gate(myself);
        } else {
            self.way_closed(myself);
        }
    }

    fn way_closed(&mut self, myself: &ActorRef<NumberMessage>) {
        let until = self.environment.clock.now().after(WAY_LOOK);
        self.step(Input::Life(lifecycle::Input::WayClosed { until }), myself);
    }

    /// It is to try a proxy. If it does not want to, or goes another way now, somebody else is to.
    fn way_open(&mut self, proxy: &ProxyAddress, myself: &ActorRef<NumberMessage>) {
        self.step(Input::Life(lifecycle::Input::WayOpen), myself);
        let state = self.loaded.as_ref().map(|loaded| loaded.number.life().state);
        let is_own = self.proxy().is_some_and(|own| own.address() == proxy);
        if !is_own || state != Some(lifecycle::State::AwaitingGate) {
            self.environment.ways.ended(proxy, self.handle.id(), Way::Unknown);
        }
    }

    /// Connects anew; a number that is to stay down does.
    fn reconnect(&mut self, myself: &ActorRef<NumberMessage>) {
        let Some(Loaded { number, .. }) = &self.loaded else { return };
        if number.life().desired == lifecycle::Desired::Stopped || !number.life().linked {
            return;
        }
        match &self.connection {
            Connection::None => self.step(Input::Life(lifecycle::Input::WayOpen), myself),
            Connection::Opening { .. } | Connection::Open { .. } => self.close_connection(myself),
        }
    }

    /// What came to be sent while it waits at the gate lets it go before those that have nothing.
    fn keep_place(&mut self) {
        let sends = self.loaded.as_ref().is_some_and(|loaded| !loaded.number.outbox().is_empty());
        if self.asked == Some(Priority::Normal) && sends {
            self.asked = Some(Priority::Waiting);
            self.environment.gate.promote(self.handle.id());
        }
    }

    /// Shows the machine's figures to everybody who reads without asking.
    fn publish(&self, now: Timestamp) {
        let Some(Loaded { number, .. }) = &self.loaded else { return };
        let stats = self.handle.stats();
        stats.outbox.set(number.outbox().len() as u64, number.outbox().oldest());
        stats.webhooks.set(number.deliveries().depth(), number.deliveries().oldest());
        self.handle.show_backlogs(number.deliveries().backlogs());
        stats.set_taken(number.memory(), number.disk_rows());
        stats.set_capacity(number.basis(self.handle.is_capacity_watched(), now));
        let life = number.life();
        stats.set_state(life.state.code(), life.state.is_connected());
        stats.set_attention(life.attention());
        stats.set_desired_up(life.desired == lifecycle::Desired::Running && life.linked);
        let new_chats = number.new_chats();
        let held = match new_chats {
            NewChats::Held { until, .. } => Some(until),
            NewChats::Allowed | NewChats::Probing => None,
        };
        stats.set_new_chats_held_until(held);
        if self.handle.shows(life, new_chats) {
            return;
        }
        self.handle.change_view(|view| {
            if view.state == lifecycle::State::Linking && life.state != lifecycle::State::Linking {
                view.pairing = if life.linked { Pairing::Idle } else { Pairing::Failed };
            } else if life.state == lifecycle::State::Linking && view.state != lifecycle::State::Linking {
                view.pairing = Pairing::Starting;
            }
            view.state = life.state;
            view.next_attempt = life.state.next_attempt();
            view.since = life.since;
            view.reason.clone_from(&life.reason);
            view.desired = life.desired;
            view.linked = life.linked;
            view.new_chats = new_chats;
            view.last_error.clone_from(&life.last_error);
            view.attention = life.attention();
        });
    }

    /// Keeps one timer for the earliest thing that becomes due. A timer that is too early only costs a step. What is due
    /// is a time of the wall clock and timers follow another, so a far one is looked at again on the way.
    fn schedule(&mut self, now: Timestamp, myself: &ActorRef<NumberMessage>) {
        let Some(due) = self.loaded.as_ref().and_then(|loaded| loaded.number.next_wake()) else { return };
        if let Some((set, timer)) = &self.wake {
            // A timer that is this late runs by a clock that was set forward meanwhile.
            if *set <= due && now.since(due) < WAKE_LATE {
                return;
            }
            timer.abort();
        }
        let actor = myself.clone();
        let pause = due.since(now).clamp(Duration::from_millis(1), WAKE_WITHIN);
        let timer = self.tasks.spawn(async move {
            tokio::time::sleep(pause).await;
            let _ = actor.cast(Inner::Wake.into());
        });
        self.wake = Some((due, timer));
    }

    pub(super) fn perform(&mut self, effects: Vec<Effect>, myself: &ActorRef<NumberMessage>) {
        for effect in effects {
            self.perform_one(effect, myself);
        }
    }
}

fn retry_of(error: SendError) -> Retry {
    match error {
        SendError::Offline | SendError::StoreFailed => Retry::WhenOnline,
        SendError::TimedOut => Retry::Unknown,
        SendError::NoSuchRecipient => Retry::Never(FailureCode::WhatsappNotExist),
        SendError::Invalid => Retry::Never(FailureCode::RejectedByWhatsapp),
        SendError::Other => Retry::Later,
    }
}
