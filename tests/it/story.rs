//! Both directions, receipts, webhooks and history, proved from outside.

use switchboard::api::grpc::proto;

use crate::harness::{World, until};

const SHOP: &str = "15551000001";
const CUSTOMER: &str = "15551000099";

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_shown_once_and_every_rung_is_told() {
    let world = World::new().await;
    let (_, _, numbers) = world.tenant("story", &[SHOP]).await;
    let shop = &numbers[0];
    let sent = shop.caller.send_text(CUSTOMER, "ping", "request-1").await.unwrap();
    assert_eq!(sent.status(), proto::MessageStatus::Queued);
    let of_message =
        |received: &switchboard::demo::sink::Received| received.body["data"]["internalMessageId"] == sent.id.as_str();
    let delivered = world.webhook(shop, "message.delivered", of_message).await;
    // A receipt that overtakes WhatsApp's own answer makes that rung old news.
    let told = world.sink.received();
    let was_sent = told.iter().find(|received| received.body["event"] == "message.sent" && of_message(received));
    for received in was_sent.into_iter().chain([&delivered]) {
        assert!(received.verified);
        assert_eq!(received.body["data"]["numberId"], shop.id.as_str());
        assert!(received.body["data"]["sequence"].as_i64() <= delivered.body["data"]["sequence"].as_i64());
    }
    world.phones.read(CUSTOMER, SHOP).await.unwrap();
    assert!(world.webhook(shop, "message.read", of_message).await.verified);
    assert_eq!(world.copies(CUSTOMER, "ping").await, 1);
    let request = proto::GetMessageRequest { id: sent.id.clone() };
    let message = shop.caller.messages().get_message(request).await.unwrap().into_inner();
    assert_eq!(message.status(), proto::MessageStatus::Read);
    assert!(message.delivered_time.is_some() && message.read_time.is_some());
    assert_eq!(message.sent_time.is_some(), was_sent.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_phone_writes_arrives_as_webhook_event_and_history() {
    let world = World::new().await;
    let (_, _, numbers) = world.tenant("story", &[SHOP]).await;
    let shop = &numbers[0];
    for index in 0..5 {
        world.phones.write(CUSTOMER, SHOP, &format!("question {index}")).await.unwrap();
    }
    for index in 0..5 {
        let text = format!("question {index}");
        let received = world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == text).await;
        assert!(received.verified);
    }
    // Newest first, page by page, each exactly once.
    let mut texts = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = proto::ListMessagesRequest { page_size: 2, page_token, ..Default::default() };
        let page = shop.caller.messages().list_messages(request).await.unwrap().into_inner();
        texts.extend(page.messages.into_iter().map(|message| message.text));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(texts, (0..5).rev().map(|index| format!("question {index}")).collect::<Vec<_>>());
    let request = proto::StreamEventsRequest::default();
    let mut stream = shop.caller.events().stream_events(request).await.unwrap().into_inner();
    let mut sequences = Vec::new();
    let mut received = 0;
    while received < 5 {
        let step = stream.message().await.unwrap().unwrap();
        if let Some(proto::stream_events_response::Step::Event(event)) = step.step {
            sequences.push(event.sequence);
            received += usize::from(event.r#type == "message.received");
        }
    }
    assert_eq!(sequences, (1..=sequences.len() as i64).collect::<Vec<_>>(), "gap-free from 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_stream_resumes_where_it_was_left() {
    let world = World::new().await;
    let (_, _, numbers) = world.tenant("story", &[SHOP]).await;
    let shop = &numbers[0];
    let next = async |cursor: String| {
        let request =
            proto::StreamEventsRequest { number: shop.id.clone(), resume_cursor: cursor, ..Default::default() };
        let mut stream = shop.caller.events().stream_events(request).await.unwrap().into_inner();
        loop {
            let step = stream.message().await.unwrap().unwrap();
            if let Some(proto::stream_events_response::Step::Event(event)) = step.step {
                return (event.sequence, step.cursor);
            }
        }
    };
    let (first, cursor) = next(String::new()).await;
    let (second, _) = next(cursor).await;
    assert_eq!((first, second), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn order_within_a_chat_is_the_order_of_acceptance() {
    let world = World::new().await;
    let (_, _, numbers) = world.tenant("story", &[SHOP]).await;
    let shop = &numbers[0];
    let texts: Vec<_> = (0..30).map(|index| format!("line {index}")).collect();
    for (index, text) in texts.iter().enumerate() {
        shop.caller.send_text(CUSTOMER, text, &format!("order-{index}")).await.unwrap();
    }
    let shown = until("all lines are shown", async || {
        let shown = world.phones.shown(CUSTOMER).await.unwrap();
        let lines: Vec<_> = shown.iter().filter_map(|message| message["text"].as_str().map(str::to_owned)).collect();
        (lines.len() >= texts.len()).then_some(lines)
    })
    .await;
    assert_eq!(shown, texts);
    assert_eq!(world.phones.stats().await.unwrap()["signal_keys_reused"], 0);
}
