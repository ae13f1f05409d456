//! The event stream: no gap without being told, whatever happens to the daemon, the number or the reader.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::stream_events_response::Step;
use switchboard::demo::client::{Caller, OwnedNumber};
use switchboard::demo::phones::call;
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::harness::{PATIENCE, World, until};

const SHOP: &str = "15558000001";
const CUSTOMER: &str = "15558000099";

type Steps = Streaming<proto::StreamEventsResponse>;

async fn stream(caller: &Caller, number: &str, cursor: &str) -> Result<Steps, Status> {
    let request = proto::StreamEventsRequest {
        number: number.to_owned(),
        resume_cursor: cursor.to_owned(),
        ..proto::StreamEventsRequest::default()
    };
    caller.events().stream_events(request).await.map(tonic::Response::into_inner)
}

async fn step(steps: &mut Steps) -> Result<Option<proto::StreamEventsResponse>, Status> {
    tokio::time::timeout(PATIENCE, steps.message()).await.expect("the stream says nothing")
}

/// Reads until the stream has caught up. Gives the sequences and the last cursor.
async fn caught_up(steps: &mut Steps) -> (Vec<i64>, String) {
    let mut sequences = Vec::new();
    loop {
        let response = step(steps).await.unwrap().unwrap();
        match response.step.unwrap() {
            Step::Event(event) => sequences.push(event.sequence),
            Step::Progress(progress) => {
                assert!(progress.caught_up);
                return (sequences, response.cursor);
            }
        }
    }
}

/// Reads to the end. Gives the error.
async fn ended(steps: &mut Steps) -> Status {
    loop {
        match step(steps).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without a word"),
            Err(status) => return status,
        }
    }
}

fn told(status: &Status) -> (String, HashMap<String, String>) {
    let info = status.get_details_error_info().unwrap();
    (info.reason, info.metadata)
}

async fn write(world: &World, shop: &OwnedNumber, text: &str) {
    world.phones.write(CUSTOMER, SHOP, text).await.unwrap();
    world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == text).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_middle_a_reader_goes_on_without_a_gap() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("streams", &[SHOP]).await;
    let shop = numbers[0].clone();
    let mut all = Vec::new();
    let mut told_of = HashSet::new();
    let mut read = |event: proto::Event| {
        all.push(event.sequence);
        let last = event.sequence;
        assert_eq!(all, (1..=last).collect::<Vec<_>>(), "every event once, in order");
        if let Some(proto::event::Body::MessageProgress(progress)) = event.body {
            told_of.insert(progress.message);
        }
        told_of.len()
    };
    let mut cursor = String::new();
    for round in 0..3 {
        let caller = world.caller(&shop.key).await;
        let mut steps = stream(&caller, "", &cursor).await.unwrap();
        for index in 0..5 {
            let text = format!("round {round} line {index}");
            caller.send_text(CUSTOMER, &text, &text).await.unwrap();
        }
        // Two events of the round, and then the daemon is gone under the reader.
        let mut seen = 0;
        while seen < 2 {
            let response = step(&mut steps).await.unwrap().unwrap();
            cursor = response.cursor;
            if let Some(Step::Event(event)) = response.step {
                read(event);
                seen += 1;
            }
        }
        world.kill_and_restart();
        assert!(ended(&mut steps).await.code() != Code::Ok);
    }
    let caller = world.caller(&shop.key).await;
    let mut steps = stream(&caller, "", &cursor).await.unwrap();
    let mut messages = 0;
    while messages < 15 {
        if let Some(Step::Event(event)) = step(&mut steps).await.unwrap().unwrap().step {
            messages = read(event);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_older_than_the_log_is_told_where_to_go_on() {
    let world = World::with(&[("RETENTION__SWEEP_SECONDS", "1"), ("RETENTION__EVENT_DAYS", "1")]).await;
    let (_, _, numbers) = world.tenant("streams", &[SHOP]).await;
    let shop = &numbers[0];
    write(&world, shop, "old").await;
    let (before, old_cursor) = caught_up(&mut stream(&shop.caller, "", "").await.unwrap()).await;
    write(&world, shop, "still old").await;
    call(world.admin(), "POST", "/debug/clock?seconds=90000", &[], "").await.unwrap();
    write(&world, shop, "young").await;
    let (after, _) = until("the log begins later", async || {
        let (kept, cursor) = caught_up(&mut stream(&shop.caller, "", "").await.unwrap()).await;
        (kept.first() > before.last()).then_some((kept, cursor))
    })
    .await;
    let expired = ended(&mut stream(&shop.caller, "", &old_cursor).await.unwrap()).await;
    let (reason, metadata) = told(&expired);
    assert_eq!((expired.code(), reason.as_str()), (Code::OutOfRange, "CURSOR_EXPIRED"));
    let (again, _) = caught_up(&mut stream(&shop.caller, "", &metadata["oldest_cursor"]).await.unwrap()).await;
    assert_eq!(again, after, "from there on everything is there");
    assert_eq!(after, (after[0]..=after[after.len() - 1]).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_nothing_is_ended_and_finds_where_it_was() {
    let world = World::with(&[("API__STREAM_PATIENCE_SECONDS", "1")]).await;
    let (_, _, numbers) = world.tenant("streams", &[SHOP]).await;
    let shop = &numbers[0];
    // A connection that takes 64 KiB at most, so that a few messages fill it.
    let endpoint = Endpoint::from_shared(format!("http://{}", world.api())).unwrap();
    let channel = endpoint.initial_stream_window_size(65_535).connect().await.unwrap();
    let key = shop.key.parse::<tonic::metadata::MetadataValue<_>>().unwrap();
    let with_key = move |mut request: tonic::Request<()>| {
        request.metadata_mut().insert("x-api-key", key.clone());
        Ok(request)
    };
    let mut client = proto::event_service_client::EventServiceClient::with_interceptor(channel, with_key);
    let request = proto::StreamEventsRequest { progress_interval: None, ..Default::default() };
    let mut slow = client.stream_events(request).await.unwrap().into_inner();
    let long = "x".repeat(40_000);
    let count = 20;
    for index in 0..count {
        write(&world, shop, &format!("{index} {long}")).await;
    }
    // Nothing is read meanwhile. How long that takes is the daemon's business; that it happened is seen in its figures.
    until("the stream's task has ended", async || {
        let metrics = world.metrics().await;
        let line = metrics.lines().find(|line| line.starts_with("switchboard_api_slow_streams_total"));
        line.is_some_and(|line| !line.ends_with(" 0")).then_some(())
    })
    .await;
    let mut sequences = Vec::new();
    let status = loop {
        match step(&mut slow).await {
            Ok(Some(response)) => {
                if let Some(Step::Event(event)) = response.step {
                    sequences.push(event.sequence);
                }
            }
            Ok(None) => panic!("the stream ended without a word"),
            Err(status) => break status,
        }
    };
    let (reason, metadata) = told(&status);
    assert_eq!((status.code(), reason.as_str()), (Code::Unavailable, "SLOW_CONSUMER"));
    assert!(sequences.len() < count, "not everything was held for it");
    let (rest, _) = caught_up(&mut stream(&shop.caller, "", &metadata["cursor"]).await.unwrap()).await;
    sequences.extend(rest);
    assert_eq!(sequences, (1..=sequences[sequences.len() - 1]).collect::<Vec<_>>(), "and nothing is missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_nothing_happens_markers_say_so_and_can_be_resumed_from() {
    let world = World::new().await;
    let (_, _, numbers) = world.tenant("streams", &[SHOP]).await;
    let shop = &numbers[0];
    // The last that happens by itself.
    world.webhook(shop, "number.connected", |_| true).await;
    let every = prost_types::Duration { seconds: 1, nanos: 0 };
    let request = proto::StreamEventsRequest { progress_interval: Some(every), ..Default::default() };
    let mut steps = shop.caller.events().stream_events(request).await.unwrap().into_inner();
    let (before, first) = caught_up(&mut steps).await;
    let response = step(&mut steps).await.unwrap().unwrap();
    assert!(matches!(response.step, Some(Step::Progress(_))), "{response:?}");
    assert_eq!(response.cursor, first, "nothing came in between");
    drop(steps);
    write(&world, shop, "after the marker").await;
    let (after, _) = caught_up(&mut stream(&shop.caller, "", &response.cursor).await.unwrap()).await;
    let last = before.last().unwrap();
    assert_eq!(after, (last + 1..=last + after.len() as i64).collect::<Vec<_>>());
    assert!(!after.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_streams_with_a_cursor_that_goes_on_without_a_gap() {
    let mut world = World::new().await;
    let (_, _, numbers) = world.tenant("streams", &[SHOP]).await;
    let shop = numbers[0].clone();
    write(&world, &shop, "before").await;
    let mut steps = stream(&shop.caller, "", "").await.unwrap();
    let (before, _) = caught_up(&mut steps).await;
    let daemon = world.daemon.take().unwrap();
    let (drained, status) = {
        let ends = tokio::task::spawn_blocking(move || {
            let mut daemon = daemon;
            daemon.terminate()
        });
        tokio::join!(ends, ended(&mut steps))
    };
    assert_eq!(drained.unwrap(), Some(0));
    let (reason, metadata) = told(&status);
    assert_eq!((status.code(), reason.as_str()), (Code::Unavailable, "DRAINING"));
    world.start_again();
    let caller = world.caller(&shop.key).await;
    let (after, _) = caught_up(&mut stream(&caller, "", &metadata["cursor"]).await.unwrap()).await;
    let all: Vec<_> = before.iter().chain(&after).copied().collect();
    assert_eq!(all, (1..=all[all.len() - 1]).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_number_takes_everything_with_it_and_its_phone_starts_anew() {
    let world = World::new().await;
    let (tenant, tenant_key, numbers) = world.tenant("streams", &[SHOP]).await;
    let shop = &numbers[0];
    write(&world, shop, "soon gone").await;
    let mut own = stream(&shop.caller, "", "").await.unwrap();
    let mut owners = stream(&tenant, &shop.id, "").await.unwrap();
    caught_up(&mut own).await;
    caught_up(&mut owners).await;
    let gone = proto::DeleteNumberRequest { number: shop.id.clone() };
    tenant.numbers().delete_number(gone).await.unwrap();
    for steps in [&mut own, &mut owners] {
        let status = ended(steps).await;
        let (reason, metadata) = told(&status);
        assert_eq!((status.code(), reason.as_str()), (Code::NotFound, "NUMBER_NOT_FOUND"));
        assert!(metadata.contains_key("cursor"));
    }
    let refused = stream(&shop.caller, "", "").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "its key is gone");
    let refused = stream(&tenant, &shop.id, "").await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    until("its series are gone", async || (!world.metrics().await.contains(&shop.id)).then_some(())).await;
    let tenant = world.caller(&tenant_key).await;
    let again = tenant.create_number("again", SHOP).await.unwrap();
    assert_ne!(again.id, shop.id);
    let page = proto::ListMessagesRequest { number: again.id.clone(), ..Default::default() };
    assert!(again.caller.messages().list_messages(page).await.unwrap().into_inner().messages.is_empty());
    let hooks = again.caller.webhooks().list_webhooks(proto::ListWebhooksRequest::default()).await.unwrap();
    assert!(hooks.into_inner().webhooks.is_empty());
    let (events, _) = caught_up(&mut stream(&again.caller, "", "").await.unwrap()).await;
    assert_eq!(events, [1], "only that it was made");
    tokio::time::timeout(Duration::from_secs(60), world.link(&tenant, &again)).await.expect("links like any other");
}
