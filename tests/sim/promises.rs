//! What the daemon promises, checked from outside: by what reached the platter, the wire, the callers and the
//! endpoints, never by what the machine says of itself. A broken promise panics.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use switchboard::domain::change::{Change, IdempotencyKey};
use switchboard::domain::delivery::{self, Endpoint};
use switchboard::domain::event::{Event, EventBody};
use switchboard::domain::id::{ChatNo, EventSeq, MessageSeq};
use switchboard::domain::lifecycle::{Desired, Life, State};
use switchboard::domain::message::{Direction, MessageRecord, MessageStatus};
use switchboard::domain::number::{Commit, Transmit};
use switchboard::domain::time::Timestamp;

use super::disk::Records;
use super::people;

/// What makes an inbound message the same one, as its sender sees it.
pub(crate) type InboundName = (u64, Direction, String, String);

/// A time in which nothing may connect.
#[derive(Debug, Clone, Copy)]
enum Quiet {
    Until(Timestamp),
    UntilTold,
}

/// The ledger.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    accepted: BTreeMap<MessageSeq, String>,
    answered: HashMap<IdempotencyKey, ([u8; 32], MessageSeq)>,
    rungs: HashMap<MessageSeq, u8>,
    inbound: HashMap<InboundName, MessageSeq>,
    chats: HashMap<u64, ChatNo>,
    /// Attempts handed to the session.
    transmitted: HashMap<MessageSeq, u16>,
    first_sent: HashMap<ChatNo, MessageSeq>,
    flying: HashMap<ChatNo, MessageSeq>,
    /// What people see: by person and WhatsApp's id.
    shown: HashMap<(u64, String), String>,
    pub(crate) repeats: u64,
    pub(crate) transmits: u64,
    /// Endpoints that were promised to the owner, as events recorded now must see them.
    endpoints: BTreeMap<u32, Endpoint>,
    owed: BTreeSet<(u32, EventSeq)>,
    received: HashMap<(u32, EventSeq), EventBody>,
    last_received: HashMap<(u32, Option<ChatNo>), EventSeq>,
    delivering: BTreeSet<(u32, EventSeq)>,
    quiet: Option<Quiet>,
}

pub(crate) fn rung(status: MessageStatus) -> u8 {
    match status {
        MessageStatus::Queued => 0,
        MessageStatus::Failed | MessageStatus::Cancelled | MessageStatus::Expired => 1,
        MessageStatus::Sent => 2,
        MessageStatus::Delivered => 3,
        MessageStatus::Read => 4,
        MessageStatus::Played => 5,
    }
}

impl Promises {
    // === the disk ===

    /// A commit was ordered: every endpoint that wants one of its events has its row in it.
    pub(crate) fn ordered(&self, commit: &Commit) {
        for change in &commit.changes {
            let Change::Event(event) = change else { continue };
            for endpoint in self.endpoints.values().filter(|endpoint| endpoint.filter.wants(event.kind())) {
                let row = commit.changes.iter().any(
                    |change| matches!(change, Change::Delivery(to, row) if *to == endpoint.ordinal && row.event == event.id.seq),
                );
                assert!(row, "event {:?} has no row for endpoint {}", event.id.seq, endpoint.ordinal);
            }
        }
    }

    /// A unit reaches the platter; `before` is what was there.
    pub(crate) fn flushing(&mut self, changes: &[Change], before: &Records) {
        let mut events = before.counters.event;
        for change in changes {
            match change {
                Change::Message(record) => self.message_flushed(record, changes, before),
                Change::Progress(seq, progress) => {
                    let old = before.progress.get(seq).map_or(0, |progress| rung(progress.status));
                    assert!(rung(progress.status) > old, "{seq:?} does not climb: {old} to {:?}", progress.status);
                }
                Change::Outbox(row) => {
                    let settled = before.progress.contains_key(&row.seq);
                    assert!(!settled, "{:?} is settled and returns to the outbox", row.seq);
                }
                Change::OutboxGone(seq) => {
                    let settled = changes.iter().any(|other| matches!(other, Change::Progress(of, _) if of == seq));
                    assert!(settled || before.progress.contains_key(seq), "{seq:?} left the outbox without an outcome");
                }
                Change::Idempotency(key, _) => {
                    assert!(!before.idempotency.contains_key(key), "a request id was taken twice");
                }
                Change::Chat(chat, contact) => {
                    let person = people::person(contact);
                    let known = *self.chats.entry(person).or_insert(*chat);
                    assert_eq!(known, *chat, "person {person} got a second chat");
                }
                Change::Event(event) => {
                    events += 1;
                    assert_eq!(event.id.seq, EventSeq(events), "the event log has a gap");
                    self.event_flushed(event);
                }
                Change::Delivery(endpoint, row) if row.attempts == 0 && self.endpoints.contains_key(endpoint) => {
                    self.owed.insert((*endpoint, row.event));
                }
                Change::DeadLetter(endpoint, row) => drop(self.owed.remove(&(*endpoint, row.event))),
                Change::Counters(counters) => {
                    let old = before.counters;
                    let back = counters.message < old.message
                        || counters.event < old.event
                        || counters.chat < old.chat
                        || counters.endpoint < old.endpoint;
                    assert!(!back, "a counter went back: {old:?} to {counters:?}");
                }
                _ => {}
            }
        }
        let counted = changes.iter().rev().find_map(|change| match change {
            Change::Counters(counters) => Some(counters.event),
            _ => None,
        });
        assert!(events == before.counters.event || counted == Some(events), "events without their counter");
    }

    fn message_flushed(&mut self, record: &MessageRecord, changes: &[Change], before: &Records) {
        assert!(!before.messages.contains_key(&record.seq), "{:?} was written twice", record.seq);
        let in_unit = changes.iter().find_map(|change| match change {
            Change::Chat(chat, contact) if *chat == record.chat => Some(contact),
            _ => None,
        });
        let contact = in_unit.or_else(|| before.chats.get(&record.chat));
        let Some(contact) = contact else { panic!("{:?} is filed in a chat nobody can find", record.seq) };
        let person = people::person(contact);
        if record.direction != Direction::Outbound {
            let name = (person, record.direction, record.whatsapp_id.clone(), record.content.text().to_owned());
            let twice = self.inbound.insert(name, record.seq);
            assert_eq!(twice, None, "inbound {:?} is in the history twice", record.seq);
        }
    }

    fn event_flushed(&mut self, event: &Event) {
        let EventBody::Outbound(body) = &event.body else { return };
        let told = self.rungs.entry(body.message.seq).or_default();
        assert!(rung(body.status) > *told, "{:?} is told to go from {told} to {:?}", body.message.seq, body.status);
        *told = rung(body.status);
    }

    // === callers ===

    pub(crate) fn accepted(
        &mut self,
        seq: MessageSeq,
        request: Option<(IdempotencyKey, [u8; 32])>,
        text: &str,
        durable: &Records,
    ) {
        let Some(record) = durable.messages.get(&seq) else { panic!("{seq:?} was answered before it was durable") };
        assert_eq!(record.content.text(), text, "{seq:?} says something else than was asked");
        self.accepted.insert(seq, record.whatsapp_id.clone());
        if let Some((key, body)) = request {
            let first = *self.answered.entry(key).or_insert((body, seq));
            assert_eq!(first, (body, seq), "one request id, two messages");
        }
    }

    pub(crate) fn inbound_acknowledged(&self, name: &InboundName) {
        assert!(self.inbound.contains_key(name), "inbound {name:?} was acknowledged before it was durable");
    }

    // === the wire ===

    pub(crate) fn transmitting(&mut self, transmit: &Transmit, life: &Life, durable: &Records) {
        let seq = transmit.seq;
        assert_eq!(life.state, State::Online, "{seq:?} is transmitted while the number is not online");
        let Some(row) = durable.outbox.get(&seq) else { panic!("{seq:?} is transmitted without a durable row") };
        let sent = self.transmitted.entry(seq).or_default();
        *sent += 1;
        assert!(*sent <= row.attempts, "{seq:?}: transmission {sent}, but {} attempts are durable", row.attempts);
        assert_eq!((&row.whatsapp_id, &row.to), (&transmit.whatsapp_id, &transmit.to), "{seq:?} changed its name");
        if *sent == 1 {
            let last = self.first_sent.insert(row.chat, seq);
            assert!(last < Some(seq), "{seq:?} follows {last:?} in one chat");
        }
        let other = self.flying.insert(row.chat, seq);
        assert_eq!(other, None, "{seq:?} leaves while its chat has one in flight");
        assert!(self.flying.len() <= switchboard::domain::outbox::IN_FLIGHT_MAX, "too many in flight");
        self.transmits += 1;
        self.repeats += u64::from(*sent > 1);
    }

    /// An attempt ended, as far as the machine has been told.
    pub(crate) fn landed(&mut self, seq: MessageSeq, visible: &Records) {
        if let Some(record) = visible.messages.get(&seq)
            && self.flying.get(&record.chat) == Some(&seq)
        {
            self.flying.remove(&record.chat);
        }
    }

    /// Every attempt ended: the connection is gone.
    pub(crate) fn all_landed(&mut self) {
        self.flying.clear();
    }

    /// A person's phone gets a message. Gives whether it shows: the first time only.
    pub(crate) fn arrived_at_phone(&mut self, transmit: &Transmit, text: &str) -> bool {
        let name = (people::person(&transmit.to), transmit.whatsapp_id.clone());
        match self.shown.get(&name) {
            Some(first) => {
                assert_eq!(first, text, "{:?} was repeated with another text", transmit.seq);
                false
            }
            None => {
                self.shown.insert(name, text.to_owned());
                true
            }
        }
    }

    // === endpoints ===

    pub(crate) fn endpoint_added(&mut self, endpoint: Endpoint, durable: &Records) {
        assert!(durable.endpoints.contains_key(&endpoint.ordinal), "an endpoint was answered before it was durable");
        self.endpoints.insert(endpoint.ordinal, endpoint);
        assert!(self.endpoints.len() <= delivery::ENDPOINTS_MAX, "too many endpoints");
    }

    pub(crate) fn endpoint_gone(&mut self, ordinal: u32) {
        self.endpoints.remove(&ordinal);
        self.owed.retain(|(endpoint, _)| *endpoint != ordinal);
    }

    pub(crate) fn endpoints(&self) -> impl Iterator<Item = u32> {
        self.endpoints.keys().copied()
    }

    pub(crate) fn delivering(&mut self, endpoint: u32, event: EventSeq, durable: &Records) {
        assert!(durable.events.contains_key(&event), "{event:?} is delivered before it is durable");
        assert!(self.delivering.insert((endpoint, event)), "{event:?} is under way twice to endpoint {endpoint}");
        let range = (endpoint, EventSeq(0))..=(endpoint, EventSeq(u64::MAX));
        assert!(self.delivering.range(range).count() <= delivery::IN_FLIGHT_MAX, "too many requests to {endpoint}");
    }

    pub(crate) fn delivered(&mut self, endpoint: u32, event: &Event) {
        let seq = event.id.seq;
        match self.received.get(&(endpoint, seq)) {
            Some(first) => assert_eq!(*first, event.body, "{seq:?} was another event before"),
            None => {
                let last = self.last_received.insert((endpoint, event.chat()), seq);
                assert!(last < Some(seq), "endpoint {endpoint} got {seq:?} after {last:?} of the same chat");
                self.received.insert((endpoint, seq), event.body.clone());
            }
        }
        self.owed.remove(&(endpoint, seq));
    }

    pub(crate) fn request_ended(&mut self, endpoint: u32, event: EventSeq) {
        self.delivering.remove(&(endpoint, event));
    }

    pub(crate) fn is_delivering(&self) -> bool {
        !self.delivering.is_empty()
    }

    pub(crate) fn events_visible(&self, seq: EventSeq, durable: &Records) {
        assert!(durable.counters.event >= seq.0, "{seq:?} is shown to streams before it is durable");
    }

    // === connecting ===

    pub(crate) fn state_changed(&mut self, to: State) {
        self.quiet = match to {
            State::Parked { until } => Some(Quiet::Until(until)),
            State::LoggedOut | State::Replaced | State::Stopped | State::Unlinked => Some(Quiet::UntilTold),
            _ => None,
        };
    }

    /// The operator's word ends a quiet time.
    pub(crate) fn told(&mut self) {
        self.quiet = None;
    }

    pub(crate) fn asking_the_gate(&self, now: Timestamp) {
        match self.quiet {
            None => {}
            Some(Quiet::Until(until)) => assert!(now >= until, "asks the gate before {until}"),
            Some(Quiet::UntilTold) => panic!("asks the gate although nobody said so"),
        }
    }

    // === ends ===

    /// The process is gone; what the next one knows is on disk.
    pub(crate) fn crashed(&mut self, durable: &Records) {
        self.flying.clear();
        self.delivering.clear();
        self.endpoints = durable
            .endpoints
            .iter()
            .filter(|(_, endpoint)| endpoint.active)
            .map(|(ordinal, endpoint)| (*ordinal, endpoint.clone()))
            .collect();
        self.owed.retain(|(endpoint, _)| durable.endpoints.get(endpoint).is_some_and(|endpoint| endpoint.active));
        match &durable.life {
            Some(life) if life.desired == Desired::Stopped => self.state_changed(State::Stopped),
            // Credentials may be on disk although the phone's consent is not noted yet.
            Some(life) if life.state != State::Linking => self.state_changed(life.state),
            _ => self.quiet = None,
        }
    }

    /// After the storm, with everything answered: nothing is owed to anybody.
    pub(crate) fn all_kept(&self, durable: &Records) {
        assert!(self.owed.is_empty(), "endpoints still wait for {:?}", self.owed);
        for (seq, whatsapp_id) in &self.accepted {
            let person = people::person(&durable.chats[&durable.messages[seq].chat]);
            let failed = durable.progress.get(seq).is_some_and(|progress| rung(progress.status) == 1);
            let text = self.shown.get(&(person, whatsapp_id.clone()));
            assert!(failed || text.is_some(), "{seq:?} was accepted and is neither shown nor failed");
            let same = text.is_none_or(|text| text == durable.messages[seq].content.text());
            assert!(same, "{seq:?} shows another text");
        }
    }

    pub(crate) fn owes_nothing(&self) -> bool {
        self.owed.is_empty()
    }
}
