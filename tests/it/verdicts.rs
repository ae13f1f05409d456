//! Every way in which WhatsApp or the line ends a connection: the number's state, wait, reason and alert are those of the
//! table in `domain::lifecycle`, at the API, in the event and in the metrics. One row is one number of one world.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::{Attention, NumberState};
use switchboard::demo::client::{Caller, OwnedNumber};
use switchboard::demo::phones::call;
use tokio::task::JoinSet;

use crate::harness::{World, put_forward, until};

const CUSTOMER: &str = "15554100099";

/// How a row's connection ends.
#[derive(Clone, Copy)]
enum Blow {
    /// The server ends the live connection so.
    Kick(&'static str),
    /// The live connection is cut, and the next login refused once: `reason`, and for bans `code` and `expire`.
    Login(u16, Option<(u16, u64)>),
}

use Blow::{Kick, Login};

/// What must follow. `wait`: seconds until the next attempt, at least; 0 for none by itself.
struct Row {
    blow: Blow,
    state: NumberState,
    code: &'static str,
    detail: i32,
    wait: i64,
    attention: Attention,
}

const fn heals(blow: Blow, code: &'static str, detail: i32) -> Row {
    Row { blow, state: NumberState::Online, code, detail, wait: 0, attention: Attention::None }
}

const fn rests(blow: Blow, state: NumberState, code: &'static str, detail: i32, attention: Attention) -> Row {
    Row { blow, state, code, detail, wait: 0, attention }
}

const fn parks(blow: Blow, code: &'static str, detail: i32, wait: i64, attention: Attention) -> Row {
    Row { blow, state: NumberState::Parked, code, detail, wait, attention }
}

const SIX_HOURS: i64 = 6 * 3600;

const ROWS: [Row; 29] = [
    heals(Kick("drop"), "CONNECTION_LOST", 0),
    heals(Kick("500"), "SERVER_ERROR", 500),
    heals(Kick("503"), "SERVER_ERROR", 503),
    heals(Kick("xml"), "NOT_WELL_FORMED", 0),
    heals(Kick("ack"), "ACK_OWED", 0),
    heals(Kick("unknown"), "STREAM_ERROR", 0),
    heals(Kick("777"), "STREAM_ERROR", 777),
    rests(Kick("401"), NumberState::LoggedOut, "LOGGED_OUT", 401, Attention::Owner),
    rests(Kick("516"), NumberState::LoggedOut, "LOGGED_OUT", 516, Attention::Owner),
    rests(Kick("device_removed"), NumberState::LoggedOut, "LOGGED_OUT", 401, Attention::Owner),
    rests(Kick("replaced"), NumberState::Replaced, "REPLACED", 0, Attention::Operator),
    rests(Kick("409"), NumberState::Replaced, "REPLACED", 0, Attention::Operator),
    parks(Kick("429"), "RATE_LIMITED", 429, 300, Attention::None),
    rests(Kick("failure-401"), NumberState::LoggedOut, "LOGGED_OUT", 401, Attention::Owner),
    heals(Login(400, None), "REFUSED", 400),
    rests(Login(401, None), NumberState::LoggedOut, "LOGGED_OUT", 401, Attention::Owner),
    parks(Login(402, Some((101, 7_200))), "TEMPORARILY_BANNED", 101, 7_200, Attention::Owner),
    parks(Login(402, None), "TEMPORARILY_BANNED", 0, 24 * 3600, Attention::Owner),
    rests(Login(403, None), NumberState::LoggedOut, "ACCOUNT_LOCKED", 403, Attention::Owner),
    rests(Login(406, None), NumberState::LoggedOut, "ACCOUNT_BANNED", 406, Attention::Owner),
    parks(Login(409, None), "REFUSED", 409, SIX_HOURS, Attention::Operator),
    parks(Login(413, None), "REFUSED", 413, SIX_HOURS, Attention::Operator),
    parks(Login(414, None), "REFUSED", 414, SIX_HOURS, Attention::Operator),
    parks(Login(415, None), "REFUSED", 415, SIX_HOURS, Attention::Operator),
    parks(Login(418, None), "REFUSED", 418, SIX_HOURS, Attention::Operator),
    heals(Login(500, None), "SERVER_ERROR", 500),
    parks(Login(501, None), "REFUSED", 501, SIX_HOURS, Attention::Operator),
    heals(Login(503, None), "SERVER_ERROR", 503),
    parks(Login(429, None), "RATE_LIMITED", 429, 300, Attention::None),
];

fn phone(row: usize) -> String {
    format!("1555410{row:04}")
}

impl Row {
    async fn strike(&self, world: &World, phone: &str) {
        match self.blow {
            Kick(code) => world.phones.kick(phone, code).await.unwrap(),
            Login(reason, ban) => {
                let failure = json!({ "reason": reason, "code": ban.map(|ban| ban.0), "expire": ban.map(|ban| ban.1) });
                world.fault(&json!({ "phone": phone, "login_failure": failure })).await;
                world.phones.kick(phone, "drop").await.unwrap();
            }
        }
    }

    /// Whether the number stands where it must, for the reason it must.
    fn fits(&self, number: &proto::Number) -> bool {
        let named = number.last_error.as_ref().is_some_and(|last| last.code == self.code && last.detail == self.detail);
        number.state() == self.state && named
    }

    fn check(&self, number: &proto::Number, what: &str) {
        assert_eq!(number.attention(), self.attention, "{what}");
        let shown = if self.state == NumberState::Online { "" } else { self.code };
        assert_eq!(number.reason, shown, "{what}");
        let since = number.state_change_time.unwrap().seconds;
        let wait = number.next_attempt_time.map_or(0, |at| at.seconds - since);
        let most = self.wait + if self.wait == 0 { 0 } else { 62 };
        assert!((self.wait..=most).contains(&wait), "{what}: waits {wait} s");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_ending_has_its_state_wait_reason_and_alert() {
    let world = World::new().await;
    let (tenant, _) = world.operator.create_tenant("verdicts").await.unwrap();
    let mut numbers = Vec::new();
    for row in 0..ROWS.len() {
        let number = tenant.create_number(&phone(row), &phone(row)).await.unwrap();
        world.subscribe(&number).await;
        world.link(&tenant, &number).await;
        numbers.push(number);
    }
    for (row, number) in ROWS.iter().zip(&numbers) {
        row.strike(&world, &number.phone).await;
    }
    for (index, (row, number)) in ROWS.iter().zip(&numbers).enumerate() {
        let what = format!("row {index}, {} {}", row.code, row.detail);
        let shown = until(&what, async || {
            let number = world.number(&tenant, &number.id).await;
            row.fits(&number).then_some(number)
        })
        .await;
        row.check(&shown, &what);
        // A login that fails and is tried again is no news: it is told that the connection was lost.
        let is_news = row.state != NumberState::Online || matches!(row.blow, Kick(_));
        let code = if is_news { row.code } else { "CONNECTION_LOST" };
        let told = |hook: &switchboard::demo::sink::Received| hook.body["data"]["reason"] == code;
        let hook = world.webhook(number, "number.disconnected", told).await;
        let returns = matches!(row.state, NumberState::Online | NumberState::Parked);
        assert_eq!(hook.body["data"]["reconnecting"], returns, "{what}");
        assert_eq!(world.metric("switchboard_number_state", &number.id).await, f64::from(row.state as i32), "{what}");
        let attention = f64::from(row.attention as i32 - 1);
        assert_eq!(world.metric("switchboard_number_attention", &number.id).await, attention, "{what}");
    }
    let metrics = world.metrics().await;
    for row in &ROWS {
        let series = format!("switchboard_connections_closed_total{{reason=\"{}\"}}", row.code);
        assert!(metrics.contains(&series), "{series}");
    }
    let stats = world.phones.stats().await.unwrap();
    assert_eq!(stats["devices_connected_twice"], 0, "{stats}");
}

/// Waits for a state after an error. The waits between attempts grow from failure to failure; an operator ends them.
async fn after_error(
    world: &World,
    tenant: &Caller,
    number: &OwnedNumber,
    code: &str,
    state: NumberState,
) -> proto::Number {
    until(&format!("{state:?} after {code}"), async || {
        let shown = world.number(tenant, &number.id).await;
        if shown.state() == NumberState::Offline {
            let request = proto::ResetNumberRequest { number: number.id.clone() };
            tenant.numbers().reset_number(request).await.unwrap();
        }
        let seen = shown.last_error.as_ref().is_some_and(|last| last.code == code);
        (seen && shown.state() == state).then_some(shown)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_before_the_login_is_named_too() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("verdicts", &[&phone(100)]).await;
    let number = &numbers[0];
    let broken = async |fault: Value| {
        world.fault(&json!({ "handshake": { "fault": fault } })).await;
        world.phones.kick(&number.phone, "drop").await.unwrap();
    };
    broken(json!({ "status": 502 })).await;
    let shown = after_error(&world, &tenant, number, "UPGRADE_REFUSED", NumberState::Online).await;
    assert_eq!(shown.last_error.unwrap().detail, 502);
    broken(json!("garbled")).await;
    after_error(&world, &tenant, number, "HANDSHAKE_REFUSED", NumberState::Online).await;
    broken(json!("silent")).await;
    after_error(&world, &tenant, number, "HANDSHAKE_SILENT", NumberState::Online).await;
    broken(json!({ "status": 403 })).await;
    let parked = after_error(&world, &tenant, number, "UPGRADE_REFUSED", NumberState::Parked).await;
    assert_eq!((parked.reason.as_str(), parked.attention()), ("UPGRADE_REFUSED", Attention::Operator));
    let wait = parked.next_attempt_time.unwrap().seconds - parked.state_change_time.unwrap().seconds;
    assert!((899..=901).contains(&wait), "{wait}");
    // The operator's word ends the wait.
    let request = proto::ResetNumberRequest { number: number.id.clone() };
    tenant.numbers().reset_number(request).await.unwrap();
    world.until_state(&tenant, &number.id, NumberState::Online).await;
}

/// Until the number is not shown as connected any more, and how long that took. What answers no question may be shown
/// as degraded before.
async fn noticed(world: &World, tenant: &Caller, number: &OwnedNumber, at_most: Duration) -> (Duration, proto::Number) {
    let begun = Instant::now();
    loop {
        let shown = world.number(tenant, &number.id).await;
        if !matches!(shown.state(), NumberState::Online | NumberState::Degraded) {
            return (begun.elapsed(), shown);
        }
        assert!(begun.elapsed() < at_most, "still shown as online after {:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_line_and_a_zombie_are_noticed_and_healed() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("verdicts", &[&phone(200), &phone(201)]).await;
    let (dead, zombie) = (&numbers[0], &numbers[1]);
    world.fault(&json!({ "phone": dead.phone, "silence": true })).await;
    world.fault(&json!({ "phone": zombie.phone, "mute_iq": ["*"] })).await;
    let mut writing = JoinSet::new();
    let (phones, to) = (world.phones, zombie.phone.clone());
    writing.spawn(async move {
        let mut often = tokio::time::interval(Duration::from_secs(2));
        loop {
            often.tick().await;
            let _ = phones.write(CUSTOMER, &to, "bytes flow").await;
        }
    });
    // The bound is the product's; what a busy machine adds is on top.
    let (took, shown) = noticed(&world, &tenant, dead, Duration::from_secs(50)).await;
    println!("dead line noticed after {:.1} s", took.as_secs_f64());
    assert_eq!(shown.last_error.unwrap().code, "CONNECTION_LOST");
    let (took, shown) = noticed(&world, &tenant, zombie, Duration::from_secs(55)).await;
    println!("zombie noticed {:.1} s later", took.as_secs_f64());
    assert_eq!(shown.last_error.unwrap().code, "UNRESPONSIVE");
    writing.shutdown().await;
    world.fault(&json!({ "clear": true })).await;
    for number in [dead, zombie] {
        let request = proto::ResetNumberRequest { number: number.id.clone() };
        tenant.numbers().reset_number(request).await.unwrap();
        world.until_state(&tenant, &number.id, NumberState::Online).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_with_something_wrong_is_degraded_and_sends_on() {
    let world = World::new().await;
    let phones = [phone(300), phone(301), phone(302)];
    // The settings are refused from the first login on.
    world.fault(&json!({ "phone": phones[1], "app_state_error": 404 })).await;
    let (tenant, _, numbers) = world.tenant("verdicts", &phones.each_ref().map(String::as_str)).await;
    let [keys, settings, readable] = &numbers[..] else { unreachable!() };
    // No keys reach the server any more, and those it had are used up.
    let refused = json!({ "queries": ["encrypt:registration", "encrypt:count"], "code": 503 });
    world.fault(&json!({ "phone": keys.phone, "refuse_iq": refused })).await;
    world.phones.post(&format!("/admin/drain-prekeys?phone={}", keys.phone), "").await.unwrap();
    // What customers write cannot be opened, and their phones repeat nothing.
    world.fault(&json!({ "phone": CUSTOMER, "spoil": 6, "hold_repeats": true })).await;
    for count in 0..6 {
        world.phones.write(CUSTOMER, &readable.phone, &format!("unreadable {count}")).await.unwrap();
    }
    let expected = [(keys, "PREKEYS_MISSING"), (settings, "APP_STATE_REFUSED"), (readable, "UNDECRYPTABLE_MESSAGES")];
    for (number, reason) in expected {
        let shown = world.until_state(&tenant, &number.id, NumberState::Degraded).await;
        assert_eq!((shown.reason.as_str(), shown.attention()), (reason, Attention::Operator));
        assert_eq!(world.metric("switchboard_number_up", &number.id).await, 1.0, "it sends on");
        number.caller.send_text(CUSTOMER, reason, reason).await.unwrap();
        until("it is shown", async || (world.copies(CUSTOMER, reason).await == 1).then_some(())).await;
        let told = |hook: &switchboard::demo::sink::Received| hook.body["data"]["reason"] == reason;
        world.webhook(number, "number.health_degraded", told).await;
    }
    world.fault(&json!({ "clear": true })).await;
    world.phones.kick(&settings.phone, "drop").await.unwrap();
    for (number, _) in expected.iter().take(2) {
        world.until_state(&tenant, &number.id, NumberState::Online).await;
    }
    world.webhook(keys, "number.recovered", |_| true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_ends_no_ban_and_time_that_passes_does() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("clock", &[&phone(400), &phone(401)]).await;
    let [banned, other] = &numbers[..] else { unreachable!() };
    let ban = parks(Login(402, Some((101, 7_200))), "TEMPORARILY_BANNED", 101, 7_200, Attention::Owner);
    ban.strike(&world, &banned.phone).await;
    let parked = world.until_state(&tenant, &banned.id, NumberState::Parked).await;
    world.fault(&json!({ "clear": true })).await;
    let logins_of = async |phone: &str| {
        let stats = world.phones.stats_of(phone).await.unwrap();
        let devices = stats["devices"].as_object().unwrap().values();
        devices.map(|device| device["logins"].as_u64().unwrap()).sum::<u64>()
    };
    let logins = async || logins_of(&banned.phone).await;
    let before = logins().await;
    let step = async |seconds: i64| {
        let path = format!("/debug/clock-step?seconds={seconds}");
        call(world.admin(), "POST", &path, &[], "").await.unwrap();
    };
    let trusted = async |expected: f64| {
        let told = async || (world.metric("switchboard_clock_trusted", "").await == expected).then_some(());
        until("it is told whether the clock is believed", told).await;
    };
    step(3 * 3600).await;
    // Work makes it look at the clock; a new login tells it WhatsApp's, which has not jumped.
    other.caller.send_text(CUSTOMER, "after the jump", "after the jump").await.unwrap();
    trusted(0.0).await;
    let once = logins_of(&other.phone).await;
    world.phones.kick(&other.phone, "drop").await.unwrap();
    until("it has logged in again", async || (logins_of(&other.phone).await > once).then_some(())).await;
    world.until_state(&tenant, &other.id, NumberState::Online).await;
    other.caller.send_text(CUSTOMER, "still here", "still here").await.unwrap();
    until("it is shown", async || (world.copies(CUSTOMER, "still here").await == 1).then_some(())).await;
    let shown = world.number(&tenant, &banned.id).await;
    assert_eq!((shown.state(), shown.next_attempt_time), (NumberState::Parked, parked.next_attempt_time));
    assert_eq!(logins().await, before, "the ban holds");
    step(-3 * 3600).await;
    trusted(1.0).await;
    put_forward(world.admin(), 7_300).await;
    // It would look by itself within a minute.
    banned.caller.send_text(CUSTOMER, "free again", "free again").await.unwrap();
    world.until_state(&tenant, &banned.id, NumberState::Online).await;
    assert_eq!(logins().await, before + 1);
}
