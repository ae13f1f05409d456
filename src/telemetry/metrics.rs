//! Every metric of low cardinality, by name, in this one file; per-number series come from `collector`. Parts call the
//! typed functions, so that no label can hold free text and no histogram lacks buckets (the exporter's default, a
//! summary, costs 2 GiB at 10,000 label sets).

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, PrometheusBuilder, PrometheusHandle};

const ACCEPT_SECONDS: &str = "switchboard_accept_seconds";
const ACK_SECONDS: &str = "switchboard_ack_seconds";
const INBOUND_DURABLE_SECONDS: &str = "switchboard_inbound_durable_seconds";
const WEBHOOK_DELIVERY_SECONDS: &str = "switchboard_webhook_delivery_seconds";
const WEBHOOK_ATTEMPTS_TOTAL: &str = "switchboard_webhook_attempts_total";
const WEBHOOK_REQUESTS: &str = "switchboard_webhook_requests";
const WEBHOOK_REQUESTS_LIMIT: &str = "switchboard_webhook_requests_limit";
const WEBHOOK_CROWDED_TOTAL: &str = "switchboard_webhook_crowded_total";
const WEBHOOK_DEAD_LETTERS_TOTAL: &str = "switchboard_webhook_dead_letters_total";
const WEBHOOKS_DISABLED_TOTAL: &str = "switchboard_webhooks_disabled_total";
const WEBHOOK_SET_ASIDE_TOTAL: &str = "switchboard_webhook_set_aside_total";
const API_REQUESTS_TOTAL: &str = "switchboard_api_requests_total";
const API_REQUEST_SECONDS: &str = "switchboard_api_request_seconds";
const API_REFUSED_TOTAL: &str = "switchboard_api_refused_total";
const API_STREAMS: &str = "switchboard_api_streams";
const API_SLOW_STREAMS_TOTAL: &str = "switchboard_api_slow_streams_total";
const GATE_WAITING: &str = "switchboard_gate_waiting";
const GATE_OPENING: &str = "switchboard_gate_opening";
const GATE_GRANTS_TOTAL: &str = "switchboard_gate_grants_total";
const GATE_RATE: &str = "switchboard_gate_rate";
const GATE_MODE: &str = "switchboard_gate_mode";
const GATE_CANARIES_FAILED_TOTAL: &str = "switchboard_gate_canaries_failed_total";
const GATE_RELEASES_TOTAL: &str = "switchboard_gate_releases_total";
const PROXIES_DOWN: &str = "switchboard_proxies_down";
const PROXY_WAITING: &str = "switchboard_proxy_waiting";
const CLIENT_VERSION_SOURCE: &str = "switchboard_client_version_source";
const CLIENT_VERSION_FOUND: &str = "switchboard_client_version_lookup_timestamp_seconds";
const CONNECTIONS_CLOSED_TOTAL: &str = "switchboard_connections_closed_total";
const RESTARTS_TOTAL: &str = "switchboard_restarts_total";
const QUARANTINES_TOTAL: &str = "switchboard_quarantines_total";
const SLOT_TIMEOUTS_TOTAL: &str = "switchboard_slot_timeouts_total";
const RESENT_TOTAL: &str = "switchboard_messages_resent_total";
const SWEPT_ROWS_TOTAL: &str = "switchboard_swept_rows_total";
const CLOCK_TRUSTED: &str = "switchboard_clock_trusted";
const CONTACTS_ERASED_TOTAL: &str = "switchboard_contacts_erased_total";
const SWEEP_PASSES_TOTAL: &str = "switchboard_sweep_passes_total";
const PANICS_TOTAL: &str = "switchboard_panics_total";
const COMMITTER_QUEUED: &str = "switchboard_committer_queued";
const COMMITTER_GROUPS_TOTAL: &str = "switchboard_committer_groups_total";
const COMMITTER_UNITS_TOTAL: &str = "switchboard_committer_units_total";
const COMMITTER_SYNC_SECONDS: &str = "switchboard_committer_sync_seconds";
const VOLUMES_FAILED: &str = "switchboard_volumes_failed";
const STORE_OPEN: &str = "switchboard_store_open";
const STORE_FAILURES_TOTAL: &str = "switchboard_store_failures_total";
const STORE_REOPENED_TOTAL: &str = "switchboard_store_reopened_total";
const STORE_DISK_BYTES: &str = "switchboard_store_disk_bytes";
const STORE_FREE_BYTES: &str = "switchboard_store_free_bytes";
const STORE_USED_RATIO: &str = "switchboard_store_used_ratio";
const STORE_LOW_SPACE: &str = "switchboard_store_low_space";
const ERASURES_WAITING: &str = "switchboard_erasures_waiting";
const BUILD_INFO: &str = "switchboard_build_info";

/// From a cached answer to a stalled disk, in seconds.
const BUCKETS_SECONDS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.010, 0.015, 0.025, 0.050, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
static INSTALLING: Mutex<()> = Mutex::new(());

/// The process's recorder, as far as `/metrics` needs it.
#[derive(Clone)]
pub struct Exposition(PrometheusHandle);

impl std::fmt::Debug for Exposition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Exposition")
    }
}

impl Exposition {
    /// Installs the recorder, once per process; later calls return the same one.
    ///
    /// # Errors
    /// When another recorder is installed already.
    pub fn install() -> Result<Self, BuildError> {
        let _one = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = HANDLE.get() {
            return Ok(Self(handle.clone()));
        }
        let handle = PrometheusBuilder::new().set_buckets(&BUCKETS_SECONDS)?.install_recorder()?;
        describe();
        let version = env!("CARGO_PKG_VERSION");
        let sandbox = if cfg!(feature = "sandbox") { "true" } else { "false" };
        gauge!(BUILD_INFO, "version" => version, "sandbox" => sandbox).set(1.0);
        Ok(Self(HANDLE.get_or_init(|| handle).clone()))
    }

    /// The text of every family in this file.
    #[must_use]
    pub fn render(&self) -> String {
        self.0.render()
    }

    /// Folds recorded samples into their buckets. Call it every few seconds: nobody may be scraping, and samples
    /// are kept until then.
    pub fn upkeep(&self) {
        self.0.run_upkeep();
    }
}

fn describe() {
    describe_histogram!(ACCEPT_SECONDS, "From a send's arrival to its durable acceptance");
    describe_histogram!(ACK_SECONDS, "From a send's acceptance to WhatsApp's ack");
    describe_histogram!(INBOUND_DURABLE_SECONDS, "From a message's decryption to its place on disk");
    describe_histogram!(WEBHOOK_DELIVERY_SECONDS, "One webhook attempt, connection included");
    describe_counter!(WEBHOOK_ATTEMPTS_TOTAL, "Webhook attempts by outcome");
    describe_gauge!(WEBHOOK_REQUESTS, "Webhook requests under way in the process, by class");
    describe_gauge!(WEBHOOK_REQUESTS_LIMIT, "Webhook requests that may be under way");
    describe_counter!(WEBHOOK_CROWDED_TOTAL, "Webhook requests put off because there was no room for them, by class");
    describe_counter!(WEBHOOK_DEAD_LETTERS_TOTAL, "Deliveries given up, by reason");
    describe_counter!(WEBHOOKS_DISABLED_TOTAL, "Endpoints that were stopped, by reason");
    describe_counter!(WEBHOOK_SET_ASIDE_TOTAL, "Stuck deliveries that let their chat go on");
    describe_counter!(API_REQUESTS_TOTAL, "API calls by protocol, method and code");
    describe_histogram!(API_REQUEST_SECONDS, "API calls, by protocol and method");
    describe_counter!(API_REFUSED_TOTAL, "Calls that were shed or cut by their deadline");
    describe_gauge!(API_STREAMS, "Open streams");
    describe_gauge!(
        CLOCK_TRUSTED,
        "Whether the system's clock is followed: 0 after a jump that WhatsApp's did not make"
    );
    gauge!(CLOCK_TRUSTED).set(1.0);
    describe_gauge!(GATE_WAITING, "Numbers waiting for their turn to connect");
    describe_gauge!(GATE_OPENING, "Sessions being opened");
    describe_counter!(GATE_GRANTS_TOTAL, "Sessions allowed to open");
    describe_gauge!(GATE_RATE, "Sessions a second that may be opened at present, 0 while only canaries go");
    describe_gauge!(GATE_MODE, "1 for the way the gate works at present: alert on held_failing and held_outdated");
    describe_counter!(GATE_CANARIES_FAILED_TOTAL, "Canaries that failed while the fleet was held");
    describe_counter!(GATE_RELEASES_TOTAL, "Times that a canary came online and the fleet was released");
    describe_gauge!(
        CLIENT_VERSION_SOURCE,
        "1 for where the version of WhatsApp Web comes from, 0 for all: there is none"
    );
    describe_gauge!(PROXIES_DOWN, "Proxies of numbers that are taken to be down");
    describe_gauge!(PROXY_WAITING, "Numbers that wait for their proxy to work again");
    describe_gauge!(
        CLIENT_VERSION_FOUND,
        "When the version was last looked up with success, 0 if never: alert on 30 days of age"
    );
    describe_counter!(CONNECTIONS_CLOSED_TOTAL, "Connections that ended, by reason");
    describe_counter!(RESTARTS_TOTAL, "Actors restarted after a crash, by cause");
    describe_counter!(QUARANTINES_TOTAL, "Numbers that crashed too often");
    describe_counter!(SLOT_TIMEOUTS_TOTAL, "Numbers whose old socket did not go away in time");
    describe_counter!(API_SLOW_STREAMS_TOTAL, "Streams ended because their client did not read");
    describe_counter!(SWEPT_ROWS_TOTAL, "Rows removed because they were kept long enough");
    describe_counter!(CONTACTS_ERASED_TOTAL, "Contacts of whom nothing is left, by order");
    describe_counter!(SWEEP_PASSES_TOTAL, "Times that a number went through everything it may forget");
    describe_counter!(RESENT_TOTAL, "Messages put on the wire again under the same id");
    describe_counter!(PANICS_TOTAL, "Panics in any thread");
    describe_gauge!(COMMITTER_QUEUED, "Units waiting for a committer, by volume");
    describe_counter!(COMMITTER_GROUPS_TOTAL, "Groups written, by volume");
    describe_counter!(COMMITTER_UNITS_TOTAL, "Units written, by volume");
    describe_gauge!(COMMITTER_SYNC_SECONDS, "Time spent in flush and fdatasync since the start, by volume");
    describe_gauge!(VOLUMES_FAILED, "Volumes that failed or did not open");
    describe_gauge!(STORE_OPEN, "1 while the volume works, 0 while it is quarantined");
    describe_counter!(STORE_FAILURES_TOTAL, "Failures of the disk, by volume");
    describe_counter!(STORE_REOPENED_TOTAL, "Volumes opened again after a failure of their disk");
    describe_gauge!(STORE_DISK_BYTES, "What the volume's files take");
    describe_gauge!(STORE_FREE_BYTES, "Room on the file system of the data directory");
    describe_gauge!(STORE_USED_RATIO, "Used share of that file system, 0 to 1");
    describe_gauge!(STORE_LOW_SPACE, "1 while new sends are refused because the disk is nearly full");
    describe_gauge!(ERASURES_WAITING, "Deleted numbers whose unreadable records are still to be removed");
    describe_gauge!(BUILD_INFO, "Always 1; the labels say which build this is");
}

/// A send was accepted durably.
pub fn accepted(took: Duration) {
    histogram!(ACCEPT_SECONDS).record(took);
}

/// WhatsApp acknowledged a send this long after its acceptance.
pub fn acknowledged(after: Duration) {
    histogram!(ACK_SECONDS).record(after);
}

/// Received messages became durable.
pub fn inbound_durable(took: Duration) {
    histogram!(INBOUND_DURABLE_SECONDS).record(took);
}

/// A webhook attempt ended; `outcome` is `Answer::outcome`.
pub fn webhook_attempt(outcome: &'static str, took: Duration) {
    histogram!(WEBHOOK_DELIVERY_SECONDS).record(took);
    counter!(WEBHOOK_ATTEMPTS_TOTAL, "outcome" => outcome).increment(1);
}

/// Webhook requests of one class under way.
pub fn webhook_requests(class: &'static str, count: usize) {
    gauge!(WEBHOOK_REQUESTS, "class" => class).set(count as f64);
}

/// Webhook requests that may be under way.
pub fn webhook_room(most: usize) {
    gauge!(WEBHOOK_REQUESTS_LIMIT).set(most as f64);
}

/// There was no room for a webhook request.
pub fn webhook_crowded(class: &'static str) {
    counter!(WEBHOOK_CROWDED_TOTAL, "class" => class).increment(1);
}

/// A delivery was given up.
pub fn webhook_dead_letter(reason: &'static str) {
    counter!(WEBHOOK_DEAD_LETTERS_TOTAL, "reason" => reason).increment(1);
}

/// A stuck delivery makes way for its chat.
pub fn webhook_set_aside() {
    counter!(WEBHOOK_SET_ASIDE_TOTAL).increment(1);
}

/// An endpoint was stopped.
pub fn webhook_disabled(reason: &'static str) {
    counter!(WEBHOOKS_DISABLED_TOTAL, "reason" => reason).increment(1);
}

/// The wire an API call came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// gRPC.
    Grpc,
    /// JSON over HTTP.
    Http,
}

impl Protocol {
    const fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http => "http",
        }
    }
}

/// An API call was answered. `method` is a name from the code, never a path from the caller.
pub fn api_request(protocol: Protocol, method: &'static str, code: &'static str, took: Duration) {
    let protocol = protocol.name();
    histogram!(API_REQUEST_SECONDS, "protocol" => protocol, "method" => method).record(took);
    counter!(API_REQUESTS_TOTAL, "protocol" => protocol, "method" => method, "code" => code).increment(1);
}

/// A call was shed, or cut by its deadline; it is in no other figure.
pub fn api_refused(protocol: Protocol, reason: &'static str) {
    counter!(API_REFUSED_TOTAL, "protocol" => protocol.name(), "reason" => reason).increment(1);
}

/// Counts an open stream until it is dropped.
#[derive(Debug)]
pub struct OpenStream(());

impl OpenStream {
    /// A stream was opened.
    #[must_use]
    pub fn begin() -> Self {
        gauge!(API_STREAMS).increment(1.0);
        Self(())
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        gauge!(API_STREAMS).decrement(1.0);
    }
}

/// How many numbers wait at the gate, how many are opening, and how many a second may.
pub fn gate(waiting: usize, opening: usize, rate: f64) {
    gauge!(GATE_WAITING).set(waiting as f64);
    gauge!(GATE_OPENING).set(opening as f64);
    gauge!(GATE_RATE).set(rate);
}

/// Whether the gate works in the way of that name.
pub fn gate_mode(mode: &'static str, is_present: bool) {
    gauge!(GATE_MODE, "mode" => mode).set(f64::from(u8::from(is_present)));
}

/// A canary failed.
pub fn gate_canary_failed() {
    counter!(GATE_CANARIES_FAILED_TOTAL).increment(1);
}

/// The fleet was released.
pub fn gate_released() {
    counter!(GATE_RELEASES_TOTAL).increment(1);
}

/// The gate let a number through.
pub fn gate_grant() {
    counter!(GATE_GRANTS_TOTAL).increment(1);
}

/// How many proxies are down, and how many numbers wait for that.
pub fn proxies(down: usize, waiting: usize) {
    gauge!(PROXIES_DOWN).set(down as f64);
    gauge!(PROXY_WAITING).set(waiting as f64);
}

/// Whether the version of WhatsApp Web comes from there.
pub fn client_version_source(source: &'static str, is_present: bool) {
    gauge!(CLIENT_VERSION_SOURCE, "source" => source).set(f64::from(u8::from(is_present)));
}

/// When the version of WhatsApp Web was last looked up with success, in seconds since 1970; 0: never.
pub fn client_version_found(at: u64) {
    gauge!(CLIENT_VERSION_FOUND).set(at as f64);
}

/// A connection ended; `reason` is `CloseReason::code`.
pub fn connection_closed(reason: &'static str) {
    counter!(CONNECTIONS_CLOSED_TOTAL, "reason" => reason).increment(1);
}

/// Why an actor was restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartCause {
    /// It panicked.
    Panic,
    /// It returned an error.
    Error,
    /// It did not answer the watchdog.
    Hang,
}

/// An actor was restarted.
pub fn restarted(cause: RestartCause) {
    let cause = match cause {
        RestartCause::Panic => "panic",
        RestartCause::Error => "error",
        RestartCause::Hang => "hang",
    };
    counter!(RESTARTS_TOTAL, "cause" => cause).increment(1);
}

/// A number crashed too often.
pub fn quarantined() {
    counter!(QUARANTINES_TOTAL).increment(1);
}

/// A stream was ended because its client did not read.
pub fn slow_stream() {
    counter!(API_SLOW_STREAMS_TOTAL).increment(1);
}

/// Rows were kept long enough.
pub fn swept_rows(count: u64) {
    counter!(SWEPT_ROWS_TOTAL).increment(count);
}

/// The system's clock is followed, or not.
pub fn clock_trusted(trusted: bool) {
    gauge!(CLOCK_TRUSTED).set(if trusted { 1.0 } else { 0.0 });
}

/// Nothing is left of a contact.
pub fn contact_erased() {
    counter!(CONTACTS_ERASED_TOTAL).increment(1);
}

/// A number went through everything it may forget.
pub fn sweep_passed() {
    counter!(SWEEP_PASSES_TOTAL).increment(1);
}

/// A message went over the wire again under the same id.
pub fn resent() {
    counter!(RESENT_TOTAL).increment(1);
}

/// A number's old socket did not go away in time.
pub fn slot_timeout() {
    counter!(SLOT_TIMEOUTS_TOTAL).increment(1);
}

/// A thread panicked.
pub fn panicked() {
    counter!(PANICS_TOTAL).increment(1);
}

/// Figures of one volume. Totals are absolute: pass what was counted since the start.
#[derive(Debug, Clone, Copy)]
pub struct VolumeFigures {
    /// Units waiting.
    pub queued: u64,
    /// Groups written.
    pub groups: u64,
    /// Units written.
    pub units: u64,
    /// Time in flush and fdatasync.
    pub sync: Duration,
    /// Whether it works.
    pub open: bool,
    /// Failures of its disk.
    pub failures: u64,
    /// How often it was opened again.
    pub reopened: u64,
    /// What its files take.
    pub disk_bytes: u64,
}

/// Shows a volume's figures; call it before a render. There are as many volumes as the store has.
pub fn volume(volume: &str, figures: VolumeFigures) {
    gauge!(COMMITTER_QUEUED, "volume" => volume.to_owned()).set(figures.queued as f64);
    counter!(COMMITTER_GROUPS_TOTAL, "volume" => volume.to_owned()).absolute(figures.groups);
    counter!(COMMITTER_UNITS_TOTAL, "volume" => volume.to_owned()).absolute(figures.units);
    gauge!(COMMITTER_SYNC_SECONDS, "volume" => volume.to_owned()).set(figures.sync.as_secs_f64());
    gauge!(STORE_OPEN, "volume" => volume.to_owned()).set(f64::from(u8::from(figures.open)));
    counter!(STORE_FAILURES_TOTAL, "volume" => volume.to_owned()).absolute(figures.failures);
    counter!(STORE_REOPENED_TOTAL, "volume" => volume.to_owned()).absolute(figures.reopened);
    gauge!(STORE_DISK_BYTES, "volume" => volume.to_owned()).set(figures.disk_bytes as f64);
}

/// Room on the file system of the data directory, in bytes, and whether new sends are refused for it.
pub fn room(free: u64, total: u64, low: bool) {
    gauge!(STORE_FREE_BYTES).set(free as f64);
    let used = if total == 0 { 0.0 } else { 1.0 - free as f64 / total as f64 };
    gauge!(STORE_USED_RATIO).set(used);
    gauge!(STORE_LOW_SPACE).set(f64::from(u8::from(low)));
}

/// How many volumes failed or did not open.
pub fn volumes_failed(count: usize) {
    gauge!(VOLUMES_FAILED).set(count as f64);
}

/// How many deleted numbers still have records on disk.
pub fn erasures_waiting(count: usize) {
    gauge!(ERASURES_WAITING).set(count as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_histogram_has_buckets_and_every_family_its_help() {
        let exposition = Exposition::install().unwrap();
        accepted(Duration::from_millis(3));
        acknowledged(Duration::from_millis(300));
        inbound_durable(Duration::from_millis(4));
        webhook_attempt("delivered", Duration::from_millis(20));
        api_request(Protocol::Grpc, "SendMessage", "OK", Duration::from_millis(2));
        let sync = Duration::from_millis(1_500);
        let figures =
            VolumeFigures { queued: 1, groups: 2, units: 3, sync, open: true, failures: 0, reopened: 0, disk_bytes: 9 };
        volume("volume-00", figures);
        room(25, 100, true);
        exposition.upkeep();
        let text = Exposition::install().unwrap().render();
        assert!(!text.contains(" summary"), "a summary: {text}");
        for expected in [
            "# HELP switchboard_accept_seconds ",
            "# TYPE switchboard_accept_seconds histogram",
            "switchboard_accept_seconds_bucket{le=\"0.005\"} 1",
            "switchboard_webhook_attempts_total{outcome=\"delivered\"} 1",
            "switchboard_committer_sync_seconds{volume=\"volume-00\"} 1.5",
            "switchboard_store_used_ratio 0.75",
            "switchboard_build_info{",
        ] {
            assert!(text.contains(expected), "{expected} not in {text}");
        }
    }
}
