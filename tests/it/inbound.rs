//! What people write, on a wire that repeats it, spoils it, and uses an id twice: each message once, in its place, told
//! when it can be read.

use std::collections::HashSet;

use serde_json::{Value, json};
use switchboard::api::grpc::proto;
use switchboard::demo::client::{Caller, OwnedNumber};

use crate::harness::{World, until};

const SHOP: &str = "15551200001";
const CUSTOMER: &str = "15551200099";
/// How often the WhatsApp library asks for a message it cannot open.
const ASKED_AT_MOST: u64 = 5;

async fn history(caller: &Caller) -> Vec<proto::Message> {
    let request = proto::ListMessagesRequest::default();
    let mut messages = caller.messages().list_messages(request).await.unwrap().into_inner().messages;
    messages.reverse();
    messages
}

/// Kind and text, oldest first.
async fn lines(caller: &Caller) -> Vec<(String, String)> {
    history(caller).await.into_iter().map(|message| (message.kind, message.text)).collect()
}

fn text(of: &str) -> (String, String) {
    ("text".to_owned(), of.to_owned())
}

fn opaque() -> (String, String) {
    ("undecryptable".to_owned(), String::new())
}

/// The texts the webhook brought, in the order in which they first came; it may repeat one, under the same id.
fn told(world: &World, shop: &OwnedNumber) -> Vec<String> {
    let mut seen = HashSet::new();
    let received = world.sink.received().into_iter();
    let of_shop = received.filter(|hook| hook.subscription == shop.id && hook.event() == "message.received");
    let first = of_shop.filter(|hook| seen.insert(hook.id.clone()));
    first.map(|hook| hook.body["data"]["content"].as_str().unwrap().to_owned()).collect()
}

async fn arrives(world: &World, shop: &OwnedNumber, text: &str) {
    world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == text).await;
}

async fn stat(world: &World, of: &str) -> u64 {
    world.phones.stats().await.unwrap()[of].as_u64().unwrap()
}

/// A person writes, under an id if one is given. Gives the id.
async fn write(world: &World, text: &str, id: Option<&str>) -> String {
    let id = id.map(|id| format!("&id={id}")).unwrap_or_default();
    let path = format!("/admin/mock-phone/send?from={CUSTOMER}&to={SHOP}{id}");
    let answer: Value = serde_json::from_str(&world.phones.post(&path, text).await.unwrap()).unwrap();
    answer["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_opened_keeps_its_place_and_gets_its_text_when_it_comes_again() {
    let world = World::new().await;
    let (_, _, numbers) = world.tenant("placeholder", &[SHOP]).await;
    let shop = &numbers[0];
    write(&world, "first", None).await;
    arrives(&world, shop, "first").await;
    // The copy and its first repetition are spoiled, and the phone is off when it is asked.
    world.fault(&json!({"phone": CUSTOMER, "spoil": 1, "hold_repeats": true})).await;
    let id = write(&world, "second", None).await;
    until("its place is kept", async || (lines(&shop.caller).await == [text("first"), opaque()]).then_some(())).await;
    write(&world, "third", None).await;
    arrives(&world, shop, "third").await;
    assert_eq!(lines(&shop.caller).await, [text("first"), opaque(), text("third")]);
    let waiting = history(&shop.caller).await[1].clone();
    assert_eq!(waiting.whatsapp_id, id);
    assert_eq!(told(&world, shop), ["first", "third"], "nobody is told of what cannot be read");
    world.fault(&json!({"phone": CUSTOMER, "spoil": 1, "hold_repeats": false})).await;
    arrives(&world, shop, "second").await;
    assert_eq!(lines(&shop.caller).await, [text("first"), text("second"), text("third")], "in its place");
    let filled = history(&shop.caller).await[1].clone();
    assert_eq!((&filled.id, &filled.whatsapp_id), (&waiting.id, &id), "the same row");
    let hook = world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == "second").await;
    assert_eq!(hook.body["data"]["internalMessageId"], waiting.id.as_str());
    write(&world, "fourth", None).await;
    arrives(&world, shop, "fourth").await;
    assert_eq!(told(&world, shop), ["first", "third", "second", "fourth"], "told once, when it could be read");
    assert_eq!(world.metric("switchboard_number_messages_received_total", &shop.id).await, 4.0);
    assert_eq!(stat(&world, "signal_keys_reused").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_never_recovered_stays_a_placeholder_and_holds_up_nobody() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("never", &[SHOP]).await;
    let shop = numbers[0].clone();
    world.fault(&json!({"phone": CUSTOMER, "spoil": 1000})).await;
    let id = write(&world, "never to be read", None).await;
    until("it was asked for as often as can be", async || {
        (stat(&world, "retry_receipts").await == ASKED_AT_MOST).then_some(())
    })
    .await;
    assert_eq!(lines(&shop.caller).await, [opaque()], "one place for all copies");
    world.fault(&json!({"clear": true})).await;
    write(&world, "and on", None).await;
    arrives(&world, &shop, "and on").await;
    world.kill_and_restart();
    let caller = world.caller(&shop.key).await;
    let kept = until("it is there after a restart", async || {
        let request = proto::ListMessagesRequest::default();
        let listed = caller.messages().list_messages(request).await.ok()?.into_inner().messages;
        (listed.len() == 2).then_some(listed)
    })
    .await;
    assert_eq!((kept[1].whatsapp_id.as_str(), kept[1].kind.as_str()), (id.as_str(), "undecryptable"));
    write(&world, "still on", None).await;
    arrives(&world, &shop, "still on").await;
    assert_eq!(told(&world, &shop), ["and on", "still on"]);
    assert_eq!(stat(&world, "retry_receipts").await, ASKED_AT_MOST, "nobody is asked for ever");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_twice_shows_once_and_an_id_used_twice_swallows_nothing() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("twice", &[SHOP]).await;
    let shop = numbers[0].clone();
    // The very same stanza again.
    world.fault(&json!({"phone": SHOP, "duplicate": 1})).await;
    let id = write(&world, "same stanza", None).await;
    arrives(&world, &shop, "same stanza").await;
    // Sealed anew under the same id, as a sender does whose device died: with this text, and with another.
    write(&world, "same stanza", Some(&id)).await;
    write(&world, "other text, same id", Some(&id)).await;
    arrives(&world, &shop, "other text, same id").await;
    // And again after everything that was in memory is gone, from a server that forgot what it delivered.
    world.fault(&json!({"phone": SHOP, "redeliver": true})).await;
    write(&world, "delivered again", None).await;
    arrives(&world, &shop, "delivered again").await;
    world.kill_and_restart();
    let shop = OwnedNumber { caller: world.caller(&shop.key).await, ..shop };
    write(&world, "other text, same id", Some(&id)).await;
    write(&world, "third text, same id", Some(&id)).await;
    arrives(&world, &shop, "third text, same id").await;
    let once = ["same stanza", "other text, same id", "delivered again", "third text, same id"];
    assert_eq!(lines(&shop.caller).await, once.map(text));
    let ids: Vec<_> = history(&shop.caller).await.into_iter().map(|message| message.whatsapp_id).collect();
    assert_eq!(ids.iter().filter(|other| **other == id).count(), 3);
    assert_eq!(told(&world, &shop), once);
    assert_eq!(stat(&world, "signal_keys_reused").await, 0);
}
