//! Named places at which a test kills the process: around every write that must be durable and before every word that
//! leaves it; and a disk that fails to sync. They exist only in builds with the feature `sandbox`; in any other, reaching
//! one is nothing at all.

use std::io;
use std::path::Path;

#[cfg(feature = "sandbox")]
pub use armed::{ArmError, arm, names};

/// Whether this build can be killed at a failpoint.
pub const COMPILED_IN: bool = cfg!(feature = "sandbox");

macro_rules! points {
    ($($(#[$doc:meta])* $point:ident $name:literal,)*) => {
        /// A place. Each is written once in the code; `tests/tidy.rs` looks.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Failpoint {
            $($(#[$doc])* $point,)*
        }

        #[cfg(feature = "sandbox")]
        impl Failpoint {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$point),*];

            /// The name it is armed by.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$point => $name),* }
            }
        }
    };
}

points! {
    /// A send was asked for; nothing of it is written.
    AcceptAsked "accept-asked",
    /// A send is about to be handed to the store.
    AcceptBeforeDurable "accept-before-durable",
    /// A send is on disk; nobody knows.
    AcceptAfterDurable "accept-after-durable",
    /// The caller is about to be told.
    AcceptBeforeReply "accept-before-reply",
    /// The caller was told.
    AcceptAfterReply "accept-after-reply",
    /// An attempt was counted and is about to be handed to the store.
    ClaimBeforeDurable "claim-before-durable",
    /// The attempt is on disk and not on the wire.
    ClaimAfterDurable "claim-after-durable",
    /// A message is about to be handed to the library.
    WireBefore "wire-before",
    /// The library handed it to the socket.
    WireAfter "wire-after",
    /// WhatsApp's answer arrived.
    AckReceived "ack-received",
    /// What it settles is about to be handed to the store.
    SettleBeforeDurable "settle-before-durable",
    /// It is settled on disk; nobody knows.
    SettleAfterDurable "settle-after-durable",
    /// A receipt's rung is about to be handed to the store.
    StatusBeforeDurable "status-before-durable",
    /// The rung is on disk.
    StatusAfterDurable "status-after-durable",
    /// A decrypted message is about to be buffered, before the ratchet that opened it is saved.
    PendingBefore "pending-before",
    /// It is buffered.
    PendingAfter "pending-after",
    /// The library asks to make received messages durable.
    InboundAsked "inbound-asked",
    /// Received messages are about to be handed to the store.
    InboundBeforeDurable "inbound-before-durable",
    /// They are on disk; the library does not know.
    InboundAfterDurable "inbound-after-durable",
    /// The library is about to be told, and will then acknowledge.
    InboundBeforeReturn "inbound-before-return",
    /// A device asks for a message again; nothing of it is written.
    RepeatAsked "repeat-asked",
    /// That is on disk; the message is not on the wire yet.
    RepeatNoted "repeat-noted",
    /// A later life is about to send the message again.
    RepeatBeforeWire "repeat-before-wire",
    /// The buffered copies of acknowledged messages are about to go.
    PendingGone "pending-gone",
    /// A webhook is about to be posted.
    WebhookBeforeRequest "webhook-before-request",
    /// The receiver answered; nothing of it is written.
    WebhookAfterAnswer "webhook-after-answer",
    /// The delivered row is about to be removed.
    WebhookBeforeRemoval "webhook-before-removal",
    /// It was removed.
    WebhookAfterRemoval "webhook-after-removal",
    /// The device row (at linking: the credentials) is about to be written.
    DeviceBeforeDurable "device-before-durable",
    /// It is on disk.
    DeviceAfterDurable "device-after-durable",
    /// The number is about to hear that it is linked.
    PairedBeforeTold "paired-before-told",
    /// Signal sessions, and with them the lease on message keys, are about to be written.
    LeaseBeforeDurable "lease-before-durable",
    /// They are on disk; what they seal is not on the wire.
    LeaseAfterDurable "lease-after-durable",
    /// A state of the connection is about to be handed to the store.
    LifeBeforeDurable "life-before-durable",
    /// It was written.
    LifeAfterDurable "life-after-durable",
    /// A group of units is about to be applied to the database.
    GroupBeforeApply "group-before-apply",
    /// It is applied, in memory only.
    GroupAfterApply "group-after-apply",
    /// It is in the file, not synced.
    GroupAfterFlush "group-after-flush",
    /// It is synced; nobody was answered.
    GroupAfterSync "group-after-sync",
    /// The drain has begun.
    DrainBegun "drain-begun",
    /// Numbers and listeners are down, the store is open.
    DrainBeforeClose "drain-before-close",
    /// The store is closed.
    DrainAfterClose "drain-after-close",
}

/// Kills the process here, if it was armed for this place and this is the time.
#[inline]
pub fn reach(point: Failpoint) {
    #[cfg(feature = "sandbox")]
    armed::reach(point);
    #[cfg(not(feature = "sandbox"))]
    let _ = point;
}

/// While a file of this name lies in the directory of a Db, the disk fails to sync that Db.
#[cfg(feature = "sandbox")]
pub const SYNC_FAULT_FILE: &str = "sync-fails";

/// A sync of the Db in `dir` is about to be asked for: fails where a test wants the disk to be broken.
///
/// # Errors
/// `EIO`.
pub fn reach_sync(dir: &Path) -> io::Result<()> {
    #[cfg(feature = "sandbox")]
    if dir.join(SYNC_FAULT_FILE).exists() {
        return Err(io::Error::from_raw_os_error(5));
    }
    #[cfg(not(feature = "sandbox"))]
    let _ = dir;
    Ok(())
}

#[cfg(feature = "sandbox")]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::Failpoint;

    struct Armed {
        point: Failpoint,
        left: AtomicU32,
    }

    static ARMED: OnceLock<Armed> = OnceLock::new();

    /// The order is not a failpoint.
    #[derive(Debug, PartialEq, Eq, thiserror::Error)]
    #[error("not a failpoint: {0:?}; give NAME or NAME:NTH, a name of `switchboard failpoints` and a count from 1")]
    pub struct ArmError(String);

    /// Every name, in the order of a message's life.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Failpoint::ALL.iter().map(|point| point.name())
    }

    pub(super) fn parse(order: &str) -> Result<(Failpoint, u32), ArmError> {
        let (name, nth) = order.split_once(':').unwrap_or((order, "1"));
        let point = Failpoint::ALL.iter().copied().find(|point| point.name() == name);
        match (point, nth.parse()) {
            (Some(point), Ok(nth @ 1..)) => Ok((point, nth)),
            _ => Err(ArmError(order.to_owned())),
        }
    }

    /// Arms one place for the rest of the process: `name`, or `name:nth` to live through the first times.
    ///
    /// # Errors
    /// When there is no such place, or the count is none.
    pub fn arm(order: &str) -> Result<(), ArmError> {
        let (point, nth) = parse(order)?;
        let _ = ARMED.set(Armed { point, left: AtomicU32::new(nth) });
        Ok(())
    }

    pub(super) fn reach(point: Failpoint) {
        let Some(armed) = ARMED.get() else { return };
        if armed.point == point && armed.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            // As hard as a SIGKILL from outside: nothing unwinds and nothing is flushed.
            std::process::abort();
        }
    }
}

#[cfg(all(test, feature = "sandbox"))]
mod tests {
    use super::*;

    #[test]
    fn an_order_names_a_place_and_a_time() {
        assert_eq!(armed::parse("wire-after"), Ok((Failpoint::WireAfter, 1)));
        assert_eq!(armed::parse("wire-after:7"), Ok((Failpoint::WireAfter, 7)));
        for wrong in ["", "wire", "wire-after:0", "wire-after:", "wire-after:x", ":1"] {
            assert!(armed::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn no_name_stands_for_two_places() {
        let mut all: Vec<_> = names().collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), Failpoint::ALL.len());
    }
}
