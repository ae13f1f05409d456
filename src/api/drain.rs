//! The announcement that the daemon goes down: said once, heard by every stream and listener.

use tokio::sync::watch;

/// Announces the drain.
#[derive(Debug)]
pub struct DrainTrigger(watch::Sender<bool>);

/// Hears of the drain.
#[derive(Debug, Clone)]
pub struct Drain(watch::Receiver<bool>);

/// The two ends.
#[must_use]
pub fn channel() -> (DrainTrigger, Drain) {
    let (sender, receiver) = watch::channel(false);
    (DrainTrigger(sender), Drain(receiver))
}

impl DrainTrigger {
    /// Announces it; saying it twice changes nothing.
    pub fn begin(&self) {
        self.0.send_replace(true);
    }
}

impl Drain {
    /// Whether it was announced.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when it is announced, or when nobody is left to announce it.
    pub async fn begun(&mut self) {
        let _ = self.0.wait_for(|begun| *begun).await;
    }
}
