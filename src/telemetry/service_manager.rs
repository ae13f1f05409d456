//! What the service manager is told, if one started us and listens: systemd's notify protocol. Without one nothing happens.

use std::time::Duration;

use sd_notify::NotifyState;

fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

/// The API answers.
pub fn ready() {
    tell(NotifyState::Ready);
}

/// The drain has begun.
pub fn stopping() {
    tell(NotifyState::Stopping);
}

/// Everything still answers.
pub fn alive() {
    tell(NotifyState::Watchdog);
}

/// How often it must be told so, if it wants to: three times within its patience.
#[must_use]
pub fn alive_every() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|patience| patience / 3)
}
