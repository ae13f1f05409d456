//! The promises of the seam, on the real store.

mod conformance;
mod crashes;
mod damage;
mod growth;
mod home;
mod lying_disk;
mod sealing;
mod sweeping;
