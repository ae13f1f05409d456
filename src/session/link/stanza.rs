//! Reads the few raw stanzas that the library tells less about than we need: why a stream ends, whose phone
//! scanned the code, and what proves that the server answers. Codes as in WhatsApp Web's `handleFailure` and
//! `StreamError` modules, by way of the library's source.

use std::time::Duration;

use whatsapp_rust::wacore_binary::NodeRef;

use crate::domain::close::CloseReason;
use crate::domain::phone::Phone;
use crate::domain::time::Timestamp;

/// How certain it is that the connection ends for a reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Certainty {
    /// Only if the connection ends without another answer from the server.
    Maybe,
    /// The library is ending it, or the server is.
    Ending,
    /// We have to end it.
    EndNow,
}

/// What a stanza says about the end of its connection.
pub(super) type Ending = (Certainty, CloseReason);

fn code(node: &NodeRef<'_>, key: &str) -> Option<u16> {
    let value = node.attrs().optional_u64(key)?;
    Some(u16::try_from(value).unwrap_or(u16::MAX))
}

/// WhatsApp's clock, where this stanza is the answer to a login.
pub(super) fn server_time(node: &NodeRef<'_>) -> Option<Timestamp> {
    let said = (node.tag.as_ref() == "success").then(|| node.get_attr("t"))??;
    let seconds: u64 = said.as_str().parse().ok()?;
    Some(Timestamp(seconds.checked_mul(1000)?))
}

/// Why the connection ends, if this stanza says so. `now` is when it arrived: bans carry a length, not an end.
pub(super) fn ending(node: &NodeRef<'_>, now: Timestamp) -> Option<Ending> {
    match node.tag.as_ref() {
        "failure" => Some((Certainty::Ending, failure(node, now))),
        "stream:error" => stream_error(node),
        "xmlstreamend" => Some((Certainty::Ending, CloseReason::Recycled)),
        _ => None,
    }
}

fn failure(node: &NodeRef<'_>, now: Timestamp) -> CloseReason {
    match code(node, "reason") {
        Some(401) => CloseReason::LoggedOut { code: 401 },
        Some(402) => CloseReason::TemporarilyBanned {
            code: code(node, "code").unwrap_or(0),
            until: node.attrs().optional_u64("expire").map(|seconds| now.after(Duration::from_secs(seconds))),
        },
        Some(403) => CloseReason::Locked,
        Some(405) => CloseReason::ClientOutdated,
        Some(406) => CloseReason::Banned,
        Some(429) => CloseReason::RateLimited,
        Some(code @ (500 | 503)) => CloseReason::ServerError { code },
        other => CloseReason::Refused { code: other.unwrap_or(0) },
    }
}

fn stream_error(node: &NodeRef<'_>) -> Option<Ending> {
    if let Some(conflict) = node.get_optional_child("conflict") {
        let replaced = conflict.get_attr("type").is_some_and(|kind| kind.as_str() == "replaced");
        let reason = if replaced { CloseReason::Replaced } else { CloseReason::LoggedOut { code: 401 } };
        return Some((Certainty::Ending, reason));
    }
    if node.get_optional_child("xml-not-well-formed").is_some() {
        return Some((Certainty::Ending, CloseReason::NotWellFormed));
    }
    if node.get_optional_child("ack").is_some() {
        return Some((Certainty::Ending, CloseReason::AckOwed));
    }
    let Some(code) = code(node, "code") else {
        return Some((Certainty::Maybe, CloseReason::StreamError { code: 0 }));
    };
    match code {
        515 => Some((Certainty::Ending, CloseReason::Recycled)),
        code @ (401 | 516) => Some((Certainty::Ending, CloseReason::LoggedOut { code })),
        409 => Some((Certainty::Ending, CloseReason::Replaced)),
        // The library stays on the socket after these two and refuses to send.
        429 => Some((Certainty::EndNow, CloseReason::RateLimited)),
        code @ (500 | 503) => Some((Certainty::EndNow, CloseReason::ServerError { code })),
        code => Some((Certainty::Maybe, CloseReason::StreamError { code })),
    }
}

/// The phone that scanned the code: the outer `Option` says whether the stanza is a pair-success at all.
pub(super) fn scanned_by(node: &NodeRef<'_>) -> Option<Option<Phone>> {
    if node.tag.as_ref() != "iq" {
        return None;
    }
    let success = node.get_optional_child("pair-success")?;
    let device = success.get_optional_child("device");
    let jid = device.and_then(|device| device.attrs().optional_jid("jid"));
    Some(jid.and_then(|jid| Phone::parse(&jid.user).ok()))
}

/// Whether the stanza answers a question of ours: proof that both directions work and that somebody thinks in between.
/// Acks are no proof: a server that only takes delivery gives them too.
pub(super) fn is_answer(node: &NodeRef<'_>) -> bool {
    let answers = |kind: &str| matches!(kind, "result" | "error");
    node.tag.as_ref() == "iq" && node.get_attr("type").is_some_and(|kind| answers(kind.as_str().as_ref()))
}

/// Whether the stanza carries a message.
pub(super) fn is_message(node: &NodeRef<'_>) -> bool {
    node.tag.as_ref() == "message"
}

/// Whether a message waited for this connection: only such a one may have come before.
pub(super) fn is_delivered_again(message: &NodeRef<'_>) -> bool {
    message.get_attr("offline").is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use whatsapp_rust::NodeBuilder;
    use whatsapp_rust::wacore_binary::Node;

    const NOW: Timestamp = Timestamp(1_000_000);

    fn read(node: &Node) -> Option<Ending> {
        ending(&node.as_node_ref(), NOW)
    }

    fn failure(reason: &str) -> CloseReason {
        let node = NodeBuilder::new("failure").attr("reason", reason).build();
        read(&node).unwrap().1
    }

    #[test]
    fn failures_after_login() {
        let table = [
            ("400", CloseReason::Refused { code: 400 }),
            ("401", CloseReason::LoggedOut { code: 401 }),
            ("403", CloseReason::Locked),
            ("405", CloseReason::ClientOutdated),
            ("406", CloseReason::Banned),
            ("409", CloseReason::Refused { code: 409 }),
            ("429", CloseReason::RateLimited),
            ("500", CloseReason::ServerError { code: 500 }),
            ("503", CloseReason::ServerError { code: 503 }),
            ("99999999", CloseReason::Refused { code: u16::MAX }),
        ];
        for (reason, expected) in table {
            assert_eq!(failure(reason), expected, "{reason}");
        }
        let bare = NodeBuilder::new("failure").build();
        assert_eq!(read(&bare).unwrap().1, CloseReason::Refused { code: 0 });
    }

    #[test]
    fn a_ban_ends_when_its_length_has_passed() {
        let node = NodeBuilder::new("failure").attr("reason", "402").attr("code", "101").attr("expire", "3600").build();
        let until = Some(Timestamp(NOW.0 + 3_600_000));
        assert_eq!(read(&node).unwrap().1, CloseReason::TemporarilyBanned { code: 101, until });
        let open_ended = CloseReason::TemporarilyBanned { code: 0, until: None };
        assert_eq!(failure("402"), open_ended);
    }

    #[test]
    fn stream_errors() {
        let coded = |code: &str| read(&NodeBuilder::new("stream:error").attr("code", code).build());
        assert_eq!(coded("515"), Some((Certainty::Ending, CloseReason::Recycled)));
        assert_eq!(coded("516"), Some((Certainty::Ending, CloseReason::LoggedOut { code: 516 })));
        assert_eq!(coded("409"), Some((Certainty::Ending, CloseReason::Replaced)));
        assert_eq!(coded("429"), Some((Certainty::EndNow, CloseReason::RateLimited)));
        assert_eq!(coded("503"), Some((Certainty::EndNow, CloseReason::ServerError { code: 503 })));
        assert_eq!(coded("777"), Some((Certainty::Maybe, CloseReason::StreamError { code: 777 })));
        let conflict = |kind: &str| {
            let child = NodeBuilder::new("conflict").attr("type", kind).build();
            read(&NodeBuilder::new("stream:error").children([child]).build()).unwrap().1
        };
        assert_eq!(conflict("replaced"), CloseReason::Replaced);
        assert_eq!(conflict("device_removed"), CloseReason::LoggedOut { code: 401 });
        let owed = NodeBuilder::new("stream:error").children([NodeBuilder::new("ack").attr("id", "1").build()]).build();
        assert_eq!(read(&owed), Some((Certainty::Ending, CloseReason::AckOwed)));
        let unknown = NodeBuilder::new("stream:error").children([NodeBuilder::new("something-new").build()]).build();
        assert_eq!(read(&unknown), Some((Certainty::Maybe, CloseReason::StreamError { code: 0 })));
    }

    #[test]
    fn pair_success_names_the_phone() {
        let device = NodeBuilder::new("device").attr("jid", "5511999990001:7@s.whatsapp.net").build();
        let success = NodeBuilder::new("pair-success").children([device]).build();
        let node = NodeBuilder::new("iq").children([success]).build();
        assert_eq!(scanned_by(&node.as_node_ref()), Some(Phone::parse("5511999990001").ok()));
        let nameless = NodeBuilder::new("iq").children([NodeBuilder::new("pair-success").build()]).build();
        assert_eq!(scanned_by(&nameless.as_node_ref()), Some(None));
        assert_eq!(scanned_by(&NodeBuilder::new("iq").build().as_node_ref()), None);
    }
}
