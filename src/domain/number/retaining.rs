//! What the number forgets: one pass after the other over what is too old, a bounded batch at a time. The shell looks
//! and reports; what happened meanwhile is known here, so here is decided what goes.

use std::collections::{BTreeSet, VecDeque};

use super::erasing::ERASURES_MAX;
use super::interface::{Counted, Effect, Ticket};
use super::machine::{Draft, Number, Then};
use crate::domain::change::Change;
use crate::domain::id::{ChatNo, EventSeq, MessageSeq, NumberId};
use crate::domain::retention::{Erasure, Found, Removal, Retention, Rules, SEEN_KEPT, SWEEP_PAUSE, Sweep, before};
use crate::domain::time::Timestamp;

/// One part of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    ErasedMessages(ChatNo),
    ErasedEvents(ChatNo),
    ErasedContact(ChatNo),
    Erased(ChatNo),
    Idempotency,
    Seen,
    Messages,
    EventAge,
    Events,
    DeadLetters(u32),
    Attempts(u32),
    Orphans,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// The next pass begins then.
    Resting(Timestamp),
    /// The next batch is looked for then.
    Pausing(Timestamp, Sweep),
    /// The shell looks.
    Looking,
    /// What goes is on its way to the disk.
    Removing(Option<Sweep>),
}

/// What the number knows of its forgetting.
#[derive(Debug)]
pub(super) struct Retaining {
    rules: Rules,
    phase: Phase,
    parts: VecDeque<Part>,
    /// Contacts being erased.
    pub(super) erasures: Vec<Erasure>,
    /// Orders to erase that are on their way to the disk.
    pub(super) ordered: Vec<ChatNo>,
    /// Contacts erased lately: a receipt may still name a message of theirs.
    erased: VecDeque<Erasure>,
    /// Chats with a message that the look under way may not have seen.
    used_chats: BTreeSet<ChatNo>,
    /// Chats with a message on its way to the disk, and the last commit it may be in.
    pending_chats: VecDeque<(Ticket, ChatNo)>,
    /// History rows up to here are gone, except those that are not settled.
    gone_through: MessageSeq,
    /// Attempts logged since they were last counted; at the start nobody knows.
    attempts: Option<u32>,
    /// How many of an endpoint's attempts this pass leaves; unset when there cannot be more.
    keep_attempts: Option<u32>,
}

impl Retaining {
    pub(super) fn new(rules: Rules, erasures: Vec<Erasure>, number: NumberId, now: Timestamp) -> Self {
        // What was begun is finished first.
        let first = if erasures.is_empty() { rules.next_pass(number, now) } else { now };
        Self {
            rules,
            phase: Phase::Resting(first),
            parts: VecDeque::new(),
            erasures,
            ordered: Vec::new(),
            erased: VecDeque::new(),
            used_chats: BTreeSet::new(),
            pending_chats: VecDeque::new(),
            gone_through: MessageSeq(0),
            attempts: None,
            keep_attempts: None,
        }
    }

    pub(super) fn next_wake(&self) -> Option<Timestamp> {
        match &self.phase {
            Phase::Resting(at) | Phase::Pausing(at, _) => Some(*at),
            Phase::Looking | Phase::Removing(_) => None,
        }
    }

    pub(super) fn relays_only(&self) -> bool {
        self.rules.retention == Retention::RelayOnly
    }

    /// A chat gets a message, by a commit no later than this one.
    pub(super) fn chat_used(&mut self, chat: ChatNo, commit: Ticket) {
        self.pending_chats.push_back((commit, chat));
        if self.phase == Phase::Looking {
            self.used_chats.insert(chat);
        }
    }

    pub(super) fn stored(&mut self, ticket: Ticket) {
        while self.pending_chats.front().is_some_and(|(commit, _)| *commit <= ticket) {
            self.pending_chats.pop_front();
        }
    }

    /// Whether a message is of a contact that is being erased, or was lately.
    fn is_erased(&self, seq: MessageSeq, chat: ChatNo) -> bool {
        let mut all = self.erasures.iter().chain(&self.erased);
        all.any(|erasure| erasure.chat == chat && seq <= erasure.through)
    }

    pub(super) fn erasure_done(&mut self, chat: ChatNo) {
        let Some(index) = self.erasures.iter().position(|erasure| erasure.chat == chat) else { return };
        if self.erased.len() >= ERASURES_MAX {
            self.erased.pop_front();
        }
        self.erased.push_back(self.erasures.remove(index));
    }

    pub(super) fn attempt_logged(&mut self) {
        self.attempts = self.attempts.map(|count| count.saturating_add(1));
    }
}

impl Number {
    /// The number's retention was set, or found out at the start.
    pub(super) fn on_retention(&mut self, retention: Retention, now: Timestamp, draft: &mut Draft) {
        if self.retaining.rules.retention != retention {
            self.retaining.rules.retention = retention;
            self.sweep_soon(now);
        }
        self.agree_with_retention(draft);
    }

    /// Notes since when the number only relays: everything up to there goes.
    pub(super) fn agree_with_retention(&mut self, draft: &mut Draft) {
        let since = match (self.retaining.relays_only(), self.counters.relays_since) {
            (true, None) => Some(MessageSeq(self.counters.message)),
            (true, since) => since,
            (false, _) => None,
        };
        if since != self.counters.relays_since {
            self.counters.relays_since = since;
            draft.changes.push(Change::Counters(self.counters));
            draft.durable = true;
        }
    }

    /// Begins a pass now; one that is under way begins again after its present batch.
    pub(super) fn sweep_soon(&mut self, now: Timestamp) {
        match self.retaining.phase {
            Phase::Resting(_) | Phase::Pausing(..) => self.retaining.phase = Phase::Resting(now),
            Phase::Looking => self.begin_pass(),
            Phase::Removing(_) => {
                self.begin_pass();
                self.retaining.phase = Phase::Removing(None);
            }
        }
    }

    fn begin_pass(&mut self) {
        let Retaining { attempts, rules, .. } = &self.retaining;
        self.retaining.keep_attempts = (*attempts != Some(0)).then_some(rules.policy.attempts_max);
        self.retaining.attempts = Some(0);
        let mut parts = VecDeque::new();
        let Retaining { erasures, ordered, .. } = &self.retaining;
        for Erasure { chat, .. } in erasures.iter().filter(|erasure| !ordered.contains(&erasure.chat)) {
            parts.extend([Part::ErasedMessages(*chat), Part::ErasedEvents(*chat)]);
            parts.extend([Part::ErasedContact(*chat), Part::Erased(*chat)]);
        }
        parts.extend([Part::Idempotency, Part::Seen, Part::Messages, Part::EventAge]);
        for endpoint in self.deliveries.endpoints() {
            parts.push_back(Part::DeadLetters(endpoint.ordinal));
            parts.push_back(Part::Attempts(endpoint.ordinal));
        }
        // After the dead letters: what they held can go in the same pass.
        parts.extend([Part::Orphans, Part::Events]);
        self.retaining.parts = parts;
    }

    pub(super) fn sweep_if_due(&mut self, now: Timestamp, draft: &mut Draft) {
        if self.draining {
            return;
        }
        match &self.retaining.phase {
            Phase::Resting(at) if *at <= now => {
                self.begin_pass();
                self.sweep_next_part(now, draft);
            }
            Phase::Pausing(at, sweep) if *at <= now => {
                let sweep = sweep.clone();
                self.look(sweep, draft);
            }
            Phase::Resting(_) | Phase::Pausing(..) | Phase::Looking | Phase::Removing(_) => {}
        }
    }

    fn sweep_next_part(&mut self, now: Timestamp, draft: &mut Draft) {
        while let Some(part) = self.retaining.parts.pop_front() {
            if let Part::Erased(chat) = part {
                self.erased(chat, draft);
                continue;
            }
            if let Some(sweep) = self.sweep_of(part, now) {
                return self.look(sweep, draft);
            }
        }
        draft.effects.push(Effect::Count(Counted::SweepPassed));
        self.retaining.phase = Phase::Resting(self.retaining.rules.next_pass(self.id, now));
    }

    fn look(&mut self, sweep: Sweep, draft: &mut Draft) {
        self.retaining.used_chats = self.retaining.pending_chats.iter().map(|(_, chat)| *chat).collect();
        self.retaining.phase = Phase::Looking;
        draft.effects.push(Effect::Sweep(sweep));
    }

    fn sweep_of(&self, part: Part, now: Timestamp) -> Option<Sweep> {
        let rules = &self.retaining.rules;
        let erasure = |chat| self.retaining.erasures.iter().find(|erasure| erasure.chat == chat).copied();
        Some(match part {
            Part::ErasedMessages(chat) => Sweep::ErasedMessages { erasure: erasure(chat)?, after: MessageSeq(0) },
            Part::ErasedEvents(chat) => Sweep::ErasedEvents { erasure: erasure(chat)?, after: EventSeq(0) },
            Part::ErasedContact(chat) => Sweep::ErasedContact(erasure(chat)?),
            Part::Erased(_) => return None,
            Part::Idempotency => Sweep::Idempotency(now),
            Part::Seen => Sweep::Seen(before(now, SEEN_KEPT)),
            Part::Messages => {
                let through = self.counters.relays_since.unwrap_or(MessageSeq(0));
                let before = rules.messages_before(now);
                if through == MessageSeq(0) && before == Timestamp(0) {
                    return None;
                }
                Sweep::Messages { after: MessageSeq(0), through, before }
            }
            Part::EventAge => {
                Sweep::EventAge { after: EventSeq(self.counters.event_floor), before: rules.events_before(now) }
            }
            Part::Events => Sweep::Events {
                after: EventSeq(0),
                through: EventSeq(self.counters.event_floor),
                dead_letters_hold: rules.retention != Retention::RelayOnly,
                endpoints: self.known_endpoints(),
            },
            Part::DeadLetters(endpoint) => {
                Sweep::DeadLetters { endpoint, after: EventSeq(0), before: rules.dead_letters_before(now) }
            }
            Part::Attempts(endpoint) => {
                let (before, keep) = (rules.attempts_before(now), self.retaining.keep_attempts);
                Sweep::Attempts { endpoint, before, keep }
            }
            Part::Orphans => Sweep::Orphans { living: self.known_endpoints(), through: self.counters.endpoint },
        })
    }

    /// The endpoints, those being added included.
    fn known_endpoints(&self) -> Vec<u32> {
        let added = self.pending.iter().flat_map(|pending| &pending.then).filter_map(|then| match then {
            Then::EndpointAdded(endpoint) => Some(endpoint.ordinal),
            _ => None,
        });
        self.deliveries.endpoints().map(|endpoint| endpoint.ordinal).chain(added).collect()
    }

    pub(super) fn on_swept(&mut self, found: Found, now: Timestamp, draft: &mut Draft) {
        if self.retaining.phase != Phase::Looking {
            return;
        }
        if self.draining {
            self.retaining.phase = Phase::Resting(now);
            return;
        }
        let next = found.next.clone();
        let before = draft.changes.len();
        self.raise_floor(&found, draft);
        self.forget(found.removals, draft);
        if draft.changes.len() > before {
            self.retaining.phase = Phase::Removing(next);
            draft.then.push(Then::Swept);
        } else {
            self.after_batch(next, now, draft);
        }
    }

    /// A batch is off the disk, or there was nothing to remove.
    pub(super) fn after_batch(&mut self, next: Option<Sweep>, now: Timestamp, draft: &mut Draft) {
        match next {
            Some(sweep) => self.retaining.phase = Phase::Pausing(now.after(SWEEP_PAUSE), sweep),
            None if self.draining => self.retaining.phase = Phase::Resting(now),
            None => self.sweep_next_part(now, draft),
        }
    }

    pub(super) fn removed(&mut self, now: Timestamp, draft: &mut Draft) {
        if let Phase::Removing(next) = self.retaining.phase.clone() {
            self.after_batch(next, now, draft);
        }
    }

    /// Moves the start of the event log: by age, and by number.
    fn raise_floor(&mut self, found: &Found, draft: &mut Draft) {
        let Some(aged) = found.aged else { return };
        let crowded = self.counters.event.saturating_sub(self.retaining.rules.policy.events_max);
        let floor = aged.0.max(crowded);
        if floor > self.counters.event_floor {
            self.counters.event_floor = floor;
            draft.changes.push(Change::Counters(self.counters));
            draft.then.push(Then::EventFloor(EventSeq(floor)));
        }
    }

    /// Removes what was found, except what is needed again or still.
    fn forget(&mut self, removals: Vec<Removal>, draft: &mut Draft) {
        let mut kept_chats = BTreeSet::new();
        let before = draft.changes.len();
        let counted = self.counters;
        for removal in removals {
            match &removal {
                Removal::Message { seq, chat, .. } if self.is_unsettled(*seq) => {
                    kept_chats.insert(*chat);
                    continue;
                }
                Removal::Message { seq, chat, .. } => {
                    // Of a contact that is being erased only its own rows go; otherwise everything older went before.
                    if !self.retaining.is_erased(*seq, *chat) {
                        self.retaining.gone_through = self.retaining.gone_through.max(*seq);
                    }
                    self.counters.messages_removed += 1;
                }
                Removal::Chat(chat) | Removal::Contact(chat, _) => {
                    if kept_chats.contains(chat) || self.retaining.used_chats.contains(chat) {
                        continue;
                    }
                    self.fresh_chats.retain(|(_, known)| known != chat);
                }
                Removal::Event(seq) if seq.0 > self.counters.event_floor || self.is_sent_again(*seq) => continue,
                Removal::Event(_) => self.counters.events_removed += 1,
                Removal::Idempotency(..)
                | Removal::Seen(..)
                | Removal::EventBody(..)
                | Removal::Delivery(..)
                | Removal::DeadLetter(..)
                | Removal::Attempt(..)
                | Removal::EndpointState(_) => {}
            }
            draft.changes.push(Change::Removed(removal));
        }
        let count = draft.changes.len() - before;
        if self.counters != counted {
            draft.changes.push(Change::Counters(self.counters));
        }
        if count > 0 {
            draft.effects.push(Effect::Count(Counted::Swept(count as u64)));
        }
    }

    /// Whether an event left the dead letters or the log for a queue, which the look may not have seen.
    fn is_sent_again(&self, event: EventSeq) -> bool {
        let being_queued = |then: &Then| matches!(then, Then::Enqueued(_, row) if row.event == event);
        self.deliveries.holds_aside(event) || self.pending.iter().any(|pending| pending.then.iter().any(being_queued))
    }

    fn is_unsettled(&self, seq: MessageSeq) -> bool {
        let being_accepted = |then: &Then| matches!(then, Then::Accepted { row, .. } if row.seq == seq);
        self.outbox.row(seq).is_some() || self.pending.iter().any(|pending| pending.then.iter().any(being_accepted))
    }

    /// Whether a message is off the disk, or on its way off it: nothing new is noted of it.
    pub(super) fn is_forgotten(&self, seq: MessageSeq, chat: ChatNo) -> bool {
        let gone = seq <= self.retaining.gone_through || self.retaining.is_erased(seq, chat);
        gone && !self.is_unsettled(seq)
    }
}
