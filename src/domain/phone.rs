//! Phone numbers, linked identities and the address of a chat. All of them mask themselves when printed:
//! only `digits()` gives the clear text, so a leak into a log has to be written on purpose.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An E.164 number: 7 to 15 digits, kept without the plus (ITU-T E.164).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Phone(Box<str>);

/// The text is not an E.164 number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an E.164 phone number (7 to 15 digits, optionally after a plus)")]
pub struct InvalidPhone;

impl Phone {
    /// Reads `+5511999999999` or `5511999999999`; blanks, dashes, dots and parentheses are passed over.
    ///
    /// # Errors
    /// Anything that does not leave 7 to 15 digits starting with a non-zero digit.
    pub fn parse(text: &str) -> Result<Self, InvalidPhone> {
        let text = text.trim();
        let text = text.strip_prefix('+').unwrap_or(text);
        let mut digits = String::with_capacity(15);
        for character in text.chars() {
            match character {
                '0'..='9' => digits.push(character),
                ' ' | '-' | '.' | '(' | ')' => {}
                _ => return Err(InvalidPhone),
            }
        }
        if !(7..=15).contains(&digits.len()) || digits.starts_with('0') {
            return Err(InvalidPhone);
        }
        Ok(Self(digits.into()))
    }

    /// The digits in clear, without the plus. For the wire and for the owner's own API answers only.
    #[must_use]
    pub fn digits(&self) -> &str {
        &self.0
    }

    /// `+` and the digits, as the API shows it to the number's owner.
    #[must_use]
    pub fn e164(&self) -> String {
        format!("+{}", self.0)
    }
}

impl TryFrom<String> for Phone {
    type Error = InvalidPhone;
    fn try_from(text: String) -> Result<Self, InvalidPhone> {
        Self::parse(&text)
    }
}

impl From<Phone> for String {
    fn from(phone: Phone) -> Self {
        phone.0.into()
    }
}

impl fmt::Debug for Phone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Phone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tail = &self.0[self.0.len().saturating_sub(2)..];
        write!(f, "+…{tail}")
    }
}

/// The user part of a LID (WhatsApp's phone-less identity of an account).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Lid(pub Box<str>);

impl fmt::Debug for Lid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lid…")
    }
}

/// One person to talk to, by every address known of them. At least one is always set.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Contact {
    /// The phone number, where known.
    pub phone: Option<Phone>,
    /// The linked identity, where known.
    pub lid: Option<Lid>,
}

impl Contact {
    /// A contact known by phone number only.
    #[must_use]
    pub fn of_phone(phone: Phone) -> Self {
        Self { phone: Some(phone), lid: None }
    }

    /// The addresses under which the chat of this contact is filed, phone first. Clear text: for store keys, which are hashed.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        let phone = self.phone.iter().map(|phone| format!("p:{}", phone.digits()));
        let lid = self.lid.iter().map(|lid| format!("l:{}", lid.0));
        phone.chain(lid).collect()
    }

    /// Takes over addresses the other one knows and this one does not. Returns whether anything was learnt.
    pub fn learn(&mut self, other: &Self) -> bool {
        let before = (self.phone.is_some(), self.lid.is_some());
        if self.phone.is_none() {
            self.phone.clone_from(&other.phone);
        }
        if self.lid.is_none() {
            self.lid.clone_from(&other.lid);
        }
        before != (self.phone.is_some(), self.lid.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_people_write_and_nothing_else() {
        for text in ["+5511999999999", "5511999999999", "+55 (11) 99999-9999"] {
            assert_eq!(Phone::parse(text).map(|phone| phone.e164()), Ok("+5511999999999".to_owned()), "{text}");
        }
        for text in ["", "abc", "+123", "0111111111", "1234567890123456", "+55x1199999999"] {
            assert_eq!(Phone::parse(text), Err(InvalidPhone), "{text}");
        }
    }

    #[test]
    fn printing_masks() {
        let phone = Phone::parse("+5511999999942").unwrap();
        assert_eq!(format!("{phone} {phone:?}"), "+…42 +…42");
    }
}
