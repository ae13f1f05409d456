//! Reads a JSON object field by field, so that every wrong field is named and none is silently passed over.

use serde_json::{Map, Value};

use crate::api::error::{ApiError, Reason, Violation};
use crate::domain::time::Timestamp;

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

    /// A truth value; `None` when it is absent, `null` or wrong.
    pub(super) fn flag(&mut self, field: &'static str) -> Option<bool> {
        match self.object.remove(field)? {
            Value::Bool(flag) => Some(flag),
            Value::Null => None,
            _ => {
                self.wrong(field, "must be true or false");
                None
            }
        }
    }

    /// A moment in ISO 8601 with its offset; `None` when it is absent, `null` or wrong.
    pub(super) fn moment(&mut self, field: &'static str) -> Option<Timestamp> {
        let text = self.text(field)?;
        let moment = text.parse::<jiff::Timestamp>().ok().and_then(|at| u64::try_from(at.as_millisecond()).ok());
        if moment.is_none() {
            self.wrong(field, "must be a time in ISO 8601 such as 2026-11-22T18:00:00Z");
        }
        moment.map(Timestamp)
    }

    /// A list of texts; `None` when it is absent, `null` or wrong.
    pub(super) fn texts(&mut self, field: &'static str) -> Option<Vec<String>> {
        let texts = match self.object.remove(field)? {
            Value::Array(entries) => entries.into_iter().map(|entry| match entry {
                Value::String(text) => Some(text),
                _ => None,
            }),
            Value::Null => return None,
            _ => {
                self.wrong(field, "must be a list of strings");
                return None;
            }
        };
        let texts: Option<Vec<String>> = texts.collect();
        if texts.is_none() {
            self.wrong(field, "must be a list of strings");
        }
        texts
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
    fn times_and_lists_are_read() {
        let body = br#"{"at": "2025-11-22T11:59:59.042-02:00", "no": "soon", "ids": ["a", "b"], "mixed": ["a", 1]}"#;
        let mut fields = Fields::read(body).unwrap();
        assert_eq!(fields.moment("at"), Some(Timestamp(1_763_819_999_042)));
        assert_eq!((fields.moment("no"), fields.moment("none")), (None, None));
        assert_eq!(fields.texts("ids"), Some(vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(fields.texts("mixed"), None);
        let error = fields.end().unwrap_err();
        assert_eq!(error.violations.iter().map(|wrong| wrong.field).collect::<Vec<_>>(), ["no", "mixed"]);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", "[]", "1", "{\"a\":"] {
            assert!(Fields::read(body.as_bytes()).is_err(), "{body}");
        }
    }
}
