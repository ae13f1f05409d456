//! The body of a delivery: `{"event": "...", "data": {...}}` in camelCase, phone numbers in E.164, times in RFC 3339.
//! `data.id` is the event's id (`evt_…`): the one to drop repeats by, equal to the `webhook-id` header. WhatsApp's id
//! of a message is `messageId`, ours is `internalMessageId`. Fields are added, never renamed or removed.

use serde::Serialize;

use crate::domain::event::{Event, EventBody, OutboundEvent, ReceivedEvent};
use crate::domain::phone::{Contact, Phone};

#[derive(Serialize)]
struct Envelope<'a> {
    event: &'static str,
    data: Data<'a>,
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

/// The bytes to sign and send. `own` is the phone number of the number the event tells of.
///
/// # Errors
/// Never for events of this program; the serializer has the right to.
pub fn body(event: &Event, own: &Phone) -> Result<Vec<u8>, serde_json::Error> {
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
    })
}

fn facts<'a>(event: &'a Event, own: &Phone) -> Facts<'a> {
    let of_number =
        |state, reason, reconnecting| Facts::Number(NumberFacts { number: own.e164(), state, reason, reconnecting });
    match &event.body {
        EventBody::Outbound(body) => Facts::Outbound(outbound(body)),
        EventBody::Received(body) => Facts::Received(received(body, own)),
        EventBody::NumberCreated => of_number(None, None, None),
        EventBody::NumberConnected => of_number(Some("OPEN"), None, None),
        EventBody::NumberDisconnected { reason, reconnecting } => {
            of_number(Some("CLOSE"), Some(reason.as_str()), Some(*reconnecting))
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
    use crate::domain::id::{ChatNo, EventId, EventSeq, MessageId, MessageSeq, NumberId};
    use crate::domain::message::{FailureCode, MessageStatus};
    use crate::domain::time::Timestamp;
    use serde_json::{Value, json};

    const NUMBER: NumberId = NumberId(1);

    fn check(body: EventBody, expected: Value) {
        let event = Event { id: EventId { number: NUMBER, seq: EventSeq(42) }, at: Timestamp(1_763_819_999_042), body };
        let own = Phone::parse("+5511900000001").unwrap();
        let bytes = super::body(&event, &own).unwrap();
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
