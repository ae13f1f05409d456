//! What is promised to webhook endpoints, checked from outside: every event queued in the commit that tells of it, none
//! lost, named without a hole, in order within its chat unless a gap is declared, replays complete.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use switchboard::domain::change::Change;
use switchboard::domain::delivery::{self, Course, Dispatch};
use switchboard::domain::endpoint::{DeliverySeq, ENDPOINTS_MAX, Endpoint, Replay};
use switchboard::domain::event::{Event, EventBody, EventKind};
use switchboard::domain::id::{ChatNo, EventSeq};
use switchboard::domain::number::Commit;
use switchboard::domain::retention::Removal;

use super::disk::Records;

/// Kinds that every filter of this world wants.
pub(crate) const WANTED_BY_ALL: [EventKind; 3] =
    [EventKind::MessageReceived, EventKind::MessageDelivered, EventKind::NumberConnected];

/// Deliveries of an endpoint are named within it.
type Name = (u32, DeliverySeq);

/// The ledger of the endpoints.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions {
    /// Endpoints whose owners know of them.
    known: BTreeSet<u32>,
    /// Those that receive events, as an event recorded now must see them.
    active: BTreeMap<u32, Endpoint>,
    /// The last name given out, by endpoint.
    last_name: HashMap<u32, u64>,
    named: HashMap<Name, (EventSeq, Option<ChatNo>)>,
    /// On disk, and neither delivered nor dead.
    owed: BTreeSet<(u32, Option<ChatNo>, DeliverySeq)>,
    received: HashMap<(u32, EventSeq), EventBody>,
    first_received: HashSet<Name>,
    /// Dead letters that came back: they are outside of the order, as they were when they were given up.
    revived: HashSet<Name>,
    last_live: HashMap<(u32, Option<ChatNo>), DeliverySeq>,
    delivering: BTreeSet<Name>,
    replay_owed: BTreeSet<(u32, EventSeq)>,
    pub(crate) late: u64,
    pub(crate) gaps: u64,
    pub(crate) replayed: u64,
    pub(crate) dead: u64,
}

impl Subscriptions {
    pub(crate) fn known(&self) -> impl Iterator<Item = u32> {
        self.known.iter().copied()
    }

    pub(crate) fn added(&mut self, endpoint: Endpoint, durable: &Records) {
        assert!(durable.endpoints.contains_key(&endpoint.ordinal), "an endpoint was answered before it was durable");
        self.known.insert(endpoint.ordinal);
        self.active.insert(endpoint.ordinal, endpoint);
        assert!(self.known.len() <= ENDPOINTS_MAX, "too many endpoints");
    }

    pub(crate) fn removed(&mut self, ordinal: u32) {
        self.known.remove(&ordinal);
        self.active.remove(&ordinal);
        self.owed.retain(|(endpoint, ..)| *endpoint != ordinal);
        self.replay_owed.retain(|(endpoint, _)| *endpoint != ordinal);
    }

    /// A replay was promised.
    pub(crate) fn replaying(&mut self, ordinal: u32, replay: Replay, durable: &Records) {
        if !self.known.contains(&ordinal) {
            return;
        }
        for (seq, event) in durable.events.range(EventSeq(replay.after.0 + 1)..=replay.through) {
            if WANTED_BY_ALL.contains(&event.kind()) {
                self.replay_owed.insert((ordinal, *seq));
            }
        }
    }

    /// A commit was ordered: every active endpoint that wants one of its events has its row in it.
    pub(crate) fn ordered(&mut self, commit: &Commit) {
        for change in &commit.changes {
            match change {
                Change::Endpoint(endpoint) if self.known.contains(&endpoint.ordinal) => {
                    self.active.remove(&endpoint.ordinal);
                    if endpoint.is_active() {
                        self.active.insert(endpoint.ordinal, endpoint.clone());
                    }
                }
                Change::Event(event) => self.event_ordered(event, commit),
                _ => {}
            }
        }
    }

    fn event_ordered(&self, event: &Event, commit: &Commit) {
        for endpoint in self.active.values().filter(|endpoint| endpoint.filter.wants(event.kind())) {
            let has_row = commit.changes.iter().any(|change| {
                matches!(change, Change::Delivery(to, row) if *to == endpoint.ordinal && row.event == event.id.seq)
            });
            assert!(has_row, "event {:?} has no row for endpoint {}", event.id.seq, endpoint.ordinal);
        }
    }

    /// A unit reaches the platter.
    pub(crate) fn flushing(&mut self, changes: &[Change], before: &Records) {
        for change in changes {
            match change {
                Change::Delivery(ordinal, row) => {
                    let name = (*ordinal, row.sequence);
                    let revived = changes.contains(&Change::DeadLetterGone(*ordinal, row.event));
                    match self.named.get(&name) {
                        Some((event, _)) => assert_eq!(*event, row.event, "{name:?} names two events"),
                        None => {
                            let last = self.last_name.entry(*ordinal).or_default();
                            assert_eq!(row.sequence.0, *last + 1, "the names of endpoint {ordinal} have a hole");
                            *last += 1;
                            self.named.insert(name, (row.event, row.chat));
                        }
                    }
                    let is_new = !before.deliveries.contains_key(&name) && !self.first_received.contains(&name);
                    if revived {
                        self.revived.insert(name);
                    }
                    if (is_new || revived) && self.known.contains(ordinal) {
                        self.owed.insert((*ordinal, row.chat, row.sequence));
                    }
                }
                Change::DeadLetter(ordinal, dead) => {
                    self.owed.remove(&(*ordinal, dead.row.chat, dead.row.sequence));
                    self.replay_owed.remove(&(*ordinal, dead.row.event));
                    self.dead += 1;
                }
                Change::Removed(Removal::Event(event)) => self.replay_owed.retain(|(_, owed)| owed != event),
                _ => {}
            }
        }
        for change in changes {
            if let Change::DeliveryGone(ordinal, sequence) = change {
                let chat = self.named.get(&(*ordinal, *sequence)).and_then(|(_, chat)| *chat);
                let owed = self.owed.contains(&(*ordinal, chat, *sequence));
                assert!(!owed, "delivery {sequence:?} of endpoint {ordinal} is gone and was never made");
            }
        }
    }

    pub(crate) fn delivering(&mut self, dispatch: &Dispatch, durable: &Records) {
        let (ordinal, row) = (dispatch.endpoint, dispatch.row);
        let gone = row.event.0 <= durable.counters.event_floor;
        assert!(gone || durable.events.contains_key(&row.event), "{row:?} is delivered before it is durable");
        assert!(self.delivering.insert((ordinal, row.sequence)), "{row:?} is under way twice to endpoint {ordinal}");
        let range = (ordinal, DeliverySeq(0))..=(ordinal, DeliverySeq(u64::MAX));
        let most = delivery::IN_FLIGHT_MAX + delivery::SIDE_IN_FLIGHT_MAX;
        assert!(self.delivering.range(range).count() <= most, "too many requests to {ordinal}");
    }

    pub(crate) fn has_received(&self, ordinal: u32, sequence: DeliverySeq) -> bool {
        self.first_received.contains(&(ordinal, sequence))
    }

    /// An endpoint takes a delivery.
    pub(crate) fn delivered(&mut self, dispatch: &Dispatch, event: &Event, durable: &Records) {
        let (ordinal, row) = (dispatch.endpoint, dispatch.row);
        let name = (ordinal, row.sequence);
        let first = self.received.entry((ordinal, row.event)).or_insert_with(|| event.body.clone());
        assert_eq!(*first, event.body, "{:?} was another event before", row.event);
        self.owed.remove(&(ordinal, row.chat, row.sequence));
        if !self.first_received.insert(name) {
            return;
        }
        match row.course {
            Course::Late => self.late += 1,
            Course::Replay => {
                self.replayed += 1;
                self.replay_owed.remove(&(ordinal, row.event));
            }
            Course::Live => {
                let last = self.last_live.insert((ordinal, row.chat), row.sequence);
                assert!(last < Some(row.sequence), "endpoint {ordinal} got {row:?} after {last:?} and is not told so");
                self.gap_is_declared(dispatch, durable);
            }
        }
    }

    /// Whatever of the chat was queued earlier and has not come is named.
    fn gap_is_declared(&mut self, dispatch: &Dispatch, durable: &Records) {
        let (ordinal, row) = (dispatch.endpoint, dispatch.row);
        self.gaps += u64::from(dispatch.missing_count > 0);
        let earlier = (ordinal, row.chat, DeliverySeq(0))..(ordinal, row.chat, row.sequence);
        for (_, _, sequence) in self.owed.range(earlier) {
            let replay = durable.deliveries.get(&(ordinal, *sequence)).is_some_and(|row| row.course == Course::Replay);
            if replay || self.revived.contains(&(ordinal, *sequence)) {
                continue;
            }
            let named = dispatch.missing.iter().any(|(missing, _)| missing == sequence);
            let counted = dispatch.missing_count > dispatch.missing.len();
            assert!(named || counted, "endpoint {ordinal} got {row:?} and {sequence:?} is missing without a word");
        }
    }

    pub(crate) fn request_ended(&mut self, ordinal: u32, sequence: DeliverySeq) {
        self.delivering.remove(&(ordinal, sequence));
    }

    pub(crate) fn is_delivering(&self) -> bool {
        !self.delivering.is_empty()
    }

    pub(crate) fn owing(&self) -> String {
        format!("owe {:?} and replay {:?}", self.owed, self.replay_owed)
    }

    pub(crate) fn owes_nothing(&self) -> bool {
        self.owed.is_empty() && self.replay_owed.is_empty()
    }

    /// The process is gone; what the next one knows is on disk.
    pub(crate) fn crashed(&mut self, durable: &Records) {
        self.delivering.clear();
        self.known = durable.endpoints.keys().copied().collect();
        let active = durable.endpoints.iter().filter(|(_, endpoint)| endpoint.is_active());
        self.active = active.map(|(ordinal, endpoint)| (*ordinal, endpoint.clone())).collect();
        self.owed.retain(|(ordinal, ..)| durable.endpoints.contains_key(ordinal));
        self.replay_owed.retain(|(ordinal, _)| durable.endpoints.contains_key(ordinal));
        // Rows of an endpoint whose owner was never answered, and that is there all the same.
        for (name, row) in &durable.deliveries {
            let made = self.first_received.contains(name);
            if self.known.contains(&name.0) && !made && !durable.dead.contains_key(&(name.0, row.event)) {
                self.owed.insert((name.0, row.chat, name.1));
            }
        }
    }

    pub(crate) fn all_kept(&self, durable: &Records) {
        assert!(self.owed.is_empty(), "endpoints still wait for {:?}", self.owed);
        assert!(self.replay_owed.is_empty(), "not replayed: {:?}", self.replay_owed);
        for ordinal in durable.endpoints.keys() {
            let state = durable.endpoint_states[ordinal];
            assert_eq!(state.last_sequence.0, self.last_name.get(ordinal).copied().unwrap_or(0));
        }
    }
}
