//! What a session takes: bytes on the wire as the library counts them, and memory as it estimates it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use whatsapp_rust::Client;

use super::signals::Signals;
use crate::domain::ledger::SessionMemory;
use crate::session::contract::{SessionEvent, Usage};

/// How often a session tells.
pub(super) const TELL_EVERY: Duration = Duration::from_secs(60);
/// Memory of a connected client before it has seen a message: measured over ten thousand of them.
const CONNECTION_BYTES: u64 = 84 * 1024;
/// What one entry of a queue holds at most as a rule: a stanza and its guards.
const QUEUED_BYTES: u64 = 1024;
/// The report walks caches under their locks.
const REPORT_WITHIN: Duration = Duration::from_secs(5);

/// Tells what the session takes now.
pub(super) async fn tell(client: Arc<Client>, signals: Arc<Signals>) {
    let Ok(report) = timeout(REPORT_WITHIN, Box::pin(client.memory_report())).await else { return };
    let queued = [
        report.transport_ack_queue,
        report.delivery_receipt_queue,
        report.response_waiters,
        report.pending_retries,
        report.presence_subscriptions,
    ];
    let directory = [
        report.device_registry_cache,
        report.lid_pn_lid_entries,
        report.lid_pn_pn_entries,
        report.recent_messages,
        report.sender_key_device_cache,
        report.group_cache,
        report.group_devices_memo,
        report.dm_devices_memo,
    ];
    let signal = [report.signal_sessions, report.signal_identities, report.signal_sender_keys];
    let memory = SessionMemory {
        connection: CONNECTION_BYTES,
        signal: signal.iter().map(|stats| stats.bytes).sum(),
        directory: directory.iter().map(|stats| stats.bytes).sum(),
        queues: queued.iter().sum::<usize>() as u64 * QUEUED_BYTES,
    };
    signals.tell(SessionEvent::Usage(usage(&client, memory)));
}

/// Tells what has gone over the wire when nothing more will, and that no memory is held any more.
pub(super) fn tell_last(client: &Client, signals: &Signals) {
    signals.tell(SessionEvent::Usage(usage(client, SessionMemory::default())));
}

fn usage(client: &Client, memory: SessionMemory) -> Usage {
    let stats = client.stats();
    Usage { received: stats.bytes_received, sent: stats.bytes_sent, memory }
}
