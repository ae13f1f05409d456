//! The supervisor of one sixteenth of the numbers. Restarts a crashed number after a backoff, sets one aside that
//! crashes too often, ends one that no longer answers. Never touches a sibling, never escalates.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::domain::id::NumberId;
use crate::domain::lifecycle::{Attention, State};
use crate::domain::restart::{RestartBudget, Verdict, WINDOW};
use crate::domain::time::Timestamp;
use crate::number::actor::{Arguments, NumberActor};
use crate::number::environment::Environment;
use crate::number::handle::NumberHandle;
use crate::number::message::{NumberMessage, StoreLost};
use crate::store::error::StoreError;
use crate::telemetry::backoff::Backoff;
use crate::telemetry::metrics::{self, RestartCause};

/// How often every number is asked for a sign of life.
const WATCHDOG_EVERY: Duration = Duration::from_secs(15);
/// No sign of life for this long is a crash.
const WATCHDOG_PATIENCE: Duration = Duration::from_secs(45);
/// Numbers that lost their store start again within this time after their volume was opened.
const REOPENED_SPREAD: Duration = Duration::from_secs(3);
/// And never sooner than this after the loss.
const REOPENED_REST: Duration = Duration::from_millis(250);
/// How long a number may take to stop before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(15);

/// A number to keep running.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) handle: Arc<NumberHandle>,
    pub(super) volume: u8,
}

#[derive(Debug)]
pub(super) enum ShardMessage {
    /// Keep these running.
    Ensure(Vec<Member>),
    /// Stop this one for good; answered when its actor has ended.
    Remove(NumberId, oneshot::Sender<()>),
    /// A delayed restart is due; stale ones carry an older generation.
    Restart(NumberId, u64),
    /// An operator ends a quarantine.
    Reset(NumberId),
    /// Ask everybody for a sign of life.
    Watchdog,
    /// The root asks for one.
    Ping(oneshot::Sender<()>),
    /// Let every number finish, then answer.
    Drain { deadline: Duration, done: oneshot::Sender<()> },
    /// The deadline of the drain has come.
    DrainOver,
}

#[derive(Debug)]
enum Status {
    Running {
        actor: ActorRef<NumberMessage>,
        since: Timestamp,
    },
    /// Restart or end of quarantine is scheduled.
    Waiting,
}

#[derive(Debug)]
struct Child {
    member: Member,
    status: Status,
    generation: u64,
    budget: RestartBudget,
    backoff: Backoff,
}

#[derive(Debug)]
pub(super) struct Shard {
    pub(super) environment: Arc<Environment>,
}

#[derive(Debug)]
pub(super) struct ShardState {
    environment: Arc<Environment>,
    children: HashMap<NumberId, Child>,
    by_actor: HashMap<ActorId, NumberId>,
    draining: Option<oneshot::Sender<()>>,
    stopping: bool,
    timers: JoinSet<()>,
}

impl Actor for Shard {
    type Msg = ShardMessage;
    type State = ShardState;
    type Arguments = ();

    async fn pre_start(&self, myself: ActorRef<ShardMessage>, (): ()) -> Result<ShardState, ActorProcessingErr> {
        let mut timers = JoinSet::new();
        timers.spawn(async move {
            let mut ticks = tokio::time::interval(WATCHDOG_EVERY);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                if myself.cast(ShardMessage::Watchdog).is_err() {
                    return;
                }
            }
        });
        Ok(ShardState {
            environment: self.environment.clone(),
            children: HashMap::new(),
            by_actor: HashMap::new(),
            draining: None,
            stopping: false,
            timers,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<ShardMessage>,
        message: ShardMessage,
        state: &mut ShardState,
    ) -> Result<(), ActorProcessingErr> {
        while state.timers.try_join_next().is_some() {}
        match message {
            ShardMessage::Ensure(members) => {
                for member in members {
                    state.ensure(member, &myself).await;
                }
            }
            ShardMessage::Remove(number, done) => state.remove(number, done),
            ShardMessage::Restart(number, generation) => {
                let due = state.children.get(&number).is_some_and(|child| child.generation == generation);
                if due && !state.stopping {
                    state.spawn(number, &myself).await;
                }
            }
            ShardMessage::Reset(number) => state.reset(number, &myself).await,
            ShardMessage::Watchdog => state.watch(),
            ShardMessage::Ping(reply) => drop(reply.send(())),
            ShardMessage::Drain { deadline, done } => state.drain(deadline, done, &myself),
            ShardMessage::DrainOver => {
                for child in state.children.values() {
                    if let Status::Running { actor, .. } = &child.status {
                        actor.kill();
                    }
                }
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<ShardMessage>,
        event: SupervisionEvent,
        state: &mut ShardState,
    ) -> Result<(), ActorProcessingErr> {
        let (actor, ended) = match event {
            SupervisionEvent::ActorTerminated(cell, old_state, reason) => {
                let killed = reason.as_deref() == Some("killed");
                // The old state holds the session; it goes before anything new begins.
                drop(old_state);
                (cell.get_id(), if killed { Ended::Crashed(RestartCause::Hang) } else { Ended::Normally })
            }
            SupervisionEvent::ActorFailed(cell, error) if error.is::<StoreLost>() => {
                let lost = error.downcast::<StoreLost>().map_or(StoreLost(StoreError::Closed), |lost| *lost);
                (cell.get_id(), Ended::StoreLost(lost))
            }
            SupervisionEvent::ActorFailed(cell, error) => {
                let panicked = error.to_string().contains("panic");
                (cell.get_id(), Ended::Crashed(if panicked { RestartCause::Panic } else { RestartCause::Error }))
            }
            SupervisionEvent::ActorStarted(_) | SupervisionEvent::ProcessGroupChanged(_) => return Ok(()),
        };
        state.ended(actor, ended, &myself);
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Ended {
    Normally,
    Crashed(RestartCause),
    /// The disk failed, not the number.
    StoreLost(StoreLost),
}

impl ShardState {
    async fn ensure(&mut self, member: Member, myself: &ActorRef<ShardMessage>) {
        let number = member.handle.id();
        if self.stopping || self.children.contains_key(&number) {
            return;
        }
        let child = Child {
            member,
            status: Status::Waiting,
            generation: 0,
            budget: RestartBudget::default(),
            backoff: Backoff::restart(),
        };
        self.children.insert(number, child);
        self.spawn(number, myself).await;
    }

    /// Starts the actor. Its `pre_start` does no I/O, so this takes microseconds.
    async fn spawn(&mut self, number: NumberId, myself: &ActorRef<ShardMessage>) {
        let Some(child) = self.children.get_mut(&number) else { return };
        if matches!(child.status, Status::Running { .. }) {
            return;
        }
        let arguments = Arguments {
            handle: child.member.handle.clone(),
            volume: child.member.volume,
            environment: self.environment.clone(),
        };
        match Actor::spawn_linked(None, NumberActor, arguments, myself.get_cell()).await {
            Ok((actor, _joined)) => {
                self.by_actor.insert(actor.get_id(), number);
                child.generation += 1;
                child.status = Status::Running { actor, since: self.environment.clock.now() };
            }
            // A failed pre_start is told only here.
            Err(error) => {
                tracing::error!(%number, %error, "number did not start");
                self.crashed(number, RestartCause::Error, myself);
            }
        }
    }

    fn ended(&mut self, actor: ActorId, ended: Ended, myself: &ActorRef<ShardMessage>) {
        let Some(number) = self.by_actor.remove(&actor) else { return };
        if let Some(child) = self.children.get(&number) {
            child.member.handle.set_live(None);
            match ended {
                Ended::Crashed(cause) if !self.stopping => self.crashed(number, cause, myself),
                Ended::StoreLost(lost) if !self.stopping => self.store_lost(number, &lost, myself),
                Ended::Crashed(_) | Ended::StoreLost(_) | Ended::Normally => {
                    self.children.remove(&number);
                }
            }
        }
        if self.children.is_empty()
            && let Some(done) = self.draining.take()
        {
            let _ = done.send(());
        }
    }

    fn crashed(&mut self, number: NumberId, cause: RestartCause, myself: &ActorRef<ShardMessage>) {
        let now = self.environment.clock.now();
        let Some(child) = self.children.get_mut(&number) else { return };
        if let Status::Running { since, .. } = child.status
            && now.since(since) >= WINDOW
        {
            child.budget.reset();
            child.backoff.reset();
        }
        child.status = Status::Waiting;
        child.generation += 1;
        child.member.handle.stats().restarts.add(1);
        metrics::restarted(cause);
        let pause = match child.budget.record(now) {
            Verdict::Restart => {
                let pause = child.backoff.next_delay(&self.environment.random);
                let again = now.after(pause);
                show(&child.member.handle, State::Offline { retry_at: again }, Some(again), "CRASHED", now);
                pause
            }
            Verdict::Quarantine(pause) => {
                metrics::quarantined();
                tracing::error!(%number, seconds = pause.as_secs(), "number quarantined: it crashed too often");
                show(&child.member.handle, State::Quarantined, Some(now.after(pause)), "CRASH_LOOP", now);
                pause
            }
        };
        tracing::warn!(%number, ?cause, restart_in_ms = pause.as_millis(), "number crashed");
        let (generation, myself) = (child.generation, myself.clone());
        self.timers.spawn(async move {
            tokio::time::sleep(pause).await;
            let _ = myself.cast(ShardMessage::Restart(number, generation));
        });
    }

    /// The number waits for its volume and starts again when that is open. This costs nothing of its restart budget.
    fn store_lost(&mut self, number: NumberId, lost: &StoreLost, myself: &ActorRef<ShardMessage>) {
        let now = self.environment.clock.now();
        let Some(child) = self.children.get_mut(&number) else { return };
        child.status = Status::Waiting;
        child.generation += 1;
        child.member.handle.set_lost(lost);
        // Numbers of one volume come back spread over a few seconds.
        let spread = REOPENED_SPREAD.mul_f64(self.environment.random.share()) + REOPENED_REST;
        let again = now.after(spread);
        show(&child.member.handle, State::Offline { retry_at: again }, Some(again), lost.code(), now);
        tracing::debug!(%number, %lost, "number waits for its volume");
        let (generation, volume) = (child.generation, child.member.volume);
        let (store, myself) = (self.environment.store.clone(), myself.clone());
        self.timers.spawn(async move {
            tokio::time::sleep(REOPENED_REST).await;
            store.volume_opened(volume).await;
            tokio::time::sleep(spread - REOPENED_REST).await;
            let _ = myself.cast(ShardMessage::Restart(number, generation));
        });
    }

    async fn reset(&mut self, number: NumberId, myself: &ActorRef<ShardMessage>) {
        if let Some(child) = self.children.get_mut(&number) {
            child.budget.reset();
            child.backoff.reset();
            if matches!(child.status, Status::Waiting) {
                child.generation += 1;
                self.spawn(number, myself).await;
            }
        }
    }

    fn remove(&mut self, number: NumberId, done: oneshot::Sender<()>) {
        let Some(child) = self.children.remove(&number) else {
            let _ = done.send(());
            return;
        };
        child.member.handle.set_live(None);
        let Status::Running { actor, .. } = child.status else {
            let _ = done.send(());
            return;
        };
        self.timers.spawn(async move {
            actor.stop(None);
            if actor.wait(Some(STOP_PATIENCE)).await.is_err() {
                actor.kill();
            }
            let _ = done.send(());
        });
    }

    fn watch(&self) {
        let now = self.environment.clock.monotonic();
        for child in self.children.values() {
            let Status::Running { actor, .. } = &child.status else { continue };
            if now.saturating_sub(child.member.handle.answered_at()) > WATCHDOG_PATIENCE {
                // Comes back as `killed`, which counts as a crash.
                actor.kill();
            } else {
                let _ = actor.cast(NumberMessage::Ping);
            }
        }
    }

    fn drain(&mut self, deadline: Duration, done: oneshot::Sender<()>, myself: &ActorRef<ShardMessage>) {
        self.stopping = true;
        self.children.retain(|_, child| matches!(child.status, Status::Running { .. }));
        if self.children.is_empty() {
            let _ = done.send(());
            return;
        }
        self.draining = Some(done);
        for child in self.children.values() {
            if let Status::Running { actor, .. } = &child.status {
                let _ = actor.cast(NumberMessage::Drain);
            }
        }
        let myself = myself.clone();
        self.timers.spawn(async move {
            tokio::time::sleep(deadline).await;
            let _ = myself.cast(ShardMessage::DrainOver);
        });
    }
}

/// A number without an actor must not look connected.
fn show(handle: &NumberHandle, state: State, again: Option<Timestamp>, reason: &str, now: Timestamp) {
    handle.stats().set_state(state.code(), false);
    handle.stats().let_go_of_memory();
    let attention = if state == State::Quarantined { Attention::Operator } else { Attention::None };
    handle.stats().set_attention(attention);
    handle.change_view(|view| {
        view.state = state;
        view.next_attempt = again;
        view.since = now;
        view.reason = reason.to_owned();
        view.attention = attention;
    });
}
