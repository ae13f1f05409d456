//! The promises of the seam, on the real store.

mod home;
mod sealing;
mod sweeping;
