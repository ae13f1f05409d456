//! Capacity, as routers use it: a small router spreads messages by what the numbers say; limits, pauses and waits.

use std::collections::HashMap;
use std::time::Duration;

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::send_limits::NewRecipients;
use switchboard::demo::client::{Caller, OwnedNumber};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::harness::{PATIENCE, World, until};

const PHONES: [&str; 3] = ["15557000001", "15557000002", "15557000003"];
const CUSTOMER: &str = "15557000099";
/// The limits of 1, 2 and 3 messages a second are this much higher, so that the test takes seconds.
const FASTER: f64 = 10.0;
const MESSAGES: usize = 600;
/// People the router writes to.
const CUSTOMERS: usize = 30;

type Changes = Streaming<proto::WatchCapacityResponse>;

async fn watch(caller: &Caller, cursor: &str) -> Result<Changes, Status> {
    let min_interval = prost_types::Duration::try_from(Duration::from_millis(50)).ok();
    let request = proto::WatchCapacityRequest {
        resume_cursor: cursor.to_owned(),
        min_interval,
        ..proto::WatchCapacityRequest::default()
    };
    caller.capacity().watch_capacity(request).await.map(tonic::Response::into_inner)
}

async fn change(changes: &mut Changes) -> Result<proto::WatchCapacityResponse, Status> {
    let change = tokio::time::timeout(PATIENCE, changes.message()).await.expect("the watch says nothing");
    change.map(|change| change.expect("the watch ended without a word"))
}

/// What has come already.
async fn news_at_hand(changes: &mut Changes) -> Option<proto::WatchCapacityResponse> {
    let news = tokio::time::timeout(Duration::ZERO, changes.message()).await.ok()?;
    Some(news.unwrap().expect("the watch ended without a word"))
}

async fn set_limits(tenant: &Caller, number: &str, limits: proto::SendLimits) -> Result<proto::Number, Status> {
    let request = proto::SetLimitsRequest { number: number.to_owned(), limits: Some(limits) };
    tenant.numbers().set_limits(request).await.map(tonic::Response::into_inner)
}

async fn capacity(caller: &Caller, number: &str) -> proto::Capacity {
    let request = proto::GetCapacityRequest { numbers: vec![number.to_owned()] };
    caller.capacity().get_capacity(request).await.unwrap().into_inner().capacities.remove(0)
}

async fn send_to(
    number: &OwnedNumber,
    to: &str,
    text: &str,
    max_wait: Option<Duration>,
) -> Result<proto::SendMessageResponse, Status> {
    let request = proto::SendMessageRequest {
        to: format!("+{to}"),
        content: Some(proto::send_message_request::Content::Text(text.to_owned())),
        request_id: text.to_owned(),
        max_wait: max_wait.and_then(|wait| prost_types::Duration::try_from(wait).ok()),
        ..proto::SendMessageRequest::default()
    };
    number.caller.messages().send_message(request).await.map(tonic::Response::into_inner)
}

async fn send(
    number: &OwnedNumber,
    text: &str,
    max_wait: Option<Duration>,
) -> Result<proto::SendMessageResponse, Status> {
    send_to(number, CUSTOMER, text, max_wait).await
}

/// Somebody the router writes to.
fn customer(index: usize) -> String {
    (15_557_000_100 + index % CUSTOMERS).to_string()
}

fn told(status: &Status) -> (String, HashMap<String, String>) {
    let info = status.get_details_error_info().unwrap();
    (info.reason, info.metadata)
}

/// What a router knows, and how many it gave to each.
#[derive(Default)]
struct Router {
    known: HashMap<String, proto::Capacity>,
    given: HashMap<String, usize>,
}

impl Router {
    fn learn(&mut self, change: proto::WatchCapacityResponse) {
        if change.reset {
            self.known.clear();
        }
        for capacity in change.changed {
            self.known.insert(capacity.number.clone(), capacity);
        }
        for number in change.removed {
            self.known.remove(&number);
        }
    }

    /// Of those that could send at once the one that had least, by its rate; it has one less until the next news.
    fn choose(&mut self) -> Option<String> {
        let given = &mut self.given;
        let load = |capacity: &proto::Capacity| {
            let had = given.get(&capacity.number).copied().unwrap_or_default();
            (had + 1) as f64 / capacity.sustainable_rate
        };
        let free = self.known.values_mut().filter(|capacity| capacity.available_now > 0);
        let best = free.min_by(|one, other| load(one).total_cmp(&load(other)))?;
        best.available_now -= 1;
        *given.entry(best.number.clone()).or_default() += 1;
        Some(best.number.clone())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_spreads_by_capacity_and_shifts_at_once_when_a_number_closes() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("router", &PHONES).await;
    for (number, rate) in numbers.iter().zip([1, 2, 3]) {
        let limits = proto::SendLimits {
            messages_per_second: Some(f64::from(rate) * FASTER),
            burst: Some(2 * rate),
            ..Default::default()
        };
        let set = set_limits(&tenant, &number.id, limits).await.unwrap();
        assert_eq!(set.own_limits.unwrap().burst, Some(2 * rate));
    }
    let by_id: HashMap<_, _> = numbers.iter().map(|number| (number.id.clone(), number)).collect();
    let mut changes = watch(&tenant, "").await.unwrap();
    let mut router = Router::default();
    let (mut sent, mut next) = (HashMap::<String, usize>::new(), 0);
    let mut closed_at = None;
    while next < MESSAGES {
        // On a slow machine several have come meanwhile, and only the last is true.
        while let Some(news) = news_at_hand(&mut changes).await {
            router.learn(news);
        }
        let Some(chosen) = router.choose() else {
            router.learn(change(&mut changes).await.unwrap());
            continue;
        };
        let text = format!("routed {next}");
        let patience = Some(Duration::from_millis(500));
        if let Err(status) = send_to(by_id[&chosen], &customer(next), &text, patience).await {
            println!("{text}: refused by {}: {:?}", by_id[&chosen].phone, told(&status));
            // It knows better: the next news will say so.
            router.known.remove(&chosen);
            *router.given.entry(chosen).or_default() -= 1;
            continue;
        }
        next += 1;
        *sent.entry(chosen).or_default() += 1;
        if next == MESSAGES / 2 {
            let shares: Vec<_> = numbers.iter().map(|number| sent[&number.id]).collect();
            println!("of {next} messages: {shares:?}");
            for (share, of_six) in shares.iter().zip([1, 2, 3]) {
                let fair = next * of_six / 6;
                assert!(share.abs_diff(fair) <= next / 12, "{shares:?} is not about 1:2:3");
            }
            // The strongest one closes.
            let request = proto::StopNumberRequest { number: numbers[2].id.clone() };
            tenant.numbers().stop_number(request).await.unwrap();
            closed_at = Some(sent[&numbers[2].id]);
        }
    }
    assert!(sent[&numbers[2].id] <= closed_at.unwrap() + 3, "went on with a closed number: {sent:?}");
    let request = proto::StartNumberRequest { number: numbers[2].id.clone() };
    tenant.numbers().start_number(request).await.unwrap();
    let shown = until("every message is shown", async || {
        let mut shown = Vec::new();
        for index in 0..CUSTOMERS {
            shown.extend(world.phones.shown(&customer(index)).await.unwrap());
        }
        (shown.len() >= MESSAGES).then_some(shown)
    })
    .await;
    let mut times = HashMap::<String, u64>::new();
    for message in &shown {
        *times.entry(message["text"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    assert_eq!(times.len(), MESSAGES, "lost");
    assert!(times.values().all(|times| *times == 1), "shown twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_where_it_was_and_says_what_a_pause_does() {
    let mut world = World::new().await;
    let (tenant, key, numbers) = world.tenant("watch", &PHONES[..2]).await;
    let first = &numbers[0];
    let mut changes = watch(&tenant, "").await.unwrap();
    let snapshot = change(&mut changes).await.unwrap();
    assert!(snapshot.reset && snapshot.caught_up && snapshot.changed.len() == 2, "{snapshot:?}");
    assert!(snapshot.changed.iter().all(|capacity| capacity.available_now == 1000), "{snapshot:?}");
    drop(changes);

    let pause = |number: &str| proto::PauseSendingRequest { number: number.to_owned(), until: None };
    let paused = tenant.numbers().pause_sending(pause(&first.id)).await.unwrap().into_inner();
    let again = first.caller.numbers().pause_sending(pause("")).await.unwrap().into_inner();
    assert_eq!((paused.paused_since, again.paused_until), (again.paused_since, None));
    let mut changes = watch(&tenant, &snapshot.cursor).await.unwrap();
    let delta = change(&mut changes).await.unwrap();
    assert!(!delta.reset, "{delta:?}");
    let told_of: Vec<_> = delta.changed.iter().map(|capacity| capacity.number.as_str()).collect();
    assert_eq!(told_of, [first.id.as_str()], "only what changed");
    let shown = &delta.changed[0];
    assert_eq!((shown.available_now, shown.limiting_reason.as_str()), (0, "PAUSED"));
    assert_eq!((shown.health(), shown.predicted_wait), (proto::NumberHealth::Limited, None));

    let waits = send(first, "waits", None).await.unwrap();
    assert_eq!(waits.predicted_wait, None, "until somebody says so");
    let (reason, metadata) = told(&send(first, "not now", Some(Duration::from_secs(60))).await.unwrap_err());
    assert_eq!((reason.as_str(), metadata["limiting_reason"].as_str()), ("WAIT_TOO_LONG", "PAUSED"));
    let repeated = send(first, "waits", Some(Duration::ZERO)).await.unwrap();
    assert_eq!(repeated.message.unwrap().id, waits.message.unwrap().id, "a repeat is answered");
    assert_eq!(capacity(&tenant, &first.id).await.queue_depth, 1, "of the refused one nothing is kept");

    world.kill_and_restart();
    let tenant = world.caller(&key).await;
    let again = world.until_state(&tenant, &first.id, proto::NumberState::Online).await;
    assert_eq!(again.paused_since, paused.paused_since, "a pause survives a kill");
    assert_eq!(world.metric("switchboard_number_send_budget_remaining", &first.id).await, 0.0);
    assert_eq!(world.copies(CUSTOMER, "waits").await, 0);
    let resume = proto::ResumeSendingRequest { number: first.id.clone() };
    let resumed = tenant.numbers().resume_sending(resume).await.unwrap().into_inner();
    assert_eq!(resumed.paused_since, None);
    until("what waited is shown", async || (world.copies(CUSTOMER, "waits").await == 1).then_some(())).await;
    until("the budget is back", async || {
        let budget = world.metric("switchboard_number_send_budget_remaining", &first.id).await;
        (budget >= 999.0).then_some(())
    })
    .await;

    // Another life of the daemon begins with a snapshot; it ends with a cursor.
    let mut changes = watch(&tenant, &delta.cursor).await.unwrap();
    assert!(change(&mut changes).await.unwrap().reset);
    let mut daemon = world.daemon.take().unwrap();
    let down = std::thread::spawn(move || daemon.terminate());
    let status = loop {
        match change(&mut changes).await {
            Ok(_) => {}
            Err(status) => break status,
        }
    };
    let (reason, metadata) = told(&status);
    assert_eq!((status.code(), reason.as_str()), (Code::Unavailable, "DRAINING"));
    assert!(!metadata["cursor"].is_empty());
    assert_eq!(down.join().unwrap(), Some(0));
}

/// Until WhatsApp's answer is on disk: one whose answer is lost would be sent again, and count again.
async fn until_settled(world: &World, number: &OwnedNumber, sent: &proto::SendMessageResponse) {
    let id = sent.message.as_ref().unwrap().id.as_str();
    world.webhook(number, "message.sent", |hook| hook.body["data"]["internalMessageId"] == id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_gives_no_fresh_burst_and_no_fresh_budget() {
    let mut world = World::new().await;
    let (tenant, key, numbers) = world.tenant("limits", &PHONES[..1]).await;
    let number = &numbers[0];
    let wrong = proto::SendLimits { burst: Some(0), messages_per_second: Some(-1.0), ..Default::default() };
    let refused = set_limits(&tenant, &number.id, wrong).await.unwrap_err();
    assert_eq!(refused.get_details_bad_request().unwrap().field_violations.len(), 2);
    let mine = proto::SetLimitsRequest::default();
    assert_eq!(number.caller.numbers().set_limits(mine).await.unwrap_err().code(), Code::PermissionDenied);
    let limits = proto::SendLimits {
        messages_per_second: Some(0.001),
        burst: Some(3),
        new_recipients: Some(NewRecipients::NewRecipientsPerDay(1)),
        ..Default::default()
    };
    set_limits(&tenant, &number.id, limits).await.unwrap();
    let to = |phone: &str, text: &str| proto::SendMessageRequest {
        to: format!("+{phone}"),
        content: Some(proto::send_message_request::Content::Text(text.to_owned())),
        max_wait: Some(prost_types::Duration::default()),
        ..proto::SendMessageRequest::default()
    };
    let sent = number.caller.messages().send_message(to(CUSTOMER, "one")).await.unwrap().into_inner();
    until_settled(&world, number, &sent).await;
    assert_eq!(sent.predicted_wait, Some(prost_types::Duration::default()));
    for budget in [1, 2] {
        if budget == 2 {
            world.kill_and_restart();
        }
        let tenant = world.caller(&key).await;
        let caller = world.caller(&number.key).await;
        let shown = world.until_state(&tenant, &number.id, proto::NumberState::Online).await;
        assert_eq!(shown.own_limits, Some(limits));
        let refused = caller.messages().send_message(to(PHONES[1], "two")).await.unwrap_err();
        let (reason, metadata) = told(&refused);
        assert_eq!((reason.as_str(), metadata["limiting_reason"].as_str()), ("WAIT_TOO_LONG", "NEW_RECIPIENTS"));
        assert!(refused.get_details_retry_info().unwrap().retry_delay.unwrap() > Duration::from_secs(23 * 3600));
        let now = capacity(&tenant, &number.id).await;
        assert_eq!((now.available_now, now.new_recipients_left), (3 - budget, Some(0)), "{now:?}");
        let sent = caller.messages().send_message(to(CUSTOMER, &format!("more {budget}"))).await.unwrap().into_inner();
        until_settled(&world, number, &sent).await;
    }
    let caller = world.caller(&number.key).await;
    let refused = caller.messages().send_message(to(CUSTOMER, "four")).await.unwrap_err();
    assert_eq!(told(&refused).1["limiting_reason"], "NUMBER_RATE");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_and_a_stream_report_the_load() {
    use switchboard::api::grpc::proto::xds::service::orca::v3::OrcaLoadReportRequest;
    use switchboard::api::grpc::proto::xds::service::orca::v3::open_rca_service_client::OpenRcaServiceClient;

    let world = World::new().await;
    let (_, _, numbers) = world.tenant("orca", &PHONES[..1]).await;
    let trailer = "endpoint-load-metrics-bin";
    let request = proto::SendMessageRequest {
        to: format!("+{CUSTOMER}"),
        content: Some(proto::send_message_request::Content::Text("reported".to_owned())),
        ..proto::SendMessageRequest::default()
    };
    let answer = numbers[0].caller.messages().send_message(request).await.unwrap();
    assert!(answer.metadata().get_bin(trailer).is_some(), "{:?}", answer.metadata());
    let refused = numbers[0].caller.messages().send_message(proto::SendMessageRequest::default()).await.unwrap_err();
    assert!(refused.metadata().get_bin(trailer).is_some(), "{:?}", refused.metadata());
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", world.api())).unwrap().connect().await;
    let mut balancer = OpenRcaServiceClient::new(channel.unwrap());
    // Figures are taken once a second, the first time when the process is a second old.
    let report = until("calls are counted", async || {
        let reports = balancer.stream_core_metrics(OrcaLoadReportRequest::default()).await;
        let report = reports.unwrap().into_inner().message().await.unwrap().unwrap();
        (report.rps_fractional > 0.0 && report.cpu_utilization > 0.0).then_some(report)
    })
    .await;
    assert!(report.eps >= 0.0 && report.application_utilization >= report.cpu_utilization, "{report:?}");
}
