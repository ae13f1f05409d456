//! Randomness for the shells: keys, ids, jitter. One source per process, of cryptographic quality; tests seed it, so
//! that a failure can be run again.

use std::sync::{Mutex, PoisonError};

use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

/// A shared source of randomness.
pub struct Random(Mutex<StdRng>);

impl std::fmt::Debug for Random {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Random")
    }
}

/// The operating system gave no randomness; nothing secret may be made.
#[derive(Debug, thiserror::Error)]
#[error("the system's source of randomness failed: {0}")]
pub struct NoEntropy(String);

impl Random {
    /// Seeded by the operating system.
    ///
    /// # Errors
    /// When the system has no entropy to give.
    pub fn from_system() -> Result<Self, NoEntropy> {
        StdRng::try_from_rng(&mut rand::rngs::SysRng)
            .map(|rng| Self(Mutex::new(rng)))
            .map_err(|error| NoEntropy(error.to_string()))
    }

    /// The same sequence for the same seed. For tests and simulations only: keys made from it can be guessed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self(Mutex::new(StdRng::seed_from_u64(seed)))
    }

    /// Random bytes.
    #[must_use]
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.with(|rng| rng.fill_bytes(&mut bytes));
        bytes
    }

    /// A uniform number of 64 bits.
    #[must_use]
    pub fn word(&self) -> u64 {
        self.with(StdRng::next_u64)
    }

    /// Uniform in 0..1.
    #[must_use]
    pub fn share(&self) -> f64 {
        self.with(|rng| rng.random::<f64>())
    }

    fn with<T>(&self, draw: impl FnOnce(&mut StdRng) -> T) -> T {
        draw(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_the_system_does_not() {
        assert_eq!(Random::seeded(7).bytes::<16>(), Random::seeded(7).bytes::<16>());
        assert_ne!(Random::from_system().unwrap().bytes::<16>(), Random::from_system().unwrap().bytes::<16>());
        let random = Random::seeded(1);
        assert!((0..1_000).all(|_| (0.0..1.0).contains(&random.share())));
    }
}
