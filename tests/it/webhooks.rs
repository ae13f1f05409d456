//! Webhooks against receivers that fail, hang and lie; what their owner can see, change and have sent again.

use std::time::Duration;

use serde_json::{Value, json};
use switchboard::api::grpc::proto;
use switchboard::demo::phones::{CallError, call};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::harness::{World, until};

const SHOP: &str = "15557000001";
const OTHER: &str = "15557000002";
const CUSTOMER: &str = "15557000099";
/// The published number of attempts, at waits a test can sit through.
const QUICK: [(&str, &str); 1] = [("WEBHOOK__SCHEDULE", "0 0.05 0.1 0.1 0.1 0.1 0.1 0.1")];

async fn ask(world: &World, key: &str, method: &str, path: &str, body: &str) -> (u16, Value) {
    match call(world.api(), method, path, &[("x-api-key", key)], body).await {
        Ok(body) => (200, serde_json::from_str(&body).unwrap_or_default()),
        Err(CallError::Status { status, body }) => (status, serde_json::from_str(&body).unwrap_or_default()),
        Err(other) => panic!("{method} {path}: {other:?}"),
    }
}

/// A receiver that takes connections and deals with each of them in its own bad way.
async fn hostile<F, W>(behave: F) -> (String, JoinSet<()>)
where
    F: Fn(tokio::net::TcpStream) -> W + Send + 'static,
    W: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((socket, _)) = listener.accept().await {
            connections.spawn(behave(socket));
        }
    });
    (url, tasks)
}

async fn read_request(socket: &mut tokio::net::TcpStream) {
    let mut chunk = [0; 4096];
    let _ = socket.read(&mut chunk).await;
}

async fn subscribe(world: &World, key: &str, url: &str, events: Value) -> String {
    let body = json!({"url": url, "events": events}).to_string();
    let (_, made) = ask(world, key, "POST", "/v1/webhooks", &body).await;
    assert!(made["secret"].as_str().unwrap().starts_with("whsec_"), "{made}");
    made["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_failures_then_success_carry_the_same_id_and_are_all_logged() {
    let world = World::with(&QUICK).await;
    let (_, _, numbers) = world.tenant("hooks", &[SHOP]).await;
    let shop = &numbers[0];
    let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (url, _receiver) = hostile(move |mut socket| {
        let count = count.clone();
        async move {
            read_request(&mut socket).await;
            let nth = count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let status = if nth < 3 { "500 No" } else { "200 OK" };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhm");
            let _ = socket.write_all(answer.as_bytes()).await;
        }
    })
    .await;
    let id = subscribe(&world, &shop.key, &url, json!(["message.received"])).await;
    world.phones.write(CUSTOMER, SHOP, "once").await.unwrap();
    let path = format!("/v1/webhooks/{id}/logs");
    let logs = until("all four attempts are logged", async || {
        let (_, logs) = ask(&world, &shop.key, "GET", &path, "").await;
        (logs.as_array().unwrap().len() == 4).then_some(logs)
    })
    .await;
    let logs = logs.as_array().unwrap();
    let statuses: Vec<_> = logs.iter().map(|entry| entry["statusCode"].as_u64().unwrap()).collect();
    assert_eq!(statuses, [200, 500, 500, 500], "newest first");
    assert!(logs.iter().all(|entry| entry["id"] == logs[0]["id"] && entry["sequence"] == 1), "{logs:#?}");
    assert_eq!((&logs[0]["status"], &logs[3]["status"]), (&json!("SUCCESS"), &json!("FAILED")));
    assert_eq!(logs[0]["payload"]["data"]["content"], "once");
    assert_eq!(ask(&world, &shop.key, "GET", &format!("{path}?limit=51"), "").await.0, 400);
    assert_eq!(ask(&world, &shop.key, "GET", &format!("{path}?limit=2"), "").await.1.as_array().unwrap().len(), 2);
    let (_, shown) = ask(&world, &shop.key, "GET", &format!("/v1/webhooks/{id}"), "").await;
    assert!(shown["secret"].is_null() && !shown.to_string().contains("whsec_"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_lying_and_endless_receivers_delay_nobody_else() {
    let world = World::with(&[("WEBHOOK__TIMEOUT_SECONDS", "60")]).await;
    let (_, _, numbers) = world.tenant("hooks", &[SHOP]).await;
    let shop = &numbers[0];
    let (hangs, _a) = hostile(|mut socket| async move {
        read_request(&mut socket).await;
        std::future::pending::<()>().await;
    })
    .await;
    let (floods, _b) = hostile(|mut socket| async move {
        read_request(&mut socket).await;
        let _ = socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while socket.write_all(&[b'x'; 65_536]).await.is_ok() {}
    })
    .await;
    let (lies, _c) = hostile(|mut socket| async move {
        read_request(&mut socket).await;
        let _ = socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nthen nothing").await;
    })
    .await;
    let (redirects, _d) = hostile(move |mut socket| async move {
        read_request(&mut socket).await;
        let answer = "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n";
        let _ = socket.write_all(answer.as_bytes()).await;
    })
    .await;
    let mut hooks = Vec::new();
    for url in [&hangs, &floods, &lies, &redirects] {
        hooks.push(subscribe(&world, &shop.key, url, json!(["message.received"])).await);
    }
    for index in 0..20 {
        world.phones.write(CUSTOMER, SHOP, &format!("line {index}")).await.unwrap();
    }
    // The sane one has everything while the hanging one holds its first request: no time is measured.
    for index in 0..20 {
        let text = format!("line {index}");
        world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == text).await;
    }
    let outcome = async |hook: &str| {
        let (_, logs) = ask(&world, &shop.key, "GET", &format!("/v1/webhooks/{hook}/logs"), "").await;
        logs.as_array().unwrap().last().map(|entry| entry["outcome"].as_str().unwrap().to_owned())
    };
    assert_eq!(outcome(&hooks[0]).await, None, "still hanging");
    for (hook, expected) in [(&hooks[1], "delivered"), (&hooks[2], "delivered"), (&hooks[3], "redirected")] {
        let seen = until("it was attempted", async || outcome(hook).await).await;
        assert_eq!(seen, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_fills_the_room_for_requests_leaves_some_to_everybody() {
    let world = World::with(&[("WEBHOOK__CONCURRENT", "6"), ("WEBHOOK__TIMEOUT_SECONDS", "60")]).await;
    let (_, _, numbers) = world.tenant("hooks", &[SHOP, OTHER]).await;
    let (shop, other) = (&numbers[0], &numbers[1]);
    let (hangs, _receiver) = hostile(|mut socket| async move {
        read_request(&mut socket).await;
        std::future::pending::<()>().await;
    })
    .await;
    let hook = subscribe(&world, &shop.key, &hangs, json!(["message.received"])).await;
    for chat in 0..8 {
        world.phones.write(&format!("1555700010{chat}"), SHOP, &format!("line {chat}")).await.unwrap();
    }
    until("the hanging one is refused more", async || {
        let metrics = world.metrics().await;
        let crowded = "switchboard_webhook_crowded_total{class=\"live\"}";
        (metrics.contains(crowded) && metrics.contains("switchboard_webhook_requests_limit 6")).then_some(())
    })
    .await;
    // Neither the number's other endpoint nor another number's waits for it.
    for chat in 0..8 {
        let text = format!("line {chat}");
        world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == text).await;
    }
    world.phones.write(CUSTOMER, OTHER, "beside").await.unwrap();
    world.webhook(other, "message.received", |hook| hook.body["data"]["content"] == "beside").await;
    let metrics = world.metrics().await;
    assert!(metrics.contains("switchboard_webhook_requests{class=\"live\"}"), "{metrics}");
    let (_, shown) = ask(&world, &shop.key, "GET", &format!("/v1/webhooks/{hook}"), "").await;
    assert_eq!((&shown["queueDepth"], &shown["breaker"]), (&json!(8), &json!("CLOSED")), "{shown}");
    let request = proto::GetWebhookRequest { id: hook };
    let shown = shop.caller.webhooks().get_webhook(request).await.unwrap().into_inner();
    assert_eq!((shown.queue_depth, shown.breaker.as_str()), (Some(8), "CLOSED"));
}

#[tokio::test(flavor = "multi_thread")]
async fn gating_pausing_and_codes_are_as_promised() {
    let world = World::with(&QUICK).await;
    let (_, tenant_key, numbers) = world.tenant("hooks", &[SHOP, OTHER]).await;
    let (shop, other) = (&numbers[0], &numbers[1]);
    let code = |(status, body): (u16, Value)| (status, body["code"].as_str().unwrap_or_default().to_owned());
    let url = world.sink.url("gated");
    let create = |number: Value| json!({"url": url, "whatsappNumberId": number}).to_string();
    let made = ask(&world, &shop.key, "POST", "/v1/webhooks", &create(json!(other.id))).await;
    assert_eq!(code(made), (400, "NUMBER_MISMATCH".to_owned()));
    let made = ask(&world, &tenant_key, "POST", "/v1/webhooks", &create(Value::Null)).await;
    assert_eq!(code(made), (400, "NUMBER_REQUIRED".to_owned()));
    let made = ask(&world, &tenant_key, "POST", "/v1/webhooks", &create(json!("num_0000000000000"))).await;
    assert_eq!(code(made), (404, "NUMBER_NOT_FOUND".to_owned()));
    let missing = ask(&world, &shop.key, "GET", "/v1/webhooks/whk_none", "").await;
    assert_eq!(code(missing), (404, "WEBHOOK_NOT_FOUND".to_owned()));
    let (_, made) = ask(&world, &shop.key, "POST", "/v1/webhooks", &json!({"url": url}).to_string()).await;
    assert_eq!(made["events"], json!([]));
    let id = made["id"].as_str().unwrap();
    world.sink.expect("gated", made["secret"].as_str().unwrap());
    let path = format!("/v1/webhooks/{id}");
    let foreign = ask(&world, &other.key, "GET", &path, "").await;
    assert_eq!(code(foreign), (404, "WEBHOOK_NOT_FOUND".to_owned()));
    let typo = ask(&world, &shop.key, "PATCH", &path, r#"{"events":["message.typo"]}"#).await;
    assert!(typo.0 == 400 && typo.1["details"].to_string().contains("events"), "{typo:?}");
    let told = async |text: &str| {
        world.phones.write(CUSTOMER, SHOP, text).await.unwrap();
        world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == text).await;
    };
    told("nothing is wanted").await;
    ask(&world, &shop.key, "PATCH", &path, r#"{"events":["*"]}"#).await;
    told("everything is wanted").await;
    let (_, paused) = ask(&world, &shop.key, "PATCH", &path, r#"{"active":false}"#).await;
    assert_eq!((&paused["active"], &paused["disabledReason"]), (&json!(false), &Value::Null));
    told("while it is paused").await;
    ask(&world, &shop.key, "PATCH", &path, r#"{"active":true}"#).await;
    told("after the pause").await;
    let gated = || {
        let received = world.sink.received();
        let of_hook = received.into_iter().filter(|hook| hook.subscription == "gated");
        of_hook.filter(|hook| hook.event() == "message.received").collect::<Vec<_>>()
    };
    until("the last one is there", async || (gated().len() == 2).then_some(())).await;
    let texts: Vec<_> = gated().iter().map(|hook| hook.body["data"]["content"].clone()).collect();
    assert_eq!(texts, [json!("everything is wanted"), json!("after the pause")]);
    assert!(gated().iter().all(|hook| hook.verified));
    // What was missed comes with a replay, under the ids that everybody else saw.
    let (status, _) = ask(&world, &shop.key, "POST", &format!("{path}/replay"), "").await;
    assert_eq!(status, 200);
    let replayed = until("the paused one is replayed", async || {
        gated().into_iter().find(|hook| hook.body["data"]["content"] == "while it is paused")
    })
    .await;
    assert_eq!(replayed.body["delivery"]["replay"], true);
    let elsewhere =
        world.webhook(shop, "message.received", |hook| hook.body["data"]["content"] == "while it is paused");
    assert_eq!(elsewhere.await.id, replayed.id);
    let (_, rotated) = ask(&world, &shop.key, "POST", &format!("{path}/rotate"), r#"{"overlapSeconds":0}"#).await;
    world.sink.expect("gated", rotated["secret"].as_str().unwrap());
    told("with another secret").await;
    let last = until("it is there", async || {
        gated().into_iter().find(|hook| hook.body["data"]["content"] == "with another secret")
    })
    .await;
    assert!(last.verified);
}

#[tokio::test(flavor = "multi_thread")]
async fn gone_disables_and_dead_letters_come_back() {
    let world = World::with(&QUICK).await;
    let (_, _, numbers) = world.tenant("hooks", &[SHOP]).await;
    let shop = &numbers[0];
    let (rejects, _a) = hostile(|mut socket| async move {
        read_request(&mut socket).await;
        let _ = socket.write_all(b"HTTP/1.1 404 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
    })
    .await;
    let id = subscribe(&world, &shop.key, &rejects, json!(["message.received"])).await;
    world.phones.write(CUSTOMER, SHOP, "unwanted").await.unwrap();
    let path = format!("/v1/webhooks/{id}");
    let dead = until("it is a dead letter", async || {
        let (_, dead) = ask(&world, &shop.key, "GET", &format!("{path}/dead-letters"), "").await;
        (dead["totalCount"] == 1).then(|| dead["deadLetters"][0].clone())
    })
    .await;
    assert_eq!((&dead["reason"], &dead["attempts"], &dead["sequence"]), (&json!("REJECTED"), &json!(3), &json!(1)));
    let sane = world.sink.url("mended");
    ask(&world, &shop.key, "PATCH", &path, &json!({"url": sane}).to_string()).await;
    let order = json!({"eventId": dead["id"]}).to_string();
    assert_eq!(ask(&world, &shop.key, "POST", &format!("{path}/redeliver"), &order).await.0, 200);
    let late = world.sink.wait_for(Duration::from_secs(60), |hook| hook.subscription == "mended").await.unwrap();
    assert_eq!(
        (late.body["delivery"]["late"].as_bool(), late.body["delivery"]["sequence"].as_u64()),
        (Some(true), Some(1))
    );
    assert_eq!(late.id, dead["id"].as_str().unwrap());

    let (gone, _b) = hostile(|mut socket| async move {
        read_request(&mut socket).await;
        let _ = socket.write_all(b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
    })
    .await;
    let id = subscribe(&world, &shop.key, &gone, json!(["message.received"])).await;
    world.phones.write(CUSTOMER, SHOP, "leave me").await.unwrap();
    let told = world.webhook(shop, "webhook.disabled", |hook| hook.body["data"]["webhookId"] == id.as_str()).await;
    assert_eq!((told.verified, &told.body["data"]["reason"]), (true, &json!("GONE")));
    let request = proto::GetWebhookRequest { id: id.clone() };
    let shown = shop.caller.webhooks().get_webhook(request).await.unwrap().into_inner();
    assert_eq!((shown.active, shown.disabled_reason.as_str()), (false, "GONE"));
    // Moved and started again: what was queued goes on.
    let webhook = proto::Webhook { id, url: world.sink.url("moved"), active: true, ..proto::Webhook::default() };
    let mask = prost_types::FieldMask { paths: vec!["url".to_owned(), "active".to_owned()] };
    let request = proto::UpdateWebhookRequest { webhook: Some(webhook), update_mask: Some(mask) };
    shop.caller.webhooks().update_webhook(request).await.unwrap();
    let moved = world.sink.wait_for(Duration::from_secs(60), |hook| hook.subscription == "moved").await.unwrap();
    assert_eq!(moved.body["data"]["content"], "leave me");
}
