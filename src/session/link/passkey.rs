//! Linking that WhatsApp allows only with the account's passkey: the request is handed on to whoever links, their
//! browser's answer and their word that the codes agree go back. The library does the exchange in between.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use whatsapp_rust::Client;
use whatsapp_rust::passkey::{self, PasskeyError, build_webauthn_assertion_json, parse_request_options};
use whatsapp_rust::types::events::{PairPasskeyConfirmation, PairPasskeyError, PairPasskeyRequest};

use super::signals::Signals;
use crate::domain::close::CloseReason;
use crate::domain::passkey::Assertion;
use crate::session::contract::{PasskeyRefused, SessionEvent};

/// Longest wait for an answer of the person. WhatsApp has been seen to say ten minutes too.
const PERSON_WITHIN: Duration = Duration::from_mins(10);
/// From the person's proof to the code: a word of the phone, whose app may have to be opened.
const PHONE_WITHIN: Duration = Duration::from_mins(3);
/// Longest comparison of two codes.
const COMPARED_WITHIN: Duration = Duration::from_mins(5);
/// From that to the phone's consent.
const LINKED_WITHIN: Duration = Duration::from_mins(2);
/// WhatsApp's answers to the two questions of a step.
const TAKEN_WITHIN: Duration = Duration::from_secs(20);

type Reply = oneshot::Sender<Result<(), PasskeyRefused>>;

fn refused(code: &str) -> CloseReason {
    CloseReason::PairingRefused { code: code.to_owned() }
}

/// Why a linking ends in which a person, or the phone, took too long.
pub(super) fn too_late() -> CloseReason {
    refused("PASSKEY_TIMED_OUT")
}

/// WhatsApp asks for the passkey. What no browser could read is not shown to anybody.
pub(super) fn requested(signals: &Signals, request: &PairPasskeyRequest) {
    if !signals.is_linking() {
        return;
    }
    let Ok(options) = parse_request_options(&request.request_options_json) else {
        return signals.end(refused("PASSKEY_REQUEST_FAILED"));
    };
    let valid_for = options.timeout_ms.map_or(PERSON_WITHIN, Duration::from_millis).min(PERSON_WITHIN);
    signals.await_passkey(valid_for);
    let options = request.request_options_json.clone();
    signals.tell(SessionEvent::PasskeyRequest { options, valid_for });
}

/// Both sides have a code to compare.
pub(super) fn compare(signals: &Signals, confirmation: &PairPasskeyConfirmation) {
    if !signals.is_linking() {
        return;
    }
    signals.await_passkey(COMPARED_WITHIN);
    signals.tell(SessionEvent::PasskeyCode { code: confirmation.code.clone(), valid_for: COMPARED_WITHIN });
}

/// The library could not go on.
pub(super) fn failed(signals: &Signals, error: &PairPasskeyError) {
    if signals.is_linking() {
        let code = if error.continuation { "PASSKEY_EXCHANGE_FAILED" } else { "PASSKEY_REQUEST_FAILED" };
        signals.end(refused(code));
    }
}

/// Gives WhatsApp the person's proof.
pub(super) async fn answer(client: Arc<Client>, signals: Arc<Signals>, assertion: Assertion, reply: Reply) {
    let Assertion { credential_id, client_data, authenticator_data, signature, user_handle } = assertion;
    let assertion_json = build_webauthn_assertion_json(
        &credential_id,
        &client_data,
        &authenticator_data,
        &signature,
        user_handle.as_deref(),
    );
    // Before the call: the code may be there when it returns.
    signals.await_passkey(PHONE_WITHIN);
    let sent = client.send_passkey_response(passkey::Assertion { assertion_json, credential_id });
    let taken = timeout(TAKEN_WITHIN, Box::pin(sent)).await;
    settle(&signals, taken.is_ok_and(|taken: Result<(), PasskeyError>| taken.is_ok()), reply);
}

/// Tells the phone that the person found the codes to be the same.
pub(super) async fn confirm(client: Arc<Client>, signals: Arc<Signals>, reply: Reply) {
    signals.await_passkey(LINKED_WITHIN);
    let taken = timeout(TAKEN_WITHIN, Box::pin(client.send_passkey_confirmation())).await;
    settle(&signals, taken.is_ok_and(|taken| taken.is_ok()), reply);
}

/// A challenge counts once, so whoever was refused begins again.
fn settle(signals: &Signals, is_taken: bool, reply: Reply) {
    let _ = reply.send(if is_taken { Ok(()) } else { Err(PasskeyRefused) });
    // An answer that is lost says nothing when the phone has gone on.
    if !is_taken && signals.is_linking() {
        signals.end(refused("PASSKEY_REFUSED"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lifecycle::LinkBy;
    use crate::domain::phone::Phone;
    use crate::session::link::signals::{PairedAs, Queued};
    use crate::session::link::stanza::Certainty;
    use tokio::sync::mpsc;

    fn signals(expected: Option<Phone>) -> (Arc<Signals>, mpsc::Receiver<Queued>) {
        let (queue, entries) = mpsc::channel(4);
        let (late, _) = mpsc::channel(1);
        (Signals::new(expected, LinkBy::QrCode, queue, late), entries)
    }

    fn linking() -> (Arc<Signals>, mpsc::Receiver<Queued>) {
        signals(Phone::parse("5511999990001").ok())
    }

    fn request(options: &str) -> PairPasskeyRequest {
        PairPasskeyRequest::builder().request_options_json(options.to_owned()).build()
    }

    fn error(continuation: bool) -> PairPasskeyError {
        PairPasskeyError::builder().error("why".to_owned()).continuation(continuation).build()
    }

    fn told(entries: &mut mpsc::Receiver<Queued>) -> (String, Duration) {
        match entries.try_recv().ok().and_then(Queued::event) {
            Some(SessionEvent::PasskeyRequest { options, valid_for }) => (options, valid_for),
            Some(SessionEvent::PasskeyCode { code, valid_for }) => (code, valid_for),
            _ => panic!("nothing of a passkey"),
        }
    }

    #[tokio::test]
    async fn what_whatsapp_asks_is_told_with_the_time_it_gives_but_not_for_ever() {
        let (signals, mut entries) = linking();
        for (timeout, valid_for) in [
            ("", PERSON_WITHIN),
            (",\"timeout\":60000", Duration::from_secs(60)),
            (",\"timeout\":86400000", PERSON_WITHIN),
        ] {
            let options = format!("{{\"challenge\":\"AQID\"{timeout}}}");
            requested(&signals, &request(&options));
            assert_eq!(told(&mut entries), (options, valid_for));
            assert!(signals.passkey_until().is_some());
        }
        compare(&signals, &PairPasskeyConfirmation::builder().code("A-B".to_owned()).skip_handoff_ux(false).build());
        assert_eq!(told(&mut entries), ("A-B".to_owned(), COMPARED_WITHIN));
    }

    #[tokio::test]
    async fn what_goes_wrong_ends_the_linking_with_its_own_code() {
        for (step, code) in [
            ((|signals| requested(signals, &request("{}"))) as fn(&Signals), "PASSKEY_REQUEST_FAILED"),
            (|signals| failed(signals, &error(false)), "PASSKEY_REQUEST_FAILED"),
            (|signals| failed(signals, &error(true)), "PASSKEY_EXCHANGE_FAILED"),
            (|signals| settle(signals, false, oneshot::channel().0), "PASSKEY_REFUSED"),
        ] {
            let (signals, _entries) = linking();
            step(&signals);
            assert_eq!(signals.ending(Certainty::EndNow), Some(refused(code)));
        }
    }

    #[tokio::test]
    async fn a_number_that_is_linked_is_touched_by_none_of_it() {
        let (connected, mut entries) = signals(None);
        let (just_linked, mut later_entries) = linking();
        just_linked.pair(PairedAs { phone: Phone::parse("5511999990001").unwrap(), lid: None });
        for (signals, entries) in [(connected, &mut entries), (just_linked, &mut later_entries)] {
            requested(&signals, &request("{\"challenge\":\"AQID\"}"));
            requested(&signals, &request("{}"));
            failed(&signals, &error(true));
            let (reply, verdict) = oneshot::channel();
            settle(&signals, false, reply);
            assert_eq!(verdict.await, Ok(Err(PasskeyRefused)));
            assert_eq!(signals.ending(Certainty::Maybe), None);
            assert!(entries.try_recv().is_err());
        }
    }
}
