//! Linking a number, as its owner watches it: codes, then the phone's consent, then the first connection.

use std::pin::Pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Sleep;

use super::drain::Drain;
use super::error::{ApiError, Reason};
use super::service::Api;
use crate::domain::access::Caller;
use crate::domain::lifecycle::{Desired, LinkBy, State};
use crate::domain::passkey::{Assertion, NoAssertion};
use crate::domain::phone::Phone;
use crate::domain::time::Timestamp;
use crate::number::handle::{NumberView, Pairing};
use crate::number::message::{Control, PasskeyStep};

/// Longest a pairing is watched; codes run out long before, and so does everybody's patience with a passkey.
const WATCH_MAX: Duration = Duration::from_mins(30);
/// Reason given when nothing more happened within [`WATCH_MAX`].
const TIMED_OUT: &str = "PAIRING_TIMED_OUT";
/// Reason given when the number's view gives none.
const ENDED: &str = "PAIRING_ENDED";

/// One step of a pairing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PairingStep {
    /// Show this code.
    QrCode {
        /// The text to encode.
        code: String,
        /// Until when it works.
        expires_at: Timestamp,
    },
    /// Show this code, to be typed into the phone.
    PairingCode {
        /// Two groups of four letters and digits.
        code: String,
        /// Until when it works.
        expires_at: Timestamp,
    },
    /// WhatsApp links only with the account's passkey: let its owner unlock it in a browser.
    PasskeyRequest {
        /// WebAuthn request options, as JSON.
        options: String,
        /// Until when WhatsApp waits.
        expires_at: Timestamp,
    },
    /// Let its owner compare this code with the one on the phone.
    PasskeyCode {
        /// Two groups of four letters and digits.
        code: String,
        /// Until when the answer is waited for.
        expires_at: Timestamp,
    },
    /// A phone accepted.
    Paired(Phone),
    /// Connected; the last step.
    Online,
    /// It came to nothing; the last step.
    Failed(String),
}

/// A pairing under way.
#[derive(Debug)]
pub struct PairingWatch {
    views: watch::Receiver<NumberView>,
    before: NumberView,
    progress: Progress,
    phone: Phone,
    drain: Drain,
    patience: Pin<Box<Sleep>>,
}

/// How far the watcher was told.
#[derive(Debug, Default)]
struct Progress {
    last_shown: Option<String>,
    paired: bool,
    over: bool,
}

impl Api {
    /// Starts linking a number, or joins a linking under way.
    ///
    /// # Errors
    /// See the contract.
    pub async fn pair_number(&self, caller: Caller, named: &str, by: LinkBy) -> Result<PairingWatch, ApiError> {
        let record = self.number_meant(caller, named)?;
        let handle = self.handle_of(record.id)?;
        let mut views = handle.watch_view();
        let before = views.borrow_and_update().clone();
        if before.linked {
            return Err(Reason::AlreadyLinked.into());
        }
        if before.desired == Desired::Stopped || before.state == State::Stopped {
            return Err(Reason::NumberStopped.into());
        }
        handle.control(Control::Pair(by)).await?;
        views.mark_changed();
        Ok(PairingWatch {
            views,
            before,
            progress: Progress::default(),
            phone: record.phone.clone(),
            drain: self.drain(),
            patience: Box::pin(tokio::time::sleep(WATCH_MAX)),
        })
    }

    /// Gives WhatsApp the proof that a number's owner unlocked the account's passkey. WhatsApp has taken it on return.
    ///
    /// # Errors
    /// See the contract.
    pub async fn answer_passkey(&self, caller: Caller, named: &str, assertion: &str) -> Result<(), ApiError> {
        let record = self.number_meant(caller, named)?;
        let assertion = Assertion::parse(assertion);
        let assertion = assertion.map_err(|NoAssertion(problem)| ApiError::field("assertion_json", problem))?;
        Ok(self.handle_of(record.id)?.passkey(PasskeyStep::Answer(assertion)).await?)
    }

    /// Tells the phone that it shows the code that was given with the linking. WhatsApp knows on return.
    ///
    /// # Errors
    /// See the contract.
    pub async fn confirm_passkey(&self, caller: Caller, named: &str, code: &str) -> Result<(), ApiError> {
        let record = self.number_meant(caller, named)?;
        if code.is_empty() {
            return Err(ApiError::field("code", "is required"));
        }
        Ok(self.handle_of(record.id)?.passkey(PasskeyStep::Confirm(code.to_owned())).await?)
    }
}

impl PairingWatch {
    /// The next step; `None` after the last.
    ///
    /// # Errors
    /// `Draining`; what the phone has accepted stays accepted.
    pub async fn next(&mut self) -> Result<Option<PairingStep>, ApiError> {
        while !self.progress.over {
            tokio::select! {
                changed = self.views.changed() => {
                    if changed.is_err() {
                        return Err(Reason::NumberNotFound.into());
                    }
                }
                () = self.patience.as_mut() => {
                    self.progress.over = true;
                    return Ok(Some(PairingStep::Failed(TIMED_OUT.to_owned())));
                }
                () = self.drain.begun() => return Err(Reason::Draining.into()),
            }
            let view = self.views.borrow_and_update().clone();
            let fresh = view != self.before || is_under_way(&view.pairing);
            if let Some(step) = self.progress.step(&view, fresh, &self.phone) {
                // Several steps may have fallen into one view: look at it again.
                self.views.mark_changed();
                return Ok(Some(step));
            }
        }
        Ok(None)
    }
}

impl Progress {
    /// What the watcher is not yet told of this view. `fresh` is false while it may still show an earlier pairing.
    fn step(&mut self, view: &NumberView, fresh: bool, phone: &Phone) -> Option<PairingStep> {
        if !fresh {
            return None;
        }
        if (view.linked || view.pairing == Pairing::Paired) && !self.paired {
            self.paired = true;
            return Some(PairingStep::Paired(phone.clone()));
        }
        match (&view.pairing, view.state) {
            (_, State::Online | State::Degraded) => {
                self.over = true;
                Some(PairingStep::Online)
            }
            (Pairing::QrCode { code, expires_at }, _) if self.last_shown.as_ref() != Some(code) => {
                self.last_shown = Some(code.clone());
                Some(PairingStep::QrCode { code: code.clone(), expires_at: *expires_at })
            }
            (Pairing::Code { code, expires_at }, _) if self.last_shown.as_ref() != Some(code) => {
                self.last_shown = Some(code.clone());
                Some(PairingStep::PairingCode { code: in_groups(code), expires_at: *expires_at })
            }
            (Pairing::PasskeyRequest { options, expires_at }, _) if self.last_shown.as_ref() != Some(options) => {
                self.last_shown = Some(options.clone());
                Some(PairingStep::PasskeyRequest { options: options.clone(), expires_at: *expires_at })
            }
            (Pairing::PasskeyCode { code, expires_at }, _) if self.last_shown.as_ref() != Some(code) => {
                self.last_shown = Some(code.clone());
                Some(PairingStep::PasskeyCode { code: code.clone(), expires_at: *expires_at })
            }
            (Pairing::Failed, State::Unlinked | State::LoggedOut)
            | (_, State::LoggedOut | State::Stopped | State::Replaced | State::Quarantined | State::Parked { .. }) => {
                self.over = true;
                let reason = if view.reason.is_empty() { ENDED } else { &view.reason };
                Some(PairingStep::Failed(reason.to_owned()))
            }
            _ => None,
        }
    }
}

/// Whether it can only belong to a linking of now.
const fn is_under_way(pairing: &Pairing) -> bool {
    match pairing {
        Pairing::QrCode { .. }
        | Pairing::Code { .. }
        | Pairing::PasskeyRequest { .. }
        | Pairing::PasskeyAnswered
        | Pairing::PasskeyCode { .. }
        | Pairing::PasskeyConfirmed
        | Pairing::Paired => true,
        Pairing::Idle | Pairing::Starting | Pairing::Failed => false,
    }
}

/// As phones show it.
fn in_groups(code: &str) -> String {
    match code.split_at_checked(code.len() / 2) {
        Some((first, second)) => format!("{first}-{second}"),
        None => code.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lifecycle::Attention;
    use crate::domain::limiter::NewChats;

    fn view(state: State, pairing: Pairing, linked: bool) -> NumberView {
        let (since, reason) = (Timestamp(1), String::new());
        NumberView {
            state,
            next_attempt: None,
            since,
            reason,
            desired: Desired::Running,
            linked,
            pairing,
            new_chats: NewChats::Allowed,
            last_error: None,
            attention: Attention::None,
        }
    }

    fn code(text: &str) -> Pairing {
        Pairing::QrCode { code: text.to_owned(), expires_at: Timestamp(9) }
    }

    fn steps(views: &[NumberView]) -> Vec<PairingStep> {
        let phone = Phone::parse("+5511999999999").unwrap();
        let mut progress = Progress::default();
        let mut steps = Vec::new();
        for view in views {
            while !progress.over {
                let Some(step) = progress.step(view, true, &phone) else { break };
                steps.push(step);
            }
        }
        steps
    }

    fn names(views: &[NumberView]) -> Vec<String> {
        let name = |step: &PairingStep| match step {
            PairingStep::QrCode { code, .. }
            | PairingStep::PairingCode { code, .. }
            | PairingStep::PasskeyCode { code, .. } => code.clone(),
            PairingStep::PasskeyRequest { options, .. } => options.clone(),
            PairingStep::Paired(_) => "paired".to_owned(),
            PairingStep::Online => "online".to_owned(),
            PairingStep::Failed(reason) => reason.clone(),
        };
        steps(views).iter().map(name).collect()
    }

    #[test]
    fn a_pairing_that_succeeds() {
        let views = [
            view(State::Linking, Pairing::Starting, false),
            view(State::Linking, code("a"), false),
            view(State::Linking, code("a"), false),
            view(State::Linking, code("b"), false),
            view(State::Linking, Pairing::Paired, true),
            view(State::Connecting, Pairing::Idle, true),
            view(State::Online, Pairing::Idle, true),
        ];
        assert_eq!(names(&views), ["a", "b", "paired", "online"]);
    }

    #[test]
    fn a_pairing_with_a_passkey() {
        let (options, expires_at) = ("options".to_owned(), Timestamp(9));
        let views = [
            view(State::Linking, code("a"), false),
            view(State::Linking, Pairing::PasskeyRequest { options, expires_at }, false),
            view(State::Linking, Pairing::PasskeyAnswered, false),
            view(State::Linking, Pairing::PasskeyCode { code: "ABCD-EFGH".to_owned(), expires_at }, false),
            view(State::Linking, Pairing::PasskeyConfirmed, false),
            view(State::Linking, Pairing::Paired, true),
            view(State::Online, Pairing::Idle, true),
        ];
        assert_eq!(names(&views), ["a", "options", "ABCD-EFGH", "paired", "online"]);
        let joined_late: Vec<_> = views[1..].to_vec();
        assert_eq!(names(&joined_late), ["options", "ABCD-EFGH", "paired", "online"]);
        assert!(views[1..6].iter().all(|view| is_under_way(&view.pairing)));
    }

    #[test]
    fn steps_that_fell_together_are_all_told() {
        assert_eq!(names(&[view(State::Online, Pairing::Idle, true)]), ["paired", "online"]);
    }

    #[test]
    fn a_pairing_that_fails_says_why() {
        let mut failed = view(State::Unlinked, Pairing::Failed, false);
        failed.reason = "WRONG_NUMBER".to_owned();
        assert_eq!(names(&[view(State::Linking, code("a"), false), failed]), ["a", "WRONG_NUMBER"]);
        assert_eq!(names(&[view(State::LoggedOut, Pairing::Failed, false)]), [ENDED]);
    }
}
