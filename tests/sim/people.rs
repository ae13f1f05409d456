//! The people a number talks to, and the names they go by.

use switchboard::domain::phone::{Contact, Lid, Phone};

const PHONES: u64 = 5_511_900_000_000;
const LIDS: u64 = 700_000;

/// By which of its addresses somebody shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Phone,
    Both,
    Lid,
}

/// Every second person has a linked identity besides the phone number.
pub(crate) fn has_lid(person: u64) -> bool {
    person % 2 == 1
}

pub(crate) fn contact(person: u64, known: Known) -> Contact {
    let phone = Phone::parse(&(PHONES + person).to_string()).unwrap();
    let lid = Lid((LIDS + person).to_string().into());
    match known {
        Known::Phone => Contact { phone: Some(phone), lid: None },
        Known::Both => Contact { phone: Some(phone), lid: Some(lid) },
        Known::Lid => Contact { phone: None, lid: Some(lid) },
    }
}

pub(crate) fn person(contact: &Contact) -> u64 {
    match (&contact.phone, &contact.lid) {
        (Some(phone), _) => phone.digits().parse::<u64>().unwrap() - PHONES,
        (None, Some(lid)) => lid.0.parse::<u64>().unwrap() - LIDS,
        (None, None) => panic!("nobody"),
    }
}
