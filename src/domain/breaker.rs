//! Whether an endpoint is asked at all. When different deliveries fail in a row it is the endpoint that is down, not an
//! event that is bad: then nothing is sent but one probe now and then, everything waits in order, and attempts do not
//! count.

use std::time::Duration;

use super::endpoint::DeliverySeq;
use super::time::Timestamp;

/// Different deliveries that fail in a row before the endpoint is taken to be down.
pub const TRIP_AFTER: usize = 3;

/// The breaker of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Breaker {
    /// Requests go.
    Closed {
        /// Different deliveries that failed since the last success; fewer than [`TRIP_AFTER`].
        failed: Vec<DeliverySeq>,
    },
    /// Nothing goes.
    Open {
        /// When one probe may go.
        until: Timestamp,
        /// The pause that was taken, without jitter; the next one is twice as long.
        pause: Duration,
    },
    /// One probe is under way, and decides.
    HalfOpen {
        /// The pause before it.
        pause: Duration,
    },
}

/// Where a breaker stands, for those who look on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stand {
    /// Requests go.
    Closed,
    /// Nothing goes until the next probe.
    Open,
    /// A probe is under way.
    HalfOpen,
}

impl Stand {
    /// Stable code for the API.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Closed => "CLOSED",
            Self::Open => "OPEN",
            Self::HalfOpen => "HALF_OPEN",
        }
    }
}

/// What may be sent now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admits {
    /// Anything.
    All,
    /// One request.
    Probe,
    /// Nothing.
    Nothing,
}

/// How long a breaker stays open.
#[derive(Debug, Clone, Copy)]
pub struct Pauses {
    /// The first time.
    pub first: Duration,
    /// At most.
    pub longest: Duration,
    /// What the receiver asked for; it opens the breaker at once.
    pub asked: Option<Duration>,
    /// Factor on the pause, around 1.
    pub jitter: f64,
}

impl Default for Breaker {
    fn default() -> Self {
        Self::Closed { failed: Vec::new() }
    }
}

impl Breaker {
    /// What may be sent now.
    #[must_use]
    pub fn admits(&self, now: Timestamp) -> Admits {
        match self {
            Self::Closed { .. } => Admits::All,
            Self::Open { until, .. } if *until <= now => Admits::Probe,
            Self::Open { .. } | Self::HalfOpen { .. } => Admits::Nothing,
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn stand(&self) -> Stand {
        match self {
            Self::Closed { .. } => Stand::Closed,
            Self::Open { .. } => Stand::Open,
            Self::HalfOpen { .. } => Stand::HalfOpen,
        }
    }

    /// Whether the endpoint is taken to be up.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    /// The probe leaves.
    pub fn probe(&mut self) {
        if let Self::Open { pause, .. } = *self {
            *self = Self::HalfOpen { pause };
        }
    }

    /// It answered. Gives whether it was taken to be down until now.
    pub fn answered(&mut self) -> bool {
        let was_down = !self.is_closed();
        *self = Self::default();
        was_down
    }

    /// A request failed in a way that tells of the endpoint.
    pub fn failed(&mut self, sequence: DeliverySeq, now: Timestamp, pauses: Pauses) {
        let pause = match self {
            Self::Closed { failed } => {
                if !failed.contains(&sequence) {
                    failed.push(sequence);
                }
                if failed.len() < TRIP_AFTER && pauses.asked.is_none() {
                    return;
                }
                pauses.first
            }
            // A request from before; the pause has begun.
            Self::Open { .. } => return,
            Self::HalfOpen { pause } => (*pause * 2).clamp(pauses.first, pauses.longest.max(pauses.first)),
        };
        let wait = pause.mul_f64(pauses.jitter).max(pauses.asked.unwrap_or_default());
        *self = Self::Open { until: now.after(wait.max(Duration::from_millis(1))), pause };
    }

    /// The probe was never sent: another one may go soon.
    pub fn not_sent(&mut self, again: Timestamp) {
        if let Self::HalfOpen { pause } = *self {
            *self = Self::Open { until: again, pause };
        }
    }

    /// When the next probe may go, while it is open.
    #[must_use]
    pub fn opens_up_at(&self) -> Option<Timestamp> {
        match self {
            Self::Open { until, .. } => Some(*until),
            Self::Closed { .. } | Self::HalfOpen { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000);
    const PAUSES: Pauses =
        Pauses { first: Duration::from_secs(5), longest: Duration::from_secs(300), asked: None, jitter: 1.0 };

    #[test]
    fn one_bad_delivery_does_not_open_it_and_three_do() {
        let mut breaker = Breaker::default();
        for _ in 0..10 {
            breaker.failed(DeliverySeq(1), NOW, PAUSES);
        }
        breaker.failed(DeliverySeq(2), NOW, PAUSES);
        assert_eq!(breaker.admits(NOW), Admits::All);
        assert!(!breaker.answered(), "it was not down");
        for sequence in 3..=5 {
            assert!(breaker.is_closed());
            breaker.failed(DeliverySeq(sequence), NOW, PAUSES);
        }
        assert_eq!((breaker.admits(NOW), breaker.opens_up_at()), (Admits::Nothing, Some(Timestamp(6_000))));
    }

    #[test]
    fn one_probe_decides_and_pauses_grow_to_their_limit() {
        let mut breaker = Breaker::Open { until: NOW, pause: PAUSES.first };
        let mut now = NOW;
        for expected in [10, 20, 40, 80, 160, 300, 300] {
            assert_eq!(breaker.admits(now), Admits::Probe);
            breaker.probe();
            assert_eq!(breaker.admits(now), Admits::Nothing, "one at a time");
            breaker.failed(DeliverySeq(1), now, PAUSES);
            let until = breaker.opens_up_at().unwrap();
            assert_eq!(until.since(now), Duration::from_secs(expected));
            breaker.failed(DeliverySeq(2), now, PAUSES);
            assert_eq!(breaker.opens_up_at(), Some(until), "a late failure changes nothing");
            now = until;
        }
        breaker.probe();
        assert!(breaker.answered());
        assert_eq!(breaker.admits(now), Admits::All);
    }

    #[test]
    fn whoever_asks_for_a_wait_gets_it() {
        let mut breaker = Breaker::default();
        let asked = Some(Duration::from_secs(60));
        breaker.failed(DeliverySeq(1), NOW, Pauses { asked, ..PAUSES });
        assert_eq!(breaker.opens_up_at(), Some(NOW.after(Duration::from_secs(60))));
    }

    #[test]
    fn a_probe_that_never_left_is_made_up_for() {
        let mut breaker = Breaker::HalfOpen { pause: PAUSES.first };
        breaker.not_sent(Timestamp(2_000));
        assert_eq!((breaker.admits(NOW), breaker.admits(Timestamp(2_000))), (Admits::Nothing, Admits::Probe));
    }
}
