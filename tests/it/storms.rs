//! What meets every number at once: WhatsApp refuses everybody, or our version. The fleet waits for one canary instead of
//! hammering.

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::{ClientVersionSource, NumberState};
use switchboard::demo::client::{Caller, OwnedNumber};
use tonic::Code;

use crate::harness::{World, until};

const NUMBERS: u64 = 20;
/// The daemon is told to claim 2.3000.1.
const WANTED: &str = "2.3000.5";
/// A canary goes after 2, 4, 8 … s: so many may within half a minute.
const CANARIES_IN_HALF_A_MINUTE: u64 = 5;

async fn linked(world: &World) -> (Caller, String, Vec<OwnedNumber>) {
    let phones: Vec<String> = (1..=NUMBERS).map(|number| format!("1555900{number:04}")).collect();
    let phones: Vec<&str> = phones.iter().map(String::as_str).collect();
    world.tenant("storms", &phones).await
}

async fn in_state(tenant: &Caller, state: NumberState) -> Vec<proto::Number> {
    let request = proto::ListNumbersRequest { page_size: 1000, ..proto::ListNumbersRequest::default() };
    let all = tenant.numbers().list_numbers(request).await.unwrap().into_inner().numbers;
    all.into_iter().filter(|number| number.state() == state).collect()
}

async fn refused(world: &World) -> u64 {
    world.phones.stats().await.unwrap()["logins_refused"].as_u64().unwrap()
}

async fn is_held(world: &World, mode: &str) -> bool {
    world.metrics().await.contains(&format!(r#"switchboard_gate_mode{{mode="{mode}"}} 1"#))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_everybody_is_asked_by_one_number_at_a_time_until_it_takes_one() {
    let world = World::with(&[("RECONNECT__LONGEST_SECONDS", "1")]).await;
    let (tenant, _, numbers) = linked(&world).await;
    let failing = serde_json::json!({ "login_failure": { "reason": 503, "count": 1_000_000 } });
    world.fault(&failing).await;
    for number in &numbers {
        world.phones.kick(&number.phone, "drop").await.unwrap();
    }
    until("the fleet is held", async || is_held(&world, "held_failing").await.then_some(())).await;
    assert_eq!(world.metric("switchboard_gate_rate", "").await, 0.0);
    let canaries = async || world.metric("switchboard_gate_canaries_failed_total", "").await;
    // What was under way when the hold began has ended by the first canary's end.
    until("a canary was refused", async || (canaries().await >= 1.0).then_some(())).await;
    let before = refused(&world).await;
    until("two more were", async || (canaries().await >= 3.0).then_some(())).await;
    let tries = refused(&world).await - before;
    assert!((1..=3).contains(&tries), "{tries} tries of {NUMBERS} numbers in some twelve seconds");
    world.fault(&serde_json::json!({ "clear": true })).await;
    until("all are online", async || {
        (in_state(&tenant, NumberState::Online).await.len() as u64 == NUMBERS).then_some(())
    })
    .await;
    assert_eq!(world.metric("switchboard_gate_releases_total", "").await, 1.0);
    assert_eq!(world.phones.stats().await.unwrap()["devices_connected_twice"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_version_holds_the_fleet_and_the_operators_word_heals_it() {
    let mut world = World::new().await;
    let (tenant, tenant_key, numbers) = linked(&world).await;
    world.fault(&serde_json::json!({ "minimum_version": WANTED })).await;
    for number in &numbers {
        world.phones.kick(&number.phone, "drop").await.unwrap();
    }
    until("the fleet is held", async || is_held(&world, "held_outdated").await.then_some(())).await;
    let waiting = until("all wait at the gate", async || {
        let waiting = in_state(&tenant, NumberState::AwaitingGate).await;
        (waiting.len() as u64 >= NUMBERS - 1).then_some(waiting)
    })
    .await;
    assert!(waiting.iter().any(|number| number.reason == "CLIENT_OUTDATED"), "{waiting:#?}");
    // Everybody may have been on the way when the first answer came; from then on only canaries are.
    let before = refused(&world).await;
    assert!(before <= NUMBERS + CANARIES_IN_HALF_A_MINUTE, "{before}");
    until("two more canaries were refused", async || (refused(&world).await >= before + 2).then_some(())).await;
    assert!(world.metric("switchboard_gate_canaries_failed_total", "").await >= 2.0);
    // A restart does not forget whom it may not ask: the first one refused holds the others again.
    let settings = [("GATE__BURST", "1"), ("GATE__CONNECTS_PER_SECOND", "2")];
    world.change_settings(&settings);
    world.kill_and_restart();
    let operator = world.operator_again().await;
    let tenant = world.caller(&tenant_key).await;
    let now = refused(&world).await;
    until("held again", async || is_held(&world, "held_outdated").await.then_some(())).await;
    assert!(refused(&world).await - now <= 3, "at two a second the first one stops the others");

    let denied = tenant.operator().get_client_version(proto::GetClientVersionRequest {}).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    let wrong = proto::SetClientVersionRequest { version: "2.3000".to_owned() };
    assert_eq!(operator.operator().set_client_version(wrong).await.unwrap_err().code(), Code::InvalidArgument);
    let card = operator.operator().get_client_version(proto::GetClientVersionRequest {}).await.unwrap().into_inner();
    assert_eq!((card.version.as_str(), card.source()), ("2.3000.1", ClientVersionSource::Config));
    let now = refused(&world).await;
    let order = proto::SetClientVersionRequest { version: WANTED.to_owned() };
    let card = operator.operator().set_client_version(order).await.unwrap().into_inner();
    assert_eq!((card.version.as_str(), card.source()), (WANTED, ClientVersionSource::Override));
    until("all are online", async || {
        (in_state(&tenant, NumberState::Online).await.len() as u64 == NUMBERS).then_some(())
    })
    .await;
    assert!(refused(&world).await <= now + 1, "at most the canary that was on its way");
    assert_eq!(world.phones.stats().await.unwrap()["devices_connected_twice"], 0);

    // The order is durable.
    world.kill_and_restart();
    let operator = world.operator_again().await;
    let card = operator.operator().get_client_version(proto::GetClientVersionRequest {}).await.unwrap().into_inner();
    assert_eq!((card.version.as_str(), card.source()), (WANTED, ClientVersionSource::Override));
    let tenant = world.caller(&tenant_key).await;
    until("all are online again", async || {
        (in_state(&tenant, NumberState::Online).await.len() as u64 == NUMBERS).then_some(())
    })
    .await;
    let taken_back = proto::SetClientVersionRequest { version: String::new() };
    let card = operator.operator().set_client_version(taken_back).await.unwrap().into_inner();
    assert_eq!((card.version.as_str(), card.source()), ("2.3000.1", ClientVersionSource::Config));
}
