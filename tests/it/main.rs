//! End to end: the real binary as a child process, the sandbox, a webhook receiver; everything through the public
//! gRPC, JSON and webhooks. Tests wait on conditions, never on the clock; what takes hours puts the daemon's clock
//! forward. Beside each module: the promises it guards.
#![cfg(feature = "sandbox")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    clippy::large_futures,
    unreachable_pub,
    missing_docs,
    reason = "a test that cannot go on may panic"
)]

// Each answer of WhatsApp to a send (400, 404, 421, 429, 463, 475, 479, 5xx, unknown, none); on_unknown; a full queue.
mod answers;
// Keys, scopes, health, metrics; one request id, one message.
mod contract;
mod demo;
// A disk that is full or fails.
mod disk;
// Crashes and lost connections stay with their number.
mod failures;
mod harness;
// A service manager, and a limit on open files.
mod host;
// Webhooks: Retry-After, redirects, resets, trickles, garbage; two secrets during a rotation.
mod hostile;
// What cannot be decrypted keeps its place and is filled; repeats show once; an id used twice swallows nothing.
mod inbound;
// Tenants see nothing of each other.
mod isolation;
// By QR or typed code, refused for another phone, undone from either side, and again.
mod linking;
// Scheduled sends, deadlines, withdrawals; a lock that survives a kill.
mod outbox;
// Numbers behind proxies; one that is down is tried by one number at a time.
mod proxies;
// Kills and drain: nothing lost or doubled; a request whose answer died with the daemon.
mod restart;
// Days, relay-only, an erased contact.
mod retention;
// Capacities: a router that spreads by them; limits, pauses and predicted waits over restarts.
mod router;
// Nothing in clear on disk; a deleted number's key is gone.
mod sealing;
// A refused version holds the fleet: one canary at a time, healed by the operator.
mod storms;
mod story;
// Resumed without a gap, markers, expired cursors, slow readers, drain; a deleted number.
mod streams;
// Errors, tokens, cursors.
mod surface;
// Every way a connection ends or goes wrong: state, wait, reason, alert.
mod verdicts;
// Attempts, dead letters, filters, pauses, replays, 410; one that hangs beside others.
mod webhooks;
