//! The body of a delivery: `{"event": "...", "data": {...}}` in camelCase, phone numbers in E.164, times in RFC 3339.
//! `data.id` is the event's id (`evt_…`): the one to drop repeats by, equal to the `webhook-id` header. WhatsApp's id
//! of a message is `messageId`, ours is `internalMessageId`. `delivery` tells of this delivery, not of the event: its
//! place in the endpoint's queue, whether it is late or a replay, what it overtook. Fields are added, never renamed.

use serde::Serialize;

use crate::domain::delivery::{Course, Dispatch};
use crate::domain::endpoint::DeliverySeq;
use crate::domain::event::{Event, EventBody, OutboundEvent, ReceivedEvent};
use crate::domain::id::{EventId, NumberId};
use crate::domain::phone::{Contact, Phone};

/// Header with the delivery's place in the endpoint's queue.
pub const SEQUENCE_HEADER: &str = "webhook-sequence";
/// Header of what is sent again on request: `true`.
const REPLAY_HEADER: &str = "webhook-replay";
/// Header of what comes after later ones of its chat: `true`.
const LATE_HEADER: &str = "webhook-late";
/// Header with the number of earlier events of the chat that are still to come.
const MISSING_HEADER: &str = "webhook-missing";

/// What the headers tell of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Its place in the endpoint's queue.
    pub sequence: DeliverySeq,
    /// The way it takes.
    pub course: Course,
    /// Earlier events of its chat that are still to come.
    pub missing: usize,
}

impl Marks {
    /// The headers that not every delivery has.
    pub(super) fn flags(self) -> impl Iterator<Item = (&'static str, String)> {
        let course = match self.course {
            Course::Live => None,
            Course::Late => Some((LATE_HEADER, "true".to_owned())),
            Course::Replay => Some((REPLAY_HEADER, "true".to_owned())),
        };
        let missing = (self.missing > 0).then(|| (MISSING_HEADER, self.missing.to_string()));
        course.into_iter().chain(missing)
    }
}

/// What the headers are to tell of a delivery.
#[must_use]
pub fn marks(outgoing: &Dispatch) -> Marks {
    let Dispatch { row, missing_count, .. } = outgoing;
    Marks { sequence: row.sequence, course: row.course, missing: *missing_count }
}

#[derive(Serialize)]
struct Envelope<'a> {
    event: &'static str,
    data: Data<'a>,
    delivery: DeliveryFacts,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DeliveryFacts {
    sequence: u64,
    replay: bool,
    late: bool,
    missing: Vec<Missing>,
    missing_count: usize,
}

#[derive(Serialize)]
struct Missing {
    id: String,
    sequence: u64,
}

impl DeliveryFacts {
    fn of(outgoing: &Dispatch, number: NumberId) -> Self {
        let missing = outgoing.missing.iter();
        let named = |(sequence, seq): &(DeliverySeq, _)| Missing {
            id: EventId { number, seq: *seq }.to_string(),
            sequence: sequence.0,
        };
        Self {
            sequence: outgoing.row.sequence.0,
            replay: outgoing.row.course == Course::Replay,
            late: outgoing.row.course == Course::Late,
            missing: missing.map(named).collect(),
            missing_count: outgoing.missing_count,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Data<'a> {
    id: String,
    sequence: u64,
    number_id: String,
    /// When it happened, by WhatsApp's clock where it says so.
    timestamp: String,
    /// When it was recorded.
    created_at: String,
    #[serde(flatten)]
    facts: Facts<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Facts<'a> {
    Outbound(OutboundFacts<'a>),
    Received(ReceivedFacts<'a>),
    Number(NumberFacts<'a>),
    Webhook(WebhookFacts),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OutboundFacts<'a> {
    message_id: &'a str,
    internal_message_id: String,
    correlation_id: Option<&'a str>,
    status: &'static str,
    to: Option<String>,
    destination_number: Option<String>,
    error: Option<&'static str>,
    error_code: Option<&'static str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ReceivedFacts<'a> {
    message_id: &'a str,
    internal_message_id: String,
    from: Option<String>,
    to: String,
    #[serde(rename = "type")]
    kind: &'static str,
    from_me: bool,
    content: &'a str,
    participant_name: Option<&'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NumberFacts<'a> {
    number: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reconnecting: Option<bool>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WebhookFacts {
    webhook_id: String,
    reason: &'static str,
}

/// The bytes to sign and send. `own` is the phone number of the number the event tells of.
///
/// # Errors
/// Never for events of this program; the serializer has the right to.
pub fn body(event: &Event, own: &Phone, outgoing: &Dispatch) -> Result<Vec<u8>, serde_json::Error> {
    let happened = match &event.body {
        EventBody::Received(received) => received.written_at,
        _ => event.at,
    };
    serde_json::to_vec(&Envelope {
        event: event.kind().name(),
        data: Data {
            id: event.id.to_string(),
            sequence: event.id.seq.0,
            number_id: event.id.number.to_string(),
            timestamp: happened.to_string(),
            created_at: event.at.to_string(),
            facts: facts(event, own),
        },
        delivery: DeliveryFacts::of(outgoing, event.id.number),
    })
}

fn facts<'a>(event: &'a Event, own: &Phone) -> Facts<'a> {
    let of_number =
        |state, reason, reconnecting| Facts::Number(NumberFacts { number: own.e164(), state, reason, reconnecting });
    match &event.body {
        EventBody::Outbound(body) => Facts::Outbound(outbound(body)),
        EventBody::Received(body) => Facts::Received(received(body, own)),
        // Never sent: who delivers looks first.
        EventBody::NumberCreated | EventBody::Erased(_) => of_number(None, None, None),
        EventBody::NumberConnected | EventBody::NumberRecovered => of_number(Some("OPEN"), None, None),
        EventBody::NumberDegraded { reason } => of_number(Some("OPEN"), Some(reason.as_str()), None),
        EventBody::NumberDisconnected { reason, reconnecting } => {
            of_number(Some("CLOSE"), Some(reason.as_str()), Some(*reconnecting))
        }
        EventBody::WebhookDisabled { webhook, reason } => {
            Facts::Webhook(WebhookFacts { webhook_id: webhook.to_string(), reason: reason.code() })
        }
    }
}

fn outbound(body: &OutboundEvent) -> OutboundFacts<'_> {
    let failure = body.failure.map(|code| code.name());
    OutboundFacts {
        message_id: &body.whatsapp_id,
        internal_message_id: body.message.to_string(),
        correlation_id: body.correlation_id.as_deref(),
        status: body.status.name(),
        to: phone_of(&body.to),
        destination_number: phone_of(&body.to),
        error: failure,
        error_code: failure,
    }
}

fn received<'a>(body: &'a ReceivedEvent, own: &Phone) -> ReceivedFacts<'a> {
    ReceivedFacts {
        message_id: &body.whatsapp_id,
        internal_message_id: body.message.to_string(),
        from: phone_of(&body.from),
        to: own.e164(),
        kind: "text",
        from_me: false,
        content: &body.text,
        participant_name: body.sender_name.as_deref(),
    }
}

/// `null` where only the WhatsApp identity of the contact is known.
fn phone_of(contact: &Contact) -> Option<String> {
    contact.phone.as_ref().map(Phone::e164)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::DeliveryRow;
    use crate::domain::endpoint::DisabledReason;
    use crate::domain::id::{ChatNo, EndpointId, EventSeq, MessageId, MessageSeq};
    use crate::domain::message::{FailureCode, MessageStatus};
    use crate::domain::time::Timestamp;
    use serde_json::{Value, json};

    const NUMBER: NumberId = NumberId(1);

    fn outgoing(course: Course) -> Dispatch {
        let (at, chat) = (Timestamp(0), Some(ChatNo(1)));
        let row = DeliveryRow {
            event: EventSeq(42),
            chat,
            attempts: 0,
            due: at,
            queued_at: at,
            sequence: DeliverySeq(17),
            course,
            stuck_since: None,
        };
        Dispatch { endpoint: 1, row, background: false, missing: Vec::new(), missing_count: 0 }
    }

    fn check(body: EventBody, mut expected: Value) {
        let event = Event { id: EventId { number: NUMBER, seq: EventSeq(42) }, at: Timestamp(1_763_819_999_042), body };
        let own = Phone::parse("+5511900000001").unwrap();
        let bytes = super::body(&event, &own, &outgoing(Course::Live)).unwrap();
        expected["delivery"] =
            json!({"sequence": 17, "replay": false, "late": false, "missing": [], "missingCount": 0});
        assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap(), expected);
    }

    fn contact() -> Contact {
        Contact::of_phone(Phone::parse("+5511999999999").unwrap())
    }

    fn message() -> MessageId {
        MessageId { number: NUMBER, seq: MessageSeq(7) }
    }

    #[test]
    fn a_failed_message() {
        check(
            EventBody::Outbound(OutboundEvent {
                message: message(),
                whatsapp_id: "3EB0AA".to_owned(),
                correlation_id: Some("order-7".to_owned()),
                to: contact(),
                chat: ChatNo(1),
                status: MessageStatus::Failed,
                failure: Some(FailureCode::WhatsappNotExist),
            }),
            json!({"event": "message.failed", "data": {
                "id": "evt_0000000000001000000000001a",
                "sequence": 42,
                "numberId": "num_0000000000001",
                "timestamp": "2025-11-22T13:59:59.042Z",
                "createdAt": "2025-11-22T13:59:59.042Z",
                "messageId": "3EB0AA",
                "internalMessageId": "msg_00000000000010000000000007",
                "correlationId": "order-7",
                "status": "FAILED",
                "to": "+5511999999999",
                "destinationNumber": "+5511999999999",
                "error": "WHATSAPP_NOT_EXIST",
                "errorCode": "WHATSAPP_NOT_EXIST",
            }}),
        );
    }

    #[test]
    fn a_received_message() {
        check(
            EventBody::Received(ReceivedEvent {
                message: message(),
                whatsapp_id: "3EB0BB".to_owned(),
                from: contact(),
                chat: ChatNo(1),
                sender_name: None,
                text: "olá".to_owned(),
                written_at: Timestamp(1_763_819_998_000),
            }),
            json!({"event": "message.received", "data": {
                "id": "evt_0000000000001000000000001a",
                "sequence": 42,
                "numberId": "num_0000000000001",
                "timestamp": "2025-11-22T13:59:58.000Z",
                "createdAt": "2025-11-22T13:59:59.042Z",
                "messageId": "3EB0BB",
                "internalMessageId": "msg_00000000000010000000000007",
                "from": "+5511999999999",
                "to": "+5511900000001",
                "type": "text",
                "fromMe": false,
                "content": "olá",
                "participantName": null,
            }}),
        );
    }

    #[test]
    fn a_delivery_tells_what_it_overtook() {
        let body = EventBody::NumberConnected;
        let event = Event { id: EventId { number: NUMBER, seq: EventSeq(42) }, at: Timestamp(0), body };
        let own = Phone::parse("+5511900000001").unwrap();
        let missing = vec![(DeliverySeq(15), EventSeq(40))];
        let overtaking = Dispatch { missing, missing_count: 30, ..outgoing(Course::Live) };
        let told: Value = serde_json::from_slice(&super::body(&event, &own, &overtaking).unwrap()).unwrap();
        let expected = json!([{"id": "evt_00000000000010000000000018", "sequence": 15}]);
        assert_eq!((&told["delivery"]["missing"], &told["delivery"]["missingCount"]), (&expected, &json!(30)));
        assert_eq!(marks(&overtaking).flags().collect::<Vec<_>>(), [("webhook-missing", "30".to_owned())]);
        for (course, flag) in [(Course::Late, "late"), (Course::Replay, "replay")] {
            let told: Value = serde_json::from_slice(&super::body(&event, &own, &outgoing(course)).unwrap()).unwrap();
            assert_eq!(told["delivery"][flag], true);
            assert_eq!(marks(&outgoing(course)).flags().count(), 1);
        }
    }

    #[test]
    fn a_webhook_that_was_disabled() {
        check(
            EventBody::WebhookDisabled {
                webhook: EndpointId { number: NUMBER, ordinal: 3 },
                reason: DisabledReason::Failing,
            },
            json!({"event": "webhook.disabled", "data": {
                "id": "evt_0000000000001000000000001a",
                "sequence": 42,
                "numberId": "num_0000000000001",
                "timestamp": "2025-11-22T13:59:59.042Z",
                "createdAt": "2025-11-22T13:59:59.042Z",
                "webhookId": "whk_00000000000010000000000003",
                "reason": "FAILING",
            }}),
        );
    }

    #[test]
    fn a_number_that_went() {
        check(
            EventBody::NumberDisconnected { reason: "CONNECTION_LOST".to_owned(), reconnecting: true },
            json!({"event": "number.disconnected", "data": {
                "id": "evt_0000000000001000000000001a",
                "sequence": 42,
                "numberId": "num_0000000000001",
                "timestamp": "2025-11-22T13:59:59.042Z",
                "createdAt": "2025-11-22T13:59:59.042Z",
                "number": "+5511900000001",
                "state": "CLOSE",
                "reason": "CONNECTION_LOST",
                "reconnecting": true,
            }}),
        );
    }
}
