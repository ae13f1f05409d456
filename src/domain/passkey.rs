//! What a browser answers when WhatsApp wants a passkey before it links a device: read strictly, never shown.
//! The form is `PublicKeyCredential.toJSON()`: <https://www.w3.org/TR/webauthn-3/#dictdef-authenticationresponsejson>

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

/// Longest answer, in bytes; real ones have about one thousand.
const ASSERTION_BYTES_MAX: usize = 16 * 1024;

/// A signed answer to WhatsApp's request.
#[derive(Clone, PartialEq, Eq)]
pub struct Assertion {
    /// Which passkey signed.
    pub credential_id: Vec<u8>,
    /// What the browser says it was asked, as JSON.
    pub client_data: Vec<u8>,
    /// What the authenticator says about itself and the person.
    pub authenticator_data: Vec<u8>,
    /// Over both.
    pub signature: Vec<u8>,
    /// Whose passkey it is, where the authenticator tells.
    pub user_handle: Option<Vec<u8>>,
}

impl std::fmt::Debug for Assertion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Assertion(…)")
    }
}

/// Why a text is no assertion, for the person who sent it. Never holds any of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoAssertion(pub String);

impl NoAssertion {
    fn field(name: &str, problem: &str) -> Self {
        Self(format!("`{name}` {problem}"))
    }
}

impl Assertion {
    /// Reads what `navigator.credentials.get(…)` gave, after its `toJSON()`.
    ///
    /// # Errors
    /// What is wrong with it, by the name of the member.
    pub fn parse(text: &str) -> Result<Self, NoAssertion> {
        if text.is_empty() {
            return Err(NoAssertion("is required".to_owned()));
        }
        if text.len() > ASSERTION_BYTES_MAX {
            return Err(NoAssertion(format!("must have at most {ASSERTION_BYTES_MAX} bytes")));
        }
        let credential = serde_json::from_str::<Value>(text).ok().filter(Value::is_object);
        let credential = credential.ok_or_else(|| NoAssertion("must be a JSON object".to_owned()))?;
        if credential.get("type").and_then(Value::as_str) != Some("public-key") {
            return Err(NoAssertion::field("type", "must be `public-key`"));
        }
        let response = credential.get("response").filter(|response| response.is_object());
        let response = response.ok_or_else(|| NoAssertion::field("response", "must be an object"))?;
        let credential_id = bytes("id", credential.get("id"))?;
        if let Some(raw) = credential.get("rawId")
            && bytes("rawId", Some(raw))? != credential_id
        {
            return Err(NoAssertion::field("rawId", "must be the same as `id`"));
        }
        let user_handle = response.get("userHandle").filter(|handle| !handle.is_null());
        Ok(Self {
            credential_id,
            client_data: bytes("response.clientDataJSON", response.get("clientDataJSON"))?,
            authenticator_data: bytes("response.authenticatorData", response.get("authenticatorData"))?,
            signature: bytes("response.signature", response.get("signature"))?,
            user_handle: user_handle.map(|handle| bytes("response.userHandle", Some(handle))).transpose()?,
        })
    }
}

fn bytes(name: &str, member: Option<&Value>) -> Result<Vec<u8>, NoAssertion> {
    let text = member.and_then(Value::as_str).filter(|text| !text.is_empty());
    let text = text.ok_or_else(|| NoAssertion::field(name, "must be a text that is not empty"))?;
    let decoded = URL_SAFE_NO_PAD.decode(text.trim_end_matches('='));
    decoded.map_err(|_| NoAssertion::field(name, "must be base64url"))
}

/// Whether two codes are the same for a person: dashes, spaces and case do not count.
#[must_use]
pub fn is_same_code(one: &str, other: &str) -> bool {
    let plain = |code: &str| -> Vec<u8> {
        code.bytes().filter(u8::is_ascii_alphanumeric).map(|byte| byte.to_ascii_uppercase()).collect()
    };
    let one = plain(one);
    !one.is_empty() && one == plain(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answer() -> Value {
        json!({
            "id": "AQID",
            "rawId": "AQID",
            "type": "public-key",
            "authenticatorAttachment": "platform",
            "clientExtensionResults": {},
            "response": {
                "clientDataJSON": "e30",
                "authenticatorData": "_-8",
                "signature": "MEU=",
                "userHandle": null,
            },
        })
    }

    fn problem(change: impl FnOnce(&mut Value)) -> String {
        let mut answer = answer();
        change(&mut answer);
        Assertion::parse(&answer.to_string()).unwrap_err().0
    }

    #[test]
    fn what_a_browser_gives_is_read() {
        let read = Assertion::parse(&answer().to_string()).unwrap();
        assert_eq!((read.credential_id, read.client_data), (vec![1, 2, 3], b"{}".to_vec()));
        assert_eq!((read.authenticator_data, read.signature), (vec![0xff, 0xef], vec![0x30, 0x45]));
        assert_eq!(read.user_handle, None);
        let mut with_handle = answer();
        with_handle["response"]["userHandle"] = "AQ".into();
        assert_eq!(Assertion::parse(&with_handle.to_string()).unwrap().user_handle, Some(vec![1]));
    }

    #[test]
    fn what_is_wrong_is_named_and_not_repeated() {
        assert_eq!(Assertion::parse("").unwrap_err().0, "is required");
        assert_eq!(Assertion::parse("{").unwrap_err().0, "must be a JSON object");
        assert_eq!(Assertion::parse("[]").unwrap_err().0, "must be a JSON object");
        let long = format!("\"{}\"", "x".repeat(ASSERTION_BYTES_MAX));
        assert_eq!(Assertion::parse(&long).unwrap_err().0, "must have at most 16384 bytes");
        assert_eq!(problem(|answer| answer["type"] = "password".into()), "`type` must be `public-key`");
        assert_eq!(problem(|answer| answer["response"] = 1.into()), "`response` must be an object");
        assert_eq!(problem(|answer| answer["rawId"] = "AQIE".into()), "`rawId` must be the same as `id`");
        assert_eq!(problem(|answer| answer["id"] = "s3cr+t".into()), "`id` must be base64url");
        let absent = problem(|answer| drop(answer["response"].as_object_mut().unwrap().remove("signature")));
        assert_eq!(absent, "`response.signature` must be a text that is not empty");
    }

    #[test]
    fn an_assertion_is_never_printed() {
        let shown = format!("{:?}", Assertion::parse(&answer().to_string()).unwrap());
        assert_eq!(shown, "Assertion(…)");
    }

    #[test]
    fn codes_are_compared_as_people_read_them() {
        assert!(is_same_code("ABCD-1234", "abcd 1234"));
        assert!(!is_same_code("ABCD-1234", "ABCD-1235"));
        assert!(!is_same_code("-", "-"), "nothing is no code");
    }
}
