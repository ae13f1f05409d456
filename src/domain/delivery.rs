//! The webhook queue of one number as far as memory is concerned: per endpoint a window over the rows on disk.
//! Events of one chat go in order; a slow endpoint only delays itself.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::event::EventFilter;
use super::id::{ChatNo, EventSeq};
use super::time::Timestamp;

/// Rows of one endpoint held in memory; the others wait on disk.
pub const WINDOW_MAX: usize = 64;
/// Requests under way at once to one endpoint of one number.
pub const IN_FLIGHT_MAX: usize = 4;
/// Endpoints one number may have.
pub const ENDPOINTS_MAX: usize = 16;

/// A webhook subscription; also what is stored of it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its ordinal within the number.
    pub ordinal: u32,
    /// What people call it.
    pub name: String,
    /// Where to POST.
    pub url: String,
    /// Which events.
    pub filter: EventFilter,
    /// Signing secrets, newest first (`whsec_…`).
    pub secrets: Vec<String>,
    /// Whether it receives anything now.
    pub active: bool,
    /// When it was made.
    pub created_at: Timestamp,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL may carry a token, the secrets are secrets.
        write!(f, "Endpoint({} active={})", self.ordinal, self.active)
    }
}

/// One event waiting for one endpoint; also what is stored of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveryRow {
    /// The event.
    pub event: EventSeq,
    /// Its chat, whose order is kept.
    pub chat: Option<ChatNo>,
    /// Attempts made.
    pub attempts: u16,
    /// Not before this moment.
    pub due: Timestamp,
    /// When it was queued.
    pub queued_at: Timestamp,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempted {
    /// The endpoint took it.
    Delivered,
    /// Try again after this pause.
    Again(Duration),
    /// No more tries: it goes to the dead letters.
    Dead,
    /// The endpoint says it is gone for good (410): no more tries for anything.
    EndpointGone,
}

#[derive(Debug, Clone)]
struct Waiting {
    row: DeliveryRow,
    in_flight: bool,
}

#[derive(Debug, Clone)]
struct Lane {
    endpoint: Endpoint,
    window: BTreeMap<EventSeq, Waiting>,
    /// Rows on disk, the window included.
    total: u64,
    /// Every row on disk up to here is, or was, in the window.
    loaded_through: EventSeq,
    /// A page is being read; holds `total` as it was when the read began.
    loading: Option<u64>,
}

impl Lane {
    fn in_flight(&self) -> usize {
        self.window.values().filter(|waiting| waiting.in_flight).count()
    }

    /// The rows that are first of their chat, in order. The window is small: a list beats hashing at every step.
    fn heads(&self) -> impl Iterator<Item = &Waiting> {
        let mut chats: Vec<Option<ChatNo>> = Vec::new();
        self.window.values().filter(move |waiting| {
            let first = !chats.contains(&waiting.row.chat);
            if first {
                chats.push(waiting.row.chat);
            }
            first
        })
    }

    fn has_more_on_disk(&self) -> bool {
        self.total > self.window.len() as u64
    }
}

/// The webhook queue of one number.
#[derive(Debug, Clone, Default)]
pub struct Deliveries {
    lanes: Vec<Lane>,
    /// Rows of later events may be read before they are flushed, and are not counted yet.
    durable_through: EventSeq,
}

/// A page of an endpoint's rows must be read from disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadPage {
    /// Whose rows.
    pub endpoint: u32,
    /// Only rows after this event.
    pub after: EventSeq,
}

impl Deliveries {
    /// Adds an endpoint with `total` rows on disk, none of them in memory yet.
    pub fn add_endpoint(&mut self, endpoint: Endpoint, total: u64) {
        let loaded_through = EventSeq(0);
        self.lanes.push(Lane { endpoint, window: BTreeMap::new(), total, loaded_through, loading: None });
    }

    /// Removes an endpoint and forgets its rows.
    pub fn remove_endpoint(&mut self, ordinal: u32) -> Option<Endpoint> {
        let index = self.lanes.iter().position(|lane| lane.endpoint.ordinal == ordinal)?;
        Some(self.lanes.remove(index).endpoint)
    }

    /// Switches an endpoint off; its rows stay on disk. Gives what must be stored.
    pub fn deactivate(&mut self, ordinal: u32) -> Option<Endpoint> {
        let lane = self.lane(ordinal)?;
        lane.endpoint.active = false;
        Some(lane.endpoint.clone())
    }

    fn lane(&mut self, ordinal: u32) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| lane.endpoint.ordinal == ordinal)
    }

    /// The endpoints.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.lanes.iter().map(|lane| &lane.endpoint)
    }

    /// One endpoint.
    #[must_use]
    pub fn endpoint(&self, ordinal: u32) -> Option<&Endpoint> {
        self.endpoints().find(|endpoint| endpoint.ordinal == ordinal)
    }

    /// Rows queued for all endpoints.
    #[must_use]
    pub fn depth(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.total).sum()
    }

    /// When the oldest row in memory was queued.
    #[must_use]
    pub fn oldest(&self) -> Option<Timestamp> {
        self.lanes.iter().filter_map(|lane| lane.window.values().next()).map(|waiting| waiting.row.queued_at).min()
    }

    /// Events up to here are durable, their rows with them.
    pub fn events_durable(&mut self, through: EventSeq) {
        self.durable_through = self.durable_through.max(through);
    }

    /// Takes in a row that has become durable.
    pub fn enqueued(&mut self, ordinal: u32, row: DeliveryRow) {
        let Some(lane) = self.lane(ordinal) else { return };
        let window_is_complete = !lane.has_more_on_disk() && lane.loading.is_none();
        lane.total += 1;
        if window_is_complete && lane.window.len() < WINDOW_MAX {
            lane.loaded_through = lane.loaded_through.max(row.event);
            lane.window.insert(row.event, Waiting { row, in_flight: false });
        }
    }

    /// Pages that must be read: windows that ran half empty with more rows on disk.
    pub fn pages_to_load(&mut self) -> Vec<LoadPage> {
        let mut pages = Vec::new();
        for lane in &mut self.lanes {
            let low = lane.window.len() <= WINDOW_MAX / 2;
            if lane.endpoint.active && low && lane.has_more_on_disk() && lane.loading.is_none() {
                lane.loading = Some(lane.total);
                pages.push(LoadPage { endpoint: lane.endpoint.ordinal, after: lane.loaded_through });
            }
        }
        pages
    }

    /// A page was read; `rows` are in the order of events. Rows that are not durable yet come again by
    /// [`Self::enqueued`].
    pub fn loaded(&mut self, ordinal: u32, mut rows: Vec<DeliveryRow>) {
        rows.retain(|row| row.event <= self.durable_through);
        let Some(lane) = self.lane(ordinal) else { return };
        let counted = lane.loading.take();
        if rows.is_empty() && counted == Some(lane.total) {
            // Rows were counted that are not there, and none came since; the window is the truth.
            lane.total = lane.window.len() as u64;
        }
        for row in rows {
            lane.loaded_through = lane.loaded_through.max(row.event);
            lane.window.entry(row.event).or_insert(Waiting { row, in_flight: false });
        }
    }

    /// Takes every row that may go now: due, first of its chat in its lane, within the lane's concurrency.
    pub fn take_due(&mut self, now: Timestamp) -> Vec<(u32, DeliveryRow)> {
        let mut taken = Vec::new();
        for lane in self.lanes.iter_mut().filter(|lane| lane.endpoint.active) {
            let free = IN_FLIGHT_MAX.saturating_sub(lane.in_flight());
            let idle = lane.heads().filter(|waiting| !waiting.in_flight && waiting.row.due <= now);
            let due: Vec<DeliveryRow> = idle.take(free).map(|waiting| waiting.row).collect();
            for row in due {
                if let Some(waiting) = lane.window.get_mut(&row.event) {
                    waiting.in_flight = true;
                }
                taken.push((lane.endpoint.ordinal, row));
            }
        }
        taken
    }

    /// An attempt ended with another try to come. Gives the row to store.
    pub fn again(&mut self, ordinal: u32, event: EventSeq, due: Timestamp) -> Option<DeliveryRow> {
        let waiting = self.lane(ordinal)?.window.get_mut(&event)?;
        waiting.in_flight = false;
        waiting.row.attempts = waiting.row.attempts.saturating_add(1);
        waiting.row.due = due;
        Some(waiting.row)
    }

    /// An attempt was the last one, for better or worse. Gives the row that was removed.
    pub fn done(&mut self, ordinal: u32, event: EventSeq) -> Option<DeliveryRow> {
        let lane = self.lane(ordinal)?;
        let waiting = lane.window.remove(&event)?;
        lane.total = lane.total.saturating_sub(1);
        Some(waiting.row)
    }

    /// The next moment at which a row becomes due that is not under way.
    #[must_use]
    pub fn next_due(&self) -> Option<Timestamp> {
        let active = self.lanes.iter().filter(|lane| lane.endpoint.active && lane.in_flight() < IN_FLIGHT_MAX);
        let idle = active.flat_map(Lane::heads).filter(|waiting| !waiting.in_flight);
        idle.map(|waiting| waiting.row.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(ordinal: u32) -> Endpoint {
        Endpoint {
            ordinal,
            name: String::new(),
            url: "https://example.com".to_owned(),
            filter: EventFilter::All,
            secrets: Vec::new(),
            active: true,
            created_at: Timestamp(0),
        }
    }

    fn row(event: u64, chat: u32) -> DeliveryRow {
        let now = Timestamp(0);
        DeliveryRow { event: EventSeq(event), chat: Some(ChatNo(chat)), attempts: 0, due: now, queued_at: now }
    }

    #[test]
    fn one_chat_keeps_its_order_and_others_pass() {
        let mut deliveries = Deliveries::default();
        deliveries.add_endpoint(endpoint(1), 0);
        for (event, chat) in [(1, 1), (2, 1), (3, 2)] {
            deliveries.enqueued(1, row(event, chat));
        }
        let events = |taken: Vec<(u32, DeliveryRow)>| taken.iter().map(|(_, row)| row.event.0).collect::<Vec<_>>();
        assert_eq!(events(deliveries.take_due(Timestamp(0))), [1, 3]);
        deliveries.again(1, EventSeq(1), Timestamp(10));
        deliveries.done(1, EventSeq(3));
        assert_eq!(events(deliveries.take_due(Timestamp(5))), [] as [u64; 0], "2 waits for 1");
        assert_eq!(deliveries.next_due(), Some(Timestamp(10)));
        assert_eq!(events(deliveries.take_due(Timestamp(10))), [1]);
        deliveries.done(1, EventSeq(1));
        assert_eq!(events(deliveries.take_due(Timestamp(10))), [2]);
    }

    #[test]
    fn a_row_that_is_read_before_its_flush_waits_for_it() {
        let mut deliveries = Deliveries::default();
        deliveries.add_endpoint(endpoint(1), 1);
        deliveries.events_durable(EventSeq(1));
        assert_eq!(deliveries.pages_to_load().len(), 1);
        deliveries.loaded(1, vec![row(1, 1), row(2, 2)]);
        assert_eq!(deliveries.take_due(Timestamp(0)), [(1, row(1, 1))], "2 may still be lost in a crash");
        deliveries.events_durable(EventSeq(2));
        deliveries.enqueued(1, row(2, 2));
        assert_eq!(deliveries.take_due(Timestamp(0)), [(1, row(2, 2))]);
        deliveries.done(1, EventSeq(1));
        deliveries.done(1, EventSeq(2));
        assert_eq!((deliveries.depth(), deliveries.pages_to_load()), (0, Vec::new()));
    }

    #[test]
    fn memory_stays_flat_and_nothing_is_skipped() {
        let mut deliveries = Deliveries::default();
        deliveries.add_endpoint(endpoint(1), 0);
        let total = 1000;
        for event in 1..=total {
            deliveries.enqueued(1, row(event, u32::try_from(event).unwrap()));
            assert!(deliveries.lanes[0].window.len() <= WINDOW_MAX);
        }
        deliveries.events_durable(EventSeq(total));
        let mut delivered = Vec::new();
        while deliveries.depth() > 0 {
            for page in deliveries.pages_to_load() {
                let after = page.after.0;
                let rows =
                    (after + 1..=total).take(WINDOW_MAX / 2).map(|event| row(event, u32::try_from(event).unwrap()));
                deliveries.loaded(1, rows.collect());
            }
            for (_, row) in deliveries.take_due(Timestamp(0)) {
                deliveries.done(1, row.event);
                delivered.push(row.event.0);
            }
        }
        assert_eq!(delivered, (1..=total).collect::<Vec<_>>());
    }
}
