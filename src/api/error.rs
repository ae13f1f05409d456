//! Every way a call can fail, in one table: reason, gRPC code, HTTP status, whether trying again can help. Programs
//! decide by the reason, which never changes; texts are for people and never hold a phone number or a body.

use std::time::Duration;

use crate::number::message::{EndpointRefused, EraseRefused, PasskeyNotTaken, SendRefused, Unserved};
use crate::store::error::StoreError;
use crate::supervisor::fleet::FleetError;

/// The name of this API in `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "switchboard";

/// The gRPC codes that occur, with their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The caller gave something that can never work.
    InvalidArgument = 3,
    /// The deadline passed first.
    DeadlineExceeded = 4,
    /// It does not exist as far as the caller can tell.
    NotFound = 5,
    /// It exists already.
    AlreadyExists = 6,
    /// A live key of the wrong kind.
    PermissionDenied = 7,
    /// A limit was reached.
    ResourceExhausted = 8,
    /// Something else must happen first.
    FailedPrecondition = 9,
    /// The position is no longer kept.
    OutOfRange = 11,
    /// Not in this version.
    Unimplemented = 12,
    /// A defect of ours.
    Internal = 13,
    /// Not at this moment.
    Unavailable = 14,
    /// No live key.
    Unauthenticated = 16,
}

impl Code {
    /// The name, as gRPC writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::NotFound => "NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::OutOfRange => "OUT_OF_RANGE",
            Self::Unimplemented => "UNIMPLEMENTED",
            Self::Internal => "INTERNAL",
            Self::Unavailable => "UNAVAILABLE",
            Self::Unauthenticated => "UNAUTHENTICATED",
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident $name:literal $code:ident $http:literal $retryable:literal $text:literal,)*) => {
        /// Why a call failed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[$doc])* $reason,)*
        }

        impl Reason {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$reason),*];

            /// The stable name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$reason => $name),* }
            }

            /// The gRPC code.
            #[must_use]
            pub const fn code(self) -> Code {
                match self { $(Self::$reason => Code::$code),* }
            }

            /// The HTTP status.
            #[must_use]
            pub const fn http_status(self) -> u16 {
                match self { $(Self::$reason => $http),* }
            }

            /// Whether the same call can succeed later.
            #[must_use]
            pub const fn is_retryable(self) -> bool {
                match self { $(Self::$reason => $retryable),* }
            }

            /// For people.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$reason => $text),* }
            }
        }
    };
}

reasons! {
    /// No live key.
    Unauthorized "UNAUTHORIZED" Unauthenticated 401 false "a valid api key is required in x-api-key",
    /// Only the operator may.
    OperatorScopeRequired "OPERATOR_SCOPE_REQUIRED" PermissionDenied 403 false "this call needs the operator's key",
    /// The operator's key does not reach what tenants own.
    OperatorScopeNotAllowed "OPERATOR_SCOPE_NOT_ALLOWED" PermissionDenied 403 false "the operator's key cannot be used for this call",
    /// A tenant's key where a number's is needed.
    TenantScopeNotAllowed "TENANT_SCOPE_NOT_ALLOWED" PermissionDenied 403 false "a tenant's key cannot be used for this call",
    /// A number's key where a tenant's is needed.
    NumberScopeNotAllowed "NUMBER_SCOPE_NOT_ALLOWED" PermissionDenied 403 false "a number's key cannot be used for this call",
    /// No such tenant.
    TenantNotFound "TENANT_NOT_FOUND" NotFound 404 false "no such tenant",
    /// No such number.
    NumberNotFound "NUMBER_NOT_FOUND" NotFound 404 false "no such number",
    /// No such message.
    MessageNotFound "MESSAGE_NOT_FOUND" NotFound 404 false "no such message",
    /// No such webhook.
    WebhookNotFound "WEBHOOK_NOT_FOUND" NotFound 404 false "no such webhook",
    /// No such path.
    PathNotFound "PATH_NOT_FOUND" Unimplemented 404 false "no such path",
    /// The path has other methods.
    MethodNotAllowed "METHOD_NOT_ALLOWED" Unimplemented 405 false "the path does not take this method",
    /// A tenant's key and no number named.
    NumberRequired "NUMBER_REQUIRED" InvalidArgument 400 false "a tenant's key must name the number",
    /// A field is wrong.
    ValidationError "VALIDATION_ERROR" InvalidArgument 400 false "the request is not valid",
    /// The recipient is not a phone number.
    InvalidDestination "INVALID_DESTINATION" InvalidArgument 400 false "the destination is not an E.164 phone number",
    /// The body is too big.
    PayloadTooLarge "PAYLOAD_TOO_LARGE" InvalidArgument 413 false "the request body is too large",
    /// The request id was used for something else.
    RequestIdReused "REQUEST_ID_REUSED" InvalidArgument 409 false "the request id was used before for another request",
    /// The range ends before it begins, or is no range of dates.
    InvalidDateRange "INVALID_DATE_RANGE" InvalidArgument 400 false "the range of dates is not valid",
    /// The page token was not made by this API.
    InvalidPageToken "INVALID_PAGE_TOKEN" InvalidArgument 400 false "the page token is not valid",
    /// The cursor was not made by this API, or for another number.
    CursorInvalid "CURSOR_INVALID" InvalidArgument 400 false "the cursor is not valid",
    /// The cursor is older than what is kept.
    CursorExpired "CURSOR_EXPIRED" OutOfRange 410 false "events after this cursor are no longer kept",
    /// The phone number is taken.
    NumberAlreadyExists "NUMBER_ALREADY_EXISTS" AlreadyExists 409 false "the phone number is registered already",
    /// Not in this version.
    KindNotSupported "KIND_NOT_SUPPORTED" Unimplemented 400 false "this kind of number is not supported",
    /// The webhook's target is forbidden.
    WebhookUrlRefused "WEBHOOK_URL_REFUSED" InvalidArgument 400 false "the webhook's url is refused",
    /// A number's key and another number named.
    NumberMismatch "NUMBER_MISMATCH" InvalidArgument 400 false "the key belongs to another number",
    /// The event is not kept any more, or never was.
    EventNotFound "EVENT_NOT_FOUND" NotFound 404 false "no such event is kept",
    /// A replay is under way, or too much waits to be sent again.
    ReplayBusy "REPLAY_BUSY" ResourceExhausted 409 true "the webhook is busy sending again",
    /// The number has as many webhooks as it may.
    WebhookLimitExceeded "WEBHOOK_LIMIT_EXCEEDED" ResourceExhausted 409 false "the number has as many webhooks as it may",
    /// Too many unsettled sends.
    QueueFull "QUEUE_FULL" ResourceExhausted 429 true "the number's queue is full",
    /// It would wait longer than its caller likes.
    WaitTooLong "WAIT_TOO_LONG" ResourceExhausted 429 true "the message would wait longer than max_wait",
    /// Too many streams follow capacities.
    TooManyWatchers "TOO_MANY_WATCHERS" ResourceExhausted 429 true "too many streams follow capacities",
    /// Too many calls at once for the number.
    NumberBusy "NUMBER_BUSY" ResourceExhausted 429 true "too many calls at once for this number",
    /// A message to the contact may just be leaving.
    ContactBusy "CONTACT_BUSY" ResourceExhausted 409 true "a message to this contact is being sent; try again in a moment",
    /// The number is linked already.
    AlreadyLinked "ALREADY_LINKED" FailedPrecondition 409 false "the number is linked already; log it out first",
    /// The number is stopped.
    NumberStopped "NUMBER_STOPPED" FailedPrecondition 409 false "the number is stopped; start it first",
    /// WhatsApp can only be told over the number's connection.
    NumberNotConnected "NUMBER_NOT_CONNECTED" FailedPrecondition 409 false "the number is not connected",
    /// Nobody asks for a passkey.
    PasskeyNotRequested "PASSKEY_NOT_REQUESTED" FailedPrecondition 409 false "no passkey is asked for, or it was answered already",
    /// There is no code to compare.
    PasskeyCodeNotShown "PASSKEY_CODE_NOT_SHOWN" FailedPrecondition 409 false "there is no code to confirm, or it was confirmed already",
    /// WhatsApp did not take it.
    PasskeyRefused "PASSKEY_REFUSED" FailedPrecondition 409 false "WhatsApp did not accept it; link the number again",
    /// The number starts, restarts, or is quarantined.
    NumberUnavailable "NUMBER_UNAVAILABLE" Unavailable 503 true "the number is not served at this moment",
    /// The stream's client reads too slowly.
    SlowConsumer "SLOW_CONSUMER" Unavailable 503 true "the stream was not read; go on from the last cursor",
    /// The daemon goes down.
    Draining "DRAINING" Unavailable 503 true "the daemon is shutting down",
    /// Too many calls at once.
    Overloaded "OVERLOADED" Unavailable 503 true "too many calls at once",
    /// The disk refused.
    StoreFailed "STORE_FAILED" Unavailable 503 true "the store is not available",
    /// There is no room, or too little to begin something new.
    DiskFull "DISK_FULL" ResourceExhausted 507 true "the disk is full",
    /// The deadline passed first.
    DeadlineExceeded "DEADLINE_EXCEEDED" DeadlineExceeded 504 true "the deadline passed; the call may have taken effect",
    /// A defect of ours.
    Internal "INTERNAL" Internal 500 true "internal error",
}

/// One wrong field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Its name, as in the protobuf contract.
    pub field: &'static str,
    /// What is wrong with it; never its value.
    pub problem: String,
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", reason.name())]
pub struct ApiError {
    /// Why.
    pub reason: Reason,
    /// The fields that are wrong.
    pub violations: Vec<Violation>,
    /// When trying again makes sense.
    pub retry_after: Option<Duration>,
    /// What varies, by stable key.
    pub metadata: Vec<(&'static str, String)>,
}

impl From<Reason> for ApiError {
    fn from(reason: Reason) -> Self {
        Self { reason, violations: Vec::new(), retry_after: None, metadata: Vec::new() }
    }
}

impl ApiError {
    /// One field is wrong.
    #[must_use]
    pub fn field(field: &'static str, problem: impl Into<String>) -> Self {
        Self::of_field(Reason::ValidationError, field, problem)
    }

    /// One field is wrong in a way that has its own reason.
    #[must_use]
    pub fn of_field(reason: Reason, field: &'static str, problem: impl Into<String>) -> Self {
        let violations = vec![Violation { field, problem: problem.into() }];
        Self { violations, ..Self::from(reason) }
    }

    /// With one more fact.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.metadata.push((key, value.into()));
        self
    }

    /// With the wait after which to try again.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}

/// Wait suggested after a refusal that passes quickly.
const RETRY_SOON: Duration = Duration::from_secs(1);
/// Wait suggested when a queue must drain first.
const RETRY_LATER: Duration = Duration::from_secs(30);

/// Wait suggested while the disk does not work: that is how often it is looked at.
const RETRY_DISK: Duration = Duration::from_secs(10);

impl From<Unserved> for ApiError {
    fn from(unserved: Unserved) -> Self {
        match unserved {
            Unserved::NotReady => Self::from(Reason::NumberUnavailable).retry_after(RETRY_SOON),
            Unserved::DiskFull => Self::from(Reason::DiskFull).retry_after(RETRY_DISK),
            Unserved::StoreFailed => Self::from(Reason::StoreFailed).retry_after(RETRY_DISK),
        }
    }
}

impl From<SendRefused> for ApiError {
    fn from(refused: SendRefused) -> Self {
        match refused {
            SendRefused::Unserved(unserved) => unserved.into(),
            SendRefused::Busy => Self::from(Reason::NumberBusy).retry_after(RETRY_SOON),
            SendRefused::QueueFull => Self::from(Reason::QueueFull).retry_after(RETRY_LATER),
            SendRefused::WaitTooLong { wait, limiting } => {
                let error = Self::from(Reason::WaitTooLong).with("limiting_reason", limiting.name());
                match wait {
                    Some(wait) => {
                        error.with("predicted_wait_ms", wait.as_millis().to_string()).retry_after(wait.max(RETRY_SOON))
                    }
                    None => error.retry_after(RETRY_LATER),
                }
            }
            SendRefused::Draining => Self::from(Reason::Draining).retry_after(RETRY_SOON),
            SendRefused::RequestIdReused => Reason::RequestIdReused.into(),
        }
    }
}

impl From<EndpointRefused> for ApiError {
    fn from(refused: EndpointRefused) -> Self {
        match refused {
            EndpointRefused::Unserved(unserved) => unserved.into(),
            EndpointRefused::NotFound => Reason::WebhookNotFound.into(),
            EndpointRefused::TooMany => Reason::WebhookLimitExceeded.into(),
            EndpointRefused::ReplayBusy => Self::from(Reason::ReplayBusy).retry_after(RETRY_LATER),
        }
    }
}

impl From<EraseRefused> for ApiError {
    fn from(refused: EraseRefused) -> Self {
        match refused {
            EraseRefused::Unserved(unserved) => unserved.into(),
            EraseRefused::InFlight => Self::from(Reason::ContactBusy).retry_after(RETRY_SOON),
            EraseRefused::TooMany => Self::from(Reason::NumberBusy).retry_after(RETRY_LATER),
        }
    }
}

impl From<PasskeyNotTaken> for ApiError {
    fn from(not_taken: PasskeyNotTaken) -> Self {
        match not_taken {
            PasskeyNotTaken::Unserved(unserved) => unserved.into(),
            PasskeyNotTaken::NotRequested => Reason::PasskeyNotRequested.into(),
            PasskeyNotTaken::NoCode => Reason::PasskeyCodeNotShown.into(),
            PasskeyNotTaken::OtherCode => Self::field("code", "must be the code that the phone shows"),
            PasskeyNotTaken::Refused => Reason::PasskeyRefused.into(),
        }
    }
}

impl From<FleetError> for ApiError {
    fn from(error: FleetError) -> Self {
        match error {
            FleetError::NotFound => Reason::NumberNotFound.into(),
            FleetError::GoingDown => Self::from(Reason::Draining).retry_after(RETRY_SOON),
            FleetError::Store(error) => error.into(),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "the store refused a call");
        match error {
            StoreError::DiskFull => Self::from(Reason::DiskFull).retry_after(RETRY_DISK),
            _ => Self::from(Reason::StoreFailed).retry_after(RETRY_SOON),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const PROTOS: [&str; 7] = [
        include_str!("../../proto/switchboard/v1/capacity.proto"),
        include_str!("../../proto/switchboard/v1/event.proto"),
        include_str!("../../proto/switchboard/v1/message.proto"),
        include_str!("../../proto/switchboard/v1/number.proto"),
        include_str!("../../proto/switchboard/v1/operator.proto"),
        include_str!("../../proto/switchboard/v1/tenant.proto"),
        include_str!("../../proto/switchboard/v1/webhook.proto"),
    ];

    #[test]
    fn names_are_unique_and_well_formed() {
        let names: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for name in names {
            assert!(name.len() <= 63 && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'), "{name}");
        }
    }

    #[test]
    fn only_unavailable_and_exhausted_calls_are_worth_repeating() {
        for reason in Reason::ALL {
            let repeatable = matches!(
                reason.code(),
                Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Internal
            );
            assert!(!reason.is_retryable() || repeatable, "{reason:?}");
            assert!((400..600).contains(&reason.http_status()), "{reason:?}");
        }
    }

    #[test]
    fn every_reason_of_the_contract_exists_and_every_reason_is_in_it() {
        let known: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        let contract = PROTOS.concat();
        for line in contract.lines().filter(|line| line.trim_start().starts_with("//")) {
            let Some((_, list)) = line.split_once("Errors:") else { continue };
            for word in list.split(|character: char| !(character.is_ascii_uppercase() || character == '_')) {
                let code = [
                    "INVALID_ARGUMENT",
                    "NOT_FOUND",
                    "ALREADY_EXISTS",
                    "RESOURCE_EXHAUSTED",
                    "FAILED_PRECONDITION",
                    "OUT_OF_RANGE",
                    "UNIMPLEMENTED",
                    "UNAVAILABLE",
                ];
                if word.len() > 5 && word.contains('_') && !code.contains(&word) {
                    assert!(known.contains(word), "{word} is in the contract and not in the table");
                }
            }
        }
        let http_only = ["INVALID_DATE_RANGE", "PATH_NOT_FOUND", "METHOD_NOT_ALLOWED", "PAYLOAD_TOO_LARGE"];
        for name in known.iter().filter(|name| !http_only.contains(name)) {
            assert!(contract.contains(name), "{name} is not in the contract");
        }
    }
}
