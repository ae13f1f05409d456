//! Who is let in: the payload of a finished handshake becomes a device that may show a QR code, a logged-in device, or
//! a refusal.

use crate::sandbox::account::Registration;
use crate::sandbox::address::{DeviceAddress, Namespace, PhoneNumber};
use crate::sandbox::error::{Result, SandboxError};
use crate::sandbox::faults::LoginFailure;
use crate::sandbox::handshake::Established;
use crate::sandbox::link::{Farewell, Link};
use crate::sandbox::pairing::Offer;
use crate::sandbox::stanza::{self, tag};
use crate::sandbox::stats::Presence;
use crate::sandbox::world::World;
use std::sync::Arc;
use std::time::Duration;
use whatsapp_rust::buffa::Message as _;
use whatsapp_rust::wacore_binary::Node;
use whatsapp_rust::waproto::whatsapp::ClientPayload;

/// A device that reconnects gets this long to see its old socket closed before it counts as a conflict.
const GRACE_FOR_OLD_SOCKET: Duration = Duration::from_millis(100);
const UNAUTHORISED: u16 = 401;
const OUTDATED: u16 = 405;

/// The outcome of a handshake.
pub enum Admission {
    /// Shows QR codes.
    Unlinked(Box<Offer>, Node),
    /// Logged in.
    Device(Box<Session>, Node),
    /// Sent away.
    Refused(Node),
}

/// A logged-in device.
pub struct Session {
    /// Which.
    pub device: DeviceAddress,
    /// How far its backlog has been written.
    pub progress: Progress,
    world: Arc<World>,
    link: Arc<Link>,
    _presence: Presence,
}

/// How far the backlog has been written to this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The device has not said that it is ready.
    Passive,
    /// What had arrived before it was ready is being written.
    Draining {
        /// Next to be written.
        next: u64,
        /// First that belongs to the present.
        end: u64,
        /// Written so far.
        written: usize,
    },
    /// Everything is written as it arrives.
    Live {
        /// Next to be written.
        next: u64,
    },
}

impl Drop for Session {
    fn drop(&mut self) {
        self.link.mark_gone();
        let own = Arc::clone(&self.link);
        self.world.change_companion(&self.device, |companion| {
            if companion.link.as_ref().is_some_and(|link| Arc::ptr_eq(link, &own)) {
                companion.link = None;
            }
        });
    }
}

/// Decides about a client whose handshake is done.
pub async fn admit(world: &Arc<World>, link: &Arc<Link>, by_ik: bool, client: &Established) -> Result<Admission> {
    let payload = ClientPayload::decode_from_slice(&client.payload)?;
    let Some(username) = payload.username else {
        let data =
            payload.device_pairing_data.as_option().ok_or(SandboxError::Malformed("payload without a purpose"))?;
        let registration = Registration::read(data, client.client_static);
        let registration = registration.ok_or(SandboxError::Malformed("registration data"))?;
        let (offer, query) = Offer::open(world, Arc::clone(link), registration)?;
        return Ok(Admission::Unlinked(Box::new(offer), query));
    };
    let phone = PhoneNumber::parse(&username.to_string()).ok_or(SandboxError::Malformed("user name"))?;
    let device = u16::try_from(payload.device.unwrap_or(0)).map_err(|_| SandboxError::Malformed("device"))?;
    let device = DeviceAddress::new(phone, device);
    if let Some(ordered) = world.faults.login_failure(&device.phone) {
        world.stats.logins_refused.add(1);
        return Ok(Admission::Refused(failure(&ordered)));
    }
    if world.faults.is_outdated(&device.phone, version_of(&payload)) {
        world.stats.logins_refused.add(1);
        return Ok(Admission::Refused(failure(&LoginFailure { reason: OUTDATED, ..unauthorised() })));
    }
    let known = world.with_companion(&device, |companion| companion.noise == client.client_static);
    if known != Some(true) {
        world.stats.logins_refused.add(1);
        return Ok(Admission::Refused(failure(&unauthorised())));
    }
    world.stats.logins_by_ik.add(u64::from(by_ik));
    Ok(log_in(world, link, device).await)
}

async fn log_in(world: &Arc<World>, link: &Arc<Link>, device: DeviceAddress) -> Admission {
    let older = world.with_companion(&device, |companion| companion.link.clone()).flatten();
    if let Some(older) = older {
        // Running out of patience is the answer: the old socket is still there.
        let _ = tokio::time::timeout(GRACE_FOR_OLD_SOCKET, older.until_gone()).await;
    }
    let taken = world.change_companion(&device, |companion| {
        (companion.link.replace(Arc::clone(link)), std::mem::take(&mut companion.wants_keys))
    });
    let Some((older, wants_keys)) = taken else {
        return Admission::Refused(failure(&unauthorised()));
    };
    if let Some(older) = older.filter(|older| !older.is_gone()) {
        world.stats.conflicts.add(1);
        older.end(Farewell::Stanza(Box::new(conflict("replaced"))));
    }
    world.stats.logins.add(1);
    if wants_keys {
        world.deliver(world.share_keys(&device));
    }
    let session = Session {
        progress: Progress::Passive,
        world: Arc::clone(world),
        link: Arc::clone(link),
        _presence: world.stats.arrived(&device),
        device,
    };
    let success = tag("success")
        .attr("t", stanza::now())
        .attr("props", 27)
        .attr("lid", Namespace::Hidden.device(&session.device))
        .attr("location", "sbx")
        .build();
    Admission::Device(Box::new(session), success)
}

/// The version of WhatsApp Web that a client says it is.
fn version_of(payload: &ClientPayload) -> [u32; 3] {
    let version = payload.user_agent.as_option().and_then(|agent| agent.app_version.as_option());
    version
        .map_or([0; 3], |version| [version.primary, version.secondary, version.tertiary].map(Option::unwrap_or_default))
}

fn unauthorised() -> LoginFailure {
    LoginFailure { reason: UNAUTHORISED, code: None, expire: None, count: 0 }
}

/// The stanza that refuses a login.
pub fn failure(failure: &LoginFailure) -> Node {
    let mut node = tag("failure").attr("reason", failure.reason).attr("location", "sbx");
    if let Some(code) = failure.code {
        node = node.attr("code", code);
    }
    if let Some(expire) = failure.expire {
        node = node.attr("expire", expire);
    }
    node.build()
}

/// The stanza that ends a stream over a conflict.
pub fn conflict(kind: &str) -> Node {
    tag("stream:error").children([tag("conflict").attr("type", kind).build()]).build()
}
