//! A webhook subscription: where to POST, which events, whether it is served, which secrets sign. Its record is rare to
//! change; what moves with every delivery is in [`EndpointState`], a record of its own.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::event::EventFilter;
use super::id::EventSeq;
use super::time::Timestamp;

/// Endpoints one number may have.
pub const ENDPOINTS_MAX: usize = 16;
/// How long the secret before the newest goes on signing, when nobody says otherwise.
pub const SECRET_OVERLAP: Duration = Duration::from_hours(24);
/// Longest overlap that can be asked for.
pub const SECRET_OVERLAP_MAX: Duration = Duration::from_hours(24 * 7);

/// Position in everything ever queued for one endpoint; the first is 1, there are no gaps. The receiver sees it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeliverySeq(pub u64);

/// A webhook subscription; also what is stored of it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored")]
pub struct Endpoint {
    /// Its ordinal within the number.
    pub ordinal: u32,
    /// What people call it.
    pub name: String,
    /// Where to POST.
    pub url: String,
    /// Which events.
    pub filter: EventFilter,
    /// Signing secrets, newest first (`whsec_…`): one, or two after a rotation.
    pub secrets: Vec<String>,
    /// Until when the second secret signs as well.
    pub overlap_until: Option<Timestamp>,
    /// Whether it receives anything.
    pub status: EndpointStatus,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was changed last.
    pub updated_at: Timestamp,
}

/// As it was written by any version: earlier ones knew only `active`.
#[derive(Deserialize)]
struct Stored {
    ordinal: u32,
    name: String,
    url: String,
    filter: EventFilter,
    secrets: Vec<String>,
    #[serde(default)]
    overlap_until: Option<Timestamp>,
    #[serde(default)]
    status: Option<EndpointStatus>,
    #[serde(default)]
    active: Option<bool>,
    created_at: Timestamp,
    #[serde(default)]
    updated_at: Option<Timestamp>,
}

impl From<Stored> for Endpoint {
    fn from(stored: Stored) -> Self {
        // Earlier versions switched an endpoint off for one reason only.
        let gone = EndpointStatus::Disabled { reason: DisabledReason::Gone, at: stored.created_at };
        let before = if stored.active == Some(false) { gone } else { EndpointStatus::Active };
        Self {
            ordinal: stored.ordinal,
            name: stored.name,
            url: stored.url,
            filter: stored.filter,
            secrets: stored.secrets,
            overlap_until: stored.overlap_until,
            status: stored.status.unwrap_or(before),
            created_at: stored.created_at,
            updated_at: stored.updated_at.unwrap_or(stored.created_at),
        }
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL may carry a token, the secrets are secrets.
        write!(f, "Endpoint({} {:?})", self.ordinal, self.status)
    }
}

/// Whether an endpoint receives anything. While it does not, new events are not queued for it; what was queued before
/// waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndpointStatus {
    /// It is served.
    Active,
    /// Its owner stopped it.
    Paused {
        /// When.
        since: Timestamp,
    },
    /// We stopped it; its owner can start it again.
    Disabled {
        /// Why.
        reason: DisabledReason,
        /// When.
        at: Timestamp,
    },
}

/// Why an endpoint was stopped without its owner's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DisabledReason {
    /// It answered 410: it wants nothing more.
    Gone,
    /// It did nothing but fail for `webhook::DISABLE_AFTER`.
    Failing,
    /// Its queue reached `delivery::QUEUE_MAX`.
    QueueFull,
}

impl DisabledReason {
    /// Stable code for the API, metrics and logs.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Gone => "GONE",
            Self::Failing => "FAILING",
            Self::QueueFull => "QUEUE_FULL",
        }
    }
}

impl Endpoint {
    /// Whether it receives anything now.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.status == EndpointStatus::Active
    }

    /// The secrets that sign at this moment, newest first.
    #[must_use]
    pub fn signing_secrets(&self, now: Timestamp) -> &[String] {
        let overlaps = self.overlap_until.is_some_and(|until| now < until);
        &self.secrets[..self.secrets.len().min(if overlaps { 2 } else { 1 })]
    }

    /// Replaces the newest secret; the one before signs for `overlap` more.
    pub fn rotate(&mut self, secret: String, overlap: Duration, now: Timestamp) {
        self.secrets.insert(0, secret);
        self.secrets.truncate(if overlap.is_zero() { 1 } else { 2 });
        self.overlap_until = (!overlap.is_zero()).then(|| now.after(overlap.min(SECRET_OVERLAP_MAX)));
        self.updated_at = now;
    }

    /// Applies what its owner wants changed.
    pub fn update(&mut self, update: EndpointUpdate, now: Timestamp) {
        let EndpointUpdate { name, url, filter, active } = update;
        self.name = name.unwrap_or(std::mem::take(&mut self.name));
        self.url = url.unwrap_or(std::mem::take(&mut self.url));
        self.filter = filter.unwrap_or(self.filter.clone());
        match active {
            Some(true) => self.status = EndpointStatus::Active,
            Some(false) if self.is_active() => self.status = EndpointStatus::Paused { since: now },
            Some(false) | None => {}
        }
        self.updated_at = now;
    }
}

/// What an endpoint's owner wants changed; `None` leaves it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EndpointUpdate {
    /// What people call it.
    pub name: Option<String>,
    /// Where to POST, also what is queued already.
    pub url: Option<String>,
    /// Replaces the whole list; counts for events from now on.
    pub filter: Option<EventFilter>,
    /// Whether it receives anything.
    pub active: Option<bool>,
}

/// What moves with an endpoint's deliveries; stored apart from its record, and outlives it until its rows are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct EndpointState {
    /// The last position given out.
    pub last_sequence: DeliverySeq,
    /// Since when nothing succeeded any more.
    pub failing_since: Option<Timestamp>,
    /// The replay under way.
    pub replay: Option<Replay>,
}

/// A part of the event log being sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {
    /// Queued, or passed over by the filter, up to here.
    pub after: EventSeq,
    /// The last event to send.
    pub through: EventSeq,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> Endpoint {
        let stored = r#"{"ordinal":1,"name":"n","url":"https://example.com","filter":"All","secrets":["whsec_a"],
            "active":true,"created_at":5}"#;
        serde_json::from_str(stored).unwrap()
    }

    #[test]
    fn records_of_the_first_version_are_read() {
        assert_eq!((endpoint().status, endpoint().updated_at), (EndpointStatus::Active, Timestamp(5)));
        let text = serde_json::to_string(&endpoint()).unwrap();
        assert_eq!(serde_json::from_str::<Endpoint>(&text).unwrap(), endpoint());
        let off = r#"{"ordinal":1,"name":"","url":"","filter":"All","secrets":[],"active":false,"created_at":5}"#;
        assert!(!serde_json::from_str::<Endpoint>(off).unwrap().is_active());
    }

    #[test]
    fn two_secrets_sign_during_the_overlap_and_never_three() {
        let mut endpoint = endpoint();
        let now = Timestamp(1_000);
        endpoint.rotate("whsec_b".to_owned(), SECRET_OVERLAP, now);
        assert_eq!(endpoint.signing_secrets(now), ["whsec_b", "whsec_a"]);
        assert_eq!(endpoint.signing_secrets(now.after(SECRET_OVERLAP)), ["whsec_b"]);
        endpoint.rotate("whsec_c".to_owned(), SECRET_OVERLAP, now);
        assert_eq!(endpoint.signing_secrets(now), ["whsec_c", "whsec_b"]);
        endpoint.rotate("whsec_d".to_owned(), Duration::ZERO, now);
        assert_eq!((endpoint.signing_secrets(now), endpoint.secrets.len()), (&["whsec_d".to_owned()][..], 1));
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let mut endpoint = endpoint();
        endpoint.update(EndpointUpdate { active: Some(false), ..EndpointUpdate::default() }, Timestamp(9));
        assert_eq!(endpoint.status, EndpointStatus::Paused { since: Timestamp(9) });
        let gone = EndpointStatus::Disabled { reason: DisabledReason::Gone, at: Timestamp(8) };
        endpoint.status = gone;
        endpoint.update(EndpointUpdate { active: Some(false), ..EndpointUpdate::default() }, Timestamp(10));
        assert_eq!(endpoint.status, gone, "why it stopped is not forgotten");
        let none = EventFilter::Only(Vec::new());
        let update = EndpointUpdate { active: Some(true), filter: Some(none.clone()), ..EndpointUpdate::default() };
        endpoint.update(update, Timestamp(11));
        assert_eq!((endpoint.status, endpoint.filter.clone()), (EndpointStatus::Active, none));
        assert_eq!((endpoint.name.as_str(), endpoint.url.as_str()), ("n", "https://example.com"));
    }
}
