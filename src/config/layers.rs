//! The three layers a value can come from, and where in them. `default.toml` holds every key, so it is the list of
//! known keys too: whatever another layer adds is a mistake.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::error::Mistake;

/// The lowest layer, which is the documentation as well.
pub(super) const DEFAULTS: &str = include_str!("default.toml");

const ENV_PREFIX: &str = "SWITCHBOARD__";
const ENV_SEPARATOR: &str = "__";
/// Largest file read; a configuration is a few kilobytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// A value before its key's type is asked for.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Raw {
    Text(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
    /// From the environment, where everything is text.
    Untyped(String),
    /// A list, a table, a date: no key takes them.
    Other(&'static str),
}

/// A value and where it was set.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    pub(super) raw: Raw,
    pub(super) place: String,
}

/// Section and key.
type Name = (String, String);

/// All settings, the highest layer's where several set one.
#[derive(Debug)]
pub(super) struct Layers(BTreeMap<Name, Setting>);

impl Layers {
    /// Lays the layers on one another. Mistakes are added to `mistakes`; what can be read is still read, so that
    /// the rest is checked as well.
    pub(super) fn read(
        file: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
        mistakes: &mut Vec<Mistake>,
    ) -> Self {
        let mut layers = Self(parse("default.toml", DEFAULTS, mistakes).into_iter().collect());
        if let Some(path) = file {
            let place = path.display().to_string();
            match read_file(path) {
                Ok(text) => {
                    let settings = parse(&place, &text, mistakes);
                    layers.lay_over(settings, mistakes);
                }
                Err(problem) => mistakes.push(Mistake { place, key: String::new(), problem }),
            }
        }
        let settings = env.into_iter().filter_map(|(name, value)| from_env(name, value, mistakes)).collect();
        layers.lay_over(settings, mistakes);
        layers
    }

    pub(super) fn get(&self, section: &str, key: &str) -> Option<&Setting> {
        self.0.get(&(section.to_owned(), key.to_owned()))
    }

    fn lay_over(&mut self, settings: Vec<(Name, Setting)>, mistakes: &mut Vec<Mistake>) {
        for (name, setting) in settings {
            match self.0.get_mut(&name) {
                Some(lower) => *lower = setting,
                None => mistakes.push(self.unknown(&name, setting.place)),
            }
        }
    }

    fn unknown(&self, (section, key): &Name, place: String) -> Mistake {
        let siblings: Vec<_> = self.0.keys().filter(|name| name.0 == *section).map(|name| name.1.as_str()).collect();
        let problem = if siblings.is_empty() {
            let mut sections: Vec<_> = self.0.keys().map(|name| name.0.as_str()).collect();
            sections.dedup();
            format!("unknown section; there are: {}", sections.join(", "))
        } else {
            format!("unknown key; [{section}] has: {}", siblings.join(", "))
        };
        Mistake { place, key: format!("{section}.{key}"), problem }
    }
}

fn read_file(path: &Path) -> Result<String, String> {
    let bytes = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(format!("larger than {FILE_BYTES_MAX} bytes"));
    }
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

fn from_env(name: String, value: String, mistakes: &mut Vec<Mistake>) -> Option<(Name, Setting)> {
    let path = name.strip_prefix(ENV_PREFIX)?;
    let Some((section, key)) = path.split_once(ENV_SEPARATOR) else {
        let problem = format!("not of the form {ENV_PREFIX}SECTION{ENV_SEPARATOR}KEY");
        mistakes.push(Mistake { place: name, key: String::new(), problem });
        return None;
    };
    let path = (section.to_lowercase(), key.to_lowercase());
    Some((path, Setting { raw: Raw::Untyped(value), place: name }))
}

fn parse(file: &str, text: &str, mistakes: &mut Vec<Mistake>) -> Vec<(Name, Setting)> {
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let place = place_of(file, text, error.span().unwrap_or(0..0));
        mistakes.push(Mistake { place, key: String::new(), problem: error.message().to_owned() });
    }
    let mut settings = Vec::new();
    for (section, value) in document.get_ref() {
        let name = section.get_ref().to_string();
        let Some(table) = value.get_ref().as_table() else {
            let place = place_of(file, text, section.span());
            let problem = "a key outside of any [section]".to_owned();
            mistakes.push(Mistake { place, key: name, problem });
            continue;
        };
        for (key, value) in table {
            let place = place_of(file, text, key.span());
            let setting = Setting { raw: raw(value.get_ref()), place };
            settings.push(((name.clone(), key.get_ref().to_string()), setting));
        }
    }
    settings
}

fn raw(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).map_or(Raw::Other("a huge integer"), Raw::Integer)
        }
        DeValue::Float(number) => number.as_str().parse().map_or(Raw::Other("a float"), Raw::Float),
        DeValue::Boolean(yes) => Raw::Bool(*yes),
        DeValue::Datetime(_) => Raw::Other("a date"),
        DeValue::Array(_) => Raw::Other("a list"),
        DeValue::Table(_) => Raw::Other("a table"),
    }
}

fn place_of(file: &str, text: &str, span: Range<usize>) -> String {
    let before = text.get(..span.start).unwrap_or(text);
    let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
    format!("{file}:{line}")
}
