//! WhatsApp addresses (JIDs) and the contacts of the rest of the daemon. One person has up to two addresses, a
//! phone number and a LID; both are given wherever both are known, because chats are filed under either.

use std::sync::Arc;

use whatsapp_rust::{Client, Jid, Server};

use crate::domain::phone::{Contact, Lid, Phone};

/// What one address says about a person; nothing for groups, channels, the status, bots.
fn said_by(jid: &Jid) -> Contact {
    let mut contact = Contact { phone: None, lid: None };
    match jid.server {
        Server::Pn | Server::Hosted | Server::Legacy => contact.phone = Phone::parse(&jid.user).ok(),
        Server::Lid | Server::HostedLid if !jid.user.is_empty() => {
            contact.lid = Some(Lid(jid.user.as_str().into()));
        }
        _ => {}
    }
    contact
}

/// The contact behind addresses that came with a stanza. `None`: not a person (group, channel, status, bot).
pub(super) fn contact_of<'a>(jids: impl IntoIterator<Item = &'a Jid>) -> Option<Contact> {
    let mut contact = Contact { phone: None, lid: None };
    for jid in jids {
        contact.learn(&said_by(jid));
    }
    (contact.phone.is_some() || contact.lid.is_some()).then_some(contact)
}

/// Fills in the address that the stanza did not carry, from what the library learnt earlier.
pub(super) async fn complete(client: &Arc<Client>, contact: &mut Contact) {
    let known = match (&contact.phone, &contact.lid) {
        (Some(phone), None) => Jid::pn(phone.digits()),
        (None, Some(lid)) => Jid::lid(&*lid.0),
        _ => return,
    };
    if let Ok(Some(entry)) = client.get_lid_pn_entry(&known).await {
        contact.learn(&said_by(&Jid::pn(&*entry.phone_number)));
        contact.learn(&said_by(&Jid::lid(&*entry.lid)));
    }
}

/// Where to send to. The phone number where it is known: the library itself moves to the LID for accounts that
/// are addressed that way, and only there.
pub(super) fn address_of(contact: &Contact) -> Option<Jid> {
    let by_phone = contact.phone.as_ref().map(|phone| Jid::pn(phone.digits()));
    by_phone.or_else(|| contact.lid.as_ref().map(|lid| Jid::lid(&*lid.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jid(text: &str) -> Jid {
        text.parse().unwrap()
    }

    #[test]
    fn both_addresses_are_taken_from_wherever_they_stand() {
        let phone = jid("5511999990001:4@s.whatsapp.net");
        let lid = jid("123456@lid");
        for order in [[&phone, &lid], [&lid, &phone]] {
            let contact = contact_of(order).unwrap();
            assert_eq!(contact.phone.as_ref().map(Phone::digits), Some("5511999990001"));
            assert_eq!(contact.lid, Some(Lid("123456".into())));
            assert_eq!(address_of(&contact), Some(Jid::pn("5511999990001")));
        }
        let only_lid = contact_of([&lid]).unwrap();
        assert_eq!(address_of(&only_lid), Some(Jid::lid("123456")));
    }

    #[test]
    fn groups_channels_and_status_are_no_contacts() {
        for text in ["123-456@g.us", "1@newsletter", "status@broadcast"] {
            assert_eq!(contact_of([&jid(text)]), None, "{text}");
        }
    }
}
