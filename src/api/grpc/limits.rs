//! Between a number's own limits and their message.

use std::time::Duration;

use super::proto as pb;
use super::proto::send_limits::NewRecipients as Wire;
use crate::api::error::{ApiError, Reason};
use crate::domain::limiter::{NEW_RECIPIENTS_MAX, NewRecipients};
use crate::domain::orders::{BURST_MAX, CHAT_SECONDS_MAX, MESSAGES_PER_SECOND_MAX, MESSAGES_PER_SECOND_MIN, OwnLimits};

pub(super) fn own_limits(limits: OwnLimits) -> pb::SendLimits {
    let whole = |count: u32| i32::try_from(count).unwrap_or(i32::MAX);
    pb::SendLimits {
        messages_per_second: limits.interval.map(|interval| 1.0 / interval.as_secs_f64()),
        burst: limits.burst.map(whole),
        chat_seconds_per_message: limits.chat_interval.map(|interval| interval.as_secs_f64()),
        chat_burst: limits.chat_burst.map(whole),
        new_recipients: limits.new_recipients.map(|new| match new {
            NewRecipients::PerDay(budget) => Wire::NewRecipientsPerDay(whole(budget)),
            NewRecipients::WarmUp => Wire::NewRecipientsWarmUp(true),
            NewRecipients::Unlimited => Wire::NewRecipientsUnlimited(true),
        }),
    }
}

/// Checks everything and names every wrong field at once.
pub(super) fn own_limits_of(asked: Option<&pb::SendLimits>) -> Result<OwnLimits, ApiError> {
    let Some(asked) = asked else { return Ok(OwnLimits::default()) };
    let mut violations = Vec::new();
    let mut check = |fine: bool, field: &'static str, problem: String| {
        if !fine {
            violations.extend(ApiError::field(field, problem).violations);
        }
    };
    let fits = |value: Option<f64>, least: f64, most: f64| value.is_none_or(|value| (least..=most).contains(&value));
    let (least, most) = (MESSAGES_PER_SECOND_MIN, MESSAGES_PER_SECOND_MAX);
    let problem = format!("must be from {least} to {most}");
    check(fits(asked.messages_per_second, least, most), "limits.messages_per_second", problem);
    let problem = format!("must be from 0 to {CHAT_SECONDS_MAX}");
    check(fits(asked.chat_seconds_per_message, 0.0, CHAT_SECONDS_MAX), "limits.chat_seconds_per_message", problem);
    let burst = |value: Option<i32>| value.map(|value| u32::try_from(value).unwrap_or(0));
    let (own_burst, chat_burst) = (burst(asked.burst), burst(asked.chat_burst));
    for (burst, field) in [(own_burst, "limits.burst"), (chat_burst, "limits.chat_burst")] {
        let fine = burst.is_none_or(|burst| (1..=BURST_MAX).contains(&burst));
        check(fine, field, format!("must be from 1 to {BURST_MAX}"));
    }
    let new_recipients = asked.new_recipients.as_ref().map(|wire| match wire {
        Wire::NewRecipientsPerDay(budget) => u32::try_from(*budget).ok().map(NewRecipients::PerDay),
        Wire::NewRecipientsWarmUp(yes) => yes.then_some(NewRecipients::WarmUp),
        Wire::NewRecipientsUnlimited(yes) => yes.then_some(NewRecipients::Unlimited),
    });
    let fine = match new_recipients {
        None | Some(Some(NewRecipients::WarmUp | NewRecipients::Unlimited)) => true,
        Some(Some(NewRecipients::PerDay(budget))) => budget <= NEW_RECIPIENTS_MAX,
        Some(None) => false,
    };
    check(fine, "limits.new_recipients", format!("must be from 0 to {NEW_RECIPIENTS_MAX}, or true"));
    if !violations.is_empty() {
        return Err(ApiError { violations, ..Reason::ValidationError.into() });
    }
    // The limiter counts whole milliseconds.
    let whole = |seconds: f64| Duration::from_millis(Duration::from_secs_f64(seconds).as_millis() as u64);
    Ok(OwnLimits {
        interval: asked.messages_per_second.map(|rate| whole(1.0 / rate)),
        burst: own_burst,
        chat_interval: asked.chat_seconds_per_message.map(whole),
        chat_burst,
        new_recipients: new_recipients.flatten(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_survive_the_way_and_every_wrong_one_is_named() {
        let set = pb::SendLimits {
            messages_per_second: Some(2.0),
            burst: Some(1),
            chat_seconds_per_message: Some(0.0),
            chat_burst: Some(1000),
            new_recipients: Some(Wire::NewRecipientsPerDay(0)),
        };
        let limits = own_limits_of(Some(&set)).unwrap();
        assert_eq!(limits.interval, Some(Duration::from_millis(500)));
        assert_eq!(own_limits(limits), set);
        assert_eq!(own_limits_of(None).unwrap(), OwnLimits::default());
        let wrong = pb::SendLimits {
            messages_per_second: Some(f64::NAN),
            burst: Some(0),
            chat_seconds_per_message: Some(-1.0),
            chat_burst: Some(-5),
            new_recipients: Some(Wire::NewRecipientsUnlimited(false)),
        };
        assert_eq!(own_limits_of(Some(&wrong)).unwrap_err().violations.len(), 5);
    }
}
