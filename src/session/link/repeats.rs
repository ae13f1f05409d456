//! Messages that a device could not open and asked for again. The library answers such a request by itself, but it
//! acknowledges it first: a crash in between, and nobody would ever answer. So a request is on disk before anything more
//! is written to the socket, stays there until the device confirms the message, and what one connection left open is
//! answered by the next.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use whatsapp_rust::wacore::time::now_secs;
use whatsapp_rust::wacore_binary::NodeRef;
use whatsapp_rust::waproto::codec;
use whatsapp_rust::waproto::whatsapp as wa;
use whatsapp_rust::{Jid, MessageRetransmission, SendError};

use super::send::{Wire, body_of};
use super::signals::Signals;
use crate::domain::message::Content;
use crate::telemetry::failpoint::{self, Failpoint};

/// Requests noted at once; the library answers further ones, but a crash would forget them.
pub(super) const ASKED_MAX: usize = 1024;
/// Answers that are begun to one request. Not few: the connection may die before a word of it is on the wire.
const ANSWERS_MAX: u8 = 32;
/// How long the device has to confirm the first answer on a connection before it gets another; it doubles with each.
pub(super) const FIRST_PATIENCE: Duration = Duration::from_mins(1);
/// After so many doublings it is seventeen hours.
const DOUBLINGS_MAX: u32 = 10;
/// How long the library has for its own answer.
const OVERDUE_SECONDS: i64 = 10;
/// A request older than this is not answered: the text of the message is not kept longer either.
const KEPT: Duration = Duration::from_secs(8 * 24 * 3600);
/// The library answers no request beyond the fifth (`MAX_RETRY_COUNT`, as WhatsApp Web).
const COUNT_MAX: u8 = 4;
/// Longest time one answer may take; it may ask for the device's keys first.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// One device's request for one message; also what is stored of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asked {
    /// The device, as it names itself.
    pub(super) device: String,
    /// The chat, where a device of our own account asks.
    pub(super) recipient: Option<String>,
    /// The message.
    pub(super) whatsapp_id: String,
    /// How often the device has asked.
    pub(super) count: u8,
    /// When, in seconds since the epoch.
    pub(super) at: i64,
    /// Answers given by later connections.
    pub(super) answers: u8,
}

/// Names one request among those of a session: the device and the message.
pub(super) type AskedName = (String, String);

impl Asked {
    pub(super) fn name(&self) -> AskedName {
        (self.device.clone(), self.whatsapp_id.clone())
    }

    fn patience(&self) -> Duration {
        FIRST_PATIENCE * 2_u32.pow(u32::from(self.answers).min(DOUBLINGS_MAX))
    }

    fn is_stale(&self, now: i64) -> bool {
        let kept = i64::try_from(KEPT.as_secs()).unwrap_or(i64::MAX);
        self.answers >= ANSWERS_MAX || now.saturating_sub(self.at) > kept
    }
}

/// What a stanza asks for, if it is such a request and of a chat between two people.
pub(super) fn asked_by(node: &NodeRef<'_>) -> Option<Asked> {
    if node.tag.as_ref() != "receipt" || node.get_attr("type")?.as_str() != "retry" {
        return None;
    }
    let mut attrs = node.attrs();
    if attrs.optional_jid("participant").is_some() {
        return None;
    }
    let device = attrs.optional_jid("from")?.to_string();
    let recipient = attrs.optional_jid("recipient").map(|jid| jid.to_string());
    let retry = node.get_optional_child("retry")?;
    let count = retry.get_attr("count").and_then(|count| count.as_str().parse().ok()).unwrap_or(1);
    let whatsapp_id = retry.get_attr("id")?.as_str().into_owned();
    Some(Asked { device, recipient, whatsapp_id, count, at: now_secs(), answers: 0 })
}

/// Answers what earlier connections left open, one after the other.
pub(super) async fn answer_all(wire: Arc<Wire>, signals: Arc<Signals>, left: Vec<Asked>) {
    let mut answered = 0_usize;
    for asked in left {
        if !signals.claim_answer(&asked.name(), asked.patience()) {
            continue;
        }
        if asked.is_stale(now_secs()) {
            signals.confirmed(&asked.device, &asked.whatsapp_id);
            continue;
        }
        match timeout(ANSWER_WITHIN, Box::pin(answer(&wire, &asked))).await {
            Ok(Ok(())) => answered += 1,
            // Never to be answered: not asked of us, or not known any more.
            Ok(Err(Unanswered::Impossible)) => signals.confirmed(&asked.device, &asked.whatsapp_id),
            Ok(Err(Unanswered::NotNow)) | Err(_) => {
                tracing::warn!("a request for a repeat waits for the next connection");
            }
        }
    }
    if answered > 0 {
        tracing::info!(answered, "sent again what devices still waited for");
    }
}

/// Answers what the library has left open for a while: it does not say when it failed, and refuses the fifth request.
pub(super) async fn answer_overdue(wire: Arc<Wire>, signals: Arc<Signals>) {
    if let Ok(mut open) = wire.backend.asked().await {
        let overdue = now_secs() - OVERDUE_SECONDS;
        open.retain(|asked| asked.at <= overdue);
        answer_all(wire, signals, open).await;
    }
}

enum Unanswered {
    NotNow,
    Impossible,
}

async fn answer(wire: &Wire, asked: &Asked) -> Result<(), Unanswered> {
    let device: Jid = asked.device.parse().map_err(|_| Unanswered::Impossible)?;
    let recipient: Option<Jid> = asked.recipient.as_ref().and_then(|jid| jid.parse().ok());
    let chat = recipient.as_ref().unwrap_or(&device).to_non_ad();
    let message = text_of(wire, &chat, &asked.whatsapp_id).await?;
    let again = Asked { answers: asked.answers.saturating_add(1), ..asked.clone() };
    wire.backend.note_asked(&again).await.map_err(|_| Unanswered::NotNow)?;
    if asked.answers > 0 || asked.count > 1 {
        // It may have got an answer, and could not open that either. A device asks five times and no more.
        let sessions = wire.client.signal();
        sessions.delete_sessions(std::slice::from_ref(&device)).await.map_err(|_| Unanswered::NotNow)?;
    }
    let count = asked.count.clamp(1, COUNT_MAX);
    let mut request = MessageRetransmission::new(chat, device, message, asked.whatsapp_id.clone(), count);
    if let Some(recipient) = recipient {
        request = request.with_recipient(recipient);
    }
    failpoint::reach(Failpoint::RepeatBeforeWire);
    match wire.client.retransmit_message(request).await {
        Ok(()) => Ok(()),
        Err(SendError::InvalidRequest(_)) => Err(Unanswered::Impossible),
        Err(_) => Err(Unanswered::NotNow),
    }
}

/// What the message says: from the library's own buffer, which files it under either address of the chat, or else from
/// the history.
async fn text_of(wire: &Wire, chat: &Jid, id: &str) -> Result<wa::Message, Unanswered> {
    let mut chats = vec![chat.clone()];
    if let Ok(Some(entry)) = wire.client.get_lid_pn_entry(chat).await {
        chats.extend([Jid::pn(&*entry.phone_number), Jid::lid(&*entry.lid)]);
    }
    for chat in chats {
        let kept = wire.backend.sent(&chat.to_string(), id).await.map_err(|_| Unanswered::NotNow)?;
        if let Some(message) = kept.and_then(|bytes| codec::message_decode(&bytes).ok()) {
            return Ok(message);
        }
    }
    let record = wire.store.outbound_with(id).await.map_err(|_| Unanswered::NotNow)?.ok_or(Unanswered::Impossible)?;
    let content = match record.content {
        Content::NotKept => wire.store.body(record.seq).await.map_err(|_| Unanswered::NotNow)?,
        content => Some(content),
    };
    content.as_ref().and_then(body_of).ok_or(Unanswered::Impossible)
}

#[cfg(test)]
mod tests {
    use super::*;
    use whatsapp_rust::NodeBuilder;

    fn request(from: &str) -> NodeBuilder {
        let retry = NodeBuilder::new("retry").attr("id", "3EB0").attr("count", "2").build();
        NodeBuilder::new("receipt").attr("from", from).attr("id", "3EB0").attr("type", "retry").children([retry])
    }

    #[test]
    fn a_request_names_the_device_and_the_message() {
        let node = request("5511999990001:7@s.whatsapp.net").build();
        let asked = asked_by(&node.as_node_ref()).unwrap();
        assert_eq!(asked.name(), ("5511999990001:7@s.whatsapp.net".to_owned(), "3EB0".to_owned()));
        assert_eq!((asked.count, asked.answers, asked.recipient), (2, 0, None));
        let own = request("5511999990001@s.whatsapp.net").attr("recipient", "5511999990002@s.whatsapp.net").build();
        assert_eq!(asked_by(&own.as_node_ref()).unwrap().recipient.as_deref(), Some("5511999990002@s.whatsapp.net"));
    }

    #[test]
    fn other_receipts_and_groups_ask_for_nothing() {
        let delivered = NodeBuilder::new("receipt").attr("from", "5511999990001@s.whatsapp.net").build();
        let group = request("1-2@g.us").attr("participant", "5511999990001@s.whatsapp.net").build();
        for node in [delivered, group] {
            assert_eq!(asked_by(&node.as_node_ref()), None);
        }
    }

    #[test]
    fn a_request_is_given_up_after_a_few_answers_or_a_week() {
        let node = request("5511999990001@s.whatsapp.net").build();
        let asked = asked_by(&node.as_node_ref()).unwrap();
        assert!(!asked.is_stale(asked.at + 3600));
        assert!(asked.is_stale(asked.at + 9 * 24 * 3600));
        assert!(Asked { answers: ANSWERS_MAX, ..asked.clone() }.is_stale(asked.at));
    }

    #[test]
    fn the_patience_with_a_device_grows_to_most_of_a_day() {
        let node = request("5511999990001@s.whatsapp.net").build();
        let asked = asked_by(&node.as_node_ref()).unwrap();
        let after = |answers| Asked { answers, ..asked.clone() }.patience();
        assert_eq!([0, 1, 2].map(after), [1, 2, 4].map(Duration::from_mins));
        assert!(after(ANSWERS_MAX) < Duration::from_hours(24) && after(ANSWERS_MAX) > Duration::from_hours(12));
    }
}
