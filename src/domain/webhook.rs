//! When a delivery is tried again, and when it is given up. The schedule is published, so it is data: eight attempts
//! over about 28 hours, then a dead letter. Nothing here reads a clock; jitter is an argument.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::time::Timestamp;

/// Wait before each attempt, counted from the failure of the one before.
pub const SCHEDULE: [Duration; 8] = [
    Duration::ZERO,
    Duration::from_secs(5),
    Duration::from_mins(5),
    Duration::from_mins(30),
    Duration::from_hours(2),
    Duration::from_hours(5),
    Duration::from_hours(10),
    Duration::from_hours(10),
];
/// Attempts before an answer that is the receiver's own fault (a 4xx, a redirect) makes a dead letter.
pub const SHORT_ATTEMPTS: u32 = 3;
/// Longest wait a receiver may ask for.
pub const RETRY_AFTER_MAX: Duration = Duration::from_hours(1);
/// An endpoint that did nothing but fail for this long is disabled.
pub const DISABLE_AFTER: Duration = Duration::from_hours(120);
/// Largest deviation from the schedule, as a share of the wait.
const JITTER_SHARE: f64 = 0.2;

/// What came back from one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
}

/// What follows from an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Done.
    Delivered,
    /// Try again after this wait.
    Retry(Duration),
    /// The receiver wants nothing more: disable the endpoint; the delivery becomes a dead letter.
    Disable,
    /// Given up; kept for a replay.
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
        }
    }
}

/// Decides what follows the answer to attempt number `attempt` (the first is 1). `jitter` is uniform in 0..1.
#[must_use]
pub fn verdict(answer: Answer, attempt: u32, jitter: f64) -> Verdict {
    let (attempts_max, at_least) = match answer {
        Answer::Status { code: 200..=299, .. } => return Verdict::Delivered,
        Answer::Status { code: 410, .. } => return Verdict::Disable,
        Answer::Status { code: 408 | 425 | 429 | 500..=599, retry_after } => {
            (SCHEDULE.len(), retry_after.unwrap_or_default())
        }
        Answer::Silence => (SCHEDULE.len(), Duration::ZERO),
        // A name that resolves to a forbidden address may be a mistake being repaired: the short part is enough.
        Answer::Status { .. } | Answer::Refused => (SHORT_ATTEMPTS as usize, Duration::ZERO),
    };
    let next = attempt as usize;
    if next >= attempts_max {
        return Verdict::DeadLetter;
    }
    let wait = jittered(SCHEDULE[next], jitter);
    Verdict::Retry(wait.max(at_least.min(RETRY_AFTER_MAX)))
}

/// Whether an endpoint that has failed without a success since `failing_since` is to be disabled.
#[must_use]
pub fn is_hopeless(failing_since: Timestamp, now: Timestamp) -> bool {
    now.since(failing_since) >= DISABLE_AFTER
}

fn jittered(wait: Duration, jitter: f64) -> Duration {
    let factor = 1.0 - JITTER_SHARE + 2.0 * JITTER_SHARE * jitter.clamp(0.0, 1.0);
    wait.mul_f64(factor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVEN: f64 = 0.5;

    fn status(code: u16) -> Answer {
        Answer::Status { code, retry_after: None }
    }

    #[test]
    fn every_answer_has_its_verdict() {
        let five_seconds = Verdict::Retry(Duration::from_secs(5));
        for (answer, expected) in [
            (status(200), Verdict::Delivered),
            (status(204), Verdict::Delivered),
            (status(302), five_seconds),
            (status(400), five_seconds),
            (status(401), five_seconds),
            (status(408), five_seconds),
            (status(410), Verdict::Disable),
            (status(425), five_seconds),
            (status(429), five_seconds),
            (status(500), five_seconds),
            (status(599), five_seconds),
            (Answer::Silence, five_seconds),
            (Answer::Refused, five_seconds),
        ] {
            assert_eq!(verdict(answer, 1, EVEN), expected, "{answer:?}");
        }
    }

    #[test]
    fn the_long_schedule_is_the_published_one() {
        let waits: Vec<_> = (1..=8).map(|attempt| verdict(Answer::Silence, attempt, EVEN)).collect();
        let seconds = [5, 300, 1_800, 7_200, 18_000, 36_000, 36_000];
        for (wait, seconds) in waits.iter().zip(seconds) {
            assert_eq!(*wait, Verdict::Retry(Duration::from_secs(seconds)));
        }
        assert_eq!(waits[7], Verdict::DeadLetter);
    }

    #[test]
    fn the_receivers_own_fault_gets_three_attempts() {
        for answer in [status(404), status(422), status(301), Answer::Refused] {
            assert!(matches!(verdict(answer, 2, EVEN), Verdict::Retry(_)), "{answer:?}");
            assert_eq!(verdict(answer, 3, EVEN), Verdict::DeadLetter, "{answer:?}");
        }
    }

    #[test]
    fn retry_after_lengthens_and_never_shortens() {
        let asking = |seconds| Answer::Status { code: 503, retry_after: Some(Duration::from_secs(seconds)) };
        for (asked, attempt, expected) in [(60, 1, 60), (1, 1, 5), (86_400, 1, 3_600), (60, 2, 300), (86_400, 4, 7_200)]
        {
            assert_eq!(verdict(asking(asked), attempt, EVEN), Verdict::Retry(Duration::from_secs(expected)));
        }
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
            let Verdict::Retry(wait) = verdict(Answer::Silence, attempt, jitter) else { panic!("gave up early") };
            let due = SCHEDULE[attempt as usize];
            prop_assert!(wait >= due.mul_f64(0.799) && wait <= due.mul_f64(1.201));
        }

        #[test]
        fn no_delivery_is_tried_for_ever(code in 100u16..700, attempt in 8u32..1000) {
            prop_assert!(!matches!(verdict(status(code), attempt, EVEN), Verdict::Retry(_)));
        }
    }
}
