//! Performs what the machine decided, each effect in one place; the only tap for the number's metrics and logs.

use ractor::ActorRef;

use super::actor::{Connection, Loaded, NumberState};
use super::crossing::Crossing;
use super::deliver::DeliveryTask;
use super::message::{
    Accepted, ConnectionNo, EndpointRefused, EraseRefused, FromSession, Inner, NumberMessage, SendRefused, Unserved,
    Waiter,
};
use super::session_pump::SessionPump;
use crate::domain::close::CloseReason;
use crate::domain::delivery::{Dispatch, LoadPage, LoadReplay, REPLAY_READ, WINDOW_MAX};
use crate::domain::event::Event;
use crate::domain::gate::{Outcome, Priority};
use crate::domain::id::MessageSeq;
use crate::domain::lifecycle::{self, Purpose, State};
use crate::domain::message::Content;
use crate::domain::number::{Commit, Counted, Effect, Reply, ReplyId, Transmit};
use crate::domain::retention::Sweep;
use crate::session::contract::{Outgoing, SendError, SessionCommand};
use crate::session::opener::OpenPurpose;
use crate::store::error::StoreError;
use crate::store::number_store::NumberStore;
use crate::telemetry::failpoint::{self, Failpoint};
use crate::telemetry::metrics;

impl NumberState {
    pub(super) fn perform_one(&mut self, effect: Effect, myself: &ActorRef<NumberMessage>) {
        match effect {
            Effect::Commit(commit) => self.commit(commit, myself),
            Effect::Life(effect) => self.perform_life(effect, myself),
            Effect::Transmit(transmit) => self.transmit(transmit, myself),
            Effect::AskLock => {
                if let Connection::Open { commands, .. } = &self.connection {
                    // Not asked for want of room: the hold then lasts as long as it does by default.
                    let _ = commands.try_send(SessionCommand::AskLock);
                }
            }
            Effect::Reply(reply, answer) => self.reply(reply, answer),
            Effect::ReplyFromRecord(reply, key, body) => {
                let Some(Loaded { store, .. }) = &self.loaded else { return };
                let (store, actor) = (store.clone(), myself.clone());
                self.tasks.spawn(async move {
                    let record = store.idempotency(key).await;
                    let _ = actor.cast(Inner::Record(reply, body, record).into());
                });
            }
            Effect::Deliver(outgoing) => self.deliver(outgoing, myself),
            Effect::LoadPage(page) => self.load_page(page, myself),
            Effect::LoadReplay(load) => self.load_replay(load, myself),
            Effect::EventsVisible(seq) => self.handle.events_visible(seq),
            Effect::EventFloor(seq) => self.handle.events_begin_after(seq),
            Effect::Sweep(sweep) => self.sweep(sweep, myself),
            Effect::StateChanged { from, to } => self.state_changed(from, to),
            Effect::Count(counted) => self.count(counted),
            Effect::Drained => self.drained(myself),
        }
    }

    fn commit(&self, commit: Commit, myself: &ActorRef<NumberMessage>) {
        let Some(Loaded { store, .. }) = &self.loaded else { return };
        let (ticket, actor, crossing) = (commit.ticket, myself.clone(), Crossing::of(&commit));
        let unit = store.unit_of(commit);
        crossing.before();
        store.submit(unit, move |outcome| {
            if outcome.is_ok() {
                crossing.after();
            }
            let _ = actor.cast(Inner::Stored(ticket, outcome).into());
        });
    }

    fn perform_life(&mut self, effect: lifecycle::Effect, myself: &ActorRef<NumberMessage>) {
        match effect {
            lifecycle::Effect::AskGate => self.ask_gate(myself),
            lifecycle::Effect::LeaveGate => {
                self.turn = None;
                self.asked = None;
                self.through = None;
                self.environment.gate.leave(self.handle.id());
            }
            lifecycle::Effect::Open(purpose) => self.open(purpose, myself),
            lifecycle::Effect::Close => self.close_connection(myself),
            lifecycle::Effect::ResetBackoff => self.backoff.reset(),
        }
    }

    pub(super) fn ask_gate(&mut self, myself: &ActorRef<NumberMessage>) {
        let Some(Loaded { number, .. }) = &self.loaded else { return };
        let priority = if number.purpose() == Purpose::Pair {
            Priority::Person
        } else if matches!(self.last_attempt, Some(Outcome::Failed | Outcome::Outdated)) {
            Priority::Failed
        } else if !number.outbox().is_empty() {
            Priority::Waiting
        } else {
            Priority::Normal
        };
        let purpose = number.purpose();
        self.asked = Some(priority);
        if purpose == Purpose::Connect && !self.may_use_way(myself) {
            let _ = myself.cast(Inner::WayClosed.into());
            return;
        }
        let actor = myself.clone();
        let granted = Box::new(move |turn| drop(actor.cast(Inner::Granted(turn).into())));
        self.environment.gate.ask(self.handle.id(), priority, granted);
    }

    fn open(&mut self, purpose: Purpose, myself: &ActorRef<NumberMessage>) {
        let Some(Loaded { store, .. }) = &self.loaded else { return };
        let store = store.clone();
        let no = ConnectionNo(self.next_connection);
        self.next_connection += 1;
        let purpose = match purpose {
            Purpose::Pair => OpenPurpose::Pair { expected: self.handle.phone().clone(), by: self.link_by },
            Purpose::Connect => OpenPurpose::Connect,
        };
        let proxy = self.proxy();
        self.go_through(proxy.as_ref());
        let pump = SessionPump {
            actor: myself.clone(),
            connection: no,
            store,
            opener: self.environment.opener.clone(),
            slot: self.handle.slot().clone(),
            proxy,
            purpose,
            span: self.span.clone(),
        };
        self.tasks.spawn(pump.run());
        self.connection = Connection::Opening { no, close_wanted: false };
    }

    /// Asks the session to close; without one, reports at once that there is none.
    pub(super) fn close_connection(&mut self, myself: &ActorRef<NumberMessage>) {
        match &mut self.connection {
            Connection::None => {
                // Comes back through the mailbox: the machine is in the middle of a step.
                let no = ConnectionNo(self.next_connection);
                self.next_connection += 1;
                self.connection = Connection::Opening { no, close_wanted: true };
                let closed = FromSession::Closed(CloseReason::Requested);
                let _ = myself.cast(Inner::Session(no, closed, None).into());
            }
            Connection::Opening { close_wanted, .. } => *close_wanted = true,
            Connection::Open { commands, .. } => {
                if let Err(tokio::sync::mpsc::error::TrySendError::Full(_)) = commands.try_send(SessionCommand::Close) {
                    // A full queue cannot take the order; dropping the sender says the same.
                    let (closed, _) = tokio::sync::mpsc::channel(1);
                    *commands = closed;
                }
            }
        }
    }

    fn transmit(&mut self, transmit: Transmit, myself: &ActorRef<NumberMessage>) {
        let Some(Loaded { store, .. }) = &self.loaded else { return };
        let Connection::Open { no, commands } = &self.connection else {
            return;
        };
        let (no, commands, actor, seq) = (*no, commands.clone(), myself.clone(), transmit.seq);
        let not_written = move |error| {
            let _ = actor.cast(Inner::Session(no, FromSession::NotWritten { seq, error }, None).into());
        };
        let Transmit { whatsapp_id, to, devices, .. } = transmit;
        let outgoing = move |content| Outgoing { seq, whatsapp_id, to, content, devices };
        if let Some(content) = transmit.content {
            if commands.try_send(SessionCommand::Send(Box::new(outgoing(content)))).is_err() {
                not_written(SendError::Offline);
            }
            return;
        }
        let store = store.clone();
        self.tasks.spawn(async move {
            let error = match said(&store, seq).await {
                Ok(Some(content)) => match commands.try_send(SessionCommand::Send(Box::new(outgoing(content)))) {
                    Ok(()) => return,
                    Err(_) => SendError::Offline,
                },
                Ok(None) => SendError::Invalid,
                Err(_) => SendError::StoreFailed,
            };
            not_written(error);
        });
    }

    fn reply(&mut self, reply: ReplyId, answer: Reply) {
        // A caller that went away left nobody to tell; what was done for it stands.
        match (self.waiters.remove(&reply), answer) {
            (Some(Waiter::Send(to, _permit)), answer) => {
                let outcome = match answer {
                    Reply::Accepted { seq, created_at, predicted_wait } => {
                        metrics::accepted(self.environment.clock.now().since(created_at));
                        Ok(Accepted { seq, created_at, predicted_wait })
                    }
                    Reply::QueueFull => Err(SendRefused::QueueFull),
                    Reply::WaitTooLong { wait, limiting } => Err(SendRefused::WaitTooLong { wait, limiting }),
                    Reply::Draining => Err(SendRefused::Draining),
                    _ => Err(Unserved::NotReady.into()),
                };
                failpoint::reach(Failpoint::AcceptBeforeReply);
                let _ = to.send(outcome);
                failpoint::reach(Failpoint::AcceptAfterReply);
            }
            (Some(Waiter::AddEndpoint(to)), Reply::EndpointAdded(endpoint)) => drop(to.send(Ok(*endpoint))),
            (Some(Waiter::AddEndpoint(to)), _) => drop(to.send(Err(EndpointRefused::TooMany))),
            (Some(Waiter::RemoveEndpoint(to)), Reply::EndpointRemoved) => drop(to.send(Ok(()))),
            (Some(Waiter::RemoveEndpoint(to)), _) => drop(to.send(Err(EndpointRefused::NotFound))),
            (Some(Waiter::ChangeEndpoint(to)), Reply::EndpointChanged(endpoint)) => drop(to.send(Ok(*endpoint))),
            (Some(Waiter::ChangeEndpoint(to)), Reply::ReplayBusy) => drop(to.send(Err(EndpointRefused::ReplayBusy))),
            (Some(Waiter::ChangeEndpoint(to)), _) => drop(to.send(Err(EndpointRefused::NotFound))),
            (Some(Waiter::Inbound(to)), _) => drop(to.send(())),
            (Some(Waiter::Cancel(to)), Reply::Cancelled(outcomes)) => drop(to.send(outcomes)),
            (Some(Waiter::Cancel(_)), _) => {}
            (Some(Waiter::Erase(to)), answer) => {
                let _ = to.send(match answer {
                    Reply::EraseBegun => Ok(()),
                    Reply::ContactBusy => Err(EraseRefused::InFlight),
                    Reply::QueueFull => Err(EraseRefused::TooMany),
                    _ => Err(Unserved::NotReady.into()),
                });
            }
            (None, _) => {}
        }
    }

    fn deliver(&mut self, outgoing: Dispatch, myself: &ActorRef<NumberMessage>) {
        let Some(Loaded { number, store }) = &self.loaded else { return };
        let Some(endpoint) = number.deliveries().endpoint(outgoing.endpoint).cloned() else { return };
        let task = DeliveryTask {
            actor: myself.clone(),
            environment: self.environment.clone(),
            store: store.clone(),
            own: self.handle.phone().clone(),
            endpoint,
            outgoing,
        };
        self.deliveries.spawn(task.run());
    }

    fn load_page(&mut self, page: LoadPage, myself: &ActorRef<NumberMessage>) {
        let Some(Loaded { store, .. }) = &self.loaded else { return };
        let (store, actor) = (store.clone(), myself.clone());
        self.tasks.spawn(async move {
            let rows = store.deliveries(page.endpoint, page.after, WINDOW_MAX / 2).await;
            let _ = actor.cast(Inner::PageLoaded(page.endpoint, rows).into());
        });
    }

    /// Looks for what is too old; a few numbers of the process at a time.
    fn sweep(&mut self, sweep: Sweep, myself: &ActorRef<NumberMessage>) {
        let Some(Loaded { store, .. }) = &self.loaded else { return };
        let (store, actor, turns) = (store.clone(), myself.clone(), self.environment.sweeps.clone());
        self.tasks.spawn(async move {
            let Ok(_turn) = turns.acquire().await else { return };
            let found = store.find(sweep).await;
            let _ = actor.cast(Inner::Swept(Box::new(found)).into());
        });
    }

    fn load_replay(&mut self, load: LoadReplay, myself: &ActorRef<NumberMessage>) {
        let Some(Loaded { store, .. }) = &self.loaded else { return };
        let (store, actor) = (store.clone(), myself.clone());
        self.tasks.spawn(async move {
            let events = store.events(load.replay.after, REPLAY_READ).await;
            let logged = events.map(|events| events.iter().map(Event::logged).collect());
            let _ = actor.cast(Inner::ReplayLoaded(load.endpoint, logged).into());
        });
    }

    fn state_changed(&self, from: State, to: State) {
        let reason = self.loaded.as_ref().map_or("", |loaded| loaded.number.life().reason.as_str());
        tracing::info!(from = from.name(), to = to.name(), reason, "state");
    }

    fn count(&self, counted: Counted) {
        let stats = self.handle.stats();
        match counted {
            Counted::Sent(after) => {
                stats.sent.add(1);
                metrics::acknowledged(after);
            }
            Counted::Received(count) => stats.received.add(count),
            Counted::Failed(code) => {
                stats.failed.add(1);
                tracing::info!(code = code.name(), "message failed");
            }
            Counted::Resent => metrics::resent(),
            Counted::Swept(count) => metrics::swept_rows(count),
            Counted::SweepPassed => metrics::sweep_passed(),
            Counted::DeadLetter(reason) => metrics::webhook_dead_letter(reason.code()),
            Counted::SetAside => metrics::webhook_set_aside(),
            Counted::EndpointDisabled(endpoint, reason) => {
                metrics::webhook_disabled(reason.code());
                tracing::warn!(endpoint, reason = reason.code(), "webhook disabled");
            }
            Counted::Held(reason) => {
                tracing::warn!(reason = reason.name(), "whatsapp refuses new chats: they are held");
            }
            Counted::ContactErased => metrics::contact_erased(),
        }
    }

    /// Nothing waits for an answer any more: close the session, let the deliveries under way finish, then end.
    fn drained(&mut self, myself: &ActorRef<NumberMessage>) {
        match &self.connection {
            Connection::Open { .. } | Connection::Opening { close_wanted: false, .. } => self.close_connection(myself),
            Connection::Opening { close_wanted: true, .. } => {}
            Connection::None if self.deliveries.is_empty() => myself.stop(None),
            Connection::None => {
                // Looked at again with each delivery that ends, and once more a little later.
                let actor = myself.clone();
                self.tasks.spawn(async move {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    let _ = actor.cast(Inner::Wake.into());
                });
            }
        }
    }
}

/// What a send says: by its history row, or beside its outbox row where the history keeps nothing.
async fn said(store: &NumberStore, seq: MessageSeq) -> Result<Option<Content>, StoreError> {
    match store.message(seq).await? {
        Some(record) if record.content != Content::NotKept => Ok(Some(record.content)),
        _ => store.body(seq).await,
    }
}
