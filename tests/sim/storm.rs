//! The course of a world: chapters of storm, each followed by a calm in which everything must settle.

use std::time::Duration;

use switchboard::domain::endpoint::ENDPOINTS_MAX;
use switchboard::domain::lifecycle::{self, State};
use switchboard::domain::number::Input;
use switchboard::domain::orders::Pause;
use switchboard::domain::outbox::IN_FLIGHT_MAX;
use switchboard::domain::time::Timestamp;

use super::promises::Promises;
use super::world::{Figures, Happens, World};

/// Longest time to settle: the longest webhook schedule, the longest ban, and a hold with the budgets of the days behind
/// it fit in.
const SETTLES_WITHIN: u64 = 130 * 3600 * 1000;
/// Time between two things that the world does in a calm.
const CALM_STIRS: u64 = 60_000;
/// Time between two looks at the number by its operator.
const NUDGE_EVERY: u64 = 60_000;

impl World {
    /// Runs the world to its end.
    pub(crate) fn run(&mut self) -> Figures {
        let start = self.now;
        self.outside(1, Happens::Stirs);
        self.outside(NUDGE_EVERY, Happens::Nudges);
        for _ in 0..self.plan.chapters {
            self.storm();
            self.settle();
        }
        self.figures.virtual_millis = self.now - start;
        self.figures.transmits = self.promises.transmits;
        self.figures.repeats = self.promises.repeats;
        self.figures.late = self.promises.hooks.late;
        self.figures.gaps = self.promises.hooks.gaps;
        self.figures.replayed = self.promises.hooks.replayed;
        self.figures.dead = self.promises.hooks.dead;
        self.figures.messages = self.disk.durable.messages.len() as u64;
        self.figures.events = self.disk.durable.counters.event;
        self.figures
    }

    fn storm(&mut self) {
        self.calm = false;
        let until = self.figures.inputs + self.plan.chapter;
        while self.figures.inputs < until {
            self.advance();
        }
    }

    fn settle(&mut self) {
        self.note(|| "CALM".to_owned());
        self.calm = true;
        self.moods.calm();
        self.order_pause(None);
        let until = self.now + SETTLES_WITHIN;
        while !self.is_settled() {
            assert!(self.now < until, "nothing settles: {}", self.unsettled());
            self.advance();
        }
        // What nobody waits for may still be on its way to the disk.
        self.flush(usize::MAX);
        self.promises.all_kept(&self.disk.durable);
        self.forget();
        // Late deliveries may just be ending.
        let until = self.now + NUDGE_EVERY;
        while !self.disk.agrees() {
            assert!(self.now < until, "the disk does not come to rest");
            self.advance();
        }
        self.flush(usize::MAX);
        if let Some(number) = &self.number {
            let living = self.disk.durable.endpoints.keys();
            let queued: u64 = living.map(|ordinal| self.disk.durable.queued(*ordinal).count() as u64).sum();
            assert_eq!(number.deliveries().depth(), queued, "the webhook queue is counted wrong");
            assert_eq!(self.disk.durable.outbox.len(), 0, "settled rows are left on disk");
        }
    }

    /// Everything that is too old goes, in a few passes.
    fn forget(&mut self) {
        let rules = self.plan.rules;
        let margin = rules.sweep_every() * 2 + Duration::from_secs(60);
        let until = self.now + 4 * u64::try_from(margin.as_millis()).unwrap_or(0) + 600_000;
        loop {
            self.flush(usize::MAX);
            let left = Promises::left_over(&self.disk.durable, &rules, Timestamp(self.now), margin);
            let left = left.or_else(|| self.promises.left_of_erased(&self.disk.durable));
            let Some(left) = left else { return };
            assert!(self.now < until, "is not forgotten: {left}");
            let pause = self.now + 10_000;
            while self.now < pause {
                self.advance();
            }
        }
    }

    fn is_settled(&self) -> bool {
        let Some(number) = &self.number else { return false };
        self.draining.is_none()
            && number.life().state.is_connected()
            && number.outbox().is_empty()
            && self.callers.all_answered()
            && self.waiters.is_empty()
            && self.whatsapp.is_idle()
            && self.disk.agrees()
            && !self.promises.hooks.is_delivering()
            && self.promises.hooks.owes_nothing()
    }

    pub(crate) fn unsettled(&self) -> String {
        let Some(number) = &self.number else { return "no machine".to_owned() };
        format!(
            "state {:?}, outbox {} ({} in flight), webhooks {}, wake {:?}, {} waiters, callers {}, whatsapp {}, disk {}, hooks {}",
            number.life().state,
            number.outbox().len(),
            number.outbox().in_flight(),
            number.deliveries().depth(),
            number.next_wake(),
            self.waiters.len(),
            self.callers.all_answered(),
            self.whatsapp.is_idle(),
            self.disk.is_idle(),
            self.promises.hooks.owing(),
        )
    }

    /// One thing that the world does by itself.
    pub(crate) fn stir(&mut self) {
        let mut pause = 1 + self.rng.below(self.plan.pace);
        if self.calm {
            self.hand_over_if_online();
            return self.outside(CALM_STIRS, Happens::Stirs);
        }
        self.check_bounds();
        if let Some(input) = self.needs_hand()
            && self.rng.chance(200)
        {
            self.order(input);
        }
        match self.rng.below(100) {
            0..38 => self.new_call(),
            38..40 => self.cancel_some(),
            40..45 => self.repeat_call(),
            45..72 => self.new_inbound(),
            72..77 => self.repeat_inbound(),
            77..80 => self.cut(),
            80..84 => self.ping(),
            84..86 => {
                let input = [lifecycle::Input::Start, lifecycle::Input::Stop, lifecycle::Input::Pair];
                let index = self.rng.index(3);
                self.order(input[index].clone());
            }
            86..88 if self.promises.hooks.known().count() < self.plan.endpoints => self.add_endpoint(),
            88 if self.rng.chance(500) => self.remove_endpoint(),
            88..90 => self.order_of_endpoint(),
            90..93 => self.change_mood(),
            93 => self.read_stream(),
            94 => {
                if self.rng.chance(self.plan.erase) {
                    self.erase_somebody();
                }
                if self.rng.chance(self.plan.retention) {
                    self.change_retention();
                }
                if self.rng.chance(self.plan.pauses) {
                    self.change_pause();
                }
            }
            95..98 => {
                if self.rng.chance(self.plan.drain) {
                    self.drain();
                }
            }
            // A quiet time: long waits pass.
            _ => pause += self.rng.pick(&[1000, 10_000, 70_000, 400_000]),
        }
        self.outside(pause, Happens::Stirs);
    }

    /// The owner pauses sending, or lets it go on.
    fn change_pause(&mut self) {
        let now = Timestamp(self.now);
        let far = now.after(Duration::from_millis(1 + self.rng.below(600_000)));
        let until = self.rng.pick(&[None, Some(far)]);
        let pause = self.rng.chance(600).then_some(Pause { since: now, until });
        self.order_pause(pause);
    }

    /// On disk at once, and then the machine is told.
    fn order_pause(&mut self, pause: Option<Pause>) {
        self.orders.pause = pause;
        self.step(Input::Orders(self.orders));
    }

    fn order(&mut self, input: lifecycle::Input) {
        if self.number.is_some() {
            self.promises.told();
            self.step(Input::Life(input));
        }
    }

    pub(crate) fn nudge(&mut self) {
        self.outside(NUDGE_EVERY, Happens::Nudges);
        if self.draining.is_some_and(|since| self.now > since + 4 * NUDGE_EVERY) {
            panic!("the drain does not end: {}", self.unsettled());
        }
        let parked = matches!(self.state(), Some(State::Parked { .. }));
        if let Some(input) = self.needs_hand()
            && self.calm
            && !parked
        {
            self.order(input);
        }
        if self.calm {
            self.start_endpoints();
        }
    }

    fn check_bounds(&mut self) {
        self.check_windows();
        let Some(number) = &self.number else { return };
        assert!(number.outbox().in_flight() <= IN_FLIGHT_MAX, "{} in flight", number.outbox().in_flight());
        assert!(number.deliveries().endpoints().count() <= ENDPOINTS_MAX);
    }
}
