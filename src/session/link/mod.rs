//! Linked devices: one session is one connection of one number, driven through whatsapp-rust over our own
//! transport, storage, HTTP client and runtime. The library's types never leave this folder.

mod backend;

pub use self::backend::{forget_device, is_linked, provision};
