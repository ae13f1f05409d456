//! The root of the tree: sixteen shards. A shard that dies takes its numbers' actors with it; the root starts it
//! again and hands it its members. Too many deaths of shards in a row mean that the process itself is sick.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::directory::Directory;
use super::shard::{Member, Shard, ShardMessage};
use crate::domain::id::NumberId;
use crate::domain::time::Timestamp;
use crate::number::environment::Environment;

/// Shards: enough that a storm in one does not keep the others from answering.
pub(super) const SHARDS: usize = 16;
/// Deaths of shards within [`SHARD_DEATHS_WINDOW`] that end the process.
const SHARD_DEATHS_MAX: usize = 3;
const SHARD_DEATHS_WINDOW: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) enum RootMessage {
    Ensure(Vec<Member>),
    Remove(NumberId, oneshot::Sender<()>),
    Reset(NumberId),
    /// Answered after a round trip through every shard.
    Ping(oneshot::Sender<()>),
    Drain {
        deadline: Duration,
        done: oneshot::Sender<()>,
    },
}

#[derive(Debug)]
pub(super) struct Root {
    pub(super) environment: Arc<Environment>,
    pub(super) directory: Arc<Directory>,
}

#[derive(Debug)]
pub(super) struct RootState {
    shards: Vec<ActorRef<ShardMessage>>,
    deaths: VecDeque<Timestamp>,
    draining: bool,
    tasks: JoinSet<()>,
}

/// A shard died three times within a minute.
#[derive(Debug, thiserror::Error)]
#[error("shards keep dying")]
struct ShardsKeepDying;

/// The shard of a number. The id is random, so its low bits spread evenly.
fn shard_of(number: NumberId) -> usize {
    (number.0 % SHARDS as u64) as usize
}

impl Root {
    async fn start_shard(&self, myself: &ActorRef<RootMessage>) -> Result<ActorRef<ShardMessage>, ActorProcessingErr> {
        let shard = Shard { environment: self.environment.clone() };
        let (actor, _joined) = Actor::spawn_linked(None, shard, (), myself.get_cell()).await?;
        Ok(actor)
    }

    fn members_of(&self, shard: usize) -> Vec<Member> {
        let meta = self.environment.store.meta();
        let handles = self.directory.all().into_iter().filter(|handle| shard_of(handle.id()) == shard);
        let member = |handle: Arc<crate::number::handle::NumberHandle>| {
            let volume = meta.number(handle.id())?.volume;
            handle.set_live(None);
            Some(Member { handle, volume })
        };
        handles.filter_map(member).collect()
    }
}

impl Actor for Root {
    type Msg = RootMessage;
    type State = RootState;
    type Arguments = ();

    async fn pre_start(&self, myself: ActorRef<RootMessage>, (): ()) -> Result<RootState, ActorProcessingErr> {
        let mut shards = Vec::with_capacity(SHARDS);
        for _ in 0..SHARDS {
            shards.push(self.start_shard(&myself).await?);
        }
        Ok(RootState { shards, deaths: VecDeque::new(), draining: false, tasks: JoinSet::new() })
    }

    async fn handle(
        &self,
        _myself: ActorRef<RootMessage>,
        message: RootMessage,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RootMessage::Ensure(members) => {
                let mut by_shard: Vec<Vec<Member>> = (0..SHARDS).map(|_| Vec::new()).collect();
                for member in members {
                    by_shard[shard_of(member.handle.id())].push(member);
                }
                for (shard, members) in state.shards.iter().zip(by_shard) {
                    shard.cast(ShardMessage::Ensure(members))?;
                }
            }
            RootMessage::Remove(number, done) => {
                state.shards[shard_of(number)].cast(ShardMessage::Remove(number, done))?;
            }
            RootMessage::Reset(number) => state.shards[shard_of(number)].cast(ShardMessage::Reset(number))?,
            RootMessage::Ping(reply) => {
                let answers = state.shards.iter().map(|shard| {
                    let (answer, wait) = oneshot::channel();
                    shard.cast(ShardMessage::Ping(answer)).map(|()| wait)
                });
                let answers = answers.collect::<Result<Vec<_>, _>>()?;
                while state.tasks.try_join_next().is_some() {}
                state.tasks.spawn(async move {
                    for wait in answers {
                        if wait.await.is_err() {
                            return;
                        }
                    }
                    let _ = reply.send(());
                });
            }
            RootMessage::Drain { deadline, done } => {
                state.draining = true;
                drain(state, deadline, done)?;
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<RootMessage>,
        event: SupervisionEvent,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        let dead = match event {
            SupervisionEvent::ActorTerminated(cell, old_state, _) => {
                drop(old_state);
                cell
            }
            SupervisionEvent::ActorFailed(cell, _) => cell,
            SupervisionEvent::ActorStarted(_) | SupervisionEvent::ProcessGroupChanged(_) => return Ok(()),
        };
        let Some(index) = state.shards.iter().position(|shard| shard.get_id() == dead.get_id()) else {
            return Ok(());
        };
        if state.draining {
            return Ok(());
        }
        let now = self.environment.clock.now();
        state.deaths.retain(|death| now.since(*death) < SHARD_DEATHS_WINDOW);
        state.deaths.push_back(now);
        if state.deaths.len() > SHARD_DEATHS_MAX {
            return Err(ShardsKeepDying.into());
        }
        tracing::error!(shard = index, "shard died, starting it again");
        state.shards[index] = self.start_shard(&myself).await?;
        state.shards[index].cast(ShardMessage::Ensure(self.members_of(index)))?;
        Ok(())
    }
}

fn drain(state: &mut RootState, deadline: Duration, done: oneshot::Sender<()>) -> Result<(), ActorProcessingErr> {
    let mut finished = Vec::with_capacity(state.shards.len());
    for shard in &state.shards {
        let (done, wait) = oneshot::channel();
        shard.cast(ShardMessage::Drain { deadline, done })?;
        finished.push(wait);
    }
    // The caller holds the other end and gives up by itself; the shards bound the wait.
    state.tasks.spawn(async move {
        for wait in finished {
            let _ = wait.await;
        }
        let _ = done.send(());
    });
    Ok(())
}
