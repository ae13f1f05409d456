//! What WhatsApp's answer to a message means (`<ack class="message" error="…">`).

use std::time::Duration;

use super::message::FailureCode;

/// Attempts after which a message that WhatsApp keeps refusing is given up.
pub const ATTEMPTS_MAX: u16 = 5;
/// No answer within this: the connection is not to be trusted; reconnect and send again under the same id.
pub const ACK_TIMEOUT: Duration = Duration::from_secs(60);

/// What follows from an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Accepted.
    Sent,
    /// Send the same id again after a pause.
    Again(Duration),
    /// Never.
    Failed(FailureCode),
}

/// The verdict on an answer to the `attempts`-th attempt. Codes as observed in the Web protocol's clients.
#[must_use]
pub fn verdict(error: Option<u16>, attempts: u16) -> Verdict {
    let Some(code) = error else { return Verdict::Sent };
    match code {
        404 => Verdict::Failed(FailureCode::WhatsappNotExist),
        // The account may not open new chats now; every retry would count as another attempt to.
        463 | 475 => Verdict::Failed(FailureCode::ReachOutLocked),
        // Malformed, or a stale device session: worth one attempt with fresh devices.
        400 | 421 | 479 if attempts < 2 => Verdict::Again(Duration::from_secs(1)),
        429 | 500..=599 if attempts < ATTEMPTS_MAX => {
            Verdict::Again(Duration::from_secs(5 << u32::from(attempts.saturating_sub(1)).min(6)))
        }
        429 | 500..=599 => Verdict::Failed(FailureCode::AttemptsExhausted),
        _ => Verdict::Failed(FailureCode::RejectedByWhatsapp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_its_verdict() {
        let table = [
            (None, 1, Verdict::Sent),
            (Some(404), 1, Verdict::Failed(FailureCode::WhatsappNotExist)),
            (Some(463), 1, Verdict::Failed(FailureCode::ReachOutLocked)),
            (Some(479), 1, Verdict::Again(Duration::from_secs(1))),
            (Some(479), 2, Verdict::Failed(FailureCode::RejectedByWhatsapp)),
            (Some(503), 1, Verdict::Again(Duration::from_secs(5))),
            (Some(503), 3, Verdict::Again(Duration::from_secs(20))),
            (Some(429), ATTEMPTS_MAX, Verdict::Failed(FailureCode::AttemptsExhausted)),
            (Some(999), 1, Verdict::Failed(FailureCode::RejectedByWhatsapp)),
        ];
        for (error, attempts, expected) in table {
            assert_eq!(verdict(error, attempts), expected, "{error:?} attempt {attempts}");
        }
    }
}
