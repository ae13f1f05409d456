//! Switchboard keeps whole fleets of WhatsApp numbers connected.
#[cfg(feature = "sandbox")]
pub mod sandbox;
