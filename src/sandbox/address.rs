//! Who is who: phone numbers, their hidden ids (LID) and the devices of an account.
//!
//! The hidden id is an invertible spelling of the number, so both directions resolve without a table and survive a
//! restart; clients cannot tell, because to them it is an opaque string of digits.

use serde::{Deserialize, Serialize};
use whatsapp_rust::wacore_binary::{Jid, Server};

/// Shortest and longest E.164 number the sandbox takes for a phone.
const DIGITS: std::ops::RangeInclusive<usize> = 5..=15;
/// Marks the hidden ids so that none can be mistaken for a phone number.
const HIDDEN_PREFIX: &str = "10";
/// Numbers below this prefix are never on WhatsApp.
const ABSENT_PREFIX: &str = "999";

/// A phone number in digits, without the plus.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PhoneNumber(Box<str>);

impl PhoneNumber {
    /// Accepts digits with or without a plus (which a URL-decoded query shows as a space).
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.trim().trim_start_matches('+');
        let plausible = DIGITS.contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
        plausible.then(|| Self(digits.into()))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The hidden id (LID user) of this number.
    pub fn hidden(&self) -> String {
        let mirrored = self.0.bytes().rev().map(|digit| char::from(b'9' - (digit - b'0')));
        HIDDEN_PREFIX.chars().chain(mirrored).collect()
    }

    /// The number behind a hidden id.
    pub fn from_hidden(hidden: &str) -> Option<Self> {
        let mirrored = hidden.strip_prefix(HIDDEN_PREFIX)?;
        if !mirrored.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let digits: String = mirrored.bytes().rev().map(|digit| char::from(b'9' - (digit - b'0'))).collect();
        Self::parse(&digits)
    }

    /// Numbers that are not on WhatsApp by convention, so that a test needs no set-up.
    pub fn absent_by_convention(&self) -> bool {
        self.0.starts_with(ABSENT_PREFIX)
    }
}

/// Which of the two spellings of an account a stanza uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum Namespace {
    /// `number@s.whatsapp.net`
    #[default]
    #[serde(rename = "pn")]
    Phone,
    /// `hidden@lid`
    #[serde(rename = "lid")]
    Hidden,
}

impl Namespace {
    /// The bare JID of `phone` in this spelling.
    pub fn user(self, phone: &PhoneNumber) -> Jid {
        match self {
            Self::Phone => Jid::pn(phone.as_str()),
            Self::Hidden => Jid::lid(phone.hidden()),
        }
    }

    /// The JID of one device in this spelling.
    pub fn device(self, address: &DeviceAddress) -> Jid {
        self.user(&address.phone).with_device(address.device)
    }
}

/// One device of one account; 0 is the phone itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceAddress {
    /// The account.
    pub phone: PhoneNumber,
    /// The device's number within the account.
    pub device: u16,
}

impl DeviceAddress {
    /// Names a device.
    pub fn new(phone: PhoneNumber, device: u16) -> Self {
        Self { phone, device }
    }

    /// The name under which phones keep their Signal sessions: one per device whatever its spelling on the wire.
    pub fn session_name(&self) -> String {
        format!("{}:{}", self.phone.as_str(), self.device)
    }
}

/// Resolves a user or device JID; `None` for groups, broadcasts and other kinds the sandbox does not have.
pub fn resolve(jid: &Jid) -> Option<(DeviceAddress, Namespace)> {
    let (phone, namespace) = match jid.server {
        Server::Pn | Server::Legacy | Server::Hosted => (PhoneNumber::parse(&jid.user)?, Namespace::Phone),
        Server::Lid | Server::HostedLid => (PhoneNumber::from_hidden(&jid.user)?, Namespace::Hidden),
        _ => return None,
    };
    Some((DeviceAddress::new(phone, jid.device), namespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hidden_id_leads_back_to_its_number() {
        for digits in ["491510000001", "15550001000", "33612", "100000000000000"] {
            let phone = PhoneNumber::parse(digits).expect("plausible");
            assert_eq!(PhoneNumber::from_hidden(&phone.hidden()), Some(phone));
        }
    }

    #[test]
    fn numbers_come_with_or_without_a_plus() {
        let plain = PhoneNumber::parse("491510000001");
        assert_eq!(PhoneNumber::parse("+491510000001"), plain);
        assert_eq!(PhoneNumber::parse(" 491510000001"), plain);
        assert_eq!(PhoneNumber::parse("49-151"), None);
        assert_eq!(PhoneNumber::parse("123"), None);
    }

    #[test]
    fn both_spellings_resolve_to_the_same_device() {
        let phone = PhoneNumber::parse("491510000001").expect("plausible");
        let address = DeviceAddress::new(phone, 3);
        for namespace in [Namespace::Phone, Namespace::Hidden] {
            assert_eq!(resolve(&namespace.device(&address)), Some((address.clone(), namespace)));
        }
    }
}
