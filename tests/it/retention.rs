//! What a number keeps, and for how long: read through the API, and on disk once the daemon is gone.

use std::sync::Arc;

use serde_json::Value;
use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::stream_events_response::Step;
use switchboard::demo::client::{Caller, OwnedNumber};
use switchboard::demo::phones::{CallError, call};
use switchboard::domain::event::EventBody;
use switchboard::domain::id::EventSeq;
use switchboard::domain::phone::{Contact, Phone};
use switchboard::store::key::Tag;
use switchboard::store::layout::{Store, StoreSettings};
use switchboard::store::number_store::{NumberStore, Order};
use switchboard::telemetry::rng::Random;
use tonic::Code;

use crate::harness::{World, until};

const SHOP: &str = "15557000001";
const CUSTOMER: &str = "15557000099";
const OTHER: &str = "15557000098";
const HOUR: u64 = 3600;

async fn json(world: &World, key: &str, method: &str, path: &str, body: &str) -> Result<Value, (u16, Value)> {
    match call(world.api(), method, path, &[("x-api-key", key)], body).await {
        Ok(text) => Ok(serde_json::from_str(&text).unwrap()),
        Err(CallError::Status { status, body }) => Err((status, serde_json::from_str(&body).unwrap())),
        Err(error) => panic!("{method} {path}: {error:?}"),
    }
}

async fn history(world: &World, number: &OwnedNumber, query: &str) -> Value {
    json(world, &number.key, "GET", &format!("/v1/messages/history{query}"), "").await.unwrap()
}

async fn put_clock_forward(world: &World, seconds: u64) {
    call(world.admin(), "POST", &format!("/debug/clock?seconds={seconds}"), &[], "").await.unwrap();
}

async fn listed(number: &OwnedNumber) -> Vec<proto::Message> {
    let request = proto::ListMessagesRequest { number: number.id.clone(), ..Default::default() };
    number.caller.messages().list_messages(request).await.unwrap().into_inner().messages
}

async fn got(number: &OwnedNumber, message: &str) -> Result<proto::Message, tonic::Status> {
    let request = proto::GetMessageRequest { id: message.to_owned() };
    number.caller.messages().get_message(request).await.map(tonic::Response::into_inner)
}

/// Waits until the only number has gone through everything it may forget, beginning after now.
async fn two_passes(world: &World) {
    let passes = async || {
        let metrics = world.metrics().await;
        let line = metrics.lines().find(|line| line.starts_with("switchboard_sweep_passes_total "));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    let before = passes().await;
    until("two more passes are through", async || (passes().await >= before + 2.0).then_some(())).await;
}

/// What a stream from the oldest event gives first.
async fn oldest_step(number: &OwnedNumber) -> Option<Step> {
    let request = proto::StreamEventsRequest::default();
    let mut stream = number.caller.events().stream_events(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap().step
}

/// The number's records, with the daemon stopped.
async fn on_disk<T>(world: &mut World, number: &str, look: impl AsyncFnOnce(&NumberStore) -> T) -> T {
    if let Some(mut daemon) = world.daemon.take() {
        assert_eq!(daemon.terminate(), Some(0));
    }
    let settings = StoreSettings::at(&world.data(), Arc::new(Random::seeded(1)));
    // A process that another test starts at this moment holds a copy of the lock until it is another program.
    let store = until("nobody holds the data", async || Store::open(&settings).ok()).await;
    let record = store.meta().number(number.parse().unwrap()).unwrap();
    let records = store.claim(record.id, record.volume).await.unwrap();
    let found = look(&records).await;
    drop(records);
    store.close();
    found
}

async fn left_on_disk(world: &mut World, number: &str, tags: &[Tag]) -> Vec<(Tag, usize)> {
    on_disk(world, number, async |store| {
        let mut left = Vec::new();
        for tag in tags {
            left.push((*tag, store.keys(*tag, &[], None, Order::Ascending, (0, 10_000)).await.unwrap().len()));
        }
        left
    })
    .await
}

/// Events that tell of a message; that the daemon stopped is an event as well.
async fn message_events_on_disk(world: &mut World, number: &str) -> usize {
    let events = on_disk(world, number, async |store| store.events(EventSeq(0), 1000).await.unwrap()).await;
    events.iter().filter(|event| event.chat().is_some()).count()
}

/// Sends and receives one message each, and waits until everybody was told.
async fn talk(world: &World, shop: &OwnedNumber, name: &str) -> String {
    let sent = shop.caller.send_text(CUSTOMER, &format!("out {name}"), name).await.unwrap();
    world.webhook(shop, "message.delivered", |hook| hook.body.to_string().contains(&sent.id)).await;
    let text = format!("in {name}");
    world.phones.write(CUSTOMER, SHOP, &text).await.unwrap();
    world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == text.as_str()).await;
    sent.id
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_older_than_the_days_to_keep_is_gone_from_reads_at_once_and_from_disk_soon() {
    let mut world = World::with(&[("RETENTION__SWEEP_SECONDS", "1")]).await;
    let (_, tenant_key, numbers) = world.tenant("days", &[SHOP]).await;
    let shop = numbers[0].clone();
    let old = talk(&world, &shop, "old").await;
    put_clock_forward(&world, 25 * HOUR).await;
    assert_eq!(history(&world, &shop, "").await["total"], 2, "everything is kept by default");
    let young = talk(&world, &shop, "young").await;
    let path = format!("/v1/numbers/{}", shop.id);
    let body = r#"{"piiMode":"STORE_X_DAYS","piiRetentionDays":1}"#;
    let changed = json(&world, &tenant_key, "PATCH", &path, body).await.unwrap();
    assert_eq!((changed["piiMode"].as_str(), changed["piiRetentionDays"].as_i64()), (Some("STORE_X_DAYS"), Some(1)));
    // Whatever the sweep has done by now, the answer is the same.
    assert_eq!(got(&shop, &old).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(got(&shop, &young).await.unwrap().text, "out young");
    let texts: Vec<_> = listed(&shop).await.into_iter().map(|message| message.text).collect();
    assert_eq!(texts, ["in young", "out young"]);
    let page = history(&world, &shop, "").await;
    assert_eq!((page["total"].as_i64(), page["messages"].as_array().unwrap().len()), (Some(2), 2));
    // A new caller finds the number as it was changed, also after a restart.
    world.kill_and_restart();
    let tenant = world.caller(&tenant_key).await;
    let number = world.number(&tenant, &shop.id).await;
    assert_eq!(number.retention.map(|kept| (kept.mode(), kept.days)), Some((proto::RetentionMode::KeepDays, 1)));
    // The restart took the clock back; now everything is too old.
    put_clock_forward(&world, 60 * HOUR).await;
    two_passes(&world).await;
    let shop = OwnedNumber { caller: world.caller(&shop.key).await, ..shop };
    assert!(matches!(oldest_step(&shop).await, Some(Step::Progress(_))), "streams begin behind what is gone");
    let tags = [Tag::Message, Tag::ChatMessage, Tag::Progress, Tag::WhatsappId, Tag::Chat];
    for (tag, left) in left_on_disk(&mut world, &shop.id, &tags).await {
        assert_eq!(left, 0, "{tag:?}");
    }
    assert_eq!(message_events_on_disk(&mut world, &shop.id).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_only_relays_tells_everything_and_keeps_nothing() {
    let mut world = World::with(&[("RETENTION__SWEEP_SECONDS", "1")]).await;
    let (tenant, _, numbers) = world.tenant("relay", &[SHOP]).await;
    let shop = numbers[0].clone();
    talk(&world, &shop, "kept at first").await;
    let change = proto::UpdateNumberRequest {
        number: Some(proto::Number {
            id: shop.id.clone(),
            retention: Some(proto::Retention { mode: proto::RetentionMode::RelayOnly.into(), days: 0 }),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["retention".to_owned()] }),
    };
    let changed = tenant.numbers().update_number(change).await.unwrap().into_inner();
    assert_eq!(changed.retention.unwrap().mode(), proto::RetentionMode::RelayOnly);
    let sent = talk(&world, &shop, "passing through").await;
    assert_eq!(world.copies(CUSTOMER, "out passing through").await, 1);
    let page = history(&world, &shop, "").await;
    assert_eq!((&page["messages"], &page["total"]), (&Value::Array(Vec::new()), &Value::from(0)));
    assert_eq!(page["notice"], "PII_RELAY_ONLY");
    assert!(listed(&shop).await.is_empty());
    let card = got(&shop, &sent).await.unwrap();
    assert_eq!((card.text.as_str(), card.peer_phone_number.as_str()), ("", ""));
    assert_eq!(card.status(), proto::MessageStatus::Delivered);
    let again = shop.caller.send_text(CUSTOMER, "out passing through", "passing through").await.unwrap();
    assert_eq!(again.id, sent, "a repeat is answered as before");
    // What was kept before goes at once, and with an hour for streams that come back the events go too.
    put_clock_forward(&world, 2 * HOUR).await;
    assert!(matches!(oldest_step(&shop).await, Some(Step::Progress(_))));
    two_passes(&world).await;
    let rows = left_on_disk(&mut world, &shop.id, &[Tag::OutboxBody, Tag::Message]).await;
    let counts: Vec<_> = rows.iter().map(|(_, left)| *left).collect();
    assert_eq!(counts, [0, 2], "of the two that passed through stays what receipts need");
    assert_eq!(message_events_on_disk(&mut world, &shop.id).await, 0);
    let kept = on_disk(&mut world, &shop.id, async |store| store.messages(None, None, 100).await.unwrap()).await;
    assert!(kept.iter().all(|record| record.content.kind() == "not_kept" && record.sender_name.is_none()));
}

/// Asks until the contact is erased entirely.
async fn erased(caller: &Caller, phone: &str) {
    let erase = async || {
        let request = proto::EraseContactRequest { number: String::new(), phone_number: format!("+{phone}") };
        match caller.numbers().erase_contact(request).await {
            Ok(answer) => (answer.into_inner().state() == proto::ErasureState::Erased).then_some(()),
            // A message to them may just be leaving, and a number that starts is not served yet.
            Err(status) => {
                assert!(matches!(status.code(), Code::ResourceExhausted | Code::Unavailable), "{status:?}");
                None
            }
        }
    };
    until("the contact is erased", erase).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_erased_contact_nothing_is_left_to_read_to_stream_or_to_deliver() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("erase", &[SHOP]).await;
    let shop = numbers[0].clone();
    let sent = talk(&world, &shop, "secret").await;
    shop.caller.send_text(OTHER, "to somebody else", "else").await.unwrap();
    world.phones.write(OTHER, SHOP, "from somebody else").await.unwrap();
    world.webhook(&shop, "message.received", |hook| hook.body["data"]["content"] == "from somebody else").await;
    world.sink.answer(503);
    world.phones.write(CUSTOMER, SHOP, "in secret, undelivered").await.unwrap();
    world.webhook(&shop, "message.received", |hook| hook.body["data"]["content"] == "in secret, undelivered").await;
    erased(&shop.caller, CUSTOMER).await;
    world.sink.answer(200);
    assert_eq!(got(&shop, &sent).await.unwrap_err().code(), Code::NotFound);
    let texts: Vec<_> = listed(&shop).await.into_iter().map(|message| message.text).collect();
    assert_eq!(texts, ["from somebody else", "to somebody else"]);
    assert_eq!(history(&world, &shop, "").await["total"], 2);
    let mut stream =
        shop.caller.events().stream_events(proto::StreamEventsRequest::default()).await.unwrap().into_inner();
    let mut told = Vec::new();
    while let Some(Step::Event(event)) = stream.message().await.unwrap().unwrap().step {
        told.push(format!("{event:?}"));
    }
    assert!(told.iter().any(|event| event.contains("somebody else")));
    assert!(!told.iter().any(|event| event.contains("secret") || event.contains(CUSTOMER)), "{told:#?}");
    // They are a new contact when they write again.
    talk(&world, &shop, "again").await;
    // The order survives the daemon's death, whenever it comes.
    let request = proto::EraseContactRequest { number: String::new(), phone_number: format!("+{CUSTOMER}") };
    let ordered = shop.caller.numbers().erase_contact(request).await;
    world.kill_and_restart();
    let caller = world.caller(&shop.key).await;
    if ordered.is_err() {
        // It was refused because a message was leaving: ordered again.
        erased(&caller, CUSTOMER).await;
    }
    let shop = OwnedNumber { caller, ..shop };
    until("nothing of it is left", async || {
        let request = proto::ListMessagesRequest { number: shop.id.clone(), ..Default::default() };
        let listed = shop.caller.messages().list_messages(request).await.ok()?.into_inner().messages;
        (listed.len() == 2).then_some(())
    })
    .await;
    erased(&shop.caller, CUSTOMER).await;
    let contact = Contact::of_phone(Phone::parse(CUSTOMER).unwrap());
    let orders =
        async |store: &NumberStore| store.keys(Tag::Erasure, &[], None, Order::Ascending, (0, 10)).await.unwrap().len();
    let (chat, left, events) = on_disk(&mut world, &shop.id, async |store| {
        (store.chat_of(&contact).await.unwrap(), orders(store).await, store.events(EventSeq(0), 1000).await.unwrap())
    })
    .await;
    assert_eq!(chat, None);
    if left > 0 {
        // The order goes last, and the daemon ended just before: the next one sees to it.
        world.start_again();
        let settled = async || (world.metric("switchboard_contacts_erased_total", "").await >= 1.0).then_some(());
        until("the order is settled", settled).await;
        assert_eq!(on_disk(&mut world, &shop.id, orders).await, 0);
    }
    assert!(!format!("{:?}", events).contains("secret"));
    let emptied = events.iter().filter(|event| matches!(event.body, EventBody::Erased(_))).count();
    assert!(emptied >= 4, "they keep their places: {emptied}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_is_paged_newest_first_and_is_the_numbers_own() {
    let world = World::new().await;
    let (_, tenant_key, numbers) = world.tenant("history", &[SHOP, OTHER]).await;
    let (shop, other) = (&numbers[0], &numbers[1]);
    for index in 0..7 {
        shop.caller.send_text(CUSTOMER, &format!("line {index}"), &format!("line-{index}")).await.unwrap();
    }
    world.phones.write(CUSTOMER, SHOP, "and back").await.unwrap();
    world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == "and back").await;
    let texts = |page: &Value| -> Vec<String> {
        let messages = page["messages"].as_array().unwrap();
        messages.iter().map(|message| message["text"].as_str().unwrap().to_owned()).collect()
    };
    let all = texts(&history(&world, shop, "").await);
    assert_eq!(all.len(), 8);
    assert_eq!((all[0].as_str(), all[7].as_str()), ("and back", "line 0"));
    let (mut by_page, mut by_cursor) = (Vec::new(), Vec::new());
    for page in 1..=3 {
        let found = history(&world, shop, &format!("?page={page}&pageSize=3")).await;
        assert_eq!((found["total"].as_i64(), found["totalPages"].as_i64()), (Some(8), Some(3)));
        by_page.extend(texts(&found));
    }
    let mut found = history(&world, shop, "?pageSize=3").await;
    loop {
        by_cursor.extend(texts(&found));
        let Some(cursor) = found["nextCursor"].as_str() else { break };
        found = history(&world, shop, &format!("?pageSize=3&cursor={cursor}")).await;
    }
    assert_eq!((&by_page, &by_cursor), (&all, &all), "each once, in one order");
    let first = &found["messages"][1];
    assert_eq!(
        (first["direction"].as_str(), first["participantPhone"].as_str()),
        (Some("OUTBOUND"), Some("+15557000099"))
    );
    let since = history(&world, shop, "?startDate=2100-01-01").await;
    assert_eq!((since["total"].as_i64(), texts(&since).len()), (Some(0), 0));
    let newest = &history(&world, shop, "?pageSize=1").await["messages"][0]["createdAt"];
    let before = history(&world, shop, &format!("?endDate={}", newest.as_str().unwrap())).await;
    assert_eq!(texts(&before), all[1..]);
    assert_eq!(history(&world, other, "").await["total"], 0, "nothing of another number");
    let refused = async |key: &str, query: &str| {
        let path = format!("/v1/messages/history{query}");
        let (status, body) = json(&world, key, "GET", &path, "").await.unwrap_err();
        (status, body["code"].as_str().unwrap().to_owned())
    };
    let invalid = (400, "INVALID_DATE_RANGE".to_owned());
    assert_eq!(refused(&shop.key, "?startDate=2026-02-01&endDate=2026-01-01").await, invalid);
    assert_eq!(refused(&shop.key, "?startDate=soon").await, invalid);
    assert_eq!(refused(&shop.key, "?page=0").await.1, "VALIDATION_ERROR");
    assert_eq!(refused(&shop.key, "?page=101&pageSize=100").await.1, "VALIDATION_ERROR");
    assert_eq!(refused(&shop.key, "?cursor=junk").await.1, "INVALID_PAGE_TOKEN");
    assert_eq!(refused(&tenant_key, "").await, (403, "TENANT_SCOPE_NOT_ALLOWED".to_owned()));
    // The same messages by the other API, under the same ids.
    let ids: Vec<_> = listed(shop).await.into_iter().map(|message| message.id).collect();
    let page = history(&world, shop, "").await;
    let shown: Vec<_> =
        page["messages"].as_array().unwrap().iter().map(|message| message["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids, shown);
}
