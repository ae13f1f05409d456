//! The machine itself: what a number knows, one step of it, and what waits for the disk.

use std::collections::VecDeque;
use std::time::Duration;

use super::interface::{Commit, Effect, Input, Reply, ReplyId, SendingRules, Snapshot, Ticket, Transmit};
use super::retaining::Retaining;
use crate::domain::ack;
use crate::domain::change::{Change, Counters, IdempotencyKey, SeenKey};
use crate::domain::delivery::{Deliveries, DeliveryRow};
use crate::domain::endpoint::{DeliverySeq, Endpoint};
use crate::domain::event::EventBody;
use crate::domain::id::{ChatNo, EventSeq, MessageSeq, NumberId};
use crate::domain::lifecycle::{Desired, Life, Purpose, State};
use crate::domain::limiter::{Limiter, NewChats};
use crate::domain::message::{Content, MessageRecord, Progress};
use crate::domain::orders::SendingOrders;
use crate::domain::outbox::{Outbox, OutboxRow, Standing, Unsettled};
use crate::domain::time::Timestamp;
use crate::domain::trouble::Legibility;

/// What waits for a commit.
#[derive(Debug, Clone)]
pub(super) enum Then {
    Accepted {
        row: OutboxRow,
        standing: Standing,
        content: Content,
        reply: ReplyId,
        wait: Option<Duration>,
        claimed: bool,
    },
    Claimed {
        seq: MessageSeq,
        attempts: u16,
    },
    Reply(ReplyId, Reply),
    Enqueued(u32, DeliveryRow),
    SetAside(u32, DeliveryRow),
    Buried(u32, DeliverySeq),
    EventsVisible(EventSeq),
    EventFloor(EventSeq),
    Swept,
    EraseOrdered(ChatNo),
    EndpointAdded(Box<Endpoint>),
}

/// A commit's precondition: the request id is new. Otherwise the caller is answered from its record.
#[derive(Debug, Clone, Copy)]
pub(super) struct UnlessKnown {
    pub(super) key: IdempotencyKey,
    pub(super) body: [u8; 32],
    pub(super) reply: ReplyId,
}

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) ticket: Ticket,
    pub(super) unless_known: Option<UnlessKnown>,
    pub(super) then: Vec<Then>,
}

/// One number.
#[derive(Debug)]
pub struct Number {
    pub(super) id: NumberId,
    pub(super) life: Life,
    pub(super) counters: Counters,
    pub(super) outbox: Outbox,
    pub(super) sending: SendingRules,
    pub(super) orders: SendingOrders,
    pub(super) limiter: Limiter,
    /// Replies that went in a row while others waited.
    pub(super) replies_in_a_row: u64,
    pub(super) new_chats: NewChats,
    pub(super) deliveries: Deliveries,
    pub(super) pending: VecDeque<Pending>,
    pub(super) accepting: usize,
    pub(super) next_ticket: u64,
    pub(super) fresh_chats: VecDeque<(String, ChatNo)>,
    pub(super) recent_heard: VecDeque<ChatNo>,
    /// How much of what arrives on the present connection can be read.
    pub(super) legibility: Legibility,
    pub(super) recent_seen: VecDeque<SeenKey>,
    pub(super) recent_placeholders: VecDeque<(SeenKey, MessageRecord)>,
    pub(super) recent_filled: VecDeque<MessageSeq>,
    pub(super) recent_progress: VecDeque<(MessageSeq, Progress)>,
    pub(super) draining: bool,
    /// Since when the connection is not trusted any more and was asked to close.
    pub(super) distrusted_since: Option<Timestamp>,
    pub(super) send_wake: Option<Timestamp>,
    pub(super) retaining: Retaining,
    /// More is due than one step may write: when the next step should be.
    pub(super) catch_up: Option<Timestamp>,
}

/// Changes being gathered by one step.
#[derive(Default)]
pub(super) struct Draft {
    pub(super) changes: Vec<Change>,
    pub(super) then: Vec<Then>,
    pub(super) durable: bool,
    /// What is only written if a request id is new: a commit of its own, behind the other one. Nothing that must be
    /// written in any case may depend on it.
    pub(super) conditional: Option<(UnlessKnown, Vec<Change>, Then)>,
    pub(super) effects: Vec<Effect>,
}

impl Number {
    /// Rebuilds a number from disk. The first step should be a `Tick`.
    #[must_use]
    pub fn restore(id: NumberId, snapshot: Snapshot, sending: SendingRules, now: Timestamp) -> (Self, Vec<Effect>) {
        let is_new = snapshot.life.is_none();
        let life = snapshot.life.map_or_else(|| Life::new(now), |life| life.revived(snapshot.has_credentials, now));
        let mut deliveries = Deliveries::default();
        for stored in snapshot.endpoints {
            deliveries.add_endpoint(stored, EventSeq(snapshot.counters.event));
        }
        let mut number = Self {
            id,
            life,
            counters: snapshot.counters,
            outbox: Outbox::restore(snapshot.outbox, &snapshot.warm),
            sending,
            orders: snapshot.orders,
            limiter: Limiter::restore(snapshot.orders.limits.over(sending.limits), &snapshot.limiter, snapshot.paces),
            replies_in_a_row: 0,
            new_chats: snapshot.limiter.new_chats,
            deliveries,
            pending: VecDeque::new(),
            accepting: 0,
            next_ticket: 0,
            fresh_chats: VecDeque::new(),
            recent_heard: VecDeque::new(),
            legibility: Legibility::default(),
            recent_seen: VecDeque::new(),
            recent_placeholders: VecDeque::new(),
            recent_filled: VecDeque::new(),
            recent_progress: VecDeque::new(),
            draining: false,
            distrusted_since: None,
            send_wake: None,
            retaining: Retaining::new(snapshot.rules, snapshot.erasures, id, now),
            catch_up: None,
        };
        let mut draft = Draft::default();
        number.agree_with_retention(&mut draft);
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

    /// Whether it may write to people who never wrote to it.
    #[must_use]
    pub fn new_chats(&self) -> NewChats {
        self.new_chats
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
        let sends = if self.life.state.is_connected() { self.send_wake } else { None };
        let hold = match self.new_chats {
            NewChats::Held { until, .. } => Some(until),
            NewChats::Allowed | NewChats::Probing => None,
        };
        let due = [self.outbox.next_due(), self.outbox.next_deadline()].into_iter().flatten().min();
        let due = self.catch_up.or(due);
        let sweep = self.retaining.next_wake();
        let others = [self.life.state.next_attempt(), sends, ack_due, hold, due, self.deliveries.next_due(), sweep];
        others.into_iter().flatten().min()
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
            Input::Receipts { messages, status, at, reply } => {
                self.on_receipts(messages, status, at, now, &mut draft);
                self.reply_when_durable(reply, &mut draft);
            }
            Input::Lock(answer) => self.on_lock(answer, now, &mut draft),
            Input::Cancel(targets, reply) => self.on_cancel(targets, reply, now, &mut draft),
            Input::Arrived(messages, reply) => self.on_arrived(messages, reply, now, &mut draft),
            Input::AddEndpoint(endpoint, reply) => self.on_add_endpoint(endpoint, reply, &mut draft),
            Input::RemoveEndpoint(ordinal, reply) => self.on_remove_endpoint(ordinal, reply, &mut draft),
            Input::Endpoint(ordinal, order, reply) => self.on_endpoint_order(ordinal, order, reply, now, &mut draft),
            Input::Attempted(end) => self.on_attempted(end, now, &mut draft),
            Input::PageLoaded(endpoint, rows) => self.deliveries.loaded(endpoint, rows, now),
            Input::ReplayLoaded(endpoint, events) => self.on_replay_loaded(endpoint, &events, now, &mut draft),
            Input::Retention(retention) => self.on_retention(retention, now, &mut draft),
            Input::Orders(orders) => self.on_orders(orders),
            Input::Swept(found) => self.on_swept(found, now, &mut draft),
            Input::Erase(chat, reply) => self.on_erase(chat, reply, &mut draft),
            Input::Drain => self.draining = true,
            Input::Tick => {
                self.on_tick(now, &mut draft);
                self.sweep_if_due(now, &mut draft);
            }
        }
        self.finish(draft, now)
    }

    /// Ends a step: sends and deliveries that may go now, then the commit before everything else.
    pub(super) fn finish(&mut self, mut draft: Draft, now: Timestamp) -> Vec<Effect> {
        self.keep_time(now, &mut draft);
        self.pump_sends(now, &mut draft);
        self.pump_deliveries(now, &mut draft);
        let mut effects = Vec::with_capacity(draft.effects.len() + 3);
        if !draft.changes.is_empty() || !draft.then.is_empty() {
            effects.push(self.commit(draft.changes, draft.then, None, draft.durable));
        }
        if let Some((unless_known, mut changes, then)) = draft.conditional {
            // Written behind the other commit: it must not take back a mark that this very step moved on.
            for change in &mut changes {
                match change {
                    Change::Counters(counters) => *counters = self.counters,
                    Change::Limiter(record) => *record = self.limiter.record(self.new_chats),
                    _ => {}
                }
            }
            effects.push(self.commit(changes, vec![then], Some(unless_known), true));
        }
        effects.append(&mut draft.effects);
        if self.draining && self.outbox.in_flight() == 0 && self.pending.is_empty() {
            effects.push(Effect::Drained);
        }
        effects
    }

    pub(super) fn commit(
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

    pub(super) fn on_stored(&mut self, ticket: Ticket, written: bool, now: Timestamp, draft: &mut Draft) {
        let Some(pending) = self.pending.pop_front() else {
            return;
        };
        assert_eq!(pending.ticket, ticket, "commits are answered in order");
        self.retaining.stored(ticket);
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
                Then::Accepted { row, standing, content, reply, wait, claimed } => {
                    self.accepting = self.accepting.saturating_sub(1);
                    let accepted = Reply::Accepted { seq: row.seq, created_at: row.created_at, predicted_wait: wait };
                    draft.effects.push(Effect::Reply(reply, accepted));
                    self.admit(row, standing, claimed.then_some(content), now, draft);
                }
                Then::Claimed { seq, attempts } => self.transmit(seq, attempts, None, now, draft),
                Then::Reply(reply, answer) => draft.effects.push(Effect::Reply(reply, answer)),
                Then::Enqueued(endpoint, row) => self.deliveries.enqueued(endpoint, row),
                Then::SetAside(endpoint, row) => self.deliveries.moved(endpoint, row),
                Then::Buried(endpoint, sequence) => self.deliveries.gone(endpoint, sequence),
                Then::EventsVisible(seq) => visible = Some(seq),
                Then::EndpointAdded(endpoint) => self.endpoint_added(*endpoint),
                Then::EventFloor(seq) => draft.effects.push(Effect::EventFloor(seq)),
                Then::Swept => self.removed(now, draft),
                Then::EraseOrdered(chat) => self.erase_ordered(chat, now),
            }
        }
        draft.effects.extend(visible.map(Effect::EventsVisible));
    }

    /// Takes an accepted row in; `claimed`: its first attempt was written with it, with this content.
    pub(super) fn admit(
        &mut self,
        mut row: OutboxRow,
        standing: Standing,
        claimed: Option<Content>,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        let (seq, chat, attempts) = (row.seq, row.chat, row.attempts);
        let standing = if self.recent_heard.contains(&chat) { Standing::Warm } else { standing };
        let Some(content) = claimed else {
            self.outbox.push(row, standing);
            return;
        };
        // The claim counts the attempt that was written with the row.
        row.attempts -= 1;
        self.outbox.push(row, standing);
        if self.may_transmit() && self.outbox.claim(seq).is_some() {
            self.transmit(seq, attempts, Some(content), now, draft);
        }
    }

    pub(super) fn transmit(
        &mut self,
        seq: MessageSeq,
        attempts: u16,
        content: Option<Content>,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        if !self.may_transmit() || !self.outbox.is_claimed(seq, attempts) {
            return;
        }
        let Some(row) = self.outbox.row(seq) else { return };
        // The disk took its time: what was right when it was claimed may not be any more.
        let paused = self.orders.paused(now).is_some();
        if paused || row.deadline() <= now || self.is_held(self.outbox.standing(row.chat)) {
            let devices = row.devices;
            self.outbox.give_back(seq, Unsettled::NotThrough, devices, Timestamp(0));
            return;
        }
        let (whatsapp_id, to, devices) = (row.whatsapp_id.clone(), row.to.clone(), row.devices);
        if self.outbox.on_wire(seq, attempts, now) {
            draft.effects.push(Effect::Transmit(Transmit { seq, whatsapp_id, to, content, devices }));
        }
    }

    /// Answers when everything written so far is durable: what made an input say nothing new may still be on its way.
    pub(super) fn reply_when_durable(&mut self, reply: ReplyId, draft: &mut Draft) {
        if draft.changes.is_empty() && self.pending.is_empty() {
            draft.effects.push(Effect::Reply(reply, Reply::InboundDurable));
            return;
        }
        draft.durable = true;
        draft.then.push(Then::Reply(reply, Reply::InboundDurable));
    }

    pub(super) fn next_message(&mut self) -> MessageSeq {
        self.counters.message += 1;
        MessageSeq(self.counters.message)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lifecycle;
    use crate::domain::limiter::Limits;
    use crate::domain::number::OnUnknown;
    use crate::domain::number::SendRequest;
    use crate::domain::phone::{Contact, Phone};

    const RULES: SendingRules = SendingRules { limits: Limits::LINKED, on_unknown: OnUnknown::Resend };
    const NOW: Timestamp = Timestamp(1_000_000);

    fn number() -> Number {
        Number::restore(NumberId(1), Snapshot::default(), RULES, NOW).0
    }

    fn send(phone: &str, request: Option<u8>) -> Input {
        let request = SendRequest {
            to: Contact::of_phone(Phone::parse(phone).unwrap()),
            chat: None,
            standing: Standing::New,
            content: Content::Text("hello".to_owned()),
            send_at: None,
            expires_at: None,
            whatsapp_id: phone.to_owned(),
            correlation_id: None,
            idempotency: request.map(|id| (IdempotencyKey([id; 16]), [0; 32])),
            max_wait: None,
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
