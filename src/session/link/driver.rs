//! One session from its opening to `Closed`. Every connection is one `run()` of the library, which is never
//! aborted while it may still write: it is asked to disconnect, then shut down, then its socket is taken away.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::Instrument;
use whatsapp_rust::pair_code::PairCodeOptions;
use whatsapp_rust::types::events::{InboundMessage, Subscription};
use whatsapp_rust::wacore::iq::keepalive::KeepaliveSpec;
use whatsapp_rust::{Client, RawNodeLease, RetryRequestOptions};

use super::backend::{LinkBackend, forget_device, is_linked};
use super::client::{self, Parts};
use super::environment::LinkEnvironment;
use super::events::subscribe;
use super::inbound::Inbox;
use super::lock;
use super::passkey;
use super::proxy::ProxyFault;
use super::pump::pump;
use super::repeats::{Asked, FIRST_PATIENCE, answer_all, answer_overdue};
use super::runtime::LinkRuntime;
use super::send::{Outbound, Wire};
use super::session::{LinkParams, Purpose};
use super::signals::{QUEUE_MAX, RECOVERED_MAX, Signals};
use super::stanza::Certainty;
use super::transport::{Reached, SocketSlot};
use super::usage;
use crate::domain::close::CloseReason;
use crate::domain::lifecycle::LinkBy;
use crate::domain::trouble::Trouble;
use crate::session::contract::{SendError, SessionCommand, SessionEvent};
use crate::store::number_store::NumberStore;
use crate::store::unit::Unit;
use crate::telemetry::failpoint::{self, Failpoint};

/// From opening to `Online` on a known device: 20 s each for socket and handshake, 90 s to drain.
const CONNECT_WITHIN: Duration = Duration::from_secs(130);
/// From opening to the scan: WhatsApp hands out codes for 160 s, the phone then takes its time.
const SCAN_WITHIN: Duration = Duration::from_secs(300);
/// From the scan to `Online`: the library gives the first app-state sync 180 s.
const FIRST_LOGIN_WITHIN: Duration = Duration::from_secs(240);
/// How long a pairing code works at WhatsApp.
const CODE_VALID_FOR: Duration = Duration::from_secs(180);
/// How often a session looks at its deadlines.
const TICK: Duration = Duration::from_secs(15);
/// Without an answer for so long we ask ourselves. The library asks after 15 to 30 s, but only when nothing at
/// all arrives, and never while a question of its own is open.
const ASK_AFTER: Duration = Duration::from_secs(40);
/// When nothing at all arrives we ask sooner: the library has asked by then and got no answer yet.
const ASK_QUIET_AFTER: Duration = Duration::from_secs(31);
/// When nothing at all arrives for so long the link is dead.
const DEAD_AFTER: Duration = Duration::from_secs(44);
/// How long WhatsApp may be without our keys.
const PREKEYS_WITHIN: Duration = Duration::from_secs(30);
/// Without an answer for so long the connection is dead, whatever bytes arrive. With the tick below 90 s.
const UNRESPONSIVE_AFTER: Duration = Duration::from_secs(75);
/// Questions of ours that are open at once.
const QUESTIONS_MAX: usize = 2;
/// Pause between two requests for lost messages.
const LOST_EVERY: Duration = Duration::from_millis(250);
/// Longest wait for the answer to our own question.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// Longest polite disconnect; the library flushes for up to 10 s inside.
const DISCONNECT_WITHIN: Duration = Duration::from_secs(15);
/// Longest unlinking: one question to the server and a disconnect.
const LOGOUT_WITHIN: Duration = Duration::from_secs(20);
/// How long `run()` may take to return once its client is shut down and its socket is closed.
const RUN_ENDS_WITHIN: Duration = Duration::from_secs(5);
/// How long tasks of the library may take to notice the end before they are aborted. One that holds a message whose
/// ratchet is saved and whose copy is not would cost a repeat by its sender.
const TASKS_END_WITHIN: Duration = Duration::from_secs(2);
/// How long sends in flight may take at the end.
const SENDS_END_WITHIN: Duration = Duration::from_secs(2);
/// How long the writes of the session may take to be applied at its end.
const WRITES_END_WITHIN: Duration = Duration::from_secs(10);
/// How long after the end of the first connection the library may still tell that it was paired.
const PAIRED_WITHIN: Duration = Duration::from_secs(5);
/// Connections of one pairing: the one with the code, and a few attempts at the first login.
const PAIRING_RUNS_MAX: u32 = 4;
/// Recovered messages made durable at once.
const RECOVERIES_MAX: usize = 4;

/// Owns everything a session started; on an abort of the session this is what ends the library's tasks.
struct CloseOnDrop(Arc<LinkRuntime>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Runs one session. Boxed, so that nobody else generates the library's state machines again.
pub(super) fn drive(
    environment: Arc<LinkEnvironment>,
    params: LinkParams,
    commands: mpsc::Receiver<SessionCommand>,
) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    let span = params.span.clone();
    Box::pin(session(environment, params, commands).instrument(span))
}

async fn session(environment: Arc<LinkEnvironment>, params: LinkParams, commands: mpsc::Receiver<SessionCommand>) {
    let LinkParams { store, purpose, proxy, slot, events, span } = params;
    let (queue, entries) = mpsc::channel(QUEUE_MAX);
    let (recovered, recoveries) = mpsc::channel(RECOVERED_MAX);
    let (expected, by) = match &purpose {
        Purpose::Pair { expected, by } => (Some(expected.clone()), *by),
        Purpose::Connect => (None, LinkBy::default()),
    };
    let signals = Signals::new(expected, by, queue, recovered);
    let (finish, last) = oneshot::channel();
    let mut pumping = JoinSet::new();
    pumping.spawn(pump(signals.clone(), entries, events, last).instrument(span.clone()));

    let failed = signals.clone();
    let lost = signals.clone();
    let backend = LinkBackend::new(
        store.clone(),
        Box::new(move || failed.end(CloseReason::StoreFailed)),
        Box::new(move |id| lost.lose(id)),
    );
    signals.attach_backend(&backend);
    let panicked = signals.clone();
    let parts = Parts {
        environment: environment.clone(),
        backend,
        runtime: LinkRuntime::new(span.clone(), Arc::new(move || panicked.end(CloseReason::Crashed))),
        slot: SocketSlot::new(slot),
        proxy,
        signals,
    };
    let runtime = CloseOnDrop(parts.runtime.clone());
    let living = live(&parts, store, purpose, commands, recoveries, span);
    let reason = AssertUnwindSafe(living).catch_unwind().await.unwrap_or(CloseReason::Crashed);
    drop(runtime);
    parts.slot.close().await;
    parts.slot.release().await;
    if reason == CloseReason::ClientOutdated {
        environment.versions().distrust();
    }
    tracing::info!(reason = reason.code(), dropped = parts.signals.dropped(), "session closed");
    let _ = finish.send(reason);
    while pumping.join_next().await.is_some() {}
}

async fn live(
    parts: &Parts,
    store: NumberStore,
    purpose: Purpose,
    commands: mpsc::Receiver<SessionCommand>,
    recovered: mpsc::Receiver<Box<InboundMessage>>,
    span: tracing::Span,
) -> CloseReason {
    let is_pairing = matches!(purpose, Purpose::Pair { .. });
    match (is_pairing, is_linked(&store).await) {
        (true, true) => {
            return CloseReason::PairingRefused { code: "ALREADY_LINKED".to_owned() };
        }
        // Nothing to log in with: only its owner can help, as after a logout.
        (false, false) => return CloseReason::LoggedOut { code: 401 },
        // A new identity must not inherit the Signal state of an old one.
        (true, false) if forget_device(&store).await.is_err() => return CloseReason::StoreFailed,
        _ => {}
    }
    let Some(version) = parts.environment.versions().current().await else {
        return CloseReason::Unreachable;
    };
    let Ok(left) = parts.backend.asked().await else {
        return CloseReason::StoreFailed;
    };
    parts.signals.expect_confirmation(&left);
    let Ok(persistence) = client::load(parts).await else {
        return CloseReason::StoreFailed;
    };
    // Boxed, as every step that is long and rare: a task keeps room for its largest one as long as it lives.
    let Ok(client) = Box::pin(client::build(parts, persistence, version)).await else {
        return CloseReason::StoreFailed;
    };
    let wire = Wire { client: client.clone(), backend: parts.backend.clone(), store: store.clone() };
    let mut connection = Connection {
        parts,
        store,
        is_pairing,
        subscription: subscribe(&client, parts.signals.clone(), parts.environment.clock().clone()),
        raw_nodes: client.acquire_raw_node_forwarding(),
        outbound: Outbound::new(parts.signals.clone(), wire, span.clone()),
        inbox: Inbox::new(parts.signals.clone()),
        commands,
        recovered,
        stop: parts.environment.stop_signal(),
        running: JoinSet::new(),
        delivering: JoinSet::new(),
        asking: JoinSet::new(),
        left,
        answering: JoinSet::new(),
        recovering: JoinSet::new(),
        settled: false,
        runs: 0,
        announced: false,
        online_by: Some(Instant::now() + if is_pairing { SCAN_WITHIN } else { CONNECT_WITHIN }),
        tick_at: Instant::now() + TICK,
        prekeys_missing: None,
        tell_usage_at: Instant::now() + usage::TELL_EVERY,
        span,
        client,
    };
    connection.start_run();
    let reason = connection.supervise().await;
    Box::pin(connection.tear_down(reason)).await
}

/// What the driver reacts to.
enum Turn {
    Woken,
    Command(Option<SessionCommand>),
    Stopped,
    Sent,
    Recovered(Box<InboundMessage>),
    Delivered,
    RunEnded { panicked: bool },
    Tick,
}

struct Connection<'a> {
    parts: &'a Parts,
    store: NumberStore,
    is_pairing: bool,
    client: Arc<Client>,
    subscription: Subscription,
    raw_nodes: RawNodeLease,
    outbound: Outbound,
    inbox: Arc<Inbox>,
    commands: mpsc::Receiver<SessionCommand>,
    recovered: mpsc::Receiver<Box<InboundMessage>>,
    stop: watch::Receiver<bool>,
    running: JoinSet<()>,
    delivering: JoinSet<()>,
    asking: JoinSet<()>,
    /// Requests for repeats that earlier connections left open, until this one is online.
    left: Vec<Asked>,
    answering: JoinSet<()>,
    recovering: JoinSet<()>,
    settled: bool,
    runs: u32,
    announced: bool,
    online_by: Option<Instant>,
    tick_at: Instant,
    prekeys_missing: Option<Instant>,
    tell_usage_at: Instant,
    span: tracing::Span,
}

impl Connection<'_> {
    fn signals(&self) -> &Arc<Signals> {
        &self.parts.signals
    }

    fn start_run(&mut self) {
        self.runs += 1;
        // The library switches this on and off by itself; one run is one connection only while it is off.
        self.client.enable_auto_reconnect.store(false, Ordering::Relaxed);
        let client = self.client.clone();
        let run = async move { client.run().await };
        self.running.spawn(Box::pin(run).instrument(self.span.clone()));
    }

    async fn next_turn(&mut self) -> Turn {
        tokio::select! {
            biased;
            () = self.parts.signals.woken() => Turn::Woken,
            _ = self.stop.wait_for(|stopped| *stopped) => Turn::Stopped,
            Some(ended) = self.running.join_next() => Turn::RunEnded { panicked: ended.is_err() },
            command = self.commands.recv() => Turn::Command(command),
            () = self.outbound.progress() => Turn::Sent,
            Some(_) = self.delivering.join_next() => Turn::Delivered,
            Some(message) = self.recovered.recv(), if self.delivering.len() < RECOVERIES_MAX => Turn::Recovered(message),
            () = sleep_until(self.tick_at) => Turn::Tick,
        }
    }

    async fn supervise(&mut self) -> CloseReason {
        loop {
            let turn = self.next_turn().await;
            let reason = match turn {
                Turn::Woken => Box::pin(self.look()).await,
                Turn::Stopped => Some(CloseReason::Requested),
                Turn::Command(command) => self.obey(command).await,
                Turn::RunEnded { panicked: true } => Some(CloseReason::Crashed),
                Turn::RunEnded { panicked: false } => Box::pin(self.after_run()).await,
                Turn::Sent | Turn::Delivered => None,
                Turn::Recovered(message) => {
                    let inbox = self.inbox.clone();
                    let deliver = async move { inbox.deliver_recovered(*message).await };
                    self.delivering.spawn(deliver.instrument(self.span.clone()));
                    None
                }
                Turn::Tick => self.check(),
            };
            if let Some(reason) = reason {
                return reason;
            }
        }
    }

    async fn look(&mut self) -> Option<CloseReason> {
        if let Some(reason) = self.signals().ending(Certainty::EndNow) {
            return Some(reason);
        }
        if self.signals().is_online() {
            if self.online_by.take().is_some() {
                self.tell_usage();
            }
            if !self.left.is_empty() {
                let answer = answer_all(self.outbound.wire(), self.signals().clone(), std::mem::take(&mut self.left));
                self.answering.spawn(Box::pin(answer).instrument(self.span.clone()));
            }
        }
        if self.signals().takes_code() {
            self.ask_for_code();
        }
        self.wait_for_passkey();
        if self.signals().is_unproved() {
            self.ask();
        }
        self.ask_for_lost();
        self.announce().await
    }

    /// While a passkey is asked for, that decides how long a linking may take.
    fn wait_for_passkey(&mut self) {
        if !self.announced
            && let Some(until) = self.signals().passkey_until()
        {
            self.online_by = Some(until);
        }
        if let Some(rotation) = self.signals().takes_rotation() {
            self.parts.runtime.halt(rotation);
        }
    }

    /// Asks WhatsApp for a code to be typed into the phone.
    fn ask_for_code(&mut self) {
        let Some(phone) = self.signals().expected.clone() else { return };
        let (client, signals) = (self.client.clone(), self.signals().clone());
        let ask = async move {
            let wanted = PairCodeOptions { phone_number: phone.digits().to_owned(), ..PairCodeOptions::default() };
            match timeout(ANSWER_WITHIN, Box::pin(client.pair_with_code(wanted))).await {
                Ok(Ok(code)) => signals.tell(SessionEvent::PairingCode { code, valid_for: CODE_VALID_FOR }),
                Ok(Err(_)) | Err(_) => {
                    signals.end(CloseReason::PairingRefused { code: "PAIRING_CODE_REFUSED".to_owned() });
                }
            }
        };
        self.asking.spawn(Box::pin(ask).instrument(self.span.clone()));
    }

    /// Asks the senders of messages that a crash has lost. They stay unacknowledged, so what is not asked now is asked
    /// on the next connection.
    fn ask_for_lost(&mut self) {
        while self.recovering.try_join_next().is_some() {}
        if self.recovering.is_empty() && self.signals().backlog.has_lost() {
            let ask = ask_for_lost(self.client.clone(), self.signals().clone());
            self.recovering.spawn(Box::pin(ask).instrument(self.span.clone()));
        }
    }

    /// Tells that the phone accepted us, once the credentials are on disk.
    async fn announce(&mut self) -> Option<CloseReason> {
        let paired = self.signals().paired()?;
        if self.announced {
            return None;
        }
        if self.client.persistence_manager().flush().await.is_err() {
            return Some(CloseReason::StoreFailed);
        }
        self.announced = true;
        if !self.signals().is_online() {
            self.online_by = Some(Instant::now() + FIRST_LOGIN_WITHIN);
        }
        failpoint::reach(Failpoint::PairedBeforeTold);
        let event = SessionEvent::Paired { phone: paired.phone, lid: paired.lid };
        self.signals().deliver(event).await;
        None
    }

    async fn obey(&mut self, command: Option<SessionCommand>) -> Option<CloseReason> {
        match command {
            Some(SessionCommand::Send(message)) => {
                self.outbound.take(*message);
                None
            }
            Some(SessionCommand::AskLock) => {
                if self.asking.len() < QUESTIONS_MAX {
                    let asking = lock::ask(self.client.clone(), self.signals().clone());
                    self.asking.spawn(asking.instrument(self.span.clone()));
                }
                None
            }
            Some(SessionCommand::AnswerPasskey(assertion, reply)) => {
                let answer = passkey::answer(self.client.clone(), self.signals().clone(), *assertion, reply);
                self.asking.spawn(Box::pin(answer).instrument(self.span.clone()));
                None
            }
            Some(SessionCommand::ConfirmPasskey(reply)) => {
                let confirm = passkey::confirm(self.client.clone(), self.signals().clone(), reply);
                self.asking.spawn(Box::pin(confirm).instrument(self.span.clone()));
                None
            }
            Some(SessionCommand::Logout) => {
                let _ = timeout(LOGOUT_WITHIN, Box::pin(self.client.logout())).await;
                Some(CloseReason::LoggedOut { code: 401 })
            }
            Some(SessionCommand::Close) | None => Some(CloseReason::Requested),
        }
    }

    /// A connection ended. After a scan the server asks for a new one: that is still the same session.
    async fn after_run(&mut self) -> Option<CloseReason> {
        if self.signals().ending(Certainty::EndNow).is_none()
            && self.is_pairing
            && !self.signals().is_online()
            && self.runs < PAIRING_RUNS_MAX
        {
            // The library may tell of the pairing only after the connection it happened on.
            if self.signals().is_answering_pairing() {
                let told = async {
                    while self.parts.signals.paired().is_none() {
                        self.parts.signals.woken().await;
                    }
                };
                let _ = timeout(PAIRED_WITHIN, told).await;
            }
            if let Some(reason) = self.announce().await {
                return Some(reason);
            }
            if self.announced && self.was_routine() {
                self.signals().next_connection();
                self.start_run();
                return None;
            }
        }
        Some(self.reason_after_run())
    }

    /// Whether the connection ended the way it does after a scan.
    fn was_routine(&self) -> bool {
        matches!(
            self.signals().ending(Certainty::Maybe),
            None | Some(CloseReason::Recycled | CloseReason::ConnectionLost)
        )
    }

    fn reason_after_run(&self) -> CloseReason {
        if let Some(reason) = self.signals().ending(Certainty::Maybe) {
            return reason;
        }
        if self.signals().has_heard() {
            // The library gave up on a socket without traffic.
            return CloseReason::ConnectionLost;
        }
        match self.parts.slot.reached() {
            Reached::Nothing => CloseReason::Unreachable,
            Reached::Proxy(ProxyFault::Unreachable) => CloseReason::ProxyUnreachable,
            Reached::Proxy(ProxyFault::Refused) => CloseReason::ProxyRefused,
            Reached::Proxy(ProxyFault::LoginRefused) => CloseReason::ProxyLoginRefused,
            Reached::Status(status) => CloseReason::UpgradeRefused { status },
            Reached::Dropped => CloseReason::ConnectionLost,
            Reached::Silence => CloseReason::HandshakeSilent,
            Reached::Refusal => CloseReason::HandshakeRefused,
        }
    }

    /// The next look at the deadlines: a little different for everybody, or ten thousand sessions look at the same
    /// moment; and not later than when silence means something.
    fn next_tick(&self, now: Instant) -> Instant {
        let usual = TICK.mul_f64(rand::random_range(0.9..1.0));
        let Some(quiet) = self.signals().quiet() else { return now + usual };
        let due = [ASK_QUIET_AFTER, DEAD_AFTER].into_iter().find(|limit| *limit > quiet);
        now + due.map_or(usual, |limit| usual.min(limit - quiet))
    }

    /// Asks the server anything: the answer is noticed where every answer is.
    fn ask(&mut self) {
        while self.asking.try_join_next().is_some() {}
        if self.asking.len() >= QUESTIONS_MAX {
            return;
        }
        let client = self.client.clone();
        let ask = async move {
            let _ = client.execute(KeepaliveSpec::with_timeout(ANSWER_WITHIN)).await;
        };
        self.asking.spawn(Box::pin(ask).instrument(self.span.clone()));
    }

    /// Whether our keys have reached WhatsApp, without which nobody can write to us for the first time.
    fn check_prekeys(&mut self, now: Instant) {
        if self.client.persistence_manager().get_device_snapshot().server_has_prekeys {
            self.prekeys_missing = None;
            self.signals().relieve(Trouble::PrekeysMissing);
        } else if now.duration_since(*self.prekeys_missing.get_or_insert(now)) >= PREKEYS_WITHIN {
            self.signals().trouble(Trouble::PrekeysMissing);
        }
    }

    fn check(&mut self) -> Option<CloseReason> {
        let now = Instant::now();
        self.tick_at = self.next_tick(now);
        if self.online_by.is_some_and(|by| now >= by) {
            let unscanned = self.is_pairing && !self.announced;
            return Some(match (unscanned, self.signals().passkey_until()) {
                (true, Some(_)) => passkey::too_late(),
                (true, None) => CloseReason::PairingEnded,
                (false, _) => CloseReason::Unresponsive,
            });
        }
        let quiet = self.signals().quiet();
        // While a code is shown, or the phone is slow with the first keys, nothing has to arrive.
        let waits_for_phone = self.is_pairing && !self.signals().is_online();
        if !waits_for_phone && quiet.is_some_and(|quiet| quiet >= DEAD_AFTER) {
            return Some(CloseReason::ConnectionLost);
        }
        if !self.signals().is_online() {
            if self.signals().is_unproved() {
                self.ask();
            }
            return None;
        }
        self.settle();
        self.ask_for_lost();
        while self.answering.try_join_next().is_some() {}
        if self.answering.is_empty() && self.signals().has_unanswered(FIRST_PATIENCE) {
            let answer = answer_overdue(self.outbound.wire(), self.signals().clone());
            self.answering.spawn(Box::pin(answer).instrument(self.span.clone()));
        }
        self.check_prekeys(now);
        if now >= self.tell_usage_at {
            self.tell_usage();
        }
        let silence = self.signals().silence()?;
        if silence >= UNRESPONSIVE_AFTER {
            return Some(CloseReason::Unresponsive);
        }
        if silence >= ASK_AFTER || quiet.is_some_and(|quiet| quiet >= ASK_QUIET_AFTER) {
            self.ask();
        }
        None
    }

    fn tell_usage(&mut self) {
        self.tell_usage_at = Instant::now() + usage::TELL_EVERY;
        let tell = usage::tell(self.client.clone(), self.signals().clone());
        self.answering.spawn(Box::pin(tell).instrument(self.span.clone()));
    }

    /// Everything that had waited for this connection has arrived.
    fn settle(&mut self) {
        self.signals().backlog.forget_waited();
        if self.settled {
            return;
        }
        self.settled = true;
        let backend = self.parts.backend.clone();
        let sweep = async move {
            // A failed write has ended the session.
            let _ = backend.drained().await;
        };
        self.answering.spawn(sweep.instrument(self.span.clone()));
    }

    async fn tear_down(self, reason: CloseReason) -> CloseReason {
        let Connection {
            parts,
            store,
            client,
            subscription,
            raw_nodes,
            outbound,
            mut commands,
            mut running,
            mut answering,
            ..
        } = self;
        // What is not answered yet is on disk for the next connection.
        answering.shutdown().await;
        let signals = &parts.signals;
        refuse_waiting(&mut commands, signals);
        let is_abrupt = store.is_poisoned()
            || matches!(reason, CloseReason::StoreFailed | CloseReason::Crashed | CloseReason::PairingRefused { .. });
        if is_abrupt {
            // What the client still holds was not made durable, so neither the disk nor WhatsApp may see it.
            signals.seal();
            parts.backend.seal();
            client.signal_shutdown_sync();
            parts.slot.close().await;
            outbound.close(Duration::ZERO).await;
        } else {
            outbound.close(SENDS_END_WITHIN).await;
            if timeout(DISCONNECT_WITHIN, Box::pin(client.disconnect())).await.is_err() {
                tracing::warn!("disconnect took too long");
                client.signal_shutdown_sync();
                parts.slot.close().await;
            }
        }
        let ended = async { while running.join_next().await.is_some() {} };
        if timeout(RUN_ENDS_WITHIN, ended).await.is_err() {
            tracing::warn!("the client does not end, it is abandoned");
            signals.seal();
            parts.backend.seal();
            parts.slot.close().await;
        }
        usage::tell_last(&client, signals);
        drop((subscription, raw_nodes, client, running));
        parts.runtime.idle(TASKS_END_WITHIN).await;
        parts.backend.seal();
        parts.runtime.close();
        // A write of an aborted task may still be queued. The next session reads the same rows and must find it there.
        let _ = timeout(WRITES_END_WITHIN, store.commit(Unit::rides_along())).await;
        if matches!(reason, CloseReason::PairingRefused { .. }) && forget_device(&store).await.is_err() {
            return CloseReason::StoreFailed;
        }
        if store.is_poisoned() && !is_final(&reason) {
            return CloseReason::StoreFailed;
        }
        reason
    }
}

/// One after the other, and not fast: each request makes the sender begin a new Signal session, and it keeps no more
/// than forty older ones to open what was sealed for them.
async fn ask_for_lost(client: Arc<Client>, signals: Arc<Signals>) {
    while let Some(stanza) = signals.backlog.next_lost() {
        let stanza = stanza.as_node_ref();
        let asked = client.request_message_retry(&stanza, RetryRequestOptions::new());
        let asked = matches!(timeout(ANSWER_WITHIN, Box::pin(asked)).await, Ok(Ok(_)));
        tracing::warn!(asked, "a crash has lost a message, its sender is asked again");
        sleep(LOST_EVERY).await;
    }
}

/// Answers the sends that nobody looked at: these certainly did not reach the wire.
fn refuse_waiting(commands: &mut mpsc::Receiver<SessionCommand>, signals: &Signals) {
    commands.close();
    while let Ok(command) = commands.try_recv() {
        if let SessionCommand::Send(message) = command {
            signals.tell(SessionEvent::NotWritten { seq: message.seq, error: SendError::Offline });
        }
    }
}

/// Reasons that stay true whatever happened to our own store.
fn is_final(reason: &CloseReason) -> bool {
    matches!(reason, CloseReason::LoggedOut { .. } | CloseReason::Locked | CloseReason::Banned | CloseReason::Replaced)
}
