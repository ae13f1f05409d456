//! The rules of the house, checked: who may import whom, which folder alone knows which crate, what is never written.
//! Every message says why. A rule without a check is a wish.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Module and the modules it may name. Nothing points up, nothing sideways except as listed.
const LAYERS: [(&str, &[&str]); 14] = [
    ("domain", &[]),
    ("telemetry", &["domain"]),
    ("store", &["domain", "telemetry"]),
    ("session", &["domain", "telemetry", "store"]),
    ("webhook", &["domain", "telemetry"]),
    ("number", &["domain", "telemetry", "store", "session", "webhook"]),
    ("supervisor", &["domain", "telemetry", "store", "session", "webhook", "number"]),
    ("api", &["domain", "telemetry", "store", "session", "webhook", "number", "supervisor"]),
    ("config", &["domain", "telemetry"]),
    ("sandbox", &["domain", "telemetry"]),
    ("daemon", &["domain", "telemetry", "store", "session", "webhook", "number", "supervisor", "api", "config"]),
    // Of the api these borrow the generated client alone.
    ("demo", &["domain", "telemetry", "api", "config", "daemon", "sandbox"]),
    ("cli", &["domain", "telemetry", "api", "config", "daemon", "sandbox", "demo"]),
    ("main", &["cli"]),
];

/// Something that only some places may write. The needle starts at a word boundary and is looked for in shipped code.
struct Only {
    needles: &'static [&'static str],
    places: &'static [&'static str],
    why: &'static str,
}

const ONLY: [Only; 19] = [
    Only {
        needles: &["sled::"],
        places: &["src/store/"],
        why: "the second store will be SQL: nothing else may know this one",
    },
    Only {
        needles: &["whatsapp_rust::", "wacore::", "wacore_", "waproto::", "buffa::"],
        places: &["src/session/", "src/sandbox/"],
        why: "WhatsApp's protocol stays behind SessionCommand and SessionEvent",
    },
    Only {
        needles: &["tokio_tungstenite::"],
        places: &["src/session/", "src/sandbox/"],
        why: "the transport belongs to the session",
    },
    Only {
        needles: &["tonic::", "tonic_types::", "tonic_health::", "tonic_reflection::", "prost::", "prost_types::"],
        places: &["src/api/grpc/", "src/cli/", "src/demo/"],
        why: "generated types are turned into domain types at the edge",
    },
    Only {
        needles: &["axum::"],
        // The daemon names the router that it serves; the demo plays a customer's webhook receiver.
        places: &["src/api/http/", "src/sandbox/", "src/demo/", "src/daemon.rs"],
        why: "HTTP stays at the edge",
    },
    Only {
        needles: &["hyper::", "hyper_util::"],
        // A tunnel through a number's proxy begins with HTTP.
        places: &["src/api/", "src/sandbox/", "src/session/link/proxy.rs"],
        why: "HTTP stays at the edge",
    },
    Only {
        needles: &["reqwest::"],
        places: &["src/webhook/", "src/session/"],
        why: "outgoing requests pass the address guard of the webhook client, or fetch WhatsApp's own media and version",
    },
    Only {
        needles: &["ractor::"],
        places: &["src/number/", "src/supervisor/", "src/daemon.rs", "src/daemon/"],
        why: "callers hold handles, never actor references",
    },
    Only {
        needles: &["use backoff", "ExponentialBackoff"],
        places: &["src/telemetry/backoff.rs"],
        why: "the crate gives up after 15 minutes by default; one file knows how to ask it",
    },
    Only {
        needles: &["counter!(", "gauge!(", "histogram!(", "metrics_exporter_prometheus::"],
        places: &["src/telemetry/metrics.rs"],
        why: "every metric name in one file, every histogram with buckets",
    },
    Only {
        needles: &["tracing_subscriber::", "tracing_log::"],
        places: &["src/telemetry/logging.rs"],
        why: "one place decides what is logged",
    },
    Only {
        needles: &["SystemTime", "Instant::now"],
        places: &[
            "src/telemetry/clock.rs",
            "src/sandbox/",
            "src/demo/",
            // Pauses of a connection, on tokio's clock, which tests can stop; nothing durable depends on them.
            "src/session/link/",
            // How long a flush and a delivery took: figures for people, no decision depends on them.
            "src/store/committer.rs",
            "src/webhook/client.rs",
        ],
        why: "take a Clock, so that tests own time",
    },
    Only {
        needles: &["rand::"],
        // The library draws its keys from the system; a connection's ticks are spread by it as well.
        places: &["src/telemetry/rng.rs", "src/sandbox/", "src/session/link/"],
        why: "take a Random, so that a seed repeats a failure",
    },
    Only {
        needles: &["env::var", "env::vars", "env::args"],
        places: &["src/main.rs", "src/cli/"],
        why: "parts are told, they do not look around",
    },
    Only {
        needles: &["println!(", "eprintln!(", "print!(", "eprint!("],
        places: &["src/main.rs", "src/cli/", "src/demo/"],
        why: "a daemon logs; only commands print",
    },
    Only {
        needles: &["process::exit", "process::abort"],
        // A failpoint is a crash on purpose, in builds for tests alone.
        places: &["src/main.rs", "src/telemetry/failpoint.rs"],
        why: "leave by returning, so that the store is closed",
    },
    Only {
        needles: &["tokio::spawn(", "task::spawn("],
        // Each of these is wrapped in an owner that aborts it when dropped.
        places: &["src/daemon.rs", "src/sandbox/", "src/demo/"],
        why: "every task has an owner that ends it: use a JoinSet or an owned task",
    },
    Only {
        needles: &["flush_async"],
        places: &[],
        why: "sled's flush_async deadlocks with seven callers; the committer flushes",
    },
    Only {
        needles: &["todo!(", "unimplemented!(", "dbg!(", ".unwrap()", ".expect(\"", ".unwrap_err()", ".expect_err(\""],
        places: &[],
        why: "shipped code handles its errors",
    },
];

/// What the pure core never writes.
const IMPURE: [&str; 13] = [
    "async ",
    ".await",
    "tokio::",
    "futures_util::",
    "std::fs",
    "std::io",
    "std::net",
    "std::thread",
    "std::sync",
    "tracing::",
    "metrics::",
    "rand::",
    "Instant",
];

/// What no log line may hold.
const PRIVATE: [&str; 7] = ["digits()", "e164()", "reveal()", ".text", "text()", "body", "secret"];

const TOP_LEVEL: [&str; 10] =
    ["Cargo.toml", "Cargo.lock", "LICENSE", "README.md", "benches", "build.rs", "deploy", "proto", "src", "tests"];
/// Written by running things here; also in .gitignore.
const IGNORED: [&str; 3] = ["target", "data", "proptest-regressions"];

const NAMES_BANNED: [&str; 8] = ["util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"];

/// `mod.rs` files that hold more than a list. Only shrinks.
const MOD_FILES_WITH_CODE: [&str; 1] = ["src/session/link/backend/mod.rs"];

const FUNCTION_LINES_MAX: usize = 70;
/// Functions that are longer, and how long. The list only shrinks: a longer one fails, and so does one that got short.
const LONG_FUNCTIONS: [(&str, &str, usize); 0] = [];

struct File {
    path: String,
    text: String,
    /// The text without comments and the insides of literals, same lines.
    code: String,
    /// The code without its tests.
    shipped: String,
}

impl File {
    fn new(path: &str, text: &str) -> Self {
        let code = blank_literals(text);
        // A file of tests is declared under `#[cfg(test)]` elsewhere.
        let is_test = path.ends_with("/tests.rs") || path.contains("/tests/");
        let shipped = if is_test { String::new() } else { blank_tests(&code) };
        Self { path: path.to_owned(), text: text.to_owned(), code, shipped }
    }

    /// The top-level module it belongs to.
    fn layer(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let name = inside.split('/').next()?;
        Some(name.strip_suffix(".rs").unwrap_or(name))
    }

    /// Modules between it and the crate root.
    fn depth(&self) -> usize {
        let parts = self.path.matches('/').count();
        if self.path.ends_with("/mod.rs") { parts - 1 } else { parts }
    }
}

// === the rules ===

#[test]
fn imports_point_down() {
    let mut problems = Vec::new();
    for file in sources("src") {
        let Some(layer) = file.layer() else { continue };
        if layer == "lib" {
            continue;
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
            problems.push(format!("{}: module `{layer}` is not in the table of layers", file.path));
            continue;
        };
        for named in modules_named(&file) {
            if named != layer && !allowed.contains(&named.as_str()) {
                problems.push(format!("{}: `{layer}` may not name `{named}`: imports point down only", file.path));
            }
        }
        problems.extend(climbs_out(&file));
        if ["cli", "demo"].contains(&layer) && file.shipped.replace("api::grpc::proto", "").contains("crate::api") {
            problems.push(format!("{}: of the api the commands borrow the generated client alone", file.path));
        }
    }
    assert_none(&problems);
}

#[test]
fn crates_and_words_stay_where_they_belong() {
    let mut problems = Vec::new();
    for file in sources("src") {
        for rule in &ONLY {
            if rule.places.iter().any(|place| file.path.starts_with(place)) {
                continue;
            }
            for needle in rule.needles {
                for line in lines_with(&file.shipped, needle) {
                    problems.push(format!("{}:{line}: `{needle}`: {}", file.path, rule.why));
                }
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn the_domain_is_pure() {
    let mut problems = Vec::new();
    for file in sources("src/domain") {
        for needle in IMPURE {
            for line in lines_with(&file.shipped, needle) {
                problems.push(format!("{}:{line}: `{needle}`: the domain is replayed from its inputs", file.path));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn every_file_says_what_it_is() {
    let mut problems = Vec::new();
    for file in all_sources() {
        let head = file.text.lines().take_while(|line| line.starts_with("//!")).count();
        if head == 0 {
            problems.push(format!("{}: must start with `//!`: what it is and why", file.path));
        }
        // The crate's is the map; a bench's says how to run it.
        let may_be_long = file.path == "src/lib.rs" || file.path.starts_with("benches/");
        if head > 5 && !may_be_long {
            problems.push(format!("{}: {head} lines of `//!`: five are enough", file.path));
        }
        let name = Path::new(&file.path).file_stem().unwrap().to_str().unwrap();
        if NAMES_BANNED.contains(&name) {
            problems.push(format!("{}: `{name}` says nothing: name the thing", file.path));
        }
    }
    assert_none(&problems);
}

#[test]
fn a_mod_file_is_a_list() {
    let mut problems = Vec::new();
    for file in sources("src") {
        if !file.path.ends_with("/mod.rs") {
            continue;
        }
        for (index, line) in file.text.lines().enumerate() {
            let declares =
                line.ends_with(';') && ["mod ", "pub mod ", "pub use "].iter().any(|start| line.starts_with(start));
            let attribute = line.starts_with("#[") && line.ends_with(']');
            let lists = declares || attribute || line.is_empty() || line.starts_with("//");
            if !lists && !MOD_FILES_WITH_CODE.contains(&file.path.as_str()) {
                problems.push(format!("{}:{}: only `//!` and the list of modules", file.path, index + 1));
                break;
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn nothing_is_left_for_later() {
    let mut problems = Vec::new();
    for file in all_sources() {
        for word in [concat!("FIX", "ME"), concat!("TO", "DO"), concat!("XX", "X")] {
            for line in lines_with(&file.text, word) {
                problems.push(format!("{}:{line}: `{word}`: do it, or open an issue", file.path));
            }
        }
        for word in ["#[ignore", "#[should_panic", "dbg!("] {
            for line in lines_with(&file.code, word) {
                problems.push(format!("{}:{line}: `{word}`: a test runs, and says what it expects", file.path));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn functions_fit_a_screen() {
    let mut problems = Vec::new();
    let mut long = BTreeSet::new();
    for file in sources("src") {
        for (name, lines) in functions(&file.shipped) {
            if lines <= FUNCTION_LINES_MAX {
                continue;
            }
            let listed = LONG_FUNCTIONS.iter().find(|(path, function, _)| *path == file.path && *function == name);
            match listed {
                Some((_, _, most)) if lines <= *most => drop(long.insert((file.path.clone(), name))),
                Some((_, _, most)) => {
                    problems.push(format!("{}: `{name}` grew from {most} to {lines} lines", file.path));
                }
                None => {
                    problems.push(format!("{}: `{name}` has {lines} lines, at most {FUNCTION_LINES_MAX}", file.path));
                }
            }
        }
    }
    for (path, name, _) in LONG_FUNCTIONS {
        if !long.contains(&(path.to_owned(), name.to_owned())) {
            problems.push(format!("{path}: `{name}` is short now: take it off the list"));
        }
    }
    assert_none(&problems);
}

#[test]
fn log_lines_hold_nothing_private() {
    let mut problems = Vec::new();
    for file in sources("src") {
        for (line, arguments) in log_calls(&file.shipped) {
            for word in PRIVATE {
                if lines_with(&arguments, word).next().is_some() {
                    problems.push(format!(
                        "{}:{line}: `{word}` in a log line: numbers, texts and secrets stay out",
                        file.path
                    ));
                }
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn metric_names_are_in_one_place() {
    let mut problems = Vec::new();
    for file in sources("src") {
        if file.path.starts_with("src/telemetry/") {
            continue;
        }
        for line in lines_with(&file.text, "\"switchboard_") {
            problems.push(format!("{}:{line}: metric names live in telemetry/", file.path));
        }
    }
    assert_none(&problems);
}

#[test]
fn every_failpoint_stands_in_one_place() {
    let table = fs::read_to_string(root().join("src/telemetry/failpoint.rs")).unwrap();
    let (_, rows) = table.split_once("\npoints! {").unwrap();
    let points: Vec<_> =
        rows.lines().take_while(|line| *line != "}").filter_map(|line| line.trim().split_once(" \"")).collect();
    let sources: Vec<_> = sources("src").into_iter().filter(|file| file.path != "src/telemetry/failpoint.rs").collect();
    let mut problems = Vec::new();
    for (point, _) in points.iter().filter(|(point, _)| !point.starts_with("///")) {
        let needle = format!("Failpoint::{point}");
        let ends = |rest: &str| !rest.starts_with(is_word);
        let count: usize =
            sources.iter().map(|file| file.shipped.split(&needle).skip(1).filter(|rest| ends(rest)).count()).sum();
        if count != 1 {
            problems.push(format!("`{needle}` stands in {count} places: a kill there must mean one thing"));
        }
    }
    assert!(points.len() > 20, "the table is no longer read");
    assert_none(&problems);
}

#[test]
fn the_top_level_stays_small() {
    let mut problems = Vec::new();
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str()) && !IGNORED.contains(&name.as_str()) {
            problems.push(format!("{name}: the top level holds what a newcomer must see; put it into a folder"));
        }
    }
    assert_none(&problems);
}

// === reading the tree ===

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn all_sources() -> Vec<File> {
    let mut files = sources("src");
    files.extend(sources("tests"));
    files.extend(sources("benches"));
    files.push(File::new("build.rs", &fs::read_to_string(root().join("build.rs")).unwrap()));
    files
}

fn sources(folder: &str) -> Vec<File> {
    let mut files = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                files.push(File::new(&name, &fs::read_to_string(&path).unwrap()));
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

fn assert_none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

/// Top-level modules named by `crate::…`, or by the crate's own name in `main.rs`.
fn modules_named(file: &File) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for start in ["crate::", "switchboard::"] {
        for (at, _) in file.shipped.match_indices(start) {
            if !at_word(&file.shipped, at) {
                continue;
            }
            let rest = &file.shipped[at + start.len()..];
            match rest.strip_prefix('{') {
                None => named.extend(identifier(rest).map(str::to_owned)),
                Some(list) => named.extend(first_segments(list)),
            }
        }
    }
    named
}

/// The first segment of each entry of a `{…}` list, which starts after its opening brace.
fn first_segments(list: &str) -> Vec<String> {
    let mut segments = Vec::new();
    let mut depth = 1;
    let mut fresh = true;
    for (at, character) in list.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => fresh = true,
            _ if fresh && depth == 1 && !character.is_whitespace() => {
                fresh = false;
                segments.extend(identifier(&list[at..]).map(str::to_owned));
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    segments
}

/// `super::super::…` up to the crate root would slip past the table.
fn climbs_out(file: &File) -> Vec<String> {
    let mut problems = Vec::new();
    for (at, _) in file.shipped.match_indices("super::") {
        if !at_word(&file.shipped, at) {
            continue;
        }
        let rest = &file.shipped[at..];
        let mut supers = 0;
        while rest[supers * "super::".len()..].starts_with("super::") {
            supers += 1;
        }
        if supers >= file.depth() {
            let line = line_of(&file.shipped, at);
            problems.push(format!("{}:{line}: `super` reaches the crate root: write `crate::`", file.path));
        }
    }
    problems
}

fn identifier(text: &str) -> Option<&str> {
    let end = text.find(|character: char| !is_word(character)).unwrap_or(text.len());
    (end > 0).then(|| &text[..end])
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Whether a path or name starts here, rather than goes on.
fn at_word(text: &str, at: usize) -> bool {
    let before = &text[..at];
    !before.ends_with(is_word) && !before.ends_with("::")
}

fn lines_with<'a>(text: &'a str, needle: &'a str) -> impl Iterator<Item = usize> + 'a {
    let starts_word = needle.starts_with(is_word);
    let found = text.match_indices(needle).filter(move |(at, _)| !starts_word || at_word(text, *at));
    found.map(|(at, _)| line_of(text, at))
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// Name and length of each function with a body.
fn functions(code: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        if !at_word(code, at) {
            continue;
        }
        let Some(name) = identifier(&code[at + 3..]) else { continue };
        let Some(end) = end_of_body(&code[at..]) else { continue };
        found.push((name.to_owned(), code[at..at + end].matches('\n').count() + 1));
    }
    found
}

/// Where the body that belongs to this signature ends; `None` for a declaration.
fn end_of_body(code: &str) -> Option<usize> {
    let mut nested = 0i32;
    for (at, character) in code.char_indices() {
        match character {
            '(' | '[' => nested += 1,
            ')' | ']' => nested -= 1,
            ';' if nested == 0 => return None,
            '{' if nested == 0 => return end_of_block(code, at),
            _ => {}
        }
    }
    None
}

fn end_of_block(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0i32;
    for (at, character) in code[open..].char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(open + at + 1);
        }
    }
    None
}

/// Line and arguments of each log macro.
fn log_calls(code: &str) -> Vec<(usize, String)> {
    let mut calls = Vec::new();
    for level in ["trace!(", "debug!(", "info!(", "warn!(", "error!(", "info_span!(", "error_span!("] {
        for (at, _) in code.match_indices(level) {
            if code[..at].ends_with(is_word) {
                continue;
            }
            let arguments = &code[at + level.len()..];
            let mut nested = 1;
            let end = arguments.find(|character| {
                nested += match character {
                    '(' => 1,
                    ')' => -1,
                    _ => 0,
                };
                nested == 0
            });
            calls.push((line_of(code, at), arguments[..end.unwrap_or(0)].to_owned()));
        }
    }
    calls
}

/// Blanks `#[cfg(test)]` items: to the end of the block or statement that follows.
fn blank_tests(code: &str) -> String {
    let mut shipped = code.to_owned();
    for (at, attribute) in code.match_indices("#[cfg(test)]") {
        let rest = &code[at + attribute.len()..];
        let end = match (rest.find('{'), rest.find(';')) {
            (Some(open), semicolon) if semicolon.is_none_or(|semicolon| open < semicolon) => end_of_block(rest, open),
            (_, Some(semicolon)) => Some(semicolon + 1),
            _ => None,
        };
        let end = at + attribute.len() + end.unwrap_or(rest.len());
        let blank: String = code[at..end].chars().map(|character| if character == '\n' { '\n' } else { ' ' }).collect();
        // Blanking keeps the number of characters, and code outside of literals is ASCII or kept as it is.
        shipped = format!("{}{blank}{}", &shipped[..at], &shipped[at + (end - at)..]);
    }
    shipped
}

// === a lexer that knows literals and comments, nothing else ===

/// Replaces comments and the insides of literals by blanks, byte for byte, so that positions stay.
fn blank_literals(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = token_end(bytes, at);
        if end == at {
            // Letters beyond ASCII would make positions depend on the encoding.
            out.push(if bytes[at].is_ascii() { bytes[at] } else { b'_' });
            at += 1;
            continue;
        }
        let quoted = !bytes[at..].starts_with(b"/");
        for (offset, byte) in bytes[at..end].iter().enumerate() {
            let edge = quoted && (offset == 0 || at + offset + 1 == end);
            out.push(match byte {
                b'\n' => b'\n',
                _ if edge && byte.is_ascii() => *byte,
                _ => b' ',
            });
        }
        at = end;
    }
    String::from_utf8(out).unwrap()
}

/// End of the comment or literal that starts here, or `at` when none does.
fn token_end(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    if rest.starts_with(b"//") {
        return rest.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |length| at + length);
    }
    if rest.starts_with(b"/*") {
        return end_of_comment(bytes, at);
    }
    let in_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    match rest[0] {
        b'"' => end_of_string(bytes, at + 1),
        b'r' | b'b' | b'c' if !in_word => prefixed_end(bytes, at),
        b'\'' => end_of_character(bytes, at),
        _ => at,
    }
}

fn end_of_comment(bytes: &[u8], at: usize) -> usize {
    let mut depth = 0;
    let mut index = at;
    while index < bytes.len() {
        if bytes[index..].starts_with(b"/*") {
            depth += 1;
            index += 2;
        } else if bytes[index..].starts_with(b"*/") {
            depth -= 1;
            index += 2;
            if depth == 0 {
                return index;
            }
        } else {
            index += 1;
        }
    }
    bytes.len()
}

fn end_of_string(bytes: &[u8], inside: usize) -> usize {
    let mut index = inside;
    while index < bytes.len() {
        match bytes[index] {
            b'\\' => index += 2,
            b'"' => return index + 1,
            _ => index += 1,
        }
    }
    bytes.len()
}

/// `b"…"`, `c"…"`, `r"…"`, `br#"…"#` and the like; `at` for a plain name.
fn prefixed_end(bytes: &[u8], at: usize) -> usize {
    let letters = bytes[at..].iter().take_while(|byte| matches!(byte, b'r' | b'b' | b'c')).count().min(2);
    let mut index = at + letters;
    if !bytes[at..index].contains(&b'r') {
        return if bytes.get(index) == Some(&b'"') { end_of_string(bytes, index + 1) } else { at };
    }
    let hashes = bytes[index..].iter().take_while(|byte| **byte == b'#').count();
    index += hashes;
    if bytes.get(index) != Some(&b'"') {
        return at;
    }
    let close = [b"\"".to_vec(), vec![b'#'; hashes]].concat();
    let found = bytes[index + 1..].windows(close.len()).position(|window| window == close);
    found.map_or(bytes.len(), |offset| index + 1 + offset + close.len())
}

/// A character literal; a lifetime is none.
fn end_of_character(bytes: &[u8], at: usize) -> usize {
    if bytes.get(at + 1) == Some(&b'\\') {
        let close = bytes[at + 3..].iter().position(|byte| *byte == b'\'');
        return close.map_or(bytes.len(), |offset| at + 3 + offset + 1);
    }
    let text = String::from_utf8_lossy(&bytes[at + 1..bytes.len().min(at + 6)]).into_owned();
    let mut characters = text.chars();
    match (characters.next(), characters.next()) {
        (Some(character), Some('\'')) => at + 1 + character.len_utf8() + 1,
        _ => at,
    }
}

// === the checks, checked ===

#[test]
fn literals_and_comments_are_blanked_and_positions_stay() {
    let text = "a(\"x::y \\\" z\"); // sled::\nb('\"', '\\'', r#\"q\"q\"#); /* c /* d */ e */ fn f<'a>(x: &'a str) {}";
    let blanked = blank_literals(text);
    assert_eq!(blanked.len(), text.len());
    for gone in ["x::y", "z", "sled", "q", "d"] {
        assert!(!blanked.contains(gone), "{gone} in {blanked}");
    }
    assert!(blanked.contains("fn f<'a>(x: &'a str) {}"), "{blanked}");
}

#[test]
fn imports_are_read_in_every_form() {
    let text = "use crate::store::meta; use crate::{api::{grpc, http}, domain::id};\nfn f() { crate::number::go(); telemetry::x() }\n\
                #[cfg(test)]\nmod tests { use crate::daemon; }\n";
    let file = File::new("src/webhook/x.rs", text);
    let named: Vec<_> = modules_named(&file).into_iter().collect();
    assert_eq!(named, ["api", "domain", "number", "store"]);
}

#[test]
fn a_climb_to_the_root_is_seen() {
    let climbing = |path, text| climbs_out(&File::new(path, text)).len();
    assert_eq!(climbing("src/webhook/client.rs", "use super::guard;"), 0);
    assert_eq!(climbing("src/webhook/client.rs", "use super::super::store;"), 1);
    assert_eq!(climbing("src/webhook/mod.rs", "use super::store;"), 1);
    assert_eq!(climbing("src/api/grpc/convert.rs", "use super::super::access;"), 0);
}

#[test]
fn function_lengths_are_counted() {
    let code = "trait T { fn declared(&self) -> [u8; 4]; }\nfn short() {}\nfn long(\n    a: [u8; 2],\n) -> bool {\n    if a { b }\n    true\n}\n";
    assert_eq!(functions(code), [("short".to_owned(), 1), ("long".to_owned(), 6)]);
}

#[test]
fn log_calls_are_read_over_several_lines() {
    let calls = log_calls("x();\ntracing::warn!(\n    phone = %f(phone.digits()),\n    \"\"\n);\nterror!(body);");
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0].0, 2);
    assert!(lines_with(&calls[0].1, "digits()").next().is_some() && !calls[0].1.contains("body"));
}
