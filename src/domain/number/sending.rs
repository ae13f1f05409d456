//! Sending: accept durably, one in flight per chat, same id at every attempt, a ladder that only climbs.

use std::time::Duration;

use super::interface::{Counted, Effect, OnUnknown, Receipted, Reply, ReplyId, Retry, SendRequest};
use super::machine::{Draft, Number, Then, UnlessKnown};
use super::predicting::REPLIES_IN_A_ROW;
use crate::domain::ack;
use crate::domain::change::{Change, IdempotencyRecord};
use crate::domain::event::{EventBody, OutboundEvent};
use crate::domain::id::{ChatNo, MessageId, MessageSeq};
use crate::domain::limiter::{Grant, LimitLayer, NewChats};
use crate::domain::message::{Content, Direction, FailureCode, MessageRecord, MessageStatus, Progress};
use crate::domain::outbox::{DEADLINE_DEFAULT, Devices, IN_FLIGHT_MAX, OutboxRow, Schedule, Standing, Unsettled};
use crate::domain::phone::Contact;
use crate::domain::time::Timestamp;

/// Accepted and unsettled sends per number, scheduled ones included; more are refused.
pub const QUEUE_MAX: usize = 10_000;
/// How long the answer to a request id is kept.
pub const IDEMPOTENCY_KEPT: Duration = Duration::from_secs(25 * 3600);
/// Messages whose progress the disk may not show yet.
const RECENT_PROGRESS_MAX: usize = 256;

/// Rows to people who never wrote that one step looks at.
const LANE_LOOKED_AT: usize = 1024;

/// What one step sends.
#[derive(Default)]
struct Chosen {
    sends: Vec<(MessageSeq, ChatNo, Grant)>,
    in_doubt: Vec<MessageSeq>,
    /// When the next one may be due.
    wake: Option<Timestamp>,
}

impl Number {
    pub(super) fn on_send(&mut self, request: SendRequest, reply: ReplyId, now: Timestamp, draft: &mut Draft) {
        if self.draining {
            draft.effects.push(Effect::Reply(reply, Reply::Draining));
            return;
        }
        if self.outbox.len() + self.accepting >= QUEUE_MAX {
            draft.effects.push(Effect::Reply(reply, Reply::QueueFull));
            return;
        }
        let scheduled = request.send_at.filter(|at| *at > now);
        if let Some(refusal) = self.would_wait_too_long(&request, scheduled, now) {
            draft.effects.push(Effect::Reply(reply, refusal));
            return;
        }
        let chat = self.chat_for(&request.to, request.chat, draft);
        let standing = if self.recent_heard.contains(&chat) { Standing::Warm } else { request.standing };
        let seq = self.next_message();
        let expires_at = request.expires_at.unwrap_or_else(|| scheduled.unwrap_or(now).after(DEADLINE_DEFAULT));
        let at_once = scheduled.is_none() && expires_at > now && self.may_leave_at_once(chat, standing, now);
        let grant = if at_once { self.limiter.try_take(chat, standing, now).ok() } else { None };
        let claimed = grant.is_some();
        let wait = if claimed { Some(Duration::ZERO) } else { self.predicted_wait(chat, scheduled, standing, now) };
        self.accepting += 1;
        let relays_only = self.retaining.relays_only();
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
            schedule: scheduled.map_or(Schedule::AtOnce, Schedule::At),
            expires_at: Some(expires_at),
            answered: 0,
            refusals: 0,
            devices: Devices::AsKnown,
        };
        let message = MessageRecord {
            seq,
            chat,
            direction: Direction::Outbound,
            whatsapp_id: request.whatsapp_id,
            correlation_id: request.correlation_id,
            content: if relays_only { Content::NotKept } else { request.content.clone() },
            sender_name: None,
            created_at: now,
            written_at: now,
            send_at: request.send_at,
            expires_at: request.expires_at,
        };
        let mut changes = vec![Change::Message(message), Change::Outbox(row.clone()), Change::Counters(self.counters)];
        if relays_only {
            changes.push(Change::Body(seq, request.content.clone()));
        }
        if let Some(grant) = grant {
            changes.extend(granted(chat, grant).chain([self.limiter_change()]));
        }
        let then = Then::Accepted { row, standing, content: request.content, reply, wait, claimed };
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
    pub(super) fn accept_unless_known(
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

    /// Whether nothing but the limits is in the way of a message that is accepted now.
    fn may_leave_at_once(&self, chat: ChatNo, standing: Standing, now: Timestamp) -> bool {
        self.may_transmit()
            && self.orders.paused(now).is_none()
            && self.outbox.is_idle(chat)
            && !self.is_accepting_for(chat)
            && (standing == Standing::Warm || self.room_for_new() > 0)
    }

    /// How long a send accepted now will probably wait; unknown when nobody can tell.
    fn predicted_wait(
        &self,
        chat: ChatNo,
        scheduled: Option<Timestamp>,
        standing: Standing,
        now: Timestamp,
    ) -> Option<Duration> {
        let at = self.outlook(Some(chat), standing, now).at?;
        Some(at.max(scheduled.unwrap_or(now)).since(now))
    }

    /// The refusal, if its caller would rather not have it wait so long.
    fn would_wait_too_long(
        &self,
        request: &SendRequest,
        scheduled: Option<Timestamp>,
        now: Timestamp,
    ) -> Option<Reply> {
        let max_wait = request.max_wait?;
        let chat = request.chat.or_else(|| self.fresh_chat(&request.to));
        let heard = chat.is_some_and(|chat| self.recent_heard.contains(&chat));
        let standing = if heard { Standing::Warm } else { request.standing };
        let outlook = self.outlook(chat, standing, now);
        let wait = outlook.at.map(|at| at.since(scheduled.unwrap_or(now)));
        let fits = wait.is_some_and(|wait| wait <= max_wait);
        (!fits).then_some(Reply::WaitTooLong { wait, limiting: outlook.limiting })
    }

    pub(super) fn may_transmit(&self) -> bool {
        self.life.state.is_connected() && self.distrusted_since.is_none()
    }

    pub(super) fn is_held(&self, standing: Standing) -> bool {
        standing == Standing::New && matches!(self.new_chats, NewChats::Held { .. })
    }

    /// How many sends to people who never wrote may leave now.
    fn room_for_new(&self) -> usize {
        match self.new_chats {
            NewChats::Allowed => IN_FLIGHT_MAX,
            NewChats::Held { .. } => 0,
            NewChats::Probing => 1_usize.saturating_sub(self.outbox.in_flight_new()),
        }
    }

    pub(super) fn is_accepting_for(&self, chat: ChatNo) -> bool {
        let of_chat = |then: &Then| matches!(then, Then::Accepted { row, .. } if row.chat == chat);
        self.pending.iter().any(|pending| pending.then.iter().any(of_chat))
    }

    pub(super) fn pump_sends(&mut self, now: Timestamp, draft: &mut Draft) {
        self.send_wake = None;
        if !self.may_transmit() || self.draining || self.outbox.waiting() == 0 {
            return;
        }
        if let Some(pause) = self.orders.paused(now) {
            self.send_wake = pause.until;
            return;
        }
        let free_at = self.limiter.free_at(now);
        if free_at > now {
            self.send_wake = Some(free_at);
            return;
        }
        let chosen = self.choose(now);
        if let Some(wake) = chosen.wake {
            self.send_wake = earliest(self.send_wake, wake);
        }
        if !chosen.sends.is_empty() {
            draft.changes.push(self.limiter_change());
        }
        for (seq, chat, grant) in chosen.sends {
            draft.changes.extend(granted(chat, grant));
            self.claim(seq, draft);
        }
        for seq in chosen.in_doubt {
            self.end_doubt(seq, now, draft);
        }
    }

    /// The people who never wrote and may be written to now, by the first row of each.
    fn new_lane(&self, room: usize, now: Timestamp) -> Vec<MessageSeq> {
        if room == 0 {
            return Vec::new();
        }
        if self.limiter.new_recipients_left(now) != Some(0) {
            return self.outbox.lane(Standing::New).take(LANE_LOOKED_AT).collect();
        }
        // Only those that count already; the others would all be refused.
        let mut heads: Vec<_> = self.limiter.opened().filter_map(|chat| self.outbox.ready_in(chat)).collect();
        heads.retain(|seq| self.outbox.row(*seq).is_some_and(|row| self.outbox.standing(row.chat) == Standing::New));
        heads.sort_unstable();
        heads
    }

    /// What goes now: replies first, and after a few of them one to somebody who never wrote.
    fn choose(&mut self, now: Timestamp) -> Chosen {
        let mut chosen = Chosen::default();
        let mut room_for_new = self.room_for_new();
        let room = IN_FLIGHT_MAX.saturating_sub(self.outbox.in_flight());
        let new_lane = self.new_lane(room_for_new, now);
        if new_lane.is_empty()
            && room_for_new > 0
            && self.outbox.waiting_of(Standing::New) > 0
            && let Some(at) = self.limiter.opening_at(0, now).filter(|at| *at > now)
        {
            chosen.wake = Some(at);
        }
        let mut new = new_lane.into_iter().peekable();
        let mut warm = self.outbox.lane(Standing::Warm).peekable();
        while chosen.sends.len() < room && chosen.in_doubt.len() < super::timely::SETTLED_AT_ONCE_MAX {
            let takes_turn = self.replies_in_a_row >= REPLIES_IN_A_ROW || warm.peek().is_none();
            let is_new = takes_turn && room_for_new > 0 && new.peek().is_some();
            let Some(seq) = (if is_new { new.next() } else { warm.next() }) else { break };
            let Some(row) = self.outbox.row(seq) else { continue };
            // Online: what receipts could prove, they have proved.
            let not_again = row.is_doubtful() && self.sending.on_unknown == OnUnknown::Fail;
            if not_again || row.deadline() <= now {
                chosen.in_doubt.push(seq);
                continue;
            }
            if row.not_before > now {
                chosen.wake = earliest(chosen.wake, row.not_before);
                continue;
            }
            let standing = if is_new { Standing::New } else { Standing::Warm };
            match self.limiter.try_take(row.chat, standing, now) {
                Ok(grant) => {
                    chosen.sends.push((seq, row.chat, grant));
                    room_for_new -= usize::from(is_new);
                    self.replies_in_a_row = if is_new { 0 } else { self.replies_in_a_row + 1 };
                }
                Err(refused) => {
                    chosen.wake = earliest(chosen.wake, refused.at);
                    match refused.layer {
                        LimitLayer::NumberRate => break,
                        LimitLayer::PairRate => {}
                        LimitLayer::NewRecipients => {
                            let mut counted = self.new_lane(room_for_new, now);
                            counted.retain(|seq| chosen.sends.iter().all(|(other, ..)| other != seq));
                            new = counted.into_iter().peekable();
                        }
                    }
                }
            }
        }
        chosen
    }

    fn claim(&mut self, seq: MessageSeq, draft: &mut Draft) {
        let Some(row) = self.outbox.claim(seq) else { return };
        if row.attempts > 1 {
            draft.effects.push(Effect::Count(Counted::Resent));
        }
        draft.then.push(Then::Claimed { seq, attempts: row.attempts });
        draft.changes.push(Change::Outbox(row));
        draft.durable = true;
    }

    /// Not sent again: its deadline passed, or its owner would rather lose it than repeat it.
    fn end_doubt(&mut self, seq: MessageSeq, now: Timestamp, draft: &mut Draft) {
        if self.outbox.row(seq).is_some_and(|row| row.deadline() <= now) {
            self.expire(seq, now, draft);
        } else {
            self.fail(seq, FailureCode::AttemptsExhausted, now, draft);
        }
    }

    /// An attempt ended without settling its message. What is written of it nobody waits for: a crash that loses it
    /// makes the attempt one of unknown outcome, which is the careful reading.
    fn give_back(
        &mut self,
        seq: MessageSeq,
        outcome: Unsettled,
        devices: Devices,
        not_before: Timestamp,
        draft: &mut Draft,
    ) {
        if let Some(row) = self.outbox.give_back(seq, outcome, devices, not_before) {
            draft.changes.push(Change::Outbox(row));
        }
    }

    pub(super) fn on_not_written(&mut self, seq: MessageSeq, retry: Retry, now: Timestamp, draft: &mut Draft) {
        let Some(row) = self.outbox.row(seq) else { return };
        let (refusals, devices) = (row.refusals, row.devices);
        match retry {
            Retry::WhenOnline => {
                let soon = now.after(Duration::from_millis(500));
                self.give_back(seq, Unsettled::NotThrough, devices, soon, draft);
            }
            Retry::Later if refusals + 1 >= ack::REFUSALS_MAX => {
                self.fail(seq, FailureCode::AttemptsExhausted, now, draft);
            }
            Retry::Later => {
                self.give_back(seq, Unsettled::Refused, devices, now.after(Duration::from_secs(5)), draft);
            }
            Retry::Unknown => {}
            Retry::Never(code) => self.fail(seq, code, now, draft),
        }
    }

    pub(super) fn on_acked(&mut self, whatsapp_id: &str, error: Option<u16>, now: Timestamp, draft: &mut Draft) {
        let Some(seq) = self.outbox.in_flight_with(whatsapp_id) else {
            return;
        };
        let Some(row) = self.outbox.row(seq) else {
            return;
        };
        let (tried, standing) = (row.devices, self.outbox.standing(row.chat));
        match ack::verdict(error, row.refusals, tried) {
            ack::Verdict::Sent => self.sent(seq, now, draft),
            ack::Verdict::Again(pause, devices) => {
                self.give_back(seq, Unsettled::Refused, devices, now.after(pause), draft);
            }
            ack::Verdict::Hold(reason) => {
                let until = self.hold_new_chats(reason, now, draft);
                // Its own chat may be one that goes on: then it waits by itself.
                let not_before = if standing == Standing::Warm { until } else { Timestamp(0) };
                self.give_back(seq, Unsettled::NotThrough, tried, not_before, draft);
            }
            ack::Verdict::Failed(code) => self.fail(seq, code, now, draft),
        }
    }

    /// WhatsApp has it: settles the message and tells so. Nothing, if that was known before.
    fn sent(&mut self, seq: MessageSeq, now: Timestamp, draft: &mut Draft) {
        let Some(row) = self.outbox.row(seq) else { return };
        let (created_at, standing) = (row.created_at, self.outbox.standing(row.chat));
        self.end(seq, MessageStatus::Sent, None, now, draft);
        draft.effects.push(Effect::Count(Counted::Sent(now.since(created_at))));
        self.new_chat_accepted(standing, draft);
    }

    pub(super) fn fail(&mut self, seq: MessageSeq, code: FailureCode, now: Timestamp, draft: &mut Draft) {
        self.end(seq, MessageStatus::Failed, Some(code), now, draft);
        draft.effects.push(Effect::Count(Counted::Failed(code)));
    }

    /// Takes a message out of the outbox and tells what became of it.
    pub(super) fn end(
        &mut self,
        seq: MessageSeq,
        status: MessageStatus,
        code: Option<FailureCode>,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        let Some(row) = self.outbox.settle(seq) else { return };
        draft.changes.push(Change::OutboxGone(seq));
        self.climb(&Subject::of(&row), Progress::QUEUED, status, code, now, now, draft);
        draft.durable = true;
    }

    pub(super) fn on_receipts(
        &mut self,
        messages: Vec<Receipted>,
        status: MessageStatus,
        at: Timestamp,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        for message in messages {
            if self.is_forgotten(message.seq, message.chat) {
                continue;
            }
            // A receipt proves that the server had it, whatever became of the answer; it may also overtake the answer.
            self.sent(message.seq, now, draft);
            let subject = Subject {
                seq: message.seq,
                chat: message.chat,
                whatsapp_id: &message.whatsapp_id,
                to: &message.to,
                correlation_id: message.correlation_id.as_deref(),
            };
            self.climb(&subject, message.progress, status, None, at, now, draft);
        }
    }

    /// Climbs the ladder and, if that changed anything, tells of it. `at` is when it happened, `now` when we learnt it.
    #[expect(clippy::too_many_arguments, reason = "one place for every rung")]
    pub(super) fn climb(
        &mut self,
        of: &Subject<'_>,
        stored: Progress,
        status: MessageStatus,
        failure: Option<FailureCode>,
        at: Timestamp,
        now: Timestamp,
        draft: &mut Draft,
    ) {
        let recent = self.recent_progress.iter().rev().find(|(seq, _)| *seq == of.seq);
        let mut progress = recent.map_or(stored, |(_, progress)| *progress);
        if !progress.climb(status, at, failure) {
            return;
        }
        self.recent_progress.retain(|(seq, _)| *seq != of.seq);
        if self.recent_progress.len() >= RECENT_PROGRESS_MAX {
            self.recent_progress.pop_front();
        }
        self.recent_progress.push_back((of.seq, progress));
        draft.changes.push(Change::Progress(of.seq, progress));
        let body = OutboundEvent {
            message: MessageId { number: self.id, seq: of.seq },
            whatsapp_id: of.whatsapp_id.to_owned(),
            correlation_id: of.correlation_id.map(str::to_owned),
            to: of.to.clone(),
            chat: of.chat,
            status,
            failure,
        };
        self.record_event(EventBody::Outbound(body), now, draft);
    }
}

/// The message a rung is climbed for.
pub(super) struct Subject<'a> {
    seq: MessageSeq,
    chat: ChatNo,
    whatsapp_id: &'a str,
    to: &'a Contact,
    correlation_id: Option<&'a str>,
}

impl<'a> Subject<'a> {
    fn of(row: &'a OutboxRow) -> Self {
        Self {
            seq: row.seq,
            chat: row.chat,
            whatsapp_id: &row.whatsapp_id,
            to: &row.to,
            correlation_id: row.correlation_id.as_deref(),
        }
    }
}

/// What a grant changed, to be written with its attempt.
fn granted(chat: ChatNo, grant: Grant) -> impl Iterator<Item = Change> {
    let forgotten = grant.forgotten.into_iter().map(Change::ChatPaceGone);
    forgotten.chain([Change::ChatPace(chat, grant.chat)])
}

fn earliest(one: Option<Timestamp>, other: Timestamp) -> Option<Timestamp> {
    Some(one.map_or(other, |one| one.min(other)))
}
