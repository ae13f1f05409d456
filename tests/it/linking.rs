//! Linking, as the person at the screen lives it: by QR code or by a code to type in, refused for the wrong phone, asked
//! for again, undone from either side; what the number has stays.

use std::time::Duration;

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::pair_number_response::Step;
use switchboard::api::grpc::proto::{NumberState, PairingMethod};
use switchboard::demo::client::{Caller, OwnedNumber};
use tonic::Streaming;

use crate::harness::{PATIENCE, World, until};

/// The first code is shown for a minute, five more for 20 s each.
const CODES: usize = 6;
const CODE_SHOWN_FOR: Duration = Duration::from_secs(60);

const ONE: &str = "15554300001";
const OTHER: &str = "15554300002";
const CUSTOMER: &str = "15554300099";

async fn pair(tenant: &Caller, number: &OwnedNumber, method: PairingMethod) -> Streaming<proto::PairNumberResponse> {
    let request = proto::PairNumberRequest { number: number.id.clone(), method: method.into() };
    tenant.numbers().pair_number(request).await.unwrap().into_inner()
}

async fn next(steps: &mut Streaming<proto::PairNumberResponse>) -> Step {
    let step = tokio::time::timeout(CODE_SHOWN_FOR + PATIENCE, steps.message()).await.expect("a step in time");
    step.unwrap().expect("a step").step.unwrap()
}

async fn qr_code(steps: &mut Streaming<proto::PairNumberResponse>) -> String {
    match next(steps).await {
        Step::QrCode(shown) => shown.code,
        step => panic!("{step:?} instead of a code"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_is_linked_by_a_code_typed_into_the_phone() {
    let world = World::new().await;
    let (tenant, _) = world.operator.create_tenant("linking").await.unwrap();
    let number = tenant.create_number("by code", ONE).await.unwrap();
    let mut steps = pair(&tenant, &number, PairingMethod::PairingCode).await;
    let Step::PairingCode(shown) = next(&mut steps).await else { panic!("no pairing code") };
    assert_eq!((shown.code.len(), shown.code.as_bytes()[4]), (9, b'-'), "two groups of four");
    let shown_until =
        shown.expire_time.unwrap().seconds - world.number(&tenant, &number.id).await.create_time.unwrap().seconds;
    assert!((60..=200).contains(&shown_until), "{shown_until} s");
    world.phones.post(&format!("/admin/mock-phone/pair-code?phone={ONE}"), &shown.code).await.unwrap();
    assert!(matches!(next(&mut steps).await, Step::Paired(paired) if paired.phone_number == format!("+{ONE}")));
    assert!(matches!(next(&mut steps).await, Step::Online(_)));
    number.caller.send_text(CUSTOMER, "linked by code", "linked").await.unwrap();
    until("it sends", async || (world.copies(CUSTOMER, "linked by code").await == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_replaced_while_nobody_scans_and_run_out() {
    let world = World::new().await;
    let (tenant, _) = world.operator.create_tenant("linking").await.unwrap();
    let late = tenant.create_number("scanned late", ONE).await.unwrap();
    let never = tenant.create_number("never scanned", OTHER).await.unwrap();
    let scanned_late = async {
        let mut steps = pair(&tenant, &late, PairingMethod::QrCode).await;
        let first = qr_code(&mut steps).await;
        let second = qr_code(&mut steps).await;
        assert_ne!(first, second);
        world.phones.scan(ONE, &second).await.unwrap();
        assert!(matches!(next(&mut steps).await, Step::Paired(_)));
        assert!(matches!(next(&mut steps).await, Step::Online(_)));
    };
    let never_scanned = async {
        let mut steps = pair(&tenant, &never, PairingMethod::QrCode).await;
        for _ in 0..CODES {
            qr_code(&mut steps).await;
        }
        let Step::Failed(failed) = next(&mut steps).await else { panic!("a code too many") };
        let shown = world.number(&tenant, &never.id).await;
        assert_eq!((shown.state(), shown.reason), (NumberState::Unlinked, failed.reason));
        world.link(&tenant, &never).await;
    };
    tokio::join!(scanned_late, never_scanned);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_phone_is_refused_and_the_right_one_may_try_again() {
    let world = World::new().await;
    let (tenant, _) = world.operator.create_tenant("linking").await.unwrap();
    let number = tenant.create_number("for one phone", ONE).await.unwrap();
    let mut steps = pair(&tenant, &number, PairingMethod::QrCode).await;
    let code = qr_code(&mut steps).await;
    // The phone shows a failure or nothing; either way it gets no device.
    let _ = world.phones.scan(OTHER, &code).await;
    assert!(matches!(next(&mut steps).await, Step::Failed(failed) if failed.reason == "WRONG_NUMBER"));
    let refused = world.number(&tenant, &number.id).await;
    assert_eq!((refused.state(), refused.reason.as_str()), (NumberState::Unlinked, "WRONG_NUMBER"));
    assert_eq!(world.phones.stats_of(OTHER).await.unwrap()["logins"], 0, "nobody logged in as the other phone");
    world.link(&tenant, &number).await;
    number.caller.send_text(CUSTOMER, "the right phone", "right").await.unwrap();
    until("it sends", async || (world.copies(CUSTOMER, "the right phone").await == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unlinked_from_either_side_it_keeps_everything_and_links_again() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("linking", &[ONE]).await;
    let number = &numbers[0];
    number.caller.send_text(CUSTOMER, "before", "before").await.unwrap();
    until("it is shown", async || (world.copies(CUSTOMER, "before").await == 1).then_some(())).await;
    // From our side: the phone shows no device any more.
    let request = proto::LogoutNumberRequest { number: number.id.clone() };
    tenant.numbers().logout_number(request).await.unwrap();
    world.until_state(&tenant, &number.id, NumberState::LoggedOut).await;
    // Accepted while it is nobody's device; sent once it is one again.
    number.caller.send_text(CUSTOMER, "waits for a phone", "waits").await.unwrap();
    world.link(&tenant, number).await;
    until("what waited is shown", async || (world.copies(CUSTOMER, "waits for a phone").await == 1).then_some(()))
        .await;
    // From the phone.
    world.phones.post(&format!("/admin/mock-phone/unlink?phone={ONE}"), "").await.unwrap();
    world.until_state(&tenant, &number.id, NumberState::LoggedOut).await;
    world.link(&tenant, number).await;
    world.phones.write(CUSTOMER, ONE, "welcome back").await.unwrap();
    world.webhook(number, "message.received", |hook| hook.body["data"]["content"] == "welcome back").await;
    let request = proto::ListMessagesRequest { page_size: 100, ..proto::ListMessagesRequest::default() };
    let rows = number.caller.messages().list_messages(request).await.unwrap().into_inner().messages;
    let texts: Vec<_> = rows.iter().rev().map(|row| row.text.as_str()).collect();
    assert_eq!(texts, ["before", "waits for a phone", "welcome back"]);
}
