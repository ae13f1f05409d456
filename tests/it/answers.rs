//! What follows from each of WhatsApp's answers to a message, and from no answer at all: for the message, for its
//! owner, for the number.

use std::collections::HashMap;

use serde_json::json;
use switchboard::api::grpc::proto::stream_events_response::Step;
use switchboard::api::grpc::proto::{self, MessageStatus, NumberState};
use switchboard::demo::client::{Caller, OwnedNumber};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{World, until};

const SHOP: &str = "15551100001";
const OTHER: &str = "15551100002";
const ANA: &str = "15551100098";
const BEA: &str = "15551100099";
/// A number looks at the clock every second: it may have been put forward.
const AWAKE: (&str, &str) = ("RETENTION__SWEEP_SECONDS", "1");
const DAY: u64 = 24 * 3600;

async fn message(caller: &Caller, id: &str) -> proto::Message {
    until("it is looked up", async || {
        let request = proto::GetMessageRequest { id: id.to_owned() };
        match caller.messages().get_message(request).await {
            Err(status) if status.code() == Code::Unavailable => None,
            answer => Some(answer.unwrap().into_inner()),
        }
    })
    .await
}

async fn until_status(caller: &Caller, id: &str, status: MessageStatus) -> proto::Message {
    until(&format!("{id} is {status:?}"), async || {
        let message = message(caller, id).await;
        (message.status() == status).then_some(message)
    })
    .await
}

/// How often a phone shows a text, and how often the message behind it has reached the phone.
async fn shown(world: &World, phone: &str, text: &str) -> (usize, u64) {
    let lines = world.phones.shown(phone).await.unwrap();
    let lines: Vec<_> = lines.iter().filter(|line| line["text"] == text).collect();
    (lines.len(), lines.iter().filter_map(|line| line["times_received"].as_u64()).sum())
}

async fn count(world: &World, of: &str) -> u64 {
    world.phones.stats().await.unwrap()[of].as_u64().unwrap()
}

/// WhatsApp refuses the next `count` messages with `code`. Gives what became of the message sent then.
async fn refused(world: &World, number: &OwnedNumber, code: u16, count: u32) -> (String, &'static str) {
    world.fault(&json!({"phone": number.phone, "clear": true, "nack": {"code": code, "count": count}})).await;
    let text = format!("{code} {count}");
    let sent = number.caller.send_text(ANA, &text, "").await.unwrap();
    let of_message =
        |hook: &switchboard::demo::sink::Received| hook.body["data"]["internalMessageId"] == sent.id.as_str();
    let expected = match (code, count) {
        (404, _) => "WHATSAPP_NOT_EXIST",
        (400 | 421 | 479, 2) | (999, _) => "REJECTED_BY_WHATSAPP",
        (429 | 500..=599, 5) => "DELIVERY_TIMEOUT",
        _ => "",
    };
    if expected.is_empty() {
        world.webhook(number, "message.delivered", of_message).await;
        assert_eq!(shown(world, ANA, &text).await, (1, 1), "{text}");
        return (sent.id, expected);
    }
    let told = world.webhook(number, "message.failed", of_message).await;
    assert_eq!((told.verified, &told.body["data"]["errorCode"]), (true, &json!(expected)), "{text}");
    let failed = message(&number.caller, &sent.id).await;
    assert_eq!((failed.status(), failed.failure_code.as_str()), (MessageStatus::Failed, expected), "{text}");
    assert!(failed.failed_time.is_some() && failed.sent_time.is_none(), "{failed:?}");
    assert_eq!(shown(world, ANA, &text).await, (0, 0), "{text}");
    (sent.id, expected)
}

/// The last that a number's events tell of each message.
async fn told(number: &OwnedNumber) -> HashMap<String, (MessageStatus, String)> {
    let request = proto::StreamEventsRequest::default();
    let mut stream = number.caller.events().stream_events(request).await.unwrap().into_inner();
    let mut told = HashMap::new();
    while let Some(Step::Event(event)) = stream.message().await.unwrap().unwrap().step {
        if let Some(proto::event::Body::MessageProgress(progress)) = event.body {
            told.insert(progress.message.clone(), (progress.status(), progress.failure_code.clone()));
        }
    }
    told
}

/// Each code with as many refusals as end the message, and with one less.
const QUICK: [(u16, u32); 8] = [(400, 1), (400, 2), (404, 1), (421, 1), (421, 2), (479, 1), (479, 2), (999, 1)];
const SLOW: [(u16, u32); 5] = [(429, 1), (500, 1), (429, 4), (503, 5), (429, 5)];

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_ends_as_its_code_says_and_the_number_goes_on() {
    let world = World::with(&[AWAKE]).await;
    let (tenant, _, numbers) = world.tenant("answers", &[SHOP, OTHER]).await;
    // Refusals for now are repeated after 5, 10, 20 and 40 seconds.
    let _haste = world.in_haste();
    let through = async |number: &OwnedNumber, codes: &[(u16, u32)]| {
        let mut ended = Vec::new();
        for (code, count) in codes {
            ended.push(refused(&world, number, *code, *count).await);
        }
        let last = number.caller.send_text(BEA, &format!("{} goes on", number.phone), "").await.unwrap();
        until_status(&number.caller, &last.id, MessageStatus::Delivered).await;
        let told = told(number).await;
        for (id, expected) in &ended {
            let (status, code) = &told[id];
            assert_eq!(code, expected);
            assert_eq!(*status == MessageStatus::Failed, !expected.is_empty(), "{status:?}");
        }
        let failed = ended.iter().filter(|(_, code)| !code.is_empty()).count();
        assert_eq!(world.metric("switchboard_number_messages_failed_total", &number.id).await, failed as f64);
        let sent = (ended.len() - failed + 1) as f64;
        assert_eq!(world.metric("switchboard_number_messages_sent_total", &number.id).await, sent);
        assert_eq!(world.metric("switchboard_number_outbox_depth", &number.id).await, 0.0);
        assert_eq!(world.number(&tenant, &number.id).await.state(), NumberState::Online);
    };
    tokio::join!(through(&numbers[0], &QUICK), through(&numbers[1], &SLOW));
    let nacks: u32 = QUICK.iter().chain(&SLOW).map(|(_, count)| count).sum();
    assert_eq!(count(&world, "nacks").await, u64::from(nacks), "asked as often as the code allows, never more");
    let stats = world.phones.stats().await.unwrap();
    assert_eq!((&stats["signal_keys_reused"], &stats["devices_connected_twice"]), (&json!(0), &json!(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cap_on_new_chats_holds_them_for_a_day_and_nothing_else() {
    let world = World::with(&[AWAKE]).await;
    let (tenant, _, numbers) = world.tenant("cap", &[SHOP]).await;
    let shop = &numbers[0];
    world.fault(&json!({"phone": SHOP, "nack": {"code": 475}})).await;
    let first = shop.caller.send_text(ANA, "new chat", "").await.unwrap();
    let held = until("new chats are held", async || {
        let number = world.number(&tenant, &shop.id).await;
        (number.new_chats_held_reason == "NEW_CHAT_CAP").then_some(number)
    })
    .await;
    let (until_when, now) = (held.new_chats_held_until.unwrap().seconds, jiff::Timestamp::now().as_second());
    assert!((now + 23 * 3600..=now + 24 * 3600).contains(&until_when), "a day: {until_when}");
    assert!(world.metric("switchboard_number_new_chats_held_until_timestamp_seconds", &shop.id).await > 0.0);
    let other = shop.caller.send_text(OTHER, "another new chat", "").await.unwrap();
    world.phones.write(BEA, SHOP, "open?").await.unwrap();
    world.webhook(shop, "message.received", |_| true).await;
    let answer = shop.caller.send_text(BEA, "yes", "").await.unwrap();
    until_status(&shop.caller, &answer.id, MessageStatus::Delivered).await;
    world.put_clock_forward(DAY - 3600).await;
    let again = shop.caller.send_text(BEA, "still", "").await.unwrap();
    until_status(&shop.caller, &again.id, MessageStatus::Delivered).await;
    for waiting in [&first, &other] {
        assert_eq!(message(&shop.caller, &waiting.id).await.status(), MessageStatus::Queued, "held, not failed");
    }
    assert_eq!(count(&world, "nacks").await, 1, "no attempt to open a chat meanwhile");
    world.put_clock_forward(2 * 3600).await;
    for (waiting, phone, text) in [(&first, ANA, "new chat"), (&other, OTHER, "another new chat")] {
        until_status(&shop.caller, &waiting.id, MessageStatus::Delivered).await;
        assert_eq!(shown(&world, phone, text).await.0, 1);
    }
    assert_eq!(world.number(&tenant, &shop.id).await.new_chats_held_until, None);
    assert_eq!(world.metric("switchboard_number_new_chats_held_until_timestamp_seconds", &shop.id).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_on_new_chats_ends_when_whatsapp_says_and_one_message_looks_first() {
    let world = World::with(&[AWAKE]).await;
    let (tenant, _, numbers) = world.tenant("lock", &[SHOP]).await;
    let shop = &numbers[0];
    // Slow answers: both are on their way when the first one is refused.
    let nack = json!({"code": 463, "count": 3});
    world.fault(&json!({"phone": SHOP, "nack": nack, "locked_for": 7200, "delay_ms": 200})).await;
    let mut sent = Vec::new();
    for person in [ANA, BEA] {
        sent.push(shop.caller.send_text(person, "hello stranger", "").await.unwrap().id);
    }
    let held = async |least: i64| {
        until("it is held as long as WhatsApp says", async || {
            let number = world.number(&tenant, &shop.id).await;
            let until = number.new_chats_held_until.map_or(0, |until| until.seconds);
            (number.new_chats_held_reason == "REACH_OUT_LOCK" && (least..least + 600).contains(&until)).then_some(())
        })
        .await;
    };
    let now = jiff::Timestamp::now().as_second();
    until("both are refused", async || (count(&world, "nacks").await == 2).then_some(())).await;
    held(now + 7200 - 60).await;
    world.fault(&json!({"phone": SHOP, "delay_ms": 0})).await;
    world.put_clock_forward(7260).await;
    until("one looked", async || (count(&world, "nacks").await == 3).then_some(())).await;
    // By the sandbox's clock the lock ends in the past; a hold lasts a minute at least.
    held(now + 7260 + 60).await;
    world.put_clock_forward(7260).await;
    for id in &sent {
        until_status(&shop.caller, id, MessageStatus::Delivered).await;
    }
    for person in [ANA, BEA] {
        assert_eq!(shown(&world, person, "hello stranger").await, (1, 1));
    }
    assert_eq!(count(&world, "nacks").await, 3, "the other one did not try meanwhile");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_answer_it_reconnects_and_sends_again_under_the_same_id() {
    let world = World::with(&[AWAKE]).await;
    let (_, _, numbers) = world.tenant("no-answer", &[SHOP]).await;
    let shop = &numbers[0];
    world.fault(&json!({"phone": SHOP, "lose": 1})).await;
    let lost = shop.caller.send_text(ANA, "lost on its way", "").await.unwrap();
    let behind = shop.caller.send_text(ANA, "right behind it", "").await.unwrap();
    until("it is on the wire", async || (count(&world, "messages").await == 1).then_some(())).await;
    let logins = count(&world, "logins").await;
    world.put_clock_forward(30).await;
    let beside = shop.caller.send_text(BEA, "to somebody else", "").await.unwrap();
    until_status(&shop.caller, &beside.id, MessageStatus::Delivered).await;
    assert_eq!(count(&world, "logins").await, logins, "it waits a minute");
    world.put_clock_forward(31).await;
    for sent in [&lost, &behind] {
        until_status(&shop.caller, &sent.id, MessageStatus::Delivered).await;
    }
    assert!(count(&world, "logins").await > logins, "a connection that does not answer is not trusted");
    let texts: Vec<_> = world.phones.shown(ANA).await.unwrap().into_iter().map(|line| line["text"].clone()).collect();
    assert_eq!(texts, [json!("lost on its way"), json!("right behind it")], "in order, each once");
    let id = message(&shop.caller, &lost.id).await.whatsapp_id;
    let lines = world.phones.shown(ANA).await.unwrap();
    assert_eq!(lines[0]["id"], id.as_str());
    assert_eq!(world.metric("switchboard_messages_resent_total", "").await, 1.0);
    assert_eq!(world.phones.stats().await.unwrap()["signal_keys_reused"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_would_rather_lose_a_message_than_repeat_it_is_told_what_became_of_it() {
    let world = World::with(&[AWAKE, ("SENDING__ON_UNKNOWN", "fail")]).await;
    let (_, _, numbers) = world.tenant("on-unknown", &[SHOP]).await;
    let shop = &numbers[0];
    // Carried, but not acknowledged: the receipt proves it.
    world.fault(&json!({"phone": SHOP, "drop_acks": 1})).await;
    let proved = shop.caller.send_text(ANA, "proved", "").await.unwrap();
    until_status(&shop.caller, &proved.id, MessageStatus::Delivered).await;
    world.fault(&json!({"phone": SHOP, "clear": true, "lose": 1})).await;
    let lost = shop.caller.send_text(ANA, "lost", "").await.unwrap();
    let behind = shop.caller.send_text(ANA, "behind", "").await.unwrap();
    until("it is on the wire", async || (count(&world, "messages").await == 2).then_some(())).await;
    world.phones.kick(SHOP, "drop").await.unwrap();
    let failed = until_status(&shop.caller, &lost.id, MessageStatus::Failed).await;
    assert_eq!(failed.failure_code, "DELIVERY_TIMEOUT");
    let hook = world.webhook(shop, "message.failed", |_| true).await;
    assert_eq!(hook.body["data"]["internalMessageId"], lost.id.as_str());
    until_status(&shop.caller, &behind.id, MessageStatus::Delivered).await;
    let texts: Vec<_> = world.phones.shown(ANA).await.unwrap().into_iter().map(|line| line["text"].clone()).collect();
    assert_eq!(texts, [json!("proved"), json!("behind")], "never repeated");
    assert!(!world.metrics().await.contains("\nswitchboard_messages_resent_total "), "not one");
}

#[tokio::test(flavor = "multi_thread")]
async fn logged_out_with_an_unanswered_message_it_goes_out_once_linked_again() {
    let mut world = World::new().await;
    let (_, tenant_key, numbers) = world.tenant("logged-out", &[SHOP]).await;
    let shop = numbers[0].clone();
    let before = shop.caller.send_text(ANA, "before", "").await.unwrap();
    until_status(&shop.caller, &before.id, MessageStatus::Delivered).await;
    // Carried and not answered, and the receipt does not find the way back either: the account is gone.
    world.fault(&json!({"phone": SHOP, "lose": 1})).await;
    let unknown = shop.caller.send_text(ANA, "unanswered", "").await.unwrap();
    until("it is on the wire", async || (count(&world, "messages").await == 2).then_some(())).await;
    world.phones.post(&format!("/admin/mock-phone/unlink?phone={SHOP}"), "").await.unwrap();
    let tenant = world.caller(&tenant_key).await;
    world.until_state(&tenant, &shop.id, NumberState::LoggedOut).await;
    let waiting = shop.caller.send_text(ANA, "accepted meanwhile", "").await.unwrap();
    world.kill_and_restart();
    let tenant = world.caller(&tenant_key).await;
    let shop = OwnedNumber { caller: world.caller(&shop.key).await, ..shop };
    for sent in [&unknown, &waiting] {
        assert_eq!(message(&shop.caller, &sent.id).await.status(), MessageStatus::Queued, "it waits for the owner");
    }
    world.link(&tenant, &shop).await;
    for sent in [&unknown, &waiting] {
        until_status(&shop.caller, &sent.id, MessageStatus::Delivered).await;
    }
    let lines = world.phones.shown(ANA).await.unwrap();
    let texts: Vec<_> = lines.iter().map(|line| line["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["before", "unanswered", "accepted meanwhile"], "in order, each once");
    assert_eq!(lines[1]["id"], message(&shop.caller, &unknown.id).await.whatsapp_id.as_str(), "under its id");
    assert_eq!(world.phones.stats().await.unwrap()["signal_keys_reused"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_so_and_takes_more_once_there_is_room() {
    const CALLERS: usize = 48;
    let world = World::new().await;
    let (tenant, _, _) = world.tenant("full", &[]).await;
    // Never linked, so nothing leaves.
    let shop = tenant.create_number("unlinked", SHOP).await.unwrap();
    let most = switchboard::domain::number::QUEUE_MAX;
    let first = shop.caller.send_text(ANA, "line 0", "line 0").await.unwrap().id;
    let mut callers = tokio::task::JoinSet::new();
    for caller in 1..=CALLERS {
        let shop = shop.clone();
        callers.spawn(async move {
            for index in (caller..most).step_by(CALLERS) {
                let text = format!("line {index}");
                shop.caller.send_text(ANA, &text, &text).await.unwrap();
            }
        });
    }
    callers.join_all().await;
    let full = async |text: &str| shop.caller.send_text(ANA, text, text).await;
    let refused = full("one more").await.unwrap_err();
    let details = refused.get_error_details();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(details.error_info().map(|info| info.reason.as_str()), Some("QUEUE_FULL"));
    assert!(details.retry_info().is_some(), "it says when to come again");
    assert_eq!(full("line 0").await.unwrap().id, first, "a repeat is no new one");
    let request = proto::CancelMessagesRequest { number: String::new(), ids: vec![first] };
    shop.caller.messages().cancel_messages(request).await.unwrap();
    full("one more").await.unwrap();
    assert_eq!(full("yet another").await.unwrap_err().code(), Code::ResourceExhausted);
}
