//! When a delivery is tried again, and when it is given up. The schedule is published, so it is data: eight attempts
//! over about 28 hours, then a dead letter. Nothing here reads a clock; jitter is an argument.

use std::time::Duration;

use super::time::Timestamp;

/// Attempts a schedule may have.
pub const ATTEMPTS_MAX: usize = 8;
/// Attempts before an answer that is the receiver's own fault (a 4xx, a redirect) makes a dead letter.
pub const SHORT_ATTEMPTS: u32 = 3;
/// Longest wait a receiver may ask for.
pub const RETRY_AFTER_MAX: Duration = Duration::from_hours(1);
/// An endpoint that did nothing but fail for this long is disabled.
pub const DISABLE_AFTER: Duration = Duration::from_hours(120);
/// Largest deviation from the schedule, as a share of the wait.
const JITTER_SHARE: f64 = 0.2;

/// The waits before each attempt, counted from the failure of the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    waits: [Duration; ATTEMPTS_MAX],
    attempts: usize,
}

impl Schedule {
    /// The published one.
    pub const PUBLISHED: Self = Self {
        waits: [
            Duration::ZERO,
            Duration::from_secs(5),
            Duration::from_mins(5),
            Duration::from_mins(30),
            Duration::from_hours(2),
            Duration::from_hours(5),
            Duration::from_hours(10),
            Duration::from_hours(10),
        ],
        attempts: ATTEMPTS_MAX,
    };

    /// A schedule of these waits; the first attempt is always made at once. `None` for none, or for more than
    /// [`ATTEMPTS_MAX`].
    #[must_use]
    pub fn of(given: &[Duration]) -> Option<Self> {
        let mut waits = [Duration::ZERO; ATTEMPTS_MAX];
        waits.get_mut(..given.len())?.copy_from_slice(given);
        (!given.is_empty()).then_some(Self { waits, attempts: given.len() })
    }

    /// The wait after this many attempts; `None` when there are no more.
    #[must_use]
    pub fn wait_after(&self, attempts: u32) -> Option<Duration> {
        self.waits[..self.attempts].get(attempts as usize).copied()
    }

    /// The first pause of a breaker and its longest: the second and third wait.
    #[must_use]
    pub fn pauses(&self) -> (Duration, Duration) {
        let wait = |index: usize| self.waits[index.min(self.attempts - 1)];
        (wait(1), wait(2))
    }
}

/// What came back from one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// An HTTP response.
    Status {
        /// Its code.
        code: u16,
        /// The wait it asked for.
        retry_after: Option<Duration>,
    },
    /// No response: DNS, TCP, TLS or a timeout.
    Silence,
    /// Never sent: the address guard refused the target.
    Refused,
    /// Never sent: the event is not kept any more.
    Unreadable,
    /// Never sent: too many requests are under way in this process.
    Crowded,
}

/// What an answer tells of the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tells {
    /// It took the delivery.
    Success,
    /// It is there, and does not want this delivery.
    Rejects,
    /// It is down, overloaded or unreachable; it may have asked for a wait.
    Trouble(Option<Duration>),
    /// It wants nothing more.
    Gone,
    /// Nothing: it was not asked, and the delivery can never be made.
    Impossible,
    /// Nothing: it was not asked.
    NotAsked,
}

/// What follows from a failed attempt that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Try again after this wait.
    Retry(Duration),
    /// Given up; kept for a redelivery.
    DeadLetter,
}

impl Answer {
    /// Label for metrics and the delivery log.
    #[must_use]
    pub const fn outcome(&self) -> &'static str {
        match self {
            Self::Status { code: 200..=299, .. } => "delivered",
            Self::Status { code: 300..=399, .. } => "redirected",
            Self::Status { code: 410, .. } => "gone",
            Self::Status { code: 429, .. } => "throttled",
            Self::Status { code: 400..=499, .. } => "client_error",
            Self::Status { .. } => "server_error",
            Self::Silence => "no_answer",
            Self::Refused => "refused",
            Self::Unreadable => "unreadable",
            Self::Crowded => "crowded",
        }
    }

    /// What it tells of the endpoint.
    #[must_use]
    pub fn tells(&self) -> Tells {
        match self {
            Self::Status { code: 200..=299, .. } => Tells::Success,
            Self::Status { code: 410, .. } => Tells::Gone,
            Self::Status { code: 408 | 425 | 429 | 500..=599, retry_after } => {
                Tells::Trouble(retry_after.map(|asked| asked.min(RETRY_AFTER_MAX)))
            }
            Self::Status { .. } => Tells::Rejects,
            Self::Silence | Self::Refused => Tells::Trouble(None),
            Self::Unreadable => Tells::Impossible,
            Self::Crowded => Tells::NotAsked,
        }
    }

    /// The HTTP status, if there was one.
    #[must_use]
    pub const fn status(&self) -> Option<u16> {
        match self {
            Self::Status { code, .. } => Some(*code),
            Self::Silence | Self::Refused | Self::Unreadable | Self::Crowded => None,
        }
    }
}

/// Decides what follows the failure of attempt number `attempt` (the first is 1). `jitter` is uniform in 0..1.
#[must_use]
pub fn verdict(schedule: &Schedule, answer: Answer, attempt: u32, jitter: f64) -> Verdict {
    let (attempts_max, at_least) = match answer.tells() {
        // A name that resolves to a forbidden address may be a mistake being repaired: the short part is enough.
        Tells::Rejects | Tells::Success | Tells::Gone => (SHORT_ATTEMPTS, Duration::ZERO),
        Tells::Trouble(_) if answer == Answer::Refused => (SHORT_ATTEMPTS, Duration::ZERO),
        Tells::Trouble(asked) => (u32::MAX, asked.unwrap_or_default()),
        Tells::Impossible | Tells::NotAsked => (0, Duration::ZERO),
    };
    match schedule.wait_after(attempt).filter(|_| attempt < attempts_max) {
        Some(wait) => Verdict::Retry(wait.mul_f64(jitter_factor(jitter)).max(at_least)),
        None => Verdict::DeadLetter,
    }
}

/// The factor on a wait; `jitter` is uniform in 0..1.
#[must_use]
pub fn jitter_factor(jitter: f64) -> f64 {
    1.0 - JITTER_SHARE + 2.0 * JITTER_SHARE * jitter.clamp(0.0, 1.0)
}

/// Whether an endpoint that has failed without a success since `failing_since` is to be disabled.
#[must_use]
pub fn is_hopeless(failing_since: Timestamp, now: Timestamp) -> bool {
    now.since(failing_since) >= DISABLE_AFTER
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVEN: f64 = 0.5;
    const LONG: Schedule = Schedule::PUBLISHED;

    fn status(code: u16) -> Answer {
        Answer::Status { code, retry_after: None }
    }

    #[test]
    fn every_answer_tells_something() {
        for (answer, expected) in [
            (status(200), Tells::Success),
            (status(204), Tells::Success),
            (status(302), Tells::Rejects),
            (status(400), Tells::Rejects),
            (status(401), Tells::Rejects),
            (status(408), Tells::Trouble(None)),
            (status(410), Tells::Gone),
            (status(425), Tells::Trouble(None)),
            (status(429), Tells::Trouble(None)),
            (status(500), Tells::Trouble(None)),
            (status(599), Tells::Trouble(None)),
            (Answer::Silence, Tells::Trouble(None)),
            (Answer::Refused, Tells::Trouble(None)),
            (Answer::Unreadable, Tells::Impossible),
            (Answer::Crowded, Tells::NotAsked),
        ] {
            assert_eq!(answer.tells(), expected, "{answer:?}");
        }
    }

    #[test]
    fn the_long_schedule_is_the_published_one() {
        let waits: Vec<_> = (1..=8).map(|attempt| verdict(&LONG, Answer::Silence, attempt, EVEN)).collect();
        let seconds = [5, 300, 1_800, 7_200, 18_000, 36_000, 36_000];
        for (wait, seconds) in waits.iter().zip(seconds) {
            assert_eq!(*wait, Verdict::Retry(Duration::from_secs(seconds)));
        }
        assert_eq!(waits[7], Verdict::DeadLetter);
    }

    #[test]
    fn the_receivers_own_fault_gets_three_attempts() {
        for answer in [status(404), status(422), status(301), Answer::Refused] {
            assert!(matches!(verdict(&LONG, answer, 2, EVEN), Verdict::Retry(_)), "{answer:?}");
            assert_eq!(verdict(&LONG, answer, 3, EVEN), Verdict::DeadLetter, "{answer:?}");
        }
    }

    #[test]
    fn retry_after_lengthens_and_never_shortens() {
        let asking = |seconds| Answer::Status { code: 503, retry_after: Some(Duration::from_secs(seconds)) };
        for (asked, attempt, expected) in [(60, 1, 60), (1, 1, 5), (86_400, 1, 3_600), (60, 2, 300), (86_400, 4, 7_200)]
        {
            let retry = Verdict::Retry(Duration::from_secs(expected));
            assert_eq!(verdict(&LONG, asking(asked), attempt, EVEN), retry);
        }
    }

    #[test]
    fn a_schedule_of_ones_own() {
        let short = Schedule::of(&[Duration::ZERO, Duration::from_millis(10)]).unwrap();
        assert_eq!(verdict(&short, status(500), 1, EVEN), Verdict::Retry(Duration::from_millis(10)));
        assert_eq!(verdict(&short, status(500), 2, EVEN), Verdict::DeadLetter);
        assert_eq!(short.pauses(), (Duration::from_millis(10), Duration::from_millis(10)));
        assert_eq!((Schedule::of(&[]), Schedule::of(&[Duration::ZERO; 9])), (None, None));
        assert_eq!(LONG.pauses(), (Duration::from_secs(5), Duration::from_mins(5)));
    }

    #[test]
    fn an_endpoint_is_hopeless_after_five_days() {
        let since = Timestamp(1_000);
        assert!(!is_hopeless(since, since.after(DISABLE_AFTER - Duration::from_secs(1))));
        assert!(is_hopeless(since, since.after(DISABLE_AFTER)));
    }

    proptest! {
        #[test]
        fn jitter_stays_within_a_fifth(attempt in 1u32..8, jitter in -1.0f64..2.0) {
            let Verdict::Retry(wait) = verdict(&LONG, Answer::Silence, attempt, jitter) else {
                panic!("gave up early")
            };
            let due = LONG.wait_after(attempt).unwrap();
            prop_assert!(wait >= due.mul_f64(0.799) && wait <= due.mul_f64(1.201));
        }

        #[test]
        fn no_delivery_is_tried_for_ever(code in 100u16..700, attempt in 8u32..1000) {
            prop_assert_eq!(verdict(&LONG, status(code), attempt, EVEN), Verdict::DeadLetter);
        }
    }
}
