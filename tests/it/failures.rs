//! What fails for one number stays with it, and heals as its verdict says.

use std::time::Duration;

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::NumberState;
use switchboard::demo::phones::call;
use tokio::task::JoinSet;

use crate::harness::{World, until};

const ONE: &str = "15554000001";
const TWO: &str = "15554000002";
const CUSTOMER: &str = "15554000099";

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_restarts_one_number_alone() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("failures", &[ONE, TWO]).await;
    let before = world.phones.stats_of(TWO).await.unwrap();
    let path = format!("/debug/panic?number={}", numbers[0].id);
    call(world.admin(), "POST", &path, &[], "").await.unwrap();
    until("it was restarted", async || {
        (world.metric("switchboard_number_restarts_total", &numbers[0].id).await == 1.0).then_some(())
    })
    .await;
    world.until_state(&tenant, &numbers[0].id, NumberState::Online).await;
    assert_eq!(world.metric("switchboard_number_restarts_total", &numbers[1].id).await, 0.0);
    let after = world.phones.stats_of(TWO).await.unwrap();
    assert_eq!(before["devices"], after["devices"], "the sibling kept its connection");
    numbers[0].caller.send_text(CUSTOMER, "still here", "still-here").await.unwrap();
    until("it sends again", async || (world.copies(CUSTOMER, "still here").await == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_crashes_again_and_again_is_quarantined_alone_until_it_is_reset() {
    const PANIC_EVERY: Duration = Duration::from_millis(100);
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("failures", &[ONE, TWO]).await;
    let (sick, well) = (&numbers[0], &numbers[1]);
    let before = world.phones.stats_of(TWO).await.unwrap();
    let (admin, path) = (world.admin(), format!("/debug/panic?number={}", sick.id));
    let mut panicking = JoinSet::new();
    panicking.spawn(async move {
        let mut beats = tokio::time::interval(PANIC_EVERY);
        loop {
            beats.tick().await;
            // Between two lives there is nobody to panic.
            let _ = call(admin, "POST", &path, &[], "").await;
        }
    });
    let quarantined = world.until_state(&tenant, &sick.id, NumberState::Quarantined).await;
    assert_eq!(quarantined.reason, "CRASH_LOOP");
    let (since, again) = (quarantined.state_change_time.unwrap(), quarantined.next_attempt_time.unwrap());
    assert_eq!(again.seconds - since.seconds, 300, "the first quarantine is five minutes");
    let accepted = until("its last socket is gone", async || {
        let stats = world.phones.stats_of(ONE).await.unwrap();
        (stats["devices"]["1"]["now"] == 0).then(|| stats["accepted"].clone())
    })
    .await;
    for index in 0..20 {
        well.caller.send_text(CUSTOMER, &format!("well {index}"), &format!("well-{index}")).await.unwrap();
    }
    until("the sibling's messages are shown", async || {
        (world.phones.shown(CUSTOMER).await.unwrap().len() == 20).then_some(())
    })
    .await;
    panicking.shutdown().await;
    assert_eq!(world.metric("switchboard_number_restarts_total", &sick.id).await, 5.0, "five, and no more");
    assert_eq!(world.metric("switchboard_quarantines_total", "").await, 1.0);
    assert_eq!(world.metric("switchboard_number_restarts_total", &well.id).await, 0.0);
    assert_eq!(
        before["devices"],
        world.phones.stats_of(TWO).await.unwrap()["devices"],
        "the sibling kept its connection"
    );
    assert_eq!(accepted, world.phones.stats().await.unwrap()["accepted"], "nobody connects in quarantine");
    let request = proto::ResetNumberRequest { number: sick.id.clone() };
    tenant.numbers().reset_number(request).await.unwrap();
    assert!(world.until_state(&tenant, &sick.id, NumberState::Online).await.next_attempt_time.is_none());
    sick.caller.send_text(CUSTOMER, "well again", "well-again").await.unwrap();
    until("it sends again", async || (world.copies(CUSTOMER, "well again").await == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_socket_reconnects() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("failures", &[ONE]).await;
    for code in ["drop", "503", "515"] {
        let before = world.number(&tenant, &numbers[0].id).await.state_change_time.unwrap();
        world.phones.kick(ONE, code).await.unwrap();
        until(&format!("it is back after {code}"), async || {
            let number = world.number(&tenant, &numbers[0].id).await;
            let since = number.state_change_time.unwrap();
            let later = (since.seconds, since.nanos) > (before.seconds, before.nanos);
            (later && number.state() == NumberState::Online).then_some(())
        })
        .await;
    }
    let stats = world.phones.stats().await.unwrap();
    assert_eq!(stats["devices_connected_twice"], 0, "never two sockets: {stats}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unlinked_by_its_owner_it_stays_away() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("failures", &[ONE]).await;
    world.phones.kick(ONE, "401").await.unwrap();
    let number = world.until_state(&tenant, &numbers[0].id, NumberState::LoggedOut).await;
    assert_eq!(number.reason, "LOGGED_OUT");
    let hook = world.webhook(&numbers[0], "number.disconnected", |_| true).await;
    assert!(hook.verified);
    let accepted = world.phones.stats().await.unwrap()["accepted"].clone();
    let path = format!("/debug/panic?number={}", numbers[0].id);
    call(world.admin(), "POST", &path, &[], "").await.unwrap();
    until("its actor was restarted", async || {
        (world.metric("switchboard_number_restarts_total", &numbers[0].id).await == 1.0).then_some(())
    })
    .await;
    let number = world.until_state(&tenant, &numbers[0].id, NumberState::LoggedOut).await;
    assert!(number.next_attempt_time.is_none());
    assert_eq!(world.phones.stats().await.unwrap()["accepted"], accepted, "no further connection");
    // Linking again keeps the number, its history and its key.
    world.link(&tenant, &numbers[0]).await;
    numbers[0].caller.send_text(CUSTOMER, "back", "back").await.unwrap();
    until("it sends again", async || (world.copies(CUSTOMER, "back").await == 1).then_some(())).await;
}
