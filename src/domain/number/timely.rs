//! What time and WhatsApp's locks do to the outbox: scheduled sends become due, deadlines pass, new chats are held; and
//! what their owner withdraws.

use std::time::Duration;

use super::interface::{CancelOutcome, CancelTarget, Counted, Effect, Reply, ReplyId};
use super::machine::{Draft, Number, Then};
use crate::domain::change::Change;
use crate::domain::id::MessageSeq;
use crate::domain::limiter::{LockAnswer, LockReason, NewChats};
use crate::domain::message::{FailureCode, MessageStatus};
use crate::domain::orders::SendingOrders;
use crate::domain::outbox::{Position, Standing};
use crate::domain::time::Timestamp;

/// Rows that one step settles or moves because of the time: what follows from each must fit one unit of the store.
pub(super) const SETTLED_AT_ONCE_MAX: usize = 50;
/// Pause between two such steps.
const CATCH_UP_AFTER: Duration = Duration::from_millis(10);

impl Number {
    /// Does what is due.
    pub(super) fn keep_time(&mut self, now: Timestamp, draft: &mut Draft) {
        if self.draining {
            return;
        }
        for row in self.outbox.release_due(now, SETTLED_AT_ONCE_MAX) {
            draft.changes.push(Change::Outbox(row));
        }
        for seq in self.outbox.expired(now, SETTLED_AT_ONCE_MAX) {
            self.expire(seq, now, draft);
        }
        let due = [self.outbox.next_due(), self.outbox.next_deadline()];
        let more = due.into_iter().flatten().any(|at| at <= now);
        self.catch_up = more.then(|| now.after(CATCH_UP_AFTER));
        self.set_new_chats(self.new_chats.at(now), draft);
        self.limiter.age(now);
        if self.life.state.is_connected() && self.limiter.warm(now) {
            draft.changes.push(self.limiter_change());
        }
    }

    /// What its owner orders about its sending was set.
    pub(super) fn on_orders(&mut self, orders: SendingOrders) {
        self.orders = orders;
        self.limiter.set_limits(orders.limits.over(self.sending.limits));
    }

    pub(super) fn limiter_change(&self) -> Change {
        Change::Limiter(self.limiter.record(self.new_chats))
    }

    /// Its time is over. Whether an attempt of unknown outcome arrived, a receipt may still tell.
    pub(super) fn expire(&mut self, seq: MessageSeq, now: Timestamp, draft: &mut Draft) {
        let Some(row) = self.outbox.row(seq) else { return };
        let code = if row.attempts == 0 { FailureCode::NeverAttempted } else { FailureCode::DeadlinePassed };
        self.end(seq, MessageStatus::Expired, Some(code), now, draft);
        draft.effects.push(Effect::Count(Counted::Failed(code)));
    }

    fn set_new_chats(&mut self, to: NewChats, draft: &mut Draft) {
        if to != self.new_chats {
            self.new_chats = to;
            draft.changes.push(self.limiter_change());
        }
    }

    /// WhatsApp refused a message as one that may not be sent for now. Gives until when.
    pub(super) fn hold_new_chats(&mut self, reason: LockReason, now: Timestamp, draft: &mut Draft) -> Timestamp {
        let asked = matches!(self.new_chats, NewChats::Held { reason: LockReason::ReachOutLock, .. });
        if reason == LockReason::ReachOutLock && !asked {
            draft.effects.push(Effect::AskLock);
        }
        draft.effects.push(Effect::Count(Counted::Held(reason)));
        self.set_new_chats(self.new_chats.refused(reason, now), draft);
        draft.durable = true;
        match self.new_chats {
            NewChats::Held { until, .. } => until,
            NewChats::Allowed | NewChats::Probing => now,
        }
    }

    pub(super) fn on_lock(&mut self, answer: LockAnswer, now: Timestamp, draft: &mut Draft) {
        let before = self.new_chats;
        self.set_new_chats(before.explained(answer, now), draft);
        if let (NewChats::Held { until: from, .. }, NewChats::Held { until: to, .. }) = (before, self.new_chats)
            && from != to
        {
            draft.changes.extend(self.outbox.postpone(from, to).into_iter().map(Change::Outbox));
            draft.durable = true;
        }
    }

    /// WhatsApp accepted a message: if it opened a chat, others may too.
    pub(super) fn new_chat_accepted(&mut self, standing: Standing, draft: &mut Draft) {
        if standing == Standing::New && self.new_chats == NewChats::Probing {
            self.set_new_chats(NewChats::Allowed, draft);
        }
    }

    pub(super) fn on_cancel(&mut self, targets: Vec<CancelTarget>, reply: ReplyId, now: Timestamp, draft: &mut Draft) {
        let mut outcomes = Vec::with_capacity(targets.len());
        for target in targets {
            outcomes.push((target.seq, self.cancel(target, now, draft)));
        }
        // Also with nothing withdrawn: what was withdrawn a moment ago may still be on its way to the disk.
        draft.durable = true;
        draft.then.push(Then::Reply(reply, Reply::Cancelled(outcomes)));
    }

    fn cancel(&mut self, target: CancelTarget, now: Timestamp, draft: &mut Draft) -> CancelOutcome {
        match self.outbox.position(target.seq) {
            Some(Position::Waiting) => {
                self.end(target.seq, MessageStatus::Cancelled, None, now, draft);
                return CancelOutcome::Cancelled;
            }
            Some(Position::MayHaveLeft) => return CancelOutcome::InFlight,
            None => {}
        }
        let recent = self.recent_progress.iter().rev().find(|(seq, _)| *seq == target.seq);
        match recent.map(|(_, progress)| *progress).or(target.stored).map(|progress| progress.status) {
            None => CancelOutcome::NotFound,
            // Neither waiting nor settled: it is being accepted.
            Some(MessageStatus::Queued) => CancelOutcome::InFlight,
            Some(MessageStatus::Sent | MessageStatus::Delivered | MessageStatus::Read | MessageStatus::Played) => {
                CancelOutcome::AlreadySent
            }
            Some(MessageStatus::Failed) => CancelOutcome::AlreadyFailed,
            Some(MessageStatus::Cancelled) => CancelOutcome::Cancelled,
            Some(MessageStatus::Expired) => CancelOutcome::AlreadyExpired,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::change::Change;
    use crate::domain::id::{ChatNo, NumberId};
    use crate::domain::lifecycle::State;
    use crate::domain::limiter::{HOLD_DEFAULT, Limits};
    use crate::domain::message::{Content, Direction, Progress};
    use crate::domain::number::{Arrived, Input, OnUnknown, Receipted, SendRequest, SendingRules, Snapshot, Ticket};
    use crate::domain::outbox::Devices;
    use crate::domain::phone::{Contact, Phone};

    const NOW: Timestamp = Timestamp(1_700_000_000_000);
    const RULES: SendingRules = SendingRules { limits: Limits::LINKED, on_unknown: OnUnknown::Resend };
    const ANA: &str = "5511900000001";
    const BEA: &str = "5511900000002";

    /// A machine whose disk is perfect and immediate.
    struct Bench {
        number: Number,
        sent: Vec<(String, Devices)>,
        replies: Vec<Reply>,
        ends: Vec<(MessageStatus, Option<FailureCode>)>,
        asked: usize,
        /// Changes of the largest commit.
        largest: usize,
    }

    fn person(phone: &str) -> Contact {
        Contact::of_phone(Phone::parse(phone).unwrap())
    }

    impl Bench {
        fn new(rules: SendingRules) -> Self {
            let (mut number, _) = Number::restore(NumberId(1), Snapshot::default(), rules, NOW);
            number.pending.clear();
            number.life.state = State::Online;
            Self { number, sent: Vec::new(), replies: Vec::new(), ends: Vec::new(), asked: 0, largest: 0 }
        }

        fn step(&mut self, input: Input, now: Timestamp) {
            let effects = self.number.step(input, now);
            let mut stored: Vec<Ticket> = Vec::new();
            for effect in effects {
                match effect {
                    Effect::Commit(commit) => {
                        stored.push(commit.ticket);
                        self.largest = self.largest.max(commit.changes.len());
                        for change in commit.changes {
                            if let Change::Progress(_, progress) = change {
                                self.ends.push((progress.status, progress.failure));
                            }
                        }
                    }
                    Effect::Transmit(transmit) => self.sent.push((transmit.whatsapp_id, transmit.devices)),
                    Effect::Reply(_, reply) => self.replies.push(reply),
                    Effect::AskLock => self.asked += 1,
                    _ => {}
                }
            }
            for ticket in stored {
                self.step(Input::Stored(ticket, true), now);
            }
        }

        fn send(&mut self, phone: &str, id: &str, send_at: Option<Timestamp>, expires_at: Option<Timestamp>) {
            let request = SendRequest {
                to: person(phone),
                chat: None,
                standing: Standing::New,
                content: Content::Text("hello".to_owned()),
                send_at,
                expires_at,
                whatsapp_id: id.to_owned(),
                correlation_id: None,
                idempotency: None,
                max_wait: None,
            };
            self.step(Input::Send(Box::new(request), ReplyId(1)), NOW);
        }

        fn answer(&mut self, id: &str, error: Option<u16>, now: Timestamp) {
            self.step(Input::Acked { whatsapp_id: id.to_owned(), error }, now);
        }

        fn hear(&mut self, phone: &str, now: Timestamp) {
            let message = Arrived {
                contact: person(phone),
                chat: None,
                seen: false,
                standing: Standing::New,
                placeholder: None,
                direction: Direction::Inbound,
                whatsapp_id: "IN".to_owned(),
                digest: [1; 16],
                sender_name: None,
                content: Content::Text("hi".to_owned()),
                written_at: now,
            };
            self.step(Input::Arrived(vec![message], ReplyId(2)), now);
        }

        fn sent(&self) -> Vec<&str> {
            self.sent.iter().map(|(id, _)| id.as_str()).collect()
        }

        fn tick(&mut self, now: Timestamp) {
            self.step(Input::Tick, now);
        }
    }

    #[test]
    fn a_lock_holds_new_chats_and_nobody_else() {
        let mut bench = Bench::new(RULES);
        bench.hear(BEA, NOW);
        bench.send(ANA, "A1", None, None);
        bench.answer("A1", Some(463), NOW);
        assert_eq!((bench.asked, bench.number.outbox().len()), (1, 1), "held, not failed");
        bench.send(BEA, "B1", None, None);
        bench.send("5511900000003", "C1", None, None);
        assert_eq!(bench.sent(), ["A1", "B1"], "replies go on, new chats do not");
        let until = NOW.after(HOLD_DEFAULT);
        let NewChats::Held { until: held, .. } = bench.number.new_chats() else { panic!("not held") };
        assert_eq!(held, until);
        bench.answer("B1", None, NOW);
        let before = Timestamp(until.0 - 1);
        bench.tick(before);
        assert_eq!(bench.sent(), ["A1", "B1"]);
        assert_eq!(bench.number.next_wake(), Some(until));
        bench.tick(until);
        assert_eq!(bench.sent(), ["A1", "B1", "A1"], "one goes first, to see");
        bench.answer("A1", None, until);
        bench.tick(until.after(Duration::from_secs(1)));
        assert_eq!(bench.sent().last(), Some(&"C1"));
        assert_eq!(bench.number.new_chats(), NewChats::Allowed);
    }

    #[test]
    fn whoever_writes_during_a_hold_is_answered() {
        let mut bench = Bench::new(RULES);
        bench.send(ANA, "A1", None, None);
        bench.answer("A1", Some(475), NOW);
        assert_eq!(bench.asked, 0, "the cap of new chats is not the lock");
        bench.hear(ANA, NOW.after(Duration::from_secs(60)));
        assert_eq!(bench.sent(), ["A1", "A1"]);
    }

    #[test]
    fn a_warm_chat_that_is_refused_waits_as_long_as_the_lock() {
        let mut bench = Bench::new(RULES);
        bench.hear(ANA, NOW);
        bench.send(ANA, "A1", None, None);
        bench.answer("A1", Some(463), NOW);
        let hour = NOW.after(Duration::from_secs(3600));
        bench.step(Input::Lock(LockAnswer::Until(hour)), NOW);
        bench.tick(Timestamp(hour.0 - 1));
        assert_eq!(bench.sent(), ["A1"], "not again and again");
        bench.tick(hour);
        assert_eq!(bench.sent(), ["A1", "A1"]);
    }

    #[test]
    fn refused_devices_are_asked_for_once() {
        let mut bench = Bench::new(RULES);
        bench.send(ANA, "A1", None, None);
        for code in [479, 400] {
            bench.answer("A1", Some(code), NOW);
            bench.tick(NOW.after(Duration::from_secs(10)));
        }
        assert_eq!(bench.sent, [("A1".to_owned(), Devices::AsKnown), ("A1".to_owned(), Devices::Refreshed)]);
        assert_eq!(bench.ends, [(MessageStatus::Failed, Some(FailureCode::RejectedByWhatsapp))]);
    }

    #[test]
    fn a_scheduled_send_leaves_when_due_and_not_before() {
        let mut bench = Bench::new(RULES);
        let at = NOW.after(Duration::from_secs(600));
        bench.send(ANA, "A1", Some(at), None);
        bench.send(ANA, "A2", None, None);
        bench.answer("A2", None, NOW);
        assert_eq!((bench.sent(), bench.number.next_wake()), (vec!["A2"], Some(at)));
        bench.tick(Timestamp(at.0 - 1));
        assert_eq!(bench.sent(), ["A2"]);
        bench.tick(at);
        assert_eq!(bench.sent(), ["A2", "A1"]);
    }

    #[test]
    fn deadlines_say_whether_it_was_ever_attempted_and_wait_for_what_may_have_left() {
        let deadline = NOW.after(Duration::from_secs(30));
        let mut bench = Bench::new(RULES);
        bench.send(ANA, "A1", None, Some(deadline));
        bench.send(ANA, "A2", None, Some(deadline));
        bench.tick(deadline);
        assert_eq!(bench.ends, [(MessageStatus::Expired, Some(FailureCode::NeverAttempted))], "one is in flight");
        bench.answer("A1", Some(503), deadline);
        assert_eq!(bench.ends[1], (MessageStatus::Expired, Some(FailureCode::DeadlinePassed)));
        assert_eq!(bench.sent(), ["A1"]);
        assert!(bench.number.outbox().is_empty());
    }

    #[test]
    fn in_doubt_it_is_sent_again_or_failed_as_its_owner_likes() {
        for (on_unknown, sent, left) in [(OnUnknown::Resend, vec!["A1", "A1"], 1), (OnUnknown::Fail, vec!["A1"], 0)] {
            let mut bench = Bench::new(SendingRules { on_unknown, ..RULES });
            bench.send(ANA, "A1", None, None);
            bench.number.outbox.give_back_all();
            bench.tick(NOW);
            assert_eq!((bench.sent(), bench.number.outbox().len()), (sent, left), "{on_unknown:?}");
        }
    }

    #[test]
    fn what_waits_can_be_withdrawn_and_the_rest_is_named() {
        let mut bench = Bench::new(RULES);
        bench.send(ANA, "A1", None, None);
        bench.send(ANA, "A2", None, None);
        bench.send(BEA, "B1", Some(NOW.after(Duration::from_secs(60))), None);
        let stored = Some(Progress::QUEUED);
        let targets: Vec<_> = (1..=4).map(|seq| CancelTarget { seq: MessageSeq(seq), stored }).collect();
        let mut targets = targets;
        targets[3].stored = None;
        bench.step(Input::Cancel(targets.clone(), ReplyId(9)), NOW);
        let expected = [
            (MessageSeq(1), CancelOutcome::InFlight),
            (MessageSeq(2), CancelOutcome::Cancelled),
            (MessageSeq(3), CancelOutcome::Cancelled),
            (MessageSeq(4), CancelOutcome::NotFound),
        ];
        assert_eq!(bench.replies.last(), Some(&Reply::Cancelled(expected.to_vec())));
        bench.answer("A1", None, NOW);
        bench.tick(NOW.after(Duration::from_secs(100)));
        assert_eq!(bench.sent(), ["A1"]);
        bench.step(Input::Cancel(targets[..2].to_vec(), ReplyId(10)), NOW);
        let again = vec![(MessageSeq(1), CancelOutcome::AlreadySent), (MessageSeq(2), CancelOutcome::Cancelled)];
        assert_eq!(bench.replies.last(), Some(&Reply::Cancelled(again)), "withdrawing twice is withdrawing");
    }

    #[test]
    fn thousands_due_at_once_are_taken_in_units_the_store_can_hold() {
        let mut bench = Bench::new(RULES);
        let at = NOW.after(Duration::from_secs(600));
        for index in 0..120u64 {
            bench.send(&(5_511_900_000_000 + index).to_string(), &format!("S{index}"), Some(at), None);
        }
        let (mut now, mut last) = (at, at);
        while bench.number.outbox().scheduled() > 0 {
            last = now;
            bench.tick(now);
            now = bench.number.next_wake().unwrap();
        }
        assert!(bench.largest > SETTLED_AT_ONCE_MAX / 2 && bench.largest <= SETTLED_AT_ONCE_MAX + 20);
        assert!(last.since(at) < Duration::from_secs(1));
        assert_eq!(bench.number.outbox().standing(ChatNo(1)), Standing::New);
    }

    #[test]
    fn a_receipt_that_overtakes_the_answer_tells_of_both() {
        let mut bench = Bench::new(RULES);
        bench.send(ANA, "A", None, None);
        let (seq, later) = (MessageSeq(1), NOW.after(Duration::from_secs(2)));
        let message = Receipted {
            seq,
            whatsapp_id: "A".to_owned(),
            chat: ChatNo(1),
            to: person(ANA),
            correlation_id: None,
            progress: Progress::QUEUED,
        };
        // Receipts come in whole seconds, and from another clock.
        let (messages, at) = (vec![message], Timestamp(NOW.0 - 1_000));
        bench.step(Input::Receipts { messages, status: MessageStatus::Delivered, at, reply: ReplyId(2) }, later);
        assert_eq!(bench.ends, [(MessageStatus::Sent, None), (MessageStatus::Delivered, None)]);
        let (_, progress) = bench.number.recent_progress.back().unwrap();
        assert_eq!((progress.sent_at, progress.delivered_at), (Some(later), Some(later)));
        assert!(bench.number.outbox.row(seq).is_none());
        bench.answer("A", None, later);
        assert_eq!(bench.ends.len(), 2, "the answer says nothing new");
    }
}
