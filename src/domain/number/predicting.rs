//! When a message would leave, told from what waits, the limits, holds, the pause and the connection; and the capacity
//! that follows from it. Costs little also with a full queue: only chats that wait for their own pace are looked at.

use std::time::Duration;

use super::machine::{Number, Then};
use crate::domain::capacity::{Basis, Limiting, Outlook};
use crate::domain::id::{ChatNo, MessageSeq};
use crate::domain::lifecycle::State;
use crate::domain::limiter::NewChats;
use crate::domain::outbox::{OutboxRow, Standing};
use crate::domain::time::Timestamp;

/// Chats that wait for their own pace and are looked at one by one; the others count as if they did not wait.
const SLOW_CHATS_MAX: usize = 512;
/// Steps towards the moment at which everything ahead has left.
const ROUNDS_MAX: usize = 64;
/// Replies that go before a message to somebody who never wrote has its turn, while both wait.
pub(super) const REPLIES_IN_A_ROW: u64 = 4;
/// What opening a connection is taken to need.
const CONNECTING_TAKES: Duration = Duration::from_secs(2);

/// A chat that waits for its own pace.
struct Slow {
    chat: ChatNo,
    standing: Standing,
    waiting: u64,
}

/// What is ahead of a message.
struct Ahead {
    warm: u64,
    new: u64,
    slow: Vec<Slow>,
}

impl Number {
    /// When a message to this chat would leave if it were accepted now. While the number is paused, or not connected,
    /// that is what is named.
    pub(super) fn outlook(&self, chat: Option<ChatNo>, standing: Standing, now: Timestamp) -> Outlook {
        let mut outlook = Outlook::at_once(now);
        outlook.wait_for(self.connected_at(now), Limiting::Disconnected);
        let paused = self.orders.paused(now);
        if let Some(pause) = paused {
            outlook.wait_for(pause.until, Limiting::Paused);
        }
        let Some(start) = outlook.at else { return self.named(outlook, now) };
        let held = match self.new_chats {
            NewChats::Held { until, reason } if standing == Standing::New => {
                outlook.wait_for(Some(until), Limiting::NewChatsHeld(reason));
                Some(until)
            }
            _ => None,
        };
        outlook
            .wait_for(Some(self.turn(standing, start, held, &self.ahead(standing, None, start))), Limiting::NumberRate);
        if let Some(chat) = chat {
            let ahead = self.outbox.waiting_in(chat) + self.accepting_where(|row, _| row.chat == chat);
            // The chat's own pace begins when the first that waits in it has its turn.
            let begins = self
                .outbox
                .first_waiting(chat)
                .map_or(start, |first| self.turn(standing, start, held, &self.ahead(standing, Some(first), start)));
            outlook.wait_for(Some(self.limiter.predicted_in(Some(chat), ahead as u64, begins)), Limiting::PairRate);
        }
        if standing == Standing::New && !chat.is_some_and(|chat| self.limiter.is_open(chat)) {
            outlook.wait_for(self.opening_at(chat, now), Limiting::NewRecipients);
        }
        self.named(outlook, now)
    }

    fn named(&self, mut outlook: Outlook, now: Timestamp) -> Outlook {
        if self.orders.paused(now).is_some() {
            outlook.limiting = Limiting::Paused;
        } else if !self.may_transmit() {
            outlook.limiting = Limiting::Disconnected;
        }
        outlook
    }

    /// When it will be connected, if it comes back by itself.
    fn connected_at(&self, now: Timestamp) -> Option<Timestamp> {
        match self.life.state {
            State::Online | State::Degraded if self.distrusted_since.is_none() => Some(now),
            State::Online | State::Degraded | State::AwaitingGate | State::Connecting => {
                Some(now.after(CONNECTING_TAKES))
            }
            state => state.next_attempt().map(|at| at.max(now).after(CONNECTING_TAKES)),
        }
    }

    /// When a new recipient has its turn; none: never.
    fn opening_at(&self, chat: Option<ChatNo>, now: Timestamp) -> Option<Timestamp> {
        if self.limiter.new_recipients_left(now).is_none() {
            return Some(now);
        }
        let own = chat.and_then(|chat| self.outbox.ready_in(chat));
        let heads = self.outbox.ready_new_before(own);
        let counted = self.limiter.opened().filter_map(|chat| self.outbox.ready_in(chat));
        let counted = counted.filter(|head| own.is_none_or(|own| *head < own)).count();
        let accepting = if own.is_some() { 0 } else { self.accepting_where(|_, of| of == Standing::New) };
        self.limiter.opening_at(heads.saturating_sub(counted) + accepting, now)
    }

    /// Rows on their way to the disk that will wait for their turn.
    fn accepting_where(&self, is_meant: impl Fn(&OutboxRow, Standing) -> bool) -> usize {
        let counts = |then: &&Then| matches!(then, Then::Accepted { row, standing, claimed: false, .. } if is_meant(row, *standing));
        self.pending.iter().map(|pending| pending.then.iter().filter(counts).count()).sum()
    }

    /// What has its turn before a message of this lane that is accepted now, or before a row that waits.
    fn ahead(&self, lane: Standing, row: Option<MessageSeq>, now: Timestamp) -> Ahead {
        let waiting = |of: Standing| match row.filter(|_| of == lane) {
            Some(row) => self.outbox.waiting_before(of, row) as u64,
            None => (self.outbox.waiting_of(of) + self.accepting_where(|_, standing| standing == of)) as u64,
        };
        let (warm, all_new) = (waiting(Standing::Warm), waiting(Standing::New));
        let mut slow = Vec::new();
        if warm + all_new > 0 {
            let busy = self.limiter.busy(now).filter(|chat| !self.outbox.is_deep(*chat));
            for chat in self.outbox.deep().chain(busy).take(SLOW_CHATS_MAX) {
                let standing = self.outbox.standing(chat);
                let waiting = match row.filter(|_| standing == lane) {
                    Some(row) => self.outbox.waiting_in_before(chat, row) as u64,
                    None => self.outbox.waiting_in(chat) as u64,
                };
                if waiting > 0 {
                    slow.push(Slow { chat, standing, waiting });
                }
            }
        }
        // Of those who would be new recipients only as many as the budget has room for are in anybody's way.
        let new = self.limiter.new_recipients_left(now).map_or(all_new, |left| {
            let counted = self.limiter.opened().filter(|chat| self.outbox.standing(*chat) == Standing::New);
            let counted: usize = counted.map(|chat| self.outbox.waiting_in(chat)).sum();
            all_new.min(counted as u64 + u64::from(left))
        });
        Ahead { warm, new, slow }
    }

    /// When the number's own rate has let everything go that is ahead, from `start` on. Until `held` nothing to people who never wrote leaves.
    fn turn(&self, standing: Standing, start: Timestamp, held: Option<Timestamp>, ahead: &Ahead) -> Timestamp {
        let from = held.map_or(start, |held| held.max(start));
        if ahead.warm + ahead.new == 0 {
            return self.limiter.predicted(0, from);
        }
        let gone = if from > start { self.limiter.allowed(start, from) } else { 0 };
        let leave_until = |of: Standing, total: u64, then: Timestamp| {
            let slow = ahead.slow.iter().filter(|slow| slow.standing == of);
            let late: u64 =
                slow.map(|slow| slow.waiting.saturating_sub(self.limiter.allowed_in(slow.chat, start, then))).sum();
            total.saturating_sub(late)
        };
        let before = |then: Timestamp| {
            let warm = leave_until(Standing::Warm, ahead.warm, then).saturating_sub(gone);
            let new = match self.new_chats {
                NewChats::Held { until, .. } if until > then => 0,
                _ => leave_until(Standing::New, ahead.new, then),
            };
            match standing {
                Standing::Warm => warm + new.min((self.replies_in_a_row + warm) / REPLIES_IN_A_ROW),
                Standing::New => new + warm.min(REPLIES_IN_A_ROW * (new + 1)),
            }
        };
        let mut turn = from;
        for _ in 0..ROUNDS_MAX {
            let next = self.limiter.predicted(before(turn), from).max(turn);
            if next == turn {
                return turn;
            }
            turn = next;
        }
        self.limiter.predicted(before(Timestamp(u64::MAX)), from)
    }

    /// What the number shows of its capacity. `exact`: somebody looks, and what waits is worth looking through.
    #[must_use]
    pub fn basis(&self, exact: bool, now: Timestamp) -> Basis {
        let waiting = (self.outbox.waiting() + self.accepting) as u64;
        let pause = self.orders.paused(now);
        let rough = |standing: Standing| {
            let mut outlook = Outlook::at_once(now);
            outlook.wait_for(self.connected_at(now), Limiting::Disconnected);
            if let Some(pause) = pause {
                outlook.wait_for(pause.until, Limiting::Paused);
            }
            if standing == Standing::New {
                if let NewChats::Held { until, reason } = self.new_chats {
                    outlook.wait_for(Some(until), Limiting::NewChatsHeld(reason));
                }
                if waiting == 0 {
                    outlook.wait_for(self.limiter.opening_at(0, now), Limiting::NewRecipients);
                }
            }
            if waiting > 0 {
                outlook.wait_for(Some(self.limiter.predicted(waiting, now)), Limiting::NumberRate);
            }
            self.named(outlook, now)
        };
        let look = |standing| {
            let looked = if exact && waiting > 0 { self.outlook(None, standing, now) } else { rough(standing) };
            // That time went by is no change.
            if looked.limiting == Limiting::Nothing { Outlook::at_once(Timestamp(0)) } else { looked }
        };
        Basis {
            state: self.life.state,
            since: pause.map_or(self.life.since, |pause| pause.since.max(self.life.since)),
            meter: self.limiter.meter(),
            queue_depth: self.outbox.len() as u64,
            waiting,
            new_recipients_left: self.limiter.new_recipients_left(now),
            outlook: look(Standing::Warm),
            outlook_new: look(Standing::New),
            pause,
            held: matches!(self.new_chats, NewChats::Held { .. }),
            changed_at: now,
            revision: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::id::NumberId;
    use crate::domain::limiter::{Limits, NewRecipients, Pace};
    use crate::domain::message::Content;
    use crate::domain::number::{
        Effect, Input, OnUnknown, Reply, ReplyId, SendRequest, SendingRules, Snapshot, Ticket,
    };
    use crate::domain::orders::{Pause, SendingOrders};
    use crate::domain::phone::{Contact, Phone};

    const NOW: Timestamp = Timestamp(1_700_000_000_000);

    /// A machine whose disk and WhatsApp answer at once.
    struct Bench {
        number: Number,
        now: Timestamp,
        left: Vec<(String, Timestamp)>,
        reply: Option<Reply>,
    }

    impl Bench {
        fn new(limits: Limits) -> Self {
            let rules = SendingRules { limits, on_unknown: OnUnknown::Resend };
            let (mut number, _) = Number::restore(NumberId(1), Snapshot::default(), rules, NOW);
            number.pending.clear();
            number.life.state = State::Online;
            let mut bench = Self { number, now: NOW, left: Vec::new(), reply: None };
            bench.step(Input::Tick);
            bench
        }

        fn step(&mut self, input: Input) {
            let mut inputs = std::collections::VecDeque::from([input]);
            while let Some(input) = inputs.pop_front() {
                let (mut stored, mut acked): (Vec<Ticket>, Vec<String>) = Default::default();
                for effect in self.number.step(input, self.now) {
                    match effect {
                        Effect::Commit(commit) => stored.push(commit.ticket),
                        Effect::Transmit(transmit) => acked.push(transmit.whatsapp_id),
                        Effect::Reply(_, reply) => self.reply = Some(reply),
                        _ => {}
                    }
                }
                inputs.extend(stored.into_iter().map(|ticket| Input::Stored(ticket, true)));
                for whatsapp_id in acked {
                    self.left.push((whatsapp_id.clone(), self.now));
                    inputs.push_back(Input::Acked { whatsapp_id, error: None });
                }
            }
        }

        fn send(&mut self, person: u64, standing: Standing, id: &str, max_wait: Option<Duration>) -> Reply {
            let request = SendRequest {
                to: Contact::of_phone(Phone::parse(&(5_511_900_000_000 + person).to_string()).unwrap()),
                chat: None,
                standing,
                content: Content::Text("hello".to_owned()),
                send_at: None,
                expires_at: None,
                whatsapp_id: id.to_owned(),
                correlation_id: None,
                idempotency: None,
                max_wait,
            };
            self.step(Input::Send(Box::new(request), ReplyId(1)));
            self.reply.take().unwrap()
        }

        /// Lets time pass until the message has left; gives how long that took.
        fn run_until_left(&mut self, id: &str) -> Duration {
            let begun = self.now;
            for _ in 0..1_000_000 {
                if let Some((_, at)) = self.left.iter().find(|(left, _)| left == id) {
                    return at.since(begun);
                }
                let due = self.number.next_wake().expect("something is due");
                self.now = due.max(Timestamp(self.now.0 + 1));
                self.step(Input::Tick);
            }
            panic!("it never leaves");
        }
    }

    fn wait_of(reply: Reply) -> Option<Duration> {
        let Reply::Accepted { predicted_wait, .. } = reply else { panic!("{reply:?}") };
        predicted_wait
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// The bound that the contract states, for whatever waits.
        #[test]
        fn the_predicted_wait_is_what_happens(
            interval in 1u64..2000, burst in 1u32..6, chat_interval in 0u64..20_000, chat_burst in 1u32..5,
            queue in proptest::collection::vec((0u64..12, 0u64..10), 0..250),
            last in (0u64..14, 0u64..10), pause in proptest::option::of(0u64..100_000),
        ) {
            let limits = Limits {
                number: Pace { interval: Duration::from_millis(interval), burst },
                chat: Pace { interval: Duration::from_millis(chat_interval), burst: chat_burst },
                new_recipients: NewRecipients::Unlimited,
            };
            let mut bench = Bench::new(limits);
            if let Some(pause) = pause {
                let until = Some(NOW.after(Duration::from_millis(1 + pause)));
                let pause = Some(Pause { since: NOW, until });
                bench.step(Input::Orders(SendingOrders { pause, ..SendingOrders::default() }));
            }
            // Every third person has written.
            let standing = |person: u64| if person.is_multiple_of(3) { Standing::Warm } else { Standing::New };
            for (index, (person, pick)) in queue.into_iter().enumerate() {
                let person = if pick < 5 { person } else { 100 + index as u64 * 3 + pick % 3 };
                bench.send(person, standing(person), &format!("Q{index}"), None);
            }
            let predicted = wait_of(bench.send(last.0, standing(last.0), "LAST", None)).unwrap();
            let real = bench.run_until_left("LAST");
            let margin = real.max(predicted) / 5 + 3 * Duration::from_millis(interval) + limits.chat.interval;
            prop_assert!(predicted.abs_diff(real) <= margin, "predicted {predicted:?}, took {real:?}");
        }
    }

    #[test]
    fn replies_do_not_wait_behind_people_who_never_wrote() {
        let pace = Pace { interval: Duration::from_secs(1), burst: 1 };
        let limits = Limits { number: pace, chat: pace, new_recipients: NewRecipients::Unlimited };
        let mut bench = Bench::new(limits);
        for person in 0..1000 {
            bench.send(person, Standing::New, &format!("N{person}"), None);
        }
        let predicted = wait_of(bench.send(2000, Standing::Warm, "R", None)).unwrap();
        assert!(predicted <= Duration::from_secs(2), "{predicted:?}");
        assert!(bench.run_until_left("R") <= Duration::from_secs(2));
        // And people who never wrote do not starve behind replies.
        for person in 3000..3100 {
            bench.send(person, Standing::Warm, &format!("W{person}"), None);
        }
        let left = bench.left.len();
        bench.run_until_left("W3099");
        let new = bench.left[left..].iter().filter(|(id, _)| id.starts_with('N')).count();
        assert!((20..=26).contains(&new), "{new} of {}", bench.left.len() - left);
    }

    #[test]
    fn the_budget_of_new_recipients_is_waited_for_and_named() {
        let fast = Pace { interval: Duration::from_millis(1), burst: 100 };
        let limits = Limits { number: fast, chat: fast, new_recipients: NewRecipients::PerDay(2) };
        let mut bench = Bench::new(limits);
        let day = Duration::from_secs(24 * 3600);
        for (person, predicted) in [(1, Duration::ZERO), (2, Duration::ZERO), (3, day), (4, day), (5, 2 * day)] {
            let wait = wait_of(bench.send(person, Standing::New, &format!("N{person}"), None)).unwrap();
            assert!(wait.abs_diff(predicted) < Duration::from_secs(1), "{person}: {wait:?}");
        }
        assert_eq!(wait_of(bench.send(9, Standing::Warm, "R", None)), Some(Duration::ZERO));
        let refused = bench.send(6, Standing::New, "N6", Some(day));
        let Reply::WaitTooLong { wait: Some(wait), limiting: Limiting::NewRecipients } = refused else {
            panic!("{refused:?}")
        };
        assert!(wait > day);
        let took = bench.run_until_left("N5");
        assert!(took.abs_diff(2 * day) < Duration::from_secs(1), "{took:?}");
    }

    #[test]
    fn what_would_wait_too_long_is_refused_with_the_reason_and_leaves_nothing_behind() {
        let mut bench = Bench::new(Limits::LINKED);
        let zero = Some(Duration::ZERO);
        for count in 0..5 {
            assert_eq!(wait_of(bench.send(1, Standing::Warm, &format!("A{count}"), zero)), Some(Duration::ZERO));
        }
        let refused = |bench: &mut Bench, person| match bench.send(person, Standing::Warm, "X", zero) {
            Reply::WaitTooLong { wait, limiting } => (wait.map(|wait| wait.as_secs()), limiting),
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&mut bench, 2), (Some(1), Limiting::NumberRate));
        assert_eq!(refused(&mut bench, 1), (Some(6), Limiting::PairRate));
        let pause = Some(Pause { since: NOW, until: None });
        bench.step(Input::Orders(SendingOrders { pause, ..SendingOrders::default() }));
        assert_eq!(refused(&mut bench, 2), (None, Limiting::Paused));
        assert_eq!(wait_of(bench.send(2, Standing::Warm, "P", None)), None, "accepted, and it waits");
        bench.step(Input::Orders(SendingOrders::default()));
        bench.number.life.state = State::Stopped;
        assert_eq!(refused(&mut bench, 2), (None, Limiting::Disconnected));
        assert_eq!(bench.number.outbox().len(), 1);
    }

    #[test]
    fn other_limits_hold_at_once_and_what_was_sent_still_counts() {
        let mut bench = Bench::new(Limits::LINKED);
        for person in 0..6 {
            bench.send(person, Standing::Warm, &format!("A{person}"), None);
        }
        assert_eq!(bench.left.len(), 5);
        let mut orders = SendingOrders::default();
        orders.limits.burst = Some(7);
        bench.step(Input::Orders(orders));
        assert_eq!(bench.left.len(), 6, "one more may go at once");
        orders.limits.burst = Some(1);
        bench.step(Input::Orders(orders));
        assert_eq!(bench.number.basis(true, bench.now).at(bench.now).available_now, 0);
        let wait = wait_of(bench.send(7, Standing::Warm, "LAST", None)).unwrap();
        assert_eq!(wait, Duration::from_secs(1), "what is owed is never more than a full burst");
    }
}
