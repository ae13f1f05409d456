//! The HTTP side: what a test, a demo or a curious person may ask the sandbox to do. Documented per route below;
//! numbers are digits with or without a plus, errors are `{"error": …}`.

use crate::sandbox::account::{Companion, Registration, device_signature_input};
use crate::sandbox::address::{DeviceAddress, Namespace, PhoneNumber};
use crate::sandbox::certificate::public_bytes;
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::faults::{LoginFailure, Order};
use crate::sandbox::link::Farewell;
use crate::sandbox::login::{conflict, failure};
use crate::sandbox::pair_code;
use crate::sandbox::pairing;
use crate::sandbox::signal_store::SignedKey;
use crate::sandbox::stanza::tag;
use crate::sandbox::world::World;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use whatsapp_rust::buffa::Message as _;
use whatsapp_rust::wacore::store::Device;
use whatsapp_rust::wacore_binary::Node;
use whatsapp_rust::waproto::whatsapp::ADVSignedDeviceIdentity;

type Shared = State<Arc<World>>;

/// All routes.
pub fn router(world: Arc<World>) -> Router {
    Router::new()
        .route("/admin/root", get(root))
        .route("/admin/stats", get(stats))
        .route("/admin/fault", post(fault))
        .route("/admin/kick", post(kick))
        .route("/admin/provision", post(provision))
        .route("/admin/drain-prekeys", post(drain_prekeys))
        .route("/admin/mock-phone/scan-qr", post(scan_qr))
        .route("/admin/mock-phone/pair-code", post(enter_code))
        .route("/admin/mock-phone/passkey", post(unlock_passkey))
        .route("/admin/mock-phone/passkey-code", get(passkey_code))
        .route("/admin/mock-phone/send", post(send))
        .route("/admin/mock-phone/read", post(read))
        .route("/admin/mock-phone/messages", get(messages))
        .route("/admin/mock-phone/absent", post(absent))
        .route("/admin/mock-phone/forget-sessions", post(forget_sessions))
        .route("/admin/mock-phone/unlink", post(unlink))
        .with_state(world)
}

impl IntoResponse for SandboxError {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Malformed(_) | Self::Json(_) | Self::Protobuf(_) | Self::Curve(_) => StatusCode::BAD_REQUEST,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Full(_) => StatusCode::TOO_MANY_REQUESTS,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, axum::Json(json!({ "error": self.to_string() }))).into_response()
    }
}

type Answer = Result<axum::Json<Value>>;

fn number(text: &str) -> Result<PhoneNumber> {
    PhoneNumber::parse(text).ok_or(SandboxError::Malformed("phone number"))
}

fn text(body: &Bytes) -> Result<&str> {
    std::str::from_utf8(body).map_err(|_| SandboxError::Malformed("body is not UTF-8"))
}

/// Only what cannot be mistaken for an address or a token.
fn is_message_id(id: &str) -> bool {
    (8..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[derive(Deserialize)]
struct Whose {
    phone: String,
    #[serde(default)]
    lid: bool,
}

/// `GET /admin/root` → `{"root": hex}`
async fn root(State(world): Shared) -> Answer {
    Ok(axum::Json(json!({ "root": world.identity.root_hex() })))
}

#[derive(Deserialize)]
struct WhoseStats {
    phone: Option<String>,
}

/// `GET /admin/stats[?phone=N]` → counters; with a number also its devices' connections.
async fn stats(State(world): Shared, Query(query): Query<WhoseStats>) -> Answer {
    let phone = query.phone.as_deref().map(number).transpose()?;
    Ok(axum::Json(world.stats.report(phone.as_ref())))
}

/// `POST /admin/fault`, body [`Order`] → `{}`
async fn fault(State(world): Shared, body: Bytes) -> Answer {
    let order: Order = serde_json::from_slice(&body)?;
    if !world.faults.order(order) {
        return Err(SandboxError::Malformed("phone number"));
    }
    world.repeat_held();
    Ok(axum::Json(json!({})))
}

#[derive(Deserialize)]
struct Kick {
    phone: String,
    code: String,
    device: Option<u16>,
    #[serde(default)]
    unlink: bool,
}

/// `POST /admin/kick?phone=N&code=C[&device=K][&unlink=true]` → `{"kicked": n}`
async fn kick(State(world): Shared, Query(query): Query<Kick>) -> Answer {
    let phone = number(&query.phone)?;
    let farewell = farewell(&query.code).ok_or(SandboxError::Malformed("code"))?;
    let account = world.require(&phone)?;
    let mut state = account.state();
    let mut kicked = 0;
    for (device, companion) in &state.companions {
        let meant = query.device.is_none_or(|wanted| wanted == *device);
        if let Some(link) = companion.link.as_ref().filter(|_| meant) {
            link.end(farewell.clone());
            kicked += 1;
        }
    }
    if query.unlink || query.code == "device_removed" {
        state.companions.retain(|device, _| query.device.is_some_and(|wanted| wanted != *device));
        account.dirty.store(true, std::sync::atomic::Ordering::Release);
    }
    Ok(axum::Json(json!({ "kicked": kicked })))
}

/// How a connection ends for each code a test may ask for: the code of a `<stream:error>`, `failure-N` for a `<failure>`,
/// or a word.
fn farewell(code: &str) -> Option<Farewell> {
    let node: Node = match code {
        "drop" => return Some(Farewell::Drop),
        "replaced" | "device_removed" => conflict(code),
        "xmlstreamend" => tag("xmlstreamend").build(),
        "xml" => tag("stream:error").children([tag("xml-not-well-formed").build()]).build(),
        "ack" => {
            let owed = tag("ack").attr("class", "message").attr("id", "3EB0000000000000").build();
            tag("stream:error").children([owed]).build()
        }
        "unknown" => tag("stream:error").children([tag("something-new").build()]).build(),
        "402" | "403" | "405" | "406" => {
            let reason = code.parse().ok()?;
            let ban = reason == 402;
            failure(&LoginFailure { reason, code: ban.then_some(101), expire: ban.then_some(3_600), count: 0 })
        }
        _ if code.starts_with("failure-") => {
            let reason = code.strip_prefix("failure-").and_then(|reason| reason.parse().ok())?;
            failure(&LoginFailure { reason, code: None, expire: None, count: 0 })
        }
        _ => tag("stream:error").attr("code", code.parse::<u16>().ok()?).build(),
    };
    Some(Farewell::Stanza(Box::new(node)))
}

/// `POST /admin/mock-phone/scan-qr?phone=N[&lid=true]`, body: QR text → `{"phone", "device", "jid", "lid"}`, or
/// `{"passkey": true}` when that is asked for first.
async fn scan_qr(State(world): Shared, Query(query): Query<Whose>, body: Bytes) -> Answer {
    let Some(device) = pairing::scan(&world, &number(&query.phone)?, text(&body)?, query.lid)? else {
        return Ok(axum::Json(json!({ "passkey": true })));
    };
    Ok(axum::Json(json!({
        "phone": device.phone,
        "device": device.device,
        "jid": Namespace::Phone.device(&device).to_string(),
        "lid": Namespace::Hidden.device(&device).to_string(),
    })))
}

/// `POST /admin/mock-phone/pair-code?phone=N[&lid=true]`, body: the code the device shows → `{}`; the person enters it
/// on the phone. Whether it was right shows when the device is linked.
async fn enter_code(State(world): Shared, Query(query): Query<Whose>, body: Bytes) -> Answer {
    let (phone, code) = (number(&query.phone)?, text(&body)?.to_owned());
    // Stretching the code takes a while by design.
    let entered = tokio::task::spawn_blocking(move || pair_code::enter(&world, &phone, &code, query.lid)).await;
    entered.map_err(|_| SandboxError::Conflict("the phone gave up"))??;
    Ok(axum::Json(json!({})))
}

/// `POST /admin/mock-phone/passkey?phone=N`, body: WebAuthn request options → the assertion, as a browser gives it
async fn unlock_passkey(State(world): Shared, Query(query): Query<Whose>, body: Bytes) -> Answer {
    let phone = number(&query.phone)?;
    world.require(&phone)?;
    world.passkeys.answer(&phone, text(&body)?).map(axum::Json)
}

/// `GET /admin/mock-phone/passkey-code?phone=N` → `{"code"}`: what the phone shows, to be compared with the device's
async fn passkey_code(State(world): Shared, Query(query): Query<Whose>) -> Answer {
    let code = world.passkeys.shown(&number(&query.phone)?);
    let code = code.ok_or(SandboxError::NotFound("a code that this phone shows"))?;
    Ok(axum::Json(json!({ "code": code })))
}

#[derive(Deserialize)]
struct Send {
    from: String,
    to: String,
    #[serde(default)]
    lid: bool,
    id: Option<String>,
}

/// `POST /admin/mock-phone/send?from=N&to=M[&lid=true][&id=I]`, body: text → `{"id"}`; the id of an earlier message may
/// be used again.
async fn send(State(world): Shared, Query(query): Query<Send>, body: Bytes) -> Answer {
    let addressing = if query.lid { Namespace::Hidden } else { Namespace::Phone };
    let given = query.id.map(|id| is_message_id(&id).then_some(id).ok_or(SandboxError::Malformed("id"))).transpose()?;
    let id = world.write(&number(&query.from)?, &number(&query.to)?, text(&body)?, addressing, given)?;
    Ok(axum::Json(json!({ "id": id })))
}

#[derive(Deserialize)]
struct Read {
    phone: String,
    peer: String,
}

/// `POST /admin/mock-phone/read?phone=N&peer=M` → `{"read": n}`
async fn read(State(world): Shared, Query(query): Query<Read>) -> Answer {
    let read = world.read(&number(&query.phone)?, &number(&query.peer)?)?;
    Ok(axum::Json(json!({ "read": read })))
}

/// `GET /admin/mock-phone/messages?phone=N` → JSON lines of what the phone shows
async fn messages(State(world): Shared, Query(query): Query<Whose>) -> Result<Response> {
    let mut lines = String::new();
    for shown in world.messages(&number(&query.phone)?)? {
        lines.push_str(&serde_json::to_string(&shown)?);
        lines.push('\n');
    }
    Ok(([("content-type", "application/x-ndjson")], lines).into_response())
}

#[derive(Deserialize)]
struct Absent {
    phone: String,
    #[serde(default = "yes")]
    absent: bool,
}

fn yes() -> bool {
    true
}

/// `POST /admin/mock-phone/absent?phone=N[&absent=false]` → `{}`
async fn absent(State(world): Shared, Query(query): Query<Absent>) -> Answer {
    world.set_absent(&number(&query.phone)?, query.absent);
    Ok(axum::Json(json!({})))
}

/// `POST /admin/mock-phone/forget-sessions?phone=N` → `{}`
async fn forget_sessions(State(world): Shared, Query(query): Query<Whose>) -> Answer {
    world.forget_sessions(&number(&query.phone)?)?;
    Ok(axum::Json(json!({})))
}

#[derive(Deserialize)]
struct Unlink {
    phone: String,
    device: Option<u16>,
}

/// `POST /admin/drain-prekeys?phone=N` → `{"devices": n}`: their one-time prekeys are used up, and they are told.
async fn drain_prekeys(State(world): Shared, Query(query): Query<Whose>) -> Answer {
    let devices = world.drain_prekeys(&number(&query.phone)?)?;
    Ok(axum::Json(json!({ "devices": devices })))
}

/// `POST /admin/mock-phone/unlink?phone=N[&device=K]` → `{"kicked": n}`; the person removes linked devices.
async fn unlink(state: Shared, Query(query): Query<Unlink>) -> Answer {
    let kick_out = Kick { phone: query.phone, code: "device_removed".to_owned(), device: query.device, unlink: true };
    kick(state, Query(kick_out)).await
}

/// `POST /admin/provision?phone=N[&lid=true]` → a `Device` of the WhatsApp library as JSON: linked, registered, and
/// with the certificate chain cached, so that it logs in by Noise IK.
async fn provision(State(world): Shared, Query(query): Query<Whose>) -> Result<axum::Json<Device>> {
    let phone = number(&query.phone)?;
    let account = world.require(&phone)?;
    let mut device = Device::new();
    let identity = public_bytes(&device.identity_key)?;
    let registration = Registration {
        registration_id: device.registration_id,
        identity,
        noise: public_bytes(&device.noise_key)?,
        signed: SignedKey {
            id: device.signed_pre_key_id,
            key: public_bytes(&device.signed_pre_key)?,
            signature: device.signed_pre_key_signature.to_vec(),
        },
    };
    let mut state = account.state();
    let place = state.reserve(&identity)?;
    let input = device_signature_input(&place.identity, &identity);
    let signature = device.identity_key.private_key.calculate_signature(&input, &mut rand::rng())?;
    let adv = ADVSignedDeviceIdentity { device_signature: Some(signature.to_vec()), ..place.identity };
    let companion = Companion::new(place.key_index, registration, adv.encode_to_vec(), false);
    state.companions.insert(place.device, companion);
    let address = DeviceAddress::new(phone, place.device);
    device.push_name = state.person.name.clone();
    drop(state);
    device.pn = Some(Namespace::Phone.device(&address));
    device.lid = Some(Namespace::Hidden.device(&address));
    device.account = Some(Arc::new(adv));
    device.server_cert_chain = Some(world.identity.cached_chain());
    device.lid_migrated = query.lid;
    world.stats.linked.add(1);
    world.save(&account)?;
    Ok(axum::Json(device))
}
