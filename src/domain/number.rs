//! The whole number as a pure machine: what it knows, what can happen to it, what must be done. The actor around
//! it only performs. Whatever must wait for the disk waits for [`Input::Stored`]; nothing is answered before.

use std::collections::VecDeque;
use std::time::Duration;

use super::ack;
use super::change::{AttemptRecord, Change, Counters, IdempotencyKey, IdempotencyRecord, SeenKey};
use super::close::CloseReason;
use super::delivery::{Attempted, Deliveries, DeliveryRow, Endpoint, LoadPage};
use super::event::{Event, EventBody, OutboundEvent, ReceivedEvent};
use super::id::{ChatNo, EventId, EventSeq, MessageId, MessageSeq, NumberId};
use super::lifecycle::{self, Desired, Life, Purpose, State};
use super::limiter::{LimitLayer, Limiter, Limits};
use super::message::{Content, Direction, FailureCode, MessageRecord, MessageStatus, Progress};
use super::outbox::{Outbox, OutboxRow};
use super::phone::Contact;
use super::time::Timestamp;

/// Accepted and unsettled sends per number; more are refused.
pub const QUEUE_MAX: usize = 10_000;
/// How long the answer to a request id is kept.
pub const IDEMPOTENCY_KEPT: Duration = Duration::from_secs(25 * 3600);
/// Chats made in this process whose number the disk may not show yet.
const FRESH_CHATS_MAX: usize = 1024;
/// Messages whose progress the disk may not show yet.
const RECENT_PROGRESS_MAX: usize = 256;
/// Inbound messages that somebody who looked at the disk a moment ago may not have found there.
const RECENT_SEEN_MAX: usize = 256;

/// Names a commit; answered by [`Input::Stored`] in the order of the commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Names a caller who waits; the shell holds the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplyId(pub u64);

/// A send, checked and resolved by the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendRequest {
    /// The recipient.
    pub to: Contact,
    /// Their chat, if the disk knew it.
    pub chat: Option<ChatNo>,
    /// What to say.
    pub content: Content,
    /// WhatsApp's id for it, chosen now and kept for every attempt.
    pub whatsapp_id: String,
    /// The caller's own reference.
    pub correlation_id: Option<String>,
    /// The request id and the digest of what it asked.
    pub idempotency: Option<(IdempotencyKey, [u8; 32])>,
}

/// An inbound message, resolved against the disk by the shell.
#[derive(Debug, Clone)]
pub struct Arrived {
    /// The other side of the chat.
    pub contact: Contact,
    /// Its chat, if the disk knew it.
    pub chat: Option<ChatNo>,
    /// Whether the disk has it already.
    pub seen: bool,
    /// Inbound, or our own from another device.
    pub direction: Direction,
    /// WhatsApp's id.
    pub whatsapp_id: String,
    /// Hash of the decoded message.
    pub digest: [u8; 16],
    /// The sender's display name.
    pub sender_name: Option<String>,
    /// What it says.
    pub content: Content,
    /// By WhatsApp's clock.
    pub written_at: Timestamp,
}

/// A message a receipt speaks of, resolved against the disk by the shell.
#[derive(Debug, Clone)]
pub struct Receipted {
    /// Its history row.
    pub seq: MessageSeq,
    /// WhatsApp's id.
    pub whatsapp_id: String,
    /// Its chat.
    pub chat: ChatNo,
    /// The recipient.
    pub to: Contact,
    /// The caller's own reference.
    pub correlation_id: Option<String>,
    /// Its progress on disk.
    pub progress: Progress,
}

/// What can happen to a number.
#[derive(Debug)]
pub enum Input {
    /// To its connection.
    Life(lifecycle::Input),
    /// Somebody wants to send.
    Send(Box<SendRequest>, ReplyId),
    /// A commit ended: `false` means its precondition did not hold. A failed disk never comes here: the actor ends.
    Stored(Ticket, bool),
    /// The session could not write an attempt.
    NotWritten {
        /// Which message.
        seq: MessageSeq,
        /// What follows.
        retry: Retry,
    },
    /// WhatsApp answered a message.
    Acked {
        /// By WhatsApp's id.
        whatsapp_id: String,
        /// Its error code.
        error: Option<u16>,
    },
    /// The other side's receipt.
    Receipts {
        /// Of which messages.
        messages: Vec<Receipted>,
        /// How far they got.
        status: MessageStatus,
        /// By WhatsApp's clock.
        at: Timestamp,
    },
    /// Messages arrived and must become durable before the reply.
    Arrived(Vec<Arrived>, ReplyId),
    /// Somebody adds a webhook endpoint; its ordinal is given here.
    AddEndpoint(Box<Endpoint>, ReplyId),
    /// Somebody removes one.
    RemoveEndpoint(u32, ReplyId),
    /// A webhook attempt ended.
    Attempted(AttemptRecord, Attempted),
    /// A page of the webhook queue was read.
    PageLoaded(u32, Vec<DeliveryRow>),
    /// No new sends; finish what waits for an answer, then close.
    Drain,
    /// Time went by.
    Tick,
}

/// What follows from an attempt that did not reach the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// When the number is online again.
    WhenOnline,
    /// After a pause.
    Later,
    /// Its outcome is unknown: wait for an answer as if it had been written.
    Unknown,
    /// Never.
    Never(FailureCode),
}

/// What a caller is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The message is durable.
    Accepted {
        /// Its history row.
        seq: MessageSeq,
        /// When.
        created_at: Timestamp,
        /// How long it will probably wait; unknown while the number is not online.
        predicted_wait: Option<Duration>,
    },
    /// Too many unsettled sends.
    QueueFull,
    /// The number is going down.
    Draining,
    /// The endpoint is durable.
    EndpointAdded(Box<Endpoint>),
    /// The number has as many endpoints as it may.
    TooManyEndpoints,
    /// The endpoint is gone.
    EndpointRemoved,
    /// There is no such endpoint.
    NoSuchEndpoint,
    /// The messages are durable.
    InboundDurable,
}

/// A transmission order for the session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Its history row.
    pub seq: MessageSeq,
    /// WhatsApp's id.
    pub whatsapp_id: String,
    /// The recipient.
    pub to: Contact,
    /// What to say, if it is still at hand; otherwise it is read from the history.
    pub content: Option<Content>,
}

/// Changes that become durable together.
#[derive(Debug, Clone, PartialEq)]
pub struct Commit {
    /// Echoed by [`Input::Stored`].
    pub ticket: Ticket,
    /// In order.
    pub changes: Vec<Change>,
    /// Written only if this request id is new.
    pub unless_known: Option<IdempotencyKey>,
    /// Whether somebody waits for the disk.
    pub durable: bool,
}

/// What must be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write.
    Commit(Commit),
    /// Act on the connection.
    Life(lifecycle::Effect),
    /// Hand a message to the session.
    Transmit(Transmit),
    /// Answer a caller.
    Reply(ReplyId, Reply),
    /// The request id is known: answer from its record, or refuse if the question was another.
    ReplyFromRecord(ReplyId, IdempotencyKey, [u8; 32]),
    /// Try to deliver an event to an endpoint.
    Deliver(u32, DeliveryRow),
    /// Read more of the webhook queue.
    LoadPage(LoadPage),
    /// Events up to here are durable: wake the streams.
    EventsVisible(EventSeq),
    /// The state changed: show it, count it, log it.
    StateChanged {
        /// Before.
        from: State,
        /// After.
        to: State,
    },
    /// Count for the metrics.
    Count(Counted),
    /// Everything is finished: the actor may end.
    Drained,
}

/// Things worth counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// WhatsApp accepted a message, this long after we did.
    Sent(Duration),
    /// Messages were received.
    Received(u64),
    /// A message failed for good.
    Failed(FailureCode),
    /// A message went over the wire again.
    Resent,
}

/// What waits for a commit.
#[derive(Debug, Clone)]
enum Then {
    Accepted { row: OutboxRow, content: Content, reply: ReplyId, wait: Option<Duration>, claimed: bool },
    Claimed { seq: MessageSeq, attempts: u16 },
    Reply(ReplyId, Reply),
    Enqueued(u32, DeliveryRow),
    EventsVisible(EventSeq),
    EndpointAdded(Box<Endpoint>),
}

/// A commit's precondition: the request id is new. Otherwise the caller is answered from its record.
#[derive(Debug, Clone, Copy)]
struct UnlessKnown {
    key: IdempotencyKey,
    body: [u8; 32],
    reply: ReplyId,
}

#[derive(Debug)]
struct Pending {
    ticket: Ticket,
    unless_known: Option<UnlessKnown>,
    then: Vec<Then>,
}

/// What a number is rebuilt from.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Its life, if it ever had one.
    pub life: Option<Life>,
    /// Whether credentials are stored: they become durable before the life that knows of them.
    pub has_credentials: bool,
    /// High-water marks.
    pub counters: Counters,
    /// Unsettled sends, in order.
    pub outbox: Vec<OutboxRow>,
    /// Endpoints, each with the rows queued for it.
    pub endpoints: Vec<(Endpoint, u64)>,
}

/// One number.
#[derive(Debug)]
pub struct Number {
    id: NumberId,
    life: Life,
    counters: Counters,
    outbox: Outbox,
    limiter: Limiter,
    deliveries: Deliveries,
    pending: VecDeque<Pending>,
    accepting: usize,
    next_ticket: u64,
    fresh_chats: VecDeque<(String, ChatNo)>,
    recent_seen: VecDeque<SeenKey>,
    recent_progress: VecDeque<(MessageSeq, Progress)>,
    draining: bool,
    /// Since when the connection is not trusted any more and was asked to close.
    distrusted_since: Option<Timestamp>,
    send_wake: Option<Timestamp>,
}

/// Changes being gathered by one step.
#[derive(Default)]
struct Draft {
    changes: Vec<Change>,
    then: Vec<Then>,
    durable: bool,
    /// What is only written if a request id is new: a commit of its own, behind the other one. Nothing that must be
    /// written in any case may depend on it.
    conditional: Option<(UnlessKnown, Vec<Change>, Then)>,
    effects: Vec<Effect>,
}

impl Number {
    /// Rebuilds a number from disk. The first step should be a `Tick`.
    #[must_use]
    pub fn restore(id: NumberId, snapshot: Snapshot, limits: Limits, now: Timestamp) -> (Self, Vec<Effect>) {
        let is_new = snapshot.life.is_none();
        let life = snapshot.life.map_or_else(|| Life::new(now), |life| life.revived(snapshot.has_credentials, now));
        let mut deliveries = Deliveries::default();
        for (endpoint, queued) in snapshot.endpoints {
            deliveries.add_endpoint(endpoint, queued);
        }
        deliveries.events_durable(EventSeq(snapshot.counters.event));
        let mut number = Self {
            id,
            life,
            counters: snapshot.counters,
            outbox: Outbox::restore(snapshot.outbox),
            limiter: Limiter::new(limits),
            deliveries,
            pending: VecDeque::new(),
            accepting: 0,
            next_ticket: 0,
            fresh_chats: VecDeque::new(),
            recent_seen: VecDeque::new(),
            recent_progress: VecDeque::new(),
            draining: false,
            distrusted_since: None,
            send_wake: None,
        };
        let mut draft = Draft::default();
        if is_new {
            number.record_event(EventBody::NumberCreated, now, &mut draft);
            draft.changes.push(Change::Life(number.life.clone()));
            draft.durable = true;
        }
        let effects = number.finish(draft, now);
        (number, effects)
    }

    /// Its connection's life.
    #[must_use]
    pub fn life(&self) -> &Life {
        &self.life
    }

    /// Unsettled sends.
    #[must_use]
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Webhook queue and endpoints.
    #[must_use]
    pub fn deliveries(&self) -> &Deliveries {
        &self.deliveries
    }

    /// Messages it could send at once.
    #[must_use]
    pub fn send_budget(&self, now: Timestamp) -> u32 {
        if self.life.state == State::Online { self.limiter.available(now) } else { 0 }
    }

    /// The last event recorded.
    #[must_use]
    pub fn last_event(&self) -> EventSeq {
        EventSeq(self.counters.event)
    }

    /// When the next `Tick` is due.
    #[must_use]
    pub fn next_wake(&self) -> Option<Timestamp> {
        let oldest = if self.distrusted_since.is_none() { self.outbox.oldest_on_wire() } else { None };
        let ack_due = oldest.map(|since| since.after(ack::ACK_TIMEOUT));
        if self.draining {
            // Nothing new begins any more, however long it has been due.
            return ack_due;
        }
        let sends = if self.life.state == State::Online { self.send_wake } else { None };
        [self.life.state.next_attempt(), sends, ack_due, self.deliveries.next_due()].into_iter().flatten().min()
    }

    /// One step.
    pub fn step(&mut self, input: Input, now: Timestamp) -> Vec<Effect> {
        let mut draft = Draft::default();
        match input {
            Input::Life(input) => self.on_life(input, now, &mut draft),
            Input::Send(request, reply) => self.on_send(*request, reply, now, &mut draft),
            Input::Stored(ticket, written) => self.on_stored(ticket, written, now, &mut draft),
            Input::NotWritten { seq, retry } => self.on_not_written(seq, retry, now, &mut draft),
            Input::Acked { whatsapp_id, error } => self.on_acked(&whatsapp_id, error, now, &mut draft),
            Input::Receipts { messages, status, at } => self.on_receipts(messages, status, at, now, &mut draft),
            Input::Arrived(messages, reply) => self.on_arrived(messages, reply, now, &mut draft),
            Input::AddEndpoint(endpoint, reply) => self.on_add_endpoint(endpoint, reply, &mut draft),
            Input::RemoveEndpoint(ordinal, reply) => self.on_remove_endpoint(ordinal, reply, &mut draft),
            Input::Attempted(record, attempted) => self.on_attempted(record, attempted, now, &mut draft),
            Input::PageLoaded(endpoint, rows) => self.deliveries.loaded(endpoint, rows),
            Input::Drain => self.draining = true,
            Input::Tick => self.on_tick(now, &mut draft),
        }
        self.finish(draft, now)
    }

    /// Ends a step: sends and deliveries that may go now, then the commit before everything else.
    fn finish(&mut self, mut draft: Draft, now: Timestamp) -> Vec<Effect> {
        self.pump_sends(now, &mut draft);
        for (endpoint, row) in if self.draining { Vec::new() } else { self.deliveries.take_due(now) } {
            draft.effects.push(Effect::Deliver(endpoint, row));
        }
        draft.effects.extend(self.deliveries.pages_to_load().into_iter().map(Effect::LoadPage));
        let mut effects = Vec::with_capacity(draft.effects.len() + 3);
        if !draft.changes.is_empty() || !draft.then.is_empty() {
            effects.push(self.commit(draft.changes, draft.then, None, draft.durable));
        }
        if let Some((unless_known, changes, then)) = draft.conditional {
            effects.push(self.commit(changes, vec![then], Some(unless_known), true));
        }
        effects.append(&mut draft.effects);
        if self.draining && self.outbox.in_flight() == 0 && self.pending.is_empty() {
            effects.push(Effect::Drained);
        }
        effects
    }

    fn commit(
        &mut self,
        changes: Vec<Change>,
        then: Vec<Then>,
        unless_known: Option<UnlessKnown>,
        durable: bool,
    ) -> Effect {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.pending.push_back(Pending { ticket, unless_known, then });
        let unless_known = unless_known.map(|condition| condition.key);
        Effect::Commit(Commit { ticket, changes, unless_known, durable })
    }

    // === connection ===

    fn on_life(&mut self, input: lifecycle::Input, now: Timestamp, draft: &mut Draft) {
        let before = self.life.clone();
        let closing = match &input {
            lifecycle::Input::Closed { reason, .. } => Some(reason.clone()),
            _ => None,
        };
        if self.draining && input == lifecycle::Input::Granted {
            draft.effects.push(Effect::Life(lifecycle::Effect::LeaveGate));
            return;
        }
        let mut effects = self.life.step(input, now);
        if self.draining {
            // Whoever goes down does not queue up again; the next incarnation does.
            effects.retain(|effect| *effect != lifecycle::Effect::AskGate);
        }
        draft.effects.extend(effects.into_iter().map(Effect::Life));
        if closing.is_some() {
            self.distrusted_since = None;
            self.outbox.give_back_all();
        }
        if self.life == before {
            return;
        }
        draft.changes.push(Change::Life(self.life.clone()));
        let (from, to) = (before.state, self.life.state);
        if from == to {
            // Linked or desired changed: facts that must survive.
            draft.durable = true;
            return;
        }
        draft.durable |= !matches!(to, State::Offline { .. } | State::AwaitingGate | State::Connecting);
        draft.effects.push(Effect::StateChanged { from, to });
        self.announce(closing.as_ref(), now, draft);
    }

    /// Tells customers when the connection stands or is gone. A routine recycle that heals at once is not told.
    fn announce(&mut self, closing: Option<&CloseReason>, now: Timestamp, draft: &mut Draft) {
        if self.life.state == State::Online {
            if !self.counters.announced_connected {
                self.counters.announced_connected = true;
                self.record_event(EventBody::NumberConnected, now, draft);
            }
            return;
        }
        let under_way = matches!(self.life.state, State::AwaitingGate | State::Connecting | State::Linking);
        if !self.counters.announced_connected
            || (under_way && closing.is_none_or(|reason| *reason == CloseReason::Recycled))
        {
            return;
        }
        self.counters.announced_connected = false;
        let reconnecting = matches!(
            self.life.state,
            State::Offline { .. } | State::AwaitingGate | State::Connecting | State::Parked { .. }
        );
        let given = self.life.reason.as_str();
        let reason = if given.is_empty() { self.life.state.name() } else { given }.to_owned();
        self.record_event(EventBody::NumberDisconnected { reason, reconnecting }, now, draft);
    }

    fn on_tick(&mut self, now: Timestamp, draft: &mut Draft) {
        if !self.draining {
            self.on_life(lifecycle::Input::Tick, now, draft);
        }
        let overdue = self.outbox.oldest_on_wire().is_some_and(|since| now.since(since) >= ack::ACK_TIMEOUT);
        if overdue && self.distrusted_since.is_none() && self.life.state == State::Online {
            // What the server thinks of these is unknown. A new connection settles it; this one sends nothing more.
            self.distrusted_since = Some(now);
            draft.effects.push(Effect::Life(lifecycle::Effect::Close));
        }
    }

    // === sending ===

    fn on_send(&mut self, request: SendRequest, reply: ReplyId, now: Timestamp, draft: &mut Draft) {
        if self.draining {
            draft.effects.push(Effect::Reply(reply, Reply::Draining));
            return;
        }
        if self.outbox.len() + self.accepting >= QUEUE_MAX {
            draft.effects.push(Effect::Reply(reply, Reply::QueueFull));
            return;
        }
        self.accepting += 1;
        let chat = self.chat_for(&request.to, request.chat, draft);
        let seq = self.next_message();
        let claimed = self.may_transmit()
            && self.outbox.is_idle(chat)
            && !self.is_accepting_for(chat)
            && self.limiter.try_take(chat, now).is_ok();
        let row = OutboxRow {
            seq,
            chat,
            whatsapp_id: request.whatsapp_id.clone(),
            to: request.to,
            correlation_id: request.correlation_id.clone(),
            created_at: now,
            // An attempt that can follow at once is counted in the same write.
            attempts: u16::from(claimed),
            not_before: Timestamp(0),
        };
        let message = MessageRecord {
            seq,
            chat,
            direction: Direction::Outbound,
            whatsapp_id: request.whatsapp_id,
            correlation_id: request.correlation_id,
            content: request.content.clone(),
            sender_name: None,
            created_at: now,
            written_at: now,
        };
        let changes = vec![Change::Message(message), Change::Outbox(row.clone()), Change::Counters(self.counters)];
        let position = self.outbox.len().saturating_sub(self.outbox.in_flight()) + self.accepting - 1;
        let wait = match (claimed, self.may_transmit()) {
            (true, _) => Some(Duration::ZERO),
            (false, true) => Some(self.limiter.predicted(position, now).since(now)),
            (false, false) => None,
        };
        let then = Then::Accepted { row, content: request.content, reply, wait, claimed };
        match request.idempotency {
            None => {
                draft.changes.extend(changes);
                draft.then.push(then);
                draft.durable = true;
            }
            Some((key, body)) => self.accept_unless_known(UnlessKnown { key, body, reply }, changes, then, now, draft),
        }
    }

    /// The chat is written in any case: sends that follow count on it. Its number was given before this message's.
    fn accept_unless_known(
        &self,
        unless_known: UnlessKnown,
        mut changes: Vec<Change>,
        then: Then,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        if let Then::Accepted { row, .. } = &then {
            let expires_at = now.after(IDEMPOTENCY_KEPT);
            let record = IdempotencyRecord { body: unless_known.body, seq: row.seq, created_at: now, expires_at };
            changes.push(Change::Idempotency(unless_known.key, record));
        }
        if !draft.changes.is_empty() {
            draft.changes.push(Change::Counters(self.counters));
        }
        draft.conditional = Some((unless_known, changes, then));
    }

    fn may_transmit(&self) -> bool {
        self.life.state == State::Online && self.distrusted_since.is_none()
    }

    fn is_accepting_for(&self, chat: ChatNo) -> bool {
        let of_chat = |then: &Then| matches!(then, Then::Accepted { row, .. } if row.chat == chat);
        self.pending.iter().any(|pending| pending.then.iter().any(of_chat))
    }

    fn pump_sends(&mut self, now: Timestamp, draft: &mut Draft) {
        self.send_wake = None;
        if !self.may_transmit() || self.draining {
            return;
        }
        let mut chosen = Vec::new();
        let mut room = super::outbox::IN_FLIGHT_MAX.saturating_sub(self.outbox.in_flight());
        for row in self.outbox.ready() {
            if room == 0 {
                break;
            }
            if row.not_before > now {
                self.send_wake = earliest(self.send_wake, row.not_before);
                continue;
            }
            match self.limiter.try_take(row.chat, now) {
                Ok(()) => {
                    chosen.push(row.seq);
                    room -= 1;
                }
                Err(refused) => {
                    self.send_wake = earliest(self.send_wake, refused.at);
                    if refused.layer == LimitLayer::NumberRate {
                        break;
                    }
                }
            }
        }
        for seq in chosen {
            let Some(row) = self.outbox.claim(seq) else { continue };
            if row.attempts > 1 {
                draft.effects.push(Effect::Count(Counted::Resent));
            }
            draft.then.push(Then::Claimed { seq, attempts: row.attempts });
            draft.changes.push(Change::Outbox(row));
            draft.durable = true;
        }
    }

    fn on_not_written(&mut self, seq: MessageSeq, retry: Retry, now: Timestamp, draft: &mut Draft) {
        match retry {
            Retry::WhenOnline => self.outbox.give_back(seq, now.after(Duration::from_millis(500))),
            Retry::Later => {
                let attempts = self.outbox.row(seq).map_or(0, |row| row.attempts);
                if attempts >= ack::ATTEMPTS_MAX {
                    self.fail(seq, FailureCode::AttemptsExhausted, now, draft);
                } else {
                    self.outbox.give_back(seq, now.after(Duration::from_secs(5)));
                }
            }
            Retry::Unknown => {}
            Retry::Never(code) => self.fail(seq, code, now, draft),
        }
    }

    fn on_acked(&mut self, whatsapp_id: &str, error: Option<u16>, now: Timestamp, draft: &mut Draft) {
        let Some(seq) = self.outbox.in_flight_with(whatsapp_id) else {
            return;
        };
        let Some(row) = self.outbox.row(seq).cloned() else {
            return;
        };
        match ack::verdict(error, row.attempts) {
            ack::Verdict::Sent => {
                self.outbox.settle(seq);
                draft.changes.push(Change::OutboxGone(seq));
                draft.effects.push(Effect::Count(Counted::Sent(now.since(row.created_at))));
                self.climb(&row, Progress::QUEUED, MessageStatus::Sent, None, now, now, draft);
                draft.durable = true;
            }
            ack::Verdict::Again(pause) => self.outbox.give_back(seq, now.after(pause)),
            ack::Verdict::Failed(code) => self.fail(seq, code, now, draft),
        }
    }

    fn fail(&mut self, seq: MessageSeq, code: FailureCode, now: Timestamp, draft: &mut Draft) {
        let Some(row) = self.outbox.settle(seq) else { return };
        draft.changes.push(Change::OutboxGone(seq));
        draft.effects.push(Effect::Count(Counted::Failed(code)));
        self.climb(&row, Progress::QUEUED, MessageStatus::Failed, Some(code), now, now, draft);
        draft.durable = true;
    }

    fn on_receipts(
        &mut self,
        messages: Vec<Receipted>,
        status: MessageStatus,
        at: Timestamp,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        for message in messages {
            // A receipt proves that the server had it, whatever became of the answer.
            if let Some(row) = self.outbox.settle(message.seq) {
                draft.changes.push(Change::OutboxGone(message.seq));
                draft.effects.push(Effect::Count(Counted::Sent(now.since(row.created_at))));
                draft.durable = true;
            }
            let row = OutboxRow {
                seq: message.seq,
                chat: message.chat,
                whatsapp_id: message.whatsapp_id,
                to: message.to,
                correlation_id: message.correlation_id,
                created_at: now,
                attempts: 0,
                not_before: now,
            };
            self.climb(&row, message.progress, status, None, at, now, draft);
        }
    }

    /// Climbs the ladder and, if that changed anything, tells of it. `at` is when it happened, `now` when we learnt it.
    #[expect(clippy::too_many_arguments, reason = "one place for every rung")]
    fn climb(
        &mut self,
        row: &OutboxRow,
        stored: Progress,
        status: MessageStatus,
        failure: Option<FailureCode>,
        at: Timestamp,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        let recent = self.recent_progress.iter().rev().find(|(seq, _)| *seq == row.seq);
        let mut progress = recent.map_or(stored, |(_, progress)| *progress);
        if !progress.climb(status, at, failure) {
            return;
        }
        self.recent_progress.retain(|(seq, _)| *seq != row.seq);
        if self.recent_progress.len() >= RECENT_PROGRESS_MAX {
            self.recent_progress.pop_front();
        }
        self.recent_progress.push_back((row.seq, progress));
        draft.changes.push(Change::Progress(row.seq, progress));
        let body = OutboundEvent {
            message: MessageId { number: self.id, seq: row.seq },
            whatsapp_id: row.whatsapp_id.clone(),
            correlation_id: row.correlation_id.clone(),
            to: row.to.clone(),
            chat: row.chat,
            status,
            failure,
        };
        self.record_event(EventBody::Outbound(body), now, draft);
    }

    // === receiving ===

    fn on_arrived(&mut self, messages: Vec<Arrived>, reply: ReplyId, now: Timestamp, draft: &mut Draft) {
        let mut received = 0;
        for message in messages {
            if message.seen {
                continue;
            }
            let chat = self.chat_for(&message.contact, message.chat, draft);
            let key = SeenKey {
                chat,
                direction: message.direction,
                whatsapp_id: message.whatsapp_id.clone(),
                digest: message.digest,
            };
            if self.recent_seen.contains(&key) {
                continue;
            }
            if self.recent_seen.len() >= RECENT_SEEN_MAX {
                self.recent_seen.pop_front();
            }
            self.recent_seen.push_back(key.clone());
            let seq = self.next_message();
            draft.changes.push(Change::Seen(key, seq));
            if message.direction == Direction::Inbound {
                received += 1;
                let body = ReceivedEvent {
                    message: MessageId { number: self.id, seq },
                    whatsapp_id: message.whatsapp_id.clone(),
                    from: message.contact,
                    chat,
                    sender_name: message.sender_name.clone(),
                    text: message.content.text().to_owned(),
                    written_at: message.written_at,
                };
                self.record_event(EventBody::Received(body), now, draft);
            }
            draft.changes.push(Change::Message(MessageRecord {
                seq,
                chat,
                direction: message.direction,
                whatsapp_id: message.whatsapp_id,
                correlation_id: None,
                content: message.content,
                sender_name: message.sender_name,
                created_at: now,
                written_at: message.written_at,
            }));
        }
        if received > 0 {
            draft.effects.push(Effect::Count(Counted::Received(received)));
        }
        if !draft.changes.is_empty() {
            draft.changes.push(Change::Counters(self.counters));
        }
        // Also with nothing new: what made these known may still be on its way to the disk.
        draft.durable = true;
        draft.then.push(Then::Reply(reply, Reply::InboundDurable));
    }

    // === webhooks ===

    fn on_add_endpoint(&mut self, mut endpoint: Box<Endpoint>, reply: ReplyId, draft: &mut Draft) {
        let being_added = self.pending.iter().flat_map(|pending| &pending.then);
        let being_added = being_added.filter(|then| matches!(then, Then::EndpointAdded(_))).count();
        if self.deliveries.endpoints().count() + being_added >= super::delivery::ENDPOINTS_MAX {
            draft.effects.push(Effect::Reply(reply, Reply::TooManyEndpoints));
            return;
        }
        self.counters.endpoint += 1;
        endpoint.ordinal = self.counters.endpoint;
        draft.changes.push(Change::Endpoint((*endpoint).clone()));
        draft.changes.push(Change::Counters(self.counters));
        draft.durable = true;
        draft.then.push(Then::EndpointAdded(endpoint.clone()));
        draft.then.push(Then::Reply(reply, Reply::EndpointAdded(endpoint)));
    }

    fn on_remove_endpoint(&mut self, ordinal: u32, reply: ReplyId, draft: &mut Draft) {
        if self.deliveries.remove_endpoint(ordinal).is_none() {
            draft.effects.push(Effect::Reply(reply, Reply::NoSuchEndpoint));
            return;
        }
        draft.changes.push(Change::EndpointGone(ordinal));
        draft.durable = true;
        draft.then.push(Then::Reply(reply, Reply::EndpointRemoved));
    }

    fn on_attempted(&mut self, record: AttemptRecord, attempted: Attempted, now: Timestamp, draft: &mut Draft) {
        let (endpoint, event) = (record.endpoint, record.event);
        match attempted {
            Attempted::Delivered => {
                // Not awaited: a crash delivers it again, under the same id.
                if self.deliveries.done(endpoint, event).is_some() {
                    draft.changes.push(Change::DeliveryGone(endpoint, event));
                }
            }
            Attempted::Again(pause) => {
                if let Some(row) = self.deliveries.again(endpoint, event, now.after(pause)) {
                    draft.changes.push(Change::Delivery(endpoint, row));
                }
            }
            Attempted::Dead => self.bury(endpoint, event, draft),
            Attempted::EndpointGone => {
                self.bury(endpoint, event, draft);
                if let Some(stored) = self.deliveries.deactivate(endpoint) {
                    draft.changes.push(Change::Endpoint(stored));
                }
            }
        }
        draft.changes.push(Change::Attempt(record));
    }

    fn bury(&mut self, endpoint: u32, event: EventSeq, draft: &mut Draft) {
        if let Some(row) = self.deliveries.done(endpoint, event) {
            draft.changes.push(Change::DeliveryGone(endpoint, event));
            draft.changes.push(Change::DeadLetter(endpoint, row));
            draft.durable = true;
        }
    }

    /// Adds an event to the log and queues it for every endpoint that wants it, in the same commit. Durable also
    /// without an endpoint: a stream that was shown it must find the same event under its number after a crash.
    fn record_event(&mut self, body: EventBody, now: Timestamp, draft: &mut Draft) {
        draft.durable = true;
        self.counters.event += 1;
        let seq = EventSeq(self.counters.event);
        let event = Event { id: EventId { number: self.id, seq }, at: now, body };
        let row = DeliveryRow { event: seq, chat: event.chat(), attempts: 0, due: now, queued_at: now };
        let kind = event.kind();
        let wanting = self.deliveries.endpoints().filter(|endpoint| endpoint.active && endpoint.filter.wants(kind));
        for ordinal in wanting.map(|endpoint| endpoint.ordinal) {
            draft.changes.push(Change::Delivery(ordinal, row));
            draft.then.push(Then::Enqueued(ordinal, row));
        }
        draft.changes.push(Change::Event(event));
        draft.changes.push(Change::Counters(self.counters));
        draft.then.push(Then::EventsVisible(seq));
    }

    // === after the disk ===

    fn on_stored(&mut self, ticket: Ticket, written: bool, now: Timestamp, draft: &mut Draft) {
        let Some(pending) = self.pending.pop_front() else {
            return;
        };
        assert_eq!(pending.ticket, ticket, "commits are answered in order");
        if !written {
            for then in &pending.then {
                if matches!(then, Then::Accepted { .. }) {
                    self.accepting = self.accepting.saturating_sub(1);
                }
            }
            if let Some(UnlessKnown { key, body, reply }) = pending.unless_known {
                draft.effects.push(Effect::ReplyFromRecord(reply, key, body));
            }
            return;
        }
        let mut visible = None;
        for then in pending.then {
            match then {
                Then::Accepted { row, content, reply, wait, claimed } => {
                    self.accepting = self.accepting.saturating_sub(1);
                    let accepted = Reply::Accepted { seq: row.seq, created_at: row.created_at, predicted_wait: wait };
                    draft.effects.push(Effect::Reply(reply, accepted));
                    self.admit(row, content, claimed, now, draft);
                }
                Then::Claimed { seq, attempts } => self.transmit(seq, attempts, None, now, draft),
                Then::Reply(reply, answer) => draft.effects.push(Effect::Reply(reply, answer)),
                Then::Enqueued(endpoint, row) => self.deliveries.enqueued(endpoint, row),
                Then::EventsVisible(seq) => {
                    self.deliveries.events_durable(seq);
                    visible = Some(seq);
                }
                Then::EndpointAdded(endpoint) => self.deliveries.add_endpoint(*endpoint, 0),
            }
        }
        draft.effects.extend(visible.map(Effect::EventsVisible));
    }

    fn admit(&mut self, mut row: OutboxRow, content: Content, claimed: bool, now: Timestamp, draft: &mut Draft) {
        let (seq, attempts) = (row.seq, row.attempts);
        if !claimed {
            self.outbox.push(row);
            return;
        }
        // The claim counts the attempt that was written with the row.
        row.attempts -= 1;
        self.outbox.push(row);
        if self.may_transmit() && self.outbox.claim(seq).is_some() {
            self.transmit(seq, attempts, Some(content), now, draft);
        }
    }

    fn transmit(
        &mut self,
        seq: MessageSeq,
        attempts: u16,
        content: Option<Content>,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        if !self.may_transmit() || !self.outbox.on_wire(seq, attempts, now) {
            return;
        }
        if let Some(row) = self.outbox.row(seq) {
            let (whatsapp_id, to) = (row.whatsapp_id.clone(), row.to.clone());
            draft.effects.push(Effect::Transmit(Transmit { seq, whatsapp_id, to, content }));
        }
    }

    // === counters and chats ===

    fn next_message(&mut self) -> MessageSeq {
        self.counters.message += 1;
        MessageSeq(self.counters.message)
    }

    /// The chat of a contact: as the disk knew it, as this process made it, or a new one.
    fn chat_for(&mut self, contact: &Contact, stored: Option<ChatNo>, draft: &mut Draft) -> ChatNo {
        let addresses = contact.addresses();
        let fresh =
            |address: &String| self.fresh_chats.iter().find(|(known, _)| known == address).map(|(_, chat)| *chat);
        let known = stored.or_else(|| addresses.iter().find_map(fresh));
        let chat = known.unwrap_or_else(|| {
            self.counters.chat += 1;
            ChatNo(self.counters.chat)
        });
        let all_fresh = addresses.iter().all(|address| fresh(address).is_some());
        // Found by one address; whether the disk knows the other one too was not asked.
        let nothing_to_learn = stored.is_some() && addresses.len() < 2;
        if all_fresh || nothing_to_learn {
            return chat;
        }
        for address in addresses {
            if self.fresh_chats.len() >= FRESH_CHATS_MAX {
                self.fresh_chats.pop_front();
            }
            self.fresh_chats.push_back((address, chat));
        }
        draft.changes.push(Change::Chat(chat, contact.clone()));
        chat
    }

    /// Whether it should be running at all.
    #[must_use]
    pub fn desired(&self) -> Desired {
        self.life.desired
    }

    /// What a session should be opened for now, if one is due.
    #[must_use]
    pub fn purpose(&self) -> Purpose {
        if self.life.state == State::Linking { Purpose::Pair } else { Purpose::Connect }
    }
}

fn earliest(one: Option<Timestamp>, other: Timestamp) -> Option<Timestamp> {
    Some(one.map_or(other, |one| one.min(other)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::phone::Phone;

    const NOW: Timestamp = Timestamp(1_000_000);

    fn number() -> Number {
        Number::restore(NumberId(1), Snapshot::default(), Limits::LINKED, NOW).0
    }

    fn send(phone: &str, request: Option<u8>) -> Input {
        let request = SendRequest {
            to: Contact::of_phone(Phone::parse(phone).unwrap()),
            chat: None,
            content: Content::Text("hello".to_owned()),
            whatsapp_id: phone.to_owned(),
            correlation_id: None,
            idempotency: request.map(|id| (IdempotencyKey([id; 16]), [0; 32])),
        };
        Input::Send(Box::new(request), ReplyId(1))
    }

    fn commits(effects: Vec<Effect>) -> Vec<Commit> {
        let commits = effects.into_iter().filter_map(|effect| match effect {
            Effect::Commit(commit) => Some(commit),
            _ => None,
        });
        commits.collect()
    }

    #[test]
    fn a_refused_request_id_takes_no_chat_with_it() {
        let written = commits(number().step(send("5511999999999", Some(1)), NOW));
        let [chat, message] = written.as_slice() else { panic!("{written:?}") };
        assert!(matches!(chat.changes[..], [Change::Chat(..), Change::Counters(_)]) && chat.unless_known.is_none());
        assert!(message.unless_known.is_some() && message.durable);
        assert!(!message.changes.iter().any(|change| matches!(change, Change::Chat(..))));
    }

    #[test]
    fn both_addresses_of_a_known_chat_are_learnt() {
        let mut number = number();
        let mut contact = Contact::of_phone(Phone::parse("5511999999999").unwrap());
        assert_eq!(number.chat_for(&contact, Some(ChatNo(4)), &mut Draft::default()), ChatNo(4));
        contact.lid = Some(crate::domain::phone::Lid("77".into()));
        let mut draft = Draft::default();
        assert_eq!(number.chat_for(&contact, Some(ChatNo(4)), &mut draft), ChatNo(4));
        assert_eq!(draft.changes, [Change::Chat(ChatNo(4), contact.clone())]);
        let mut draft = Draft::default();
        number.chat_for(&contact, Some(ChatNo(4)), &mut draft);
        assert!(draft.changes.is_empty(), "once is enough");
    }

    #[test]
    fn every_event_is_durable_before_it_is_shown() {
        let mut number = number();
        let mut draft = Draft::default();
        number.record_event(EventBody::NumberConnected, NOW, &mut draft);
        assert!(draft.durable);
    }

    #[test]
    fn who_goes_down_neither_spins_nor_queues_up() {
        let mut number = number();
        number.life.linked = true;
        number.life.state = State::Offline { retry_at: NOW };
        number.step(Input::Drain, NOW);
        number.step(Input::Tick, NOW);
        assert_eq!(number.next_wake(), None);
        let effects = number.step(Input::Life(lifecycle::Input::Start), NOW);
        assert!(!effects.contains(&Effect::Life(lifecycle::Effect::AskGate)));
    }
}
