//! Received messages on their way to the number's disk. The library acknowledges a message only after this hook
//! returned; what it recovers outside the hook takes the same way in a task of ours.
//! Nothing is ever sent from here: the library holds the sender's session lock meanwhile.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};
use whatsapp_rust::types::events::{DecryptFailMode, InboundMessage, UndecryptableMessage};
use whatsapp_rust::types::message::MessageInfo;
use whatsapp_rust::{Client, InboundDurabilityHook, Jid};

use super::contact::{complete, contact_of};
use super::content::{content, digest};
use super::signals::Signals;
use crate::domain::close::CloseReason;
use crate::domain::message::{Content, Direction, PLACEHOLDER_DIGEST};
use crate::domain::time::Timestamp;
use crate::session::contract::{Incoming, SessionEvent};
use crate::telemetry::failpoint::{self, Failpoint};

/// How long the number may take to make messages durable before the connection is given up and WhatsApp
/// delivers them again on the next one (reliability: a failed hook is not retried before that).
const DURABLE_WITHIN: Duration = Duration::from_secs(30);
/// Pause before messages are offered again.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Messages of one unit of work of the number.
const CHUNK_MESSAGES_MAX: usize = 100;
/// Text of one unit of work, in bytes: a quarter of the store's limit, for the number adds events and deliveries.
const CHUNK_BYTES_MAX: usize = 256 * 1024;

/// The place in the chat of a message that could not be decrypted. `None`: not for the history, or hidden by
/// WhatsApp's own clients as well.
pub(super) fn placeholder(event: &UndecryptableMessage) -> Option<Incoming> {
    if event.decrypt_fail_mode == DecryptFailMode::Hide {
        return None;
    }
    incoming(&event.info, Content::Undecryptable, PLACEHOLDER_DIGEST)
}

/// The addresses of the other side of the chat. `None`: not a chat between two people.
fn chat_addresses(info: &MessageInfo) -> Option<Vec<&Jid>> {
    let source = &info.source;
    if source.is_group || source.chat.is_group_like() {
        return None;
    }
    let mut addresses = vec![&source.chat];
    if source.is_from_me {
        addresses.extend(&source.recipient);
        addresses.extend(&source.recipient_alt);
        addresses.extend(&info.peer_recipient_pn);
    } else {
        addresses.push(&source.sender);
        addresses.extend(&source.sender_alt);
    }
    Some(addresses)
}

trait GroupLike {
    fn is_group_like(&self) -> bool;
}

impl GroupLike for Jid {
    fn is_group_like(&self) -> bool {
        use whatsapp_rust::Server;
        matches!(self.server, Server::Group | Server::Broadcast | Server::Newsletter | Server::Call)
    }
}

fn written_at(info: &MessageInfo) -> Timestamp {
    Timestamp(u64::try_from(info.timestamp.timestamp_millis()).unwrap_or(0))
}

/// One message in the daemon's terms, but for the address the stanza did not carry. `None`: not for the history
/// (groups and channels are not served yet; control messages say nothing to a person).
fn incoming(info: &MessageInfo, content: Content, digest: [u8; 16]) -> Option<Incoming> {
    let direction = if info.source.is_from_me { Direction::OwnDevice } else { Direction::Inbound };
    let named = direction == Direction::Inbound && !info.push_name.is_empty();
    Some(Incoming {
        whatsapp_id: info.id.clone(),
        direction,
        chat: contact_of(chat_addresses(info)?)?,
        sender_name: named.then(|| info.push_name.clone()),
        content,
        digest,
        written_at: written_at(info),
    })
}

fn read(message: &InboundMessage) -> Option<Incoming> {
    let content = content(&message.message)?;
    let digest = digest(&message.message, &content);
    incoming(&message.info, content, digest)
}

/// Hands messages to the number and waits until they are on disk.
pub(super) struct Inbox {
    signals: Arc<Signals>,
    durable_within: Duration,
}

impl Inbox {
    pub(super) fn new(signals: Arc<Signals>) -> Arc<Self> {
        Arc::new(Self { signals, durable_within: DURABLE_WITHIN })
    }

    /// Makes one chunk durable, offering it again until the deadline. False: it is not durable.
    async fn commit(&self, messages: Vec<Incoming>) -> bool {
        let deadline = Instant::now() + self.durable_within;
        loop {
            let (durable, answer) = oneshot::channel();
            let event = SessionEvent::Inbound { messages: messages.clone(), durable };
            let offered = async { self.signals.deliver(event).await && matches!(answer.await, Ok(Ok(()))) };
            match timeout_at(deadline, offered).await {
                Ok(true) => return true,
                Ok(false) if Instant::now() + AGAIN_AFTER < deadline && !self.signals.is_over() => {
                    sleep(AGAIN_AFTER).await;
                }
                Ok(false) | Err(_) => return false,
            }
        }
    }

    async fn commit_all(&self, messages: Vec<Incoming>) -> bool {
        let mut chunk = Vec::new();
        let mut bytes = 0;
        for message in messages {
            let size = message.content.text().len();
            if chunk.len() >= CHUNK_MESSAGES_MAX || (!chunk.is_empty() && bytes + size > CHUNK_BYTES_MAX) {
                bytes = 0;
                if !self.commit(std::mem::take(&mut chunk)).await {
                    return false;
                }
            }
            bytes += size;
            chunk.push(message);
        }
        chunk.is_empty() || self.commit(chunk).await
    }

    /// Delivers a message whose content the phone sent after all. The library does not bring it to the hook, and
    /// WhatsApp was already told, so a failure here is only logged: the placeholder stays.
    pub(super) async fn deliver_recovered(&self, message: InboundMessage) {
        let Some(mut read) = read(&message) else {
            return;
        };
        if let Some(client) = self.signals.client() {
            complete(&client, &mut read.chat).await;
        }
        if !self.commit(vec![read]).await {
            tracing::warn!("a recovered message did not reach the disk");
        }
    }
}

#[async_trait]
impl InboundDurabilityHook for Inbox {
    async fn on_messages(&self, client: Arc<Client>, batch: &[InboundMessage]) -> anyhow::Result<()> {
        failpoint::reach(Failpoint::InboundAsked);
        let mut messages: Vec<Incoming> = batch.iter().filter_map(read).collect();
        for message in &mut messages {
            complete(&client, &mut message.chat).await;
        }
        if self.commit_all(messages).await {
            failpoint::reach(Failpoint::InboundBeforeReturn);
            return Ok(());
        }
        // No acknowledgement goes out; only a new connection makes WhatsApp deliver again.
        self.signals.end(CloseReason::StoreFailed);
        anyhow::bail!("the messages are not durable")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lifecycle::LinkBy;
    use crate::session::contract::NotDurable;
    use crate::session::link::signals::Queued;
    use tokio::sync::mpsc;
    use whatsapp_rust::types::message::MessageSource;
    use whatsapp_rust::waproto::whatsapp as wa;

    fn info(source: MessageSource) -> MessageInfo {
        MessageInfo { source, id: "3EB0".to_owned(), push_name: "Ana".to_owned(), ..Default::default() }
    }

    fn jid(text: &str) -> Jid {
        text.parse().unwrap()
    }

    #[test]
    fn the_other_side_is_found_in_both_directions() {
        let received = info(MessageSource {
            chat: jid("777@lid"),
            sender: jid("777:2@lid"),
            sender_alt: Some(jid("5511999990002@s.whatsapp.net")),
            ..Default::default()
        });
        let read = incoming(&received, Content::Undecryptable, [0; 16]).unwrap();
        assert_eq!(read.direction, Direction::Inbound);
        assert_eq!(read.sender_name.as_deref(), Some("Ana"));
        assert_eq!(read.chat.phone.as_ref().unwrap().digits(), "5511999990002");
        assert!(read.chat.lid.is_some());

        let own = info(MessageSource {
            chat: jid("5511999990002@s.whatsapp.net"),
            sender: jid("5511999990001@s.whatsapp.net"),
            is_from_me: true,
            recipient: Some(jid("5511999990002@s.whatsapp.net")),
            recipient_alt: Some(jid("777@lid")),
            ..Default::default()
        });
        let read = incoming(&own, Content::Undecryptable, [0; 16]).unwrap();
        assert_eq!(read.direction, Direction::OwnDevice);
        assert_eq!(read.chat.phone.as_ref().unwrap().digits(), "5511999990002");
        assert_eq!(read.sender_name, None);
    }

    #[test]
    fn groups_are_not_taken_for_their_senders() {
        let group = info(MessageSource {
            chat: jid("123@g.us"),
            sender: jid("5511999990002@s.whatsapp.net"),
            is_group: true,
            ..Default::default()
        });
        assert!(incoming(&group, Content::Undecryptable, [0; 16]).is_none());
        let status = info(MessageSource {
            chat: jid("status@broadcast"),
            sender: jid("5511999990002@s.whatsapp.net"),
            ..Default::default()
        });
        assert!(incoming(&status, Content::Undecryptable, [0; 16]).is_none());
    }

    fn inbox() -> (Arc<Inbox>, mpsc::Receiver<Queued>) {
        let (queue, entries) = mpsc::channel(8);
        let (late, _) = mpsc::channel(1);
        let inbox =
            Inbox { signals: Signals::new(None, LinkBy::QrCode, queue, late), durable_within: Duration::from_secs(3) };
        (Arc::new(inbox), entries)
    }

    fn message(text: &str) -> Incoming {
        let received = InboundMessage::builder()
            .message(Arc::new(wa::Message { conversation: Some(text.to_owned()), ..Default::default() }))
            .info(Arc::new(info(MessageSource {
                chat: jid("5511999990002@s.whatsapp.net"),
                sender: jid("5511999990002@s.whatsapp.net"),
                ..Default::default()
            })))
            .build();
        read(&received).unwrap()
    }

    async fn next(entries: &mut mpsc::Receiver<Queued>) -> (usize, oneshot::Sender<Result<(), NotDurable>>) {
        match entries.recv().await.and_then(Queued::event) {
            Some(SessionEvent::Inbound { messages, durable }) => (messages.len(), durable),
            _ => panic!("not an inbound batch"),
        }
    }

    #[tokio::test]
    async fn a_refused_batch_is_offered_again_until_it_is_durable() {
        let (inbox, mut entries) = inbox();
        let committing = tokio::spawn(async move { inbox.commit_all(vec![message("a")]).await });
        drop(next(&mut entries).await);
        next(&mut entries).await.1.send(Err(NotDurable)).unwrap();
        next(&mut entries).await.1.send(Ok(())).unwrap();
        assert!(committing.await.unwrap());
    }

    #[tokio::test]
    async fn a_batch_nobody_answers_fails_in_time() {
        let (inbox, mut entries) = inbox();
        let begun = Instant::now();
        let committing = tokio::spawn(async move { inbox.commit_all(vec![message("a")]).await });
        let _unanswered = next(&mut entries).await;
        assert!(!committing.await.unwrap());
        assert!(begun.elapsed() >= Duration::from_secs(3));
    }

    #[tokio::test]
    async fn a_drain_is_cut_into_units_the_store_takes() {
        let (inbox, mut entries) = inbox();
        let many: Vec<Incoming> = (0..230).map(|_| message("x")).collect();
        let large: Vec<Incoming> = (0..3).map(|_| message(&"y".repeat(200 * 1024))).collect();
        let committing = tokio::spawn(async move { inbox.commit_all(many).await && inbox.commit_all(large).await });
        let mut sizes = Vec::new();
        for _ in 0..6 {
            let (size, durable) = next(&mut entries).await;
            sizes.push(size);
            durable.send(Ok(())).unwrap();
        }
        assert!(committing.await.unwrap());
        assert_eq!(sizes, [100, 100, 30, 1, 1, 1]);
    }
}
