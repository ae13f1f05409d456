//! The only folder that knows WhatsApp. A session is one connection of one number: commands in, events out.
//! `link` speaks the linked-device protocol; every kind of session gives the same [`SessionEvent`]s.

pub mod contract;
pub mod link;
pub mod opener;
