//! Callers: they send with and without a request id, lose answers, and ask again with the same body or another.

use switchboard::domain::change::IdempotencyKey;
use switchboard::domain::endpoint::Replay;
use switchboard::domain::id::MessageSeq;
use switchboard::domain::message::{Content, Progress};
use switchboard::domain::number::{CancelTarget, Input, Reply, ReplyId, SendRequest};
use switchboard::domain::time::Timestamp;

use super::people::{self, Known};
use super::world::{Happens, World};

/// Most scheduled sends and deadlines lie within this, in milliseconds.
const SOON_MAX: u64 = 20_000;
const HOUR: u64 = 3_600_000;

/// One call for a message to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    person: u64,
    text: String,
    request: Option<u64>,
    send_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    open: bool,
}

/// All calls so far.
#[derive(Debug, Default)]
pub(crate) struct Callers {
    calls: Vec<Call>,
    open: usize,
    requests: u64,
    whatsapp_ids: u64,
}

/// Who waits for a reply.
#[derive(Debug)]
pub(crate) enum Waiter {
    Send(usize),
    Inbound(u64, Vec<usize>),
    Receipts,
    Cancel(Vec<MessageSeq>),
    AddEndpoint,
    RemoveEndpoint,
    ChangeEndpoint(u32, Option<Replay>),
    Erase(switchboard::domain::id::ChatNo),
}

impl Callers {
    pub(crate) fn all_answered(&self) -> bool {
        self.open == 0
    }
}

fn key(request: u64) -> IdempotencyKey {
    IdempotencyKey(u128::from(request).to_be_bytes())
}

fn digest(call: &Call) -> [u8; 32] {
    let mut digest = [0; 32];
    let text = call.text.as_bytes();
    digest[..8].copy_from_slice(&call.person.to_be_bytes());
    digest[8..8 + text.len()].copy_from_slice(text);
    digest
}

impl World {
    /// Somebody calls.
    pub(crate) fn new_call(&mut self) {
        let person = self.rng.below(self.plan.people);
        let text = format!("out {}", self.callers.calls.len());
        let request = self.rng.chance(self.plan.request_id).then_some(self.callers.requests);
        self.callers.requests += 1;
        let send_at = self.rng.chance(self.plan.scheduled).then(|| self.soon());
        let expires_at = self.rng.chance(self.plan.deadline).then(|| {
            let least = send_at.map_or(self.now, |at| at.0);
            Timestamp(least + 1 + self.rng.below(SOON_MAX))
        });
        let call = self.add_call(Call { person, text, request, send_at, expires_at, open: true });
        self.outside(0, Happens::Asks(call));
    }

    /// Mostly soon, sometimes in an hour.
    fn soon(&mut self) -> Timestamp {
        let far = if self.plan.sweeps_seldom() { HOUR } else { SOON_MAX };
        let most = self.rng.pick(&[100, SOON_MAX, SOON_MAX, far]);
        Timestamp(self.now + self.rng.below(most))
    }

    /// Somebody withdraws a few of the last messages.
    pub(crate) fn cancel_some(&mut self) {
        if self.number.is_none() {
            return;
        }
        let mut targets = Vec::new();
        for _ in 0..1 + self.rng.below(5) {
            let Some(seq) = self.promises.some_accepted(self.rng.next()) else { break };
            if !targets.contains(&seq) {
                targets.push(seq);
            }
        }
        let stored = |seq: &MessageSeq| {
            let disk = &self.disk.visible;
            let progress = disk.progress.get(seq).copied().unwrap_or(Progress::QUEUED);
            CancelTarget { seq: *seq, stored: disk.messages.contains_key(seq).then_some(progress) }
        };
        let resolved = targets.iter().map(stored).collect();
        let delay = self.hop();
        self.inside(delay, Happens::Cancels(resolved));
    }

    pub(crate) fn cancels(&mut self, targets: Vec<CancelTarget>) {
        let reply = self.reply_id();
        self.waiters.insert(reply, Waiter::Cancel(targets.iter().map(|target| target.seq).collect()));
        self.step(Input::Cancel(targets, reply));
    }

    pub(crate) fn cancel_answered(&mut self, asked: &[MessageSeq], answer: &Reply) {
        let Reply::Cancelled(outcomes) = answer else { panic!("a cancel was answered {answer:?}") };
        assert_eq!(outcomes.iter().map(|(seq, _)| *seq).collect::<Vec<_>>(), asked);
        for (seq, outcome) in outcomes {
            self.promises.cancelled(*seq, *outcome, &self.disk.durable);
        }
    }

    fn add_call(&mut self, call: Call) -> usize {
        self.callers.calls.push(call);
        self.callers.open += 1;
        self.callers.calls.len() - 1
    }

    /// The handle: finds the chat on disk, then casts.
    pub(crate) fn caller_asks(&mut self, index: usize) {
        if self.number.is_none() {
            return self.outside(500, Happens::Asks(index));
        }
        let call = &self.callers.calls[index];
        let to = people::contact(call.person, Known::Phone);
        let chat = self.disk.visible.chat_of(&to);
        let request = SendRequest {
            to,
            chat,
            standing: self.disk.visible.standing(chat),
            content: Content::Text(call.text.clone()),
            send_at: call.send_at,
            expires_at: call.expires_at,
            whatsapp_id: format!("3EB0{:018X}", self.callers.whatsapp_ids),
            correlation_id: None,
            idempotency: call.request.map(|request| (key(request), digest(call))),
            max_wait: None,
        };
        self.callers.whatsapp_ids += 1;
        let delay = self.hop();
        // A call that meets a crash on its way is noticed by its caller.
        self.outside(delay, Happens::Send(Box::new(request), index, self.incarnation));
    }

    pub(crate) fn send(&mut self, request: Box<SendRequest>, index: usize, incarnation: u64) {
        if self.number.is_none() || self.incarnation != incarnation {
            return self.call_unanswered(index);
        }
        let reply = self.reply_id();
        self.waiters.insert(reply, Waiter::Send(index));
        self.step(Input::Send(request, reply));
    }

    pub(crate) fn send_answered(&mut self, index: usize, answer: Reply) {
        match answer {
            Reply::Accepted { seq, .. } => {
                let call = &self.callers.calls[index];
                let request = call.request.map(|request| (key(request), digest(call)));
                let now = Timestamp(self.now);
                self.promises.accepted(seq, request, &call.text, &self.disk.durable, now);
                if self.fault(self.plan.answer_lost) {
                    self.call_unanswered(index);
                } else {
                    self.call_ends(index);
                }
            }
            Reply::QueueFull | Reply::Draining => self.outside(1000, Happens::Asks(index)),
            other => panic!("a send was answered {other:?}"),
        }
    }

    pub(crate) fn read_record(&mut self, reply: ReplyId, key: IdempotencyKey, body: [u8; 32]) {
        let Some(Waiter::Send(index)) = self.waiters.remove(&reply) else { panic!("{reply:?} was answered twice") };
        let record = self.disk.visible.idempotency.get(&key).cloned();
        match record {
            Some(record) if record.body == body => {
                let accepted = Reply::Accepted { seq: record.seq, created_at: record.created_at, predicted_wait: None };
                self.send_answered(index, accepted);
            }
            // Reused for something else: the caller is told, and gives up.
            Some(_) => self.call_ends(index),
            // It expired between the check and the look.
            None => self.call_unanswered(index),
        }
    }

    fn call_ends(&mut self, index: usize) {
        let call = &mut self.callers.calls[index];
        assert!(call.open, "call {index} was answered twice");
        call.open = false;
        self.callers.open -= 1;
    }

    /// The caller does not know what became of it. With a request id it asks again, sometimes for something else.
    fn call_unanswered(&mut self, index: usize) {
        let call = self.callers.calls[index].clone();
        if call.request.is_none() {
            return self.call_ends(index);
        }
        let delay = self.rng.below(3000);
        if self.fault(200) {
            self.call_ends(index);
            let text = format!("{}!", call.text);
            let person = self.rng.below(self.plan.people);
            let other = self.add_call(Call { text, person, ..call });
            self.outside(delay, Happens::Asks(other));
        } else {
            self.outside(delay, Happens::Asks(index));
        }
    }

    /// Two calls with one request id at once: impatient callers do that.
    pub(crate) fn repeat_call(&mut self) {
        if self.callers.calls.is_empty() {
            return;
        }
        let recent = self.callers.calls.len().min(20);
        let index = self.callers.calls.len() - 1 - self.rng.index(recent);
        let mut call = self.callers.calls[index].clone();
        if call.request.is_none() {
            return;
        }
        call.open = true;
        if self.rng.chance(200) && call.text.len() < 20 {
            call.text.push('?');
            call.person = self.rng.below(self.plan.people);
        }
        let again = self.add_call(call);
        self.outside(0, Happens::Asks(again));
    }

    pub(crate) fn unanswered(&mut self, waiter: Waiter) {
        match waiter {
            Waiter::Send(index) => self.call_unanswered(index),
            Waiter::Inbound(..)
            | Waiter::Receipts
            | Waiter::Cancel(_)
            | Waiter::AddEndpoint
            | Waiter::RemoveEndpoint
            | Waiter::ChangeEndpoint(..)
            | Waiter::Erase(_) => {}
        }
    }
}
