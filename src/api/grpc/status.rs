//! Errors as gRPC carries them: the code, and `google.rpc` details that programs decide by.

use std::collections::HashMap;

use http::Response;
use tonic::{Code as GrpcCode, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::api::error::{ApiError, Code, DOMAIN, Reason};

/// The status of a failed call.
#[must_use]
pub fn status_of(error: &ApiError) -> Status {
    let mut details = ErrorDetails::new();
    let metadata: HashMap<String, String> =
        error.metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    details.set_error_info(error.reason.name(), DOMAIN, metadata);
    for violation in &error.violations {
        details.add_bad_request_violation(violation.field, &violation.problem);
    }
    if error.retry_after.is_some() {
        details.set_retry_info(error.retry_after);
    }
    if let Some(subject) = quota_subject(error.reason) {
        details.add_quota_failure_violation(subject, error.reason.text());
    }
    Status::with_error_details(code_of(error.reason.code()), error.reason.text(), details)
}

/// The whole answer, for layers that answer before a service is reached.
#[must_use]
pub fn response_of<B: Default>(error: &ApiError) -> Response<B> {
    status_of(error).into_http()
}

fn quota_subject(reason: Reason) -> Option<&'static str> {
    match reason {
        Reason::QueueFull => Some("number:outbox"),
        Reason::WaitTooLong => Some("number:limits"),
        Reason::NumberBusy => Some("number:calls"),
        Reason::WebhookLimitExceeded => Some("number:webhooks"),
        _ => None,
    }
}

fn code_of(code: Code) -> GrpcCode {
    GrpcCode::from_i32(code as i32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_reason_keeps_its_code_and_carries_its_name() {
        for reason in Reason::ALL {
            let status = status_of(&ApiError::from(*reason));
            assert_eq!(status.code() as i32, reason.code() as i32);
            let info = status.get_details_error_info().unwrap();
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason.name(), DOMAIN));
        }
    }

    #[test]
    fn details_are_there_where_they_apply() {
        let wrong = status_of(&ApiError::field("text", "is required"));
        assert_eq!(wrong.get_details_bad_request().unwrap().field_violations[0].field, "text");
        let full = ApiError::from(Reason::QueueFull).retry_after(Duration::from_secs(3)).with("depth", "9");
        let full = status_of(&full);
        assert_eq!(full.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_secs(3)));
        assert_eq!(full.get_details_quota_failure().unwrap().violations[0].subject, "number:outbox");
        assert_eq!(full.get_details_error_info().unwrap().metadata["depth"], "9");
    }
}
