//! What WhatsApp's answer to a message means (`<ack class="message" error="…">`).

use std::time::Duration;

use super::limiter::LockReason;
use super::message::FailureCode;
use super::outbox::Devices;

/// Refusals after which a message that WhatsApp keeps refusing is given up.
pub const REFUSALS_MAX: u16 = 5;
/// No answer within this: the connection is not to be trusted; reconnect and send again under the same id.
pub const ACK_TIMEOUT: Duration = Duration::from_secs(60);

/// What follows from an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Accepted.
    Sent,
    /// Send the same id again after a pause.
    Again(Duration, Devices),
    /// The account may not open new chats: hold this message and every other that would open one.
    Hold(LockReason),
    /// Never.
    Failed(FailureCode),
}

/// The verdict on an answer to a message that was refused `refusals` times before, the last time sent to `devices`.
/// Codes as observed in the Web protocol's clients.
#[must_use]
pub fn verdict(error: Option<u16>, refusals: u16, devices: Devices) -> Verdict {
    let Some(code) = error else { return Verdict::Sent };
    match code {
        404 => Verdict::Failed(FailureCode::WhatsappNotExist),
        // Every retry would count as another attempt to open a chat.
        463 => Verdict::Hold(LockReason::ReachOutLock),
        475 => Verdict::Hold(LockReason::NewChatCap),
        // Malformed, or a stale device session or address: worth one attempt with fresh devices.
        400 | 421 | 479 if devices == Devices::AsKnown => Verdict::Again(Duration::from_secs(1), Devices::Refreshed),
        429 | 500..=599 if refusals + 1 < REFUSALS_MAX => {
            Verdict::Again(Duration::from_secs(5 << u32::from(refusals.min(6))), devices)
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
        let known = Devices::AsKnown;
        let fresh = Devices::Refreshed;
        let rejected = Verdict::Failed(FailureCode::RejectedByWhatsapp);
        let exhausted = Verdict::Failed(FailureCode::AttemptsExhausted);
        let mut table = vec![
            (None, 0, known, Verdict::Sent),
            (Some(404), 0, known, Verdict::Failed(FailureCode::WhatsappNotExist)),
            (Some(463), 4, known, Verdict::Hold(LockReason::ReachOutLock)),
            (Some(475), 0, fresh, Verdict::Hold(LockReason::NewChatCap)),
            (Some(999), 0, known, rejected),
        ];
        for code in [400, 421, 479] {
            table.push((Some(code), 0, known, Verdict::Again(Duration::from_secs(1), fresh)));
            table.push((Some(code), 3, known, Verdict::Again(Duration::from_secs(1), fresh)));
            table.push((Some(code), 1, fresh, rejected));
        }
        for code in [429, 500, 503] {
            table.push((Some(code), 0, known, Verdict::Again(Duration::from_secs(5), known)));
            table.push((Some(code), 2, fresh, Verdict::Again(Duration::from_secs(20), fresh)));
            table.push((Some(code), REFUSALS_MAX - 1, known, exhausted));
        }
        for (error, refusals, devices, expected) in table {
            assert_eq!(verdict(error, refusals, devices), expected, "{error:?} after {refusals} refusals, {devices:?}");
        }
    }
}
