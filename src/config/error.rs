//! What is wrong with a configuration, all of it at once, each mistake with its place.

use std::fmt;

/// Every mistake that was found; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<Mistake>);

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// `file:line`, or the name of the environment variable.
    pub place: String,
    /// `section.key`; empty when the text could not be read at all.
    pub key: String,
    /// What is wrong, and what would be right. Never the value of the environment: it may be somebody's secret.
    pub problem: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.key.is_empty() {
            return write!(f, "{}: {}", self.place, self.problem);
        }
        write!(f, "{}: {}: {}", self.place, self.key, self.problem)
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.0.iter().enumerate() {
            let line_break = if index == 0 { "" } else { "\n" };
            write!(f, "{line_break}{mistake}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
