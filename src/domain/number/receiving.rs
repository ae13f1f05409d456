//! Receiving: every message once, in its chat, durable before WhatsApp is told.

use super::interface::{Arrived, Counted, Effect, Reply, ReplyId, Ticket};
use super::machine::{Draft, Number, Then};
use crate::domain::change::{Change, SeenKey};
use crate::domain::event::{EventBody, ReceivedEvent};
use crate::domain::id::{ChatNo, MessageId};
use crate::domain::message::{Content, Direction, MessageRecord};
use crate::domain::phone::Contact;
use crate::domain::time::Timestamp;

/// Chats made in this process whose number the disk may not show yet.
const FRESH_CHATS_MAX: usize = 1024;
/// Inbound messages that somebody who looked at the disk a moment ago may not have found there.
const RECENT_SEEN_MAX: usize = 256;

impl Number {
    pub(super) fn on_arrived(&mut self, messages: Vec<Arrived>, reply: ReplyId, now: Timestamp, draft: &mut Draft) {
        let mut received = 0;
        let relays_only = self.retaining.relays_only();
        for message in messages {
            if message.seen {
                continue;
            }
            let chat = self.chat_for(&message.contact, message.chat, draft);
            let key = SeenKey {
                chat,
                direction: message.direction,
                whatsapp_id: message.whatsapp_id.clone(),
                digest: message.digest,
            };
            if self.recent_seen.contains(&key) {
                continue;
            }
            if self.recent_seen.len() >= RECENT_SEEN_MAX {
                self.recent_seen.pop_front();
            }
            self.recent_seen.push_back(key.clone());
            let seq = self.next_message();
            draft.changes.push(Change::Seen(key, seq, now));
            if message.direction == Direction::Inbound {
                received += 1;
                let body = ReceivedEvent {
                    message: MessageId { number: self.id, seq },
                    whatsapp_id: message.whatsapp_id.clone(),
                    from: message.contact,
                    chat,
                    sender_name: message.sender_name.clone(),
                    text: message.content.text().to_owned(),
                    written_at: message.written_at,
                };
                self.record_event(EventBody::Received(body), now, draft);
            }
            draft.changes.push(Change::Message(MessageRecord {
                seq,
                chat,
                direction: message.direction,
                whatsapp_id: message.whatsapp_id,
                correlation_id: None,
                content: if relays_only { Content::NotKept } else { message.content },
                sender_name: message.sender_name.filter(|_| !relays_only),
                created_at: now,
                written_at: message.written_at,
            }));
        }
        if received > 0 {
            draft.effects.push(Effect::Count(Counted::Received(received)));
        }
        if !draft.changes.is_empty() {
            draft.changes.push(Change::Counters(self.counters));
        }
        // Also with nothing new: what made these known may still be on its way to the disk.
        draft.durable = true;
        draft.then.push(Then::Reply(reply, Reply::InboundDurable));
    }

    /// The chat of a contact: as the disk knew it, as this process made it, or a new one.
    pub(super) fn chat_for(&mut self, contact: &Contact, stored: Option<ChatNo>, draft: &mut Draft) -> ChatNo {
        let addresses = contact.addresses();
        let fresh =
            |address: &String| self.fresh_chats.iter().find(|(known, _)| known == address).map(|(_, chat)| *chat);
        let known = stored.or_else(|| addresses.iter().find_map(fresh));
        let chat = known.unwrap_or_else(|| {
            self.counters.chat += 1;
            ChatNo(self.counters.chat)
        });
        // One step makes two commits at most.
        self.retaining.chat_used(chat, Ticket(self.next_ticket + 1));
        let all_fresh = addresses.iter().all(|address| fresh(address).is_some());
        if all_fresh {
            return chat;
        }
        // Also one that the disk knows by this address: the chat itself may have been forgotten, or another address of
        // it be new. Once in this process is enough.
        for address in addresses {
            if self.fresh_chats.len() >= FRESH_CHATS_MAX {
                self.fresh_chats.pop_front();
            }
            self.fresh_chats.push_back((address, chat));
        }
        draft.changes.push(Change::Chat(chat, contact.clone()));
        chat
    }
}
