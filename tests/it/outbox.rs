//! Scheduled sends, deadlines, withdrawals, and what follows from each of WhatsApp's answers.

use serde_json::{Value, json};
use switchboard::api::grpc::proto::{self, MessageStatus};
use switchboard::demo::client::{Caller, OwnedNumber};
use switchboard::demo::phones::{CallError, call};

use crate::harness::{World, until};

const SHOP: &str = "15556000001";
const ANA: &str = "15556000098";
const BEA: &str = "15556000099";
const CAL: &str = "15556000097";

fn in_seconds(seconds: i64) -> String {
    (jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds)).to_string()
}

async fn json_call(
    world: &World,
    number: &OwnedNumber,
    method: &str,
    path: &str,
    body: &Value,
) -> Result<Value, CallError> {
    let headers = [("x-api-key", number.key.as_str()), ("content-type", "application/json")];
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let answer = call(world.api(), method, path, &headers, &body).await?;
    Ok(serde_json::from_str(&answer).unwrap())
}

async fn send(world: &World, number: &OwnedNumber, body: &Value) -> Value {
    json_call(world, number, "POST", "/v1/messages/send", body).await.unwrap()
}

/// What is known of a message; a number that starts is not served at once.
async fn look(world: &World, number: &OwnedNumber, id: &str) -> Value {
    until("it is looked up", async || {
        match json_call(world, number, "GET", &format!("/v1/messages/{id}"), &Value::Null).await {
            Err(CallError::Status { status: 503, .. }) => None,
            answer => Some(answer.unwrap()),
        }
    })
    .await
}

async fn until_status(world: &World, number: &OwnedNumber, id: &str, status: &str) -> Value {
    until(&format!("{id} is {status}"), async || {
        let message = look(world, number, id).await;
        (message["status"] == status).then_some(message)
    })
    .await
}

async fn message(caller: &Caller, id: &str) -> proto::Message {
    caller.messages().get_message(proto::GetMessageRequest { id: id.to_owned() }).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduled_send_survives_a_kill_and_is_never_early() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("scheduled", &[SHOP]).await;
    let shop = numbers[0].clone();
    let body = json!({"text": "later", "destinationNumber": ANA, "deliverAt": in_seconds(8), "correlationId": "ref 1"});
    let accepted = send(&world, &shop, &body).await;
    let now = json!({"text": "now", "destinationNumber": ANA});
    send(&world, &shop, &now).await;
    until("what is not scheduled goes", async || (world.copies(ANA, "now").await == 1).then_some(())).await;
    assert_eq!(world.copies(ANA, "later").await, 0);
    world.kill_and_restart();
    let id = accepted["id"].as_str().unwrap();
    until("it is sent", async || (world.copies(ANA, "later").await == 1).then_some(())).await;
    let sent = until("it says so", async || {
        let sent = look(&world, &shop, id).await;
        sent["sentAt"].is_string().then_some(sent)
    })
    .await;
    let at = |field: &str| sent[field].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    assert!(at("sentAt") >= at("deliverAt"), "{sent}");
    let by_whatsapp = sent["externalMessageId"].as_str().unwrap();
    for name in ["ref%201", by_whatsapp] {
        assert_eq!(look(&world, &shop, name).await["id"], id, "found by {name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_withdrawn_for_good_and_the_rest_is_named() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("cancel", &[SHOP]).await;
    let shop = numbers[0].clone();
    let later = json!({"text": "withdrawn", "destinationNumber": ANA, "deliverAt": in_seconds(10)});
    let later = send(&world, &shop, &later).await;
    let gone = send(&world, &shop, &json!({"text": "gone", "destinationNumber": ANA})).await;
    let (later, gone) = (later["id"].as_str().unwrap(), gone["id"].as_str().unwrap());
    until("one is sent", async || look(&world, &shop, gone).await["sentAt"].is_string().then_some(())).await;
    let cancel = async |world: &World, ids: Vec<&str>| {
        json_call(world, &shop, "DELETE", "/v1/messages/cancel", &json!({ "messageIds": ids })).await
    };
    let answer = cancel(&world, vec![later, gone, "msg_nonsense"]).await.unwrap();
    let expected = json!({
        "cancelled": [later],
        "failed": [{"id": gone, "reason": "ALREADY_SENT"}, {"id": "msg_nonsense", "reason": "NOT_FOUND"}],
    });
    assert_eq!(answer, expected);
    assert!(matches!(cancel(&world, vec![later; 101]).await, Err(CallError::Status { status: 400, .. })));
    world.kill_and_restart();
    assert_eq!(until_status(&world, &shop, later, "CANCELED").await["sentAt"], Value::Null);
    let marker = json!({"text": "marker", "destinationNumber": ANA, "deliverAt": in_seconds(11)});
    send(&world, &shop, &marker).await;
    until("time passes", async || (world.copies(ANA, "marker").await == 1).then_some(())).await;
    assert_eq!(world.copies(ANA, "withdrawn").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_passes_before_the_number_is_there_expires_the_message() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("deadline", &[SHOP]).await;
    let shop = &numbers[0];
    world.subscribe(shop).await;
    tenant.numbers().stop_number(proto::StopNumberRequest { number: shop.id.clone() }).await.unwrap();
    world.until_state(&tenant, &shop.id, proto::NumberState::Stopped).await;
    let body = json!({"text": "too late", "destinationNumber": ANA, "deliverUntil": in_seconds(2)});
    let id = send(&world, shop, &body).await["id"].as_str().unwrap().to_owned();
    let expired = until_status(&world, shop, &id, "EXPIRED").await;
    assert_eq!(expired["errorCode"], "NEVER_ATTEMPTED_MAX_AGE_EXCEEDED");
    world.webhook(shop, "message.failed", |hook| hook.body["data"]["internalMessageId"] == id.as_str()).await;
    let past = json!({"text": "x", "destinationNumber": ANA, "deliverUntil": in_seconds(-1)});
    let refused = json_call(&world, shop, "POST", "/v1/messages/send", &past).await;
    let Err(CallError::Status { status, body }) = refused else { panic!("{refused:?}") };
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, body["details"]["fields"][0]["field"].as_str()), (400, Some("deliverUntil")));
    tenant.numbers().start_number(proto::StartNumberRequest { number: shop.id.clone() }).await.unwrap();
    world.until_state(&tenant, &shop.id, proto::NumberState::Online).await;
    send(&world, shop, &json!({"text": "in time", "destinationNumber": ANA})).await;
    until("others go", async || (world.copies(ANA, "in time").await == 1).then_some(())).await;
    assert_eq!(world.copies(ANA, "too late").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_on_new_chats_is_shown_survives_a_kill_and_lets_answers_through() {
    let mut world = World::new().await;
    let (_, tenant_key, numbers) = world.tenant("locked", &[SHOP]).await;
    let shop = numbers[0].clone();
    let order = json!({"phone": SHOP, "nack": {"code": 463}}).to_string();
    world.phones.post("/admin/fault", &order).await.unwrap();
    let held = shop.caller.send_text(ANA, "hello stranger", "").await.unwrap();
    let held_until = async |world: &World| {
        let tenant = world.caller(&tenant_key).await;
        until("new chats are held", async || {
            let number = world.number(&tenant, &shop.id).await;
            (number.new_chats_held_reason == "REACH_OUT_LOCK").then_some(number.new_chats_held_until)
        })
        .await
        .unwrap()
    };
    held_until(&world).await;
    let family = "switchboard_number_new_chats_held_until_timestamp_seconds";
    assert!(world.metric(family, &shop.id).await > 0.0);
    // What is shown may not be on disk yet; once something is accepted behind it, it is.
    shop.caller.send_text(CAL, "hello other stranger", "").await.unwrap();
    world.kill_and_restart();
    held_until(&world).await;
    let caller = world.caller(&shop.key).await;
    assert_eq!(message(&caller, &held.id).await.status(), MessageStatus::Queued, "held, not failed");
    world.phones.write(BEA, SHOP, "are you open?").await.unwrap();
    until("the question arrives", async || {
        let asked = proto::ListMessagesRequest { peer_phone_number: BEA.to_owned(), ..Default::default() };
        let listed = caller.messages().list_messages(asked).await.unwrap().into_inner();
        (!listed.messages.is_empty()).then_some(())
    })
    .await;
    caller.send_text(BEA, "we are", "").await.unwrap();
    until("answers go on", async || (world.copies(BEA, "we are").await == 1).then_some(())).await;
    assert_eq!(world.copies(ANA, "hello stranger").await, 0);
    world.phones.write(ANA, SHOP, "it is me").await.unwrap();
    until("who writes in is answered", async || (world.copies(ANA, "hello stranger").await == 1).then_some(())).await;
    assert_eq!(world.copies(CAL, "hello other stranger").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_tried_again_as_their_code_says() {
    let world = World::new().await;
    let (_, _, numbers) = world.tenant("refused", &[SHOP]).await;
    let caller = &numbers[0].caller;
    for (code, count, expected) in [
        (479, 1, MessageStatus::Sent),
        (479, 2, MessageStatus::Failed),
        (404, 1, MessageStatus::Failed),
        (421, 1, MessageStatus::Sent),
        (503, 1, MessageStatus::Sent),
    ] {
        let order = json!({"phone": SHOP, "clear": true, "nack": {"code": code, "count": count}}).to_string();
        world.phones.post("/admin/fault", &order).await.unwrap();
        let text = format!("{code} {count}");
        let sent = caller.send_text(ANA, &text, "").await.unwrap();
        let status = until(&format!("{text} is settled"), async || {
            let status = message(caller, &sent.id).await.status();
            (status != MessageStatus::Queued).then_some(status)
        })
        .await;
        assert_eq!(status == MessageStatus::Failed, expected == MessageStatus::Failed, "{text}: {status:?}");
        let shown = usize::from(expected != MessageStatus::Failed);
        until(&format!("{text} is shown"), async || (world.copies(ANA, &text).await == shown).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_gets_its_answer_after_a_kill_and_after_its_deadline() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("repeated", &[SHOP]).await;
    let shop = numbers[0].clone();
    let ask = async |world: &World, text: &str, until: &str| {
        let body = json!({"text": text, "destinationNumber": ANA, "deliverUntil": until}).to_string();
        let headers = [("x-api-key", shop.key.as_str()), ("idempotency-key", "the same")];
        call(world.api(), "POST", "/v1/messages/send", &headers, &body).await
    };
    let deadline = in_seconds(5);
    let first: Value = serde_json::from_str(&ask(&world, "once", &deadline).await.unwrap()).unwrap();
    world.kill_and_restart();
    until("its deadline is past", async || {
        (deadline.parse::<jiff::Timestamp>().unwrap() < jiff::Timestamp::now()).then_some(())
    })
    .await;
    let again: Value = serde_json::from_str(&ask(&world, "once", &deadline).await.unwrap()).unwrap();
    assert_eq!(again["id"], first["id"]);
    for (text, until) in [("other", deadline.clone()), ("once", in_seconds(60))] {
        let refused = ask(&world, text, &until).await;
        let Err(CallError::Status { status: 409, body }) = refused else { panic!("{refused:?}") };
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["code"], "REQUEST_ID_REUSED");
    }
    assert!(world.copies(ANA, "once").await <= 1);
}
