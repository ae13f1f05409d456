//! Switchboard keeps whole fleets of WhatsApp numbers connected: one process, one supervised actor per number, durable
//! sends, signed webhooks. This page is the architecture.
//!
//! ```text
//!  callers ── gRPC, JSON ──▶ api ──▶ NumberHandle ──▶ number (ractor actor) ──▶ session ──▶ WhatsApp
//!                             │       admits, reads     │  feeds inputs,            ▲
//!                             │                         │  performs effects         └ inbound durability hook
//!                             ▼                         ▼
//!                          store ◀── one unit ── domain::number::step(input, now) -> effects   (pure)
//!                             ▲                         │
//!  customers' endpoints ◀── webhook ◀── owned task ─────┘
//!
//!  supervisor: root ─▶ 16 shards ─▶ numbers · directory (found without asking) · gate (how fast sessions open)
//! ```
//!
//! # Where things are
//!
//! | folder | what it is |
//! | --- | --- |
//! | [`domain`] | the rules, pure: no async, clock, randomness or I/O. [`domain::number`] is a whole number as a machine |
//! | [`telemetry`] | clock, randomness, backoff, metrics, logs: what the pure part must not have |
//! | [`store`] | the only folder that knows sled: group commit, keys, records; [`store::number_store`] is the seam |
//! | [`session`] | the only folder that knows WhatsApp: commands in, events out ([`session::contract`]) |
//! | [`webhook`] | payload, signature, address guard, HTTP client |
//! | [`number`] | the actor of one number: a thin shell around `domain::number`, and its [`number::handle`] |
//! | [`supervisor`] | root, shards, directory, gate, fleet |
//! | [`api`] | use cases with authorisation; `api::grpc` and `api::http` only translate |
//! | [`config`] | what an operator may set; `config/default.toml` is its documentation |
//! | [`daemon`] | the composition root: the only place that wires |
//! | [`cli`] | the command line |
//! | `sandbox`, `demo` | a loopback WhatsApp and the story told with it; only with the feature `sandbox` |
//!
//! Imports point down this list only: domain ← telemetry ← store, session, webhook ← number ← supervisor ← api ← daemon.
//! `tests/tidy.rs` holds the table and fails on any other arrow.
//!
//! # The five flows
//!
//! * **Send.** The handle takes a permit, looks up the chat and casts. One step makes one unit {history row, outbox row,
//!   idempotency record, counters}, written only if the request id is new. The caller is answered when it is on disk. If the
//!   limiter allows it at once, the same unit counts the first attempt. WhatsApp's ack settles it; a lost connection puts
//!   every unanswered attempt back in line, under the same WhatsApp id.
//! * **Receive.** The library's durability hook hands over what it decrypted and waits. One unit {history, dedupe key,
//!   event, webhook rows}; then the hook returns, and only then does WhatsApp get its receipt.
//! * **Crash.** The shard drops the old state (and with it the session), waits the restart backoff and starts the actor
//!   again; it claims the next epoch, reads its records and goes on. A lost socket is not a crash: it is an input.
//! * **The disk fails.** The committer gives the volume up at the first error: no read, no write, no answer. Its numbers'
//!   actors end (that is no crash) and wait; the store's mender opens the volume again when there is room, and they claim.
//! * **Boot.** The directory is complete before the API answers; every number then claims, loads and asks the gate.
//!
//! # Invariants, and the test that guards each
//!
//! | what must never be otherwise | guarded by |
//! | --- | --- |
//! | what was answered is on disk | `it::restart::nothing_accepted_is_lost_or_shown_twice_when_killed_in_the_middle` |
//! | one chat's sends leave in order, one at a time | `domain::outbox::tests::per_chat_order_holds`, `it::story` |
//! | never sent early, late, withdrawn, or as a new chat during a hold | `sim::no_promise_breaks_in_any_storm` |
//! | no limit is passed, also over restarts; nothing leaves during a pause | the same simulation (`pacing`), `domain::limiter::tests`, `it::router` |
//! | the predicted wait is what happens, within the bound of the contract | `domain::number::predicting::tests` |
//! | a router that goes by capacities loses and doubles nothing, and leaves a closed number at once | `it::router` |
//! | what could not be decrypted gets its content in the same row, and is told once | `domain::number::receiving::tests`, `it::inbound` |
//! | each of WhatsApp's answers to a message ends as its code says | `domain::ack::tests`, `it::answers` |
//! | a device's request for a repeat is answered, also after a crash | `session::link::repeats`, `faults::kill` |
//! | a message that was opened and is nowhere is asked for again, not acknowledged | `tests/session.rs` |
//! | what was taken in is known again on the next connection, after whatever outage | `session::link::backend::tests`, `faults::line` |
//! | an order is answered clearly in every state, and the same again | `it::surface` |
//! | what a number takes is told, and goes with its connection | `it::surface` |
//! | messages that wait to be decrypted have a limit | `session::link::backlog::tests` |
//! | statuses only climb | `domain::message::tests::the_ladder_only_climbs_whatever_the_order` |
//! | the same request id sends once, and is answered again, also after a crash | `it::contract`, `it::restart`, `it::answers` |
//! | events are numbered without a gap | `it::story::what_a_phone_writes_arrives_as_webhook_event_and_history` |
//! | no Signal message key is used twice | the sandbox counts; `it::restart`, `it::story`, the demo |
//! | every state answers every input of its connection, and each ending has its verdict | `domain::lifecycle::tests`, `it::verdicts` |
//! | no number is shown online without an answer; a dead line is noticed | `session::link::signals::tests`, `it::verdicts` |
//! | only the phone that is meant gets linked; unlinked, a number keeps what it has | `it::linking` |
//! | an account that wants its passkey is linked by its owner's answer to that request, and by nothing else; a refused or late one leaves no trace | `it::linking`, `session::link::passkey::tests`, `domain::passkey::tests` |
//! | a clock that jumps ends no park and deletes nothing | `telemetry::clock::tests`, `it::verdicts` |
//! | parked and logged-out numbers do not connect | `domain::lifecycle::tests::nothing_connects_that_must_not` |
//! | never two sockets of one number | `domain::lifecycle::tests::nothing_connects_that_must_not`; the sandbox counts |
//! | never more or faster connections than the gate allows; nobody waits for ever; a fleet comes back by itself | `domain::gate::tests`, `sim::gate` |
//! | a refused version (405) stops the fleet, one canary tries the next one; the last version found survives | `it::storms`, `session::link::version::tests` |
//! | a proxy that is down is tried by one number at a time; its password is seen by nobody | `domain::proxy::tests`, `supervisor::proxies::tests`, `it::proxies` |
//! | after a day of trouble every number is where WhatsApp's or its operator's last word put it, and none came early | `sim::fleet` |
//! | one number's crash is nobody else's; one that crashes again and again is set aside alone | `it::failures` |
//! | nothing of one tenant is seen by another | `it::isolation` |
//! | the default build verifies WhatsApp's certificates | `.ci/run`, by `cargo tree` |
//! | all of these of the pure core, in any storm and with a crash at any point | `sim::no_promise_breaks_in_any_storm` |
//! | a power cut at any moment, and a disk that fails, lose nothing acknowledged | `store::tests::crashes` |
//! | a full or broken disk loses nothing, says so, and is left behind without a restart | `it::disk` |
//! | lives that end soon do not fill the disk | `store::tests::damage::a_log_that_outgrew_its_rows_is_copied_at_a_start_and_a_lean_one_is_not` |
//! | a damaged volume is never deleted, touched again, or taken for a new one | `store::tests::damage`, `it::disk` |
//! | nothing lies on disk in clear, no value can be moved, deletion is final | `it::sealing`, `store::tests::sealing` |
//! | all of these when the process is killed at any place | `faults::kill` |
//! | nothing is lost, doubled or reordered on a bad line | `faults::line` |
//! | what is kept long enough goes, nothing else does, and nothing that a queue still needs | `sim::no_promise_breaks_in_any_storm`, `store::tests::sweeping` |
//! | of an erased contact nothing is left | the same simulation, `store::tests::sweeping`, `it::retention` |
//! | an endpoint that is down for a day loses nothing, and delays nobody | `sim::outage` |
//! | no number or endpoint takes every webhook request | `domain::budget::tests`, `it::webhooks::whoever_fills_the_room_for_requests_leaves_some_to_everybody` |
//! | a stream skips nothing without saying so | `it::streams`, the same simulation |
//! | folders stay apart | `tests/tidy.rs` |

//!
//! Where the promises seen from outside are kept, by the letters that reliability work uses:
//!
//! | | what | guarded by |
//! | --- | --- | --- |
//! | I1 | no acknowledged send is lost | `sim::no_promise_breaks_in_any_storm`, `faults::kill` |
//! | I2 | no message shows twice | the same |
//! | I3 | nobody gets what was not submitted, byte for byte | the same |
//! | I4 | inbound at least once, durable before it is acknowledged | the same, `store::tests::crashes` |
//! | I5 | webhooks at least once, in order per chat or with a declared gap | `sim`, `sim::outage`, `it::webhooks` |
//! | I6 | statuses never go back | `sim`, `domain::message::tests` |
//! | I7 | no Signal key is used twice | the sandbox counts: `faults::kill`, `faults::line`, `it` |
//! | I8 | one number's trouble is nobody else's | `it::isolation`, `it::failures`, `domain::budget::tests` |
//! | I9 | after the faults everything settles | `sim`: every storm ends in a calm with a deadline |
//! | I10 | parked and logged-out numbers do not connect early | `domain::lifecycle::tests`, `sim` |
//! | I11 | memory is bounded | `sim`: windows, side lanes and idle wake-ups have limits |

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
#[cfg(feature = "sandbox")]
pub mod demo;
pub mod domain;
pub mod number;
#[cfg(feature = "sandbox")]
pub mod sandbox;
pub mod session;
pub mod store;
pub mod supervisor;
pub mod telemetry;
pub mod webhook;
