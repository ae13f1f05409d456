//! Queries of a logged-in device: every namespace a client asks about, and an honest "not implemented" for the rest.

use crate::sandbox::address::DeviceAddress;
use crate::sandbox::appstate;
use crate::sandbox::connection::Reaction;
use crate::sandbox::link::Farewell;
use crate::sandbox::login::conflict;
use crate::sandbox::prekeys;
use crate::sandbox::stanza::{self, attr, children, tag};
use crate::sandbox::usync;
use crate::sandbox::world::World;
use std::time::Duration;
use whatsapp_rust::wacore::iq::mex_operations::fetch_reachout_timelock;
use whatsapp_rust::wacore_binary::Node;

/// Media hosts are not simulated here; the name resolves nowhere on purpose.
const MEDIA_HOST: &str = "media.sandbox.invalid";
const MEDIA_TTL: u32 = 3_600;
const PRIVACY_CATEGORIES: [&str; 8] =
    ["readreceipts", "profile", "status", "online", "last", "groupadd", "calladd", "messages"];
const PROPS_REFRESH: u32 = 86_400;

/// Takes a query.
pub fn react(world: &World, device: &DeviceAddress, iq: &Node) -> Vec<Reaction> {
    let kind = kind_of(iq);
    if world.faults.mutes(&device.phone, &kind) {
        return Vec::new();
    }
    if let Some(code) = world.faults.refuses(&device.phone, &kind) {
        return vec![Reaction::Reply(stanza::failure(iq, code, "refused-on-order"))];
    }
    match kind.as_str() {
        "passive:active" => vec![Reaction::Reply(stanza::result(iq, [])), Reaction::Active],
        "md:remove-companion-device" => log_out(world, device, iq),
        _ => vec![Reaction::Reply(answer(world, device, &kind, iq))],
    }
}

/// Namespace and question, as faults name them.
fn kind_of(iq: &Node) -> String {
    let namespace = attr(iq, "xmlns").unwrap_or_default();
    match children(iq).first() {
        Some(question) => format!("{namespace}:{}", question.tag),
        None => namespace.into_owned(),
    }
}

fn answer(world: &World, device: &DeviceAddress, kind: &str, iq: &Node) -> Node {
    let is_set = attr(iq, "type").is_some_and(|kind| kind == "set");
    let namespace = attr(iq, "xmlns").unwrap_or_default();
    match (namespace.as_ref(), is_set) {
        ("encrypt", _) => prekeys::answer(world, device, iq),
        ("usync", _) => usync::answer(world, iq),
        ("w:sync:app:state", _) => appstate::answer(iq, world.faults.app_state_error(&device.phone)),
        ("w:p", _) => stanza::result(iq, []),
        ("w:mex", false) if asks_for_lock(iq) => match world.faults.locked_for(&device.phone) {
            Some(seconds) => stanza::result(iq, [lock(seconds)]),
            None => not_implemented(world, kind, iq),
        },
        ("abt" | "w", false) => {
            let props = tag("props")
                .attr("protocol", "1")
                .attr("hash", "sandbox")
                .attr("refresh", PROPS_REFRESH)
                .attr("refresh_id", "1");
            stanza::result(iq, [props.build()])
        }
        ("blocklist", false) => stanza::result(iq, [tag("list").build()]),
        ("privacy", false) => stanza::result(iq, [privacy()]),
        ("w:m", _) => stanza::result(iq, [media_connection()]),
        ("w:g2", false) => stanza::result(iq, [tag("groups").build()]),
        ("w:profile:picture", false) => stanza::failure(iq, 404, "item-not-found"),
        // Settings and housekeeping that nothing here depends on.
        (_, true) => stanza::result(iq, []),
        (_, false) => not_implemented(world, kind, iq),
    }
}

fn not_implemented(world: &World, kind: &str, iq: &Node) -> Node {
    tracing::debug!(kind, "query not implemented");
    world.stats.unknown_queries.add(1);
    stanza::failure(iq, 501, "feature-not-implemented")
}

/// Whether this is the persisted query for the account's lock on new chats.
fn asks_for_lock(iq: &Node) -> bool {
    children(iq)
        .first()
        .and_then(|query| attr(query, "query_id"))
        .is_some_and(|id| id == fetch_reachout_timelock::DOC_ID)
}

fn lock(seconds: u64) -> Node {
    let ends = (stanza::now() + seconds).to_string();
    let lock = serde_json::json!({ "is_active": seconds > 0, "time_enforcement_ends": ends });
    let answer = serde_json::json!({ "data": { "xwa2_fetch_account_reachout_timelock": lock } });
    tag("result").bytes(answer.to_string().into_bytes()).build()
}

/// Everything is shown to everybody; without an answer about read receipts clients keep theirs to themselves.
fn privacy() -> Node {
    let category = |name: &'static str| tag("category").attr("name", name).attr("value", "all").build();
    tag("privacy").children(PRIVACY_CATEGORIES.map(category)).build()
}

fn media_connection() -> Node {
    tag("media_conn")
        .attr("auth", "sandbox")
        .attr("ttl", MEDIA_TTL)
        .attr("auth_ttl", MEDIA_TTL)
        .attr("max_buckets", 1)
        .children([tag("host").attr("hostname", MEDIA_HOST).build()])
        .build()
}

fn log_out(world: &World, device: &DeviceAddress, iq: &Node) -> Vec<Reaction> {
    if let Some(account) = world.account(&device.phone) {
        account.state().companions.remove(&device.device);
        account.dirty.store(true, std::sync::atomic::Ordering::Release);
    }
    let farewell = Farewell::Stanza(Box::new(conflict("device_removed")));
    vec![Reaction::Reply(stanza::result(iq, [])), Reaction::CloseAfter { pause: Duration::ZERO, farewell }]
}
