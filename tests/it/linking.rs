//! Linking, as the person at the screen lives it: by QR code or by a code to type in, refused for the wrong phone, asked
//! for again, undone from either side; what the number has stays.

use std::time::Duration;

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::pair_number_response::Step;
use switchboard::api::grpc::proto::{NumberState, PairingMethod};
use switchboard::demo::client::{Caller, OwnedNumber};
use switchboard::demo::phones::call;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::harness::{PATIENCE, World, until};

/// The first code is shown for a minute, five more for 20 s each.
const CODES: usize = 6;
const CODE_SHOWN_FOR: Duration = Duration::from_secs(60);

const ONE: &str = "15554300001";
const OTHER: &str = "15554300002";
const THIRD: &str = "15554300003";
const CUSTOMER: &str = "15554300099";

/// Well-formed, and nobody's.
const ASSERTION: &str = r#"{"id":"AQ","type":"public-key","response":
    {"clientDataJSON":"AQ","authenticatorData":"AQ","signature":"AQ"}}"#;

fn not_requested() -> (Code, String) {
    (Code::FailedPrecondition, "PASSKEY_NOT_REQUESTED".to_owned())
}

fn no_code() -> (Code, String) {
    (Code::FailedPrecondition, "PASSKEY_CODE_NOT_SHOWN".to_owned())
}

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

/// The next step must be the request of a passkey: its options.
async fn passkey_request(steps: &mut Streaming<proto::PairNumberResponse>) -> proto::PasskeyRequest {
    match next(steps).await {
        Step::PasskeyRequest(request) => request,
        step => panic!("{step:?} instead of the request of a passkey"),
    }
}

/// The next step must be the code to compare.
async fn code_to_compare(steps: &mut Streaming<proto::PairNumberResponse>) -> String {
    match next(steps).await {
        Step::PasskeyConfirmation(confirmation) => confirmation.code,
        step => panic!("{step:?} instead of a code to compare"),
    }
}

/// A person unlocks their passkey in a browser.
async fn unlocked(world: &World, phone: &str, request: &proto::PasskeyRequest) -> String {
    let path = format!("/admin/mock-phone/passkey?phone={phone}");
    world.phones.post(&path, &request.request_options_json).await.unwrap()
}

async fn shown_on_phone(world: &World, phone: &str) -> String {
    let path = format!("/admin/mock-phone/passkey-code?phone={phone}");
    let shown: serde_json::Value =
        serde_json::from_str(&call(world.phones.sandbox, "GET", &path, &[], "").await.unwrap()).unwrap();
    shown["code"].as_str().unwrap().to_owned()
}

async fn answer(tenant: &Caller, number: &OwnedNumber, assertion_json: &str) -> Result<(), Status> {
    let (number, assertion_json) = (number.id.clone(), assertion_json.to_owned());
    tenant.numbers().answer_passkey(proto::AnswerPasskeyRequest { number, assertion_json }).await.map(drop)
}

async fn confirm(tenant: &Caller, number: &OwnedNumber, code: &str) -> Result<(), Status> {
    let (number, code) = (number.id.clone(), code.to_owned());
    tenant.numbers().confirm_passkey(proto::ConfirmPasskeyRequest { number, code }).await.map(drop)
}

fn reason(refused: Result<(), Status>) -> (Code, String) {
    let refused = refused.unwrap_err();
    (refused.code(), refused.get_error_details().error_info().unwrap().reason.clone())
}

/// The number is linked by a passkey from its request on.
async fn unlock_and_compare(
    world: &World,
    tenant: &Caller,
    number: &OwnedNumber,
    steps: &mut Streaming<proto::PairNumberResponse>,
    request: &proto::PasskeyRequest,
) {
    answer(tenant, number, &unlocked(world, &number.phone, request).await).await.unwrap();
    let code = code_to_compare(steps).await;
    assert_eq!(code, shown_on_phone(world, &number.phone).await);
    confirm(tenant, number, &code).await.unwrap();
    assert!(matches!(next(steps).await, Step::Paired(_)));
    assert!(matches!(next(steps).await, Step::Online(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_is_linked_by_its_accounts_passkey() {
    let world = World::new().await;
    let (tenant, _) = world.operator.create_tenant("linking").await.unwrap();
    let scanned = tenant.create_number("by passkey", ONE).await.unwrap();
    let typed = tenant.create_number("by code and passkey", OTHER).await.unwrap();
    world.fault(&serde_json::json!({ "passkey": true })).await;
    let mut steps = pair(&tenant, &scanned, PairingMethod::QrCode).await;
    let code = qr_code(&mut steps).await;
    assert_eq!(reason(answer(&tenant, &scanned, ASSERTION).await), not_requested(), "before the scan");
    world.phones.scan(ONE, &code).await.unwrap();
    let request = passkey_request(&mut steps).await;
    let options: serde_json::Value = serde_json::from_str(&request.request_options_json).unwrap();
    assert_eq!(options["rpId"], "whatsapp.com");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let left = request.expire_time.unwrap().seconds - i64::try_from(now).unwrap();
    assert!((500..=601).contains(&left), "{left} s");
    assert_eq!(world.number(&tenant, &scanned.id).await.state(), NumberState::Linking);
    // Whoever joins in gets the same request.
    let mut joined = pair(&tenant, &scanned, PairingMethod::QrCode).await;
    assert_eq!(passkey_request(&mut joined).await.request_options_json, request.request_options_json);

    // Out of turn and malformed answers change nothing.
    assert_eq!(reason(confirm(&tenant, &scanned, "ABCD-EFGH").await), no_code());
    let malformed = answer(&tenant, &scanned, "{\"type\":\"public-key\",\"response\":{}}").await.unwrap_err();
    assert_eq!(malformed.code(), Code::InvalidArgument);
    let details = malformed.get_error_details();
    let violation = &details.bad_request().unwrap().field_violations[0];
    assert_eq!((violation.field.as_str(), violation.description.contains("`id`")), ("assertion_json", true));

    let assertion = unlocked(&world, ONE, &request).await;
    answer(&tenant, &scanned, &assertion).await.unwrap();
    assert_eq!(reason(answer(&tenant, &scanned, &assertion).await), not_requested(), "once is enough");
    let shown = code_to_compare(&mut steps).await;
    assert_eq!(shown, shown_on_phone(&world, ONE).await);
    let other = confirm(&tenant, &scanned, "1111-1111").await.unwrap_err();
    assert_eq!(other.get_error_details().bad_request().unwrap().field_violations[0].field, "code");
    confirm(&tenant, &scanned, &shown.to_lowercase().replace('-', " ")).await.unwrap();
    assert!(matches!(next(&mut steps).await, Step::Paired(paired) if paired.phone_number == format!("+{ONE}")));
    assert!(matches!(next(&mut steps).await, Step::Online(_)));
    assert_eq!(reason(confirm(&tenant, &scanned, &shown).await), no_code(), "it is linked");

    // The same behind a code that was typed in.
    let mut steps = pair(&tenant, &typed, PairingMethod::PairingCode).await;
    let Step::PairingCode(shown) = next(&mut steps).await else { panic!("no pairing code") };
    world.phones.post(&format!("/admin/mock-phone/pair-code?phone={OTHER}"), &shown.code).await.unwrap();
    let request = passkey_request(&mut steps).await;
    unlock_and_compare(&world, &tenant, &typed, &mut steps, &request).await;
    for number in [&scanned, &typed] {
        number.caller.send_text(CUSTOMER, &number.id, "linked").await.unwrap();
        until("it sends", async || (world.copies(CUSTOMER, &number.id).await == 1).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_passkey_and_none_at_all_end_the_linking_and_it_may_be_tried_again() {
    let world = World::new().await;
    let (tenant, _) = world.operator.create_tenant("linking").await.unwrap();
    let number = tenant.create_number("by passkey", ONE).await.unwrap();
    assert_eq!(reason(answer(&tenant, &number, ASSERTION).await), not_requested(), "nobody links");
    world.fault(&serde_json::json!({ "phone": ONE, "passkey": true })).await;
    let asked = async || {
        let mut steps = pair(&tenant, &number, PairingMethod::QrCode).await;
        let code = qr_code(&mut steps).await;
        world.phones.scan(ONE, &code).await.unwrap();
        let request = passkey_request(&mut steps).await;
        (steps, request)
    };
    let ended = async |mut steps: Streaming<proto::PairNumberResponse>, why: &str| {
        let Step::Failed(failed) = next(&mut steps).await else { panic!("it goes on") };
        assert_eq!(failed.reason, why);
        let shown = world.number(&tenant, &number.id).await;
        assert_eq!((shown.state(), shown.reason.as_str()), (NumberState::Unlinked, why));
    };

    // Somebody else's passkey.
    let (steps, request) = asked().await;
    let foreign = unlocked(&world, OTHER, &request).await;
    let refused = (Code::FailedPrecondition, "PASSKEY_REFUSED".to_owned());
    assert_eq!(reason(answer(&tenant, &number, &foreign).await), refused);
    ended(steps, "PASSKEY_REFUSED").await;
    // The right one for an earlier request.
    let stale = unlocked(&world, ONE, &request).await;
    let (steps, _) = asked().await;
    assert_eq!(reason(answer(&tenant, &number, &stale).await), refused);
    ended(steps, "PASSKEY_REFUSED").await;
    // Nobody unlocks it.
    world.fault(&serde_json::json!({ "phone": ONE, "passkey_timeout_ms": 2_000 })).await;
    let (steps, _) = asked().await;
    ended(steps, "PASSKEY_TIMED_OUT").await;
    assert_eq!(reason(answer(&tenant, &number, ASSERTION).await), not_requested(), "it is over");

    world.fault(&serde_json::json!({ "phone": ONE, "clear": true, "passkey": true })).await;
    let (mut steps, request) = asked().await;
    unlock_and_compare(&world, &tenant, &number, &mut steps, &request).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_replaced_while_nobody_scans_and_run_out() {
    let world = World::new().await;
    let (tenant, _) = world.operator.create_tenant("linking").await.unwrap();
    let late = tenant.create_number("scanned late", ONE).await.unwrap();
    let never = tenant.create_number("never scanned", OTHER).await.unwrap();
    let slow = tenant.create_number("whose owner looks for the passkey", THIRD).await.unwrap();
    world.fault(&serde_json::json!({ "phone": THIRD, "passkey": true })).await;
    let mut slow_steps = pair(&tenant, &slow, PairingMethod::QrCode).await;
    let code = qr_code(&mut slow_steps).await;
    world.phones.scan(THIRD, &code).await.unwrap();
    let request = passkey_request(&mut slow_steps).await;
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
    // A person who is asked for a passkey may take longer than codes last.
    unlock_and_compare(&world, &tenant, &slow, &mut slow_steps, &request).await;
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
