//! Linked devices: one session is one connection of one number, driven through whatsapp-rust over our own
//! transport, storage, HTTP client and runtime. The library's types never leave this folder.

mod backend;
mod backlog;
mod barrier;
mod client;
mod contact;
mod content;
mod driver;
mod environment;
mod events;
mod http;
mod inbound;
mod lock;
mod passkey;
mod proxy;
mod pump;
mod repeats;
mod runtime;
mod send;
mod session;
mod signals;
mod stanza;
mod transport;
mod trust;
mod usage;
mod version;

pub use self::backend::{ProvisionError, forget_device, is_linked, provision};
pub use self::environment::{EnvironmentError, LinkConfig, LinkEnvironment};
pub use self::session::{LinkParams, Purpose, open};
pub use self::trust::is_sandbox_build;
pub use self::version::{ClientVersions, VersionCard};
