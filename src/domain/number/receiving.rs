//! Receiving: every message once, in its chat, durable before WhatsApp is told. One that could not be decrypted keeps
//! its place; when its content comes, the same row gets it.

use std::collections::VecDeque;

use super::interface::{Arrived, Counted, Effect, ReplyId, Ticket};
use super::machine::{Draft, Number};
use crate::domain::change::{Change, SeenKey};
use crate::domain::event::{EventBody, ReceivedEvent};
use crate::domain::id::{ChatNo, MessageId};
use crate::domain::lifecycle;
use crate::domain::message::{Content, Direction, MessageRecord};
use crate::domain::outbox::Standing;
use crate::domain::phone::Contact;
use crate::domain::time::Timestamp;
use crate::domain::trouble::Trouble;

/// Chats made in this process whose number the disk may not show yet.
const FRESH_CHATS_MAX: usize = 1024;
/// Inbound messages that somebody who looked at the disk a moment ago may not have found there.
const RECENT_SEEN_MAX: usize = 256;

fn remember<T>(recent: &mut VecDeque<T>, entry: T, most: usize) {
    if recent.len() >= most {
        recent.pop_front();
    }
    recent.push_back(entry);
}

impl Number {
    pub(super) fn on_arrived(&mut self, messages: Vec<Arrived>, reply: ReplyId, now: Timestamp, draft: &mut Draft) {
        let mut received = 0;
        for message in messages {
            if !message.seen {
                received += self.take_in(message, now, draft);
            }
        }
        if received > 0 {
            draft.effects.push(Effect::Count(Counted::Received(received)));
        }
        if !draft.changes.is_empty() {
            draft.changes.push(Change::Counters(self.counters));
        }
        self.reply_when_durable(reply, draft);
    }

    /// Takes in one message that the disk did not have. Gives how many can be read now that could not before.
    fn take_in(&mut self, message: Arrived, now: Timestamp, draft: &mut Draft) -> u64 {
        let chat = self.chat_for(&message.contact, message.chat, draft);
        let key = SeenKey {
            chat,
            direction: message.direction,
            whatsapp_id: message.whatsapp_id.clone(),
            digest: message.digest,
        };
        if self.recent_seen.contains(&key) {
            return 0;
        }
        remember(&mut self.recent_seen, key.clone(), RECENT_SEEN_MAX);
        let inbound = message.direction == Direction::Inbound;
        if inbound && message.standing == Standing::New && !self.recent_heard.contains(&chat) {
            remember(&mut self.recent_heard, chat, FRESH_CHATS_MAX);
            self.outbox.heard(chat);
            draft.changes.push(Change::Heard(chat));
        }
        let relays_only = self.retaining.relays_only();
        let readable = message.content != Content::Undecryptable;
        let waiting = if readable { self.placeholder_of(&key, &message) } else { None };
        let kept = |content: Content| if relays_only && readable { Content::NotKept } else { content };
        let text = message.content.text().to_owned();
        let record = match waiting {
            Some(placeholder) => {
                remember(&mut self.recent_filled, placeholder.seq, RECENT_SEEN_MAX);
                MessageRecord { content: kept(message.content), ..placeholder }
            }
            None => MessageRecord {
                seq: self.next_message(),
                chat,
                direction: message.direction,
                whatsapp_id: message.whatsapp_id,
                correlation_id: None,
                content: kept(message.content),
                sender_name: message.sender_name.clone().filter(|_| !relays_only),
                created_at: now,
                written_at: message.written_at,
                send_at: None,
                expires_at: None,
            },
        };
        draft.changes.push(Change::Seen(key.clone(), record.seq, now));
        self.judge(readable, now, draft);
        let told = inbound && readable;
        if told {
            let body = ReceivedEvent {
                message: MessageId { number: self.id, seq: record.seq },
                whatsapp_id: record.whatsapp_id.clone(),
                from: message.contact,
                chat,
                sender_name: message.sender_name.or_else(|| record.sender_name.clone()),
                text,
                written_at: record.written_at,
            };
            // Told when it can be read: what never could be decrypted is only in the history.
            self.record_event(EventBody::Received(body), now, draft);
        }
        if !readable {
            remember(&mut self.recent_placeholders, (key, record.clone()), RECENT_SEEN_MAX);
        }
        let filled = self.recent_filled.contains(&record.seq);
        draft.changes.push(if filled { Change::Filled(record) } else { Change::Message(record) });
        u64::from(told)
    }

    /// Whether too much of what arrives cannot be read.
    fn judge(&mut self, readable: bool, now: Timestamp, draft: &mut Draft) {
        let bad_before = self.legibility.is_bad(now);
        if readable {
            self.legibility.read(now);
        } else {
            self.legibility.unreadable(now);
        }
        match (bad_before, self.legibility.is_bad(now)) {
            (false, true) => self.on_life(lifecycle::Input::Troubled(Trouble::Undecryptable), now, draft),
            (true, false) => self.on_life(lifecycle::Input::Relieved(Trouble::Undecryptable), now, draft),
            (false, false) | (true, true) => {}
        }
    }

    /// The row that stands for this message and has no content yet, on disk or on its way there.
    fn placeholder_of(&self, key: &SeenKey, message: &Arrived) -> Option<MessageRecord> {
        let same = |other: &SeenKey| {
            other.chat == key.chat && other.direction == key.direction && other.whatsapp_id == key.whatsapp_id
        };
        let recent = self.recent_placeholders.iter().find(|(other, _)| same(other)).map(|(_, record)| record);
        let found = message.placeholder.as_deref().or(recent)?;
        let open = !self.recent_filled.contains(&found.seq) && !self.is_forgotten(found.seq, key.chat);
        open.then(|| found.clone())
    }

    /// The chat that this process made for a contact.
    pub(super) fn fresh_chat(&self, contact: &Contact) -> Option<ChatNo> {
        let addresses = contact.addresses();
        self.fresh_chats.iter().find(|(known, _)| addresses.contains(known)).map(|(_, chat)| *chat)
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
        // An address alone may have led to another chat when it was fresh: then this one may have been forgotten since.
        if all_fresh && addresses.iter().any(|address| fresh(address) == Some(chat)) {
            return chat;
        }
        // Also one that the disk knows by this address: the chat itself may have been forgotten, or another address of
        // it be new. Once in this process is enough.
        for address in addresses {
            self.fresh_chats.retain(|(known, _)| *known != address);
            if self.fresh_chats.len() >= FRESH_CHATS_MAX {
                self.fresh_chats.pop_front();
            }
            self.fresh_chats.push_back((address, chat));
        }
        draft.changes.push(Change::Chat(chat, contact.clone()));
        chat
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::id::{MessageSeq, NumberId};
    use crate::domain::limiter::Limits;
    use crate::domain::message::PLACEHOLDER_DIGEST;
    use crate::domain::number::{Input, OnUnknown, SendingRules, Snapshot};
    use crate::domain::phone::Phone;

    const NOW: Timestamp = Timestamp(1_000_000);

    fn arrived(content: Content, digest: [u8; 16], at: u64) -> Arrived {
        Arrived {
            contact: Contact::of_phone(Phone::parse("5511900000001").unwrap()),
            chat: None,
            seen: false,
            standing: Standing::New,
            placeholder: None,
            direction: Direction::Inbound,
            whatsapp_id: "3EB0".to_owned(),
            digest,
            sender_name: None,
            content,
            written_at: Timestamp(at),
        }
    }

    fn changes(number: &mut Number, message: Arrived) -> Vec<Change> {
        let effects = number.step(Input::Arrived(vec![message], ReplyId(1)), NOW);
        let commits = effects.into_iter().filter_map(|effect| match effect {
            Effect::Commit(commit) => Some(commit.changes),
            _ => None,
        });
        commits.flatten().collect()
    }

    #[test]
    fn what_could_not_be_read_gets_its_content_in_the_same_row() {
        let rules = SendingRules { limits: Limits::LINKED, on_unknown: OnUnknown::Resend };
        let mut number = Number::restore(NumberId(1), Snapshot::default(), rules, NOW).0;
        let opaque = arrived(Content::Undecryptable, PLACEHOLDER_DIGEST, 5);
        let written = changes(&mut number, opaque.clone());
        let row = written.iter().find_map(|change| match change {
            Change::Message(record) => Some(record.clone()),
            _ => None,
        });
        let row = row.unwrap();
        assert!(!written.iter().any(|change| matches!(change, Change::Event(_))), "nobody is told of what is not read");
        let text = arrived(Content::Text("hello".to_owned()), [1; 16], 9);
        let written = changes(&mut number, text.clone());
        let filled = MessageRecord { content: Content::Text("hello".to_owned()), ..row.clone() };
        assert!(written.contains(&Change::Filled(filled)), "{written:?}");
        assert_eq!(written.iter().filter(|change| matches!(change, Change::Event(_))).count(), 1);
        for again in [text, opaque] {
            assert!(changes(&mut number, again).is_empty(), "never two rows");
        }

        // After a restart the disk says what waits.
        let mut number = Number::restore(NumberId(1), Snapshot::default(), rules, NOW).0;
        let late = arrived(Content::Text("hello".to_owned()), [1; 16], 9);
        let written = changes(&mut number, Arrived { placeholder: Some(Box::new(row)), ..late });
        let filled = |change: &Change| matches!(change, Change::Filled(record) if record.seq == MessageSeq(1));
        assert!(written.iter().any(filled));
    }
}
