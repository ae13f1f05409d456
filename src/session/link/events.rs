//! The library's events. Its handlers run synchronously on whichever task dispatches, and a panic in one kills
//! that task for good, so this only records, queues without waiting, and catches.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use whatsapp_rust::Client;
use whatsapp_rust::types::events::{
    Disconnected, Event, EventHandler, EventInterest, EventKind, PairSuccess, Receipt, ServerAck, Subscription,
};
use whatsapp_rust::types::presence::ReceiptType;
use whatsapp_rust::wacore::net::DisconnectReason;
use whatsapp_rust::wacore_binary::NodeRef;

use super::contact::contact_of;
use super::inbound::placeholder;
use super::passkey;
use super::repeats::asked_by;
use super::signals::{PairedAs, Queued, RawReceipt, Signals};
use super::stanza::{self, Certainty};
use crate::domain::close::CloseReason;
use crate::domain::lifecycle::LinkBy;
use crate::domain::time::Timestamp;
use crate::domain::trouble::Trouble;
use crate::session::contract::{ReceiptKind, SessionEvent};
use crate::telemetry::clock::Clock;

/// Exactly what is read below: an event nobody subscribes to is not even built.
const INTEREST: [EventKind; 17] = [
    EventKind::RawNode,
    EventKind::Connected,
    EventKind::Disconnected,
    EventKind::PairingQrCode,
    EventKind::PairingQrCodesExhausted,
    EventKind::PairingCodeRefresh,
    EventKind::PairSuccess,
    EventKind::PairError,
    EventKind::PairPasskeyRequest,
    EventKind::PairPasskeyConfirmation,
    EventKind::PairPasskeyError,
    EventKind::QrScannedWithoutMultidevice,
    EventKind::ServerAck,
    EventKind::Receipt,
    EventKind::UndecryptableMessage,
    EventKind::Messages,
    EventKind::AppStateSyncFailed,
];

struct Handler {
    signals: Arc<Signals>,
    clock: Arc<dyn Clock>,
}

/// Subscribes before the first connection; dropping the result unsubscribes.
pub(super) fn subscribe(client: &Arc<Client>, signals: Arc<Signals>, clock: Arc<dyn Clock>) -> Subscription {
    client.subscribe(EventInterest::of(&INTEREST), Arc::new(Handler { signals, clock }))
}

impl EventHandler for Handler {
    fn handle_event(&self, event: Arc<Event>) {
        if catch_unwind(AssertUnwindSafe(|| self.handle(&event))).is_err() {
            self.signals.end(CloseReason::Crashed);
        }
    }
}

impl Handler {
    fn handle(&self, event: &Event) {
        if matches!(event, Event::PairingQrCode(_)) {
            self.signals.rotates_codes(tokio::task::try_id());
        }
        match event {
            Event::RawNode(node) => {
                self.signals.backlog.hear(node);
                self.stanza(node.get());
            }
            Event::Connected(_) => self.signals.connected(),
            Event::Disconnected(disconnected) => self.disconnected(disconnected),
            // The phone is past codes.
            Event::PairingQrCode(_) | Event::PairingCodeRefresh(_) if self.signals.passkey_until().is_some() => {}
            // The server is ready to link: the first one says so to whoever wants a code as well.
            Event::PairingQrCode(_) if self.signals.link_by == LinkBy::PairingCode => self.signals.want_first_code(),
            Event::PairingCodeRefresh(_) => self.signals.want_code(),
            Event::PairingQrCode(qr) => {
                self.signals.tell(SessionEvent::QrCode { code: qr.code.clone(), valid_for: qr.timeout });
            }
            Event::PairingQrCodesExhausted(_) => self.signals.end(CloseReason::PairingEnded),
            Event::PairSuccess(success) => self.paired(success),
            Event::PairError(_) => self.refuse("BAD_SIGNATURE"),
            Event::PairPasskeyRequest(request) => passkey::requested(&self.signals, request),
            Event::PairPasskeyConfirmation(confirmation) => passkey::compare(&self.signals, confirmation),
            Event::PairPasskeyError(error) => passkey::failed(&self.signals, error),
            Event::QrScannedWithoutMultidevice(_) => self.refuse("PHONE_TOO_OLD"),
            Event::ServerAck(ack) => self.acked(ack),
            Event::Receipt(receipt) => self.receipt(receipt),
            Event::UndecryptableMessage(message) => {
                if let Some(placeholder) = placeholder(message) {
                    self.signals.push(Queued::Placeholder(Box::new(placeholder)));
                }
            }
            Event::AppStateSyncFailed(failed) if !failed.fatal.is_empty() => {
                tracing::warn!(collections = failed.fatal.len(), "the account's settings are refused");
                self.signals.trouble(Trouble::AppStateRefused);
            }
            Event::Messages(batch) if !batch.hook_committed => {
                // Newsletters come this way too; they are dropped as not being a chat between two people.
                for message in batch.messages.iter() {
                    self.signals.push_recovered(message.clone());
                }
            }
            _ => {}
        }
    }

    fn refuse(&self, code: &str) {
        self.signals.seal();
        self.signals.end(CloseReason::PairingRefused { code: code.to_owned() });
    }

    /// Runs before the library looks at the stanza.
    fn stanza(&self, node: &NodeRef<'_>) {
        self.signals.hear();
        if stanza::is_answer(node) {
            self.signals.answered();
        } else if let Some(asked) = asked_by(node) {
            self.signals.push_asked(asked);
        } else if let Some((certainty, reason)) = stanza::ending(node, self.clock.now()) {
            self.signals.note(certainty, reason);
        } else if let Some(at) = stanza::server_time(node) {
            self.signals.tell(SessionEvent::ServerTime(at));
        } else if let Some(phone) = stanza::scanned_by(node) {
            // Refused before the library accepts: sealed, its reply cannot leave, and the phone shows a failure.
            if phone.is_some() && phone == self.signals.expected {
                self.signals.answer_pairing();
            } else {
                self.refuse("WRONG_NUMBER");
            }
        }
    }

    fn disconnected(&self, event: &Disconnected) {
        let reason = match &event.reason {
            clean @ DisconnectReason::ServerClose { .. } if clean.is_clean_shutdown() => CloseReason::Recycled,
            _ => CloseReason::ConnectionLost,
        };
        // What the server said last explains it better than that it closed.
        let reason = self.signals.ending(Certainty::Maybe).unwrap_or(reason);
        self.signals.note(Certainty::Ending, reason);
    }

    fn paired(&self, success: &PairSuccess) {
        let contact = contact_of([&success.id, &success.lid]);
        let Some(phone) = contact.as_ref().and_then(|contact| contact.phone.clone()) else {
            return self.refuse("NO_PHONE");
        };
        let lid = contact.and_then(|contact| contact.lid);
        self.signals.pair(PairedAs { phone, lid });
    }

    fn acked(&self, ack: &ServerAck) {
        if ack.class.as_deref() != Some("message") {
            return;
        }
        let error = ack.error.as_ref().map(|error| error.parse().unwrap_or(0));
        self.signals.tell(SessionEvent::Acked { whatsapp_id: ack.id.clone(), error });
    }

    fn receipt(&self, receipt: &Receipt) {
        let source = &receipt.source;
        if opened_by_its_sender(&receipt.r#type) {
            let device = source.sender.to_string();
            for id in &receipt.message_ids {
                self.signals.confirmed(&device, id);
            }
        }
        let Some(kind) = receipt_kind(&receipt.r#type) else {
            return;
        };
        if source.is_group || source.is_from_me {
            return;
        }
        self.signals.push_receipt(RawReceipt {
            whatsapp_ids: receipt.message_ids.clone(),
            from: source.sender.clone(),
            also: source.sender_alt.clone(),
            kind,
            at: Timestamp(u64::try_from(receipt.timestamp.timestamp_millis()).unwrap_or(0)),
        });
    }
}

/// Whether a receipt says that the device which sent it could open the message.
fn opened_by_its_sender(kind: &ReceiptType) -> bool {
    matches!(kind, ReceiptType::Sender | ReceiptType::PeerMsg) || receipt_kind(kind).is_some()
}

/// The rung a receipt stands for; `None` for those that concern our own devices or the library.
fn receipt_kind(kind: &ReceiptType) -> Option<ReceiptKind> {
    match kind {
        ReceiptType::Delivered | ReceiptType::Inactive => Some(ReceiptKind::Delivered),
        ReceiptType::Read => Some(ReceiptKind::Read),
        ReceiptType::Played => Some(ReceiptKind::Played),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::phone::Phone;
    use crate::telemetry::clock::SystemClock;
    use tokio::sync::mpsc;
    use whatsapp_rust::NodeBuilder;
    use whatsapp_rust::wacore_binary::Node;

    fn handler(expected: &str) -> (Handler, Arc<Signals>, mpsc::Receiver<Queued>) {
        let (queue, entries) = mpsc::channel(8);
        let (late, _) = mpsc::channel(1);
        let signals = Signals::new(Phone::parse(expected).ok(), LinkBy::QrCode, queue, late);
        let handler = Handler { signals: signals.clone(), clock: Arc::new(SystemClock::new()) };
        (handler, signals, entries)
    }

    fn pair_success(jid: &str) -> Node {
        let device = NodeBuilder::new("device").attr("jid", jid).build();
        let success = NodeBuilder::new("pair-success").children([device]).build();
        NodeBuilder::new("iq").attr("type", "set").children([success]).build()
    }

    #[tokio::test]
    async fn another_phone_is_refused_before_it_is_answered() {
        let (handler, signals, _entries) = handler("5511999990001");
        handler.stanza(&pair_success("5511999990009@s.whatsapp.net").as_node_ref());
        assert!(signals.before_write().await.is_err());
        assert_eq!(
            signals.ending(Certainty::EndNow),
            Some(CloseReason::PairingRefused { code: "WRONG_NUMBER".to_owned() })
        );
    }

    #[tokio::test]
    async fn the_expected_phone_is_answered_only_with_durable_credentials() {
        let (handler, signals, _entries) = handler("5511999990001");
        assert!(signals.before_write().await.is_ok());
        handler.stanza(&pair_success("5511999990001:0@s.whatsapp.net").as_node_ref());
        assert_eq!(signals.ending(Certainty::Maybe), None);
        assert!(signals.before_write().await.is_err(), "there is nothing to make durable with");
    }

    #[tokio::test]
    async fn only_acks_of_messages_are_told() {
        let (handler, _signals, mut entries) = handler("5511999990001");
        let ack = |class: &str, error: Option<&str>| {
            ServerAck::builder()
                .id("3EB0".to_owned())
                .class(class.to_owned())
                .maybe_error(error.map(str::to_owned))
                .build()
        };
        handler.acked(&ack("receipt", None));
        handler.acked(&ack("message", Some("463")));
        match entries.try_recv().ok().and_then(Queued::event) {
            Some(SessionEvent::Acked { whatsapp_id, error }) => {
                assert_eq!((whatsapp_id.as_str(), error), ("3EB0", Some(463)));
            }
            _ => panic!("not an ack"),
        }
        assert!(entries.try_recv().is_err());
    }

    #[test]
    fn receipts_of_our_own_devices_do_not_count() {
        assert_eq!(receipt_kind(&ReceiptType::Inactive), Some(ReceiptKind::Delivered));
        assert_eq!(receipt_kind(&ReceiptType::Read), Some(ReceiptKind::Read));
        for kind in [
            ReceiptType::Sender,
            ReceiptType::ReadSelf,
            ReceiptType::PlayedSelf,
            ReceiptType::Retry,
            ReceiptType::Sent,
            ReceiptType::ServerError,
        ] {
            assert_eq!(receipt_kind(&kind), None);
        }
    }

    #[test]
    fn how_the_socket_ended_decides_between_routine_and_loss() {
        let ended = |reason: DisconnectReason| {
            let (handler, signals, _entries) = handler("5511999990001");
            handler.disconnected(&Disconnected::builder().reason(reason).build());
            signals.ending(Certainty::Ending)
        };
        let close = |code| DisconnectReason::ServerClose { code: Some(code), reason: String::new() };
        assert_eq!(ended(close(1000)), Some(CloseReason::Recycled));
        assert_eq!(ended(close(1011)), Some(CloseReason::ConnectionLost));
        assert_eq!(ended(DisconnectReason::StreamEnded), Some(CloseReason::ConnectionLost));
    }
}
