//! The public surface: keys and scopes, the seed's two curl calls, health, reflection, configuration mistakes.

use std::process::Command;

use switchboard::api::grpc::proto;
use switchboard::demo::phones::{CallError, call};
use tonic::Code;

use crate::harness::{World, until};

const ONE: &str = "15555000001";
const CUSTOMER: &str = "15555000099";

fn refused(answer: Result<String, CallError>) -> (u16, String) {
    match answer {
        Err(CallError::Status { status, body }) => {
            let body: serde_json::Value = serde_json::from_str(&body).unwrap();
            (status, body["code"].as_str().unwrap().to_owned())
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_two_curl_calls_of_the_seed() {
    let world = World::new().await;
    let (_, tenant_key, numbers) = world.tenant("curl", &[ONE]).await;
    let body = format!(r#"{{"text":"Hello from your app!","destinationNumber":"+{CUSTOMER}"}}"#);
    let send = async |key: &str, body: &str| {
        let headers = [("x-api-key", key), ("content-type", "application/json")];
        call(world.api(), "POST", "/v1/messages/send", &headers, body).await
    };
    let answer: serde_json::Value = serde_json::from_str(&send(&numbers[0].key, &body).await.unwrap()).unwrap();
    assert_eq!(answer["status"], "QUEUED");
    assert_eq!(answer["sourceNumber"].as_str().map(|number| number.trim_start_matches('+')), Some(ONE));
    for field in ["id", "correlationId", "createdAt"] {
        assert!(answer[field].is_string(), "{field} in {answer}");
    }
    until("the phone shows it", async || (world.copies(CUSTOMER, "Hello from your app!").await == 1).then_some(()))
        .await;
    assert_eq!(refused(send(&tenant_key, &body).await), (403, "TENANT_SCOPE_NOT_ALLOWED".to_owned()));
    assert_eq!(refused(send("ps_nb_wrong", &body).await).0, 401);
    let bad = r#"{"text":"x","destinationNumber":"abc"}"#;
    assert_eq!(refused(send(&numbers[0].key, bad).await), (400, "INVALID_DESTINATION".to_owned()));

    let list = async |key: &str| call(world.api(), "GET", "/v1/numbers", &[("x-api-key", key)], "").await;
    let listed: serde_json::Value = serde_json::from_str(&list(&tenant_key).await.unwrap()).unwrap();
    let number = &listed.as_array().unwrap()[0];
    assert_eq!((number["id"].as_str(), number["state"].as_str()), (Some(numbers[0].id.as_str()), Some("OPEN")));
    assert_eq!(number["isFullyConnected"], true);
    for field in ["number", "name", "provider", "createdAt"] {
        assert!(number[field].is_string(), "{field} in {number}");
    }
    assert_eq!(refused(list(&numbers[0].key).await), (403, "NUMBER_SCOPE_NOT_ALLOWED".to_owned()));
    assert_eq!(refused(list("nonsense").await).0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_open_what_they_are_for() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("keys", &[ONE]).await;
    let stranger = world.operator.with_key("ps_nb_nothing").unwrap();
    assert_eq!(stranger.send_text(CUSTOMER, "x", "").await.unwrap_err().code(), Code::Unauthenticated);
    let create = proto::CreateTenantRequest { display_name: "mine".to_owned() };
    assert_eq!(tenant.tenants().create_tenant(create).await.unwrap_err().code(), Code::PermissionDenied);
    let refused = numbers[0].caller.create_number("another", "15555000002").await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let twice = tenant.create_number("same phone", ONE).await.unwrap_err();
    assert_eq!(twice.code(), Code::AlreadyExists);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_id_sends_once() {
    let world = World::new().await;
    let (_, _, numbers) = world.tenant("idempotency", &[ONE]).await;
    let caller = &numbers[0].caller;
    let first = caller.send_text(CUSTOMER, "once", "the-id").await.unwrap();
    let (again, at_once) =
        tokio::join!(caller.send_text(CUSTOMER, "once", "the-id"), caller.send_text(CUSTOMER, "once", "the-id"),);
    assert_eq!((&again.unwrap().id, &at_once.unwrap().id), (&first.id, &first.id));
    let other = caller.send_text(CUSTOMER, "something else", "the-id").await.unwrap_err();
    assert_eq!(other.code(), Code::InvalidArgument);
    world.webhook(&numbers[0], "message.delivered", |_| true).await;
    assert_eq!(world.copies(CUSTOMER, "once").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_probes_and_metrics_answer() {
    let world = World::new().await;
    let (_, _, numbers) = world.tenant("probes", &[ONE]).await;
    for path in ["/livez", "/readyz"] {
        call(world.admin(), "GET", path, &[], "").await.unwrap();
    }
    assert_eq!(world.metric("switchboard_number_up", &numbers[0].id).await, 1.0);
    numbers[0].caller.send_text(CUSTOMER, "counted", "").await.unwrap();
    let metrics = world.metrics().await;
    for family in ["switchboard_accept_seconds", "switchboard_gate_grants_total", "switchboard_committer_units_total"] {
        assert!(metrics.contains(family), "{family}");
    }
    // What the alerts ask for must exist.
    let rules = include_str!("../../deploy/prometheus/rules.yml");
    for name in
        rules.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| word.starts_with("switchboard_"))
    {
        assert!(metrics.contains(&format!("\n{name}")), "{name} is not in /metrics");
    }
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", world.api())).unwrap();
    let channel = channel.connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let request = tonic_health::pb::HealthCheckRequest { service: String::new() };
    let answer = health.check(request).await.unwrap().into_inner();
    assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(tonic_reflection::pb::v1::server_reflection_request::MessageRequest::ListServices(
            String::new(),
        )),
    };
    let mut reflection = tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(channel);
    let stream = reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer = stream.into_inner().message().await.unwrap().unwrap();
    let listed = format!("{:?}", answer.message_response);
    for service in ["switchboard.v1.MessageService", "switchboard.v1.NumberService", "grpc.health.v1.Health"] {
        assert!(listed.contains(service), "{service} in {listed}");
    }
}

#[test]
fn every_mistake_of_a_configuration_is_named_at_once() {
    let file = std::env::temp_dir().join(format!("switchboard-wrong-{}.toml", std::process::id()));
    std::fs::write(&file, "[api]\nlisten = \"nowhere\"\n\n[gate]\nburst = 0\nburts = 3\n").unwrap();
    let binary = env!("CARGO_BIN_EXE_switchboard");
    let output = Command::new(binary).args(["serve", "--config"]).arg(&file).output().unwrap();
    std::fs::remove_file(&file).unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{text}");
    for part in ["listen", "burst", "burts", ":2", ":5", ":6"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}
