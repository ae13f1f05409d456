//! The account's lock on writing to people who never wrote to it: asked for when WhatsApp refused to open a chat.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use whatsapp_rust::{Client, ReachoutTimelock};

use super::signals::Signals;
use crate::domain::limiter::LockAnswer;
use crate::domain::time::Timestamp;
use crate::session::contract::SessionEvent;

/// Longest wait for the answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Asks once and tells the number. Without an answer nothing is told: the number holds as long as it does by default.
pub(super) fn ask(client: Arc<Client>, signals: Arc<Signals>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(async move {
        let mex = client.mex();
        if let Ok(Ok(lock)) = timeout(ANSWER_WITHIN, mex.fetch_reachout_timelock()).await {
            signals.deliver(SessionEvent::Lock(read(&lock))).await;
        } else {
            tracing::warn!("whatsapp does not say until when new chats are locked");
        }
    })
}

/// Times are seconds since the epoch, as text (fixture in the library's own tests).
fn read(lock: &ReachoutTimelock) -> LockAnswer {
    if lock.is_active == Some(false) {
        return LockAnswer::None;
    }
    let ends = lock.time_enforcement_ends.as_deref().and_then(|ends| ends.parse::<u64>().ok());
    match ends.filter(|seconds| *seconds > 0) {
        Some(seconds) => LockAnswer::Until(Timestamp(seconds.saturating_mul(1000))),
        None => LockAnswer::Open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_whatsapp_says_of_its_lock_is_read() {
        let lock = |is_active, ends: Option<&str>| {
            let time_enforcement_ends = ends.map(str::to_owned);
            read(&ReachoutTimelock { is_active, time_enforcement_ends, enforcement_type: None })
        };
        assert_eq!(lock(Some(true), Some("1770000000")), LockAnswer::Until(Timestamp(1_770_000_000_000)));
        assert_eq!(lock(None, Some("1770000000")), LockAnswer::Until(Timestamp(1_770_000_000_000)));
        for unclear in [None, Some("0"), Some("soon")] {
            assert_eq!(lock(Some(true), unclear), LockAnswer::Open);
        }
        assert_eq!(lock(Some(false), None), LockAnswer::None);
    }
}
