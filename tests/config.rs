//! The configuration as an operator meets it: what wins, and what is said about mistakes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::path::PathBuf;
use std::time::Duration;

use switchboard::config::sections::Config;
use switchboard::domain::limiter::NewRecipients;
use switchboard::telemetry::logging;

/// A file of its own for each test, gone at the end.
struct File(PathBuf);

impl File {
    fn of(test: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("switchboard-config-{}-{test}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn mistakes(test: &str, text: &str, pairs: &[(&str, &str)]) -> Vec<String> {
    let file = File::of(test, text);
    let errors = Config::load(Some(&file.0), env(pairs)).unwrap_err();
    let place = format!("{}:", file.0.display());
    errors.0.iter().map(|mistake| mistake.to_string().replace(&place, "FILE:")).collect()
}

#[test]
fn the_defaults_are_complete_and_as_published() {
    let config = Config::load(None, []).unwrap();
    assert_eq!(config.data.dir, PathBuf::from("./data"));
    assert_eq!(config.api.listen.to_string(), "127.0.0.1:7400");
    assert_eq!(config.admin.listen.to_string(), "127.0.0.1:7401");
    assert_eq!(config.whatsapp.url.as_str(), "wss://web.whatsapp.com/ws/chat");
    assert_eq!(config.whatsapp.version, None);
    assert!(!config.whatsapp.allow_private_proxies);
    assert_eq!(config.reconnect.first_ceiling, Duration::from_secs(1));
    assert_eq!(config.reconnect.last_ceiling, Duration::from_mins(15));
    assert_eq!(config.limits.interval, Duration::from_secs(1));
    assert_eq!(config.limits.chat_interval, Duration::from_secs(6));
    assert_eq!(config.limits.new_recipients, NewRecipients::WarmUp);
    assert!(!config.webhook.allow_private);
    assert_eq!(config.webhook.concurrent, 512);
    assert_eq!(config.shutdown.grace, Duration::from_secs(25));
}

#[test]
fn the_documentation_is_a_file_that_changes_nothing() {
    let file = File::of("documentation", Config::documentation());
    assert_eq!(Config::load(Some(&file.0), []), Config::load(None, []));
}

#[test]
fn the_environment_beats_the_file_and_the_file_the_defaults() {
    let file = File::of(
        "order",
        "[api]\nlisten = \"127.0.0.1:1\"\n[data]\ndir = \"/from/file\"\n[limits]\nmessages_per_second = 2\n",
    );
    let pairs = env(&[
        ("SWITCHBOARD__API__LISTEN", "127.0.0.1:2"),
        ("SWITCHBOARD__WEBHOOK__ALLOW_PRIVATE", "true"),
        ("SWITCHBOARD__LOG__FORMAT", "json"),
        ("SWITCHBOARD__WHATSAPP__VERSION", "2.3000.1234567890"),
        ("UNRELATED__API__LISTEN", "nonsense"),
    ]);
    let config = Config::load(Some(&file.0), pairs).unwrap();
    assert_eq!(config.api.listen.port(), 2);
    assert_eq!(config.data.dir, PathBuf::from("/from/file"));
    assert_eq!(config.limits.interval, Duration::from_millis(500));
    assert!(config.webhook.allow_private);
    assert_eq!(config.log.format, logging::Format::Json);
    assert_eq!(config.whatsapp.version.map(|version| version.to_string()).as_deref(), Some("2.3000.1234567890"));
}

#[test]
fn every_mistake_is_reported_at_once_with_its_place() {
    let text = "\
[api]
listen = \"nowhere\"
lisen = \"127.0.0.1:1\"

[gate]
burst = 0
concurrent = \"many\"

[wether]
sunny = true
";
    let found = mistakes(
        "all",
        text,
        &[("SWITCHBOARD__LIMITS__BURST", "-1"), ("SWITCHBOARD__DATA__DIRECTORY", "/x"), ("SWITCHBOARD__DATA", "/x")],
    );
    for expected in [
        "FILE:2: api.listen: expected an address and a port, such as 127.0.0.1:7400, got \"nowhere\"",
        "FILE:3: api.lisen: unknown key; [api] has: concurrent_requests, deadline_seconds, listen, stream_patience_seconds",
        "FILE:6: gate.burst: expected an integer from 1 to 10000, got 0",
        "FILE:7: gate.concurrent: expected an integer from 1 to 10000, got \"many\"",
        "FILE:9: wether.sunny: unknown section;",
        "SWITCHBOARD__LIMITS__BURST: limits.burst: expected an integer from 1 to 1000, got something else",
        "SWITCHBOARD__DATA__DIRECTORY: data.directory: unknown key; [data] has: dir",
        "SWITCHBOARD__DATA: not of the form SWITCHBOARD__SECTION__KEY",
    ] {
        // The line of an unknown section is the line of its first key.
        let expected = expected.replace("FILE:9: wether", "FILE:10: wether");
        assert!(found.iter().any(|mistake| mistake.starts_with(&expected)), "{expected} not in {found:#?}");
    }
    assert_eq!(found.len(), 8, "{found:#?}");
}

#[test]
fn text_that_is_not_toml_is_placed_too() {
    let found = mistakes("syntax", "[api]\nlisten = \n\n[gate]\nburst = 0\n", &[]);
    assert!(found.iter().any(|mistake| mistake.starts_with("FILE:2: ")), "{found:#?}");
    assert!(found.iter().any(|mistake| mistake.starts_with("FILE:5: gate.burst: ")), "{found:#?}");
    let found = mistakes("bare", "listen = 1\n", &[]);
    assert_eq!(found, ["FILE:1: listen: a key outside of any [section]"]);
}

#[test]
fn a_missing_file_is_a_mistake() {
    let errors = Config::load(Some(&PathBuf::from("/nonexistent/switchboard.toml")), []).unwrap_err();
    assert_eq!(errors.0.len(), 1);
    assert!(errors.to_string().starts_with("/nonexistent/switchboard.toml: "));
}

#[test]
fn what_the_environment_held_is_not_repeated() {
    let secret = "ps_op_thisisasecret";
    let errors = Config::load(None, env(&[("SWITCHBOARD__API__LISTEN", secret)])).unwrap_err();
    assert!(!errors.to_string().contains(secret), "{errors}");
}
