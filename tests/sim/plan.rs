//! What one seed's world is like. Each seed draws its own mixture of faults: a world in which everything fails at
//! once hides the failures that need something else to work.

use std::time::Duration;

use switchboard::domain::limiter::{Limits, NewRecipients, Pace};
use switchboard::domain::number::OnUnknown;

use switchboard::domain::retention::{Policy, Retention, Rules};

use super::rng::Rng;

/// Chances are in per mille.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Crash before or after any single effect.
    pub(crate) crash: u64,
    /// Longest time from a commit to its group, and from a group to its flush, in milliseconds.
    pub(crate) disk: u64,
    /// Longest way from one part to another, in milliseconds.
    pub(crate) hop: u64,
    /// Most commits in one group.
    pub(crate) group: u64,
    /// Longest pause between two things that the world does, in milliseconds.
    pub(crate) pace: u64,
    /// The connection is cut by a send.
    pub(crate) cut_on_send: u64,
    /// The session does not write an attempt.
    pub(crate) not_written: u64,
    /// WhatsApp refuses with a code.
    pub(crate) refused: u64,
    /// A refusal locks new chats.
    pub(crate) locked: u64,
    /// A call is for later; a call has a deadline of its own.
    pub(crate) scheduled: u64,
    pub(crate) deadline: u64,
    /// A message cannot be decrypted at first.
    pub(crate) opaque: u64,
    /// What is done in doubt.
    pub(crate) on_unknown: OnUnknown,
    /// An answer of WhatsApp is lost, or comes twice.
    pub(crate) ack_odd: u64,
    /// A connection does not come about.
    pub(crate) no_login: u64,
    /// Its proxy is down when its turn to connect comes.
    pub(crate) proxy_down: u64,
    /// A webhook attempt fails.
    pub(crate) webhook: u64,
    /// An answer to a caller is lost.
    pub(crate) answer_lost: u64,
    /// A call carries a request id.
    pub(crate) request_id: u64,
    /// An end of a connection that does not heal by itself, among all ends.
    pub(crate) hard_close: u64,
    /// The daemon is asked to drain.
    pub(crate) drain: u64,
    /// Endpoints that the owner wants at most.
    pub(crate) endpoints: usize,
    /// People written to and writing.
    pub(crate) people: u64,
    /// How long things are kept.
    pub(crate) rules: Rules,
    /// Somebody asks to be forgotten, among what the world does.
    pub(crate) erase: u64,
    /// The owner changes what is kept, among what the world does.
    pub(crate) retention: u64,
    /// The owner pauses sending, among what the world does.
    pub(crate) pauses: u64,
    /// What the number is allowed.
    pub(crate) limits: Limits,
    /// Inputs of one stormy chapter, and chapters.
    pub(crate) chapter: u64,
    pub(crate) chapters: u64,
}

/// A world with long waits looks for old rows no more often than this: it would do little else.
const SELDOM: Duration = Duration::from_secs(600);

impl Plan {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let fast = Pace { interval: Duration::from_millis(1), burst: 100 };
        let open = Limits { number: fast, chat: fast, new_recipients: NewRecipients::Unlimited };
        let brisk = Limits { number: Pace { interval: Duration::from_millis(100), burst: 5 }, ..open };
        // Whoever never wrote and is one too many waits for a day.
        let paced = Limits {
            number: Pace { interval: Duration::from_millis(20), burst: 3 },
            chat: Pace { interval: Duration::from_millis(700), burst: 2 },
            new_recipients: NewRecipients::PerDay(30),
        };
        let sweep_every = Duration::from_secs(rng.pick(&[1, 30, 600]));
        Self {
            crash: rng.pick(&[0, 1, 3, 10]),
            disk: rng.pick(&[0, 3, 20, 400]),
            hop: rng.pick(&[0, 2, 10, 100]),
            group: rng.pick(&[1, 4, 64]),
            pace: rng.pick(&[5, 50, 500]),
            cut_on_send: rng.pick(&[0, 5, 30]),
            not_written: rng.pick(&[0, 10, 100]),
            refused: rng.pick(&[0, 20, 100]),
            // A hold lasts a day.
            locked: if sweep_every >= SELDOM { rng.pick(&[100, 500]) } else { 0 },
            scheduled: rng.pick(&[0, 50, 300]),
            deadline: rng.pick(&[0, 50, 300]),
            opaque: rng.pick(&[0, 50, 300]),
            on_unknown: rng.pick(&[OnUnknown::Resend, OnUnknown::Resend, OnUnknown::Fail]),
            ack_odd: rng.pick(&[0, 20, 100]),
            no_login: rng.pick(&[0, 100, 400]),
            webhook: rng.pick(&[0, 50, 300]),
            answer_lost: rng.pick(&[0, 50, 200]),
            request_id: rng.pick(&[0, 500, 1000]),
            hard_close: rng.pick(&[0, 100, 400]),
            drain: rng.pick(&[0, 30, 300]),
            endpoints: rng.pick(&[0, 1, 2, 2, 4, 20]),
            people: rng.pick(&[1, 3, 12, 60]),
            rules: Rules {
                policy: Policy {
                    events_kept: Duration::from_secs(rng.pick(&[600, 7200, 200_000, 600_000])),
                    events_max: rng.pick(&[30, 1_000_000]),
                    dead_letters_kept: Duration::from_secs(rng.pick(&[3600, 200_000])),
                    sweep_every,
                    ..Policy::default()
                },
                retention: rng.pick(&[Retention::KeepAll, Retention::KeepDays(1), Retention::RelayOnly]),
            },
            erase: rng.pick(&[0, 0, 100, 500]),
            retention: rng.pick(&[0, 0, 50, 300]),
            limits: match sweep_every >= SELDOM {
                true => rng.pick(&[open, brisk, paced, Limits::LINKED]),
                false => {
                    let everybody = |limits| Limits { new_recipients: NewRecipients::Unlimited, ..limits };
                    rng.pick(&[open, brisk, everybody(paced), everybody(Limits::LINKED)])
                }
            },
            pauses: rng.pick(&[0, 0, 300]),
            chapter: 500 + rng.below(1000),
            chapters: 4,
            proxy_down: rng.pick(&[0, 0, 300]),
        }
    }

    /// Whether long waits cost little.
    pub(crate) fn sweeps_seldom(&self) -> bool {
        self.rules.policy.sweep_every >= SELDOM
    }
}
