//! Builds the library's client for one number. Every limit is set on purpose: the defaults are sized for one
//! account on a desktop, here ten thousand share a process.

use std::sync::Arc;
use std::time::Duration;

use whatsapp_rust::cache_config::CacheConfig;
use whatsapp_rust::store::persistence_manager::PersistenceManager;
use whatsapp_rust::store::traits::Backend;
use whatsapp_rust::wacore::msg_secret::MsgSecretPolicy;
use whatsapp_rust::wacore::store::DevicePropsOverride;
use whatsapp_rust::waproto::whatsapp::device_props::PlatformType;
use whatsapp_rust::{CacheEntryConfig, Client};

use super::backend::LinkBackend;
use super::environment::LinkEnvironment;
use super::inbound::Inbox;
use super::runtime::LinkRuntime;
use super::signals::Signals;
use super::transport::{LinkTransportFactory, SocketSlot};
use crate::domain::proxy::Proxy;
use crate::domain::version::ClientVersion;

/// The name the phone shows in its list of linked devices.
const DEVICE_NAME: &str = "Switchboard";
/// How often a changed device row is written besides at once: only catches a write that failed.
const SAVE_EVERY: Duration = Duration::from_secs(60);
/// One-time prekeys per upload. WhatsApp Web makes 812: 24 ms of CPU and 180 KiB per number. The server asks
/// for more when few are left.
const PREKEYS: usize = 60;
/// Live chats with a task and a queue (10.5 KiB each); others are opened again when they speak.
const CHAT_LANES: u64 = 32;
/// Locks of Signal sessions, two or three per contact that is being talked to.
const SESSION_LOCKS: u64 = 256;
/// Device lists in memory; the others are read from disk.
const DEVICE_LISTS: u64 = 256;
/// Groups are not served yet; what the library does for them stays small.
const GROUPS: u64 = 32;
/// Chats whose resends are paced at the same time.
const RESEND_CHATS: u64 = 64;
/// Messages that failed to decrypt and are being asked for again.
const RETRIES: u64 = 128;
/// Plain text of sent messages is kept this long for retry receipts: a phone may be off for a week.
const SENT_KEPT: Duration = Duration::from_secs(8 * 24 * 3600);
const HOUR: Option<Duration> = Some(Duration::from_secs(3600));

fn caches() -> CacheConfig {
    CacheConfig {
        group_cache: CacheEntryConfig::new(HOUR, GROUPS),
        device_registry_cache: CacheEntryConfig::new(HOUR, DEVICE_LISTS),
        // Zero on purpose: with a cache the row of a sent message is written after the wire instead of before.
        recent_messages: CacheEntryConfig::new(HOUR, 0),
        message_retry_counts: CacheEntryConfig::new(HOUR, RETRIES),
        undecryptable_dispatched: CacheEntryConfig::new(Some(Duration::from_secs(300)), RETRIES),
        pdo_requested: CacheEntryConfig::new(Some(Duration::from_secs(24 * 3600)), RETRIES),
        sender_key_devices_cache: CacheEntryConfig::new(HOUR, GROUPS),
        session_recreate_history: CacheEntryConfig::new(HOUR, RETRIES),
        session_locks_capacity: SESSION_LOCKS,
        chat_lanes_capacity: CHAT_LANES,
        group_distribution_locks_capacity: GROUPS,
        resend_rate_limiter_capacity: RESEND_CHATS,
        sent_message_ttl_secs: SENT_KEPT.as_secs(),
        // Secrets decrypt later edits and poll votes, which this version does not read: two rows per message saved.
        msg_secret_policy: MsgSecretPolicy::Disabled,
        seed_msg_secrets_from_history: false,
        ..CacheConfig::default()
    }
}

/// The parts of a session that its client is made of.
pub(super) struct Parts {
    pub(super) environment: Arc<LinkEnvironment>,
    pub(super) signals: Arc<Signals>,
    pub(super) backend: Arc<LinkBackend>,
    pub(super) runtime: Arc<LinkRuntime>,
    pub(super) slot: Arc<SocketSlot>,
    pub(super) proxy: Option<Proxy>,
}

/// The store did not answer, or not as the library needs it.
#[derive(Debug)]
pub(super) struct NotBuilt;

/// Loads the number's device, or makes a new identity for one that has none.
pub(super) async fn load(parts: &Parts) -> Result<Arc<PersistenceManager>, NotBuilt> {
    let backend: Arc<dyn Backend> = parts.backend.clone();
    let persistence = PersistenceManager::new(backend).await.map_err(|_| NotBuilt)?;
    Ok(Arc::new(persistence))
}

/// Builds the client. It connects nowhere yet.
pub(super) async fn build(
    parts: &Parts,
    persistence: Arc<PersistenceManager>,
    version: ClientVersion,
) -> Result<Arc<Client>, NotBuilt> {
    let factory = LinkTransportFactory {
        environment: parts.environment.clone(),
        slot: parts.slot.clone(),
        proxy: parts.proxy.clone(),
        signals: parts.signals.clone(),
        runtime: parts.runtime.clone(),
    };
    let is_new = persistence.get_device_snapshot().pn.is_none();
    let build = Client::builder()
        .with_runtime_arc(parts.runtime.clone())
        .with_persistence_manager(persistence)
        .with_transport_factory(factory)
        .with_http_client_arc(parts.environment.http())
        .with_version_override((version.primary, version.secondary, version.tertiary))
        .with_cache_config(caches())
        .with_background_saver_interval(SAVE_EVERY)
        .with_inbound_durability_hook_arc(Inbox::new(parts.signals.clone()))
        // An initial history is many MiB per number and nobody asked for it.
        .with_skip_history_sync(true)
        .with_wanted_pre_key_count(PREKEYS)
        .build()
        .await
        .map_err(|_| NotBuilt)?;
    let client = build.into_client();
    parts.signals.attach(&client);
    if is_new {
        let props = DevicePropsOverride::new().with_os(DEVICE_NAME).with_platform_type(PlatformType::DESKTOP);
        client.set_device_props(props).await;
    }
    Ok(client)
}
