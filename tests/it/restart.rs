//! SIGKILL while online: back by itself, on the same device and the same Signal sessions.

use std::collections::HashSet;

use switchboard::api::grpc::proto::NumberState;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{World, until};

const SHOP: &str = "15553000001";
const CUSTOMER: &str = "15553000099";

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_online_it_goes_on_where_it_was() {
    let mut world = World::new().await;
    let (_, tenant_key, numbers) = world.tenant("restart", &[SHOP]).await;
    let shop = numbers[0].clone();
    shop.caller.send_text(CUSTOMER, "before", "before").await.unwrap();
    world.webhook(&shop, "message.delivered", |_| true).await;
    world.phones.write(CUSTOMER, SHOP, "you there?").await.unwrap();
    world.webhook(&shop, "message.received", |_| true).await;
    let before = world.phones.stats().await.unwrap();
    world.kill_and_restart();
    let tenant = world.caller(&tenant_key).await;
    world.until_state(&tenant, &shop.id, NumberState::Online).await;
    let caller = world.caller(&shop.key).await;
    caller.send_text(CUSTOMER, "after", "after").await.unwrap();
    until("the phone shows both", async || (world.copies(CUSTOMER, "after").await == 1).then_some(())).await;
    world.phones.write(CUSTOMER, SHOP, "good").await.unwrap();
    world.webhook(&shop, "message.received", |hook| hook.body["data"]["content"] == "good").await;
    let after = world.phones.stats().await.unwrap();
    assert_eq!(after["signal_keys_reused"], 0);
    assert_eq!(before["retry_receipts"], after["retry_receipts"], "the old sessions go on: nobody asks again");
    assert_eq!(world.copies(CUSTOMER, "before").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_accepted_is_lost_or_shown_twice_when_killed_in_the_middle() {
    let mut world = World::new().await;
    let (_, tenant_key, numbers) = world.tenant("restart", &[SHOP]).await;
    let shop = numbers[0].clone();
    let mut accepted = Vec::new();
    for round in 0..4 {
        let caller = world.caller(&shop.key).await;
        for index in 0..25 {
            let text = format!("round {round} line {index}");
            caller.send_text(CUSTOMER, &text, &text).await.unwrap();
            accepted.push(text);
        }
        world.kill_and_restart();
    }
    let tenant = world.caller(&tenant_key).await;
    world.until_state(&tenant, &shop.id, NumberState::Online).await;
    let shown = until("everything accepted is shown", async || {
        let shown = world.phones.shown(CUSTOMER).await.unwrap();
        let texts: Vec<_> = shown.iter().filter_map(|message| message["text"].as_str().map(str::to_owned)).collect();
        (texts.len() >= accepted.len()).then_some(texts)
    })
    .await;
    assert_eq!(shown, accepted, "in order, each once");
    assert_eq!(shown.iter().collect::<HashSet<_>>().len(), shown.len());
    assert_eq!(world.phones.stats().await.unwrap()["signal_keys_reused"], 0);
}

/// Between a caller's question and its answer, before and after the message is on disk.
const ANSWER_LOST_AT: [&str; 3] = ["accept-before-durable", "accept-after-durable", "accept-before-reply"];

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_answer_died_with_the_daemon_is_answered_again_and_sent_once() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("answer-lost", &[SHOP]).await;
    let shop = numbers[0].clone();
    for place in ANSWER_LOST_AT {
        drop(world.daemon.take());
        world.start_to_die_at(Some(place));
        let caller = world.caller(&shop.key).await;
        let text = format!("lost at {place}");
        until("the daemon dies with the answer", async || {
            // Before the number is served it says so.
            assert!(caller.send_text(CUSTOMER, &text, &text).await.is_err(), "{place}");
            world.daemon.as_mut().unwrap().is_dead().then_some(())
        })
        .await;
        world.start_again();
        let caller = world.caller(&shop.key).await;
        let sent = until("it is answered", async || caller.send_text(CUSTOMER, &text, &text).await.ok()).await;
        world.kill_and_restart();
        let caller = world.caller(&shop.key).await;
        let again = until("it is answered again", async || caller.send_text(CUSTOMER, &text, &text).await.ok()).await;
        assert_eq!(again.id, sent.id, "{place}");
        let other = caller.send_text(CUSTOMER, "something else", &text).await.unwrap_err();
        let reason = other.get_details_error_info().unwrap().reason;
        assert_eq!((other.code(), reason.as_str()), (Code::InvalidArgument, "REQUEST_ID_REUSED"));
    }
    let expected = ANSWER_LOST_AT.map(|place| format!("lost at {place}"));
    let shown = until("all are shown", async || {
        let shown = world.phones.shown(CUSTOMER).await.unwrap();
        (shown.len() >= expected.len()).then_some(shown)
    })
    .await;
    let texts: Vec<_> = shown.iter().map(|message| message["text"].as_str().unwrap()).collect();
    assert_eq!(texts, expected, "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undelivered_webhook_survives_the_kill() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("restart", &[SHOP]).await;
    let shop = numbers[0].clone();
    world.sink.answer(503);
    world.phones.write(CUSTOMER, SHOP, "hold this").await.unwrap();
    let first = world.webhook(&shop, "message.received", |_| true).await;
    world.sink.answer(200);
    world.kill_and_restart();
    until("it is delivered again under the same id", async || {
        let copies = world.sink.received().iter().filter(|received| received.id == first.id).count();
        (copies >= 2).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains_and_exits_with_zero() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("restart", &[SHOP]).await;
    for index in 0..20 {
        numbers[0].caller.send_text(CUSTOMER, &format!("last {index}"), &format!("last-{index}")).await.unwrap();
    }
    assert_eq!(world.daemon.as_mut().unwrap().terminate(), Some(0));
    world.start_again();
    until("nothing accepted was lost", async || {
        let shown = world.phones.shown(CUSTOMER).await.unwrap();
        (shown.len() == 20).then_some(())
    })
    .await;
}
