//! Looks find what is too old, all of it, and nothing else; and what is removed is gone with its index entries.

use super::home::{Home, claim};
use crate::domain::change::{AttemptRecord, Change, IdempotencyKey, IdempotencyRecord, SeenKey};
use crate::domain::delivery::{Course, DeadLetter, DeadReason, DeliveryRow};
use crate::domain::endpoint::{DeliverySeq, EndpointState};
use crate::domain::event::{Event, EventBody};
use crate::domain::id::{ChatNo, EventId, EventSeq, MessageSeq};
use crate::domain::message::{Content, Direction, MessageRecord, Progress};
use crate::domain::number::{Commit, Ticket};
use crate::domain::phone::{Contact, Lid, Phone};
use crate::domain::retention::{Erasure, Removal, SWEEP_ROWS, Sweep};
use crate::domain::time::Timestamp;
use crate::store::key::Tag;
use crate::store::number_store::{NumberStore, Order};

async fn write(store: &NumberStore, changes: Vec<Change>) {
    for part in changes.chunks(500) {
        let commit = Commit { ticket: Ticket(0), changes: part.to_vec(), unless_known: None, durable: true };
        store.commit(store.unit_of(commit)).await.unwrap();
    }
}

/// Does what the machine does with nothing in the way. Gives how many rows each batch removed.
async fn sweep(store: &NumberStore, sweep: Sweep) -> Vec<usize> {
    let mut batches = Vec::new();
    let mut next = Some(sweep);
    while let Some(sweep) = next {
        let found = store.find(sweep).await.unwrap();
        batches.push(found.removals.len());
        write(store, found.removals.into_iter().map(Change::Removed).collect()).await;
        next = found.next;
    }
    batches
}

async fn rows(store: &NumberStore, tag: Tag) -> usize {
    store.keys(tag, &[], None, Order::Ascending, (0, 100_000)).await.unwrap().len()
}

fn message(seq: u64, chat: u32, at: u64) -> MessageRecord {
    MessageRecord {
        seq: MessageSeq(seq),
        chat: ChatNo(chat),
        direction: if seq.is_multiple_of(2) { Direction::Outbound } else { Direction::Inbound },
        whatsapp_id: format!("W{seq}"),
        correlation_id: None,
        content: Content::Text("text".to_owned()),
        sender_name: None,
        created_at: Timestamp(at),
        written_at: Timestamp(at),
        send_at: None,
        expires_at: None,
    }
}

fn delivery(event: u64, at: u64) -> DeliveryRow {
    DeliveryRow {
        event: EventSeq(event),
        chat: None,
        attempts: 0,
        due: Timestamp(at),
        queued_at: Timestamp(at),
        sequence: DeliverySeq(event),
        course: Course::Live,
        stuck_since: None,
    }
}

fn dead_letter(event: u64) -> DeadLetter {
    DeadLetter { row: delivery(event, event), at: Timestamp(event), reason: DeadReason::Exhausted }
}

#[tokio::test]
async fn request_ids_go_by_their_expiry_in_batches() {
    let home = Home::new("sweep-requests");
    let store = home.open();
    let number = claim(&store, 1).await;
    let count = 2 * SWEEP_ROWS as u64 + 50;
    let record = |index: u64| {
        let mut key = [0; 16];
        // Keys in another order than their expiries.
        key[..8].copy_from_slice(&(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_be_bytes());
        let (seq, at) = (MessageSeq(index), Timestamp(index));
        let record = IdempotencyRecord { body: [0; 32], seq, created_at: at, expires_at: at };
        Change::Idempotency(IdempotencyKey(key), record)
    };
    write(&number, (1..=count + 7).map(record).collect()).await;
    assert_eq!(sweep(&number, Sweep::Idempotency(Timestamp(count))).await, [SWEEP_ROWS, SWEEP_ROWS, 50]);
    assert_eq!((rows(&number, Tag::Idempotency).await, rows(&number, Tag::IdempotencyExpiry).await), (7, 7));
    assert_eq!(sweep(&number, Sweep::Idempotency(Timestamp(count))).await, [0], "nothing left to find");
}

#[tokio::test]
async fn history_goes_with_its_index_its_progress_and_chats_that_are_left_empty() {
    let home = Home::new("sweep-history");
    let store = home.open();
    let number = claim(&store, 1).await;
    let contact = |chat: u32| Contact::of_phone(Phone::parse(&format!("5511900000{chat:03}")).unwrap());
    let mut changes: Vec<Change> = (1..=3).map(|chat| Change::Chat(ChatNo(chat), contact(chat))).collect();
    for seq in 1..=300 {
        changes.push(Change::Message(message(seq, 1 + u32::try_from(seq % 2).unwrap(), seq)));
        changes.push(Change::Progress(MessageSeq(seq), Progress::QUEUED));
    }
    changes.push(Change::Message(message(301, 3, 301)));
    write(&number, changes).await;
    let look = Sweep::Messages { after: MessageSeq(0), through: MessageSeq(0), before: Timestamp(299) };
    sweep(&number, look).await;
    let left: Vec<_> = number.messages(None, None, 10).await.unwrap().iter().map(|record| record.seq.0).collect();
    assert_eq!(left, [301, 300, 299], "what is young stays");
    assert_eq!(rows(&number, Tag::ChatMessage).await, 3);
    assert!(number.outbound_with("W298").await.unwrap().is_none());
    assert!(number.outbound_with("W300").await.unwrap().is_some());
    let all = Sweep::Messages { after: MessageSeq(0), through: MessageSeq(300), before: Timestamp(0) };
    sweep(&number, all).await;
    for tag in [Tag::Message, Tag::ChatMessage] {
        assert_eq!(rows(&number, tag).await, 1, "{tag:?}");
    }
    assert_eq!(rows(&number, Tag::WhatsappId).await, 0);
    assert_eq!(
        (number.contact(ChatNo(1)).await.unwrap(), number.contact(ChatNo(3)).await.unwrap()),
        (None, Some(contact(3)))
    );
    assert_eq!(number.chat_of(&contact(1)).await.unwrap(), Some(ChatNo(1)), "what comes again is recognised by it");
}

#[tokio::test]
async fn nothing_leads_to_an_erased_contact_by_any_of_its_addresses() {
    let home = Home::new("sweep-contact");
    let store = home.open();
    let number = claim(&store, 1).await;
    let phone = Contact::of_phone(Phone::parse("5511900000001").unwrap());
    let both = Contact { lid: Some(Lid("77".into())), ..phone.clone() };
    let other = Contact::of_phone(Phone::parse("5511900000002").unwrap());
    // The last time it was known by one address only.
    let known = [(1, both.clone()), (2, other.clone()), (1, phone)];
    write(&number, known.map(|(chat, contact)| Change::Chat(ChatNo(chat), contact)).to_vec()).await;
    let erasure = Erasure { chat: ChatNo(1), through: MessageSeq(1), events_through: EventSeq(0) };
    sweep(&number, Sweep::ErasedContact(erasure)).await;
    assert_eq!((number.chat_of(&both).await.unwrap(), number.contact(ChatNo(1)).await.unwrap()), (None, None));
    assert_eq!(number.chat_of(&other).await.unwrap(), Some(ChatNo(2)));
    assert_eq!(sweep(&number, Sweep::ErasedContact(erasure)).await, [0], "nothing left to find");
}

#[tokio::test]
async fn a_chat_with_an_older_row_that_stays_is_not_empty() {
    let home = Home::new("sweep-chats");
    let store = home.open();
    let number = claim(&store, 1).await;
    write(&number, (1..=3).map(|seq| Change::Message(message(seq, 1, seq))).collect()).await;
    let chats = async |after: u64| {
        let look = Sweep::Messages { after: MessageSeq(after), through: MessageSeq(3), before: Timestamp(0) };
        let removals = number.find(look).await.unwrap().removals;
        removals.into_iter().filter(|removal| matches!(removal, Removal::Chat(_))).count()
    };
    assert_eq!(
        (chats(0).await, chats(1).await),
        (1, 0),
        "the first one is not settled and was left by an earlier batch"
    );
}

#[tokio::test]
async fn digests_go_by_when_they_were_noted() {
    let home = Home::new("sweep-seen");
    let store = home.open();
    let number = claim(&store, 1).await;
    let key = |index: u64| SeenKey {
        chat: ChatNo(1),
        direction: Direction::Inbound,
        whatsapp_id: format!("IN{index}"),
        digest: [0; 16],
    };
    write(&number, (1..=10).map(|at| Change::Seen(key(at), MessageSeq(at), Timestamp(at))).collect()).await;
    assert_eq!(sweep(&number, Sweep::Seen(Timestamp(8))).await, [7]);
    assert!(!number.has_seen(&key(7)).await.unwrap() && number.has_seen(&key(8)).await.unwrap());
    assert_eq!((rows(&number, Tag::Seen).await, rows(&number, Tag::SeenTime).await), (3, 3));
}

#[tokio::test]
async fn an_event_stays_while_a_queue_or_a_dead_letter_names_it() {
    let home = Home::new("sweep-events");
    let store = home.open();
    let number = claim(&store, 1).await;
    let event = |seq: u64| {
        let id = EventId { number: number.number(), seq: EventSeq(seq) };
        Change::Event(Event { id, at: Timestamp(seq), body: EventBody::NumberConnected })
    };
    write(&number, (1..=500).map(event).collect()).await;
    let held = vec![
        Change::Delivery(2, delivery(3, 3)),
        Change::Delivery(2, delivery(400, 400)),
        Change::DeadLetter(5, dead_letter(250)),
        // An endpoint that is gone holds nothing.
        Change::Delivery(9, delivery(10, 10)),
    ];
    write(&number, held).await;
    let age = |after: u64| Sweep::EventAge { after: EventSeq(after), before: Timestamp(451) };
    let found = number.find(age(0)).await.unwrap();
    assert_eq!((found.aged, found.next), (Some(EventSeq(200)), Some(age(200))));
    assert_eq!(number.find(age(400)).await.unwrap().aged, Some(EventSeq(450)));
    assert_eq!(number.find(age(450)).await.unwrap().aged, Some(EventSeq(450)), "the rest is young");
    let events = |dead_letters_hold| Sweep::Events {
        after: EventSeq(0),
        through: EventSeq(450),
        dead_letters_hold,
        endpoints: vec![2, 5],
    };
    sweep(&number, events(true)).await;
    let left = async || {
        let events = number.events(EventSeq(0), 100).await.unwrap();
        events.iter().map(|event| event.id.seq.0).take_while(|seq| *seq <= 450).collect::<Vec<_>>()
    };
    assert_eq!(left().await, [3, 250, 400]);
    sweep(&number, events(false)).await;
    assert_eq!(left().await, [3, 400], "a number that only relays holds nothing for a dead letter");
    assert_eq!(rows(&number, Tag::Event).await, 52);
}

#[tokio::test]
async fn attempts_go_by_age_and_by_number_and_what_gone_endpoints_left_goes_whole() {
    let home = Home::new("sweep-attempts");
    let store = home.open();
    let number = claim(&store, 1).await;
    let attempt = |endpoint: u32, at: u64| {
        let (event, at, outcome) = (EventSeq(at), Timestamp(at), "delivered".to_owned());
        let (sequence, course, kind, response) = (DeliverySeq(event.0), Course::Live, None, String::new());
        let (attempt, status, duration_ms) = (1, None, 0);
        let record = AttemptRecord {
            endpoint,
            event,
            sequence,
            kind,
            course,
            attempt,
            at,
            status,
            outcome,
            duration_ms,
            response,
        };
        Change::Attempt(record)
    };
    for endpoint in 1..=3 {
        write(&number, (1..=700).map(|at| attempt(endpoint, at)).collect()).await;
    }
    let look = |keep| Sweep::Attempts { endpoint: 2, before: Timestamp(101), keep };
    sweep(&number, look(None)).await;
    assert_eq!(rows(&number, Tag::Attempt).await, 2000);
    sweep(&number, look(Some(150))).await;
    let left = number.attempts(2, None, 1000).await.unwrap();
    assert_eq!((left.len(), left[0].at, left[149].at), (150, Timestamp(700), Timestamp(551)));
    let queued = [1, 2, 3].map(|endpoint| Change::Delivery(endpoint, delivery(9, 9)));
    let dead = [1, 2, 3].map(|endpoint| Change::DeadLetter(endpoint, dead_letter(8)));
    let states = [1, 2, 3].map(|endpoint| Change::EndpointState(endpoint, EndpointState::default()));
    write(&number, queued.into_iter().chain(dead).chain(states).collect()).await;
    sweep(&number, Sweep::Orphans { living: vec![2], through: 3 }).await;
    assert_eq!((rows(&number, Tag::Attempt).await, rows(&number, Tag::Delivery).await), (150, 1));
    assert_eq!((rows(&number, Tag::DeadLetter).await, rows(&number, Tag::EndpointState).await), (1, 1));
    sweep(&number, Sweep::DeadLetters { endpoint: 2, after: EventSeq(0), before: Timestamp(9) }).await;
    assert_eq!(rows(&number, Tag::DeadLetter).await, 0);
}
