//! Reads a JSON object field by field, so that every wrong field is named and none is silently passed over.

use serde_json::{Map, Value};

use crate::api::error::{ApiError, Reason, Violation};

/// The fields of a request, taken one by one.
pub(super) struct Fields {
    object: Map<String, Value>,
    violations: Vec<Violation>,
}

impl Fields {
    /// The object in a body.
    pub(super) fn read(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(object)) => Ok(Self { object, violations: Vec::new() }),
            Ok(_) => Err(ApiError::field("body", "must be a JSON object")),
            Err(error) => {
                let problem = format!("is not JSON: line {} column {}", error.line(), error.column());
                Err(ApiError::field("body", problem))
            }
        }
    }

    /// A text; `None` when it is absent, `null` or wrong.
    pub(super) fn text(&mut self, field: &'static str) -> Option<String> {
        match self.object.remove(field)? {
            Value::String(text) => Some(text),
            Value::Null => None,
            _ => {
                self.wrong(field, "must be a string");
                None
            }
        }
    }

    /// A whole number; `None` when it is absent, `null` or wrong.
    pub(super) fn integer(&mut self, field: &'static str) -> Option<i64> {
        match self.object.remove(field)? {
            Value::Null => None,
            value => {
                let number = value.as_i64();
                if number.is_none() {
                    self.wrong(field, "must be a whole number");
                }
                number
            }
        }
    }

    /// A field that exists in the product and not in this version.
    pub(super) fn unsupported(&mut self, field: &'static str) {
        if self.object.remove(field).is_some_and(|value| !value.is_null()) {
            self.wrong(field, "is not supported by this version");
        }
    }

    /// Nothing else may be left.
    pub(super) fn end(mut self) -> Result<(), ApiError> {
        if !self.object.is_empty() {
            self.wrong("body", "holds a field this call does not have");
        }
        if self.violations.is_empty() {
            return Ok(());
        }
        Err(ApiError { violations: self.violations, ..Reason::ValidationError.into() })
    }

    fn wrong(&mut self, field: &'static str, problem: &str) {
        self.violations.push(Violation { field, problem: problem.to_owned() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_field_is_named() {
        let mut fields = Fields::read(br#"{"text": 1, "to": "x", "media": "m", "other": true}"#).unwrap();
        assert_eq!((fields.text("text"), fields.text("to"), fields.text("none")), (None, Some("x".to_owned()), None));
        fields.unsupported("media");
        let error = fields.end().unwrap_err();
        let named: Vec<_> = error.violations.iter().map(|wrong| wrong.field).collect();
        assert_eq!(named, ["text", "media", "body"]);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", "[]", "1", "{\"a\":"] {
            assert!(Fields::read(body.as_bytes()).is_err(), "{body}");
        }
    }
}
