//! The edges of the public surface: what is wrong is named, and a stream that is ended says where to go on.

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::NumberState;
use switchboard::api::grpc::proto::stream_events_response::Step;
use switchboard::demo::client::Caller;
use switchboard::demo::phones::{CallError, call};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{World, until};

const ONE: &str = "15556000001";
const CUSTOMER: &str = "15556000099";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_json_call_is_named() {
    let world = World::new().await;
    let (tenant, tenant_key, _) = world.tenant("json", &[]).await;
    let number = tenant.create_number("unlinked", ONE).await.unwrap();
    let key = ("x-api-key", number.key.as_str());
    let refused = async |method: &str, path: &str, headers: &[(&str, &str)], body: &str| {
        let answer = call(world.api(), method, path, headers, body).await;
        let Err(CallError::Status { status, body }) = answer else { panic!("{method} {path}: {answer:?}") };
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert!(body["error"].is_string(), "{body}");
        (status, body["code"].as_str().unwrap().to_owned(), body["details"].to_string())
    };
    let send = "/v1/messages/send";
    let too_long = format!(r#"{{"text":"{}"}}"#, "x".repeat(70_000));
    for (body, status, code, named) in [
        ("", 400, "VALIDATION_ERROR", "body"),
        ("[]", 400, "VALIDATION_ERROR", "body"),
        (r#"{"text":5,"destinationNumber":"+15556000099"}"#, 400, "VALIDATION_ERROR", "text"),
        (r#"{"text":"","destinationNumber":"+15556000099"}"#, 400, "VALIDATION_ERROR", "text"),
        (r#"{"text":"x"}"#, 400, "INVALID_DESTINATION", "destinationNumber"),
        (r#"{"templateId":"t","destinationNumber":"+15556000099"}"#, 400, "VALIDATION_ERROR", "templateId"),
        (too_long.as_str(), 413, "PAYLOAD_TOO_LARGE", ""),
    ] {
        let (got_status, got_code, details) = refused("POST", send, &[key], body).await;
        assert_eq!((got_status, got_code.as_str()), (status, code), "{}", &body[..body.len().min(80)]);
        assert!(details.contains(named), "{named} not in {details}");
    }
    assert_eq!(refused("POST", send, &[], "{}").await.0, 401);
    assert_eq!(refused("GET", "/v1/nothing", &[key], "").await.1, "PATH_NOT_FOUND");
    assert_eq!(refused("PUT", "/v1/numbers", &[key], "").await.1, "METHOD_NOT_ALLOWED");
    assert_eq!(refused("GET", "/v1/messages/msg_none", &[key], "").await.1, "MESSAGE_NOT_FOUND");
    assert_eq!(refused("GET", "/v1/numbers/num_none", &[("x-api-key", &tenant_key)], "").await.1, "NUMBER_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_send_to_a_number_that_is_down_waits_in_its_queue() {
    let world = World::new().await;
    let (tenant, _, _) = world.tenant("queue", &[]).await;
    let number = tenant.create_number("unlinked", ONE).await.unwrap();
    let headers = [("x-api-key", number.key.as_str()), ("idempotency-key", "order-1")];
    let body = format!(r#"{{"text":"later","destinationNumber":"+{CUSTOMER}"}}"#);
    let send = async || {
        let answer = call(world.api(), "POST", "/v1/messages/send", &headers, &body).await.unwrap();
        serde_json::from_str::<serde_json::Value>(&answer).unwrap()
    };
    let (first, again) = (send().await, send().await);
    assert_eq!(first, again, "the same request id, the same answer");
    assert_eq!(first["correlationId"], "order-1");
    let path = format!("/v1/messages/{}", first["id"].as_str().unwrap());
    let shown = call(world.api(), "GET", &path, &headers, "").await.unwrap();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((shown["status"].as_str(), shown["sentAt"].is_null()), (Some("QUEUED"), true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_at_the_drain_and_says_where_to_go_on() {
    let mut world = World::new().await;
    let (tenant, _, _) = world.tenant("drain", &[]).await;
    let number = tenant.create_number("unlinked", ONE).await.unwrap();
    let request = proto::StreamEventsRequest::default();
    let mut stream = number.caller.events().stream_events(request).await.unwrap().into_inner();
    let mut seen = Vec::new();
    loop {
        match stream.message().await.unwrap().unwrap().step.unwrap() {
            Step::Event(event) => seen.push(event.sequence),
            Step::Progress(progress) if progress.caught_up => break,
            Step::Progress(_) => {}
        }
    }
    assert_eq!(seen.first(), Some(&1));
    let mut daemon = world.daemon.take().unwrap();
    let stopped = tokio::task::spawn_blocking(move || daemon.terminate());
    let ended = loop {
        if let Err(status) = stream.message().await {
            break status;
        }
    };
    assert_eq!(stopped.await.unwrap(), Some(0));
    assert_eq!(ended.code(), Code::Unavailable, "{ended:?}");
    let info = ended.get_details_error_info().unwrap();
    assert_eq!(info.reason, "DRAINING");
    world.start_again();
    let caller = world.caller(&number.key).await;
    let request = proto::StreamEventsRequest { resume_cursor: info.metadata["cursor"].clone(), ..Default::default() };
    let mut stream = caller.events().stream_events(request).await.unwrap().into_inner();
    // Whatever was told while nobody listened follows without a gap.
    let step = stream.message().await.unwrap().unwrap().step.unwrap();
    if let Step::Event(event) = step {
        assert_eq!(event.sequence, seen.last().unwrap() + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cursors_and_page_tokens_are_checked() {
    let world = World::new().await;
    let (tenant, _, _) = world.tenant("tokens", &[]).await;
    let number = tenant.create_number("unlinked", ONE).await.unwrap();
    let request = proto::StreamEventsRequest { resume_cursor: "junk".to_owned(), ..Default::default() };
    let refused = number.caller.events().stream_events(request).await.unwrap_err();
    assert_eq!(refused.get_details_error_info().unwrap().reason, "CURSOR_INVALID");
    let request = proto::ListMessagesRequest { page_token: "junk".to_owned(), ..Default::default() };
    let refused = number.caller.messages().list_messages(request).await.unwrap_err();
    assert_eq!(refused.get_details_error_info().unwrap().reason, "INVALID_PAGE_TOKEN");
    let request = proto::ListNumbersRequest { page_size: -1, ..Default::default() };
    let refused = tenant.numbers().list_numbers(request).await.unwrap_err();
    assert_eq!(refused.get_details_bad_request().unwrap().field_violations[0].field, "page_size");
    let request = proto::SendMessageRequest { to: CUSTOMER.to_owned(), ..Default::default() };
    let refused = tenant.messages().send_message(request).await.unwrap_err();
    assert_eq!(refused.get_details_error_info().unwrap().reason, "NUMBER_REQUIRED");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_number_takes_can_be_attributed() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("usage", &["15559200001"]).await;
    let number = &numbers[0];
    let usage = async || world.number(&tenant, &number.id).await.usage.unwrap();
    let connected = until("its connection is told of", async || {
        let taken = usage().await;
        (taken.memory_bytes["connection"] > 0).then_some(taken)
    })
    .await;
    assert!(connected.wire_received_bytes > 0 && connected.wire_sent_bytes > 0, "{connected:?}");
    let rows = connected.disk_rows["messages"];
    for index in 0..5 {
        number.caller.send_text("15559200099", &format!("row {index}"), &format!("row {index}")).await.unwrap();
    }
    let counted = async || (usage().await.disk_rows["messages"] == rows + 5).then_some(());
    until("the history has grown by five rows", counted).await;
    assert!(usage().await.disk_rows["events"] > 0);
    // Held while nobody can send them.
    let request = proto::StopNumberRequest { number: number.id.clone() };
    tenant.numbers().stop_number(request).await.unwrap();
    let stopped = until("its connection has gone", async || {
        let taken = usage().await;
        (taken.memory_bytes["connection"] == 0).then_some(taken)
    })
    .await;
    assert!(stopped.wire_sent_bytes > connected.wire_sent_bytes, "{stopped:?}");
    number.caller.send_text("15559200099", "held", "held").await.unwrap();
    let held = until("the outbox takes memory and a row", async || {
        let taken = usage().await;
        (taken.disk_rows["outbox"] > 0 && taken.memory_bytes["outbox"] > 0).then_some(taken)
    })
    .await;
    let told = world.metric("switchboard_number_memory_bytes", &number.id).await;
    assert!(told >= held.memory_bytes["outbox"] as f64);
    // Two questions are two moments: what is still being written may come in between.
    until("both ways of asking tell the same rows", async || {
        let told = world.metric("switchboard_number_disk_rows", &number.id).await;
        (told == usage().await.disk_rows.values().sum::<i64>() as f64).then_some(())
    })
    .await;
    let metrics = world.metrics().await;
    assert!(metrics.contains("switchboard_numbers_memory_bytes{part=\"outbox\"}"), "{metrics}");
}

#[derive(Debug, Clone, Copy)]
enum Order {
    Start,
    Stop,
    Restart,
    Reset,
    Logout,
}

/// Gives an order; the state it is answered with, or the reason why not.
async fn order(tenant: &Caller, number: &str, order: Order) -> Result<NumberState, String> {
    let (mut numbers, number) = (tenant.numbers(), number.to_owned());
    let answer = match order {
        Order::Start => numbers.start_number(proto::StartNumberRequest { number }).await,
        Order::Stop => numbers.stop_number(proto::StopNumberRequest { number }).await,
        Order::Restart => numbers.restart_number(proto::RestartNumberRequest { number }).await,
        Order::Reset => numbers.reset_number(proto::ResetNumberRequest { number }).await,
        Order::Logout => numbers.logout_number(proto::LogoutNumberRequest { number }).await,
    };
    let reason = |status: tonic::Status| status.get_error_details().error_info().unwrap().reason.clone();
    answer.map(|answer| answer.into_inner().state()).map_err(reason)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_has_its_answer_in_every_state_also_the_second_time() {
    let world = World::new().await;
    let phones = ["15559300001", "15559300002", "15559300003", "15559300004"];
    let (tenant, _, numbers) = world.tenant("orders", &phones).await;
    let unlinked = tenant.create_number("unlinked", "15559300005").await.unwrap();
    let [stopped, gone, parked, online] = &numbers[..] else { unreachable!() };
    order(&tenant, &stopped.id, Order::Stop).await.unwrap();
    order(&tenant, &gone.id, Order::Logout).await.unwrap();
    world.phones.kick(&parked.phone, "429").await.unwrap();
    world.until_state(&tenant, &stopped.id, NumberState::Stopped).await;
    world.until_state(&tenant, &gone.id, NumberState::LoggedOut).await;
    world.until_state(&tenant, &parked.id, NumberState::Parked).await;
    let refused = |reason: &str| Err(reason.to_owned());
    for (number, given, answer) in [
        (&unlinked, Order::Start, Ok(NumberState::Unlinked)),
        (&unlinked, Order::Restart, Ok(NumberState::Unlinked)),
        (&unlinked, Order::Reset, Ok(NumberState::Unlinked)),
        (&unlinked, Order::Logout, Ok(NumberState::Unlinked)),
        (stopped, Order::Stop, Ok(NumberState::Stopped)),
        (stopped, Order::Reset, Ok(NumberState::Stopped)),
        (stopped, Order::Restart, refused("NUMBER_STOPPED")),
        (stopped, Order::Logout, refused("NUMBER_NOT_CONNECTED")),
        (gone, Order::Start, Ok(NumberState::LoggedOut)),
        (gone, Order::Restart, Ok(NumberState::LoggedOut)),
        (gone, Order::Logout, Ok(NumberState::LoggedOut)),
        (parked, Order::Logout, refused("NUMBER_NOT_CONNECTED")),
        (online, Order::Start, Ok(NumberState::Online)),
        (online, Order::Reset, Ok(NumberState::Online)),
    ] {
        for _ in 0..2 {
            assert_eq!(order(&tenant, &number.id, given).await, answer, "{given:?}");
        }
    }
    let logins = async || world.phones.stats().await.unwrap()["logins"].as_u64().unwrap();
    let before = logins().await;
    order(&tenant, &online.id, Order::Restart).await.unwrap();
    until("it has connected anew", async || (logins().await == before + 1).then_some(())).await;
    world.until_state(&tenant, &online.id, NumberState::Online).await;
    order(&tenant, &parked.id, Order::Restart).await.unwrap();
    order(&tenant, &stopped.id, Order::Start).await.unwrap();
    for number in [parked, stopped, online] {
        world.until_state(&tenant, &number.id, NumberState::Online).await;
    }
    assert_eq!(logins().await, before + 3);
    assert_eq!(world.phones.stats().await.unwrap()["devices_connected_twice"], 0);
}
