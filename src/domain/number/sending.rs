//! Sending: accept durably, one in flight per chat, same id at every attempt, a ladder that only climbs.

use std::time::Duration;

use super::interface::{Counted, Effect, Receipted, Reply, ReplyId, Retry, SendRequest};
use super::machine::{Draft, Number, Then, UnlessKnown};
use crate::domain::ack;
use crate::domain::change::{Change, IdempotencyRecord};
use crate::domain::event::{EventBody, OutboundEvent};
use crate::domain::id::{ChatNo, MessageId, MessageSeq};
use crate::domain::lifecycle::State;
use crate::domain::limiter::LimitLayer;
use crate::domain::message::{Content, Direction, FailureCode, MessageRecord, MessageStatus, Progress};
use crate::domain::outbox::{IN_FLIGHT_MAX, OutboxRow};
use crate::domain::time::Timestamp;

/// Accepted and unsettled sends per number; more are refused.
pub const QUEUE_MAX: usize = 10_000;
/// How long the answer to a request id is kept.
pub const IDEMPOTENCY_KEPT: Duration = Duration::from_secs(25 * 3600);
/// Messages whose progress the disk may not show yet.
const RECENT_PROGRESS_MAX: usize = 256;

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
        self.accepting += 1;
        let chat = self.chat_for(&request.to, request.chat, draft);
        let seq = self.next_message();
        let claimed = self.may_transmit()
            && self.outbox.is_idle(chat)
            && !self.is_accepting_for(chat)
            && self.limiter.try_take(chat, now).is_ok();
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
        };
        let mut changes = vec![Change::Message(message), Change::Outbox(row.clone()), Change::Counters(self.counters)];
        if relays_only {
            changes.push(Change::Body(seq, request.content.clone()));
        }
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

    pub(super) fn may_transmit(&self) -> bool {
        self.life.state == State::Online && self.distrusted_since.is_none()
    }

    pub(super) fn is_accepting_for(&self, chat: ChatNo) -> bool {
        let of_chat = |then: &Then| matches!(then, Then::Accepted { row, .. } if row.chat == chat);
        self.pending.iter().any(|pending| pending.then.iter().any(of_chat))
    }

    pub(super) fn pump_sends(&mut self, now: Timestamp, draft: &mut Draft) {
        self.send_wake = None;
        if !self.may_transmit() || self.draining {
            return;
        }
        let mut chosen = Vec::new();
        let mut room = IN_FLIGHT_MAX.saturating_sub(self.outbox.in_flight());
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

    pub(super) fn on_not_written(&mut self, seq: MessageSeq, retry: Retry, now: Timestamp, draft: &mut Draft) {
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

    pub(super) fn on_acked(&mut self, whatsapp_id: &str, error: Option<u16>, now: Timestamp, draft: &mut Draft) {
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

    pub(super) fn fail(&mut self, seq: MessageSeq, code: FailureCode, now: Timestamp, draft: &mut Draft) {
        let Some(row) = self.outbox.settle(seq) else { return };
        draft.changes.push(Change::OutboxGone(seq));
        draft.effects.push(Effect::Count(Counted::Failed(code)));
        self.climb(&row, Progress::QUEUED, MessageStatus::Failed, Some(code), now, now, draft);
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
            if self.is_forgotten(message.seq) {
                continue;
            }
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
    pub(super) fn climb(
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
}

fn earliest(one: Option<Timestamp>, other: Timestamp) -> Option<Timestamp> {
    Some(one.map_or(other, |one| one.min(other)))
}
