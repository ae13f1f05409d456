//! Messages: accepting them, and reading what became of them.

use std::collections::HashMap;
use std::time::Duration;

use super::error::{ApiError, Reason};
use super::service::{Api, page_size};
use super::tenants::Page;
use super::token::{self, TokenKind};
use crate::domain::access::Caller;
use crate::domain::id::{ChatNo, MessageId, MessageSeq, NumberId};
use crate::domain::message::{Content, Direction, MessageRecord, Progress, TEXT_CHARS_MAX};
use crate::domain::number::CancelOutcome;
use crate::domain::outbox::{DEADLINE_DEFAULT, SCHEDULE_AHEAD_MAX};
use crate::domain::phone::{Contact, Phone};
use crate::domain::retention::Retention;
use crate::domain::time::Timestamp;
use crate::number::handle::{NumberHandle, SendCommand};
use crate::number::message::{Accepted, SendRefused, Unserved};
use crate::store::number_store::NumberStore;
use crate::telemetry::metrics;

/// Most entries of one page.
const PAGE_MAX: usize = 500;
const REQUEST_ID_CHARS_MAX: usize = 128;
const CORRELATION_ID_CHARS_MAX: usize = 128;
/// Most messages withdrawn by one call.
const CANCEL_MAX: usize = 100;
/// Request ids of a number are one space, whichever key or wire they come by.
const REQUEST_SCOPE: &str = "send";

/// What a caller wants to send.
#[derive(Debug, Default)]
pub struct SendOrder<'a> {
    /// The number, as `Api::number` takes it.
    pub number: &'a str,
    /// The recipient.
    pub to: &'a str,
    /// The text; `None` when the caller gave no content at all.
    pub text: Option<&'a str>,
    /// Makes it safe to repeat; empty for none.
    pub request_id: &'a str,
    /// The caller's own reference; empty for none.
    pub correlation_id: &'a str,
    /// Not before this moment; in the past: at once.
    pub send_time: Option<Timestamp>,
    /// Not after this moment.
    pub expire_time: Option<Timestamp>,
    /// Refused if it would probably wait longer, from when it is due.
    pub max_wait: Option<Duration>,
}

/// A message as its owner sees it.
#[derive(Debug, Clone)]
pub struct MessageCard {
    /// Its id.
    pub id: MessageId,
    /// Its history row.
    pub record: MessageRecord,
    /// Where it stands, if this number sent it through the API.
    pub progress: Option<Progress>,
    /// The other side's phone number, where known.
    pub peer: Option<Phone>,
}

/// A message as it was accepted.
#[derive(Debug, Clone)]
pub struct SentCard {
    /// The message.
    pub message: MessageCard,
    /// How long it will probably wait before it leaves; unknown when nobody can tell, and for a repeat.
    pub predicted_wait: Option<Duration>,
}

impl Api {
    /// Accepts a message: it is durable when this returns.
    ///
    /// # Errors
    /// See the contract.
    pub async fn send_message(&self, caller: Caller, order: SendOrder<'_>) -> Result<SentCard, ApiError> {
        let begun = self.parts.clock.monotonic();
        let record = self.number_meant(caller, order.number)?;
        let command = command_of(&order)?;
        let handle = self.handle_of(record.id)?;
        let (to, content) = (command.to.clone(), command.content.clone());
        let (send_at, expires_at) = (command.send_at, command.expires_at);
        let accepted = match times_of(&order, self.parts.clock.now()) {
            Ok(()) => self.accepted(&handle, command).await?,
            // A repeat of what was right at its time gets the same answer.
            Err(wrong) => handle.remembered(&command).await?.ok_or(wrong)?,
        };
        metrics::accepted(self.parts.clock.monotonic().saturating_sub(begun));
        let store = handle.store()?;
        if let Some(message) = store.message(accepted.seq).await? {
            let message = Cards::new(record.id, store).card(message).await?;
            return Ok(SentCard { message, predicted_wait: accepted.predicted_wait });
        }
        // A repeat of a request whose message is no longer kept: the answer is the same.
        let message = MessageRecord {
            seq: accepted.seq,
            chat: ChatNo(0),
            direction: Direction::Outbound,
            whatsapp_id: String::new(),
            correlation_id: some_text(order.correlation_id),
            content,
            sender_name: None,
            created_at: accepted.created_at,
            written_at: accepted.created_at,
            send_at,
            expires_at,
        };
        let id = MessageId { number: record.id, seq: accepted.seq };
        let message = MessageCard { id, record: message, progress: Some(Progress::QUEUED), peer: to.phone };
        Ok(SentCard { message, predicted_wait: accepted.predicted_wait })
    }

    /// Accepts, or finds what was accepted before: a repeat is answered also while nothing new is taken.
    async fn accepted(&self, handle: &NumberHandle, command: SendCommand) -> Result<Accepted, SendRefused> {
        let refused = match handle.send(command.clone(), &self.parts.random).await {
            Err(
                refused @ (SendRefused::QueueFull
                | SendRefused::WaitTooLong { .. }
                | SendRefused::Draining
                | SendRefused::Unserved(Unserved::DiskFull)),
            ) => refused,
            answer => return answer,
        };
        match handle.remembered(&command).await {
            Ok(Some(accepted)) => Ok(accepted),
            Err(SendRefused::RequestIdReused) => Err(SendRefused::RequestIdReused),
            Ok(None) | Err(_) => Err(refused),
        }
    }

    /// One message, by our id.
    ///
    /// # Errors
    /// See the contract.
    pub async fn message(&self, caller: Caller, id: &str) -> Result<MessageCard, ApiError> {
        let id: MessageId = id.parse().map_err(|_| Reason::MessageNotFound)?;
        if caller == Caller::Operator {
            return Err(Reason::OperatorScopeNotAllowed.into());
        }
        let number = self.number_seen(caller, id.number).map_err(|_| Reason::MessageNotFound)?;
        let store = self.store_of(id.number)?;
        let message = store.message(id.seq).await?.ok_or(Reason::MessageNotFound)?;
        let card = Cards::new(id.number, store).card(message).await?;
        self.shown(number.retention, card).ok_or_else(|| Reason::MessageNotFound.into())
    }

    /// One outbound message of a number, by WhatsApp's id, or the newest one with this reference of its caller.
    ///
    /// # Errors
    /// See the contract.
    pub async fn message_named(&self, number: NumberId, name: &str) -> Result<MessageCard, ApiError> {
        let store = self.store_of(number)?;
        let message = match store.outbound_with(name).await? {
            Some(message) => message,
            None => store.correlated_with(name).await?.ok_or(Reason::MessageNotFound)?,
        };
        let retention = self.parts.store.meta().number(number).ok_or(Reason::NumberNotFound)?.retention;
        let card = Cards::new(number, store).card(message).await?;
        self.shown(retention, card).ok_or_else(|| Reason::MessageNotFound.into())
    }

    /// What may be shown of a message. Of one that only passed through: that it was sent, and how far it got.
    fn shown(&self, retention: Retention, mut card: MessageCard) -> Option<MessageCard> {
        match retention.shown_from(self.parts.clock.now()) {
            Some(from) => (card.record.created_at >= from).then_some(card),
            None if card.record.direction == Direction::Outbound => {
                card.record.content = Content::NotKept;
                card.peer = None;
                Some(card)
            }
            None => None,
        }
    }

    /// Withdraws messages of one number; durable when this returns. What became of each, in the order asked. An id of
    /// another number is as unknown as one that never existed.
    ///
    /// # Errors
    /// See the contract.
    pub async fn cancel_messages<'a>(
        &self,
        caller: Caller,
        named: &str,
        ids: &'a [String],
    ) -> Result<Vec<(&'a str, CancelOutcome)>, ApiError> {
        let number = self.number_meant(caller, named)?.id;
        if !(1..=CANCEL_MAX).contains(&ids.len()) {
            return Err(ApiError::field("ids", format!("must hold 1 to {CANCEL_MAX} ids")));
        }
        let seq_of = |id: &String| id.parse::<MessageId>().ok().filter(|id| id.number == number).map(|id| id.seq);
        let mut seqs: Vec<MessageSeq> = ids.iter().filter_map(seq_of).collect();
        seqs.sort_unstable();
        seqs.dedup();
        let outcomes: HashMap<_, _> = self.handle_of(number)?.cancel(&seqs).await?.into_iter().collect();
        let outcome =
            |id: &String| seq_of(id).and_then(|seq| outcomes.get(&seq).copied()).unwrap_or(CancelOutcome::NotFound);
        Ok(ids.iter().map(|id| (id.as_str(), outcome(id))).collect())
    }

    /// A number's messages, newest first.
    ///
    /// # Errors
    /// See the contract.
    pub async fn messages(
        &self,
        caller: Caller,
        named: &str,
        peer: &str,
        size: i32,
        token: &str,
    ) -> Result<Page<MessageCard>, ApiError> {
        let record = self.number_meant(caller, named)?;
        let number = record.id;
        let size = page_size(size, PAGE_MAX)?;
        let before = match token {
            "" => None,
            token => match token::decode(TokenKind::Messages, token) {
                Some([of, seq]) if of == number.0 => Some(MessageSeq(seq)),
                _ => return Err(Reason::InvalidPageToken.into()),
            },
        };
        let store = self.store_of(number)?;
        let chat = match peer {
            "" => None,
            peer => match store.chat_of(&recipient("peer_phone_number", peer)?).await? {
                Some(chat) => Some(chat),
                None => return Ok(Page { entries: Vec::new(), next: String::new() }),
            },
        };
        let Some(from) = record.retention.shown_from(self.parts.clock.now()) else {
            return Ok(Page { entries: Vec::new(), next: String::new() });
        };
        let mut rows = store.messages(chat, before, size).await?;
        rows.retain(|row| row.created_at >= from);
        let next = match rows.last() {
            Some(last) if rows.len() == size => token::encode(TokenKind::Messages, [number.0, last.seq.0]),
            _ => String::new(),
        };
        let mut cards = Cards::new(number, store);
        let mut entries = Vec::with_capacity(rows.len());
        for row in rows {
            entries.push(cards.card(row).await?);
        }
        Ok(Page { entries, next })
    }
}

/// Completes history rows; remembers the contacts of one page.
pub(super) struct Cards {
    number: NumberId,
    store: NumberStore,
    peers: HashMap<ChatNo, Option<Phone>>,
}

impl Cards {
    pub(super) fn new(number: NumberId, store: NumberStore) -> Self {
        Self { number, store, peers: HashMap::new() }
    }

    pub(super) async fn card(&mut self, record: MessageRecord) -> Result<MessageCard, ApiError> {
        let progress = match record.direction {
            Direction::Outbound => Some(self.store.progress(record.seq).await?),
            Direction::Inbound | Direction::OwnDevice => None,
        };
        let peer = match self.peers.get(&record.chat) {
            Some(peer) => peer.clone(),
            None => {
                let peer = self.store.contact(record.chat).await?.and_then(|contact| contact.phone);
                self.peers.insert(record.chat, peer.clone());
                peer
            }
        };
        let id = MessageId { number: self.number, seq: record.seq };
        Ok(MessageCard { id, record, progress, peer })
    }
}

fn recipient(field: &'static str, text: &str) -> Result<Contact, ApiError> {
    let invalid = |_| ApiError::of_field(Reason::InvalidDestination, field, "must be an E.164 phone number");
    Phone::parse(text).map(Contact::of_phone).map_err(invalid)
}

/// Checks everything and names every wrong field at once.
fn command_of(order: &SendOrder<'_>) -> Result<SendCommand, ApiError> {
    let to = recipient("to", order.to);
    let text = order.text.unwrap_or_default();
    let mut violations = Vec::new();
    let mut check = |fine: bool, field, problem: String| {
        if !fine {
            violations.extend(ApiError::field(field, problem).violations);
        }
    };
    let chars = text.chars().count();
    let problem = format!("must have 1 to {TEXT_CHARS_MAX} characters");
    check((1..=TEXT_CHARS_MAX).contains(&chars) && !text.trim().is_empty(), "text", problem);
    let problem = format!("must have at most {REQUEST_ID_CHARS_MAX} printable ASCII characters");
    check(is_label(order.request_id, REQUEST_ID_CHARS_MAX), "request_id", problem);
    let long = order.correlation_id.chars().count() > CORRELATION_ID_CHARS_MAX;
    let problem = format!("must have at most {CORRELATION_ID_CHARS_MAX} characters");
    check(!long && !order.correlation_id.chars().any(char::is_control), "correlation_id", problem);
    match to {
        Ok(to) if violations.is_empty() => Ok(SendCommand {
            to,
            content: Content::Text(text.to_owned()),
            send_at: order.send_time,
            expires_at: order.expire_time,
            max_wait: order.max_wait,
            correlation_id: some_text(order.correlation_id),
            request_id: some_text(order.request_id),
            scope: REQUEST_SCOPE.to_owned(),
        }),
        Ok(_) => Err(ApiError { violations, ..Reason::ValidationError.into() }),
        Err(mut error) => {
            error.violations.extend(violations);
            Err(error)
        }
    }
}

/// Whether a message can be sent between these times, and soon enough to be kept for it.
fn times_of(order: &SendOrder<'_>, now: Timestamp) -> Result<(), ApiError> {
    let mut violations = Vec::new();
    let mut wrong = |field, problem: &str| violations.extend(ApiError::field(field, problem).violations);
    if order.send_time.is_some_and(|at| at > now.after(SCHEDULE_AHEAD_MAX)) {
        wrong("send_time", "must be at most 30 days ahead");
    }
    if let Some(at) = order.expire_time {
        if at <= now {
            wrong("expire_time", "must be in the future");
        } else if order.send_time.is_some_and(|send| at <= send) {
            wrong("expire_time", "must be after the time to send at");
        } else if at > now.after(SCHEDULE_AHEAD_MAX + DEADLINE_DEFAULT) {
            wrong("expire_time", "must be at most 37 days ahead");
        }
    }
    if violations.is_empty() { Ok(()) } else { Err(ApiError { violations, ..Reason::ValidationError.into() }) }
}

fn is_label(text: &str, chars_max: usize) -> bool {
    text.len() <= chars_max && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
}

fn some_text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong_fields(order: SendOrder<'_>) -> (Reason, Vec<&'static str>) {
        let error = command_of(&order).unwrap_err();
        (error.reason, error.violations.iter().map(|violation| violation.field).collect())
    }

    const GOOD: SendOrder<'static> = SendOrder {
        number: "",
        to: "+5511999999999",
        text: Some("hi"),
        request_id: "",
        correlation_id: "",
        send_time: None,
        expire_time: None,
        max_wait: None,
    };

    #[test]
    fn times_must_leave_room_for_a_send() {
        let now = Timestamp(1_000_000_000_000);
        let day = Duration::from_secs(24 * 3600);
        let named = |send_time, expire_time| match times_of(&SendOrder { send_time, expire_time, ..GOOD }, now) {
            Ok(()) => Vec::new(),
            Err(error) => error.violations.iter().map(|violation| violation.field).collect(),
        };
        for (send, expire) in [
            (None, None),
            (Some(Timestamp(5)), None),
            (Some(now.after(30 * day)), Some(now.after(37 * day))),
            (None, Some(Timestamp(now.0 + 1))),
        ] {
            assert_eq!(named(send, expire), Vec::<&str>::new());
        }
        assert_eq!(named(Some(Timestamp(now.after(30 * day).0 + 1)), None), ["send_time"]);
        for (send, expire) in [
            (None, now),
            (Some(Timestamp(5)), Timestamp(9)),
            (Some(now.after(day)), now.after(day)),
            (None, Timestamp(now.after(37 * day).0 + 1)),
        ] {
            assert_eq!(named(send, Some(expire)), ["expire_time"]);
        }
    }

    #[test]
    fn what_is_right_passes() {
        let command = command_of(&GOOD).unwrap();
        assert_eq!((command.content, command.request_id), (Content::Text("hi".to_owned()), None));
        let longest = "é".repeat(TEXT_CHARS_MAX);
        assert!(command_of(&SendOrder { text: Some(&longest), ..GOOD }).is_ok());
    }

    #[test]
    fn every_wrong_field_is_named_at_once() {
        let long = "x".repeat(TEXT_CHARS_MAX + 1);
        for text in [None, Some(""), Some(" \n "), Some(long.as_str())] {
            assert_eq!(wrong_fields(SendOrder { text, ..GOOD }), (Reason::ValidationError, vec!["text"]));
        }
        let all = SendOrder { to: "abc", text: None, request_id: "ü", correlation_id: "a\nb", ..GOOD };
        let expected = vec!["to", "text", "request_id", "correlation_id"];
        assert_eq!(wrong_fields(all), (Reason::InvalidDestination, expected));
    }
}
